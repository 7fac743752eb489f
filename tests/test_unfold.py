"""im2col, col2im and the convolution made of them, against float64 and PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import geometry, modules_conv, reference
from tileconv.kernels.geometry import Conv2dProblem

WINDOWS = {
    "overlapping": {"kernel_size": 3, "padding": 1},
    "every setting": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": (1, 3), "stride": (2, 1)},
    "apart": {"kernel_size": 2, "stride": 3},
    "one pixel": {"kernel_size": 1},
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


@DTYPES
@pytest.mark.parametrize("name", WINDOWS)
def test_unfold_and_fold_against_torch(name: str, dtype: torch.dtype) -> None:
    window: dict[str, Any] = WINDOWS[name]
    x = torch.randn(2, 5, 9, 8).to(dtype)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        image = image.clone().requires_grad_()
        cols = tk.unfold(image, **window)
        want = F.unfold(x, **window)
        assert torch.equal(cols, want) and cols.stride() == want.stride()
        exact = F.fold(want.double(), (9, 8), **window)
        (dx,) = torch.autograd.grad(cols, image, want)
        for sums in (dx, tk.fold(want, (9, 8), **window)):
            assert reference.error(sums, exact) <= reference.allowed_error(exact, F.fold(want, (9, 8), **window))
        assert sums.is_contiguous()
    cols = want.clone().requires_grad_()
    dy = torch.randn(2, 5, 9, 8).to(dtype)
    assert torch.equal(torch.autograd.grad(tk.fold(cols, (9, 8), **window), cols, dy)[0], F.unfold(dy, **window))


def test_unbatched_and_empty() -> None:
    x = torch.randn(3, 6, 5)
    assert torch.equal(tk.unfold(x, 2), F.unfold(x, 2))
    cols = torch.randn(12, 20)
    torch.testing.assert_close(tk.fold(cols, (6, 5), 2), F.fold(cols, (6, 5), 2))
    assert tk.unfold(x[None][:0], 2).shape == (0, 12, 20)
    assert tk.fold(cols[None][:0], (6, 5), 2).shape == (0, 3, 6, 5)
    assert torch.equal(modules_conv.Unfold(2, padding=1)(x[None]), F.unfold(x[None], 2, padding=1))
    torch.testing.assert_close(modules_conv.Fold((6, 5), 2)(cols), F.fold(cols, (6, 5), 2))


CONVOLUTIONS = [
    {"padding": 1},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
    {"padding": "same"},
]


@DTYPES
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=["3x3", "grouped", "same"])
def test_conv2d_im2col_against_float64(settings: dict[str, Any], memory_format: Any, dtype: torch.dtype) -> None:
    shape = (6, 4 // settings.get("groups", 1), 3, 2)
    x, w = (torch.randn(extents).to(dtype).contiguous(memory_format=memory_format) for extents in ((2, 4, 7, 6), shape))
    operands = [x, w, torch.randn(6).to(dtype)]

    def run(conv: Any, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = conv(*leaves, **settings)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    exact = run(F.conv2d, [t.double() for t in operands])
    for got, their, want in zip(run(tk.conv2d_im2col, operands), run(F.conv2d, operands), exact, strict=True):
        assert reference.error(got, want) <= reference.allowed_error(want, their)
    y = tk.conv2d_im2col(*operands, **settings, activation="relu")
    assert reference.error(y, exact[0].relu()) <= reference.allowed_error(exact[0], F.conv2d(*operands, **settings))


def test_the_memory_of_a_first_layer() -> None:
    problem = Conv2dProblem(N=1, C=3, H=227, W=227, K=96, R=11, S=11, stride=(4, 4))
    assert problem.im2col_shape == (363, 3025)
    assert geometry.im2col_bytes(problem, 4) == 363 * 3025 * 4
    assert tk.unfold(torch.randn(1, 3, 227, 227), 11, stride=4).shape == (1, 363, 3025)
    assert geometry.im2col_bytes(problem, 2) / (3 * 227 * 227 * 2) == pytest.approx(7.1, abs=0.05)


def test_gradcheck() -> None:
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    cols = torch.randn(1, 8, 12, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (lambda x: tk.unfold(x, 2, stride=2), (x,)),
        (lambda c: tk.fold(c, (5, 4), 2), (cols,)),
        (lambda x, w: tk.conv2d_im2col(x, w, padding=1), (x, w)),
        (lambda x, w: tk.conv2d_im2col(x.contiguous(memory_format=torch.channels_last), w, padding=1), (x, w)),
    ):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("input of 4x4 is too small", lambda: tk.unfold(torch.randn(1, 2, 4, 4), 5)),
        ("kernel_size is 0", lambda: tk.unfold(torch.randn(1, 2, 4, 4), 0)),
        ("7 rows must be a multiple of the 2x2 taps", lambda: tk.fold(torch.randn(1, 7, 9), 4, 2)),
        ("so it needs 9 columns", lambda: tk.fold(torch.randn(1, 8, 8), 4, 2)),
        (r"allowed is \[N, C \* R \* S, P \* Q\]", lambda: tk.fold(torch.randn(8), 4, 2)),
    ],
)
def test_bad_input(match: str, call: Any) -> None:
    with pytest.raises(ValueError, match=match):
        call()
