"""Softmax and cross-entropy: a program owns whole rows and walks along them in blocks.

Tensors are [OUTER, D, INNER]; a row is the D elements of one (outer, inner), m counts the rows.  Rows of up to COLS
elements are read once (ONE), longer ones twice: the first walk keeps a running maximum and a sum scaled to it.
D and the steps from one outer to the next come divided by ALIGN: a factor that the compiler sees widens loads, and of
1000 elements it would only see that they are not a multiple of 16.
"""

import triton
import triton.language as tl


@triton.jit
def _base(peak):
    # What is taken off before exp.  Rows of nothing but -inf keep 0: exp sums to 0, and 0 / 0 is the NaN that they are.
    return tl.where(peak == float("-inf"), 0.0, peak)


# The running maximum and sum of exp(value - maximum) of rows, one block further.  A NaN reaches the sum through exp.
@triton.jit
def _online(peak, total, value):
    new = tl.maximum(peak, tl.max(value, axis=1))
    total = total * tl.exp(peak - _base(new)) + tl.sum(tl.exp(value - _base(new)[:, None]), axis=1)
    return new, total


# y = exp(x - max) / sum, or with LOG x - max - log(sum).
@triton.jit
def softmax_forward(
    x,
    y,
    M,
    D,
    INNER,
    stride_xo,
    stride_xd,
    stride_xi,
    stride_yo,
    stride_yd,
    stride_yi,
    LOG: tl.constexpr,
    ONE: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    D *= ALIGN
    stride_xo *= ALIGN
    stride_yo *= ALIGN
    m = tl.cast(tl.program_id(0), INDEX) * ROWS + tl.arange(0, ROWS)
    o, i = (m // INNER).to(INDEX), (m % INNER).to(INDEX)
    rows_x = x + (o * stride_xo + i * stride_xi)[:, None]
    rows_y = y + (o * stride_yo + i * stride_yi)[:, None]
    d = tl.arange(0, COLS).to(INDEX)[None, :]
    peak = tl.full((ROWS,), float("-inf"), ACC)
    total = tl.zeros((ROWS,), ACC)
    if ONE:
        inside = (m < M)[:, None] & (d < D)
        value = tl.load(rows_x + d * stride_xd, mask=inside, other=float("-inf")).to(ACC)
        peak, total = _online(peak, total, value)
        value = value - _base(peak)[:, None]
        if LOG:
            result = value - tl.log(total)[:, None]
        else:
            result = tl.exp(value) / total[:, None]
        tl.store(rows_y + d * stride_yd, result.to(y.dtype.element_ty), mask=inside)
    else:
        for start in tl.range(0, D, COLS):
            at = d + start
            inside = (m < M)[:, None] & (at < D)
            value = tl.load(rows_x + at * stride_xd, mask=inside, other=float("-inf")).to(ACC)
            peak, total = _online(peak, total, value)
        for start in tl.range(0, D, COLS):
            at = d + start
            inside = (m < M)[:, None] & (at < D)
            value = tl.load(rows_x + at * stride_xd, mask=inside, other=float("-inf")).to(ACC) - _base(peak)[:, None]
            if LOG:
                result = value - tl.log(total)[:, None]
            else:
                result = tl.exp(value) / total[:, None]
            tl.store(rows_y + at * stride_yd, result.to(y.dtype.element_ty), mask=inside)


# dx = y * (dy - sum(dy * y)), or with LOG dy - exp(y) * sum(dy).
@triton.jit
def softmax_backward(
    dy,
    y,
    dx,
    M,
    D,
    INNER,
    stride_go,
    stride_gd,
    stride_gi,
    stride_yo,
    stride_yd,
    stride_yi,
    stride_xo,
    stride_xd,
    stride_xi,
    LOG: tl.constexpr,
    ONE: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    D *= ALIGN
    stride_go *= ALIGN
    stride_xo *= ALIGN
    stride_yo *= ALIGN
    m = tl.cast(tl.program_id(0), INDEX) * ROWS + tl.arange(0, ROWS)
    o, i = (m // INNER).to(INDEX), (m % INNER).to(INDEX)
    rows_g = dy + (o * stride_go + i * stride_gi)[:, None]
    rows_y = y + (o * stride_yo + i * stride_yi)[:, None]
    rows_x = dx + (o * stride_xo + i * stride_xi)[:, None]
    d = tl.arange(0, COLS).to(INDEX)[None, :]
    total = tl.zeros((ROWS,), ACC)
    if ONE:
        inside = (m < M)[:, None] & (d < D)
        grad = tl.load(rows_g + d * stride_gd, mask=inside, other=0.0).to(ACC)
        value = tl.load(rows_y + d * stride_yd, mask=inside, other=0.0).to(ACC)
        if LOG:
            result = grad - tl.exp(value) * tl.sum(grad, axis=1)[:, None]
        else:
            result = value * (grad - tl.sum(grad * value, axis=1)[:, None])
        tl.store(rows_x + d * stride_xd, result.to(dx.dtype.element_ty), mask=inside)
    else:
        for start in tl.range(0, D, COLS):
            at = d + start
            inside = (m < M)[:, None] & (at < D)
            grad = tl.load(rows_g + at * stride_gd, mask=inside, other=0.0).to(ACC)
            if not LOG:
                grad = grad * tl.load(rows_y + at * stride_yd, mask=inside, other=0.0).to(ACC)
            total += tl.sum(grad, axis=1)
        for start in tl.range(0, D, COLS):
            at = d + start
            inside = (m < M)[:, None] & (at < D)
            grad = tl.load(rows_g + at * stride_gd, mask=inside, other=0.0).to(ACC)
            value = tl.load(rows_y + at * stride_yd, mask=inside, other=0.0).to(ACC)
            if LOG:
                result = grad - tl.exp(value) * total[:, None]
            else:
                result = value * (grad - total[:, None])
            tl.store(rows_x + at * stride_xd, result.to(dx.dtype.element_ty), mask=inside)


# What class d of a row counts in its loss: the share B of loss = sum over d of B_d * (log(sum(exp(x))) - x_d).
# Index targets: (1 - smoothing) * w_t at d = t, and smoothing / D * w_d everywhere.  Probabilities: w_d * t'_d.
@triton.jit
def _share(
    target, weight, label, kept, rows_t, at, inside, stride_td, D, smoothing, INDEXED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    if INDEXED:
        share = tl.where(at == label[:, None], 1.0, 0.0).to(ACC)
    else:
        share = tl.load(target + rows_t[:, None] + at * stride_td, mask=inside, other=0.0).to(ACC)
    if SMOOTH:
        share = share * (1.0 - smoothing) + smoothing / D
    if HAS_WEIGHT:
        share = share * tl.load(weight + at, mask=at < D, other=0.0).to(ACC)
    return tl.where(inside & kept[:, None], share, 0.0)


# Per row: losses[0] the loss, losses[1] what it counts in a mean; saved the largest x, log(sum(exp(x - largest))), and
# the sum of B.  The first two added up would round away what the gradient is most sensitive to.
# A label outside the classes makes the loss NaN; nothing is read through it.
@triton.jit
def cross_entropy_forward(
    x,
    target,  # int64 [OUTER, INNER] with INDEXED, else probabilities [OUTER, D, INNER]
    weight,  # [D], or None
    losses,  # [2, M]
    saved,  # [3, M]
    M,
    D,
    INNER,
    stride_xo,
    stride_xd,
    stride_xi,
    stride_to,
    stride_td,
    stride_ti,
    ignore_index,
    smoothing,
    smoothing_rest,  # what fp32, in which numbers are passed, leaves of it
    INDEXED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    smoothing = tl.cast(smoothing, ACC) + smoothing_rest
    D *= ALIGN
    if not INDEXED:
        stride_to *= ALIGN
    stride_xo *= ALIGN
    m = tl.cast(tl.program_id(0), INDEX) * ROWS + tl.arange(0, ROWS)
    o, i = (m // INNER).to(INDEX), (m % INNER).to(INDEX)
    rows_x = x + (o * stride_xo + i * stride_xi)[:, None]
    rows_t = o * stride_to + i * stride_ti
    d = tl.arange(0, COLS).to(INDEX)[None, :]
    kept = m < M
    label = tl.zeros((ROWS,), tl.int64)
    if INDEXED:
        label = tl.load(target + rows_t, mask=m < M, other=0)
        kept = kept & (label != ignore_index)
    peak = tl.full((ROWS,), float("-inf"), ACC)
    total = tl.zeros((ROWS,), ACC)
    for start in tl.range(0, D, COLS):
        at = d + start
        inside = (m < M)[:, None] & (at < D)
        value = tl.load(rows_x + at * stride_xd, mask=inside, other=float("-inf")).to(ACC)
        peak, total = _online(peak, total, value)
    logsum = tl.log(total)
    loss = tl.zeros((ROWS,), ACC)
    mass = tl.zeros((ROWS,), ACC)
    for start in tl.range(0, D, COLS):  # the second read of a row comes from a cache
        at = d + start
        inside = (m < M)[:, None] & (at < D)
        value = tl.load(rows_x + at * stride_xd, mask=inside, other=0.0).to(ACC)
        share = _share(
            target, weight, label, kept, rows_t, at, inside, stride_td, D, smoothing,
            INDEXED, HAS_WEIGHT, SMOOTH, ACC, COLS,
        )  # fmt: skip
        part = share * (logsum[:, None] - (value - _base(peak)[:, None]))
        if INDEXED and not SMOOTH:
            part = tl.where(at == label[:, None], part, 0.0)  # 0 * inf of the other classes is not a NaN
        loss += tl.sum(tl.where(inside & kept[:, None], part, 0.0), axis=1)
        mass += tl.sum(share, axis=1)
    count = tl.where(kept, 1.0, 0.0).to(ACC)
    if INDEXED:
        known = (label >= 0) & (label < D)
        loss = tl.where(kept & (known == 0), float("nan"), loss)
        if HAS_WEIGHT:
            count = tl.load(weight + label, mask=kept & known, other=0.0).to(ACC)
    tl.store(losses + m, loss, mask=m < M)
    tl.store(losses + M + m, count, mask=m < M)
    tl.store(saved + m, _base(peak), mask=m < M)
    tl.store(saved + M + m, logsum, mask=m < M)
    tl.store(saved + 2 * M + m, mass, mask=m < M)


# dx_d = g * (exp(x_d - peak - logsum) * mass - B_d), g the row's gradient over the divisor; with TO_TARGET instead the
# gradient of a probability, g * (1 - smoothing) * w_d * (logsum + peak - x_d).
@triton.jit
def cross_entropy_backward(
    grad,  # one number, or [M] with PER_ROW
    divisor,  # one number
    x,
    target,
    weight,
    saved,  # [3, M]
    dx,
    M,
    D,
    INNER,
    stride_xo,
    stride_xd,
    stride_xi,
    stride_to,
    stride_td,
    stride_ti,
    stride_yo,
    stride_yd,
    stride_yi,
    ignore_index,
    smoothing,
    smoothing_rest,
    PER_ROW: tl.constexpr,
    TO_TARGET: tl.constexpr,
    INDEXED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    smoothing = tl.cast(smoothing, ACC) + smoothing_rest
    D *= ALIGN
    if not INDEXED:
        stride_to *= ALIGN
    stride_xo *= ALIGN
    stride_yo *= ALIGN
    blocks = tl.cdiv(D, COLS)
    m = tl.cast(tl.program_id(0) // blocks, INDEX) * ROWS + tl.arange(0, ROWS)
    at = (tl.cast(tl.program_id(0) % blocks, INDEX) * COLS + tl.arange(0, COLS).to(INDEX))[None, :]
    o, i = (m // INNER).to(INDEX), (m % INNER).to(INDEX)
    rows_t = o * stride_to + i * stride_ti
    kept = m < M
    label = tl.zeros((ROWS,), tl.int64)
    if INDEXED:
        label = tl.load(target + rows_t, mask=m < M, other=0)
        kept = kept & (label != ignore_index)
    if PER_ROW:
        scale = tl.load(grad + m, mask=m < M, other=0.0).to(ACC)
    else:
        scale = tl.load(grad).to(ACC) + tl.zeros((ROWS,), ACC)
    scale = (scale / tl.load(divisor))[:, None]
    inside = (m < M)[:, None] & (at < D)
    value = tl.load(x + (o * stride_xo + i * stride_xi)[:, None] + at * stride_xd, mask=inside, other=0.0).to(ACC)
    value -= tl.load(saved + m, mask=m < M, other=0.0)[:, None]
    logsum = tl.load(saved + M + m, mask=m < M, other=0.0)[:, None]
    if TO_TARGET:
        result = logsum - value
        if SMOOTH:
            result = result * (1.0 - smoothing)
        if HAS_WEIGHT:
            result = result * tl.load(weight + at, mask=at < D, other=0.0).to(ACC)
    else:
        share = _share(
            target, weight, label, kept, rows_t, at, inside, stride_td, D, smoothing,
            INDEXED, HAS_WEIGHT, SMOOTH, ACC, COLS,
        )  # fmt: skip
        mass = tl.load(saved + 2 * M + m, mask=m < M, other=0.0)[:, None]
        result = tl.exp(value - logsum) * mass - share
    result = tl.where(inside & kept[:, None], result * scale, 0.0)
    tl.store(dx + (o * stride_yo + i * stride_yi)[:, None] + at * stride_yd, result.to(dx.dtype.element_ty),
             mask=inside)  # fmt: skip
