"""Which tile a problem gets: the quickest of the candidates by the cost model, a measured one, or an override."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

from tileconv.kernels import cost, excluded, fp32
from tileconv.kernels.conv_candidates import clean_candidates
from tileconv.kernels.conv_tile import FORMULATIONS, MAX_NUMEL, ConvTile, addressable, power_of_two, why_invalid
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU

BATCHES = (1, 8, 32, 128)  # what a choice that may not depend on the batch is weighed for


def first_layer(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
    """Whether a pass runs on problem.space_to_depth: few channels, so that no descriptor fits as it is.

    With a stride always on tensor cores.  Where blocks are whole windows or rows of them, if the model has them quicker
    than pointers: patches forward without tensor cores, where arithmetic hides what pointers cost and a block's zeros
    are multiplied in full, and layers without a stride on them (docs/tried.md).  A formulation that is forced decides.
    """
    few = problem.C <= 4 and problem.dilation == (1, 1) and problem.groups == 1
    strided, on_tensor_cores = max(problem.stride) > 1, fp32.on_tensor_cores(dtype, precision)
    if not few or pass_ == "dgrad":
        return False
    if not strided and (problem.S == 1 or addressable(problem, pass_, dtype)):
        return False
    by_blocks = strided and on_tensor_cores
    if not by_blocks and (on_tensor_cores or (pass_ == "fprop" and strided)):
        by_blocks = _quicker(replace(problem, N=BATCHES[-1]), pass_, dtype, precision, gpu)
    if forced().get("formulation", None if by_blocks else "gather") == "gather":
        return False
    return gpu.has_descriptors and addressable(problem.space_to_depth, pass_, dtype)


@lru_cache(maxsize=1024)
def _quicker(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
    """Whether no window of a first layer is only part of its blocks, and the model has blocks quicker than pointers.

    Where it is, a NaN beside it would reach its output.  One answer serves batches of all sizes, since the two add in
    different orders.
    """
    blocks = problem.space_to_depth
    whole = problem.blocks == (1, problem.S) or (
        problem.stride == (problem.R, problem.S) and problem.padding == ((0, 0), (0, 0))
    )
    if not whole or gpu.interprets or not (gpu.has_descriptors and addressable(blocks, pass_, dtype)):
        return False
    by_pointers, by_blocks = (
        _cost(_best(one, pass_, only, dtype, precision, gpu), one, pass_, dtype, precision, gpu)[0]
        for one, only in ((problem, "gather"), (blocks, None))
    )
    for shape in (blocks.x_shape, blocks.w_shape):
        by_blocks += cost.streaming_us(2 * dtype.itemsize * math.prod(shape), gpu)
    return by_blocks < by_pointers


def blocked(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> Conv2dProblem:
    """The problem that a tile of fprop or wgrad is chosen for: problem.space_to_depth of a first layer, else itself."""
    return problem.space_to_depth if first_layer(problem, pass_, dtype, precision, gpu) else problem


def formulations(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU, precision: str = "ieee"
) -> tuple[str, ...]:
    """The formulations that can run a pass, for tests and benchmarks that force each in turn."""
    found = []
    for name in FORMULATIONS:
        with override(formulation=name):
            inner = blocked(problem, pass_, dtype, precision, gpu)
        tile = _choose(inner, pass_, dtype, precision, gpu, name)
        if why_invalid(tile, inner, pass_, dtype, precision, gpu) is None:
            found.append(name)
    return tuple(found)


_overrides: list[dict[str, object]] = []


@contextlib.contextmanager
def override(**changes: object) -> Iterator[None]:
    """Force fields of ConvTile (such as `formulation="gather"`) for every choice in the block: tests and benchmarks.

    A choice that cannot honour them raises ValueError; nothing falls back.
    """
    unknown = set(changes) - {field.name for field in fields(ConvTile)}
    if unknown:
        raise TypeError(f"override has no field {sorted(unknown)}: allowed are {[f.name for f in fields(ConvTile)]}")
    if (wanted := changes.get("formulation")) not in (None, *FORMULATIONS):
        raise ValueError(f"formulation={wanted!r} is unknown: allowed are {', '.join(FORMULATIONS)}")
    _overrides.append(changes)
    try:
        yield
    finally:
        _overrides.remove(changes)


def forced() -> dict[str, object]:
    """What the overrides in force ask for."""
    return {name: value for override_ in _overrides for name, value in override_.items()}


def choose(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU, *, batch_invariant: bool = False
) -> ConvTile:
    """The tile for one pass of a problem: a pure function of its arguments, outside `override`.

    A dgrad problem is the rephrased one, geometry.DgradPart.problem.  With batch_invariant problem.N has no say in the
    order in which an output is summed (`order`).
    """
    changes = forced()
    if not changes:
        return _choose(problem, pass_, dtype, precision, gpu, None, batch_invariant)
    formulation = changes.pop("formulation", None)
    chosen = _choose(problem, pass_, dtype, precision, gpu, formulation, batch_invariant)
    tile = replace(chosen, **changes)  # type: ignore[arg-type]
    if reason := why_invalid(tile, problem, pass_, dtype, precision, gpu):
        raise ValueError(f"the tile override cannot be honoured: {reason}")
    return tile


@lru_cache(maxsize=4096)
def _choose(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU, formulation: object,
    batch_invariant: bool = False,
) -> ConvTile:  # fmt: skip
    if gpu.interprets:
        wanted = str(formulation or _interpreter_formulation(problem, pass_, fp32.multiplied(dtype, precision)))
        if not batch_invariant:
            return _interpreter_tile(problem, pass_, wanted)
        # There numpy's library adds in an order that the shape of a block decides, and from 32 columns on the column.
        tile = _interpreter_tile(replace(problem, N=1), pass_, wanted)
        return tile if wanted == "box" else replace(tile, box=(16, 1, 1))
    only = None if formulation is None else str(formulation)
    if only is None and not batch_invariant:
        from tileconv.kernels import tuned  # it reads ConvTile and why_invalid from here

        if (measured := tuned.find(problem, pass_, dtype, precision, gpu)) is not None:
            return measured
    best = _best_for_any_batch if batch_invariant else _best
    return best(problem, pass_, only, dtype, precision, gpu)


def _interpreter_formulation(problem: Conv2dProblem, pass_: str, dtype: torch.dtype) -> str:
    if not addressable(problem, pass_, dtype):
        return "gather"
    # A program costs more than its arithmetic there, so one program an output pixel is the slow way.
    if problem.P * problem.Q == 1:
        return "pixel"
    return "box" if problem.stride == (1, 1) else "gather"


def _interpreter_tile(problem: Conv2dProblem, pass_: str, formulation: str) -> ConvTile:
    """Large blocks: a program costs about 0.4 ms of Python and a step 1.5 ms, whatever its size."""
    n, p, q = (power_of_two(extent) for extent in (problem.N, problem.P, problem.Q))
    flat = formulation == "gather" and (pass_ == "wgrad" or problem.group_channels < 16)
    depth = problem.taps * problem.group_channels if flat else problem.group_channels
    block_c = min(max(power_of_two(depth), 16), 1024)
    pixels = min(16_384 if block_c <= 32 else 4096, MAX_NUMEL // block_c)
    if formulation == "pixel":
        box = (min(max(n, 16), pixels), 1, 1)
    elif formulation == "gather":
        box = (min(max(power_of_two(problem.N * problem.P * problem.Q), 16), pixels), 1, 1)
    else:
        columns = min(q, pixels)
        rows = min(p, pixels // columns)
        images = min(n, pixels // (columns * rows))
        box = (max(images, 16 // (rows * columns)), rows, columns)
    filters_at_once = min(MAX_NUMEL // max(math.prod(box), block_c), 1024)
    block_k = min(max(power_of_two(problem.group_filters), 16), filters_at_once)
    return ConvTile(formulation, box, block_k, block_c, flat=flat)


def _best(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> ConvTile:
    """The candidate with the least predicted time."""
    found = ranked(problem, pass_, formulation, dtype, precision, gpu)
    return found[0] if found else _impossible(formulation)


def _impossible(formulation: str | None) -> ConvTile:
    """For a formulation that was asked for and cannot run: choose() says why."""
    return ConvTile(str(formulation), (64, 1, 1), 64, 32)


def ranked(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> list[ConvTile]:
    """The candidates by predicted time, the quickest first.

    Of equals (DRAM bounds many) that which the SMs alone would be quickest with, then that with fewest instructions.
    """
    valid = _valid(problem, pass_, formulation, dtype, precision, gpu)
    found = sorted(valid, key=lambda tile: _cost(tile, problem, pass_, dtype, precision, gpu))
    whole = next((tile for tile in found if tile.formulation == "gather" and tile.splits == 1), None)
    if pass_ == "wgrad" or whole is None:
        return found

    # By pointers a second kernel has to be worth it in time, not in power alone.
    def us(tile: ConvTile) -> float:
        return cost.predict(problem, pass_, tile, dtype, precision, gpu).modelled_us

    most = 0.95 * us(whole)
    return [tile for tile in found if tile.formulation != "gather" or tile.splits == 1 or us(tile) < most]


def order(tile: ConvTile) -> tuple[object, ...]:
    """What decides in which order an output of fprop or dgrad is summed; for equal ones it has the same bits.

    Programs that share a depth divide the steps of their box, and how many those are depends on where its pixels lie.
    Which tiles are shared with a tail depends on the batch.  By descriptors every step starts at a multiple of what a
    product takes, so that its length has no say where one program goes through all of them.
    """
    shared = tile.splits > 1
    step = tile.block_c if shared or tile.formulation == "gather" else None
    rows_and_columns, tail = (tile.box[1:], tile.tail) if shared else (None, 0)
    return tile.formulation, step, tile.flat, tile.columns, tile.across, tile.splits, tail, rows_and_columns


def _best_for_any_batch(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> ConvTile:
    """The quickest candidate of those that add in the one order that serves batches of all sizes."""
    if not _valid(problem, pass_, formulation, dtype, precision, gpu):
        return _impossible(formulation)
    settings = pass_, dtype, precision, gpu
    wanted = _order_for_any_batch(replace(problem, N=1), pass_, formulation, dtype, precision, gpu)
    found: list[ConvTile] = []
    for batch in (problem.N, *BATCHES):
        valid = _valid(replace(problem, N=batch), pass_, formulation, dtype, precision, gpu)
        if found := [tile for tile in valid if (order(tile), cost.by_single_warps(tile, *settings)) == wanted]:
            break
    return min(found, key=lambda tile: _cost(tile, problem, pass_, dtype, precision, gpu)[0])


@lru_cache(maxsize=1024)
def _order_for_any_batch(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> tuple[object, ...]:
    """The order whose best tile is the least behind the best of all where it is furthest behind, over BATCHES."""
    times: dict[tuple[object, ...], list[float]] = {}
    for i, batch in enumerate(BATCHES):
        sized = replace(problem, N=batch)
        for tile in _valid(sized, pass_, formulation, dtype, precision, gpu):
            if not tile.tail:
                key = order(tile), cost.by_single_warps(tile, pass_, dtype, precision, gpu)
                row = times.setdefault(key, [math.inf] * len(BATCHES))
                row[i] = min(row[i], _cost(tile, sized, pass_, dtype, precision, gpu)[0])
    best = [min(column) for column in zip(*times.values(), strict=True)]
    return min(times, key=lambda key: max(time / least for time, least in zip(times[key], best, strict=True)))


def _valid(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> list[ConvTile]:
    """The candidates that can run, and of them those that the model may weigh against each other."""
    valid = [
        tile
        for tile in candidates(problem, pass_, dtype, precision, gpu)
        if formulation in (None, tile.formulation) and why_invalid(tile, problem, pass_, dtype, precision, gpu) is None
    ]
    if formulation is None and problem.stride == (1, 1):
        # Pointers are for what descriptors cannot address, and for strides at small batches: the model knows too little
        # of them to weigh the two.
        valid = [tile for tile in valid if tile.formulation != "gather"] or valid
    return valid


def _cost(
    tile: ConvTile, problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU
) -> tuple[float, float, float]:
    """What a choice goes by: microseconds, copies of its operands included; of the loop; of its instructions."""
    predicted = cost.predict(problem, pass_, tile, dtype, precision, gpu)
    us = cost.weighed_us(predicted, gpu)
    if pass_ == "wgrad" and tile.formulation == "pixel" and cost.turned(problem, dtype, precision, gpu):
        us += cost.turn_us(problem, dtype, gpu)
    if cost.filters_turned(tile, pass_, dtype, precision, gpu):
        us += cost.filters_turn_us(problem, dtype, gpu)
    # Tensor cores of half the width (sm_86, sm_89) hide any tile's instructions and traffic; they cost power still.
    us += 0.0 if gpu.arch >= 90 else 0.2 * (predicted.issue_us + predicted.l2_us)
    return us, predicted.loop_us, predicted.issue_us


def candidates(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> list[ConvTile]:
    """The tiles that a chooser weighs: the clean ones that no self-test on this GPU excluded."""
    return excluded.without(clean_candidates(problem, pass_, dtype, precision, gpu), gpu.name, pass_)


@dataclass(frozen=True)
class ElementwiseTile:
    """What one program of a memory-bound kernel makes: rows x cols elements, cols along the contiguous axis."""

    rows: int
    cols: int
    num_warps: int = 4

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols} w{self.num_warps}"


def choose_elementwise(height: int, width: int, dtype: torch.dtype, gpu: GPU) -> ElementwiseTile:
    """The tile for `height` rows of `width` contiguous elements: 16 bytes a thread and load, four times over."""
    budget = 1 << 18 if gpu.interprets else 128 * 4 * 16 // dtype.itemsize // 2
    cols = min(power_of_two(max(width, 1)), budget)
    return ElementwiseTile(max(1, min(power_of_two(max(height, 1)), budget // cols)), cols)
