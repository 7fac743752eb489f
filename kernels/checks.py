"""Argument checks: every error names the argument, what it was and what is allowed, before anything is allocated."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from tileconv.kernels import fp32, hardware

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = (None, "relu")
PRECISIONS = fp32.NAMES
LARGEST = 1 << 28  # kernels count places in 32 bits, and add a few of these: window, padding and stride


def tensor(name: str, value: Any, like: torch.Tensor | None = None) -> None:
    """A floating-point tensor on a device that kernels reach; with `like`, of its dtype and on its device."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {value.dtype}: allowed are {', '.join(map(str, FLOATING))}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: allowed is torch.strided")
    if like is None:
        hardware.check_device(value.device, name)
    elif value.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, but input has {like.dtype}: they must be the same")
    elif value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but input is on {like.device}: they must be the same")


def image(name: str, value: Any) -> torch.Tensor:
    """A [N, C, H, W] or unbatched [C, H, W] tensor whose only empty axis may be N; returns it with a batch axis."""
    tensor(name, value)
    if value.dim() not in (3, 4):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: allowed are [N, C, H, W] and [C, H, W]")
    batched: torch.Tensor = value if value.dim() == 4 else value.unsqueeze(0)
    if any(extent == 0 for extent in batched.shape[1:]):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: only the batch may be empty")
    return batched


def index(name: str, value: Any, allowed: str = "an int") -> int:
    """What Python takes for an index, as numpy's integers and torch's of no axis are; bools and floats are none."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    number = not (value.dim() or value.dtype == torch.bool) if isinstance(value, torch.Tensor) else value is not True
    try:
        if number and value is not False:
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be {allowed}, not {value!r}")


def integer(name: str, value: Any, least: int) -> int:
    """An int from `least` to what kernels count to."""
    found = index(name, value)
    if found < least:
        raise ValueError(f"{name} is {value}: allowed is {least} or more")
    if found > LARGEST:
        raise ValueError(f"{name} is {value}: allowed are {least} to {LARGEST}")
    return found


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """An int, or a sequence of one or two of them, each at least `least`."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) not in (1, 2):
            raise ValueError(f"{name} is {value!r}: allowed are an int or a pair of ints")
        return integer(name, value[0], least), integer(name, value[-1], least)
    if isinstance(value, str):
        raise TypeError(f"{name} must be an int or a pair of ints, not {value!r}")
    single = integer(name, value, least)
    return single, single


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """One of a few values."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: allowed are {', '.join(map(repr, allowed))}")


def number(name: str, value: Any) -> float:
    """A finite number; bools are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not -math.inf < value < math.inf:  # torch.compile traces this, but not math.isfinite
        raise ValueError(f"{name} is {value}: allowed are finite numbers")
    return float(value)


def probability(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: allowed is 0 to 1")
    return float(value)


def convolution(input: torch.Tensor, weight: Any, bias: Any, groups: Any) -> int:
    """Filters [K, C/groups, R, S] and bias [K] that fit the input [N, C, H, W]; returns the groups."""
    tensor("weight", weight, input)
    if weight.dim() != 4 or any(extent == 0 for extent in weight.shape):
        raise ValueError(f"weight has shape {tuple(weight.shape)}: allowed is [K, C/groups, R, S], nothing empty")
    count = integer("groups", groups, 1)
    channels, filters = input.shape[1], weight.shape[0]
    if channels % count or filters % count:
        raise ValueError(
            f"groups is {count}: it must divide input's {channels} channels and weight's {filters} filters"
        )
    if weight.shape[1] * count != channels:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: input's {channels} channels in {count} groups need "
            f"weight.shape[1] = {channels // count}"
        )
    if bias is not None:
        vector("bias", bias, input, filters)
    return count


def vector(name: str, value: Any, like: torch.Tensor, length: int) -> None:
    """A tensor of shape [length] that goes with `like`."""
    tensor(name, value, like)
    if tuple(value.shape) != (length,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: allowed is ({length},)")


def belongs(name: str, value: torch.Tensor, shape: Sequence[int], like: torch.Tensor, dtype: torch.dtype) -> None:
    """A tensor of an op's other tensors' making: exactly this shape and dtype, on the device of `like`."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: allowed is {tuple(shape)}")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}: allowed is {dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}: allowed is {like.device}")
