"""Average, Lp and adaptive max-pool, and max-unpool: numbers, gradients, odd values and windows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.bench.inspect import COMPILING
from tileconv.kernels import device, reference
from tileconv.kernels.watch import bounds_check

MEMORY_FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
AVERAGES: dict[str, tuple[Any, ...]] = {
    "plain": (3, 2),
    "default stride": (2,),
    "padded": (3, 2, 1),
    "padding not counted": (3, 2, 1, False, False),
    "ceil": (2, 2, 0, True),
    "ceil and padding": (3, 2, 1, True, True),
    "ceil, padding not counted": (3, 2, 1, True, False),
    "divisor": (3, 2, 1, True, True, 7),
    "negative divisor": (3, 2, 0, False, True, -2),
    "uneven": ((3, 2), (2, 1), (1, 0), True),
    "gaps between windows": (2, 3),
    "windows beyond every second element": (2, 5, 1, True),
    "heavy overlap": (5, 1, 2, False, False),
    "whole image": ((9, 8),),
}
NORMS: dict[str, tuple[Any, ...]] = {
    "L2": (2, 3, 2),
    "L2, default stride": (2.0, 2),
    "L1": (1, 2, 2),
    "L3": (3, (3, 2), (2, 1)),
    "L4, ceil": (4, 2, 2, True),
    "L2, ceil": (2, 3, 2, True),
    "L1.5": (1.5, 3, 2),
    "L0.5": (0.5, 2, 1),
    "L8": (8, 2, 2),
}


def value_and_grad(pool: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = pool(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y) if dy is None else dy.to(y.dtype))[0]


def within_budget(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor, roundings: float = 0
) -> Tensor:
    """Values and gradients against torch's in float64, with torch's own error in x's dtype; returns our values.

    `roundings` of the largest gradient are allowed beyond that.
    """
    dy = torch.randn(theirs(x).shape).to(x.dtype)
    with bounds_check():
        mine = value_and_grad(ours, x, dy)
    them, exactly = value_and_grad(theirs, x, dy), value_and_grad(theirs, x.double(), dy)
    for got, same, exact, extra in zip(mine, them, exactly, (0, roundings), strict=True):
        assert got.dtype == x.dtype
        assert got.stride() == same.stride()
        more = extra * torch.finfo(x.dtype).eps * exact.abs().max().item()
        assert reference.error(got, exact) <= reference.allowed_error(exact, same) + more
    return mine[0]


@DTYPES
@MEMORY_FORMATS
@pytest.mark.parametrize("window", AVERAGES.values(), ids=AVERAGES)
def test_average_pool(window: tuple[Any, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 9, 8).to(dtype).contiguous(memory_format=memory_format)
    y = within_budget(lambda x: tk.avg_pool2d(x, *window), lambda x: F.avg_pool2d(x, *window), x)
    exact = reference.avg_pool2d(x, *window)
    assert reference.error(y, exact) <= 2 * torch.finfo(dtype).eps * exact.abs().max().item()


@DTYPES
@MEMORY_FORMATS
@pytest.mark.parametrize("window", NORMS.values(), ids=NORMS)
def test_norm_pool(window: tuple[Any, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 9, 8)
    x = (x if window[0] in (2, 4) else x.abs() + 0.1).to(dtype).contiguous(memory_format=memory_format)
    # Backward raises x / y to the norm - 1, and y with it, which was kept rounded.
    roundings = max(0, window[0] - 4)
    y = within_budget(lambda x: tk.lp_pool2d(x, *window), lambda x: F.lp_pool2d(x, *window), x, roundings)
    exact = reference.lp_pool2d(x, *window)
    assert reference.error(y, exact) <= 4 * torch.finfo(dtype).eps * exact.abs().max().item()


def test_l2_pool_is_the_root_of_the_sum_of_squares() -> None:
    x = torch.tensor([[3.0, 0.0, 1.0, 1.0], [0.0, 4.0, 1.0, -1.0]]).reshape(1, 1, 2, 4)
    assert torch.equal(tk.lp_pool2d(x, 2, 2), torch.tensor([5.0, 2.0]).reshape(1, 1, 1, 2))


def test_odd_and_broken_norms_of_negative_values_are_torchs() -> None:
    x = torch.tensor([-2.0, 1.0, -1.0, 2.0, 0.0, 0.5]).reshape(1, 1, 1, 6)
    for norm in (1, 3, 2.5, 0.5):
        torch.testing.assert_close(
            tk.lp_pool2d(x, norm, (1, 2)), F.lp_pool2d(x, norm, (1, 2)), equal_nan=True, msg=f"norm {norm}"
        )


def test_windows_of_zeros_have_no_gradient() -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = -2.0
    _, dx = value_and_grad(lambda x: tk.lp_pool2d(x, 2, 2), x)
    want = torch.zeros_like(x)
    want[0, 0, 0, 0] = -1.0
    assert torch.equal(dx, want)
    assert torch.equal(value_and_grad(lambda x: F.lp_pool2d(x, 2, 2), x)[1], want)


def test_squares_beyond_fp16() -> None:
    x = (400 * torch.randn(2, 3, 6, 6)).half()
    assert F.lp_pool2d(x, 2, 2).isinf().any()
    y, dx = value_and_grad(lambda x: tk.lp_pool2d(x, 2, 2), x)
    exact, exact_dx = value_and_grad(lambda x: F.lp_pool2d(x, 2, 2), x.double())
    assert reference.error(y, exact) <= torch.finfo(torch.float16).eps * exact.max().item()
    assert reference.error(dx, exact_dx) <= 2 * torch.finfo(torch.float16).eps


@MEMORY_FORMATS
def test_nan_and_infinity(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 8, 9)
    x[0, 0, 2:4, 2:4] = float("nan")
    x[1, 2, ::3, ::4] = float("inf")
    x[0, 1] = float("-inf")
    x = x.contiguous(memory_format=memory_format)
    torch.testing.assert_close(tk.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1), equal_nan=True)
    torch.testing.assert_close(tk.lp_pool2d(x, 2, 3, 2), F.lp_pool2d(x, 2, 3, 2), equal_nan=True)
    want, want_indices = reference.adaptive_max_pool2d(x, (3, 4))
    y, indices = tk.adaptive_max_pool2d(x, (3, 4), return_indices=True)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.double().nan_to_num(), want.nan_to_num())
    assert torch.equal(indices, want_indices)
    assert torch.equal(F.adaptive_max_pool2d(x, (3, 4), return_indices=True)[1], want_indices)


@DTYPES
@MEMORY_FORMATS
@pytest.mark.parametrize("size", [(6, 6), (3, 4), (5, None), (1, 1), (13, 2), 7], ids=str)
def test_adaptive_max_pool(size: Any, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randint(-4, 5, (2, 3, 6, 7)).to(dtype).contiguous(memory_format=memory_format)  # many ties
    want, want_indices = F.adaptive_max_pool2d(x, size, return_indices=True)
    y, indices = tk.adaptive_max_pool2d(x, size, return_indices=True)
    assert torch.equal(y, want) and y.stride() == want.stride()
    assert torch.equal(indices, want_indices) and indices.dtype == torch.int64
    assert torch.equal(tk.adaptive_max_pool2d(x, size), want)
    exact, exact_indices = reference.adaptive_max_pool2d(x, tuple(want.shape[2:]))
    assert torch.equal(y.double(), exact) and torch.equal(indices, exact_indices)
    dy = torch.randint(-4, 5, y.shape).to(dtype)  # sums are exact
    dx = value_and_grad(lambda x: tk.adaptive_max_pool2d(x, size), x, dy)[1]
    assert torch.equal(dx.double(), reference.max_pool2d_backward(dy, want_indices, x.shape))


def test_adaptive_windows_of_more_than_256_elements() -> None:
    x = torch.randn(1, 2, 40, 37)
    want, want_indices = F.adaptive_max_pool2d(x, 2, return_indices=True)
    y, indices = tk.adaptive_max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, want) and torch.equal(indices, want_indices)
    dx = value_and_grad(lambda x: tk.adaptive_max_pool2d(x, 2), x)[1]
    assert torch.equal(dx.double(), reference.max_pool2d_backward(torch.ones_like(y), want_indices, x.shape))


@DTYPES
@MEMORY_FORMATS
def test_unpool_undoes_max_pool(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.rand(2, 5, 9, 8).to(dtype).contiguous(memory_format=memory_format)
    y, indices = tk.max_pool2d(x, 2, return_indices=True)
    back = tk.max_unpool2d(y, indices, 2, output_size=x.shape)
    assert torch.equal(back, F.max_unpool2d(y, indices, 2, output_size=x.shape[2:]))
    assert torch.equal(back.double(), reference.max_unpool2d(y, indices, (9, 8)))
    assert back.is_contiguous(memory_format=memory_format)
    assert torch.equal(tk.max_pool2d(back, 2), y)
    dy = torch.randn(back.shape).to(dtype)
    dx = value_and_grad(lambda y: tk.max_unpool2d(y, indices, 2, output_size=(9, 8)), y, dy)[1]
    assert torch.equal(dx, dy.flatten(2).gather(2, indices.flatten(2)).view(y.shape))


@MEMORY_FORMATS
def test_the_last_of_repeated_indices_stays(memory_format: torch.memory_format) -> None:
    y = torch.randn(3, 4, 11, 9).contiguous(memory_format=memory_format)
    indices = torch.randint(0, 60, y.shape)  # in another memory format than y, every place named about twice
    size = (22, 18)
    ours = tk.max_unpool2d(y, indices, 2)
    assert torch.equal(ours.double(), reference.max_unpool2d(y, indices, size))
    assert torch.equal(ours, tk.max_unpool2d(y, indices, 2))
    pooled, overlapping = tk.max_pool2d(torch.rand(2, 3, 9, 9), 3, 1, return_indices=True)
    back = tk.max_unpool2d(pooled, overlapping, 3, 1)
    assert torch.equal(back.double(), reference.max_unpool2d(pooled, overlapping, (9, 9)))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda x: tk.avg_pool2d(x, 3, 2, 1, True, False),
    "L2": lambda x: tk.lp_pool2d(x, 2, 3, 2),
    "L4": lambda x: tk.lp_pool2d(x, 4, 2, 1, True),
    "L1": lambda x: tk.lp_pool2d(x.abs(), 1, 2, 1),
    "L1.5": lambda x: tk.lp_pool2d(x.abs(), 1.5, 2),
    "adaptive max": lambda x: tk.adaptive_max_pool2d(x, (3, 4)),
    "unpool": lambda x: tk.max_unpool2d(x, torch.arange(60).reshape(1, 2, 5, 6) % 41, 3),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_gradcheck_and_gradgradcheck(pool: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(pool, (x,), fast_mode=True)


BACKWARD = POOLS | {
    "max": lambda x: tk.max_pool2d(x, 3, 1, 1),
    "adaptive average": lambda x: tk.adaptive_avg_pool2d(x, (3, 4)),
}


@MEMORY_FORMATS
@pytest.mark.parametrize("pool", BACKWARD.values(), ids=BACKWARD)
def test_backward_repeats_to_the_bit(pool: Callable[[Tensor], Tensor], memory_format: torch.memory_format) -> None:
    """Of overlapping windows and gradients whose sum depends on its order; and near the one in float64."""
    x = torch.rand(1, 2, 5, 6).contiguous(memory_format=memory_format)
    shape = pool(x).shape
    dy = torch.randn(shape) * 10.0 ** torch.randint(-3, 4, shape)
    first, second = (value_and_grad(pool, x, dy) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    exact = value_and_grad(pool, x.double(), dy)[1]
    assert reference.error(first[1], exact) <= 1e-5 * exact.abs().max().item()


def test_no_kernel_adds_atomically() -> None:
    """What runs in a changing order on a GPU runs in one order here, so the sources are asked."""
    sources = sorted(Path(device.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    assert not [path.name for path in sources if re.search(r"\batomic_\w+\(", path.read_text())]


@pytest.mark.parametrize("pool", [POOLS[name] for name in ("average", "L2", "adaptive max")])
def test_no_batch_an_empty_one_and_slices(pool: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 8, 9)
    assert torch.equal(pool(x[1]), pool(x)[1])
    empty = torch.randn(0, 3, 8, 9, requires_grad=True)
    y = pool(empty)
    y.sum().backward()
    assert y.shape == (0, *pool(x).shape[1:]) and empty.grad is not None and empty.grad.shape == empty.shape
    whole = torch.randn(3, 9, 16, 12)
    for view in (whole[:, 1:8, ::2, 2:11], whole.permute(0, 3, 1, 2)[:, ::2]):
        for ours, copied in zip(value_and_grad(pool, view), value_and_grad(pool, view.contiguous()), strict=True):
            torch.testing.assert_close(ours, copied)


@pytest.mark.parametrize("pool", [POOLS[name] for name in ("average", "L2", "adaptive max", "unpool")])
def test_compiles_without_graph_breaks(pool: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    x = torch.randn(1, 2, 5, 6)
    compiled = value_and_grad(torch.compile(pool, backend="aot_eager", fullgraph=True, dynamic=True), x)
    for ours, eager in zip(compiled, value_and_grad(pool, x), strict=True):
        torch.testing.assert_close(ours, eager)


def test_modules_are_torchs() -> None:
    x = torch.randn(2, 3, 8, 8)
    for ours, theirs in (
        (tk.nn.AvgPool2d(3, 2, 1, True, False), torch.nn.AvgPool2d(3, 2, 1, True, False)),
        (tk.nn.LPPool2d(2, 3, 2), torch.nn.LPPool2d(2, 3, 2)),
        (tk.nn.AdaptiveMaxPool2d((3, None)), torch.nn.AdaptiveMaxPool2d((3, None))),
    ):
        assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
        torch.testing.assert_close(ours(x), theirs(x))
    pooled, indices = tk.nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(tk.nn.MaxUnpool2d(2)(pooled, indices), torch.nn.MaxUnpool2d(2)(pooled, indices))


def test_bad_input() -> None:
    x, places = torch.randn(1, 2, 4, 4), torch.arange(16).reshape(4, 4).expand(1, 2, 4, 4)
    for call, error, message in (
        (lambda: tk.avg_pool2d(x, 3, padding=2), ValueError, "padding=\\(2, 2\\) must be at most half"),
        (lambda: tk.avg_pool2d(x, 5), ValueError, "too small"),
        (lambda: tk.avg_pool2d(x, 2, divisor_override=0), ValueError, "divisor_override is 0"),
        (lambda: tk.avg_pool2d(x, 2, divisor_override=1.5), TypeError, "divisor_override must be an int"),
        (lambda: tk.lp_pool2d(x, 0, 2), ValueError, "norm_type is 0"),
        (lambda: tk.lp_pool2d(x, float("inf"), 2), ValueError, "norm_type is inf"),
        (lambda: tk.adaptive_max_pool2d(x, (2, 2, 2)), ValueError, "output_size"),
        (lambda: tk.adaptive_max_pool2d(x, 0), ValueError, "output_size is 0"),
        (lambda: tk.max_unpool2d(x, places.int(), 2), TypeError, "indices must be a torch.Tensor of torch.int64"),
        (lambda: tk.max_unpool2d(x, places[..., :2], 2), ValueError, "indices have shape"),
        (lambda: tk.max_unpool2d(x, places + 60, 2), ValueError, "reach from 60 to 75: allowed are 0 to 63"),
        (lambda: tk.max_unpool2d(x, places - 1, 2), ValueError, "reach from -1"),
        (lambda: tk.max_unpool2d(x, places, 2, output_size=(10, 8)), ValueError, "less than a stride"),
        (lambda: tk.max_unpool2d(x, places, 2, output_size=(8,)), ValueError, "output_size is \\(8,\\)"),
        (lambda: tk.max_unpool2d(x[..., :1, :1], places[..., :1, :1], 2, padding=1), ValueError, "an output of 0x0"),
    ):
        with pytest.raises(error, match=message):
            call()


COMPILE = """
import torch
import tileconv.kernels
from tileconv.bench.inspect import inspect_launch
from tileconv.kernels import hardware
from tileconv.kernels.geometry import AdaptivePool2dProblem, Pool2dProblem
from tileconv.kernels.launch import pool

