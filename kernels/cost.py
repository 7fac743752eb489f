"""The cost model: problem, tile and GPU -> predicted time, and what bounds it.

A launch is a number of programs with the same number of steps.  A step costs the largest of four: tensor cores, issue
slots, shared memory, and L2 traffic, since without multicast every program reads its own operands.  Whole waves of
programs run with all SMs sharing L2; the last, partial wave has more of it for each.  Filling the pipeline and writing
the result add to that unless another program of the same SM hides them.  DRAM bounds the whole from below.

The model cannot see bank conflicts, cache misses in L2, clock changes beyond one constant, or how well loads overlap.
It is an upper bound made of published rates; `tests/test_cost.py` holds it to published GEMM speeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tileconv.kernels import fp32
from tileconv.kernels.conv_tile import ConvTile
from tileconv.kernels.cost_rates import LOAD_CYCLES, Phase, Rates, fetch, pieces
from tileconv.kernels.cost_shapes import Shape, fprop_shape, reached, runs_shape, wgrad_shape
from tileconv.kernels.geometry import Conv2dProblem, Pair, Pool2dProblem, Runs
from tileconv.kernels.hardware import GPU

DRAM_LOAD = 0.92  # share of the data sheet's DRAM rate that a streaming kernel reaches
KEY_INSTRUCTIONS = 8  # beside what a convolution does: value and place of a sum as one integer, and its maximum
LAUNCH_US = 1.0  # a dependent kernel's start after another one, in a CUDA graph


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


def filters_turned(tile: ConvTile, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
    """Whether an input gradient's boxes read a copy of the filters that has the channels first.

    Warp groups read 4-byte operands along the depth only: as they lie, products wait for a turn in registers.  Single
    warps, which sm_120 has alone and on Hopper blocks of fewer than four, read them from any layout.
    """
    if pass_ != "dgrad" or dtype != torch.float32 or precision != "tf32" or tile.formulation == "gather":
        return False
    return gpu.arch < 120 and not by_single_warps(tile, pass_, dtype, precision, gpu)


def by_single_warps(tile: ConvTile, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
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


def predict(
    problem: Conv2dProblem, pass_: str, tile: ConvTile, dtype: torch.dtype, precision: str, gpu: GPU,
    runs: Runs | None = None,
) -> Prediction:  # fmt: skip
    """One launch of a convolution pass, and the second kernel if partial sums need one.

    A dgrad problem is the rephrased one, geometry.DgradPart.problem.  What splits operands into parts is a launch of
    its own; here every product of parts goes through the depth once more.  `runs` are those of a first layer that is
    read so, problem.runs if none are given.
    """
    products = fp32.products(precision)
    shape = _shape(problem, pass_, tile, dtype, precision, gpu, runs)
    resident = _resident(shape, pass_, tile, dtype, precision, gpu)
    work = _work(problem, shape, pass_, tile, dtype, precision, gpu)
    cycles = sum(one.rates.phase(one.ctas, one.steps, one.out_bytes, resident, work.beside) for one in work.phases)
    every = [*work.phases, *([work.beside] if work.beside else [])]
    ctas = sum(one.ctas for one in every)
    read = sum(one.ctas * one.steps * one.rates.bytes for one in every)
    finish = _finish_us(work, pass_, tile, gpu)
    least, read_type = problem.bytes_least(dtype.itemsize), fp32.multiplied(dtype, precision)
    # Parts are more than one pass's share of L2: each time anew.
    moved = least * products * read_type.itemsize // dtype.itemsize
    dram = 1e6 * (moved + (work.slices if work.slices > 40e6 else 0)) / (gpu.dram * DRAM_LOAD)
    loop = 1e6 * cycles / gpu.clock
    parts = {
        name: 1e6 * sum(one.ctas * one.steps * getattr(one.rates, name) for one in every) / gpu.sms / gpu.clock
        for name in ("tensor", "issue", "shared")
    }
    parts |= {"L2": 1e6 * read / gpu.l2, "DRAM": dram}
    bound = max(parts, key=lambda name: parts[name])
    return Prediction(
        modelled_us=max(loop, dram) + finish,
        floor_us=floor_us(problem, dtype, precision, gpu),
        bound_by="waves" if loop > 1.25 * parts[bound] else bound,
        loop_us=loop, tensor_us=parts["tensor"], issue_us=parts["issue"], l2_us=parts["L2"], dram_us=dram,
        finish_us=finish,
        ctas=ctas, ctas_per_sm=resident, waves=ctas / (gpu.sms * resident),
        wave_efficiency=ctas / gpu.sms / math.ceil(ctas / gpu.sms) if ctas else 1.0,
        useful_rows=shape.useful_rows, useful_columns=shape.useful_columns,
        flops_done=int(work.flops / products), flops_needed=problem.flops,
        bytes_read=int(read), bytes_written=sum(one.ctas * one.out_bytes for one in every), bytes_least=least,
    )  # fmt: skip


def _shape(
    problem: Conv2dProblem, pass_: str, tile: ConvTile, dtype: torch.dtype, precision: str, gpu: GPU,
    runs: Runs | None,
) -> Shape:  # fmt: skip
    """The pass as tiles, every product of parts a further walk through the depth."""
    if tile.formulation == "runs":
        shape = runs_shape(problem, pass_, tile, dtype.itemsize, runs or problem.runs(dtype.itemsize, pass_))
    else:
        shape = wgrad_shape(problem, tile) if pass_ == "wgrad" else fprop_shape(problem, tile)
    if tile.formulation == "gather":
        read_type, on_tensor_cores = fp32.multiplied(dtype, precision), fp32.on_tensor_cores(dtype, precision)
        found = pieces(problem, pass_, tile, read_type)
        instructions = fetch(problem, pass_, tile, read_type, on_tensor_cores, found)
        shape = replace(shape, fetch=instructions, pieces=found)
    fragments = shape.fragments or by_single_warps(tile, pass_, dtype, precision, gpu)
    return replace(shape, steps=shape.steps * fp32.products(precision), fragments=fragments)


def _resident(shape: Shape, pass_: str, tile: ConvTile, dtype: torch.dtype, precision: str, gpu: GPU) -> int:
    """Programs of an SM, by what their registers and buffers were when compiled."""
    on_tensor_cores, sums = fp32.on_tensor_cores(dtype, precision), shape.rows * shape.columns
    by_warps = gpu.arch < 90 or shape.fragments
    threads_need = registers(shape.rows, shape.columns, tile.num_warps, by_warps)
    if by_single_warps(tile, pass_, dtype, precision, gpu):
        # Compiled: 56 for 16 sums, 84 for 32, 125 for 64, 156 and 227 for 64 and 128 of other shapes.
        threads_need = min(255, 42 + 7 * sums // (160 * tile.num_warps))
    if not on_tensor_cores:
        # Compiled by boxes: 46 for 4 sums, 40 to 56 for 8, 80 for 16, 80 to 128 for 32, 120 to 254 for 64.
        threads_need = min(255, (70 if tile.formulation == "gather" else 50) + sums // (16 * tile.num_warps))
    if tile.formulation == "runs" and not by_warps:
        # 44 inner runs compiled for sm_90 take 38 to 168 beside their sums, half of them at most 75; runs with masks,
        # 256 pixels x 64 filters in four warps, 106.
        threads_need = min(255, threads_need + 36)
    buffers = tile.num_stages - (by_warps or not on_tensor_cores)  # one stage is in registers there
    shared = shape.stage_bytes(fp32.multiplied(dtype, precision).itemsize) * buffers
    if not on_tensor_cores and tile.formulation != "gather":
        shared += shape.columns * shape.depth * dtype.itemsize  # the pixels once more, as products read them
    return max(1, occupancy(threads_need, shared, tile.num_warps, gpu))


@dataclass(frozen=True)
class _Work:
    """The programs of a launch, and the partial sums that they leave: bytes of these, and of what they add up to."""

    phases: list[Phase]
    beside: Phase | None  # programs of the taps that are left over
    slices: int
    finished: int
    flops: float


def _work(
    problem: Conv2dProblem, shape: Shape, pass_: str, tile: ConvTile, dtype: torch.dtype, precision: str, gpu: GPU
) -> _Work:
    item, products, read_type = dtype.itemsize, fp32.products(precision), fp32.multiplied(dtype, precision)
    read_as = precision if products == 1 else "ieee"
    as_they_lie = tile.formulation == "box" or not turned(problem, dtype, precision, gpu)
    through_registers = as_they_lie and not tile.flat and not shape.fragments
    waits = pass_ == "wgrad" and gpu.arch // 10 == 9 and precision == "tf32" and through_registers
    rates = Rates(shape, tile, read_type, read_as, gpu, waits)
    last_tiles = min(tile.tail, shape.tiles)
    shared_tiles = 0 if tile.splits == 1 else shape.tiles if pass_ == "wgrad" or not tile.tail else last_tiles
    narrow_tiles = last_tiles if tile.narrow else 0
    shared_ctas, sums = shared_tiles * tile.splits, shape.rows * shape.columns
    partial, whole = sums * max(4, item), sums * item
    phases = [
        Phase(rates, shape.tiles - shared_tiles - narrow_tiles, shape.steps, whole),
        Phase(rates, shared_ctas, shape.steps / tile.splits, partial),
    ]
    if tile.narrow:
        few = replace(shape, rows=tile.narrow.rows)
        rates = Rates(few, tile.narrow, read_type, precision, gpu)
        made = few.rows * few.columns * item
        phases.append(Phase(rates, narrow_tiles * shape.rows // few.rows, shape.steps, made))
    slices, finished, flops, beside = shared_ctas * partial, shared_tiles * whole, shape.flops, None
    if last := tile.of_last(problem):
        few = wgrad_shape(problem, last, problem.taps - last.taps)
        few = replace(few, steps=few.steps * products)
        less, made = Rates(few, last, read_type, read_as, gpu, waits), few.rows * few.columns
        beside = Phase(less, few.tiles * last.splits, few.steps / last.splits, made * (4 if shared_ctas else item))
        flops += few.flops
        if shared_ctas:  # slices that none of them has are zeros
            slices += few.tiles * tile.splits * made * 4
            finished += few.tiles * made * item
    return _Work(phases, beside, slices, finished, flops)


def _finish_us(work: _Work, pass_: str, tile: ConvTile, gpu: GPU) -> float:
    """The kernel that adds partial sums, if there are any."""
    if not work.slices:
        return 0.0
    moved = work.slices + work.finished
    finish = 1e6 * moved / (0.6 * gpu.l2 if moved < 40e6 else gpu.dram * DRAM_LOAD)
    if tile.formulation == "gather" and pass_ != "wgrad":  # of few tiles: three parts are on their way at a time
        finish = max(finish, 1e6 * LOAD_CYCLES / gpu.clock * math.ceil(tile.splits / 3))
    return finish + LAUNCH_US


def predict_pooled(
    problem: Conv2dProblem, pool: Pool2dProblem, tile: ConvTile, dtype: torch.dtype, precision: str, gpu: GPU
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
    shape = Shape(tiles, steps, tile.rows, tile.pixels, tile.block_c, 1.0, 1.0)
    sums = tile.rows * tile.pixels
    held = sums if whole else sums * (3 if dtype.itemsize == 4 else 2)  # a key takes what a sum takes, or twice that
    threads_need = registers(held // tile.pixels, tile.pixels, tile.num_warps, gpu.arch < 90)
    resident = max(1, occupancy(threads_need, shape.stage_bytes(dtype.itemsize) * tile.num_stages, tile.num_warps, gpu))
    outputs = tile.rows * tile.box[0] * math.prod(windows)
    places = 1 if whole else pool.taps
    keys = places * KEY_INSTRUCTIONS * sums / 32 / 4 + (places - 1) * LOAD_CYCLES
    turns = math.ceil(tiles / gpu.sms)
    cycles = Rates(shape, tile, dtype, precision, gpu).phase(tiles, steps, outputs * (dtype.itemsize + 1), resident)
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
    pairs = sum(reached(1, taps, stride, before - place * stride, dilation, extent, box)[1] for place in boxes)
    return len(starts), pairs
