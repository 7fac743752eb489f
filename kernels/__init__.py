"""Convolution, pooling and their companions as Triton kernels, with torch.nn.functional's signatures."""

if __name__ != "tileconv.kernels":
    raise ImportError("import tileconv.kernels, not kernels: loaded under two names, the ops would be defined twice")
from tileconv.kernels import hardware

hardware.start_triton()

from tileconv.kernels import functional, tiles  # noqa: E402
from tileconv.kernels.functional import (  # noqa: E402
    adaptive_avg_pool2d,
    conv2d,
    dropout,
    linear,
    local_response_norm,
    max_pool2d,
    relu,
)

__all__ = [
    "adaptive_avg_pool2d",
    "conv2d",
    "dropout",
    "functional",
    "linear",
    "local_response_norm",
    "max_pool2d",
    "relu",
    "tiles",
]
