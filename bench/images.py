"""The pictures that checks run on: photographs where their package is installed, and otherwise noise that says so."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NOISE = "on smooth noise, because scikit-image, which carries the photographs, is not installed"


def images(n: int, size: int = 224) -> tuple[torch.Tensor, str]:
    """`n` pictures, float32 [n, 3, size, size], normalised as photographs are; and a note, empty for photographs.

    The noise is the same on every machine, no two pictures are alike, and like a photograph it is smooth.
    """
    from tileconv.model.data import photographs

    try:
        return photographs(n, size), ""
    except ImportError:
        coarse = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return F.interpolate(coarse, (size, size), mode="bicubic"), NOISE
