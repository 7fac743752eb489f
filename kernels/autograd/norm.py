"""Local response normalisation."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels.autograd.function import Function, Gradients, door, then_nones
from tileconv.kernels.geometry import channel_window
from tileconv.kernels.layout import sum_dtype
from tileconv.kernels.ops import OPS


class _LocalResponseNorm(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.local_response_norm(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, *ctx.settings = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        (input,) = ctx.saved_tensors
        return then_nones(local_response_norm_backward(grad, input, *ctx.settings), count=5)


class _LocalResponseNormBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.local_response_norm_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, input, *ctx.settings = inputs
        ctx.save_for_backward(grad, input)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        grad, input = ctx.saved_tensors
        return then_nones(*_second_derivative(grad_grad, grad, input, *ctx.settings[:-1]), count=5)


def _second_derivative(
    v: torch.Tensor, grad: torch.Tensor, input: torch.Tensor, size: int, alpha: float, beta: float, k: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of sum(v * dx) to grad and input.

    With s = k + alpha * W(x^2), W a window's sum and W' the mirrored window's,
    sum(v * dx) = sum of grad * (v * s^-beta - 2 * alpha * beta * x * s^(-beta - 1) * W(v * x)).
    In PyTorch's operations, which have derivatives of any order: no kernel is worth its while here.
    """
    before, after = channel_window(input.shape[1], size)
    dtype = sum_dtype(input.dtype)
    v, g, x = v.to(dtype), grad.to(dtype), input.to(dtype)
    s = k + alpha * _window_sums(x * x, before, after)
    power = s**-beta
    ratio = power / s
    sums = _window_sums(v * x, before, after)
    slope = 2 * alpha * beta
    to_grad = v * power - slope * x * ratio * sums
    to_s = g * ratio * (slope * (beta + 1) * x * sums / s - beta * v)
    to_input = (
        2 * alpha * x * _window_sums(to_s, after, before)
        - slope * g * ratio * sums
        - slope * v * _window_sums(g * x * ratio, after, before)
    )
    return to_grad.to(grad.dtype), to_input.to(input.dtype)


def _window_sums(image: torch.Tensor, before: int, after: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(image, (0, 0, 0, 0, before, after))
    total = padded.narrow(1, 0, image.shape[1])
    for first in range(1, before + after + 1):
        total = total + padded.narrow(1, first, image.shape[1])
    return total


local_response_norm = door(_LocalResponseNorm, OPS.local_response_norm)
local_response_norm_backward = door(_LocalResponseNormBackward, OPS.local_response_norm_backward)
