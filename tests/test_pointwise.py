"""ReLU and dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tileconv.kernels as tk


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_relu_is_torchs(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 7).to(dtype)
    x[0, 0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    x.requires_grad_()
    y, want = tk.relu(x), F.relu(x)
    assert torch.equal(y.nan_to_num(nan=7), want.nan_to_num(nan=7))
    dy = torch.randn_like(y)
    (ours,), (theirs,) = (torch.autograd.grad(out, x, dy) for out in (y, want))
    assert torch.equal(ours[1:], theirs[1:])


def test_relu_keeps_strides_and_works_in_place() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert tk.relu(x).stride() == x.stride()
    view = torch.randn(6, 8)[::2, 1::3]
    assert torch.equal(tk.relu(view), F.relu(view))
    assert tk.relu(x, inplace=True) is x
    assert (x >= 0).all()
    assert tk.relu(torch.empty(0, 3)).shape == (0, 3)


def test_dropout_keeps_the_expected_share_and_scales_it() -> None:
    x = torch.ones(100, 200, requires_grad=True)
    y = tk.dropout(x, 0.3)
    kept = y != 0
    assert abs(kept.float().mean().item() - 0.7) < 4 * (0.3 * 0.7 / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))
    # Backward makes the same mask again, from the seed alone.
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], torch.where(kept, dy / 0.7, 0.0))


def test_dropout_draws_from_torchs_generator() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = tk.dropout(x), tk.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(tk.dropout(x), first)
    assert not torch.equal(first, second)


def test_dropout_gradient_of_another_layout_meets_the_same_mask() -> None:
    x = torch.ones(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = tk.dropout(x)
    dy = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], torch.where(y != 0, 2 * dy, 0.0))


def test_dropout_edges() -> None:
    x = torch.randn(5, 5)
    assert tk.dropout(x, 0.5, training=False) is x
    assert torch.equal(tk.dropout(x, 0.0), x)
    assert torch.equal(tk.dropout(x, 1.0), torch.zeros_like(x))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tk.dropout(torch.randn(50, 50, requires_grad=True))
    assert [t.numel() for t in kept] == [1]
