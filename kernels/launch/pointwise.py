"""Elementwise operations and column sums on the host side."""

from __future__ import annotations

import torch
import triton

from tileconv.kernels import tiles
from tileconv.kernels.device import pointwise as device
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, accumulator, index_type


def plan_relu(x: torch.Tensor, y: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes y = max(x, 0); both dense and laid out alike."""
    return _flat(device.relu_forward, {"x": x, "y": y}, x.numel(), x, gpu)


def plan_dropout(x: torch.Tensor, y: torch.Tensor, p: float, seed: int, offset: int, *, gpu: GPU) -> Launch:
    """The launch that writes y = x / (1 - p) where Philox(seed, offset + element) keeps it, else 0."""
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    arguments = {"x": x, "y": y, "p": float(p), "scale": float(scale), "seed": seed, "offset": offset}
    return _flat(device.dropout, arguments, x.numel(), x, gpu)


def plan_add_slices(parts: torch.Tensor, out: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes out = parts[0] + parts[1] + ... in this order; both contiguous."""
    return _flat(device.add_slices, {"parts": parts, "out": out, "SLICES": parts.shape[0]}, out.numel(), out, gpu)


def plan_relu_backward_sum(
    dy: torch.Tensor, y: torch.Tensor | None, dx: torch.Tensor | None, sums: torch.Tensor | None, loops: int, rows: int,
    *, gpu: GPU,
) -> Launch:  # fmt: skip
    """The launch on [M, K] views that masks dy by y > 0 into dx (if given) and sums it over strips of rows into sums.

    A strip is `loops * rows` rows; sums is [strips, K].
    """
    height, width = dy.shape
    tile = tiles.choose_elementwise(height, width, dy.dtype, gpu)
    arguments = {
        "dy": dy, "y": y, "dx": dx, "sums": sums, "HEIGHT": height, "K": width,
        "stride_gm": dy.stride(0), "stride_gk": dy.stride(1),
        "stride_ym": 0 if y is None else y.stride(0), "stride_yk": 0 if y is None else y.stride(1),
        "stride_xm": 0 if dx is None else dx.stride(0), "stride_xk": 0 if dx is None else dx.stride(1),
        "MASK": y is not None, "PARTIAL": sums is not None, "ACC": accumulator(dy.dtype),
        "INDEX": index_type(*(t for t in (dy, y, dx) if t is not None)),
        "LOOPS": loops, "ROWS": rows, "COLS": tile.cols,
    }  # fmt: skip
    programs = triton.cdiv(height, rows * loops) * triton.cdiv(width, tile.cols)
    return Launch(device.relu_backward_sum, (programs,), arguments, tile.num_warps, 1, f"{rows}x{tile.cols}*{loops}")


def _flat(kernel: object, arguments: dict[str, object], size: int, like: torch.Tensor, gpu: GPU) -> Launch:
    tile = tiles.choose_elementwise(1, size, like.dtype, gpu)
    arguments |= {"SIZE": size, "INDEX": index_type(like), "BLOCK": tile.cols}
    return Launch(kernel, (triton.cdiv(size, tile.cols),), arguments, tile.num_warps, 1, str(tile))
