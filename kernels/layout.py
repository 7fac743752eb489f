"""PyTorch's memory-format rule and allocation by it, and the type that sums are kept in."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_channels_last(image: torch.Tensor) -> bool:
    """What PyTorch's suggest_memory_format says of a 4-d tensor: its strides read N, H, W, C, and not N, C, H, W.

    Where both hold, as for [N, 1, 1, 1], contiguous is meant.
    """
    lowest = 0
    sizes, strides = image.shape, image.stride()
    if strides[1] == 0:
        return False
    for axis in (1, 3, 2, 0):
        if sizes[axis] == 0 or strides[axis] < lowest or (axis == 0 and lowest == strides[1]):
            return False
        lowest = strides[axis] * (sizes[axis] if sizes[axis] > 1 else 1)
    return True


def empty_image(shape: Sequence[int], like: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """An uninitialised image [N, C, H, W] with the dtype and device of `like`."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)


def laid_out_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied if its strides differ from those of `model`."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied if its elements overlap or leave gaps."""
    if tensor.stride() == torch.empty_like(tensor, device="meta").stride():
        return tensor
    return torch.empty_like(tensor).copy_(tensor)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor as a vector in storage order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of `dtype` are kept in: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
