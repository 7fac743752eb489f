"""Locally connected layers: the three passes.  Filters are [P, Q, K, C, R, S]; their memory is best P Q K R S C."""

from __future__ import annotations

import torch

from tileconv.kernels import checks, hardware, layout
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import local as launch_local
from tileconv.kernels.ops.conv import conv2d_problem
from tileconv.kernels.ops.registry import Ints, define

WINDOW = "int[2] stride, int[4] padding, int[2] dilation"


def local_problem(shape: Ints, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Conv2dProblem:
    """The convolution that one pixel's filters would make; padding is (top, bottom, left, right)."""
    return conv2d_problem(shape, weight_shape[2:], stride, padding, dilation, 1)


def _matrices(weight: torch.Tensor) -> torch.Tensor:
    """[P*Q, K, R*S*C]: a view of filters that lie as the kernels read them, a copy of others."""
    p, q, k = weight.shape[:3]
    return weight.permute(0, 1, 2, 4, 5, 3).reshape(p * q, k, -1).contiguous()


def empty_filters(shape: Ints, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised filters [P, Q, K, C, R, S] that lie as the kernels read them."""
    p, q, k, c, r, s = shape
    return like.new_empty(p, q, k, r, s, c).permute(0, 1, 2, 5, 3, 4)


def _local(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    precision: str, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = local_problem(input.shape, weight.shape, stride, padding, dilation)
    output = layout.empty_image(problem.y_shape, input, channels_last)
    if output.numel():
        bias = None if bias is None else bias.contiguous()
        launch_local.plan_fprop(
            problem, input, _matrices(weight), bias, output, gpu=hardware.gpu_of(input.device), precision=precision
        ).run()
    return output


def _local_dgrad(
    grad: torch.Tensor, weight: torch.Tensor, input_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    precision: str, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = local_problem(input_shape, weight.shape, stride, padding, dilation)
    checks.belongs("grad", grad, problem.y_shape, weight, weight.dtype)
    grad_input = layout.empty_image(input_shape, grad, channels_last)
    if grad_input.numel():
        launch_local.plan_dgrad(
            problem, grad, _matrices(weight), grad_input, gpu=hardware.gpu_of(grad.device), precision=precision
        ).run()
    return grad_input


def _local_wgrad(
    grad: torch.Tensor, input: torch.Tensor, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    precision: str,
) -> torch.Tensor:  # fmt: skip
    problem = local_problem(input.shape, weight_shape, stride, padding, dilation)
    checks.belongs("grad", grad, problem.y_shape, input, input.dtype)
    grad_weight = empty_filters(weight_shape, grad)
    if not grad.numel():
        return grad_weight.zero_()
    matrices = grad_weight.permute(0, 1, 2, 4, 5, 3).reshape(problem.P * problem.Q, problem.K, -1)
    launch_local.plan_wgrad(problem, grad, input, matrices, gpu=hardware.gpu_of(grad.device), precision=precision).run()
    return grad_weight


define(
    f"locally_connected2d(Tensor input, Tensor weight, Tensor? bias, {WINDOW}, str precision, bool channels_last) "
    "-> Tensor",
    _local,
    lambda input, weight, bias, stride, padding, dilation, precision, channels_last: layout.empty_image(
        local_problem(input.shape, weight.shape, stride, padding, dilation).y_shape, input, channels_last
    ),
)
define(
    f"locally_connected2d_dgrad(Tensor grad, Tensor weight, SymInt[4] input_shape, {WINDOW}, str precision, "
    "bool channels_last) -> Tensor",
    _local_dgrad,
    lambda grad, weight, input_shape, *settings: layout.empty_image(input_shape, grad, settings[-1]),
)
define(
    f"locally_connected2d_wgrad(Tensor grad, Tensor input, SymInt[6] weight_shape, {WINDOW}, str precision) -> Tensor",
    _local_wgrad,
    lambda grad, input, weight_shape, *settings: empty_filters(weight_shape, grad),
)
