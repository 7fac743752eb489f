"""Who computes a case: our kernels in each formulation, cuDNN as PyTorch can be told to call it, and others."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from .cases import DTYPES, FORWARD, Case, conv_problem, shape_of
from .networks import Shape, known
from .passes import Call, Side, Tensors, forward, im2col, work
from .problems import PRODUCTS

CONVOLUTIONS = ("conv2d", "conv1d", "conv_transpose2d", "conv2d_im2col")
Applies = Callable[[Case, Shape], bool]
Around = Callable[[Case], AbstractContextManager[None]]


@dataclass(frozen=True)
class Provider:
    """A way to compute a case: `make(case, shape, tensors)` returns the call, made and run inside `around(case)`.

    `turn` says when a run with a time budget comes to it: 0 for what every case needs, 2 for detail. `alone`: its
    result for one image is compared as well. `explicit`: only where it is asked for by name.
    """

    name: str
    memory_format: Literal["contiguous", "channels_last"]
    make: Callable[[Case, Shape, Tensors], Call]
    around: Around
    applies: Applies
    turn: int = 0
    alone: bool = False
    explicit: bool = False

    @property
    def ours(self) -> bool:
        return self.name.split(":")[0] == "tileconv"

    @property
    def layout(self) -> str:
        """calls.placed's name for where its operands lie."""
        return "native" if self.ours else self.memory_format


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 for `tf32`, strict fp32 for the rest."""
    # Not allow_tf32: reading that older switch raises once anyone has set the newer one.
    backends: Any = torch.backends
    levels = (backends.cudnn.conv, backends.cuda.matmul)
    before = [level.fp32_precision for level in levels]
    for level in levels:
        level.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        for level, value in zip(levels, before, strict=True):
            level.fp32_precision = value


def cudnn(*, benchmark: bool, deterministic: bool = False) -> Around:
    """cuDNN's own switches, at the precision of the case."""

    @contextlib.contextmanager
    def around(case: Case) -> Iterator[None]:
        switches = torch.backends.cudnn
        before = switches.benchmark, switches.deterministic
        switches.benchmark, switches.deterministic = benchmark, deterministic
        try:
            with precision(case.dtype):
                yield
        finally:
            switches.benchmark, switches.deterministic = before

    return around


def _untouched(case: Case) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def _forced(formulation: str) -> Around:
    @contextlib.contextmanager
    def around(case: Case) -> Iterator[None]:
        from tileconv.kernels import tiles

        with precision(case.dtype), tiles.override(formulation=formulation):
            yield

    return around


def formulations(case: Case, shape: Shape) -> tuple[str, ...]:
    """The formulations that can run a pass of a convolution, on the GPU that is there."""
    from tileconv.kernels import conv_tile, hardware, tiles

    if shape.op != "conv2d" or case.pass_ not in ("fprop", "dgrad", "wgrad"):
        return ()
    problem, dtype = conv_problem(shape), DTYPES[case.dtype]
    gpu = hardware.gpu_of(torch.device("cuda"))
    inner = [part.problem for part in problem.dgrad] if case.pass_ == "dgrad" else [problem]
    able = [tiles.formulations(p, case.pass_, dtype, gpu) for p in inner]
    return tuple(name for name in conv_tile.FORMULATIONS if all(name in names for names in able))


def _side(side: Side) -> Callable[[Case, Shape, Tensors], Call]:
    return lambda case, shape, t: work(side, case, shape, t)


def _compiled(case: Case, shape: Shape, t: Tensors) -> Call:
    run = _compiled_forward(case)
    return lambda: run(t)


@lru_cache(maxsize=1)
def _compiled_forward(case: Case) -> Any:
    """Inductor's forward pass of a case, compiled once for all of its buffers."""
    # Dynamo counts recompilations by source line, and this line is every case's.
    torch.compiler.reset()
    shape = shape_of(case)
    return torch.compile(lambda t: forward("torch", shape, t), dynamic=False)