def image(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype).to(memory_format=memory_format)

window = Pool2dProblem(128, 64, 56, 56, (3, 3), (2, 2))
grid = AdaptivePool2dProblem(128, 64, 56, 56, 6, 6)
average, norm = pool.Averaging(True, None), pool.Averaging(True, None, 2.0)
for memory_format in (torch.channels_last, torch.contiguous_format):
    x, y, z = image(*window.x_shape), image(*window.y_shape), image(128, 64, 6, 6)
    switch, index = image(*z.shape, dtype=torch.uint8), image(*z.shape, dtype=torch.int64)
    places = image(*y.shape, dtype=torch.int64)
    for arch in (90, 80):
        gpu = hardware.gpu_of_arch(arch)
        wide = [
            pool.plan_average_forward(window, average, x, y, gpu=gpu),
            pool.plan_average_backward(window, average, y, None, None, x, gpu=gpu),
            pool.plan_average_forward(window, norm, x, y, gpu=gpu),
            pool.plan_average_backward(window, norm, y, x, y, x, gpu=gpu),
        ]
        others = [
            pool.plan_adaptive_max_forward(grid, x, z, switch, gpu=gpu),
            pool.plan_adaptive_switch_to_index(grid, switch, index, gpu=gpu),
            pool.plan_adaptive_max_backward(grid, z, switch, x, gpu=gpu),
            pool.plan_unpool(y, places, x, gpu=gpu),
            pool.plan_unpool_backward(x, places, y, gpu=gpu),
        ]
        for launch in wide + others:
            row = inspect_launch(launch, f"sm_{arch}")
            assert row["stack_bytes"] == 0 and row["spills"] == 0 and row["fits"], (arch, memory_format, row)
            if launch in wide and memory_format is torch.channels_last:
                assert set(row["loop_loads"]) <= {"LDG.128", "STG.128"}, (arch, row)
"""


@pytest.mark.slow
def test_compiled_kernels_spill_nothing_and_averages_move_16_bytes_at_a_time() -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=os.environ | COMPILING, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
