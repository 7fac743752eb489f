"""How many bytes a launch moves, computed from its arguments.

Two different things are counted.  `read` and `written` are what the programs ask for, after masks and descriptor
clipping: the traffic between L2 and the SMs, where every program fetches its own operands (but for runs, whose repeated
pixels L1 keeps; the cost model takes that into account, this count does not).  `least` counts every byte
that the launch touches once: what DRAM has to deliver if nothing is fetched twice.  tests/test_counted_bytes.py holds
both to the loads and stores that the interpreter counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from . import traffic_conv, traffic_layers, traffic_runs
from .traffic_base import Arguments, Traffic, adaptive_pairs, itemsize, pairs, touched, windows_once


def traffic(launch: Any) -> Traffic | None:
    """The traffic of a launch; None for a kernel that this file does not know."""
    name = launch.kernel.__name__
    module = getattr(launch.kernel, "fn", launch.kernel).__module__.rpartition(".")[2]
    count = COUNTERS.get(name) or traffic_layers.COUNTERS.get(f"{module}.{name}")
    return None if count is None else count(launch.arguments)


def _max_forward(a: Arguments) -> Traffic:
    reached, touched, images = _window(a, a["x"])
    outputs = images * a["P"] * a["Q"]
    written = outputs * (itemsize(a["y"]) + (itemsize(a["switch"]) if a["HAS_SWITCH"] else 0))
    return Traffic(images * reached * itemsize(a["x"]), written, images * touched * itemsize(a["x"]) + written)


def _max_backward(a: Arguments) -> Traffic:
    """Every window names one element, so every gradient is loaded once; with MASK at most once, y as often."""
    reached, _, images = _window(a, a["dx"])
    outputs = images * a["P"] * a["Q"]
    hits = outputs * (itemsize(a["dy"]) + (itemsize(a["y"]) if a["MASK"] else 0))
    written = images * a["H"] * a["W"] * itemsize(a["dx"])
    switch = itemsize(a["switch"])
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
    return pairs(*rows) * pairs(*columns), touched(*rows) * touched(*columns), planes


def _adaptive(a: Arguments) -> tuple[int, int]:
    """Elements that all windows of one plane load, and elements of a window's plane."""
    return adaptive_pairs(a), a["H"] * a["W"]


def _adaptive_forward(a: Arguments) -> Traffic:
    reached, plane = _adaptive(a)
    images = a["x"].shape[0] * a["x"].shape[1]
    written = images * a["P"] * a["Q"] * itemsize(a["y"])
    size = itemsize(a["x"])
    return Traffic(images * reached * size, written, images * plane * size + written)


def _adaptive_backward(a: Arguments) -> Traffic:
    reached, plane = _adaptive(a)
    images, size = a["dx"].shape[0] * a["dx"].shape[1], itemsize(a["dy"])
    written = images * plane * itemsize(a["dx"])
    return Traffic(images * reached * size, written, images * a["P"] * a["Q"] * size + written)


def _copied(a: Arguments) -> Traffic:
    """Every element of x read and every element of y written, once."""
    read, written = (a[name].numel() * itemsize(a[name]) for name in ("x", "y"))
    return Traffic(read, written, read + written)


def _bias_backward(a: Arguments) -> Traffic:
    elements = a["HEIGHT"] * a["K"]
    read = elements * (itemsize(a["dy"]) + (itemsize(a["y"]) if a["MASK"] else 0))
    written = a["sums"].numel() * itemsize(a["sums"]) + (elements * itemsize(a["dx"]) if a["MASK"] else 0)
    return Traffic(read, written, read + written)


def _norm(a: Arguments) -> Traffic:
    operands = [a["x"]] + ([a["dy"]] if a["BACKWARD"] else [])
    read = sum(operand.numel() * itemsize(operand) for operand in operands)
    written = a["out"].numel() * itemsize(a["out"])
    return Traffic(read, written, read + written)


def _each_once(*operands: str, out: str, times: str = "") -> Callable[[Arguments], Traffic]:
    """SIZE elements of each operand (`times` many of the first), and SIZE elements out."""

    def count(a: Arguments) -> Traffic:
        read = sum(a["SIZE"] * itemsize(a[name]) for name in operands) * (a[times] if times else 1)
        written = a["SIZE"] * itemsize(a[out])
        return Traffic(read, written, read + written)

    return count


COUNTERS: dict[str, Callable[[Arguments], Traffic]] = {
    **traffic_conv.COUNTERS,
    **traffic_runs.COUNTERS,
    "max_forward": _max_forward,
    "max_backward": _max_backward,
    "max_backward_cells": _max_backward_cells,
    "adaptive_avg_forward": _adaptive_forward,
    "adaptive_avg_backward": _adaptive_backward,
    "across_columns": _norm,
    "split": _copied,
    "turn": _copied,
    "widen": _copied,
    "depth_to_space": _each_once("y", out="dw"),
    "bias_backward": _bias_backward,
    "relu_forward": _each_once("x", out="y"),
    "relu_backward": _each_once("dy", "y", out="dx"),
    "add_slices": _each_once("parts", out="out", times="SLICES"),
}
