"""Bytes that the kernels of convolutions move, by boxes and by pointers; see traffic.py."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .traffic_base import Arguments, Traffic, cdiv, clip, itemsize, pairs, touched


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
        low = max(0, cdiv(1 - self.box - first, self.dilation))
        return low, min(self.taps, max(0, cdiv(self.extent - first, self.dilation)))

    def rows(self, starts: list[int] | None = None) -> tuple[int, Counter[tuple[int, int]]]:
        """Input rows that all boxes and taps load, and how many boxes have each range of taps."""
        loaded, ranges = 0, Counter[tuple[int, int]]()
        for start in range(0, self.outputs, self.box) if starts is None else starts:
            low, high = self.range_of(start)
            ranges[low, max(low, high)] += 1
            first = start * self.stride - self.pad
            loaded += sum(clip(first + tap * self.dilation, self.box, self.extent) for tap in range(low, high))
        return loaded, ranges

    def reached(self, starts: list[int]) -> set[int]:
        """The input rows that those boxes load."""
        firsts = [(s * self.stride - self.pad, self.range_of(s)) for s in starts]
        loaded = {
            first + tap * self.dilation + i for first, taps in firsts for tap in range(*taps) for i in range(self.box)
        }
        return {row for row in loaded if 0 <= row < self.extent}

    def touched(self) -> int:
        return touched(self.outputs, self.taps, self.stride, self.pad, self.dilation, self.extent)


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
    return int(a["N"] * rows.touched() * columns.touched() * a["GROUPS"] * a["C"] * a["PARTS"] * itemsize(a["x"]))


def _products(parts: int) -> list[tuple[int, int]]:
    """Which parts of either operand the box kernels multiply: each pair is loaded anew."""
    return [(i, j) for i, j in itertools.product(range(parts), repeat=2) if i + j < parts]


def _drawn(a: Arguments, blocks: int, found: Traffic) -> Traffic:
    """`found`, and the seed of dropout if there is one: every finished block reads it."""
    seed = 0 if a["seed"] is None else itemsize(a["seed"])
    return Traffic(found.read + blocks * seed, found.written, found.least + seed)


def _fprop_box(a: Arguments) -> Traffic:
    size, groups, K, C = itemsize(a["x"]), a["GROUPS"], a["K"], a["C"]
    rows, columns = _axes(a)
    below = a["BOX_H"] // 2 if a["HALF"] and a["COLUMNS"] > 1 else 0  # where the half box lies, its rows join the box
    h, h_ranges = replace(rows, box=rows.box + below).rows()
    w, w_ranges = _beside_each_other(a, columns)
    filter_tiles = cdiv(K, _filters(a))
    pixels = h * w * C * groups * filter_tiles * size * len(_products(a["PARTS"]))
    narrow = _narrow_tiles(a, rows, columns, filter_tiles)
    more = (a["BLOCK_K"] + a["BLOCK_K2"]) // a["BLOCK_K2"] - 1 if narrow else 0
    pixels += more * sum(narrow) * C * size
    filters = 0
    for ((r0, r1), r_count), ((s0, s1), s_count) in itertools.product(h_ranges.items(), w_ranges.items()):
        taps = itertools.product(range(r0, r1), range(s0, s1))
        filters += r_count * s_count * sum(_filter_elements(a, r, s) for r, s in taps)
    whole, partial, bias = _outputs(a, filter_tiles, h_ranges.total() * w_ranges.total())
    bias_bytes = bias * itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = partial * 4 + (0 if a["y"] is None else whole * itemsize(a["y"]))
    weights = groups * K * C * a["R"] * a["S"] * size * a["PARTS"]
    least = _image_bytes(a) + weights + written + (groups * K * itemsize(a["bias"]) if bias_bytes else 0)
    finished = a["FULL"] * (2 if a["BLOCK_K2"] else 1) + len(narrow) * (1 + more)
    return _drawn(a, finished, Traffic(pixels + filters * size + bias_bytes, written, least))


def _fprop_across(a: Arguments) -> Traffic:
    """Rows of a program's pixels are boxes of their own, stride_h apart."""
    size, groups, K = itemsize(a["x"]), a["GROUPS"], a["K"]
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
    filter_tiles = cdiv(K, _filters(a))
    filters = 0
    for ((r0, r1), r_count), ((s0, s1), s_count) in itertools.product(h_ranges.items(), w_ranges.items()):
        taps = itertools.product(range(r0, r1), range(s0, s1))
        filters += r_count * s_count * sum(_filter_elements(a, r, s) for r, s in taps)
    whole, _, bias = _outputs(a, filter_tiles, h_ranges.total() * w_ranges.total())
    bias_bytes = bias * rows.box * itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = whole * itemsize(a["y"])
    weights = groups * K * a["C"] * a["R"] * a["S"] * size
    least = _image_bytes(a) + weights + written + (groups * K * itemsize(a["bias"]) if bias_bytes else 0)
    finished = 2 * rows.box * h_ranges.total() * w_ranges.total() * filter_tiles * groups
    read = h * w * a["C"] * groups * filter_tiles * size + filters * size + bias_bytes
    return _drawn(a, finished, Traffic(read, written, least))


