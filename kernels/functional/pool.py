"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.autograd import pool as autograd
from tileconv.kernels.functional.common import IntOrPair
from tileconv.kernels.ops import OPS
from tileconv.kernels.ops.pool import pool2d_problem


def max_pool2d(
    input: torch.Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The maximum of every window, as torch.nn.functional.max_pool2d; activation="relu" also cuts it at zero.

    [N, C, H, W] -> [N, C, P, Q] (or without N); with return_indices also their int64 places h * W + w.  NaN wins, ties
    go to the first element, stride defaults to kernel_size, padding is at most half of it.  What backward needs is one
    byte an output (four for windows of more than 256 elements), and with "relu" the output.
    """
    checks.choice("activation", activation, checks.ACTIVATIONS)
    batched = checks.image("input", input)
    kernel = checks.pair("kernel_size", kernel_size, 1)
    empty = stride is None or (isinstance(stride, Sequence) and len(stride) == 0)
    window = (
        kernel,
        kernel if empty else checks.pair("stride", stride, 1),
        checks.pair("padding", padding, 0),
        checks.pair("dilation", dilation, 1),
        bool(ceil_mode),
    )
    pool2d_problem(batched.shape, *window)  # raises if the padding is too large or nothing is left
    with_switch = return_indices or (torch.is_grad_enabled() and batched.requires_grad)
    output: torch.Tensor
    output, switch = autograd.max_pool2d(batched, *window, activation, with_switch, layout.is_channels_last(batched))
    output = output if input.dim() == 4 else output.squeeze(0)
    if not return_indices:
        return output
    indices = OPS.max_pool2d_indices(switch, batched.shape, *window)
    return output, indices if input.dim() == 4 else indices.squeeze(0)


def adaptive_avg_pool2d(input: torch.Tensor, output_size: int | Sequence[int | None] | None) -> torch.Tensor:
    """Means over output_size (P, Q) windows that cover the image, as torch.nn.functional.adaptive_avg_pool2d.

    Window i covers rows floor(i * H / P) to ceil((i + 1) * H / P).  None keeps the input's extent.
    """
    batched = checks.image("input", input)
    wanted = (output_size, output_size) if output_size is None or isinstance(output_size, int) else tuple(output_size)
    if len(wanted) != 2:
        raise ValueError(f"output_size is {output_size!r}: allowed are an int, None, or a pair of them")
    size = tuple(
        extent if want is None else checks.integer("output_size", want, 1)
        for want, extent in zip(wanted, batched.shape[2:], strict=True)
    )
    output: torch.Tensor = autograd.adaptive_avg_pool2d(batched, size, layout.is_channels_last(batched))
    return output if input.dim() == 4 else output.squeeze(0)
