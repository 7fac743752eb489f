"""How one pass of a layer is called, on our kernels and on PyTorch's: a table of operations, each pass timed alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .cases import DTYPES, Case, conv_problem, shape_of
from .network_calls import network_call
from .networks import Shape

Tensors = dict[str, torch.Tensor]
Call = Callable[[], torch.Tensor]
Side = Literal["ours", "torch"]
PRODUCT_PASSES = ("fprop", "dgrad", "wgrad")
CLASSES = 10  # labels that every network has
RANDOM = ("dropout",)
"""Operations whose result differs from call to call."""
OVER_BATCH = ("cross_entropy",)
"""Operations whose result is a sum over the images, or a tensor that does not begin with them."""


class Unsupported(ValueError):
    """A pass that a provider does not have; the message says which."""


def api_of(side: Side) -> Any:
    """The module whose functions a side's forward passes are."""
    from tileconv.kernels import functional

    return functional if side == "ours" else F


# Forward passes: (functional, module, tensors, what only ours takes) -> output, in torch.nn.functional's signatures.
Forward = Callable[[Any, Any, Tensors, dict[str, Any]], torch.Tensor]


def _conv(api: Any, m: Any, t: Tensors, extra: dict[str, Any]) -> Any:
    return api.conv2d(t["x"], t["w"], t.get("b"), m.stride, m.padding, m.dilation, m.groups, **extra)


def _conv_pool(api: Any, m: Any, t: Tensors, _: dict[str, Any]) -> torch.Tensor:
    """Ours is one call; PyTorch's are three, the ReLU in place."""
    if api is F:
        y = F.conv2d(t["x"], t["w"], t.get("b"), m.stride, m.padding, m.dilation, m.groups).relu_()
        pooled: torch.Tensor = F.max_pool2d(y, *m.pool)
        return pooled
    names = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode")
    window = dict(zip(names, m.pool, strict=True))
    out: torch.Tensor = api.conv2d_max_pool2d(
        t["x"], t["w"], t.get("b"), m.stride, m.padding, m.dilation, m.groups, **window
    )
    return out


def _conv1d(api: Any, m: Any, t: Tensors, extra: dict[str, Any]) -> Any:
    return api.conv1d(t["x"], t["w"], t.get("b"), m.stride, m.padding, m.dilation, m.groups, **extra)


def _transposed(api: Any, m: Any, t: Tensors, extra: dict[str, Any]) -> Any:
    more = (m.stride, m.padding, m.output_padding, m.groups, m.dilation)
    return api.conv_transpose2d(t["x"], t["w"], t.get("b"), *more, **extra)


def _im2col(api: Any, m: Any, t: Tensors, extra: dict[str, Any]) -> Any:
    function = api.conv2d if api is F else api.conv2d_im2col
    return function(t["x"], t["w"], t.get("b"), m.stride, m.padding, m.dilation, m.groups, **extra)


def _local(api: Any, m: Any, t: Tensors, extra: dict[str, Any]) -> Any:
    """PyTorch has no such layer: its side unfolds and multiplies pixel by pixel, as its users do."""
    x, w, b = t["x"], t["w"], t.get("b")
    if api is not F:
        return api.locally_connected2d(x, w, b, m.stride, m.padding, m.dilation)
    p, q, k = w.shape[:3]
    cols = F.unfold(x, w.shape[4:], m.dilation, m.padding, m.stride)  # [N, C * R * S, P * Q]
    y = torch.bmm(w.reshape(p * q, k, -1), cols.permute(2, 1, 0))  # [P * Q, K, N]
    y = y.permute(2, 1, 0).reshape(x.shape[0], k, p, q)
    return y if b is None else y + (b[:, None, None] if b.dim() == 1 else b)


