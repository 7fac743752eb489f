"""How many bytes a launch moves, computed from its arguments.

Two different things are counted.  `read` and `written` are what the programs ask for, after masks and descriptor
clipping: the traffic between L2 and the SMs, where every program fetches its own operands.  `least` counts every byte
that the launch touches once: what DRAM has to deliver if nothing is fetched twice.  tests/test_counted_bytes.py holds
both to the loads and stores that the interpreter counts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch: requested by its programs, and touched at least once."""

    read: int
    written: int
    least: int

    @property
    def requested(self) -> int:
        """All that goes between L2 and the SMs."""
        return self.read + self.written


def traffic(launch: Any) -> Traffic | None:
    """The traffic of a launch; None for a kernel that this file does not know."""
    count = COUNTERS.get(launch.kernel.__name__)
    return None if count is None else count(launch.arguments)


Arguments = dict[str, Any]


def _itemsize(operand: Any) -> int:
    """Of a tensor, or of a tensor descriptor's tensor."""
    tensor = operand.base if hasattr(operand, "block_shape") else operand
    size: int = tensor.element_size()
    return size


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _clip(start: int, size: int, extent: int) -> int:
    """How much of [start, start + size) lies in [0, extent)."""
    return max(0, min(start + size, extent) - max(start, 0))


def _touched(outputs: int, taps: int, stride: int, pad: int, dilation: int, extent: int) -> int:
    """Along one axis: input positions that some window reaches."""
    found = {o * stride - pad + t * dilation for o, t in itertools.product(range(outputs), range(taps))}
    return sum(0 <= i < extent for i in found)


def _pairs(outputs: int, taps: int, stride: int, pad: int, dilation: int, extent: int) -> int:
    """Along one axis: pairs of an output and a tap inside the image."""
    return sum(0 <= o * stride - pad + t * dilation < extent for o, t in itertools.product(range(outputs), range(taps)))


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

    def rows(self) -> tuple[int, Counter[tuple[int, int]]]:
        """Input rows that all boxes and taps load, and how many boxes have each range of taps."""
        loaded, ranges = 0, Counter[tuple[int, int]]()
        for start in range(0, self.outputs, self.box):
            low, high = self.range_of(start)
            ranges[low, max(low, high)] += 1
            first = start * self.stride - self.pad
            loaded += sum(_clip(first + tap * self.dilation, self.box, self.extent) for tap in range(low, high))
        return loaded, ranges

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


def _fprop_box(a: Arguments) -> Traffic:
    size, groups, K, C = _itemsize(a["x"]), a["GROUPS"], a["K"], a["C"]
    rows, columns = _axes(a)
    (h, h_ranges), (w, w_ranges) = rows.rows(), columns.rows()
    filter_tiles = _cdiv(K, a["BLOCK_K"] + a["BLOCK_K2"])
    pixels = a["N"] * h * w * C * groups * filter_tiles * size * len(_products(a["PARTS"]))
    images = _cdiv(a["N"], a["BOX_N"])
    filters = 0
    for ((r0, r1), r_count), ((s0, s1), s_count) in itertools.product(h_ranges.items(), w_ranges.items()):
        taps = [a["TAP_0"] + r * a["TAP_R"] + s * a["TAP_S"] for r in range(r0, r1) for s in range(s0, s1)]
        filters += images * r_count * s_count * sum(_filter_elements(a, tap) for tap in taps)
    whole, partial, bias = _outputs(a, filter_tiles)
    bias_bytes = bias * _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = whole * _itemsize(a["y"]) + partial * 4
    weights = groups * K * C * a["R"] * a["S"] * size * a["PARTS"]
    least = _image_bytes(a) + weights + written + (groups * K * _itemsize(a["bias"]) if bias_bytes else 0)
    return Traffic(pixels + filters * size + bias_bytes, written, least)


