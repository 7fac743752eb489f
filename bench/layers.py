"""Layers as plain data: an operation, the extents of an image and named settings, checked and made into a Shape.

Built-in suites, users' files and recorded models all say what a layer is in this form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import problems
from .networks import Shape, known


class LayerError(ValueError):
    """A field that does not say what a layer is; the message names the field, its value and what is allowed."""


@dataclass(frozen=True)
class Row:
    """A layer as data. input: extents without the batch; batch: the layer's own; inner: as Shape's."""

    name: str
    op: str
    input: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    inner: bool = False

    def at(self, batch: int) -> Shape:
        """The layer for `batch` images. Raises LayerError for settings that are unknown, missing or do not fit."""
        return build(self, batch)


@dataclass(frozen=True)
class Field:
    """How a setting is read, from YAML's values or from text, and what is allowed, for the message."""

    read: Callable[[Any], Any]
    allowed: str


@dataclass(frozen=True)
class Operation:
    """What an operation needs: how many extents its input has beside the batch, its settings, and its module."""

    extents: tuple[int, ...]
    make: Callable[..., nn.Module]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _integer(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def _at_least(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = _integer(value)
        if number < least:
            raise ValueError
        return number

    return read


def _extents(value: Any, least: int = 1) -> tuple[int, ...]:
    """3x224x224, [3, 224, 224] or one number."""
    parts = re.split(r"\s*[x,]\s*", value.strip()) if isinstance(value, str) else value
    parts = parts if isinstance(parts, (list, tuple)) else [parts]
    return tuple(_at_least(least)(part) for part in parts)


def _pair(least: int) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        found = _extents(value, least)
        if len(found) not in (1, 2):
            raise ValueError
        return found[0] if len(found) == 1 else found

    return read


def _padding(value: Any) -> Any:
    return value.strip() if isinstance(value, str) and value.strip() in ("same", "valid") else _pair(0)(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value)


def _between(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        number = _number(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return read


def _truth(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return value if isinstance(value, bool) else words[str(value).strip().lower()]


def _activation(value: Any) -> str | None:
    return {"": None, "none": None, "relu": "relu"}[str(value if value is not None else "").strip().lower()]


COUNT = Field(_at_least(1), "an integer of at least 1")
PAIR = Field(_pair(1), "an integer of at least 1, or two such as 3x5")
EDGE = Field(_pair(0), "an integer of at least 0, or two such as 1x2")
NUMBER = Field(_number, "a number")
CHANCE = Field(_between(0, 1), "a number from 0 to 1")
TRUTH = Field(_truth, "true or false")
FIELDS = {
    "filters": COUNT, "features": COUNT, "groups": COUNT, "kernel": PAIR, "stride": PAIR, "dilation": PAIR,
    "padding": Field(_padding, EDGE.allowed + ', "same" or "valid"'), "output_padding": EDGE, "output": PAIR,
    "pool_kernel": PAIR, "pool_stride": PAIR, "pool_padding": EDGE,
    "bias": TRUTH, "activation": Field(_activation, "relu or none"), "dropout": CHANCE, "p": CHANCE,
    "ceil_mode": TRUTH, "count_include_pad": TRUTH, "norm": NUMBER, "size": COUNT, "alpha": NUMBER, "beta": NUMBER,
    "k": NUMBER, "label_smoothing": CHANCE,
    "input": Field(_extents, "the extents of one image, such as 3x224x224, or of one row of a matrix"),
    "batch": COUNT,
}  # fmt: skip
"""Every setting, whatever the operation."""
NOT_OF_MODULES = ("activation", "dropout")  # a Shape's own
RENAMED = {"kernel": "kernel_size", "pool_kernel": "pool_kernel_size", "output": "output_size", "norm": "norm_type"}


def _conv(kind: type[nn.Module]) -> Callable[..., nn.Module]:
    def make(channels: int, *_: int, filters: int, **settings: Any) -> nn.Module:
        return kind(channels, filters, **settings)

    return make


def _local(channels: int, *size: int, filters: int, **settings: Any) -> nn.Module:
    from tileconv.kernels.nn import LocallyConnected2d

    kernel = settings.pop("kernel_size")
    return LocallyConnected2d(channels, filters, (size[0], size[1]), kernel, **settings)


def _pooled(channels: int, *_: int, filters: int, **settings: Any) -> nn.Module:
    from tileconv.kernels.nn import ConvReLUMaxPool2d

    kernel = settings.pop("kernel_size")
    return ConvReLUMaxPool2d(channels, filters, kernel, **settings)


def _plain(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda *_, **settings: kind(**settings)


WINDOW = ("stride", "padding", "dilation")
CONV = (*WINDOW, "groups", "bias", "activation")
OPERATIONS = {
    "conv2d": Operation((3,), _conv(nn.Conv2d), ("filters", "kernel"), CONV),
    "conv2d_max_pool2d": Operation(
        (3,), _pooled, ("filters", "kernel", "pool_kernel"),
        (*WINDOW, "groups", "bias", "pool_stride", "pool_padding", "ceil_mode"),
    ),
    "conv2d_im2col": Operation((3,), _conv(nn.Conv2d), ("filters", "kernel"), CONV),
    "conv1d": Operation((2,), _conv(nn.Conv1d), ("filters", "kernel"), CONV),
    "conv_transpose2d": Operation(
        (3,), _conv(nn.ConvTranspose2d), ("filters", "kernel"), (*CONV, "output_padding")
    ),
    "locally_connected2d": Operation((3,), _local, ("filters", "kernel"), (*WINDOW, "bias")),
    "linear": Operation(
        (1,), lambda width, features, **settings: nn.Linear(width, features, **settings), ("features",),
        ("bias", "activation", "dropout"),
    ),
    "max_pool2d": Operation((3,), _plain(nn.MaxPool2d), ("kernel",), (*WINDOW, "ceil_mode")),
    "avg_pool2d": Operation(
        (3,), _plain(nn.AvgPool2d), ("kernel",), ("stride", "padding", "ceil_mode", "count_include_pad")
    ),
    "lp_pool2d": Operation((3,), _plain(nn.LPPool2d), ("norm", "kernel"), ("stride", "ceil_mode")),
    "adaptive_avg_pool2d": Operation((3,), _plain(nn.AdaptiveAvgPool2d), ("output",)),
    "adaptive_max_pool2d": Operation((3,), _plain(nn.AdaptiveMaxPool2d), ("output",)),
    "max_unpool2d": Operation((3,), _plain(nn.MaxUnpool2d), ("kernel",), ("stride", "padding")),
    "local_response_norm": Operation((3,), _plain(nn.LocalResponseNorm), ("size",), ("alpha", "beta", "k")),
    "relu": Operation((1, 2, 3), _plain(nn.ReLU)),
    "dropout": Operation((1, 2, 3), _plain(nn.Dropout), (), ("p",)),
    "softmax": Operation((1, 2, 3), lambda *_: nn.Softmax(dim=1)),
    "log_softmax": Operation((1, 2, 3), lambda *_: nn.LogSoftmax(dim=1)),
    "cross_entropy": Operation((1, 2, 3), _plain(nn.CrossEntropyLoss), (), ("label_smoothing",)),
    "unfold": Operation((3,), _plain(nn.Unfold), ("kernel",), WINDOW),
    "fold": Operation((2,), _plain(nn.Fold), ("output", "kernel"), WINDOW),
}  # fmt: skip
"""The operations that have kernels. Softmax, its logarithm and cross-entropy run along the channels."""


def read_setting(name: str, value: Any) -> Any:
    """A setting's value as modules take it. Raises LayerError."""
    try:
        return FIELDS[name].read(value)
    except (ValueError, TypeError, KeyError):
        raise LayerError(f"{name}={value!r} is not allowed: it must be {FIELDS[name].allowed}") from None


def check_settings(op: str, names: Mapping[str, Any]) -> None:
    """Raise LayerError for an unknown operation, a setting that it does not have, or a missing one."""
    try:
        operation = OPERATIONS[known("op", op, OPERATIONS)]
        for name in names:
            known(f"field of {op}", name, (*operation.required, *operation.optional))
    except ValueError as error:
        raise LayerError(str(error)) from None
    for name in operation.required:
        if name not in names:
            raise LayerError(f"{name} is missing: {op} needs {', '.join(operation.required)}")


def build(row: Row, batch: int) -> Shape:
    """The Shape of a row. Raises LayerError, naming the field, where it cannot be."""
    check_settings(row.op, row.settings)
    operation = OPERATIONS[row.op]
    if len(row.input) not in operation.extents:
        counts = " or ".join(map(str, operation.extents))
        raise LayerError(f"input={'x'.join(map(str, row.input))} has {len(row.input)} extents: {row.op} takes {counts}")
    settings = {name: read_setting(name, value) for name, value in row.settings.items()}
    own = {name: settings.pop(name) for name in NOT_OF_MODULES if name in settings}
    arguments = {RENAMED.get(name, name): value for name, value in settings.items()}
    try:
        with torch.device("meta"):
            module = operation.make(*row.input, **arguments)
        shape = Shape(
            row.name, row.op, module, (batch, *row.input), own.get("activation"), own.get("dropout", 0.0), row.inner
        )
        problems.output_shape(shape)
    except (ValueError, RuntimeError) as error:
        raise LayerError(f"{', '.join(f'{k}={v}' for k, v in row.settings.items())}: {error}") from None
    return shape
