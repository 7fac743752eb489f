"""The repaired interpreter against torch, bit for bit where the arithmetic is torch's too, and its watchers."""

import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as stock
from triton.tools.tensor_descriptor import TensorDescriptor

import tileconv.kernels as tk
from tileconv.kernels import hardware, interpreter, watch

pytestmark = pytest.mark.skipif(not hardware.interpreting(), reason="tests of Triton's interpreter")


def same_bits(got: Tensor, expected: Tensor) -> None:
    """Equal, NaN where NaN, and zeros of the same sign."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit()[~got.isnan()], expected.signbit()[~got.isnan()])


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3.0, 1e-40, 65504.0, 3.38e38]


def values(dtype: torch.dtype, count: int = 256) -> Tensor:
    """Normal numbers, then the special ones."""
    x = torch.randn(count) * 10.0 ** torch.randint(-4, 5, (count,))
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(dtype)


@triton.jit
def binary_kernel(x, y, z, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    b = tl.load(y + i)
    if OP == "add":
        r = a + b
    elif OP == "sub":
        r = a - b
    elif OP == "mul":
        r = a * b
    elif OP == "div":
        r = a / b
    elif OP == "less":
        r = a < b
    elif OP == "where":
        r = tl.where(a > b, a, -1.5)
    elif OP == "maximum":
        r = tl.maximum(a, b)
    elif OP == "maximum-nan":
        r = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "minimum":
        r = tl.minimum(a, b)
    elif OP == "fma":
        r = tl.fma(a, b, a)
    elif OP == "constant":
        r = a * 2 + 1
    else:
        r = tl.clamp(a, b, 2.0)
    tl.store(z + i, r)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "less": torch.lt,
    "where": lambda a, b: torch.where(a > b, a, torch.tensor(-1.5, dtype=a.dtype)),
    "maximum": torch.fmax,
    "maximum-nan": torch.maximum,
    "minimum": torch.fmin,
    "fma": lambda a, b: (a.double() * b.double() + a.double()).to(a.dtype),
    "constant": lambda a, b: a * 2 + 1,
    "clamp": lambda a, b: torch.fmin(torch.fmax(a, b), torch.full_like(a, 2.0)),
}


@pytest.mark.parametrize("block", [256, 2048])  # fp16 takes another way from 1024 on
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_is_torchs(op: str, dtype: torch.dtype, block: int) -> None:
    x, y = values(dtype, block), values(dtype, block).flip(0)
    expected = BINARY[op](x, y)
    z = torch.empty_like(expected)
    binary_kernel[(1,)](x, y, z, OP=op, BLOCK=block)
    if expected.dtype == torch.bool:
        assert torch.equal(z, expected)
    else:
        zero = (z == 0) & (expected == 0)  # IEEE leaves the sign of max(0, -0) open
        same_bits(z.masked_fill(zero, 0), expected.masked_fill(zero, 0))


def test_maximum_of_nan_is_the_number() -> None:
    """As a GPU has it; only PropagateNan.ALL keeps NaN."""
    x, y, z = torch.tensor([math.nan, 1.0]), torch.zeros(2), torch.empty(2)
    binary_kernel[(1,)](x, y, z, OP="maximum", BLOCK=2)
    assert z.tolist() == [0.0, 1.0]
    binary_kernel[(1,)](x, y, z, OP="maximum-nan", BLOCK=2)
    assert math.isnan(z[0])


@triton.jit
def cast_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, y, BLOCK=x.numel())
    return y


@pytest.mark.parametrize("count", [256, 2048])
@pytest.mark.parametrize(
    ("source", "target"),
    [(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float64, torch.float16)],
)
def test_fp16_casts(source: torch.dtype, target: torch.dtype, count: int) -> None:
    x = values(source, count)
    same_bits(cast(x, target), x.to(target))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64], ids=str)
def test_to_bf16_rounds_to_nearest_even(source: torch.dtype) -> None:
    x = values(source)
    same_bits(cast(x, torch.bfloat16), x.float().bfloat16())


def test_to_bf16_ties() -> None:
    """One bf16 ulp at 1 is 2**-7: half of it goes to the even neighbour, a little more goes up."""
    ulp = 2.0**-7
    x = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 + 2**-20, -1 - ulp / 2])
    assert cast(x, torch.bfloat16).tolist() == [1.0, 1 + 2 * ulp, 1 + ulp, -1.0]


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64], ids=str)
def test_from_bf16(target: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    same_bits(cast(x, target), x.to(target))


def test_bf16_to_int() -> None:
    x = torch.tensor([1.5, -2.75, 100.0, 0.0]).bfloat16()
    assert cast(x, torch.int32).tolist() == [1, -2, 100, 0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8(dtype: torch.dtype) -> None:
    raw = torch.arange(256, dtype=torch.uint8).view(dtype)
    same_bits(cast(raw, torch.float32), raw.float())
    x = torch.randn(256).clamp(-4, 4) * 2.0 ** torch.randint(-12, 6, (256,))
    same_bits(cast(x, dtype).float(), x.to(dtype).float())
    largest = torch.finfo(dtype).max
    over = torch.tensor([1e30, -math.inf, math.nan, largest])  # a GPU's conversion saturates
    same_bits(cast(over, dtype).float(), torch.tensor([largest, -largest, math.nan, largest]))


@triton.jit
def full_kernel(y, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.full([BLOCK], VALUE, y.dtype.element_ty))


def test_bf16_constants() -> None:
    y = torch.empty(4, dtype=torch.bfloat16)
    full_kernel[(1,)](y, VALUE=1.2, BLOCK=4)
    assert torch.equal(y, torch.full((4,), 1.2, dtype=torch.bfloat16))


@triton.jit
def dot_kernel(a, b, c, PRECISION: tl.constexpr, ACC: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + n[:, None] * K + k[None, :]).T
    acc = tl.dot(x, y, tl.full([M, N], 1.0, ACC), input_precision=PRECISION, out_dtype=ACC)
    tl.store(c + m[:, None] * N + n[None, :], acc)


def dot(a: Tensor, b: Tensor, precision: str = "ieee", acc: Any = tl.float32) -> tuple[Tensor, Tensor]:
    """(1 + a @ b.T as the interpreter has it, the same in float64)."""
    out = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}[acc]
    c = torch.empty(a.shape[0], b.shape[0], dtype=out)
    dot_kernel[(1,)](a, b, c, PRECISION=precision, ACC=acc, M=a.shape[0], N=b.shape[0], K=a.shape[1])
    return c, 1 + a.double() @ b.double().T


@pytest.mark.parametrize(
    ("dtype", "acc", "ulps"),
    [
        (torch.bfloat16, tl.float32, 2**-20),
        (torch.float16, tl.float32, 2**-20),
        (torch.float8_e5m2, tl.float32, 2**-20),
        (torch.float16, tl.float16, 2**-9),
        (torch.float32, tl.float32, 2**-19),
        (torch.float64, tl.float64, 2**-48),
    ],
    ids=str,
)
def test_dot(dtype: torch.dtype, acc: Any, ulps: float) -> None:
    a, b = torch.randn(32, 64).to(dtype), torch.randn(16, 64).to(dtype)
    got, exact = dot(a, b, acc=acc)
    assert (got.double() - exact).abs().max() < ulps * exact.abs().max()


def test_dot_int8() -> None:
    a, b = (torch.randint(-128, 128, (16, 64), dtype=torch.int8) for _ in range(2))
    c = torch.empty(16, 16, dtype=torch.int32)
    dot_kernel[(1,)](a, b, c, PRECISION="ieee", ACC=tl.int32, M=16, N=16, K=64)
    assert torch.equal(c, 1 + a.int() @ b.int().T)


def tf32(x: Tensor) -> Tensor:
    """10 mantissa bits, ties away from zero: added in integers, as cvt.rna does."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tf32_rounds_the_operands() -> None:
    a, b = torch.randn(16, 64), torch.randn(16, 64)
    got, exact = dot(a, b, "tf32")
    rounded = 1 + tf32(a).double() @ tf32(b).double().T
    assert (got.double() - rounded).abs().max() < 1e-5 * exact.abs().max()
    assert (got.double() - exact).abs().max() > 1e-4 * exact.abs().max()


