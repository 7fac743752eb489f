"""Convolution kernels: a loop of boxes (tensor descriptors) and its pointer twin, with one epilogue.

Every kernel computes acc[k, pixel] = sum over (r, s, c) of w[k, r, s, c] * x[pixel shifted by (r, s), c].  Weights are
operand A and pixels operand B: the other way round Triton moves the reshaped box through registers and serialises
every WGMMA.  The filter a tap (r, s) reads is TAP_0 + r * TAP_R + s * TAP_S, which lets dgrad run on the filters of
fprop, flipped and transposed in place.

Where both operands are fp32 numbers in two or three bf16 PARTS, the depth is gone through for every product of parts
that counts: the small ones first, because tensor cores cut sums off at the last bit of the largest term, and what they
cut off a small sum is small.  Kernels with pointers make all products of what they have loaded instead: their addresses
cost more than their products, and they do not wait in the way that WGMMA would.
"""

import triton
import triton.language as tl


@triton.jit
def _next_tap(c, s, r, s_lo, s_hi, C, BLOCK_C: tl.constexpr):
    # Counters carried by hand: about 20 integer instructions an iteration less than dividing the step.
    c += BLOCK_C
    wrap = c >= C
    c = tl.where(wrap, 0, c)
    s = tl.where(wrap, s + 1, s)
    wrap = s >= s_hi
    s = tl.where(wrap, s_lo, s)
    r = tl.where(wrap, r + 1, r)
    return c, s, r


@triton.jit
def _small_products(PARTS: tl.constexpr):
    # How many there are, and which part of either operand each takes, two bits a product, the smallest product first.
    if PARTS == 3:
        return 5, 2 + (1 << 4) + (1 << 6), (2 << 2) + (1 << 4) + (1 << 8)
    elif PARTS == 2:
        return 2, 1, 1 << 2
    else:
        return 0, 0, 0


@triton.jit
def _next_product(step, steps, x_parts, w_parts):
    # Selections: a branch in a loop may make WGMMAs wait for each other.
    step += 1
    wrap = step == steps
    return tl.where(wrap, 0, step), wrap, tl.where(wrap, x_parts >> 2, x_parts), tl.where(wrap, w_parts >> 2, w_parts)


@triton.jit
def _without_infinities(acc):
    # An infinite operand has further parts of zero.  Zero times infinity must not spoil what the largest product says.
    return tl.where(tl.abs(acc) < float("inf"), acc, 0.0)


@triton.jit
def _dot_parts(w, inside_w, w_part, x, inside_x, x_part, PARTS: tl.constexpr, ACC: tl.constexpr):
    # w [rows, depth] and x [columns, depth] point at the largest parts.
    w0 = tl.load(w, mask=inside_w, other=0.0)
    w1 = tl.load(w + w_part, mask=inside_w, other=0.0)
    x0 = tl.load(x, mask=inside_x, other=0.0).T
    x1 = tl.load(x + x_part, mask=inside_x, other=0.0).T
    acc = tl.zeros((w.shape[0], x.shape[0]), ACC)
    if PARTS == 3:
        acc = tl.dot(w0, tl.load(x + 2 * x_part, mask=inside_x, other=0.0).T, acc)
        acc = tl.dot(tl.load(w + 2 * w_part, mask=inside_w, other=0.0), x0, acc)
        acc = tl.dot(w1, x1, acc)
    acc = tl.dot(w0, x1, acc)
    acc = tl.dot(w1, x0, acc)
    return tl.dot(w0, x0, _without_infinities(acc))


@triton.jit
def _bias_and_activation(acc, bias, g, k, K, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias + g * K + k, mask=k < K, other=0.0).to(acc.dtype)[:, None]
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)  # a comparison, because relu keeps NaN
    return acc


