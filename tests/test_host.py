"""The host's side of a call: what a layout needs is worked out once, a call puts its tensors in, and that is quick."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import tileconv.kernels as tk
from tileconv.kernels import tiles
from tileconv.kernels.launch import descriptors, plans
from tileconv.kernels.launch.common import Launch

CHANNELS_LAST = torch.channels_last
LIMIT_US = 60.0  # from functional.conv2d to the launch, gradients asked for
SLACK = 1.5  # for a slower or busier processor than the 38 us that conv2d took when this was written


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    plans.forget()
    yield
    plans.forget()


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(memory_format=CHANNELS_LAST)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts of descriptors made from scratch, of layouts planned and of launches, which do nothing."""
    counts = {"descriptors": 0, "layouts": 0, "launches": 0}
    for described in (descriptors._image, descriptors._pixel, descriptors._matrix):
        described.cache_clear()  # what earlier tests had described
    check = TensorDescriptor.__post_init__

    def count(name: str) -> None:
        counts[name] += 1

    monkeypatch.setattr(TensorDescriptor, "__post_init__", lambda self: count("descriptors") or check(self))
    monkeypatch.setattr(Launch, "run", lambda self: count("launches"))
    monkeypatch.setattr(plans, "_launches", _counted(plans._launches, lambda: count("layouts")))
    return counts


def _counted(function: Callable[..., Any], tick: Callable[[], None]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        tick()
        return function(*arguments)

    return call


def test_a_layout_is_planned_and_described_once(planned: dict[str, int]) -> None:
    def call(batch: int = 2) -> Tensor:
        w = image(24, 40, 3, 3).requires_grad_()
        return tk.conv2d(image(batch, 40, 9, 7), w, torch.randn(24), padding=1, activation="relu")

    call()
    first = dict(planned)
    assert first["layouts"] == first["launches"] == 1 and first["descriptors"] >= 3
    for _ in range(5):
        call()
    assert planned == first | {"launches": 6}
    call(batch=3)
    assert planned["layouts"] == 2 and planned["descriptors"] > first["descriptors"]
    with tiles.override(block_c=16):
        call()
        call()
    assert planned["layouts"] == 3
    call()
    assert planned["layouts"] == 3, "the plans of before the override are kept"


def test_other_tensors_of_a_layout_get_their_own_results() -> None:
    w = image(16, 8, 3, 3)
    for stride in (1, 2):  # a strided input gradient writes views of dx
        for _ in range(2):
            x = image(1, 8, 7, 6).requires_grad_()
            y = tk.conv2d(x, w, stride=stride, padding=1)
            want = F.conv2d(x, w, stride=stride, padding=1)
            dy = torch.randn_like(want)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
            mine, theirs = (torch.autograd.grad(out, x, dy)[0] for out in (y, want))
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_every_call_gets_memory_of_its_own_for_partial_sums() -> None:
    x, w = image(1, 64, 4, 4), image(16, 64, 3, 3)
    with tiles.override(formulation="box", block_c=16, splits=3):
        results = [tk.conv2d(x * factor, w, padding=1) for factor in (1.0, 2.0)]
    torch.testing.assert_close(results[0], F.conv2d(x, w, padding=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1], 2 * results[0], rtol=1e-5, atol=1e-5)


def test_tensors_between_multiples_of_16_bytes_are_planned_for_themselves() -> None:
    whole = torch.randn(1 * 7 * 6 * 8 + 1)
    w = image(16, 8, 3, 3)
    for start in (0, 1, 0):
        x = whole[start : start + 336].view(1, 7, 6, 8).permute(0, 3, 1, 2)
        assert (x.data_ptr() % 16 == 0) == (start == 0)
        torch.testing.assert_close(tk.conv2d(x, w), F.conv2d(x, w), rtol=1e-5, atol=1e-5)


def test_copies_are_made_in_every_call(planned: dict[str, int]) -> None:
    w = image(16, 8, 3, 3)
    for _ in range(2):
        tk.conv2d(torch.randn(1, 8, 7, 12)[..., ::2], w)  # neither its pixels nor its channels lie together
    assert planned["launches"] == 2 and planned["layouts"] == 3, "once to see that it copies, then for each call"


def test_contiguous_operands_are_planned_once(planned: dict[str, int]) -> None:
    w = torch.randn(16, 8, 3, 3)
    for _ in range(2):
        tk.conv2d(torch.randn(1, 8, 7, 6), w)
    assert planned["layouts"] == 1 and planned["launches"] == 2 * 4, "x and w are turned, and the result"


CALLS: dict[str, Callable[[], Callable[[], Any]]] = {
    "conv2d": lambda: _prepared(tk.conv2d, image(2, 64, 13, 13), image(64, 64, 3, 3), torch.randn(64), padding=1),
    "linear": lambda: _prepared(tk.linear, torch.randn(2, 64), torch.randn(64, 64), torch.randn(64)),
    "max_pool2d": lambda: _prepared(tk.max_pool2d, image(2, 64, 13, 13), kernel_size=3, stride=2),
}


def _prepared(function: Callable[..., Any], *tensors: Tensor, **settings: int) -> Callable[[], Any]:
    leaves = [tensor.requires_grad_() for tensor in tensors]
    return lambda: function(*leaves, **settings)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_wants_gradients_is_launched_within_60_microseconds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launch, "run", lambda self: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    call = CALLS[name]()
    # Time of this thread, in rounds shorter than a scheduler's turn: what else runs on the machine counts little.
    best = min(timeit.repeat(call, number=20, repeat=250, timer=time.thread_time)) / 20 * 1e6
    assert best <= LIMIT_US * SLACK, f"{name} took {best:.1f} us on the host"
