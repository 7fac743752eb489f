"""Average and power-average (Lp) pooling on any strides; tiles as in pool.py."""

import triton
import triton.language as tl

from tileconv.kernels.device.pool import output_tile


# What the sum of window (p, q) is divided by.  A window is cut at the padding's outer edge before its elements are
# counted, and at the image's edge without INCLUDE_PAD: PyTorch's rule, which matters with ceil_mode.
@triton.jit
def _divisor(
    p, q, H, W, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    if DIVISOR is not None:
        return tl.full(p.shape, DIVISOR, ACC)
    else:
        top = p * STRIDE_H - PAD_H
        left = q * STRIDE_W - PAD_W
        bottom = tl.minimum(top + R, H + PAD_H)
        right = tl.minimum(left + S, W + PAD_W)
        if not INCLUDE_PAD:
            top = tl.maximum(top, 0)
            left = tl.maximum(left, 0)
            bottom = tl.minimum(bottom, H)
            right = tl.minimum(right, W)
        return ((bottom - top) * (right - left)).to(ACC)


# value^N: by multiplication for small whole N, else by logarithms, with PyTorch's NaN for negative values.
@triton.jit
def _power(value, N: tl.constexpr):
    if N >= 0 and N < 64 and N % 1 == 0:
        power = tl.full(value.shape, 1.0, value.dtype)
        square = value
        for bit in tl.static_range(6):
            if (N >> bit) % 2 == 1:
                power *= square
            square *= square
        return power
    else:
        power = tl.exp2(N * tl.log2(tl.abs(value)))
        if N % 2 == 0:
            return power
        elif N % 1 == 0:
            return tl.where(value < 0, -power, power)
        else:
            return tl.where(value < 0, float("nan"), power)


# y[n, c, p, q] = sum of the window / divisor; with NORM = (sum of x^NORM / divisor * R * S)^(1 / NORM).
@triton.jit
def average_forward(
    x,
    y,
    C,
    H,
    W,
    P,
    Q,
    HEIGHT,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yp,
    stride_yq,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    DIVISOR: tl.constexpr,  # None: count
    NORM: tl.constexpr,  # None: average
    ACC: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, p, q, inside = output_tile(tl.program_id(0), C, P, Q, HEIGHT, NHWC, INDEX, ROWS, COLS)
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    corner = x + n * stride_xn + c * stride_xc + h0.to(INDEX) * stride_xh + w0.to(INDEX) * stride_xw
    acc = tl.zeros((ROWS, COLS), ACC)
    for tap in tl.range(R * S):
        r = tap // S
        s = tap % S
        valid = inside & (h0 + r >= 0) & (h0 + r < H) & (w0 + s >= 0) & (w0 + s < W)
        shift = tl.cast(r, INDEX) * stride_xh + tl.cast(s, INDEX) * stride_xw
        value = tl.load(corner + shift, mask=valid, other=0.0).to(ACC)
        if NORM is not None:
            value = _power(value, NORM)
        acc += value
    mean = acc / _divisor(p, q, H, W, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, INCLUDE_PAD, DIVISOR, ACC)
    if NORM is not None:
        mean *= R * S
        if NORM == 2:
            mean = tl.sqrt(mean)
        elif NORM != 1:
            mean = tl.exp2(tl.log2(mean) / NORM)  # NaN for negative sums, which odd exponents can have
    out = n * stride_yn + c * stride_yc + p.to(INDEX) * stride_yp + q.to(INDEX) * stride_yq
    tl.store(y + out, mean.to(y.dtype.element_ty), mask=inside)


# dx[n, c, h, w] = sum over the at most ceil(R / stride)^2 windows that hold (h, w) of dy / divisor; with NORM, of
# dy / divisor * R * S * (x / y)^(NORM - 1), where windows with y = 0 pass nothing on.  A gather, so no atomics.
@triton.jit
def average_backward(
    dy,
    x,  # None without NORM
    y,  # None without NORM
    dx,
    C,
    H,
    W,
    P,
    Q,
    HEIGHT,
    stride_gn,
    stride_gc,
    stride_gp,
    stride_gq,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yp,
    stride_yq,
    stride_dn,
    stride_dc,
    stride_dh,
    stride_dw,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    DIVISOR: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, h, w, inside = output_tile(tl.program_id(0), C, H, W, HEIGHT, NHWC, INDEX, ROWS, COLS)
    grads = dy + n * stride_gn + c * stride_gc
    if NORM is not None:
        pooled = y + n * stride_yn + c * stride_yc
        at = n * stride_xn + c * stride_xc + h.to(INDEX) * stride_xh + w.to(INDEX) * stride_xw
        value = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    acc = tl.zeros((ROWS, COLS), ACC)
    SPREAD_H: tl.constexpr = (R - 1) // STRIDE_H + 1
    SPREAD_W: tl.constexpr = (S - 1) // STRIDE_W + 1
    last_p = (h + PAD_H) // STRIDE_H
    last_q = (w + PAD_W) // STRIDE_W
    for back in tl.range(SPREAD_H * SPREAD_W):
        p = last_p - back // SPREAD_W
        q = last_q - back % SPREAD_W
        reaches = (h + PAD_H - p * STRIDE_H < R) & (w + PAD_W - q * STRIDE_W < S)
        valid = inside & reaches & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        grad = tl.load(grads + p.to(INDEX) * stride_gp + q.to(INDEX) * stride_gq, mask=valid, other=0.0).to(ACC)
        share = grad / _divisor(p, q, H, W, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, INCLUDE_PAD, DIVISOR, ACC)
        if NORM is not None:
            there = p.to(INDEX) * stride_yp + q.to(INDEX) * stride_yq
            norm = tl.load(pooled + there, mask=valid, other=0.0).to(ACC)
            ratio = value / tl.where(norm == 0, tl.full(norm.shape, 1.0, ACC), norm)
            share = tl.where(norm == 0, tl.zeros_like(share), share * (R * S) * _power(ratio, NORM - 1))
        acc += tl.where(valid, share, tl.zeros_like(share))  # the divisor of a window that is none may be zero
    out = n * stride_dn + c * stride_dc + h.to(INDEX) * stride_dh + w.to(INDEX) * stride_dw
    tl.store(dx + out, acc.to(dx.dtype.element_ty), mask=inside)
