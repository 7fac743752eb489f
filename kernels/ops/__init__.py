"""torch.ops.tileconv: schemas, what they return without running (fakes), and how they run; one file per family.

Arguments are already checked and complete here; functional/ is the door for people.
"""

from tileconv.kernels.ops import conv, conv_pool, local, norm, pointwise, pool, softmax, transpose, unfold
from tileconv.kernels.ops.registry import OPS

__all__ = ["OPS", "conv", "conv_pool", "local", "norm", "pointwise", "pool", "softmax", "transpose", "unfold"]
