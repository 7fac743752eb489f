"""autograd.Functions around the ops: what is saved, and which gradients are asked for.

A convolution's three passes are bilinear in each other, so each one's derivative is made of the other two, to any
order.  Every Function takes its op's arguments.  Only gradients that are asked for are computed, and where none is, the
Function is skipped: `conv2d`, `relu`, ... at the end of the file are the doors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from tileconv.kernels.ops import OPS

Gradients = tuple[torch.Tensor | None, ...]


class _Function(torch.autograd.Function):
    generate_vmap_rule = True  # the ops have batching rules of their own; without jvp, forward mode raises


def _door(function: type[_Function], op: Callable[..., Any]) -> Callable[..., Any]:
    """A call that goes through the Function where autograd must see it, else straight to the op."""

    def call(*arguments: Any) -> Any:
        # Forward mode and torch.func count too: past the Function they would lose a tangent without a word.
        seen = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
        if not seen and torch.is_grad_enabled():
            seen = any(isinstance(value, torch.Tensor) and value.requires_grad for value in arguments)
        return function.apply(*arguments) if seen else op(*arguments)  # type: ignore[no-untyped-call]

    return call


def _then_nones(*gradients: torch.Tensor | None, count: int) -> Gradients:
    """Gradients of the tensors that come first, None for the `count` settings after them."""
    return (*gradients, *(None,) * count)


# -- convolution: (input, weight, bias, stride, padding, dilation, groups, activation, precision, channels_last) -------


class _Conv2d(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.conv2d_fprop(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, _, *ctx.geometry, activation, ctx.precision, ctx.channels_last = inputs
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
        to_input = to_weight = to_bias = None
        if ctx.needs_input_grad[2]:
            grad, to_bias = (grad, bias_grad(grad)) if output is None else relu_bias_grad(grad, output)
        elif output is not None:
            grad = relu_backward(grad, output)
        if ctx.needs_input_grad[0]:
            to_input = conv2d_dgrad(grad, weight, ctx.shapes[0], *ctx.geometry, ctx.precision, ctx.channels_last)
        if ctx.needs_input_grad[1]:
            to_weight = conv2d_wgrad(grad, input, ctx.shapes[1], *ctx.geometry, ctx.precision)
        return _then_nones(to_input, to_weight, to_bias, count=7)


class _Dgrad(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.conv2d_dgrad(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, weight, _, *ctx.geometry, ctx.precision, ctx.channels_last = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        grad, weight = ctx.saved_tensors
        to_grad = to_weight = None
        if ctx.needs_input_grad[0]:
            to_grad = conv2d(grad_grad, weight, None, *ctx.geometry, None, ctx.precision, ctx.channels_last)
        if ctx.needs_input_grad[1]:
            to_weight = conv2d_wgrad(grad, grad_grad, weight.shape, *ctx.geometry, ctx.precision)
        return _then_nones(to_grad, to_weight, count=7)


class _Wgrad(_Function):
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
            to_grad = conv2d(input, grad_grad, None, *ctx.geometry, None, ctx.precision, True)
        if ctx.needs_input_grad[1]:
            to_input = conv2d_dgrad(grad, grad_grad, input.shape, *ctx.geometry, ctx.precision, True)
        return _then_nones(to_grad, to_input, count=6)


class _BiasGrad(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.bias_grad(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, to_bias: torch.Tensor) -> Gradients:
        return (to_bias[:, None, None].expand(ctx.shape),)


class _ReluBiasGrad(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.relu_bias_grad(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, to_masked: torch.Tensor, to_bias: torch.Tensor) -> Gradients:
        return relu_backward(to_masked + to_bias[:, None, None], ctx.saved_tensors[0]), None


# -- elementwise -------------------------------------------------------------------------------------------------------


class _Relu(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.relu(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return (relu_backward(grad, ctx.saved_tensors[0]),)


class _ReluBackward(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.relu_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        return relu_backward(grad_grad, ctx.saved_tensors[0]), None


class _Dropout(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.dropout(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, seed, ctx.p = inputs
        ctx.strides = output.stride()
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        if grad.stride() != ctx.strides:  # the mask counts elements as they lay in the forward pass
            grad = torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype, device=grad.device).copy_(grad)
        return _then_nones(dropout(grad, ctx.saved_tensors[0], ctx.p), count=2)


# -- pooling -----------------------------------------------------------------------------------------------------------


class _MaxPool2d(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.max_pool2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        input, *ctx.window, activation, _, ctx.channels_last = inputs
        ctx.shape = input.shape
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], output[0] if activation else None)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Gradients:
        switch, output = ctx.saved_tensors
        grad_input = max_pool2d_backward(grad, switch, output, ctx.shape, *ctx.window, ctx.channels_last)
        return _then_nones(grad_input, count=8)


class _MaxPool2dBackward(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.max_pool2d_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, switch, pooled, ctx.shape, *ctx.window, _ = inputs
        ctx.save_for_backward(switch, pooled)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        switch, pooled = ctx.saved_tensors
        indices = OPS.max_pool2d_indices(switch, ctx.shape, *ctx.window)
        picked = grad_grad.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)
        return _then_nones(picked if pooled is None else relu_backward(picked, pooled), count=9)


class _AdaptiveAvgPool2d(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.adaptive_avg_pool2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.shape, ctx.channels_last = inputs[0].shape, inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return _then_nones(adaptive_avg_pool2d_backward(grad, ctx.shape, ctx.channels_last), count=2)


class _AdaptiveAvgPool2dBackward(_Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.adaptive_avg_pool2d_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.output_size, ctx.channels_last = inputs[0].shape[2:], inputs[2]

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        return _then_nones(adaptive_avg_pool2d(grad_grad, ctx.output_size, ctx.channels_last), count=2)


conv2d = _door(_Conv2d, OPS.conv2d_fprop)
conv2d_dgrad = _door(_Dgrad, OPS.conv2d_dgrad)
conv2d_wgrad = _door(_Wgrad, OPS.conv2d_wgrad)
bias_grad = _door(_BiasGrad, OPS.bias_grad)
relu_bias_grad = _door(_ReluBiasGrad, OPS.relu_bias_grad)
relu = _door(_Relu, OPS.relu)
relu_backward = _door(_ReluBackward, OPS.relu_backward)
dropout = _door(_Dropout, OPS.dropout)
max_pool2d = _door(_MaxPool2d, OPS.max_pool2d)
max_pool2d_backward = _door(_MaxPool2dBackward, OPS.max_pool2d_backward)
adaptive_avg_pool2d = _door(_AdaptiveAvgPool2d, OPS.adaptive_avg_pool2d)
adaptive_avg_pool2d_backward = _door(_AdaptiveAvgPool2dBackward, OPS.adaptive_avg_pool2d_backward)
