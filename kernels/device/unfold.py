"""im2col and col2im: an image's patches as the columns of a matrix, and the sum of columns back into an image."""

import triton
import triton.language as tl


# cols[n, (c, r, s), (p, q)] = x[n, c, p * STRIDE_H + r * DIL_H - pad_h, q * STRIDE_W + s * DIL_W - pad_w], zero outside
# the image.  Rows of a tile run along the axis of cols that is not contiguous.  RUN channels lie side by side: (c, r,
# s) is in the order (c // RUN, r, s, c % RUN).
@triton.jit
def unfold(
    x,
    cols,
    N,
    H,
    W,
    Q,
    DEPTH,  # C * R * S
    PIXELS,  # P * Q
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yd,
    stride_yi,
    pad_h,
    pad_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    RUN: tl.constexpr,
    PATCHES: tl.constexpr,  # the depth of a patch is contiguous in cols; else its pixels are
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    if PATCHES:
        height, width = PIXELS, DEPTH
    else:
        height, width = DEPTH, PIXELS
    blocks = tl.cdiv(width, COLS)
    row = (tl.cast(tl.program_id(0) // blocks, INDEX) * ROWS + tl.arange(0, ROWS))[:, None]
    col = ((tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS))[None, :]
    n = (row // height).to(tl.int64)
    inside = (n < N) & (col < width)
    if PATCHES:
        i, d = (row % height).to(tl.int32), col
    else:
        i, d = col, (row % height).to(tl.int32)
    c = d // (R * S * RUN) * RUN + d % RUN
    tap = d // RUN
    h = i // Q * STRIDE_H + tap // S % R * DIL_H - pad_h
    w = i % Q * STRIDE_W + tap % S * DIL_W - pad_w
    seen = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = n * stride_xn + c.to(INDEX) * stride_xc + h.to(INDEX) * stride_xh + w.to(INDEX) * stride_xw
    out = n * stride_yn + d.to(INDEX) * stride_yd + i.to(INDEX) * stride_yi
    tl.store(cols + out, tl.load(x + at, mask=seen, other=0.0), mask=inside)


# x[n, c, h, w] = the sum of cols[n, (c, r, s), (p, q)] over the patches that hold the pixel: every pixel looks for
# them, taps in order, so nothing is added atomically.  RUN as above.
@triton.jit
def fold(
    cols,
    x,
    N,
    C,
    H,
    W,
    P,
    Q,
    stride_yn,
    stride_yd,
    stride_yi,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    pad_h,
    pad_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    RUN: tl.constexpr,
    NHWC: tl.constexpr,  # channels are contiguous in x; else its columns are
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    if NHWC:
        width = C
    else:
        width = W
    blocks = tl.cdiv(width, COLS)
    row = (tl.cast(tl.program_id(0) // blocks, INDEX) * ROWS + tl.arange(0, ROWS))[:, None]
    col = ((tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS))[None, :]
    if NHWC:
        c, w = col, (row % W).to(tl.int32)
        h = (row // W % H).to(tl.int32)
        n = (row // W // H).to(tl.int64)
    else:
        c, w = (row // H % C).to(tl.int32), col
        h = (row % H).to(tl.int32)
        n = (row // H // C).to(tl.int64)
    inside = (n < N) & (col < width)
    total = tl.zeros((ROWS, COLS), ACC)
    for tap in tl.range(R * S):
        r = tap // S
        s = tap % S
        up = h + pad_h - r * DIL_H
        left = w + pad_w - s * DIL_W
        p = up // STRIDE_H
        q = left // STRIDE_W
        # A negative `up` may round to p = 0, but then p * STRIDE_H is not `up`.
        hit = (p * STRIDE_H == up) & (q * STRIDE_W == left) & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        d = (c // RUN * (R * S) + tap) * RUN + c % RUN
        at = n * stride_yn + d.to(INDEX) * stride_yd + (p * Q + q).to(INDEX) * stride_yi
        total += tl.load(cols + at, mask=inside & hit, other=0.0).to(ACC)
    at = n * stride_xn + c.to(INDEX) * stride_xc + h.to(INDEX) * stride_xh + w.to(INDEX) * stride_xw
    tl.store(x + at, total.to(x.dtype.element_ty), mask=inside)
