"""Filter gradients: a loop of boxes (tensor descriptors) over the output pixels."""

import triton
import triton.language as tl

from tileconv.kernels.device.conv_steps import next_product, pixel_load, small_products, without_infinities


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
    UNIT: tl.constexpr,  # divides C where the compiler cannot see it (multiples of 16), else 0
):
    if UNIT:  # without it addresses of dw spill, for 136 channels of fp16 391 times
        C = C // UNIT * UNIT
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
        products, x_parts, y_parts = small_products(PARTS if small else 1)
        step = 0
        for _ in tl.range(begin, begin + steps * products if small else end):
            i = p * BOX_H
            j = q * BOX_W
            plane = g + (y_parts & 3) * GROUPS if small else g
            grad = pixel_load(dy, n, i, j, plane, k0, K, pitch_yp, pitch_yq, PLANES, PIXEL, PIXELS, BLOCK_K)
            if BLOCK_K2:
                k1 = k0 + BLOCK_K
                grad2 = pixel_load(dy2, n, i, j, plane, k1, K, pitch_yp, pitch_yq, PLANES, PIXEL, PIXELS, BLOCK_K2)
            h = i * stride_h + h_tap
            w = j * stride_w + w_tap
            m = n
            if TAPS == 2 and PIXEL:  # no box, so no border: images from N on read as zero
                m = tl.where((h >= 0) & (h < H) & (w >= 0) & (w < W), n, N)
            plane = g + (x_parts & 3) * GROUPS if small else g
            box = pixel_load(x, m, h, w, plane, c0, C, pitch_xh, pitch_xw, PLANES, PIXEL, PIXELS, BLOCK_C)
            acc = tl.dot(grad.T, box, acc, input_precision=PRECISION, out_dtype=ACC)
            if BLOCK_K2:
                low = tl.dot(grad2.T, box, low, input_precision=PRECISION, out_dtype=ACC)
            if HALF:
                box = pixel_load(
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
                box = pixel_load(x, m, h, w, plane, c0, C, pitch_xh, pitch_xw, PLANES, PIXEL, PIXELS, BLOCK_C)
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
                step, wrap, x_parts, y_parts = next_product(step, steps, x_parts, y_parts)
                n = tl.where(wrap, n_first, n)
                q = tl.where(wrap, q_first, q)
                p = tl.where(wrap, p_first, p)
        if small:
            acc = without_infinities(acc)
            if BLOCK_K2:
                low = without_infinities(low)
            if HALF:
                acc_half = without_infinities(acc_half)
                if BLOCK_K2:
                    low_half = without_infinities(low_half)
            if TAPS == 2:
                acc2 = without_infinities(acc2)
                if BLOCK_K2:
                    low2 = without_infinities(low2)
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
def _store_filters(dw, acc, k0, K, c, C, tap, TAPS_ALL: tl.constexpr, ROWS: tl.constexpr):
    k = k0 + tl.arange(0, ROWS)
    inside = ((k < K) & (tap < TAPS_ALL))[:, None] & (c < C)[None, :]
    tl.store(dw + (k.to(tl.int64) * TAPS_ALL + tap)[:, None] * C + c[None, :], acc.to(dw.dtype.element_ty), mask=inside)
