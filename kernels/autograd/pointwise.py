"""Elementwise functions."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels.autograd.function import Function, Gradients, door, then_nones
from tileconv.kernels.ops import OPS


class _Relu(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.relu(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return (relu_backward(grad, ctx.saved_tensors[0]),)


class _ReluBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.relu_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, read, *ctx.dropout = inputs
        ctx.save_for_backward(read)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        to_grad = relu_backward(grad_grad, ctx.saved_tensors[0], *ctx.dropout)
        return then_nones(to_grad, count=1 + len(ctx.dropout))


class _Dropout(Function):
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
        return then_nones(dropout(grad, ctx.saved_tensors[0], ctx.p), count=2)


relu = door(_Relu, OPS.relu)
relu_backward = door(_ReluBackward, OPS.relu_backward)
dropout = door(_Dropout, OPS.dropout)
