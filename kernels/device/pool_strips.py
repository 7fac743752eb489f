"""Max-pools over windows that overlap, channels_last, dilation 1: a program walks down a strip of the image.

Each of its ROWS lanes has a strip of its own, WIDE outputs (backward: cells) across and LONG down, COLS channels deep.
What neighbours in a row share is loaded once for all of them, and what the next row shares with this one stays in
registers, so only the strips' edges are loaded twice.  Results are those of pool.py, bit for bit.
"""

import triton
import triton.language as tl

from tileconv.kernels.device.pool import _cell_sum, key_of, key_place, key_value, larger, output_tile


# Switches are a byte each, values TOGETHER = 2 or 4: switches of so many outputs are 16 bytes a thread, as values are.
@triton.jit
def _side_by_side(at, inside, q, Q, stride_q, TOGETHER: tl.constexpr):
    # [2, ROWS, COLS] or [2, 2, ROWS, COLS]: offsets and which are inside.
    beside = tl.arange(0, 2)[:, None, None]
    if TOGETHER == 4:
        beside = beside.expand_dims(0) + (2 * tl.arange(0, 2))[:, None, None, None]
        at, inside, q = at.expand_dims(0), inside.expand_dims(0), q.expand_dims(0)
    all_q = q.expand_dims(0) + beside
    return at.expand_dims(0) + beside * stride_q, inside.expand_dims(0) & (all_q >= 0) & (all_q < Q)


@triton.jit
def _joined(places, FIRST: tl.constexpr, TOGETHER: tl.constexpr):
    if TOGETHER == 2:
        return tl.join(places[FIRST], places[FIRST + 1]).permute(2, 0, 1)
    else:
        even, odd = tl.join(places[FIRST], places[FIRST + 2]), tl.join(places[FIRST + 1], places[FIRST + 3])
        return tl.join(even, odd).permute(2, 3, 0, 1)


@triton.jit
def _apart(loaded, TOGETHER: tl.constexpr):
    if TOGETHER == 2:
        return loaded.permute(1, 2, 0).split()
    else:
        even, odd = loaded.permute(2, 3, 0, 1).split()
        a, c = even.split()
        b, d = odd.split()
        return a, b, c, d


@triton.jit
def _pixel_row(row, inside, w0, limit_w, stride_xw, OUTSIDE: tl.constexpr, COUNT: tl.constexpr):
    pixels = ()
    for k in tl.static_range(COUNT):
        valid = inside & (w0 + k >= 0) & (w0 + k < limit_w)
        pixels = pixels + (tl.load(row + k * stride_xw, mask=valid, other=OUTSIDE),)
    return pixels


@triton.jit
def _row_maximum(pixels, w, FIRST: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr):
    # The key of the largest of S pixels of a window that begins at w.  Of a row of -inf it is the first that is not
    # before the edge; BEFORE says that some may be.
    best = key_of(pixels[FIRST], tl.maximum(-w, 0) if BEFORE else 0)
    for s in tl.static_range(1, S):
        best = larger(key_of(pixels[FIRST + s], s), best, pixels[FIRST].dtype)
    return best


@triton.jit
def _window_maximum(
    rows, h, R: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr, ACTIVATION: tl.constexpr, TYPE: tl.constexpr
):
    # What a pool writes of a window that begins at h, from the keys of its R rows: the value and its switch.
    key = rows[0]
    if BEFORE:
        key += tl.cast(tl.maximum(-h, 0) * S, key.dtype) << TYPE.primitive_bitwidth
    for r in tl.static_range(1, R):
        key = larger(rows[r] + (r * S << TYPE.primitive_bitwidth), key, TYPE)
    best = key_value(key, TYPE)
    if ACTIVATION == "relu":
        best = tl.where(best < 0, tl.zeros_like(best), best)
    return best, key_place(key, TYPE).to(tl.uint8)


