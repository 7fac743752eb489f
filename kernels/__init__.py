"""Convolution, pooling and their companions as Triton kernels, with torch.nn.functional's signatures."""

if __name__ != "tileconv.kernels":
    raise ImportError("import tileconv.kernels, not kernels: loaded under two names, the ops would be defined twice")
from tileconv.kernels import hardware

hardware.start_triton()
