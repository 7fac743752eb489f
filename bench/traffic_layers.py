"""The bytes of kernels beside convolution, most pools and pointwise ones: by module and name, for some share names."""

from __future__ import annotations

from collections.abc import Callable

from .traffic_base import Arguments, Traffic, adaptive_pairs, cdiv, clip, itemsize, pairs, touched, windows_once

Axis = tuple[int, int, int, int, int, int]  # outputs, taps, stride, padding, dilation, extent


def _axes(a: Arguments) -> tuple[Axis, Axis]:
    """Of a window over an image: rows and columns. Average pools have no dilation."""
    pad_h, pad_w = (a["PAD_H"], a["PAD_W"]) if "PAD_H" in a else (a["pad_h"], a["pad_w"])
    return (
        (a["P"], a["R"], a["STRIDE_H"], pad_h, a.get("DIL_H", 1), a["H"]),
        (a["Q"], a["S"], a["STRIDE_W"], pad_w, a.get("DIL_W", 1), a["W"]),
    )


def _met(a: Arguments) -> tuple[int, int]:
    """Of one plane: pairs of an output and a tap inside the image, and pixels that some window reaches."""
    rows, columns = _axes(a)
    return pairs(*rows) * pairs(*columns), touched(*rows) * touched(*columns)


def _planes(image: object) -> int:
    shape: tuple[int, ...] = image.shape  # type: ignore[attr-defined]
    return shape[0] * shape[1]


def _average_forward(a: Arguments) -> Traffic:
    (loads, pixels), planes, size = _met(a), _planes(a["x"]), itemsize(a["x"])
    written = planes * a["P"] * a["Q"] * itemsize(a["y"])
    return Traffic(planes * loads * size, written, planes * pixels * size + written)


def _average_backward(a: Arguments) -> Traffic:
    """A norm also reads its output wherever it reads a gradient, and its input once."""
    loads, planes, size = _met(a)[0], _planes(a["dx"]), itemsize(a["dy"])
    operands = 2 if a["NORM"] is not None else 1
    written = planes * a["H"] * a["W"] * itemsize(a["dx"])
    values = planes * a["H"] * a["W"] * size if a["NORM"] is not None else 0
    least = operands * planes * a["P"] * a["Q"] * size + values + written
    return Traffic(operands * planes * loads * size + values, written, least)


def _max_forward_strips(a: Arguments) -> Traffic:
    """Every pixel under a strip of outputs once; what lies beyond the last window belongs to no strip."""
    loaded = 1
    for strip, (outputs, window, stride, pad, _, extent) in zip((a["LONG"], a["WIDE"]), _axes(a), strict=True):
        end = min(extent, (outputs - 1) * stride - pad + window)
        starts = range(-pad, outputs * stride - pad, strip * stride)
        loaded *= sum(clip(start, (strip - 1) * stride + window, end) for start in starts)
    planes, size = _planes(a["x"]), itemsize(a["x"])
    written = planes * a["P"] * a["Q"] * (itemsize(a["y"]) + (itemsize(a["switch"]) if a["HAS_SWITCH"] else 0))
    return Traffic(planes * loaded * size, written, planes * _met(a)[1] * size + written)


def _max_backward_strips(a: Arguments) -> Traffic:
    """The windows over each strip of cells, each loaded once for the strip."""
    windows = 1
    for strips, strip, (outputs, window, stride, *_) in zip(
        (a["STRIPS_H"], a["STRIPS_W"]), (a["LONG"], a["WIDE"]), _axes(a), strict=True
    ):
        before = (window - 1) // stride
        windows *= sum(clip(first - before, strip + before, outputs) for first in range(0, strips * strip, strip))
    return windows_once(a, windows)


def _columns_shared(a: Arguments, before: int, after: int) -> list[int]:
    """Of lanes that programs have beside their own columns, `before` and `after` these: the columns of their planes."""
    step, end = a["LANES"] - before - after, a["POSITIONS"]
    beside = [(first - back) for first in range(step, end, step) for back in range(1, before + 1)]
    beside += [first + more for first in range(step, end, step) for more in range(after) if first + more < end]
    return [position % a["COLUMNS"] for position in beside]


