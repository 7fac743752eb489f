"""Strips of max-pools whose windows overlap (device/pool_strips.py): which pools have them, how long and how wide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from tileconv.kernels import cost, cost_rates
from tileconv.kernels.conv_tile import power_of_two
from tileconv.kernels.geometry import Pair, Pool2dProblem
from tileconv.kernels.hardware import GPU

STAGES = 3  # of the copies into shared memory: two rows ahead of the one that is pooled
# By bytes of an element: compiled for sm_80 and sm_90 windows of up to 3x3 take at most 235 registers.
WIDEST = {"forward": {2: 8, 4: 8}, "backward": {2: 5, 4: 7}}
# Instructions of a thread for each comparison of a pixel, or each gradient added, and for each step besides: compiled
# for sm_90, fp16, 3x3 windows at stride 2, where the kernels without strips take 12 for each comparison.
INSTRUCTIONS = {"forward": 6.4, "backward": 4.3}
STEP_INSTRUCTIONS = 60
# A scheduler's only warp waits for its own results every other cycle: assumed, not measured.
WARPS_TO_FILL = 2
EQUAL = 1.05  # times this close are the same to the model
FEW = 1.1  # times the least bytes: fewer than this are not worth fewer warps


@dataclass(frozen=True)
class StripTile:
    """What one program makes: of `rows` strips, each `long` x `wide` outputs (backward: cells), `cols` channels."""

    long: int
    wide: int
    rows: int
    cols: int
    num_warps: int = 1  # a warp exchanges switches without shared memory, and SMs share the work evenly

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols} strips of {self.long}x{self.wide} w{self.num_warps}"

    def strips(self, extents: Pair) -> Pair:
        """How many cover that many rows and columns."""
        return -(-extents[0] // self.long), -(-extents[1] // self.wide)


def has_strips(problem: Pool2dProblem, dtype: torch.dtype) -> bool:
    """Whether windows overlap, no further than with their next neighbours, so that a step needs what one step kept."""
    (r, s), (down, across) = problem.kernel, problem.stride
    overlap = down < r <= 2 * down and across <= s <= 2 * across and max(problem.stride) <= 2
    return overlap and problem.dilation == (1, 1) and dtype.itemsize in (2, 4)


def cells(problem: Pool2dProblem) -> Pair:
    """Rows and columns of cells, each of stride x stride input pixels, that cover the input."""
    rows, columns = (
        -(-(extent + pad) // stride)
        for extent, pad, stride in zip(problem.x_shape[2:], problem.padding, problem.stride, strict=True)
    )
    return rows, columns


def strip_tile(problem: Pool2dProblem, dtype: torch.dtype, gpu: GPU, long: int, wide: int) -> StripTile:
    """The tile with strips of that size: 16 bytes of channels a thread, no more than 128 of a pixel."""
    if gpu.interprets:  # few programs, large blocks
        cols = min(power_of_two(problem.C), 1024)
        return StripTile(long, wide, min(power_of_two(problem.N * 64), (1 << 16) // cols), cols)
    cols = min(power_of_two(problem.C), 128 // dtype.itemsize)
    return StripTile(long, wide, max(1, 32 * 16 // dtype.itemsize // cols), cols)


@lru_cache(maxsize=4096)
def choose_strips(problem: Pool2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> StripTile | None:
    """The strips of the least modelled time; of equals those that load least, down to FEW, then the least busy.

    None for pools that have none, and in the interpreter: it counts steps, and a strip takes many.
    """
    if gpu.interprets or not has_strips(problem, dtype):
        return None
    lines, columns = (problem.P, problem.Q) if pass_ == "forward" else cells(problem)
    widest = WIDEST[pass_][dtype.itemsize] if problem.taps <= 9 else 4
    # Switches of as many windows as an element has bytes are 16 bytes; a strip of cells needs windows beside its own.
    more = 0 if pass_ == "forward" else windows_before(problem)[1]
    wides = [wide for wide in range(1, widest + 1) if (wide + more) % dtype.itemsize == 0]
    longs = sorted({-(-lines // strips) for strips in range(1, lines + 1)})
    least = problem.bytes_least(dtype.itemsize, switch=True)
    dram = cost.streaming_us(least, gpu)
    found = []
    for tile in (strip_tile(problem, dtype, gpu, long, wide) for wide in wides for long in longs):
        moved = _moved(problem, pass_, dtype, tile.strips((lines, columns)))
        busy = _busy_us(problem, pass_, dtype, gpu, tile)
        found.append((max(dram, busy, 1e6 * moved / gpu.l2), max(moved, FEW * least), busy, tile))
    limit = EQUAL * min(time for time, *_ in found)
    return min((each for each in found if each[0] <= limit), key=lambda each: each[1:3])[-1]


def windows_before(problem: Pool2dProblem) -> Pair:
    """Rows and columns of windows before a cell's own that reach into it."""
    return (problem.kernel[0] - 1) // problem.stride[0], (problem.kernel[1] - 1) // problem.stride[1]


def _moved(problem: Pool2dProblem, pass_: str, dtype: torch.dtype, strips: Pair) -> int:
    """Bytes that all strips ask for: everything once, and what they share with their neighbours once more."""
    if pass_ == "forward":
        edges = [window - stride for window, stride in zip(problem.kernel, problem.stride, strict=True)]
        loaded, size = problem.x_shape[2:], dtype.itemsize
        once = problem.P * problem.Q * (dtype.itemsize + 1)
    else:
        edges = [*windows_before(problem)]
        loaded, size = (problem.P, problem.Q), dtype.itemsize + 1
        once = problem.H * problem.W * dtype.itemsize
    rows, columns = (extent + (n - 1) * edge for extent, n, edge in zip(loaded, strips, edges, strict=True))
    return problem.N * problem.C * (rows * columns * size + once)


def _busy_us(problem: Pool2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU, tile: StripTile) -> float:
    """What schedulers take to issue the steps of their warps; copies run ahead of them."""
    (r, s), (down, across) = problem.kernel, problem.stride
    if pass_ == "forward":
        extents, operations = (problem.P, problem.Q), (s - 1) * down + r - 1
        copied = down * ((tile.wide - 1) * across + s) * dtype.itemsize
    else:
        extents, operations = cells(problem), problem.taps
        copied = (tile.wide + windows_before(problem)[1]) * (dtype.itemsize + 1)
    shared = (STAGES - 1) * copied * tile.rows * tile.cols
    filled = min(1.0, cost.occupancy(255, shared, tile.num_warps, gpu) / (4 * WARPS_TO_FILL))
    lanes = problem.N * math.prod(tile.strips(extents))
    warps = -(-lanes // tile.rows) * -(-problem.C // tile.cols) * tile.num_warps
    each = tile.rows * tile.cols // (32 * tile.num_warps)
    step = STEP_INSTRUCTIONS + INSTRUCTIONS[pass_] * operations * each * tile.wide
    turns = max(WARPS_TO_FILL, -(-warps // (4 * gpu.sms)) / filled) if filled else math.inf
    return 1e6 * (cost_rates.FILL_CYCLES + (tile.long + 1) * step * turns) / gpu.clock
