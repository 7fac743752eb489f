"""Tiles of the kernel that convolves and max-pools, and whether it is worth its while."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import torch

from tileconv.kernels import conv_tile, cost, excluded, fp32, tiles
from tileconv.kernels.conv_tile import ConvTile, power_of_two, powers
from tileconv.kernels.geometry import Conv2dProblem, Pool2dProblem
from tileconv.kernels.hardware import GPU


def fuse_pool(problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
    """Whether a convolution, its ReLU and the max-pool behind it run as one kernel."""
    return why_separate(problem, pool, dtype, precision, gpu) is None


def why_separate(
    problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, precision: str, gpu: GPU
) -> str | None:
    """None if a convolution and the max-pool behind it run as one kernel, else why they run as two."""
    if reason := why_impossible(problem, pool, dtype, precision, gpu):
        return reason
    if tiles.forced():
        tile = choose_pooled(problem, pool, dtype, precision, gpu)
        return why_invalid(tile, problem, pool, dtype, precision, gpu)
    if gpu.interprets:
        # One program a window and many steps: seconds where the separate kernels take milliseconds.
        return None if _whole(problem, pool) else "in the interpreter only windows that do not overlap are fused"
    return _why_slower(problem, pool, dtype, precision, gpu)


@lru_cache(maxsize=4096)
def _why_slower(
    problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, precision: str, gpu: GPU
) -> str | None:
    together, apart = modelled_us(problem, pool, dtype, precision, gpu)
    return None if together < apart else f"one kernel is modelled to take {together:.1f} us, two {apart:.1f} us"


def modelled_us(
    problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, precision: str, gpu: GPU
) -> tuple[float, float]:
    """Modelled microseconds of one kernel and of two, with switches as in training."""
    tile = choose_pooled(problem, pool, dtype, precision, gpu)
    together = cost.predict_pooled(problem, pool, tile, dtype, precision, gpu)
    convolution = tiles.choose(problem, "fprop", dtype, precision, gpu)
    apart = cost.predict(problem, "fprop", convolution, dtype, precision, gpu).modelled_us
    return together, apart + cost.streaming_us(pool.bytes_least(dtype.itemsize, switch=True), gpu)


def why_impossible(
    problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, precision: str, gpu: GPU
) -> str | None:
    """None if one kernel can run, whether it pays or not, else why it cannot."""
    if not gpu.has_descriptors:
        return f"one kernel needs tensor descriptors (sm_90 or newer); this is {gpu.name}"
    if fp32.parts(precision) > 1:
        return f"precision={precision!r} multiplies parts of fp32, which the kernel that pools does not read"
    if not fp32.on_tensor_cores(dtype, precision):
        return f"products of {dtype} at precision={precision!r} do not run on tensor cores"
    if tiles.first_layer(problem, "fprop", dtype, precision, gpu):
        return "a first layer runs on blocks of its image, which the kernel that pools does not read"
    if not conv_tile.addressable(problem, "fprop", dtype):
        return f"a group's {problem.group_channels} channels of {dtype} are no multiple of 16 bytes"
    if problem.groups == problem.C > 1:
        return "depthwise convolutions have a kernel of their own"
    if pool.dilation != (1, 1) or pool.taps > 256:
        return "one kernel takes windows of at most 256 elements without dilation"
    return None if gpu.interprets or tiles.forced() else _why_no_tile(problem, pool, dtype, gpu)


@lru_cache(maxsize=4096)
def _why_no_tile(problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, gpu: GPU) -> str | None:
    every = candidates(problem, pool, dtype, gpu)
    if not every:
        return f"no tile for {problem.N} images and windows of {pool.kernel} fits {gpu.name}'s registers"
    wrong = excluded.names(gpu.name, "fprop")
    if all(str(tile) in wrong for tile in every):
        return f"a self-test on {gpu.name} excluded every tile of the kernel that pools"
    return None


def why_invalid(
    tile: ConvTile, problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, precision: str, gpu: GPU
) -> str | None:
    """As conv_tile.why_invalid, for the kernel that convolves and pools."""
    if tile.formulation == "gather" or tile.splits > 1 or tile.block_k2 or tile.columns > 1 or tile.half:
        return f"{tile}: the kernel that pools has no gather, no splits, no second product and no half boxes"
    if reason := conv_tile.why_invalid(tile, problem, "fprop", dtype, precision, gpu):
        return reason
    if tile.formulation == "pixel":
        return None
    if not _whole(problem, pool):
        return f"formulation='box' needs stride 1 and windows that do not overlap, of a power of two: {pool.kernel}"
    if any(extent % window for extent, window in zip(tile.box[1:], pool.kernel, strict=True)):
        return f"box={tile.box} does not hold whole windows of {pool.kernel}"
    return None


def _whole(problem: Conv2dProblem, pool: Pool2dProblem) -> bool:
    """Whether a box can hold whole windows."""
    return (
        pool.kernel == pool.stride
        and pool.taps > 1
        and problem.stride == (1, 1)
        and all(extent == power_of_two(extent) for extent in pool.kernel)
    )


def choose_pooled(
    problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, precision: str, gpu: GPU
) -> ConvTile:
    """The tile of the kernel that convolves and pools; `tiles.override` is honoured or raises ValueError.

    Raises RuntimeError where a self-test excluded every tile that could be chosen.
    """
    changes = tiles.forced()
    formulation = changes.pop("formulation", None)
    tile = _choose(problem, pool, dtype, precision, gpu, None if formulation is None else str(formulation))
    return replace(tile, **changes) if changes else tile  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _choose(
    problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, precision: str, gpu: GPU, formulation: str | None
) -> ConvTile:
    if formulation == "gather":
        return ConvTile("gather", (64, 1, 1), 64, 32)
    if gpu.interprets:
        return _interpreter_tile(problem, pool, formulation)
    found = [tile for tile in candidates(problem, pool, dtype, gpu) if formulation in (None, tile.formulation)]
    # A self-test runs the convolution's kernel; what is wrong there is not trusted here, where the loop is the same.
    found = excluded.without(found, gpu.name, "fprop")
    if not found:
        return ConvTile(str(formulation), (64, 1, 1), 64, 128 // dtype.itemsize)
    return min(found, key=lambda tile: cost.predict_pooled(problem, pool, tile, dtype, precision, gpu))


def _interpreter_tile(problem: Conv2dProblem, pool: Pool2dProblem, formulation: str | None) -> ConvTile:
    """Large blocks: a program costs about 0.4 ms of Python and a step 1.5 ms, whatever its size."""
    block_c = min(max(power_of_two(problem.group_channels), 16), 1024)
    block_k = min(max(power_of_two(problem.group_filters), 16), 256)
    most = min(4096, conv_tile.MAX_NUMEL // max(block_k, block_c))
    if formulation == "pixel" or (formulation is None and not _whole(problem, pool)):
        return ConvTile("pixel", (min(max(power_of_two(problem.N), 16), most), 1, 1), block_k, block_c)
    columns = min(power_of_two(pool.Q) * pool.kernel[1], most // pool.kernel[0])
    rows = min(power_of_two(pool.P) * pool.kernel[0], most // columns)
    images = min(power_of_two(problem.N), most // (columns * rows))
    return ConvTile("box", (max(images, 16 // (rows * columns)), rows, columns), block_k, block_c)


def candidates(problem: Conv2dProblem, pool: Pool2dProblem, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    """The tiles that compile to clean loops, see tests/test_conv_pool.py."""
    depth = 128 // dtype.itemsize
    found = []
    for pixels, block_k in itertools.product((64, 128, 256), (64, 128, 256)):
        if 64 < block_k > power_of_two(problem.group_filters):
            continue
        for box in _boxes(problem, pool, pixels):
            whole = box[1] * box[2] > 1
            warps = _warps(block_k, pixels, whole, pool, dtype, gpu)
            if warps is None:
                continue
            deepest = min(4, (gpu.shared_block - 2048) // ((block_k + pixels) * 128))
            for stages in range(deepest, 1, -1):  # of equals the deepest
                found.append(ConvTile("box" if whole else "pixel", box, block_k, depth, warps, stages))
    return found


def _warps(block_k: int, pixels: int, whole: bool, pool: Pool2dProblem, dtype: torch.dtype, gpu: GPU) -> int | None:
    """How many warps hold a tile's sums and keys without spilling; None where none do.

    Four hold 16,384 sums on their way to keys (168 registers of 64 x 256), or 8,192 beside as
    many keys (145 registers, 210 in TF32).
    """
    most = 16_384 if whole else 8192  # 16,384 beside their keys spill 90 times
    if whole and pool.partial and dtype.itemsize == 4:
        most = 8192  # keys of eight bytes, some left out: 20 times
    if not whole and gpu.arch >= 120 and dtype.itemsize == 4:
        most = 4096  # operands take registers too where tensor cores read no shared memory
    if not whole and (block_k > 64 or (100 <= gpu.arch < 120 and pixels == 64)):
        return None  # addresses of 128 rows of a contiguous output spill 100 times; 64 x 64 on sm_100 5 times
    if block_k * pixels > 2 * most:
        return None
    return 4 if block_k * pixels <= most else 8


def _boxes(problem: Conv2dProblem, pool: Pool2dProblem, pixels: int) -> list[tuple[int, int, int]]:
    """One place of many images, and boxes of whole windows that waste fewest pixels."""
    images = min(power_of_two(problem.N), pixels)
    found = [(pixels, 1, 1)] if images == pixels or pixels == 64 else []
    if not _whole(problem, pool):
        return found
    height, width = pool.kernel
    boxes = [
        (n, pixels // n // columns, columns)
        for n in powers(images)
        for columns in powers(pixels // n)
        if columns >= width and pixels // n // columns >= height
    ]

    def covered(box: tuple[int, int, int]) -> int:
        rows, columns = box[1] // height, box[2] // width
        return -(-problem.N // box[0]) * box[0] * (-(-pool.P // rows) * rows) * (-(-pool.Q // columns) * columns)

    return found + sorted(boxes, key=lambda box: (covered(box), -box[0], box[1]))[:3]
