"""Tiles of convolution kernels: what they are, and which ones can run a problem."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tileconv.kernels import fp32
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU

FORMULATIONS = ("pixel", "box", "gather")
PASSES = ("fprop", "dgrad", "wgrad")
MAX_NUMEL = 1 << 20  # Triton's limit for the elements of one block
MOST_ROWS = 4  # of a program whose second product is turned
WARPS = (1, 2, 4, 8, 16, 32)  # of one block: 1,024 threads at the most


@dataclass(frozen=True)
class ConvTile:
    """What one program of a convolution kernel makes, or in wgrad sums over: a box of output pixels x block_k filters.

    `box` is (images, rows, columns).  "pixel" has one row and one column; "gather" counts flat pixels in box[0].
    `block_c` is the depth of one step; `flat` steps through (r, s, c) flattened instead of through the channels.
    `block_k2` filters more share its pixels in a second product.  `splits` programs share the depth of a tile: of all
    tiles, or of the last `tail` ones, those that would leave most of the GPU idle in their wave; with `tail` and one
    split they share the filters of those, block_k2 each.  With `columns` above one a program makes so many columns of
    the output from a box of one: block_k counts through the filters of all of them.  With `half` a program makes half a
    box more with the same filters: boxes cover the first columns of the output, half boxes the others; with `columns`
    the half box lies below the box.  `across` turns the second product, so that its filters are columns, which may be
    32, and pixels rows; its box is pixels of neighbouring rows.
    In wgrad the box is the depth of a step, a program makes rows x block_c of `taps` (1 to 5) taps, with `half` half as
    many channels more of one tap, and `splits` share the pixels.  With `last` the taps that are left over have
    programs of their own, of which so many share the pixels.
    """

    formulation: str
    box: tuple[int, int, int]
    block_k: int
    block_c: int
    num_warps: int = 4
    num_stages: int = 3
    flat: bool = False
    splits: int = 1
    block_k2: int = 0
    tail: int = 0
    taps: int = 1
    columns: int = 1
    half: bool = False
    last: int = 0
    across: bool = False

    @property
    def rows(self) -> int:
        """Filters of a program."""
        return self.block_k + self.block_k2

    @property
    def filters(self) -> int:
        """Different filters of a program."""
        return self.rows // self.columns

    @property
    def pixels(self) -> int:
        return math.prod(self.box)

    @property
    def channels(self) -> int:
        """Channels that a program of wgrad makes of a tap."""
        return self.block_c + self.block_c // 2 * self.half

    def of_last(self, problem: Conv2dProblem) -> ConvTile | None:
        """What a program of wgrad makes that makes the taps that are left over."""
        return replace(self, taps=problem.taps % self.taps, splits=self.last, last=0) if self.last else None

    @property
    def narrow(self) -> ConvTile | None:
        """What a program makes that shares the filters of one of the last tiles."""
        if not self.tail or self.splits > 1:
            return None
        return replace(self, block_k=self.block_k2, block_k2=0, tail=0)

    @property
    def half_box(self) -> tuple[int, int, int] | None:
        """Half a box: of its images, or of its columns if it has but one image; of its rows with `columns`."""
        if not self.half:
            return None
        n, h, w = self.box
        if self.columns > 1:
            return n, h // 2, w
        return (n // 2, h, w) if n > 1 else (n, h, w // 2)

    def whole_columns(self, problem: Conv2dProblem) -> int:
        """With `half`, of one column: the columns that boxes cover so that the fewest programs make all outputs."""
        assert self.half_box is not None
        # More columns take programs for boxes and save those for half boxes: the fewest are where the two meet.
        whole, half = (-(-problem.N // box[0]) / box[2] for box in (self.box, self.half_box))
        near = int(problem.Q * half / (whole + half)) // self.box[2] * self.box[2]
        candidates = range(near - self.box[2], near + 3 * self.box[2], self.box[2])
        inside = [columns for columns in candidates if self.box[2] <= columns < problem.Q]
        return min(inside, key=lambda columns: self._in_row(problem, columns))

    def _in_row(self, problem: Conv2dProblem, whole: int) -> int:
        """Programs of one row of boxes, where boxes cover the first `whole` columns and half boxes the others."""
        assert self.half_box is not None
        return max(
            -(-problem.N // box[0]) * -(-columns // box[2])
            for box, columns in ((self.box, whole), (self.half_box, problem.Q - whole))
        )

    def boxes(self, problem: Conv2dProblem) -> int:
        """How many boxes cover the outputs of one group; a box stands for `columns` of them.

        With `half` a box and the half box beside it count as one.
        """
        n, h, w = self.box
        if self.formulation == "gather":
            return -(-problem.N * problem.P * problem.Q // n)
        if self.half and self.columns == 1:
            return -(-problem.P // h) * self._in_row(problem, self.whole_columns(problem))
        h += h // 2 * self.half
        return -(-problem.N // n) * -(-problem.P // h) * -(-problem.Q // (w * self.columns))

    def __str__(self) -> str:
        box = str(self.pixels) if self.pixels == self.box[0] else "x".join(map(str, self.box))
        flat = " flat" if self.flat else ""
        splits = f" /{self.splits}" if self.splits > 1 else f" by {self.block_k2}" if self.tail else ""
        splits += f" of {self.tail}" if self.tail else f" last /{self.last}" if self.last else ""
        rows = f"({self.block_k}+{self.block_k2})" if self.block_k2 else str(self.block_k)
        rows = f"{self.columns}x{self.filters}" if self.columns > 1 else rows
        size = f"{box}*{rows}*{self.block_c}" + (f"*{self.taps} taps" if self.taps > 1 else "")
        size += " +half" if self.half else " across" if self.across else ""
        return f"{self.formulation} {size}{flat}{splits} w{self.num_warps} s{self.num_stages}"


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to `limit`."""
    return [1 << i for i in range(limit.bit_length())]


