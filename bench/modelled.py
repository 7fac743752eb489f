"""What the cost model says of a layer's forward pass by its problem alone, for layers of no suite: modelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tileconv.kernels.geometry import AdaptivePool2dProblem, Conv2dProblem, Pool2dProblem, Runs
    from tileconv.kernels.hardware import GPU
    from tileconv.model.shapes import Row


def product_us(problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> float:
    """A convolution in the tile that would be launched, and the kernels that prepare its operands where some do.

    A first layer's image is contiguous.
    """
    from tileconv.kernels import cost, run_tiles, tiles
    from tileconv.kernels.launch import padded

    inner, moved, runs = problem, [], None
    if run_tiles.in_runs(problem, "fprop", dtype, "ieee", gpu):
        runs = _contiguous_runs(problem, dtype)
        if runs is None:
            inner = problem.in_aligned_rows
            moved, runs = [(problem.x_shape, inner.x_shape)], _contiguous_runs(inner, dtype)
        moved.append((problem.w_shape, problem.w_shape))
    elif tiles.first_layer(problem, "fprop", dtype, "ieee", gpu):
        inner = problem.space_to_depth
        moved = [(problem.x_shape, inner.x_shape), (problem.w_shape, inner.w_shape)]
    elif padded.applies(problem, "fprop", dtype, "ieee", gpu):
        [(inner, _)] = padded.problems(problem, "fprop", dtype, "ieee")
        moved = [(problem.x_shape, inner.x_shape), (problem.w_shape, inner.w_shape)]
    if runs:
        tile = run_tiles.choose_runs(inner, "fprop", dtype, "ieee", gpu, runs=runs)
    else:
        tile = tiles.choose(inner, "fprop", dtype, "ieee", gpu)
    modelled = cost.predict(inner, "fprop", tile, dtype, "ieee", gpu, runs).modelled_us
    return modelled + sum(moved_us([math.prod(shape) for shape in pair], dtype, gpu) for pair in moved)


def _contiguous_runs(problem: Conv2dProblem, dtype: torch.dtype) -> Runs | None:
    pitches = (problem.C * problem.H * problem.W, problem.H * problem.W, problem.W)
    return problem.inner_runs(dtype.itemsize, "fprop", pitches) or problem.runs(dtype.itemsize, "fprop")


def moved_us(elements: Sequence[int], dtype: torch.dtype, gpu: GPU) -> float:
    """A kernel that moves tensors of so many elements once each."""
    from tileconv.kernels import cost

    return cost.streaming_us(dtype.itemsize * sum(elements), gpu)


def pool_us(problem: Pool2dProblem | AdaptivePool2dProblem, dtype: torch.dtype, gpu: GPU) -> float:
    """A pool without switches: the input once, the output once."""
    n, c = problem.N, problem.C
    return moved_us((n * c * problem.H * problem.W, n * c * problem.P * problem.Q), dtype, gpu)


def forward_us(rows: Sequence[Row], dtype: torch.dtype, gpu: GPU) -> float:
    """A network's forward pass from the rows of model.shapes; ReLUs are in the convolutions."""
    from tileconv.kernels.geometry import Conv2dProblem

    total = 0.0
    for row in rows:
        if row.parts:  # a module's branches, and the pass that stacks them
            total += forward_us(row.parts, dtype, gpu) + moved_us([2 * math.prod(row.shape)], dtype, gpu)
        elif row.problem is None:  # a norm
            total += moved_us([2 * row.elements], dtype, gpu)
        elif isinstance(row.problem, Conv2dProblem):
            total += product_us(row.problem, dtype, gpu)
        else:
            total += pool_us(row.problem, dtype, gpu)
    return total
