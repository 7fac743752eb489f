"""What a call of torch's functions, or of tileconv's operators, is as a layer: operation, input and settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Settings = dict[str, Any]
Found = tuple[str, Tensor, Settings]  # operation, input, settings


class NoLayer(Exception):
    """A call that there is no kernel for; the message says why."""


def _conv(
    op: str, input: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    activation: str | None = None,
) -> Found:  # fmt: skip
    if input.dim() != weight.dim():
        raise NoLayer("an input without a batch")
    settings = {
        "filters": weight.shape[0], "kernel": tuple(weight.shape[2:]), "stride": _axes(stride),
        "padding": padding if isinstance(padding, str) else _axes(padding), "dilation": _axes(dilation),
        "groups": groups, "bias": bias is not None, "activation": activation,
    }  # fmt: skip
    return op, input, settings


def _conv2d(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Found:  # fmt: skip
    return _conv("conv2d", input, weight, bias, stride, padding, dilation, groups)


def _conv1d(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Found:  # fmt: skip
    return _conv("conv1d", input, weight, bias, stride, padding, dilation, groups)


def _conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Found:  # fmt: skip
    op, _, settings = _conv("conv_transpose2d", input, weight, bias, stride, padding, dilation, groups)
    return op, input, settings | {"filters": weight.shape[1] * groups, "output_padding": _axes(output_padding)}


def _own_conv(
    input: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    activation: str | None, *_: Any,
) -> Found:  # fmt: skip
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        raise NoLayer(f"uneven padding {tuple(padding)}")
    if tuple(input.shape[2:]) == tuple(weight.shape[2:]) == (1, 1):  # how linear calls it
        return "linear", input.flatten(1), _linear(input.flatten(1), weight, bias)[2] | {"activation": activation}
    return _conv("conv2d", input, weight, bias, stride, (top, left), dilation, groups, activation)


def _linear(input: Tensor, weight: Tensor, bias: Any = None) -> Found:
    return "linear", input.reshape(-1, input.shape[-1]), {"features": weight.shape[0], "bias": bias is not None}


def _own_linear(
    input: Tensor, weight: Tensor, bias: Any, seed: Tensor, dropout: float, activation: str | None, *_: Any
) -> Found:
    op, rows, settings = _linear(input.flatten(1), weight, bias)
    return op, rows, settings | {"activation": activation, "dropout": dropout}


def _max_pool(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    *_: Any, **__: Any,
) -> Found:  # fmt: skip
    settings = {"padding": _axes(padding), "dilation": _axes(dilation), "ceil_mode": ceil_mode}
    return "max_pool2d", input, _window(kernel_size, stride) | settings


def _avg_pool(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None, *_: Any,
) -> Found:  # fmt: skip
    if divisor_override is not None:
        raise NoLayer(f"divisor_override={divisor_override}")
    settings = {"padding": _axes(padding), "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    return "avg_pool2d", input, _window(kernel_size, stride) | settings


def _lp_pool(
    input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False, *_: Any
) -> Found:
    return "lp_pool2d", input, {"norm": norm_type, "ceil_mode": ceil_mode} | _window(kernel_size, stride)


def _adaptive(op: str) -> Callable[..., Found]:
    def settings(input: Tensor, output_size: Any, *_: Any, **__: Any) -> Found:
        wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        size = tuple(e if want is None else int(want) for want, e in zip(wanted, input.shape[-2:], strict=True))
        return op, input, {"output": size}

    return settings


def _max_unpool(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Found:
    if output_size is not None:
        raise NoLayer(f"output_size={tuple(output_size)}")
    return "max_unpool2d", input, _window(kernel_size, stride) | {"padding": _axes(padding)}


def _norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Found:
    return "local_response_norm", input, {"size": size, "alpha": alpha, "beta": beta, "k": k}


def _own_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, *_: Any) -> Found:
    return _norm(input, size, alpha * size, beta, k)  # divided on the way here


def _softmax(op: str) -> Callable[..., Found]:
    def settings(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Found:
        if dim is None or dim % input.dim() != 1:
            raise NoLayer(f"dim={dim} of {input.dim()} axes: only channels")
        return op, input, {}

    return settings


def _cross_entropy(input: Tensor, target: Tensor, weight: Any = None, *_: Any, **options: Any) -> Found:
    if weight is not None or target.is_floating_point() or options.get("reduction", "mean") != "mean":
        raise NoLayer("weights, probabilities or another reduction than the mean")
    return "cross_entropy", input, {"label_smoothing": options.get("label_smoothing", 0.0)}


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Found | None:
    return ("dropout", input, {"p": p}) if training and p > 0 else None


def _own_dropout(input: Tensor, seed: Tensor, p: float) -> Found:
    return "dropout", input, {"p": p}


def _unfold(input: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Found:
    settings = {"kernel": _axes(kernel_size), "dilation": _axes(dilation), "padding": _axes(padding)}
    return "unfold", input, settings | {"stride": _axes(stride)}


def _fold(
    input: Tensor, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Found:
    _, _, settings = _unfold(input, kernel_size, dilation, padding, stride)
    return "fold", input, settings | {"output": _axes(output_size)}


def _relu(input: Tensor, *_: Any, **__: Any) -> Found:
    return "relu", input, {}


def _axes(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple, torch.Size)) else value


def _window(kernel: Any, stride: Any) -> Settings:
    return {"kernel": _axes(kernel), "stride": _axes(kernel if stride is None or stride == [] else stride)}


RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
CALLS: dict[Any, Callable[..., Found | None]] = {
    torch.conv2d: _conv2d, torch.conv1d: _conv1d, torch.conv_transpose2d: _conv_transpose2d, F.linear: _linear,
    F.max_pool2d: _max_pool, F.max_pool2d_with_indices: _max_pool, torch.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool, F.lp_pool2d: _lp_pool, F.adaptive_avg_pool2d: _adaptive("adaptive_avg_pool2d"),
    F.adaptive_max_pool2d: _adaptive("adaptive_max_pool2d"),
    F.adaptive_max_pool2d_with_indices: _adaptive("adaptive_max_pool2d"), F.max_unpool2d: _max_unpool,
    F.local_response_norm: _norm, F.softmax: _softmax("softmax"), torch.softmax: _softmax("softmax"),
    Tensor.softmax: _softmax("softmax"), F.log_softmax: _softmax("log_softmax"),
    torch.log_softmax: _softmax("log_softmax"), Tensor.log_softmax: _softmax("log_softmax"),
    F.cross_entropy: _cross_entropy, F.dropout: _dropout, torch.dropout: _dropout, F.unfold: _unfold, F.fold: _fold,
    **dict.fromkeys(RELUS, _relu),
}  # fmt: skip
OWN_CALLS: dict[str, Callable[..., Found | None]] = {
    "conv2d_fprop": _own_conv, "max_pool2d": _max_pool, "avg_pool2d": _avg_pool, "lp_pool2d": _lp_pool,
    "adaptive_avg_pool2d": _adaptive("adaptive_avg_pool2d"), "adaptive_max_pool2d": _adaptive("adaptive_max_pool2d"),
    "local_response_norm": _own_norm, "relu": _relu, "dropout": _own_dropout,
    "linear_dropout": _own_linear,
}  # fmt: skip
"""tileconv's own operators, whose arguments are resolved already."""


def handler(function: Any) -> Callable[..., Found | None] | None:
    """What reads a call of `function`; None for one that is no layer of ours."""
    if is_own(function):
        return OWN_CALLS.get(function._qualified_op_name.removeprefix("tileconv::"))
    return CALLS.get(function) if function.__hash__ is not None else None


def is_own(function: Any) -> bool:
    """Whether this is one of tileconv's operators."""
    return isinstance(function, torch._ops.OpOverloadPacket) and function._qualified_op_name.startswith("tileconv::")
