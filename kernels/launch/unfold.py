"""im2col and col2im on the host side."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tileconv.kernels import tiles
from tileconv.kernels.device import unfold as device
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, accumulator, index_type, strides


def plan_unfold(problem: Conv2dProblem, x: torch.Tensor, cols: torch.Tensor, run: int = 1, *, gpu: GPU) -> Launch:
    """The launch that writes cols [N, C * R * S, P * Q], in either order of memory, from x [N, C, H, W].

    The depth's order is (c // run, r, s, c % run).
    """
    depth, pixels = cols.shape[1:]
    patches = cols.stride(1) == 1 and depth > 1
    arguments = {
        "x": x, "cols": cols, "N": problem.N, "H": problem.H, "W": problem.W, "Q": problem.Q, "DEPTH": depth,
        "PIXELS": pixels, **strides("x", x, "nchw"), **strides("y", cols, "ndi"), **_window(problem),
        "RUN": run, "PATCHES": patches,
    }  # fmt: skip
    height, width = (pixels, depth) if patches else (depth, pixels)
    return _tiled(device.unfold, arguments, problem.N * height, width, [x, cols], gpu)


def plan_fold(problem: Conv2dProblem, cols: torch.Tensor, x: torch.Tensor, run: int = 1, *, gpu: GPU) -> Launch:
    """The launch that writes x [N, C, H, W], the sums of cols [N, C * R * S, P * Q], with `run` as in plan_unfold."""
    nhwc = problem.C > 1 and x.stride(1) == 1
    arguments = {
        "cols": cols, "x": x, "N": problem.N, "C": problem.C, "H": problem.H, "W": problem.W, "P": problem.P,
        "Q": problem.Q, **strides("x", x, "nchw"), **strides("y", cols, "ndi"), **_window(problem), "RUN": run,
        "NHWC": nhwc, "ACC": accumulator(x.dtype),
    }  # fmt: skip
    width = problem.C if nhwc else problem.W
    return _tiled(device.fold, arguments, x.numel() // width, width, [x, cols], gpu)


def _window(problem: Conv2dProblem) -> dict[str, Any]:
    return {
        "pad_h": problem.padding[0][0], "pad_w": problem.padding[1][0], "R": problem.R, "S": problem.S,
        "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1], "DIL_H": problem.dilation[0],
        "DIL_W": problem.dilation[1],
    }  # fmt: skip


def _tiled(
    kernel: Any, arguments: dict[str, Any], height: int, width: int, tensors: list[torch.Tensor], gpu: GPU
) -> Launch:
    tile = tiles.choose_elementwise(height, width, tensors[0].dtype, gpu)
    arguments |= {"INDEX": index_type(*tensors), "ROWS": tile.rows, "COLS": tile.cols}
    programs = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols)
    return Launch(kernel, (programs,), arguments, tile.num_warps, 1, str(tile))
