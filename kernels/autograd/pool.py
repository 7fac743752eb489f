"""Pooling."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels import layout
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


class _AdaptiveMaxPool2d(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.adaptive_max_pool2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.shape, ctx.channels_last = inputs[0].shape, inputs[3]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Gradients:
        (switch,) = ctx.saved_tensors
        return then_nones(adaptive_max_pool2d_backward(grad, switch, ctx.shape, ctx.channels_last), count=3)


class _AdaptiveMaxPool2dBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.adaptive_max_pool2d_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, switch, ctx.shape, _ = inputs
        ctx.save_for_backward(switch)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        (switch,) = ctx.saved_tensors
        indices = OPS.adaptive_max_pool2d_indices(switch, ctx.shape)
        return then_nones(max_unpool2d_backward(grad_grad, indices, layout.is_channels_last(switch)), count=3)


class _AvgPool2d(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.avg_pool2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, *ctx.window = inputs
        ctx.shape = input.shape

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return then_nones(avg_pool2d_backward(grad, ctx.shape, *ctx.window), count=7)


class _AvgPool2dBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.avg_pool2d_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, _, *ctx.window = inputs

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        return then_nones(avg_pool2d(grad_grad, *ctx.window), count=8)


class _LpPool2d(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.lp_pool2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, *ctx.window = inputs
        ctx.save_for_backward(input, output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return then_nones(lp_pool2d_backward(grad, *ctx.saved_tensors, *ctx.window), count=5)


class _LpPool2dBackward(Function):
    """dx = x^(p - 1) * A'(dy * y^(1 - p)); x and y both count as inputs.

    A is R * S times average pooling, A' its transpose.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.lp_pool2d_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, input, pooled, *ctx.window = inputs
        ctx.save_for_backward(grad, input, pooled)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        grad, x, y = ctx.saved_tensors
        norm, kernel, stride, ceil_mode, channels_last = ctx.window
        window = (kernel, stride, (0, 0), ceil_mode, True, None, channels_last)
        taps = kernel[0] * kernel[1]
        norms = torch.where(y == 0, 1.0, y)  # windows with y = 0 pass nothing on, below
        inner = taps * avg_pool2d(grad_grad * x ** (norm - 1), *window)
        outer = taps * avg_pool2d_backward(torch.where(y == 0, 0.0, grad * norms ** (1 - norm)), x.shape, *window)
        to_grad = torch.where(y == 0, 0.0, norms ** (1 - norm) * inner)
        to_input = grad_grad * outer * (norm - 1) * x ** (norm - 2) if norm != 1 else torch.zeros_like(x)
        to_output = torch.where(y == 0, 0.0, (1 - norm) * grad * norms ** (-norm) * inner)
        return then_nones(to_grad, to_input, to_output, count=5)


class _MaxUnpool2d(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.max_unpool2d(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, indices, _, ctx.channels_last = inputs
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return then_nones(max_unpool2d_backward(grad, *ctx.saved_tensors, ctx.channels_last), count=3)


class _MaxUnpool2dBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.max_unpool2d_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, indices, ctx.channels_last = inputs
        ctx.shape = grad.shape
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad_grad: torch.Tensor) -> Gradients:
        # Elements that several outputs read get the sum, unlike max_unpool2d's: max-pool's windows may overlap.
        # index_put sorts its indices, so it is deterministic, where scatter_add is not.
        (indices,) = ctx.saved_tensors
        planes, size = ctx.shape[0] * ctx.shape[1], ctx.shape[2] * ctx.shape[3]
        places = indices.flatten(0, 1).flatten(1) + size * torch.arange(planes, device=indices.device)[:, None]
        total = grad_grad.new_zeros(planes * size)
        total = total.index_put((places.flatten(),), grad_grad.reshape(-1), accumulate=True)
        return then_nones(total.view(ctx.shape), count=2)


max_pool2d = door(_MaxPool2d, OPS.max_pool2d)
max_pool2d_backward = door(_MaxPool2dBackward, OPS.max_pool2d_backward)
adaptive_avg_pool2d = door(_AdaptiveAvgPool2d, OPS.adaptive_avg_pool2d)
adaptive_avg_pool2d_backward = door(_AdaptiveAvgPool2dBackward, OPS.adaptive_avg_pool2d_backward)
adaptive_max_pool2d = door(_AdaptiveMaxPool2d, OPS.adaptive_max_pool2d)
adaptive_max_pool2d_backward = door(_AdaptiveMaxPool2dBackward, OPS.adaptive_max_pool2d_backward)
avg_pool2d = door(_AvgPool2d, OPS.avg_pool2d)
avg_pool2d_backward = door(_AvgPool2dBackward, OPS.avg_pool2d_backward)
lp_pool2d = door(_LpPool2d, OPS.lp_pool2d)
lp_pool2d_backward = door(_LpPool2dBackward, OPS.lp_pool2d_backward)
max_unpool2d = door(_MaxUnpool2d, OPS.max_unpool2d)
max_unpool2d_backward = door(_MaxUnpool2dBackward, OPS.max_unpool2d_backward)
