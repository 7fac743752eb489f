"""Tensor descriptors of images and matrices.

What depends on a layout alone is worked out and checked once for it, on a tensor without memory; a call then only puts
its own tensor in.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

Box = tuple[int, int, int]
Extents = tuple[int, ...]


def describable(image: torch.Tensor, groups: int) -> bool:
    """Whether a tensor descriptor can address `image` [N, C, H, W] as it lies: NHWC, all pitches 16-byte multiples."""
    return _has_pitches(tuple(image.shape), image.stride(), image.itemsize, groups) and image.data_ptr() % 16 == 0


def for_descriptor(image: torch.Tensor, groups: int) -> torch.Tensor:
    """`image`, copied if no descriptor can address it as it lies."""
    if describable(image, groups):
        return image
    return torch.empty_like(image, memory_format=torch.channels_last).copy_(image)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied if it starts between two multiples of 16 bytes, as a slice may."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def image_descriptor(image: torch.Tensor, groups: int, box: Box, channels: int) -> TensorDescriptor:
    """[N, H, W, C]; with groups [N, H, W, groups, C/groups], so that a box cannot run into the next group."""
    return filled(_image(tuple(image.shape), image.stride(), image.dtype, groups, box, channels), image)


def pixel_descriptor(image: torch.Tensor, groups: int, box: Box, channels: int) -> TensorDescriptor:
    """[H, W, N, C]; with groups [H, W, groups, N, C/groups]: the box of one pixel is a matrix to the tensor cores.

    An image that is turned, its images next to each other, has [C, N] at the end.
    """
    return filled(_pixel(tuple(image.shape), image.stride(), image.dtype, groups, box[0], channels), image)


def row_length(shape: Extents, strides: Extents) -> int:
    """From an image's first element to its last, gaps included."""
    return sum((extent - 1) * stride for extent, stride in zip(shape[1:], strides[1:], strict=True)) + 1


def matrix_descriptor(matrix: torch.Tensor, box: tuple[int, int]) -> TensorDescriptor:
    """A matrix as it is, or [..., A, B] of many: a box lies in one of them, with zeros beside."""
    return filled(_matrix(tuple(matrix.shape), matrix.stride(), matrix.dtype, box), matrix)


def filled(template: TensorDescriptor, tensor: torch.Tensor) -> TensorDescriptor:
    """The descriptor of another tensor with the layout that `template` describes."""
    descriptor: TensorDescriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(template.__dict__, base=tensor)
    return descriptor


@lru_cache(maxsize=4096)
def _has_pitches(shape: Extents, strides: Extents, itemsize: int, groups: int) -> bool:
    pitches = [strides[axis] for axis in (0, 2, 3) if shape[axis] > 1]
    multiples = all(pitch > 0 and pitch * itemsize % 16 == 0 for pitch in [*pitches, shape[1] // groups])
    return multiples and (strides[1] == 1 or shape[1] == 1)


@lru_cache(maxsize=4096)
def _image(
    shape: Extents, strides: Extents, dtype: torch.dtype, groups: int, box: Box, channels: int
) -> TensorDescriptor:
    total = shape[1]
    # An axis of one element has no pitch of its own.
    pitches = [strides[axis] if shape[axis] > 1 else total for axis in (0, 2, 3)]
    extents = [shape[0], shape[2], shape[3]]
    if groups == 1:
        return TensorDescriptor(_nothing(dtype), [*extents, total], [*pitches, 1], [*box, channels])
    own = total // groups
    return TensorDescriptor(_nothing(dtype), [*extents, groups, own], [*pitches, own, 1], [*box, 1, channels])


@lru_cache(maxsize=4096)
def _pixel(
    shape: Extents, strides: Extents, dtype: torch.dtype, groups: int, images: int, channels: int
) -> TensorDescriptor:
    turned = strides[1] > 1
    total = shape[1] * (strides[1] if turned else 1)
    own = shape[1] // groups
    outer = [(shape[axis], strides[axis] if shape[axis] > 1 else total, 1) for axis in (2, 3)]
    outer += [(groups, total // groups, 1)] if groups > 1 else []
    inner = [(shape[0], strides[0] if shape[0] > 1 else total, images), (own, strides[1] if turned else 1, channels)]
    extents, pitches, block = zip(*outer, *(reversed(inner) if turned else inner), strict=True)
    return TensorDescriptor(_nothing(dtype), list(extents), list(pitches), list(block))


@lru_cache(maxsize=4096)
def _matrix(shape: Extents, strides: Extents, dtype: torch.dtype, box: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(_nothing(dtype), list(shape), list(strides), [1] * (len(shape) - 2) + list(box))


def _nothing(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="meta")
