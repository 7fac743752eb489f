"""The output-size and receptive-field calculator: what each layer of a network makes, sees, holds and costs.

Nothing is run: networks are read as chains of layers, and extents come from tileconv.kernels.geometry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

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
    parameters: int
    flops: int
    """Multiplications and additions of convolutions and fully connected layers, biases left out; 0 for others."""
    neurons: int
    """Outputs for one picture, if the layer has weights: as papers count them."""
    elements: int
    """Outputs that are written, for the whole batch; of an inception module those within it too."""
    parts: tuple[Row, ...] = ()
    """The layers within an inception module."""

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

    shape = tuple(input_shape)
    if len(shape) not in (3, 4) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"input_shape is {input_shape!r}: allowed are [N, C, H, W] and [C, H, W] of positive ints")
    shape = (1, *shape) if len(shape) == 3 else shape
    layers = model_or_layers
    rows, _ = _walk(layers_of(layers, shape) if isinstance(layers, nn.Module) else layers, _At(shape), strict)
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


def layers_of(model: nn.Module, shape: Sequence[int]) -> list[tuple[str, nn.Module]]:
    """A network as a chain of named layers, inception modules among them, for pictures [N, C, H, W] of `shape`."""
    from torch import nn

    from tileconv.model import alexnet2012, googlenet, lenet, vgg
    from tileconv.model.alexnet import AlexNet

    if isinstance(model, googlenet.GoogLeNet):
        aux = ("aux1", "aux2")
        chain = [(name, m) for name, m in model.named_children() if name not in aux]
        return [*chain[:-1], ("flatten", nn.Flatten()), chain[-1]]
    if isinstance(model, lenet.LeNet):
        return _lenet(model, shape)
    if isinstance(model, alexnet2012.AlexNet2012):
        return alexnet2012.chain(model)
    if isinstance(model, vgg.VGG):
        return vgg.chain(model)
    if isinstance(model, AlexNet):
        parts = ("conv1", "", "pool1", "conv2", "", "pool2", "conv3", "", "conv4", "", "conv5", "", "pool5")
        dense = ("", "fc6", "", "", "fc7", "", "fc8")
        return [
            *zip(parts, model.features, strict=True), ("avgpool", model.avgpool), ("", nn.Flatten()),
            *zip(dense, model.classifier, strict=True),
        ]  # fmt: skip
    if isinstance(model, nn.Sequential):
        return list(model.named_children())
    raise TypeError(
        f"model is a {type(model).__name__}: allowed are the networks of tileconv.model, torch.nn.Sequential "
        "and (name, layer) pairs"
    )


def network(name: str, **arguments: Any) -> nn.Module:
    """A network of tileconv.model by name, without values: nothing is drawn and nothing takes memory."""
    import torch

    from tileconv.model.zoo import build

    with torch.device("meta"):
        return build(name, **arguments)


def channels_of(model: nn.Module) -> int:
    """Channels of the pictures that a network takes."""
    from torch import nn

    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def _lenet(model: Any, shape: Sequence[int]) -> list[tuple[str, nn.Module]]:
    """LeNet's forward spelled out; the padding of its first layer depends on the picture."""
    import copy

    from torch import nn

    from tileconv.model import lenet

    if len(shape) != 4 or shape[2] != shape[3] or shape[2] not in lenet.SIZES:
        raise ValueError(f"input_shape is {tuple(shape)}: LeNet takes [N, C, 28, 28] or [N, C, 32, 32]")
    pad = lenet.SIZES[shape[2]]
    first = copy.copy(model.conv1)  # the same parameters, another padding
    first.padding = (pad, pad)
    return [
        ("conv1", first), ("relu1", nn.ReLU()), ("pool1", nn.MaxPool2d(2)),
        ("conv2", model.conv2), ("relu2", nn.ReLU()), ("pool2", nn.MaxPool2d(2)), ("flatten", nn.Flatten()),
        ("fc1", model.fc1), ("relu3", nn.ReLU()), ("fc2", model.fc2), ("relu4", nn.ReLU()), ("fc3", model.fc3),
    ]  # fmt: skip