def _max_forward_planes(a: Arguments) -> Traffic:
    """Every pixel under a column of outputs once, and once more what the next program's first windows hold."""
    (outputs, window, stride, pad, _, extent), (Q, S, step, pad_w, _, W) = _axes(a)
    end = min(extent, (outputs - 1) * stride - pad + window)
    starts = range(-pad, a["STRIPS"] * a["LONG"] * stride - pad, a["LONG"] * stride)
    rows = sum(clip(start, (a["LONG"] - 1) * stride + window, end) for start in starts)
    limit = min(W, (Q - 1) * step - pad_w + S)
    # Of its own columns a lane loads for itself those that no lane beside asks for: only where it has a window.
    asked = [clip(q * step - pad_w, max(0, min(step, S - step)), limit) for q in range(a["COLUMNS"])]
    whole = [clip(q * step - pad_w, min(step, S), limit) for q in range(Q)] + asked[Q:]
    planes, size = _planes(a["x"]), itemsize(a["x"])
    beside = sum(asked[q] for q in _columns_shared(a, 0, (S - 1) // step))
    written = planes * outputs * Q * (itemsize(a["y"]) + (itemsize(a["switch"]) if a["HAS_SWITCH"] else 0))
    read = (planes * sum(whole) + beside) * rows * size
    return Traffic(read, written, planes * _met(a)[1] * size + written)


def _max_backward_planes(a: Arguments) -> Traffic:
    """The windows over each column of cells, each loaded once for the column, and once more for the next program's."""
    (P, R, stride, *_), (Q, S, step, *_) = _axes(a)
    before, planes = (R - 1) // stride, _planes(a["dx"])
    firsts = range(0, a["STRIPS"] * a["LONG"], a["LONG"])
    rows = sum(clip(first - before, a["LONG"] + before, P) for first in firsts)
    beside = sum(q < Q for q in _columns_shared(a, (S - 1) // step, 0))
    size = itemsize(a["dy"]) + itemsize(a["switch"]) + (itemsize(a["y"]) if a["MASK"] else 0)
    written = planes * a["H"] * a["W"] * itemsize(a["dx"])
    return Traffic((planes * Q + beside) * rows * size, written, planes * P * Q * size + written)


def _adaptive_max_forward(a: Arguments) -> Traffic:
    planes, size = _planes(a["x"]), itemsize(a["x"])
    written = planes * a["P"] * a["Q"] * (itemsize(a["y"]) + (itemsize(a["switch"]) if a["HAS_SWITCH"] else 0))
    return Traffic(planes * adaptive_pairs(a) * size, written, planes * a["H"] * a["W"] * size + written)


def _adaptive_max_backward(a: Arguments) -> Traffic:
    """Every window names one element, so every gradient is loaded once."""
    planes, switch = _planes(a["dx"]), itemsize(a["switch"])
    outputs = planes * a["P"] * a["Q"]
    hits, written = outputs * itemsize(a["dy"]), planes * a["H"] * a["W"] * itemsize(a["dx"])
    return Traffic(planes * adaptive_pairs(a) * switch + hits, written, outputs * switch + hits + written)


def _unpool(a: Arguments) -> Traffic:
    """Indices all different: of several that name one element, some are not stored."""
    read = a["x"].numel() * (itemsize(a["x"]) + itemsize(a["index"]))
    written = a["x"].numel() * itemsize(a["y"])
    return Traffic(read, written, read + written)


def _unpool_backward(a: Arguments) -> Traffic:
    read = a["dx"].numel() * (itemsize(a["dy"]) + itemsize(a["index"]))
    written = a["dx"].numel() * itemsize(a["dx"])
    return Traffic(read, written, read + written)


def _switch_to_index(a: Arguments) -> Traffic:
    read, written = (a[name].numel() * itemsize(a[name]) for name in ("switch", "index"))
    return Traffic(read, written, read + written)


def _unfold(a: Arguments) -> Traffic:
    loads, pixels = _met(a | {"P": a["PIXELS"] // a["Q"]})
    planes, size = a["N"] * a["DEPTH"] // (a["R"] * a["S"]), itemsize(a["x"])
    written = a["N"] * a["DEPTH"] * a["PIXELS"] * itemsize(a["cols"])
    return Traffic(planes * loads * size, written, planes * pixels * size + written)


def _fold(a: Arguments) -> Traffic:
    """Every element of the columns that is not in the padding goes to one pixel."""
    planes = a["N"] * a["C"]
    read = planes * _met(a)[0] * itemsize(a["cols"])
    written = planes * a["H"] * a["W"] * itemsize(a["x"])
    return Traffic(read, written, read + written)


def _rows(a: Arguments) -> tuple[int, int]:
    """Elements of all rows, and programs side by side over the rows."""
    return a["M"] * a["D"] * a["ALIGN"], cdiv(a["M"], a["ROWS"])


def _softmax_forward(a: Arguments) -> Traffic:
    elements, _ = _rows(a)
    once, written = elements * itemsize(a["x"]), elements * itemsize(a["y"])
    return Traffic(once * (1 if a["ONE"] else 2), written, once + written)


def _softmax_backward(a: Arguments) -> Traffic:
    """Rows that do not fit are walked along twice; the first walk of log_softmax needs gradients alone."""
    elements, _ = _rows(a)
    grad, value, written = (elements * itemsize(a[name]) for name in ("dy", "y", "dx"))
    again = 0 if a["ONE"] else grad if a["LOG"] else grad + value
    return Traffic(grad + value + again, written, grad + value + written)


def _cross_entropy_forward(a: Arguments) -> Traffic:
    """A row is walked along twice, the second time out of a cache."""
    elements, programs = _rows(a)
    once = elements * itemsize(a["x"])
    target = (a["M"] if a["INDEXED"] else elements) * itemsize(a["target"])
    weights, picked = 0, 0
    if a["HAS_WEIGHT"]:
        weights = a["D"] * a["ALIGN"] * itemsize(a["weight"])
        picked = a["M"] * itemsize(a["weight"]) if a["INDEXED"] else 0
    written = 5 * a["M"] * itemsize(a["losses"])
    return Traffic(2 * once + target + weights * programs + picked, written, once + target + weights + written)


def _cross_entropy_backward(a: Arguments) -> Traffic:
    """Every block of a row fetches what the row's blocks share."""
    elements, strips = _rows(a)
    blocks = cdiv(a["D"] * a["ALIGN"], a["COLS"])
    saved = (2 if a["TO_TARGET"] else 3) * a["M"] * itemsize(a["saved"])
    grad = a["M"] * itemsize(a["grad"]) if a["PER_ROW"] else 0
    label = a["M"] * itemsize(a["target"]) if a["INDEXED"] else 0
    scalars = itemsize(a["divisor"]) + (0 if a["PER_ROW"] else itemsize(a["grad"]))
    across = 0 if a["INDEXED"] or a["TO_TARGET"] else elements * itemsize(a["target"])
    weights = a["D"] * a["ALIGN"] * itemsize(a["weight"]) if a["HAS_WEIGHT"] else 0
    once = elements * itemsize(a["x"]) + across
    written = elements * itemsize(a["dx"])
    read = once + (saved + grad + label + strips * scalars) * blocks + weights * strips
    return Traffic(read, written, once + saved + grad + label + scalars + weights + written)


def _along_rows(a: Arguments, before: int, after: int) -> int:
    """Channels that all chunks of a norm load: theirs, and so many around them."""
    total = 0
    for first in range(0, a["C"], a["CHUNK"]):
        last = min(first + a["CHUNK"], a["C"])
        total += min(last + after, a["C"]) - max(first - before, 0)
    return total


def _norm_forward(a: Arguments) -> Traffic:
    size, pixels = itemsize(a["x"]), a["WIDTH"]
    written = pixels * a["C"] * itemsize(a["y"])
    read = pixels * _along_rows(a, a["BEFORE"], a["AFTER"]) * size
    return Traffic(read, written, pixels * a["C"] * size + written)


def _norm_backward(a: Arguments) -> Traffic:
    size, pixels, reach = itemsize(a["x"]), a["WIDTH"], a["BEFORE"] + a["AFTER"]
    written = pixels * a["C"] * itemsize(a["dx"])
    read = pixels * (_along_rows(a, reach, reach) + _along_rows(a, a["AFTER"], a["BEFORE"])) * size
    return Traffic(read, written, 2 * pixels * a["C"] * size + written)


def _dropout(a: Arguments) -> Traffic:
    """Every program reads the seed."""
    read, written = a["SIZE"] * itemsize(a["x"]), a["SIZE"] * itemsize(a["y"])
    seed = itemsize(a["seed"])
    return Traffic(read + seed * cdiv(a["SIZE"], a["BLOCK"]), written, read + seed + written)


# Depthwise: a strip of LINES output rows loads every input row under it once; taps in the padding load nothing.
def _depthwise_fprop(a: Arguments) -> Traffic:
    rows, columns = _axes(a)
    strips = range(0, a["P"], a["LINES"])
    if a["LINES"] == 1:
        met, weight_rows = pairs(*rows), a["R"]
    else:
        shifts = {line * a["STRIDE_H"] + r * a["DIL_H"] for line in range(a["LINES"]) for r in range(a["R"])}
        tops = [p * a["STRIDE_H"] - a["pad_h"] for p in strips]
        met, weight_rows = sum(0 <= top + shift < a["H"] for top in tops for shift in shifts), a["LINES"] * a["R"]
    size, taps = itemsize(a["x"]), a["R"] * a["S"]
    programs = cdiv(a["N"] * len(strips) * a["Q"], a["COLUMNS"])
    pixels = a["N"] * met * pairs(*columns) * a["K"] * a["GROUP_C"] * size
    weights = weight_rows * a["S"] * a["K"] * a["GROUP_C"] * itemsize(a["w"])
    bias = a["K"] * itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = a["N"] * a["P"] * a["Q"] * a["K"] * itemsize(a["y"])
    channels = a["K"] // a["GROUP_K"] * a["GROUP_C"]
    least = a["N"] * channels * touched(*rows) * touched(*columns) * size
    least += taps * a["K"] * a["GROUP_C"] * itemsize(a["w"]) + bias + written
    return Traffic(pixels + programs * (weights + a["LINES"] * bias), written, least)


def _depthwise_wgrad(a: Arguments) -> Traffic:
    (loads, pixels), size = _met(a), itemsize(a["x"])
    grads = a["N"] * a["P"] * a["Q"] * a["K"] * size
    read = a["N"] * loads * a["K"] * size + grads * cdiv(a["R"] * a["S"], a["TAPS"])
    written = a["parts"].numel() * itemsize(a["parts"])
    return Traffic(read, written, a["N"] * a["K"] // a["GROUP_K"] * pixels * size + grads + written)


# Locally connected: a pixel's filters are read once for every block of images, its patches for every block of filters.
def _local_fprop(a: Arguments) -> Traffic:
    outputs = a["y"].shape[2] * a["y"].shape[3]
    (loads, pixels), size = _met(a | {"P": a["y"].shape[2]}), itemsize(a["x"])
    patches, images = a["N"] * a["C"] * size, cdiv(a["N"], a["BLOCK_N"])
    weights = outputs * a["K"] * a["C"] * a["R"] * a["S"] * itemsize(a["w"])
    bias = a["K"] * itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    written = a["N"] * outputs * a["K"] * itemsize(a["y"])
    read = patches * loads * cdiv(a["K"], a["BLOCK_K"]) + images * (weights + outputs * bias)
    least = patches * pixels + weights + bias * (outputs if a["stride_bi"] else 1) + written
    return Traffic(read, written, least)


def _local_dgrad(a: Arguments) -> Traffic:
    loads, size = _met(a)[0], itemsize(a["dy"])
    filters = loads * a["K"] * a["C"] * itemsize(a["w"])
    grads = a["N"] * a["K"] * size
    written = a["N"] * a["C"] * a["H"] * a["W"] * itemsize(a["dx"])
    read = grads * loads * cdiv(a["C"], a["BLOCK_C"]) + filters * cdiv(a["N"], a["BLOCK_N"])
    return Traffic(read, written, grads * a["P"] * a["Q"] + filters + written)


def _local_wgrad(a: Arguments) -> Traffic:
    height = a["dy"].shape[2]
    (loads, pixels), size, depth = _met(a | {"P": height}), itemsize(a["x"]), a["C"] * a["R"] * a["S"]
    patches, grads = a["N"] * a["C"] * size, a["N"] * height * a["Q"] * a["K"] * size
    written = height * a["Q"] * a["K"] * depth * itemsize(a["dw"])
    read = patches * loads * cdiv(a["K"], a["BLOCK_K"]) + grads * cdiv(depth, a["BLOCK_D"])
    return Traffic(read, written, patches * pixels + grads + written)


COUNTERS: dict[str, Callable[[Arguments], Traffic]] = {
    "average.average_forward": _average_forward,
    "average.average_backward": _average_backward,
    "selection.adaptive_max_forward": _adaptive_max_forward,
    "selection.adaptive_max_backward": _adaptive_max_backward,
    "selection.adaptive_switch_to_index": _switch_to_index,
    "selection.unpool_forward": _unpool,
    "selection.unpool_backward": _unpool_backward,
    "pool.switch_to_index": _switch_to_index,
    "pool_strips.max_forward_strips": _max_forward_strips,
    "pool_strips.max_backward_strips": _max_backward_strips,
    "pool_planes.max_forward_planes": _max_forward_planes,
    "pool_planes.max_backward_planes": _max_backward_planes,
    "unfold.unfold": _unfold,
    "unfold.fold": _fold,
    "softmax.softmax_forward": _softmax_forward,
    "softmax.softmax_backward": _softmax_backward,
    "softmax.cross_entropy_forward": _cross_entropy_forward,
    "softmax.cross_entropy_backward": _cross_entropy_backward,
    "norm.along_rows_forward": _norm_forward,
    "norm.along_rows_backward": _norm_backward,
    "pointwise.dropout": _dropout,
    "depthwise.fprop": _depthwise_fprop,
    "depthwise.wgrad": _depthwise_wgrad,
    "local.fprop": _local_fprop,
    "local.dgrad": _local_dgrad,
    "local.wgrad": _local_wgrad,
}