def addressable(problem: Conv2dProblem, pass_: str, dtype: torch.dtype) -> bool:
    """Whether tensor descriptors reach the operands: every row pitch a multiple of 16 bytes, no 8-byte elements."""
    pitches = [problem.group_channels] + ([] if pass_ == "fprop" else [problem.group_filters])
    return dtype.itemsize <= 4 and all(pitch * dtype.itemsize % 16 == 0 for pitch in pitches)


def why_invalid(
    tile: ConvTile, problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU
) -> str | None:
    """The one predicate: None if `tile` can run `problem` on `gpu`, else the reason why not.

    dtype is that of the layer's operands; at some precisions kernels read parts of them.
    """
    read = fp32.multiplied(dtype, precision)
    extents = {"box": tile.box[0] if tile.across else tile.pixels, "block_k": tile.block_k, "block_c": tile.block_c}
    if tile.formulation not in FORMULATIONS:
        return f"formulation={tile.formulation!r} is unknown: allowed are {', '.join(FORMULATIONS)}"
    if len(tile.box) != 3 or min(tile.box) < 1:
        return f"box={tile.box} must be images, rows and columns, each at least 1"
    for name, extent in extents.items():
        if extent < 16 or extent != power_of_two(extent):
            return f"{name}={extent} must be a power of two of at least 16"
    if tile.num_warps not in WARPS:
        return f"num_warps={tile.num_warps}: allowed are {', '.join(map(str, WARPS))}"
    if tile.num_stages < 1:
        return f"num_stages={tile.num_stages} must be at least 1"
    if tile.columns != 1:
        ready = problem.together and problem.stride[1] == problem.dilation[1] == tile.box[2] == 1
        ready = ready and (tile.across or not tile.block_k2)
        if tile.columns < 1 or tile.formulation == "gather" or not ready:
            return (
                f"columns={tile.columns}: allowed is 1, and more in input gradients with pixel or box of one column, "
                "stride and dilation 1 along it, several taps, and block_k2=0 or across"
            )
        if problem.group_filters > tile.filters:
            return f"columns={tile.columns} of {problem.group_filters} channels are more than block_k={tile.block_k}"
    if tile.block_k2 and (tile.block_k2 != power_of_two(tile.block_k2) or not 16 <= tile.block_k2 < tile.block_k):
        return f"block_k2={tile.block_k2} must be 0 or a power of two of at least 16, below block_k={tile.block_k}"
    if tile.half:
        ready = tile.box[1] > 1 if tile.columns > 1 else tile.box[0] * tile.box[2] > 1 and tile.box[2] < problem.Q
        ready = ready and tile.splits == 1
        if pass_ == "wgrad":
            ready = tile.taps == 1 and tile.block_c >= 32
        if tile.formulation == "gather" or not ready:
            return (
                "half needs box or pixel; in fprop and dgrad splits 1, a box of two images or columns and columns "
                "beside it (with columns a box of two rows); in wgrad taps 1 and block_c of at least 32"
            )
    if tile.splits < 1 or tile.tail < 0:
        return f"splits={tile.splits} must be at least 1 and tail={tile.tail} at least 0"
    if tile.narrow and (pass_ == "wgrad" or tile.half or not tile.block_k2):
        return f"tail={tile.tail} with splits=1 needs fprop or dgrad, and block_k2 filters beside block_k, without half"
    if tile.narrow and fp32.parts(precision) > 1:
        return f"tail={tile.tail} with splits=1 multiplies no parts, and precision={precision!r} does"
    if (tile.block_k2 or tile.tail) and tile.formulation == "gather":
        return "formulation='gather' has no second product, and all its tiles are shared or none (tail=0)"
    if tile.splits > 1 and tile.flat and pass_ != "wgrad":
        return f"splits={tile.splits} needs fprop and dgrad that step through channels (flat=False), or wgrad"
    if tile.taps not in (range(1, 6) if pass_ == "wgrad" and tile.formulation != "gather" else (1,)):
        return f"taps={tile.taps}: allowed are 1, and 2 to 5 in wgrad where formulation is not gather"
    left = problem.taps % tile.taps if tile.taps < problem.taps else 0
    if tile.last and (not left or not 1 <= tile.last <= tile.splits):
        return (
            f"last={tile.last} needs wgrad and taps left over of {problem.taps}, taps={tile.taps} at a time, and is at "
            f"most splits={tile.splits}"
        )
    if max(tile.block_k * tile.pixels, max(tile.block_k, tile.pixels) * tile.block_c) > MAX_NUMEL:
        return f"{tile} has a block of more than {MAX_NUMEL} elements"
    if tile.across and (reason := _not_across(tile, pass_, precision)):
        return reason
    if tile.formulation == "gather":
        return None if tile.box[1:] == (1, 1) else f"box={tile.box}: gather counts flat pixels in box[0]"
    if not gpu.has_descriptors:
        return f"formulation={tile.formulation!r} needs tensor descriptors (sm_90 or newer); this is {gpu.name}"
    if not addressable(problem, pass_, read):
        return (
            f"formulation={tile.formulation!r} needs a group's channels (its filters too in dgrad and wgrad) in "
            f"multiples of 16 bytes: {problem.group_channels} channels, {problem.group_filters} filters of {read}"
        )
    if tile.formulation == "pixel":
        one = tile.box[1:] == (1, 1) or (tile.across and tile.box[2] == 1)
        return None if one else f"box={tile.box}: pixel takes one row and one column"
    if problem.stride != (1, 1):
        return f"formulation='box' needs stride 1, this problem has {problem.stride}"
    return None


def _not_across(tile: ConvTile, pass_: str, precision: str) -> str | None:
    """Why a tile cannot turn its second product, or None."""
    alone = tile.splits == 1 and not (tile.tail or tile.half) and fp32.parts(precision) == 1
    if pass_ != "wgrad" and tile.formulation == "pixel" and tile.block_k2 and alone and tile.box[1] <= MOST_ROWS:
        return None
    return (
        f"across=True needs fprop or dgrad, pixel of up to {MOST_ROWS} rows, block_k2, splits=1, no tail or half, and "
        "a precision that multiplies no parts"
    )
