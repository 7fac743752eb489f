"""Softmax and cross-entropy."""

from __future__ import annotations

import math

import torch

from tileconv.kernels import checks, hardware, layout
from tileconv.kernels.launch import pointwise as launch_pointwise
from tileconv.kernels.launch import softmax as launch_softmax
from tileconv.kernels.ops.registry import define

LOSS = "int ignore_index, str reduction, float label_smoothing"


def rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """`tensor` as [outer, shape[dim], inner]: a view where its strides allow one."""
    shape = tensor.shape or (1,)
    return tensor.reshape(math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]))


def _softmax(input: torch.Tensor, dim: int, log: bool) -> torch.Tensor:
    output = input.new_empty(input.shape)
    if output.numel():
        gpu = hardware.gpu_of(input.device)
        launch_softmax.plan_softmax(rows(input, dim), rows(output, dim), log, gpu=gpu).run()
    return output


def _softmax_backward(grad: torch.Tensor, output: torch.Tensor, dim: int, log: bool) -> torch.Tensor:
    checks.belongs("grad", grad, output.shape, output, output.dtype)
    grad_input = output.new_empty(output.shape)
    if output.numel():
        dy, y, dx = (rows(tensor, dim) for tensor in (grad, output, grad_input))
        launch_softmax.plan_softmax_backward(dy, y, dx, log, gpu=hardware.gpu_of(output.device)).run()
    return grad_input


def _operands(input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """input as [outer, classes, inner], target likewise or as [outer, inner]."""
    x = rows(input, min(1, input.dim() - 1))
    return x, target.reshape(x.shape[0], x.shape[2]) if not target.is_floating_point() else target.reshape(x.shape)


def _check_labels(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Only on the CPU: on a GPU the look would wait for everything queued before it, and a wrong label gives NaN."""
    if target.device.type != "cpu" or target.is_floating_point():
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise ValueError(
            f"target holds the class {wrong[0].item()}: allowed are 0 to {classes - 1}, and ignore_index={ignore_index}"
        )


def _cross_entropy_fake(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = [*input.shape[:1], *input.shape[2:]] if input.dim() > 1 else []
    dtype = layout.sum_dtype(input.dtype)
    count = math.prod(shape)
    loss = input.new_empty(shape if reduction == "none" else [])
    return loss, input.new_empty([3, count], dtype=dtype), input.new_empty([], dtype=dtype)


def _cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    x, labels = _operands(input, target)
    _check_labels(labels, x.shape[1], ignore_index)
    loss, saved, divisor = _cross_entropy_fake(input, target, weight, ignore_index, reduction, label_smoothing)
    losses = torch.empty_like(saved[:2])
    divisor.fill_(1.0)
    gpu = hardware.gpu_of(input.device)
    if saved.numel():
        weight = None if weight is None else weight.contiguous()
        launch_softmax.plan_cross_entropy(
            x, labels, weight, losses, saved, ignore_index, label_smoothing, gpu=gpu
        ).run()
    if reduction == "none":
        return loss.copy_(losses[0].view(loss.shape)), saved, divisor
    sums = torch.zeros(2, dtype=saved.dtype, device=input.device)
    if saved.numel():
        for launch in launch_pointwise.plan_bias_backward(losses[None, :, None, :], None, None, sums, gpu=gpu):
            launch.run()
    if reduction == "mean":
        divisor.copy_(sums[1])
    return loss.copy_(sums[0] / divisor), saved, divisor


def _cross_entropy_backward(
    grad: torch.Tensor, input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, saved: torch.Tensor,
    divisor: torch.Tensor, ignore_index: int, reduction: str, label_smoothing: float, to_target: bool,
) -> torch.Tensor:  # fmt: skip
    loss, kept, _ = _cross_entropy_fake(input, target, weight, ignore_index, reduction, label_smoothing)
    checks.belongs("grad", grad, loss.shape, input, input.dtype)
    checks.belongs("saved", saved, kept.shape, input, kept.dtype)
    result = torch.empty(input.shape, dtype=target.dtype if to_target else input.dtype, device=input.device)
    if result.numel():
        x, labels = _operands(input, target)
        weight = None if weight is None else weight.contiguous()
        grad = grad.reshape(-1).contiguous() if reduction == "none" and input.dim() > 1 else grad
        launch_softmax.plan_cross_entropy_backward(
            grad, divisor, x, labels, weight, saved, rows(result, min(1, input.dim() - 1)), ignore_index,
            label_smoothing, to_target, gpu=hardware.gpu_of(input.device),
        ).run()  # fmt: skip
    return result


define("softmax(Tensor input, int dim, bool log) -> Tensor", _softmax, lambda input, *_: input.new_empty(input.shape))
define(
    "softmax_backward(Tensor grad, Tensor output, int dim, bool log) -> Tensor",
    _softmax_backward,
    lambda grad, output, *_: output.new_empty(output.shape),
)
define(
    f"cross_entropy(Tensor input, Tensor target, Tensor? weight, {LOSS}) -> (Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
)
define(
    f"cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor saved, Tensor divisor, "
    f"{LOSS}, bool to_target) -> Tensor",
    _cross_entropy_backward,
    lambda grad, input, target, *settings: input.new_empty(
        input.shape, dtype=target.dtype if settings[-1] else input.dtype
    ),
)
