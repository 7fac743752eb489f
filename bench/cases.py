"""Suites as data: which layers, passes and shapes the bench looks at, and the launches that they turn into."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
EPS = {
    "fp16": 2.0**-10,
    "bf16": 2.0**-7,
    "tf32": 2.0**-10,
    "fp32": 2.0**-23,
    "fp64": 2.0**-52,
}
SUITES = ("alexnet",)
PASSES = ("fprop", "forward")
PASS_OF = {"conv2d": "fprop", "linear": "fprop", "max_pool2d": "forward", "adaptive_avg_pool2d": "forward"}
# The layers that AlexNet's forward pass leaves without a ReLU.
LINEAR_OUTPUT = {"alexnet": {"fc8"}}


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


def known(argument: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is allowed; else ValueError with the nearest names."""
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ValueError(f"{argument}={value!r} is unknown{hint}. Allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class Shape:
    """A layer of a network: its operation, module (parameters on the meta device), input shape and fused activation."""

    name: str
    op: str
    module: torch.nn.Module
    input: tuple[int, ...]
    activation: str | None


@cache
def network_layers(network: str, batch: int, size: int = 224) -> tuple[Shape, ...]:
    """The layers of a network with the shapes that arrive at them; nothing is computed."""
    from tileconv.model.alexnet import AlexNet, layers

    known("network", network, SUITES)
    with torch.device("meta"):
        model = AlexNet().eval()
        x = torch.empty(batch, 3, size, size)
    found = []
    for layer in layers(model):
        shape = tuple(x.flatten(1).shape) if layer.op == "linear" else tuple(x.shape)
        relu = layer.op in ("conv2d", "linear") and layer.name not in LINEAR_OUTPUT[network]
        found.append(Shape(layer.name, layer.op, layer.module, shape, "relu" if relu else None))
        x = layer.reference(x)
    return tuple(found)


def cases(suite: str, batch: int, dtypes: Sequence[str] = ("fp16",), passes: Sequence[str] = PASSES) -> list[Case]:
    """Every layer of a suite in every dtype and pass asked for.

    Raises ValueError, with the nearest names, for an unknown suite, dtype or pass, and for a batch below 1.
    """
    known("suite", suite, SUITES)
    for dtype in dtypes:
        known("dtype", dtype, DTYPES)
    for name in passes:
        known("pass", name, PASSES)
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    return [
        Case(suite, shape.name, PASS_OF[shape.op], batch, dtype)
        for dtype in dtypes
        for shape in network_layers(suite, batch)
        if PASS_OF[shape.op] in passes
    ]


def shape_of(case: Case) -> Shape:
    """The layer that a case is about."""
    shapes = {shape.name: shape for shape in network_layers(case.network, case.batch)}
    return shapes[known("layer", case.layer, shapes)]


def flops_of(case: Case) -> int | None:
    """Multiplications and additions of a case; None for what does not multiply."""
    shape = shape_of(case)
    return conv_problem(shape).flops if shape.op in ("conv2d", "linear") else None


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


def launches(case: Case, gpu: Any) -> list[Any]:
    """The launches that a call of this case makes on `gpu` (tileconv.kernels.hardware.GPU), on meta tensors.

    Activations and weights are channels_last, the native layout.
    """
    shape = shape_of(case)
    dtype = DTYPES[known("dtype", case.dtype, DTYPES)]
    if shape.op in ("conv2d", "linear"):
        return _conv_launches(shape, dtype, "tf32" if case.dtype == "tf32" else "ieee", gpu)
    return _pool_launches(shape, dtype, gpu)


def _image(dtype: torch.dtype, *extents: int) -> torch.Tensor:
    return torch.empty(extents, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _conv_launches(shape: Shape, dtype: torch.dtype, precision: str, gpu: Any) -> list[Any]:
    from tileconv.kernels.launch import conv

    problem = conv_problem(shape)
    x, w, y = (_image(dtype, *extents) for extents in (problem.x_shape, problem.w_shape, problem.y_shape))
    bias = torch.empty(problem.K, dtype=dtype, device="meta")
    planned: list[Any] = conv.plan_fprop(
        problem, x, w, bias, y, gpu=gpu, activation=shape.activation, precision=precision
    )
    return planned


def _pool_launches(shape: Shape, dtype: torch.dtype, gpu: Any) -> list[Any]:
    from tileconv.kernels.geometry import AdaptivePool2dProblem, Pool2dProblem
    from tileconv.kernels.launch import pool

    m: Any = shape.module
    n, c, h, w = shape.input
    x = _image(dtype, *shape.input)
    if shape.op == "max_pool2d":
        problem = Pool2dProblem(n, c, h, w, _pair(m.kernel_size), _pair(m.stride), _pair(m.padding), _pair(m.dilation))
        return [pool.plan_max_forward(problem, x, _image(dtype, *problem.y_shape), None, gpu=gpu)]
    adaptive = AdaptivePool2dProblem(n, c, h, w, *_pair(m.output_size))
    return [pool.plan_adaptive_avg_forward(adaptive, x, _image(dtype, n, c, adaptive.P, adaptive.Q), gpu=gpu)]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
