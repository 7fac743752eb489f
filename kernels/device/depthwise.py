"""Depthwise convolution: one input channel a filter, so there is nothing to share but pixels, and memory is the bound.

A tile is [columns, channels] of NHWC images, 16 bytes a thread; a program makes LINES rows of it and adds every input
row that it loads to all of them.  Filters come as [taps, layer filters].  One body serves both directions: fprop has
GROUP_K filters for every channel, dgrad sums over the GROUP_C gradients that a channel had filters for; the other of
the two is 1.
"""

import triton
import triton.language as tl


@triton.jit
def _strip(t, P, Q, LINES: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    # Columns of strips of LINES output rows, images before strips: BLOCK of them from number t * BLOCK on.
    m = tl.cast(t, INDEX) * BLOCK + tl.arange(0, BLOCK)
    strips = tl.cdiv(P, LINES)
    q = (m % Q).to(tl.int32)
    p = (m // Q % strips).to(tl.int32) * LINES
    n = (m // Q // strips).to(tl.int64)
    return n, p, q


# y[n, k, p, q] = activation(bias[k] + sum over (r, s) of w[k, r, s] * x[n, k // GROUP_K, pixel shifted by (r, s)]).
@triton.jit
def fprop(
    x,
    w,  # [taps of the layer, filters of the layer]
    y,
    bias,  # [K], or None
    N,
    H,
    W,
    P,
    Q,
    K,  # channels of y
    FILTERS,  # of the layer
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
    GROUP_C: tl.constexpr,
    GROUP_K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    TAP_0: tl.constexpr,
    TAP_R: tl.constexpr,
    TAP_S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(K, CHANNELS)
    k = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n, p, q = _strip(tl.program_id(0) // blocks, P, Q, LINES, COLUMNS, INDEX)
    inside_k = (k < K)[None, :]
    h0 = p * STRIDE_H - pad_h
    w0 = q * STRIDE_W - pad_w
    sums = ()
    for _ in tl.static_range(LINES):
        sums = sums + (tl.zeros((COLUMNS, CHANNELS), ACC),)
    for j in tl.static_range(GROUP_C):
        c = k // GROUP_K * GROUP_C + j
        filters = w + (k * GROUP_C + j)
        image = x + (n * stride_xn)[:, None] + (c.to(INDEX) * stride_xc)[None, :]
        if LINES == 1:
            for tap in tl.range(R * S):
                r = tap // S
                s = tap % S
                h = h0 + r * DIL_H
                v = w0 + s * DIL_W
                seen = (n < N) & (h >= 0) & (h < H) & (v >= 0) & (v < W)
                at = (h.to(INDEX) * stride_xh + v.to(INDEX) * stride_xw)[:, None]
                value = tl.load(image + at, mask=seen[:, None] & inside_k, other=0.0).to(ACC)
                row = (TAP_0 + r * TAP_R + s * TAP_S) * FILTERS
                sums = (sums[0] + value * tl.load(filters + row, mask=k < K, other=0.0).to(ACC)[None, :],)
        else:
            # Row h0 + shift of the image is row r of the window of line l where shift = l * STRIDE_H + r * DIL_H.
            for shift in tl.static_range((LINES - 1) * STRIDE_H + (R - 1) * DIL_H + 1):
                h = h0 + shift
                for s in tl.static_range(S):
                    v = w0 + s * DIL_W
                    seen = (n < N) & (h >= 0) & (h < H) & (v >= 0) & (v < W)
                    at = (h.to(INDEX) * stride_xh + v.to(INDEX) * stride_xw)[:, None]
                    value = tl.load(image + at, mask=seen[:, None] & inside_k, other=0.0).to(ACC)
                    new = ()
                    for line in tl.static_range(LINES):
                        total = sums[line]
                        for r in tl.static_range(R):
                            if shift == line * STRIDE_H + r * DIL_H:
                                row = (TAP_0 + r * TAP_R + s * TAP_S) * FILTERS
                                total += value * tl.load(filters + row, mask=k < K, other=0.0).to(ACC)[None, :]
                        new = new + (total,)
                    sums = new
    out = y + (n * stride_yn + q.to(tl.int64) * stride_yq)[:, None] + (k.to(tl.int64) * stride_yk)[None, :]
    for line in tl.static_range(LINES):
        result = sums[line]
        if HAS_BIAS:
            result += tl.load(bias + k, mask=k < K, other=0.0).to(ACC)[None, :]
        if ACTIVATION == "relu":
            result = tl.where(result < 0, 0.0, result)  # a comparison, because relu keeps NaN
        inside = ((n < N) & (p + line < P))[:, None] & inside_k
        at = ((p + line).to(tl.int64) * stride_yp)[:, None]
        tl.store(out + at, result.to(y.dtype.element_ty), mask=inside)


# parts[split, k, r, s] = the sum of dy[n, k, p, q] * x[n, k // GROUP_K, pixel shifted by (r, s)] over a split's pixels.
# TAPS taps share what is loaded of dy, and find each other's pixels of x in L1; sums stay apart until the last step.
@triton.jit
def wgrad(
    x,
    dy,
    parts,  # [SPLITS, K, R * S]
    N,
    H,
    W,
    P,
    Q,
    K,
    LOOPS,
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
    GROUP_K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    t = tl.program_id(0)
    groups = tl.cdiv(R * S, TAPS)
    tap0 = t % groups * TAPS
    t = t // groups
    k = t % tl.cdiv(K, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)
    split = t // tl.cdiv(K, CHANNELS)
    across_x = (k // GROUP_K).to(INDEX) * stride_xc
    across_y = k.to(INDEX) * stride_yk
    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (tl.zeros((COLUMNS, CHANNELS), ACC),)
    for loop in tl.range(LOOPS):
        n, p, q = _strip(split * LOOPS + loop, P, Q, 1, COLUMNS, INDEX)
        inside = (n < N)[:, None] & (k < K)[None, :]
        at = n * stride_yn + p.to(tl.int64) * stride_yp + q.to(tl.int64) * stride_yq
        grad = tl.load(dy + at[:, None] + across_y[None, :], mask=inside, other=0.0).to(ACC)
        new = ()
        for j in tl.static_range(TAPS):
            h = p * STRIDE_H - pad_h + (tap0 + j) // S * DIL_H
            v = q * STRIDE_W - pad_w + (tap0 + j) % S * DIL_W
            seen = (h >= 0) & (h < H) & (v >= 0) & (v < W) & (tap0 + j < R * S)
            at = n * stride_xn + h.to(tl.int64) * stride_xh + v.to(tl.int64) * stride_xw
            value = tl.load(x + at[:, None] + across_x[None, :], mask=inside & seen[:, None], other=0.0).to(ACC)
            new = new + (sums[j] + grad * value,)
        sums = new
    out = parts + (tl.cast(split, tl.int64) * K + k) * (R * S) + tap0
    for j in tl.static_range(TAPS):
        tl.store(out + j, tl.sum(sums[j], axis=0), mask=(k < K) & (tap0 + j < R * S))
