"""Pooling kernels on any strides: a [ROWS, COLS] tile of outputs, its columns along the contiguous axis.

NHWC: rows are pixels (n, p, q), columns are channels.  NCHW: rows are (n, c, p), columns are q.
"""

import triton
import triton.language as tl


@triton.jit
def output_tile(
    program, C, P, Q, HEIGHT, NHWC: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    # HEIGHT is the number of rows.  Returns n, c, p, q, each broadcastable to [ROWS, COLS], and which are inside.
    WIDTH = C if NHWC else Q
    blocks = tl.cdiv(WIDTH, COLS)
    row = (tl.cast(program // blocks, INDEX) * ROWS + tl.arange(0, ROWS))[:, None]
    col = ((program % blocks) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < HEIGHT) & (col < WIDTH)
    if NHWC:
        c = col
        q = row % Q
        p = (row // Q) % P
        n = row // Q // P
    else:
        q = col
        p = row % P
        c = (row // P) % C
        n = row // P // C
    return n.to(tl.int64), c.to(INDEX), p.to(tl.int32), q.to(tl.int32), inside


# A value's bits below its place in the window: one select moves both.
@triton.jit
def key_of(value, place):
    if value.dtype.primitive_bitwidth == 16:
        return value.to(tl.uint16, bitcast=True).to(tl.int32) | (place << 16)
    else:
        return value.to(tl.uint32, bitcast=True).to(tl.int64) | (tl.cast(place, tl.int64) << 32)


@triton.jit
def key_value(key, TYPE: tl.constexpr):
    return key.to(tl.int16 if TYPE.primitive_bitwidth == 16 else tl.int32).to(TYPE, bitcast=True)


@triton.jit
def key_place(key, TYPE: tl.constexpr):
    return key >> TYPE.primitive_bitwidth


@triton.jit
def larger(key, best, TYPE: tl.constexpr):
    value = key_value(key, TYPE)
    return tl.where((value > key_value(best, TYPE)) | (value != value), key, best)


# y[n, c, p, q] = max over the window; switch = r * S + s of the element that won, one byte.
# NaN wins (the last one), ties go to the first, a window of -inf to its first element: as in PyTorch.
@triton.jit
def max_forward(
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
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    HAS_SWITCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether windows reach beyond the image
    ONE_KEY: tl.constexpr,  # for elements of up to 4 bytes in windows of less than 32,768
    UNROLL: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, p, q, inside = output_tile(tl.program_id(0), C, P, Q, HEIGHT, NHWC, INDEX, ROWS, COLS)
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    corner = x + n * stride_xn + c * stride_xc + h0.to(INDEX) * stride_xh + w0.to(INDEX) * stride_xw
    TYPE: tl.constexpr = x.dtype.element_ty
    FIRST: tl.constexpr = 0 if PARTIAL else 1
    if PARTIAL:  # in a window of -inf the first element wins that is not before the edge
        best = tl.full((ROWS, COLS), float("-inf"), TYPE)
        won = tl.cdiv(tl.maximum(-h0, 0), DIL_H) * S + tl.cdiv(tl.maximum(-w0, 0), DIL_W)
        won = tl.broadcast_to(won, (ROWS, COLS))
    else:
        best = tl.load(corner, mask=inside)
        won = tl.zeros((ROWS, COLS), tl.int32)
    if ONE_KEY:
        key = key_of(best, won)
        if UNROLL:
            for tap in tl.static_range(FIRST, R * S):
                value = _tap(corner, tap, h0, w0, H, W, inside, stride_xh, stride_xw, S, DIL_H, DIL_W, PARTIAL, INDEX)
                key = larger(key_of(value, tap), key, TYPE)
        else:
            for tap in tl.range(FIRST, R * S):
                value = _tap(corner, tap, h0, w0, H, W, inside, stride_xh, stride_xw, S, DIL_H, DIL_W, PARTIAL, INDEX)
                key = larger(key_of(value, tap), key, TYPE)
        best, won = key_value(key, TYPE), key_place(key, TYPE)
    else:
        for tap in tl.range(FIRST, R * S):
            value = _tap(corner, tap, h0, w0, H, W, inside, stride_xh, stride_xw, S, DIL_H, DIL_W, PARTIAL, INDEX)
            wins = (value > best) | (value != value)
            best, won = tl.where(wins, value, best), tl.where(wins, tap, won)
    out = n * stride_yn + c * stride_yc + p.to(INDEX) * stride_yp + q.to(INDEX) * stride_yq
    if ACTIVATION == "relu":
        best = tl.where(best < 0, tl.zeros_like(best), best)
    tl.store(y + out, best, mask=inside)
    if HAS_SWITCH:
        tl.store(switch + out, won.to(switch.dtype.element_ty), mask=inside)


@triton.jit
def _tap(
    corner, tap, h0, w0, H, W, inside, stride_xh, stride_xw, S: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, PARTIAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    r = tap // S * DIL_H
    s = tap % S * DIL_W
    at = corner + (tl.cast(r, INDEX) * stride_xh + tl.cast(s, INDEX) * stride_xw)
    if PARTIAL:
        h = h0 + r
        w = w0 + s
        value = tl.load(at, mask=inside & (h >= 0) & (h < H) & (w >= 0) & (w < W), other=float("-inf"))
    else:
        value = tl.load(at, mask=inside)
    return value


# index[n, c, p, q] = h * W + w of the element that the switch names.
@triton.jit
def switch_to_index(
    switch,
    index,  # same layout as switch
    W,
    P,
    Q,
    C,
    HEIGHT,
    stride_n,
    stride_c,
    stride_p,
    stride_q,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, p, q, inside = output_tile(tl.program_id(0), C, P, Q, HEIGHT, NHWC, INDEX, ROWS, COLS)
    at = n * stride_n + c * stride_c + p.to(INDEX) * stride_p + q.to(INDEX) * stride_q
    tap = tl.load(switch + at, mask=inside, other=0).to(tl.int32)
    h = p * STRIDE_H - PAD_H + tap // S * DIL_H
    w = q * STRIDE_W - PAD_W + tap % S * DIL_W
    tl.store(index + at, h.to(tl.int64) * W + w, mask=inside)


# dx[n, c, h, w] = sum of dy over the at most ceil(R / stride)^2 windows whose switch points at (h, w): a gather, so no
# atomics and the same bits every run.
@triton.jit
def max_backward(
    dy,
    switch,
    y,  # pooled values: a window whose maximum ReLU had cut (y <= 0) passes nothing on; None without MASK
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
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, h, w, inside = output_tile(tl.program_id(0), C, H, W, HEIGHT, NHWC, INDEX, ROWS, COLS)
    grad_base = dy + n * stride_gn + c * stride_gc
    out_base = n * stride_yn + c * stride_yc
    acc = tl.zeros((ROWS, COLS), ACC)
    # The windows over h: tap r of window p, with p * STRIDE_H = h + PAD_H - r * DIL_H.
    SPREAD_H: tl.constexpr = DIL_H * (R - 1) // STRIDE_H + 1
    SPREAD_W: tl.constexpr = DIL_W * (S - 1) // STRIDE_W + 1
    last_p = (h + PAD_H) // STRIDE_H
    last_q = (w + PAD_W) // STRIDE_W
    for back in tl.range(SPREAD_H * SPREAD_W):
        p = last_p - back // SPREAD_W
        q = last_q - back % SPREAD_W
        up = h + PAD_H - p * STRIDE_H
        left = w + PAD_W - q * STRIDE_W
        r = up // DIL_H
        s = left // DIL_W
        reaches = (r * DIL_H == up) & (r < R) & (s * DIL_W == left) & (s < S)
        valid = inside & reaches & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        at = out_base + p.to(INDEX) * stride_yp + q.to(INDEX) * stride_yq
        tap = tl.load(switch + at, mask=valid, other=0).to(tl.int32)
        hit = valid & (tap == r * S + s)
        if MASK:
            hit = hit & ~(tl.load(y + at, mask=hit, other=0.0) <= 0)
        grad = tl.load(grad_base + p.to(INDEX) * stride_gp + q.to(INDEX) * stride_gq, mask=hit, other=0.0)
        acc += grad.to(ACC)
    out = n * stride_xn + c * stride_xc + h.to(INDEX) * stride_xh + w.to(INDEX) * stride_xw
    tl.store(dx + out, acc.to(dx.dtype.element_ty), mask=inside)


# The same for dilation 1: a program makes whole cells of STRIDE_H x STRIDE_W input pixels, so that
# all pixels of a cell share the loads of the windows over it, and these are never masked element by element.
@triton.jit
def max_backward_cells(
    dy,
    switch,
    y,  # as in max_backward
    dx,
    C,
    H,
    W,
    P,
    Q,
    HEIGHT,  # cells of all images
    CELLS_H,
    CELLS_W,
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
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ABREAST: tl.constexpr,  # 2 with STRIDE_W = 2 and NCHW: pixels that lie side by side are stored together; else 1
    MASK: tl.constexpr,
    ACC: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, c, i, j, inside = output_tile(tl.program_id(0), C, CELLS_H, CELLS_W, HEIGHT, NHWC, INDEX, ROWS, COLS)
    grad_base = dy + n * stride_gn + c * stride_gc
    out_base = n * stride_yn + c * stride_yc
    BACK_H: tl.constexpr = (R - 1) // STRIDE_H + 1  # windows over a cell
    BACK_W: tl.constexpr = (S - 1) // STRIDE_W + 1
    grads = ()
    taps = ()
    for back in tl.static_range(BACK_H * BACK_W):
        p = i - back // BACK_W
        q = j - back % BACK_W
        valid = inside & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        at = out_base + p.to(INDEX) * stride_yp + q.to(INDEX) * stride_yq
        grad = tl.load(grad_base + p.to(INDEX) * stride_gp + q.to(INDEX) * stride_gq, mask=valid, other=0.0)
        if MASK:
            grad = tl.where(tl.load(y + at, mask=valid, other=0.0) <= 0, tl.zeros_like(grad), grad)
        grads = grads + (grad.to(ACC),)
        taps = taps + (tl.load(switch + at, mask=valid, other=0).to(tl.int32),)
    if ABREAST == 2:
        n, c, i, j, inside = output_tile(tl.program_id(0), C, CELLS_H, CELLS_W * 2, HEIGHT, NHWC, INDEX, ROWS, COLS * 2)
    for pixel in tl.static_range(0, STRIDE_H * STRIDE_W, ABREAST):
        acc = _cell_sum(taps, grads, pixel // STRIDE_W, pixel % STRIDE_W, R, S, STRIDE_H, STRIDE_W)
        if ABREAST == 2:
            beside = _cell_sum(taps, grads, pixel // STRIDE_W, 1, R, S, STRIDE_H, STRIDE_W)
            acc = tl.join(acc.to(dx.dtype.element_ty), beside.to(dx.dtype.element_ty)).reshape(ROWS, COLS * 2)
        h = i * STRIDE_H + (pixel // STRIDE_W - PAD_H)
        w = j * (STRIDE_W // ABREAST) + (pixel % STRIDE_W - PAD_W)
        out = n * stride_xn + c * stride_xc + h.to(INDEX) * stride_xh + w.to(INDEX) * stride_xw
        tl.store(dx + out, acc.to(dx.dtype.element_ty), mask=inside & (h >= 0) & (h < H) & (w >= 0) & (w < W))


@triton.jit
def _cell_sum(
    taps, grads, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
):  # fmt: skip
    # Of the windows over a cell, the gradients of those whose maximum was its pixel (A, B).
    BACK_W: tl.constexpr = (S - 1) // STRIDE_W + 1
    acc = tl.zeros_like(grads[0])
    for back in tl.static_range(((R - 1) // STRIDE_H + 1) * BACK_W):
        if A + back // BACK_W * STRIDE_H < R and B + back % BACK_W * STRIDE_W < S:
            hit = taps[back] == (A + back // BACK_W * STRIDE_H) * S + B + back % BACK_W * STRIDE_W
            acc += tl.where(hit, grads[back], tl.zeros_like(acc))
    return acc


# y[n, c, p, q] = mean over rows floor(p * H / P) .. ceil((p + 1) * H / P) and the columns likewise.
@triton.jit
def adaptive_avg_forward(
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
    R: tl.constexpr,  # the largest window
    S: tl.constexpr,
    ACC: tl.constexpr,
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
    acc = tl.zeros((ROWS, COLS), ACC)
    for tap in tl.range(R * S):
        r = tap // S
        s = tap % S
        valid = inside & (h0 + r < h1) & (w0 + s < w1)
        shift = tl.cast(r, INDEX) * stride_xh + tl.cast(s, INDEX) * stride_xw
        acc += tl.load(corner + shift, mask=valid, other=0.0).to(ACC)
    mean = acc / ((h1 - h0) * (w1 - w0)).to(ACC)
    out = n * stride_yn + c * stride_yc + p.to(INDEX) * stride_yp + q.to(INDEX) * stride_yq
    tl.store(y + out, mean.to(y.dtype.element_ty), mask=inside)


# dx[n, c, h, w] = sum over the windows that hold (h, w) of dy / size of the window.
@triton.jit
def adaptive_avg_backward(
    dy,
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
    R: tl.constexpr,  # the most windows over one row
    S: tl.constexpr,
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
    base = dy + n * stride_gn + c * stride_gc
    acc = tl.zeros((ROWS, COLS), ACC)
    for step in tl.range(R * S):
        p = p0 + step // S
        q = q0 + step % S
        top = p * H // P
        left = q * W // Q
        rows = ((p + 1) * H + P - 1) // P - top
        columns = ((q + 1) * W + Q - 1) // Q - left
        valid = inside & (p < P) & (q < Q) & (top <= h) & (left <= w)
        grad = tl.load(base + p.to(INDEX) * stride_gp + q.to(INDEX) * stride_gq, mask=valid, other=0.0)
        acc += grad.to(ACC) / (rows * columns).to(ACC)
    out = n * stride_xn + c * stride_xc + h.to(INDEX) * stride_xh + w.to(INDEX) * stride_xw
    tl.store(dx + out, acc.to(dx.dtype.element_ty), mask=inside)
