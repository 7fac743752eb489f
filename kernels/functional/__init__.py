"""torch.nn.functional's signatures on our kernels: checks, autocast and memory format, then one call down.

All functions take fp16, bf16, fp32 and fp64 tensors on a CUDA device, or on the CPU where Triton interprets, in any
strides.  They raise TypeError or ValueError that names the argument, its value and what is allowed.
"""

from tileconv.kernels.functional.common import batch_invariant
from tileconv.kernels.functional.conv import conv2d, linear
from tileconv.kernels.functional.conv_pool import conv2d_max_pool2d, how_conv2d_max_pool2d_runs
from tileconv.kernels.functional.im2col import conv2d_im2col, fold, unfold
from tileconv.kernels.functional.local import locally_connected2d
from tileconv.kernels.functional.loss import cross_entropy, log_softmax, softmax
from tileconv.kernels.functional.norm import local_response_norm
from tileconv.kernels.functional.pointwise import dropout, relu
from tileconv.kernels.functional.pool import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    lp_pool2d,
    max_pool2d,
    max_unpool2d,
)
from tileconv.kernels.functional.transpose import conv1d, conv_transpose2d

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "batch_invariant",
    "conv1d",
    "conv2d",
    "conv2d_im2col",
    "conv2d_max_pool2d",
    "conv_transpose2d",
    "cross_entropy",
    "dropout",
    "fold",
    "how_conv2d_max_pool2d_runs",
    "linear",
    "local_response_norm",
    "locally_connected2d",
    "log_softmax",
    "lp_pool2d",
    "max_pool2d",
    "max_unpool2d",
    "relu",
    "softmax",
    "unfold",
]
