"""Normalisation."""

from __future__ import annotations

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.autograd import norm as autograd
from tileconv.kernels.geometry import channel_window
from tileconv.kernels.launch.norm import MAX_WINDOW


def local_response_norm(
    input: torch.Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    divide_alpha: bool = True,
) -> torch.Tensor:
    """input / (k + alpha / size * sum of input^2 over `size` neighbouring channels)^beta.

    As torch.nn.functional.local_response_norm: input [N, C, ...] of at least three axes -> the same shape; the window
    of channel c is c - size // 2 .. c + (size - 1) // 2, cut at the ends.  Sums and powers are fp32 (fp64 for fp64), so
    fp16 does not overflow beyond 255.  The result is channels_last if input is, else contiguous; where pixels are not
    evenly spaced in memory, or a tensor of five axes is neither, the input is copied once.

    Two conventions share the letters (n, k, alpha, beta) = (5, 2, 1e-4, 0.75) of AlexNet:

    - PyTorch, Caffe, ONNX and cuda-convnet, the code that the network was trained with, divide alpha by n:
      local_response_norm(x, 5, 1e-4, 0.75, 2.0).
    - The formula in section 3.3 of the paper (Krizhevsky, Sutskever and Hinton 2012) does not, so that its alpha
      counts n times as much: local_response_norm(x, 5, 1e-4, 0.75, 2.0, divide_alpha=False), which is alpha = 5e-4 of
      the first convention.

    Raises ValueError where size is below 1, where a window reaches more than 255 channels of the input, and for an
    input of fewer than three axes or with an empty axis other than the first.
    """
    checks.tensor("input", input)
    if input.dim() < 3 or 0 in input.shape[1:]:
        raise ValueError(
            f"input has shape {tuple(input.shape)}: allowed is [N, C, ...] of at least three axes, only N may be 0"
        )
    size = checks.integer("size", size, 1)
    alpha, beta, k = (checks.number(name, value) for name, value in (("alpha", alpha), ("beta", beta), ("k", k)))
    if (window := 1 + sum(channel_window(input.shape[1], size))) > MAX_WINDOW:
        raise ValueError(f"size is {size}: windows of {window} channels are too long, allowed are {MAX_WINDOW}")
    # As an image: a fourth axis for three, one axis for all rows of more than four.  A slice tells the memory format,
    # because flatten may give a batch of one any stride.
    image = input.unsqueeze(2) if input.dim() == 3 else input.flatten(2, -2)
    part = image if input.dim() < 5 else input
    while part.dim() > 4:
        part = part.select(2, 0)
    channels_last = layout.is_channels_last(part)
    output: torch.Tensor = autograd.local_response_norm(
        image, size, alpha / size if divide_alpha else alpha, beta, k, channels_last
    )
    if input.dim() == 4:
        return output
    return output.squeeze(2) if input.dim() == 3 else output.unflatten(2, input.shape[2:-1])
