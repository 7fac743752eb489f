"""Transposed convolution: the input gradient of a convolution, with a bias and an activation of its own."""

from __future__ import annotations

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.launch import conv as launch_conv
from tileconv.kernels.launch import plans
from tileconv.kernels.ops.conv import GEOMETRY, conv2d_problem
from tileconv.kernels.ops.registry import Ints, define


def _conv_transpose(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_shape: Ints, stride: Ints,
    padding: Ints, dilation: Ints, groups: int, activation: str | None, precision: str, channels_last: bool,
    batch_invariant: bool = False,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(output_shape, weight.shape, stride, padding, dilation, groups)
    checks.belongs("input", input, problem.y_shape, weight, weight.dtype)
    output = layout.empty_image(output_shape, input, channels_last)
    if output.numel():
        plans.run(
            launch_conv.plan_transpose, problem, input, weight, bias, output, activation=activation,
            precision=precision, batch_invariant=batch_invariant,
        )  # fmt: skip
    return output


def _conv_transpose_fake(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_shape: Ints, stride: Ints,
    padding: Ints, dilation: Ints, groups: int, activation: str | None, precision: str, channels_last: bool,
    batch_invariant: bool = False,
) -> torch.Tensor:  # fmt: skip
    return layout.empty_image(output_shape, input, channels_last)


define(
    f"conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, SymInt[4] output_shape, {GEOMETRY}, "
    "str? activation, str precision, bool channels_last, bool batch_invariant=False) -> Tensor",
    _conv_transpose,
    _conv_transpose_fake,
)
