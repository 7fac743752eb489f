"""Real photographs, without a download: those that scikit-image's own package carries."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle", "hubble_deep_field", "retina")
"""Names in skimage.data: the colour photographs that come inside the package (others are fetched when first used)."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Per channel, of ImageNet's training pictures in [0, 1]: what torchvision's models are trained with."""


def photographs(n: int, size: int = 224) -> Tensor:
    """`n` photographs, float32 [n, 3, size, size], prepared as ImageNet's are for evaluation.

    The shorter side is scaled to 256/224 of `size` (bilinear, anti-aliased), the middle is cut out and the channels are
    normalised. Past the last photograph they come again mirrored, then as they are, and so on. Always the same bits on
    one machine.

    Raises TypeError or ValueError if n or size is not a positive integer, ImportError if scikit-image is missing.
    """
    for name, value in (("n", n), ("size", size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"photographs: {name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"photographs: {name} must be at least 1, got {value}")
    pictures = []
    for i in range(n):
        turn, index = divmod(i, len(PHOTOGRAPHS))
        picture = _prepared(PHOTOGRAPHS[index], size)
        pictures.append(picture.flip(2) if turn % 2 else picture)
    return torch.stack(pictures)


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _prepared(name: str, size: int) -> Tensor:
    pixels = torch.from_numpy(_load(name)).permute(2, 0, 1).float() / 255  # [3, height, width]
    height, width = pixels.shape[1:]
    scale = round(size * 256 / 224) / min(height, width)
    height, width = max(size, round(height * scale)), max(size, round(width * scale))
    pixels = F.interpolate(pixels[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (height - size) // 2, (width - size) // 2
    pixels = pixels[:, top : top + size, left : left + size]
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _load(name: str) -> np.ndarray:
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError("photographs need scikit-image: pip install 'tileconv[bench]'") from error
    loaded = getattr(skimage.data, name)()
    return np.asarray(loaded[0] if isinstance(loaded, tuple) else loaded)  # a stereo pair comes as (left, right, depth)
