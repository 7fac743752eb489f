"""Pooling on the host side."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tileconv.kernels import tiles
from tileconv.kernels.device import pool as device
from tileconv.kernels.geometry import AdaptivePool2dProblem, Pool2dProblem
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, accumulator, index_type, strides


def switch_dtype(problem: Pool2dProblem) -> torch.dtype:
    """One byte for windows of up to 256 elements."""
    return torch.uint8 if problem.taps <= 256 else torch.int32


def plan_max_forward(
    problem: Pool2dProblem, x: torch.Tensor, y: torch.Tensor, switch: torch.Tensor | None, *, gpu: GPU,
    activation: str | None = None,
) -> Launch:  # fmt: skip
    """The launch that writes y and, if given, switch (laid out like y) from x; activation "relu" cuts y at zero."""
    arguments = {
        "x": x, "y": y, "switch": switch, **_extents(problem), **strides("x", x, "nchw"), **strides("y", y, "ncpq"),
        **_window(problem), "HAS_SWITCH": switch is not None, "ACTIVATION": activation,
        "UNROLL": problem.taps <= 25 and not gpu.interprets,
    }  # fmt: skip
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
) -> Launch:
    """The launch that writes dx from dy; with y (laid out like switch), only windows with y > 0 pass a gradient on."""
    arguments = {
        "dy": dy, "switch": switch, "y": y, "dx": dx, **_extents(problem), **strides("g", dy, "ncpq"),
        **strides("y", switch, "ncpq"), **strides("x", dx, "nchw"), **_window(problem),
        "MASK": y is not None, "ACC": accumulator(dx.dtype),
    }  # fmt: skip
    return _tiled(device.max_backward, arguments, dx, problem.x_shape, gpu, [dx, dy])


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


def _extents(problem: Pool2dProblem | AdaptivePool2dProblem) -> dict[str, Any]:
    return {"C": problem.C, "H": problem.H, "W": problem.W, "P": problem.P, "Q": problem.Q}


def _window(problem: Pool2dProblem) -> dict[str, Any]:
    return {
        "R": problem.kernel[0], "S": problem.kernel[1], "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0], "PAD_W": problem.padding[1],
        "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
    }  # fmt: skip


def _tiled(
    kernel: Any,
    arguments: dict[str, Any],
    out: torch.Tensor,
    shape: tuple[int, ...],
    gpu: GPU,
    images: list[torch.Tensor],
) -> Launch:
    """Rows and columns of outputs, the columns along the axis that is contiguous in `out`."""
    count, channels, rows, columns = shape
    nhwc = channels > 1 and out.stride(1) == 1
    height, width = (count * rows * columns, channels) if nhwc else (count * channels * rows, columns)
    tile = tiles.choose_elementwise(height, width, out.dtype, gpu)
    arguments |= {
        "HEIGHT": height, "NHWC": nhwc, "INDEX": index_type(*images), "ROWS": tile.rows, "COLS": tile.cols,
    }  # fmt: skip
    programs = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols)
    return Launch(kernel, (programs,), arguments, tile.num_warps, 1, str(tile))
