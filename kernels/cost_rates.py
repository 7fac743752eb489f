"""What the cost model takes a step for: cycles of one SM by tensor cores, issue slots, shared memory and L2."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from tileconv.kernels import fp32
from tileconv.kernels.conv_tile import ConvTile
from tileconv.kernels.cost_shapes import Pieces, Shape
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU

TENSOR_LOAD = 0.80  # share of the data sheet's tensor-core rate that lasts under load (power)
L2_PORT = 64  # bytes a cycle that one SM can take from L2
FILL_CYCLES = 900  # from a program's start to its first product: launch, descriptor and first loads
LOAD_CYCLES = 800  # from asking for a box to having it; a pipeline hides it behind its other stages


def _warp_groups(shape: Shape, tile: ConvTile) -> tuple[float, float]:
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


def _of_a_warp(shape: Shape, tile: ConvTile) -> tuple[int, int]:
    """Rows and columns of a block that a warp multiplies by mma.sync."""
    rows, columns = shape.rows, shape.columns
    for _ in range(tile.num_warps.bit_length() - 1):  # as Triton divides a block between warps
        rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
    return rows, columns


def _by_fragments(shape: Shape, tile: ConvTile) -> tuple[float, float]:
    """Of a step of 4-byte operands by mma.sync: instructions of a warp, and cycles of shared memory.

    A product of 16 x 8 x 8 takes two reads of 128 bytes for its columns and four for its rows, shared along a warp's
    rows and columns.  Copies of one pixel pass L1, which is the same memory, and are written then.
    """
    rows, columns = _of_a_warp(shape, tile)
    deep = shape.depth / 8
    products, reads = deep * rows * columns / 128, deep * (rows / 4 + columns / 4)
    # Compiled loops for sm_80 and sm_90, 9 of them, lie within 8 % of this.
    patch, gradient = (n * shape.depth / (32 * tile.num_warps) for n in (shape.columns, shape.rows / 4))
    instructions = 40 + products + reads + 9 * patch + 5 * gradient
    return instructions, reads * tile.num_warps + (shape.rows + 2 * shape.columns) * shape.depth * 4 / 128


def _by_turned_fragments(shape: Shape, tile: ConvTile) -> tuple[float, float]:
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


def pieces(problem: Conv2dProblem, pass_: str, tile: ConvTile, dtype: torch.dtype) -> Pieces:
    """How pointers fetch the operands: 16 bytes at a time, or what divides their channels."""
    pixels = 1 if tile.flat and pass_ != "wgrad" else problem.group_channels
    others = pixels if pass_ == "fprop" else problem.group_filters
    columns = tile.channels if pass_ == "wgrad" else tile.pixels
    whole = tile.rows + columns
    return tuple(
        (extent / whole, math.gcd(channels * dtype.itemsize, 16))
        for extent, channels in ((tile.rows, others), (columns, pixels))
    )


def fetch(
    problem: Conv2dProblem, pass_: str, tile: ConvTile, dtype: torch.dtype, on_tensor_cores: bool, found: Pieces
) -> float:
    """Instructions that a pointer kernel takes for 16 bytes, as compiled: loads, their addresses, their masks."""
    if tile.flat and pass_ != "wgrad":
        return 13 * 16 / dtype.itemsize
    if pass_ != "wgrad":
        each, together = 5, 4  # 3 to 7 each, with 21 to 257 channels of fp16 and fp32
    elif problem.N % tile.pixels:
        each, together = 14, 22  # each pixel is divided by P and Q: 13 to 31 together
    else:
        each, together = 4 if on_tensor_cores else 2, 4  # 2 to 5 each
    return sum(share * (together if size == 16 else each * 16 / size) for share, size in found)


def _fused(shape: Shape, tile: ConvTile, gpu: GPU) -> float:
    """Instructions of a thread for a step of fused multiply-adds: these, reads of 16 bytes, and what is around them.

    Where operands come in 16 bytes, loops compiled for sm_80 to sm_90 and sm_120 lie within 7 % of this, those of 4 and
    8 sums by pointers within 12 %, filter gradients of 8 within 13 %.
    """
    sums = shape.rows * shape.columns / (32 * tile.num_warps)
    reads = 1 + max(2.0 * shape.apart, sums / 16)
    # sm_100's two products at a time (FFMA2) take their operands side by side: within 8 %, mostly moves.
    moves = 0.4 * min(1.0, sums / 16) if gpu.arch // 10 == 10 else 0.0
    return (40 if tile.formulation == "gather" else 80) + shape.depth * (sums * (1 + moves) + reads)


class Rates:
    """Cycles that one step takes on one SM, by what it uses."""

    def __init__(
        self, shape: Shape, tile: ConvTile, dtype: torch.dtype, precision: str, gpu: GPU, waits: bool = False
    ) -> None:  # fmt: skip
        flops = 2 * shape.rows * shape.columns * shape.depth
        self.gpu = gpu
        self.bytes = shape.step_bytes(dtype.itemsize)
        self.stage = shape.stage_bytes(dtype.itemsize)
        # Compiled loops of runs: 60 instructions and 11 for each load, which addresses and masks its pixels by itself;
        # of inner runs, 36 compiled for sm_90, at most 90 and 5 or little more.
        before, a_load = (90, 5) if shape.inner else (60, 11)
        # Into shared memory: 128 bytes a cycle, and 32 pieces (A100's and H100's whitepapers give an SM 32 load/store
        # units).  Fewer than four bytes are no copy: they take a load, and mostly a store of their own.
        written = self.stage * sum(
            share * max(1 / 128, (1 if size >= 4 else 2) / size / 32) for share, size in shape.pieces or ((1.0, 16),)
        )
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
            if tile.formulation in ("gather", "runs"):  # the copy engine has a way of its own into shared memory
                self.shared += written
        else:
            products = flops / 4096 / tile.num_warps
            # Compiled for sm_80, 42 loops of fp16 lie within 14 % of this, and 4-byte operands read more for a product.
            each = 1.05 if dtype.itemsize == 2 else 1.4
            instructions = (30 + 1.5 * products + loads) if loads else (62 + fetched + each * products)
            warp_rows, warp_columns = _of_a_warp(shape, tile)
            self.shared = written + tile.num_warps * (warp_rows + warp_columns) * shape.depth * dtype.itemsize / 128
        self.issue = instructions * tile.num_warps / 4
        # What waits for the step before, and lets that after it wait: operands on their way in registers.
        self.alone = waits * (2 * self.stage / 128 + LOAD_CYCLES / 4)
        self.stages_ahead = tile.num_stages - 1
        self.fused = 0.0  # a step's cycles where no other program takes turns and nothing overlaps
        if any(size < 4 for _, size in shape.pieces):  # no copy ahead: Triton loads these when they are due
            self.fused, self.stages_ahead = max(self.tensor, self.issue, self.shared), 0
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
        self, ctas: int, steps: float, out_bytes: int, resident: int, beside: Phase | None = None
    ) -> float:  # fmt: skip
        """Cycles of `ctas` equal programs: whole waves, one program an SM at a time, then what is left over.

        Those `beside` them, which are shorter, start with what is left over.
        """
        if not ctas:
            return 0.0
        sms = self.gpu.sms
        whole, left = divmod(ctas, sms)
        out = out_bytes / (self.gpu.l2 / self.gpu.clock / sms)
        rates, others, steps_of_others, _ = beside or Phase(self, 0, 0.0, 0)
        waves = math.ceil((ctas + others) / sms)
        around = (FILL_CYCLES + out) * waves / min(resident, waves)
        busy = steps * whole * self.step(sms, min(resident, max(1, whole)))
        if left + others:
            active, there = min(sms, left + others), min(resident, whole + 1)
            long, short = steps * self.step(active, there), steps_of_others * rates.step(active, there)
            busy += _last_of_two(left, long, others, short, sms) if others else long
        return busy + around


class Phase(NamedTuple):
    """Equal programs of a launch: how many, and the steps and bytes written of each."""

    rates: Rates
    ctas: int
    steps: float
    out_bytes: int


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
