"""Convolution, pooling and their companions as Triton kernels, with torch.nn.functional's signatures."""

if __name__ != "tileconv.kernels":
    raise ImportError("import tileconv.kernels, not kernels: loaded under two names, the ops would be defined twice")
from tileconv.kernels import hardware

hardware.start_triton()

from tileconv.kernels import functional, nn, tiles  # noqa: E402
from tileconv.kernels.conversion import convert, explain, revert  # noqa: E402
from tileconv.kernels.exchange import conv_to_fc, fc_to_conv  # noqa: E402
from tileconv.kernels.functional import (  # noqa: E402
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    batch_invariant,
    conv1d,
    conv2d,
    conv2d_im2col,
    conv2d_max_pool2d,
    conv_transpose2d,
    cross_entropy,
    dropout,
    fold,
    linear,
    local_response_norm,
    locally_connected2d,
    log_softmax,
    lp_pool2d,
    max_pool2d,
    max_unpool2d,
    relu,
    softmax,
    unfold,
)
from tileconv.kernels.redirect import use_kernels  # noqa: E402

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "batch_invariant",
    "conv1d",
    "conv2d",
    "conv2d_im2col",
    "conv2d_max_pool2d",
    "conv_to_fc",
    "conv_transpose2d",
    "convert",
    "cross_entropy",
    "dropout",
    "explain",
    "fc_to_conv",
    "fold",
    "functional",
    "linear",
    "local_response_norm",
    "locally_connected2d",
    "log_softmax",
    "lp_pool2d",
    "max_pool2d",
    "max_unpool2d",
    "nn",
    "relu",
    "revert",
    "softmax",
    "tiles",
    "unfold",
    "use_kernels",
]
