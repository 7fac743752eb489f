"""What the functions share: argument types, autocast and fp32 precision."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tileconv.kernels import checks, fp32

IntOrPair = int | Sequence[int]
_scope = threading.local()  # not a ContextVar: torch.compile cannot trace one


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """In this block what convolutions and linear layers make of a sample has the same bits in a batch of any size.

    The tile is then chosen without a look at the batch, for batches of 1 to 128, and never by a measured table.
    Backward follows its forward pass; gradients of weights and biases add over the batch, and so depend on it.  The
    argument of the same name on a call has the last word.  Raises TypeError where `enabled` is no bool.
    """
    before = invariance(None)
    _scope.batch_invariant = checks.flag("enabled", enabled)
    try:
        yield
    finally:
        _scope.batch_invariant = before


def invariance(wanted: bool | None) -> bool:
    """What a call's batch_invariant comes to."""
    if wanted is None:
        return getattr(_scope, "batch_invariant", False)
    return checks.flag("batch_invariant", wanted)


def fp32_precision(
    wanted: str | None, input: torch.Tensor, operation: str, allowed: Sequence[str] = checks.PRECISIONS
) -> str:
    """What is wanted, or "ieee" or "tf32" as PyTorch would do for `operation` ("conv" or "matmul") there."""
    if wanted is not None:
        checks.choice("precision", wanted, allowed)
        fp32.multiplied(input.dtype, wanted)  # raises for what is no fp32 tensor
        return wanted
    if input.dtype != torch.float32 or input.device.type != "cuda":
        return "ieee"
    backends: Any = torch.backends
    own = (backends.cudnn.conv, backends.cudnn) if operation == "conv" else (backends.cuda.matmul,)
    # A level that says "none" leaves it to the next one.
    said = next((level.fp32_precision for level in (*own, backends) if level.fp32_precision != "none"), "ieee")
    return "tf32" if said == "tf32" else "ieee"


def in_autocast(input: torch.Tensor) -> bool:
    """Whether a surrounding autocast region is about tensors where `input` is; there is none for meta tensors."""
    return input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)


def autocast(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The operands in the dtype of the surrounding autocast region, if there is one; fp64 stays, as in PyTorch."""
    if not in_autocast(input) or input.dtype == torch.float64:
        return input, weight, bias
    dtype = torch.get_autocast_dtype(input.device.type)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
