"""Convolution, activation and max-pool: the switch and the sign of the pooled value are all that backward needs."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels.autograd.conv import bias_grad, conv2d_dgrad, conv2d_wgrad, relu_bias_grad
from tileconv.kernels.autograd.function import Function, Gradients, door, then_nones
from tileconv.kernels.autograd.pool import max_pool2d_backward
from tileconv.kernels.ops import OPS
from tileconv.kernels.ops.conv import conv2d_problem


class _ConvMaxPool2d(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.conv2d_max_pool2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        input, weight, _, *settings = inputs
        ctx.geometry, ctx.window = settings[:4], settings[4:9]
        activation, ctx.precision, _, ctx.channels_last, ctx.batch_invariant = settings[9:]
        ctx.shapes = input.shape, weight.shape, conv2d_problem(input.shape, weight.shape, *ctx.geometry).y_shape
        ctx.mark_non_differentiable(output[1])
        wants_input, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            input if wants_weight else None,
            weight if wants_input else None,
            output[1] if wants_input or wants_weight else None,
            output[0] if activation else None,
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Gradients:
        input, weight, switch, output = ctx.saved_tensors
        to_input = to_weight = to_bias = None
        if ctx.needs_input_grad[2]:
            # A filter's sum over the windows is its sum over the convolution's outputs, which are more.
            grad, to_bias = (grad, bias_grad(grad)) if output is None else relu_bias_grad(grad, output)
            output = None  # what ReLU cut is zero already
        if switch is not None:
            grad = max_pool2d_backward(grad, switch, output, ctx.shapes[2], *ctx.window, ctx.channels_last)
        if ctx.needs_input_grad[0]:
            to_input = conv2d_dgrad(
                grad, weight, ctx.shapes[0], *ctx.geometry, ctx.precision, ctx.channels_last, ctx.batch_invariant
            )
        if ctx.needs_input_grad[1]:
            to_weight = conv2d_wgrad(grad, input, ctx.shapes[1], *ctx.geometry, ctx.precision)
        return then_nones(to_input, to_weight, to_bias, count=14)


conv2d_max_pool2d = door(_ConvMaxPool2d, OPS.conv2d_max_pool2d)
