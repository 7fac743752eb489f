"""What the convolution kernels share: the walk over taps, products of parts, one epilogue.

Where both operands are fp32 numbers in two or three bf16 PARTS, the depth is gone through for every product of parts
that counts: the small ones first, because tensor cores cut sums off at the last bit of the largest term, and what they
cut off a small sum is small.  Kernels with pointers make all products of what they have loaded instead: their addresses
cost more than their products, and they do not wait in the way that WGMMA would.
"""

import triton
import triton.language as tl


@triton.jit
def next_tap(c, s, r, s_lo, s_hi, C, BLOCK_C: tl.constexpr):
    # Counters carried by hand: about 20 integer instructions an iteration less than dividing the step.
    c += BLOCK_C
    wrap = c >= C
    c = tl.where(wrap, 0, c)
    s = tl.where(wrap, s + 1, s)
    wrap = s >= s_hi
    s = tl.where(wrap, s_lo, s)
    r = tl.where(wrap, r + 1, r)
    return c, s, r


@triton.jit
def one_at_least(steps, first, outside):
    # A program without a step takes one at `outside`, where the copy engine finds zeros for both operands.  With a way
    # round the loop Triton 3.6 sets the sums to zero there, and ptxas makes WGMMAs of 32,768 sums wait for each other.
    # Not where parts are multiplied: of the two loops one after the other it then makes those of 24,576 wait.
    return tl.maximum(steps, 1), tl.where(steps > 0, first, outside)


@triton.jit
def small_products(PARTS: tl.constexpr):
    # How many there are, and which part of either operand each takes, two bits a product, the smallest product first.
    if PARTS == 3:
        return 5, 2 + (1 << 4) + (1 << 6), (2 << 2) + (1 << 4) + (1 << 8)
    elif PARTS == 2:
        return 2, 1, 1 << 2
    else:
        return 0, 0, 0


@triton.jit
def next_product(step, steps, x_parts, w_parts):
    # Selections: a branch in a loop may make WGMMAs wait for each other.
    step += 1
    wrap = step == steps
    return tl.where(wrap, 0, step), wrap, tl.where(wrap, x_parts >> 2, x_parts), tl.where(wrap, w_parts >> 2, w_parts)


@triton.jit
def without_infinities(acc):
    # An infinite operand has further parts of zero.  Zero times infinity must not spoil what the largest product says.
    return tl.where(tl.abs(acc) < float("inf"), acc, 0.0)


@triton.jit
def dot_parts(w, inside_w, w_part, x, inside_x, x_part, PARTS: tl.constexpr, ACC: tl.constexpr):
    # w [rows, depth] and x [columns, depth] point at the largest parts.
    w0 = tl.load(w, mask=inside_w, other=0.0)
    w1 = tl.load(w + w_part, mask=inside_w, other=0.0)
    x0 = tl.load(x, mask=inside_x, other=0.0).T
    x1 = tl.load(x + x_part, mask=inside_x, other=0.0).T
    acc = tl.zeros((w.shape[0], x.shape[0]), ACC)
    if PARTS == 3:
        acc = tl.dot(w0, tl.load(x + 2 * x_part, mask=inside_x, other=0.0).T, acc)
        acc = tl.dot(tl.load(w + 2 * w_part, mask=inside_w, other=0.0), x0, acc)
        acc = tl.dot(w1, x1, acc)
    acc = tl.dot(w0, x1, acc)
    acc = tl.dot(w1, x0, acc)
    return tl.dot(w0, x0, without_infinities(acc))


@triton.jit
def bias_and_activation(acc, bias, g, k, K, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias + g * K + k, mask=k < K, other=0.0).to(acc.dtype)[:, None]
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)  # a comparison, because relu keeps NaN
    return acc


@triton.jit
def _dropped(value, row, k, seed, dropout, scale):
    return tl.where(tl.rand(seed, row + k) >= dropout, value * scale, 0.0)


@triton.jit
def finished(
    acc, bias, seed, g, k, n, K, dropout, scale, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    # With dropout of a linear layer's acc[k, n], which is y[n, k]: elements count as device.pointwise.dropout counts
    # those of a row-major y, so that both draw one mask.  An int32 that overflows is outside y.
    acc = bias_and_activation(acc, bias, g, k, K, HAS_BIAS, ACTIVATION)
    if DROPOUT is not None:
        # One element after the other.  A block at a time, all four words of every element's state are alive at once:
        # 2,832 bytes of stack for 64 x 256 outputs on 4 warps of sm_90, where this way takes none.
        acc = tl.map_elementwise(_dropped, acc, n.to(DROPOUT)[None, :] * K, k[:, None], tl.load(seed), dropout, scale)
    return acc


@triton.jit
def pixel_load(
    image, n, h, w, g, c0, GROUPS: tl.constexpr, PIXEL: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr
):
    # [PIXELS, BLOCK].  With PIXEL one pixel of many images, a matrix as it lies: the axes that a box has one of come
    # first.  With PIXEL = 2 turned, which is up to a product: what stands between two loads gives each its own barrier.
    if PIXEL == 2:
        if GROUPS == 1:
            box = image.load([h, w, c0, n]).reshape(BLOCK, PIXELS)
        else:
            box = image.load([h, w, g, c0, n]).reshape(BLOCK, PIXELS)
    elif PIXEL:
        if GROUPS == 1:
            box = image.load([h, w, n, c0]).reshape(PIXELS, BLOCK)
        else:
            box = image.load([h, w, g, n, c0]).reshape(PIXELS, BLOCK)
    elif GROUPS == 1:
        box = image.load([n, h, w, c0]).reshape(PIXELS, BLOCK)
    else:
        box = image.load([n, h, w, g, c0]).reshape(PIXELS, BLOCK)
    return box
