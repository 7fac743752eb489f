"""Local response normalisation on the host side."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tileconv.kernels import conv_tile, tiles
from tileconv.kernels.device import norm as device
from tileconv.kernels.geometry import channel_window
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, accumulator, index_type, strides

MAX_COLUMNS = 8192  # channels of a pixel that one program holds
MAX_WINDOW = 255  # channels whose sum is written out, term by term, in the kernel


def plan_local_response_norm(
    x: torch.Tensor,
    dy: torch.Tensor | None,
    out: torch.Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    *,
    gpu: GPU,
) -> Launch:
    """The launch that writes out = y from x, or out = dx from x and dy; alpha times the sum of squares, not the mean.

    Images [N, C, H, W] of any strides; those whose pixels no single stride reaches are copied first.
    """
    before, after = channel_window(x.shape[1], size)
    images = {"x": x.flatten(2), "y": out.flatten(2)} | ({} if dy is None else {"g": dy.flatten(2)})
    count, channels, pixels = images["x"].shape
    arguments: dict[str, Any] = {"x": images["x"], "C": channels, "PIXELS": pixels}
    for name, image in images.items():
        arguments |= strides(name, image, "nci")
    arguments |= {
        "BEFORE": before, "AFTER": after, "ALPHA": float(alpha), "BETA": float(beta), "K": float(k),
        "ACC": accumulator(x.dtype), "INDEX": index_type(*images.values()),
    }  # fmt: skip
    if channels > 1 and images["y"].stride(1) == 1 and channels <= MAX_COLUMNS:
        return _across_columns(arguments, images, count * pixels, gpu)
    return _along_rows(arguments, images, count * pixels, gpu)


def _across_columns(arguments: dict[str, Any], images: dict[str, torch.Tensor], height: int, gpu: GPU) -> Launch:
    """Channels side by side: a program takes whole pixels."""
    dtype, channels = images["x"].dtype, images["x"].shape[1]
    vector = 16 // dtype.itemsize
    cols = max(conv_tile.power_of_two(channels), vector)
    # Two 16-byte loads a thread forward; backward, with two operands, one of each.
    budget = 1 << 16 if gpu.interprets else 128 * vector * (1 if "g" in images else 2)
    rows = max(1, min(conv_tile.power_of_two(height), budget // cols))
    arguments |= {
        "dy": images.get("g"), "out": images["y"], "HEIGHT": height, "BACKWARD": "g" in images,
        "ROWS": rows, "COLS": cols, "VEC_LOG2": vector.bit_length() - 1,
    }  # fmt: skip
    if "g" not in images:
        arguments |= strides("g", images["x"], "nci")
    tile = tiles.ElementwiseTile(rows, cols)
    return Launch(
        device.across_columns, (triton.cdiv(height, rows),), arguments, tile.num_warps, 1, f"across columns {tile}"
    )


def _along_rows(arguments: dict[str, Any], images: dict[str, torch.Tensor], width: int, gpu: GPU) -> Launch:
    """Pixels side by side, or neither: a program walks through the channels of its pixels."""
    dtype, channels = images["x"].dtype, images["x"].shape[1]
    neighbours = arguments["BEFORE"] + arguments["AFTER"]
    per_thread = max(
        1, min(16 // dtype.itemsize, conv_tile.power_of_two(64 // (neighbours + 1)))
    )  # the window is registers
    cols = min(conv_tile.power_of_two(width), 1 << 16 if gpu.interprets else 128 * per_thread)
    blocks = triton.cdiv(width, cols)
    # Few pixels: share the channels.  Each share reads `neighbours` more at either end: at most 1/12 more bytes.
    shares = min(triton.cdiv(4 * gpu.sms, blocks), max(1, channels // max(1, 12 * neighbours)))
    chunk = triton.cdiv(channels, 1 if gpu.interprets else shares)
    arguments |= {"CHUNK": chunk, "WIDTH": width, "COLS": cols}
    if "g" in images:
        kernel, arguments = device.along_rows_backward, arguments | {"dy": images["g"], "dx": images["y"]}
    else:
        kernel, arguments = device.along_rows_forward, arguments | {"y": images["y"]}
    programs = blocks * triton.cdiv(channels, chunk)
    return Launch(kernel, (programs,), arguments, 4, 1, f"along rows {chunk}x{cols} w4")