@pytest.mark.parametrize(("precision", "bound"), [("tf32x3", 2**-18), ("bf16x3", 2**-14), ("bf16x6", 2**-18)])
def test_emulated_fp32(precision: str, bound: float) -> None:
    """Three tf32 or six bf16 products are as good as fp32; three bf16 products lie between."""
    got, exact = dot(torch.randn(16, 64), torch.randn(16, 64), precision)
    error = (got.double() - exact).abs().max() / exact.abs().max()
    assert error < bound
    if precision == "bf16x3":
        assert error > 2**-20


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "bf16x6"])
def test_rounded_operands_keep_infinity_and_nan(precision: str) -> None:
    a = torch.zeros(16, 16)
    a[0, 0], a[1, 0] = math.inf, math.nan
    a[2, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that rounding up would make -0
    got, _ = dot(a, torch.full((16, 16), 1.5), precision)
    assert got[0].tolist() == [math.inf] * 16
    assert got[1:3].isnan().all()
    assert got[3:].tolist() == [[1.0] * 16] * 13


@triton.jit
def larger_then_left(a, i, b, j):
    left = (a > b) | ((a == b) & (i < j))
    return tl.where(left, a, b), tl.where(left, i, j)


@triton.jit
def larger_by_branch(a, i, b, j):
    if a > b:
        r = a
        s = i
    elif b > a:
        r = b
        s = j
    else:
        r = a
        s = tl.minimum(i, j)
    return r, s


@triton.jit
def reduce_kernel(x, y, at, OP: tl.constexpr, COMBINE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    v = tl.load(x + m[:, None] * N + n[None, :])
    if OP == "sum":
        tl.store(y + m, tl.sum(v, axis=1))
    elif OP == "max":
        tl.store(y + m, tl.max(v, axis=1))
    elif OP == "min":
        tl.store(y + m, tl.min(v, axis=1))
    elif OP == "argmax":
        r, i = tl.max(v, axis=1, return_indices=True)
        tl.store(y + m, r)
        tl.store(at + m, i)
    elif OP == "cumsum":
        tl.store(y + m[:, None] * N + n[None, :], tl.cumsum(v, axis=1))
    else:
        r, i = tl.reduce((v, n[None, :] + m[:, None] * 0), 1, COMBINE)
        tl.store(y + m, r)
        tl.store(at + m, i)


def run_reduce(op: str, x: Tensor, combine: Any = None) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape if op == "cumsum" else x.shape[:1], dtype=x.dtype)
    at = torch.empty(x.shape[0], dtype=torch.int32)
    reduce_kernel[(1,)](x, y, at, OP=op, COMBINE=combine, M=x.shape[0], N=x.shape[1])
    return y, at


@triton.jit
def sums_kernel(x, down, across, both, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    v = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(down + n[None, :], tl.sum(v, axis=0, keep_dims=True))
    tl.store(across + m, tl.sum(v, axis=1))
    tl.store(both, tl.sum(v))
    tl.store(both + 1, tl.sum(v, keep_dims=True).reshape(()))


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.float32, 2**-24), (torch.float64, 2**-52), (torch.int32, 0)],
    ids=["fp32", "fp64", "int32"],
)
def test_a_term_of_a_sum_is_rounded_as_often_as_a_tree_is_high(dtype: torch.dtype, unit: float) -> None:
    """numpy adds 32,768 rows one after the other, and is off by up to 3.5 times the bound."""
    x = torch.rand(32_768, 8).to(dtype) if dtype.is_floating_point else torch.randint(-9, 9, (32_768, 8), dtype=dtype)
    down, across, both = (torch.empty(size, dtype=dtype) for size in (8, 32_768, 2))
    sums_kernel[(1,)](x, down, across, both, M=32_768, N=8)
    for got, height, axes in ((down, 15, 0), (across, 3, 1), (both, 18, (0, 1))):
        exact = x.double().sum(axes)
        assert ((got.double() - exact).abs() <= height * unit * exact.abs()).all()


