"""fp32 numbers as sums of bf16 numbers: what tensor cores multiply in the place of fp32."""

import triton
import triton.language as tl


# y[n, u, v, part, c] or y[part, n, u, v, c], with x[n, u, v, c] = sum over part: each part is what those before it
# leave, rounded to nearest.  Three hold an fp32 number whole.
@triton.jit
def split(
    x,  # pointer to fp32, any strides
    y,  # pointer to bf16 [N, U, V, PITCH]
    U,
    V,
    stride_xn,
    stride_xu,
    stride_xv,
    stride_xc,
    part,  # from one part to the next: C where PITCH is PARTS * C, all of x where it is C
    C: tl.constexpr,  # constant, so that wide stores are proven aligned
    PITCH: tl.constexpr,
    PARTS: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,  # of v
    COLS: tl.constexpr,  # of c
):
    LARGEST: tl.constexpr = 3.3895313892515355e38  # of bf16: fp32 numbers beyond it would round to infinity
    t = tl.program_id(0)
    c = t % tl.cdiv(C, COLS) * COLS + tl.arange(0, COLS)
    t = t // tl.cdiv(C, COLS)
    strip = t // tl.cdiv(V, ROWS)
    v = tl.cast(t % tl.cdiv(V, ROWS), INDEX) * ROWS + tl.arange(0, ROWS)
    n = (strip // U).to(tl.int64)
    u = (strip % U).to(INDEX)
    inside = (v < V)[:, None] & (c < C)[None, :]
    pixels = x + (n * stride_xn + u * stride_xu) + v[:, None] * stride_xv
    rest = tl.load(pixels + c.to(INDEX)[None, :] * stride_xc, mask=inside, other=0.0)
    out = y + ((strip.to(tl.int64) * V + v) * PITCH)[:, None] + c[None, :]
    finite = tl.abs(rest) < float("inf")
    near = tl.where(finite, tl.minimum(tl.maximum(rest, -LARGEST), LARGEST), rest)
    for i in tl.static_range(PARTS):
        head = (near if i == 0 else rest).to(tl.bfloat16)
        tl.store(out + tl.cast(part, tl.int64) * i, head, mask=inside)
        rest = tl.where(finite, rest - head.to(tl.float32), 0.0)
