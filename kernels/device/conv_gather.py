"""Convolution by pointers and masks, for what tensor descriptors do not reach; the contract is that of conv.py."""

import triton
import triton.language as tl

from tileconv.kernels.device.conv_steps import dot_parts, finished, next_tap


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
# SPLITS programs share the depth of a tile, and fprop_finish adds what they leave in `parts`.
@triton.jit(do_not_specialize=["N"])  # of one image N would be a constant, and with it the number of steps
def fprop_gather(
    x,  # pointer, any strides
    w,  # pointer, any strides
    y,  # pointer, any strides; None with SPLITS
    bias,  # pointer to [GROUPS * K], or None
    seed,  # of dropout, as in fprop_box
    parts,  # pointer to [tiles, SPLITS, BLOCK_K, PIXELS], or None
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
    SPLITS: tl.constexpr,  # 1 with FLAT
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
    if SPLITS > 1:
        part = t % SPLITS
        t = t // SPLITS
        slot = parts + (t.to(tl.int64) * SPLITS + part) * (BLOCK_K * PIXELS)
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
                acc += dot_parts(w_at, inside_w, stride_wp, x_at, inside, x_part, PARTS, ACC)
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
        N_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        SHARE: tl.constexpr = (R * S * N_C + SPLITS - 1) // SPLITS
        steps = SHARE
        if SPLITS > 1:
            begin = part * SHARE
            steps = tl.minimum(R * S * N_C - begin, SHARE)  # below 1 of a program that finds none left
        # The maximum, with a number below it, hides a constant: LLVM would unroll 9 or 18 steps whole, and ptxas spill.
        steps = tl.maximum(steps, -N)
        # The filters' offset is carried, as taps may lie backwards: c, s or r goes on, what is before it goes back.
        column = tl.cast(TAP_0, INDEX) * stride_wt
        next_c = tl.cast(BLOCK_C, INDEX) * stride_wc
        back = next_c * (N_C - 1)
        next_s = tl.cast(TAP_S, INDEX) * stride_wt - back
        next_r = tl.cast(TAP_R - (S - 1) * TAP_S, INDEX) * stride_wt - back
        c, s, r, left = 0, 0, 0, C
        # Counters that begin at zero take 15 instructions a step less: of one tap it is the operands that move instead.
        # Some of its shares spill otherwise (sm_80), and some of its whole tiles if they count no taps (sm_120).
        COUNT_TAPS: tl.constexpr = SPLITS == 1 or R * S > 1
        if SPLITS > 1:
            if COUNT_TAPS:
                c = begin % N_C * BLOCK_C
                s = begin // N_C % S
                r = begin // N_C // S
                column += tl.cast(c, INDEX) * stride_wc + tl.cast(r * TAP_R + s * TAP_S, INDEX) * stride_wt
            else:
                x_ptrs += tl.cast(begin * BLOCK_C, INDEX) * stride_xc
                w_ptrs += tl.cast(begin * BLOCK_C, INDEX) * stride_wc
                left = C - begin * BLOCK_C
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
                inside_c = d < left - c
                inside_x, inside_w = inside_x & inside_c[None, :], inside_w & inside_c[None, :]
            if PARTS == 1:
                pixels = tl.load(x_at, mask=inside_x, other=0.0)
                filters = tl.load(w_at, mask=inside_w, other=0.0)
                acc = tl.dot(filters, pixels.T, acc, input_precision=PRECISION, out_dtype=ACC)
            else:
                acc += dot_parts(w_at, inside_w, stride_wp, x_at, inside_x, x_part, PARTS, ACC)
            if COUNT_TAPS:
                c, s, r = next_tap(c, s, r, 0, S, C, BLOCK_C)
                column += tl.where(c > 0, next_c, tl.where(s > 0, next_s, next_r))
            else:
                c += BLOCK_C
                column += next_c
    if SPLITS > 1:
        tl.store(slot + (tl.arange(0, BLOCK_K) * PIXELS)[:, None] + tl.arange(0, PIXELS)[None, :], acc)
    else:
        acc = finished(acc, bias, seed, g, k, n, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
        pixel_y = n * stride_yn + p.to(tl.int64) * stride_yp + q.to(tl.int64) * stride_yq
        rows = (g * K + k).to(tl.int64) * stride_yk
        tl.store(y + rows[:, None] + pixel_y[None, :], acc.to(OUT), mask=inside_k[:, None] & inside_y[None, :])


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
        return acc + dot_parts(grad_at, inside_y, y_part, patches.T, inside_x.T, x_part, PARTS, ACC)


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
