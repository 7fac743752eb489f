"""Layers that are several of torch.nn's in one kernel, beside ConvReLU2d and LinearReLU."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from tileconv.kernels import checks
from tileconv.kernels.functional import conv2d_max_pool2d, how_conv2d_max_pool2d_runs
from tileconv.kernels.functional.common import IntOrPair
from tileconv.kernels.modules import Conv2d

torch.fx.wrap("conv2d_max_pool2d")


class PoolWindow(NamedTuple):
    """The settings of a torch.nn.MaxPool2d."""

    kernel_size: IntOrPair
    stride: IntOrPair
    padding: IntOrPair
    dilation: IntOrPair
    ceil_mode: bool

    @classmethod
    def of(cls, pool: torch.nn.MaxPool2d) -> PoolWindow:
        """Those of a pool that returns no indices."""
        return cls(pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)


class ConvReLUMaxPool2d(Conv2d):
    """Conv2d, ReLU and MaxPool2d in one: [N, C, H, W] or [C, H, W] -> [N, K, P, Q] or [K, P, Q]; keys of Conv2d.

    Training keeps a byte an output instead of what the convolution writes.  Arguments as in Conv2d, those of the pool
    as in torch.nn.MaxPool2d.  Whether it runs as one kernel or as two, each call decides: functional.conv2d_max_pool2d.
    """

    activation = "relu"
    pool: PoolWindow

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pool_kernel_size: IntOrPair,
        pool_stride: IntOrPair | None = None,
        pool_padding: IntOrPair = 0,
        pool_dilation: IntOrPair = 1,
        ceil_mode: bool = False,
        precision: str | None = None,
    ) -> None:
        checks.pair("pool_kernel_size", pool_kernel_size, 1)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, precision=precision,
        )  # fmt: skip
        pool_stride = pool_kernel_size if pool_stride is None else pool_stride
        self.pool = PoolWindow(pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return conv2d_max_pool2d(input, self.weight, self.bias, **self._settings())

    def how_it_runs(self, input: torch.Tensor) -> str:
        """ "one kernel", or "two kernels: " and why, for this input."""
        return how_conv2d_max_pool2d_runs(input, self.weight, self.bias, **self._settings())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={tuple(self.pool)}"

    def _settings(self) -> dict[str, Any]:
        pool = self.pool
        return {
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups,
            "pool_kernel_size": pool.kernel_size, "pool_stride": pool.stride, "pool_padding": pool.padding,
            "pool_dilation": pool.dilation, "ceil_mode": pool.ceil_mode, "activation": self.activation,
            "precision": self.precision,
        }  # fmt: skip


class FusedMaxPool2d(torch.nn.Identity):
    """What convert() leaves where a MaxPool2d was that the convolution before it does now."""
