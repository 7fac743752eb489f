"""Rearrangements on the host side."""

from __future__ import annotations

import torch
import triton

from tileconv.kernels import conv_tile, small_tiles, tiles
from tileconv.kernels.device import layout as device
from tileconv.kernels.geometry import Pair
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch, index_type, strides


def plan_space_to_depth(x: torch.Tensor, y: torch.Tensor, stride: Pair, padding: Pair, *, gpu: GPU) -> Launch:
    """The launch that writes y [N, DEPTH, U, V] (channels_last) from x [N, C, H, W], padded before by `padding`."""
    count, depth, rows, columns = y.shape
    cols = conv_tile.power_of_two(depth)
    tile = tiles.choose_elementwise(columns, cols, x.dtype, gpu)
    arguments = {
        "x": x, "y": y, "C": x.shape[1], "H": x.shape[2], "W": x.shape[3], "U": rows, "V": columns,
        **strides("x", x, "nchw"), "pad_h": padding[0], "pad_w": padding[1], "STRIDE_H": stride[0],
        "STRIDE_W": stride[1], "DEPTH": depth, "INDEX": index_type(x, y), "ROWS": tile.rows, "COLS": cols,
    }  # fmt: skip
    programs = count * rows * triton.cdiv(columns, tile.rows)
    return Launch(device.space_to_depth, (programs,), arguments, tile.num_warps, 1, f"{tile.rows}x{cols}")


def plan_turn(rows: torch.Tensor, turned: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes turned [WIDTH, N], contiguous, from rows [N, WIDTH], each of them contiguous."""
    count, width = rows.shape
    tile = small_tiles.choose_turn(count, width, rows.dtype, gpu)
    arguments = {"x": rows, "y": turned, "N": count, "WIDTH": width, "stride_x": rows.stride(0), "ROWS": tile.rows,
                 "COLS": tile.cols}  # fmt: skip
    programs = triton.cdiv(count, tile.rows) * triton.cdiv(width, tile.cols)
    return Launch(device.turn, (programs,), arguments, tile.num_warps, 1, str(tile))


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
