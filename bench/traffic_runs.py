"""Bytes that the kernels of first layers move: blocks and runs of their images; see traffic.py."""

from __future__ import annotations

import math
from collections.abc import Callable

from .traffic_base import Arguments, Traffic, cdiv, clip, itemsize, pairs, touched


def _space_to_depth(a: Arguments) -> Traffic:
    count, depth = a["x"].shape[0], a["DEPTH"]
    axes = [
        (a["U"], a["BLOCK_H"], a["STEP_H"], a["pad_h"], a["H"]),
        (a["V"], a["BLOCK_W"], a["STEP_W"], a["pad_w"], a["W"]),
    ]
    loaded = [
        sum(clip(i * step - pad, block, extent) for i in range(blocks)) for blocks, block, step, pad, extent in axes
    ]
    once = [clip(-pad, (blocks - 1) * step + block, extent) for blocks, block, step, pad, extent in axes]
    planes = count * a["C"] * itemsize(a["x"])
    written = count * a["U"] * a["V"] * depth * itemsize(a["y"])
    return Traffic(planes * math.prod(loaded), written, planes * math.prod(once) + written)


def _in_runs(a: Arguments) -> tuple[int, int]:
    """Pixels of x that the runs of all outputs load, and those that some run reaches."""
    rows = (a["P"], a["R"], a["STRIDE_H"], a["pad_h"], a["DIL_H"], a["H"])
    loaded = cdiv(a["USED"], a["ALIGN"]) * a["ALIGN"]
    columns = (a["Q"], loaded, a["STRIDE_W"], a["FIRST"], 1, a["W"] * a["ALIGN"])
    planes = a["N"] * a["C"]
    return planes * pairs(*rows) * pairs(*columns), planes * touched(*rows) * touched(*columns)


def _fprop_runs(a: Arguments) -> Traffic:
    loaded, reached = _in_runs(a)
    pixel_tiles = cdiv(a["N"] * a["P"] * a["Q"], a["PIXELS"])
    size = itemsize(a["x"])
    biases = a["K"] * itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    weights = a["K"] * a["DEPTH"] * size
    written = a["N"] * a["P"] * a["Q"] * a["K"] * itemsize(a["y"])
    read = loaded * size * cdiv(a["K"], a["BLOCK_K"] + a["BLOCK_K2"]) + pixel_tiles * (weights + biases)
    return Traffic(read, written, reached * size + weights + biases + written)


def _wgrad_runs(a: Arguments) -> Traffic:
    loaded, reached = _in_runs(a)
    size, depth = itemsize(a["x"]), a["C"] * a["R"] * a["RUN"]
    grads = a["N"] * a["P"] * a["Q"] * a["K"] * itemsize(a["dy"])
    written = a["dw"].numel() * itemsize(a["dw"])
    read = loaded * size * cdiv(a["K"], a["BLOCK_K"]) + grads * cdiv(depth, a["BLOCK_C"])
    return Traffic(read, written, reached * size + grads + written)


def _inner_runs(a: Arguments) -> int:
    """Bytes of x that windows meet; loads begin and end up to an aligned load beside them."""
    _, planes, extent, _ = a["x"].shape
    rows = touched(a["P"], a["R"], (a["step_xp"] * a["ALIGN"]) // a["stride_xh"], 0, a["DIL_H"], extent)
    columns = touched(a["Q"], a["S"], a["STRIDE_W"], 0, 1, (a["Q"] - 1) * a["STRIDE_W"] + a["S"])
    return int(a["N"] * planes * rows * columns * itemsize(a["x"]))


def _fprop_inner_runs(a: Arguments) -> Traffic:
    size = itemsize(a["x"])
    tiles = a["CLASSES"] * cdiv(cdiv(a["N"], a["CLASSES"]) * a["P"] * a["Q"], a["PIXELS"])
    biases = a["K"] * itemsize(a["bias"]) if a["HAS_BIAS"] else 0
    weights = a["K"] * a["DEPTH"] * size
    written = a["N"] * a["P"] * a["Q"] * a["K"] * itemsize(a["y"])
    # Nothing is masked: what no filter meets and what is beyond the last pixel reads what is there anyway.
    filter_tiles = cdiv(a["K"], a["BLOCK_K"] + a["BLOCK_K2"])
    pixels = tiles * a["PIXELS"] * a["DEPTH"] * filter_tiles * size
    used = min(a["CLASSES"], a["N"]) * weights
    return Traffic(pixels + tiles * (weights + biases), written, _inner_runs(a) + used + biases + written)


def _wgrad_inner_runs(a: Arguments) -> Traffic:
    tiles = cdiv(a["C"] * a["R"] * a["RUN"], a["BLOCK_C"])
    rows = a["N"] * a["P"] * a["Q"]
    grads = rows * a["K"] * itemsize(a["dy"])
    pixels = rows * tiles * a["BLOCK_C"] * cdiv(a["K"], a["BLOCK_K"]) * itemsize(a["x"])
    written = a["dw"].numel() * itemsize(a["dw"])
    return Traffic(pixels + grads * tiles, written, _inner_runs(a) + grads + written)


def _filters_to_runs(a: Arguments) -> Traffic:
    classes, filters, _ = a["out"].shape
    read = classes * filters * a["C"] * a["R"] * a["S"] * itemsize(a["w"])
    written = a["SIZE"] * itemsize(a["out"])
    return Traffic(read, written, read // classes + written)


def _runs_to_filters(a: Arguments) -> Traffic:
    read, written = a["CLASSES"] * a["SIZE"] * itemsize(a["sums"]), a["SIZE"] * itemsize(a["dw"])
    return Traffic(read, written, read + written)


COUNTERS: dict[str, Callable[[Arguments], Traffic]] = {
    "space_to_depth": _space_to_depth,
    "fprop_runs": _fprop_runs,
    "wgrad_runs": _wgrad_runs,
    "fprop_inner_runs": _fprop_inner_runs,
    "wgrad_inner_runs": _wgrad_inner_runs,
    "filters_to_runs": _filters_to_runs,
    "runs_to_filters": _runs_to_filters,
}
