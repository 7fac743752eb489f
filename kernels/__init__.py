"""Convolution, pooling and their companions as Triton kernels, with torch.nn.functional's signatures."""

if __name__ != "tileconv.kernels":
    raise ImportError("import tileconv.kernels, not kernels: loaded under two names, the ops would be defined twice")
from tileconv.kernels import hardware

hardware.start_triton()

from tileconv.kernels import functional, tiles  # noqa: E402
from tileconv.kernels import modules as nn  # noqa: E402
from tileconv.kernels.conversion import convert, explain, revert  # noqa: E402
from tileconv.kernels.functional import (  # noqa: E402
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    conv2d,
    dropout,
    linear,
    local_response_norm,
    lp_pool2d,
    max_pool2d,
    max_unpool2d,
    relu,
)
from tileconv.kernels.redirect import use_kernels  # noqa: E402

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "conv2d",
    "convert",
    "dropout",
    "explain",
    "functional",
    "linear",
    "local_response_norm",
    "lp_pool2d",
    "max_pool2d",
    "max_unpool2d",
    "nn",
    "relu",
    "revert",
    "tiles",
    "use_kernels",
]
