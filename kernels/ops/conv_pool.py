"""Convolution, activation and max-pool in one op."""

from __future__ import annotations

import torch

from tileconv.kernels import layout
from tileconv.kernels.geometry import Conv2dProblem, Pool2dProblem
from tileconv.kernels.launch import conv_pool as launch_conv_pool
from tileconv.kernels.launch import plans
from tileconv.kernels.launch import pool as launch_pool
from tileconv.kernels.ops.conv import GEOMETRY, conv2d_problem
from tileconv.kernels.ops.pool import pool2d_problem
from tileconv.kernels.ops.registry import Ints, define

POOL = "int[2] kernel, int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation, bool ceil_mode"


def _problems(
    input: torch.Tensor, weight: torch.Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int, kernel: Ints,
    pool_stride: Ints, pool_padding: Ints, pool_dilation: Ints, ceil_mode: bool,
) -> tuple[Conv2dProblem, Pool2dProblem]:  # fmt: skip
    problem = conv2d_problem(input.shape, weight.shape, stride, padding, dilation, groups)
    return problem, pool2d_problem(problem.y_shape, kernel, pool_stride, pool_padding, pool_dilation, ceil_mode)


def _fake(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, kernel: Ints, pool_stride: Ints, pool_padding: Ints, pool_dilation: Ints, ceil_mode: bool,
    activation: str | None, precision: str, with_switch: bool, channels_last: bool,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    _, pool = _problems(
        input, weight, stride, padding, dilation, groups, kernel, pool_stride, pool_padding, pool_dilation, ceil_mode
    )
    output = layout.empty_image(pool.y_shape, input, channels_last)
    dtype = launch_pool.switch_dtype(pool)
    return output, torch.empty_like(output, dtype=dtype) if with_switch else input.new_empty(0, dtype=dtype)


def _conv_pool(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, kernel: Ints, pool_stride: Ints, pool_padding: Ints, pool_dilation: Ints, ceil_mode: bool,
    activation: str | None, precision: str, with_switch: bool, channels_last: bool,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    geometry = (stride, padding, dilation, groups, kernel, pool_stride, pool_padding, pool_dilation, ceil_mode)
    problem, pool = _problems(input, weight, *geometry)
    output, switches = _fake(
        input, weight, bias, *geometry, activation, precision, with_switch, channels_last, batch_invariant
    )
    if output.numel():
        plans.run(
            launch_conv_pool.plan, problem, pool, input, weight, bias, output, switches if with_switch else None,
            activation=activation, precision=precision, channels_last=channels_last, batch_invariant=batch_invariant,
        )  # fmt: skip
    return output, switches


define(
    f"conv2d_max_pool2d(Tensor input, Tensor weight, Tensor? bias, {GEOMETRY}, {POOL}, str? activation, str precision, "
    "bool with_switch, bool channels_last, bool batch_invariant=False) -> (Tensor, Tensor)",
    _conv_pool,
    _fake,
)
