"""Softmax and cross-entropy on the host side: tensors come as [OUTER, D, INNER], and rows run along D."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from tileconv.kernels import conv_tile, tiles
from tileconv.kernels.device import softmax as device
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, accumulator, index_type, strides


def plan_softmax(x: torch.Tensor, y: torch.Tensor, log: bool, *, gpu: GPU) -> Launch:
    """The launch that writes y = softmax(x) along D, or its logarithm."""
    arguments = {"x": x, "y": y, **strides("x", x, "odi"), **strides("y", y, "odi"), "LOG": log}
    return _rows(device.softmax_forward, arguments, [x, y], gpu)


def plan_softmax_backward(dy: torch.Tensor, y: torch.Tensor, dx: torch.Tensor, log: bool, *, gpu: GPU) -> Launch:
    """The launch that writes dx from the result y of softmax, or of log_softmax."""
    arguments = {
        "dy": dy, "y": y, "dx": dx, **strides("g", dy, "odi"), **strides("y", y, "odi"), **strides("x", dx, "odi"),
        "LOG": log,
    }  # fmt: skip
    return _rows(device.softmax_backward, arguments, [y, dy, dx], gpu)


def plan_cross_entropy(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, losses: torch.Tensor, saved: torch.Tensor,
    ignore_index: int, smoothing: float, *, gpu: GPU,
) -> Launch:  # fmt: skip
    """The launch that writes losses [2, M] (loss, what it counts) and saved [3, M] (maximum, log of the sum, shares).

    target: int64 [OUTER, INNER], or probabilities of the shape of x.
    """
    arguments = {
        **_targets(x, target, weight, ignore_index, smoothing), "losses": losses, "saved": saved,
    }  # fmt: skip
    launch = _rows(device.cross_entropy_forward, arguments, [x, target], gpu)
    del launch.arguments["ONE"]
    return launch


def plan_cross_entropy_backward(
    grad: torch.Tensor, divisor: torch.Tensor, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None,
    saved: torch.Tensor, dx: torch.Tensor, ignore_index: int, smoothing: float, to_target: bool, *, gpu: GPU,
) -> Launch:  # fmt: skip
    """The launch that writes dx, the gradient of the input (of the probabilities with `to_target`).

    grad: one number or [M]; divisor: one number; both contiguous.
    """
    arguments = {
        **_targets(x, target, weight, ignore_index, smoothing), "grad": grad, "divisor": divisor, "saved": saved,
        "dx": dx, **strides("y", dx, "odi"), "PER_ROW": grad.dim() > 0, "TO_TARGET": to_target,
    }  # fmt: skip
    launch = _rows(device.cross_entropy_backward, arguments, [x, target, dx], gpu, per_block=True)
    del launch.arguments["ONE"]
    return launch


def _targets(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, smoothing: float
) -> dict[str, Any]:
    indexed = target.dim() == 2
    across = strides("t", target.unsqueeze(1) if indexed else target, "odi")
    near = torch.tensor(smoothing, dtype=torch.float32).item()
    return {
        "x": x, "target": target, "weight": weight, **strides("x", x, "odi"), **across, "ignore_index": ignore_index,
        "smoothing": near, "smoothing_rest": smoothing - near, "INDEXED": indexed, "HAS_WEIGHT": weight is not None,
        "SMOOTH": smoothing > 0,
    }  # fmt: skip


def _rows(
    kernel: Any, arguments: dict[str, Any], tensors: list[torch.Tensor], gpu: GPU, per_block: bool = False
) -> Launch:
    """A launch of one program for every few rows; with `per_block` for every block of their elements."""
    outer, length, inner = tensors[0].shape
    tile = tiles.choose_elementwise(outer * inner, length, tensors[0].dtype, gpu)
    rows, cols = tile.rows, tile.cols
    if inner > 1 and tensors[0].stride(1) != 1 and not gpu.interprets:
        # Neighbours in memory belong to neighbouring rows: 64 of them fill two 32-byte sectors even of fp16.
        rows = min(max(rows, 64), conv_tile.power_of_two(outer * inner))
        cols = max(1, min(cols, tile.rows * tile.cols // rows))
    steps = [name for name in arguments if name.startswith("stride_") and name.endswith("o")]
    if arguments.get("INDEXED"):
        steps.remove("stride_to")
    align = math.gcd(16, length, *(arguments[name] for name in steps))
    arguments |= {name: arguments[name] // align for name in steps}
    arguments |= {
        "M": outer * inner, "D": length // align, "INNER": inner, "ONE": length <= cols, "ALIGN": align,
        "ACC": accumulator(tensors[0].dtype), "INDEX": index_type(*tensors), "ROWS": rows, "COLS": cols,
    }  # fmt: skip
    programs = triton.cdiv(outer * inner, rows) * (triton.cdiv(length, cols) if per_block else 1)
    return Launch(kernel, (programs,), arguments, tile.num_warps, 1, f"{rows}x{cols}")
