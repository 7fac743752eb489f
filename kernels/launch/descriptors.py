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


def row_descriptor(image: torch.Tensor, groups: int, box: Box, channels: int) -> TensorDescriptor:
    """[N, everything of one image]: a box of one pixel needs no more, and the tensor cores take it as it lies.

    A group's channels are an offset along the row.
    """
    return filled(_rows(tuple(image.shape), image.stride(), image.dtype, box[0], channels), image)


def row_length(shape: Extents, strides: Extents) -> int:
    """From an image's first element to its last, gaps included."""
    return sum((extent - 1) * stride for extent, stride in zip(shape[1:], strides[1:], strict=True)) + 1


def matrix_descriptor(matrix: torch.Tensor, box: tuple[int, int]) -> TensorDescriptor:
    """A matrix as it is."""
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
def _rows(shape: Extents, strides: Extents, dtype: torch.dtype, images: int, channels: int) -> TensorDescriptor:
    pitch = strides[0] if shape[0] > 1 else shape[1]
    return TensorDescriptor(_nothing(dtype), [shape[0], row_length(shape, strides)], [pitch, 1], [images, channels])


@lru_cache(maxsize=4096)
def _matrix(shape: Extents, strides: Extents, dtype: torch.dtype, box: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(_nothing(dtype), list(shape), list(strides), list(box))


def _nothing(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="meta")
