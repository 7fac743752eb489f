"""The cost model: problem, tile and GPU -> predicted time, and what bounds it.

A launch is a number of programs with the same number of steps.  A step costs the largest of four: tensor cores, issue
slots, shared memory, and L2 traffic, since without multicast every program reads its own operands.  Whole waves of
programs run with all SMs sharing L2; the last, partial wave has more of it for each.  Filling the pipeline and writing
the result add to that unless another program of the same SM hides them.  DRAM bounds the whole from below.

The model cannot see bank conflicts, cache misses in L2, clock changes beyond one constant, or how well loads overlap.
It is an upper bound made of published rates; `tests/test_cost.py` holds it to published GEMM speeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch

from tileconv.kernels import fp32
from tileconv.kernels.geometry import Conv2dProblem, Pair, Pool2dProblem, Runs
from tileconv.kernels.hardware import GPU

TENSOR_LOAD = 0.80  # share of the data sheet's tensor-core rate that lasts under load (power)
DRAM_LOAD = 0.92  # share of the data sheet's DRAM rate that a streaming kernel reaches
L2_PORT = 64  # bytes a cycle that one SM can take from L2
FILL_CYCLES = 900  # from a program's start to its first product: launch, descriptor and first loads
LOAD_CYCLES = 800  # from asking for a box to having it; a pipeline hides it behind its other stages
KEY_INSTRUCTIONS = 8  # beside what a convolution does: value and place of a sum as one integer, and its maximum
LAUNCH_US = 1.0  # a dependent kernel's start after another one, in a CUDA graph


class Tile(Protocol):
    """What the model reads of conv_tile.ConvTile."""

    @property
    def formulation(self) -> str: ...
    @property
    def box(self) -> tuple[int, int, int]: ...
    @property
    def block_k2(self) -> int: ...
    @property
    def block_c(self) -> int: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def splits(self) -> int: ...
    @property
    def tail(self) -> int: ...
    @property
    def taps(self) -> int: ...
    @property
    def flat(self) -> bool: ...
    @property
    def columns(self) -> int: ...
    @property
    def across(self) -> bool: ...
    @property
    def half(self) -> bool: ...
    @property
    def rows(self) -> int: ...
    @property
    def filters(self) -> int: ...
    @property
    def pixels(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def narrow(self) -> Tile | None: ...
    def of_last(self, problem: Conv2dProblem) -> Tile | None: ...
    def boxes(self, problem: Conv2dProblem) -> int: ...


@dataclass(frozen=True)
class Prediction:
    """Times in microseconds; bytes are requests to L2, `bytes_least` each operand once."""

    modelled_us: float
    floor_us: float
    bound_by: str
    loop_us: float  # if DRAM were no bound
    tensor_us: float
    issue_us: float
    l2_us: float
    dram_us: float
    finish_us: float  # a second kernel that adds partial sums
    ctas: int
    ctas_per_sm: int
    waves: float
    wave_efficiency: float
    useful_rows: float
    useful_columns: float
    flops_done: int
    flops_needed: int
    bytes_read: int
    bytes_written: int
    bytes_least: int


def weighed_us(predicted: Prediction, gpu: GPU, doubt: float = 0.1) -> float:
    """What a choice goes by: where most SMs idle, a step's latency decides, and of that the model knows least."""
    return predicted.modelled_us * (1 + doubt if predicted.ctas < gpu.sms / 2 else 1)


def floor_us(problem: Conv2dProblem, dtype: torch.dtype, precision: str, gpu: GPU) -> float:
    """No kernel is faster: all operations at the data sheet's rate, or each operand moved once."""
    arithmetic = problem.flops / gpu.peak(dtype, precision)
    return 1e6 * max(arithmetic, problem.bytes_least(dtype.itemsize) / gpu.dram)


