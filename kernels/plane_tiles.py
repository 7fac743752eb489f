"""Columns of planes of contiguous max-pools (device/pool_planes.py): which pools have them, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tileconv.kernels import strip_tiles
from tileconv.kernels.geometry import Pool2dProblem
from tileconv.kernels.hardware import GPU

AHEAD = 2  # steps between loads and use: 32 warps of an SM have then 16 KB on the way, DRAM needs about 15
# Unrolled: 14 steps of 3x3 windows are about 780 instructions.
MOST_COMPARISONS = 128
STEPS_TO_START = 3  # a program's addresses and first rows take about as many instructions as so many steps


@dataclass(frozen=True)
class PlaneTile:
    """What one program makes: in each of `lanes` columns, less those it shares, `long` outputs (backward: cells)."""

    long: int
    lanes: int = 32
    num_warps: int = 1  # lanes of a warp take pixels from each other without shared memory

    def __str__(self) -> str:
        return f"{self.lanes} columns of {self.long} w{self.num_warps}"


def has_planes(problem: Pool2dProblem, dtype: torch.dtype) -> bool:
    """Whether windows overlap along a row, so that lanes side by side share pixels, and few enough to unroll."""
    overlap = problem.kernel[1] > problem.stride[1] and problem.kernel[0] >= problem.stride[0]
    return overlap and problem.dilation == (1, 1) and problem.taps <= 25 and dtype.itemsize in (2, 4)


def columns(problem: Pool2dProblem, pass_: str) -> int:
    """Of a plane: outputs (backward: cells) beside each other, and those that others' windows reach into."""
    more = strip_tiles.windows_before(problem)[1]
    return problem.Q + more if pass_ == "forward" else max(strip_tiles.cells(problem)[1], problem.Q + more)


@lru_cache(maxsize=4096)
def choose_planes(problem: Pool2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> PlaneTile | None:
    """The length with which schedulers have least to issue, of equals the longest.

    None for pools that have none, and in the interpreter: it counts steps, and a column takes many.
    """
    if gpu.interprets or not has_planes(problem, dtype):
        return None
    lines = problem.P if pass_ == "forward" else strip_tiles.cells(problem)[0]
    longest = max(1, MOST_COMPARISONS // problem.taps)
    own = PlaneTile.lanes - strip_tiles.windows_before(problem)[1]
    across = -(-problem.N * problem.C * columns(problem, pass_) // own)

    def steps(long: int) -> int:
        return -(-across * -(-lines // long) // (4 * gpu.sms)) * (long + STEPS_TO_START)

    longs = sorted({-(-lines // strips) for strips in range(1, lines + 1)}, reverse=True)
    return PlaneTile(min((long for long in longs if long <= longest), key=steps))
