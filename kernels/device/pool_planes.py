"""Max-pools over windows that overlap, of contiguous images, dilation 1: a lane walks down a column of one plane.

Lanes lie side by side along the columns of all planes (n, c), one behind the other: what a window shares with the
next one comes from the lane beside by a shuffle, what it shares with the one below stays in registers.  A row may
begin at any address, so that elements go one at a time.  Results are those of pool.py, bit for bit.
"""

import triton
import triton.language as tl

from tileconv.kernels.device.pool import _cell_sum
from tileconv.kernels.device.pool_strips import _after, _row_maximum, _window, _window_maximum


@triton.jit
def _column(program, POSITIONS, COLUMNS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, LANES: tl.constexpr,
            INDEX: tl.constexpr):  # fmt: skip
    # Plane, column in it, which lanes have one, and which of those are not just another program's, taken for a shuffle.
    lane = tl.arange(0, LANES)
    position = tl.cast(program, INDEX) * (LANES - BEFORE - AFTER) + (lane - BEFORE)
    inside = (position >= 0) & (position < POSITIONS)
    plane = position // COLUMNS
    column = (position - plane * COLUMNS).to(tl.int32)
    return plane, column, inside, inside & (lane >= BEFORE) & (lane < LANES - AFTER)


@triton.jit
def _of_lane(value, lane):
    # A shuffle, where one warp has all lanes.
    WHOLE: tl.constexpr = tl.int16 if value.dtype.primitive_bitwidth == 16 else tl.int32
    beside = tl.gather(value.to(WHOLE, bitcast=True).to(tl.int32), lane, 0)
    return beside.to(WHOLE).to(value.dtype, bitcast=True)


@triton.jit
def _rows(
    corner, h, inside, own, w, W: tl.constexpr, LIMIT_H: tl.constexpr, LIMIT_W: tl.constexpr, STEP: tl.constexpr,
    FIRST: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    OUTSIDE: tl.constexpr,
):  # fmt: skip
    # Of rows FIRST to R of the windows of a step the lane's own columns; the last of them no lane beside asks for.
    pixels = ()
    for r in tl.static_range(FIRST, R):
        for s in tl.static_range(S if S < STRIDE_W else STRIDE_W):
            row = h + (STEP * STRIDE_H + r)
            valid = (inside if STRIDE_W + s < S else own) & (w + s >= 0) & (w + s < LIMIT_W)
            valid = valid & (row >= 0) & (row < LIMIT_H)
            pixels = pixels + (tl.load(corner + ((STEP * STRIDE_H + r) * W + s), mask=valid, other=OUTSIDE),)
    return pixels


