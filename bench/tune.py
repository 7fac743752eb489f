"""`tileconv tune`: times the tiles that the cost model likes best, and keeps those that win over its own choice."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch.nn.grad import conv2d_input, conv2d_weight

from tileconv.kernels import conv_tile, hardware, layout, run_tiles, tiles, tuned
from tileconv.kernels.conv_tile import ConvTile
from tileconv.kernels.geometry import Conv2dProblem, DgradPart
from tileconv.kernels.launch import conv as launch_conv
from tileconv.kernels.launch import depthwise
from tileconv.model.command import fail

from . import environment
from .cases import DTYPES, Case, cases, conv_problem, shape_of
from .check import budget, largest_difference
from .networks import Shape
from .records import replace_text
from .timing import CudaTimer, Quantiles, Timer
from .workers import describe_error

CANDIDATES = 12
Say = Callable[[str], None]


@dataclass(frozen=True)
class Unit:
    """One choice of a tile: a pass of a layer, or one residue of a strided input gradient.

    `problem` is what tiles.choose is asked for, `layer` the call's own.
    """

    case: Case
    shape: Shape
    layer: Conv2dProblem
    problem: Conv2dProblem
    part: DgradPart | None = None

    def __str__(self) -> str:
        return str(self.case) + (f" at {self.part.offset}" if self.part and self.part.stride != (1, 1) else "")


@dataclass(frozen=True)
class Outcome:
    """What timing one unit gave: the model's tile, the quickest one, and whether it won by more than the noise."""

    unit: Unit
    model: ConvTile
    model_us: Quantiles | None
    best: ConvTile
    best_us: Quantiles | None
    refused: tuple[str, ...] = ()  # candidates that were wrong or did not run, with why

    @property
    def won(self) -> bool:
        if self.best == self.model or self.best_us is None:
            return False
        return self.model_us is None or self.best_us.p80 < self.model_us.p20

    def __str__(self) -> str:
        model = "not timed" if self.model_us is None else f"{self.model_us.p50:.1f} us"
        if not self.won or self.best_us is None:
            return f"{self.unit}: {self.model} {model}, stays"
        return f"{self.unit}: {self.model} {model} -> {self.best} {self.best_us.p50:.1f} us"


def units(case: Case, shape: Shape, gpu: hardware.GPU) -> list[Unit]:
    """The choices behind a case; depthwise layers and those read in runs have none: their kernels are others."""
    if shape.op not in ("conv2d", "linear") or case.pass_ not in conv_tile.PASSES:
        return []
    layer = conv_problem(shape)
    dtype = DTYPES[case.dtype]
    if depthwise.applies(layer) or run_tiles.in_runs(layer, case.pass_, dtype, case.precision, gpu):
        return []
    if case.pass_ == "dgrad":
        return [Unit(case, shape, layer, part.problem, part) for part in layer.dgrad if part.problem.taps]
    return [Unit(case, shape, layer, tiles.blocked(layer, case.pass_, dtype, case.precision, gpu))]