FORWARDS: Mapping[str, Forward] = {
    "conv2d": _conv,
    "conv2d_max_pool2d": _conv_pool,
    "conv1d": _conv1d,
    "conv_transpose2d": _transposed,
    "conv2d_im2col": _im2col,
    "locally_connected2d": _local,
    "linear": lambda api, m, t, extra: api.linear(t["x"], t["w"], t.get("b"), **extra),
    "max_pool2d": lambda api, m, t, _: api.max_pool2d(
        t["x"], m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode
    ),
    "avg_pool2d": lambda api, m, t, _: api.avg_pool2d(
        t["x"], m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad
    ),
    "lp_pool2d": lambda api, m, t, _: api.lp_pool2d(t["x"], m.norm_type, m.kernel_size, m.stride, m.ceil_mode),
    "adaptive_avg_pool2d": lambda api, m, t, _: api.adaptive_avg_pool2d(t["x"], m.output_size),
    "adaptive_max_pool2d": lambda api, m, t, _: api.adaptive_max_pool2d(t["x"], m.output_size),
    "max_unpool2d": lambda api, m, t, _: api.max_unpool2d(t["x"], t["indices"], m.kernel_size, m.stride, m.padding),
    "local_response_norm": lambda api, m, t, _: api.local_response_norm(t["x"], m.size, m.alpha, m.beta, m.k),
    "relu": lambda api, m, t, _: api.relu(t["x"]),
    "dropout": lambda api, m, t, _: api.dropout(t["x"], m.p, True),
    "softmax": lambda api, m, t, _: api.softmax(t["x"], m.dim),
    "log_softmax": lambda api, m, t, _: api.log_softmax(t["x"], m.dim),
    "cross_entropy": lambda api, m, t, _: api.cross_entropy(
        t["x"], t["target"], label_smoothing=getattr(m, "label_smoothing", 0.0)
    ),
    "unfold": lambda api, m, t, _: api.unfold(t["x"], m.kernel_size, m.dilation, m.padding, m.stride),
    "fold": lambda api, m, t, _: api.fold(t["x"], m.output_size, m.kernel_size, m.dilation, m.padding, m.stride),
}  # fmt: skip


def forward(side: Side, shape: Shape, t: Tensors, *, activation: bool = True) -> torch.Tensor:
    """One forward call: bias and ReLU fused on our side, a ReLU in place behind PyTorch's."""
    run = known_op(shape)
    wanted = shape.activation if activation else None
    extra = {"activation": wanted} if side == "ours" and wanted else {}
    y = run(api_of(side), shape.module, t, extra)
    return y.relu_() if wanted == "relu" and side == "torch" else y


def known_op(shape: Shape) -> Forward:
    """The forward function of a layer's operation. Raises Unsupported for one that is not in the table."""
    if shape.op not in FORWARDS:
        raise Unsupported(f"{shape.op} has no entry in the table of calls")
    return FORWARDS[shape.op]


def work(side: Side, case: Case, shape: Shape, t: Tensors) -> Call:
    """A call that computes one pass of a case and nothing beside it, ready to be repeated.

    What a backward pass needs from the forward pass is made here, outside the call. Raises Unsupported.
    """
    if shape.op == "network":
        found: Call = network_call(side == "ours", shape, case.pass_, t)
        return found
    if case.pass_ in ("fprop", "forward"):
        return lambda: forward(side, shape, t)
    direct = DIRECT.get((shape.op, case.pass_))
    if direct is not None:
        try:
            return direct(side, case, shape, t)
        except Unsupported:
            pass  # through autograd, then
    if case.pass_ == "backward" and "w" in t:
        return _epilogue_backward(side, shape, t)
    return _through_autograd(side, shape, t, "w" if case.pass_ == "wgrad" else "x")


def _through_autograd(side: Side, shape: Shape, t: Tensors, wanted: str) -> Call:
    """Autograd's way to one gradient: the kernels of that pass, and the engine's work on the host."""
    with torch.enable_grad():
        leaf = t[wanted].detach().requires_grad_()
        operands = {name: value for name, value in t.items() if name != "b"} | {wanted: leaf}
        y = forward(side, shape, operands, activation=False)
    dy = t["dy"]
    return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]


def _epilogue_backward(side: Side, shape: Shape, t: Tensors) -> Call:
    """What precedes dgrad and wgrad, in one call: ReLU's gradient and the bias's; returns the latter if there is one.

    A locally connected layer may have a bias for every pixel, whose gradient is a sum over images alone.
    """
    dy, y, masks, b = t["dy"], t["y"], shape.activation is not None, t.get("b")
    if side == "torch":
        axes = [0] if b is not None and b.dim() > 1 else [axis for axis in range(dy.dim()) if axis != 1]
        if b is None:
            return lambda: torch.ops.aten.threshold_backward(dy, y, 0)
        return lambda: (torch.ops.aten.threshold_backward(dy, y, 0) if masks else dy).sum(axes)
    ops = torch.ops.tileconv
    if b is None:
        return lambda: ops.relu_backward(dy, y)
    if b.dim() > 1:
        columns = dy.contiguous().reshape(dy.shape[0], -1, 1, 1)
        return lambda: ops.bias_grad(columns).view(b.shape)
    dy, y = (value[(..., *[None] * (4 - value.dim()))] for value in (dy, y))
    return lambda: ops.relu_bias_grad(dy, y)[1] if masks else ops.bias_grad(dy)


