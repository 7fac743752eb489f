"""Max-pool with its switches and adaptive average pool: values, indices and gradients, by PyTorch's odd rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import reference

CHANNELS_LAST = torch.channels_last
WINDOWS: dict[str, tuple[Any, ...]] = {
    "alexnet": (3, 2),
    "vgg": (2, 2),
    "padded": (3, 2, 1),
    "overlapping": (5, 1, 2),
    "gaps between windows": (2, 3),
    "ceil": (2, 2, 0, 1, True),
    "ceil and padding": (3, 3, 1, 1, True),
    "dilated": (3, 1, 1, 2),
    "uneven": ((3, 2), (2, 1), (1, 0), (1, 2), True),
    "windows without an element": (2, 1, 1, 9),
    "default stride": (3,),
}
MEMORY_FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"]
)


def pool_and_grad(pool: Any, x: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y, indices = pool(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype) if dy is None else dy
    return y.detach(), indices, torch.autograd.grad(y, x, dy)[0], dy


@MEMORY_FORMATS
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_max_pool_is_torchs(window: tuple[Any, ...], memory_format: torch.memory_format) -> None:
    x = torch.randint(-4, 5, (2, 5, 9, 8)).float()  # many ties
    x = x.contiguous(memory_format=memory_format)
    if window == WINDOWS["windows without an element"]:
        x = x[:, :, :8, :8].contiguous(memory_format=memory_format)
    want, want_indices = F.max_pool2d(x, *window, return_indices=True)
    y, indices = tk.max_pool2d(x, *window, return_indices=True)
    assert torch.equal(y, want)
    assert y.stride() == want.stride()
    assert indices.dtype == torch.int64
    assert torch.equal(indices, want_indices)
    assert torch.equal(tk.max_pool2d(x, *window), want)
    _, _, dx, dy = pool_and_grad(lambda x: tk.max_pool2d(x, *window, return_indices=True), x)
    if want_indices.max() < x.shape[2] * x.shape[3]:
        exact = reference.max_pool2d_backward(dy, want_indices, x.shape)
        assert reference.error(dx, exact) <= 1e-6 * exact.abs().max().item()
        assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@MEMORY_FORMATS
def test_nan_and_infinity(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 8, 9).to(dtype)
    x[0, 0, 2:4, 2:4] = float("nan")
    x[0, 1] = float("-inf")
    x[1, 2, ::3, ::2] = float("inf")
    x = x.contiguous(memory_format=memory_format)
    want, want_indices = reference.max_pool2d(x, 3, 2, 1)
    y, indices = tk.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert y.dtype == dtype
    assert torch.equal(y.double().nan_to_num(), want.nan_to_num())
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(indices, want_indices)
    assert torch.equal(F.max_pool2d(x.float().contiguous(), 3, 2, 1).isnan(), want.isnan())


def test_a_window_of_more_than_256_elements_keeps_wider_switches() -> None:
    x = torch.randn(1, 2, 20, 21)
    want, want_indices = F.max_pool2d(x, 17, 3, return_indices=True)
    y, indices, dx, dy = pool_and_grad(lambda x: tk.max_pool2d(x, 17, 3, return_indices=True), x)
    assert torch.equal(y, want)
    assert torch.equal(indices, want_indices)
    assert reference.error(dx, reference.max_pool2d_backward(dy, want_indices, x.shape)) <= 1e-5


def test_what_backward_keeps_is_one_byte_an_output() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = tk.max_pool2d(torch.randn(2, 4, 9, 9, requires_grad=True), 3, 2)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, y.shape)]


@MEMORY_FORMATS
def test_relu_and_max_pool_in_one(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 6, 9, 9).contiguous(memory_format=memory_format) - 0.7
    pool = lambda x: (tk.max_pool2d(x, 3, 2, activation="relu"), None)  # noqa: E731
    y, _, dx, dy = pool_and_grad(pool, x)
    leaf = x.double().requires_grad_()
    want = F.max_pool2d(F.relu(leaf), 3, 2)
    assert torch.equal(y.double(), want)
    assert (y == 0).any()
    exact = torch.autograd.grad(want, leaf, dy.double())[0]
    assert reference.error(dx, exact) <= 1e-6 * exact.abs().max().item()


def test_sliced_input_and_expanded_gradient() -> None:
    x = torch.randn(3, 6, 9, 16).permute(0, 3, 1, 2)[:, 2:13, ::2]
    y, indices, dx, _ = pool_and_grad(
        lambda x: tk.max_pool2d(x, 2, return_indices=True), x, torch.ones(()).expand(3, 11, 1, 4)
    )
    want, want_indices = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, want)
    assert torch.equal(indices, want_indices)
    assert dx.sum() == y.numel()


def test_max_pool_without_a_batch_and_with_an_empty_one() -> None:
    x = torch.randn(3, 8, 8)
    assert torch.equal(tk.max_pool2d(x, 2), F.max_pool2d(x, 2))
    empty = torch.randn(0, 3, 8, 8, requires_grad=True)
    y = tk.max_pool2d(empty, 2)
    assert y.shape == (0, 3, 4, 4)
    y.sum().backward()
    assert empty.grad is not None and empty.grad.shape == empty.shape


@MEMORY_FORMATS
@pytest.mark.parametrize("size", [(6, 6), (3, 4), (5, None), (1, 1), (13, 2), 7], ids=str)
def test_adaptive_avg_pool_is_torchs(size: Any, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 6, 7).contiguous(memory_format=memory_format)
    leaf, double = x.requires_grad_(), x.detach().double().requires_grad_()
    want, theirs, ours = (F.adaptive_avg_pool2d(double, size), F.adaptive_avg_pool2d(x.detach(), size),
                          tk.adaptive_avg_pool2d(leaf, size))  # fmt: skip
    assert reference.error(ours, want) <= reference.allowed_error(want, theirs)
    assert ours.stride() == theirs.stride()
    dy = torch.randn_like(ours)
    exact = torch.autograd.grad(want, double, dy.double())[0]
    assert reference.error(torch.autograd.grad(ours, leaf, dy)[0], exact) <= 1e-6 * exact.abs().max().item()
