"""Softmax, its logarithm, cross-entropy and top-k error against float64 and PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import hardware, reference, tiles
from tileconv.kernels.launch import softmax as launch
from tileconv.model.metrics import topk_error

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
SHAPES = {
    "rows of 1000": ((3, 1000), 1),
    "one element": ((4, 1), 1),
    "first axis": ((7, 5), 0),
    "channels of an image": ((2, 5, 3, 4), 1),
    "channels last": ((2, 5, 3, 4), -3),
    "vector": ((11,), 0),
    "no axis": ((), -1),
}


def run(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_close(ours: Any, theirs: Any, inputs: list[Tensor]) -> None:
    """Both functions on the inputs: ours within the budget of the error that theirs makes."""
    dy = torch.randn(theirs(*inputs).shape, dtype=inputs[0].dtype)
    exact = run(theirs, [t.double() for t in inputs], dy)
    for got, their, want in zip(run(ours, inputs, dy), run(theirs, inputs, dy), exact, strict=True):
        assert got.dtype == their.dtype and got.stride() == their.stride()
        error, allowed = reference.error(got, want), reference.allowed_error(want, their)
        assert error <= allowed, f"error {error:.3g} is over the allowed {allowed:.3g}"


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_softmax_against_float64(name: str, dtype: torch.dtype) -> None:
    shape, dim = SHAPES[name]
    x = (3 * torch.randn(shape)).to(dtype)
    if name == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    assert_close(lambda x: tk.softmax(x, dim), lambda x: F.softmax(x, dim), [x])
    assert_close(lambda x: tk.log_softmax(x, dim), lambda x: F.log_softmax(x, dim), [x])


def test_rows_longer_than_a_block() -> None:
    gpu = hardware.INTERPRETER
    x = torch.randn(2, 1 << 18) * 3
    x = torch.cat([torch.full((2, 1 << 18), -math.inf), x, x[:, :7]], 1)  # a first block without anything in it
    assert tiles.choose_elementwise(*x.shape, x.dtype, gpu).cols < x.shape[1]
    for ours, theirs in ((tk.softmax, F.softmax), (tk.log_softmax, F.log_softmax)):
        assert_close(lambda x, f=ours: f(x, 1)[:, 1 << 18 :], lambda x, f=theirs: f(x, 1)[:, 1 << 18 :], [x])
    target = torch.tensor([x.shape[1] - 1, -100])
    assert_close(lambda x: tk.cross_entropy(x, target), lambda x: F.cross_entropy(x, target), [x])


def test_infinities_and_nan_as_torch_has_them() -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [inf, 0.0, 1.0], [nan, 0.0, 1.0], [-1e30, 1e30, 0.0]])
    for dtype in (torch.float32, torch.float64):
        for ours, theirs in ((tk.softmax, F.softmax), (tk.log_softmax, F.log_softmax)):
            torch.testing.assert_close(ours(x.to(dtype), 1), theirs(x.to(dtype), 1), equal_nan=True)
        for target in (torch.tensor([1, 0, 0, 1, 2]), torch.tensor([0, 2, 1, 2, 1])):
            for smoothing in (0.0, 0.1):
                got, want = (f(x.to(dtype), target, reduction="none", label_smoothing=smoothing)
                             for f in (tk.cross_entropy, F.cross_entropy))  # fmt: skip
                torch.testing.assert_close(got, want, equal_nan=True)


def test_label_smoothing_is_exact_in_fp64() -> None:
    x, target = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 7, (4, 5))
    ours, theirs = (f(x, target, label_smoothing=0.1) for f in (tk.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_cross_entropy_against_float64(weighted: bool, smoothing: float, reduction: str) -> None:
    weight = torch.rand(7) if weighted else None

    def loss(function: Any, target: Tensor | None = None) -> Any:
        def call(x: Tensor, t: Tensor | None = target) -> Tensor:
            own = None if weight is None else weight.to(x.dtype)
            ignored = -100 if target is None else 3
            return function(x, t, own, reduction=reduction, label_smoothing=smoothing, ignore_index=ignored)

        return call

    for shape in ((5, 7), (3, 7, 5), (2, 7, 3, 2)):
        x = 2 * torch.randn(shape)
        target = torch.randint(0, 7, (*shape[:1], *shape[2:]))
        target.view(-1)[1] = 3
        assert_close(loss(tk.cross_entropy, target), loss(F.cross_entropy, target), [x])
        assert_close(loss(tk.cross_entropy), loss(F.cross_entropy), [x, torch.softmax(torch.randn(shape), 1)])


@DTYPES
def test_cross_entropy_in_every_dtype(dtype: torch.dtype) -> None:
    x, target = (4 * torch.randn(9, 37)).to(dtype), torch.randint(0, 37, (9,))
    assert_close(lambda x: tk.cross_entropy(x, target), lambda x: F.cross_entropy(x, target), [x])


def test_cross_entropy_of_one_sample_of_nothing_and_of_ignored_rows() -> None:
    x, target = torch.randn(6), torch.tensor(4)
    torch.testing.assert_close(tk.cross_entropy(x, target), F.cross_entropy(x, target))
    ignored = torch.full((2,), -100)
    x = torch.randn(2, 6, requires_grad=True)
    assert tk.cross_entropy(x, ignored).isnan()
    assert tk.cross_entropy(x, ignored, reduction="sum") == 0
    assert tk.cross_entropy(torch.randn(0, 6), torch.zeros(0, dtype=torch.int64), reduction="sum") == 0
    assert tk.softmax(torch.randn(0, 6), 1).shape == (0, 6)


@pytest.mark.parametrize("ignored", [7, -5, 1 << 40, 2])
def test_the_ignored_class_may_be_none_of_the_classes(ignored: int) -> None:
    x, target = torch.randn(6, 4), torch.tensor([0, ignored, 3, 1, ignored, 2])
    for reduction in ("none", "mean", "sum"):
        settings = {"ignore_index": ignored, "reduction": reduction, "label_smoothing": 0.1}
        assert_close(
            lambda x, s=settings: tk.cross_entropy(x, target, **s),
            lambda x, s=settings: F.cross_entropy(x, target, **s),
            [x],
        )
    with pytest.raises(ValueError, match="target holds the class 9: allowed are 0 to 3"):
        tk.cross_entropy(x, torch.tensor([0, 9, 3, 1, 2, 2]), ignore_index=ignored)


def test_a_wrong_class_is_an_error_here_and_nan_on_a_gpu() -> None:
    x = torch.randn(3, 4)
    for wrong in (4, -1, 1 << 40):
        with pytest.raises(ValueError, match=rf"target holds the class {wrong}: allowed are 0 to 3"):
            tk.cross_entropy(x, torch.tensor([0, wrong, 1]))
    # What the kernel does where nobody looks: it reads nothing there, and says so with a NaN.
    losses, saved = torch.empty(2, 3), torch.empty(3, 3)
    target = torch.tensor([[0], [1 << 40], [-1]])
    launch.plan_cross_entropy(
        x[:, :, None], target, torch.rand(4), losses, saved, -100, 0.1, gpu=hardware.INTERPRETER
    ).run()
    assert losses[0].isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "target has dtype torch.int32", lambda x: tk.cross_entropy(x, torch.zeros(3, dtype=torch.int32))),
        (ValueError, r"target has shape \(2,\)", lambda x: tk.cross_entropy(x, torch.zeros(2, dtype=torch.int64))),
        (ValueError, r"target has shape \(3,\)", lambda x: tk.cross_entropy(x, torch.zeros(3))),
        (ValueError, r"weight has shape \(3,\)", lambda x: tk.cross_entropy(x, x.argmax(1), torch.ones(3))),
        (ValueError, "weight requires a gradient",
         lambda x: tk.cross_entropy(x, x.argmax(1), torch.ones(4, requires_grad=True))),
        (ValueError, "ignore_index is 3: probabilities", lambda x: tk.cross_entropy(x, x.detach(), ignore_index=3)),
        (ValueError, "label_smoothing is 2", lambda x: tk.cross_entropy(x, x.argmax(1), label_smoothing=2)),
        (TypeError, "ignore_index must be an int", lambda x: tk.cross_entropy(x, x.argmax(1), ignore_index=1.5)),
        (ValueError, "reduction is 'avg'", lambda x: tk.cross_entropy(x, x.argmax(1), reduction="avg")),
        (ValueError, "size_average and reduce", lambda x: tk.cross_entropy(x, x.argmax(1), reduce=True)),
        (ValueError, "dim is 2: allowed are -2 to 1", lambda x: tk.softmax(x, 2)),
        (TypeError, "dim must be an int, not None", lambda x: tk.log_softmax(x)),
        (TypeError, "input has dtype torch.int64", lambda x: tk.softmax(x.long(), 1)),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call(torch.randn(3, 4))


def test_gradcheck_and_gradgradcheck() -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    target, weight = torch.tensor([[0, 3], [-100, 1], [2, 2]]), torch.rand(4, dtype=torch.float64)
    probabilities = torch.rand(3, 4, 2, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda x: tk.softmax(x, 1),
        lambda x: tk.log_softmax(x, 2),
        lambda x: tk.cross_entropy(x, target, weight, label_smoothing=0.2),
        lambda x: tk.cross_entropy(x, target, reduction="none"),
        lambda x: tk.cross_entropy(x, probabilities.detach(), weight),
    ):
        assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x, t: tk.cross_entropy(x, t, weight, label_smoothing=0.2), (x, probabilities), fast_mode=True
    )


def test_dtype_and_autocast() -> None:
    x = torch.randn(3, 5).half()
    assert tk.softmax(x, 1, dtype=torch.float64).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tk.log_softmax(x, 1).dtype == torch.float32
        assert tk.cross_entropy(x, torch.tensor([1, 2, 3])).dtype == torch.float32


def test_topk_error() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [math.nan, 0.0, 1.0]])
    targets = torch.tensor([2, 0, 1, 2])
    assert [topk_error(logits, targets, k).item() for k in (1, 2, 3)] == [0.75, 0.0, 0.0]
    logits, targets = torch.randn(50, 20), torch.randint(0, 20, (50,))
    found = (logits.topk(5).indices == targets[:, None]).any(1)
    assert topk_error(logits, targets, 5).item() == pytest.approx(1 - found.double().mean().item())
    for scores, classes, k, error, message in (
        (logits, targets, 21, ValueError, "k is 21: allowed is 1 to the 20 classes"),
        (logits, targets.int(), 1, TypeError, "targets torch.int32: allowed are floating point and torch.int64"),
        (logits, targets.float(), 1, TypeError, "targets torch.float32"),
        (logits.long(), targets, 1, TypeError, "logits have dtype torch.int64"),
        (logits, targets[:3], 1, ValueError, r"targets \(3,\): allowed are \[N, C\] and \[N\]"),
    ):
        with pytest.raises(error, match=message):
            topk_error(scores, classes, k)
