"""im2col, col2im, and the convolution that textbooks make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tileconv.kernels import checks, geometry, layout
from tileconv.kernels.autograd import conv as autograd_conv
from tileconv.kernels.autograd import unfold as autograd
from tileconv.kernels.functional.common import IntOrPair, autocast, fp32_precision
from tileconv.kernels.functional.conv import _conv_padding
from tileconv.kernels.ops.conv import conv2d_problem
from tileconv.kernels.ops.unfold import unfold_problem


def unfold(
    input: torch.Tensor,
    kernel_size: IntOrPair,
    dilation: IntOrPair = 1,
    padding: IntOrPair = 0,
    stride: IntOrPair = 1,
) -> torch.Tensor:
    """The patches of input as columns (im2col), as torch.nn.functional.unfold.

    input [N, C, H, W] or [C, H, W] -> [N, C * R * S, P * Q] or [C * R * S, P * Q], contiguous: column p * Q + q holds
    the patch of output pixel (p, q), channels before rows before columns, zero outside the image.  P and Q as in
    conv2d.  Raises TypeError or ValueError that names the argument.
    """
    batched = checks.image("input", input)
    kernel, stride, dilation = _window(kernel_size, stride, dilation)
    top, left = checks.pair("padding", padding, 0)
    edges = (top, top, left, left)
    unfold_problem(batched.shape, kernel, stride, edges, dilation)  # raises if nothing is left
    cols: torch.Tensor = autograd.unfold(batched, kernel, stride, edges, dilation, False, 1)
    return cols if input.dim() == 4 else cols.squeeze(0)


def fold(
    input: torch.Tensor,
    output_size: IntOrPair,
    kernel_size: IntOrPair,
    dilation: IntOrPair = 1,
    padding: IntOrPair = 0,
    stride: IntOrPair = 1,
) -> torch.Tensor:
    """The sum of overlapping patches (col2im), as torch.nn.functional.fold: the transpose of unfold, not its inverse.

    input [N, C * R * S, P * Q] or [C * R * S, P * Q] -> [N, C, H, W] or [C, H, W], contiguous, with (H, W) =
    output_size.  Every pixel gathers its patches in a fixed order: the same bits on every run.  Raises TypeError or
    ValueError that names the argument.
    """
    checks.tensor("input", input)
    if input.dim() not in (2, 3) or 0 in input.shape[-2:]:
        raise ValueError(f"input has shape {tuple(input.shape)}: allowed is [N, C * R * S, P * Q], or no N")
    batched = input if input.dim() == 3 else input.unsqueeze(0)
    size = checks.pair("output_size", output_size, 1)
    kernel, stride, dilation = _window(kernel_size, stride, dilation)
    top, left = checks.pair("padding", padding, 0)
    edges = (top, top, left, left)
    taps = kernel[0] * kernel[1]
    if batched.shape[1] % taps:
        raise ValueError(
            f"input has shape {tuple(input.shape)}: its {batched.shape[1]} rows must be a multiple of the "
            f"{kernel[0]}x{kernel[1]} taps of kernel_size"
        )
    shape = (batched.shape[0], batched.shape[1] // taps, *size)
    problem = unfold_problem(shape, kernel, stride, edges, dilation)
    if batched.shape[2] != problem.P * problem.Q:
        raise ValueError(
            f"input has shape {tuple(input.shape)}: output_size={size} has {problem.P}x{problem.Q} patches, "
            f"so it needs {problem.P * problem.Q} columns"
        )
    image: torch.Tensor = autograd.fold(batched, shape, kernel, stride, edges, dilation, False, 1)
    return image if input.dim() == 3 else image.squeeze(0)


def conv2d_im2col(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    precision: str | None = None,
) -> torch.Tensor:
    """conv2d the textbook way: unfold, then one matrix product over the columns.  A baseline, not a way to be fast.

    Arguments, result and errors are those of conv2d.  The matrix of patches, geometry.im2col_bytes of memory, is
    written and read once more, and kept for the weight's gradient.
    """
    checks.choice("activation", activation, checks.ACTIVATIONS)
    batched = checks.image("input", input)
    batched, weight, bias = autocast(batched, weight, bias)
    groups = checks.convolution(batched, weight, bias, groups)
    kernel, stride, dilation = _window(tuple(weight.shape[2:]), stride, dilation)
    edges = _conv_padding(padding, kernel, stride, dilation)
    problem = conv2d_problem(batched.shape, weight.shape, stride, edges, dilation, groups)
    channels_last = layout.is_channels_last(batched) or layout.is_channels_last(weight)
    # Patches lie as rows: the matrix product then finds its depth contiguous in both operands.  A group's channels stay
    # side by side where they are, so that 16 bytes move at once.
    run = problem.group_channels if layout.is_channels_last(batched) else 1
    cols = autograd.unfold(batched, kernel, stride, edges, dilation, True, run)
    filters = weight if run == 1 else weight.permute(0, 2, 3, 1)
    matrix = cols.mT.unflatten(1, (problem.P, problem.Q)).permute(0, 3, 1, 2)
    output: torch.Tensor = autograd_conv.conv2d(
        matrix, filters.reshape(weight.shape[0], -1, 1, 1), bias, (1, 1), (0, 0, 0, 0), (1, 1), groups, activation,
        fp32_precision(precision, batched, "conv"), channels_last, False,
    )  # fmt: skip
    return output if input.dim() == 4 else output.squeeze(0)


def _window(
    kernel_size: IntOrPair | Sequence[int], stride: IntOrPair, dilation: IntOrPair
) -> tuple[geometry.Pair, geometry.Pair, geometry.Pair]:
    return (
        checks.pair("kernel_size", kernel_size, 1),
        checks.pair("stride", stride, 1),
        checks.pair("dilation", dilation, 1),
    )
