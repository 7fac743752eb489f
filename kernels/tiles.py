"""Tiles: what they are, which are valid, and which one a problem gets."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

from tileconv.kernels import cost, excluded, fp32
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU, triton_version

FORMULATIONS = ("pixel", "box", "gather")
PASSES = ("fprop", "dgrad", "wgrad")
MAX_NUMEL = 1 << 20  # Triton's limit for the elements of one block
BATCHES = (1, 8, 32, 128)  # what a choice that may not depend on the batch is weighed for


@dataclass(frozen=True)
class ConvTile:
    """What one program of a convolution kernel makes, or in wgrad sums over: a box of output pixels x block_k filters.

    `box` is (images, rows, columns).  "pixel" has one row and one column; "gather" counts flat pixels in box[0].
    `block_c` is the depth of one step; `flat` steps through (r, s, c) flattened instead of through the channels.
    `block_k2` filters more share its pixels in a second product.  `splits` programs share the depth of a tile: of all
    tiles, or of the last `tail` ones, those that would leave most of the GPU idle in their wave.  With `shift` the
    second product makes the next output column, from the same pixels and the same filters.  With `half` a program makes
    half a box more with the same filters: boxes cover the first columns of the output, half boxes the others; with
    `shift` the half box lies below the box.
    In wgrad the box is the depth of a step, a program makes rows x block_c of `taps` (1 or 2) taps, with `half` half as
    many channels more of one tap, and `splits` share the pixels.
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
    shift: bool = False
    half: bool = False

    @property
    def rows(self) -> int:
        """Filters of a program."""
        return self.block_k + self.block_k2

    @property
    def filters(self) -> int:
        """Different filters of a program."""
        return self.block_k if self.shift else self.rows

    @property
    def pixels(self) -> int:
        return math.prod(self.box)

    @property
    def channels(self) -> int:
        """Channels that a program of wgrad makes of a tap."""
        return self.block_c + self.block_c // 2 * self.half

    @property
    def half_box(self) -> tuple[int, int, int] | None:
        """Half a box: of its images, or of its columns if it has but one image; of its rows with `shift`."""
        if not self.half:
            return None
        n, h, w = self.box
        if self.shift:
            return n, h // 2, w
        return (n // 2, h, w) if n > 1 else (n, h, w // 2)

    def whole_columns(self, problem: Conv2dProblem) -> int:
        """With `half`, not `shift`: how many columns of the output boxes cover so that the fewest programs make all."""
        return min(range(self.box[2], problem.Q, self.box[2]), key=lambda columns: self._in_row(problem, columns))

    def _in_row(self, problem: Conv2dProblem, whole: int) -> int:
        """Programs of one row of boxes, where boxes cover the first `whole` columns and half boxes the others."""
        assert self.half_box is not None
        return max(
            -(-problem.N // box[0]) * -(-columns // box[2])
            for box, columns in ((self.box, whole), (self.half_box, problem.Q - whole))
        )

    def boxes(self, problem: Conv2dProblem) -> int:
        """How many boxes cover the outputs of one group; with `shift` a box stands for two columns.

        With `half` a box and the half box beside it count as one.
        """
        n, h, w = self.box
        if self.half and not self.shift:
            return -(-problem.P // h) * self._in_row(problem, self.whole_columns(problem))
        h += h // 2 * self.half
        return -(-problem.N // n) * -(-problem.P // h) * -(-problem.Q // (w + self.shift))

    def __str__(self) -> str:
        box = "x".join(map(str, self.box)) if self.formulation == "box" else str(self.pixels)
        flat = " flat" if self.flat else ""
        splits = (f" /{self.splits}" + (f" of {self.tail}" if self.tail else "")) if self.splits > 1 else ""
        rows = f"({self.block_k}+{self.block_k2})" if self.block_k2 else str(self.block_k)
        rows = f"2x{self.block_k}" if self.shift else rows
        size = f"{box}*{rows}*{self.block_c}" + (f"*{self.taps} taps" if self.taps > 1 else "")
        size += " +half" if self.half else ""
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
    if tile.shift:
        ready = problem.stride[1] == problem.dilation[1] == tile.box[2] == 1 and tile.block_k2 == tile.block_k
        if pass_ == "wgrad" or tile.formulation == "gather" or not ready:
            return (
                "shift needs fprop or dgrad, one column a box, stride and dilation 1 along it, and block_k2 = block_k"
            )
    elif tile.block_k2 and (tile.block_k2 != power_of_two(tile.block_k2) or not 16 <= tile.block_k2 < tile.block_k):
        return f"block_k2={tile.block_k2} must be 0 or a power of two of at least 16, below block_k={tile.block_k}"
    if tile.half:
        ready = tile.box[1] > 1 if tile.shift else tile.box[0] * tile.box[2] > 1 and tile.box[2] < problem.Q
        ready = ready and tile.splits == 1
        if pass_ == "wgrad":
            ready = tile.taps == 1 and tile.block_c >= 32
        if tile.formulation == "gather" or not ready:
            return (
                "half needs box or pixel; in fprop and dgrad splits 1, a box of two images or columns and columns "
                "beside it (with shift a box of two rows); in wgrad taps 1 and block_c of at least 32"
            )
    if tile.splits < 1 or tile.tail < 0:
        return f"splits={tile.splits} must be at least 1 and tail={tile.tail} at least 0"
    if (tile.block_k2 or (tile.splits > 1 and pass_ != "wgrad")) and tile.formulation == "gather":
        return "formulation='gather' has no second product and no splits"
    if tile.taps not in ((1, 2) if pass_ == "wgrad" and tile.formulation != "gather" else (1,)):
        return f"taps={tile.taps}: allowed are 1, and 2 in wgrad where formulation is not gather"
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
    if not few or pass_ == "dgrad" or forced().get("formulation") == "gather":
        return False
    return gpu.has_descriptors and addressable(problem.space_to_depth, pass_, dtype)


def formulations(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU, precision: str = "ieee"
) -> tuple[str, ...]:
    """The formulations that can run a pass, for tests and benchmarks that force each in turn."""
    inner = problem.space_to_depth if first_layer(problem, pass_, dtype, gpu) else problem
    tiles = {name: _choose(inner, pass_, dtype, precision, gpu, name) for name in FORMULATIONS}
    read = fp32.multiplied(dtype, precision)
    return tuple(name for name, tile in tiles.items() if why_invalid(tile, inner, pass_, read, gpu) is None)


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


def forced() -> dict[str, object]:
    """What the overrides in force ask for."""
    return {name: value for override_ in _overrides for name, value in override_.items()}


def choose(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU, *, batch_invariant: bool = False
) -> ConvTile:
    """The tile for one pass of a problem: a pure function of its arguments, outside `override`.

    A dgrad problem is the rephrased one, geometry.DgradPart.problem.  With batch_invariant problem.N has no say in the
    order in which an output is summed (`order`).
    """
    changes = forced()
    if not changes:
        return _choose(problem, pass_, dtype, precision, gpu, None, batch_invariant)
    formulation = changes.pop("formulation", None)
    chosen = _choose(problem, pass_, dtype, precision, gpu, formulation, batch_invariant)
    tile = replace(chosen, **changes)  # type: ignore[arg-type]
    if reason := why_invalid(tile, problem, pass_, fp32.multiplied(dtype, precision), gpu):
        raise ValueError(f"the tile override cannot be honoured: {reason}")
    return tile


@lru_cache(maxsize=4096)
def _choose(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU, formulation: object,
    batch_invariant: bool = False,
) -> ConvTile:  # fmt: skip
    if gpu.interprets:
        wanted = str(formulation or _interpreter_formulation(problem, pass_, fp32.multiplied(dtype, precision)))
        if not batch_invariant:
            return _interpreter_tile(problem, pass_, wanted)
        # There numpy's library adds in an order that the shape of a block decides, and from 32 columns on the column.
        tile = _interpreter_tile(replace(problem, N=1), pass_, wanted)
        return tile if wanted == "box" else replace(tile, box=(16, 1, 1))
    only = None if formulation is None else str(formulation)
    if only is None and not batch_invariant:
        from tileconv.kernels import tuned  # it reads ConvTile and why_invalid from here

        if (measured := tuned.find(problem, pass_, dtype, precision, gpu)) is not None:
            return measured
    best = _best_for_any_batch if batch_invariant else _best
    return best(problem, pass_, only, dtype, precision, gpu)


def _interpreter_formulation(problem: Conv2dProblem, pass_: str, dtype: torch.dtype) -> str:
    if not addressable(problem, pass_, dtype):
        return "gather"
    # A program costs more than its arithmetic there, so one program an output pixel is the slow way.
    if problem.P * problem.Q == 1:
        return "pixel"
    return "box" if problem.stride == (1, 1) else "gather"


def _interpreter_tile(problem: Conv2dProblem, pass_: str, formulation: str) -> ConvTile:
    """Large blocks: a program costs about 0.4 ms of Python and a step 1.5 ms, whatever its size."""
    n, p, q = (power_of_two(extent) for extent in (problem.N, problem.P, problem.Q))
    flat = formulation == "gather" and (pass_ == "wgrad" or problem.group_channels < 16)
    depth = problem.taps * problem.group_channels if flat else problem.group_channels
    block_c = min(max(power_of_two(depth), 16), 1024)
    pixels = min(16_384 if block_c <= 32 else 4096, MAX_NUMEL // block_c)
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


def _best(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> ConvTile:
    """The candidate with the least predicted time; of equals the first."""
    found = ranked(problem, pass_, formulation, dtype, precision, gpu)
    return found[0] if found else _impossible(formulation)


def _impossible(formulation: str | None) -> ConvTile:
    """For a formulation that was asked for and cannot run: choose() says why."""
    return ConvTile(str(formulation), (64, 1, 1), 64, 32)


def ranked(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> list[ConvTile]:
    """The candidates by predicted time, the quickest first."""
    valid = _valid(problem, pass_, formulation, dtype, precision, gpu)
    return sorted(valid, key=lambda tile: _time(tile, problem, pass_, dtype, precision, gpu))


def order(tile: ConvTile) -> tuple[object, ...]:
    """What decides in which order an output of fprop or dgrad is summed; for equal ones it has the same bits.

    Programs that share a depth divide the steps of their box, and how many those are depends on where its pixels lie.
    Which tiles are shared with a tail depends on the batch.
    """
    rows_and_columns = tile.box[1:] if tile.splits > 1 else None
    return tile.formulation, tile.block_c, tile.flat, tile.shift, tile.splits, tile.tail, rows_and_columns


def _best_for_any_batch(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> ConvTile:
    """The quickest candidate of those that add in the one order that serves batches of all sizes."""
    if not _valid(problem, pass_, formulation, dtype, precision, gpu):
        return _impossible(formulation)
    wanted = _order_for_any_batch(replace(problem, N=1), pass_, formulation, dtype, precision, gpu)
    found: list[ConvTile] = []
    for batch in (problem.N, *BATCHES):
        valid = _valid(replace(problem, N=batch), pass_, formulation, dtype, precision, gpu)
        if found := [tile for tile in valid if order(tile) == wanted]:
            break
    return min(found, key=lambda tile: _time(tile, problem, pass_, dtype, precision, gpu))


@lru_cache(maxsize=1024)
def _order_for_any_batch(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> tuple[object, ...]:
    """The order whose best tile is the least behind the best of all where it is furthest behind, over BATCHES."""
    times: dict[tuple[object, ...], list[float]] = {}
    for i, batch in enumerate(BATCHES):
        sized = replace(problem, N=batch)
        for tile in _valid(sized, pass_, formulation, dtype, precision, gpu):
            if not tile.tail:
                row = times.setdefault(order(tile), [math.inf] * len(BATCHES))
                row[i] = min(row[i], _time(tile, sized, pass_, dtype, precision, gpu))
    best = [min(column) for column in zip(*times.values(), strict=True)]
    return min(times, key=lambda key: max(time / least for time, least in zip(times[key], best, strict=True)))


def _valid(
    problem: Conv2dProblem, pass_: str, formulation: str | None, dtype: torch.dtype, precision: str, gpu: GPU
) -> list[ConvTile]:
    """The candidates that can run, and of them those that the model may weigh against each other."""
    read = fp32.multiplied(dtype, precision)
    valid = [
        tile
        for tile in candidates(problem, pass_, dtype, precision, gpu)
        if formulation in (None, tile.formulation) and why_invalid(tile, problem, pass_, read, gpu) is None
    ]
    if formulation is None and problem.stride == (1, 1):
        # Pointers are for what descriptors cannot address, and for strides at small batches: the model knows too little
        # of them to weigh the two.
        valid = [tile for tile in valid if tile.formulation != "gather"] or valid
    return valid


def _time(
    tile: ConvTile, problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU
) -> float:  # fmt: skip
    predicted = cost.predict(problem, pass_, tile, dtype, precision, gpu)
    us = cost.weighed_us(predicted, gpu)
    if pass_ == "wgrad" and tile.formulation == "pixel" and cost.turned(problem, dtype, precision, gpu):
        us += cost.turn_us(problem, dtype, gpu)
    # Tensor cores of half the width (sm_86, sm_89) hide any tile's instructions and traffic; they cost power still.
    return us if gpu.arch >= 90 else us + 0.2 * (predicted.issue_us + predicted.l2_us)


def candidates(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> list[ConvTile]:
    """The tiles that a chooser weighs: the clean ones that no self-test on this GPU excluded."""
    return excluded.without(clean_candidates(problem, pass_, dtype, precision, gpu), gpu.name, pass_)


def clean_candidates(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU
) -> list[ConvTile]:  # fmt: skip
    """The tiles that compile to clean loops, see tests/test_inspect.py."""
    if dtype == torch.float64 or (dtype == torch.float32 and precision == "ieee"):
        return _scalar_candidates(problem, pass_, dtype, gpu)
    read = fp32.multiplied(dtype, precision)
    found = _gather_candidates(problem, pass_, read, gpu)
    if gpu.has_descriptors and addressable(problem, pass_, read):
        boxes = (
            _wgrad_candidates(problem, read, gpu) if pass_ == "wgrad" else _box_candidates(problem, pass_, read, gpu)
        )
        found = boxes + found
    return found if read == dtype else _of_parts(problem, pass_, found, precision, gpu)


def _of_parts(problem: Conv2dProblem, pass_: str, tiles: list[ConvTile], precision: str, gpu: GPU) -> list[ConvTile]:
    """Those of the tiles for bf16 that multiply the parts of fp32 without spilling, in sums that are not too long."""
    wgrad = pass_ == "wgrad"
    depth = problem.N * problem.P * problem.Q if wgrad else problem.taps * problem.group_channels
    least = -(-depth // fp32.LONGEST_SUM) if precision == "bf16x6" else 1
    wide = addressable(problem, pass_, torch.bfloat16)
    found = []
    for tile in tiles:
        if tile.half and least > 1 and not wgrad:
            continue  # it shares no depth
        size = tile.rows * (tile.channels * tile.taps if wgrad else tile.pixels + tile.pixels // 2 * tile.half)
        if tile.formulation == "gather":  # a step's products have a sum of their own before they are added
            most = (4096 if wgrad else 8192) // (1 if wide else 2)
            if size <= most and (tile.pixels if wgrad else tile.block_c) <= 32:  # steps of 64 spill
                found.append(replace(tile, num_warps=8) if size > 4096 or wgrad or not wide else tile)
            continue
        if gpu.arch >= 100 and (size > 32_768 or tile.taps == 2):
            continue
        # There fp32 outputs line up for their store.
        if not wgrad and 4 * tile.block_k * tile.pixels > gpu.shared_block:
            continue
        if (tile.block_k2 and tile.taps == 2) or (gpu.arch >= 100 and size > 16_384):
            tile = replace(tile, num_warps=8)
        found.append(tile if least == 1 else replace(tile, splits=max(tile.splits, least), tail=0))
    return list(dict.fromkeys(found))


def _depths(channels: int, dtype: torch.dtype) -> list[int]:
    """Steps of 128 bytes of the channels, and of half as many if they leave less of a tap's last step empty.

    Shorter ones have more barriers than products to hide them: 36 other instructions for each.
    """
    whole = 128 // dtype.itemsize
    covered, by_half = (-(-channels // depth) * depth for depth in (whole, whole // 2))
    return [whole, whole // 2] if by_half < covered else [whole]


def _box_candidates(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    found = []
    # Outputs that no descriptor reaches take an address each: compiled for sm_90, 192 of a thread spill 150 times, 128
    # of four bytes 102 times, and so do 64 where a second way out is for shared tiles.
    odd = problem.group_filters * dtype.itemsize % 16 != 0
    rows_of = ((64, 0), (128, 0), (256, 0), (128, 64), (64, 64), (128, 128))
    for depth, pixels, (block_k, block_k2), half in itertools.product(
        _depths(problem.group_channels, dtype), (64, 128, 256, 512), rows_of, (False, True)
    ):
        rows, shift = block_k + block_k2, block_k == block_k2
        columns = pixels + pixels // 2 * half
        # A shifted product multiplies pixels beyond its taps by zero: harmless in a gradient, but a forward pass would
        # carry a NaN or an infinity one column too far.
        if shift and (pass_ != "dgrad" or problem.stride[1] != 1 or problem.dilation[1] != 1 or problem.S == 1):
            continue
        # Sums of 24,576 elements are the most that four warps hold without spilling (219 registers), twice that eight.
        # Compiled for one tap, transposed filters of 128 rows or more wait for every product; 128 + 64 do not.
        if pass_ == "dgrad" and problem.taps == 1 and block_k > 64 and not block_k2:
            continue
        # Triton 3.6 makes products of 192 x 256 wait for each other; 3.7 does not.
        if rows * columns > 32_768 and triton_version() < (3, 7):
            continue
        if rows * columns > 49_152 or 64 < (block_k if shift else rows) > power_of_two(problem.group_filters):
            continue
        warps = 4 if rows * columns <= (32_768 // dtype.itemsize if odd else 24_576) else 8
        if odd and rows * columns > 65_536 // dtype.itemsize:
            continue
        most = 4 * 128 // (depth * dtype.itemsize)
        stages = min(most, (gpu.shared_block - 2048) // ((rows + columns) * depth * dtype.itemsize))
        if stages < 2:
            continue
        if half and (odd or pixels not in (128, 256)):
            continue
        # For sm_120, whose products take registers, half a box more spills 224 bytes and up, 2 x 128 filters 160.
        if gpu.arch >= 120 and (half or (shift and block_k > 64)):
            continue
        if dtype.itemsize * block_k * pixels > gpu.shared_block:  # outputs on their way out
            continue
        for box in _columns(problem, pixels, half) if shift else _boxes(problem, pixels):
            formulation = "pixel" if box[1:] == (1, 1) else "box"
            tile = ConvTile(formulation, box, block_k, depth, warps, stages, block_k2=block_k2, shift=shift, half=half)
            if half:
                found += [tile] if shift or (box[2] < problem.Q and box[0] * box[2] > 1) else []
                continue
            found += [tile, *_shared_depth(problem, tile, gpu)]
            if stages == most == 4:  # fewer buffers may let one more program onto the SM
                tile = replace(tile, num_stages=3)
                found += [tile, *_shared_depth(problem, tile, gpu)]
    return [tile for tile in found if not (odd and tile.tail)]


def _boxes(problem: Conv2dProblem, pixels: int) -> list[tuple[int, int, int]]:
    """One pixel of many images, and the boxes that waste fewest pixels."""
    images = min(power_of_two(problem.N), pixels)
    found = [(pixels, 1, 1)] if images == pixels or problem.stride != (1, 1) or problem.P * problem.Q == 1 else []
    if problem.stride != (1, 1):
        return found
    boxes = [
        (n, pixels // n // columns, columns)
        for n in _powers(images)
        for columns in _powers(min(power_of_two(problem.Q), pixels // n))
        if pixels // n // columns <= power_of_two(problem.P) and (n, columns) != (pixels, 1)
    ]
    return found + sorted(boxes, key=lambda box: (_covered(problem, box), -box[0], box[1]))[:3]


def _columns(problem: Conv2dProblem, pixels: int, half: bool) -> list[tuple[int, int, int]]:
    """Boxes of one column, with `half` with half a box below each."""
    images = min(power_of_two(problem.N), pixels)
    tall = [(n, pixels // n, 1) for n in _powers(images) if pixels // n <= power_of_two(problem.P)]
    tall = [box for box in tall if problem.stride[0] == 1 or box[1] == 1]
    if half:
        tall = [box for box in tall if box[1] > 1]
    return sorted(tall, key=lambda box: (_covered(problem, (box[0], box[1] + box[1] // 2 * half, 1)), -box[0]))[:2]


def _covered(problem: Conv2dProblem, box: tuple[int, int, int]) -> int:
    extents = zip((problem.N, problem.P, problem.Q), box, strict=True)
    return math.prod(-(-extent // size) * size for extent, size in extents)


def _shared_depth(problem: Conv2dProblem, tile: ConvTile, gpu: GPU) -> list[ConvTile]:
    """The tile with its depth shared: everywhere, or where the last wave would leave most SMs idle."""
    programs = tile.boxes(problem) * problem.groups * -(-problem.group_filters // tile.filters)
    steps = problem.taps * -(-problem.group_channels // tile.block_c)
    tail = programs % gpu.sms
    found = [replace(tile, splits=splits) for splits in (2, 3, 4, 6, 8, 12, 16, 24, 32)
             if steps >= 4 * splits and programs * splits <= 4 * gpu.sms]  # fmt: skip
    if tail and programs > gpu.sms:
        found += [replace(tile, splits=splits, tail=tail) for splits in (2, 3, 4, 6) if steps >= 4 * splits]
    return found


def _wgrad_candidates(problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    depth = 128 // dtype.itemsize
    found = []
    # For sm_100 4-byte operands, which are turned on their way, take the shared memory of two more steps.
    turned = 2 if gpu.arch // 10 == 10 and dtype.itemsize == 4 else 0
    rows_of = ((64, 0), (128, 0), (256, 0), (128, 64))
    columns_of = ((1, False), (2, False), (1, True))
    for (block_k, block_k2), block_c, (taps, half) in itertools.product(rows_of, (64, 128, 256), columns_of):
        rows, columns = block_k + block_k2, block_c * taps + block_c // 2 * half
        if rows * columns > 49_152 or (taps == 2 and problem.taps == 1) or (half and block_c == 64):
            continue
        if gpu.arch >= 100 and not block_k2 and rows * columns > 16_384:
            continue  # compiled for sm_100 the sums' way out of tensor memory spills
        if half and gpu.arch >= 100 and not block_k2:
            continue  # so it does with 64 x (128 + 64): 56 bytes
        if gpu.arch >= 120 and (half or block_k2):
            continue  # compiled for sm_120, whose products take registers, 16 to 1256 bytes spill
        most = dtype.itemsize == 4 and block_k2 > 0 and taps == 2
        as_turned = most or (dtype.itemsize == 4 and half)
        if as_turned and not cost.turned(problem, dtype, "tf32", gpu):
            continue  # 4-byte operands pass registers on their way, and the sums of four products leave too few: spills
        warps = 8 if most or rows * columns > (24_576 if gpu.arch < 100 or block_k2 else 8192) else 4
        for box in dict.fromkeys([*_boxes(problem, depth), *_lines(problem, depth)]):
            stages = min(4, (gpu.shared_block - 2048) // ((rows + columns) * 128) - turned) * (depth // math.prod(box))
            if stages < 2:
                continue
            formulation = "pixel" if box[1:] == (1, 1) else "box"
            if as_turned and formulation == "box":
                continue
            tile = ConvTile(formulation, box, block_k, block_c, warps, stages, block_k2=block_k2, taps=taps, half=half)
            shared = [replace(tile, splits=splits) for splits in _splits(problem, tile, gpu)]
            found += [one for one in shared if not _waits(one, problem, dtype, gpu)]
    return found


def _lines(problem: Conv2dProblem, pixels: int) -> list[tuple[int, int, int]]:
    """Boxes along one axis, half as long where that covers fewer pixels: how tensor cores take a filter gradient's."""
    along: list[Callable[[int], tuple[int, int, int]]] = [lambda images: (images, 1, 1)]
    if problem.stride == (1, 1) and problem.groups == 1:
        along.append(lambda columns: (1, 1, columns))
    found = []
    for box in along:
        whole, half = box(pixels), box(pixels // 2)
        found.append(half if _covered(problem, half) < _covered(problem, whole) else whole)
    return found


def _waits(tile: ConvTile, problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> bool:
    """Whether a filter gradient's products wait for each other, or spill, as Triton 3.7.1 compiles them for sm_90.

    A box along one axis is the matrix that tensor cores take; another passes registers on its way.  Then ptxas (its
    remark C7515) waits for every product of 128 channels, of 256 where the sums leave as 2-byte elements, and of a
    second row of products; not for those of 64 channels, nor for 256 with splits.  4-byte operands wait in any shape.
    """
    line = tile.box[1:] == (1, 1) or (tile.box[:2] == (1, 1) and problem.groups == 1)
    if line or gpu.arch // 10 != 9:
        return False
    if tile.half:
        return True
    if dtype.itemsize == 4:
        return tile.block_k2 > 0  # with 9 to 52 spills
    return (
        tile.block_c == 128 or (tile.block_c == 256 and tile.splits == 1) or (tile.block_c == 64 and tile.block_k2 > 0)
    )


def _splits(problem: Conv2dProblem, tile: ConvTile, gpu: GPU) -> list[int]:
    """How many programs may share the pixels of one tile of a filter gradient: up to four waves, eight steps each."""
    channels = problem.group_channels * (problem.taps if tile.flat else 1)
    taps = 1 if tile.flat else -(-problem.taps // tile.taps)
    programs = -(-channels // tile.channels) * -(-problem.group_filters // tile.rows) * taps * problem.groups
    steps = max(1, problem.N * problem.P * problem.Q // tile.pixels)
    most = max(1, min(steps // 8, -(-4 * gpu.sms // programs)))
    return sorted({*range(1, min(most, 12) + 1), *(1 << i for i in range(most.bit_length())), most})


def _gather_candidates(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    if pass_ == "wgrad":
        tiles = _gather_gradient_tiles(problem, dtype, gpu)
        return [replace(tile, splits=splits) for tile in tiles for splits in _splits(problem, tile, gpu)]
    if problem.group_channels < 16:
        # Two-byte loads and their addresses fill the registers: 64 filters and 8 warps are the most without spills.
        return [ConvTile("gather", (128, 1, 1), block_k, 32, 8, 2, flat=True) for block_k in (16, 32, 64)]
    # Channels that do not come in 16 bytes are fetched one by one, those of fp16 through registers; filters that do not
    # come in 8 bytes are stored one by one: with four warps 128 x 128 spills 2586 times and 128 x 64 161 times, with
    # eight warps 128 x 64 never.
    narrow = problem.group_channels * dtype.itemsize % 16 != 0 or problem.group_filters * dtype.itemsize % 8 != 0
    depth, stages = 64 // dtype.itemsize, _gather_stages(gpu)
    most = 8192 if dtype == torch.float32 or narrow else 16_384
    found = [
        (pixels, block_k, depth, 8 if narrow and pixels * block_k > 4096 else 4)
        for pixels, block_k in itertools.product((64, 128), (16, 32, 64, 128))
        if pixels * block_k <= most
    ]
    if gpu.arch < 90 and not narrow:
        # Twice the depth has twice the products for a step's masks and offsets.  128 x 64 of it takes all registers of
        # four warps, and so do 256 x 64 and 128 x 256: eight.
        found += [(64, 16, 2 * depth, 4), (64, 32, 2 * depth, 4), (64, 64, 2 * depth, 4), (64, 128, 2 * depth, 4)]
        found += [(128, 64, 2 * depth, 8), (128, 128, depth, 8), (128, 128, 2 * depth, 8)]
        if dtype.itemsize == 2:
            found += [(256, 64, depth, 8), (128, 256, depth, 8), (256, 128, depth, 8)]
    return [ConvTile("gather", (pixels, 1, 1), block_k, block_c, warps, stages)
            for pixels, block_k, block_c, warps in found]  # fmt: skip


def _gather_stages(gpu: GPU) -> int:
    return 4 if gpu.shared_block > 120_000 else 3


def _gather_gradient_tiles(problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    """The tiles of a filter gradient, their pixels not yet split."""
    depth = 64 // dtype.itemsize
    wide = problem.group_channels * dtype.itemsize % 16 == 0 and problem.group_filters * dtype.itemsize % 8 == 0
    if gpu.arch < 90 and wide and problem.N % depth == 0:  # steps of whole images: few registers go into addresses
        sizes = [(32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)]
        found = [(pixels, *size) for pixels in (depth, 2 * depth) if problem.N % pixels == 0 for size in sizes]
        if problem.N % (2 * depth) == 0:
            found.append((2 * depth, 32, 128, 4))  # shorter steps of it spill for sm_89
        if dtype.itemsize == 2:
            found += [(depth, 128, 256, 8), (depth, 256, 128, 8)]
        return [ConvTile("gather", (pixels, 1, 1), block_k, block_c, warps, _gather_stages(gpu), flat=True)
                for pixels, block_k, block_c, warps in found]  # fmt: skip
    return [
        ConvTile("gather", (pixels, 1, 1), block_k, block_c, 8, 3, flat=True)
        for pixels, block_k, block_c in itertools.product((depth, 2 * depth), (32, 64, 128), (32, 64, 128))
        if block_k * block_c * dtype.itemsize <= 32_768  # 128 x 128 of 4-byte elements spills
        and (pixels == depth or min(block_k, block_c) == 128)
    ]


def _scalar_candidates(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    """fp64, and fp32 at its own precision: registers, not tensor cores, set the size."""
    size = 32 if dtype == torch.float64 else 64
    flat = pass_ == "wgrad" or problem.group_channels < 16
    if pass_ == "wgrad":
        gather = ConvTile("gather", (16, 1, 1), 32, 32, 4, 2, flat=True)
        found = [replace(gather, splits=splits) for splits in _splits(problem, gather, gpu)]
    else:
        found = [ConvTile("gather", (size, 1, 1), size, 16, 4, 2, flat=flat)]
    if not gpu.has_descriptors or not addressable(problem, pass_, dtype):
        return found
    depth, block_c = (16, 32) if pass_ == "wgrad" else (64, 16)
    for box in _boxes(problem, depth):
        formulation = "pixel" if box[1:] == (1, 1) else "box"
        tile = ConvTile(formulation, box, 32 if pass_ == "wgrad" else 64, block_c, 4, 2)
        found += (
            [replace(tile, splits=splits) for splits in _splits(problem, tile, gpu)] if pass_ == "wgrad" else [tile]
        )
    return found


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
