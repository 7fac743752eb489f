"""Pooling."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels.autograd.function import Function, Gradients, door, then_nones
from tileconv.kernels.autograd.pointwise import relu_backward
from tileconv.kernels.ops import OPS


class _MaxPool2d(Function):
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
        return then_nones(grad_input, count=8)


class _MaxPool2dBackward(Function):
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
        return then_nones(picked if pooled is None else relu_backward(picked, pooled), count=9)


class _AdaptiveAvgPool2d(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.adaptive_avg_pool2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.shape, ctx.channels_last = inputs[0].shape, inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return then_nones(adaptive_avg_pool2d_backward(grad, ctx.shape, ctx.channels_last), count=2)


class _AdaptiveAvgPool2dBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.adaptive_avg_pool2d_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.output_size, ctx.channels_last = inputs[0].shape[2:], inputs[2]

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        return then_nones(adaptive_avg_pool2d(grad_grad, ctx.output_size, ctx.channels_last), count=2)


max_pool2d = door(_MaxPool2d, OPS.max_pool2d)
max_pool2d_backward = door(_MaxPool2dBackward, OPS.max_pool2d_backward)
adaptive_avg_pool2d = door(_AdaptiveAvgPool2d, OPS.adaptive_avg_pool2d)
adaptive_avg_pool2d_backward = door(_AdaptiveAvgPool2dBackward, OPS.adaptive_avg_pool2d_backward)
