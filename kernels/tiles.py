"""Tiles: what they are, which are valid, and which one a problem gets."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU

FORMULATIONS = ("pixel", "box", "gather")
PASSES = ("fprop", "dgrad", "wgrad")
MAX_NUMEL = 1 << 20  # Triton's limit for the elements of one block


@dataclass(frozen=True)
class ConvTile:
    """What one program of a convolution kernel makes, or in wgrad sums over: a box of output pixels x block_k filters.

    `box` is (images, rows, columns).  "pixel" has one row and one column; "gather" counts flat pixels in box[0].
    `block_c` is the depth of one step; `flat` steps through (r, s, c) flattened instead of through the channels.
    `block_k2` filters more share its pixels in a second product.  `splits` programs share the depth of a tile: of all
    tiles, or of the last `tail` ones, those that would leave most of the GPU idle in their wave.
    In wgrad the box is the depth of a step, block_k x block_c is what a program makes, and `splits` share the pixels.
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

    @property
    def rows(self) -> int:
        """Filters of a program."""
        return self.block_k + self.block_k2

    @property
    def pixels(self) -> int:
        return math.prod(self.box)

    def __str__(self) -> str:
        box = "x".join(map(str, self.box)) if self.formulation == "box" else str(self.pixels)
        flat = " flat" if self.flat else ""
        splits = (f" /{self.splits}" + (f" of {self.tail}" if self.tail else "")) if self.splits > 1 else ""
        rows = f"({self.block_k}+{self.block_k2})" if self.block_k2 else str(self.block_k)
        size = f"{box}*{rows}*{self.block_c}"
        return f"{self.formulation} {size}{flat}{splits} w{self.num_warps} s{self.num_stages}"


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def addressable(problem: Conv2dProblem, pass_: str, dtype: torch.dtype) -> bool:
    """Whether tensor descriptors reach the operands: every row pitch a multiple of 16 bytes, no 8-byte elements."""
    pitches = [problem.group_channels] + ([] if pass_ == "fprop" else [problem.group_filters])
    return dtype.itemsize <= 4 and all(pitch * dtype.itemsize % 16 == 0 for pitch in pitches)


