"""First layers without padding, straight from an image whose rows start at any address.

As device/runs.py, but no window reaches beyond its row, so nothing that a filter meets needs a mask.  Where a row
starts beside a multiple of ALIGN elements, its runs start up to ALIGN - 1 elements early, and the filters have as many
zeros more before them.  How many, follows from channel, filter row and the image's class, its number modulo CLASSES:
one matrix of filters for each class, and a program's images are all of one.
"""

import triton
import triton.language as tl

from tileconv.kernels.device.runs import finish, has_nan


# For each place in the depth, (c, r, e) with e inside a run: its element, from the first one of an image of class 0 on
# (a multiple of ALIGN for every ALIGN of them), and the filter's column there, any number outside of 0 .. S.
@triton.jit
def _places(
    d0,
    d,
    cls,
    stride_xn,
    stride_xc,
    stride_xh,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    DIL_H: tl.constexpr,
    INDEX: tl.constexpr,
):
    group = d0 // ALIGN + d // ALIGN
    run = group // (RUN // ALIGN)
    first = group % (RUN // ALIGN) * ALIGN
    known = run < C * R
    run = tl.where(known, run, 0)
    c = (run // R).to(INDEX)
    r = (run % R * DIL_H).to(INDEX)
    start = tl.cast(cls, INDEX) * stride_xn + c * stride_xc + r * stride_xh
    shift = (start % ALIGN).to(tl.int32)
    # What no filter meets may lie outside of the image's memory: the run's first elements stand in.
    known = known & (first < S + shift)
    near = tl.where(known, first, 0)
    at = (start // ALIGN + near // ALIGN) * ALIGN + d % ALIGN
    s = tl.where(known, first + d % ALIGN - shift, -1)
    return at, s


# Sums of the output pixels `first` and after it, of their class: [BLOCK_K, PIXELS] and, as in device/runs.py, those of
# BLOCK_K2 filters more.  EXACT reads what the filters meet and nothing beside it, element by element.
@triton.jit
def _sums(
    x,
    filters,  # pointer to the class's matrix
    k0,  # the first filter
    K,
    first,
    cls,
    N,
    stride_xn,
    stride_xc,
    stride_xh,
    step_xn,
    step_xp,
    DEPTH,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    CLASSES: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    TURNED: tl.constexpr,
    EXACT: tl.constexpr,
):
    i = first + tl.arange(0, PIXELS)
    m = i // Q // P
    m = tl.where(m * CLASSES + cls < N, m, 0)  # read, and not stored
    start = (m * step_xn + (i // Q % P) * step_xp + i % Q * (STRIDE_W // ALIGN)) * ALIGN
    d = tl.arange(0, BLOCK_C)
    k = k0 + tl.arange(0, BLOCK_K)
    acc = tl.zeros((PIXELS, BLOCK_K) if EXACT else (BLOCK_K, PIXELS), ACC)
    if BLOCK_K2 > 0:
        k2 = k0 + BLOCK_K + tl.arange(0, BLOCK_K2)
        acc2 = tl.zeros((PIXELS, BLOCK_K2) if TURNED or EXACT else (BLOCK_K2, PIXELS), ACC)
    for d0 in tl.range(0, DEPTH, BLOCK_C, num_stages=1 if EXACT else None):
        at, s = _places(d0, d, cls, stride_xn, stride_xc, stride_xh, C, R, S, RUN, ALIGN, DIL_H, INDEX)
        at = x + (start[:, None] + at[None, :])
        pixels = tl.load(at, mask=((s >= 0) & (s < S))[None, :], other=0.0) if EXACT else tl.load(at)
        a = tl.load((filters + k.to(INDEX) * DEPTH)[:, None] + (d0 + d)[None, :], mask=(k < K)[:, None], other=0.0)
        if EXACT:  # fewer than 64 rows: mma.sync, which needs no waiting for what is written to shared memory
            acc = tl.dot(pixels, a.T, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(a, pixels.T, acc, input_precision=PRECISION, out_dtype=ACC)
        if BLOCK_K2 > 0:
            a2 = tl.load(
                (filters + k2.to(INDEX) * DEPTH)[:, None] + (d0 + d)[None, :], mask=(k2 < K)[:, None], other=0.0
            )
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
def fprop_inner_runs(
    x,  # pointer to [N, C, H, W], W contiguous, at a multiple of ALIGN elements
    w,  # pointer to [CLASSES, K, DEPTH], zero where a run meets no filter
    y,  # pointer, any strides
    bias,  # pointer to [K], or None
    N,
    K,
    stride_xn,
    stride_xc,
    stride_xh,
    step_xn,  # from an image to the next of its class, in units of ALIGN elements
    step_xp,  # from a row of outputs to the next, likewise
    stride_yn,
    stride_yp,
    stride_yq,
    stride_yk,
    DEPTH,  # no constant: short loops would be unrolled out of their pipeline
    P: tl.constexpr,  # constants, because every pixel is divided by them
    Q: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    CLASSES: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    OUT: tl.constexpr,
    INDEX: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    TURNED: tl.constexpr,
):
    FEW: tl.constexpr = 16
    t = tl.program_id(0)
    n_k = tl.cdiv(K, BLOCK_K + BLOCK_K2)
    k0 = (t % n_k) * (BLOCK_K + BLOCK_K2)
    t = t // n_k
    cls = t % CLASSES
    first = tl.cast(t // CLASSES, INDEX) * PIXELS
    filters = w + tl.cast(cls * K, INDEX) * DEPTH
    acc, acc2 = _sums(
        x, filters, k0, K, first, cls, N, stride_xn, stride_xc, stride_xh, step_xn, step_xp, DEPTH, P, Q, C, R, S, RUN,
        ALIGN, CLASSES, STRIDE_W, DIL_H, PRECISION, ACC, INDEX, PIXELS, BLOCK_K, BLOCK_C, BLOCK_K2, TURNED, False,
    )  # fmt: skip
    poisoned = has_nan(acc)
    if BLOCK_K2 > 0:
        poisoned |= has_nan(acc2)
        finish(acc2, y, bias, first, cls, N, k0 + BLOCK_K, K, stride_yn, stride_yp, stride_yq, stride_yk, P, Q, CLASSES,
               HAS_BIAS, ACTIVATION, OUT, PIXELS, False)  # fmt: skip
    finish(acc, y, bias, first, cls, N, k0, K, stride_yn, stride_yp, stride_yq, stride_yk, P, Q, CLASSES, HAS_BIAS,
           ACTIVATION, OUT, PIXELS, False)  # fmt: skip
    # A zero of the filters times what lies beside a window is NaN where that is infinite or NaN: once more, without it.
    if poisoned:
        tl.debug_barrier()  # each thread reads what others wrote
        for some in tl.range(first, first + PIXELS, FEW):
            few, few2 = _sums(
                x, filters, k0, K, some, cls, N, stride_xn, stride_xc, stride_xh, step_xn, step_xp, DEPTH, P, Q, C, R,
                S, RUN, ALIGN, CLASSES, STRIDE_W, DIL_H, PRECISION, ACC, INDEX, FEW, BLOCK_K, 16, BLOCK_K2, TURNED,
                True,
            )  # fmt: skip
            if BLOCK_K2 > 0:
                finish(few2, y, bias, some, cls, N, k0 + BLOCK_K, K, stride_yn, stride_yp, stride_yq, stride_yk, P, Q,
                       CLASSES, HAS_BIAS, ACTIVATION, OUT, FEW, True)  # fmt: skip
            finish(few, y, bias, some, cls, N, k0, K, stride_yn, stride_yp, stride_yq, stride_yk, P, Q, CLASSES,
                   HAS_BIAS, ACTIVATION, OUT, FEW, True)  # fmt: skip


# As wgrad_runs; each program has the rows of one class's images.
@triton.jit
def wgrad_inner_runs(
    x,  # pointer to [N, C, H, W], W contiguous, at a multiple of ALIGN elements
    dy,  # pointer, any strides
    dw,  # pointer to [SPLITS * columns of programs, CLASSES, K, C * R * RUN]
    N,
    P,
    Q,
    K,
    stride_xn,
    stride_xc,
    stride_xh,
    step_xn,
    step_xp,
    stride_yn,
    stride_yp,
    stride_yq,
    stride_yk,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    CLASSES: tl.constexpr,
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
    t = tl.program_id(0)
    n_k = tl.cdiv(K, BLOCK_K)
    k = (t % n_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = t // n_k
    n_d = tl.cdiv(C * R * RUN, BLOCK_C)
    d0 = (t % n_d) * BLOCK_C
    d = tl.arange(0, BLOCK_C)
    slot = t // n_d
    cls = slot % CLASSES
    n_q = tl.cdiv(Q, PIXELS)
    q = slot // CLASSES % n_q * PIXELS + tl.arange(0, PIXELS)
    split = slot // CLASSES // n_q
    at, _ = _places(d0, d, cls, stride_xn, stride_xc, stride_xh, C, R, S, RUN, ALIGN, DIL_H, INDEX)
    start = q.to(INDEX)[:, None] * STRIDE_W + at[None, :]
    grads = dy + k.to(INDEX)[:, None] * stride_yk + q.to(INDEX)[None, :] * stride_yq
    rows = tl.cdiv(N - cls, CLASSES) * P
    share = tl.cdiv(rows, SPLITS)
    begin = split * share
    steps = tl.maximum(tl.minimum(share, rows - begin), 1)  # one of zeros for none, as in conv_steps.one_at_least
    inside_q = (q < Q) & (begin < rows)
    inside_y = (k < K)[:, None] & inside_q[None, :]
    p = begin % P
    m = tl.cast(begin // P, INDEX)
    acc = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    for _ in tl.range(0, steps):
        row = (m * step_xn + tl.cast(p, INDEX) * step_xp) * ALIGN
        patch = tl.load(x + (row + start), mask=inside_q[:, None], other=0.0)
        at_y = (m * CLASSES + cls) * stride_yn + tl.cast(p, INDEX) * stride_yp
        grad = tl.load(grads + at_y, mask=inside_y, other=0.0)
        acc = tl.dot(grad, patch, acc, input_precision=PRECISION, out_dtype=ACC)
        p += 1
        wrap = p >= P
        p = tl.where(wrap, 0, p)
        m = tl.where(wrap, m + 1, m)
    d += d0
    rows = (slot.to(tl.int64) * K + k) * (C * R * RUN)
    tl.store(dw + rows[:, None] + d[None, :], acc, mask=(k < K)[:, None] & (d < C * R * RUN)[None, :])
