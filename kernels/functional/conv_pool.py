"""Convolution, activation and max-pool in one call."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels import checks, hardware, layout, pool_tiles
from tileconv.kernels.autograd import conv_pool as autograd
from tileconv.kernels.functional.common import IntOrPair, autocast, fp32_precision, invariance
from tileconv.kernels.functional.conv import _conv_padding
from tileconv.kernels.functional.pool import _stride
from tileconv.kernels.ops.conv import conv2d_problem
from tileconv.kernels.ops.pool import pool2d_problem


def conv2d_max_pool2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    pool_kernel_size: IntOrPair,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    pool_dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    activation: str | None = "relu",
    precision: str | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """max_pool2d(activation(conv2d(...)), ...), where training keeps a byte an output instead of what conv2d writes.

    input [N, C, H, W] or [C, H, W], weight, bias and the settings before `pool_kernel_size` as in conv2d; the others as
    in max_pool2d -> [N, K, P, Q] or [K, P, Q] with the pool's extents.

    One kernel does all where its cost model finds that faster than two and the operands allow it; two kernels, the
    convolution's and the pool's, do it elsewhere, and always if batch_invariant; results differ by the order of sums
    at most.  `how_conv2d_max_pool2d_runs` says which.  Besides input and weight, backward needs one byte an output
    (four for windows of more than 256 elements), and with "relu" the output.

    The result is channels_last if input or weight is, else contiguous.
    """
    batched, weight, bias, settings = _prepare(
        input, weight, bias, stride, padding, dilation, groups, pool_kernel_size=pool_kernel_size,
        pool_stride=pool_stride, pool_padding=pool_padding, pool_dilation=pool_dilation, ceil_mode=ceil_mode,
        activation=activation, precision=precision,
    )  # fmt: skip
    leaves = (batched, weight) if bias is None else (batched, weight, bias)
    with_switch = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    channels_last = layout.is_channels_last(batched) or layout.is_channels_last(weight)
    output: torch.Tensor
    output, _ = autograd.conv2d_max_pool2d(
        batched, weight, bias, *settings, with_switch, channels_last, invariance(batch_invariant)
    )
    return output if input.dim() == 4 else output.squeeze(0)


def how_conv2d_max_pool2d_runs(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **settings: Any
) -> str:
    """ "one kernel", or "two kernels: " and why: what conv2d_max_pool2d does with the same settings, given by name."""
    batched, weight, _, complete = _prepare(input, weight, bias, **settings)
    problem = conv2d_problem(batched.shape, weight.shape, *complete[:4])
    pool = pool2d_problem(problem.y_shape, *complete[4:9])
    gpu = hardware.gpu_of(batched.device)
    reason: str | None = "the kernel that pools has a ReLU"
    if complete[9] == "relu":
        reason = pool_tiles.why_separate(problem, pool, batched.dtype, complete[10], gpu)
    return "one kernel" if reason is None else f"two kernels: {reason}"


def _prepare(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: IntOrPair = 1,
    padding: IntOrPair | str = 0, dilation: IntOrPair = 1, groups: int = 1, *, pool_kernel_size: IntOrPair,
    pool_stride: IntOrPair | None = None, pool_padding: IntOrPair = 0, pool_dilation: IntOrPair = 1,
    ceil_mode: bool = False, activation: str | None = "relu", precision: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[Any, ...]]:  # fmt: skip
    """The checked operands, and the op's settings from stride to precision."""
    checks.choice("activation", activation, checks.ACTIVATIONS)
    batched = checks.image("input", input)
    batched, weight, bias = autocast(batched, weight, bias)
    groups = checks.convolution(batched, weight, bias, groups)
    stride = checks.pair("stride", stride, 1)
    dilation = checks.pair("dilation", dilation, 1)
    geometry = stride, _conv_padding(padding, weight.shape[2:], stride, dilation), dilation, groups
    kernel = checks.pair("pool_kernel_size", pool_kernel_size, 1)
    window = (
        kernel,
        _stride(pool_stride, kernel, "pool_stride"),
        checks.pair("pool_padding", pool_padding, 0),
        checks.pair("pool_dilation", pool_dilation, 1),
        bool(ceil_mode),
    )
    problem = conv2d_problem(batched.shape, weight.shape, *geometry)  # these raise if nothing is left
    pool2d_problem(problem.y_shape, *window)
    return batched, weight, bias, (*geometry, *window, activation, fp32_precision(precision, batched, "conv"))
