"""torch.nn's layers on our kernels: the same constructors, attributes and state_dict keys.

Every class is a subclass of torch.nn's, so isinstance checks, initialisation by type, repr, deepcopy and pickle go on
as they did; only forward differs.  Shapes, dtypes and errors are those of `tileconv.kernels.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.functional import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    conv2d,
    dropout,
    linear,
    local_response_norm,
    lp_pool2d,
    max_pool2d,
    max_unpool2d,
    relu,
)

for _name in (
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "conv2d",
    "dropout",
    "linear",
    "local_response_norm",
    "lp_pool2d",
    "max_pool2d",
    "max_unpool2d",
    "relu",
):
    torch.fx.wrap(_name)  # symbolic tracing records the call: the argument checks inside cannot read a proxy


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d: [N, C, H, W] or [C, H, W] -> [N, K, P, Q] or [K, P, Q].

    The weight is kept channels_last, through load_state_dict, .to(memory_format=...) and reset_parameters, so that no
    call repacks it.  By PyTorch's rule the output then is channels_last too: flatten it with flatten or reshape, as
    `view` refuses it.

    precision: of fp32 products, None, "ieee", "tf32", "bf16x3" or "bf16x6", as in functional.conv2d.

    Raises ValueError for padding_mode other than "zeros", and what torch.nn.Conv2d raises.
    """

    activation: Literal["relu"] | None = None
    precision: str | None = None  # on the class too: convert() makes instances without calling __init__

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
        precision: str | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode is {padding_mode!r}: allowed is 'zeros'; torch.nn.Conv2d does the others")
        checks.choice("precision", precision, (None, *checks.PRECISIONS))
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.precision = precision

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            activation=self.activation, precision=self.precision,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Draw the values that torch.nn.Conv2d draws."""
        super().reset_parameters()  # the constructor ends with this call
        self.lay_out(torch.channels_last)

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Lay the weight, and its gradient, out in `memory_format`; the Parameter stays the same object."""
        weight = self._parameters.get("weight")  # a parametrized weight is computed anew in each call
        if weight is None or weight.layout != torch.strided:
            return
        with torch.no_grad():
            for tensor in (weight, weight.grad):
                if tensor is not None and layout.is_channels_last(tensor) != (memory_format == torch.channels_last):
                    tensor.data = tensor.data.to(memory_format=memory_format)

    def extra_repr(self) -> str:
        return _with_precision(super().extra_repr(), self.precision)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Conv2d:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.lay_out(torch.channels_last)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, *arguments)
        self.lay_out(torch.channels_last)  # load_state_dict(assign=True) puts in tensors of any layout


class ConvReLU2d(Conv2d):
    """Conv2d and the ReLU behind it in one kernel; keys and constructor of Conv2d."""

    activation = "relu"


class Linear(torch.nn.Linear):
    """torch.nn.Linear: [..., C] -> [..., K].

    precision: of fp32 products, None, "ieee", "tf32", "bf16x3" or "bf16x6", as in functional.conv2d.
    dropout: in training the share of outputs that become zero, in the same kernel, as in functional.linear.
    """

    activation: Literal["relu"] | None = None
    precision: str | None = None
    dropout: float = 0.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        checks.choice("precision", precision, (None, *checks.PRECISIONS))
        dropout = checks.probability("dropout", dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.precision, self.dropout = precision, dropout

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(
            input, self.weight, self.bias, activation=self.activation, dropout=self.dropout, training=self.training,
            precision=self.precision,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = _with_precision(super().extra_repr(), self.precision)
        return f"{text}, dropout={self.dropout}" if self.dropout else text


class LinearReLU(Linear):
    """Linear and the ReLU behind it in one kernel; keys and constructor of Linear."""

    activation = "relu"


class MaxPool2d(torch.nn.MaxPool2d):
    """torch.nn.MaxPool2d: [N, C, H, W] or [C, H, W] -> the maxima, and with return_indices a pair with their places."""

    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d: [N, C, H, W] or [C, H, W] -> means over output_size windows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return adaptive_avg_pool2d(input, self.output_size)


class ReLU(torch.nn.ReLU):
    """torch.nn.ReLU, for tensors of any shape."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return relu(input, self.inplace)


class FusedReLU(torch.nn.Identity):
    """What convert() leaves where a ReLU was that the layer before it does now: keys and indices stay."""


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout, for tensors of any shape: PyTorch's seed, other random numbers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropout(input, self.p, self.training, self.inplace)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """torch.nn.AdaptiveMaxPool2d: maxima over output_size windows, and with return_indices their places."""

    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AvgPool2d(torch.nn.AvgPool2d):
    """torch.nn.AvgPool2d: [N, C, H, W] or [C, H, W] -> means."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class LPPool2d(torch.nn.LPPool2d):
    """torch.nn.LPPool2d: [N, C, H, W] or [C, H, W] -> norms; norm_type 2 is L2-norm pooling."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return lp_pool2d(input, self.norm_type, self.kernel_size, self.stride, self.ceil_mode)


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """torch.nn.MaxUnpool2d: what a max-pool with return_indices undoes."""

    def forward(
        self, input: torch.Tensor, indices: torch.Tensor, output_size: Sequence[int] | None = None
    ) -> torch.Tensor:
        return max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """torch.nn.LocalResponseNorm; LocalResponseNorm(5, 1e-4, 0.75, 2.0) is what AlexNet's code computed.

    divide_alpha=False is the formula of AlexNet's paper, where alpha is not divided by size.
    """

    divide_alpha: bool = True  # on the class too: convert() makes instances without calling __init__

    def __init__(
        self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, divide_alpha: bool = True
    ) -> None:
        super().__init__(size, alpha, beta, k)
        self.divide_alpha = divide_alpha

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k, divide_alpha=self.divide_alpha)

    def extra_repr(self) -> str:
        text = str(super().extra_repr())  # type: ignore[no-untyped-call]
        return text if self.divide_alpha else f"{text}, divide_alpha=False"


def _with_precision(text: str, precision: str | None) -> str:
    return text if precision is None else f"{text}, precision={precision!r}"


__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "Conv2d",
    "ConvReLU2d",
    "Dropout",
    "FusedReLU",
    "LPPool2d",
    "Linear",
    "LinearReLU",
    "LocalResponseNorm",
    "MaxPool2d",
    "MaxUnpool2d",
    "ReLU",
]