def why_invalid(tile: ConvTile, problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> str | None:
    """The one predicate: None if `tile` can run `problem` on `gpu`, else the reason why not."""
    extents = {"box": tile.pixels, "block_k": tile.block_k, "block_c": tile.block_c}
    if tile.formulation not in FORMULATIONS:
        return f"formulation={tile.formulation!r} is unknown: allowed are {', '.join(FORMULATIONS)}"
    for name, extent in extents.items():
        if extent < 16 or extent != power_of_two(extent):
            return f"{name}={extent} must be a power of two of at least 16"
    if tile.block_k2 and (tile.block_k2 != power_of_two(tile.block_k2) or not 16 <= tile.block_k2 < tile.block_k):
        return f"block_k2={tile.block_k2} must be 0 or a power of two of at least 16, below block_k={tile.block_k}"
    if tile.splits < 1 or tile.tail < 0:
        return f"splits={tile.splits} must be at least 1 and tail={tile.tail} at least 0"
    if (tile.block_k2 or (tile.splits > 1 and pass_ != "wgrad")) and tile.formulation == "gather":
        return "formulation='gather' has no second product and no splits"
    if tile.block_k2 and pass_ == "wgrad":
        return "block_k2 is not for wgrad"
    if max(tile.block_k * tile.pixels, max(tile.block_k, tile.pixels) * tile.block_c) > MAX_NUMEL:
        return f"{tile} has a block of more than {MAX_NUMEL} elements"
    if tile.formulation == "gather":
        return None if tile.box[1:] == (1, 1) else f"box={tile.box}: gather counts flat pixels in box[0]"
    if not gpu.has_descriptors:
        return f"formulation={tile.formulation!r} needs tensor descriptors (sm_90 or newer); this is {gpu.name}"
    if not addressable(problem, pass_, dtype):
        return (
            f"formulation={tile.formulation!r} needs a group's channels (its filters too in dgrad and wgrad) in "
            f"multiples of 16 bytes: {problem.group_channels} channels, {problem.group_filters} filters of {dtype}"
        )
    if tile.formulation == "pixel":
        return None if tile.box[1:] == (1, 1) else f"box={tile.box}: pixel takes one row and one column"
    if problem.stride != (1, 1):
        return f"formulation='box' needs stride 1, this problem has {problem.stride}"
    return None


def first_layer(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> bool:
    """Whether a pass runs on problem.space_to_depth: few channels and a stride, so that no descriptor fits as it is."""
    few = problem.C <= 4 and max(problem.stride) > 1 and problem.dilation == (1, 1) and problem.groups == 1
    if not few or pass_ == "dgrad" or _forced().get("formulation") == "gather":
        return False
    return gpu.has_descriptors and addressable(problem.space_to_depth, pass_, dtype)


def formulations(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> tuple[str, ...]:
    """The formulations that can run a pass, for tests and benchmarks that force each in turn."""
    inner = problem.space_to_depth if first_layer(problem, pass_, dtype, gpu) else problem
    tiles = {name: _choose(inner, pass_, dtype, "ieee", gpu, name) for name in FORMULATIONS}
    return tuple(name for name, tile in tiles.items() if why_invalid(tile, inner, pass_, dtype, gpu) is None)


_overrides: list[dict[str, object]] = []


@contextlib.contextmanager
def override(**changes: object) -> Iterator[None]:
    """Force fields of ConvTile (such as `formulation="gather"`) for every choice in the block: tests and benchmarks.

    A choice that cannot honour them raises ValueError; nothing falls back.
    """
    unknown = set(changes) - {field.name for field in fields(ConvTile)}
    if unknown:
        raise TypeError(f"override has no field {sorted(unknown)}: allowed are {[f.name for f in fields(ConvTile)]}")
    if (wanted := changes.get("formulation")) not in (None, *FORMULATIONS):
        raise ValueError(f"formulation={wanted!r} is unknown: allowed are {', '.join(FORMULATIONS)}")
    _overrides.append(changes)
    try:
        yield
    finally:
        _overrides.remove(changes)


def _forced() -> dict[str, object]:
    return {name: value for override_ in _overrides for name, value in override_.items()}


def choose(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> ConvTile:
    """The tile for one pass of a problem: a pure function of its arguments, outside `override`.

    A dgrad problem is the rephrased one, geometry.DgradPart.problem.
    """
    changes = _forced()
    if not changes:
        return _choose(problem, pass_, dtype, precision, gpu, None)
    formulation = changes.pop("formulation", None)
    tile = replace(_choose(problem, pass_, dtype, precision, gpu, formulation), **changes)  # type: ignore[arg-type]
    if reason := why_invalid(tile, problem, pass_, dtype, gpu):
        raise ValueError(f"the tile override cannot be honoured: {reason}")
    return tile


@lru_cache(maxsize=4096)
def _choose(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU, formulation: object
) -> ConvTile:
    if formulation is None:
        formulation = _formulation(problem, pass_, dtype, gpu)
    if gpu.interprets:
        return _interpreter_tile(problem, pass_, str(formulation))
    if pass_ == "wgrad":
        return _gpu_wgrad_tile(problem, str(formulation), dtype, precision, gpu)
    return _gpu_tile(problem, str(formulation), dtype, precision, gpu)


def _formulation(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> str:
    if not gpu.has_descriptors or not addressable(problem, pass_, dtype):
        return "gather"
    one_pixel = problem.P * problem.Q == 1
    # In the interpreter a program costs more than its arithmetic, so one program an output pixel is the slow way.
    if one_pixel or (problem.N >= 64 and not gpu.interprets):
        return "pixel"
    return "box" if problem.stride == (1, 1) else "gather"


def _interpreter_tile(problem: Conv2dProblem, pass_: str, formulation: str) -> ConvTile:
    """Large blocks: a program costs about 0.4 ms of Python and a step 1.5 ms, whatever its size."""
    n, p, q = (power_of_two(extent) for extent in (problem.N, problem.P, problem.Q))
    flat = formulation == "gather" and (pass_ == "wgrad" or problem.group_channels < 16)
    depth = problem.taps * problem.group_channels if flat else problem.group_channels
    block_c = min(max(power_of_two(depth), 16), 1024)
    pixels = min(4096, MAX_NUMEL // block_c)
    if formulation == "pixel":
        box = (min(max(n, 16), pixels), 1, 1)
    elif formulation == "gather":
        box = (min(max(power_of_two(problem.N * problem.P * problem.Q), 16), pixels), 1, 1)
    else:
        columns = min(q, pixels)
        rows = min(p, pixels // columns)
        images = min(n, pixels // (columns * rows))
        box = (max(images, 16 // (rows * columns)), rows, columns)
    filters_at_once = min(MAX_NUMEL // max(math.prod(box), block_c), 1024)
    block_k = min(max(power_of_two(problem.group_filters), 16), filters_at_once)
    return ConvTile(formulation, box, block_k, block_c, flat=flat)


def _gpu_wgrad_tile(problem: Conv2dProblem, formulation: str, dtype: torch.dtype, precision: str, gpu: GPU) -> ConvTile:
    channels = problem.group_channels * (problem.taps if formulation == "gather" else 1)
    if dtype == torch.float64 or (dtype == torch.float32 and precision == "ieee"):
        tile = ConvTile(formulation, (16, 1, 1), 32, 32, 4, 2)
    else:
        depth = 64 // dtype.itemsize if formulation == "gather" else 128 // dtype.itemsize
        block_k = 128 if problem.group_filters % 128 == 0 else 64 if problem.group_filters > 32 else 32
        block_c = 128 if channels % 128 == 0 else 64 if channels > 32 else 32
        warps = 8 if formulation == "gather" else 4
        tile = ConvTile(formulation, (depth, 1, 1), block_k, block_c, warps, 3)
    tile = replace(_with_box(tile, problem), flat=formulation == "gather")
    taps = 1 if tile.flat else problem.taps
    programs = -(-channels // tile.block_c) * -(-problem.group_filters // tile.block_k) * taps * problem.groups
    steps = max(1, problem.N * problem.P * problem.Q // tile.pixels)
    # Two programs an SM, as long as a split still has eight steps to pay for its slice.
    return replace(tile, splits=max(1, min(-(-2 * gpu.sms // programs), steps // 8)))


def _gpu_tile(problem: Conv2dProblem, formulation: str, dtype: torch.dtype, precision: str, gpu: GPU) -> ConvTile:
    filters = problem.group_filters
    if dtype == torch.float64:
        return _with_box(ConvTile("gather", (32, 1, 1), 32, 16, 4, 2), problem)
    if dtype == torch.float32 and precision == "ieee":  # FFMA: registers, not tensor cores, set the size
        return _with_box(ConvTile(formulation, (64, 1, 1), 64, 16, 4, 2), problem)
    depth = 64 // dtype.itemsize if formulation == "gather" else 128 // dtype.itemsize
    # Whole columns beat wide tiles: 192 filters are three tiles of 64, not one and a half of 128.
    block_k = 128 if filters % 128 == 0 or filters > 256 else 64 if filters > 32 else max(16, power_of_two(filters))
    if formulation == "gather" and problem.group_channels < 16:
        # Two-byte loads and their addresses fill the registers: 64 filters and 8 warps are the most without spills.
        return ConvTile(formulation, (128, 1, 1), min(block_k, 64), 32, 8, 2, flat=True)
    stages = 4 if gpu.shared_block > 200_000 or formulation == "gather" else 2
    if dtype == torch.float32 and formulation == "gather":
        block_k, stages = min(block_k, 64), 3
    return _with_box(ConvTile(formulation, (128, 1, 1), block_k, depth, 4, stages), problem)


def _with_box(tile: ConvTile, problem: Conv2dProblem) -> ConvTile:
    """Shape the tile's pixels for its formulation: the box that wastes fewest pixels of a small batch."""
    if tile.formulation == "gather":
        return replace(tile, flat=problem.group_channels < 16)
    if tile.formulation == "pixel":
        return tile
    boxes = [
        (images, tile.pixels // images // columns, columns)
        for images in _powers(min(power_of_two(problem.N), tile.pixels))
        for columns in _powers(min(power_of_two(problem.Q), tile.pixels // images))
    ]

    def covered(box: tuple[int, int, int]) -> int:
        extents = zip((problem.N, problem.P, problem.Q), box, strict=True)
        return math.prod(-(-extent // size) * size for extent, size in extents)

    return replace(tile, box=min(boxes, key=lambda box: (covered(box), box[0])))


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length())]


@dataclass(frozen=True)
class ElementwiseTile:
    """What one program of a memory-bound kernel makes: rows x cols elements, cols along the contiguous axis."""

    rows: int
    cols: int
    num_warps: int = 4

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols} w{self.num_warps}"


def choose_elementwise(height: int, width: int, dtype: torch.dtype, gpu: GPU) -> ElementwiseTile:
    """The tile for `height` rows of `width` contiguous elements: 16 bytes a thread and load, four times over."""
    budget = 1 << 18 if gpu.interprets else 128 * 4 * 16 // dtype.itemsize // 2
    cols = min(power_of_two(max(width, 1)), budget)
    return ElementwiseTile(max(1, min(power_of_two(max(height, 1)), budget // cols)), cols)