def _filter_elements(a: Arguments, tap: int) -> int:
    """Filter elements that one pixel box loads for one tap: all groups and tiles, clipped by the matrix alone."""
    height, width = a["w"].shape
    total = 0
    blocks = [(a["BLOCK_K"], 0)] + ([(a["BLOCK_K2"], a["BLOCK_K"])] if a["BLOCK_K2"] else [])
    for g, k0 in itertools.product(range(a["GROUPS"]), range(0, a["K"], a["BLOCK_K"] + a["BLOCK_K2"])):
        for (block, shift), c, (_, part) in itertools.product(
            blocks, range(0, a["C"], a["BLOCK_C"]), _products(a["PARTS"])
        ):
            k, depth, column = k0 + shift, c, tap * a["PARTS"] + part
            if a["TRANSPOSED"]:
                total += _clip(g * a["C"] + depth, a["BLOCK_C"], height) * _clip(column * a["K"] + k, block, width)
            else:
                total += _clip(g * a["K"] + k, block, height) * _clip(column * a["C"] + depth, a["BLOCK_C"], width)
    return total


def _outputs(a: Arguments, filter_tiles: int) -> tuple[int, int, int]:
    """Elements of y and of partial sums that a box launch writes, and elements of bias that it reads."""
    starts = [range(0, a[extent], a[box]) for extent, box in (("N", "BOX_N"), ("P", "BOX_H"), ("Q", "BOX_W"))]
    whole = a["N"] * a["P"] * a["Q"] * a["K"] * a["GROUPS"]
    boxes = len(starts[0]) * len(starts[1]) * len(starts[2])
    bias = boxes * a["GROUPS"] * a["K"]
    if a["SPLITS"] == 1:
        return whole, 0, bias
    rows = a.get("ROWS") or a["BLOCK_K"] + a["BLOCK_K2"]
    shared = list(_shared_tiles(a, starts, filter_tiles, rows))
    partial = len(shared) * a["SPLITS"] * rows * a["BOX_N"] * a["BOX_H"] * a["BOX_W"]
    return whole - sum(k * pixels for _, k, pixels in shared), partial, bias - sum(k for _, k, _ in shared)


