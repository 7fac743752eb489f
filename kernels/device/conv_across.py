"""Convolution of filters that fill one and a half blocks: 96 of 64 + 32.

Hopper's tensor cores take rows in 64s and columns in eights.  The first product has filters for rows and pixels for
columns, as in conv.py; the second has them the other way round, so that its 32 filters are columns.  Both read one copy
of the pixels: a box of one pixel of many images is the matrix that either side of a product takes as it lies.
"""

import triton
import triton.language as tl

from tileconv.kernels.device.conv import box_origin, filter_load, row_load, store_box
from tileconv.kernels.device.conv_steps import finished, next_tap, one_at_least, pixel_load


# As fprop_box with BOX_W = 1, whose arguments these are; but BOX_H boxes of one row each, stride_h apart.
@triton.jit
def fprop_across(
    x,  # descriptor of [H, W, (GROUPS,) N, C], box [1, 1, (1,) BOX_N, BLOCK_C]
    w,  # descriptors of the filters, as in fprop_box
    w2,
    y,  # descriptors of [N, P, Q, (GROUPS,) K], box [BOX_N, 1, 1, (1,) BLOCK_K or BLOCK_K2]; pointers if not STORE_BOX
    y2,
    bias,  # pointer to [GROUPS * K], or None
    seed,  # of dropout, as in fprop_box
    N,
    H,
    W,
    P,
    Q,
    C,
    K,
    stride_yn,
    stride_yp,
    stride_yq,
    stride_yk,
    pad_h,
    pad_w,
    stride_h,
    stride_w,
    dropout,
    scale,
    R: tl.constexpr,
    S: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    TAP_0: tl.constexpr,
    TAP_R: tl.constexpr,
    TAP_S: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    STORE_BOX: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    OUT: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_K: tl.constexpr,
):
    k0, g, n, p, q = box_origin(tl.program_id(0), N, P, Q, K, GROUPS, BOX_N, BOX_H, COLUMNS, BLOCK_K + BLOCK_K2)
    h0 = p * stride_h - pad_h
    w0 = q * stride_w - pad_w
    r_lo = tl.maximum(0, tl.cdiv(-(BOX_H - 1) * stride_h - h0, DIL_H))
    r_hi = tl.minimum(R, tl.maximum(0, tl.cdiv(H - h0, DIL_H)))
    s_lo = tl.maximum(0, tl.cdiv(-w0, DIL_W))
    s_hi = tl.minimum(S + COLUMNS - 1, tl.maximum(0, tl.cdiv(W - w0, DIL_W)))
    steps = tl.maximum(r_hi - r_lo, 0) * tl.maximum(s_hi - s_lo, 0) * tl.cdiv(C, BLOCK_C)
    steps, r = one_at_least(steps, r_lo, R + tl.maximum(H - h0, 0))
    c, s = 0, s_lo
    upper = ()
    lower = ()
    for _ in tl.static_range(BOX_H):
        upper += (tl.zeros((BLOCK_K, BOX_N), ACC),)
        lower += (tl.zeros((BOX_N, BLOCK_K2), ACC),)
    for _ in tl.range(0, steps):
        boxes = ()
        for i in tl.static_range(BOX_H):
            row = h0 + i * stride_h + r * DIL_H
            boxes += (pixel_load(x, n, row, w0 + s * DIL_W, g, c, GROUPS, True, BOX_N, BLOCK_C),)
        if COLUMNS > 1:
            filters = row_load(w, 0, r, s, g, c, 0, COLUMN_K, S, TAP_0, TAP_R, GROUPS, TRANSPOSED, BLOCK_K, BLOCK_C)
            others = row_load(
                w2, 0, r, s, g, c, BLOCK_K, COLUMN_K, S, TAP_0, TAP_R, GROUPS, TRANSPOSED, BLOCK_K2, BLOCK_C
            )  # fmt: skip
        else:
            column = (TAP_0 + r * TAP_R + s * TAP_S) * (K if TRANSPOSED else C)
            filters = filter_load(w, g, c, k0, 0, C, K, column, GROUPS, TRANSPOSED)
            others = filter_load(w2, g, c, k0, BLOCK_K, C, K, column, GROUPS, TRANSPOSED)
        if TRANSPOSED:
            filters = filters.T
        else:
            others = others.T
        next_upper = ()
        next_lower = ()
        for i in tl.static_range(BOX_H):
            next_upper += (tl.dot(filters, boxes[i].T, upper[i], input_precision=PRECISION, out_dtype=ACC),)
            next_lower += (tl.dot(boxes[i], others, lower[i], input_precision=PRECISION, out_dtype=ACC),)
        upper = next_upper
        lower = next_lower
        c, s, r = next_tap(c, s, r, s_lo, s_hi, C, BLOCK_C)
    for i in tl.static_range(BOX_H):
        _finish(
            y, upper[i], bias, seed, k0, g, n, p + i, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk,
            dropout, scale, GROUPS, HAS_BIAS, ACTIVATION, DROPOUT, STORE_BOX, INDEX, OUT, BOX_N, BLOCK_K, COLUMNS,
            COLUMN_K,
        )  # fmt: skip
        _finish(
            y2, lower[i].T, bias, seed, k0 + BLOCK_K, g, n, p + i, q, N, P, Q, K, stride_yn, stride_yp, stride_yq,
            stride_yk, dropout, scale, GROUPS, HAS_BIAS, ACTIVATION, DROPOUT, STORE_BOX, INDEX, OUT, BOX_N, BLOCK_K2,
            COLUMNS, COLUMN_K,
        )  # fmt: skip


@triton.jit
def _finish(
    y, acc, bias, seed, k0, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, dropout, scale,
    GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    STORE_BOX: tl.constexpr, INDEX: tl.constexpr, OUT: tl.constexpr, BOX_N: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMN_K: tl.constexpr,
):  # fmt: skip
    k = k0 + tl.arange(0, ROWS)
    if COLUMNS > 1:
        k = k % COLUMN_K
    image = n + tl.arange(0, BOX_N)
    acc = finished(acc, bias, seed, g, k, image, K, dropout, scale, HAS_BIAS, ACTIVATION, DROPOUT)
    store_box(
        y, acc.to(OUT), k0, g, n, p, q, N, P, Q, K, stride_yn, stride_yp, stride_yq, stride_yk, GROUPS, STORE_BOX,
        BOX_N, 1, 1, ROWS, INDEX, COLUMNS, COLUMN_K,
    )  # fmt: skip
