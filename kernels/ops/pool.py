"""Pooling."""

from __future__ import annotations

import torch

from tileconv.kernels import hardware, layout
from tileconv.kernels.geometry import AdaptivePool2dProblem, Pool2dProblem
from tileconv.kernels.launch import pool as launch_pool
from tileconv.kernels.ops.registry import Ints, define

WINDOW = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"


def pool2d_problem(
    shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> Pool2dProblem:
    """The problem of a call."""
    n, c, h, w = shape
    pairs = [(pair[0], pair[1]) for pair in (kernel, stride, padding, dilation)]
    return Pool2dProblem(n, c, h, w, pairs[0], pairs[1], pairs[2], pairs[3], ceil_mode)


def _max_pool_fake(
    input: torch.Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool,
    activation: str | None, with_switch: bool, channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    problem = pool2d_problem(input.shape, kernel, stride, padding, dilation, ceil_mode)
    output = layout.empty_image(problem.y_shape, input, channels_last)
    dtype = launch_pool.switch_dtype(problem)
    return output, torch.empty_like(output, dtype=dtype) if with_switch else input.new_empty(0, dtype=dtype)


def _max_pool(
    input: torch.Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool,
    activation: str | None, with_switch: bool, channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    problem = pool2d_problem(input.shape, kernel, stride, padding, dilation, ceil_mode)
    output, switch = _max_pool_fake(
        input, kernel, stride, padding, dilation, ceil_mode, activation, with_switch, channels_last
    )
    if output.numel():
        launch_pool.plan_max_forward(
            problem, input, output, switch if with_switch else None, gpu=hardware.gpu_of(input.device),
            activation=activation,
        ).run()  # fmt: skip
    return output, switch


def _max_pool_indices(
    switch: torch.Tensor, input_shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> torch.Tensor:
    problem = pool2d_problem(input_shape, kernel, stride, padding, dilation, ceil_mode)
    indices = torch.empty_like(switch, dtype=torch.int64)
    if indices.numel():
        launch_pool.plan_switch_to_index(problem, switch, indices, gpu=hardware.gpu_of(switch.device)).run()
    return indices


def _max_pool_backward(
    grad: torch.Tensor, switch: torch.Tensor, output: torch.Tensor | None, input_shape: Ints, kernel: Ints,
    stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = pool2d_problem(input_shape, kernel, stride, padding, dilation, ceil_mode)
    grad_input = layout.empty_image(input_shape, grad, channels_last)
    if grad_input.numel():
        mask = None if output is None else layout.laid_out_like(output, switch)
        gpu = hardware.gpu_of(grad.device)
        launch_pool.plan_max_backward(problem, grad, switch, mask, grad_input, gpu=gpu).run()
    return grad_input


def _adaptive_problem(shape: Ints, output_size: Ints) -> AdaptivePool2dProblem:
    return AdaptivePool2dProblem(shape[0], shape[1], shape[2], shape[3], output_size[0], output_size[1])


def _adaptive_avg_fake(input: torch.Tensor, output_size: Ints, channels_last: bool) -> torch.Tensor:
    return layout.empty_image((*input.shape[:2], *output_size), input, channels_last)


def _adaptive_avg(input: torch.Tensor, output_size: Ints, channels_last: bool) -> torch.Tensor:
    output = _adaptive_avg_fake(input, output_size, channels_last)
    if output.numel():
        problem = _adaptive_problem(input.shape, output_size)
        launch_pool.plan_adaptive_avg_forward(problem, input, output, gpu=hardware.gpu_of(input.device)).run()
    return output


def _adaptive_avg_backward(grad: torch.Tensor, input_shape: Ints, channels_last: bool) -> torch.Tensor:
    grad_input = layout.empty_image(input_shape, grad, channels_last)
    if grad_input.numel():
        problem = _adaptive_problem(input_shape, grad.shape[2:])
        launch_pool.plan_adaptive_avg_backward(problem, grad, grad_input, gpu=hardware.gpu_of(grad.device)).run()
    return grad_input


define(
    f"max_pool2d(Tensor input, {WINDOW}, str? activation, bool with_switch, bool channels_last) -> (Tensor, Tensor)",
    _max_pool,
    _max_pool_fake,
)
define(
    f"max_pool2d_indices(Tensor switch, SymInt[4] input_shape, {WINDOW}) -> Tensor",
    _max_pool_indices,
    lambda switch, *window: torch.empty_like(switch, dtype=torch.int64),
)
define(
    f"max_pool2d_backward(Tensor grad, Tensor switch, Tensor? output, SymInt[4] input_shape, {WINDOW}, "
    "bool channels_last) -> Tensor",
    _max_pool_backward,
    lambda grad, switch, output, input_shape, *window: layout.empty_image(input_shape, grad, window[-1]),
)
define(
    "adaptive_avg_pool2d(Tensor input, SymInt[2] output_size, bool channels_last) -> Tensor",
    _adaptive_avg,
    _adaptive_avg_fake,
)
define(
    "adaptive_avg_pool2d_backward(Tensor grad, SymInt[4] input_shape, bool channels_last) -> Tensor",
    _adaptive_avg_backward,
    lambda grad, input_shape, channels_last: layout.empty_image(input_shape, grad, channels_last),
)
