"""Convolution: the three passes, and the bias gradient."""

from __future__ import annotations

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv as launch_conv
from tileconv.kernels.launch import plans
from tileconv.kernels.launch import pointwise as launch_pointwise
from tileconv.kernels.ops.registry import Ints, define, remembered

GEOMETRY = "int[2] stride, int[4] padding, int[2] dilation, int groups"
OF_LINEAR = (1, 1), (0, 0, 0, 0), (1, 1), 1
"""The geometry of a linear layer: a 1x1 convolution of images of one pixel."""


@remembered
def conv2d_problem(
    input_shape: Ints, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Conv2dProblem:
    """The problem of a call; padding is (top, bottom, left, right)."""
    n, c, h, w = input_shape
    k, _, r, s = weight_shape
    return Conv2dProblem(
        n, c, h, w, k, r, s, (stride[0], stride[1]), ((padding[0], padding[1]), (padding[2], padding[3])),
        (dilation[0], dilation[1]), groups,
    )  # fmt: skip


def _fprop_fake(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, activation: str | None, precision: str, channels_last: bool, batch_invariant: bool = False,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(input.shape, weight.shape, stride, padding, dilation, groups)
    return layout.empty_image(problem.y_shape, input, channels_last)


def _fprop(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, activation: str | None, precision: str, channels_last: bool, batch_invariant: bool = False,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(input.shape, weight.shape, stride, padding, dilation, groups)
    output = layout.empty_image(problem.y_shape, input, channels_last)
    if output.numel():
        plans.run(
            launch_conv.plan_fprop, problem, input, weight, bias, output, activation=activation, precision=precision,
            batch_invariant=batch_invariant,
        )  # fmt: skip
    return output


def _linear_dropout_fake(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, dropout: float,
    activation: str | None, precision: str, batch_invariant: bool = False,
) -> torch.Tensor:  # fmt: skip
    return input.new_empty((input.shape[0], weight.shape[0], 1, 1))


def _linear_dropout(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, dropout: float,
    activation: str | None, precision: str, batch_invariant: bool = False,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(input.shape, weight.shape, *OF_LINEAR)
    output = input.new_empty(problem.y_shape)
    if output.numel():
        plans.run(
            launch_conv.plan_fprop, problem, input, weight, bias, output, seed, activation=activation,
            precision=precision, batch_invariant=batch_invariant, dropout=dropout,
        )  # fmt: skip
    return output


def _dgrad_fake(
    grad: torch.Tensor, weight: torch.Tensor, input_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, precision: str, channels_last: bool, batch_invariant: bool = False,
) -> torch.Tensor:  # fmt: skip
    return layout.empty_image(input_shape, grad, channels_last)


def _dgrad(
    grad: torch.Tensor, weight: torch.Tensor, input_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, precision: str, channels_last: bool, batch_invariant: bool = False,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(input_shape, weight.shape, stride, padding, dilation, groups)
    checks.belongs("grad", grad, problem.y_shape, weight, weight.dtype)
    grad_input = layout.empty_image(input_shape, grad, channels_last)
    if grad_input.numel():
        plans.run(
            launch_conv.plan_dgrad, problem, grad, weight, grad_input, precision=precision,
            batch_invariant=batch_invariant,
        )  # fmt: skip
    return grad_input


def _wgrad_fake(
    grad: torch.Tensor, input: torch.Tensor, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, precision: str,
) -> torch.Tensor:  # fmt: skip
    return layout.empty_image(weight_shape, grad, channels_last=True)


def _wgrad(
    grad: torch.Tensor, input: torch.Tensor, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, precision: str,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(input.shape, weight_shape, stride, padding, dilation, groups)
    checks.belongs("grad", grad, problem.y_shape, input, input.dtype)
    grad_weight = layout.empty_image(weight_shape, grad, channels_last=True)
    if not grad.numel():
        return grad_weight.zero_()
    plans.run(launch_conv.plan_wgrad, problem, grad, input, grad_weight, precision=precision)
    return grad_weight


define(
    f"conv2d_fprop(Tensor input, Tensor weight, Tensor? bias, {GEOMETRY}, str? activation, str precision, "
    "bool channels_last, bool batch_invariant=False) -> Tensor",
    _fprop,
    _fprop_fake,
)
define(
    "linear_dropout(Tensor input, Tensor weight, Tensor? bias, Tensor seed, float dropout, str? activation, "
    "str precision, bool batch_invariant=False) -> Tensor",
    _linear_dropout,
    _linear_dropout_fake,
)
define(
    f"conv2d_dgrad(Tensor grad, Tensor weight, SymInt[4] input_shape, {GEOMETRY}, str precision, bool channels_last, "
    "bool batch_invariant=False) -> Tensor",
    _dgrad,
    _dgrad_fake,
)
define(
    f"conv2d_wgrad(Tensor grad, Tensor input, SymInt[4] weight_shape, {GEOMETRY}, str precision) -> Tensor",
    _wgrad,
    _wgrad_fake,
)


def _bias_backward(
    grad: torch.Tensor, output: torch.Tensor | None, dropout: float = 0.0
) -> tuple[torch.Tensor | None, torch.Tensor]:
    masked = None
    if output is not None:
        checks.belongs("grad", grad, output.shape, output, output.dtype)
        output = launch_pointwise.rows_in_line(layout.dense(output))
        masked = torch.empty_like(output)
    sums = torch.zeros(grad.shape[1], dtype=grad.dtype, device=grad.device)
    if grad.numel():
        plans.run(launch_pointwise.plan_bias_backward, grad, output, masked, sums, dropout)
    return masked, sums


def _bias_grad(grad: torch.Tensor) -> torch.Tensor:
    return _bias_backward(grad, None)[1]


def _relu_bias_grad(
    grad: torch.Tensor, output: torch.Tensor, dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    masked, sums = _bias_backward(grad, output, dropout)
    assert masked is not None
    return masked, sums


define("bias_grad(Tensor grad) -> Tensor", _bias_grad, lambda grad: grad.new_empty(grad.shape[1]))
define(
    "relu_bias_grad(Tensor grad, Tensor output, float dropout=0.0) -> (Tensor, Tensor)",
    _relu_bias_grad,
    lambda grad, output, dropout=0.0: (torch.empty_like(output), grad.new_empty(grad.shape[1])),
)
