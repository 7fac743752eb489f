"""Cases as data: which layers, passes, dtypes and batch sizes the bench looks at, and the launches they turn into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .networks import Shape, known, network_layers
from .problems import PRODUCTS, bytes_least, conv_problem, has_bias, output_shape, pool_problem
from .suites import SUITES, suite_of

__all__ = [
    "DTYPES", "EPS", "FORWARD", "PASSES", "PASSES_OF", "SUITES", "Case", "by_weight", "cases", "conv_problem",
    "find_case", "flops_of", "launches", "parts", "passes_of", "pool_problem", "shape_of", "weight_of",
]  # fmt: skip

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
MEMORY_FORMATS = ("channels_last", "contiguous")
STEP = "step"  # a whole network's training step: forward, backward and update
PASSES = ("fprop", "dgrad", "wgrad", "forward", "backward", STEP)
FORWARD = ("fprop", "forward")
# "backward" of what multiplies is what precedes dgrad and wgrad: the gradients of dropout, ReLU and bias.
PRODUCT_PASSES = ("fprop", "dgrad", "wgrad", "backward")
STREAMED = (
    "max_pool2d", "avg_pool2d", "lp_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_unpool2d",
    "local_response_norm", "relu", "dropout", "softmax", "log_softmax", "cross_entropy", "unfold", "fold",
)  # fmt: skip
PASSES_OF = (
    dict.fromkeys(PRODUCTS, PRODUCT_PASSES)
    | dict.fromkeys(STREAMED, ("forward", "backward"))
    | {"network": ("forward", STEP), "conv2d_max_pool2d": ("forward",)}
)


@dataclass(frozen=True)
class Case:
    """One pass of one layer at one batch size and dtype, its operands in one memory format (one of MEMORY_FORMATS)."""

    network: str
    layer: str
    pass_: str
    batch: int
    dtype: str
    memory_format: str = MEMORY_FORMATS[0]

    def to_json(self) -> dict[str, Any]:
        """As a worker reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """From what `to_json` made; other keys are ignored."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})

    def __str__(self) -> str:
        name = f"{self.network}/{self.layer}/{self.pass_}/{self.dtype}/n{self.batch}"
        return name if self.memory_format == MEMORY_FORMATS[0] else f"{name}/{self.memory_format}"

    @property
    def precision(self) -> str:
        return precision_of(self.dtype)


def precision_of(dtype: str) -> str:
    """What the kernels are told about 4-byte products."""
    return dtype if dtype in ("tf32", "bf16x3", "bf16x6") else "ieee"


def passes_of(shape: Shape) -> tuple[str, ...]:
    """The passes that a layer has: an image wants no gradient, and not every layer has something before dgrad."""
    missing = {"dgrad"} if shape.reads_image else set()
    if shape.op in PRODUCTS and not (has_bias(shape) or shape.activation or shape.dropout):
        missing.add("backward")
    return tuple(name for name in PASSES_OF[shape.op] if name not in missing)


def cases(
    suite: str,
    batch: int | None = None,
    dtypes: Sequence[str] = ("fp16",),
    passes: Sequence[str] = PASSES,
    layers: Sequence[str] = (),
    memory_format: str = MEMORY_FORMATS[0],
) -> list[Case]:
    """Every layer of a suite (or those named) in every dtype and pass asked for that it has.

    suite: as network_layers. batch: None is each layer's own. Raises ValueError, with the nearest names, for an unknown
    suite, dtype, pass, layer or memory format, for a batch below 1, and for one where the suite has its own.
    """
    chosen = suite_of(suite)
    for dtype in dtypes:
        known("dtype", dtype, DTYPES)
    for name in passes:
        known("pass", name, PASSES)
    known("memory_format", memory_format, MEMORY_FORMATS)
    shapes = chosen.shapes(batch)
    for layer in layers:
        known("layer", layer, [shape.name for shape in shapes])
    return [
        Case(suite, shape.name, pass_, shape.input[0], dtype, memory_format)
        for dtype in dtypes
        for pass_ in dict.fromkeys(passes)
        for shape in shapes
        if pass_ in passes_of(shape) and (not layers or shape.name in layers)
    ]


def find_case(text: str) -> Case:
    """The case that `str(case)` names. Raises ValueError, with the nearest names, for one that there is not."""
    last = text.rpartition("/")[2]
    memory_format = last if last in MEMORY_FORMATS else MEMORY_FORMATS[0]
    parts = text.removesuffix(f"/{memory_format}").rsplit("/", 4)
    batch = parts[-1].removeprefix("n")
    if len(parts) != 5 or not batch.isdecimal():
        raise ValueError(f"case={text!r} must be suite/layer/pass/dtype/nBATCH, such as alexnet/conv2/fprop/fp16/n128")
    network, layer, pass_, dtype = parts[:4]
    known("pass", pass_, PASSES)
    case = Case(network, layer, pass_, int(batch), known("dtype", dtype, DTYPES), memory_format)
    known(f"pass of {layer}", pass_, passes_of(shape_of(case)))
    return case


def shape_of(case: Case) -> Shape:
    """The layer that a case is about. Raises ValueError for an unknown one, and a batch that it does not have."""
    fixed = suite_of(case.network).fixed
    shapes = {shape.name: shape for shape in network_layers(case.network, None if fixed else case.batch)}
    shape = shapes[known("layer", case.layer, shapes)]
    if shape.input[0] != case.batch:
        raise ValueError(f"batch={case.batch}: {case.layer} of {case.network} has {shape.input[0]}")
    return shape


def parts(case: Case) -> list[Case]:
    """A whole network's pass as those of its layers, one by one: all of them for a training step."""
    passes = FORWARD if case.pass_ == "forward" else PASSES
    return cases(case.layer, case.batch, [case.dtype], passes, memory_format=case.memory_format)


