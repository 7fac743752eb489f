"""The launches that one pass of a layer makes, on meta tensors: planned as the operators plan them, and not run.

Activations and convolution weights are channels_last, the native layout, or contiguous; the images that a network reads
are contiguous, as data loaders give them. Forward max-pools write switches, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .networks import Shape
from .problems import conv_pool_problem, conv_problem, has_bias, output_shape, pool_problem


@dataclass(frozen=True)
class Setting:
    """What is planned for: element type, precision of 4-byte products, GPU (kernels.hardware.GPU), images' layout."""

    dtype: torch.dtype
    precision: str
    gpu: Any
    channels_last: bool = True

    def empty(self, *extents: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A meta tensor, an image in the memory format."""
        images = torch.channels_last if self.channels_last and len(extents) == 4 else torch.contiguous_format
        return torch.empty(extents, dtype=dtype or self.dtype, device="meta", memory_format=images)

    def gradient(self, weight: torch.Tensor) -> torch.Tensor:
        """Of a convolution's weight, channels_last as its operator makes it."""
        return torch.empty_like(weight, memory_format=torch.channels_last)

    def operand(self, op: str, extents: tuple[int, ...]) -> torch.Tensor:
        """What a convolution takes for an operand of `op`: linear and conv1d bring no image, and make one of theirs.

        What they lack is an axis of one element, whose pitch the compiler specialises a kernel for like any other.
        """
        if op == "linear":
            return self.empty(*extents[:2])[:, :, None, None]
        if op == "conv1d":
            return self.empty(extents[0], extents[1], extents[3]).unsqueeze(-2)
        return self.empty(*extents)


def plan(shape: Shape, pass_: str, setting: Setting) -> list[Any]:
    """The launches of a pass that the layer has (cases.passes_of)."""
    return PLANS[shape.op](shape, pass_, setting)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    from tileconv.kernels import layout

    return layout.flat(tensor)


def _seed(s: Setting) -> torch.Tensor:
    return s.empty(1, dtype=torch.int64)


def _dropout(x: torch.Tensor, p: float, s: Setting) -> Any:
    from tileconv.kernels.launch import pointwise

    return pointwise.plan_dropout(_flat(x), _flat(x), _seed(s), p, gpu=s.gpu)


def _epilogue_backward(shape: Shape, y: torch.Tensor, s: Setting) -> list[Any]:
    """What precedes dgrad and wgrad: the gradients of dropout, of ReLU and of the bias."""
    from tileconv.kernels.launch import pointwise

    launches, dropout = [], shape.dropout
    if dropout and not shape.activation:  # a ReLU's gradient is also that of the dropout behind it
        launches, dropout = [_dropout(y, dropout, s)], 0.0
    output, masked = (y, torch.empty_like(y)) if shape.activation else (None, None)
    if has_bias(shape):
        launches += pointwise.plan_bias_backward(y, output, masked, s.empty(y.shape[1]), dropout, gpu=s.gpu)
    elif masked is not None:
        row = _flat(y)[None, :]
        launches.append(pointwise.plan_relu_backward(row, row, row, dropout, gpu=s.gpu))
    return launches


def _conv(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    from tileconv.kernels.launch import conv

    problem = conv_problem(shape)
    x, w, y = (s.operand(shape.op, extents) for extents in (problem.x_shape, problem.w_shape, problem.y_shape))
    if shape.reads_image:
        x = x.contiguous()
    planned: list[Any]
    if pass_ == "fprop":
        bias = s.empty(problem.K) if has_bias(shape) else None
        planned = conv.plan_fprop(
            problem, x, w, bias, y, _seed(s) if shape.dropout else None, gpu=s.gpu, activation=shape.activation,
            precision=s.precision, dropout=shape.dropout,
        )  # fmt: skip
    elif pass_ == "dgrad":
        planned = conv.plan_dgrad(problem, y, w, x, gpu=s.gpu, precision=s.precision)
    elif pass_ == "wgrad":
        planned = conv.plan_wgrad(problem, y, x, s.gradient(w), gpu=s.gpu, precision=s.precision)
    else:
        planned = _epilogue_backward(shape, y, s)
    return planned


def _conv_pool(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    """With switches, as in training: the kernel that pools, or a convolution and a pool."""
    from tileconv.kernels.launch import conv_pool

    problem, pool = conv_problem(shape), conv_pool_problem(shape)
    x, w, y = (s.empty(*extents) for extents in (problem.x_shape, problem.w_shape, pool.y_shape))
    if shape.reads_image:
        x = x.contiguous()
    planned: list[Any] = conv_pool.plan(
        problem, pool, x, w, s.empty(problem.K) if has_bias(shape) else None, y, s.empty(*y.shape, dtype=torch.uint8),
        gpu=s.gpu, activation="relu", precision=s.precision, channels_last=s.channels_last, batch_invariant=False,
    )  # fmt: skip
    return planned


def _transposed(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    """The forward pass is the input gradient of `problem`, its own input gradient is that one's forward pass."""
    from tileconv.kernels.launch import conv

    problem = conv_problem(shape)
    image, w, x = (s.empty(*extents) for extents in (problem.x_shape, problem.w_shape, problem.y_shape))
    common: dict[str, Any] = {"gpu": s.gpu, "precision": s.precision}
    planned: list[Any]
    if pass_ == "fprop":
        bias = s.empty(problem.C) if has_bias(shape) else None
        planned = conv.plan_transpose(problem, x, w, bias, image, activation=shape.activation, **common)
        return planned
    if pass_ == "dgrad":
        planned = conv.plan_fprop(problem, image, w, None, x, **common)
    elif pass_ == "wgrad":
        planned = conv.plan_wgrad(problem, x, image, s.gradient(w), **common)
    else:
        planned = _epilogue_backward(shape, image, s)
    return planned


def _im2col(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    """unfold and a 1x1 convolution over its columns, which lie as patches; kept for the weight's gradient."""
    from tileconv.kernels.launch import conv, unfold

    problem, product = conv_problem(shape), matrix_product(shape)
    x, y = s.empty(*problem.x_shape), s.empty(*problem.y_shape)
    depth, pixels = problem.im2col_shape
    cols = s.empty(problem.N, pixels, depth).mT
    matrix = cols.mT.unflatten(1, (problem.P, problem.Q)).permute(0, 3, 1, 2)
    w = s.empty(*product.w_shape)
    common: dict[str, Any] = {"gpu": s.gpu, "precision": s.precision}
    run = problem.group_channels if s.channels_last else 1
    if pass_ == "fprop":
        bias = s.empty(problem.K) if has_bias(shape) else None
        first = unfold.plan_unfold(problem, x, cols, run, gpu=s.gpu)
        return [first, *conv.plan_fprop(product, matrix, w, bias, y, activation=shape.activation, **common)]
    if pass_ == "dgrad":
        return [*conv.plan_dgrad(product, y, w, matrix, **common), unfold.plan_fold(problem, cols, x, run, gpu=s.gpu)]
    if pass_ == "wgrad":
        planned: list[Any] = conv.plan_wgrad(product, y, matrix, s.gradient(w), **common)
        return planned
    return _epilogue_backward(shape, y, s)


def matrix_product(shape: Shape) -> Any:
    """The 1x1 convolution that conv2d_im2col makes of its columns."""
    from tileconv.kernels.geometry import Conv2dProblem

    problem = conv_problem(shape)
    return Conv2dProblem(
        N=problem.N, C=problem.C * problem.taps, H=problem.P, W=problem.Q, K=problem.K, R=1, S=1, groups=problem.groups
    )


def _local(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    from tileconv.kernels.launch import local, pointwise

    problem = conv_problem(shape)
    own_bias: Any = shape.module.bias
    x, y = s.empty(*problem.x_shape), s.empty(*problem.y_shape)
    w = s.empty(problem.P * problem.Q, problem.K, problem.C * problem.taps)
    if pass_ == "fprop":
        bias = s.empty(*own_bias.shape) if has_bias(shape) else None
        return [local.plan_fprop(problem, x, w, bias, y, gpu=s.gpu, precision=s.precision)]
    if pass_ == "dgrad":
        return [local.plan_dgrad(problem, y, w, x, gpu=s.gpu, precision=s.precision)]
    if pass_ == "wgrad":
        return [local.plan_wgrad(problem, y, x, w, gpu=s.gpu, precision=s.precision)]
    if own_bias.dim() == 3:  # one bias for every pixel: channels of an image of one pixel
        y = y.contiguous().reshape(y.shape[0], -1, 1, 1)
    planned: list[Any] = pointwise.plan_bias_backward(y, None, None, s.empty(y.shape[1]), gpu=s.gpu)
    return planned


def _norm(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    from tileconv.kernels.launch import norm

    m: Any = shape.module
    x = s.empty(*shape.input)
    dy = None if pass_ == "forward" else torch.empty_like(x)
    # The kernel takes alpha per channel of the window, torch's module divides it by their number.
    return [norm.plan_local_response_norm(x, dy, torch.empty_like(x), m.size, m.alpha / m.size, m.beta, m.k, gpu=s.gpu)]


def _pool(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    from tileconv.kernels.launch import pool

    m: Any = shape.module
    problem = pool_problem(shape)
    x, y = s.empty(*shape.input), s.empty(*output_shape(shape))
    forward = pass_ == "forward"
    if shape.op in ("max_pool2d", "adaptive_max_pool2d"):
        switch = torch.empty_like(y, dtype=pool.switch_dtype(problem))
        if shape.op == "adaptive_max_pool2d":
            if forward:
                return [pool.plan_adaptive_max_forward(problem, x, y, switch, gpu=s.gpu)]
            return [pool.plan_adaptive_max_backward(problem, y, switch, x, gpu=s.gpu)]
        if forward:
            return [pool.plan_max_forward(problem, x, y, switch, gpu=s.gpu)]
        return [pool.plan_max_backward(problem, y, switch, None, x, gpu=s.gpu)]
    if shape.op == "adaptive_avg_pool2d":
        if forward:
            return [pool.plan_adaptive_avg_forward(problem, x, y, gpu=s.gpu)]
        return [pool.plan_adaptive_avg_backward(problem, y, x, gpu=s.gpu)]
    power = shape.op == "lp_pool2d"
    averaging = pool.Averaging(True, None, m.norm_type) if power else pool.Averaging(m.count_include_pad, None)
    if forward:
        return [pool.plan_average_forward(problem, averaging, x, y, gpu=s.gpu)]
    saved_x, saved_y = (x, y) if power else (None, None)
    return [pool.plan_average_backward(problem, averaging, y, saved_x, saved_y, torch.empty_like(x), gpu=s.gpu)]


def _unpool(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    from tileconv.kernels.launch import pool

    x, y = s.empty(*shape.input), s.empty(*output_shape(shape))
    index = torch.empty_like(x, dtype=torch.int64)
    if pass_ == "forward":
        return [pool.plan_unpool(x, index, y, gpu=s.gpu)]
    return [pool.plan_unpool_backward(y, index, x, gpu=s.gpu)]


def _relu(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    from tileconv.kernels.launch import pointwise

    x = _flat(s.empty(*shape.input))
    if pass_ == "forward":
        return [pointwise.plan_relu(x, x, gpu=s.gpu)]
    return [pointwise.plan_relu_backward(x[None, :], x[None, :], x[None, :], gpu=s.gpu)]


def _dropped(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    """The backward pass is the same kernel with the same seed."""
    module: Any = shape.module
    return [_dropout(s.empty(*shape.input), module.p, s)]


def _softmax(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    from tileconv.kernels.launch import softmax
    from tileconv.kernels.ops.softmax import rows

    log = shape.op == "log_softmax"
    x, y = rows(s.empty(*shape.input), 1), rows(s.empty(*shape.input).contiguous(), 1)
    if pass_ == "forward":
        return [softmax.plan_softmax(x, y, log, gpu=s.gpu)]
    return [softmax.plan_softmax_backward(y, y, torch.empty_like(y), log, gpu=s.gpu)]


def _cross_entropy(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    """Of class indices, averaged: losses of rows, then their sum."""
    from tileconv.kernels import layout
    from tileconv.kernels.launch import pointwise, softmax
    from tileconv.kernels.ops.softmax import rows

    m: Any = shape.module
    x = rows(s.empty(*shape.input), 1)
    target = s.empty(x.shape[0], x.shape[2], dtype=torch.int64)
    wide = layout.sum_dtype(s.dtype)
    losses, saved = (s.empty(count, x.shape[0] * x.shape[2], dtype=wide) for count in (2, 3))
    settings = m.ignore_index, m.label_smoothing
    if pass_ == "forward":
        first = softmax.plan_cross_entropy(x, target, None, losses, saved, *settings, gpu=s.gpu)
        sums = s.empty(2, dtype=wide)
        return [first, *pointwise.plan_bias_backward(losses[None, :, None, :], None, None, sums, gpu=s.gpu)]
    grad, divisor = s.empty(), s.empty(dtype=wide)
    dx = rows(s.empty(*shape.input).contiguous(), 1)
    return [
        softmax.plan_cross_entropy_backward(grad, divisor, x, target, None, saved, dx, *settings, False, gpu=s.gpu)
    ]  # fmt: skip


def _unfold(shape: Shape, pass_: str, s: Setting) -> list[Any]:
    """Columns as PyTorch has them, pixels side by side; fold is its transpose, and each the other's gradient."""
    from tileconv.kernels.launch import unfold

    problem = conv_problem(shape)
    image, cols = s.empty(*problem.x_shape), s.empty(problem.N, *problem.im2col_shape)
    if shape.op == "fold" and pass_ == "forward":
        image = image.contiguous()  # columns have no layout that it could follow
    if (shape.op == "unfold") == (pass_ == "forward"):
        return [unfold.plan_unfold(problem, image, cols, gpu=s.gpu)]
    return [unfold.plan_fold(problem, cols, image, gpu=s.gpu)]


PLANS: dict[str, Callable[[Shape, str, Setting], list[Any]]] = {
    "conv2d": _conv, "conv2d_max_pool2d": _conv_pool, "linear": _conv, "conv1d": _conv,
    "conv_transpose2d": _transposed, "conv2d_im2col": _im2col, "locally_connected2d": _local,
    "max_pool2d": _pool, "avg_pool2d": _pool, "lp_pool2d": _pool,
    "adaptive_avg_pool2d": _pool, "adaptive_max_pool2d": _pool, "max_unpool2d": _unpool,
    "local_response_norm": _norm, "relu": _relu, "dropout": _dropped, "softmax": _softmax, "log_softmax": _softmax,
    "cross_entropy": _cross_entropy, "unfold": _unfold, "fold": _unfold,
}  # fmt: skip