def _shared_tiles(a: Arguments, starts: list[range], filter_tiles: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(first filter, filters, pixels) of every tile whose depth is shared: those from FULL on, filters fastest."""
    order = itertools.product(*starts, range(a["GROUPS"]), range(filter_tiles))
    for n, p, q, g, k in itertools.islice(order, a["FULL"], None):
        pixels = _clip(n, a["BOX_N"], a["N"]) * _clip(p, a["BOX_H"], a["P"]) * _clip(q, a["BOX_W"], a["Q"])
        yield g * a["K"] + k * rows, _clip(k * rows, rows, a["K"]), pixels


def _fprop_finish(a: Arguments) -> Traffic:
    starts = [range(0, a[extent], a[box]) for extent, box in (("N", "BOX_N"), ("P", "BOX_H"), ("Q", "BOX_W"))]
    shared = list(_shared_tiles(a, starts, _cdiv(a["K"], a["ROWS"]), a["ROWS"]))
    pixels = a["BOX_N"] * a["BOX_H"] * a["BOX_W"]
    parts = len(shared) * a["SPLITS"] * a["ROWS"] * pixels * _itemsize(a["parts"])
    written = sum(k * inside for _, k, inside in shared) * _itemsize(a["y"])
    bias = _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    read = parts + sum(k for _, k, _ in shared) * pixels // a["BLOCK_P"] * bias
    touched = sum({first: k for first, k, _ in shared}.values())
    return Traffic(read, written, parts + written + touched * bias)


def _fprop_gather(a: Arguments) -> Traffic:
    size, groups, K, C = _itemsize(a["x"]) * a["PARTS"], a["GROUPS"], a["K"], a["C"]
    rows, columns = _axes(a, boxed=False)
    reached = _pairs(*_extents(rows)) * _pairs(*_extents(columns))
    blocks = _cdiv(a["N"] * a["P"] * a["Q"], a["PIXELS"])
    pixels = a["N"] * reached * C * groups * _cdiv(K, a["BLOCK_K"]) * size
    weights = groups * K * C * a["R"] * a["S"] * size
    bias = groups * K * _itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = a["N"] * a["P"] * a["Q"] * K * groups * _itemsize(a["y"])
    return Traffic(pixels + blocks * (weights + bias), written, _image_bytes(a) + weights + bias + written)


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
    read = 0
    for tap in range(0, taps, per_program):
        mine = [min(tap + i, taps - 1) for i in range(per_program)]
        ps, qs = _wgrad_range(a, mine, "H"), _wgrad_range(a, mine, "W")
        for g, (x_part, y_part) in itertools.product(range(groups), _products(a["PARTS"])):
            x_plane, y_plane = x_part * groups + g, y_part * groups + g
            grads = [(y_plane * K + k0 + shift, block, K - k0 - shift) for k0 in row_tiles for block, shift in blocks]
            read += len(range(0, C, a["BLOCK_C"])) * _wgrad_load(a, "dy", ps, qs, None, grads)
            channels = [(x_plane * C + c0, a["BLOCK_C"], C - c0) for c0 in range(0, C, a["BLOCK_C"])]
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
    total = 0
    for p, q in itertools.product(ps, qs):
        h, w = p * a["BOX_H"], q * a["BOX_W"]
        if tap is not None:
            h, w = h * a["stride_h"] + _tap_shift(a, tap, "H"), w * a["stride_w"] + _tap_shift(a, tap, "W")
        rows, cols = _clip(h, a["BOX_H"], height), _clip(w, a["BOX_W"], width)
        if not rows or not cols:
            continue
        if a["PIXEL"]:  # a row of an image: only its end clips
            pitch_h, pitch_w = (a["pitch_yp"], a["pitch_yq"]) if tap is None else (a["pitch_xh"], a["pitch_xw"])
            at = h * pitch_h + w * pitch_w
            total += sum(_clip(at + first, block, image.shape[1]) for first, block, _ in columns)
        else:
            total += rows * cols * sum(
                _clip(first, block, image.shape[-1]) if len(image.shape) == 4 else min(block, max(0, left))
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


def _window(a: Arguments, image: Any) -> tuple[int, int, int]:
    """Of one plane: elements that all windows load, and those they touch; then the number of planes."""
    rows = a["P"], a["R"], a["STRIDE_H"], a["PAD_H"], a["DIL_H"], a["H"]
    columns = a["Q"], a["S"], a["STRIDE_W"], a["PAD_W"], a["DIL_W"], a["W"]
    planes = image.shape[0] * image.shape[1]
    return _pairs(*rows) * _pairs(*columns), _touched(*rows) * _touched(*columns), planes


def _adaptive(a: Arguments) -> tuple[int, int]:
    """Elements that all windows of one plane load, and elements of a window's plane."""
    rows, columns = (
        sum(_cdiv((i + 1) * extent, outputs) - i * extent // outputs for i in range(outputs))
        for extent, outputs in ((a["H"], a["P"]), (a["W"], a["Q"]))
    )
    return rows * columns, a["H"] * a["W"]


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
    rows, columns = (
        _clip(-pad, blocks * stride, extent)
        for pad, blocks, stride, extent in (
            (a["pad_h"], a["U"], a["STRIDE_H"], a["H"]), (a["pad_w"], a["V"], a["STRIDE_W"], a["W"]))
    )  # fmt: skip
    read = count * a["C"] * rows * columns * _itemsize(a["x"])
    written = count * a["U"] * a["V"] * depth * _itemsize(a["y"])
    return Traffic(read, written, read + written)


def _split(a: Arguments) -> Traffic:
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
    "fprop_finish": _fprop_finish,
    "fprop_gather": _fprop_gather,
    "wgrad_box": _wgrad_box,
    "wgrad_gather": _wgrad_gather,
    "max_forward": _max_forward,
    "max_backward": _max_backward,
    "adaptive_avg_forward": _adaptive_forward,
    "adaptive_avg_backward": _adaptive_backward,
    "across_columns": _norm,
    "space_to_depth": _space_to_depth,
    "split": _split,
    "depth_to_space": _each_once("y", out="dw"),
    "bias_backward": _bias_backward,
    "relu_forward": _each_once("x", out="y"),
    "relu_backward": _each_once("dy", "y", out="dx"),
    "add_slices": _each_once("parts", out="out", times="SLICES"),
}
