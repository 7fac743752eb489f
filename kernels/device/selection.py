"""Kernels that pick single elements: adaptive max-pool and max-unpool; tiles as in pool.py."""

import triton
import triton.language as tl

from tileconv.kernels.device.pool import output_tile


# y[n, c, p, q] = max over rows floor(p * H / P) .. ceil((p + 1) * H / P) and the columns likewise; switch = r * S + s
# of the element that won, counted from the window's first.  NaN wins (the last one), ties go to the first.
@triton.jit
def adaptive_max_forward(
    x,
    y,
    switch,  # pointer in the layout of y, or None
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
    R: tl.constexpr,  # the largest window
    S: tl.constexpr,
    HAS_SWITCH: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, p, q, inside = output_tile(tl.program_id(0), C, P, Q, HEIGHT, NHWC, INDEX, ROWS, COLS)
    h0 = p * H // P
    h1 = ((p + 1) * H + P - 1) // P
    w0 = q * W // Q
    w1 = ((q + 1) * W + Q - 1) // Q
    corner = x + n * stride_xn + c * stride_xc + h0.to(INDEX) * stride_xh + w0.to(INDEX) * stride_xw
    best = tl.full((ROWS, COLS), float("-inf"), x.dtype.element_ty)
    won = tl.zeros((ROWS, COLS), tl.int32)
    for tap in tl.range(R * S):
        r = tap // S
        s = tap % S
        valid = inside & (h0 + r < h1) & (w0 + s < w1)
        shift = tl.cast(r, INDEX) * stride_xh + tl.cast(s, INDEX) * stride_xw
        value = tl.load(corner + shift, mask=valid, other=float("-inf"))
        wins = valid & ((value > best) | (value != value))
        best = tl.where(wins, value, best)
        won = tl.where(wins, tap, won)
    out = n * stride_yn + c * stride_yc + p.to(INDEX) * stride_yp + q.to(INDEX) * stride_yq
    tl.store(y + out, best, mask=inside)
    if HAS_SWITCH:
        tl.store(switch + out, won.to(switch.dtype.element_ty), mask=inside)


# index[n, c, p, q] = h * W + w of the element that the switch names.
@triton.jit
def adaptive_switch_to_index(
    switch,
    index,  # same layout as switch
    C,
    H,
    W,
    P,
    Q,
    HEIGHT,
    stride_n,
    stride_c,
    stride_p,
    stride_q,
    S: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, p, q, inside = output_tile(tl.program_id(0), C, P, Q, HEIGHT, NHWC, INDEX, ROWS, COLS)
    at = n * stride_n + c * stride_c + p.to(INDEX) * stride_p + q.to(INDEX) * stride_q
    tap = tl.load(switch + at, mask=inside, other=0).to(tl.int32)
    h = p * H // P + tap // S
    w = q * W // Q + tap % S
    tl.store(index + at, h.to(tl.int64) * W + w, mask=inside)


# dx[n, c, h, w] = sum of dy over the windows that hold (h, w) and whose switch points at it.
@triton.jit
def adaptive_max_backward(
    dy,
    switch,
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
    stride_yn,
    stride_yc,
    stride_yp,
    stride_yq,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    R: tl.constexpr,  # the most windows over one row, and one column
    OVER: tl.constexpr,
    S: tl.constexpr,  # the width of the largest window
    ACC: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, h, w, inside = output_tile(tl.program_id(0), C, H, W, HEIGHT, NHWC, INDEX, ROWS, COLS)
    # The first window that ends beyond h: ceil((p + 1) * H / P) > h exactly where p >= floor(h * P / H).
    p0 = h * P // H
    q0 = w * Q // W
    grads = dy + n * stride_gn + c * stride_gc
    switches = switch + n * stride_yn + c * stride_yc
    acc = tl.zeros((ROWS, COLS), ACC)
    for step in tl.range(R * OVER):
        p = p0 + step // OVER
        q = q0 + step % OVER
        r = h - p * H // P
        s = w - q * W // Q
        valid = inside & (p < P) & (q < Q) & (r >= 0) & (s >= 0)
        at = p.to(INDEX) * stride_yp + q.to(INDEX) * stride_yq
        tap = tl.load(switches + at, mask=valid, other=0).to(tl.int32)
        hit = valid & (tap == r * S + s)
        acc += tl.load(grads + p.to(INDEX) * stride_gp + q.to(INDEX) * stride_gq, mask=hit, other=0.0).to(ACC)
    out = n * stride_xn + c * stride_xc + h.to(INDEX) * stride_xh + w.to(INDEX) * stride_xw
    tl.store(dx + out, acc.to(dx.dtype.element_ty), mask=inside)


# y[n, c, index] = x[n, c, p, q]; of several that name one element the last in rows-then-columns order stays.  A program
# owns its planes and goes through their pixels in order, with a barrier between two steps: no atomics.  y starts as 0.
@triton.jit
def unpool_forward(
    x,
    index,  # int64, h * W + w
    y,
    C,
    W,
    PLANES,  # images * channels
    Q,
    PIXELS,  # P * Q
    SIZE,  # H * W
    stride_xn,
    stride_xc,
    stride_xp,
    stride_xq,
    stride_in,
    stride_ic,
    stride_ip,
    stride_iq,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    plane = tl.cast(tl.program_id(0), INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
    n = (plane // C).to(tl.int64)
    c = (plane % C).to(INDEX)
    order = tl.arange(0, COLS)
    later = order[None, None, :] > order[None, :, None]
    for first in tl.range(0, PIXELS, COLS):
        pixel = first + order[None, :]
        p = (pixel // Q).to(INDEX)
        q = (pixel % Q).to(INDEX)
        inside = (plane < PLANES) & (pixel < PIXELS)
        at = n * stride_in + c * stride_ic + p * stride_ip + q * stride_iq
        place = tl.load(index + at, mask=inside, other=-1)
        value = tl.load(x + n * stride_xn + c * stride_xc + p * stride_xp + q * stride_xq, mask=inside, other=0.0)
        again = tl.expand_dims(place, 1) == tl.expand_dims(place, 2)  # [ROWS, this pixel, that pixel]
        beaten = tl.max((again & later).to(tl.int32), axis=2) > 0
        keeps = inside & (place >= 0) & (place < SIZE) & (beaten == 0)
        h = (place // W).to(INDEX)
        w = (place % W).to(INDEX)
        tl.store(y + n * stride_yn + c * stride_yc + h * stride_yh + w * stride_yw, value, mask=keeps)
        tl.debug_barrier()


# dx[n, c, p, q] = dy[n, c, index].
@triton.jit
def unpool_backward(
    dy,
    index,
    dx,
    C,
    W,
    P,
    Q,
    SIZE,
    HEIGHT,
    stride_gn,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_in,
    stride_ic,
    stride_ip,
    stride_iq,
    stride_xn,
    stride_xc,
    stride_xp,
    stride_xq,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, p, q, inside = output_tile(tl.program_id(0), C, P, Q, HEIGHT, NHWC, INDEX, ROWS, COLS)
    p = p.to(INDEX)
    q = q.to(INDEX)
    place = tl.load(index + n * stride_in + c * stride_ic + p * stride_ip + q * stride_iq, mask=inside, other=-1)
    h = (place // W).to(INDEX)
    w = (place % W).to(INDEX)
    there = inside & (place >= 0) & (place < SIZE)
    grad = tl.load(dy + n * stride_gn + c * stride_gc + h * stride_gh + w * stride_gw, mask=there, other=0.0)
    tl.store(dx + n * stride_xn + c * stride_xc + p * stride_xp + q * stride_xq, grad, mask=inside)
