"""Convolution, ReLU and max-pool in one kernel: the convolution's output stays in registers.

A value and its place in the pool's window travel as one integer, a key, so that one maximum finds both; keys are
positive, and -1 stands for no element.
"""

import triton
import triton.language as tl

from tileconv.kernels.device.conv import box_origin, store_box
from tileconv.kernels.device.conv_steps import bias_and_activation, next_tap, one_at_least


@triton.jit
def _key(value, place):
    # Ordered like the values, which ReLU has left without a sign; of equals the first place is the largest.  They have
    # their final rounding, so that ties are those of a convolution that wrote them, and the lowest eight bits of a
    # two-byte value's fp32 are free for the place.  -0 is 0.  NaN is above all; a GPU may widen it to all ones.
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    if value.dtype.primitive_bitwidth == 32:
        bits = (bits & 0x7FFFFFFF).to(tl.int64) * 256
    else:
        bits &= 0x7FFFFF00
    return bits + (255 - place)


@triton.jit
def _value_and_place(key, OUT: tl.constexpr):
    low = key & 255
    bits = key - low
    if OUT.primitive_bitwidth == 32:
        bits = (bits >> 8).to(tl.int32)
    return bits.to(tl.float32, bitcast=True).to(OUT), (255 - low).to(tl.uint8)


