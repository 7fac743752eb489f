"""The output-size and receptive-field calculator: what each layer of a network makes, sees, holds and costs.

Nothing is run: networks are read as chains of layers, and extents come from tileconv.kernels.geometry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from tileconv.kernels.geometry import AdaptivePool2dProblem, Conv2dProblem, Pool2dProblem

Pair = tuple[int, int]
SIZES = {
    "alexnet": 224,
    "alexnet-2012": 227,
    "alexnet-mini": 28,
    "googlenet": 224,
    "lenet": 32,
    "lenet-visualiser": 32,
    "vgg16": 224,
}
"""Height and width of the pictures that each network is made for."""


@dataclass(frozen=True)
class Row:
    """One layer. ReLU, dropout and batch normalisation are no rows: they belong to the layer before them."""

    name: str
    kind: str
    """The function that does it: conv2d, max_pool2d, linear, ...; inception for a module of several."""
    geometry: str
    """For reading: 96 x 11x11x3, stride 4."""
    shape: tuple[int, ...]
    """The output volume, [N, C, H, W] or [N, C]."""
    receptive_field: Pair
    """Rows and columns of the picture that one output sees, those in the padding around it included."""
    jump: Pair
    """The total stride: rows and columns of the picture from one output to the next; (0, 0) where there is only one
    output because the layer sees all there is."""
    before: Pair
    """Rows above and columns left of the picture, in the padding, that the first output sees."""
    parameters: int
    flops: int
    """Multiplications and additions of convolutions and fully connected layers, biases left out; 0 for others."""
    neurons: int
    """Outputs for one picture, if the layer has weights: as papers count them."""
    elements: int
    """Outputs that are written, for the whole batch; of an inception module those within it too."""
    parts: tuple[Row, ...] = ()
    """The layers within an inception module."""
    problem: Conv2dProblem | Pool2dProblem | AdaptivePool2dProblem | None = None
    """What the kernels are asked; a fully connected layer is a 1x1 convolution. None: a norm, a module of several."""

    def memory(self, itemsize: int = 4) -> int:
        """Bytes of the outputs; fp32 unless told otherwise."""
        return itemsize * self.elements


@dataclass(frozen=True)
class Totals:
    """Sums over the layers of a network. Neurons are those of convolutions and fully connected layers."""

    parameters: int
    neurons: int
    convolution_neurons: int
    flops: int
    memory: int


@dataclass(frozen=True)
class _At:
    """How far a chain is: the shape there, and how the picture is seen from there."""

    shape: tuple[int, ...]
    field: Pair = (1, 1)
    jump: Pair = (1, 1)
    before: Pair = (0, 0)


def output_size(
    extent: int, window: int, stride: int = 1, padding: int = 0, dilation: int = 1, *, strict: bool = False
) -> int:
    """Outputs along one axis: (W - F + 2P) / S + 1, rounded down as PyTorch does, where F is the dilated window.

    Raises ValueError where the window does not fit; with `strict` also where the quotient is not whole, so that the
    last pixels would be left out: W=10, F=3, S=2, P=0 gives 4.5.
    """
    from tileconv.kernels.geometry import output_extent

    least = {"extent": (extent, 1), "window": (window, 1), "stride": (stride, 1), "padding": (padding, 0),
             "dilation": (dilation, 1)}  # fmt: skip
    for name, (value, lowest) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"{name} is {value!r}: allowed are ints of at least {lowest}")
    span = dilation * (window - 1) + 1
    steps = output_extent(extent, window, 1, padding, padding, dilation) - 1  # W - F + 2P
    values = f"W={extent}, F={span}, S={stride}, P={padding}"
    if steps < 0:
        raise ValueError(f"{values}: a window of {span} does not fit into {extent} pixels and {2 * padding} of padding")
    if strict and steps % stride:
        raise ValueError(
            f"{values}: (W - F + 2P)/S + 1 = ({extent} - {span} + {2 * padding})/{stride} + 1 "
            f"= {steps / stride + 1:.4g}, which is not whole: the filters do not fit evenly"
        )
    return output_extent(extent, window, stride, padding, padding, dilation)


def shapes(
    model_or_layers: nn.Module | Iterable[tuple[str, nn.Module]], input_shape: Sequence[int], *, strict: bool = False
) -> list[Row]:
    """A row for each layer, for pictures of `input_shape` [N, C, H, W] or [C, H, W].

    A network of tileconv.model, a torch.nn.Sequential or (name, layer) pairs of Conv2d, pools, LocalResponseNorm,
    BatchNorm2d, Linear, ReLU, Dropout, Flatten and Softmax of torch.nn or tileconv.kernels.nn; values of parameters are
    not needed, so the layers may be on the meta device.

    Raises ValueError, naming the layer, for sizes that do not fit together; with `strict` also where a window's steps
    do not divide as `output_size` describes. Raises TypeError for another kind of layer or model.
    """
    from torch import nn

    from tileconv.model.chains import chain

    shape = tuple(input_shape)
    if len(shape) not in (3, 4) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"input_shape is {input_shape!r}: allowed are [N, C, H, W] and [C, H, W] of positive ints")
    shape = (1, *shape) if len(shape) == 3 else shape
    layers = model_or_layers
    rows, _ = _walk(chain(layers, shape) if isinstance(layers, nn.Module) else layers, _At(shape), strict)
    return rows


def totals(rows: Iterable[Row], itemsize: int = 4) -> Totals:
    """Sums over `shapes`' rows; memory in bytes is that of all outputs, for elements of `itemsize` bytes."""
    rows = list(rows)
    return Totals(
        parameters=sum(row.parameters for row in rows),
        neurons=sum(row.neurons for row in rows),
        convolution_neurons=sum(row.neurons for row in rows if row.kind != "linear"),
        flops=sum(row.flops for row in rows),
        memory=sum(row.memory(itemsize) for row in rows),
    )