def flops_of(case: Case) -> int | None:
    """Multiplications and additions of a case; None for what does not multiply."""
    shape = shape_of(case)
    if shape.op == "network":
        return sum(flops_of(part) or 0 for part in parts(case))
    pools = shape.op == "conv2d_max_pool2d"
    if not pools and (shape.op not in PRODUCTS or case.pass_ not in ("fprop", "dgrad", "wgrad")):
        return None
    flops: int = conv_problem(shape).flops
    return flops


def weight_of(case: Case) -> float:
    """Microseconds that the case takes an H100 at least, by its data sheet: operations, or operands moved once."""
    from tileconv.kernels.hardware import GPUS

    shape, dtype, gpu = shape_of(case), DTYPES[case.dtype], GPUS["H100"]
    if shape.op == "network":
        return sum(weight_of(part) for part in parts(case))
    moved = 0
    if case.pass_ in ("fprop", "dgrad", "wgrad"):
        moved = bytes_least(shape, dtype.itemsize)
    else:
        for extents in (shape.input, output_shape(shape)):
            moved += torch.Size(extents).numel() * dtype.itemsize
    return 1e6 * max(moved / gpu.dram, (flops_of(case) or 0) / gpu.peak(dtype, case.precision))


def by_weight(cases: Iterable[Case]) -> list[Case]:
    """The most telling cases first, for a run that may have to stop: the layers that their suite lists as telling, in
    its order and each with all its passes, then the others by falling `weight_of`. What is equal keeps its order."""
    ranked = []
    for case in cases:
        telling = suite_of(case.network).telling
        place = telling.index(case.layer) if case.layer in telling else len(telling)
        ranked.append(((place, 0.0 if place < len(telling) else -weight_of(case)), case))
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def launches(case: Case, gpu: Any) -> list[Any]:
    """The launches that a call of this case makes on `gpu` (tileconv.kernels.hardware.GPU), on meta tensors.

    A whole network's are those of its layers, one by one; what joins layers in the network itself is not joined here.
    """
    from .plans import Setting, plan

    shape = shape_of(case)
    if shape.op == "network":
        return [launch for part in parts(case) for launch in launches(part, gpu)]
    dtype, channels_last = DTYPES[known("dtype", case.dtype, DTYPES)], case.memory_format == "channels_last"
    return plan(shape, case.pass_, Setting(dtype, case.precision, gpu, channels_last))
