"""What AlexNet's paper does to pictures: random crops, reflections, shifts of colour, and ten crops to judge by.

Krizhevsky, Sutskever and Hinton, NIPS 2012, section 4.1. Pictures are float tensors [N, C, H, W], before or after
normalisation; every random draw comes from the generator that is given. `model.datasets` changes picture files one by
one with the components of ImageNet's pixels; here they are computed from the pictures at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 0.1


@dataclass(frozen=True)
class Components:
    """The principal components of the pixels' colours: values [C], largest first, and vectors [C, C], one a column."""

    values: Tensor
    vectors: Tensor


def principal_components(pictures: Tensor) -> Components:
    """Of the covariance of the colours of all pixels, in float64; the largest entry of each vector is positive."""
    _images(pictures)
    colours = pictures.double().permute(1, 0, 2, 3).flatten(1)  # [C, pixels]
    if colours.shape[1] < 2:
        raise ValueError(f"pictures has shape {tuple(pictures.shape)}: two pixels or more are needed")
    values, vectors = torch.linalg.eigh(torch.cov(colours))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return Components(values, vectors * largest.sign())


def shift_colours(pictures: Tensor, components: Components, generator: torch.Generator, sigma: float = SIGMA) -> Tensor:
    """Add to every pixel of a picture vectors @ (a * values), with a drawn once a picture from normal(0, sigma).

    The paper's formula. Eigenvalues are variances and grow with the square of the pixels' scale, so it is meant for
    pixels in [0, 1] or normalised ones: of 0..255 the shifts would be of hundreds.
    """
    _images(pictures)
    channels = len(components.values)
    if pictures.shape[1] != channels:
        raise ValueError(f"pictures has shape {tuple(pictures.shape)}: the components are of {channels} channels")
    if not sigma >= 0:
        raise ValueError(f"sigma is {sigma}: allowed are numbers of at least 0")
    drawn = sigma * torch.randn(len(pictures), channels, generator=generator, dtype=torch.float64)
    shifts = (drawn * components.values.cpu()) @ components.vectors.cpu().T
    return pictures + shifts[:, :, None, None].to(pictures)


def random_crops(pictures: Tensor, size: int, generator: torch.Generator, *, mirror: bool = True) -> Tensor:
    """A size x size piece of every picture, each place equally likely; with `mirror` every other one reflected."""
    spare = _spare(pictures, size)
    result = []
    for picture in pictures:
        top, left = (int(torch.randint(0, room + 1, (), generator=generator)) for room in spare)
        piece = picture[:, top : top + size, left : left + size]
        result.append(piece.flip(2) if mirror and torch.randint(0, 2, (), generator=generator) else piece)
    return torch.stack(result)


def augment(
    pictures: Tensor, size: int, components: Components, generator: torch.Generator, sigma: float = SIGMA
) -> Tensor:
    """What the paper trains on: random crops (of 224 from 256), mirrored half of the time, their colours shifted."""
    return shift_colours(random_crops(pictures, size, generator), components, generator, sigma)


def ten_crops(pictures: Tensor, size: int) -> Tensor:
    """[N, C, H, W] -> [N, 10, C, size, size]: the corners and the centre, then their reflections."""
    height, width = _spare(pictures, size)
    places = [(0, 0), (0, width), (height, 0), (height, width), (height // 2, width // 2)]
    five = torch.stack([pictures[:, :, top : top + size, left : left + size] for top, left in places], dim=1)
    return torch.cat([five, five.flip(4)], dim=1)


def ten_crop_probabilities(classify: Callable[[Tensor], Tensor], pictures: Tensor, size: int) -> Tensor:
    """The mean over the ten crops of the softmax of the classifier's scores: [N, C, H, W] -> [N, num_classes]."""
    crops = ten_crops(pictures, size)
    scores = classify(crops.flatten(0, 1))
    probabilities: Tensor = F.softmax(scores, dim=1).unflatten(0, tuple(crops.shape[:2]))
    return probabilities.mean(1)


def _images(pictures: Tensor) -> None:
    if not isinstance(pictures, Tensor) or not pictures.is_floating_point():
        kind = pictures.dtype if isinstance(pictures, Tensor) else type(pictures).__name__
        raise TypeError(f"pictures must be a floating-point torch.Tensor, not {kind}")
    if pictures.dim() != 4 or 0 in pictures.shape:
        raise ValueError(f"pictures has shape {tuple(pictures.shape)}: allowed is [N, C, H, W], nothing empty")


def _spare(pictures: Tensor, size: int) -> tuple[int, int]:
    _images(pictures)
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size must be an int, not {size!r}")
    height, width = pictures.shape[2:]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size is {size}: allowed are 1 to {min(height, width)} for pictures of {height}x{width}")
    return height - size, width - size
