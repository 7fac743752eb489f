"""Elementwise kernels, and the column sums that belong to them."""

import triton
import triton.language as tl


# y = max(x, 0), keeping NaN.
@triton.jit
def relu_forward(x, y, SIZE, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < SIZE, other=0.0)
    tl.store(y + i, tl.where(value <= 0, tl.zeros_like(value), value), mask=i < SIZE)


# dx = dy where y > 0, else 0.  With PARTIAL also sums[program, k] += dx over this program's rows: the bias gradient in
# the same pass (6 bytes an fp16 element in all, where masking inside dgrad and wgrad would read y once for every tap).
@triton.jit
def relu_backward_sum(
    dy,
    y,  # None without MASK
    dx,  # None without MASK
    sums,  # [programs along the rows, K], or None without PARTIAL
    HEIGHT,
    K,
    stride_gm,
    stride_gk,
    stride_ym,
    stride_yk,
    stride_xm,
    stride_xk,
    MASK: tl.constexpr,
    PARTIAL: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    LOOPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(K, COLS)
    strip = tl.program_id(0) // blocks
    k = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), ACC)
    for loop in tl.range(LOOPS):
        m = tl.cast(strip * LOOPS + loop, INDEX) * ROWS + tl.arange(0, ROWS)
        inside = (m < HEIGHT)[:, None] & (k < K)[None, :]
        grad = tl.load(dy + m[:, None] * stride_gm + k.to(INDEX)[None, :] * stride_gk, mask=inside, other=0.0)
        if MASK:
            value = tl.load(y + m[:, None] * stride_ym + k.to(INDEX)[None, :] * stride_yk, mask=inside, other=0.0)
            grad = tl.where(value > 0, grad, tl.zeros_like(grad))
            tl.store(dx + m[:, None] * stride_xm + k.to(INDEX)[None, :] * stride_xk, grad, mask=inside)
        if PARTIAL:
            total += tl.sum(grad.to(ACC), axis=0)
    if PARTIAL:
        tl.store(sums + tl.cast(strip, INDEX) * K + k, total, mask=k < K)


# out[i] = parts[0, i] + parts[1, i] + ..., always in this order.
@triton.jit
def add_slices(parts, out, SLICES, SIZE, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), parts.dtype.element_ty)
    for part in tl.range(SLICES):
        total += tl.load(parts + tl.cast(part, tl.int64) * SIZE + i, mask=i < SIZE, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < SIZE)


# y = x / (1 - p) where kept, else 0.  The mask is Philox(seed, element), made again by the backward pass, never stored.
@triton.jit
def dropout(x, y, SIZE, p, scale, seed, offset, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < SIZE, other=0.0)
    kept = tl.rand(seed, offset + i) >= p
    out = tl.where(kept, value * scale, tl.zeros_like(value))
    tl.store(y + i, out.to(y.dtype.element_ty), mask=i < SIZE)
