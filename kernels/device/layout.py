"""Rearrangements: blocks of an image into channels, and a filter gradient back out of them."""

import triton
import triton.language as tl


# y[n, u, v, (c, a, b)] = x[n, c, u * STEP_H + a - pad_h, v * STEP_W + b - pad_w] for a < BLOCK_H and b < BLOCK_W, zero
# outside the image and in the channels beyond C * BLOCK_H * BLOCK_W.  A convolution of few channels becomes a stride-1
# one of many.
@triton.jit
def space_to_depth(
    x,  # pointer, any strides
    y,  # pointer to [N, U, V, DEPTH]
    C,
    H,
    W,
    U,
    V,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    pad_h,
    pad_w,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    DEPTH: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,  # of v
    COLS: tl.constexpr,  # at least DEPTH
):
    blocks = tl.cdiv(V, ROWS)
    strip = tl.program_id(0) // blocks
    v = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    u = strip % U
    n = (strip // U).to(tl.int64)
    d = tl.arange(0, COLS)
    c = d // (BLOCK_H * BLOCK_W)
    h = u * STEP_H + d // BLOCK_W % BLOCK_H - pad_h
    w = v[:, None] * STEP_W + (d % BLOCK_W)[None, :] - pad_w
    inside = (v < V)[:, None] & ((c < C) & (h >= 0) & (h < H))[None, :] & (w >= 0) & (w < W)
    rows = n * stride_xn + c.to(INDEX) * stride_xc + h.to(INDEX) * stride_xh
    value = tl.load(x + rows[None, :] + w.to(INDEX) * stride_xw, mask=inside, other=0.0)
    out = (strip.to(tl.int64) * V + v)[:, None] * DEPTH + d[None, :]
    tl.store(y + out, value, mask=(v < V)[:, None] & (d < DEPTH)[None, :])


# dw[k, r, s, c] = y[k, r // STRIDE_H, s // STRIDE_W, (c, r % STRIDE_H, s % STRIDE_W)]: the way back, for filters.
@triton.jit
def depth_to_space(
    y,  # pointer to [K, U, V, DEPTH]
    dw,  # pointer to [K, R, S, C]
    SIZE,
    R,
    S,
    C,
    U,
    V,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DEPTH: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    c = i % C
    s = i // C % S
    r = i // C // S % R
    k = i // C // S // R
    d = (c * STRIDE_H + r % STRIDE_H) * STRIDE_W + s % STRIDE_W
    block = (k * U + r // STRIDE_H) * V + s // STRIDE_W
    tl.store(dw + i, tl.load(y + block * DEPTH + d, mask=i < SIZE, other=0.0), mask=i < SIZE)


# y[a, b, i, n] = x[a, b, n, i], zero from N on: images beside each other, so that sums over them run along memory;
# channels beside each other where pixels were, and back; filters beside each other where their channels were.
@triton.jit
def turn(
    x,  # pointer to [A, B, N, WIDTH], the last axis contiguous
    y,  # pointer to [A, B, WIDTH, DEPTH], the last axis contiguous
    B,
    N,
    DEPTH,  # at least N
    WIDTH,
    stride_xa,
    stride_xb,
    stride_xn,
    stride_ya,
    stride_yb,
    stride_yi,
    ROWS: tl.constexpr,  # of x
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(DEPTH, ROWS)
    strips = tl.cdiv(WIDTH, COLS)
    t = tl.program_id(0)
    n = (t % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t = t // blocks
    i = (t % strips).to(tl.int64) * COLS + tl.arange(0, COLS)
    b = (t // strips % B).to(tl.int64)
    a = (t // strips // B).to(tl.int64)
    across = (i < WIDTH)[None, :]
    rows = x + (a * stride_xa + b * stride_xb) + n[:, None] * stride_xn
    value = tl.load(rows + i[None, :], mask=(n < N)[:, None] & across, other=0.0)
    out = y + (a * stride_ya + b * stride_yb) + i[:, None] * stride_yi
    tl.store(out + n[None, :], value.T, mask=(n < DEPTH)[None, :] & across.T)


# y[n, c, h, w] = x[n, c, h, w], zero from W on: rows that start at aligned addresses, for any x.
@triton.jit
def widen(
    x,  # pointer, any strides
    y,  # pointer to [N, C, H, WIDTH]
    HEIGHT,  # rows of all images and channels
    C,
    H,
    W,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # at least WIDTH
):
    row = tl.cast(tl.program_id(0), INDEX) * ROWS + tl.arange(0, ROWS)
    w = tl.arange(0, COLS)[None, :]
    h = row % H
    c = row // H % C
    n = row // H // C
    at = (n * stride_xn + c * stride_xc + h * stride_xh)[:, None] + w * stride_xw
    value = tl.load(x + at, mask=(row < HEIGHT)[:, None] & (w < W), other=0.0)
    tl.store(y + row[:, None] * WIDTH + w, value, mask=(row < HEIGHT)[:, None] & (w < WIDTH))
