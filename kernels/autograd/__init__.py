"""autograd.Functions around the ops: what is saved, and which gradients are asked for; one file per family.

Every Function takes its op's arguments.  Only gradients that are asked for are computed, and where none is, the
Function is skipped: the names at the end of each file are the doors.
"""

from tileconv.kernels.autograd import conv, local, norm, pointwise, pool, softmax, transpose, unfold

__all__ = ["conv", "local", "norm", "pointwise", "pool", "softmax", "transpose", "unfold"]