def network(name: str, **arguments: Any) -> nn.Module:
    """A network of tileconv.model by name, without values: nothing is drawn and nothing takes memory."""
    import torch

    from tileconv.model.zoo import build

    with torch.device("meta"):
        return build(name, **arguments)


def _walk(layers: Iterable[tuple[str, nn.Module]], at: _At, strict: bool) -> tuple[list[Row], _At]:
    """The rows of a chain that starts at `at`, and where it ends."""
    from torch import nn

    from tileconv.model.googlenet import BasicConv2d, Inception

    rows: list[Row] = []
    for name, m in layers:
        if isinstance(m, nn.ReLU | nn.Dropout | nn.Identity | nn.Softmax | nn.LogSoftmax):
            continue
        if isinstance(m, nn.Flatten):
            at = _At((at.shape[0], math.prod(at.shape[1:])), _whole(at), (0, 0), at.before)
        elif isinstance(m, nn.BatchNorm2d) and rows:
            rows[-1] = replace(rows[-1], parameters=rows[-1].parameters + _parameters(m))
        elif isinstance(m, BasicConv2d):
            inner, at = _walk([(name, m.conv), (name, m.bn)], at, strict)
            rows += inner
        elif isinstance(m, Inception):
            row, at = _inception(name, m, at, strict)
            rows.append(row)
        else:
            try:
                row, at = _layer(name, m, at, strict)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            rows.append(row)
    return rows, at


