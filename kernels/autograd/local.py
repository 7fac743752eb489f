"""Locally connected layers: like convolution, three passes that are bilinear in each other."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels.autograd.conv import bias_grad
from tileconv.kernels.autograd.function import Function, Gradients, door, then_nones
from tileconv.kernels.ops import OPS


class _Local(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.locally_connected2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, bias, *ctx.window, ctx.precision, ctx.channels_last = inputs
        ctx.shapes = input.shape, weight.shape
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        input, weight = ctx.saved_tensors
        to_input = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_input = locally_connected2d_dgrad(
                grad, weight, ctx.shapes[0], *ctx.window, ctx.precision, ctx.channels_last
            )
        if ctx.needs_input_grad[1]:
            to_weight = locally_connected2d_wgrad(grad, input, ctx.shapes[1], *ctx.window, ctx.precision)
        if ctx.needs_input_grad[2]:
            own = len(ctx.bias_shape) == 3  # a bias of every pixel's own is one more channel each
            to_bias = bias_grad(grad.reshape(grad.shape[0], ctx.bias_shape.numel(), 1, 1) if own else grad)
            to_bias = to_bias.reshape(ctx.bias_shape)
        return then_nones(to_input, to_weight, to_bias, count=5)


class _LocalDgrad(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.locally_connected2d_dgrad(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, weight, _, *ctx.window, ctx.precision, ctx.channels_last = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        grad, weight = ctx.saved_tensors
        to_grad = to_weight = None
        if ctx.needs_input_grad[0]:
            to_grad = locally_connected2d(grad_grad, weight, None, *ctx.window, ctx.precision, ctx.channels_last)
        if ctx.needs_input_grad[1]:
            to_weight = locally_connected2d_wgrad(grad, grad_grad, weight.shape, *ctx.window, ctx.precision)
        return then_nones(to_grad, to_weight, count=6)


class _LocalWgrad(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.locally_connected2d_wgrad(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, input, _, *ctx.window, ctx.precision = inputs
        ctx.save_for_backward(grad, input)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        grad, input = ctx.saved_tensors
        to_grad = to_input = None
        if ctx.needs_input_grad[0]:
            to_grad = locally_connected2d(input, grad_grad, None, *ctx.window, ctx.precision, True)
        if ctx.needs_input_grad[1]:
            to_input = locally_connected2d_dgrad(grad, grad_grad, input.shape, *ctx.window, ctx.precision, True)
        return then_nones(to_grad, to_input, count=5)


locally_connected2d = door(_Local, OPS.locally_connected2d)
locally_connected2d_dgrad = door(_LocalDgrad, OPS.locally_connected2d_dgrad)
locally_connected2d_wgrad = door(_LocalWgrad, OPS.locally_connected2d_wgrad)
