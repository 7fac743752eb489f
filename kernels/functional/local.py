"""Locally connected layers."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.autograd import local as autograd
from tileconv.kernels.functional.common import IntOrPair, autocast, fp32_precision
from tileconv.kernels.ops.local import local_problem


def locally_connected2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    *,
    precision: str | None = None,
) -> torch.Tensor:
    """A convolution without weight sharing: every output pixel has filters of its own.

    input [N, C, H, W] or [C, H, W], weight [P, Q, K, C, R, S], bias [K] (all pixels share it) or [K, P, Q], all of one
    dtype -> [N, K, P, Q] or [K, P, Q]:

        y[n, k, p, q] = bias[k] + sum over (c, r, s) of
                        weight[p, q, k, c, r, s] * x[n, c, p * stride + r * dilation - padding, ...]

    so weight[p, q] is what conv2d would take, and P and Q are conv2d's.  No call repacks filters whose memory is in the
    order P Q K R S C, as LocallyConnected2d keeps them.  precision, "ieee" or "tf32", as in conv2d.  The result is
    channels_last if input is, else contiguous.  Raises TypeError or ValueError that names the argument.
    """
    batched = checks.image("input", input)
    batched, weight, bias = autocast(batched, weight, bias)
    checks.tensor("weight", weight, batched)
    if weight.dim() != 6 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: allowed is [P, Q, K, C, R, S], nothing empty")
    if weight.shape[3] != batched.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: input's {batched.shape[1]} channels need weight.shape[3] = "
            f"{batched.shape[1]}"
        )
    stride, dilation = checks.pair("stride", stride, 1), checks.pair("dilation", dilation, 1)
    top, left = checks.pair("padding", padding, 0)
    edges = (top, top, left, left)
    problem = local_problem(batched.shape, weight.shape, stride, edges, dilation)
    if tuple(weight.shape[:2]) != (problem.P, problem.Q):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: the output has {problem.P}x{problem.Q} pixels, "
            f"so it needs weight.shape[:2] = ({problem.P}, {problem.Q})"
        )
    if bias is not None:
        _check_bias(bias, batched, problem.y_shape[1:])
    output: torch.Tensor = autograd.locally_connected2d(
        batched, weight, bias, stride, edges, dilation, fp32_precision(precision, batched, "conv", ("ieee", "tf32")),
        layout.is_channels_last(batched),
    )  # fmt: skip
    return output if input.dim() == 4 else output.squeeze(0)


def _check_bias(bias: Any, like: torch.Tensor, shape: tuple[int, ...]) -> None:
    checks.tensor("bias", bias, like)
    if tuple(bias.shape) not in (shape[:1], shape):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: allowed are {shape[:1]} and {shape}")
