"""First layers straight from the image: few channels and an even stride, so that no descriptor fits its pixels.

Depth is counted in runs.  A row of a filter meets a run of neighbouring pixels of one image row and channel; RUN of
them, from LEAD pixels before the filter, start at a multiple of ALIGN pixels.  So they come in loads of ALIGN pixels,
asynchronously, with no rewritten image in between.  Filters are read as [K, (c, r, e)] with zeros where a run is longer
than the filter.
"""

import triton
import triton.language as tl

from tileconv.kernels.device.conv_steps import bias_and_activation

_FAR = tl.constexpr(1 << 29)  # a row that is outside every image


# Sums of the output pixels `first` and after it: [BLOCK_K, PIXELS], and, by a second product, of BLOCK_K2 filters more.
# EXACT reads what the filters meet and nothing beside it, element by element.
@triton.jit
def _sums(
    x,
    filters,  # pointer to the matrix
    k0,  # the first filter
    K,
    first,
    N,
    H,
    W,
    stride_xn,
    stride_xc,
    stride_xh,
    pad_h,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    RUN: tl.constexpr,
    LEAD: tl.constexpr,
    USED: tl.constexpr,
    FIRST: tl.constexpr,
    ALIGN: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # a multiple of RUN
    BLOCK_K2: tl.constexpr,
    TURNED: tl.constexpr,
    EXACT: tl.constexpr,
):
    i = first + tl.arange(0, PIXELS)
    n = i // Q // P
    d = tl.arange(0, BLOCK_C)
    e = d % RUN
    h0 = (i // Q % P).to(tl.int32) * STRIDE_H - pad_h
    v = ((i % Q).to(tl.int32) * STRIDE_W - FIRST)[:, None] + e[None, :]
    start = (n * (stride_xn * ALIGN) + h0.to(INDEX) * (stride_xh * ALIGN))[:, None] + v
    met = (e >= LEAD) & (e < USED) if EXACT else e < (USED + ALIGN - 1) // ALIGN * ALIGN
    # What a run has outside its row reads as zero because its image row is far away: one comparison in the loop.
    inside = (v >= 0) & (v < W * ALIGN) & (n < N)[:, None] & met[None, :]
    h0 = tl.where(inside, h0[:, None], -2 * _FAR)
    k = k0 + tl.arange(0, BLOCK_K)
    rows = (filters + k.to(INDEX) * DEPTH)[:, None] + d[None, :]
    acc = tl.zeros((PIXELS, BLOCK_K) if EXACT else (BLOCK_K, PIXELS), ACC)
    if BLOCK_K2 > 0:
        k2 = k0 + BLOCK_K + tl.arange(0, BLOCK_K2)
        rows2 = (filters + k2.to(INDEX) * DEPTH)[:, None] + d[None, :]
        acc2 = tl.zeros((PIXELS, BLOCK_K2) if TURNED or EXACT else (BLOCK_K2, PIXELS), ACC)
    for d0 in tl.range(0, DEPTH, BLOCK_C, num_stages=1 if EXACT else None):
        run = d0 // RUN + d // RUN
        r = run % R * DIL_H
        shift = tl.cast(run // R, INDEX) * (stride_xc * ALIGN) + r.to(INDEX) * (stride_xh * ALIGN)
        h = h0 + tl.where(run < C * R, r, _FAR)[None, :]
        # A negative row is a large unsigned one.
        pixels = tl.load(x + (start + shift[None, :]), mask=h.to(tl.uint32) < tl.cast(H, tl.uint32), other=0.0)
        a = tl.load(rows + d0, mask=(k < K)[:, None], other=0.0)
        if EXACT:  # fewer than 64 rows: mma.sync, which needs no waiting for what is written to shared memory
            acc = tl.dot(pixels, a.T, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(a, pixels.T, acc, input_precision=PRECISION, out_dtype=ACC)
        if BLOCK_K2 > 0:
            a2 = tl.load(rows2 + d0, mask=(k2 < K)[:, None], other=0.0)
            if TURNED or EXACT:
                acc2 = tl.dot(pixels, a2.T, acc2, input_precision=PRECISION, out_dtype=ACC)
            else:
                acc2 = tl.dot(a2, pixels.T, acc2, input_precision=PRECISION, out_dtype=ACC)
    acc = acc.T if EXACT else acc
    if BLOCK_K2 > 0:
        acc2 = acc2.T if TURNED or EXACT else acc2
    else:
        acc2 = acc
    return acc, acc2


@triton.jit
def has_nan(acc):
    return tl.max((acc != acc).to(tl.int32)) > 0


# Of the images cls, cls + CLASSES, ...; AGAIN replaces NaN alone: what a window without it made keeps its bits.
@triton.jit
def finish(
    acc, y, bias, first, cls, N, k0, K, stride_yn, stride_yp, stride_yq, stride_yk, P: tl.constexpr, Q: tl.constexpr,
    CLASSES: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, OUT: tl.constexpr, PIXELS: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    k = k0 + tl.arange(0, acc.shape[0])
    acc = bias_and_activation(acc, bias, 0, k, K, HAS_BIAS, ACTIVATION)
    i = first + tl.arange(0, PIXELS)
    n = (i // Q // P).to(tl.int64) * CLASSES + cls
    at = n * stride_yn + (i // Q % P).to(tl.int64) * stride_yp + (i % Q).to(tl.int64) * stride_yq
    y += (k.to(tl.int64) * stride_yk)[:, None] + at[None, :]
    inside = (k < K)[:, None] & (n < N)[None, :]
    if AGAIN:
        before = tl.load(y, mask=inside, other=0.0).to(tl.float32)
        inside &= before != before
    tl.store(y, acc.to(OUT), mask=inside)


# GEMM_M: filters.  GEMM_N: flat output pixels (n, p, q).  GEMM_K: (c, r, e), e inside a run.
@triton.jit
def fprop_runs(
    x,  # pointer to [N, C, H, W], W contiguous
    w,  # pointer to [K, DEPTH], zero beyond C * R * RUN
    y,  # pointer, any strides
    bias,  # pointer to [K], or None
    N,
    H,
    W,  # in units of ALIGN pixels, as the strides of x
    K,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_yn,
    stride_yp,
    stride_yq,
    stride_yk,
    pad_h,
    P: tl.constexpr,  # constants, because every pixel is divided by them
    Q: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    RUN: tl.constexpr,
    LEAD: tl.constexpr,
    USED: tl.constexpr,  # pixels of a run up to the filter's end: LEAD + S
    FIRST: tl.constexpr,  # pixels from the first run's start to the image's: pad_w + LEAD
    ALIGN: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    OUT: tl.constexpr,
    INDEX: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # a multiple of RUN
    BLOCK_K2: tl.constexpr,  # filters of a second product on the same pixels: 64 + 32 waste no row of 96
    TURNED: tl.constexpr,  # whether its rows are pixels: Hopper takes rows in 64s, columns in eights
):
    FEW: tl.constexpr = 16
    RUNS: tl.constexpr = RUN if RUN > FEW else FEW
    t = tl.program_id(0)
    n_k = tl.cdiv(K, BLOCK_K + BLOCK_K2)
    k0 = (t % n_k) * (BLOCK_K + BLOCK_K2)
    first = tl.cast(t // n_k, INDEX) * PIXELS
    acc, acc2 = _sums(
        x, w, k0, K, first, N, H, W, stride_xn, stride_xc, stride_xh, pad_h, P, Q, C, R, RUN, LEAD, USED, FIRST,
        ALIGN, STRIDE_H, STRIDE_W, DIL_H, DEPTH, PRECISION, ACC, INDEX, PIXELS, BLOCK_K, BLOCK_C, BLOCK_K2,
        TURNED, False,
    )  # fmt: skip
    poisoned = has_nan(acc)
    if BLOCK_K2 > 0:
        poisoned |= has_nan(acc2)
        finish(acc2, y, bias, first, 0, N, k0 + BLOCK_K, K, stride_yn, stride_yp, stride_yq, stride_yk, P, Q, 1,
               HAS_BIAS, ACTIVATION, OUT, PIXELS, False)  # fmt: skip
    finish(acc, y, bias, first, 0, N, k0, K, stride_yn, stride_yp, stride_yq, stride_yk, P, Q, 1, HAS_BIAS,
           ACTIVATION, OUT, PIXELS, False)  # fmt: skip
    # A zero of the filters times what lies beside a window is NaN where that is infinite or NaN: once more, without it.
    if poisoned:
        tl.debug_barrier()  # each thread reads what others wrote
        for some in tl.range(first, first + PIXELS, FEW):
            few, few2 = _sums(
                x, w, k0, K, some, N, H, W, stride_xn, stride_xc, stride_xh, pad_h, P, Q, C, R, RUN, LEAD, USED, FIRST,
                ALIGN, STRIDE_H, STRIDE_W, DIL_H, DEPTH, PRECISION, ACC, INDEX, FEW, BLOCK_K, RUNS, BLOCK_K2, TURNED,
                True,
            )  # fmt: skip
            if BLOCK_K2 > 0:
                finish(few2, y, bias, some, 0, N, k0 + BLOCK_K, K, stride_yn, stride_yp, stride_yq, stride_yk, P, Q, 1,
                       HAS_BIAS, ACTIVATION, OUT, FEW, True)  # fmt: skip
            finish(few, y, bias, some, 0, N, k0, K, stride_yn, stride_yp, stride_yq, stride_yk, P, Q, 1, HAS_BIAS,
                   ACTIVATION, OUT, FEW, True)  # fmt: skip


# GEMM_M: filters.  GEMM_N: (c, r, e), e inside a run.  GEMM_K: output pixels, PIXELS of one row a step; the rows of all
# images are split between programs, each of which writes its own slice of dw.
@triton.jit
def wgrad_runs(
    x,  # pointer to [N, C, H, W], W contiguous
    dy,  # pointer, any strides
    dw,  # pointer to [SPLITS * columns of programs, K, C * R * RUN]
    N,
    H,
    W,  # in units of ALIGN pixels, as the strides of x
    P,
    Q,
    K,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_yn,
    stride_yp,
    stride_yq,
    stride_yk,
    pad_h,
    C: tl.constexpr,
    R: tl.constexpr,
    RUN: tl.constexpr,
    USED: tl.constexpr,
    FIRST: tl.constexpr,
    ALIGN: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    LOADED: tl.constexpr = (USED + ALIGN - 1) // ALIGN * ALIGN
    IN_BITS: tl.constexpr = ALIGN == 1  # no load of several pixels needs a mask that they share
    tl.static_assert(PIXELS <= 32 or not IN_BITS)
    t = tl.program_id(0)
    n_k = tl.cdiv(K, BLOCK_K)
    k = (t % n_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = t // n_k
    n_d = tl.cdiv(C * R * RUN, BLOCK_C)
    d = (t % n_d) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = t // n_d
    n_q = tl.cdiv(Q, PIXELS)
    q = slot % n_q * PIXELS + tl.arange(0, PIXELS)
    split = slot // n_q
    run = d // RUN
    r = run % R * DIL_H - pad_h
    v = (q * STRIDE_W - FIRST)[:, None] + (d % RUN)[None, :]
    inside = (v >= 0) & (v < W * ALIGN) & (q < Q)[:, None] & ((run < C * R) & (d % RUN < LOADED))[None, :]
    column = tl.cast(run // R, INDEX) * (stride_xc * ALIGN) + r.to(INDEX) * (stride_xh * ALIGN)
    if IN_BITS:
        # A bit for each pixel of a column, and 64-bit offsets whose constants end up in the loads: 9 instructions for
        # each load instead of 13, and few enough registers for 64 x 64 sums a warp.
        bit = 1 << tl.arange(0, PIXELS)
        columns = tl.sum(tl.where(inside, bit[:, None], 0), 0)
        column = (column + d % RUN - FIRST).to(tl.int64)
        start = (tl.arange(0, PIXELS).to(tl.int64) * STRIDE_W)[:, None] + column[None, :]
    else:
        start = v + column[None, :]
        r = tl.where(inside, r[None, :], -2 * _FAR)
    grads = dy + k.to(INDEX)[:, None] * stride_yk + q.to(INDEX)[None, :] * stride_yq
    inside_y = (k < K)[:, None] & (q < Q)[None, :]
    share = tl.cdiv(N * P, SPLITS)
    begin = split * share
    p = begin % P
    n = tl.cast(begin // P, INDEX)
    acc = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    for _ in tl.range(begin, tl.minimum(begin + share, N * P)):
        row = n * (stride_xn * ALIGN) + tl.cast(p * STRIDE_H, INDEX) * (stride_xh * ALIGN)
        h = p * STRIDE_H + r
        inside_x = h.to(tl.uint32) < tl.cast(H, tl.uint32)
        if IN_BITS:
            row += slot % n_q * (PIXELS * STRIDE_W)
            inside_x = (tl.where(inside_x, columns, 0)[None, :] & bit[:, None]) != 0
        patch = tl.load(x + row + start, mask=inside_x, other=0.0)
        grad = tl.load(grads + (n * stride_yn + tl.cast(p, INDEX) * stride_yp), mask=inside_y, other=0.0)
        acc = tl.dot(grad, patch, acc, input_precision=PRECISION, out_dtype=ACC)
        p += 1
        wrap = p >= P
        p = tl.where(wrap, 0, p)
        n = tl.where(wrap, n + 1, n)
    rows = (slot.to(tl.int64) * K + k) * (C * R * RUN)
    tl.store(dw + rows[:, None] + d[None, :], acc, mask=(k < K)[:, None] & (d < C * R * RUN)[None, :])


# out[cls, k, (c, r, e)] = w[k, c, r, e - LEAD - shift], zero outside the filter.  An inner run's shift is where its row
# starts, modulo ALIGN, in images of class cls.
@triton.jit
def filters_to_runs(
    w,  # pointer, any strides
    out,  # pointer to [CLASSES, K, DEPTH]
    SIZE,
    K,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    shift_n,
    shift_c,
    shift_r,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    RUN: tl.constexpr,
    LEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = i % DEPTH
    run = d // RUN
    c = run // R
    r = run % R
    s = d % RUN - LEAD - (i // DEPTH // K * shift_n + c * shift_c + r * shift_r) % ALIGN
    at = (i // DEPTH % K).to(tl.int64) * stride_wk + c * stride_wc + r * stride_wr + s * stride_ws
    inside = (s >= 0) & (s < S) & (run < C * R) & (i < SIZE)
    tl.store(out + i, tl.load(w + at, mask=inside, other=0.0), mask=i < SIZE)


# dw[k, r, s, c] = sums[cls, k, (c, r, s + LEAD + shift)], added up over the classes in order: the way back.
@triton.jit
def runs_to_filters(
    sums,  # pointer to [CLASSES, K, C * R * RUN]
    dw,  # pointer to [K, R, S, C]
    SIZE,
    shift_n,
    shift_c,
    shift_r,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    RUN: tl.constexpr,
    LEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = i % C
    s = i // C % S
    r = i // C // S % R
    at = i // C // S // R * (C * R * RUN) + (c * R + r) * RUN + s + LEAD
    sums_of = SIZE // S * RUN
    value = tl.load(sums + at + (c * shift_c + r * shift_r) % ALIGN, mask=i < SIZE, other=0.0)
    for cls in tl.static_range(1, CLASSES):
        shift = (cls * shift_n + c * shift_c + r * shift_r) % ALIGN
        value += tl.load(sums + cls * sums_of + at + shift, mask=i < SIZE, other=0.0)
    tl.store(dw + i, value.to(dw.dtype.element_ty), mask=i < SIZE)