@triton.jit
def _finished(
    acc, bias, seed, g, k, n, K, dropout, scale, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    # With dropout of a linear layer's acc[k, n], which is y[n, k]: elements count as device.pointwise.dropout counts
    # those of a row-major y, so that both draw one mask.  An int32 that overflows is outside y.
    acc = _bias_and_activation(acc, bias, g, k, K, HAS_BIAS, ACTIVATION)
    if DROPOUT is not None:
        # One element after the other.  A block at a time, all four words of every element's state are alive at once:
        # 2,832 bytes of stack for 64 x 256 outputs on 4 warps of sm_90, where this way takes none.
        acc = tl.map_elementwise(_dropped, acc, n.to(DROPOUT)[None, :] * K, k[:, None], tl.load(seed), dropout, scale)
    return acc


@triton.jit
def _dropped(value, row, k, seed, dropout, scale):
    return tl.where(tl.rand(seed, row + k) >= dropout, value * scale, 0.0)


@triton.jit
def _box_origin(
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
    y, out, i, k, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk,
    BOX_H: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    # out[k, i] for filters k of group g and flat pixels i of the box at (n, p, q).
    i_n = n + i // (BOX_H * BOX_W)
    i_p = p + (i // BOX_W) % BOX_H
    i_q = q + i % BOX_W
    pixels = i_n.to(tl.int64) * stride_yn + i_p.to(tl.int64) * stride_yp + i_q.to(tl.int64) * stride_yq
    inside = (i_n < N) & (i_p < P) & (i_q < Q)
    rows = (g * K + k).to(tl.int64) * stride_yk
    tl.store(y + rows[:, None] + pixels[None, :], out, mask=(k < K)[:, None] & inside[None, :])


# GEMM_M: filters of one group.  GEMM_N: output pixels, a [BOX_N, BOX_H, BOX_W] box of them.
# GEMM_K: (r, s, c), taps that lie outside the image for the whole box are skipped.
# With BOX_H = BOX_W = 1 ("pixel") a box never straddles the border, and stride only moves a coordinate.
# With SHIFT a second product makes the next output column: what its tap s - 1 reads is what tap s of the first reads.
# With HALF a program makes half a box more with the same filters, 192 pixels of 128 + 64: below its box with SHIFT,
# else elsewhere in the same rows.
# Programs from FULL on share the depth of a tile between SPLITS of them; fprop_finish adds what they leave in `parts`.
@triton.jit
def fprop_box(
    x,  # descriptor of [N, H, W, (PARTS * GROUPS,) C], box [BOX_N, BOX_H, BOX_W, (1,) BLOCK_C]
    x_half,  # the same with half a box, or None
    w,  # descriptor of the filters as a matrix: [rows, taps * PARTS * C], box [BLOCK_K, BLOCK_C]; turned if TRANSPOSED
    w2,  # the same with a box of BLOCK_K2 rows, or None
    y,  # descriptor of [N, P, Q, (GROUPS,) K], box [BOX_N, BOX_H, BOX_W, (1,) BLOCK_K]; a pointer if not STORE_BOX
    y2,  # the same with a box of BLOCK_K2 filters, or None
    y_half,  # as y and y2 with half a box, or None
    y2_half,
    bias,  # pointer to [GROUPS * K], or None
    seed,  # of dropout: pointer to one int64, or None
    parts,  # pointer to [tiles from FULL on, SPLITS, BLOCK_K + BLOCK_K2, pixels of a box], or None
    FULL,
    WIDTH,  # columns of w
    WHOLE,  # columns of y that whole boxes make, with HALF and without SHIFT; else 0
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
    SHIFT: tl.constexpr,  # 0, or 1 with BOX_W = 1, BLOCK_K2 = BLOCK_K, stride and dilation 1 along W
    HALF: tl.constexpr,  # 0, or 1 with SPLITS = 1: half the rows with SHIFT, else half the images or columns
):
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    NEXT_K: tl.constexpr = BLOCK_K2 if SHIFT else BLOCK_K + BLOCK_K2
    ROWS: tl.constexpr = BLOCK_K + BLOCK_K2
    BELOW: tl.constexpr = HALF * SHIFT
    HALF_N: tl.constexpr = BOX_N if BELOW else (BOX_N + 1) // 2
    HALF_H: tl.constexpr = BOX_H // 2 if BELOW else BOX_H
    HALF_W: tl.constexpr = BOX_W if BELOW or BOX_N > 1 else BOX_W // 2
    TALL: tl.constexpr = BOX_H + HALF_H * BELOW
    tl.static_assert(SHIFT == 0 or (BOX_W == 1 and DIL_W == 1 and BLOCK_K2 == BLOCK_K))
    tl.static_assert(HALF == 0 or DROPOUT is None)  # half a box takes another column, a linear layer has one
    t = tl.program_id(0)
    part = 0
    shares = 1
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
        k0, g, n, p, q = _box_origin(t, N, P, Q, K, GROUPS, BOX_N, TALL, BOX_W + SHIFT, NEXT_K)
        n_half, p_half, q_half = n, p + BOX_H, q
    h0 = p * stride_h - pad_h
    w0 = q * stride_w - pad_w
    # cdiv rounds towards zero for negatives; the outer maximum makes that harmless.
    r_lo = tl.maximum(0, tl.cdiv(1 - TALL - h0, DIL_H))
    r_hi = tl.minimum(R, tl.maximum(0, tl.cdiv(H - h0, DIL_H)))
    s_lo = tl.maximum(0, tl.cdiv(1 - BOX_W - w0, DIL_W))
    s_hi = tl.minimum(S + SHIFT, tl.maximum(0, tl.cdiv(W - w0, DIL_W)))
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
        products, x_parts, w_parts = _small_products(PARTS if small else 1)
        step = 0
        for _ in tl.range(0, steps * products if small else steps):  # one flat loop: it pipelines across taps
            plane = g + (x_parts & 3) * GROUPS if small else g
            box = _pixel_load(
                x, n, h0 + r * DIL_H, w0 + s * DIL_W, plane, c, C, 0, 0, GROUPS * PARTS, False, PIXELS, BLOCK_C
            )
            if HALF:
                box_half = _pixel_load(
                    x_half, n_half, h_half + r * DIL_H, w_half + s * DIL_W, plane, c, C, 0, 0, GROUPS * PARTS, False,
                    PIXELS // 2, BLOCK_C,
                )  # fmt: skip
            tap = TAP_0 + r * TAP_R + s * TAP_S
            beside = (w_parts & 3) * (K if TRANSPOSED else C) if small else 0
            column = tap * width + beside
            if SHIFT:  # a tap that the filters do not have lies beyond the matrix, and so is zero
                column = tl.where(s < S, column, WIDTH)
            filters = _filter_load(w, g, c, k0, 0, C, K, column, TRANSPOSED)
            acc = tl.dot(filters, box.T, acc, input_precision=PRECISION, out_dtype=ACC)
            if HALF:
                acc_half = tl.dot(filters, box_half.T, acc_half, input_precision=PRECISION, out_dtype=ACC)
            if BLOCK_K2:
                below = BLOCK_K
                if SHIFT:
                    below = 0
                    column = tl.where(s > 0, (tap - TAP_S) * width + beside, WIDTH)
                filters = _filter_load(w2, g, c, k0, below, C, K, column, TRANSPOSED)
                acc2 = tl.dot(filters, box.T, acc2, input_precision=PRECISION, out_dtype=ACC)
                if HALF:
                    acc2_half = tl.dot(filters, box_half.T, acc2_half, input_precision=PRECISION, out_dtype=ACC)
            c, s, r = _next_tap(c, s, r, s_lo, s_hi, C, BLOCK_C)
            if small:
                step, wrap, x_parts, w_parts = _next_product(step, steps, x_parts, w_parts)
                c = tl.where(wrap, c_first, c)
                s = tl.where(wrap, s_first, s)
                r = tl.where(wrap, r_first, r)
        if small:
            acc = _without_infinities(acc)
            if BLOCK_K2:
                acc2 = _without_infinities(acc2)
            if HALF:
                acc_half = _without_infinities(acc_half)
                if BLOCK_K2:
                    acc2_half = _without_infinities(acc2_half)
    if SPLITS > 1:
        if shares > 1:
            i = tl.arange(0, PIXELS)
            slot = parts + ((t - FULL).to(tl.int64) * SPLITS + part) * (ROWS * PIXELS)
            tl.store(slot + (tl.arange(0, BLOCK_K) * PIXELS)[:, None] + i[None, :], acc)
            if BLOCK_K2:
                tl.store(slot + ((BLOCK_K + tl.arange(0, BLOCK_K2)) * PIXELS)[:, None] + i[None, :], acc2)
            return
    k = k0 + tl.arange(0, BLOCK_K)
    image = n + tl.arange(0, PIXELS) // (BOX_H * BOX_W)
    acc = _finished(acc, bias, seed, g, k, image, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
    _store_box(
        y, acc.to(OUT), k0, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk,
        GROUPS, STORE_BOX, BOX_N, BOX_H, BOX_W, BLOCK_K,
    )  # fmt: skip
    if HALF:
        acc_half = _bias_and_activation(acc_half, bias, g, k, K, HAS_BIAS, ACTIVATION)
        _store_box(
            y_half, acc_half.to(OUT), k0, g, n_half, p_half, q_half, N, P, Q, K,
            stride_yn, stride_yp, stride_yq, stride_yk, GROUPS, STORE_BOX, HALF_N, HALF_H, HALF_W, BLOCK_K,
        )  # fmt: skip
    if BLOCK_K2:
        k1 = k0 if SHIFT else k0 + BLOCK_K
        k = k1 + tl.arange(0, BLOCK_K2)
        acc2 = _finished(acc2, bias, seed, g, k, image, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
        _store_box(
            y2, acc2.to(OUT), k1, g, n, p, q + SHIFT, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk,
            GROUPS, STORE_BOX, BOX_N, BOX_H, BOX_W, BLOCK_K2,
        )  # fmt: skip
        if HALF:
            acc2_half = _bias_and_activation(acc2_half, bias, g, k, K, HAS_BIAS, ACTIVATION)
            _store_box(
                y2_half, acc2_half.to(OUT), k1, g, n_half, p_half, q_half + SHIFT, N, P, Q, K,
                stride_yn, stride_yp, stride_yq, stride_yk, GROUPS, STORE_BOX, HALF_N, HALF_H, HALF_W, BLOCK_K2,
            )  # fmt: skip


@triton.jit
def _filter_load(w, g, c, k0, below, C, K, column, TRANSPOSED: tl.constexpr):
    # In this order: (k0 + below) + column makes 64 x (128 + 64) tiles of one tap wait for every product.
    if TRANSPOSED:
        return w.load([g * C + c, column + k0 + below]).T
    else:
        return w.load([g * K + k0 + below, column + c])


@triton.jit
def _store_box(
    y, out, k0, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, GROUPS: tl.constexpr,
    STORE_BOX: tl.constexpr, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if not STORE_BOX:
        k = k0 + tl.arange(0, ROWS)
        i = tl.arange(0, BOX_N * BOX_H * BOX_W)
        _store_pixels(
            y, out, i, k, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, BOX_H, BOX_W
        )  # fmt: skip
    elif GROUPS == 1:
        y.store([n, p, q, k0], out.T.reshape(BOX_N, BOX_H, BOX_W, ROWS))
    else:
        y.store([n, p, q, g, k0], out.T.reshape(BOX_N, BOX_H, BOX_W, 1, ROWS))


# y[k, pixel] = activation(bias + parts[0] + parts[1] + ...), always in this order, for the tiles that were shared; with
# dropout as in fprop_box.
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
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    ROWS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides ROWS, and half of it with SHIFT
    BLOCK_P: tl.constexpr,  # divides the pixels of a box
):
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    BLOCKS: tl.constexpr = (ROWS // BLOCK_K) * (PIXELS // BLOCK_P)
    t = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    row = block % (ROWS // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    i = block // (ROWS // BLOCK_K) * BLOCK_P + tl.arange(0, BLOCK_P)
    NEXT_K: tl.constexpr = ROWS // 2 if SHIFT else ROWS
    k0, g, n, p, q = _box_origin(FULL + t, N, P, Q, K, GROUPS, BOX_N, BOX_H, BOX_W + SHIFT, NEXT_K)
    slot = parts + t.to(tl.int64) * (SPLITS * ROWS * PIXELS)
    acc = tl.zeros((BLOCK_K, BLOCK_P), parts.dtype.element_ty)
    for part in tl.range(SPLITS):
        acc += tl.load(slot + part * (ROWS * PIXELS) + (row * PIXELS)[:, None] + i[None, :])
    k = k0 + row
    if SHIFT:  # the rows of the second product are those of the first, one column on
        second = block % (ROWS // BLOCK_K) * BLOCK_K // NEXT_K
        k -= second * NEXT_K
        q += second
    image = n + i // (BOX_H * BOX_W)
    acc = _finished(acc, bias, seed, g, k, image, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
    _store_pixels(
        y, acc.to(OUT), i, k, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, BOX_H, BOX_W
    )  # fmt: skip


@triton.jit
def _multiples(a, b, c, UNIT: tl.constexpr):
    # The same strides, known to the compiler as multiples of UNIT.  Triton itself tells it those of 16: without this it
    # moves the channels of pixels that lie 72 apart one by one.
    return a // UNIT * UNIT, b // UNIT * UNIT, c // UNIT * UNIT


@triton.jit
def _taps_beyond(first, extent, TAPS: tl.constexpr, DILATION: tl.constexpr):
    # Bit t is set where tap t, which reads first + t * DILATION, lies outside [0, extent).
    # cdiv rounds towards zero for negatives; the maximum makes that harmless.
    lo = tl.minimum(tl.maximum(tl.cdiv(-first, DILATION), 0), TAPS)
    hi = tl.minimum(tl.maximum(tl.cdiv(extent - first, DILATION), 0), TAPS)
    return ((1 << TAPS) - 1) ^ ((1 << hi) - (1 << lo))


# GEMM_M: filters of one group.  GEMM_N: flat output pixels (n, p, q).  GEMM_K: (r, s, c).
# Pointers and masks: for GPUs without tensor descriptors and for row pitches that they cannot address.
@triton.jit
def fprop_gather(
    x,  # pointer, any strides
    w,  # pointer, any strides
    y,  # pointer, any strides
    bias,  # pointer to [GROUPS * K], or None
    seed,  # of dropout, as in fprop_box
    N,
    H,
    W,
    P,
    Q,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_wg,
    stride_wk,
    stride_wt,  # from one tap to the next
    stride_wp,  # from one part to the next
    stride_wc,
    stride_yn,
    stride_yp,
    stride_yq,
    stride_yk,
    pad_h,
    pad_w,
    dropout,
    scale,
    C: tl.constexpr,  # channels of one group; constant, so that offsets fold and wide loads are proven aligned
    K: tl.constexpr,  # filters of one group
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    TAP_0: tl.constexpr,
    TAP_R: tl.constexpr,
    TAP_S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    FLAT: tl.constexpr,  # depth is (r, s, c) flattened: few channels would leave a block of c mostly empty
    TRANSPOSED: tl.constexpr,  # stride_wk is 1, else stride_wc
    UNIT_X: tl.constexpr,  # a power of two that divides the strides of x but its channels'
    UNIT_W: tl.constexpr,  # the same for w, but the one that is 1
    UNIT_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,  # of x, GROUPS * C channels apart, and of w
    ACC: tl.constexpr,
    OUT: tl.constexpr,
    INDEX: tl.constexpr,  # tl.int64 where an offset inside one image or filter can pass 2^31
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    stride_xn, stride_xh, stride_xw = _multiples(stride_xn, stride_xh, stride_xw, UNIT_X)
    stride_wg, stride_wt, stride_wp = _multiples(stride_wg, stride_wt, stride_wp, UNIT_W)
    stride_yn, stride_yp, stride_yq = _multiples(stride_yn, stride_yp, stride_yq, UNIT_Y)
    if TRANSPOSED:
        stride_wc = stride_wc // UNIT_W * UNIT_W
    else:
        stride_wk = stride_wk // UNIT_W * UNIT_W
    t = tl.program_id(0)
    n_k = tl.cdiv(K, BLOCK_K)
    k0 = (t % n_k) * BLOCK_K
    t = t // n_k
    g = t % GROUPS
    i = tl.cast(t // GROUPS, INDEX) * PIXELS + tl.arange(0, PIXELS)
    q = (i % Q).to(tl.int32)
    row = i // Q
    p = (row % P).to(tl.int32)
    n = (row // P).to(tl.int64)
    inside_y = n < N
    h0 = p * STRIDE_H - pad_h
    w0 = q * STRIDE_W - pad_w
    pixel_x = n * stride_xn + h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
    k = k0 + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_C)
    inside_k = k < K
    x_rows = x + (g.to(tl.int64) * C * stride_xc + pixel_x)
    w_rows = w + (g.to(tl.int64) * stride_wg + k.to(tl.int64) * stride_wk)
    x_part = GROUPS * C * stride_xc
    acc = tl.zeros((BLOCK_K, PIXELS), ACC)
    if FLAT:
        for d0 in tl.range(0, R * S * C, BLOCK_C):
            flat = d0 + d
            c = flat % C
            tap = flat // C
            r = tap // S
            s = tap % S
            h = h0[:, None] + r[None, :] * DIL_H
            v = w0[:, None] + s[None, :] * DIL_W
            inside = (h >= 0) & (h < H) & (v >= 0) & (v < W) & inside_y[:, None] & (r < R)[None, :]
            shift = (r * DIL_H).to(INDEX) * stride_xh + (s * DIL_W).to(INDEX) * stride_xw + c.to(INDEX) * stride_xc
            column = (TAP_0 + r * TAP_R + s * TAP_S).to(INDEX) * stride_wt + c.to(INDEX) * stride_wc
            x_at, w_at = x_rows[:, None] + shift[None, :], w_rows[:, None] + column[None, :]
            inside_w = inside_k[:, None] & (r < R)[None, :]
            if PARTS == 1:
                pixels = tl.load(x_at, mask=inside, other=0.0)
                filters = tl.load(w_at, mask=inside_w, other=0.0)
                acc = tl.dot(filters, pixels.T, acc, input_precision=PRECISION, out_dtype=ACC)
            else:
                acc += _dot_parts(w_at, inside_w, stride_wp, x_at, inside, x_part, PARTS, ACC)
    else:
        x_ptrs = x_rows[:, None] + d.to(INDEX)[None, :] * stride_xc
        w_ptrs = w_rows[:, None] + d.to(INDEX)[None, :] * stride_wc
        # Worked out once: in the loop one test of bits takes the place of two sums and four comparisons a pixel.
        IN_BITS: tl.constexpr = R + S < 32
        if IN_BITS:
            beyond = tl.where(inside_y, _taps_beyond(h0, H, R, DIL_H) | (_taps_beyond(w0, W, S, DIL_W) << R), -1)
        # What holds for all is left out: every conjunct of a mask is an instruction or two a load.
        rows_w = tl.full((BLOCK_K, BLOCK_C), True, tl.int1)
        if K % BLOCK_K != 0:
            rows_w = tl.broadcast_to(inside_k[:, None], (BLOCK_K, BLOCK_C))
        # The maximum, with a number below it, hides a constant: LLVM would unroll 9 or 18 steps whole, and ptxas spill.
        steps = tl.maximum(R * S * tl.cdiv(C, BLOCK_C), -N)
        # The filters' offset is carried, as taps may lie backwards: c, s or r goes on, what is before it goes back.
        column = tl.cast(TAP_0, INDEX) * stride_wt
        next_c = tl.cast(BLOCK_C, INDEX) * stride_wc
        back = next_c * (tl.cdiv(C, BLOCK_C) - 1)
        next_s = tl.cast(TAP_S, INDEX) * stride_wt - back
        next_r = tl.cast(TAP_R - (S - 1) * TAP_S, INDEX) * stride_wt - back
        c, s, r = 0, 0, 0
        for _ in tl.range(0, steps):
            if IN_BITS:
                inside = (beyond & ((1 << r) | ((1 << R) << s))) == 0
            else:
                h = h0 + r * DIL_H
                v = w0 + s * DIL_W
                inside = inside_y & (h >= 0) & (h < H) & (v >= 0) & (v < W)
            shift = tl.cast(r * DIL_H, INDEX) * stride_xh + tl.cast(s * DIL_W, INDEX) * stride_xw
            x_at, w_at = x_ptrs + (shift + tl.cast(c, INDEX) * stride_xc), w_ptrs + column
            inside_x = tl.broadcast_to(inside[:, None], (PIXELS, BLOCK_C))
            inside_w = rows_w
            if C % BLOCK_C != 0:
                inside_c = d < C - c
                inside_x, inside_w = inside_x & inside_c[None, :], inside_w & inside_c[None, :]
            if PARTS == 1:
                pixels = tl.load(x_at, mask=inside_x, other=0.0)
                filters = tl.load(w_at, mask=inside_w, other=0.0)
                acc = tl.dot(filters, pixels.T, acc, input_precision=PRECISION, out_dtype=ACC)
            else:
                acc += _dot_parts(w_at, inside_w, stride_wp, x_at, inside_x, x_part, PARTS, ACC)
            c, s, r = _next_tap(c, s, r, 0, S, C, BLOCK_C)
            column += tl.where(c > 0, next_c, tl.where(s > 0, next_s, next_r))
    acc = _finished(acc, bias, seed, g, k, n, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
    pixel_y = n * stride_yn + p.to(tl.int64) * stride_yp + q.to(tl.int64) * stride_yq
    rows = (g * K + k).to(tl.int64) * stride_yk
    tl.store(y + rows[:, None] + pixel_y[None, :], acc.to(OUT), mask=inside_k[:, None] & inside_y[None, :])


# GEMM_M: filters of one group.  GEMM_N: channels of one group, for one tap (r, s) or two.  GEMM_K: output pixels, of
# which every split takes an equal run and writes its own slice of dw; pixels whose taps lie in padding are skipped.
# BLOCK_K2 more filters, and a second tap or half as many channels more, share what is loaded: at most four products.
@triton.jit
def wgrad_box(
    x,  # descriptor of [N, H, W, (PARTS * GROUPS,) C]; with PIXEL of [N, all of an image], box [BOX_N, BLOCK_C]
    x_half,  # the same with half the channels, or None
    dy,  # descriptor of [N, P, Q, (PARTS * GROUPS,) K]; with PIXEL of [N, all of an image], box [BOX_N, BLOCK_K]
    dy2,  # the same with a box of BLOCK_K2 filters, or None
    dw,  # pointer to [SPLITS, GROUPS * K, R * S, C]
    N,
    H,
    W,
    P,
    Q,
    C,  # channels of one group
    K,  # filters of one group
    pitch_xh,  # from one row of x to the next, in elements (PIXEL)
    pitch_xw,
    pitch_yp,
    pitch_yq,
    pad_h,
    pad_w,
    stride_h,
    stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    TAPS: tl.constexpr,  # 1 or 2
    PIXEL: tl.constexpr,  # 1: one pixel of BOX_N images: no box straddles an edge, so both operands are matrices
    # 2: the same, and the descriptors are of [all of an image, N], box [BLOCK, BOX_N]
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,  # of x and dy
    ACC: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HALF: tl.constexpr,  # 0, or 1 with TAPS = 1
):
    ROWS: tl.constexpr = BLOCK_K + BLOCK_K2
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    PLANES: tl.constexpr = GROUPS * PARTS
    COLUMNS: tl.constexpr = BLOCK_C + BLOCK_C // 2 * HALF
    t = tl.program_id(0)
    n_c = tl.cdiv(C, COLUMNS)
    n_k = tl.cdiv(K, ROWS)
    n_t = tl.cdiv(R * S, TAPS)
    k0 = (t % n_k) * ROWS
    t = t // n_k
    c0 = (t % n_c) * COLUMNS
    t = t // n_c
    tap = (t % n_t) * TAPS
    t = t // n_t
    g = t % GROUPS
    split = t // GROUPS
    h_tap = (tap // S) * DIL_H - pad_h
    w_tap = (tap % S) * DIL_W - pad_w
    p_lo, p_hi = _inside(h_tap, H, P, stride_h, BOX_H)
    q_lo, q_hi = _inside(w_tap, W, Q, stride_w, BOX_W)
    h_tap2 = h_tap
    w_tap2 = w_tap
    if TAPS == 2:
        tap2 = tl.minimum(tap + 1, R * S - 1)  # an odd number of taps: the last one twice, and not stored again
        h_tap2 = (tap2 // S) * DIL_H - pad_h
        w_tap2 = (tap2 % S) * DIL_W - pad_w
        lo, hi = _inside(h_tap2, H, P, stride_h, BOX_H)
        p_lo, p_hi = tl.minimum(p_lo, lo), tl.maximum(p_hi, hi)
        lo, hi = _inside(w_tap2, W, Q, stride_w, BOX_W)
        q_lo, q_hi = tl.minimum(q_lo, lo), tl.maximum(q_hi, hi)
    n_n = tl.cdiv(N, BOX_N)
    n_q = tl.maximum(q_hi - q_lo, 1)
    steps = n_n * tl.maximum(q_hi - q_lo, 0) * tl.maximum(p_hi - p_lo, 0)
    share = tl.cdiv(steps, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, steps)
    steps = end - begin
    n_first = (begin % n_n) * BOX_N
    q_first = q_lo + (begin // n_n) % n_q
    p_first = p_lo + begin // n_n // n_q
    acc = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    if BLOCK_K2:
        low = tl.zeros((BLOCK_K2, BLOCK_C), ACC)
    if TAPS == 2:
        acc2 = tl.zeros((BLOCK_K, BLOCK_C), ACC)
        if BLOCK_K2:
            low2 = tl.zeros((BLOCK_K2, BLOCK_C), ACC)
    if HALF:
        acc_half = tl.zeros((BLOCK_K, BLOCK_C // 2), ACC)
        if BLOCK_K2:
            low_half = tl.zeros((BLOCK_K2, BLOCK_C // 2), ACC)
    for small in tl.static_range(PARTS > 1, -1, -1):
        n, q, p = n_first, q_first, p_first
        products, x_parts, y_parts = _small_products(PARTS if small else 1)
        step = 0
        for _ in tl.range(begin, begin + steps * products if small else end):
            i = p * BOX_H
            j = q * BOX_W
            plane = g + (y_parts & 3) * GROUPS if small else g
            grad = _pixel_load(dy, n, i, j, plane, k0, K, pitch_yp, pitch_yq, PLANES, PIXEL, PIXELS, BLOCK_K)
            if BLOCK_K2:
                k1 = k0 + BLOCK_K
                grad2 = _pixel_load(dy2, n, i, j, plane, k1, K, pitch_yp, pitch_yq, PLANES, PIXEL, PIXELS, BLOCK_K2)
            h = i * stride_h + h_tap
            w = j * stride_w + w_tap
            m = n
            if TAPS == 2 and PIXEL:  # no box, so no border: images from N on read as zero
                m = tl.where((h >= 0) & (h < H) & (w >= 0) & (w < W), n, N)
            plane = g + (x_parts & 3) * GROUPS if small else g
            box = _pixel_load(x, m, h, w, plane, c0, C, pitch_xh, pitch_xw, PLANES, PIXEL, PIXELS, BLOCK_C)
            acc = tl.dot(grad.T, box, acc, input_precision=PRECISION, out_dtype=ACC)
            if BLOCK_K2:
                low = tl.dot(grad2.T, box, low, input_precision=PRECISION, out_dtype=ACC)
            if HALF:
                box = _pixel_load(
                    x_half, m, h, w, plane, c0 + BLOCK_C, C, pitch_xh, pitch_xw, PLANES, PIXEL, PIXELS, BLOCK_C // 2
                )
                acc_half = tl.dot(grad.T, box, acc_half, input_precision=PRECISION, out_dtype=ACC)
                if BLOCK_K2:
                    low_half = tl.dot(grad2.T, box, low_half, input_precision=PRECISION, out_dtype=ACC)
            if TAPS == 2:
                h = i * stride_h + h_tap2
                w = j * stride_w + w_tap2
                m = n
                if PIXEL:
                    m = tl.where((h >= 0) & (h < H) & (w >= 0) & (w < W), n, N)
                box = _pixel_load(x, m, h, w, plane, c0, C, pitch_xh, pitch_xw, PLANES, PIXEL, PIXELS, BLOCK_C)
                acc2 = tl.dot(grad.T, box, acc2, input_precision=PRECISION, out_dtype=ACC)
                if BLOCK_K2:
                    low2 = tl.dot(grad2.T, box, low2, input_precision=PRECISION, out_dtype=ACC)
            n += BOX_N
            wrap = n >= N
            n = tl.where(wrap, 0, n)
            q = tl.where(wrap, q + 1, q)
            wrap = q >= q_hi
            q = tl.where(wrap, q_lo, q)
            p = tl.where(wrap, p + 1, p)
            if small:
                step, wrap, x_parts, y_parts = _next_product(step, steps, x_parts, y_parts)
                n = tl.where(wrap, n_first, n)
                q = tl.where(wrap, q_first, q)
                p = tl.where(wrap, p_first, p)
        if small:
            acc = _without_infinities(acc)
            if BLOCK_K2:
                low = _without_infinities(low)
            if HALF:
                acc_half = _without_infinities(acc_half)
                if BLOCK_K2:
                    low_half = _without_infinities(low_half)
            if TAPS == 2:
                acc2 = _without_infinities(acc2)
                if BLOCK_K2:
                    low2 = _without_infinities(low2)
    c = c0 + tl.arange(0, BLOCK_C)
    first = dw + (split * GROUPS + g).to(tl.int64) * K * (R * S) * C
    _store_filters(first, acc, k0, K, c, C, tap, R * S, BLOCK_K)
    if BLOCK_K2:
        _store_filters(first, low, k0 + BLOCK_K, K, c, C, tap, R * S, BLOCK_K2)
    if TAPS == 2:
        _store_filters(first, acc2, k0, K, c, C, tap + 1, R * S, BLOCK_K)
        if BLOCK_K2:
            _store_filters(first, low2, k0 + BLOCK_K, K, c, C, tap + 1, R * S, BLOCK_K2)
    if HALF:
        c = c0 + BLOCK_C + tl.arange(0, BLOCK_C // 2)
        _store_filters(first, acc_half, k0, K, c, C, tap, R * S, BLOCK_K)
        if BLOCK_K2:
            _store_filters(first, low_half, k0 + BLOCK_K, K, c, C, tap, R * S, BLOCK_K2)


@triton.jit
def _inside(tap, extent, outputs, stride, BOX: tl.constexpr):
    # Boxes [lo, hi) of outputs p that hold one whose input p * stride + tap is inside the image.
    lo = tl.maximum(0, tl.cdiv(-tap, stride)) // BOX
    hi = tl.cdiv(tl.minimum(outputs, tl.maximum(0, tl.cdiv(extent - tap, stride))), BOX)
    return lo, hi


@triton.jit
def _pixel_load(
    image, n, h, w, g, c0, C, pitch_h, pitch_w, GROUPS: tl.constexpr, PIXEL: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if PIXEL == 2:
        box = image.load([h * pitch_h + w * pitch_w + g * C + c0, n]).T
    elif PIXEL:
        box = image.load([n, h * pitch_h + w * pitch_w + g * C + c0])
    elif GROUPS == 1:
        box = image.load([n, h, w, c0]).reshape(PIXELS, BLOCK)
    else:
        box = image.load([n, h, w, g, c0]).reshape(PIXELS, BLOCK)
    return box


@triton.jit
def _store_filters(dw, acc, k0, K, c, C, tap, TAPS_ALL: tl.constexpr, ROWS: tl.constexpr):
    k = k0 + tl.arange(0, ROWS)
    inside = ((k < K) & (tap < TAPS_ALL))[:, None] & (c < C)[None, :]
    tl.store(dw + (k.to(tl.int64) * TAPS_ALL + tap)[:, None] * C + c[None, :], acc.to(dw.dtype.element_ty), mask=inside)


@triton.jit
def _below(i, extent):
    # 0 <= i < extent, in one comparison.
    return i.to(tl.uint32, bitcast=True) < tl.cast(extent, tl.uint32)


@triton.jit
def _add_gradients(
    acc, grad_at, inside_y, y_part, patches, inside_x, x_part, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # grad_at [filters, pixels] and patches [pixels, columns] point at one step's operands.
    if PARTS == 1:
        patch = tl.load(patches, mask=inside_x, other=0.0)
        grad = tl.load(grad_at, mask=inside_y, other=0.0)
        return tl.dot(grad, patch, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        return acc + _dot_parts(grad_at, inside_y, y_part, patches.T, inside_x.T, x_part, PARTS, ACC)


# GEMM_M: filters of one group.  GEMM_N: (r, s, c) flattened.  GEMM_K: output pixels, split as above.  A step takes one
# output pixel of PIXELS images where those divide the batch: its taps are then the same for all rows of the step, and
# so are its masks, where flat pixels (n, p, q) each take three divisions and masks of their own.
@triton.jit
def wgrad_gather(
    x,  # pointer, any strides
    dy,  # pointer, any strides
    dw,  # pointer to [SPLITS, GROUPS * K, R * S * C]
    N,
    H,
    W,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_yn,
    stride_yp,
    stride_yq,
    stride_yk,
    pad_h,
    pad_w,
    P: tl.constexpr,  # constants, because every pixel is divided by them
    Q: tl.constexpr,
    C: tl.constexpr,  # channels of one group
    K: tl.constexpr,  # filters of one group
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,  # of x and dy, GROUPS * C and GROUPS * K channels apart
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT_X: tl.constexpr,  # a power of two that divides the strides of x but its channels'
    UNIT_Y: tl.constexpr,
    IMAGES: tl.constexpr,  # whether PIXELS divides N
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    stride_xn, stride_xh, stride_xw = _multiples(stride_xn, stride_xh, stride_xw, UNIT_X)
    stride_yn, stride_yp, stride_yq = _multiples(stride_yn, stride_yp, stride_yq, UNIT_Y)
    t = tl.program_id(0)
    n_k = tl.cdiv(K, BLOCK_K)
    n_d = tl.cdiv(R * S * C, BLOCK_C)
    k0 = (t % n_k) * BLOCK_K
    t = t // n_k
    d = (t % n_d) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = t // n_d
    g = t % GROUPS
    split = t // GROUPS
    k = k0 + tl.arange(0, BLOCK_K)
    c = d % C
    h_tap = (d // C // S) * DIL_H - pad_h
    w_tap = (d // C % S) * DIL_W - pad_w
    column = h_tap.to(INDEX) * stride_xh + w_tap.to(INDEX) * stride_xw + (g * C + c).to(INDEX) * stride_xc
    grads = dy + (g * K + k).to(INDEX)[:, None] * stride_yk
    inside_d = d < R * S * C
    inside_k = k < K
    # What holds for all is left out of the loop's masks.
    columns_x = tl.full((PIXELS, BLOCK_C), True, tl.int1)
    if (R * S * C) % BLOCK_C != 0:
        columns_x = tl.broadcast_to(inside_d[None, :], (PIXELS, BLOCK_C))
    rows_y = tl.full((BLOCK_K, PIXELS), True, tl.int1)
    if K % BLOCK_K != 0:
        rows_y = tl.broadcast_to(inside_k[:, None], (BLOCK_K, PIXELS))
    x_part, y_part = GROUPS * C * stride_xc, GROUPS * K * stride_yk
    steps = tl.cdiv(N * P * Q, PIXELS)
    share = tl.cdiv(steps, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, steps)
    acc = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    if IMAGES:
        image = tl.arange(0, PIXELS).to(INDEX)
        patches = x + (image * stride_xn)[:, None] + column[None, :]
        grads += (image * stride_yn)[None, :]
        q, p, n = begin % Q, begin // Q % P, begin // (P * Q) * PIXELS
        for _ in tl.range(begin, end):
            h, w = p * STRIDE_H, q * STRIDE_W
            inside = _below(h + h_tap, H) & _below(w + w_tap, W)
            at = tl.cast(n, INDEX) * stride_xn + tl.cast(h, INDEX) * stride_xh + tl.cast(w, INDEX) * stride_xw
            at_y = tl.cast(n, INDEX) * stride_yn + tl.cast(p, INDEX) * stride_yp + tl.cast(q, INDEX) * stride_yq
            acc = _add_gradients(
                acc, grads + at_y, rows_y, y_part, patches + at, columns_x & inside[None, :], x_part,
                PRECISION, PARTS, ACC,
            )  # fmt: skip
            q += 1
            wrap = q == Q
            q = tl.where(wrap, 0, q)
            p = tl.where(wrap, p + 1, p)
            wrap = p == P
            p = tl.where(wrap, 0, p)
            n = tl.where(wrap, n + PIXELS, n)
    else:
        for step in tl.range(begin, end):
            i = tl.cast(step, INDEX) * PIXELS + tl.arange(0, PIXELS)
            q = (i % Q).to(tl.int32)
            p = (i // Q % P).to(tl.int32)
            n = i // Q // P
            inside = (n < N)[:, None] & _below((p * STRIDE_H)[:, None] + h_tap[None, :], H)
            inside = inside & _below((q * STRIDE_W)[:, None] + w_tap[None, :], W)
            pixel = n * stride_xn + (p * STRIDE_H).to(INDEX) * stride_xh + (q * STRIDE_W).to(INDEX) * stride_xw
            patches = x + pixel[:, None] + column[None, :]
            pixel_y = n * stride_yn + p.to(INDEX) * stride_yp + q.to(INDEX) * stride_yq
            # Read as it is multiplied: turned afterwards, Triton fetches it through registers on sm_80.
            acc = _add_gradients(
                acc, grads + pixel_y[None, :], rows_y & (n < N)[None, :], y_part, patches, columns_x & inside, x_part,
                PRECISION, PARTS, ACC,
            )  # fmt: skip
    rows = ((split * GROUPS + g).to(tl.int64) * K + k) * (R * S * C)
    inside = inside_k[:, None] & inside_d[None, :]
    tl.store(dw + rows[:, None] + d[None, :], acc.to(dw.dtype.element_ty), mask=inside)
