"""Convolution: the three passes are bilinear in each other, so each one's derivative is made of the other two."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels.autograd.function import Function, Gradients, door, then_nones
from tileconv.kernels.autograd.pointwise import dropout, relu_backward
from tileconv.kernels.ops import OPS
from tileconv.kernels.ops.conv import OF_LINEAR


class _Conv2d(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.conv2d_fprop(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, _, *ctx.geometry, activation, ctx.precision, ctx.channels_last, ctx.batch_invariant = inputs
        ctx.shapes = input.shape, weight.shape
        # The weight's gradient needs the input, the input's needs the weight: neither is kept in vain.
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
            output if activation else None,
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        input, weight, output = ctx.saved_tensors
        to_bias = None
        if ctx.needs_input_grad[2]:
            grad, to_bias = (grad, bias_grad(grad)) if output is None else relu_bias_grad(grad, output)
        elif output is not None:
            grad = relu_backward(grad, output)
        return then_nones(*_to_operands(ctx, grad, input, weight), to_bias, count=8)


def _to_operands(ctx: Any, grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> Gradients:
    """The gradients of input and weight, each if it is asked for, from that of what is ahead of bias and activation."""
    to_input = to_weight = None
    if ctx.needs_input_grad[0]:
        to_input = conv2d_dgrad(
            grad, weight, ctx.shapes[0], *ctx.geometry, ctx.precision, ctx.channels_last, ctx.batch_invariant
        )
    if ctx.needs_input_grad[1]:
        to_weight = conv2d_wgrad(grad, input, ctx.shapes[1], *ctx.geometry, ctx.precision)
    return to_input, to_weight


class _LinearDropout(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.linear_dropout(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, _, seed, ctx.dropout, ctx.activation, ctx.precision, ctx.batch_invariant = inputs
        ctx.geometry, ctx.channels_last = OF_LINEAR, False
        ctx.shapes = input.shape, weight.shape
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
            output if ctx.activation else seed,
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        input, weight, kept = ctx.saved_tensors
        to_bias = None
        if not ctx.activation:
            grad = dropout(grad.contiguous(), kept, ctx.dropout)
            to_bias = bias_grad(grad) if ctx.needs_input_grad[2] else None
        # Behind a ReLU all that was cut or dropped is zero, and all that was not is above: no mask is made again.
        elif ctx.needs_input_grad[2]:
            grad, to_bias = relu_bias_grad(grad, kept, ctx.dropout)
        else:
            grad = relu_backward(grad, kept, ctx.dropout)
        return then_nones(*_to_operands(ctx, grad, input, weight), to_bias, count=5)


class _Dgrad(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.conv2d_dgrad(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, weight, _, *ctx.geometry, ctx.precision, ctx.channels_last, ctx.batch_invariant = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        grad, weight = ctx.saved_tensors
        to_grad = to_weight = None
        if ctx.needs_input_grad[0]:
            to_grad = conv2d(
                grad_grad, weight, None, *ctx.geometry, None, ctx.precision, ctx.channels_last, ctx.batch_invariant
            )
        if ctx.needs_input_grad[1]:
            to_weight = conv2d_wgrad(grad, grad_grad, weight.shape, *ctx.geometry, ctx.precision)
        return then_nones(to_grad, to_weight, count=8)


class _Wgrad(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.conv2d_wgrad(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, input, _, *ctx.geometry, ctx.precision = inputs
        ctx.save_for_backward(grad, input)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        grad, input = ctx.saved_tensors
        to_grad = to_input = None
        if ctx.needs_input_grad[0]:
            to_grad = conv2d(input, grad_grad, None, *ctx.geometry, None, ctx.precision, True, False)
        if ctx.needs_input_grad[1]:
            to_input = conv2d_dgrad(grad, grad_grad, input.shape, *ctx.geometry, ctx.precision, True, False)
        return then_nones(to_grad, to_input, count=6)


class _BiasGrad(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.bias_grad(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, to_bias: torch.Tensor) -> Gradients:
        return (to_bias[:, None, None].expand(ctx.shape),)


class _ReluBiasGrad(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.relu_bias_grad(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        _, read, *ctx.dropout = inputs
        ctx.save_for_backward(read)

    @staticmethod
    def backward(ctx: Any, to_masked: torch.Tensor, to_bias: torch.Tensor) -> Gradients:
        to_grad = relu_backward(to_masked + to_bias[:, None, None], ctx.saved_tensors[0], *ctx.dropout)
        return then_nones(to_grad, count=1 + len(ctx.dropout))


conv2d = door(_Conv2d, OPS.conv2d_fprop)
linear_dropout = door(_LinearDropout, OPS.linear_dropout)
conv2d_dgrad = door(_Dgrad, OPS.conv2d_dgrad)
conv2d_wgrad = door(_Wgrad, OPS.conv2d_wgrad)
bias_grad = door(_BiasGrad, OPS.bias_grad)
relu_bias_grad = door(_ReluBiasGrad, OPS.relu_bias_grad)