def _narrow_tiles(a: Arguments, rows: _Axis, columns: _Axis, filter_tiles: int) -> list[int]:
    """Pixels that a program loads for each of the tiles whose filters are shared: those from FULL on."""
    if not a["NARROW"]:
        return []

    def loaded(axis: _Axis) -> list[int]:
        return [axis.rows([start])[0] for start in range(0, axis.outputs, axis.box)]

    images = [clip(n, a["BOX_N"], a["N"]) for n in range(0, a["N"], a["BOX_N"])]
    tiles = itertools.product(images, loaded(rows), loaded(columns), range(a["GROUPS"] * filter_tiles))
    return [n * h * w for n, h, w, _ in itertools.islice(tiles, a["FULL"], None)]


def _beside_each_other(a: Arguments, axis: _Axis) -> tuple[int, Counter[tuple[int, int]]]:
    """Of all programs for one row of boxes: pixels that they load along it, and how many have each range of taps."""
    if not a["HALF"] or a["COLUMNS"] > 1:
        more = a["COLUMNS"] - 1
        loaded, ranges = replace(axis, taps=axis.taps + more).rows(list(range(0, axis.outputs, axis.box + more)))
        images = cdiv(a["N"], a["BOX_N"])
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
            taps.append(replace(axis, box=width).range_of(start + j % cdiv(stop - start, width) * width))
        low, high = min(first for first, _ in taps), max(last for _, last in taps)
        ranges[low, max(low, high)] += 1
        for place, (images, width) in zip(pair, (box, half), strict=True):
            if place is not None:
                first = place[1] * axis.stride - axis.pad
                inside = sum(clip(first + tap * axis.dilation, width, axis.extent) for tap in range(low, high))
                loaded += clip(place[0], images, a["N"]) * inside
    return loaded, ranges


