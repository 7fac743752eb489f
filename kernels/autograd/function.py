"""What every Function around an op shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

Gradients = tuple[torch.Tensor | None, ...]


class Function(torch.autograd.Function):
    generate_vmap_rule = True  # the ops have batching rules of their own; without jvp, forward mode raises

    def __init_subclass__(cls) -> None:
        # apply() asks inspect for the signature in every call; one that is kept saves it a fifth of a convolution's
        # host time.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


def door(function: type[Function], op: Callable[..., Any]) -> Callable[..., Any]:
    """A call that goes through the Function where autograd must see it, else straight to the op.

    Raises RuntimeError where torch.jit.trace meets a Function: it can neither check nor save one.
    """

    def call(*arguments: Any) -> Any:
        # Forward mode and torch.func count too: past the Function they would lose a tangent without a word.
        seen = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
        if not seen and torch.is_grad_enabled():
            seen = any(isinstance(value, torch.Tensor) and value.requires_grad for value in arguments)
        if not seen:
            return op(*arguments)
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError("torch.jit.trace keeps no gradients of tileconv's kernels: trace in torch.no_grad()")
        return function.apply(*arguments)  # type: ignore[no-untyped-call]

    return call


def then_nones(*gradients: torch.Tensor | None, count: int) -> Gradients:
    """Gradients of the tensors that come first, None for the `count` settings after them."""
    return (*gradients, *(None,) * count)
