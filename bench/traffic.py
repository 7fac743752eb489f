"""How many bytes a launch moves, computed from its arguments.

Two different things are counted.  `read` and `written` are what the programs ask for, after masks and descriptor
clipping: the traffic between L2 and the SMs, where every program fetches its own operands (but for runs, whose repeated
pixels L1 keeps; the cost model takes that into account, this count does not).  `least` counts every byte
that the launch touches once: what DRAM has to deliver if nothing is fetched twice.  tests/test_counted_bytes.py holds
both to the loads and stores that the interpreter counts.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from . import traffic_layers
from .traffic_base import Arguments, Traffic, adaptive_pairs, windows_once
from .traffic_base import cdiv as _cdiv
from .traffic_base import clip as _clip
from .traffic_base import itemsize as _itemsize
from .traffic_base import pairs as _pairs
from .traffic_base import touched as _touched


def traffic(launch: Any) -> Traffic | None:
    """The traffic of a launch; None for a kernel that this file does not know."""
    name = launch.kernel.__name__
    module = getattr(launch.kernel, "fn", launch.kernel).__module__.rpartition(".")[2]
    count = COUNTERS.get(name) or traffic_layers.COUNTERS.get(f"{module}.{name}")
    return None if count is None else count(launch.arguments)


@dataclass(frozen=True)
class _Axis:
    """One axis of a convolution as the box kernels walk it."""

    extent: int
    outputs: int
    taps: int
    stride: int
    pad: int
    dilation: int
    box: int

    def range_of(self, start: int) -> tuple[int, int]:
        """The taps that reach the image from the box of outputs at `start`."""
        first = start * self.stride - self.pad
        low = max(0, _cdiv(1 - self.box - first, self.dilation))
        return low, min(self.taps, max(0, _cdiv(self.extent - first, self.dilation)))

    def rows(self, starts: list[int] | None = None) -> tuple[int, Counter[tuple[int, int]]]:
        """Input rows that all boxes and taps load, and how many boxes have each range of taps."""
        loaded, ranges = 0, Counter[tuple[int, int]]()
        for start in range(0, self.outputs, self.box) if starts is None else starts:
            low, high = self.range_of(start)
            ranges[low, max(low, high)] += 1
            first = start * self.stride - self.pad
            loaded += sum(_clip(first + tap * self.dilation, self.box, self.extent) for tap in range(low, high))
        return loaded, ranges

    def reached(self, starts: list[int]) -> set[int]:
        """The input rows that those boxes load."""
        firsts = [(s * self.stride - self.pad, self.range_of(s)) for s in starts]
        loaded = {
            first + tap * self.dilation + i for first, taps in firsts for tap in range(*taps) for i in range(self.box)
        }
        return {row for row in loaded if 0 <= row < self.extent}

    def touched(self) -> int:
        return _touched(self.outputs, self.taps, self.stride, self.pad, self.dilation, self.extent)


def _axes(a: Arguments, boxed: bool = True) -> tuple[_Axis, _Axis]:
    def get(name: str) -> int:
        value: int = a[name] if name in a else a[name.upper()]
        return value

    sizes = (a["BOX_H"], a["BOX_W"]) if boxed else (1, 1)
    return (
        _Axis(a["H"], a["P"], a["R"], get("stride_h"), a["pad_h"], a["DIL_H"], sizes[0]),
        _Axis(a["W"], a["Q"], a["S"], get("stride_w"), a["pad_w"], a["DIL_W"], sizes[1]),
    )


def _image_bytes(a: Arguments) -> int:
    """The pixels of x that a convolution reaches, each once."""
    rows, columns = _axes(a, boxed=False)
    return int(a["N"] * rows.touched() * columns.touched() * a["GROUPS"] * a["C"] * a["PARTS"] * _itemsize(a["x"]))


def _products(parts: int) -> list[tuple[int, int]]:
    """Which parts of either operand the box kernels multiply: each pair is loaded anew."""
    return [(i, j) for i, j in itertools.product(range(parts), repeat=2) if i + j < parts]


def _drawn(a: Arguments, blocks: int, found: Traffic) -> Traffic:
    """`found`, and the seed of dropout if there is one: every finished block reads it."""
    seed = 0 if a["seed"] is None else _itemsize(a["seed"])
    return Traffic(found.read + blocks * seed, found.written, found.least + seed)


def _fprop_box(a: Arguments) -> Traffic:
    size, groups, K, C = _itemsize(a["x"]), a["GROUPS"], a["K"], a["C"]
    rows, columns = _axes(a)
    below = a["BOX_H"] // 2 if a["HALF"] and a["COLUMNS"] > 1 else 0  # where the half box lies, its rows join the box
    h, h_ranges = replace(rows, box=rows.box + below).rows()
    w, w_ranges = _beside_each_other(a, columns)
    filter_tiles = _cdiv(K, _filters(a))
    pixels = h * w * C * groups * filter_tiles * size * len(_products(a["PARTS"]))
    narrow = _narrow_tiles(a, rows, columns, filter_tiles)
    more = (a["BLOCK_K"] + a["BLOCK_K2"]) // a["BLOCK_K2"] - 1 if narrow else 0
    pixels += more * sum(narrow) * C * size
    filters = 0
    for ((r0, r1), r_count), ((s0, s1), s_count) in itertools.product(h_ranges.items(), w_ranges.items()):
        taps = itertools.product(range(r0, r1), range(s0, s1))
        filters += r_count * s_count * sum(_filter_elements(a, r, s) for r, s in taps)
    whole, partial, bias = _outputs(a, filter_tiles, h_ranges.total() * w_ranges.total())
    bias_bytes = bias * _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = partial * 4 + (0 if a["y"] is None else whole * _itemsize(a["y"]))
    weights = groups * K * C * a["R"] * a["S"] * size * a["PARTS"]
    least = _image_bytes(a) + weights + written + (groups * K * _itemsize(a["bias"]) if bias_bytes else 0)
    finished = a["FULL"] * (2 if a["BLOCK_K2"] else 1) + len(narrow) * (1 + more)
    return _drawn(a, finished, Traffic(pixels + filters * size + bias_bytes, written, least))


def _fprop_across(a: Arguments) -> Traffic:
    """Rows of a program's pixels are boxes of their own, stride_h apart."""
    size, groups, K = _itemsize(a["x"]), a["GROUPS"], a["K"]
    a = a | {"BOX_W": 1, "PARTS": 1, "HALF": 0, "SPLITS": 1}
    rows, columns = _axes(a)
    starts = range(0, rows.outputs, rows.box)
    spread = replace(rows, box=(rows.box - 1) * rows.stride + 1)  # from the first row of a program to its last
    h_ranges = Counter(spread.range_of(start) for start in starts)
    h = 0
    for start, i in itertools.product(starts, range(rows.box)):
        first = (start + i) * rows.stride - rows.pad
        h += sum(0 <= first + tap * rows.dilation < rows.extent for tap in range(*spread.range_of(start)))
    w, w_ranges = _beside_each_other(a, columns)
    filter_tiles = _cdiv(K, _filters(a))
    filters = 0
    for ((r0, r1), r_count), ((s0, s1), s_count) in itertools.product(h_ranges.items(), w_ranges.items()):
        taps = itertools.product(range(r0, r1), range(s0, s1))
        filters += r_count * s_count * sum(_filter_elements(a, r, s) for r, s in taps)
    whole, _, bias = _outputs(a, filter_tiles, h_ranges.total() * w_ranges.total())
    bias_bytes = bias * rows.box * _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = whole * _itemsize(a["y"])
    weights = groups * K * a["C"] * a["R"] * a["S"] * size
    least = _image_bytes(a) + weights + written + (groups * K * _itemsize(a["bias"]) if bias_bytes else 0)
    return Traffic(h * w * a["C"] * groups * filter_tiles * size + filters * size + bias_bytes, written, least)


