"""Convolution and fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tileconv.kernels import checks, geometry, layout
from tileconv.kernels.autograd import conv as autograd
from tileconv.kernels.functional import common, pointwise
from tileconv.kernels.functional.common import IntOrPair, autocast, fp32_precision
from tileconv.kernels.ops.conv import OF_LINEAR, conv2d_problem


def conv2d(
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
    """2-D cross-correlation with bias and activation in the same kernel, as torch.nn.functional.conv2d.

    input [N, C, H, W] or [C, H, W], weight [K, C/groups, R, S], bias [K], all of one dtype -> [N, K, P, Q] or
    [K, P, Q], with P = floor((H + 2 * padding - dilation * (R - 1) - 1) / stride) + 1 and Q likewise.

    padding: an int, a pair, "valid" (none) or "same" (P = H; stride 1 only, the odd element after the image).
    activation: None or "relu".
    precision: of fp32 products.  "ieee" is fp32's own; the others run on tensor cores: "tf32" (10-bit mantissas), and
    for fp32 tensors alone "bf16x3" (16 bits) and "bf16x6" (24 bits, so fp32's accuracy), which add up three or six
    products of bf16 parts; kernels/fp32.py says how large their errors are.  None does as PyTorch: on CUDA what
    torch.backends.cudnn.conv.fp32_precision says, on the CPU "ieee".  Depthwise layers, bound by memory, are computed
    as with "ieee" whatever it is.  Sums are fp32 (fp64 for fp64).
    batch_invariant: whether a sample's result and its input's gradient have the same bits in a batch of any size; None
    does as the surrounding functional.batch_invariant says, else no.

    The result is channels_last if input or weight is, else contiguous.  A strided layer of up to four channels whose
    image is regrouped in blocks (at "bf16x3" and "bf16x6", and of fp16 and bf16 at an odd stride along rows) multiplies
    pixels beside a filter by zero: a NaN or an infinity there reaches that output too.
    """
    checks.choice("activation", activation, checks.ACTIVATIONS)
    batched = checks.image("input", input)
    batched, weight, bias = autocast(batched, weight, bias)
    groups = checks.convolution(batched, weight, bias, groups)
    stride = checks.pair("stride", stride, 1)
    dilation = checks.pair("dilation", dilation, 1)
    edges = _conv_padding(padding, weight.shape[2:], stride, dilation)
    conv2d_problem(batched.shape, weight.shape, stride, edges, dilation, groups)  # raises if nothing is left
    output: torch.Tensor = autograd.conv2d(
        batched, weight, bias, stride, edges, dilation, groups, activation,
        fp32_precision(precision, batched, "conv"),
        layout.is_channels_last(batched) or layout.is_channels_last(weight), common.invariance(batch_invariant),
    )  # fmt: skip
    return output if input.dim() == 4 else output.squeeze(0)


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    dropout: float = 0.0,
    training: bool = True,
    precision: str | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """input [..., C] times weight [K, C] transposed, plus bias [K] -> [..., K]: a 1x1 convolution of 1x1 images.

    `activation` and `precision` as in conv2d; None follows torch.backends.cuda.matmul.fp32_precision.
    batch_invariant as in conv2d: the batch are all rows of input.
    dropout: while `training` zero outputs with this probability and divide the others by what is left, after the
    activation and in the same kernel; the mask is that which functional.dropout would draw for the output.  Outputs are
    divided before they are rounded, so in half precision they may differ from those of two calls in the last bit.
    """
    checks.choice("activation", activation, checks.ACTIVATIONS)
    dropout = checks.probability("dropout", dropout)
    checks.tensor("input", input)
    input, weight, bias = autocast(input, weight, bias)
    checks.tensor("weight", weight, input)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: allowed is [K, C], nothing empty")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input has shape {tuple(input.shape)}: weight {tuple(weight.shape)} needs [..., {weight.shape[1]}]"
        )
    if bias is not None:
        checks.vector("bias", bias, input, weight.shape[0])
    rows = input.reshape(-1, input.shape[-1])
    pixels, filters = rows[:, :, None, None], weight[:, :, None, None]
    precision = fp32_precision(precision, input, "matmul")
    invariant = common.invariance(batch_invariant)
    output: torch.Tensor
    if training and dropout > 0:
        seed = pointwise.drawn_seed(input.device)
        output = autograd.linear_dropout(pixels, filters, bias, seed, dropout, activation, precision, invariant)
    else:
        output = autograd.conv2d(pixels, filters, bias, *OF_LINEAR, activation, precision, False, invariant)
    return output.reshape(*input.shape[:-1], weight.shape[0])


def _conv_padding(
    padding: Any, window: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right)."""
    if not isinstance(padding, str):
        rows, columns = checks.pair("padding", padding, 0)
        return rows, rows, columns, columns
    checks.choice("padding", padding, ("valid", "same"))
    if padding == "valid":
        return 0, 0, 0, 0
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1, stride is {stride}")
    return *geometry.same_padding(window[0], dilation[0]), *geometry.same_padding(window[1], dilation[1])
