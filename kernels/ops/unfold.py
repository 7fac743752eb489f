"""im2col and col2im."""

from __future__ import annotations

import torch

from tileconv.kernels import checks, hardware, layout
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import unfold as launch_unfold
from tileconv.kernels.ops.conv import conv2d_problem
from tileconv.kernels.ops.registry import Ints, define

WINDOW = "int[2] kernel, int[2] stride, int[4] padding, int[2] dilation"


def unfold_problem(shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Conv2dProblem:
    """The convolution with one filter whose patches the columns are; padding is (top, bottom, left, right)."""
    return conv2d_problem(shape, (1, shape[1], *kernel), stride, padding, dilation, 1)


def _unfold_fake(
    input: torch.Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, patches: bool, run: int = 1
) -> torch.Tensor:
    problem = unfold_problem(input.shape, kernel, stride, padding, dilation)
    depth, pixels = problem.im2col_shape
    return input.new_empty(problem.N, pixels, depth).mT if patches else input.new_empty(problem.N, depth, pixels)


def _unfold(
    input: torch.Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, patches: bool, run: int = 1
) -> torch.Tensor:
    cols = _unfold_fake(input, kernel, stride, padding, dilation, patches)
    if cols.numel():
        problem = unfold_problem(input.shape, kernel, stride, padding, dilation)
        launch_unfold.plan_unfold(problem, input, cols, run, gpu=hardware.gpu_of(input.device)).run()
    return cols


def _fold(
    cols: torch.Tensor,
    shape: Ints,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    channels_last: bool,
    run: int = 1,
) -> torch.Tensor:
    problem = unfold_problem(shape, kernel, stride, padding, dilation)
    depth, pixels = problem.im2col_shape
    checks.belongs("cols", cols, (problem.N, depth, pixels), cols, cols.dtype)
    image = layout.empty_image(shape, cols, channels_last)
    if image.numel():
        launch_unfold.plan_fold(problem, cols, image, run, gpu=hardware.gpu_of(cols.device)).run()
    return image


def _fold_fake(
    cols: torch.Tensor, shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool,
    run: int = 1,
) -> torch.Tensor:  # fmt: skip
    return layout.empty_image(shape, cols, channels_last)


define(f"unfold(Tensor input, {WINDOW}, bool patches, int run=1) -> Tensor", _unfold, _unfold_fake)
define(
    f"fold(Tensor cols, SymInt[4] shape, {WINDOW}, bool channels_last, int run=1) -> Tensor",
    _fold,
    _fold_fake,
)