def _narrow_tiles(a: Arguments, rows: _Axis, columns: _Axis, filter_tiles: int) -> list[int]:
    """Pixels that a program loads for each of the tiles whose filters are shared: those from FULL on."""
    if not a["NARROW"]:
        return []

    def loaded(axis: _Axis) -> list[int]:
        return [axis.rows([start])[0] for start in range(0, axis.outputs, axis.box)]

    images = [_clip(n, a["BOX_N"], a["N"]) for n in range(0, a["N"], a["BOX_N"])]
    tiles = itertools.product(images, loaded(rows), loaded(columns), range(a["GROUPS"] * filter_tiles))
    return [n * h * w for n, h, w, _ in itertools.islice(tiles, a["FULL"], None)]


def _beside_each_other(a: Arguments, axis: _Axis) -> tuple[int, Counter[tuple[int, int]]]:
    """Of all programs for one row of boxes: pixels that they load along it, and how many have each range of taps."""
    if not a["HALF"] or a["COLUMNS"] > 1:
        more = a["COLUMNS"] - 1
        loaded, ranges = replace(axis, taps=axis.taps + more).rows(list(range(0, axis.outputs, axis.box + more)))
        images = _cdiv(a["N"], a["BOX_N"])
        return a["N"] * loaded, Counter({taps: images * count for taps, count in ranges.items()})
    box = a["BOX_N"], a["BOX_W"]
    half = (box[0] // 2, box[1]) if box[0] > 1 else (1, box[1] // 2)
    places = [
        [(n, q) for n in range(0, a["N"], images) for q in range(start, stop, width)]
        for (images, width), start, stop in ((box, 0, a["WHOLE"]), (half, a["WHOLE"], axis.outputs))
    ]
    loaded, ranges = 0, Counter[tuple[int, int]]()
    for j, pair in enumerate(itertools.zip_longest(*places)):
        # A program that finds no box of a kind left meets the taps of one beyond the last image.
        taps = []
        for (_, width), start, stop in zip((box, half), (0, a["WHOLE"]), (a["WHOLE"], axis.outputs), strict=True):
            taps.append(replace(axis, box=width).range_of(start + j % _cdiv(stop - start, width) * width))
        low, high = min(first for first, _ in taps), max(last for _, last in taps)
        ranges[low, max(low, high)] += 1
        for place, (images, width) in zip(pair, (box, half), strict=True):
            if place is not None:
                first = place[1] * axis.stride - axis.pad
                inside = sum(_clip(first + tap * axis.dilation, width, axis.extent) for tap in range(low, high))
                loaded += _clip(place[0], images, a["N"]) * inside
    return loaded, ranges


def _fprop_pool(a: Arguments) -> Traffic:
    size, groups, K = _itemsize(a["x"]), a["GROUPS"], a["K"]
    axes = _axes(a)
    starts = [
        _pool_starts(a, axis, name, place) for axis, (name, place) in zip(axes, (("H", "P"), ("W", "Q")), strict=True)
    ]
    (h, h_ranges), (w, w_ranges) = (axis.rows(s) for axis, s in zip(axes, starts, strict=True))
    filter_tiles, images = _cdiv(K, a["BLOCK_K"]), _cdiv(a["N"], a["BOX_N"])
    pixels = a["N"] * h * w * a["C"] * groups * filter_tiles * size
    plain = a | {"BLOCK_K2": 0, "TRANSPOSED": False, "PARTS": 1, "COLUMNS": 1, "TAP_0": 0, "TAP_R": a["S"], "TAP_S": 1}
    filters = 0
    for ((r0, r1), r_count), ((s0, s1), s_count) in itertools.product(h_ranges.items(), w_ranges.items()):
        taps = itertools.product(range(r0, r1), range(s0, s1))
        filters += images * r_count * s_count * sum(_filter_elements(plain, r, s) for r, s in taps)
    bias = groups * K * _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = a["N"] * a["POOLED_P"] * a["POOLED_Q"] * groups * K
    written *= _itemsize(a["y"]) + (0 if a["switch"] is None else 1)
    touched = [len(axis.reached(s)) for axis, s in zip(axes, starts, strict=True)]
    image = a["N"] * touched[0] * touched[1] * groups * a["C"] * size
    weights = groups * K * a["C"] * a["R"] * a["S"] * size
    read = pixels + filters * size + images * len(starts[0]) * len(starts[1]) * bias
    return Traffic(read, written, image + weights + bias + written)


def _pool_starts(a: Arguments, axis: _Axis, window: str, pooled: str) -> list[int]:
    """Along one axis: the convolution outputs at which a program's boxes start, over all programs."""
    extent, step, before = a[f"WINDOW_{window}"], a[f"STEP_{window}"], a[f"POOL_PAD_{window}"]
    whole = a["BOX_H"] * a["BOX_W"] > 1
    windows = axis.box // extent if whole else 1
    starts = range(-before, a[f"POOLED_{pooled}"] * step - before, windows * step)
    if whole:
        return list(starts)
    return [place for start in starts for place in range(start, start + extent) if 0 <= place < axis.outputs]


def _filters(a: Arguments) -> int:
    """Different filters of a program."""
    return int(a["BLOCK_K"] + a["BLOCK_K2"]) // int(a["COLUMNS"])


def _filter_elements(a: Arguments, r: int, s: int) -> int:
    """Filter elements that one pixel box loads for the taps it meets at (r, s): all groups and tiles, clipped by the
    matrix alone.
    """
    blocks = [(a["BLOCK_K"], 0)] + ([(a["BLOCK_K2"], a["BLOCK_K"])] if a["BLOCK_K2"] else [])
    if a["COLUMNS"] > 1:
        return sum(_row_elements(a, s, block, below) for block, below in blocks)
    height, width = a["w"].shape
    total = 0
    for g, k0 in itertools.product(range(a["GROUPS"]), range(0, a["K"], _filters(a))):
        for (block, below), c, (_, part) in itertools.product(
            blocks, range(0, a["C"], a["BLOCK_C"]), _products(a["PARTS"])
        ):
            tap = a["TAP_0"] + r * a["TAP_R"] + s * a["TAP_S"]
            k, column = k0 + below, tap * a["PARTS"] + part
            if a["TRANSPOSED"]:
                total += _clip(g * a["C"] + c, a["BLOCK_C"], height) * _clip(column * a["K"] + k, block, width)
            else:
                total += _clip(g * a["K"] + k, block, height) * _clip(column * a["C"] + c, a["BLOCK_C"], width)
    return total


def _row_elements(a: Arguments, s: int, block: int, below: int) -> int:
    """The same with COLUMNS: a box of a row of taps, clipped by that row."""
    own = _clip((a["S"] - 1 - s) * a["K"] + below, block, a["S"] * a["K"])
    total = 0
    for g, c in itertools.product(range(a["GROUPS"]), range(0, a["C"], a["BLOCK_C"])):
        first, depth = (g * a["C"] + c, a["GROUPS"] * a["C"]) if a["TRANSPOSED"] else (c, a["C"])
        total += own * _clip(first, a["BLOCK_C"], depth)
    return total * len(_products(a["PARTS"]))


def _outputs(a: Arguments, filter_tiles: int, boxes: int) -> tuple[int, int, int]:
    """Elements of y and of partial sums that a box launch writes, and elements of bias that it reads."""
    whole = a["N"] * a["P"] * a["Q"] * a["K"] * a["GROUPS"]
    times = a["COLUMNS"] * (1 + a["HALF"])  # a program finishes so many boxes
    bias = boxes * a["GROUPS"] * a["K"] * times
    if a["SPLITS"] == 1:
        return whole, 0, bias
    rows = a["BLOCK_K"] + a["BLOCK_K2"]
    shared = list(_shared_tiles(a, filter_tiles, _filters(a)))
    partial = len(shared) * a["SPLITS"] * rows * a["BOX_N"] * a["BOX_H"] * a["BOX_W"]
    return whole - sum(k * pixels for _, k, pixels in shared), partial, bias - times * sum(k for _, k, _ in shared)


def _shared_tiles(a: Arguments, filter_tiles: int, filters: int) -> Iterator[tuple[int, int, int]]:
    """(first filter, filters, pixels) of every tile whose depth is shared: those from FULL on, filters fastest."""
    extents = [(a["N"], a["BOX_N"]), (a["P"], a["BOX_H"]), (a["Q"], a["BOX_W"] * a["COLUMNS"])]
    if a.get("COUNTED"):
        extents = [(a["N"] * a["P"] * a["Q"], a["BOX_N"])]
    starts = [range(0, extent, box) for extent, box in extents]
    order = itertools.product(*starts, range(a["GROUPS"]), range(filter_tiles))
    for *place, g, k in itertools.islice(order, a["FULL"], None):
        pixels = math.prod(_clip(start, box, extent) for start, (extent, box) in zip(place, extents, strict=True))
        yield g * a["K"] + k * filters, _clip(k * filters, filters, a["K"]), pixels


def _fprop_finish(a: Arguments) -> Traffic:
    filters = a["ROWS"] // a["COLUMNS"]
    shared = list(_shared_tiles(a, _cdiv(a["K"], filters), filters))
    pixels = a["BOX_N"] * a["BOX_H"] * a["BOX_W"]
    parts = len(shared) * a["SPLITS"] * a["ROWS"] * pixels * _itemsize(a["parts"])
    written = sum(k * inside for _, k, inside in shared) * _itemsize(a["y"])
    bias = _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    read = parts + sum(k for _, k, _ in shared) * a["COLUMNS"] * pixels // a["BLOCK_P"] * bias
    touched = sum({first: k for first, k, _ in shared}.values())
    blocks = len(shared) * (a["ROWS"] // a["BLOCK_K"]) * (pixels // a["BLOCK_P"])
    return _drawn(a, blocks, Traffic(read, written, parts + written + touched * bias))


def _fprop_gather(a: Arguments) -> Traffic:
    size, groups, K, C = _itemsize(a["x"]) * a["PARTS"], a["GROUPS"], a["K"], a["C"]
    rows, columns = _axes(a, boxed=False)
    reached = _pairs(*_extents(rows)) * _pairs(*_extents(columns))
    blocks = _cdiv(a["N"] * a["P"] * a["Q"], a["PIXELS"])
    filter_tiles = _cdiv(K, a["BLOCK_K"])
    pixels = a["N"] * reached * C * groups * filter_tiles * size
    weights = groups * K * C * a["R"] * a["S"] * size
    if a["SPLITS"] > 1:  # fprop_finish does the rest
        written = math.prod(a["parts"].shape) * _itemsize(a["parts"])
        return Traffic(pixels + blocks * weights, written, _image_bytes(a) + weights + written)
    bias = groups * K * _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = a["N"] * a["P"] * a["Q"] * K * groups * _itemsize(a["y"])
    found = Traffic(pixels + blocks * (weights + bias), written, _image_bytes(a) + weights + bias + written)
    return _drawn(a, blocks * groups * filter_tiles, found)


def _extents(axis: _Axis) -> tuple[int, int, int, int, int, int]:
    return axis.outputs, axis.taps, axis.stride, axis.pad, axis.dilation, axis.extent


def _wgrad_gather(a: Arguments) -> Traffic:
    size, groups, K, C = _itemsize(a["x"]) * a["PARTS"], a["GROUPS"], a["K"], a["C"]
    rows, columns = _axes(a, boxed=False)
    reached = _pairs(*_extents(rows)) * _pairs(*_extents(columns))
    pixels = a["N"] * reached * C * groups * _cdiv(K, a["BLOCK_K"]) * size
    grads = a["N"] * a["P"] * a["Q"] * K * groups * size
    depth = a["R"] * a["S"] * C
    written = a["SPLITS"] * groups * K * depth * _itemsize(a["dw"])
    return Traffic(pixels + grads * _cdiv(depth, a["BLOCK_C"]), written, _image_bytes(a) + grads + written)


def _wgrad_box(a: Arguments) -> Traffic:
    size, groups, K, C, taps = _itemsize(a["x"]), a["GROUPS"], a["K"], a["C"], a["R"] * a["S"]
    per_program = a.get("TAPS", 1)
    second = a.get("BLOCK_K2", 0)
    row_tiles = range(0, K, a["BLOCK_K"] + second)
    blocks = [(a["BLOCK_K"], 0)] + ([(second, a["BLOCK_K"])] if second else [])
    half = a["BLOCK_C"] // 2 if a.get("HALF", 0) else 0
    column_tiles = range(0, C, a["BLOCK_C"] + half)
    wide = [(a["BLOCK_C"], 0)] + ([(half, a["BLOCK_C"])] if half else [])
    read = 0
    for tap in range(0, taps, per_program):
        mine = [min(tap + i, taps - 1) for i in range(per_program)]
        if a.get("LAST", 0):
            mine = list(dict.fromkeys(mine))  # no program has taps beyond the last one
        ps, qs = _wgrad_range(a, mine, "H"), _wgrad_range(a, mine, "W")
        for g, (x_part, y_part) in itertools.product(range(groups), _products(a["PARTS"])):
            x_plane, y_plane = x_part * groups + g, y_part * groups + g
            grads = [(y_plane * K + k0 + below, block, K - k0 - below) for k0 in row_tiles for block, below in blocks]
            read += len(column_tiles) * _wgrad_load(a, "dy", ps, qs, None, grads)
            channels = [
                (x_plane * C + c0 + right, block, C - c0 - right) for c0 in column_tiles for block, right in wide
            ]
            read += len(row_tiles) * sum(_wgrad_load(a, "x", ps, qs, one, channels) for one in mine)
    written = a["SPLITS"] * groups * K * taps * C * _itemsize(a["dw"])
    least = _image_bytes(a) + a["N"] * a["P"] * a["Q"] * K * groups * a["PARTS"] * size + written
    return Traffic(read * size, written, least)


def _wgrad_range(a: Arguments, taps: list[int], axis: str) -> range:
    """Boxes of outputs along one axis in which some tap of a program reaches the image."""
    outputs, extent, stride, box = (
        (a["P"], a["H"], a["stride_h"], a["BOX_H"]) if axis == "H" else (a["Q"], a["W"], a["stride_w"], a["BOX_W"])
    )
    found = []
    for shift in (_tap_shift(a, tap, axis) for tap in taps):
        low = max(0, _cdiv(-shift, stride)) // box
        found.append((low, _cdiv(min(outputs, max(0, _cdiv(extent - shift, stride))), box)))
    return range(min(low for low, _ in found), max(high for _, high in found))


def _tap_shift(a: Arguments, tap: int, axis: str) -> int:
    shift: int = tap // a["S"] * a["DIL_H"] - a["pad_h"] if axis == "H" else tap % a["S"] * a["DIL_W"] - a["pad_w"]
    return shift


def _wgrad_load(
    a: Arguments, operand: str, ps: range, qs: range, tap: int | None, columns: list[tuple[int, int, int]]
) -> int:
    """Elements of dy (tap None) or of x that one program loads over all its boxes, for all its column blocks.

    A column block is (first channel, width, channels left in its group).
    """
    image = a[operand]
    height, width = (a["P"], a["Q"]) if tap is None else (a["H"], a["W"])
    extent = image.shape[-2 if a["PIXEL"] == 2 else -1]
    total = 0
    for p, q in itertools.product(ps, qs):
        h, w = p * a["BOX_H"], q * a["BOX_W"]
        if tap is not None:
            h, w = h * a["stride_h"] + _tap_shift(a, tap, "H"), w * a["stride_w"] + _tap_shift(a, tap, "W")
        rows, cols = _clip(h, a["BOX_H"], height), _clip(w, a["BOX_W"], width)
        if not rows or not cols:
            continue
        total += rows * cols * sum(
            _clip(first, block, extent) if len(image.shape) == 4 else min(block, max(0, left))
            for first, block, left in columns
        )  # fmt: skip
    return int(total * a["N"])


def _max_forward(a: Arguments) -> Traffic:
    reached, touched, images = _window(a, a["x"])
    outputs = images * a["P"] * a["Q"]
    written = outputs * (_itemsize(a["y"]) + (_itemsize(a["switch"]) if a["HAS_SWITCH"] else 0))
    return Traffic(images * reached * _itemsize(a["x"]), written, images * touched * _itemsize(a["x"]) + written)


def _max_backward(a: Arguments) -> Traffic:
    """Every window names one element, so every gradient is loaded once; with MASK at most once, y as often."""
    reached, _, images = _window(a, a["dx"])
    outputs = images * a["P"] * a["Q"]
    hits = outputs * (_itemsize(a["dy"]) + (_itemsize(a["y"]) if a["MASK"] else 0))
    written = images * a["H"] * a["W"] * _itemsize(a["dx"])
    switch = _itemsize(a["switch"])
    return Traffic(images * reached * switch + hits, written, outputs * switch + hits + written)


def _max_backward_cells(a: Arguments) -> Traffic:
    """The windows over each cell, each loaded once for the cell."""
    windows = math.prod(
        sum(0 <= i - back < outputs for i in range(cells) for back in range((window - 1) // stride + 1))
        for cells, outputs, window, stride in (
            (a["CELLS_H"], a["P"], a["R"], a["STRIDE_H"]), (a["CELLS_W"], a["Q"], a["S"], a["STRIDE_W"]))
    )  # fmt: skip
    return windows_once(a, windows)


def _window(a: Arguments, image: Any) -> tuple[int, int, int]:
    """Of one plane: elements that all windows load, and those they touch; then the number of planes."""
    rows = a["P"], a["R"], a["STRIDE_H"], a["PAD_H"], a["DIL_H"], a["H"]
    columns = a["Q"], a["S"], a["STRIDE_W"], a["PAD_W"], a["DIL_W"], a["W"]
    planes = image.shape[0] * image.shape[1]
    return _pairs(*rows) * _pairs(*columns), _touched(*rows) * _touched(*columns), planes


def _adaptive(a: Arguments) -> tuple[int, int]:
    """Elements that all windows of one plane load, and elements of a window's plane."""
    return adaptive_pairs(a), a["H"] * a["W"]


def _adaptive_forward(a: Arguments) -> Traffic:
    reached, plane = _adaptive(a)
    images = a["x"].shape[0] * a["x"].shape[1]
    written = images * a["P"] * a["Q"] * _itemsize(a["y"])
    size = _itemsize(a["x"])
    return Traffic(images * reached * size, written, images * plane * size + written)


def _adaptive_backward(a: Arguments) -> Traffic:
    reached, plane = _adaptive(a)
    images, size = a["dx"].shape[0] * a["dx"].shape[1], _itemsize(a["dy"])
    written = images * plane * _itemsize(a["dx"])
    return Traffic(images * reached * size, written, images * a["P"] * a["Q"] * size + written)


def _space_to_depth(a: Arguments) -> Traffic:
    count, depth = a["x"].shape[0], a["DEPTH"]
    axes = [
        (a["U"], a["BLOCK_H"], a["STEP_H"], a["pad_h"], a["H"]),
        (a["V"], a["BLOCK_W"], a["STEP_W"], a["pad_w"], a["W"]),
    ]
    loaded = [
        sum(_clip(i * step - pad, block, extent) for i in range(blocks)) for blocks, block, step, pad, extent in axes
    ]
    once = [_clip(-pad, (blocks - 1) * step + block, extent) for blocks, block, step, pad, extent in axes]
    planes = count * a["C"] * _itemsize(a["x"])
    written = count * a["U"] * a["V"] * depth * _itemsize(a["y"])
    return Traffic(planes * math.prod(loaded), written, planes * math.prod(once) + written)


def _widen(a: Arguments) -> Traffic:
    read, written = a["x"].numel() * _itemsize(a["x"]), a["y"].numel() * _itemsize(a["y"])
    return Traffic(read, written, read + written)


def _in_runs(a: Arguments) -> tuple[int, int]:
    """Pixels of x that the runs of all outputs load, and those that some run reaches."""
    rows = (a["P"], a["R"], a["STRIDE_H"], a["pad_h"], a["DIL_H"], a["H"])
    loaded = _cdiv(a["USED"], a["ALIGN"]) * a["ALIGN"]
    columns = (a["Q"], loaded, a["STRIDE_W"], a["FIRST"], 1, a["W"] * a["ALIGN"])
    planes = a["N"] * a["C"]
    return planes * _pairs(*rows) * _pairs(*columns), planes * _touched(*rows) * _touched(*columns)


def _fprop_runs(a: Arguments) -> Traffic:
    loaded, reached = _in_runs(a)
    pixel_tiles = _cdiv(a["N"] * a["P"] * a["Q"], a["PIXELS"])
    size = _itemsize(a["x"])
    biases = a["K"] * _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    weights = a["K"] * a["DEPTH"] * size
    written = a["N"] * a["P"] * a["Q"] * a["K"] * _itemsize(a["y"])
    read = loaded * size * _cdiv(a["K"], a["BLOCK_K"] + a["BLOCK_K2"]) + pixel_tiles * (weights + biases)
    return Traffic(read, written, reached * size + weights + biases + written)


def _wgrad_runs(a: Arguments) -> Traffic:
    loaded, reached = _in_runs(a)
    size, depth = _itemsize(a["x"]), a["C"] * a["R"] * a["RUN"]
    grads = a["N"] * a["P"] * a["Q"] * a["K"] * _itemsize(a["dy"])
    written = a["dw"].numel() * _itemsize(a["dw"])
    read = loaded * size * _cdiv(a["K"], a["BLOCK_K"]) + grads * _cdiv(depth, a["BLOCK_C"])
    return Traffic(read, written, reached * size + grads + written)


def _inner_runs(a: Arguments) -> int:
    """Bytes of x that windows meet; loads begin and end up to an aligned load beside them."""
    _, planes, extent, _ = a["x"].shape
    rows = _touched(a["P"], a["R"], (a["step_xp"] * a["ALIGN"]) // a["stride_xh"], 0, a["DIL_H"], extent)
    columns = _touched(a["Q"], a["S"], a["STRIDE_W"], 0, 1, (a["Q"] - 1) * a["STRIDE_W"] + a["S"])
    return int(a["N"] * planes * rows * columns * _itemsize(a["x"]))


def _fprop_inner_runs(a: Arguments) -> Traffic:
    size = _itemsize(a["x"])
    tiles = a["CLASSES"] * _cdiv(_cdiv(a["N"], a["CLASSES"]) * a["P"] * a["Q"], a["PIXELS"])
    biases = a["K"] * _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    weights = a["K"] * a["DEPTH"] * size
    written = a["N"] * a["P"] * a["Q"] * a["K"] * _itemsize(a["y"])
    # Nothing is masked: what no filter meets and what is beyond the last pixel reads what is there anyway.
    filter_tiles = _cdiv(a["K"], a["BLOCK_K"] + a["BLOCK_K2"])
    pixels = tiles * a["PIXELS"] * a["DEPTH"] * filter_tiles * size
    used = min(a["CLASSES"], a["N"]) * weights
    return Traffic(pixels + tiles * (weights + biases), written, _inner_runs(a) + used + biases + written)


def _wgrad_inner_runs(a: Arguments) -> Traffic:
    tiles = _cdiv(a["C"] * a["R"] * a["RUN"], a["BLOCK_C"])
    rows = a["N"] * a["P"] * a["Q"]
    grads = rows * a["K"] * _itemsize(a["dy"])
    pixels = rows * tiles * a["BLOCK_C"] * _cdiv(a["K"], a["BLOCK_K"]) * _itemsize(a["x"])
    written = a["dw"].numel() * _itemsize(a["dw"])
    return Traffic(pixels + grads * tiles, written, _inner_runs(a) + grads + written)


def _filters_to_runs(a: Arguments) -> Traffic:
    classes, filters, _ = a["out"].shape
    read = classes * filters * a["C"] * a["R"] * a["S"] * _itemsize(a["w"])
    written = a["SIZE"] * _itemsize(a["out"])
    return Traffic(read, written, read // classes + written)


def _runs_to_filters(a: Arguments) -> Traffic:
    read, written = a["CLASSES"] * a["SIZE"] * _itemsize(a["sums"]), a["SIZE"] * _itemsize(a["dw"])
    return Traffic(read, written, read + written)


def _copied(a: Arguments) -> Traffic:
    """Every element of x read and every element of y written, once."""
    read, written = (a[name].numel() * _itemsize(a[name]) for name in ("x", "y"))
    return Traffic(read, written, read + written)


def _bias_backward(a: Arguments) -> Traffic:
    elements = a["HEIGHT"] * a["K"]
    read = elements * (_itemsize(a["dy"]) + (_itemsize(a["y"]) if a["MASK"] else 0))
    written = a["sums"].numel() * _itemsize(a["sums"]) + (elements * _itemsize(a["dx"]) if a["MASK"] else 0)
    return Traffic(read, written, read + written)


def _norm(a: Arguments) -> Traffic:
    operands = [a["x"]] + ([a["dy"]] if a["BACKWARD"] else [])
    read = sum(operand.numel() * _itemsize(operand) for operand in operands)
    written = a["out"].numel() * _itemsize(a["out"])
    return Traffic(read, written, read + written)


def _each_once(*operands: str, out: str, times: str = "") -> Callable[[Arguments], Traffic]:
    """SIZE elements of each operand (`times` many of the first), and SIZE elements out."""

    def count(a: Arguments) -> Traffic:
        read = sum(a["SIZE"] * _itemsize(a[name]) for name in operands) * (a[times] if times else 1)
        written = a["SIZE"] * _itemsize(a[out])
        return Traffic(read, written, read + written)

    return count


COUNTERS: dict[str, Callable[[Arguments], Traffic]] = {
    "fprop_box": _fprop_box,
    "fprop_across": _fprop_across,
    "fprop_finish": _fprop_finish,
    "fprop_gather": _fprop_gather,
    "fprop_pool": _fprop_pool,
    "wgrad_box": _wgrad_box,
    "wgrad_gather": _wgrad_gather,
    "max_forward": _max_forward,
    "max_backward": _max_backward,
    "max_backward_cells": _max_backward_cells,
    "adaptive_avg_forward": _adaptive_forward,
    "adaptive_avg_backward": _adaptive_backward,
    "across_columns": _norm,
    "space_to_depth": _space_to_depth,
    "split": _copied,
    "turn": _copied,
    "depth_to_space": _each_once("y", out="dw"),
    "widen": _widen,
    "fprop_runs": _fprop_runs,
    "wgrad_runs": _wgrad_runs,
    "fprop_inner_runs": _fprop_inner_runs,
    "wgrad_inner_runs": _wgrad_inner_runs,
    "filters_to_runs": _filters_to_runs,
    "runs_to_filters": _runs_to_filters,
    "bias_backward": _bias_backward,
    "relu_forward": _each_once("x", out="y"),
    "relu_backward": _each_once("dy", "y", out="dx"),
    "add_slices": _each_once("parts", out="out", times="SLICES"),
}
