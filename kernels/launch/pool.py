"""Pooling on the host side."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from tileconv.kernels import conv_tile, plane_tiles, strip_tiles, tiles
from tileconv.kernels.device import average, pool_planes, pool_strips, selection
from tileconv.kernels.device import pool as device
from tileconv.kernels.geometry import AdaptivePool2dProblem, Pool2dProblem
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, accumulator, index_type, strides
from tileconv.kernels.plane_tiles import PlaneTile
from tileconv.kernels.strip_tiles import StripTile


def switch_dtype(problem: Pool2dProblem | AdaptivePool2dProblem) -> torch.dtype:
    """One byte for windows of up to 256 elements."""
    return torch.uint8 if problem.taps <= 256 else torch.int32


def plan_max_forward(
    problem: Pool2dProblem, x: torch.Tensor, y: torch.Tensor, switch: torch.Tensor | None, *, gpu: GPU,
    activation: str | None = None, strips: StripTile | PlaneTile | None = None,
) -> Launch:  # fmt: skip
    """The launch that writes y and, if given, switch (laid out like y) from x; activation "relu" cuts y at zero.

    `strips` pins the tile of a pool in strips or in columns of planes; ValueError where it has none.
    """
    arguments = {
        "x": x, "y": y, "switch": switch, **_extents(problem), **strides("x", x, "nchw"), **strides("y", y, "ncpq"),
        **_window(problem), "HAS_SWITCH": switch is not None, "ACTIVATION": activation,
    }  # fmt: skip
    images = [x, y] if switch is None else [x, y, switch]
    if columns := _planes(problem, "forward", gpu, images, strips):
        arguments |= {"OUTSIDE": -math.inf if problem.partial else 0.0, "AHEAD": plane_tiles.AHEAD}
        return _in_planes(pool_planes.max_forward_planes, arguments, columns, problem, "forward", images)
    if tile := _strips(problem, "forward", gpu, [x, y], strips):
        arguments["OUTSIDE"] = -math.inf if problem.partial else 0.0
        return _in_strips(pool_strips.max_forward_strips, arguments, tile, (problem.P, problem.Q), [x, y])
    arguments["PARTIAL"] = problem.partial
    arguments["ONE_KEY"] = x.itemsize <= 4 and problem.taps < 1 << 15
    arguments["UNROLL"] = problem.taps <= 25 and not gpu.interprets
    return _tiled(device.max_forward, arguments, y, problem.y_shape, gpu, [x, y])


def plan_switch_to_index(problem: Pool2dProblem, switch: torch.Tensor, index: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes PyTorch's int64 indices (h * W + w) from the switches."""
    arguments = {
        "switch": switch, "index": index, "W": problem.W, "P": problem.P, "Q": problem.Q, "C": problem.C,
        **strides("", switch, "ncpq"), **_window(problem),
    }  # fmt: skip
    del arguments["R"]
    return _tiled(device.switch_to_index, arguments, switch, problem.y_shape, gpu, [switch])


def plan_max_backward(
    problem: Pool2dProblem,
    dy: torch.Tensor,
    switch: torch.Tensor,
    y: torch.Tensor | None,
    dx: torch.Tensor,
    *,
    gpu: GPU,
    strips: StripTile | PlaneTile | None = None,
) -> Launch:
    """The launch that writes dx from dy; with y (laid out like switch), windows with y <= 0 pass no gradient on.

    `strips` as in plan_max_forward.
    """
    arguments = {
        "dy": dy, "switch": switch, "y": y, "dx": dx, **_extents(problem), **strides("g", dy, "ncpq"),
        **strides("y", switch, "ncpq"), **strides("x", dx, "nchw"), **_window(problem),
        "MASK": y is not None, "ACC": accumulator(dx.dtype),
    }  # fmt: skip
    cells = strip_tiles.cells(problem)
    images = [dx, dy, switch]  # windows may outnumber pixels, and an expanded dy does not reach far
    masked = [dy, switch, dx] if y is None else [dy, switch, dx, y]
    if columns := _planes(problem, "backward", gpu, masked, strips):
        return _in_planes(pool_planes.max_backward_planes, arguments, columns, problem, "backward", images)
    if tile := _strips(problem, "backward", gpu, [dy, switch, dx], strips):
        return _in_strips(pool_strips.max_backward_strips, arguments, tile, cells, images)
    if not _in_cells(problem, dx):
        return _tiled(device.max_backward, arguments, dx, problem.x_shape, gpu, images)
    del arguments["DIL_H"], arguments["DIL_W"]
    # 16 bytes of a row, where rows begin at multiples of them; elsewhere a join costs registers and saves nothing.
    aligned = all(extent * dx.itemsize % 16 == 0 for extent in (problem.padding[1], dx.stride(2)))
    abreast = problem.stride[1] == 2 and aligned and not _channels_inner(dx)
    arguments |= {"CELLS_H": cells[0], "CELLS_W": cells[1], "ABREAST": 2 if abreast else 1}
    shape = (problem.N, problem.C, *cells)
    crowded = _windows_over_cell(problem) > 1
    return _tiled(device.max_backward_cells, arguments, dx, shape, gpu, images, crowded=crowded)


