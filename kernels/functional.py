"""torch.nn.functional's signatures on our kernels: checks, autocast and memory format, then one call down.

All functions take fp16, bf16, fp32 and fp64 tensors on a CUDA device, or on the CPU where Triton interprets, in any
strides.  They raise TypeError or ValueError that names the argument, its value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tileconv.kernels import autograd, checks, geometry, layout, ops

IntOrPair = int | Sequence[int]


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
) -> torch.Tensor:
    """2-D cross-correlation with bias and activation in the same kernel, as torch.nn.functional.conv2d.

    input [N, C, H, W] or [C, H, W], weight [K, C/groups, R, S], bias [K], all of one dtype -> [N, K, P, Q] or
    [K, P, Q], with P = floor((H + 2 * padding - dilation * (R - 1) - 1) / stride) + 1 and Q likewise.

    padding: an int, a pair, "valid" (none) or "same" (P = H; stride 1 only, the odd element after the image).
    activation: None or "relu".
    precision: of fp32 products, "ieee" or "tf32" (10-bit mantissas, tensor cores); None does as PyTorch: on CUDA what
    torch.backends.cudnn.conv.fp32_precision says, on the CPU "ieee".  Sums are fp32 (fp64 for fp64).

    The result is channels_last if input or weight is, else contiguous.
    """
    checks.choice("activation", activation, checks.ACTIVATIONS)
    batched = checks.image("input", input)
    batched, weight, bias = _autocast(batched, weight, bias)
    checks.convolution(batched, weight, bias, groups)
    stride = checks.pair("stride", stride, 1)
    dilation = checks.pair("dilation", dilation, 1)
    edges = _conv_padding(padding, weight.shape[2:], stride, dilation)
    ops.conv2d_problem(batched.shape, weight.shape, stride, edges, dilation, groups)  # raises if nothing is left
    output: torch.Tensor = autograd.conv2d(
        batched, weight, bias, stride, edges, dilation, groups, activation,
        _precision(precision, batched, "conv"),
        layout.is_channels_last(batched) or layout.is_channels_last(weight),
    )  # fmt: skip
    return output if input.dim() == 4 else output.squeeze(0)


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    precision: str | None = None,
) -> torch.Tensor:
    """input [..., C] times weight [K, C] transposed, plus bias [K] -> [..., K]: a 1x1 convolution of 1x1 images.

    `activation` and `precision` as in conv2d; None follows torch.backends.cuda.matmul.fp32_precision.
    """
    checks.choice("activation", activation, checks.ACTIVATIONS)
    checks.tensor("input", input)
    input, weight, bias = _autocast(input, weight, bias)
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
    output: torch.Tensor = autograd.conv2d(
        rows[:, :, None, None], weight[:, :, None, None], bias, (1, 1), (0, 0, 0, 0), (1, 1), 1, activation,
        _precision(precision, input, "matmul"), False,
    )  # fmt: skip
    return output.reshape(*input.shape[:-1], weight.shape[0])


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
    ops.pool2d_problem(batched.shape, *window)  # raises if the padding is too large or nothing is left
    with_switch = return_indices or (torch.is_grad_enabled() and batched.requires_grad)
    output: torch.Tensor
    output, switch = autograd.max_pool2d(batched, *window, activation, with_switch, layout.is_channels_last(batched))
    output = output if input.dim() == 4 else output.squeeze(0)
    if not return_indices:
        return output
    indices = ops.OPS.max_pool2d_indices(switch, batched.shape, *window)
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


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """max(input, 0), keeping NaN, for a tensor of any shape."""
    checks.tensor("input", input)
    output: torch.Tensor = autograd.relu(input)
    return input.copy_(output) if inplace else output


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """While training zero elements with probability p and divide the others by 1 - p; otherwise return input.

    The mask comes from a counter-based generator (Philox) whose seed PyTorch's generator of that device gives; it is
    never stored.
    """
    checks.tensor("input", input)
    p = checks.probability("p", p)
    if not training:
        return input
    seed = torch.randint(0, 1 << 62, (1,), device=input.device)
    output: torch.Tensor = autograd.dropout(input, seed, p)
    return input.copy_(output) if inplace else output


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


def _precision(wanted: str | None, input: torch.Tensor, operation: str) -> str:
    if wanted is not None:
        checks.choice("precision", wanted, checks.PRECISIONS)
        return wanted
    if input.dtype != torch.float32 or input.device.type != "cuda":
        return "ieee"
    backends: Any = torch.backends
    own = (backends.cudnn.conv, backends.cudnn) if operation == "conv" else (backends.cuda.matmul,)
    # A level that says "none" leaves it to the next one.
    said = next((level.fp32_precision for level in (*own, backends) if level.fp32_precision != "none"), "ieee")
    return "tf32" if said == "tf32" else "ieee"


def _autocast(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The operands in the dtype of the surrounding autocast region, if there is one; fp64 stays, as in PyTorch."""
    device = input.device.type
    if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


__all__ = ["adaptive_avg_pool2d", "conv2d", "dropout", "linear", "max_pool2d", "relu"]
