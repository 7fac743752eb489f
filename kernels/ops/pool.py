"""Pooling."""

from __future__ import annotations

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.geometry import AdaptivePool2dProblem, Pool2dProblem
from tileconv.kernels.launch import plans
from tileconv.kernels.launch import pool as launch_pool
from tileconv.kernels.ops.registry import Ints, define, remembered

WINDOW = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"
AVERAGE = "int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor, "
AVERAGE += "bool channels_last"
NORM = "float norm, int[2] kernel, int[2] stride, bool ceil_mode, bool channels_last"


@remembered
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
        plans.run(
            launch_pool.plan_max_forward, problem, input, output, switch if with_switch else None, activation=activation
        )
    return output, switch


def _max_pool_indices(
    switch: torch.Tensor, input_shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> torch.Tensor:
    problem = pool2d_problem(input_shape, kernel, stride, padding, dilation, ceil_mode)
    checks.belongs("switch", switch, problem.y_shape, switch, launch_pool.switch_dtype(problem))
    indices = torch.empty_like(switch, dtype=torch.int64)
    if indices.numel():
        plans.run(launch_pool.plan_switch_to_index, problem, switch, indices)
    return indices


def _max_pool_backward(
    grad: torch.Tensor, switch: torch.Tensor, output: torch.Tensor | None, input_shape: Ints, kernel: Ints,
    stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = pool2d_problem(input_shape, kernel, stride, padding, dilation, ceil_mode)
    checks.belongs("switch", switch, problem.y_shape, grad, launch_pool.switch_dtype(problem))
    checks.belongs("grad", grad, problem.y_shape, switch, grad.dtype if output is None else output.dtype)
    if output is not None:
        checks.belongs("output", output, problem.y_shape, grad, grad.dtype)
    grad_input = layout.empty_image(input_shape, grad, channels_last)
    if grad_input.numel():
        mask = None if output is None else layout.laid_out_like(output, switch)
        plans.run(launch_pool.plan_max_backward, problem, grad, switch, mask, grad_input)
    return grad_input


@remembered
def _adaptive_problem(shape: Ints, output_size: Ints) -> AdaptivePool2dProblem:
    return AdaptivePool2dProblem(shape[0], shape[1], shape[2], shape[3], output_size[0], output_size[1])


def _adaptive_avg_fake(input: torch.Tensor, output_size: Ints, channels_last: bool) -> torch.Tensor:
    return layout.empty_image((*input.shape[:2], *output_size), input, channels_last)


def _adaptive_avg(input: torch.Tensor, output_size: Ints, channels_last: bool) -> torch.Tensor:
    output = _adaptive_avg_fake(input, output_size, channels_last)
    if output.numel():
        problem = _adaptive_problem(input.shape, output_size)
        plans.run(launch_pool.plan_adaptive_avg_forward, problem, input, output)
    return output


def _adaptive_avg_backward(grad: torch.Tensor, input_shape: Ints, channels_last: bool) -> torch.Tensor:
    grad_input = layout.empty_image(input_shape, grad, channels_last)
    if grad_input.numel():
        problem = _adaptive_problem(input_shape, grad.shape[2:])
        plans.run(launch_pool.plan_adaptive_avg_backward, problem, grad, grad_input)
    return grad_input


def _adaptive_max_fake(
    input: torch.Tensor, output_size: Ints, with_switch: bool, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output = layout.empty_image((*input.shape[:2], *output_size), input, channels_last)
    dtype = launch_pool.switch_dtype(_adaptive_problem(input.shape, output_size))
    return output, torch.empty_like(output, dtype=dtype) if with_switch else input.new_empty(0, dtype=dtype)


def _adaptive_max(
    input: torch.Tensor, output_size: Ints, with_switch: bool, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output, switch = _adaptive_max_fake(input, output_size, with_switch, channels_last)
    if output.numel():
        problem = _adaptive_problem(input.shape, output_size)
        plans.run(launch_pool.plan_adaptive_max_forward, problem, input, output, switch if with_switch else None)
    return output, switch


def _adaptive_max_indices(switch: torch.Tensor, input_shape: Ints) -> torch.Tensor:
    problem = _adaptive_problem(input_shape, switch.shape[2:])
    checks.belongs(
        "switch", switch, (*input_shape[:2], *switch.shape[2:]), switch, launch_pool.switch_dtype(problem)
    )  # fmt: skip
    indices = torch.empty_like(switch, dtype=torch.int64)
    if indices.numel():
        plans.run(launch_pool.plan_adaptive_switch_to_index, problem, switch, indices)
    return indices


def _adaptive_max_backward(
    grad: torch.Tensor, switch: torch.Tensor, input_shape: Ints, channels_last: bool
) -> torch.Tensor:
    problem = _adaptive_problem(input_shape, grad.shape[2:])
    shape = (*input_shape[:2], *grad.shape[2:])
    checks.belongs("switch", switch, shape, grad, launch_pool.switch_dtype(problem))
    checks.belongs("grad", grad, shape, grad, grad.dtype)
    grad_input = layout.empty_image(input_shape, grad, channels_last)
    if grad_input.numel():
        plans.run(launch_pool.plan_adaptive_max_backward, problem, grad, switch, grad_input)
    return grad_input


def _average_problem(shape: Ints, kernel: Ints, stride: Ints, padding: Ints, ceil_mode: bool) -> Pool2dProblem:
    return pool2d_problem(shape, kernel, stride, padding, (1, 1), ceil_mode)


def _average_fake(
    input: torch.Tensor, kernel: Ints, stride: Ints, padding: Ints, ceil_mode: bool, channels_last: bool
) -> torch.Tensor:
    problem = _average_problem(input.shape, kernel, stride, padding, ceil_mode)
    return layout.empty_image(problem.y_shape, input, channels_last)


def _avg_pool(
    input: torch.Tensor, kernel: Ints, stride: Ints, padding: Ints, ceil_mode: bool, count_include_pad: bool,
    divisor: int | None, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    output = _average_fake(input, kernel, stride, padding, ceil_mode, channels_last)
    if output.numel():
        problem = _average_problem(input.shape, kernel, stride, padding, ceil_mode)
        averaging = launch_pool.Averaging(count_include_pad, divisor)
        plans.run(launch_pool.plan_average_forward, problem, averaging, input, output)
    return output


def _avg_pool_backward(
    grad: torch.Tensor, input_shape: Ints, kernel: Ints, stride: Ints, padding: Ints, ceil_mode: bool,
    count_include_pad: bool, divisor: int | None, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = _average_problem(input_shape, kernel, stride, padding, ceil_mode)
    checks.belongs("grad", grad, problem.y_shape, grad, grad.dtype)
    grad_input = layout.empty_image(input_shape, grad, channels_last)
    if grad_input.numel():
        averaging = launch_pool.Averaging(count_include_pad, divisor)
        plans.run(launch_pool.plan_average_backward, problem, averaging, grad, None, None, grad_input)
    return grad_input


def _lp_pool(
    input: torch.Tensor, norm: float, kernel: Ints, stride: Ints, ceil_mode: bool, channels_last: bool
) -> torch.Tensor:
    output = _average_fake(input, kernel, stride, (0, 0), ceil_mode, channels_last)
    if output.numel():
        problem = _average_problem(input.shape, kernel, stride, (0, 0), ceil_mode)
        averaging = launch_pool.Averaging(True, None, norm)
        plans.run(launch_pool.plan_average_forward, problem, averaging, input, output)
    return output


def _lp_pool_backward(
    grad: torch.Tensor, input: torch.Tensor, output: torch.Tensor, norm: float, kernel: Ints, stride: Ints,
    ceil_mode: bool, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = _average_problem(input.shape, kernel, stride, (0, 0), ceil_mode)
    for name, tensor in (("grad", grad), ("output", output)):
        checks.belongs(name, tensor, problem.y_shape, input, input.dtype)
    grad_input = layout.empty_image(input.shape, grad, channels_last)
    if grad_input.numel():
        averaging = launch_pool.Averaging(True, None, norm)
        plans.run(launch_pool.plan_average_backward, problem, averaging, grad, input, output, grad_input)
    return grad_input


def _max_unpool(input: torch.Tensor, indices: torch.Tensor, output_size: Ints, channels_last: bool) -> torch.Tensor:
    checks.belongs("indices", indices, input.shape, input, torch.int64)
    size = output_size[0] * output_size[1]
    if indices.numel() and indices.device.type == "cpu" and (indices.min() < 0 or indices.max() >= size):
        raise ValueError(
            f"indices reach from {int(indices.min())} to {int(indices.max())}: allowed are 0 to {size - 1}, the places "
            f"of an output of {output_size[0]}x{output_size[1]}"
        )
    output = layout.empty_image((*input.shape[:2], *output_size), input, channels_last).zero_()
    if input.numel():
        plans.run(launch_pool.plan_unpool, input, indices, output)
    return output


def _max_unpool_backward(grad: torch.Tensor, indices: torch.Tensor, channels_last: bool) -> torch.Tensor:
    checks.belongs("indices", indices, (*grad.shape[:2], *indices.shape[2:]), grad, torch.int64)
    grad_input = layout.empty_image(indices.shape, grad, channels_last)
    if grad_input.numel():
        plans.run(launch_pool.plan_unpool_backward, grad, indices, grad_input)
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
define(
    "adaptive_max_pool2d(Tensor input, SymInt[2] output_size, bool with_switch, bool channels_last) -> "
    "(Tensor, Tensor)",
    _adaptive_max,
    _adaptive_max_fake,
)
define(
    "adaptive_max_pool2d_indices(Tensor switch, SymInt[4] input_shape) -> Tensor",
    _adaptive_max_indices,
    lambda switch, input_shape: torch.empty_like(switch, dtype=torch.int64),
)
define(
    "adaptive_max_pool2d_backward(Tensor grad, Tensor switch, SymInt[4] input_shape, bool channels_last) -> Tensor",
    _adaptive_max_backward,
    lambda grad, switch, input_shape, channels_last: layout.empty_image(input_shape, grad, channels_last),
)
define(
    f"avg_pool2d(Tensor input, {AVERAGE}) -> Tensor",
    _avg_pool,
    lambda input, kernel, stride, padding, ceil_mode, *rest: _average_fake(
        input, kernel, stride, padding, ceil_mode, rest[-1]
    ),
)
define(
    f"avg_pool2d_backward(Tensor grad, SymInt[4] input_shape, {AVERAGE}) -> Tensor",
    _avg_pool_backward,
    lambda grad, input_shape, *window: layout.empty_image(input_shape, grad, window[-1]),
)
define(
    f"lp_pool2d(Tensor input, {NORM}) -> Tensor",
    _lp_pool,
    lambda input, norm, kernel, stride, ceil_mode, channels_last: _average_fake(
        input, kernel, stride, (0, 0), ceil_mode, channels_last
    ),
)
define(
    f"lp_pool2d_backward(Tensor grad, Tensor input, Tensor output, {NORM}) -> Tensor",
    _lp_pool_backward,
    lambda grad, input, output, *window: layout.empty_image(input.shape, grad, window[-1]),
)
define(
    "max_unpool2d(Tensor input, Tensor indices, SymInt[2] output_size, bool channels_last) -> Tensor",
    _max_unpool,
    lambda input, indices, output_size, channels_last: layout.empty_image(
        (*input.shape[:2], *output_size), input, channels_last
    ),
)
define(
    "max_unpool2d_backward(Tensor grad, Tensor indices, bool channels_last) -> Tensor",
    _max_unpool_backward,
    lambda grad, indices, channels_last: layout.empty_image(indices.shape, grad, channels_last),
)
