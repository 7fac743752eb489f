"""im2col and col2im: linear, and each the other's transpose."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels import layout
from tileconv.kernels.autograd.function import Function, Gradients, door, then_nones
from tileconv.kernels.ops import OPS


class _Unfold(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.unfold(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, *ctx.window, _, ctx.run = inputs
        ctx.shape, ctx.channels_last = input.shape, layout.is_channels_last(input)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return then_nones(fold(grad, ctx.shape, *ctx.window, ctx.channels_last, ctx.run), count=6)


class _Fold(Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return OPS.fold(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        cols, _, *ctx.window, _, ctx.run = inputs
        ctx.patches = cols.stride(1) == 1 and cols.stride(2) != 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return then_nones(unfold(grad, *ctx.window, ctx.patches, ctx.run), count=7)


unfold = door(_Unfold, OPS.unfold)
fold = door(_Fold, OPS.fold)