def _symmetric(problem: Any) -> list[int]:
    """aten's padding. Raises Unsupported where the two sides of an axis differ."""
    if any(before != after for before, after in problem.padding):
        raise Unsupported(f"aten.convolution_backward has no padding {problem.padding}")
    return [before for before, _ in problem.padding]


def _conv_grad(side: Side, case: Case, shape: Shape, t: Tensors) -> Call:
    p = conv_problem(shape)
    x, w, dy, first = t["x"], t["w"], t["dy"], case.pass_ == "dgrad"
    if side == "torch":
        padding = _symmetric(p)
        wanted = [first, not first, False]
        more = ([*p.stride], padding, [*p.dilation], False, [0, 0], p.groups, wanted)
        return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *more)[0 if first else 1]
    from tileconv.kernels import layout

    edges = [edge for pair in p.padding for edge in pair]
    geometry = ([*p.stride], edges, [*p.dilation], p.groups, case.precision)
    ops = torch.ops.tileconv
    if first:
        nhwc = layout.is_channels_last(x) or layout.is_channels_last(w)
        return lambda: ops.conv2d_dgrad(dy, w, x.shape, *geometry, nhwc)
    return lambda: ops.conv2d_wgrad(dy, x, w.shape, *geometry)


def _linear_grad(side: Side, case: Case, shape: Shape, t: Tensors) -> Call:
    x, w, dy = t["x"], t["w"], t["dy"]
    if side == "torch":
        return (lambda: dy @ w) if case.pass_ == "dgrad" else (lambda: dy.mT @ x)
    call = _conv_grad(side, case, shape, {name: t[name][:, :, None, None] for name in ("x", "w", "dy")})
    return lambda: call().flatten(1)


def _max_pool_grad(side: Side, case: Case, shape: Shape, t: Tensors) -> Call:
    m: Any = shape.module
    x, dy = t["x"], t["dy"]
    window = [_pair(value) for value in (m.kernel_size, m.stride, m.padding, m.dilation)]
    if side == "torch":
        _, indices = torch.ops.aten.max_pool2d_with_indices(x, *window, m.ceil_mode)
        return lambda: torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *window, m.ceil_mode, indices)
    from tileconv.kernels import layout

    ops, nhwc = torch.ops.tileconv, layout.is_channels_last(x)
    _, switch = ops.max_pool2d(x, *window, m.ceil_mode, None, True, nhwc)
    return lambda: ops.max_pool2d_backward(dy, switch, None, x.shape, *window, m.ceil_mode, nhwc)


def _adaptive_avg_grad(side: Side, case: Case, shape: Shape, t: Tensors) -> Call:
    x, dy = t["x"], t["dy"]
    if side == "torch":
        return lambda: torch.ops.aten._adaptive_avg_pool2d_backward(dy, x)
    from tileconv.kernels import layout

    nhwc = layout.is_channels_last(x)
    return lambda: torch.ops.tileconv.adaptive_avg_pool2d_backward(dy, x.shape, nhwc)


Direct = Callable[[Side, Case, Shape, Tensors], Call]
DIRECT: Mapping[tuple[str, str], Direct] = {
    ("conv2d", "dgrad"): _conv_grad,
    ("conv2d", "wgrad"): _conv_grad,
    ("linear", "dgrad"): _linear_grad,
    ("linear", "wgrad"): _linear_grad,
    ("max_pool2d", "backward"): _max_pool_grad,
    ("adaptive_avg_pool2d", "backward"): _adaptive_avg_grad,
}
"""Passes that are called without autograd's engine in between; the others go through it."""


