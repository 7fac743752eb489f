"""What the cost model counts: a pass as tiles, their steps, and how much of them is useful."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

from tileconv.kernels.conv_tile import ConvTile
from tileconv.kernels.geometry import Conv2dProblem, Pair, Runs

Pieces = tuple[tuple[float, int], ...]  # shares of a step's operands, and how many bytes of each come at a time


@dataclass(frozen=True)
class Shape:
    """A pass as tiles of rows x columns, each of `steps` products of `depth`."""

    tiles: int
    steps: float  # on average: taps in the padding are skipped
    rows: int
    columns: int
    depth: int
    useful_rows: float
    useful_columns: float
    fresh_bytes: float | None = None  # what a step's columns take from L2, where L1 holds the rest
    loads: float = 0.0  # loads of runs, for every element of the columns
    inner: bool = False  # whether none of them needs a mask of its own
    fetch: float = 0.0  # instructions that pointers take for 16 bytes of the operands
    pieces: Pieces = ()  # of pointers
    inside: float = 1.0  # share of the columns that lies inside the tensor: the copy engine fetches no others
    fragments: bool = False  # mma.sync, in one pixel's loads: each warp reads its operands from shared memory
    apart: bool = False  # what is multiplied one after the other does not lie side by side: narrower reads of it

    @property
    def flops(self) -> float:
        """Of all products, useful or not."""
        return self.tiles * self.steps * 2 * self.rows * self.columns * self.depth

    def stage_bytes(self, itemsize: int) -> int:
        """Shared memory of a step."""
        return (self.rows + self.columns) * self.depth * itemsize

    def step_bytes(self, itemsize: int) -> float:
        """What a step takes from L2."""
        if self.fresh_bytes is None:
            return (self.rows + self.columns * self.inside) * self.depth * itemsize
        return self.fresh_bytes + self.rows * self.useful_rows * self.depth * itemsize


@lru_cache(maxsize=8192)
def reached(
    outputs: int, window: int, stride: int, before: int, dilation: int, extent: int, box: int, more: int = 0
) -> Pair:
    """Along one axis: boxes, and pairs of a box and a tap with a pixel inside the image.

    A box makes so many `more` columns, and meets the taps of all.
    """
    starts = range(0, outputs, box + more)
    window += more
    pairs = 0
    for start in starts:
        first = start * stride - before
        lowest = max(0, -(-(1 - box - first) // dilation))
        pairs += max(0, min(window, -(-(extent - first) // dilation)) - lowest)
    return len(starts), pairs


def fprop_shape(problem: Conv2dProblem, tile: ConvTile) -> Shape:
    K, C = problem.group_filters, problem.group_channels
    row_tiles = -(-K // tile.filters)
    pixels, inside = tile.pixels, 1.0
    if tile.formulation == "gather":
        outputs = problem.N * problem.P * problem.Q
        boxes = tile.boxes(problem)
        steps: float = -(-problem.taps * C // tile.block_c) if tile.flat else problem.taps * -(-C // tile.block_c)
        columns = outputs / (boxes * pixels)
    else:
        n, h, w = tile.box
        images = -(-problem.N // n)
        rows, row_pairs = reached(
            problem.P, problem.R, problem.stride[0], problem.padding[0][0], problem.dilation[0], problem.H,
            h + h // 2 * (tile.half and tile.columns > 1),
        )  # fmt: skip
        cols, col_pairs = reached(
            problem.Q, problem.S, problem.stride[1], problem.padding[1][0], problem.dilation[1], problem.W, w,
            tile.columns - 1,
        )  # fmt: skip
        boxes, taps_of_row = images * rows * cols, col_pairs / cols
        if tile.half and tile.columns == 1:  # a box and its half box lie apart: together they miss no tap of a row
            boxes, taps_of_row = tile.boxes(problem), problem.S
        steps = row_pairs / rows * taps_of_row * -(-C // tile.block_c)
        pixels += pixels // 2 * tile.half
        columns = problem.N * problem.P * problem.Q / (boxes * pixels * tile.columns)
        inside = C / (-(-C // tile.block_c) * tile.block_c)
    tiles = boxes * row_tiles * problem.groups
    useful_rows = K / (row_tiles * tile.filters)
    return Shape(tiles, steps, tile.rows, pixels, tile.block_c, useful_rows, columns, inside=inside)


def wgrad_shape(problem: Conv2dProblem, tile: ConvTile, first: int = 0) -> Shape:
    """The taps from `first` on, but for those that the tile leaves over."""
    K, C = problem.group_filters, problem.group_channels
    row_tiles = -(-K // tile.rows)
    inside = 1.0
    if tile.formulation == "gather":
        columns, programs, taps = problem.taps * C, 1, 1.0
        steps: float = -(-problem.N * problem.P * problem.Q // tile.pixels)
    else:
        end = problem.taps - (problem.taps % tile.taps if tile.last else 0)
        columns, programs = C, -(-(end - first) // tile.taps)
        taps = (end - first) / (programs * tile.taps)
        n, h, w = tile.box
        rows = problem.P, problem.R, problem.stride[0], problem.padding[0][0], problem.dilation[0], problem.H, h
        cols = problem.Q, problem.S, problem.stride[1], problem.padding[1][0], problem.dilation[1], problem.W, w
        boxes, pairs = _reached_together(rows, cols, tile.taps, first, end)
        steps = boxes / programs * -(-problem.N // n)
        inside = pairs / max(1, boxes * tile.taps) * C / (-(-C // tile.channels) * tile.channels)
    column_tiles = -(-columns // tile.channels)
    tiles = row_tiles * column_tiles * programs * problem.groups
    useful = columns / (column_tiles * tile.channels) * taps
    useful_rows = K / (row_tiles * tile.rows)
    return Shape(
        tiles, steps, tile.rows, tile.channels * tile.taps, tile.pixels, useful_rows, useful, inside=inside, apart=True
    )  # fmt: skip


@lru_cache(maxsize=8192)
def _reached_together(rows: tuple[int, ...], cols: tuple[int, ...], together: int, first: int, end: int) -> Pair:
    """Of all programs of `together` of the taps [first, end): boxes of outputs, and pairs of a box and a tap that are
    inside the image.

    A program goes through the boxes between the first and the last that one of its taps needs.  The arguments are
    outputs, window, stride, padding before, dilation, extent and box along either axis.
    """
    p_of, q_of = _boxes_of_taps(*rows), _boxes_of_taps(*cols)
    taps = list(itertools.product(p_of, q_of))[:end]
    boxes = pairs = 0
    for one in range(first, end, together):
        mine = taps[one : one + together]
        mine += mine[-1:] * (together - len(mine))  # beyond the last tap: that one again
        boxes += math.prod(
            max(0, max(high for _, high in spans) - min(low for low, _ in spans)) for spans in zip(*mine, strict=True)
        )
        pairs += sum(math.prod(max(0, high - low) for low, high in spans) for spans in mine)
    return boxes, pairs


def _boxes_of_taps(
    outputs: int, window: int, stride: int, before: int, dilation: int, extent: int, box: int
) -> list[Pair]:
    """For each tap along one axis the boxes [low, high) of outputs with a pixel inside the image."""
    shifts = [tap * dilation - before for tap in range(window)]
    ends = [min(outputs, max(0, -(-(extent - shift) // stride))) for shift in shifts]
    return [(max(0, -(shift // stride)) // box, -(-end // box)) for shift, end in zip(shifts, ends, strict=True)]


def runs_shape(problem: Conv2dProblem, pass_: str, tile: ConvTile, item: int, runs: Runs | None) -> Shape:
    """A first layer's pass; steps of fprop go along the depth, those of wgrad along one row of outputs each."""
    assert runs is not None
    classes = runs.classes  # a program's images are all of one
    images = -(-problem.N // classes)
    depth = problem.C * problem.R * runs.length
    row_tiles = -(-problem.K // tile.rows)
    useful_rows = problem.K / (row_tiles * tile.rows)
    if pass_ == "wgrad":
        column_tiles = -(-depth // tile.block_c)
        widths = -(-problem.Q // tile.pixels)
        useful = problem.C * problem.taps / (column_tiles * tile.block_c) * problem.Q / (widths * tile.pixels)
        # From one row of outputs to the next the image moves on by the stride; L1 holds the rows that stay.
        reached = min(problem.W, (tile.pixels - 1) * problem.stride[1] + problem.S)
        fresh = problem.C * reached * item * problem.stride[0] * min(1.0, tile.block_c / depth)
        return Shape(
            row_tiles * column_tiles * widths * classes, images * problem.P, tile.rows, tile.block_c, tile.pixels,
            useful_rows, useful, fresh, 1 / runs.align, runs.inner, fragments=item == 4,
        )  # fmt: skip
    boxes = classes * -(-images * problem.P * problem.Q // tile.pixels)
    steps = -(-depth // tile.block_c)
    image_rows = (tile.pixels / problem.Q) * problem.stride[0] + (problem.R - 1) * problem.dilation[0] + 1
    useful = problem.N * problem.P * problem.Q / (boxes * tile.pixels) * problem.C * problem.taps / depth
    return Shape(
        boxes * row_tiles, steps, tile.rows, tile.pixels, tile.block_c, useful_rows, useful,
        problem.C * problem.W * item * image_rows / steps, 1 / runs.align, runs.inner,
    )  # fmt: skip
