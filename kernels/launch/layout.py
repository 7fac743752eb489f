"""Rearrangements on the host side."""

from __future__ import annotations

import math

import torch
import triton

from tileconv.kernels import conv_tile, layout, small_tiles, tiles
from tileconv.kernels.device import layout as device
from tileconv.kernels.geometry import Pair
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, index_type, pitch, strides
from tileconv.kernels.launch.plans import scratch

_SMALL = 1 << 17  # elements


def plan_space_to_depth(
    x: torch.Tensor, y: torch.Tensor, block: Pair, step: Pair, padding: Pair, *, gpu: GPU
) -> Launch:  # fmt: skip
    """The launch that writes y [N, DEPTH, U, V] (channels_last) from x [N, C, H, W], padded before by `padding`.

    A pixel of y is a block of x, those of neighbours begin `step` apart.
    """
    count, depth, rows, columns = y.shape
    cols = conv_tile.power_of_two(depth)
    tile = tiles.choose_elementwise(columns, cols, x.dtype, gpu)
    arguments = {
        "x": x, "y": y, "C": x.shape[1], "H": x.shape[2], "W": x.shape[3], "U": rows, "V": columns,
        **strides("x", x, "nchw"), "pad_h": padding[0], "pad_w": padding[1], "BLOCK_H": block[0], "BLOCK_W": block[1],
        "STEP_H": step[0], "STEP_W": step[1], "DEPTH": depth, "INDEX": index_type(x, y), "ROWS": tile.rows,
        "COLS": cols,
    }  # fmt: skip
    programs = count * rows * triton.cdiv(columns, tile.rows)
    return Launch(device.space_to_depth, (programs,), arguments, tile.num_warps, 1, f"{tile.rows}x{cols}")


