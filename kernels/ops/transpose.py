"""Transposed convolution: the input gradient of a convolution, with a bias and an activation of its own."""

from __future__ import annotations

import torch

from tileconv.kernels import checks, hardware, layout
from tileconv.kernels.launch import conv as launch_conv
from tileconv.kernels.ops.conv import GEOMETRY, conv2d_problem
from tileconv.kernels.ops.registry import Ints, define


def _conv_transpose(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_shape: Ints, stride: Ints,
    padding: Ints, dilation: Ints, groups: int, activation: str | None, precision: str, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(output_shape, weight.shape, stride, padding, dilation, groups)
    checks.belongs("input", input, problem.y_shape, weight, weight.dtype)
    output = layout.empty_image(output_shape, input, channels_last)
    if output.numel():
        gpu = hardware.gpu_of(input.device)
        for launch in launch_conv.plan_transposed(
            problem, input, weight, bias, output, gpu=gpu, activation=activation, precision=precision
        ):
            launch.run()
    return output


define(
    f"conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, SymInt[4] output_shape, {GEOMETRY}, "
    "str? activation, str precision, bool channels_last) -> Tensor",
    _conv_transpose,
    lambda input, weight, bias, output_shape, *settings: layout.empty_image(output_shape, input, settings[-1]),
)