# y and switch as in pool.max_forward.  Rows first: a row's maxima serve every window that the row is in, and of equals
# the first, of NaN the last in row order wins as if all taps were taken in turn.
@triton.jit
def max_forward_strips(
    x,
    y,
    switch,  # pointer in the layout of y, or None
    C,
    H,
    W,
    P,
    Q,
    HEIGHT,  # strips of all images
    STRIPS_H,
    STRIPS_W,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yp,
    stride_yq,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    OUTSIDE: tl.constexpr,  # -inf where windows reach beyond the image; else no output sees it, and 0 costs nothing
    HAS_SWITCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LONG: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    n, c, strip_h, strip_w, inside = output_tile(
        tl.program_id(0), C, STRIPS_H, STRIPS_W, HEIGHT, True, INDEX, ROWS, COLS
    )
    p0 = strip_h * LONG
    q0 = strip_w * WIDE
    h0 = p0 * STRIDE_H - PAD_H
    w0 = q0 * STRIDE_W - PAD_W
    limit_h = tl.minimum(H, (P - 1) * STRIDE_H - PAD_H + R)  # what lies beyond belongs to no window
    limit_w = tl.minimum(W, (Q - 1) * STRIDE_W - PAD_W + S)
    corner = x + n * stride_xn + c * stride_xc + h0.to(INDEX) * stride_xh + w0.to(INDEX) * stride_xw
    out = n * stride_yn + c * stride_yc + p0.to(INDEX) * stride_yp + q0.to(INDEX) * stride_yq
    COUNT: tl.constexpr = (WIDE - 1) * STRIDE_W + S
    KEPT: tl.constexpr = R - STRIDE_H
    TYPE: tl.constexpr = x.dtype.element_ty
    TOGETHER: tl.constexpr = TYPE.primitive_bitwidth // 8
    tl.static_assert(R > STRIDE_H and WIDE % TOGETHER == 0)
    first = ()
    for r in tl.static_range(KEPT):
        above = inside & (h0 + r >= 0) & (h0 + r < limit_h)
        row = corner + tl.cast(r, INDEX) * stride_xh
        first = first + _pixel_row(row, above, w0, limit_w, stride_xw, OUTSIDE, COUNT)
    maxima = ()  # for each of WIDE columns of windows, of the KEPT rows that a window shares with that above it
    for j in tl.static_range(WIDE):
        for r in tl.static_range(KEPT):
            top = _row_maximum(first, w0 + j * STRIDE_W, r * COUNT + j * STRIDE_W, S, j * STRIDE_W < PAD_W)
            maxima = maxima + (top,)
    for step in tl.range(0, LONG, num_stages=STAGES):
        h = h0 + step * STRIDE_H
        pixels = ()
        for r in tl.static_range(KEPT, R):
            reached = inside & (h + r >= 0) & (h + r < limit_h)
            below = corner + tl.cast(step * STRIDE_H + r, INDEX) * stride_xh
            pixels = pixels + _pixel_row(below, reached, w0, limit_w, stride_xw, OUTSIDE, COUNT)
        at = out + tl.cast(step, INDEX) * stride_yp
        owned = inside & (p0 + step < P)
        places = ()
        kept = ()
        for j in tl.static_range(WIDE):
            rows = ()
            for r in tl.static_range(KEPT):
                rows = rows + (maxima[j * KEPT + r],)
            for r in tl.static_range(STRIDE_H):
                new = _row_maximum(pixels, w0 + j * STRIDE_W, r * COUNT + j * STRIDE_W, S, j * STRIDE_W < PAD_W)
                rows = rows + (new,)
            best, place = _window_maximum(rows, h, R, S, PAD_H > 0, ACTIVATION, TYPE)
            tl.store(y + at + j * stride_yq, best, mask=owned & (q0 + j < Q))
            places = places + (place,)
            for r in tl.static_range(KEPT):
                kept = kept + (rows[STRIDE_H + r],)
        if HAS_SWITCH:
            for j in tl.static_range(0, WIDE, TOGETHER):
                here, valid = _side_by_side(at + j * stride_yq, owned, q0 + j, Q, stride_yq, TOGETHER)
                tl.store(switch + here, _joined(places, j, TOGETHER), mask=valid)
        maxima = kept


@triton.jit
def _window_row(dy, switch, y, at_dy, at, inside, q0, Q, stride_gq, stride_yq, MASK: tl.constexpr, COUNT: tl.constexpr):
    # Gradients and switches of COUNT windows side by side.
    grads = ()
    taps = ()
    for k in tl.static_range(COUNT):
        valid = inside & (q0 + k >= 0) & (q0 + k < Q)
        grad = tl.load(dy + at_dy + k * stride_gq, mask=valid, other=0.0)
        if MASK:
            grad = tl.where(tl.load(y + at + k * stride_yq, mask=valid, other=0.0) <= 0, tl.zeros_like(grad), grad)
        grads = grads + (grad,)
    TOGETHER: tl.constexpr = dy.dtype.element_ty.primitive_bitwidth // 8
    for k in tl.static_range(0, COUNT, TOGETHER):
        here, inner = _side_by_side(at + k * stride_yq, inside, q0 + k, Q, stride_yq, TOGETHER)
        taps = taps + _apart(tl.load(switch + here, mask=inner, other=0), TOGETHER)
    return grads, taps


@triton.jit
def _window(
    windows, BACK: tl.constexpr, J: tl.constexpr, BACK_H: tl.constexpr, BACK_W: tl.constexpr, COUNT: tl.constexpr
):
    # Of BACK_H + 1 rows of COUNT windows: that which lies BACK windows, counted in rows, before the last row's cell J.
    return windows[(BACK_H - BACK // (BACK_W + 1)) * COUNT + J + BACK_W - BACK % (BACK_W + 1)]


@triton.jit
def _after(values, FIRST: tl.constexpr):
    # What a step leaves to the next: all from FIRST on.
    rest = ()
    for k in tl.static_range(FIRST, len(values)):
        rest = rest + (values[k],)
    return rest


# dx as in pool.max_backward_cells, and added up in the same order.
@triton.jit
def max_backward_strips(
    dy,
    switch,
    y,  # as in pool.max_backward
    dx,
    C,
    H,
    W,
    P,
    Q,
    HEIGHT,  # strips of all images
    STRIPS_H,
    STRIPS_W,
    stride_gn,
    stride_gc,
    stride_gp,
    stride_gq,
    stride_yn,
    stride_yc,
    stride_yp,
    stride_yq,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LONG: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    BACK_H: tl.constexpr = (R - 1) // STRIDE_H  # windows before a cell's own that reach into it
    BACK_W: tl.constexpr = (S - 1) // STRIDE_W
    COUNT: tl.constexpr = WIDE + BACK_W
    tl.static_assert(COUNT % (dy.dtype.element_ty.primitive_bitwidth // 8) == 0)
    n, c, strip_h, strip_w, inside = output_tile(
        tl.program_id(0), C, STRIPS_H, STRIPS_W, HEIGHT, True, INDEX, ROWS, COLS
    )
    i0 = strip_h * LONG
    j0 = strip_w * WIDE
    q0 = j0 - BACK_W
    at_dy = n * stride_gn + c * stride_gc + q0.to(INDEX) * stride_gq
    at = n * stride_yn + c * stride_yc + q0.to(INDEX) * stride_yq
    grads = ()  # of the rows of windows that the next cells share with those above
    taps = ()
    for back in tl.static_range(BACK_H):
        above = i0 - BACK_H + back
        first = _window_row(
            dy, switch, y, at_dy + above.to(INDEX) * stride_gp, at + above.to(INDEX) * stride_yp,
            inside & (above >= 0) & (above < P), q0, Q, stride_gq, stride_yq, MASK, COUNT,
        )  # fmt: skip
        grads = grads + first[0]
        taps = taps + first[1]
    for step in tl.range(0, LONG, num_stages=STAGES):
        i = i0 + step
        new = _window_row(
            dy, switch, y, at_dy + i.to(INDEX) * stride_gp, at + i.to(INDEX) * stride_yp, inside & (i < P), q0, Q,
            stride_gq, stride_yq, MASK, COUNT,
        )  # fmt: skip
        grads = grads + new[0]
        taps = taps + new[1]
        for j in tl.static_range(WIDE):
            over = ()
            over_taps = ()
            for back in tl.static_range((BACK_H + 1) * (BACK_W + 1)):
                over = over + (_window(grads, back, j, BACK_H, BACK_W, COUNT).to(ACC),)
                over_taps = over_taps + (_window(taps, back, j, BACK_H, BACK_W, COUNT).to(tl.int32),)
            for pixel in tl.static_range(STRIDE_H * STRIDE_W):
                acc = _cell_sum(over_taps, over, pixel // STRIDE_W, pixel % STRIDE_W, R, S, STRIDE_H, STRIDE_W)
                h = i * STRIDE_H + (pixel // STRIDE_W - PAD_H)
                w = (j0 + j) * STRIDE_W + (pixel % STRIDE_W - PAD_W)
                out = n * stride_xn + c * stride_xc + h.to(INDEX) * stride_xh + w.to(INDEX) * stride_xw
                own = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                tl.store(dx + out, acc.to(dx.dtype.element_ty), mask=own)
        grads = _after(grads, COUNT)
        taps = _after(taps, COUNT)
