"""First layers read in runs, on the host side."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tileconv.kernels import layout, run_tiles
from tileconv.kernels.device import inner_runs
from tileconv.kernels.device import runs as device
from tileconv.kernels.geometry import Conv2dProblem, Runs
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import TRITON_TYPE, Launch, accumulator, index_type, strides
from tileconv.kernels.launch.layout import plan_widen
from tileconv.kernels.launch.plans import scratch
from tileconv.kernels.launch.pointwise import plan_add_slices
from tileconv.kernels.tiles import choose_elementwise


def prepare(
    problem: Conv2dProblem, pass_: str, x: torch.Tensor, precision: str, *, gpu: GPU, batch_invariant: bool = False
) -> tuple[Conv2dProblem, torch.Tensor, list[Launch]] | None:
    """A pass as one on an image that can be read in runs, that image, and the launches that fill it; None if it cannot.

    An image lies right if neighbours are side by side and every row starts at an aligned address: [N, C, H, W], or NHWC
    with its channels as columns.  Without padding its rows may start anywhere; but the places of the products in their
    sums then differ from image to image, which batch_invariant forbids.  Others are copied, their rows filled up with
    zeros.
    """
    if not run_tiles.in_runs(problem, pass_, x.dtype, precision, gpu):
        return None
    flat, rows = _in_rows(problem, x)
    inner = inner_runs_of(flat, pass_, rows) and not batch_invariant
    if inner or _lies_right(flat, pass_, rows):
        return flat, rows, []
    # A slice of a batch may start beside an aligned address where the batch does not: its sums keep the order of runs.
    wide, image = (flat.in_aligned_rows, rows) if batch_invariant else (problem.in_aligned_rows, x)
    if wide.runs(x.itemsize, pass_) is None:
        return None
    copy = scratch(torch.empty(wide.x_shape, dtype=x.dtype, device=x.device))
    return wide, copy, [plan_widen(image, copy, gpu=gpu)]


def _lies_right(problem: Conv2dProblem, pass_: str, x: torch.Tensor) -> bool:
    runs = problem.runs(x.itemsize, pass_)
    if runs is None or (runs.align > 1 and x.data_ptr() % 16) or (x.stride(3) != 1 and x.shape[3] > 1):
        return False
    pitches = [stride for extent, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if extent > 1]
    return all(pitch % runs.align == 0 for pitch in pitches)


def _in_rows(problem: Conv2dProblem, x: torch.Tensor) -> tuple[Conv2dProblem, torch.Tensor]:
    """Both with the pixels' channels as columns, where they lie so (NHWC); else as they are."""
    if problem.C == 1 or x.stride(1) != 1 or (x.stride(3) != problem.C and x.shape[3] > 1):
        return problem, x
    flat = problem.interleaved
    return flat, x.as_strided(flat.x_shape, (x.stride(0), x.stride(0), x.stride(2), 1))


