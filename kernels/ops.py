"""torch.ops.tileconv: schemas, what they return without running (fakes), and how they run.

Arguments are already checked and complete here; functional.py is the door for people.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tileconv.kernels import hardware, layout
from tileconv.kernels.geometry import AdaptivePool2dProblem, Conv2dProblem, Pool2dProblem
from tileconv.kernels.launch import conv as launch_conv
from tileconv.kernels.launch import pointwise as launch_pointwise
from tileconv.kernels.launch import pool as launch_pool

Ints = Sequence[int]
OPS = torch.ops.tileconv
LIBRARY = torch.library.Library("tileconv", "DEF")  # must stay alive: its death takes the ops with it
GEOMETRY = "int[2] stride, int[4] padding, int[2] dilation, int groups"
WINDOW = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"tileconv::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"tileconv::{name}", functools.partial(_batched, getattr(OPS, name)), lib=LIBRARY)


def _batched(op: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """vmap's rule for every op: one call a sample.  What a batch has in common, an op's own N axis already batches."""
    columns = [
        argument.unbind(dim) if isinstance(dim, int) else [argument] * info.batch_size
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    results = [op(*sample) for sample in zip(*columns, strict=True)]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


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


def pool2d_problem(
    shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> Pool2dProblem:
    """The problem of a call."""
    n, c, h, w = shape
    pairs = [(pair[0], pair[1]) for pair in (kernel, stride, padding, dilation)]
    return Pool2dProblem(n, c, h, w, pairs[0], pairs[1], pairs[2], pairs[3], ceil_mode)


# -- convolution -------------------------------------------------------------------------------------------------------


def _fprop_fake(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, activation: str | None, precision: str, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(input.shape, weight.shape, stride, padding, dilation, groups)
    return layout.empty_image(problem.y_shape, input, channels_last)


def _fprop(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, activation: str | None, precision: str, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(input.shape, weight.shape, stride, padding, dilation, groups)
    output = layout.empty_image(problem.y_shape, input, channels_last)
    if output.numel():
        gpu = hardware.gpu_of(input.device)
        for launch in launch_conv.plan_fprop(
            problem, input, weight, bias, output, gpu=gpu, activation=activation, precision=precision
        ):
            launch.run()
    return output


def _dgrad_fake(
    grad: torch.Tensor, weight: torch.Tensor, input_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, precision: str, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    return layout.empty_image(input_shape, grad, channels_last)


def _dgrad(
    grad: torch.Tensor, weight: torch.Tensor, input_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, precision: str, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    problem = conv2d_problem(input_shape, weight.shape, stride, padding, dilation, groups)
    grad_input = layout.empty_image(input_shape, grad, channels_last)
    if grad_input.numel():
        gpu = hardware.gpu_of(grad.device)
        for launch in launch_conv.plan_dgrad(problem, grad, weight, grad_input, gpu=gpu, precision=precision):
            launch.run()
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
    grad_weight = layout.empty_image(weight_shape, grad, channels_last=True)
    if not grad.numel():
        return grad_weight.zero_()
    gpu = hardware.gpu_of(grad.device)
    for launch in launch_conv.plan_wgrad(problem, grad, input, grad_weight, gpu=gpu, precision=precision):
        launch.run()
    return grad_weight


_define(
    f"conv2d_fprop(Tensor input, Tensor weight, Tensor? bias, {GEOMETRY}, str? activation, str precision, "
    "bool channels_last) -> Tensor",
    _fprop,
    _fprop_fake,
)
_define(
    f"conv2d_dgrad(Tensor grad, Tensor weight, SymInt[4] input_shape, {GEOMETRY}, str precision, bool channels_last) "
    "-> Tensor",
    _dgrad,
    _dgrad_fake,
)
_define(
    f"conv2d_wgrad(Tensor grad, Tensor input, SymInt[4] weight_shape, {GEOMETRY}, str precision) -> Tensor",
    _wgrad,
    _wgrad_fake,
)


# -- elementwise, and the bias gradient --------------------------------------------------------------------------------


def _relu(input: torch.Tensor) -> torch.Tensor:
    source = layout.dense(input)
    output = torch.empty_like(source)
    if output.numel():
        gpu = hardware.gpu_of(input.device)
        launch_pointwise.plan_relu(layout.flat(source), layout.flat(output), gpu=gpu).run()
    return output


def _relu_backward(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    output = layout.dense(output)
    grad = layout.laid_out_like(grad, output)
    grad_input = torch.empty_like(output)
    if output.numel():
        rows = [layout.flat(tensor)[None, :] for tensor in (grad, output, grad_input)]
        launch_pointwise.plan_relu_backward(*rows, gpu=hardware.gpu_of(grad.device)).run()
    return grad_input


def _bias_backward(grad: torch.Tensor, output: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    masked = None
    if output is not None:
        output = launch_pointwise.rows_in_line(layout.dense(output))
        masked = torch.empty_like(output)
    sums = torch.zeros(grad.shape[1], dtype=grad.dtype, device=grad.device)
    if grad.numel():
        gpu = hardware.gpu_of(grad.device)
        for launch in launch_pointwise.plan_bias_backward(grad, output, masked, sums, gpu=gpu):
            launch.run()
    return masked, sums


def _bias_grad(grad: torch.Tensor) -> torch.Tensor:
    return _bias_backward(grad, None)[1]


def _relu_bias_grad(grad: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    masked, sums = _bias_backward(grad, output)
    assert masked is not None
    return masked, sums


def _dropout(input: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    source = layout.dense(input)
    output = torch.empty_like(source)
    if output.numel():
        gpu = hardware.gpu_of(input.device)
        launch_pointwise.plan_dropout(layout.flat(source), layout.flat(output), seed, p, gpu=gpu).run()
    return output


_define("relu(Tensor input) -> Tensor", _relu, lambda input: torch.empty_like(input))
_define(
    "relu_backward(Tensor grad, Tensor output) -> Tensor", _relu_backward, lambda grad, output: torch.empty_like(output)
)
_define("bias_grad(Tensor grad) -> Tensor", _bias_grad, lambda grad: grad.new_empty(grad.shape[1]))
_define(
    "relu_bias_grad(Tensor grad, Tensor output) -> (Tensor, Tensor)",
    _relu_bias_grad,
    lambda grad, output: (torch.empty_like(output), grad.new_empty(grad.shape[1])),
)
_define(
    "dropout(Tensor input, Tensor seed, float p) -> Tensor", _dropout, lambda input, seed, p: torch.empty_like(input)
)


# -- pooling -----------------------------------------------------------------------------------------------------------


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


_define(
    f"max_pool2d(Tensor input, {WINDOW}, str? activation, bool with_switch, bool channels_last) -> (Tensor, Tensor)",
    _max_pool,
    _max_pool_fake,
)
_define(
    f"max_pool2d_indices(Tensor switch, SymInt[4] input_shape, {WINDOW}) -> Tensor",
    _max_pool_indices,
    lambda switch, *window: torch.empty_like(switch, dtype=torch.int64),
)
_define(
    f"max_pool2d_backward(Tensor grad, Tensor switch, Tensor? output, SymInt[4] input_shape, {WINDOW}, "
    "bool channels_last) -> Tensor",
    _max_pool_backward,
    lambda grad, switch, output, input_shape, *window: layout.empty_image(input_shape, grad, window[-1]),
)
_define(
    "adaptive_avg_pool2d(Tensor input, SymInt[2] output_size, bool channels_last) -> Tensor",
    _adaptive_avg,
    _adaptive_avg_fake,
)
_define(
    "adaptive_avg_pool2d_backward(Tensor grad, SymInt[4] input_shape, bool channels_last) -> Tensor",
    _adaptive_avg_backward,
    lambda grad, input_shape, channels_last: layout.empty_image(input_shape, grad, channels_last),
)