@triton.jit
def _maximum(pixels, ROW: tl.constexpr, w, lane, S: tl.constexpr, STRIDE_W: tl.constexpr, LANES: tl.constexpr,
             PAD_W: tl.constexpr):  # fmt: skip
    OWN: tl.constexpr = S if S < STRIDE_W else STRIDE_W
    row = ()
    for s in tl.static_range(S):
        if s < OWN:
            row = row + (pixels[ROW * OWN + s],)
        else:
            row = row + (_of_lane(pixels[ROW * OWN + s % STRIDE_W], tl.minimum(lane + s // STRIDE_W, LANES - 1)),)
    return _row_maximum(row, w, 0, S, PAD_W > 0)


# y and switch as in pool.max_forward; rows first, as in pool_strips.max_forward_strips.
@triton.jit
def max_forward_planes(
    x,
    y,
    switch,  # or None
    POSITIONS,  # columns of all planes
    H: tl.constexpr,  # constant, so that rows are at constant distances: else a third more instructions
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    OUTSIDE: tl.constexpr,  # as in pool_strips.max_forward_strips
    HAS_SWITCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a plane: Q, and those beyond that the last windows reach into
    LANES: tl.constexpr,
    LONG: tl.constexpr,
    STRIPS: tl.constexpr,
    AHEAD: tl.constexpr,  # steps between a row's loads and its use
):
    HALO: tl.constexpr = (S - 1) // STRIDE_W
    KEPT: tl.constexpr = R - STRIDE_H if R > STRIDE_H else 0
    NEW: tl.constexpr = R - KEPT
    EACH: tl.constexpr = NEW * (S if S < STRIDE_W else STRIDE_W)
    TYPE: tl.constexpr = x.dtype.element_ty
    LIMIT_H: tl.constexpr = min(H, (P - 1) * STRIDE_H - PAD_H + R)  # what lies beyond belongs to no window
    LIMIT_W: tl.constexpr = min(W, (Q - 1) * STRIDE_W - PAD_W + S)
    program = tl.program_id(0)
    plane, q, inside, own = _column(program // STRIPS, POSITIONS, COLUMNS, 0, HALO, LANES, INDEX)
    own = own & (q < Q)
    lane = tl.arange(0, LANES)
    p0 = program % STRIPS * LONG
    h0 = p0 * STRIDE_H - PAD_H
    w = q * STRIDE_W - PAD_W
    corner = x + (plane * (H * W) + tl.cast(h0, INDEX) * W + w)
    out = plane * (P * Q) + tl.cast(p0, INDEX) * Q + q
    maxima = ()
    first = _rows(corner, h0, inside, own, w, W, LIMIT_H, LIMIT_W, 0, 0, KEPT, S, STRIDE_H, STRIDE_W, OUTSIDE)
    ahead = ()
    for step in tl.static_range(min(AHEAD, LONG)):
        ahead = ahead + _rows(
            corner, h0, inside, own, w, W, LIMIT_H, LIMIT_W, step, KEPT, R, S, STRIDE_H, STRIDE_W, OUTSIDE
        )
    for r in tl.static_range(KEPT):
        maxima = maxima + (_maximum(first, r, w, lane, S, STRIDE_W, LANES, PAD_W),)
    for step in tl.static_range(LONG):
        if step + AHEAD < LONG:
            ahead = ahead + _rows(
                corner, h0, inside, own, w, W, LIMIT_H, LIMIT_W, step + AHEAD, KEPT, R, S, STRIDE_H, STRIDE_W, OUTSIDE
            )
        rows = maxima
        for r in tl.static_range(NEW):
            rows = rows + (_maximum(ahead, r, w, lane, S, STRIDE_W, LANES, PAD_W),)
        ahead = _after(ahead, EACH)
        best, place = _window_maximum(rows, h0 + step * STRIDE_H, R, S, PAD_H > 0, ACTIVATION, TYPE)
        valid = own & (p0 + step < P)
        tl.store(y + (out + step * Q), best, mask=valid)
        if HAS_SWITCH:
            tl.store(switch + (out + step * Q), place, mask=valid)
        maxima = _after(rows, NEW)


@triton.jit
def _windows(dy, switch, y, at, valid, lane, MASK: tl.constexpr, ACC: tl.constexpr, BACK_W: tl.constexpr):
    # Gradients and switches of the windows over a cell in one row of windows, from the leftmost on.
    grad = tl.load(dy + at, mask=valid, other=0.0)
    tap = tl.load(switch + at, mask=valid, other=0).to(tl.int32)
    if MASK:
        grad = tl.where(tl.load(y + at, mask=valid, other=0.0) <= 0, tl.zeros_like(grad), grad)
    grads = ()
    taps = ()
    if grad.dtype.primitive_bitwidth == 16:  # both in one shuffle
        both = grad.to(tl.uint16, bitcast=True).to(tl.int32) | (tap << 16)
        for back in tl.static_range(BACK_W, 0, -1):
            beside = tl.gather(both, tl.maximum(lane - back, 0), 0)
            grads = grads + (beside.to(tl.int16).to(grad.dtype, bitcast=True).to(ACC),)
            taps = taps + (beside >> 16,)
    else:
        for back in tl.static_range(BACK_W, 0, -1):
            grads = grads + (_of_lane(grad, tl.maximum(lane - back, 0)).to(ACC),)
            taps = taps + (tl.gather(tap, tl.maximum(lane - back, 0), 0),)
    return grads + (grad.to(ACC),), taps + (tap,)


# dx as in pool.max_backward_cells, and added up in the same order.
@triton.jit
def max_backward_planes(
    dy,
    switch,
    y,  # as in pool.max_backward
    dx,
    POSITIONS,  # columns of cells of all planes
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a plane: its cells', and no fewer than keep its windows from the next plane's cells
    LANES: tl.constexpr,
    LONG: tl.constexpr,
    STRIPS: tl.constexpr,
):
    BACK_H: tl.constexpr = (R - 1) // STRIDE_H  # windows before a cell's own that reach into it
    BACK_W: tl.constexpr = (S - 1) // STRIDE_W
    COUNT: tl.constexpr = BACK_W + 1
    program = tl.program_id(0)
    plane, j, inside, own = _column(program // STRIPS, POSITIONS, COLUMNS, BACK_W, 0, LANES, INDEX)
    lane = tl.arange(0, LANES)
    i0 = program % STRIPS * LONG
    at = plane * (P * Q) + tl.cast(i0, INDEX) * Q + j
    out = plane * (H * W) + tl.cast(i0 * STRIDE_H - PAD_H, INDEX) * W + (j * STRIDE_W - PAD_W)
    within = inside & (j < Q)
    grads = ()
    taps = ()
    for back in tl.static_range(BACK_H):
        above = i0 + (back - BACK_H)
        first = _windows(
            dy, switch, y, at + (back - BACK_H) * Q, within & (above >= 0) & (above < P), lane, MASK, ACC, BACK_W
        )
        grads = grads + first[0]
        taps = taps + first[1]
    for step in tl.static_range(LONG):
        new = _windows(dy, switch, y, at + step * Q, within & (i0 + step < P), lane, MASK, ACC, BACK_W)
        grads = grads + new[0]
        taps = taps + new[1]
        over = ()
        over_taps = ()
        for back in tl.static_range((BACK_H + 1) * COUNT):
            over = over + (_window(grads, back, 0, BACK_H, BACK_W, COUNT),)
            over_taps = over_taps + (_window(taps, back, 0, BACK_H, BACK_W, COUNT),)
        for pixel in tl.static_range(STRIDE_H * STRIDE_W):
            acc = _cell_sum(over_taps, over, pixel // STRIDE_W, pixel % STRIDE_W, R, S, STRIDE_H, STRIDE_W)
            h = (i0 + step) * STRIDE_H + (pixel // STRIDE_W - PAD_H)
            w = j * STRIDE_W + (pixel % STRIDE_W - PAD_W)
            here = out + ((step * STRIDE_H + pixel // STRIDE_W) * W + pixel % STRIDE_W)
            valid = own & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            tl.store(dx + here, acc.to(dx.dtype.element_ty), mask=valid)
        grads = _after(grads, COUNT)
        taps = _after(taps, COUNT)