def _walk(layers: Iterable[tuple[str, nn.Module]], at: _At, strict: bool) -> tuple[list[Row], _At]:
    """The rows of a chain that starts at `at`, and where it ends."""
    from torch import nn

    from tileconv.model.googlenet import BasicConv2d, Inception

    rows: list[Row] = []
    for name, m in layers:
        if isinstance(m, nn.ReLU | nn.Dropout | nn.Identity | nn.Softmax | nn.LogSoftmax):
            continue
        if isinstance(m, nn.Flatten):
            at = _At((at.shape[0], math.prod(at.shape[1:])), _whole(at), (0, 0))
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
        after = _At((at.shape[0], m.out_features), _whole(at), (0, 0))
        row = _row(name, "linear", f"{features} -> {m.out_features}", after, m)
        return replace(row, flops=2 * at.shape[0] * features * m.out_features), after
    if len(at.shape) != 4:
        raise ValueError(f"a {type(m).__name__} takes [N, C, H, W] and is given {list(at.shape)}")
    n, c, h, w = at.shape
    if isinstance(m, nn.LocalResponseNorm):
        return _row(name, "local_response_norm", f"{m.size} channels", at, m), at
    if isinstance(m, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        p, q = (extent if wanted is None else wanted for extent, wanted in zip((h, w), _pair(m.output_size)))  # noqa: B905
        adaptive = AdaptivePool2dProblem(n, c, h, w, p, q)
        jump = (at.jump[0] * (h // p or 1), at.jump[1] * (w // q or 1))
        after = _At((n, c, p, q), _seen(at, adaptive.window), jump)
        kind = "adaptive_avg_pool2d" if isinstance(m, nn.AdaptiveAvgPool2d) else "adaptive_max_pool2d"
        return _row(name, kind, f"to {p}x{q}", after, m), after
    kernel, stride, dilation = (_pair(getattr(m, key, 1)) for key in ("kernel_size", "stride", "dilation"))
    stride = kernel if stride == (None, None) else stride  # an LPPool2d's may be None
    padding: Pair = _same(m) if isinstance(m, nn.Conv2d) else _pair(getattr(m, "padding", 0))
    if strict:
        for extent, window, step, pad, spread in zip((h, w), kernel, stride, padding, dilation, strict=True):
            output_size(extent, window, step, pad, spread, strict=True)
    spans = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    jump = (at.jump[0] * stride[0], at.jump[1] * stride[1])
    text = f"{kernel[0]}x{kernel[1]}"
    named = (("stride", stride, (1, 1)), ("padding", padding, (0, 0)), ("dilation", dilation, (1, 1)))
    tail = "".join(f", {key} {_short(value)}" for key, value, usual in named if value != usual)
    if isinstance(m, nn.Conv2d):
        if c != m.in_channels:
            raise ValueError(f"it takes {m.in_channels} channels and is given {c}")
        sides = (padding[0], padding[0]), (padding[1], padding[1])
        conv = Conv2dProblem(n, c, h, w, m.out_channels, kernel[0], kernel[1], stride, sides, dilation, m.groups)
        after = _At(conv.y_shape, _seen(at, spans), jump)
        tail += f", {m.groups} groups" if m.groups > 1 else ""
        row = _row(name, "conv2d", f"{conv.K} x {text}x{conv.group_channels}{tail}", after, m)
        return replace(row, flops=conv.flops), after
    kinds = {nn.MaxPool2d: "max_pool2d", nn.AvgPool2d: "avg_pool2d", nn.LPPool2d: "lp_pool2d"}
    found = [kind for cls, kind in kinds.items() if isinstance(m, cls)]
    if not found:
        raise TypeError(f"{name} is a {type(m).__name__}: no layer that shapes are known of")
    pool = Pool2dProblem(n, c, h, w, kernel, stride, padding, dilation, bool(getattr(m, "ceil_mode", False)))
    after = _At(pool.y_shape, _seen(at, spans), jump)
    return _row(name, found[0], text + tail, after, m), after


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
    sight = max(end.field[0] for end in ends), max(end.field[1] for end in ends)
    after = _At((n, sum(end.shape[1] for end in ends), h, w), sight, ends[0].jump)
    row = Row(
        name, "inception", f"{len(ends)} branches", after.shape, after.field, after.jump,
        parameters=sum(part.parameters for part in parts), flops=sum(part.flops for part in parts),
        neurons=sum(part.neurons for part in parts),
        elements=sum(part.elements for part in parts) + math.prod(after.shape), parts=tuple(parts),
    )  # fmt: skip
    return row, after


def _row(name: str, kind: str, geometry: str, at: _At, m: nn.Module) -> Row:
    count = math.prod(at.shape)
    neurons = count // at.shape[0] if kind in ("conv2d", "linear") else 0
    return Row(name, kind, geometry, at.shape, at.field, at.jump, _parameters(m), 0, neurons, count)


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


def _short(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _volume(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[1:]))


def table(rows: Sequence[Row], parts: bool = False) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells for reading; `parts` lists the layers within inception modules below them."""
    header = ("layer", "what", "output", "receptive field", "jump", "parameters", "neurons", "MFLOPs", "fp32 KiB")
    cells: list[tuple[str, ...]] = []
    for row in rows:
        inner = [replace(part, name=f"  {part.name.removeprefix(row.name)[1:]}") for part in row.parts] if parts else []
        for r in (row, *inner):
            cells.append((
                r.name, f"{r.kind}: {r.geometry}", "x".join(map(str, (*r.shape[2:], r.shape[1]))),
                _short(r.receptive_field), _short(r.jump) if r.jump != (0, 0) else "-", f"{r.parameters:,}",
                f"{r.neurons:,}", f"{r.flops / 1e6:,.1f}", f"{r.memory() / 1024:,.1f}",
            ))  # fmt: skip
    return header, cells


def summary(rows: Sequence[Row], shape: Sequence[int]) -> list[str]:
    """The totals, and how they are counted."""
    sums, picture = totals(rows), math.prod(shape[1:])
    return [
        f"parameters: {sums.parameters:,}",
        f"neurons: {sums.convolution_neurons:,} in the convolutions, {sums.neurons:,} with the fully connected layers. "
        f"One picture's outputs of layers with weights; its {picture:,} inputs, pools and norms are not counted",
        f"operations: {sums.flops / 1e6:,.1f} MFLOPs forward, multiplications and additions of convolutions and fully "
        "connected layers, taps in the padding included",
        f"outputs of all layers: {sums.memory / 1024:,.1f} KiB in fp32, ReLUs in place",
    ]


def shapes_command(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(SIZES)}.")] = "alexnet",
    size: Annotated[int | None, typer.Option(help="Height and width of the pictures; default: the network's.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures; operations and memory are those of all.")] = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse sizes that do not divide by a stride.")] = False,
    parts: Annotated[bool, typer.Option("--parts", help="Also list the layers within inception modules.")] = False,
) -> None:
    """Calculate every layer's output, receptive field, parameters, neurons, operations and memory."""
    from rich.console import Console

    try:
        if model not in SIZES:
            raise ValueError(f"model is {model!r}: allowed are {', '.join(SIZES)}")
        chosen = {"size": size} if model == "alexnet-2012" and size is not None else {}
        built = network(model, **chosen)
        extent = SIZES[model] if size is None else size
        if batch < 1 or extent < 1:
            raise ValueError(f"batch is {batch}, size is {extent}: allowed are numbers of at least 1")
        shape = (batch, channels_of(built), extent, extent)
        rows = shapes(built, shape, strict=strict)
    except (ValueError, ImportError) as error:
        _fail(error)
    _print(Console(), model, shape, rows, parts)


def _print(console: Console, model: str, shape: Sequence[int], rows: Sequence[Row], parts: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    header, cells = table(rows, parts)
    drawn = Table(box=None, pad_edge=False, title_justify="left", title=f"{model}, input {list(shape)}")
    for i, name in enumerate(header):
        drawn.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for line in cells:
        drawn.add_row(*line)
    wide = console if console.is_terminal else Console(width=500)
    wide.print(drawn, highlight=False, markup=False)
    for text in summary(rows, shape):
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _fail(error: Exception) -> NoReturn:
    """A user's mistake: one line on stderr, exit status 2."""
    typer.echo(f"tileconv: {error}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(shapes_command)