@contextlib.contextmanager
def _gems(case: Case) -> Iterator[None]:
    gems: Any = importlib.import_module("flag_gems")
    with precision(case.dtype), gems.use_gems():
        yield


def has_gems() -> bool:
    """Whether FlagGems is installed."""
    return importlib.util.find_spec("flag_gems") is not None


def _is_conv(case: Case, shape: Shape) -> bool:
    return shape.op in CONVOLUTIONS and case.pass_ in ("fprop", "dgrad", "wgrad")


def _is_other(case: Case, shape: Shape) -> bool:
    return not _is_conv(case, shape)


def _has_default(case: Case, shape: Shape) -> bool:
    """PyTorch's settings say something else for four-byte products only."""
    return shape.op in PRODUCTS and case.pass_ in ("fprop", "dgrad", "wgrad") and DTYPES[case.dtype] == torch.float32


def _runs_as(formulation: str) -> Applies:
    return lambda case, shape: formulation in formulations(case, shape)


def _is_forward(case: Case, shape: Shape) -> bool:
    return case.pass_ in FORWARD and shape.op != "network"


def _both(name: str, around: Around, applies: Applies, turn: int, **more: Any) -> list[Provider]:
    formats: tuple[Literal["channels_last", "contiguous"], ...] = ("channels_last", "contiguous")
    return [Provider(name, layout, _side("torch"), around, applies, turn, **more) for layout in formats]


SEARCHED = cudnn(benchmark=True)
PROVIDERS = (
    Provider("tileconv", "channels_last", _side("ours"), SEARCHED, lambda case, shape: True, alone=True),
    *_both("cudnn-benchmark", SEARCHED, _is_conv, 0, alone=True),
    *_both("torch", SEARCHED, _is_other, 0, alone=True),
    *_both("cudnn-heuristic", cudnn(benchmark=False), _is_conv, 1),
    *_both("cudnn-deterministic", cudnn(benchmark=True, deterministic=True), _is_conv, 1),
    *_both("torch-default", _untouched, _has_default, 1),
    *(
        Provider(f"tileconv:{name}", "channels_last", _side("ours"), _forced(name), _runs_as(name), 2)
        for name in ("pixel", "box", "gather")
    ),
    Provider("im2col", "contiguous", im2col, SEARCHED, lambda case, shape: shape.op == "conv2d"
             and case.pass_ == "fprop", 2),
    Provider("torch-compile", "channels_last", _compiled, SEARCHED, _is_forward, 2),
    *_both("flaggems", _gems, _is_forward, 2, explicit=True),
)  # fmt: skip


def chosen(names: Sequence[str] = ()) -> list[Provider]:
    """The providers of these names; all but the explicit ones for no names.

    Raises ValueError with the nearest names for an unknown one, and for FlagGems where it is not installed.
    """
    every = list(dict.fromkeys(p.name for p in PROVIDERS))
    for name in names:
        known("provider", name, every)
    if "flaggems" in names and not has_gems():
        raise ValueError("provider='flaggems' is not installed: pip install flag_gems, or leave it out")
    return [p for p in PROVIDERS if (p.name in names if names else not p.explicit)]


def level_of(provider: Provider, case: Case) -> str:
    """The precision that products run at, as a key of cases.EPS: the case's, but for PyTorch's own default."""
    if provider.name != "torch-default":
        return case.dtype
    from tileconv.kernels.functional.common import fp32_precision

    operation = "matmul" if case.pass_ in ("fprop", "dgrad", "wgrad") and _linear(case) else "conv"
    probe = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    return "tf32" if fp32_precision(None, probe, operation) == "tf32" else "fp32"


def _linear(case: Case) -> bool:
    return shape_of(case).op in ("linear", "locally_connected2d")


def label_of(level: str) -> str:
    """How a row names its precision: strict fp32 and fp64 are "ieee"."""
    return "ieee" if level in ("fp32", "fp64") else level
