"""Softmax and cross-entropy.  Second derivatives, which training never asks for, are written in PyTorch's own terms."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels.autograd.function import Function, Gradients, door, then_nones
from tileconv.kernels.ops import OPS


class _Softmax(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.softmax(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.dim, ctx.log = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return then_nones(softmax_backward(grad, ctx.saved_tensors[0], ctx.dim, ctx.log), count=2)


class _SoftmaxBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.softmax_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, result, ctx.dim, ctx.log = inputs
        ctx.save_for_backward(grad, result)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        grad, result = ctx.saved_tensors
        if ctx.log:
            p = result.exp()
            to_grad = grad_grad - (grad_grad * p).sum(ctx.dim, keepdim=True)
            to_result = -grad_grad * p * grad.sum(ctx.dim, keepdim=True)
        else:
            inner, outer = ((t * result).sum(ctx.dim, keepdim=True) for t in (grad, grad_grad))
            to_grad = result * (grad_grad - outer)
            to_result = grad_grad * (grad - inner) - grad * outer
        return then_nones(to_grad, to_result, count=2)


class _CrossEntropy(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.cross_entropy(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        input, target, weight, *ctx.settings = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(input, target, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Gradients:
        operands = ctx.saved_tensors
        to_input, to_target = (
            cross_entropy_backward(grad, *operands, *ctx.settings, place == 1) if ctx.needs_input_grad[place] else None
            for place in range(2)
        )
        return then_nones(to_input, to_target, count=4)


class _CrossEntropyBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.cross_entropy_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, input, target, weight, saved, divisor, *ctx.settings = inputs
        ctx.save_for_backward(grad, input, target, weight, saved, divisor)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        *ctx.loss, to_target = ctx.settings
        if to_target or ctx.needs_input_grad[2]:
            raise NotImplementedError("cross_entropy: second derivatives with respect to target are not implemented")
        grad, input, *rest = ctx.saved_tensors
        _, _, saved, divisor = rest
        dim = min(1, input.dim() - 1)
        to_grad = to_input = None
        if ctx.needs_input_grad[0]:  # the first derivative is linear in grad
            ones = torch.ones_like(grad)
            slope = grad_grad * OPS.cross_entropy_backward(ones, input, *rest, *ctx.settings)
            to_grad = slope.sum(dim) if grad.dim() else slope.sum()
        if ctx.needs_input_grad[1]:
            peak, logsum, mass = (row.view([*input.shape[:dim], 1, *input.shape[dim + 1 :]]) for row in saved)
            p = (input.to(saved.dtype) - peak - logsum).exp()
            scale = (grad.unsqueeze(dim) if grad.dim() else grad) * mass / divisor
            to_input = (scale * p * (grad_grad - (grad_grad * p).sum(dim, keepdim=True))).to(input.dtype)
        return then_nones(to_grad, to_input, count=8)


softmax = door(_Softmax, OPS.softmax)
softmax_backward = door(_SoftmaxBackward, OPS.softmax_backward)
cross_entropy = door(_CrossEntropy, OPS.cross_entropy)
cross_entropy_backward = door(_CrossEntropyBackward, OPS.cross_entropy_backward)