class Operands:
    """The tensors of a unit: random, channels_last, images of a first layer contiguous; and what it should make."""

    def __init__(self, unit: Unit, device: str) -> None:
        self.unit = unit
        generator = torch.Generator().manual_seed(0)
        dtype, p = DTYPES[unit.case.dtype], unit.layer

        def image(extents: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
            values = (torch.randn(extents, generator=generator) * scale).to(device=device, dtype=dtype)
            return values.contiguous(memory_format=torch.channels_last)

        self.x, self.dy = image(p.x_shape), image(p.y_shape)
        self.x = self.x.contiguous() if unit.shape.reads_image else self.x
        self.w = image(p.w_shape, (p.group_channels * p.taps) ** -0.5)
        self.bias = image((1, p.K, 1, 1)).flatten()
        self.activation = unit.shape.activation
        made = {"fprop": p.y_shape, "dgrad": p.x_shape, "wgrad": p.w_shape}[unit.case.pass_]
        self.out = layout.empty_image(made, self.x, channels_last=True)
        narrow, wide = (self._result(tensors) for tensors in (self._all(), [t.double() for t in self._all()]))
        self.exact = wide
        self.allowed = budget(largest_difference(narrow, wide), unit.case.dtype, float(wide.abs().max()))

    def _all(self) -> list[torch.Tensor]:
        return [self.x, self.w, self.bias, self.dy]

    def _result(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """What torch makes of them."""
        x, w, bias, dy = tensors
        p = self.unit.layer
        padding, rest = (p.padding[0][0], p.padding[1][0]), (p.dilation, p.groups)
        if self.unit.case.pass_ == "fprop":
            y = F.conv2d(x, w, bias, p.stride, padding, *rest)
            return y.relu() if self.activation == "relu" else y
        if self.unit.case.pass_ == "dgrad":
            dx: torch.Tensor = conv2d_input(p.x_shape, w, dy, p.stride, padding, *rest)
            return self.written(dx)
        dw: torch.Tensor = conv2d_weight(x, p.w_shape, dy, p.stride, padding, *rest)
        return dw

    def written(self, out: torch.Tensor) -> torch.Tensor:
        """The part of the output that the unit writes."""
        part = self.unit.part
        if part is None:
            return out
        return out[:, :, part.offset[0] :: part.stride[0], part.offset[1] :: part.stride[1]]

    def launches(self, tile: ConvTile, gpu: hardware.GPU) -> list[Any]:
        """What the unit launches with a tile."""
        unit, precision = self.unit, self.unit.case.precision
        with tiles.override(**{field.name: getattr(tile, field.name) for field in dataclasses.fields(tile)}):
            if unit.part is not None:
                return launch_conv.plan_transpose(
                    unit.layer, self.dy, self.w, None, self.out, gpu=gpu, precision=precision, only=unit.part
                )
            if unit.case.pass_ == "wgrad":
                return launch_conv.plan_wgrad(unit.layer, self.dy, self.x, self.out, gpu=gpu, precision=precision)
            return launch_conv.plan_fprop(
                unit.layer, self.x, self.w, self.bias, self.out, gpu=gpu, activation=self.activation,
                precision=precision,
            )  # fmt: skip


def tune_unit(unit: Unit, timer: Timer, gpu: hardware.GPU, device: str = "cuda", count: int = CANDIDATES) -> Outcome:
    """Check the model's `count` best tiles against float64, time those that are right, L2 cold, as between layers."""
    dtype = DTYPES[unit.case.dtype]
    candidates = tiles.ranked(unit.problem, unit.case.pass_, None, dtype, unit.case.precision, gpu)[:count]
    with torch.no_grad():
        operands = Operands(unit, device)
        times: dict[ConvTile, Quantiles] = {}
        refused = []
        for tile in candidates:
            try:
                launches = operands.launches(tile, gpu)
                operands.out.fill_(torch.nan)
                _run(launches)
                error = largest_difference(operands.written(operands.out), operands.exact)
                if not error <= operands.allowed:
                    raise ValueError(f"error {error:.3g} is over the allowed {operands.allowed:.3g}")
                times[tile] = Quantiles.of(timer([_replayed(launches, device)], cold=True))
            except Exception as problem:  # one tile that does not run must not cost the others
                refused.append(f"{tile}: {describe_error(problem)}")
    model = candidates[0]
    best = min(times, key=lambda tile: times[tile].p50, default=model)
    return Outcome(unit, model, times.get(model), best, times.get(best), tuple(refused))


def _run(launches: Sequence[Any]) -> None:
    for launch in launches:
        launch.run()


def _replayed(launches: Sequence[Any], device: str) -> Callable[[], Any]:
    """The launches as one call; on a GPU a graph, so that the host's time is not measured."""
    if device != "cuda":
        return lambda: _run(launches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(launches)
    return graph.replay


def entry(outcome: Outcome, gpu: hardware.GPU) -> tuned.Entry:
    """A win as the table holds it."""
    unit, best, model = outcome.unit, outcome.best_us, outcome.model_us
    assert best is not None
    times = [{name: getattr(q, name) for name in tuned.QUANTILES} for q in (best, model or best)]
    own = tuned.key(unit.problem, unit.case.pass_, DTYPES[unit.case.dtype], unit.case.precision, gpu)
    return tuned.Entry(own, outcome.best, str(outcome.model), times[0], times[1])


def merged(before: Sequence[tuned.Entry], outcomes: Sequence[Outcome], gpu: hardware.GPU) -> list[tuned.Entry]:
    """A table after a run: what was measured again is replaced, or dropped where the model's choice stays."""
    again = {
        tuned.key(o.unit.problem, o.unit.case.pass_, DTYPES[o.unit.case.dtype], o.unit.case.precision, gpu)
        for o in outcomes
    }
    kept = [item for item in before if item.key not in again]
    return kept + [entry(outcome, gpu) for outcome in outcomes if outcome.won]


def outcomes(
    todo: Sequence[Unit], timer: Timer, gpu: hardware.GPU, *, device: str = "cuda", minutes: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Outcome]:  # fmt: skip
    """One outcome after the other, until no time is left to begin another."""
    end = clock() + 60 * minutes
    for unit in itertools.takewhile(lambda _: clock() < end, todo):
        yield tune_unit(unit, timer, gpu, device)


def tune(
    suite: Annotated[str, typer.Option(help="Which network's layers.")] = "alexnet",
    dtype: Annotated[list[str] | None, typer.Option(help="fp16, bf16, tf32, fp32 or fp64; may be given again.")] = None,
    pass_: Annotated[
        list[str] | None, typer.Option("--pass", help="fprop, dgrad or wgrad; may be given again. Default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 128,
    layer: Annotated[list[str] | None, typer.Option(help="A layer's name; may be given again. Default: all.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no other layer after this time.", min=0.0)] = 10.0,
    out: Annotated[
        Path | None, typer.Option(help="The table to write or to add to; default: the one in the user's cache folder.")
    ] = None,
) -> None:
    """Time tiles on a CUDA GPU and keep those that win over the cost model's choice, in tiles_tuned.json.

    Every tile is checked against float64 before it is timed. One wins if the middle three fifths of its times lie below
    those of the model's choice. The library reads the table from $TILECONV_TILES or the user's cache folder.
    """
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    try:
        if not hardware.has_gpu() or hardware.interpreting():
            raise ValueError("tune needs a CUDA GPU, and there is none here: nothing was timed, nothing was written")
        path, before = _table(out)
        gpu = hardware.gpu_of(torch.device("cuda"))
        asked = cases(suite, batch, dtype or ["fp16"], pass_ or conv_tile.PASSES, layer or ())
        todo = [unit for case in asked for unit in units(case, shape_of(case), gpu)]
        environment.require_launches()
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    done: list[Outcome] = []
    for outcome in outcomes(todo, CudaTimer(), gpu, minutes=minutes):
        done.append(outcome)
        say(str(outcome))
        for line in outcome.refused:
            say(f"  refused: {line}")
        replace_text(path, tuned.text(merged(before, done, gpu)))  # after each, so that an interruption costs one
    left = len(todo) - len(done)
    say(
        f"{sum(o.won for o in done)} of {len(done)} tiles replace the model's on {gpu.name}; {left} not reached in time"
    )
    say(f"Table: {path}" if done else "Nothing was timed, nothing was written")


def _table(out: Path | None) -> tuple[Path, list[tuned.Entry]]:
    """Where the table goes and what it holds. Raises ValueError before anything is timed."""
    path = out
    if path is None:
        folder = tuned.user_folder()
        if folder is None:
            raise ValueError(
                f"{tuned.CACHE_VARIABLE} is empty, so there is no folder for the table: name a file, --out"
            )
        path = folder / tuned.NAME
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"out={str(path)!r}: its directory does not exist")
    return path, tuned.read(path) if path.exists() else []