def plan_fprop(
    problem: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor,
    *, gpu: GPU, activation: str | None, precision: str, batch_invariant: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launches that write y [N, K, P, Q], any strides: the filters as runs, then the convolution.

    `problem` and x as `prepare` makes them, w and y the layer's own.
    """
    if w.shape != problem.w_shape:
        w = w.permute(0, 2, 3, 1).reshape(problem.w_shape)
    runs = _runs_of(problem, "fprop", x)
    tile = run_tiles.choose_runs(problem, "fprop", x.dtype, precision, gpu, batch_invariant, runs)
    depth = -(-_columns(problem, runs) // tile.block_c) * tile.block_c
    matrix = scratch(torch.empty((runs.classes, problem.K, depth), dtype=w.dtype, device=w.device))
    arguments = _geometry(problem, runs, x) | {
        "w": matrix, "y": y, "bias": bias, **strides("y", y, "nkpq"), "DEPTH": depth, "HAS_BIAS": bias is not None,
        "ACTIVATION": activation, "PRECISION": precision, "ACC": accumulator(x.dtype), "OUT": TRITON_TYPE[y.dtype],
        "INDEX": index_type(x), "PIXELS": tile.pixels, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
        "BLOCK_K2": tile.block_k2, "TURNED": run_tiles.turned(tile, gpu),
    }  # fmt: skip
    if not runs.inner:
        arguments["LEAD"] = runs.lead
    pixels = triton.cdiv(problem.N, runs.classes) * problem.P * problem.Q
    programs = runs.classes * triton.cdiv(pixels, tile.pixels) * triton.cdiv(problem.K, tile.rows)
    kernel = inner_runs.fprop_inner_runs if runs.inner else device.fprop_runs
    first = _plan_filters(problem, runs, w, x, matrix, gpu)
    most = run_tiles.most_registers(tile, x.dtype, gpu)
    return [first, Launch(kernel, (programs,), arguments, tile.num_warps, tile.num_stages, str(tile), most)]


def plan_wgrad(
    problem: Conv2dProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, *, gpu: GPU, precision: str
) -> list[Launch]:
    """The launches that write dw [K, C, R, S] (channels_last): partial sums, their sum, and its way out of the runs.

    `problem` and x as `prepare` makes them, dy and dw the layer's own.
    """
    runs = _runs_of(problem, "wgrad", x)
    tile = run_tiles.choose_runs(problem, "wgrad", x.dtype, precision, gpu, runs=runs)
    columns = _columns(problem, runs)
    slots = tile.splits * triton.cdiv(problem.Q, tile.pixels)
    sizes = (slots, runs.classes, problem.K, columns)
    parts = scratch(torch.empty(sizes, dtype=layout.sum_dtype(x.dtype), device=x.device))
    sums = parts[0] if slots == 1 else scratch(torch.empty_like(parts[0]))
    arguments = _geometry(problem, runs, x) | {
        "dy": dy, "dw": parts, **strides("y", dy, "nkpq"), "SPLITS": tile.splits, "PRECISION": precision,
        "ACC": accumulator(x.dtype), "INDEX": index_type(x, dy), "PIXELS": tile.pixels, "BLOCK_K": tile.block_k,
        "BLOCK_C": tile.block_c,
    }  # fmt: skip
    programs = slots * runs.classes * triton.cdiv(problem.K, tile.block_k) * triton.cdiv(columns, tile.block_c)
    kernel = inner_runs.wgrad_inner_runs if runs.inner else device.wgrad_runs
    launches = [Launch(kernel, (programs,), arguments, tile.num_warps, tile.num_stages, str(tile))]
    if slots > 1:
        launches.append(plan_add_slices(parts, sums, gpu=gpu))
    block = choose_elementwise(1, dw.numel(), dw.dtype, gpu)
    back = {
        "sums": sums, "dw": dw.permute(0, 2, 3, 1), "SIZE": dw.numel(), "CLASSES": runs.classes,
        **_layout(problem, runs, x), "BLOCK": block.cols,
    }  # fmt: skip
    programs = triton.cdiv(dw.numel(), block.cols)
    return [*launches, Launch(device.runs_to_filters, (programs,), back, block.num_warps, 1, str(block))]


def _runs_of(problem: Conv2dProblem, pass_: str, x: torch.Tensor) -> Runs:
    runs = inner_runs_of(problem, pass_, x) or problem.runs(x.itemsize, pass_)
    assert runs is not None
    return runs


def inner_runs_of(problem: Conv2dProblem, pass_: str, x: torch.Tensor) -> Runs | None:
    """The runs of a problem on an image as it lies, if no window reaches beyond the image: any rows are right then."""
    if x.data_ptr() % 16 or (x.stride(3) != 1 and x.shape[3] > 1):
        return None
    images, channels, rows, _ = x.stride()
    return problem.inner_runs(x.itemsize, pass_, (images, channels, rows))


def _columns(problem: Conv2dProblem, runs: Runs) -> int:
    return problem.C * problem.R * runs.length


def _geometry(problem: Conv2dProblem, runs: Runs, x: torch.Tensor) -> dict[str, Any]:
    """What both passes are told of the problem and its image; pitches in aligned loads, so that they divide."""
    if runs.inner:
        images, channels, rows, _ = x.stride()
        return {
            "x": x, "N": problem.N, "K": problem.K, "P": problem.P, "Q": problem.Q, "stride_xn": images,
            "stride_xc": channels, "stride_xh": rows, "step_xn": runs.classes * images // runs.align,
            "step_xp": problem.stride[0] * rows // runs.align, "C": problem.C, "R": problem.R, "S": problem.S,
            "RUN": runs.length, "ALIGN": runs.align, "CLASSES": runs.classes, "STRIDE_W": problem.stride[1],
            "DIL_H": problem.dilation[0],
        }  # fmt: skip
    pitches = {f"stride_x{axis}": stride // runs.align for axis, stride in zip("nch", x.stride()[:3], strict=True)}
    return pitches | {
        "x": x, "N": problem.N, "H": problem.H, "W": problem.W // runs.align, "K": problem.K, "P": problem.P,
        "Q": problem.Q, "pad_h": problem.padding[0][0], "C": problem.C, "R": problem.R, "RUN": runs.length,
        "USED": runs.lead + problem.S, "FIRST": problem.padding[1][0] + runs.lead, "ALIGN": runs.align,
        "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1], "DIL_H": problem.dilation[0],
    }  # fmt: skip


def _layout(problem: Conv2dProblem, runs: Runs, x: torch.Tensor) -> dict[str, int]:
    """Where the filters lie in runs."""
    images, channels, rows = x.stride()[:3] if runs.inner else (0, 0, 0)
    return {
        "shift_n": images % runs.align, "shift_c": channels % runs.align,
        "shift_r": problem.dilation[0] * rows % runs.align, "C": problem.C, "R": problem.R, "S": problem.S,
        "RUN": runs.length, "LEAD": runs.lead, "ALIGN": runs.align,
    }  # fmt: skip


def _plan_filters(
    problem: Conv2dProblem, runs: Runs, w: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, gpu: GPU
) -> Launch:
    block = choose_elementwise(1, matrix.numel(), w.dtype, gpu)
    arguments = {
        "w": w, "out": matrix, "SIZE": matrix.numel(), "K": problem.K, **strides("w", w, "kcrs"),
        **_layout(problem, runs, x), "DEPTH": matrix.shape[2], "BLOCK": block.cols,
    }  # fmt: skip
    programs = triton.cdiv(matrix.numel(), block.cols)
    return Launch(device.filters_to_runs, (programs,), arguments, block.num_warps, 1, str(block))
