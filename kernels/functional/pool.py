"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    window = (
        kernel,
        _stride(stride, kernel),
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
    size = _adaptive_size(output_size, batched)
    output: torch.Tensor = autograd.adaptive_avg_pool2d(batched, size, layout.is_channels_last(batched))
    return output if input.dim() == 4 else output.squeeze(0)


def adaptive_max_pool2d(
    input: torch.Tensor, output_size: int | Sequence[int | None] | None, return_indices: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Maxima over output_size (P, Q) windows that cover the image, as torch.nn.functional.adaptive_max_pool2d.

    [N, C, H, W] -> [N, C, P, Q] (or without N); with return_indices also their int64 places h * W + w.  Windows as in
    adaptive_avg_pool2d; NaN and ties as in max_pool2d.  What backward needs is one byte an output (four for windows of
    more than 256 elements).
    """
    batched = checks.image("input", input)
    size = _adaptive_size(output_size, batched)
    with_switch = return_indices or (torch.is_grad_enabled() and batched.requires_grad)
    output: torch.Tensor
    output, switch = autograd.adaptive_max_pool2d(batched, size, with_switch, layout.is_channels_last(batched))
    output = output if input.dim() == 4 else output.squeeze(0)
    if not return_indices:
        return output
    indices = OPS.adaptive_max_pool2d_indices(switch, batched.shape)
    return output, indices if input.dim() == 4 else indices.squeeze(0)


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """The mean of every window, as torch.nn.functional.avg_pool2d: [N, C, H, W] -> [N, C, P, Q] (or without N).

    Padding, at most half of kernel_size, counts as zeros; without count_include_pad it is not counted.  What a window
    of ceil_mode has beyond the padding is never counted.  divisor_override, any int but 0, replaces the count.  Sums
    are fp32 (fp64 for fp64).
    """
    batched = checks.image("input", input)
    kernel = checks.pair("kernel_size", kernel_size, 1)
    window = kernel, _stride(stride, kernel), checks.pair("padding", padding, 0)
    if divisor_override is not None:
        divisor_override = checks.index("divisor_override", divisor_override, "an int or None")
    if divisor_override == 0:
        raise ValueError("divisor_override is 0: allowed are other ints and None")
    pool2d_problem(batched.shape, *window, (1, 1), bool(ceil_mode))  # raises if nothing is left
    output: torch.Tensor = autograd.avg_pool2d(
        batched, *window, bool(ceil_mode), bool(count_include_pad), divisor_override, layout.is_channels_last(batched)
    )
    return output if input.dim() == 4 else output.squeeze(0)


def lp_pool2d(
    input: torch.Tensor,
    norm_type: int | float,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """(sum of x^norm_type over the window)^(1 / norm_type), as torch.nn.functional.lp_pool2d; 2 is L2-norm pooling.

    [N, C, H, W] -> [N, C, P, Q] (or without N).  PyTorch's definition: no absolute values, so odd norms of negative
    sums are NaN and so are broken powers of negative elements; a window of ceil_mode that hangs over the edge is
    scaled up by kernel elements / elements inside.  Powers and sums are fp32 (fp64 for fp64), so squares of fp16 do
    not overflow.  A window whose norm is 0 passes no gradient on.

    Raises ValueError for a norm_type that is not positive and finite.
    """
    batched = checks.image("input", input)
    norm = checks.number("norm_type", norm_type)
    if norm <= 0:
        raise ValueError(f"norm_type is {norm_type}: allowed are positive numbers")
    kernel = checks.pair("kernel_size", kernel_size, 1)
    window = kernel, _stride(stride, kernel)
    pool2d_problem(batched.shape, *window, (0, 0), (1, 1), bool(ceil_mode))  # raises if nothing is left
    output: torch.Tensor = autograd.lp_pool2d(batched, norm, *window, bool(ceil_mode), layout.is_channels_last(batched))
    return output if input.dim() == 4 else output.squeeze(0)


def max_unpool2d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    output_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Zeros with input's elements where indices say, as torch.nn.functional.max_unpool2d: what max_pool2d undoes.

    input [N, C, P, Q] (or without N), indices of the same shape, int64 places h * W + w -> [N, C, H, W] with
    H = (P - 1) * stride - 2 * padding + kernel_size, or output_size, whose last two extents may differ from that by
    less than a stride.

    Where several indices of a plane name one element, the last one in rows-then-columns order wins, on every run; the
    gradient, as PyTorch's, still goes to all of them.  Indices outside the output raise ValueError on the CPU and
    write nothing on a GPU, where looking would make the CPU wait.
    """
    batched = checks.image("input", input)
    if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64:
        kind = indices.dtype if isinstance(indices, torch.Tensor) else type(indices).__name__
        raise TypeError(f"indices must be a torch.Tensor of torch.int64, not {kind}")
    if indices.shape != input.shape or indices.device != input.device:
        raise ValueError(
            f"indices have shape {tuple(indices.shape)} on {indices.device}: allowed is that of input, "
            f"{tuple(input.shape)} on {input.device}"
        )
    kernel = checks.pair("kernel_size", kernel_size, 1)
    size = _unpooled_size(batched, kernel, _stride(stride, kernel), checks.pair("padding", padding, 0), output_size)
    output: torch.Tensor = autograd.max_unpool2d(
        batched, indices if input.dim() == 4 else indices.unsqueeze(0), size, layout.is_channels_last(batched)
    )
    return output if input.dim() == 4 else output.squeeze(0)


def _stride(stride: IntOrPair | None, kernel: tuple[int, int], name: str = "stride") -> tuple[int, int]:
    empty = stride is None or (isinstance(stride, Sequence) and len(stride) == 0)
    return kernel if empty else checks.pair(name, stride, 1)


def _adaptive_size(output_size: Any, image: torch.Tensor) -> tuple[int, ...]:
    wanted = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    if len(wanted) != 2:
        raise ValueError(f"output_size is {output_size!r}: allowed are an int, None, or a pair of them")
    return tuple(
        extent if want is None else checks.integer("output_size", want, 1)
        for want, extent in zip(wanted, image.shape[2:], strict=True)
    )


def _unpooled_size(
    image: torch.Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_size: Sequence[int] | None,
) -> tuple[int, ...]:
    default = [
        (extent - 1) * step - 2 * pad + window
        for extent, window, step, pad in zip(image.shape[2:], kernel, stride, padding, strict=True)
    ]
    if min(default) < 1:
        raise ValueError(f"padding={padding} leaves an output of {default[0]}x{default[1]}")
    if output_size is None:
        return tuple(default)
    wanted = list(output_size)[-2:]
    if len(output_size) not in (2, 3, 4) or any(
        not max(1, extent - step + 1) <= want < extent + step
        for want, extent, step in zip(wanted, default, stride, strict=True)
    ):
        raise ValueError(
            f"output_size is {tuple(output_size)!r}: allowed are [H, W], also behind N and C, less than a stride "
            f"{stride} away from {tuple(default)}"
        )
    return tuple(wanted)