def im2col(case: Case, shape: Shape, t: Tensors) -> Call:
    """The textbook's forward pass: unfold, then a matrix product a group. Raises Unsupported beside fprop of conv2d."""
    m: Any = shape.module
    if shape.op != "conv2d" or case.pass_ != "fprop" or isinstance(m.padding, str):
        raise Unsupported(f"im2col computes fprop of conv2d, not {case.pass_} of {shape.op}")
    x, w, b = t["x"], t["w"], t.get("b")
    extents = (x.shape[0], *conv_problem(shape).y_shape[1:])

    def run() -> torch.Tensor:
        cols = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).unflatten(1, (m.groups, -1))
        y: torch.Tensor = (w.reshape(m.groups, w.shape[0] // m.groups, -1) @ cols).reshape(extents)
        y = y if b is None else y.add_(b[:, None, None])
        return y.relu_() if shape.activation == "relu" else y

    return run


# Operands


def operands(case: Case, device: str) -> Tensors:
    """`operands_of` the layer that a case names."""
    return operands_of(shape_of(case), case, device)


def operands_of(shape: Shape, case: Case, device: str) -> Tensors:
    """Random operands of a case, contiguous: normal, weights scaled so that outputs stay near one; never zeros.

    x, w and b where the layer has them, dy (the output's gradient) and y (an output behind a ReLU) for the passes that
    read them, indices and target for the operations that do.
    """
    dtype = DTYPES[case.dtype]
    m: Any = shape.module
    generator = torch.Generator(device).manual_seed(0)

    def normal(extents: Any) -> torch.Tensor:
        return torch.randn(tuple(extents), generator=generator, device=device).to(dtype)

    found: Tensors = {"x": normal(shape.input)}
    if shape.op == "network":
        found["target"] = torch.randint(CLASSES, shape.input[:1], generator=generator, device=device)
        return found
    if shape.op == "lp_pool2d":
        found["x"] = found["x"].abs() + 0.125  # roots of sums with signs are NaN
    if isinstance(getattr(m, "weight", None), torch.Tensor) and shape.op != "cross_entropy":
        w = torch.randn(m.weight.shape, generator=generator, device=device)
        fan = math.prod(w.shape[3:] if w.dim() == 6 else w.shape[1:])
        found["w"] = (w / fan**0.5).to(dtype)
        if m.bias is not None:
            found["b"] = normal(m.bias.shape)
    if shape.op == "max_unpool2d":
        found["indices"] = _distinct(shape, generator, device)
    if shape.op == "cross_entropy":
        labels = (shape.input[0], *shape.input[2:])
        found["target"] = torch.randint(shape.input[1], labels, generator=generator, device=device)
    if case.pass_ not in ("fprop", "forward"):
        extents = output_extents(shape, found)
        found["dy"] = normal(extents) if extents else torch.ones((), device=device, dtype=dtype)
        if case.pass_ == "backward" and "w" in found:
            found["y"] = normal(extents).relu_()
    return found


def output_extents(shape: Shape, t: Tensors) -> tuple[int, ...]:
    """The output's shape, from PyTorch's own rule on meta tensors."""
    meta = {name: torch.empty_like(value, device="meta") for name, value in t.items()}
    return tuple(forward("torch", shape, meta, activation=False).shape)


def _distinct(shape: Shape, generator: torch.Generator, device: str) -> torch.Tensor:
    """Indices for max_unpool2d, no two alike in a plane: where two are, the result depends on who writes last."""
    m: Any = shape.module
    n, c, p, q = shape.input
    kernel, stride, padding = _pair(m.kernel_size), _pair(m.stride), _pair(m.padding)
    h, w = ((e - 1) * s - 2 * a + k for e, s, a, k in zip((p, q), stride, padding, kernel, strict=True))
    order = torch.randperm(h * w, generator=generator, device=device)[: p * q]
    planes = torch.arange(n * c, device=device)[:, None]
    return ((order + planes) % (h * w)).reshape(n, c, p, q)


def placed(t: Tensors, shape: Shape, memory_format: str) -> Tensors:
    """A copy of the operands in a memory format: "native" is channels_last but for the images that a network reads.

    Filters of locally connected layers are copied as those layers keep them, P Q K R S C in memory.
    """
    found = {}
    for name, value in t.items():
        last = memory_format == "channels_last" or (
            memory_format == "native" and not (name == "x" and shape.reads_image)
        )
        if value.dim() == 6:
            value = value.permute(0, 1, 2, 4, 5, 3).contiguous().permute(0, 1, 2, 5, 3, 4).clone()
        elif value.dim() == 4:
            value = value.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
        else:
            value = value.clone()
        found[name] = value
    return found


def first_image(t: Tensors) -> Tensors:
    """The operands of the first image alone: activations and what lies with them cut, parameters whole."""
    return {name: value if name in ("w", "b") else value[:1] for name, value in t.items()}


def stands_alone(case: Case, shape: Shape, t: Tensors) -> bool:
    """Whether the first image alone has a result to compare: sums over the images have none, and what is drawn."""
    summed = case.pass_ in ("wgrad", "step") or (case.pass_ == "backward" and "w" in t)
    return not summed and shape.op not in (*OVER_BATCH, *RANDOM) and t["x"].shape[0] >= 2


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value]
