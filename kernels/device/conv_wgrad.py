"""Filter gradients: a loop of boxes (tensor descriptors) over the output pixels."""

import triton
import triton.language as tl

from tileconv.kernels.device.conv_steps import (
    next_product,
    one_at_least,
    pixel_load,
    small_products,
    without_infinities,
)


# GEMM_M: filters of one group.  GEMM_N: channels of one group, for one tap (r, s) to five.  GEMM_K: output pixels, of
# which every split takes an equal run and writes its own slice of dw; pixels whose taps lie in padding are skipped.
# BLOCK_K2 more filters, and more taps or half as many channels more, share what is loaded: a product for each.
# With LAST the taps that are left over, R * S % TAPS, have programs of their own, the last ones: LAST share the pixels,
# and write zeros into the slices that are too many.
@triton.jit
def wgrad_box(
    x,  # descriptor of [N, H, W, (PARTS * GROUPS,) C]; with PIXEL of [H, W, (PARTS * GROUPS,) N, C]
    x_half,  # the same with half the channels, or None
    dy,  # descriptor of [N, P, Q, (PARTS * GROUPS,) K]; with PIXEL of [P, Q, (PARTS * GROUPS,) N, K]
    dy2,  # the same with a box of BLOCK_K2 filters, or None
    dw,  # pointer to [SPLITS, GROUPS * K, R * S, C]
    N,
    H,
    W,
    P,
    Q,
    C,  # channels of one group
    K,  # filters of one group
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
    LAST: tl.constexpr,  # 0, or at most SPLITS where TAPS does not divide R * S
    TAPS: tl.constexpr,  # 1 to 5
    PIXEL: tl.constexpr,  # 1: one pixel of BOX_N images: no box straddles an edge, so both operands are matrices
    # 2: the same, and the descriptors have the images last
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
    ONE_K: tl.constexpr,  # may say that a program makes all filters of a group
    ONE_C: tl.constexpr,  # and all channels
    UNIT: tl.constexpr,  # divides C where the compiler cannot see it (multiples of 16), else 0
):
    if UNIT:  # without it addresses of dw spill, for 136 channels of fp16 391 times
        C = C // UNIT * UNIT
    t = tl.program_id(0)
    WHOLE: tl.constexpr = R * S // TAPS * TAPS if LAST else R * S
    if LAST:
        blocks = tl.cdiv(K, BLOCK_K + BLOCK_K2) * tl.cdiv(C, BLOCK_C)
        before = blocks * (WHOLE // TAPS * GROUPS * SPLITS)
        if t >= before:
            _add_pixels(
                t - before, x, x_half, dy, dy2, dw, N, H, W, P, Q, C, K, pad_h, pad_w, stride_h, stride_w, WHOLE, R * S,
                R, S, DIL_H, DIL_W, GROUPS, LAST, SPLITS, R * S - WHOLE, PIXEL, PRECISION, PARTS, ACC, BOX_N, BOX_H,
                BOX_W, BLOCK_K, BLOCK_K2, BLOCK_C, HALF, ONE_K, ONE_C,
            )  # fmt: skip
            return
    _add_pixels(
        t, x, x_half, dy, dy2, dw, N, H, W, P, Q, C, K, pad_h, pad_w, stride_h, stride_w, 0, WHOLE,
        R, S, DIL_H, DIL_W, GROUPS, SPLITS, SPLITS, TAPS, PIXEL, PRECISION, PARTS, ACC, BOX_N, BOX_H,
        BOX_W, BLOCK_K, BLOCK_K2, BLOCK_C, HALF, ONE_K, ONE_C,
    )  # fmt: skip


@triton.jit
def _add_pixels(
    t, x, x_half, dy, dy2, dw, N, H, W, P, Q, C, K, pad_h, pad_w, stride_h, stride_w, FIRST: tl.constexpr,
    END: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, GROUPS: tl.constexpr,
    SHARES: tl.constexpr, SPLITS: tl.constexpr, TAPS: tl.constexpr, PIXEL: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, ACC: tl.constexpr, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_K2: tl.constexpr, BLOCK_C: tl.constexpr, HALF: tl.constexpr,
    ONE_K: tl.constexpr, ONE_C: tl.constexpr,
):  # fmt: skip
    # Program t of those that make the taps FIRST to END, TAPS each, SHARES of them the same ones of different pixels.
    ROWS: tl.constexpr = BLOCK_K + BLOCK_K2
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    PLANES: tl.constexpr = GROUPS * PARTS
    COLUMNS: tl.constexpr = BLOCK_C + BLOCK_C // 2 * HALF
    n_t = tl.cdiv(END - FIRST, TAPS)
    k0, c0 = 0, 0  # as constants they save 5 of a loop's 240 instructions
    if not ONE_K:
        n_k = tl.cdiv(K, ROWS)
        k0 = (t % n_k) * ROWS
        t = t // n_k
    if not ONE_C:
        n_c = tl.cdiv(C, COLUMNS)
        c0 = (t % n_c) * COLUMNS
        t = t // n_c
    tap = FIRST + (t % n_t) * TAPS
    t = t // n_t
    g = t % GROUPS
    split = t // GROUPS
    h_taps, w_taps = (), ()
    p_lo, p_hi, q_lo, q_hi = P, 0, Q, 0
    for one in tl.static_range(TAPS):
        at = tl.minimum(tap + one, R * S - 1)  # beyond the last tap: that one again, and not stored
        h_taps = h_taps + ((at // S) * DIL_H - pad_h,)
        w_taps = w_taps + ((at % S) * DIL_W - pad_w,)
        lo, hi = _inside(h_taps[one], H, P, stride_h, BOX_H)
        p_lo, p_hi = tl.minimum(p_lo, lo), tl.maximum(p_hi, hi)
        lo, hi = _inside(w_taps[one], W, Q, stride_w, BOX_W)
        q_lo, q_hi = tl.minimum(q_lo, lo), tl.maximum(q_hi, hi)
    n_n = tl.cdiv(N, BOX_N)
    n_q = tl.maximum(q_hi - q_lo, 1)
    steps = n_n * tl.maximum(q_hi - q_lo, 0) * tl.maximum(p_hi - p_lo, 0)
    share = tl.cdiv(steps, SHARES)
    begin = split * share
    steps = tl.minimum(share, steps - begin)
    p_first = p_lo + begin // n_n // n_q
    if PARTS == 1:
        steps, p_first = one_at_least(steps, p_first, P + H + pad_h)
    n_first = (begin % n_n) * BOX_N
    q_first = q_lo + (begin // n_n) % n_q
    sums = _sums_of(TAPS, HALF, BLOCK_C, BLOCK_K, BLOCK_K2, ACC)
    for small in tl.static_range(PARTS > 1, -1, -1):
        n, q, p = n_first, q_first, p_first
        products, x_parts, y_parts = small_products(PARTS if small else 1)
        step = 0
        for _ in tl.range(0, steps * products if small else steps):
            i = p * BOX_H
            j = q * BOX_W
            plane = g + (y_parts & 3) * GROUPS if small else g
            grads = (pixel_load(dy, n, i, j, plane, k0, PLANES, PIXEL, PIXELS, BLOCK_K),)
            if BLOCK_K2:
                k1 = k0 + BLOCK_K
                grad = pixel_load(dy2, n, i, j, plane, k1, PLANES, PIXEL, PIXELS, BLOCK_K2)
                grads = grads + (grad,)
            plane = g + (x_parts & 3) * GROUPS if small else g
            # Loaded one after the other, boxes share a barrier; those of 4 bytes that are not turned pass registers.
            BY_TAP: tl.constexpr = PIXEL < 2 and grads[0].dtype.primitive_bitwidth == 32
            boxes, new = (), ()
            for part in tl.static_range(TAPS):
                h = i * stride_h + h_taps[part if S % TAPS else 0]  # 0: all lie in one row
                w = j * stride_w + w_taps[part]
                boxes = boxes + (pixel_load(x, n, h, w, plane, c0, PLANES, PIXEL, PIXELS, BLOCK_C),)
                if HALF:
                    c1 = c0 + BLOCK_C
                    boxes = boxes + (pixel_load(x_half, n, h, w, plane, c1, PLANES, PIXEL, PIXELS, BLOCK_C // 2),)
                if BY_TAP or part == TAPS - 1:
                    for one in tl.static_range(len(boxes)):
                        mine = sums[len(new) : len(new) + len(grads)]
                        new = new + _products(mine, grads, boxes[one], PIXEL, PRECISION, ACC)
                    boxes = ()
            sums = new
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
            new = ()
            for one in tl.static_range(len(sums)):
                new = new + (without_infinities(sums[one]),)
            sums = new
    first = dw + (split * GROUPS + g).to(tl.int64) * K * (R * S) * C
    _store_slice(first, sums, k0, K, c0, C, tap, R * S, TAPS, HALF, BLOCK_C, BLOCK_K, BLOCK_K2)
    if SHARES < SPLITS:
        zeros = _sums_of(TAPS, HALF, BLOCK_C, BLOCK_K, BLOCK_K2, ACC)
        for slot in tl.range(split + SHARES, SPLITS, SHARES):
            first = dw + (slot * GROUPS + g).to(tl.int64) * K * (R * S) * C
            _store_slice(first, zeros, k0, K, c0, C, tap, R * S, TAPS, HALF, BLOCK_C, BLOCK_K, BLOCK_K2)


@triton.jit
def _sums_of(
    TAPS: tl.constexpr, HALF: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K2: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    sums = ()  # by tap, then by box of channels, then by block of filters
    for _ in tl.static_range(TAPS):
        sums = sums + _zeros(BLOCK_C, BLOCK_K, BLOCK_K2, ACC)
        if HALF:
            sums = sums + _zeros(BLOCK_C // 2, BLOCK_K, BLOCK_K2, ACC)
    return sums


@triton.jit
def _zeros(COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K2: tl.constexpr, ACC: tl.constexpr):
    if BLOCK_K2:
        return tl.zeros((BLOCK_K, COLUMNS), ACC), tl.zeros((BLOCK_K2, COLUMNS), ACC)
    else:
        return (tl.zeros((BLOCK_K, COLUMNS), ACC),)


@triton.jit
def _products(sums, grads, box, PIXEL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    # The sums after a product of each block of filters with the box.  They are as many as the blocks: Triton 3.6 knows
    # a call by the types of all that its tuples hold, and took one of 1 and 4 elements for one of 0 and 5.
    new = ()
    for k in tl.static_range(len(grads)):
        grad, other = (grads[k], box.T) if PIXEL == 2 else (grads[k].T, box)
        new = new + (tl.dot(grad, other, sums[k], input_precision=PRECISION, out_dtype=ACC),)
    return new


@triton.jit
def _store_slice(
    dw, sums, k0, K, c0, C, tap, TAPS_ALL: tl.constexpr, TAPS: tl.constexpr, HALF: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_K2: tl.constexpr,
):  # fmt: skip
    for one in tl.static_range(TAPS):
        sums = _store_taps(dw, sums, k0, K, c0, C, tap + one, TAPS_ALL, BLOCK_C, BLOCK_K, BLOCK_K2)
        if HALF:
            sums = _store_taps(dw, sums, k0, K, c0 + BLOCK_C, C, tap + one, TAPS_ALL, BLOCK_C // 2, BLOCK_K, BLOCK_K2)


@triton.jit
def _store_taps(
    dw, sums, k0, K, c0, C, tap, TAPS_ALL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,
):  # fmt: skip
    # Of what is not stored yet.
    c = c0 + tl.arange(0, COLUMNS)
    _store_filters(dw, sums[0], k0, K, c, C, tap, TAPS_ALL, BLOCK_K)
    if BLOCK_K2:
        _store_filters(dw, sums[1], k0 + BLOCK_K, K, c, C, tap, TAPS_ALL, BLOCK_K2)
        return sums[2:]
    else:
        return sums[1:]


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
