"""Convolution kernels: a loop of boxes (tensor descriptors), and the sum of what programs share.

Every kernel computes acc[k, pixel] = sum over (r, s, c) of w[k, r, s, c] * x[pixel shifted by (r, s), c].  Weights are
operand A and pixels operand B: the other way round Triton moves the reshaped box through registers and serialises
every WGMMA.  The filter a tap (r, s) reads is TAP_0 + r * TAP_R + s * TAP_S, which lets dgrad run on the filters of
fprop, flipped and transposed in place.  conv_gather.py holds the pointer twins, conv_wgrad.py the filter gradient.
"""

import triton
import triton.language as tl

from tileconv.kernels.device.conv_steps import (
    bias_and_activation,
    finished,
    next_product,
    next_tap,
    one_at_least,
    pixel_load,
    small_products,
    without_infinities,
)


@triton.jit
def box_origin(
    t, N, P, Q, K, GROUPS: tl.constexpr, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    # Filters vary fastest: neighbouring programs read the same pixels.
    n_k = tl.cdiv(K, ROWS)
    k0 = (t % n_k) * ROWS
    t = t // n_k
    g = t % GROUPS
    t = t // GROUPS
    n_q = tl.cdiv(Q, BOX_W)
    q = (t % n_q) * BOX_W
    t = t // n_q
    n_p = tl.cdiv(P, BOX_H)
    p = (t % n_p) * BOX_H
    n = (t // n_p) * BOX_N
    return k0, g, n, p, q


@triton.jit
def _pair_origin(
    t, N, Q, K, WHOLE, GROUPS: tl.constexpr, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    HALF_N: tl.constexpr, HALF_W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A box from the first WHOLE columns and half a box from the others, of the same rows.
    n_k = tl.cdiv(K, ROWS)
    k0 = (t % n_k) * ROWS
    t = t // n_k
    g = t % GROUPS
    t = t // GROUPS
    n_q = tl.cdiv(WHOLE, BOX_W)
    halves_q = tl.cdiv(Q - WHOLE, HALF_W)
    in_row = tl.maximum(n_q * tl.cdiv(N, BOX_N), halves_q * tl.cdiv(N, HALF_N))
    j = t % in_row
    p = t // in_row * BOX_H
    return k0, g, j // n_q * BOX_N, p, j % n_q * BOX_W, j // halves_q * HALF_N, WHOLE + j % halves_q * HALF_W


@triton.jit
def _store_pixels(
    y, out, i, k, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, box_h, box_w,
    INDEX: tl.constexpr, COLUMNS: tl.constexpr = 1, COLUMN_K: tl.constexpr = 0,
):  # fmt: skip
    # out[k, i] for filters k of group g and flat pixels i of the box at (n, p, q).  With COLUMNS k counts through the
    # filters of so many, and a box has one.
    i_n = n + i // (box_h * box_w)
    i_p = p + (i // box_w) % box_h
    i_q = q + i % box_w
    pixels = i_n.to(INDEX) * stride_yn + i_p.to(INDEX) * stride_yp + i_q.to(INDEX) * stride_yq
    inside = (i_n < N) & (i_p < P) & (i_q < Q)
    valid = k < K
    if COLUMNS > 1:
        column = k // COLUMN_K
        valid = (column < COLUMNS) & (q + column < Q)
        k = k % COLUMN_K
        rows = (g * K + k).to(INDEX) * stride_yk + column.to(INDEX) * stride_yq
    else:
        rows = (g * K + k).to(INDEX) * stride_yk
    tl.store(y + rows[:, None] + pixels[None, :], out, mask=valid[:, None] & inside[None, :])


# GEMM_M: filters of one group.  GEMM_N: output pixels, a [BOX_N, BOX_H, BOX_W] box of them.
# GEMM_K: (r, s, c), taps that lie outside the image for the whole box are skipped.
# With BOX_H = BOX_W = 1 ("pixel") a box never straddles the border, and stride only moves a coordinate.
# With COLUMNS a box of one column meets the filters of so many output columns: what tap s - 1 of the next one reads is
# what tap s of the first reads, so their filters lie one behind the other in a row of taps, with zeros beside it.
# With HALF a program makes half a box more with the same filters, 192 pixels of 128 + 64: below its box with COLUMNS,
# else elsewhere in the same rows.
# Programs from FULL on share a tile: SPLITS of them its depth, and fprop_finish adds what they leave in `parts`; or,
# with NARROW, its filters, BLOCK_K2 each.
@triton.jit
def fprop_box(
    x,  # descriptor of [N, H, W, (PARTS * GROUPS,) C], box [BOX_N, BOX_H, BOX_W, (1,) BLOCK_C]
    x_half,  # the same with half a box, or None
    w,  # descriptor of the filters as a matrix: [rows, taps * PARTS * C], box [BLOCK_K, BLOCK_C]; if TRANSPOSED turned,
    # [(GROUPS,) C, taps * PARTS * K], so that a box cannot run into the next group, whose NaN would reach this one
    # with COLUMNS of a matrix for each row of taps: see row_load
    w2,  # the same with a box of BLOCK_K2 rows, or None
    y,  # descriptor of [N, P, Q, (GROUPS,) K], box [BOX_N, BOX_H, BOX_W, (1,) BLOCK_K]; a pointer if not STORE_BOX
    # None where all tiles are shared
    y2,  # the same with a box of BLOCK_K2 filters, or None
    y_half,  # as y and y2 with half a box, or None
    y2_half,
    bias,  # pointer to [GROUPS * K], or None
    seed,  # of dropout: pointer to one int64, or None
    parts,  # pointer to [tiles from FULL on, SPLITS, BLOCK_K + BLOCK_K2, pixels of a box], or None
    FULL,
    WHOLE,  # columns of y that whole boxes make, with HALF and without COLUMNS; else 0
    N,
    H,
    W,
    P,
    Q,
    C,  # channels of one group
    K,  # filters of one group
    stride_yn,
    stride_yp,
    stride_yq,
    stride_yk,
    pad_h,
    pad_w,
    stride_h,
    stride_w,
    dropout,  # the share of outputs that become zero, and what the others are multiplied by; None without seed
    scale,
    R: tl.constexpr,
    S: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    TAP_0: tl.constexpr,
    TAP_R: tl.constexpr,
    TAP_S: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # w holds [depth, taps * PARTS * rows], as dgrad finds the filters of fprop
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,  # the type that counts y's elements, or None; P = Q = GROUPS = 1
    STORE_BOX: tl.constexpr,
    INDEX: tl.constexpr,  # the type that counts y's elements
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,  # of x and w
    ACC: tl.constexpr,
    OUT: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,  # filters of a second product on the same pixels: 128 + 64 wastes no column of 192 or 384
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,  # 1, or more with BOX_W = 1, BLOCK_K2 = 0, stride and dilation 1 along W, TAP_S = -1
    COLUMN_K: tl.constexpr,  # K if COLUMNS are more than one, else 0
    HALF: tl.constexpr,  # 0, or 1 with SPLITS = 1: half the rows with COLUMNS, else half the images or columns
    LOADS_FIRST: tl.constexpr,  # before a step's first turn or product, so that they share a barrier
    NARROW: tl.constexpr,  # BLOCK_K2 divides BLOCK_K; COLUMNS = 1, HALF = 0, SPLITS = PARTS = 1
):
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    ROWS: tl.constexpr = BLOCK_K + BLOCK_K2
    BELOW: tl.constexpr = HALF and COLUMNS > 1
    HALF_N: tl.constexpr = BOX_N if BELOW or BOX_N == 1 else BOX_N // 2
    HALF_H: tl.constexpr = BOX_H // 2 if BELOW else BOX_H
    HALF_W: tl.constexpr = BOX_W if BELOW or BOX_N > 1 else BOX_W // 2
    TALL: tl.constexpr = BOX_H + HALF_H if BELOW else BOX_H
    tl.static_assert(COLUMNS == 1 or (BOX_W == 1 and DIL_W == 1 and BLOCK_K2 == 0 and TAP_S == -1))
    tl.static_assert(HALF == 0 or DROPOUT is None)  # half a box takes another column, a linear layer has one
    t = tl.program_id(0)
    part = 0
    shares = 1
    narrow = NARROW and t >= FULL
    first = 0
    if NARROW:
        if narrow:
            first = (t - FULL) % (ROWS // BLOCK_K2) * BLOCK_K2
            t = FULL + (t - FULL) // (ROWS // BLOCK_K2)
    if SPLITS > 1:
        if t >= FULL:
            part = (t - FULL) % SPLITS
            shares = SPLITS
            t = FULL + (t - FULL) // SPLITS
    if HALF and not BELOW:
        k0, g, n, p, q, n_half, q_half = _pair_origin(
            t, N, Q, K, WHOLE, GROUPS, BOX_N, BOX_H, BOX_W, HALF_N, HALF_W, ROWS
        )
        p_half = p
    else:
        k0, g, n, p, q = box_origin(t, N, P, Q, K, GROUPS, BOX_N, TALL, BOX_W * COLUMNS, ROWS)
        n_half, p_half, q_half = n, p + BOX_H, q
    h0 = p * stride_h - pad_h
    w0 = q * stride_w - pad_w
    # cdiv rounds towards zero for negatives; the outer maximum makes that harmless.
    r_lo = tl.maximum(0, tl.cdiv(1 - TALL - h0, DIL_H))
    r_hi = tl.minimum(R, tl.maximum(0, tl.cdiv(H - h0, DIL_H)))
    s_lo = tl.maximum(0, tl.cdiv(1 - BOX_W - w0, DIL_W))
    s_hi = tl.minimum(S + COLUMNS - 1, tl.maximum(0, tl.cdiv(W - w0, DIL_W)))
    h_half = p_half * stride_h - pad_h
    w_half = q_half * stride_w - pad_w
    if HALF and not BELOW:
        s_lo = tl.minimum(s_lo, tl.maximum(0, tl.cdiv(1 - HALF_W - w_half, DIL_W)))
        s_hi = tl.maximum(s_hi, tl.minimum(S, tl.maximum(0, tl.cdiv(W - w_half, DIL_W))))
    n_c = tl.cdiv(C, BLOCK_C)
    steps = tl.maximum(r_hi - r_lo, 0) * tl.maximum(s_hi - s_lo, 0) * n_c
    c_first, s_first, r_first = 0, s_lo, r_lo
    if SPLITS > 1:
        share = tl.cdiv(steps, shares)
        begin = part * share
        steps = tl.minimum(share, steps - begin)
        n_s = tl.maximum(s_hi - s_lo, 1)
        c_first = begin % n_c * BLOCK_C
        s_first = s_lo + begin // n_c % n_s
        r_first = r_lo + begin // n_c // n_s
    if PARTS == 1:
        steps, r_first = one_at_least(steps, r_first, R + tl.maximum(H - h0, 0))
    if NARROW:
        if narrow:
            k0 += first
            acc = tl.zeros((BLOCK_K2, PIXELS), ACC)
            c, s, r = c_first, s_first, r_first
            for _ in tl.range(0, steps):
                box = pixel_load(x, n, h0 + r * DIL_H, w0 + s * DIL_W, g, c, GROUPS, False, PIXELS, BLOCK_C)
                column = (TAP_0 + r * TAP_R + s * TAP_S) * (K if TRANSPOSED else C)
                filters = filter_load(w2, g, c, k0, 0, C, K, column, GROUPS, TRANSPOSED)
                if TRANSPOSED:
                    filters = filters.T
                acc = tl.dot(filters, box.T, acc, input_precision=PRECISION, out_dtype=ACC)
                c, s, r = next_tap(c, s, r, s_lo, s_hi, C, BLOCK_C)
            k = k0 + tl.arange(0, BLOCK_K2)
            image = n + tl.arange(0, PIXELS) // (BOX_H * BOX_W)
            acc = finished(acc, bias, seed, g, k, image, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
            store_box(
                y2, acc.to(OUT), k0, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk,
                GROUPS, STORE_BOX, BOX_N, BOX_H, BOX_W, BLOCK_K2, INDEX,
            )  # fmt: skip
            return
    acc = tl.zeros((BLOCK_K, PIXELS), ACC)
    if BLOCK_K2:
        acc2 = tl.zeros((BLOCK_K2, PIXELS), ACC)
    if HALF:
        acc_half = tl.zeros((BLOCK_K, PIXELS // 2), ACC)
        if BLOCK_K2:
            acc2_half = tl.zeros((BLOCK_K2, PIXELS // 2), ACC)
    width = (K if TRANSPOSED else C) * PARTS  # of a tap
    for small in tl.static_range(PARTS > 1, -1, -1):
        c, s, r = c_first, s_first, r_first
        products, x_parts, w_parts = small_products(PARTS if small else 1)
        step = 0
        for _ in tl.range(0, steps * products if small else steps):  # one flat loop: it pipelines across taps
            plane = g + (x_parts & 3) * GROUPS if small else g
            box = pixel_load(x, n, h0 + r * DIL_H, w0 + s * DIL_W, plane, c, GROUPS * PARTS, False, PIXELS, BLOCK_C)
            if HALF:
                box_half = pixel_load(
                    x_half, n_half, h_half + r * DIL_H, w_half + s * DIL_W, plane, c, GROUPS * PARTS, False,
                    PIXELS // 2, BLOCK_C,
                )  # fmt: skip
            if COLUMNS > 1:
                w_part = w_parts & 3 if small else 0
                filters = row_load(
                    w, w_part, r, s, g, c, 0, COLUMN_K, S, TAP_0, TAP_R, GROUPS, TRANSPOSED, BLOCK_K, BLOCK_C
                )  # fmt: skip
            else:
                beside = (w_parts & 3) * (K if TRANSPOSED else C) if small else 0
                column = (TAP_0 + r * TAP_R + s * TAP_S) * width + beside
                filters = filter_load(w, g, c, k0, 0, C, K, column, GROUPS, TRANSPOSED)
            if BLOCK_K2 and LOADS_FIRST:
                filters2 = filter_load(w2, g, c, k0, BLOCK_K, C, K, column, GROUPS, TRANSPOSED)
            if TRANSPOSED:
                filters = filters.T
            acc = tl.dot(filters, box.T, acc, input_precision=PRECISION, out_dtype=ACC)
            if HALF:
                acc_half = tl.dot(filters, box_half.T, acc_half, input_precision=PRECISION, out_dtype=ACC)
            if BLOCK_K2:
                if not LOADS_FIRST:
                    filters2 = filter_load(w2, g, c, k0, BLOCK_K, C, K, column, GROUPS, TRANSPOSED)
                if TRANSPOSED:
                    filters2 = filters2.T
                acc2 = tl.dot(filters2, box.T, acc2, input_precision=PRECISION, out_dtype=ACC)
                if HALF:
                    acc2_half = tl.dot(filters2, box_half.T, acc2_half, input_precision=PRECISION, out_dtype=ACC)
            c, s, r = next_tap(c, s, r, s_lo, s_hi, C, BLOCK_C)
            if small:
                step, wrap, x_parts, w_parts = next_product(step, steps, x_parts, w_parts)
                c = tl.where(wrap, c_first, c)
                s = tl.where(wrap, s_first, s)
                r = tl.where(wrap, r_first, r)
        if small:
            acc = without_infinities(acc)
            if BLOCK_K2:
                acc2 = without_infinities(acc2)
            if HALF:
                acc_half = without_infinities(acc_half)
                if BLOCK_K2:
                    acc2_half = without_infinities(acc2_half)
    if SPLITS > 1:
        if shares > 1:
            i = tl.arange(0, PIXELS)
            slot = parts + ((t - FULL).to(tl.int64) * SPLITS + part) * (ROWS * PIXELS)
            tl.store(slot + (tl.arange(0, BLOCK_K) * PIXELS)[:, None] + i[None, :], acc)
            if BLOCK_K2:
                tl.store(slot + ((BLOCK_K + tl.arange(0, BLOCK_K2)) * PIXELS)[:, None] + i[None, :], acc2)
            return
    if y is not None:  # else all tiles are shared
        k = k0 + tl.arange(0, BLOCK_K)
        image = n + tl.arange(0, PIXELS) // (BOX_H * BOX_W)
        if COLUMNS > 1:
            k = k % COLUMN_K
        acc = finished(acc, bias, seed, g, k, image, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
        store_box(
            y, acc.to(OUT), k0, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk,
            GROUPS, STORE_BOX, BOX_N, BOX_H, BOX_W, BLOCK_K, INDEX, COLUMNS, COLUMN_K,
        )  # fmt: skip
        if HALF:
            acc_half = bias_and_activation(acc_half, bias, g, k, K, HAS_BIAS, ACTIVATION)
            store_box(
                y_half, acc_half.to(OUT), k0, g, n_half, p_half, q_half, N, P, Q, K,
                stride_yn, stride_yp, stride_yq, stride_yk, GROUPS, STORE_BOX, HALF_N, HALF_H, HALF_W, BLOCK_K,
                INDEX, COLUMNS, COLUMN_K,
            )  # fmt: skip
        if BLOCK_K2:
            k1 = k0 + BLOCK_K
            k = k1 + tl.arange(0, BLOCK_K2)
            acc2 = finished(acc2, bias, seed, g, k, image, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
            store_box(
                y2, acc2.to(OUT), k1, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk,
                GROUPS, STORE_BOX, BOX_N, BOX_H, BOX_W, BLOCK_K2, INDEX,
            )  # fmt: skip
            if HALF:
                acc2_half = bias_and_activation(acc2_half, bias, g, k, K, HAS_BIAS, ACTIVATION)
                store_box(
                    y2_half, acc2_half.to(OUT), k1, g, n_half, p_half, q_half, N, P, Q, K,
                    stride_yn, stride_yp, stride_yq, stride_yk, GROUPS, STORE_BOX, HALF_N, HALF_H, HALF_W, BLOCK_K2,
                    INDEX,
                )  # fmt: skip


@triton.jit
def filter_load(w, g, c, k0, below, C, K, column, GROUPS: tl.constexpr, TRANSPOSED: tl.constexpr):
    # In this order: (k0 + below) + column makes 64 x (128 + 64) tiles of one tap wait for every product.
    if TRANSPOSED and GROUPS > 1:
        block = w.load([g, c, column + k0 + below])
        return block.reshape(block.shape[1], block.shape[2])
    elif TRANSPOSED:
        return w.load([c, column + k0 + below])
    else:
        return w.load([g * K + k0 + below, column + c])


@triton.jit
def row_load(
    w, part, r, s, g, c, below, COLUMN_K: tl.constexpr, S: tl.constexpr, TAP_0: tl.constexpr, TAP_R: tl.constexpr,
    GROUPS: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # The filters that a box of pixels meets for all columns of a program, from w [PARTS, rows of taps, (GROUPS,) C,
    # S * K], or [groups, rows of taps, S * K, C] if not TRANSPOSED.  Beside a row of taps are zeros of the copy engine.
    row = TAP_0 // S + r * (TAP_R // S)
    column = (S - 1 - s) * COLUMN_K + below
    if TRANSPOSED and GROUPS > 1:
        return w.load([part, row, g, c, column]).reshape(BLOCK_C, BLOCK_K)
    elif TRANSPOSED:
        return w.load([part, row, c, column]).reshape(BLOCK_C, BLOCK_K)
    else:
        return w.load([g, row, column, c]).reshape(BLOCK_K, BLOCK_C)


@triton.jit
def store_box(
    y, out, k0, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, GROUPS: tl.constexpr,
    STORE_BOX: tl.constexpr, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, ROWS: tl.constexpr,
    INDEX: tl.constexpr = tl.int64,
    COLUMNS: tl.constexpr = 1,  # if more, BOX_W = 1, and ROWS = COLUMNS * COLUMN_K with STORE_BOX
    COLUMN_K: tl.constexpr = 0,
):  # fmt: skip
    if not STORE_BOX:
        k = k0 + tl.arange(0, ROWS)
        i = tl.arange(0, BOX_N * BOX_H * BOX_W)
        _store_pixels(
            y, out, i, k, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, BOX_H, BOX_W,
            INDEX, COLUMNS, COLUMN_K,
        )  # fmt: skip
    elif GROUPS == 1:
        y.store([n, p, q, k0], out.T.reshape(BOX_N, BOX_H, BOX_W * COLUMNS, ROWS // COLUMNS))
    else:
        y.store([n, p, q, g, k0], out.T.reshape(BOX_N, BOX_H, BOX_W * COLUMNS, 1, ROWS // COLUMNS))


# y[k, pixel] = activation(bias + parts[0] + parts[1] + ...), always in this order, for the tiles that were shared; with
# dropout as in fprop_box.  With COUNTED a tile has BOX_N flat pixels (n, p, q), as fprop_gather counts them.
@triton.jit
def fprop_finish(
    parts,  # pointer to [tiles from FULL on, SPLITS, ROWS, pixels of a box]
    y,  # pointer
    bias,
    seed,
    FULL,
    N,
    P,
    Q,
    K,
    stride_yn,
    stride_yp,
    stride_yq,
    stride_yk,
    dropout,
    scale,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    OUT: tl.constexpr,
    INDEX: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_K: tl.constexpr,
    COUNTED: tl.constexpr,  # FULL = 0 and BOX_H = BOX_W = COLUMNS = 1
    BLOCK_K: tl.constexpr,  # divides ROWS
    BLOCK_P: tl.constexpr,  # divides the pixels of a box
):
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    BLOCKS: tl.constexpr = (ROWS // BLOCK_K) * (PIXELS // BLOCK_P)
    t = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    row = block % (ROWS // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    i = block // (ROWS // BLOCK_K) * BLOCK_P + tl.arange(0, BLOCK_P)
    if COUNTED:
        k0, g, n, p, q = box_origin(t, N * P * Q, 1, 1, K, GROUPS, BOX_N, BOX_H, BOX_W, ROWS)
    else:
        k0, g, n, p, q = box_origin(FULL + t, N, P, Q, K, GROUPS, BOX_N, BOX_H, BOX_W * COLUMNS, ROWS)
    slot = parts + t.to(tl.int64) * (SPLITS * ROWS * PIXELS)
    acc = tl.zeros((BLOCK_K, BLOCK_P), parts.dtype.element_ty)
    for part in tl.range(SPLITS):
        acc += tl.load(slot + part * (ROWS * PIXELS) + (row * PIXELS)[:, None] + i[None, :])
    k = k0 + row
    image = n + i // (BOX_H * BOX_W)  # a flat pixel is one where there is dropout
    own = k % COLUMN_K if COLUMNS > 1 else k
    acc = finished(acc, bias, seed, g, own, image, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
    if COUNTED:  # flat pixels of all images are those of a box of whole ones
        _store_pixels(
            y, acc.to(OUT), image, k, g, 0, 0, 0, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, P, Q,
            INDEX,
        )  # fmt: skip
    else:
        _store_pixels(
            y, acc.to(OUT), i, k, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, BOX_H, BOX_W,
            INDEX, COLUMNS, COLUMN_K,
        )  # fmt: skip
