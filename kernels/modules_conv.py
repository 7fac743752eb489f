"""torch.nn's less common convolutions on our kernels, unfolding, and a layer that torch.nn lacks; see modules.py."""

from __future__ import annotations

import math
from typing import Any

import torch

from tileconv.kernels import checks
from tileconv.kernels.functional import conv1d, conv_transpose2d, fold, locally_connected2d, unfold
from tileconv.kernels.ops.local import empty_filters, local_problem

for _name in ("conv1d", "conv_transpose2d", "fold", "locally_connected2d", "unfold"):
    torch.fx.wrap(_name)  # symbolic tracing records the call: the argument checks inside cannot read a proxy


class Conv1d(torch.nn.Conv1d):
    """torch.nn.Conv1d: [N, C, W] or [C, W] -> [N, K, Q] or [K, Q].

    Its forward raises ValueError for a padding_mode other than "zeros".
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        _only_zeros(self.padding_mode)
        return conv1d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d: [N, K, P, Q] or [K, P, Q] -> [N, C, H, W] or [C, H, W]; output_size as there."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        padding: Any = self.padding  # a pair: torch.nn.ConvTranspose2d takes no words
        sizes: tuple[Any, ...] = self.stride, padding, self.kernel_size, 2, self.dilation
        more: Any = self._output_padding(input, output_size, *sizes)
        return conv_transpose2d(input, self.weight, self.bias, self.stride, padding, more, self.groups, self.dilation)


class LocallyConnected2d(torch.nn.Module):
    """A convolution without weight sharing, for images of one size: [N, C, H, W] or [C, H, W] -> [N, K, P, Q].

    input_size: (H, W).  The other arguments are torch.nn.Conv2d's.  weight is [P, Q, K, C, R, S], in memory P Q K R S
    C, as the kernels read it; bias, one for every pixel and filter, is [K, P, Q], or [K] with shared_bias=True.  Both
    start as torch.nn.Conv2d's do, uniform within 1 / sqrt(C * R * S).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: int | tuple[int, int],
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        shared_bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        self.out_channels = checks.integer("out_channels", out_channels, 1)
        self.input_size = checks.pair("input_size", input_size, 1)
        self.kernel_size = checks.pair("kernel_size", kernel_size, 1)
        self.stride = checks.pair("stride", stride, 1)
        self.padding = checks.pair("padding", padding, 0)
        self.dilation = checks.pair("dilation", dilation, 1)
        (top, left), filters = self.padding, (0, 0, out_channels, in_channels, *self.kernel_size)
        problem = local_problem(
            (1, in_channels, *self.input_size), filters, self.stride, (top, top, left, left), self.dilation
        )
        like = torch.empty(0, device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(empty_filters((problem.P, problem.Q, *filters[2:]), like))
        shape = problem.y_shape[1:2] if shared_bias else problem.y_shape[1:]
        self.bias = torch.nn.Parameter(like.new_empty(shape)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the values anew."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return locally_connected2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )


class Unfold(torch.nn.Unfold):
    """torch.nn.Unfold: [N, C, H, W] or [C, H, W] -> the patches as columns, [N, C * R * S, P * Q]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)


class Fold(torch.nn.Fold):
    """torch.nn.Fold: columns [N, C * R * S, P * Q] -> their sums [N, C, H, W]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return fold(
            input,
            self.output_size,
            self.kernel_size,
            self.dilation,
            self.padding,
            self.stride,
        )


def _only_zeros(mode: str) -> None:
    if mode != "zeros":
        raise ValueError(f"padding_mode is {mode!r}: allowed is 'zeros'; torch.nn does the others")


__all__ = ["Conv1d", "ConvTranspose2d", "Fold", "LocallyConnected2d", "Unfold"]