def turned(problem: Conv2dProblem, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
    """Whether a filter gradient's tiles of one pixel read copies of its operands with the images last.

    Hopper's tensor cores read 4-byte operands along the depth only, and the depth is images there: as they lie they
    pass registers, and every product waits for the one before it.
    """
    hopper = gpu.arch // 10 == 9 or gpu.interprets
    return hopper and dtype == torch.float32 and precision == "tf32" and problem.N % 4 == 0


def turn_us(problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> float:
    """The two kernels that make those copies."""
    return sum(streaming_us(2 * dtype.itemsize * math.prod(shape), gpu) for shape in (problem.x_shape, problem.y_shape))


def filters_turned(tile: Tile, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
    """Whether an input gradient's boxes read a copy of the filters that has the channels first.

    Warp groups read 4-byte operands along the depth only: as they lie, products wait for a turn in registers.  Single
    warps, which sm_120 has alone and on Hopper blocks of fewer than four, read them from any layout.
    """
    if pass_ != "dgrad" or dtype != torch.float32 or precision != "tf32" or tile.formulation == "gather":
        return False
    return gpu.arch < 120 and not by_single_warps(tile, pass_, dtype, precision, gpu)


def by_single_warps(tile: Tile, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
    """Whether an input gradient in TF32 multiplies by mma.sync on Hopper, to read the filters as they lie."""
    tf32 = pass_ == "dgrad" and dtype == torch.float32 and precision == "tf32"
    return tf32 and gpu.arch // 10 == 9 and tile.num_warps < 4 and tile.formulation != "gather"


def filters_turn_us(problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> float:
    """The kernel that makes filters_turned's copy."""
    return streaming_us(2 * dtype.itemsize * math.prod(problem.w_shape), gpu)


def streaming_us(bytes_moved: int, gpu: GPU) -> float:
    """A memory-bound kernel, with its start."""
    return LAUNCH_US + 1e6 * bytes_moved / (gpu.dram * DRAM_LOAD)


def registers(rows: int, columns: int, num_warps: int, fragments: bool) -> int:
    """Registers a thread, as compiled: the sums, and what addresses and operands take beside them.

    `fragments` says that operands are among these, as below sm_90.
    """
    return min(255, rows * columns // (32 * num_warps) + (110 if fragments else 28))


def occupancy(registers_: int, shared: int, num_warps: int, gpu: GPU) -> int:
    """Programs that fit an SM at once: registers in granules of 256 a warp, 1 KiB of shared memory more a block."""
    per_warp = -(-registers_ * 32 // 256) * 256
    by_registers = 65_536 // (per_warp * num_warps)
    return max(0, min(by_registers, gpu.shared_sm // (shared + 1024), gpu.warps_sm // num_warps, 32))


@lru_cache(maxsize=8192)
def _reached(
    outputs: int, window: int, stride: int, before: int, dilation: int, extent: int, box: int, more: int = 0
) -> Pair:
    """Along one axis: boxes, and pairs of a box and a tap with a pixel inside the image.

    A box makes so many `more` columns, and meets the taps of all.
    """
    starts = range(0, outputs, box + more)
    window += more
    pairs = 0
    for start in starts:
        first = start * stride - before
        lowest = max(0, -(-(1 - box - first) // dilation))
        pairs += max(0, min(window, -(-(extent - first) // dilation)) - lowest)
    return len(starts), pairs


def predict(
    problem: Conv2dProblem, pass_: str, tile: Tile, dtype: torch.dtype, precision: str, gpu: GPU,
    runs: Runs | None = None,
) -> Prediction:  # fmt: skip
    """One launch of a convolution pass, and the second kernel if partial sums need one.

    A dgrad problem is the rephrased one, geometry.DgradPart.problem.  What splits operands into parts is a launch of
    its own; here every product of parts goes through the depth once more.  `runs` are those of a first layer that is
    read so, problem.runs if none are given.
    """
    item = dtype.itemsize
    if tile.formulation == "runs":
        shape = _runs_shape(problem, pass_, tile, item, runs or problem.runs(item, pass_))
    else:
        shape = _wgrad_shape(problem, tile) if pass_ == "wgrad" else _fprop_shape(problem, tile)
    products, read_type = fp32.products(precision), fp32.multiplied(dtype, precision)
    on_tensor_cores = fp32.on_tensor_cores(dtype, precision)
    if tile.formulation == "gather":
        shape = replace(shape, fetch=_fetch(problem, pass_, tile, read_type, on_tensor_cores))
    single = by_single_warps(tile, pass_, dtype, precision, gpu)
    shape = replace(shape, steps=shape.steps * products, fragments=shape.fragments or single)
    stage = shape.stage_bytes(read_type.itemsize)
    last_tiles = min(tile.tail, shape.tiles)
    shared_tiles = 0 if tile.splits == 1 else shape.tiles if pass_ == "wgrad" or not tile.tail else last_tiles
    narrow_tiles = last_tiles if tile.narrow else 0
    whole_tiles = shape.tiles - shared_tiles - narrow_tiles
    partial = shape.rows * shape.columns * max(4, item)
    whole = shape.rows * shape.columns * item
    read_as = precision if products == 1 else "ieee"
    rate = _Rates(shape, tile, read_type, read_as, gpu)
    as_they_lie = tile.formulation == "box" or not turned(problem, dtype, precision, gpu)
    through_registers = as_they_lie and not tile.flat and not shape.fragments
    waits = pass_ == "wgrad" and gpu.arch // 10 == 9 and precision == "tf32" and through_registers
    rate.alone = waits * (2 * stage / 128 + LOAD_CYCLES / 4)
    by_warps = gpu.arch < 90 or shape.fragments
    threads_need = registers(shape.rows, shape.columns, tile.num_warps, by_warps)
    if single:  # compiled: 56 for 16 sums, 84 for 32, 125 for 64, 156 and 227 for 64 and 128 of other shapes
        threads_need = min(255, 42 + 7 * shape.rows * shape.columns // (160 * tile.num_warps))
    if not on_tensor_cores:
        # Compiled by boxes: 46 for 4 sums, 40 to 56 for 8, 80 for 16, 80 to 128 for 32, 120 to 254 for 64.
        others = 70 if tile.formulation == "gather" else 50
        threads_need = min(255, others + shape.rows * shape.columns // (16 * tile.num_warps))
    if tile.formulation == "runs" and not by_warps:
        # 44 inner runs compiled for sm_90 take 38 to 168 beside their sums, half of them at most 75; runs with masks,
        # 256 pixels x 64 filters in four warps, 106.
        threads_need = min(255, threads_need + 36)
    buffers = tile.num_stages - (by_warps or not on_tensor_cores)  # one stage is in registers there
    shared = stage * buffers
    if not on_tensor_cores and tile.formulation != "gather":
        shared += shape.columns * shape.depth * item  # the pixels once more, as products read them
    resident = max(1, occupancy(threads_need, shared, tile.num_warps, gpu))
    shared_ctas = shared_tiles * tile.splits
    phases = [(rate, whole_tiles, shape.steps, whole), (rate, shared_ctas, shape.steps / tile.splits, partial)]
    if tile.narrow:
        few = replace(shape, rows=tile.narrow.rows)
        rate = _Rates(few, tile.narrow, read_type, precision, gpu)
        phases.append((rate, narrow_tiles * shape.rows // few.rows, shape.steps, few.rows * few.columns * item))
    slices, finished, done, beside = shared_ctas * partial, shared_tiles * whole, shape.flops, None
    if last := tile.of_last(problem):
        few = _wgrad_shape(problem, last, problem.taps - last.taps)
        few = replace(few, steps=few.steps * products)
        less, made = _Rates(few, last, read_type, read_as, gpu), few.rows * few.columns
        less.alone = waits * (2 * less.stage / 128 + LOAD_CYCLES / 4)
        beside = less, few.tiles * last.splits, few.steps / last.splits, made * (4 if shared_ctas else item)
        done += few.flops
        if shared_ctas:  # slices that none of them has are zeros
            slices += few.tiles * tile.splits * made * 4
            finished += few.tiles * made * item
    cycles = sum(rate.phase(ctas, steps, out, resident, beside) for rate, ctas, steps, out in phases)
    phases += [beside] if beside else []
    ctas = sum(phase[1] for phase in phases)
    tensor = sum(ctas * steps * rate.tensor for rate, ctas, steps, _ in phases)
    issue = sum(ctas * steps * rate.issue for rate, ctas, steps, _ in phases)
    read = sum(ctas * steps * rate.bytes for rate, ctas, steps, _ in phases)
    written = sum(ctas * out for _, ctas, _, out in phases)
    finish = 0.0
    if shared_ctas:
        moved = slices + finished
        finish = 1e6 * moved / (0.6 * gpu.l2 if moved < 40e6 else gpu.dram * DRAM_LOAD)
        if tile.formulation == "gather" and pass_ != "wgrad":  # of few tiles: three parts are on their way at a time
            finish = max(finish, 1e6 * LOAD_CYCLES / gpu.clock * math.ceil(tile.splits / 3))
        finish += LAUNCH_US
    least = problem.bytes_least(item)
    moved = least * products * read_type.itemsize // item  # parts are more than one pass's share of L2: each time anew
    dram = 1e6 * (moved + (slices if slices > 40e6 else 0)) / (gpu.dram * DRAM_LOAD)
    loop = 1e6 * cycles / gpu.clock
    parts = {
        "tensor": 1e6 * tensor / gpu.sms / gpu.clock,
        "issue": 1e6 * issue / gpu.sms / gpu.clock,
        "L2": 1e6 * read / gpu.l2,
        "DRAM": dram,
    }
    bound = max(parts, key=lambda name: parts[name])
    waves = ctas / (gpu.sms * resident)
    return Prediction(
        modelled_us=max(loop, dram) + finish,
        floor_us=floor_us(problem, dtype, precision, gpu),
        bound_by="waves" if loop > 1.25 * parts[bound] else bound,
        loop_us=loop, tensor_us=parts["tensor"], issue_us=parts["issue"], l2_us=parts["L2"], dram_us=dram,
        finish_us=finish,
        ctas=ctas, ctas_per_sm=resident, waves=waves,
        wave_efficiency=ctas / gpu.sms / math.ceil(ctas / gpu.sms) if ctas else 1.0,
        useful_rows=shape.useful_rows, useful_columns=shape.useful_columns,
        flops_done=int(done / products), flops_needed=problem.flops,
        bytes_read=int(read), bytes_written=written, bytes_least=least,
    )  # fmt: skip


@dataclass(frozen=True)
class _Shape:
    """A pass as tiles of rows x columns, each of `steps` products of `depth`."""

    tiles: int
    steps: float  # on average: taps in the padding are skipped
    rows: int
    columns: int
    depth: int
    useful_rows: float
    useful_columns: float
    fresh_bytes: float | None = None  # what a step's columns take from L2, where L1 holds the rest
    loads: float = 0.0  # loads of runs, for every element of the columns
    inner: bool = False  # whether none of them needs a mask of its own
    fetch: float = 0.0  # instructions that pointers take for 16 bytes of the operands
    inside: float = 1.0  # share of the columns that lies inside the tensor: the copy engine fetches no others
    fragments: bool = False  # mma.sync, in one pixel's loads: each warp reads its operands from shared memory
    apart: bool = False  # what is multiplied one after the other does not lie side by side: narrower reads of it

    @property
    def flops(self) -> float:
        """Of all products, useful or not."""
        return self.tiles * self.steps * 2 * self.rows * self.columns * self.depth

    def stage_bytes(self, itemsize: int) -> int:
        """Shared memory of a step."""
        return (self.rows + self.columns) * self.depth * itemsize

    def step_bytes(self, itemsize: int) -> float:
        """What a step takes from L2."""
        if self.fresh_bytes is None:
            return (self.rows + self.columns * self.inside) * self.depth * itemsize
        return self.fresh_bytes + self.rows * self.useful_rows * self.depth * itemsize


def _fprop_shape(problem: Conv2dProblem, tile: Tile) -> _Shape:
    K, C = problem.group_filters, problem.group_channels
    row_tiles = -(-K // tile.filters)
    pixels, inside = tile.pixels, 1.0
    if tile.formulation == "gather":
        outputs = problem.N * problem.P * problem.Q
        boxes = tile.boxes(problem)
        steps: float = -(-problem.taps * C // tile.block_c) if tile.flat else problem.taps * -(-C // tile.block_c)
        columns = outputs / (boxes * pixels)
    else:
        n, h, w = tile.box
        images = -(-problem.N // n)
        rows, row_pairs = _reached(
            problem.P, problem.R, problem.stride[0], problem.padding[0][0], problem.dilation[0], problem.H,
            h + h // 2 * (tile.half and tile.columns > 1),
        )  # fmt: skip
        cols, col_pairs = _reached(
            problem.Q, problem.S, problem.stride[1], problem.padding[1][0], problem.dilation[1], problem.W, w,
            tile.columns - 1,
        )  # fmt: skip
        boxes, taps_of_row = images * rows * cols, col_pairs / cols
        if tile.half and tile.columns == 1:  # a box and its half box lie apart: together they miss no tap of a row
            boxes, taps_of_row = tile.boxes(problem), problem.S
        steps = row_pairs / rows * taps_of_row * -(-C // tile.block_c)
        pixels += pixels // 2 * tile.half
        columns = problem.N * problem.P * problem.Q / (boxes * pixels * tile.columns)
        inside = C / (-(-C // tile.block_c) * tile.block_c)
    tiles = boxes * row_tiles * problem.groups
    useful_rows = K / (row_tiles * tile.filters)
    return _Shape(tiles, steps, tile.rows, pixels, tile.block_c, useful_rows, columns, inside=inside)


def _wgrad_shape(problem: Conv2dProblem, tile: Tile, first: int = 0) -> _Shape:
    """The taps from `first` on, but for those that the tile leaves over."""
    K, C = problem.group_filters, problem.group_channels
    row_tiles = -(-K // tile.rows)
    inside = 1.0
    if tile.formulation == "gather":
        columns, programs, taps = problem.taps * C, 1, 1.0
        steps: float = -(-problem.N * problem.P * problem.Q // tile.pixels)
    else:
        end = problem.taps - (problem.taps % tile.taps if tile.last else 0)
        columns, programs = C, -(-(end - first) // tile.taps)
        taps = (end - first) / (programs * tile.taps)
        n, h, w = tile.box
        rows = problem.P, problem.R, problem.stride[0], problem.padding[0][0], problem.dilation[0], problem.H, h
        cols = problem.Q, problem.S, problem.stride[1], problem.padding[1][0], problem.dilation[1], problem.W, w
        boxes, pairs = _reached_together(rows, cols, tile.taps, first, end)
        steps = boxes / programs * -(-problem.N // n)
        inside = pairs / max(1, boxes * tile.taps) * C / (-(-C // tile.channels) * tile.channels)
    column_tiles = -(-columns // tile.channels)
    tiles = row_tiles * column_tiles * programs * problem.groups
    useful = columns / (column_tiles * tile.channels) * taps
    useful_rows = K / (row_tiles * tile.rows)
    return _Shape(
        tiles, steps, tile.rows, tile.channels * tile.taps, tile.pixels, useful_rows, useful, inside=inside, apart=True
    )  # fmt: skip


@lru_cache(maxsize=8192)
def _reached_together(rows: tuple[int, ...], cols: tuple[int, ...], together: int, first: int, end: int) -> Pair:
    """Of all programs of `together` of the taps [first, end): boxes of outputs, and pairs of a box and a tap that are
    inside the image.

    A program goes through the boxes between the first and the last that one of its taps needs.  The arguments are
    outputs, window, stride, padding before, dilation, extent and box along either axis.
    """
    p_of, q_of = _boxes_of_taps(*rows), _boxes_of_taps(*cols)
    taps = list(itertools.product(p_of, q_of))[:end]
    boxes = pairs = 0
    for one in range(first, end, together):
        mine = taps[one : one + together]
        mine += mine[-1:] * (together - len(mine))  # beyond the last tap: that one again
        boxes += math.prod(
            max(0, max(high for _, high in spans) - min(low for low, _ in spans)) for spans in zip(*mine, strict=True)
        )
        pairs += sum(math.prod(max(0, high - low) for low, high in spans) for spans in mine)
    return boxes, pairs


def _boxes_of_taps(
    outputs: int, window: int, stride: int, before: int, dilation: int, extent: int, box: int
) -> list[Pair]:
    """For each tap along one axis the boxes [low, high) of outputs with a pixel inside the image."""
    shifts = [tap * dilation - before for tap in range(window)]
    ends = [min(outputs, max(0, -(-(extent - shift) // stride))) for shift in shifts]
    return [(max(0, -(shift // stride)) // box, -(-end // box)) for shift, end in zip(shifts, ends, strict=True)]


def _runs_shape(problem: Conv2dProblem, pass_: str, tile: Tile, item: int, runs: Runs | None) -> _Shape:
    """A first layer's pass; steps of fprop go along the depth, those of wgrad along one row of outputs each."""
    assert runs is not None
    classes = runs.classes  # a program's images are all of one
    images = -(-problem.N // classes)
    depth = problem.C * problem.R * runs.length
    row_tiles = -(-problem.K // tile.rows)
    useful_rows = problem.K / (row_tiles * tile.rows)
    if pass_ == "wgrad":
        column_tiles = -(-depth // tile.block_c)
        widths = -(-problem.Q // tile.pixels)
        useful = problem.C * problem.taps / (column_tiles * tile.block_c) * problem.Q / (widths * tile.pixels)
        # From one row of outputs to the next the image moves on by the stride; L1 holds the rows that stay.
        reached = min(problem.W, (tile.pixels - 1) * problem.stride[1] + problem.S)
        fresh = problem.C * reached * item * problem.stride[0] * min(1.0, tile.block_c / depth)
        return _Shape(
            row_tiles * column_tiles * widths * classes, images * problem.P, tile.rows, tile.block_c, tile.pixels,
            useful_rows, useful, fresh, 1 / runs.align, runs.inner, fragments=item == 4,
        )  # fmt: skip
    boxes = classes * -(-images * problem.P * problem.Q // tile.pixels)
    steps = -(-depth // tile.block_c)
    image_rows = (tile.pixels / problem.Q) * problem.stride[0] + (problem.R - 1) * problem.dilation[0] + 1
    useful = problem.N * problem.P * problem.Q / (boxes * tile.pixels) * problem.C * problem.taps / depth
    return _Shape(
        boxes * row_tiles, steps, tile.rows, tile.pixels, tile.block_c, useful_rows, useful,
        problem.C * problem.W * item * image_rows / steps, 1 / runs.align, runs.inner,
    )  # fmt: skip


def _warp_groups(shape: _Shape, tile: Tile) -> tuple[float, float]:
    """For each 32 bytes of depth: the products that a warp issues, and the lines of operands that all of them read.

    A product of 64 rows and up to 256 columns reads all of those from shared memory.  Warp groups divide the rows of a
    block, 64 each, and then its columns.
    """
    groups = max(1, tile.num_warps // 4)
    rows_of = (shape.rows - tile.block_k2, tile.block_k2) if tile.block_k2 else (shape.rows,)
    columns_of: tuple[int, ...] = (shape.columns // tile.taps,) * tile.taps
    if tile.half:
        columns_of = shape.columns * 2 // 3, shape.columns // 3
    products_of = list(itertools.product(rows_of, columns_of))
    if tile.formulation == "runs" and tile.block_k2:  # the second product's rows are pixels
        products_of[-1] = shape.columns, tile.block_k2
    if tile.across:
        products_of = [(rows_of[0], tile.box[0]), (tile.box[0], tile.block_k2)] * tile.box[1]
    issued = lines = 0.0
    for rows, columns in products_of:
        along_rows = min(groups, max(1, rows // 64))
        width = columns * along_rows / groups
        products = max(1.0, rows / 64) * math.ceil(width / 256) * groups / along_rows
        issued += products / groups
        lines += products * (64 + min(256, width))
    return issued, lines


def _by_fragments(shape: _Shape, tile: Tile) -> tuple[float, float]:
    """Of a step of 4-byte operands by mma.sync: instructions of a warp, and cycles of shared memory.

    A product of 16 x 8 x 8 takes two reads of 128 bytes for its columns and four for its rows, shared along a warp's
    rows and columns.  Copies of one pixel pass L1, which is the same memory, and are written then.
    """
    rows, columns = shape.rows, shape.columns
    for _ in range(tile.num_warps.bit_length() - 1):  # as Triton divides a block between warps
        rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
    deep = shape.depth / 8
    products, reads = deep * rows * columns / 128, deep * (rows / 4 + columns / 4)
    # Compiled loops for sm_80 and sm_90, 9 of them, lie within 8 % of this.
    patch, gradient = (n * shape.depth / (32 * tile.num_warps) for n in (shape.columns, shape.rows / 4))
    instructions = 40 + products + reads + 9 * patch + 5 * gradient
    return instructions, reads * tile.num_warps + (shape.rows + 2 * shape.columns) * shape.depth * 4 / 128


def _by_turned_fragments(shape: _Shape, tile: Tile) -> tuple[float, float]:
    """As _by_fragments, of boxes that the copy engine brings, whose filters lie across the depth.

    A warp reads 32 elements of the filters at once, from eight rows and four steps of the depth: taken for two reads,
    of banks that two of those share; columns come 16 bytes a thread.
    """
    rows, columns = shape.rows, shape.columns
    for _ in range(tile.num_warps.bit_length() - 1):  # as Triton divides such a block between warps
        rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
    across, along = rows * shape.depth / 32, columns * shape.depth / 128
    # Compiled loops for sm_90, 7 of them, lie within 6 % of this.
    instructions = 70 + rows * columns * shape.depth / 1024 + across + along
    return instructions, (2 * across + 4 * along) * tile.num_warps + shape.stage_bytes(4) / 128


def _fetch(problem: Conv2dProblem, pass_: str, tile: Tile, dtype: torch.dtype, on_tensor_cores: bool) -> float:
    """Instructions that a pointer kernel takes for 16 bytes, as compiled: the load, its address, its mask."""
    elements = 16 // dtype.itemsize
    narrow = problem.group_channels % elements != 0
    if not on_tensor_cores and pass_ == "wgrad" and problem.N % tile.pixels == 0:
        return 2 * elements if narrow else 4
    if tile.flat and (narrow or pass_ != "wgrad"):
        return 13 * elements
    if narrow:
        return 10 * elements  # one by one: 6 to 15 each, with 21 to 257 channels of fp16
    if pass_ == "wgrad" and problem.N % tile.pixels:
        return 22  # each pixel is divided by P and Q: 13 to 31
    return 4


def _fused(shape: _Shape, tile: Tile, gpu: GPU) -> float:
    """Instructions of a thread for a step of fused multiply-adds: these, reads of 16 bytes, and what is around them.

    Where operands come in 16 bytes, loops compiled for sm_80 to sm_90 and sm_120 lie within 7 % of this, those of 4 and
    8 sums by pointers within 12 %, filter gradients of 8 within 13 %.
    """
    sums = shape.rows * shape.columns / (32 * tile.num_warps)
    reads = 1 + max(2.0 * shape.apart, sums / 16)
    # sm_100's two products at a time (FFMA2) take their operands side by side: within 8 %, mostly moves.
    moves = 0.4 * min(1.0, sums / 16) if gpu.arch // 10 == 10 else 0.0
    return (40 if tile.formulation == "gather" else 80) + shape.depth * (sums * (1 + moves) + reads)


class _Rates:
    """Cycles that one step takes on one SM, by what it uses."""

    def __init__(self, shape: _Shape, tile: Tile, dtype: torch.dtype, precision: str, gpu: GPU) -> None:
        flops = 2 * shape.rows * shape.columns * shape.depth
        self.gpu = gpu
        self.bytes = shape.step_bytes(dtype.itemsize)
        self.stage = shape.stage_bytes(dtype.itemsize)
        # Compiled loops of runs: 60 instructions and 11 for each load, which addresses and masks its pixels by itself;
        # of inner runs, 36 compiled for sm_90, at most 90 and 5 or little more.
        before, a_load = (90, 5) if shape.inner else (60, 11)
        loads = a_load * shape.loads * shape.columns * shape.depth / (32 * tile.num_warps)
        fetched = shape.fetch * self.stage / 16 / (32 * tile.num_warps)
        lasting = min(TENSOR_LOAD, gpu.sync_share) if shape.fragments or shape.rows < 64 else TENSOR_LOAD
        self.tensor = flops * gpu.clock * gpu.sms / gpu.peak(dtype, precision) / lasting
        if shape.fragments:
            by_fragments = _by_fragments if tile.formulation == "runs" else _by_turned_fragments
            instructions, self.shared = by_fragments(shape, tile)
        elif not fp32.on_tensor_cores(dtype, precision):
            # Nearly all of them are products: they are taken to last as those of tensor cores do.
            instructions, self.shared = (_fused(shape, tile, gpu) + fetched) / TENSOR_LOAD, 0.0
        elif gpu.arch >= 90:
            products, reads = _warp_groups(shape, tile)
            products *= shape.depth * dtype.itemsize / 32
            # Compiled loops: 87 instructions and two for each product of a warp, 30 more for a second row of products,
            # 40 for each tap after the first, 43 for half a box more and for each further row.
            boxes = tile.box[1] if tile.across else 1 + tile.half
            instructions = 87 + 2 * products + 30 * (tile.block_k2 > 0) + 40 * (tile.taps - 1) + 43 * (boxes - 1)
            if tile.formulation == "gather":
                instructions = 60 + fetched
            if tile.formulation == "runs":
                instructions = before + 2 * products + loads
            self.shared = reads * shape.depth * dtype.itemsize / 128
            if loads:  # their way into shared memory is shorter than the copy engine's: 128 bytes a cycle too
                self.shared += self.stage / 128
        else:
            products = flops / 4096 / tile.num_warps
            # Compiled for sm_80, 42 loops of fp16 lie within 14 % of this, and 4-byte operands read more for a product.
            each = 1.05 if dtype.itemsize == 2 else 1.4
            instructions = (30 + 1.5 * products + loads) if loads else (62 + fetched + each * products)
            self.shared = 0.0
        self.issue = instructions * tile.num_warps / 4
        # What waits for the step before, and lets that after it wait: operands on their way in registers.
        self.alone = 0.0
        self.stages_ahead = tile.num_stages - 1
        self.fused = 0.0  # of fused multiply-adds: a step's cycles where no other program takes turns
        if not fp32.on_tensor_cores(dtype, precision):
            self.fused = max(self.issue, instructions)
            self.stages_ahead -= 1  # they read shared memory to their end: a buffer is filled again only then

    def step(self, active: int, programs: int) -> float:
        """The slowest, where `active` SMs run `programs` each: fewer SMs leave each more of L2, up to its port."""
        share = min(L2_PORT, self.gpu.l2 / self.gpu.clock / max(1, active))
        transfer = self.bytes / share
        # A step's operands are asked for as many steps ahead as there are buffers but one.
        wait = LOAD_CYCLES + transfer
        alone = max(self.fused, wait / self.stages_ahead) if self.stages_ahead else self.fused + wait
        return max(self.tensor, self.issue, self.shared, transfer, alone / programs) + self.alone / programs

    def phase(
        self, ctas: int, steps: float, out_bytes: int, resident: int,
        beside: tuple[_Rates, int, float, int] | None = None,
    ) -> float:  # fmt: skip
        """Cycles of `ctas` equal programs: whole waves, one program an SM at a time, then what is left over.

        Those `beside` them, which are shorter (rates, how many, steps and bytes of each), start with what is left over.
        """
        if not ctas:
            return 0.0
        sms = self.gpu.sms
        whole, left = divmod(ctas, sms)
        out = out_bytes / (self.gpu.l2 / self.gpu.clock / sms)
        rates, others, steps_of_others, _ = beside or (self, 0, 0.0, 0)
        waves = math.ceil((ctas + others) / sms)
        around = (FILL_CYCLES + out) * waves / min(resident, waves)
        busy = steps * whole * self.step(sms, min(resident, max(1, whole)))
        if left + others:
            active, there = min(sms, left + others), min(resident, whole + 1)
            long, short = steps * self.step(active, there), steps_of_others * rates.step(active, there)
            busy += _last_of_two(left, long, others, short, sms) if others else long
        return busy + around


def _last_of_two(long: int, long_takes: float, short: int, short_takes: float, sms: int) -> float:
    """When the last program ends, where fewer long ones than SMs start at once and short ones whenever an SM is free.

    A short one may take longer than a long one.
    """
    begin = long_takes if long else 0.0
    turns = range(1, -(-short // max(1, sms - long)) + 1)
    ends = sorted({begin, *(turn * short_takes for turn in turns), *(begin + turn * short_takes for turn in turns)})
    return next(
        end
        for end in ends
        if end >= begin
        and (sms - long) * int(end / short_takes + 1e-9) + long * int((end - begin) / short_takes + 1e-9) >= short
    )


def predict_pooled(
    problem: Conv2dProblem, pool: Pool2dProblem, tile: Tile, dtype: torch.dtype, precision: str, gpu: GPU
) -> float:
    """Microseconds of device/conv_pool.py's kernel with switches: a convolution whose output only its pool sees.

    A tile of one pixel takes the places of a window in turn, each with its own taps and its own start of the pipeline.
    """
    whole = tile.pixels > tile.box[0]
    windows = (tile.box[1] // pool.kernel[0], tile.box[2] // pool.kernel[1]) if whole else (1, 1)
    (rows, row_pairs), (columns, column_pairs) = (
        _pooled_axis(problem, pool, axis, windows[axis], tile.box[1 + axis]) for axis in (0, 1)
    )
    row_tiles = -(-problem.group_filters // tile.rows)
    tiles = -(-problem.N // tile.box[0]) * rows * columns * row_tiles * problem.groups
    steps = row_pairs * column_pairs / (rows * columns) * -(-problem.group_channels // tile.block_c)
    shape = _Shape(tiles, steps, tile.rows, tile.pixels, tile.block_c, 1.0, 1.0)
    sums = tile.rows * tile.pixels
    held = sums if whole else sums * (3 if dtype.itemsize == 4 else 2)  # a key takes what a sum takes, or twice that
    threads_need = registers(held // tile.pixels, tile.pixels, tile.num_warps, gpu.arch < 90)
    resident = max(1, occupancy(threads_need, shape.stage_bytes(dtype.itemsize) * tile.num_stages, tile.num_warps, gpu))
    outputs = tile.rows * tile.box[0] * math.prod(windows)
    places = 1 if whole else pool.taps
    keys = places * KEY_INSTRUCTIONS * sums / 32 / 4 + (places - 1) * LOAD_CYCLES
    turns = math.ceil(tiles / gpu.sms)
    cycles = _Rates(shape, tile, dtype, precision, gpu).phase(tiles, steps, outputs * (dtype.itemsize + 1), resident)
    cycles += keys * turns / min(resident, turns)
    least = dtype.itemsize * (math.prod(problem.x_shape) + math.prod(problem.w_shape))
    least += (dtype.itemsize + 1) * math.prod(pool.y_shape)
    return max(1e6 * cycles / gpu.clock, 1e6 * least / (gpu.dram * DRAM_LOAD))


def _pooled_axis(problem: Conv2dProblem, pool: Pool2dProblem, axis: int, windows: int, box: int) -> Pair:
    """Along one axis: programs, each of `windows` windows, and pairs of a box of convolution outputs and a tap."""
    outputs, extent = (problem.P, problem.Q)[axis], (problem.H, problem.W)[axis]
    pooled, taps = (pool.P, pool.Q)[axis], (problem.R, problem.S)[axis]
    stride, before, dilation = problem.stride[axis], problem.padding[axis][0], problem.dilation[axis]
    starts = range(-pool.padding[axis], pooled * pool.stride[axis] - pool.padding[axis], windows * pool.stride[axis])
    boxes: Sequence[int] = starts
    if box == 1:
        boxes = [place for start in starts for place in range(start, start + pool.kernel[axis]) if 0 <= place < outputs]
    pairs = sum(_reached(1, taps, stride, before - place * stride, dilation, extent, box)[1] for place in boxes)
    return len(starts), pairs
