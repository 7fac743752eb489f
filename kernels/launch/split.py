"""Splitting fp32 images into bf16 parts, on the host side."""

from __future__ import annotations

import torch
import triton

from tileconv.kernels import fp32, small_tiles
from tileconv.kernels.device import split as device
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, index_type
from tileconv.kernels.launch.plans import scratch


def plan_split(
    image: torch.Tensor, precision: str, *, gpu: GPU, apart: bool = False
) -> tuple[torch.Tensor, Launch]:  # fmt: skip
    """The bf16 parts [N, parts * C, H, W] (channels_last, the largest part first) of an fp32 image, and the launch that
    writes them.  `image` [N, C, H, W] may have any strides: NCHW is transposed on the way.  With `apart` they are
    [parts * N, C, H, W], one image behind the other.
    """
    parts = fp32.parts(precision)
    count, channels, *size = image.shape
    shape = (parts * count, channels) if apart else (count, parts * channels)
    y = scratch(
        torch.empty(
            (*shape, *size), dtype=fp32.multiplied(image.dtype, precision), device=image.device,
            memory_format=torch.channels_last,
        )
    )  # fmt: skip
    (_, stride_n), (rows, stride_u), (columns, stride_v) = _in_line(image)
    tile = small_tiles.choose_split(columns, channels, image.stride(1) == 1, image.dtype, gpu)
    arguments = {
        "x": image, "y": y, "U": rows, "V": columns, "stride_xn": stride_n, "stride_xu": stride_u,
        "stride_xv": stride_v, "stride_xc": image.stride(1), "C": channels,
        "part": image.numel() if apart else channels, "PITCH": y.shape[1], "PARTS": parts,
        "INDEX": index_type(image, y), "ROWS": tile.rows, "COLS": tile.cols,
    }  # fmt: skip
    strips = image.numel() // (channels * columns) if image.numel() else 0
    programs = strips * triton.cdiv(columns, tile.rows) * triton.cdiv(channels, tile.cols)
    return y, Launch(device.split, (programs,), arguments, tile.num_warps, 1, str(tile))


def _in_line(image: torch.Tensor) -> list[tuple[int, int]]:
    """(extent, stride) of the axes N, H, W, the inner ones taken together where one stride leads through both."""
    axes = [(image.shape[axis], image.stride(axis)) for axis in (0, 2, 3) if image.shape[axis] > 1] or [(1, 0)]
    while len(axes) > 1 and axes[-2][1] == axes[-1][0] * axes[-1][1]:
        extent, stride = axes.pop()
        axes[-1] = axes[-1][0] * extent, stride
    return [(1, 0)] * (3 - len(axes)) + axes
