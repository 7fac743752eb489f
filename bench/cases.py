"""Cases as data: which layers, passes, dtypes and batch sizes the bench looks at, and the launches they turn into."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .networks import SUITES, Shape, known, network_layers

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "bf16x3": torch.float32,
    "bf16x6": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
EPS = {
    "fp16": 2.0**-10,
    "bf16": 2.0**-7,
    "tf32": 2.0**-10,
    "bf16x3": 2.0**-16,
    "bf16x6": 2.0**-23,
    "fp32": 2.0**-23,
    "fp64": 2.0**-52,
}
# What a call without `precision` may compute in: the others are inspected, not checked or timed.
DEFAULT_DTYPES = ("fp16", "bf16", "tf32", "fp32", "fp64")
PASSES = ("fprop", "dgrad", "wgrad", "forward", "backward")
FORWARD = ("fprop", "forward")
# "backward" of what multiplies is what precedes dgrad and wgrad: ReLU's mask and the bias gradient, in one kernel.
PASSES_OF = {
    "conv2d": ("fprop", "dgrad", "wgrad", "backward"),
    "linear": ("fprop", "dgrad", "wgrad", "backward"),
    "max_pool2d": ("forward", "backward"),
    "adaptive_avg_pool2d": ("forward", "backward"),
    "local_response_norm": ("forward", "backward"),
}


@dataclass(frozen=True)
class Case:
    """One pass of one layer at one batch size and dtype."""

    network: str
    layer: str
    pass_: str
    batch: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """As a worker reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """From what `to_json` made; other keys are ignored."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})

    def __str__(self) -> str:
        return f"{self.network}/{self.layer}/{self.pass_}/{self.dtype}/n{self.batch}"

    @property
    def precision(self) -> str:
        """What the kernels are told about 4-byte products."""
        return self.dtype if self.dtype in ("tf32", "bf16x3", "bf16x6") else "ieee"


def cases(
    suite: str,
    batch: int,
    dtypes: Sequence[str] = ("fp16",),
    passes: Sequence[str] = PASSES,
    layers: Sequence[str] = (),
) -> list[Case]:
    """Every layer of a suite (or those named) in every dtype and pass asked for.

    The first layer has no dgrad: nobody asks for an image's gradient.  Operations without kernels are left out.  Raises
    ValueError, with the nearest names, for an unknown suite, dtype, pass or layer, and for a batch below 1.
    """
    known("suite", suite, SUITES)
    for dtype in dtypes:
        known("dtype", dtype, DTYPES)
    for name in passes:
        known("pass", name, PASSES)
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    shapes = [shape for shape in network_layers(suite, batch) if shape.op in PASSES_OF]
    for layer in layers:
        known("layer", layer, [shape.name for shape in shapes])
    return [
        Case(suite, shape.name, pass_, batch, dtype)
        for dtype in dtypes
        for pass_ in dict.fromkeys(passes)
        for shape in shapes
        if pass_ in PASSES_OF[shape.op]
        and not (shape.reads_image and pass_ == "dgrad")
        and (not layers or shape.name in layers)
    ]


def shape_of(case: Case) -> Shape:
    """The layer that a case is about."""
    shapes = {shape.name: shape for shape in network_layers(case.network, case.batch)}
    return shapes[known("layer", case.layer, shapes)]


def flops_of(case: Case) -> int | None:
    """Multiplications and additions of a case; None for what does not multiply."""
    shape = shape_of(case)
    if shape.op not in ("conv2d", "linear") or case.pass_ not in ("fprop", "dgrad", "wgrad"):
        return None
    flops: int = conv_problem(shape).flops
    return flops


def conv_problem(shape: Shape) -> Any:
    """The Conv2dProblem of a convolution, or of a linear layer as a 1x1 convolution on a 1x1 image."""
    from tileconv.kernels.geometry import Conv2dProblem

    m = shape.module
    if isinstance(m, torch.nn.Linear):
        return Conv2dProblem(N=shape.input[0], C=m.in_features, H=1, W=1, K=m.out_features, R=1, S=1)
    assert isinstance(m, torch.nn.Conv2d) and not isinstance(m.padding, str)
    n, c, h, w = shape.input
    (pad_h, pad_w), (r, s) = m.padding, m.kernel_size
    return Conv2dProblem(
        N=n, C=c, H=h, W=w, K=m.out_channels, R=r, S=s,
        stride=(m.stride[0], m.stride[1]), padding=((pad_h, pad_h), (pad_w, pad_w)),
        dilation=(m.dilation[0], m.dilation[1]), groups=m.groups,
    )  # fmt: skip


def pool_problem(shape: Shape) -> Any:
    """The Pool2dProblem of a max-pool, or the AdaptivePool2dProblem of an adaptive average."""
    from tileconv.kernels.geometry import AdaptivePool2dProblem, Pool2dProblem

    m: Any = shape.module
    n, c, h, w = shape.input
    if shape.op == "max_pool2d":
        return Pool2dProblem(n, c, h, w, _pair(m.kernel_size), _pair(m.stride), _pair(m.padding), _pair(m.dilation))
    return AdaptivePool2dProblem(n, c, h, w, *_pair(m.output_size))


def launches(case: Case, gpu: Any) -> list[Any]:
    """The launches that a call of this case makes on `gpu` (tileconv.kernels.hardware.GPU), on meta tensors.

    Activations and weights are channels_last, the native layout; the images that a network reads are contiguous, as
    data loaders give them.  Forward pools write switches, as in training.
    """
    shape = shape_of(case)
    dtype = DTYPES[known("dtype", case.dtype, DTYPES)]
    if shape.op in ("conv2d", "linear"):
        return _conv_launches(shape, case, dtype, gpu)
    if shape.op == "local_response_norm":
        return [_norm_launch(shape, case, dtype, gpu)]
    return _pool_launches(shape, case, dtype, gpu)


def _image(dtype: torch.dtype, *extents: int) -> torch.Tensor:
    return torch.empty(extents, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _conv_launches(shape: Shape, case: Case, dtype: torch.dtype, gpu: Any) -> list[Any]:
    from tileconv.kernels.launch import conv, pointwise

    problem = conv_problem(shape)
    x, w, y = (_image(dtype, *extents) for extents in (problem.x_shape, problem.w_shape, problem.y_shape))
    if shape.reads_image:
        x = x.contiguous()
    bias = torch.empty(problem.K, dtype=dtype, device="meta")
    planned: list[Any]
    if case.pass_ == "fprop":
        planned = conv.plan_fprop(
            problem, x, w, bias, y, gpu=gpu, activation=shape.activation, precision=case.precision
        )
    elif case.pass_ == "dgrad":
        planned = conv.plan_dgrad(problem, y, w, x, gpu=gpu, precision=case.precision)
    elif case.pass_ == "wgrad":
        planned = conv.plan_wgrad(problem, y, x, w, gpu=gpu, precision=case.precision)
    else:
        masks = shape.activation is not None
        output, masked = (y, torch.empty_like(y)) if masks else (None, None)
        planned = pointwise.plan_bias_backward(y, output, masked, bias, gpu=gpu)
    return planned


def _norm_launch(shape: Shape, case: Case, dtype: torch.dtype, gpu: Any) -> Any:
    from tileconv.kernels.launch import norm

    m: Any = shape.module
    x = _image(dtype, *shape.input)
    dy = None if case.pass_ == "forward" else torch.empty_like(x)
    # The kernel takes alpha per channel of the window, torch's module divides it by their number.
    return norm.plan_local_response_norm(x, dy, torch.empty_like(x), m.size, m.alpha / m.size, m.beta, m.k, gpu=gpu)


def _pool_launches(shape: Shape, case: Case, dtype: torch.dtype, gpu: Any) -> list[Any]:
    from tileconv.kernels.launch import pool

    problem = pool_problem(shape)
    n, c, *_ = shape.input
    x, y = _image(dtype, *shape.input), _image(dtype, n, c, problem.P, problem.Q)
    forward = case.pass_ == "forward"
    if shape.op == "max_pool2d":
        switch = torch.empty_like(y, dtype=pool.switch_dtype(problem))
        if forward:
            return [pool.plan_max_forward(problem, x, y, switch, gpu=gpu)]
        return [pool.plan_max_backward(problem, y, switch, None, x, gpu=gpu)]
    if forward:
        return [pool.plan_adaptive_avg_forward(problem, x, y, gpu=gpu)]
    return [pool.plan_adaptive_avg_backward(problem, y, x, gpu=gpu)]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