def plan_turn(rows: torch.Tensor, turned: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes turned [A, B, WIDTH, DEPTH] from rows [A, B, N, WIDTH], both with a contiguous last axis.

    Where DEPTH is more than N, zeros follow.
    """
    count, width = rows.shape[2:]
    depth = turned.shape[3]
    tile = small_tiles.choose_turn(depth, width, rows.dtype, gpu)
    pitches = {f"stride_x{axis}": pitch(rows, number) for number, axis in enumerate("abn")}
    pitches |= {f"stride_y{axis}": pitch(turned, number) for number, axis in enumerate("abi")}
    arguments = {"x": rows, "y": turned, "B": rows.shape[1], "N": count, "DEPTH": depth, "WIDTH": width, **pitches,
                 "ROWS": tile.rows, "COLS": tile.cols}  # fmt: skip
    programs = rows.shape[0] * rows.shape[1] * triton.cdiv(depth, tile.rows) * triton.cdiv(width, tile.cols)
    return Launch(device.turn, (programs,), arguments, tile.num_warps, 1, str(tile))


def with_channels_first(
    w: torch.Tensor, groups: int, *, gpu: GPU, taps_first: bool = False
) -> tuple[torch.Tensor, Launch]:  # fmt: skip
    """Filters [K, C/groups, R, S] as those of an input gradient, [C, K/groups, R, S] (channels_last), and the launch.

    w is channels_last.  With `taps_first` they are [groups, R, S * C/groups, K/groups] instead.
    """
    count, channels, *window = w.shape
    own, taps = count // groups, math.prod(window)
    rows = w.as_strided((groups, taps, own, channels), (own * taps * channels, channels, taps * channels, 1))
    if taps_first:
        shape = groups, window[0], window[1] * channels, own
        turned = scratch(torch.empty(shape, dtype=w.dtype, device=w.device))
        return turned, plan_turn(rows, turned.view(groups, taps, channels, own), gpu=gpu)
    turned = scratch(layout.empty_image((groups * channels, own, *window), w, channels_last=True))
    out = turned.as_strided((groups, taps, channels, own), (channels * taps * own, own, taps * own, 1))
    return turned, plan_turn(rows, out, gpu=gpu)


def in_channels_last(
    image: torch.Tensor, *, gpu: GPU, channels: int | None = None
) -> tuple[torch.Tensor, list[Launch]]:
    """An image [N, C, H, W] whose channels lie beside each other, and what fills it: a copy of one whose pixels do.

    With `channels` the copy has that many, zeros from C on.  An image that lies neither way, or whose channels are too
    few to be read together, stays as it is.
    """
    planes = _planes(image)
    if planes is None:
        return image, []
    count, own, height, width = image.shape
    shape = count, own if channels is None else channels, height, width
    copy = scratch(layout.empty_image(shape, image, channels_last=True))
    return copy, [plan_turn(planes, _rows(copy), gpu=gpu)]


def by_channels_last(image: torch.Tensor, *, gpu: GPU) -> tuple[torch.Tensor, list[Launch]]:
    """What a convolution writes for an image, and what takes it there: a channels_last copy of a large contiguous one.

    There a program's outputs lie apart: each is a sector of 32 bytes to L2, and their addresses fill the registers
    (AlexNet's conv5, compiled for sm_90, spills 1440 bytes).  Small images are made in small tiles, and another kernel
    would take longer than their stores.
    """
    planes = _planes(image)
    if planes is None or not planes.is_contiguous() or (image.numel() <= _SMALL and not gpu.interprets):
        return image, []
    own = scratch(layout.empty_image(image.shape, image, channels_last=True))
    return own, [plan_turn(_rows(own), planes, gpu=gpu)]


def _planes(image: torch.Tensor) -> torch.Tensor | None:
    """An image [N, C, H, W] as [1, N, C, H * W], where its pixels lie beside each other and its channels do not."""
    _, channels, height, width = image.shape
    beside = (width == 1 or image.stride(3) == 1) and (height == 1 or image.stride(2) == width)
    many = channels >= 16 or (channels > 1 and channels * image.itemsize % 16 == 0)
    if not (beside and many) or height * width == 1 or image.stride(1) == 1:
        return None
    return image.as_strided((1, *image.shape[:2], height * width), (0, *image.stride()[:2], 1))


def _rows(image: torch.Tensor) -> torch.Tensor:
    """A channels_last image as [1, N, H * W, C]."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)[None]


def plan_depth_to_space(y: torch.Tensor, dw: torch.Tensor, stride: Pair, *, gpu: GPU) -> Launch:
    """The launch that writes dw [K, C, R, S] from y [K, DEPTH, U, V], both channels_last."""
    tile = tiles.choose_elementwise(1, dw.numel(), dw.dtype, gpu)
    arguments = {
        "y": y, "dw": dw, "SIZE": dw.numel(), "C": dw.shape[1], "R": dw.shape[2], "S": dw.shape[3],
        "U": y.shape[2], "V": y.shape[3], "STRIDE_H": stride[0], "STRIDE_W": stride[1], "DEPTH": y.shape[1],
        "INDEX": index_type(y), "BLOCK": tile.cols,
    }  # fmt: skip
    programs = triton.cdiv(dw.numel(), tile.cols)
    return Launch(device.depth_to_space, (programs,), arguments, tile.num_warps, 1, str(tile))


def plan_widen(x: torch.Tensor, y: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes y [N, C, H, WIDTH] (contiguous) from x [N, C, H, W], its rows filled up with zeros."""
    height, width = y.shape[0] * y.shape[1] * y.shape[2], y.shape[3]
    cols = conv_tile.power_of_two(width)
    tile = tiles.choose_elementwise(height, cols, x.dtype, gpu)
    arguments = {
        "x": x, "y": y, "HEIGHT": height, "C": x.shape[1], "H": x.shape[2], "W": x.shape[3],
        **strides("x", x, "nchw"), "WIDTH": width, "INDEX": index_type(x, y), "ROWS": tile.rows, "COLS": cols,
    }  # fmt: skip
    return Launch(device.widen, (triton.cdiv(height, tile.rows),), arguments, tile.num_warps, 1, f"{tile.rows}x{cols}")
