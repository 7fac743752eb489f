"""Elementwise kernels, and the column sums that belong to them."""

import triton
import triton.language as tl


# y = max(x, 0), keeping NaN.
@triton.jit
def relu_forward(x, y, SIZE, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < SIZE, other=0.0)
    tl.store(y + i, tl.where(value <= 0, tl.zeros_like(value), value), mask=i < SIZE)


# dx = 0 where y <= 0, else dy: ReLU's gradient from its output; NaN passes it on, as in PyTorch.  Dropout behind it
# zeroes outputs too and scales the others, so with its `scale` that is the gradient of both.
@triton.jit
def relu_backward(dy, y, dx, scale, SIZE, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(dy + i, mask=i < SIZE, other=0.0)
    value = tl.load(y + i, mask=i < SIZE, other=0.0)
    grad = tl.where(value <= 0, tl.zeros_like(grad), grad)
    tl.store(dx + i, _scaled(grad, scale).to(dx.dtype.element_ty), mask=i < SIZE)


@triton.jit
def _scaled(value, scale):
    if scale is not None:
        value = value * scale  # half precision becomes fp32
    return value


# sums[strip, k] = the sum of dy over a strip of pixels, masked where y <= 0, scaled and kept as dx with MASK.  One pass
# makes the masked gradient and the bias gradient: 6 bytes an fp16 element in all, where masking inside dgrad and wgrad
# would read y again for every tap and put a register pass between the loads and the tensor cores.  Every element of a
# block has a sum of its own until the last step: adding up columns in the loop, threads would meet in every step (3
# barriers and 16 shuffles; compiled for sm_90, a step of AlexNet's conv2 in fp16 then takes 264 instructions instead of
# 193).
@triton.jit
def bias_backward(
    dy,
    y,  # None without MASK
    dx,  # in the layout of y; None without MASK
    sums,  # [strips, K]
    scale,  # as in relu_backward; None without MASK
    PIXELS,  # of one image
    HEIGHT,  # images * PIXELS
    K,
    stride_gn,
    stride_gk,
    stride_gi,  # from one pixel to the next
    stride_yn,
    stride_yk,
    stride_yi,
    LOOPS,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(K, COLS)
    strip = tl.program_id(0) // blocks
    k = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), ACC)
    for loop in tl.range(LOOPS):
        m = tl.cast(strip * LOOPS + loop, INDEX) * ROWS + tl.arange(0, ROWS)
        n = (m // PIXELS).to(tl.int64)
        i = (m % PIXELS).to(INDEX)
        inside = (m < HEIGHT)[:, None] & (k < K)[None, :]
        at = (n * stride_gn + i * stride_gi)[:, None] + k.to(INDEX)[None, :] * stride_gk
        grad = tl.load(dy + at, mask=inside, other=0.0)
        if MASK:
            at = (n * stride_yn + i * stride_yi)[:, None] + k.to(INDEX)[None, :] * stride_yk
            value = tl.load(y + at, mask=inside, other=0.0)
            grad = _scaled(tl.where(value <= 0, tl.zeros_like(grad), grad), scale)
            tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=inside)
        total += grad.to(ACC)
    tl.store(sums + tl.cast(strip, INDEX) * K + k, tl.sum(total, axis=0), mask=k < K)


# out[i] = parts[0, i] + parts[1, i] + ..., in the same order in every run: every ROWS-th part in turn, then the sums of
# the rows in a tree.  Of 264 fp32 parts between 0 and 1 (20 x 64 times) the sum is off by up to 1.5e-7 of itself in 32
# rows, one after the other by 8.3e-7.  A single row is one-dimensional, so that no sum passes through shared memory.
@triton.jit
def add_slices(parts, out, SLICES, SIZE, INDEX: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i = tl.cast(tl.program_id(0), INDEX) * COLS + tl.arange(0, COLS)
    if ROWS == 1:
        total = tl.zeros((COLS,), parts.dtype.element_ty)
        for part in tl.range(SLICES):
            total += tl.load(parts + tl.cast(part, tl.int64) * SIZE + i, mask=i < SIZE, other=0.0)
    else:
        sums = tl.zeros((ROWS, COLS), parts.dtype.element_ty)
        for start in tl.range(0, SLICES, ROWS):
            part = start + tl.arange(0, ROWS)
            inside = (part < SLICES)[:, None] & (i < SIZE)[None, :]
            sums += tl.load(parts + part.to(tl.int64)[:, None] * SIZE + i[None, :], mask=inside, other=0.0)
        total = tl.sum(sums, axis=0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < SIZE)


# y = x / (1 - p) where kept, else 0.  The mask is Philox(seed, element), made again by the backward pass, never stored.
@triton.jit
def dropout(
    x,
    y,
    seed,  # pointer to one int64: on the device, so that a CUDA graph draws anew at every replay
    SIZE,
    p,
    scale,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < SIZE, other=0.0)
    kept = tl.rand(tl.load(seed), i) >= p
    out = tl.where(kept, value * scale, tl.zeros_like(value))
    tl.store(y + i, out.to(y.dtype.element_ty), mask=i < SIZE)
