"""ReLU and dropout, and sums over pixels and partial sums, long ones too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import hardware, reference
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch import pointwise

H100 = hardware.GPUS["H100"]
ONE_SM = replace(H100, sms=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_relu_is_torchs(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 7).to(dtype)
    x[0, 0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    x.requires_grad_()
    y, want = tk.relu(x), F.relu(x)
    assert torch.equal(y.nan_to_num(nan=7), want.nan_to_num(nan=7))
    dy = torch.randn_like(y)
    (ours,), (theirs,) = (torch.autograd.grad(out, x, dy) for out in (y, want))
    assert torch.equal(ours, theirs)


RELUS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "conv2d": (
        lambda x, w, b: tk.conv2d(x, w, b, activation="relu"),
        lambda x, w, b: F.relu(F.conv2d(x, w, b)),
    ),
    "linear": (
        lambda x, w, b: tk.linear(x.flatten(2), w.new_ones(3, 64), b, activation="relu"),
        lambda x, w, b: F.relu(F.linear(x.flatten(2), w.new_ones(3, 64), b)),
    ),
    "pool": (lambda x, w, b: tk.max_pool2d(x, 3, 2, activation="relu"), lambda x, w, b: F.relu(F.max_pool2d(x, 3, 2))),
    "dilated pool": (
        lambda x, w, b: tk.max_pool2d(x, 2, 1, 1, 2, activation="relu"),
        lambda x, w, b: F.relu(F.max_pool2d(x, 2, 1, 1, 2)),
    ),
    "conv2d_max_pool2d": (
        lambda x, w, b: tk.conv2d_max_pool2d(x, w, b, pool_kernel_size=2),
        lambda x, w, b: F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2),
    ),
}


@pytest.mark.parametrize("name", RELUS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nan_passes_relus_gradient_on_as_in_pytorch(name: str, memory_format: torch.memory_format) -> None:
    x, w, b = torch.randint(-3, 4, (2, 2, 8, 8)).float(), torch.eye(2).view(2, 2, 1, 1), torch.zeros(2)
    b = torch.zeros(3) if name == "linear" else b
    x[:, :, 2, 5] = torch.nan
    x = x.contiguous(memory_format=memory_format)
    found = []
    for relu in RELUS[name]:
        leaves = [leaf.clone().requires_grad_() for leaf in (x, b)]
        y = relu(leaves[0], w, leaves[1])
        assert y.isnan().any()
        y.sum().backward()
        found.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


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
    before = torch.get_rng_state()
    assert tk.dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), before), "as in PyTorch, what is drawn later stays the same"
    assert torch.equal(tk.dropout(x, 1.0), torch.zeros_like(x))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tk.dropout(torch.randn(50, 50, requires_grad=True))
    assert [t.numel() for t in kept] == [1]


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slices", "size", "gpu", "rows"),
    [
        pytest.param(264, 67, hardware.INTERPRETER, 512, id="the interpreter's tile"),
        pytest.param(264, 67, H100, 32, id="an H100's tile"),
        pytest.param(264, 2100, ONE_SM, 1, id="one row"),
        pytest.param(7, 2100, replace(H100, sms=40), 8, id="more rows than parts"),
    ],
)
def test_parts_are_added_within_budget(slices: int, size: int, gpu: GPU, rows: int, device: torch.device) -> None:
    parts, out = torch.rand(slices, size, device=device), torch.empty(size, device=device)
    launch = pointwise.plan_add_slices(parts, out, gpu=gpu)
    assert launch.arguments["ROWS"] == rows
    launch.run()
    exact = parts.double().sum(0)
    roundings = -(-slices // rows) + rows.bit_length() - 1
    assert ((out.double() - exact).abs() <= roundings * 2**-24 * exact).all()
    if rows > 1:  # one row is for so many elements that their parts are few
        assert (out.double() - exact).abs().max() <= reference.allowed_error(exact, parts.sum(0))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked by ReLU"])
@pytest.mark.parametrize("gpu", [hardware.INTERPRETER, H100, ONE_SM], ids=["interpreter", "many strips", "long strips"])
def test_column_sums_are_float64s_on_whole_numbers(gpu: GPU, masked: bool, device: torch.device) -> None:
    dy, y = (torch.randint(-3, 4, (3, 40, 17, 19), device=device).half() for _ in range(2))
    dy, y = (t.contiguous(memory_format=torch.channels_last) for t in (dy, y))
    dx, sums = torch.empty_like(y), torch.empty(40, dtype=torch.float16, device=device)
    planned = pointwise.plan_bias_backward(dy, y if masked else None, dx if masked else None, sums, gpu=gpu)
    for launch in planned:
        launch.run()
    assert gpu is not ONE_SM or planned[0].arguments["LOOPS"] > 1
    want = torch.where(y > 0, dy, 0) if masked else dy
    assert torch.equal(sums.double(), want.double().sum((0, 2, 3)))
    assert not masked or torch.equal(dx, want)


def bias_gradient(lib: Any, dy: Tensor) -> Tensor:
    b = torch.zeros(dy.shape[1], dtype=dy.dtype, device=dy.device, requires_grad=True)
    y = lib.conv2d(dy.new_zeros(dy.shape[0], 1, *dy.shape[2:]), dy.new_zeros(dy.shape[1], 1, 1, 1), b)
    return torch.autograd.grad(y, b, dy)[0]


def mean_loss(lib: Any, x: Tensor) -> Tensor:
    loss: Tensor = lib.cross_entropy(x, torch.arange(x[:, 0].numel(), device=x.device).reshape(x[:, 0].shape) % 5)
    return loss


@pytest.mark.parametrize(
    ("compute", "shape"),
    [pytest.param(bias_gradient, (2, 8, 160, 160), id="bias"), pytest.param(mean_loss, (1, 5, 512, 512), id="loss")],
)
def test_long_sums_are_within_budget(
    compute: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...], device: torch.device
) -> None:
    x = torch.rand(shape, device=device)
    exact = compute(F, x.double())
    error = (compute(tk.functional, x).double() - exact).abs().max().item()
    assert error <= reference.allowed_error(exact, compute(F, x))
