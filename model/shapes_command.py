"""`tileconv shapes`: the output-size and receptive-field calculator as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tileconv.model.command import fail
from tileconv.model.shapes import SIZES, Row, network, shapes, short, totals

if TYPE_CHECKING:
    from rich.console import Console


def table(rows: Sequence[Row], parts: bool = False) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells for reading; `parts` lists the layers within inception modules below them."""
    header = ("layer", "what", "output", "receptive field", "jump", "parameters", "neurons", "MFLOPs", "fp32 KiB")
    cells: list[tuple[str, ...]] = []
    for row in rows:
        inner = [replace(part, name=f"  {part.name.removeprefix(row.name)[1:]}") for part in row.parts] if parts else []
        for r in (row, *inner):
            cells.append((
                r.name, f"{r.kind}: {r.geometry}", "x".join(map(str, (*r.shape[2:], r.shape[1]))),
                short(r.receptive_field), short(r.jump) if r.jump != (0, 0) else "-", f"{r.parameters:,}",
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

    from tileconv.model.chains import channels_of

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
        fail(error)
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


if __name__ == "__main__":
    typer.run(shapes_command)
