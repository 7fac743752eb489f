"""Local response normalisation: y = x * s^-BETA, s = K + ALPHA * the sum of x^2 over a window of channels.

The window of channel c is c - BEFORE .. c + AFTER; the backward pass sums over the channels whose window holds c, its
mirror image.  Every element is loaded once.  A window is added up anew for every channel, never by taking away what
left it, so that nothing cancels and a NaN or an infinity stays within reach of its own channel.
Images are [N, C, PIXELS]; m counts the pixels of all images.
"""

import triton
import triton.language as tl


# s^-BETA and 1 / s.  The exponents that networks use need no logarithm: tl.log2 is 18 instructions a value.
@triton.jit
def _powers(s, BETA: tl.constexpr):
    if BETA == 0.5 or BETA == 0.75 or BETA == 1:
        root = tl.rsqrt(s)
        inverse = root * root
        if BETA == 0.5:
            power = root
        elif BETA == 1:
            power = inverse
        else:
            power = root * tl.sqrt(root)
    else:
        inverse = 1.0 / s
        if BETA == 0:
            power = tl.full(s.shape, 1.0, s.dtype)
        else:
            power = tl.exp2(-BETA * tl.log2(s))
    return power, inverse


# [ROWS, GROUPS * VEC] as VEC blocks [ROWS, GROUPS]: lane i has columns i, i + VEC, ...  Where a thread holds VEC
# neighbouring columns, which 16-byte loads give it, this only renames registers.
@triton.jit
def _to_lanes(block, ROWS: tl.constexpr, GROUPS: tl.constexpr, VEC_LOG2: tl.constexpr):
    parts = (tl.reshape(block, (ROWS, GROUPS, 1 << VEC_LOG2)),)
    for level in tl.static_range(VEC_LOG2):
        halves = ()
        for i in tl.static_range(1 << level):
            pair = tl.reshape(parts[i], (ROWS, GROUPS, 2, (1 << VEC_LOG2) >> (level + 1)))
            low, high = tl.split(tl.permute(pair, (0, 1, 3, 2)))
            halves = halves + (low, high)
        parts = halves
    lanes = ()
    for i in tl.static_range(1 << VEC_LOG2):
        lanes = lanes + (tl.reshape(parts[i], (ROWS, GROUPS)),)
    return lanes


@triton.jit
def _from_lanes(lanes, ROWS: tl.constexpr, GROUPS: tl.constexpr, VEC_LOG2: tl.constexpr):
    parts = lanes
    for level in tl.static_range(VEC_LOG2):
        wider = ()
        for i in tl.static_range((1 << VEC_LOG2) >> (level + 1)):
            low = tl.reshape(parts[2 * i], (ROWS, GROUPS, 1 << level))
            high = tl.reshape(parts[2 * i + 1], (ROWS, GROUPS, 1 << level))
            pair = tl.permute(tl.join(low, high), (0, 1, 3, 2))
            wider = wider + (tl.reshape(pair, (ROWS, GROUPS, 2 << level)),)
        parts = wider
    return tl.reshape(parts[0], (ROWS, GROUPS << VEC_LOG2))


# out[row, c] = the sum of block[row, c - BEFORE .. c + AFTER], in registers.  Only columns that another thread holds
# are fetched, by shuffles: BEFORE + AFTER of them for every VEC columns.
@triton.jit
def _window_sums(
    block, BEFORE: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, VEC_LOG2: tl.constexpr
):
    VEC: tl.constexpr = 1 << VEC_LOG2
    lanes = _to_lanes(block, ROWS, GROUPS, VEC_LOG2)
    group = tl.broadcast_to(tl.arange(0, GROUPS)[None, :], (ROWS, GROUPS))
    line = ()  # columns -BEFORE .. VEC + AFTER - 1 of every group
    for j in tl.static_range(-BEFORE, VEC + AFTER):
        if j >= 0 and j < VEC:
            line = line + (lanes[j],)
        else:
            at = group + j // VEC
            there = (at >= 0) & (at < GROUPS)
            line = line + (tl.where(there, tl.gather(lanes[j % VEC], tl.where(there, at, 0), 1), 0.0),)
    sums = ()
    for i in tl.static_range(VEC):
        total = line[i]
        for j in tl.static_range(1, BEFORE + AFTER + 1):
            total += line[i + j]
        sums = sums + (total,)
    return _from_lanes(sums, ROWS, GROUPS, VEC_LOG2)


