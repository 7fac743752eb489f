"""Convolution, ReLU and max-pool in one kernel, on the host side."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tileconv.kernels import layout, pool_tiles
from tileconv.kernels.device import conv_pool as device
from tileconv.kernels.geometry import Conv2dProblem, Pool2dProblem
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import TRITON_TYPE, Launch, strides
from tileconv.kernels.launch.conv import _filter_matrix, plan_fprop
from tileconv.kernels.launch.descriptors import (
    aligned,
    describable,
    for_descriptor,
    image_descriptor,
    matrix_descriptor,
)
from tileconv.kernels.launch.layout import in_channels_last
from tileconv.kernels.launch.plans import scratch
from tileconv.kernels.launch.pool import plan_max_forward


def plan(
    problem: Conv2dProblem, pool: Pool2dProblem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None,
    y: torch.Tensor, switch: torch.Tensor | None,
    *, gpu: GPU, activation: str | None, precision: str, channels_last: bool, batch_invariant: bool,
) -> list[Launch]:  # fmt: skip
    """The launches that write y and, if given, switch: one where that is faster, else a convolution and a pool.

    What lies between those two is channels_last or not, as said.
    """
    if activation == "relu" and not batch_invariant and pool_tiles.fuse_pool(problem, pool, x.dtype, precision, gpu):
        (x, copy_x), (w, copy_w) = in_channels_last(x, gpu=gpu), in_channels_last(w, gpu=gpu)
        return [*copy_x, *copy_w, plan_conv_pool(problem, pool, x, w, bias, y, switch, gpu=gpu, precision=precision)]
    between = scratch(layout.empty_image(problem.y_shape, x, channels_last))
    first = plan_fprop(problem, x, w, bias, between, gpu=gpu, precision=precision, batch_invariant=batch_invariant)
    # The activation goes to the pool, which sees fewer elements, so that both ways give the same bits.
    return [*first, plan_max_forward(pool, between, y, switch, gpu=gpu, activation=activation)]


def plan_conv_pool(
    problem: Conv2dProblem,
    pool: Pool2dProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    switch: torch.Tensor | None,
    *,
    gpu: GPU,
    precision: str = "ieee",
) -> Launch:
    """The launch that writes y [N, K, pool.P, pool.Q] and, if given, switch (uint8, laid out like y) from x and w.

    Between convolution and pool is a ReLU, and bias before it if given.
    Raises ValueError where the kernel cannot run, and RuntimeError where a self-test excluded all of its tiles;
    pool_tiles.why_separate says both beforehand.
    """
    tile = pool_tiles.choose_pooled(problem, pool, x.dtype, precision, gpu)
    if reason := pool_tiles.why_invalid(tile, problem, pool, x.dtype, precision, gpu):
        raise ValueError(f"convolution and max-pool cannot run as one kernel: {reason}")
    windows = (1, 1)
    if tile.formulation == "box":
        windows = tile.box[1] // pool.kernel[0], tile.box[2] // pool.kernel[1]
    own = (tile.box[0], *windows)
    store_box = describable(y, problem.groups) and (switch is None or describable(switch, problem.groups))

    def output(image: torch.Tensor) -> Any:
        return image_descriptor(image, problem.groups, own, tile.block_k) if store_box else image

    arguments: dict[str, Any] = {
        "x": image_descriptor(for_descriptor(x, problem.groups), problem.groups, tile.box, tile.block_c),
        "w": matrix_descriptor(aligned(_filter_matrix(w)), (tile.block_k, tile.block_c)),
        "y": output(y), "switch": None if switch is None else output(switch), "bias": bias,
        "N": problem.N, "H": problem.H, "W": problem.W, "P": problem.P, "Q": problem.Q, "POOLED_P": pool.P,
        "POOLED_Q": pool.Q, "C": problem.group_channels, "K": problem.group_filters, **strides("y", y, "nkpq"),
        "pad_h": problem.padding[0][0], "pad_w": problem.padding[1][0], "stride_h": problem.stride[0],
        "stride_w": problem.stride[1], "R": problem.R, "S": problem.S, "DIL_H": problem.dilation[0],
        "DIL_W": problem.dilation[1], "GROUPS": problem.groups, "WINDOW_H": pool.kernel[0], "WINDOW_W": pool.kernel[1],
        "STEP_H": pool.stride[0], "STEP_W": pool.stride[1], "POOL_PAD_H": pool.padding[0],
        "POOL_PAD_W": pool.padding[1], "PARTIAL": pool.partial, "HAS_BIAS": bias is not None,
        "STORE_BOX": store_box, "PRECISION": precision, "OUT": TRITON_TYPE[y.dtype],
        "BOX_N": tile.box[0], "BOX_H": tile.box[1], "BOX_W": tile.box[2], "BLOCK_K": tile.block_k,
        "BLOCK_C": tile.block_c,
    }  # fmt: skip
    boxes = triton.cdiv(problem.N, own[0]) * triton.cdiv(pool.P, own[1]) * triton.cdiv(pool.Q, own[2])
    programs = boxes * problem.groups * triton.cdiv(problem.group_filters, tile.block_k)
    return Launch(device.fprop_pool, (programs,), arguments, tile.num_warps, tile.num_stages, str(tile))