@triton.jit
def _sums(
    x, w, n, h0, w0, g, k0, H, W, C, K, R: tl.constexpr, S: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # The loop of fprop_box for the pixels whose first tap reads the box at (n, h0, w0).
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    r_lo = tl.maximum(0, tl.cdiv(1 - BOX_H - h0, DIL_H))
    r_hi = tl.minimum(R, tl.maximum(0, tl.cdiv(H - h0, DIL_H)))
    s_lo = tl.maximum(0, tl.cdiv(1 - BOX_W - w0, DIL_W))
    s_hi = tl.minimum(S, tl.maximum(0, tl.cdiv(W - w0, DIL_W)))
    steps = tl.maximum(r_hi - r_lo, 0) * tl.maximum(s_hi - s_lo, 0) * tl.cdiv(C, BLOCK_C)
    steps, r = one_at_least(steps, r_lo, R + tl.maximum(H - h0, 0))
    c, s = 0, s_lo
    acc = tl.zeros((BLOCK_K, PIXELS), tl.float32)
    for _ in tl.range(0, steps):
        if GROUPS == 1:
            box = x.load([n, h0 + r * DIL_H, w0 + s * DIL_W, c]).reshape(PIXELS, BLOCK_C)
        else:
            box = x.load([n, h0 + r * DIL_H, w0 + s * DIL_W, g, c]).reshape(PIXELS, BLOCK_C)
        filters = w.load([g * K + k0, (r * S + s) * C + c])
        acc = tl.dot(filters, box.T, acc, input_precision=PRECISION)
        c, s, r = next_tap(c, s, r, s_lo, s_hi, C, BLOCK_C)
    return acc


# GEMM_M: filters of one group.  GEMM_N: the convolution's output pixels.  GEMM_K: (r, s, c), as in fprop_box.
# Windows that do not overlap: a box holds whole windows, and each column of sums is computed once.
# Others: a box is one place of one window, and the program takes the places in turn, keeping the largest.
@triton.jit
def fprop_pool(
    x,  # descriptor of [N, H, W, (GROUPS,) C], box [BOX_N, BOX_H, BOX_W, (1,) BLOCK_C]
    w,  # descriptor of the filters as a matrix: [K of all groups, taps * C], box [BLOCK_K, BLOCK_C]
    y,  # descriptor of [N, POOLED_P, POOLED_Q, (GROUPS,) K], box of the windows x BLOCK_K; a pointer if not STORE_BOX
    switch,  # likewise: r * WINDOW_W + s of the largest element, one byte; or None
    bias,  # pointer to [GROUPS * K], or None
    N,
    H,
    W,
    P,  # extents of the convolution's output
    Q,
    POOLED_P,
    POOLED_Q,
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
    R: tl.constexpr,
    S: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    GROUPS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    POOL_PAD_H: tl.constexpr,
    POOL_PAD_W: tl.constexpr,
    PARTIAL: tl.constexpr,  # windows may reach beyond the convolution's output
    HAS_BIAS: tl.constexpr,
    STORE_BOX: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,  # rows of windows * WINDOW_H; or 1, and BOX_W 1: one place at a time
    BOX_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    WHOLE: tl.constexpr = BOX_H * BOX_W > 1
    OWN_H: tl.constexpr = BOX_H // WINDOW_H if WHOLE else 1
    OWN_W: tl.constexpr = BOX_W // WINDOW_W if WHOLE else 1
    k0, g, n, pp, pq = box_origin(tl.program_id(0), N, POOLED_P, POOLED_Q, K, GROUPS, BOX_N, OWN_H, OWN_W, BLOCK_K)
    k = k0 + tl.arange(0, BLOCK_K)
    p = pp * STEP_H - POOL_PAD_H
    q = pq * STEP_W - POOL_PAD_W
    if WHOLE:
        acc = _sums(
            x, w, n, p * stride_h - pad_h, q * stride_w - pad_w, g, k0, H, W, C, K, R, S, DIL_H, DIL_W, GROUPS,
            PRECISION, BOX_N, BOX_H, BOX_W, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        i = tl.arange(0, BOX_N * BOX_H * BOX_W)
        i_p = i // BOX_W % BOX_H
        i_q = i % BOX_W
        out = bias_and_activation(acc, bias, g, k, K, HAS_BIAS, "relu").to(OUT)
        key = _key(out, (i_p % WINDOW_H * WINDOW_W + i_q % WINDOW_W)[None, :])
        if PARTIAL:
            inside = (p + i_p >= 0) & (p + i_p < P) & (q + i_q >= 0) & (q + i_q < Q)
            key = tl.where(inside[None, :], key, -1)
        key = key.reshape(BLOCK_K, BOX_N, OWN_H, WINDOW_H, OWN_W, WINDOW_W)
        best = tl.max(tl.max(key, axis=5), axis=3).reshape(BLOCK_K, BOX_N * OWN_H * OWN_W)
    else:
        u_lo = tl.maximum(0, -p)
        v_lo = tl.maximum(0, -q)
        columns = tl.minimum(WINDOW_W, Q - q) - v_lo
        best = tl.full((BLOCK_K, BOX_N), -1, tl.int64 if OUT.primitive_bitwidth == 32 else tl.int32)
        # Two loops: in one flat loop every product would wait for the one before it, because a place ends in it.
        for place in tl.range(0, (tl.minimum(WINDOW_H, P - p) - u_lo) * columns):
            u = u_lo + place // columns
            v = v_lo + place % columns
            acc = _sums(
                x, w, n, (p + u) * stride_h - pad_h, (q + v) * stride_w - pad_w, g, k0, H, W, C, K, R, S, DIL_H, DIL_W,
                GROUPS, PRECISION, BOX_N, BOX_H, BOX_W, BLOCK_K, BLOCK_C,
            )  # fmt: skip
            out = bias_and_activation(acc, bias, g, k, K, HAS_BIAS, "relu").to(OUT)
            best = tl.maximum(best, _key(out, u * WINDOW_W + v))
    value, place = _value_and_place(best, OUT)
    store_box(
        y, value, k0, g, n, pp, pq, N, POOLED_P, POOLED_Q, K, stride_yn, stride_yp, stride_yq, stride_yk,
        GROUPS, STORE_BOX, BOX_N, OWN_H, OWN_W, BLOCK_K,
    )  # fmt: skip
    if switch is not None:
        store_box(
            switch, place, k0, g, n, pp, pq, N, POOLED_P, POOLED_Q, K, stride_yn, stride_yp, stride_yq, stride_yk,
            GROUPS, STORE_BOX, BOX_N, OWN_H, OWN_W, BLOCK_K,
        )  # fmt: skip
