"""Locally connected layers: a convolution whose filters differ from output pixel to output pixel.

The batch takes the place that pixels have in a convolution: for every output pixel a [K, R*S*C] matrix of its own
multiplies the patches of all images.  Each filter is read once and used for N images, so that small batches are bound
by memory.  Images are reached by strides; filters are [P*Q, K, (r, s, c)], contiguous.
"""

import triton
import triton.language as tl


# y[n, k, p, q] = bias + sum over d = (r, s, c) of w[pixel, k, d] * x[n, patch of (p, q)].  GEMM_M: filters.
# GEMM_N: images.  GEMM_K: d.  Pixels vary slowest, so that a pixel's programs share its filters in L2.
@triton.jit
def fprop(
    x,
    w,
    y,
    bias,  # or None
    N,
    H,
    W,
    Q,
    K,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    stride_bk,
    stride_bi,  # from one pixel's biases to the next; 0 where all share them
    pad_h,
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    DEPTH: tl.constexpr = R * S * C
    t = tl.program_id(0)
    n = tl.cast(t % tl.cdiv(N, BLOCK_N), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = t // tl.cdiv(N, BLOCK_N)
    k = t % tl.cdiv(K, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    pixel = t // tl.cdiv(K, BLOCK_K)
    p, q = pixel // Q, pixel % Q
    rows = w + tl.cast(pixel, tl.int64) * K * DEPTH + k.to(tl.int64)[:, None] * DEPTH
    acc = tl.zeros((BLOCK_K, BLOCK_N), ACC)
    for start in tl.range(0, DEPTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        c = d % C
        h = p * STRIDE_H + d // C // S * DIL_H - pad_h
        v = q * STRIDE_W + d // C % S * DIL_W - pad_w
        seen = (d < DEPTH) & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        at = h.to(INDEX) * stride_xh + v.to(INDEX) * stride_xw + c.to(INDEX) * stride_xc
        patches = tl.load(
            x + (n * stride_xn)[:, None] + at[None, :], mask=(n < N)[:, None] & seen[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_D]
        filters = tl.load(rows + d[None, :], mask=(k < K)[:, None] & (d < DEPTH)[None, :], other=0.0)
        acc = tl.dot(filters, patches.T, acc, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        own = bias + tl.cast(pixel, tl.int64) * stride_bi + k.to(tl.int64) * stride_bk
        acc += tl.load(own, mask=k < K, other=0.0).to(ACC)[:, None]
    at = tl.cast(p, tl.int64) * stride_yp + tl.cast(q, tl.int64) * stride_yq + k.to(tl.int64) * stride_yk
    tl.store(y + at[:, None] + (n * stride_yn)[None, :], acc.to(y.dtype.element_ty),
             mask=(k < K)[:, None] & (n < N)[None, :])  # fmt: skip


# dx[n, c, h, w] = sum over the taps (r, s) whose output pixel (p, q) reads (h, w), and k, of w[pixel, k, (r, s, c)] *
# dy[n, k, p, q].  GEMM_M: channels.  GEMM_N: images.  GEMM_K: filters, tap after tap; taps without a pixel are skipped.
@triton.jit
def dgrad(
    dy,
    w,
    dx,
    N,
    H,
    W,
    P,
    Q,
    K,
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    pad_h,
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0)
    n = tl.cast(t % tl.cdiv(N, BLOCK_N), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = t // tl.cdiv(N, BLOCK_N)
    c = t % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = t // tl.cdiv(C, BLOCK_C)
    h, v = pixel // W, pixel % W
    acc = tl.zeros((BLOCK_C, BLOCK_N), ACC)
    for tap in tl.range(R * S):
        up = h + pad_h - tap // S * DIL_H
        left = v + pad_w - tap % S * DIL_W
        p, q = up // STRIDE_H, left // STRIDE_W
        if (up >= 0) & (left >= 0) & (p * STRIDE_H == up) & (q * STRIDE_W == left) & (p < P) & (q < Q):
            source = dy + tl.cast(p, tl.int64) * stride_yp + tl.cast(q, tl.int64) * stride_yq
            columns = w + (tl.cast(p, tl.int64) * Q + q) * K * (R * S * C) + tap * C
            for start in tl.range(0, K, BLOCK_D):
                k = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
                grads = tl.load(source + (n * stride_yn)[:, None] + (k * stride_yk)[None, :],
                                mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)  # fmt: skip
                filters = tl.load(columns + (k * (R * S * C))[:, None] + c[None, :],
                                  mask=(k < K)[:, None] & (c < C)[None, :], other=0.0)  # fmt: skip
                acc = tl.dot(filters.T, grads.T, acc, input_precision=PRECISION, out_dtype=ACC)
    at = tl.cast(h, tl.int64) * stride_xh + tl.cast(v, tl.int64) * stride_xw + c.to(tl.int64) * stride_xc
    tl.store(dx + at[:, None] + (n * stride_xn)[None, :], acc.to(dx.dtype.element_ty),
             mask=(c < C)[:, None] & (n < N)[None, :])  # fmt: skip


# dw[pixel, k, d] = sum over n of dy[n, k, p, q] * x[n, patch of (p, q)].  GEMM_M: filters.  GEMM_N: d.  GEMM_K: images.
@triton.jit
def wgrad(
    x,
    dy,
    dw,
    N,
    H,
    W,
    Q,
    K,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    pad_h,
    pad_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    DEPTH: tl.constexpr = R * S * C
    t = tl.program_id(0)
    d = t % tl.cdiv(DEPTH, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = t // tl.cdiv(DEPTH, BLOCK_D)
    k = t % tl.cdiv(K, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    pixel = t // tl.cdiv(K, BLOCK_K)
    p, q = pixel // Q, pixel % Q
    h = p * STRIDE_H + d // C // S * DIL_H - pad_h
    v = q * STRIDE_W + d // C % S * DIL_W - pad_w
    seen = (d < DEPTH) & (h >= 0) & (h < H) & (v >= 0) & (v < W)
    at = h.to(INDEX) * stride_xh + v.to(INDEX) * stride_xw + (d % C).to(INDEX) * stride_xc
    source = dy + tl.cast(p, tl.int64) * stride_yp + tl.cast(q, tl.int64) * stride_yq + k.to(tl.int64) * stride_yk
    acc = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    for start in tl.range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        patches = tl.load(
            x + (n * stride_xn)[:, None] + at[None, :], mask=(n < N)[:, None] & seen[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_D]
        grads = tl.load(
            source[None, :] + (n * stride_yn)[:, None], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(grads.T, patches, acc, input_precision=PRECISION, out_dtype=ACC)
    out = dw + tl.cast(pixel, tl.int64) * K * DEPTH + k.to(tl.int64)[:, None] * DEPTH + d[None, :]
    tl.store(out, acc.to(dw.dtype.element_ty), mask=(k < K)[:, None] & (d < DEPTH)[None, :])