def _in_cells(problem: Pool2dProblem, dx: torch.Tensor) -> bool:
    """Whether a cell's pixels and the windows over it, which are unrolled, are few."""
    pixels = math.prod(problem.stride)
    if not _channels_inner(dx) and (pixels == 1 or _windows_over_cell(problem) > 4):
        return False  # in NCHW each has an offset of its own, and a single pixel shares none
    return problem.dilation == (1, 1) and max(problem.taps, pixels) <= 25


def _windows_over_cell(problem: Pool2dProblem) -> int:
    return math.prod((extent - 1) // step + 1 for extent, step in zip(problem.kernel, problem.stride, strict=True))


def plan_adaptive_avg_forward(problem: AdaptivePool2dProblem, x: torch.Tensor, y: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes the mean of every window."""
    arguments = {
        "x": x, "y": y, **_extents(problem), **strides("x", x, "nchw"), **strides("y", y, "ncpq"),
        "R": problem.window[0], "S": problem.window[1], "ACC": accumulator(x.dtype),
    }  # fmt: skip
    return _tiled(device.adaptive_avg_forward, arguments, y, tuple(y.shape), gpu, [x, y])


def plan_adaptive_avg_backward(
    problem: AdaptivePool2dProblem, dy: torch.Tensor, dx: torch.Tensor, *, gpu: GPU
) -> Launch:
    """The launch that spreads dy over its windows."""
    arguments = {
        "dy": dy, "dx": dx, **_extents(problem), **strides("g", dy, "ncpq"), **strides("x", dx, "nchw"),
        "R": problem.overlap[0], "S": problem.overlap[1], "ACC": accumulator(dx.dtype),
    }  # fmt: skip
    return _tiled(device.adaptive_avg_backward, arguments, dx, tuple(dx.shape), gpu, [dx, dy])


def plan_adaptive_max_forward(
    problem: AdaptivePool2dProblem, x: torch.Tensor, y: torch.Tensor, switch: torch.Tensor | None, *, gpu: GPU
) -> Launch:
    """The launch that writes the maximum of every window and, if given, switch (laid out like y)."""
    arguments = {
        "x": x, "y": y, "switch": switch, **_extents(problem), **strides("x", x, "nchw"), **strides("y", y, "ncpq"),
        "R": problem.window[0], "S": problem.window[1], "HAS_SWITCH": switch is not None,
    }  # fmt: skip
    return _tiled(selection.adaptive_max_forward, arguments, y, tuple(y.shape), gpu, [x, y])


def plan_adaptive_switch_to_index(
    problem: AdaptivePool2dProblem, switch: torch.Tensor, index: torch.Tensor, *, gpu: GPU
) -> Launch:
    """The launch that writes PyTorch's int64 indices (h * W + w) from the switches."""
    arguments = {
        "switch": switch, "index": index, **_extents(problem), **strides("", switch, "ncpq"), "S": problem.window[1],
    }  # fmt: skip
    return _tiled(selection.adaptive_switch_to_index, arguments, switch, tuple(switch.shape), gpu, [switch])


def plan_adaptive_max_backward(
    problem: AdaptivePool2dProblem, dy: torch.Tensor, switch: torch.Tensor, dx: torch.Tensor, *, gpu: GPU
) -> Launch:
    """The launch that gives dy to the elements that the switches name."""
    arguments = {
        "dy": dy, "switch": switch, "dx": dx, **_extents(problem), **strides("g", dy, "ncpq"),
        **strides("y", switch, "ncpq"), **strides("x", dx, "nchw"), "R": problem.overlap[0],
        "OVER": problem.overlap[1], "S": problem.window[1], "ACC": accumulator(dx.dtype),
    }  # fmt: skip
    return _tiled(selection.adaptive_max_backward, arguments, dx, tuple(dx.shape), gpu, [dx, dy, switch], crowded=True)


@dataclass(frozen=True)
class Averaging:
    """What a window's sum becomes: PyTorch's count_include_pad and divisor_override, and the exponent of lp_pool2d."""

    include_pad: bool
    divisor: int | None
    norm: float | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        norm = int(self.norm) if self.norm is not None and float(self.norm).is_integer() else self.norm
        return {"INCLUDE_PAD": self.include_pad, "DIVISOR": self.divisor, "NORM": norm}


def plan_average_forward(
    problem: Pool2dProblem, averaging: Averaging, x: torch.Tensor, y: torch.Tensor, *, gpu: GPU
) -> Launch:
    """The launch that writes the average, or the norm, of every window."""
    arguments = {
        "x": x, "y": y, **_extents(problem), **strides("x", x, "nchw"), **strides("y", y, "ncpq"),
        **_undilated(problem), **averaging.arguments, "ACC": accumulator(x.dtype),
    }  # fmt: skip
    return _tiled(average.average_forward, arguments, y, problem.y_shape, gpu, [x, y])


def plan_average_backward(
    problem: Pool2dProblem, averaging: Averaging, dy: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None,
    dx: torch.Tensor, *, gpu: GPU,
) -> Launch:  # fmt: skip
    """The launch that spreads dy over its windows; a norm needs its input x and its output y."""
    arguments = {
        "dy": dy, "x": x, "y": y, "dx": dx, **_extents(problem), **strides("g", dy, "ncpq"),
        **strides("x", dx if x is None else x, "nchw"), **strides("y", dy if y is None else y, "ncpq"),
        **strides("d", dx, "nchw"), **_undilated(problem), **averaging.arguments, "ACC": accumulator(dx.dtype),
    }  # fmt: skip
    images = [image for image in (dx, dy, x, y) if image is not None]
    return _tiled(average.average_backward, arguments, dx, problem.x_shape, gpu, images, crowded=x is not None)


def plan_unpool(x: torch.Tensor, index: torch.Tensor, y: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes the elements of x into y, which is zero, where index says."""
    count, channels, rows, columns = x.shape
    planes, pixels = count * channels, rows * columns
    # Every pixel of a step is compared with every other: steps are short, except that the interpreter counts steps.
    budget, longest = (1 << 18, 64) if gpu.interprets else (1 << 13, 16)
    cols = min(conv_tile.power_of_two(pixels), longest)
    tile_rows = max(1, min(conv_tile.power_of_two(planes), budget // (cols * cols)))
    arguments = {
        "x": x, "index": index, "y": y, "C": channels, "W": y.shape[3], "PLANES": planes, "Q": columns,
        "PIXELS": pixels, "SIZE": y.shape[2] * y.shape[3], **strides("x", x, "ncpq"), **strides("i", index, "ncpq"),
        **strides("y", y, "nchw"), "INDEX": index_type(x, index, y), "ROWS": tile_rows, "COLS": cols,
    }  # fmt: skip
    programs = triton.cdiv(planes, tile_rows)
    return Launch(selection.unpool_forward, (programs,), arguments, 4, 1, f"{tile_rows}x{cols} w4")


def plan_unpool_backward(dy: torch.Tensor, index: torch.Tensor, dx: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that reads dx from dy where index says."""
    arguments = {
        "dy": dy, "index": index, "dx": dx, "C": dx.shape[1], "W": dy.shape[3], "P": dx.shape[2], "Q": dx.shape[3],
        "SIZE": dy.shape[2] * dy.shape[3], **strides("g", dy, "nchw"), **strides("i", index, "ncpq"),
        **strides("x", dx, "ncpq"),
    }  # fmt: skip
    return _tiled(selection.unpool_backward, arguments, dx, tuple(dx.shape), gpu, [dy, index, dx])


def _undilated(problem: Pool2dProblem) -> dict[str, Any]:
    return {name: value for name, value in _window(problem).items() if not name.startswith("DIL")}


def _extents(problem: Pool2dProblem | AdaptivePool2dProblem) -> dict[str, Any]:
    return {"C": problem.C, "H": problem.H, "W": problem.W, "P": problem.P, "Q": problem.Q}


def _window(problem: Pool2dProblem) -> dict[str, Any]:
    return {
        "R": problem.kernel[0], "S": problem.kernel[1], "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0], "PAD_W": problem.padding[1],
        "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
    }  # fmt: skip


def _channels_inner(image: torch.Tensor) -> bool:
    return image.shape[1] > 1 and image.stride(1) == 1


def _strips(
    problem: Pool2dProblem, pass_: str, gpu: GPU, images: list[torch.Tensor], pinned: StripTile | PlaneTile | None
) -> StripTile | None:
    """The strips of a pool whose images all have their channels side by side, in whole 16 bytes; else None."""
    dtype = images[0].dtype
    fits = all(_channels_inner(image) for image in images) and problem.C * dtype.itemsize % 16 == 0
    if pinned is None:
        return strip_tiles.choose_strips(problem, pass_, dtype, gpu) if fits else None
    if not fits or not strip_tiles.has_strips(problem, dtype):
        raise ValueError(
            f"strips={pinned} do not suit {problem} of {dtype}: windows must overlap with their next neighbours alone, "
            "and images must be channels_last with whole 16 bytes of channels"
        )
    assert isinstance(pinned, StripTile)
    return pinned


def _planes(
    problem: Pool2dProblem, pass_: str, gpu: GPU, images: list[torch.Tensor], pinned: StripTile | PlaneTile | None
) -> PlaneTile | None:
    """The columns of a pool whose images are all contiguous, and not channels_last; else None."""
    if isinstance(pinned, StripTile):
        return None
    dtype = images[0].dtype
    fits = all(image.is_contiguous() and not _channels_inner(image) for image in images)
    if pinned is None:
        return plane_tiles.choose_planes(problem, pass_, dtype, gpu) if fits else None
    if not fits or not plane_tiles.has_planes(problem, dtype):
        raise ValueError(
            f"strips={pinned} do not suit {problem} of {dtype}: windows must overlap along rows, and images be "
            "contiguous, of 2 or 4 bytes an element"
        )
    return pinned


def _in_planes(
    kernel: Any, arguments: dict[str, Any], tile: PlaneTile, problem: Pool2dProblem, pass_: str,
    images: list[torch.Tensor],
) -> Launch:  # fmt: skip
    lines = problem.P if pass_ == "forward" else strip_tiles.cells(problem)[0]
    columns, strips = plane_tiles.columns(problem, pass_), triton.cdiv(lines, tile.long)
    positions = problem.N * problem.C * columns
    unused = {"C", "DIL_H", "DIL_W"}
    arguments = {name: value for name, value in arguments.items()
                 if name not in unused and not name.startswith("stride_")}  # fmt: skip
    arguments |= {
        "POSITIONS": positions, "INDEX": index_type(*images), "COLUMNS": columns, "LANES": tile.lanes,
        "LONG": tile.long, "STRIPS": strips,
    }  # fmt: skip
    if positions >= 1 << 30:  # planes of a pixel or two have more columns than pixels
        arguments["INDEX"] = tl.int64
    programs = triton.cdiv(positions, tile.lanes - strip_tiles.windows_before(problem)[1]) * strips
    return Launch(kernel, (programs,), arguments, tile.num_warps, 1, str(tile))


def _in_strips(
    kernel: Any, arguments: dict[str, Any], tile: StripTile, extents: tuple[int, int], images: list[torch.Tensor]
) -> Launch:
    down, across = tile.strips(extents)
    height = images[0].shape[0] * down * across
    del arguments["DIL_H"], arguments["DIL_W"]
    arguments |= {
        "HEIGHT": height, "STRIPS_H": down, "STRIPS_W": across, "INDEX": index_type(*images), "ROWS": tile.rows,
        "COLS": tile.cols, "LONG": tile.long, "WIDE": tile.wide, "STAGES": strip_tiles.STAGES,
    }  # fmt: skip
    programs = triton.cdiv(height, tile.rows) * triton.cdiv(images[0].shape[1], tile.cols)
    return Launch(kernel, (programs,), arguments, tile.num_warps, strip_tiles.STAGES, str(tile))


def _tiled(
    kernel: Any,
    arguments: dict[str, Any],
    out: torch.Tensor,
    shape: tuple[int, ...],
    gpu: GPU,
    images: list[torch.Tensor],
    *,
    crowded: bool = False,
) -> Launch:
    """Rows and columns of outputs, the columns along the axis that is contiguous in `out`.

    Where a kernel holds several operands and NCHW's offsets differ from element to element, a whole tile does not fit
    the registers: `crowded` halves it there.
    """
    count, channels, rows, columns = shape
    nhwc = _channels_inner(out)
    height, width = (count * rows * columns, channels) if nhwc else (count * channels * rows, columns)
    tile = tiles.choose_elementwise(height, width, out.dtype, gpu)
    if crowded and not nhwc and not gpu.interprets:
        tile = replace(tile, rows=max(1, tile.rows // 2))
    arguments |= {
        "HEIGHT": height, "NHWC": nhwc, "INDEX": index_type(*images), "ROWS": tile.rows, "COLS": tile.cols,
    }  # fmt: skip
    programs = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols)
    return Launch(kernel, (programs,), arguments, tile.num_warps, 1, str(tile))
