"""What dense evaluation saves: one pass over a large picture beside the classifier on every crop of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from tileconv.model.command import fail

from .cases import DTYPES
from .document import Table
from .networks import known

NETWORKS = ("alexnet", "vgg16", "googlenet")


@dataclass(frozen=True)
class DenseRow:
    """One way to all scores of a picture. `flops` are counted; `modelled_us` is the cost model's, not measured."""

    network: str
    way: str
    pictures: tuple[int, int, int]
    """How many runs, pictures in each, and their height."""
    scores: int
    flops: int
    modelled_us: float


def dense_rows(
    networks: Sequence[str] = NETWORKS, extent: int = 384, dtype: str = "fp16", arch: str = "sm_90"
) -> list[DenseRow]:
    """For every network three ways to the scores of a picture of extent x extent: densely, all crops as one batch, and
    one crop after the other.

    Operations are those of convolutions and fully connected layers. Times are modelled for the GPU of `arch`: every
    layer's forward pass, without the host and without what lies between two kernels. Raises ValueError for an unknown
    network, dtype or arch, and a picture smaller than a crop.
    """
    from tileconv.kernels.hardware import gpu_of_arch
    from tileconv.model.dense import dense as dense_of
    from tileconv.model.shapes import network, totals

    from .inspect import ARCHS
    from .modelled import forward_us

    known("dtype", dtype, DTYPES)
    gpu = gpu_of_arch(int(known("arch", arch, [a for a in ARCHS if a.startswith("sm_")])[3:]))
    found: list[DenseRow] = []
    for name in networks:
        net = dense_of(network(known("network", name, NETWORKS)).eval())
        if extent < net.size:
            raise ValueError(f"size={extent} must be at least the {net.size} pixels of a crop")
        whole = net.rows(extent, extent)
        scores = math.prod(whole[-1].shape[2:])
        batch = net.rows(net.size, net.size, batch=scores)
        one = net.rows(net.size, net.size)
        for way, pictures, rows in (
            ("dense", (1, 1, extent), whole),
            ("crops, one batch", (1, scores, net.size), batch),
            ("crops, one by one", (scores, 1, net.size), one),
        ):
            runs = pictures[0]
            time = runs * forward_us(rows, DTYPES[dtype], gpu)
            found.append(DenseRow(name, way, pictures, scores, runs * totals(rows).flops, time))
    return found


def dense_table(rows: Sequence[DenseRow]) -> Table:
    """The rows for reading, each beside the dense one of its network."""
    dense = {row.network: row for row in rows if row.way == "dense"}
    header = ("network", "way", "pictures", "scores", "GFLOP", "x dense", "modelled us", "x dense")
    cells = []
    for row in rows:
        least = dense[row.network]
        runs, batch, size = row.pictures
        pictures = f"{runs} x {batch} of {size}x{size}" if runs > 1 else f"{batch} of {size}x{size}"
        cells.append((
            row.network, row.way, pictures, str(row.scores), f"{row.flops / 1e9:.2f}",
            f"{row.flops / least.flops:.1f}", f"{row.modelled_us:,.0f}", f"{row.modelled_us / least.modelled_us:.1f}",
        ))  # fmt: skip
    return Table(header, tuple(cells))


def dense(
    network: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(NETWORKS)}; may be given again. Default: all.")
    ] = None,
    size: Annotated[int, typer.Option(help="Height and width of the large picture.")] = 384,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    arch: Annotated[str, typer.Option(help="The GPU that times are modelled for, sm_80 ... sm_120.")] = "sm_90",
) -> None:
    """Compare one dense pass over a large picture with the classifier on every crop: operations and modelled time."""
    from rich.console import Console
    from rich.table import Table as Drawn

    try:
        table = dense_table(dense_rows(network or NETWORKS, size, dtype, arch))
    except (ValueError, ImportError) as error:
        fail(error)
    drawn = Drawn(box=None, pad_edge=False)
    for i, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if i < 3 else "right", overflow="fold")
    for line in table.rows:
        drawn.add_row(*line)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(drawn, highlight=False, markup=False)
    typer.echo(f"Operations are counted. Times are modelled for {arch}, {dtype}; nobody measured them.")
