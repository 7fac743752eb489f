"""Locally connected layers on the host side.  Filters come as a matrix for each pixel, [P*Q, K, R*S*C], contiguous."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tileconv.kernels import small_tiles
from tileconv.kernels.device import local as device
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, accumulator, index_type, strides


def plan_fprop(
    problem: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, *, gpu: GPU,
    precision: str,
) -> Launch:  # fmt: skip
    """The launch that writes y [N, K, P, Q]; bias is [K] or [K, P, Q], contiguous."""
    tile = small_tiles.choose_local(problem.K, problem.N, problem.C * problem.taps, x.dtype, gpu)
    pixels = problem.P * problem.Q
    own = bias is not None and bias.dim() == 3
    arguments = {
        "x": x, "w": w, "y": y, "bias": bias, "N": problem.N, "H": problem.H, "W": problem.W, "Q": problem.Q,
        "K": problem.K, **strides("x", x, "nchw"), **strides("y", y, "nkpq"), "stride_bk": pixels if own else 1,
        "stride_bi": 1 if own else 0, **_window(problem), "HAS_BIAS": bias is not None, "PRECISION": precision,
        "ACC": accumulator(x.dtype), "INDEX": index_type(x), "BLOCK_N": tile.columns, "BLOCK_K": tile.rows,
        "BLOCK_D": tile.depth,
    }  # fmt: skip
    programs = pixels * triton.cdiv(problem.K, tile.rows) * triton.cdiv(problem.N, tile.columns)
    return Launch(device.fprop, (programs,), arguments, tile.num_warps, tile.num_stages, str(tile))


def plan_dgrad(
    problem: Conv2dProblem, dy: torch.Tensor, w: torch.Tensor, dx: torch.Tensor, *, gpu: GPU, precision: str
) -> Launch:
    """The launch that writes dx [N, C, H, W]."""
    tile = small_tiles.choose_local(problem.C, problem.N, problem.K, dy.dtype, gpu)
    arguments = {
        "dy": dy, "w": w, "dx": dx, "N": problem.N, "H": problem.H, "W": problem.W, "P": problem.P, "Q": problem.Q,
        "K": problem.K, **strides("y", dy, "nkpq"), **strides("x", dx, "nchw"), **_window(problem),
        "PRECISION": precision, "ACC": accumulator(dy.dtype), "BLOCK_N": tile.columns, "BLOCK_C": tile.rows,
        "BLOCK_D": tile.depth,
    }  # fmt: skip
    programs = problem.H * problem.W * triton.cdiv(problem.C, tile.rows) * triton.cdiv(problem.N, tile.columns)
    return Launch(device.dgrad, (programs,), arguments, tile.num_warps, tile.num_stages, str(tile))


def plan_wgrad(
    problem: Conv2dProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, *, gpu: GPU, precision: str
) -> Launch:
    """The launch that writes dw [P*Q, K, R*S*C]."""
    depth = problem.C * problem.taps
    tile = small_tiles.choose_local(problem.K, depth, problem.N, dy.dtype, gpu)
    arguments = {
        "x": x, "dy": dy, "dw": dw, "N": problem.N, "H": problem.H, "W": problem.W, "Q": problem.Q, "K": problem.K,
        **strides("x", x, "nchw"), **strides("y", dy, "nkpq"), **_window(problem), "PRECISION": precision,
        "ACC": accumulator(dy.dtype), "INDEX": index_type(x), "BLOCK_N": tile.depth, "BLOCK_K": tile.rows,
        "BLOCK_D": tile.columns,
    }  # fmt: skip
    programs = problem.P * problem.Q * triton.cdiv(problem.K, tile.rows) * triton.cdiv(depth, tile.columns)
    return Launch(device.wgrad, (programs,), arguments, tile.num_warps, tile.num_stages, str(tile))


def _window(problem: Conv2dProblem) -> dict[str, Any]:
    return {
        "pad_h": problem.padding[0][0], "pad_w": problem.padding[1][0], "C": problem.C, "R": problem.R, "S": problem.S,
        "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1], "DIL_H": problem.dilation[0],
        "DIL_W": problem.dilation[1],
    }  # fmt: skip
