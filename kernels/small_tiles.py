"""Tiles of the kernels beside the convolution engine: locally connected and depthwise layers, and partial sums."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tileconv.kernels.conv_tile import power_of_two
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU
from tileconv.kernels.tiles import ElementwiseTile, choose_elementwise


@dataclass(frozen=True)
class ProductTile:
    """What one program of a batched matrix product makes: rows x columns, `depth` at a step."""

    rows: int
    columns: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}*{self.depth} w{self.num_warps} s{self.num_stages}"


def choose_local(rows: int, columns: int, depth: int, dtype: torch.dtype, gpu: GPU) -> ProductTile:
    """The tile of a locally connected layer's products: small ones, because every pixel has its own."""
    most = 512 if gpu.interprets else (32 if dtype.itemsize == 8 else 64)
    extents = [min(max(power_of_two(extent), 16), most) for extent in (rows, columns, depth)]
    return ProductTile(extents[0], extents[1], extents[2] if gpu.interprets else min(extents[2], 128 // dtype.itemsize))


def choose_slices(slices: int, size: int, dtype: torch.dtype, gpu: GPU) -> ElementwiseTile:
    """The tile of the sum of `slices` parts of `size` elements, written as `dtype`: rows are parts added side by side.

    Columns give way to rows until programs fill the SMs, down to 32 columns, a cache line of fp32: one row of 64 bias
    gradients waits for memory 66 times to add 264 parts, four loads each time; 64 rows of 32 wait five times.
    """
    tile = choose_elementwise(slices, size, dtype, gpu)
    rows, cols, most = tile.rows, tile.cols, power_of_two(slices)
    while rows < most and cols > 32 and -(-size // cols) < gpu.sms:
        rows, cols = 2 * rows, cols // 2
    return replace(tile, rows=rows, cols=cols)


@dataclass(frozen=True)
class DepthwiseTile:
    """What one program makes: `lines` output rows of `columns` pixels x `channels`; in wgrad `taps` taps of `channels`,
    from `columns` pixels at a step, the steps shared by `splits` programs."""

    lines: int
    columns: int
    channels: int
    taps: int = 1
    splits: int = 1
    num_warps: int = 4

    def __str__(self) -> str:
        size = f"{self.lines}x{self.columns}x{self.channels}"
        return size + (f"*{self.taps} taps /{self.splits}" if self.taps > 1 or self.splits > 1 else "")


def choose_depthwise(problem: Conv2dProblem, nhwc: bool, dtype: torch.dtype, gpu: GPU) -> DepthwiseTile:
    """The tile of a forward or input-gradient pass: 16 bytes of channels (in NCHW columns) a thread.

    Three output rows share the five input rows under a 3x3 window, instead of reading nine, and keep 24 sums a thread
    of fp16.  There three rows of a 5x5 window spill (16 times; two take 180 registers), as do two rows where a channel
    sums over several filters; 7x7 spills 58 times.  Strided windows share little.
    """
    shares = problem.stride[0] == 1 and problem.R > 1 and problem.taps <= 25
    lines = 3 if shares else 1
    if shares and dtype.itemsize == 2:
        lines = 1 if problem.group_channels > 1 else 3 if problem.taps <= 9 else 2
    return _depthwise(problem, nhwc, dtype, gpu, min(lines, problem.P))


def choose_depthwise_wgrad(problem: Conv2dProblem, nhwc: bool, dtype: torch.dtype, gpu: GPU) -> DepthwiseTile:
    """The tile of a weight-gradient pass: up to nine taps a program, whose sums stay in registers until the end."""
    tile = _depthwise(problem, nhwc, dtype, gpu, 1)
    taps = min(problem.taps, 9)
    blocks = -(-problem.K // tile.channels) * -(-problem.taps // taps)
    steps = -(-problem.N * problem.P * problem.Q // tile.columns)
    splits = max(1, min(steps // 4, -(-4 * gpu.sms // blocks)))
    return replace(tile, taps=taps, splits=splits)


def _depthwise(problem: Conv2dProblem, nhwc: bool, dtype: torch.dtype, gpu: GPU, lines: int) -> DepthwiseTile:
    pixels = power_of_two(problem.N * -(-problem.P // lines) * problem.Q)
    if gpu.interprets:
        channels = min(power_of_two(problem.K), 256)
        return DepthwiseTile(lines, min(pixels, (1 << 17) // channels), channels)
    budget = 128 * max(1, 16 // dtype.itemsize)
    channels = min(power_of_two(problem.K), max(16, 128 // dtype.itemsize)) if nhwc else 1
    return DepthwiseTile(lines, min(pixels, budget // channels), channels)


def choose_split(pixels: int, channels: int, nhwc: bool, dtype: torch.dtype, gpu: GPU) -> ElementwiseTile:
    """The tile of the kernel that splits fp32: `pixels` rows of `channels`, transposed from NCHW."""
    return choose_elementwise(pixels, channels, dtype, gpu) if nhwc else choose_turn(pixels, channels, dtype, gpu)


def choose_turn(height: int, width: int, dtype: torch.dtype, gpu: GPU) -> ElementwiseTile:
    """The tile of a kernel that transposes: both its loads and its stores are wide."""
    if gpu.interprets:
        return choose_elementwise(height, width, dtype, gpu)
    return ElementwiseTile(min(power_of_two(height), 64), min(power_of_two(width), 32))
