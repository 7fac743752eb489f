"""Elementwise operations and column sums on the host side."""

from __future__ import annotations

import torch
import triton

from tileconv.kernels import small_tiles, tiles
from tileconv.kernels.device import pointwise as device
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, accumulator, index_type, pitch
from tileconv.kernels.launch.plans import scratch
from tileconv.kernels.layout import sum_dtype


def plan_relu(x: torch.Tensor, y: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes y = max(x, 0); both dense and laid out alike."""
    return _flat(device.relu_forward, {"x": x, "y": y}, x.numel(), x, gpu)


def plan_relu_backward(
    dy: torch.Tensor, y: torch.Tensor, dx: torch.Tensor, dropout: float = 0.0, *, gpu: GPU
) -> Launch:
    """The launch that writes dx = 0 where y <= 0, else dy / (1 - dropout); vectors laid out alike."""
    scale = dropout_scale(dropout) if dropout else None
    return _flat(device.relu_backward, {"dy": dy, "y": y, "dx": dx, "scale": scale}, dy.numel(), dy, gpu)


def dropout_scale(p: float) -> float:
    """What is left is multiplied by this after dropout with probability p: 0 where nothing is."""
    return 1.0 / (1.0 - p) if p < 1 else 0.0


def plan_dropout(x: torch.Tensor, y: torch.Tensor, seed: torch.Tensor, p: float, *, gpu: GPU) -> Launch:
    """The launch that writes y = x / (1 - p) where Philox(seed, element) keeps it, else 0; vectors laid out alike."""
    arguments = {"x": x, "y": y, "seed": seed, "p": float(p), "scale": dropout_scale(p)}
    return _flat(device.dropout, arguments, x.numel(), x, gpu)


def plan_add_slices(parts: torch.Tensor, out: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes out = parts[0] + parts[1] + ..., in the same order in every run; both contiguous."""
    slices, size = parts.shape[0], out.numel()
    tile = small_tiles.choose_slices(slices, size, out.dtype, gpu)
    arguments = {
        "parts": parts, "out": out, "SLICES": slices, "SIZE": size, "INDEX": index_type(out),
        "ROWS": tile.rows, "COLS": tile.cols,
    }  # fmt: skip
    return Launch(device.add_slices, (triton.cdiv(size, tile.cols),), arguments, tile.num_warps, 1, str(tile))


def plan_bias_backward(
    dy: torch.Tensor, y: torch.Tensor | None, dx: torch.Tensor | None, sums: torch.Tensor, dropout: float = 0.0,
    *, gpu: GPU,
) -> list[Launch]:  # fmt: skip
    """The launches that write sums [K] from dy [N, K, P, Q].

    If y and dx, laid out alike, are given, they are the sums of dx, which is 0 where y <= 0, else dy / (1 - dropout).
    """
    images, width, pixels = dy.shape[0], dy.shape[1], dy.shape[2] * dy.shape[3]
    dy = rows_in_line(dy)
    tile = tiles.choose_elementwise(images * pixels, width, dy.dtype, gpu)
    strips = min(triton.cdiv(images * pixels, tile.rows), 2 * gpu.sms)
    loops = triton.cdiv(images * pixels, tile.rows * strips)
    dtype = sum_dtype(dy.dtype)
    parts = scratch(torch.empty((strips, width), dtype=dtype, device=dy.device))
    arguments = {
        "dy": dy, "y": y, "dx": dx, "sums": parts, "scale": dropout_scale(dropout) if dropout else None,
        "PIXELS": pixels, "HEIGHT": images * pixels, "K": width,
        "stride_gn": dy.stride(0), "stride_gk": dy.stride(1), "stride_gi": _pixel_stride(dy),
        "stride_yn": 0 if y is None else y.stride(0), "stride_yk": 0 if y is None else y.stride(1),
        "stride_yi": 0 if y is None else _pixel_stride(y), "LOOPS": loops, "MASK": y is not None,
        "ACC": accumulator(dy.dtype), "INDEX": index_type(*(t for t in (dy, y) if t is not None)),
        "ROWS": tile.rows, "COLS": tile.cols,
    }  # fmt: skip
    programs = strips * triton.cdiv(width, tile.cols)
    name = f"{tile.rows}x{tile.cols}*{loops}"
    first = Launch(device.bias_backward, (programs,), arguments, tile.num_warps, 1, name)
    return [first, plan_add_slices(parts, sums, gpu=gpu)]


def rows_in_line(image: torch.Tensor) -> torch.Tensor:
    """`image` [N, C, H, W], copied unless one stride leads from any pixel to the next, across rows too."""
    if image.shape[2] == 1 or image.shape[3] == 1 or image.stride(2) == image.shape[3] * image.stride(3):
        return image
    return image.contiguous(memory_format=torch.channels_last)


def _pixel_stride(image: torch.Tensor) -> int:
    return image.stride(3) if image.shape[3] > 1 else pitch(image, 2)


def _flat(kernel: object, arguments: dict[str, object], size: int, like: torch.Tensor, gpu: GPU) -> Launch:
    tile = tiles.choose_elementwise(1, size, like.dtype, gpu)
    arguments |= {"SIZE": size, "INDEX": index_type(like), "BLOCK": tile.cols}
    return Launch(kernel, (triton.cdiv(size, tile.cols),), arguments, tile.num_warps, 1, str(tile))