def _fprop_pool(a: Arguments) -> Traffic:
    size, groups, K = itemsize(a["x"]), a["GROUPS"], a["K"]
    axes = _axes(a)
    starts = [
        _pool_starts(a, axis, name, place) for axis, (name, place) in zip(axes, (("H", "P"), ("W", "Q")), strict=True)
    ]
    (h, h_ranges), (w, w_ranges) = (axis.rows(s) for axis, s in zip(axes, starts, strict=True))
    filter_tiles, images = cdiv(K, a["BLOCK_K"]), cdiv(a["N"], a["BOX_N"])
    pixels = a["N"] * h * w * a["C"] * groups * filter_tiles * size
    plain = a | {"BLOCK_K2": 0, "TRANSPOSED": False, "PARTS": 1, "COLUMNS": 1, "TAP_0": 0, "TAP_R": a["S"], "TAP_S": 1}
    filters = 0
    for ((r0, r1), r_count), ((s0, s1), s_count) in itertools.product(h_ranges.items(), w_ranges.items()):
        taps = itertools.product(range(r0, r1), range(s0, s1))
        filters += images * r_count * s_count * sum(_filter_elements(plain, r, s) for r, s in taps)
    bias = groups * K * itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = a["N"] * a["POOLED_P"] * a["POOLED_Q"] * groups * K
    written *= itemsize(a["y"]) + (0 if a["switch"] is None else 1)
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
    matrix alone, with TRANSPOSED that of a group.
    """
    blocks = [(a["BLOCK_K"], 0)] + ([(a["BLOCK_K2"], a["BLOCK_K"])] if a["BLOCK_K2"] else [])
    if a["COLUMNS"] > 1:
        return sum(_row_elements(a, s, block, below) for block, below in blocks)
    height, width = a["w"].shape[-2:]
    total = 0
    for g, k0 in itertools.product(range(a["GROUPS"]), range(0, a["K"], _filters(a))):
        for (block, below), c, (_, part) in itertools.product(
            blocks, range(0, a["C"], a["BLOCK_C"]), _products(a["PARTS"])
        ):
            tap = a["TAP_0"] + r * a["TAP_R"] + s * a["TAP_S"]
            k, column = k0 + below, tap * a["PARTS"] + part
            if a["TRANSPOSED"]:
                total += clip(c, a["BLOCK_C"], height) * clip(column * a["K"] + k, block, width)
            else:
                total += clip(g * a["K"] + k, block, height) * clip(column * a["C"] + c, a["BLOCK_C"], width)
    return total


def _row_elements(a: Arguments, s: int, block: int, below: int) -> int:
    """The same with COLUMNS: a box of a row of taps, clipped by that row."""
    own = clip((a["S"] - 1 - s) * a["K"] + below, block, a["S"] * a["K"])
    return int(own * a["C"] * a["GROUPS"] * len(_products(a["PARTS"])))


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
        pixels = math.prod(clip(start, box, extent) for start, (extent, box) in zip(place, extents, strict=True))
        yield g * a["K"] + k * filters, clip(k * filters, filters, a["K"]), pixels


def _fprop_finish(a: Arguments) -> Traffic:
    filters = a["ROWS"] // a["COLUMNS"]
    shared = list(_shared_tiles(a, cdiv(a["K"], filters), filters))
    pixels = a["BOX_N"] * a["BOX_H"] * a["BOX_W"]
    parts = len(shared) * a["SPLITS"] * a["ROWS"] * pixels * itemsize(a["parts"])
    written = sum(k * inside for _, k, inside in shared) * itemsize(a["y"])
    bias = itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    read = parts + sum(k for _, k, _ in shared) * a["COLUMNS"] * pixels // a["BLOCK_P"] * bias
    touched = sum({first: k for first, k, _ in shared}.values())
    blocks = len(shared) * (a["ROWS"] // a["BLOCK_K"]) * (pixels // a["BLOCK_P"])
    return _drawn(a, blocks, Traffic(read, written, parts + written + touched * bias))


def _fprop_gather(a: Arguments) -> Traffic:
    size, groups, K, C = itemsize(a["x"]) * a["PARTS"], a["GROUPS"], a["K"], a["C"]
    rows, columns = _axes(a, boxed=False)
    reached = pairs(*_extents(rows)) * pairs(*_extents(columns))
    blocks = cdiv(a["N"] * a["P"] * a["Q"], a["PIXELS"])
    filter_tiles = cdiv(K, a["BLOCK_K"])
    pixels = a["N"] * reached * C * groups * filter_tiles * size
    weights = groups * K * C * a["R"] * a["S"] * size
    if a["SPLITS"] > 1:  # fprop_finish does the rest
        written = math.prod(a["parts"].shape) * itemsize(a["parts"])
        return Traffic(pixels + blocks * weights, written, _image_bytes(a) + weights + written)
    bias = groups * K * itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = a["N"] * a["P"] * a["Q"] * K * groups * itemsize(a["y"])
    found = Traffic(pixels + blocks * (weights + bias), written, _image_bytes(a) + weights + bias + written)
    return _drawn(a, blocks * groups * filter_tiles, found)


def _extents(axis: _Axis) -> tuple[int, int, int, int, int, int]:
    return axis.outputs, axis.taps, axis.stride, axis.pad, axis.dilation, axis.extent


def _wgrad_gather(a: Arguments) -> Traffic:
    size, groups, K, C = itemsize(a["x"]) * a["PARTS"], a["GROUPS"], a["K"], a["C"]
    rows, columns = _axes(a, boxed=False)
    reached = pairs(*_extents(rows)) * pairs(*_extents(columns))
    pixels = a["N"] * reached * C * groups * cdiv(K, a["BLOCK_K"]) * size
    grads = a["N"] * a["P"] * a["Q"] * K * groups * size
    depth = a["R"] * a["S"] * C
    written = a["SPLITS"] * groups * K * depth * itemsize(a["dw"])
    return Traffic(pixels + grads * cdiv(depth, a["BLOCK_C"]), written, _image_bytes(a) + grads + written)


def _wgrad_box(a: Arguments) -> Traffic:
    size, groups, K, C, taps = itemsize(a["x"]), a["GROUPS"], a["K"], a["C"], a["R"] * a["S"]
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
    written = a["SPLITS"] * groups * K * taps * C * itemsize(a["dw"])
    least = _image_bytes(a) + a["N"] * a["P"] * a["Q"] * K * groups * a["PARTS"] * size + written
    return Traffic(read * size, written, least)


def _wgrad_range(a: Arguments, taps: list[int], axis: str) -> range:
    """Boxes of outputs along one axis in which some tap of a program reaches the image."""
    outputs, extent, stride, box = (
        (a["P"], a["H"], a["stride_h"], a["BOX_H"]) if axis == "H" else (a["Q"], a["W"], a["stride_w"], a["BOX_W"])
    )
    found = []
    for shift in (_tap_shift(a, tap, axis) for tap in taps):
        low = max(0, cdiv(-shift, stride)) // box
        found.append((low, cdiv(min(outputs, max(0, cdiv(extent - shift, stride))), box)))
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
        rows, cols = clip(h, a["BOX_H"], height), clip(w, a["BOX_W"], width)
        if not rows or not cols:
            continue
        total += rows * cols * sum(
            clip(first, block, extent) if len(image.shape) == 4 else min(block, max(0, left))
            for first, block, left in columns
        )  # fmt: skip
    return int(total * a["N"])


COUNTERS: dict[str, Callable[[Arguments], Traffic]] = {
    "fprop_box": _fprop_box,
    "fprop_across": _fprop_across,
    "fprop_finish": _fprop_finish,
    "fprop_gather": _fprop_gather,
    "fprop_pool": _fprop_pool,
    "wgrad_box": _wgrad_box,
    "wgrad_gather": _wgrad_gather,
}
