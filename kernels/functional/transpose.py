"""Transposed and one-dimensional convolution, on the two-dimensional engine."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.autograd import transpose as autograd
from tileconv.kernels.functional import common
from tileconv.kernels.functional.common import IntOrPair, autocast, fp32_precision
from tileconv.kernels.functional.conv import conv2d


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    groups: int = 1,
    dilation: IntOrPair = 1,
    *,
    activation: str | None = None,
    precision: str | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """The transpose of conv2d, as torch.nn.functional.conv_transpose2d: what conv2d's input gradient computes.

    input [N, K, P, Q] or [K, P, Q], weight [K, C/groups, R, S], bias [C], all of one dtype -> [N, C, H, W] or
    [C, H, W], with H = (P - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1 and W likewise.

    output_padding: rows and columns more at the far side, fewer than stride or dilation is.  activation, precision and
    batch_invariant as in conv2d.  The result is channels_last if input or weight is, else contiguous.  Raises TypeError
    or ValueError that names the argument.
    """
    checks.choice("activation", activation, checks.ACTIVATIONS)
    batched = checks.image("input", input)
    batched, weight, bias = autocast(batched, weight, bias)
    checks.tensor("weight", weight, batched)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: allowed is [K, C/groups, R, S], nothing empty")
    groups = checks.integer("groups", groups, 1)
    if batched.shape[1] != weight.shape[0]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: input's {batched.shape[1]} channels need weight.shape[0] = "
            f"{batched.shape[1]}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"groups is {groups}: it must divide input's {weight.shape[0]} channels")
    channels = weight.shape[1] * groups
    if bias is not None:
        checks.vector("bias", bias, batched, channels)
    stride, dilation = checks.pair("stride", stride, 1), checks.pair("dilation", dilation, 1)
    padding, more = checks.pair("padding", padding, 0), checks.pair("output_padding", output_padding, 0)
    for axis in range(2):
        if more[axis] >= max(stride[axis], dilation[axis]):
            raise ValueError(
                f"output_padding is {more}: allowed is less than stride {stride} or dilation {dilation} on each axis"
            )
    size = [
        (batched.shape[2 + axis] - 1) * stride[axis] - 2 * padding[axis]
        + dilation[axis] * (weight.shape[2 + axis] - 1) + more[axis] + 1
        for axis in range(2)
    ]  # fmt: skip
    if min(size) < 1:
        raise ValueError(
            f"padding is {padding}: with input {tuple(input.shape)} and weight {tuple(weight.shape)} it leaves an "
            f"output of {size[0]}x{size[1]}"
        )
    # What output_padding adds no patch reaches from that side: it is cut from the padding there.
    edges = padding[0], padding[0] - more[0], padding[1], padding[1] - more[1]
    output: torch.Tensor = autograd.conv_transpose2d(
        batched, weight, bias, (batched.shape[0], channels, size[0], size[1]), stride, edges, dilation, groups,
        activation, fp32_precision(precision, batched, "conv"),
        layout.is_channels_last(batched) or layout.is_channels_last(weight), common.invariance(batch_invariant),
    )  # fmt: skip
    return output if input.dim() == 4 else output.squeeze(0)


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    precision: str | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """1-D cross-correlation, as torch.nn.functional.conv1d: a picture of one row.

    input [N, C, W] or [C, W], weight [K, C/groups, S], bias [K] -> [N, K, Q] or [K, Q].  The other arguments are an
    int each (or a sequence of one), or for padding "valid" or "same"; activation, precision, batch_invariant
    and errors as in conv2d.
    """
    checks.tensor("input", input)
    checks.tensor("weight", weight)
    if input.dim() not in (2, 3):
        raise ValueError(f"input has shape {tuple(input.shape)}: allowed are [N, C, W] and [C, W]")
    if weight.dim() != 3:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: allowed is [K, C/groups, S]")
    if not isinstance(padding, str):
        padding = (0, _single("padding", padding, 0))
    return conv2d(
        input.unsqueeze(-2), weight.unsqueeze(-2), bias, (1, _single("stride", stride, 1)), padding,
        (1, _single("dilation", dilation, 1)), groups, activation=activation, precision=precision,
        batch_invariant=batch_invariant,
    ).squeeze(-2)  # fmt: skip


def _single(name: str, value: Any, least: int) -> int:
    """An int, or a sequence of one."""
    if isinstance(value, (tuple, list)):
        if len(value) != 1:
            raise ValueError(f"{name} is {value!r}: allowed are an int or a sequence of one")
        value = value[0]
    return checks.integer(name, value, least)
