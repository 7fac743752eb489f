"""Local response normalisation: numbers, gradients, both readings of alpha, odd values, and the bytes it asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.bench.inspect import COMPILING
from tileconv.kernels import hardware, reference
from tileconv.kernels.launch.common import Launch
from tileconv.kernels.launch.norm import plan_local_response_norm
from tileconv.kernels.watch import bounds_check, count_bytes

CASES: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "alexnet": ((2, 96, 3, 5), (5, 1e-4, 0.75, 2.0)),
    "strong": ((2, 21, 5, 3), (5, 0.5, 0.75, 1.0)),
    "even size": ((2, 7, 4, 3), (4, 0.3, 0.75, 1.0)),
    "one channel a window": ((1, 6, 3, 3), (1, 0.3, 0.5, 1.0)),
    "longer than the channels": ((2, 5, 3, 3), (12, 0.3, 1.0, 1.0)),
    "any beta": ((2, 9, 2, 3), (3, 0.2, 0.6, 0.7)),
    "beta 0": ((2, 9, 2, 3), (3, 0.2, 0.0, 0.7)),
    "a single channel": ((3, 1, 4, 4), (5, 0.3, 0.75, 1.0)),
    "signals": ((2, 6, 11), (5, 0.3, 0.75, 2.0)),
    "volumes": ((2, 6, 2, 3, 4), (5, 0.3, 0.75, 2.0)),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
CHANNELS_LAST = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def torchs(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """F.local_response_norm, whose average pool the CPU lacks in 16 bits: its steps, each rounded, the sums in fp32."""
    if x.dtype.itemsize > 2:
        return F.local_response_norm(x, size, alpha, beta, k)
    squares = F.pad((x * x).float().flatten(2), (0, 0, size // 2, (size - 1) // 2))
    means = squares.unfold(1, size, 1).mean(3).to(x.dtype).reshape(x.shape)
    return x / (means * alpha + k) ** beta


def norm_and_grad(norm: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@DTYPES
@CHANNELS_LAST
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numbers_and_gradient(
    case: tuple[tuple[int, ...], tuple[Any, ...]], channels_last: bool, dtype: torch.dtype
) -> None:
    shape, settings = case
    x = in_format(3 * torch.randn(shape).to(dtype), channels_last)
    dy = in_format(torch.randn(shape).to(dtype), channels_last)
    with bounds_check():
        y, dx = norm_and_grad(lambda x: tk.local_response_norm(x, *settings), x, dy)
    their_y, their_dx = norm_and_grad(lambda x: torchs(x, *settings), x, dy)
    assert y.dtype == dx.dtype == dtype
    if shape[1] > 1:
        assert y.stride() == dx.stride() == x.stride()
    for ours, theirs, exact in (
        (y, their_y, reference.local_response_norm(x, *settings)),
        (dx, their_dx, reference.local_response_norm_backward(dy, x, *settings)),
    ):
        assert reference.error(ours, exact) <= reference.allowed_error(exact, theirs)


@CHANNELS_LAST
def test_one_kernel_each_way(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Launch] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (launched.append(launch), run(launch)))
    x = in_format(torch.randn(2, 96, 5, 3).half(), channels_last).requires_grad_()
    y = tk.local_response_norm(x, 5, 1e-4, 0.75, 2.0)
    assert len(launched) == 1
    torch.autograd.grad(y, x, torch.randn_like(y))
    assert len(launched) == 2


@CHANNELS_LAST
def test_the_papers_alpha_and_the_codes(channels_last: bool) -> None:
    x = in_format(torch.randn(2, 12, 3, 3), channels_last)
    paper = tk.local_response_norm(x, 5, 1e-2, 0.75, 2.0, divide_alpha=False)
    exact = reference.local_response_norm(x, 5, 1e-2, 0.75, 2.0, divide_alpha=False)
    assert reference.error(paper, exact) <= 1e-6
    # Section 3.3: a / (k + alpha * sum of a^2 over channels i - 2 .. i + 2)^beta.
    by_hand = x[:, 6] / (2.0 + 1e-2 * x[:, 4:9].square().sum(1)) ** 0.75
    torch.testing.assert_close(paper[:, 6], by_hand)
    assert torch.equal(paper, tk.local_response_norm(x, 5, 5e-2, 0.75, 2.0))
    module = tk.nn.LocalResponseNorm(5, 1e-2, 0.75, 2.0, divide_alpha=False)
    assert torch.equal(module(x), paper)
    assert isinstance(module, torch.nn.LocalResponseNorm)
    assert repr(module) == "LocalResponseNorm(5, alpha=0.01, beta=0.75, k=2.0, divide_alpha=False)"


@CHANNELS_LAST
def test_squares_beyond_fp16(channels_last: bool) -> None:
    x = in_format((400 * torch.randn(2, 8, 3, 3)).half(), channels_last)
    assert x.abs().max() > 256
    assert (torchs(x, 5, 1e-4, 0.75, 2.0) == 0).any(), "x^2 overflows there, so x / inf"
    dy = torch.randn(x.shape).half()
    y, dx = norm_and_grad(lambda x: tk.local_response_norm(x, 5, 1e-4, 0.75, 2.0), x, dy)
    for ours, exact in (
        (y, reference.local_response_norm(x, 5, 1e-4, 0.75, 2.0)),
        (dx, reference.local_response_norm_backward(dy, x, 5, 1e-4, 0.75, 2.0)),
    ):
        assert reference.error(ours, exact) <= torch.finfo(torch.float16).eps * exact.abs().max().item()


@CHANNELS_LAST
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_infinity_reach_their_neighbours_alone(value: float, channels_last: bool) -> None:
    x = torch.randn(2, 32, 3, 3)
    x[1, 16, 1, 2] = value
    x, dy = in_format(x, channels_last), torch.randn(x.shape)
    y, dx = norm_and_grad(lambda x: tk.local_response_norm(x, 5), x, dy)
    want_y, want_dx = norm_and_grad(lambda x: F.local_response_norm(x, 5), x, dy)
    assert torch.equal(y.isnan(), want_y.isnan())
    torch.testing.assert_close(y, want_y, equal_nan=True)
    # s of channels 14..18 is not finite, so dx of 12..20 may not be; torch's sums pass it on to every later channel.
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[1, 12:21, 1, 2] = True
    assert dx[~touched].isfinite().all()
    torch.testing.assert_close(dx[~touched], want_dx[~touched])


def test_images_cut_out_of_larger_ones_and_broadcast_gradients() -> None:
    whole = torch.randn(3, 9, 7, 12)
    for x in (whole[:, 1:8, ::2, 2:9], whole.permute(0, 3, 1, 2)[:, 2:10, 1:], whole.transpose(2, 3), whole[:, ::3]):
        dy = torch.ones(()).expand(x.shape)
        y, dx = norm_and_grad(lambda x: tk.local_response_norm(x, 5, 0.3), x, dy)
        assert reference.error(y, reference.local_response_norm(x, 5, 0.3)) <= 1e-6
        assert reference.error(dx, reference.local_response_norm_backward(dy, x, 5, 0.3)) <= 1e-6


def test_an_empty_batch() -> None:
    x = torch.randn(0, 4, 3, 3, requires_grad=True)
    y = tk.local_response_norm(x, 5)
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape


@CHANNELS_LAST
@pytest.mark.parametrize("channels", [96, 64, 7])
@pytest.mark.parametrize("size", [5, 17])
def test_every_element_moves_once(size: int, channels: int, channels_last: bool) -> None:
    x = in_format(torch.randn(2, channels, 9, 7).half(), channels_last).requires_grad_()
    with count_bytes() as forward:
        y = tk.local_response_norm(x, size)
    with count_bytes() as backward:
        torch.autograd.grad(y, x, torch.randn_like(y))
    for count, least in ((forward, 2), (backward, 3)):
        requested = sum(b.requested for way in (count.read, count.written) for b in way.values())
        assert requested <= 1.1 * least * x.numel() * x.element_size()


@CHANNELS_LAST
def test_a_gpus_small_tiles_and_shared_channels(channels_last: bool) -> None:
    x = in_format(torch.randn(1, 192, 8, 8), channels_last)
    for dy, least in ((None, 2), (torch.randn_like(x), 3)):
        out = torch.full_like(x, float("nan"))
        launch = plan_local_response_norm(x, dy, out, 5, 0.1, 0.75, 2.0, gpu=hardware.GPUS["H100"])
        with count_bytes() as count:
            launch.run()
        if dy is None:
            exact = reference.local_response_norm(x, 5, 0.5, 0.75, 2.0)
        else:
            exact = reference.local_response_norm_backward(dy, x, 5, 0.5, 0.75, 2.0)
        assert launch.grid[0] > 1
        assert reference.error(out, exact) <= 1e-6 * exact.abs().max().item()
        requested = sum(b.requested for way in (count.read, count.written) for b in way.values())
        assert requested <= 1.1 * least * x.numel() * x.element_size()


@CHANNELS_LAST
@pytest.mark.parametrize("settings", [(3, 0.5, 0.75, 1.0), (4, 0.5, 0.6, 1.5), (1, 0.5, 1.0, 1.0)], ids=str)
def test_gradcheck_and_gradgradcheck(settings: tuple[Any, ...], channels_last: bool) -> None:
    x = in_format(torch.randn(2, 5, 2, 2, dtype=torch.float64), channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tk.local_response_norm(x, *settings), (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: tk.local_response_norm(x, *settings), (x,), fast_mode=True)


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(tk.local_response_norm, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 6, 4, 5)
        for ours, eager in zip(
            norm_and_grad(lambda x: compiled(x, 5, 0.3), x, x),
            norm_and_grad(lambda x: tk.local_response_norm(x, 5, 0.3), x, x),
            strict=True,
        ):
            torch.testing.assert_close(ours, eager)


def test_bad_input() -> None:
    x = torch.randn(2, 4, 3, 3)
    for call, error, message in (
        (lambda: tk.local_response_norm(x[0, 0], 5), ValueError, "at least three axes"),
        (lambda: tk.local_response_norm(x[:, :0], 5), ValueError, "only N may be 0"),
        (lambda: tk.local_response_norm(x, 0), ValueError, "size is 0: allowed is 1 or more"),
        (lambda: tk.local_response_norm(x, 2.5), TypeError, "size must be an int"),
        (lambda: tk.local_response_norm(x, 5, "1"), TypeError, "alpha must be a number"),
        (lambda: tk.local_response_norm(x, 5, beta=float("nan")), ValueError, "beta is nan"),
        (lambda: tk.local_response_norm(x.int(), 5), TypeError, "torch.int32"),
        (lambda: tk.local_response_norm(torch.randn(1, 300, 1), 300), ValueError, "size is 300"),
    ):
        with pytest.raises(error, match=message):
            call()


COMPILE = """
import torch
import tileconv.kernels
from tileconv.bench.inspect import inspect_launch
from tileconv.kernels import hardware
from tileconv.kernels.launch.norm import plan_local_response_norm

for arch in (90, 80):
    for dtype in (torch.float16, torch.float32):
        for shape, memory_format in (
            ((128, 96, 55, 55), torch.channels_last),
            ((128, 256, 27, 27), torch.channels_last),
            ((128, 64, 56, 56), torch.contiguous_format),
        ):
            x = torch.empty(shape, dtype=dtype).to(memory_format=memory_format)
            for dy in (None, x):
                gpu = hardware.gpu_of_arch(arch)
                launch = plan_local_response_norm(x, dy, x, 5, 2e-5, 0.75, 2.0, gpu=gpu)
                row = inspect_launch(launch, f"sm_{arch}")
                moved = {kind for kind in row["loop_loads"] if kind.startswith(("LDG", "STG"))}
                what = arch, dtype, shape, dy is not None, row
                assert row["stack_bytes"] == 0 and row["spills"] == 0 and row["fits"], what
                assert moved == {"LDG.128", "STG.128"}, what
                assert row["registers"] <= 128, what
"""


@pytest.mark.slow
def test_compiled_kernels_move_16_bytes_at_a_time_and_spill_nothing() -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=os.environ | COMPILING, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
