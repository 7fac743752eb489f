"""How fp32 operands meet the tensor cores: the names of `precision`, and what they mean to kernels and costs.

"bf16x3" and "bf16x6" split every operand once, before the product, into two or three bf16 parts, each what the parts
before it leave, rounded to nearest.  Three parts hold all 24 bits of fp32.  Of the products of parts those too small to
matter are left out: i + j >= parts.  (Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype
For Higher-Precision Computations, 2019.)

| precision | products | left out, of |x w| at most |
|---|---|---|
| "ieee" | 1, of fp32 | 0 |
| "tf32" | 1, of 10-bit mantissas | 2^-10 |
| "bf16x3" | 3, of bf16 | 2^-15 |
| "bf16x6" | 6, of bf16 | 2^-24, half a unit in fp32's last place |

Sums are fp32.  Numbers below 2^-110 lose their last parts to underflow, by at most 2^-134 each; sums within 1 % of the
largest fp32 may overflow.  Infinities and NaN come out as in fp32.
"""

from __future__ import annotations

import torch

NAMES = ("ieee", "tf32", "bf16x3", "bf16x6")
_PARTS = {"bf16x3": 2, "bf16x6": 3}
# Tensor cores add 16 products at a time to a sum and cut the result off where fp32 rounds it, which over a long sum
# loses more than the products do.  Up to this depth the error stays within twice that of a sum rounded at every
# product (tests/test_precision.py adds up both ways); what is deeper, "bf16x6" takes as several sums.
LONGEST_SUM = 2048


def parts(precision: str) -> int:
    """How many bf16 parts an operand is split into; 1 where it is multiplied as it is."""
    return _PARTS.get(precision, 1)


def products(precision: str) -> int:
    """Products of parts for one product of operands."""
    return parts(precision) * (parts(precision) + 1) // 2


def on_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    """Whether products of `dtype` run there; the others are fused multiply-adds."""
    return dtype.itemsize == 2 or (dtype == torch.float32 and precision != "ieee")


def multiplied(dtype: torch.dtype, precision: str) -> torch.dtype:
    """What the multiplying units read for operands of `dtype`.  Raises ValueError if `precision` cannot split it."""
    if parts(precision) == 1:
        return dtype
    if dtype != torch.float32:
        raise ValueError(f"precision is {precision!r}: it splits torch.float32, and the operands are {dtype}")
    return torch.bfloat16
