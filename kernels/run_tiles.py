"""Tiles for first layers that are read in runs (device/runs.py): which passes they serve, and which tile one gets."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from tileconv.kernels import cost, excluded
from tileconv.kernels.conv_tile import ConvTile, power_of_two
from tileconv.kernels.geometry import Conv2dProblem, Runs
from tileconv.kernels.hardware import GPU, triton_version
from tileconv.kernels.tiles import forced

TYPICAL_BATCH = 32
# (pixels, filters, depth of a step, warps).  Compiled for sm_80 and sm_90 none spills, and on sm_90 no product waits
# for another; 256 pixels x 64 filters in four warps only from sm_90 on, in 2-byte types: of fp32 they spill 142 times.
# Of inner runs two of 60 forward kernels keep 8 and 16 bytes in memory on sm_90: 256 pixels x 128 filters of fp16, and
# 128 x 32 of contiguous-channel TF32.
FPROP = (
    (256, 64, 32, 4), (256, 64, 32, 8), (128, 64, 64, 4), (128, 64, 32, 4), (64, 64, 64, 4), (32, 64, 64, 4),
    (256, 128, 32, 8), (128, 128, 64, 8), (128, 32, 64, 4),
)  # fmt: skip
# With 32 filters more in a second product, where that wastes fewer rows: 96 as two blocks of 64 multiply a third more,
# and load every pixel twice.  Compiled for sm_80 to sm_120 none of those chosen spills, and on sm_90 no product waits.
FPROP_OF_96 = ((128, 64, 32, 4),)
# (pixels of one row, filters, (c, r, e), warps)
WGRAD = (
    (64, 64, 256, 8), (64, 64, 128, 4), (64, 64, 128, 8), (32, 64, 128, 4), (64, 128, 128, 8), (64, 32, 64, 4),
)  # fmt: skip
# Hopper's warp groups take 4-byte operands along the depth only, and here pixels are the depth.  But a block of fewer
# than four warps multiplies by mma.sync, as all blocks do on other GPUs, and its fragments come from any layout.  Warps
# make 64 x 64, for one read of 128 bytes a product, where 32 x 32 takes two.
WGRAD_TF32 = ((16, 64, 128, 2), (16, 128, 64, 2), (16, 64, 64, 1), (16, 32, 128, 2))
# Triton 3.6 spills those 2 to 192 times; these it does not, in 250 to 254 registers and in 159 to 164.
WGRAD_TF32_IN_3_6 = ((16, 64, 64, 2), (16, 32, 64, 2))


def in_runs(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
    """Whether a pass is one of a first layer that can read its image in runs, if the image lies as they need it.

    Not the filter gradient of TF32 on a B200: how fast that multiplies by mma.sync is not published.
    """
    few = problem.C <= 4 and max(problem.stride) > 1 and not forced()
    tf32 = dtype == torch.float32 and precision == "tf32" and (pass_ == "fprop" or gpu.arch // 10 != 10)
    on_tensor_cores = dtype.itemsize == 2 or tf32
    return few and pass_ != "dgrad" and on_tensor_cores and problem.dilation[1] == problem.groups == 1


def turned(tile: ConvTile, gpu: GPU) -> bool:
    """Whether the rows of a second product are pixels.

    Warp groups take rows in 64s. Single warps take 16, and their fragments of pixels serve both products as they are.
    """
    return tile.block_k2 > 0 and (gpu.interprets or gpu.arch // 10 in (9, 10))


def most_registers(tile: ConvTile, dtype: torch.dtype, gpu: GPU) -> int | None:
    """Registers a thread that a launch is held to, for three programs an SM, where none spills then.

    Left alone, storing 64 + 32 filters took 160 to 214 for sm_90, and two programs hide less of each other's ends.
    """
    three = tile.block_k2 > 0 and tile.block_c <= 32 and dtype.itemsize == 2
    return 168 if three and gpu.arch // 10 == 9 else None


@lru_cache(maxsize=1024)
def choose_runs(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU, batch_invariant: bool = False,
    runs: Runs | None = None,
) -> ConvTile:  # fmt: skip
    """The tile with the least predicted time: box[0] is output pixels, in wgrad of one row, block_c is (c, r, e).

    With batch_invariant it is the tile of one batch size for all of them.  `runs` are problem.runs if none are given.
    """
    if batch_invariant:
        tile = choose_runs(replace(problem, N=TYPICAL_BATCH), pass_, dtype, precision, gpu, runs=runs)
        # As in tiles.choose: numpy's library adds in an order that the place in a block decides, but not in small ones.
        small = replace(tile, box=(16, 1, 1), block_k=power_of_two(tile.rows), block_k2=0)
        return small if gpu.interprets else tile
    runs = runs or problem.runs(dtype.itemsize, pass_)
    assert runs is not None
    filters = max(power_of_two(problem.K), 16)
    of_96 = pass_ == "fprop" and 96 * -(-problem.K // 96) < 64 * -(-problem.K // 64)
    if gpu.interprets:  # few programs, large blocks
        pixels = problem.Q if pass_ == "wgrad" else problem.N * problem.P * problem.Q
        depth = power_of_two(problem.C * problem.R * runs.length)
        most = 32 if runs.align == 1 else 1024  # a mask's bits
        box = (min(max(power_of_two(pixels), 16), most), 1, 1)
        block_c = max(min(depth, 1024), power_of_two(runs.length), 16)
        return ConvTile("runs", box, 64 if of_96 else min(filters, 512), block_c, block_k2=32 * of_96)
    found = []
    in_bits = pass_ == "wgrad" and dtype.itemsize == 4
    of_bits = WGRAD_TF32_IN_3_6 if triton_version() < (3, 7) else WGRAD_TF32
    candidates = of_bits if in_bits else WGRAD if pass_ == "wgrad" else FPROP
    # By single warps 4-byte operands spill in some layers: 8 to 280 bytes.
    of_96 = of_96 and (dtype.itemsize == 2 or gpu.arch // 10 in (9, 10))
    both = [(*tile, 0) for tile in candidates] + [(*tile, 32) for tile in FPROP_OF_96 if of_96]
    for pixels, block_k, block_c, warps, block_k2 in both:
        block_c = block_c if in_bits or runs.inner else max(block_c, runs.length)
        if block_k2 and block_c > 32 and gpu.arch >= 100:
            continue  # runs of 64 pixels: 8 to 32 bytes spill
        rows = block_k + block_k2
        sums = rows * (block_c if pass_ == "wgrad" else pixels)
        # As many sums spill before Hopper, and with the addresses of 4-byte pixels beside them there too.
        most = 4096 * warps if (gpu.arch < 90 or dtype.itemsize == 4) and not in_bits else 1 << 16
        if block_k > max(filters, 32) or sums >= most:
            continue
        if gpu.arch in (86, 89) and not runs.inner and dtype.itemsize == 4 and (pixels, block_k, warps) == (128, 64, 4):
            continue  # compiled for sm_86 and sm_89, not for sm_80, 8 bytes spill
        if gpu.arch in (86, 89) and in_bits and runs.length <= 4 and (block_k == 128 or warps == 1):
            continue  # there many rows of addresses: 40 and 64 bytes
        step = (rows + (block_c if pass_ == "wgrad" else pixels)) * dtype.itemsize
        step *= pixels if pass_ == "wgrad" else block_c
        stages = min(3, (gpu.shared_block - 2048) // step)
        if stages < 2:
            continue
        tile = ConvTile("runs", (pixels, 1, 1), block_k, block_c, warps, stages, block_k2=block_k2)
        found += _split(problem, tile, runs, gpu) if pass_ == "wgrad" else [tile]
    found = excluded.without(found, gpu.name, pass_)
    # Loads that threads address by themselves take their time in ways that the model sees less of than a box's.
    return min(
        found,
        key=lambda tile: cost.weighed_us(cost.predict(problem, pass_, tile, dtype, precision, gpu, runs), gpu, 0.15),
    )


def _split(problem: Conv2dProblem, tile: ConvTile, runs: Runs, gpu: GPU) -> list[ConvTile]:
    """One, two and four programs an SM, eight rows of outputs each at the least.

    Programs of fewer than four warps are as many as make eight, so that no scheduler waits for a single warp's reads.
    """
    programs = -(-problem.K // tile.block_k) * -(-problem.C * problem.R * runs.length // tile.block_c)
    programs *= -(-problem.Q // tile.pixels) * runs.classes
    most = max(1, problem.N * problem.P // runs.classes // 8)
    each = (1, 2, 4) if tile.num_warps >= 4 else (8 // tile.num_warps,)
    return [replace(tile, splits=min(most, max(1, waves * gpu.sms // programs))) for waves in each]
