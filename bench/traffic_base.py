"""What byte counters share: the two sums of a launch, and how windows meet an axis of an image."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

Arguments = dict[str, Any]


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


def itemsize(operand: Any) -> int:
    """Of a tensor, or of a tensor descriptor's tensor."""
    tensor = operand.base if hasattr(operand, "block_shape") else operand
    size: int = tensor.element_size()
    return size


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def clip(start: int, size: int, extent: int) -> int:
    """How much of [start, start + size) lies in [0, extent)."""
    return max(0, min(start + size, extent) - max(start, 0))


def touched(outputs: int, taps: int, stride: int, pad: int, dilation: int, extent: int) -> int:
    """Along one axis: input positions that some window reaches."""
    found = {o * stride - pad + t * dilation for o, t in itertools.product(range(outputs), range(taps))}
    return sum(0 <= i < extent for i in found)


def pairs(outputs: int, taps: int, stride: int, pad: int, dilation: int, extent: int) -> int:
    """Along one axis: pairs of an output and a tap inside the image."""
    return sum(0 <= o * stride - pad + t * dilation < extent for o, t in itertools.product(range(outputs), range(taps)))


def adaptive_pairs(a: Arguments) -> int:
    """Of one plane: pairs of an output of an adaptive pool and an element of its window."""
    rows, columns = (
        sum(cdiv((i + 1) * extent, outputs) - i * extent // outputs for i in range(outputs))
        for extent, outputs in ((a["H"], a["P"]), (a["W"], a["Q"]))
    )
    return int(rows * columns)


def windows_once(a: Arguments, loaded: int) -> Traffic:
    """A max-pool's backward: of `loaded` windows of a plane what each holds, and every pixel's gradient."""
    planes = a["dx"].shape[0] * a["dx"].shape[1]
    size = itemsize(a["dy"]) + itemsize(a["switch"]) + (itemsize(a["y"]) if a["MASK"] else 0)
    written = planes * a["H"] * a["W"] * itemsize(a["dx"])
    return Traffic(planes * loaded * size, written, planes * a["P"] * a["Q"] * size + written)
