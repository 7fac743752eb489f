"""Run a model's calls of torch.nn.functional on our kernels, without touching the model."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tileconv.kernels import functional
from tileconv.kernels.fusion import first_line


def _relu_in_place(input: torch.Tensor) -> torch.Tensor:
    return functional.relu(input, inplace=True)


def _torch_dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    return functional.dropout(input, p, train)


def _named_self(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda self: function(self)


# What a TorchFunctionMode is handed.  F.max_pool2d is a switch between two functions of which one names itself, and
# F.conv2d and F.linear are the built-in functions themselves.
REDIRECTS: dict[Any, tuple[str, Callable[..., Any]]] = {
    torch.conv2d: ("conv2d", functional.conv2d),
    F.linear: ("linear", functional.linear),
    F.max_pool2d: ("max_pool2d", functional.max_pool2d),
    F.max_pool2d_with_indices: (
        "max_pool2d",
        lambda *args, **kwargs: functional.max_pool2d(*args[:6], **{**kwargs, "return_indices": True}),
    ),
    torch.max_pool2d: ("max_pool2d", functional.max_pool2d),
    F.adaptive_avg_pool2d: ("adaptive_avg_pool2d", functional.adaptive_avg_pool2d),
    F.relu: ("relu", functional.relu),
    torch.relu: ("relu", functools.partial(functional.relu, inplace=False)),
    torch.relu_: ("relu", _relu_in_place),
    torch.Tensor.relu: ("relu", _named_self(functional.relu)),
    torch.Tensor.relu_: ("relu", _named_self(_relu_in_place)),
    F.dropout: ("dropout", functional.dropout),
    torch.dropout: ("dropout", _torch_dropout),
}


@dataclass(eq=False)
class KernelMode(TorchFunctionMode):
    """What `use_kernels` returns: the context, and counts of what it did."""

    strict: bool = False
    taken: Counter[str] = field(default_factory=Counter)
    """Calls that went to our kernels, by function."""
    left: Counter[str] = field(default_factory=Counter)
    """Calls that were left with PyTorch, as "function: why"."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # PyTorch takes the mode off while it is in here, so what our own functions call is not redirected again.
        kwargs = kwargs or {}
        if func not in REDIRECTS:
            return func(*args, **kwargs)
        name, ours = REDIRECTS[func]
        try:
            result = ours(*args, **kwargs)
        except (TypeError, ValueError) as error:  # how our functions refuse arguments, before anything has run
            if self.strict:
                raise
            refused = first_line(error)
        else:
            self.taken[name] += 1
            return result
        self.left[f"{name}: {refused}"] += 1
        return func(*args, **kwargs)  # what is wrong for PyTorch as well gets PyTorch's own error


def use_kernels(*, strict: bool = False) -> KernelMode:
    """A context in which calls of torch.nn.functional run on our kernels, in models' own code and in torch.nn's layers.

    Redirected are conv2d, linear, max_pool2d, adaptive_avg_pool2d, relu and dropout of torch.nn.functional, and
    torch's and Tensor's names for them.  What our kernels do not take (another dtype, device or layout) is left with
    PyTorch; with strict=True it raises our TypeError or ValueError instead.  `with use_kernels() as mode:` counts both
    in mode.taken and mode.left.  Nothing is fused, and contiguous weights are repacked in every call: convert()
    does better where a model is made of modules.
    """
    return KernelMode(strict)
