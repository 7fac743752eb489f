"""Transposed convolution: its gradients are the forward pass and the weight gradient of the convolution it turns."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels.autograd.conv import bias_grad, conv2d, conv2d_wgrad, relu_bias_grad
from tileconv.kernels.autograd.function import Function, Gradients, door, then_nones
from tileconv.kernels.autograd.pointwise import relu_backward
from tileconv.kernels.ops import OPS


class _ConvTranspose2d(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.conv_transpose2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, _, _, *ctx.geometry, activation, ctx.precision, ctx.channels_last, ctx.batch_invariant = inputs
        ctx.weight_shape = weight.shape
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
            output if activation else None,
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        input, weight, output = ctx.saved_tensors
        to_input = to_weight = to_bias = None
        if ctx.needs_input_grad[2]:
            grad, to_bias = (grad, bias_grad(grad)) if output is None else relu_bias_grad(grad, output)
        elif output is not None:
            grad = relu_backward(grad, output)
        if ctx.needs_input_grad[0]:
            to_input = conv2d(
                grad, weight, None, *ctx.geometry, None, ctx.precision, ctx.channels_last, ctx.batch_invariant
            )
        if ctx.needs_input_grad[1]:
            to_weight = conv2d_wgrad(input, grad, ctx.weight_shape, *ctx.geometry, ctx.precision)
        return then_nones(to_input, to_weight, to_bias, count=9)


conv_transpose2d = door(_ConvTranspose2d, OPS.conv_transpose2d)
