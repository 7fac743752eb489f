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


def _with_indices(function: Callable[..., Any], places: int) -> Callable[..., Any]:
    """The variant with indices: PyTorch passes its return_indices on, as it was, behind `places` arguments."""
    return lambda *args, **kwargs: function(*args[:places], **{**kwargs, "return_indices": True})


def _torch_softmax(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch's and Tensor's argument order."""
    return lambda input, dim, dtype=None: function(input, dim, dtype=dtype)


# What a TorchFunctionMode is handed.  F.max_pool2d is a switch between two functions of which one names itself, and
# F.conv2d and F.linear are the built-in functions themselves.
REDIRECTS: dict[Any, tuple[str, Callable[..., Any]]] = {
    torch.conv2d: ("conv2d", functional.conv2d),
    F.linear: ("linear", functional.linear),
    F.max_pool2d: ("max_pool2d", functional.max_pool2d),
    F.max_pool2d_with_indices: ("max_pool2d", _with_indices(functional.max_pool2d, 6)),
    torch.max_pool2d: ("max_pool2d", functional.max_pool2d),
    torch.conv1d: ("conv1d", functional.conv1d),
    torch.conv_transpose2d: ("conv_transpose2d", functional.conv_transpose2d),
    F.avg_pool2d: ("avg_pool2d", functional.avg_pool2d),
    F.lp_pool2d: ("lp_pool2d", functional.lp_pool2d),
    F.max_unpool2d: ("max_unpool2d", functional.max_unpool2d),
    F.adaptive_max_pool2d: ("adaptive_max_pool2d", functional.adaptive_max_pool2d),
    F.adaptive_max_pool2d_with_indices: ("adaptive_max_pool2d", _with_indices(functional.adaptive_max_pool2d, 2)),
    F.adaptive_avg_pool2d: ("adaptive_avg_pool2d", functional.adaptive_avg_pool2d),
    F.local_response_norm: ("local_response_norm", functional.local_response_norm),
    F.softmax: ("softmax", functional.softmax),
    torch.softmax: ("softmax", _torch_softmax(functional.softmax)),
    torch.Tensor.softmax: ("softmax", _torch_softmax(functional.softmax)),
    F.log_softmax: ("log_softmax", functional.log_softmax),
    torch.log_softmax: ("log_softmax", _torch_softmax(functional.log_softmax)),
    torch.Tensor.log_softmax: ("log_softmax", _torch_softmax(functional.log_softmax)),
    F.cross_entropy: ("cross_entropy", functional.cross_entropy),
    F.unfold: ("unfold", functional.unfold),
    F.fold: ("fold", functional.fold),
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

    Redirected are the functions of tileconv.kernels that torch.nn.functional has too, and torch's and Tensor's names
    for them.  What our kernels do not take (another dtype, device or layout) is left with
    PyTorch; with strict=True it raises our TypeError or ValueError instead.  `with use_kernels() as mode:` counts both
    in mode.taken and mode.left.  Nothing is fused, and contiguous weights are repacked in every call: convert()
    does better where a model is made of modules.
    """
    return KernelMode(strict)
