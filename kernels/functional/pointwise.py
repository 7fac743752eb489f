"""Elementwise functions."""

from __future__ import annotations

import torch

from tileconv.kernels import checks
from tileconv.kernels.autograd import pointwise as autograd


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """max(input, 0), keeping NaN, for a tensor of any shape."""
    checks.tensor("input", input)
    output: torch.Tensor = autograd.relu(input)
    return input.copy_(output) if inplace else output


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """While training zero elements with probability p and divide the others by 1 - p; otherwise, or with p 0, return
    input.

    The mask comes from a counter-based generator (Philox) whose seed PyTorch's generator of that device gives; it is
    never stored.
    """
    checks.tensor("input", input)
    p = checks.probability("p", p)
    if not training or p == 0:  # no seed is drawn: as in PyTorch, what is drawn after it stays the same
        return input
    output: torch.Tensor = autograd.dropout(input, drawn_seed(input.device), p)
    return input.copy_(output) if inplace else output


def drawn_seed(device: torch.device) -> torch.Tensor:
    """The seed of one mask, from PyTorch's generator: there, so that a CUDA graph draws anew at every replay."""
    return torch.randint(0, 1 << 62, (1,), device=device)