# Rows are pixels, columns all channels, which lie side by side in memory.  With a gradient this is the backward pass:
# dx = dy * s^-BETA - 2 * ALPHA * BETA * x * the mirrored window's sum of dy * x * s^(-BETA - 1).
@triton.jit
def across_columns(
    x,
    dy,  # None: forward
    out,  # y, or dx with dy
    C,
    PIXELS,
    HEIGHT,  # images * PIXELS
    stride_xn,
    stride_xc,
    stride_xi,
    stride_gn,
    stride_gc,
    stride_gi,
    stride_yn,
    stride_yc,
    stride_yi,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VEC_LOG2: tl.constexpr,
):
    GROUPS: tl.constexpr = COLS >> VEC_LOG2
    m = (tl.cast(tl.program_id(0), INDEX) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.arange(0, COLS)[None, :].to(INDEX)
    inside = (m < HEIGHT) & (c < C)
    n = (m // PIXELS).to(tl.int64)
    i = (m % PIXELS).to(INDEX)
    value = tl.load(x + n * stride_xn + i * stride_xi + c * stride_xc, mask=inside, other=0.0).to(ACC)
    s = K + ALPHA * _window_sums(value * value, BEFORE, AFTER, ROWS, GROUPS, VEC_LOG2)
    power, inverse = _powers(s, BETA)
    if BACKWARD:
        grad = tl.load(dy + n * stride_gn + i * stride_gi + c * stride_gc, mask=inside, other=0.0).to(ACC) * power
        share = tl.where(inside, grad * value * inverse, 0.0)  # beyond C, s may be zero
        result = grad - 2 * ALPHA * BETA * value * _window_sums(share, AFTER, BEFORE, ROWS, GROUPS, VEC_LOG2)
    else:
        result = value * power
    tl.store(out + n * stride_yn + i * stride_yi + c * stride_yc, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _zeros(COUNT: tl.constexpr, COLS: tl.constexpr, DTYPE: tl.constexpr):
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros((COLS,), DTYPE),)
    return blocks


@triton.jit
def _sum(blocks, COUNT: tl.constexpr):
    total = blocks[0]
    for j in tl.static_range(1, COUNT):
        total += blocks[j]
    return total


# Columns are pixels; a program walks through CHUNK channels with the window in registers, oldest channel first.
@triton.jit
def along_rows_forward(
    x,
    y,
    C,
    PIXELS,
    WIDTH,  # images * PIXELS
    stride_xn,
    stride_xc,
    stride_xi,
    stride_yn,
    stride_yc,
    stride_yi,
    CHUNK,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(WIDTH, COLS)
    m = tl.cast(tl.program_id(0) % blocks, INDEX) * COLS + tl.arange(0, COLS)
    n = (m // PIXELS).to(tl.int64)
    i = (m % PIXELS).to(INDEX)
    source = x + n * stride_xn + i * stride_xi
    target = y + n * stride_yn + i * stride_yi
    first = tl.program_id(0) // blocks * CHUNK
    values = _zeros(BEFORE + AFTER, COLS, ACC)  # x of channels c - BEFORE .. c + AFTER - 1
    squares = _zeros(BEFORE + AFTER, COLS, ACC)
    for c in tl.range(first - BEFORE - AFTER, tl.minimum(first + CHUNK, C)):
        new = c + AFTER
        there = (m < WIDTH) & (new >= 0) & (new < C)
        value = tl.load(source + tl.cast(new, INDEX) * stride_xc, mask=there, other=0.0).to(ACC)
        values = values + (value,)
        squares = squares + (value * value,)
        power, _ = _powers(K + ALPHA * _sum(squares, BEFORE + AFTER + 1), BETA)
        result = (values[BEFORE] * power).to(y.dtype.element_ty)
        tl.store(target + tl.cast(c, INDEX) * stride_yc, result, mask=(m < WIDTH) & (c >= first))
        values = values[1:]
        squares = squares[1:]


# Step c reads x of channel c + BEFORE + AFTER, which completes s of channel c + BEFORE and with it dx of channel c.
@triton.jit
def along_rows_backward(
    x,
    dy,
    dx,
    C,
    PIXELS,
    WIDTH,
    stride_xn,
    stride_xc,
    stride_xi,
    stride_gn,
    stride_gc,
    stride_gi,
    stride_yn,
    stride_yc,
    stride_yi,
    CHUNK,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(WIDTH, COLS)
    m = tl.cast(tl.program_id(0) % blocks, INDEX) * COLS + tl.arange(0, COLS)
    n = (m // PIXELS).to(tl.int64)
    i = (m % PIXELS).to(INDEX)
    source = x + n * stride_xn + i * stride_xi
    grads = dy + n * stride_gn + i * stride_gi
    target = dx + n * stride_yn + i * stride_yi
    first = tl.program_id(0) // blocks * CHUNK
    values = _zeros(BEFORE + AFTER, COLS, x.dtype.element_ty)  # x of channels c .. c + BEFORE + AFTER - 1
    shares = _zeros(BEFORE + AFTER, COLS, ACC)  # dy * x * s^(-BETA - 1) of channels c - AFTER .. c + BEFORE - 1
    scaled = _zeros(BEFORE, COLS, ACC)  # dy * s^-BETA of channels c .. c + BEFORE - 1
    for c in tl.range(first - 2 * (BEFORE + AFTER), tl.minimum(first + CHUNK, C)):
        new = c + BEFORE + AFTER
        there = (m < WIDTH) & (new >= 0) & (new < C)
        value = tl.load(source + tl.cast(new, INDEX) * stride_xc, mask=there, other=0.0)
        new = c + BEFORE
        there = (m < WIDTH) & (new >= first - AFTER) & (new >= 0) & (new < C)
        grad = tl.load(grads + tl.cast(new, INDEX) * stride_gc, mask=there, other=0.0).to(ACC)
        values = values + (value,)
        total = tl.zeros((COLS,), ACC)
        for j in tl.static_range(BEFORE + AFTER + 1):
            total += values[j].to(ACC) * values[j].to(ACC)
        power, inverse = _powers(K + ALPHA * total, BETA)
        grad = grad * power
        scaled = scaled + (grad,)
        shares = shares + (tl.where(there, grad * values[BEFORE].to(ACC) * inverse, 0.0),)
        sums = _sum(shares, BEFORE + AFTER + 1)
        result = scaled[0] - 2 * ALPHA * BETA * values[0].to(ACC) * sums
        at = target + tl.cast(c, INDEX) * stride_yc
        tl.store(at, result.to(dx.dtype.element_ty), mask=(m < WIDTH) & (c >= first))
        values = values[1:]
        shares = shares[1:]
        scaled = scaled[1:]