def _layer(name: str, m: nn.Module, at: _At, strict: bool) -> tuple[Row, _At]:
    """One layer that computes something."""
    from torch import nn

    from tileconv.kernels.geometry import AdaptivePool2dProblem, Conv2dProblem, Pool2dProblem

    if isinstance(m, nn.Linear):
        features = math.prod(at.shape[1:])  # as Flatten before it would
        if features != m.in_features:
            raise ValueError(f"it takes {m.in_features} inputs and is given {features}, of {_volume(at.shape)}")
        after = _At((at.shape[0], m.out_features), _whole(at), (0, 0), at.before)
        row = _row(name, "linear", f"{features} -> {m.out_features}", after, m)
        product = Conv2dProblem(at.shape[0], features, 1, 1, m.out_features, 1, 1)
        return replace(row, flops=product.flops, problem=product), after
    if len(at.shape) != 4:
        raise ValueError(f"a {type(m).__name__} takes [N, C, H, W] and is given {list(at.shape)}")
    n, c, h, w = at.shape
    if isinstance(m, nn.LocalResponseNorm):
        return _row(name, "local_response_norm", f"{m.size} channels", at, m), at
    if isinstance(m, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        p, q = (extent if wanted is None else wanted for extent, wanted in zip((h, w), _pair(m.output_size)))  # noqa: B905
        adaptive = AdaptivePool2dProblem(n, c, h, w, p, q)
        jump = (at.jump[0] * (h // p or 1), at.jump[1] * (w // q or 1))
        after = _At((n, c, p, q), _seen(at, adaptive.window), jump, at.before)
        kind = "adaptive_avg_pool2d" if isinstance(m, nn.AdaptiveAvgPool2d) else "adaptive_max_pool2d"
        return replace(_row(name, kind, f"to {p}x{q}", after, m), problem=adaptive), after
    kernel, stride, dilation = (_pair(getattr(m, key, 1)) for key in ("kernel_size", "stride", "dilation"))
    stride = kernel if stride == (None, None) else stride  # an LPPool2d's may be None
    padding: Pair = _same(m) if isinstance(m, nn.Conv2d) else _pair(getattr(m, "padding", 0))
    if strict:
        for extent, window, step, pad, spread in zip((h, w), kernel, stride, padding, dilation, strict=True):
            output_size(extent, window, step, pad, spread, strict=True)
    spans = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    jump = (at.jump[0] * stride[0], at.jump[1] * stride[1])
    before = (at.before[0] + padding[0] * at.jump[0], at.before[1] + padding[1] * at.jump[1])
    text = f"{kernel[0]}x{kernel[1]}"
    named = (("stride", stride, (1, 1)), ("padding", padding, (0, 0)), ("dilation", dilation, (1, 1)))
    tail = "".join(f", {key} {short(value)}" for key, value, usual in named if value != usual)
    if isinstance(m, nn.Conv2d):
        if c != m.in_channels:
            raise ValueError(f"it takes {m.in_channels} channels and is given {c}")
        sides = (padding[0], padding[0]), (padding[1], padding[1])
        conv = Conv2dProblem(n, c, h, w, m.out_channels, kernel[0], kernel[1], stride, sides, dilation, m.groups)
        after = _At(conv.y_shape, _seen(at, spans), jump, before)
        tail += f", {m.groups} groups" if m.groups > 1 else ""
        row = _row(name, "conv2d", f"{conv.K} x {text}x{conv.group_channels}{tail}", after, m)
        return replace(row, flops=conv.flops, problem=conv), after
    kinds = {nn.MaxPool2d: "max_pool2d", nn.AvgPool2d: "avg_pool2d", nn.LPPool2d: "lp_pool2d"}
    found = [kind for cls, kind in kinds.items() if isinstance(m, cls)]
    if not found:
        raise TypeError(f"{name} is a {type(m).__name__}: no layer that shapes are known of")
    pool = Pool2dProblem(n, c, h, w, kernel, stride, padding, dilation, bool(getattr(m, "ceil_mode", False)))
    after = _At(pool.y_shape, _seen(at, spans), jump, before)
    return replace(_row(name, found[0], text + tail, after, m), problem=pool), after


def _inception(name: str, m: Any, at: _At, strict: bool) -> tuple[Row, _At]:
    """Branches side by side, stacked by their channels; the widest sight is the module's."""
    parts: list[Row] = []
    ends: list[_At] = []
    for label, branch in m.named_children():
        chain = branch.named_children() if label != "branch1" else [("", branch)]
        steps = [(f"{name}.{label}.{place}".rstrip("."), layer) for place, layer in chain]
        rows, end = _walk(steps, at, strict)
        parts += rows
        ends.append(end)
    n, _, h, w = ends[0].shape
    sight, before = (
        (max(pair[0] for pair in pairs), max(pair[1] for pair in pairs))
        for pairs in ([end.field for end in ends], [end.before for end in ends])
    )
    after = _At((n, sum(end.shape[1] for end in ends), h, w), sight, ends[0].jump, before)
    row = Row(
        name, "inception", f"{len(ends)} branches", after.shape, after.field, after.jump, after.before,
        parameters=sum(part.parameters for part in parts), flops=sum(part.flops for part in parts),
        neurons=sum(part.neurons for part in parts),
        elements=sum(part.elements for part in parts) + math.prod(after.shape), parts=tuple(parts),
    )  # fmt: skip
    return row, after


def _row(name: str, kind: str, geometry: str, at: _At, m: nn.Module) -> Row:
    count = math.prod(at.shape)
    neurons = count // at.shape[0] if kind in ("conv2d", "linear") else 0
    return Row(name, kind, geometry, at.shape, at.field, at.jump, at.before, _parameters(m), 0, neurons, count)


def _parameters(m: nn.Module) -> int:
    return sum(p.numel() for p in m.parameters())


def _seen(at: _At, window: Pair) -> Pair:
    return at.field[0] + (window[0] - 1) * at.jump[0], at.field[1] + (window[1] - 1) * at.jump[1]


def _whole(at: _At) -> Pair:
    """What all outputs together see."""
    return _seen(at, (at.shape[2], at.shape[3])) if len(at.shape) == 4 else at.field


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) or value is None else tuple(value)


def _same(m: Any) -> Pair:
    """A convolution's padding as numbers."""
    from tileconv.kernels.geometry import same_padding

    if not isinstance(m.padding, str):
        return m.padding[0], m.padding[1]
    if m.padding == "valid":
        return 0, 0
    sides = [same_padding(window, spread) for window, spread in zip(m.kernel_size, m.dilation, strict=True)]
    if any(before != after for before, after in sides):
        raise ValueError(
            f"padding='same' of a {m.kernel_size[0]}x{m.kernel_size[1]} window is uneven: not counted here"
        )
    return sides[0][0], sides[1][0]


def short(pair: Pair) -> str:
    """Both extents, or one for both."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _volume(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[1:]))
