"""Depthwise convolution on the host side: the planners of launch.conv for one input channel a group."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tileconv.kernels import small_tiles
from tileconv.kernels.device import depthwise as device
from tileconv.kernels.geometry import Conv2dProblem, Filters
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, accumulator, index_type, strides
from tileconv.kernels.launch.plans import scratch
from tileconv.kernels.launch.pointwise import plan_add_slices
from tileconv.kernels.layout import sum_dtype


def applies(problem: Conv2dProblem) -> bool:
    """Whether every filter of a layer reads one channel of several.

    A single group of one channel is a first layer: its K filters share what they read, which is the engine's work.
    """
    return problem.groups == problem.C > 1


def plan_fprop(
    problem: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, *, gpu: GPU,
    activation: str | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches that write y [N, K, P, Q] from x [N, C, H, W] and w [K, 1, R, S]; strides are free."""
    return [_plan(problem, problem.filters, x, _taps_first(w), bias, y, activation, gpu)]


def plan_dgrad(
    problem: Conv2dProblem, dy: torch.Tensor, w: torch.Tensor, dx: torch.Tensor, *, gpu: GPU
) -> list[Launch]:
    """The launches that write dx, one for each residue of the input pixel."""
    filters = _taps_first(w)
    return [
        _plan(part.problem, part.filters, dy, filters, None,
              dx[:, :, part.offset[0] :: part.stride[0], part.offset[1] :: part.stride[1]], None, gpu)
        for part in problem.dgrad
    ]  # fmt: skip


def plan_wgrad(
    problem: Conv2dProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, *, gpu: GPU
) -> list[Launch]:
    """The launches that write dw [K, 1, R, S], contiguous: partial sums of runs of pixels, then their sum in order."""
    tile = small_tiles.choose_depthwise_wgrad(problem, _nhwc(dy), dy.dtype, gpu)
    steps = triton.cdiv(problem.N * problem.P * problem.Q, tile.columns)
    loops = triton.cdiv(steps, tile.splits)
    dtype = sum_dtype(dw.dtype)
    parts = scratch(torch.empty((tile.splits, dw.numel()), dtype=dtype, device=dw.device))
    arguments = {
        "x": x, "dy": dy, "parts": parts, **_extents(problem, x, dy), "LOOPS": loops, "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1], "GROUP_K": problem.group_filters, "TAPS": tile.taps, "COLUMNS": tile.columns,
        "CHANNELS": tile.channels,
    }  # fmt: skip
    blocks = triton.cdiv(problem.taps, tile.taps) * triton.cdiv(problem.K, tile.channels)
    first = Launch(device.wgrad, (blocks * tile.splits,), arguments, tile.num_warps, 1, str(tile))
    return [first, plan_add_slices(parts, dw.permute(0, 2, 3, 1), gpu=gpu)]


def _plan(
    problem: Conv2dProblem, filters: Filters, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None,
    y: torch.Tensor, activation: str | None, gpu: GPU,
) -> Launch:  # fmt: skip
    tile = small_tiles.choose_depthwise(problem, _nhwc(y), y.dtype, gpu)
    arguments = {
        "x": x, "w": w, "y": y, "bias": bias, **_extents(problem, x, y), "FILTERS": w.shape[1],
        "GROUP_C": problem.group_channels, "GROUP_K": problem.group_filters, "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1], "TAP_0": filters.first, "TAP_R": filters.step_r, "TAP_S": filters.step_s,
        "HAS_BIAS": bias is not None, "ACTIVATION": activation, "LINES": tile.lines, "COLUMNS": tile.columns,
        "CHANNELS": tile.channels,
    }  # fmt: skip
    strips = problem.N * triton.cdiv(problem.P, tile.lines) * problem.Q
    programs = triton.cdiv(strips, tile.columns) * triton.cdiv(problem.K, tile.channels)
    return Launch(device.fprop, (programs,), arguments, tile.num_warps, 1, str(tile))


def _extents(problem: Conv2dProblem, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    return {
        "N": problem.N, "H": problem.H, "W": problem.W, "P": problem.P, "Q": problem.Q, "K": problem.K,
        **strides("x", x, "nchw"), **strides("y", y, "nkpq"), "pad_h": problem.padding[0][0],
        "pad_w": problem.padding[1][0], "R": problem.R, "S": problem.S, "DIL_H": problem.dilation[0],
        "DIL_W": problem.dilation[1], "ACC": accumulator(x.dtype), "INDEX": index_type(x, y),
    }  # fmt: skip


def _taps_first(w: torch.Tensor) -> torch.Tensor:
    """[R * S, K]: neighbouring filters lie together, like the channels that they meet.  A copy, of a few kilobytes."""
    return w.reshape(w.shape[0], -1).t().contiguous()


def _nhwc(image: torch.Tensor) -> bool:
    return image.stride(1) == 1 and image.shape[1] > 1