@pytest.mark.parametrize("op", ["sum", "max", "min", "argmax", "cumsum"])
def test_bf16_reductions(op: str) -> None:
    x = torch.randn(8, 32).round(decimals=1).bfloat16()
    y, at = run_reduce(op, x)
    if op == "argmax":
        assert torch.equal(y, x.amax(1))
        assert at.tolist() == x.float().numpy().argmax(1).tolist()  # the first of equals, in numpy too
    else:
        wide = x.float()
        theirs = {"sum": wide.sum(1), "max": wide.amax(1), "min": wide.amin(1), "cumsum": wide.cumsum(1)}[op]
        torch.testing.assert_close(y, theirs.bfloat16(), rtol=2**-7, atol=0)


def test_max_passes_over_nan_without_a_warning() -> None:
    x = torch.tensor([[math.nan, 1.0], [math.nan, math.nan]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = run_reduce("max", x)
    same_bits(y, torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize("combine", [larger_then_left, larger_by_branch], ids=["elementwise", "branches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_custom_reduction(combine: Any, dtype: torch.dtype) -> None:
    """Blocks at a time where the combine function allows it; one that branches takes the slow way."""
    x = torch.randint(0, 5, (4, 16)).to(dtype)
    y, at = run_reduce("custom", x, combine)
    assert torch.equal(y, x.amax(1))
    assert at.tolist() == x.float().numpy().argmax(1).tolist()


@triton.jit
def integer_kernel(x, y):
    v = tl.load(x)
    tl.store(y, v + 1)
    tl.store(y + 1, tl.cdiv(v, 2) * 4)


def test_int32_wraps() -> None:
    x, y = torch.tensor([2**31 - 1], dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    integer_kernel[(1,)](x, y)
    assert y.tolist() == [-(2**31), 0]


# Descriptors.


@triton.jit
def copy_box_kernel(x, y, a, b, c, d, e, NDIM: tl.constexpr):
    if NDIM == 2:
        y.store([a, b], x.load([a, b]))
    elif NDIM == 4:
        y.store([a, b, c, d], x.load([a, b, c, d]))
    else:
        y.store([a, b, c, d, e], x.load([a, b, c, d, e]))


@triton.jit
def load_box_kernel(x, y, a, b, c, d, e, NDIM: tl.constexpr, SIZE: tl.constexpr):
    if NDIM == 2:
        v = x.load([a, b])
    elif NDIM == 4:
        v = x.load([a, b, c, d])
    else:
        v = x.load([a, b, c, d, e])
    tl.store(y + tl.arange(0, SIZE), v.reshape(SIZE))


BOXES = [
    ("inside", (16, 32), [8, 16], (4, 8)),
    ("over-the-end", (13, 24), [8, 16], (9, 16)),
    ("before-the-start", (13, 24), [8, 16], (-3, -8)),
    ("around", (3, 8), [8, 32], (-2, -16)),
    ("outside", (13, 24), [8, 16], (13, 0)),
    ("far-outside", (13, 24), [8, 16], (-8, -1000000)),
    ("image", (3, 5, 5, 24), [2, 4, 8, 16], (2, -1, -2, 16)),
    ("groups", (3, 5, 7, 3, 24), [2, 4, 8, 1, 16], (2, 3, -1, 1, 16)),
    ("group-outside", (3, 5, 7, 3, 24), [2, 4, 8, 1, 16], (0, 0, 0, 3, 0)),
]


@pytest.fixture(params=["fast", "stock"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The repaired descriptor operations, and the ones they replaced."""
    if request.param == "stock":
        for name in ("create_descriptor_load", "create_descriptor_store"):
            monkeypatch.setattr(stock.InterpreterBuilder, name, getattr(stock.InterpreterBuilder, name).__wrapped__)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "block", "start"), [row[1:] for row in BOXES], ids=[row[0] for row in BOXES])
def test_descriptors(path: str, shape: tuple[int, ...], block: list[int], start: tuple[int, ...], dtype: Any) -> None:
    """Zero fill and clipped stores, against indexing by hand."""
    wide = torch.randn(*shape[:-1], shape[-1] + 8).to(dtype)
    x = wide[..., : shape[-1]]  # rows with gaps between them
    y = torch.full(shape, 7.0, dtype=dtype)
    inside = tuple(slice(max(0, i), max(0, min(n, i + b))) for i, n, b in zip(start, shape, block, strict=True))
    expected = torch.full(shape, 7.0, dtype=dtype)
    expected[inside] = x[inside]
    offsets = [*start, *[0] * (5 - len(start))]
    copy_box_kernel[(1,)](descriptor(x, block), descriptor(y, block), *offsets, NDIM=len(shape))
    assert torch.equal(y, expected)
    size = math.prod(block)
    loaded = torch.empty(size, dtype=dtype)
    load_box_kernel[(1,)](descriptor(x, block), loaded, *offsets, NDIM=len(shape), SIZE=size)
    box = torch.zeros(block, dtype=dtype)
    there = tuple(
        slice(s.start - i, s.stop - i) if s.stop > s.start else slice(0, 0) for s, i in zip(inside, start, strict=True)
    )
    box[there] = x[inside] if all(s.stop > s.start for s in inside) else 0
    assert torch.equal(loaded.reshape(block), box)


@triton.jit
def device_descriptor_kernel(x, y, H, W, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [H, W], [W, 1], [BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(y, [H, W], [W, 1], [BLOCK, BLOCK])
    for i in tl.range(0, tl.cdiv(H, BLOCK)):
        target.store([i * BLOCK, 0], source.load([i * BLOCK, 0]) * 2)


def test_device_made_descriptors(path: str) -> None:
    x = torch.randn(21, 16).bfloat16()
    y = torch.empty_like(x)
    device_descriptor_kernel[(1,)](x, y, 21, 16, BLOCK=16)
    assert torch.equal(y, x * 2)


def test_descriptor_pads_with_nan_if_asked() -> None:
    x, y = torch.ones(4, 16).bfloat16(), torch.empty(8 * 16, dtype=torch.bfloat16)
    desc = TensorDescriptor(x, list(x.shape), list(x.stride()), [8, 16], padding="nan")
    load_box_kernel[(1,)](desc, y, 0, 0, 0, 0, 0, NDIM=2, SIZE=8 * 16)
    assert y[: 4 * 16].eq(1).all()
    assert y[4 * 16 :].isnan().all()


def test_unaligned_last_offset_is_refused() -> None:
    x = torch.zeros(4, 32).half()
    with pytest.raises(Exception, match="multiple of 16 bytes"):
        copy_box_kernel[(1,)](descriptor(x, [4, 16]), descriptor(x, [4, 16]), 0, 3, 0, 0, 0, NDIM=2)


# Pointers.


@triton.jit
def gather_kernel(x, y, at, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    j = tl.load(at + i)
    v = tl.load(x + j, mask=(j >= 0) & (j < n), other=OTHER)
    tl.store(y + i, v, mask=i % 3 != 1)
    tl.store(y + BLOCK + i, v)
    tl.store(y + i, v, mask=i < 0)


@pytest.mark.parametrize("block", [32, 4096])  # below and above where blocks go to numpy as a whole
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gather_and_scatter(dtype: torch.dtype, block: int) -> None:
    x = torch.randint(-99, 100, (1000,)).to(dtype)
    at = torch.randint(-50, 1050, (block,), dtype=torch.int32)
    y = torch.full((2 * block,), 77).to(dtype)
    with watch.bounds_check():
        gather_kernel[(1,)](x, y, at, 1000, OTHER=5, BLOCK=block)
    inside = (at >= 0) & (at < 1000)
    loaded = torch.where(inside, x[at.clamp(0, 999)], torch.full((), 5, dtype=dtype))
    kept = torch.arange(block) % 3 == 1
    assert torch.equal(y[:block], torch.where(kept, torch.full((), 77, dtype=dtype), loaded))
    assert torch.equal(y[block:], loaded)


@triton.jit
def unaligned_kernel(x, y, BLOCK: tl.constexpr):
    """Every other two-byte load starts at an odd address: two elements straddled."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load((x + 3 * i).to(tl.pointer_type(tl.int16))))


def test_unaligned_addresses() -> None:
    x = torch.arange(3 * 2048 + 1).remainder(127).to(torch.int8)
    y = torch.empty(2048, dtype=torch.int16)
    unaligned_kernel[(1,)](x, y, BLOCK=2048)
    low, high = x[0::3][:2048].short(), x[1::3][:2048].short()
    assert torch.equal(y, low + 256 * high)


# Watchers.


@triton.jit
def shifted_copy_kernel(x, y, n, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i + shift, mask=i < n, other=0.0), mask=i < n)


@pytest.fixture
def middle() -> Iterator[Tensor]:
    """Ten elements with memory of ours on both sides, so that a stray access harms nothing."""
    yield torch.randn(100)[40:50]


@pytest.mark.parametrize(("shift", "offset"), [(-1, -1), (1, 10)], ids=["before", "after"])
def test_bounds_check_finds_a_near_miss(middle: Tensor, shift: int, offset: int) -> None:
    y = torch.empty(10)
    with watch.bounds_check(), pytest.raises(watch.OutOfBounds, match=f"element {offset} of `x`") as caught:
        shifted_copy_kernel[(2,)](middle, y, 10, shift, BLOCK=8)
    assert (caught.value.tensor, caught.value.offset) == ("x", offset)
    shifted_copy_kernel[(2,)](middle, y, 10, shift, BLOCK=8)  # outside the context nobody looks


def test_bounds_check_finds_a_stray_store(middle: Tensor) -> None:
    before = middle.clone()
    with watch.bounds_check(), pytest.raises(watch.OutOfBounds, match="store of 2 element"):
        shifted_copy_kernel[(2,)](torch.zeros(12), middle, 12, 0, BLOCK=8)
    assert torch.equal(middle[8:], before[8:])  # stopped before it was written
    assert middle[:8].eq(0).all()


def test_bounds_check_looks_into_descriptors() -> None:
    """A descriptor that promises more rows than its tensor has."""
    x, y = torch.zeros(64, 16).half()[:4], torch.empty(8, 16).half()
    honest = descriptor(x, [8, 16])
    lying = TensorDescriptor(x, [8, 16], [16, 1], [8, 16])
    with watch.bounds_check():
        copy_box_kernel[(1,)](honest, descriptor(y, [8, 16]), 0, 0, 0, 0, 0, NDIM=2)
        copy_box_kernel[(1,)](honest, descriptor(y, [8, 16]), -4, -8, 0, 0, 0, NDIM=2)
        with pytest.raises(watch.OutOfBounds, match=r"load of 64 element.*element 64 of `x`"):
            copy_box_kernel[(1,)](lying, descriptor(y, [8, 16]), 0, 0, 0, 0, 0, NDIM=2)


def test_bounds_check_lets_clean_kernels_pass(middle: Tensor) -> None:
    y = torch.empty(10)
    with watch.bounds_check():
        shifted_copy_kernel[(2,)](middle, y, 10, 0, BLOCK=8)
    assert torch.equal(y, middle)


@triton.jit
def stencil_kernel(x, y, counter, n, BLOCK: tl.constexpr):
    """y[i] = x[i] + x[i + 1]: every element of x but the ends is read twice."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0.0)
    b = tl.load(x + i + 1, mask=i < n, other=0.0)
    tl.store(y + i, a + b, mask=i < n)
    tl.atomic_add(counter, 1)


def test_count_bytes_of_pointers() -> None:
    x, y, counter = torch.randn(11).half(), torch.empty(10).half(), torch.zeros(1, dtype=torch.int32)
    with watch.count_bytes() as count:
        stencil_kernel[(2,)](x, y, counter, 10, BLOCK=8)
    assert count.read == {"x": (2 * 10 * 2, 11 * 2), "counter": (2 * 4, 4)}
    assert count.written == {"y": (10 * 2, 10 * 2), "counter": (2 * 4, 4)}
    assert count.read["x"].requested == 40


def test_count_bytes_of_descriptors() -> None:
    """Two overlapping boxes that hang over the edge, in two launches: distinct bytes are those of each launch."""
    x, y = torch.randn(6, 24).half(), torch.empty(6, 24).half()
    with watch.count_bytes() as count:
        for row in (-1, 4):
            copy_box_kernel[(1,)](descriptor(x, [4, 16]), descriptor(y, [4, 16]), row, 16, 0, 0, 0, NDIM=2)
        copy_box_kernel[(1,)](descriptor(x, [4, 16]), descriptor(y, [4, 16]), 0, 0, 0, 0, 0, NDIM=2)
    bytes_moved = 2 * (3 * 8 + 2 * 8 + 4 * 16)
    assert count.read == {"x": (bytes_moved, bytes_moved)}
    assert count.written == {"y": (bytes_moved, bytes_moved)}


def test_watchers_are_removed_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), watch.bounds_check(), watch.count_bytes():
        raise ZeroDivisionError
    assert not watch.watchers


@triton.jit
def _plain(a, b):
    return a * b + 1.0


@triton.jit
def _branching(a, b):
    if a > b:
        a = b
    return a


@triton.jit
def map_kernel(x, y, FUNCTION: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    block = tl.load(x + i)[:, None] + tl.zeros((1, BLOCK), tl.float32)
    out = tl.map_elementwise(FUNCTION, block, tl.load(x + i)[None, :], pack=PACK)
    tl.store(y + i[:, None] * BLOCK + i[None, :], out)


def test_map_elementwise_is_a_call_on_blocks_and_refuses_what_that_cannot_do() -> None:
    x, y = torch.randn(16), torch.full((16, 16), math.nan)
    map_kernel[(1,)](x, y, FUNCTION=_plain, PACK=1, BLOCK=16)
    torch.testing.assert_close(y, x[:, None] * x + 1)
    for function, pack, says in ((_branching, 1, "cannot branch on an element"), (_plain, 2, "pack=2")):
        with pytest.raises(triton.runtime.errors.InterpreterError, match=says):
            map_kernel[(1,)](x, y, FUNCTION=function, PACK=pack, BLOCK=16)


# The repair itself.


class Together(watch.Watcher):
    """How many launches there are at once, at most."""

    now = most = 0

    def begin(self, tensors: list[Any]) -> None:
        self.now += 1
        time.sleep(0.02)
        self.most = max(self.most, self.now)
        self.now -= 1

    def touch(self, kind: str, addresses: Any, size: int) -> None:
        """Nothing."""


def test_launches_of_threads_wait_for_each_other() -> None:
    """A launch patches triton.language for the process: side by side, the first to end took that from the other."""
    x, together = torch.arange(-8.0, 8.0), Together()
    begin = threading.Barrier(4)

    def run(i: int) -> Tensor:
        begin.wait()
        return tk.relu(x + i)

    with watch.watching(together), ThreadPoolExecutor(4) as pool:
        every = list(pool.map(run, range(4)))
    assert together.most == 1
    assert all(torch.equal(y, (x + i).relu()) for i, y in enumerate(every))


def test_repair_is_idempotent() -> None:
    before = stock.InterpreterBuilder.binary_op
    interpreter.repair()
    assert stock.InterpreterBuilder.binary_op is before


def test_repair_names_what_this_triton_lacks() -> None:
    """In a process of its own: a Triton without create_dot is refused, not half repaired in silence."""
    script = """
from triton.runtime import interpreter as stock
del stock.InterpreterBuilder.create_dot
from tileconv.kernels import interpreter
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "RuntimeError: Triton" in done.stderr
    assert "InterpreterBuilder has no create_dot" in done.stderr


@triton.jit
def _store_under_a_scalar_condition(out, tap, K, ROWS: tl.constexpr, COLS: tl.constexpr):
    k = tl.arange(0, ROWS)
    mask = ((k < K) & (tap < 9))[:, None] & (tl.arange(0, COLS) < 40)[None, :]
    places = out + k[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(places, tl.load(places, mask=mask, other=0.0) + 1.0, mask=mask)


def test_a_mask_made_with_a_scalar_is_a_mask_not_an_index() -> None:
    out = torch.zeros(32, 64)
    _store_under_a_scalar_condition[(1,)](out, 3, 24, ROWS=32, COLS=64)
    want = torch.zeros(32, 64)
    want[:24, :40] = 1
    assert torch.equal(out, want)
