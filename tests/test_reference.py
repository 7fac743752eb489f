"""The float64 oracles against torch in float64: every formula was written twice, by different people."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileconv.kernels import reference


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Conv(NamedTuple):
    """x [N, C, H, W] and w [K, C/groups, R, S], and why this row is here."""

    name: str
    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    options: dict[str, Any]


CONVS = [
    Conv("plain", (2, 5, 9, 8), (7, 5, 3, 3), {}),
    Conv("pointwise", (2, 6, 4, 5), (3, 6, 1, 1), {}),
    Conv("alexnet-first", (1, 3, 35, 35), (4, 3, 11, 11), {"stride": 4, "padding": 2}),  # the last row is not read
    Conv("axes-differ", (2, 4, 11, 8), (3, 4, 3, 2), {"stride": (3, 2), "padding": (2, 1), "dilation": (1, 3)}),
    Conv("dilated", (1, 4, 12, 12), (5, 4, 3, 3), {"padding": 2, "dilation": 2}),
    Conv("grouped", (2, 6, 7, 7), (9, 2, 3, 3), {"padding": 1, "groups": 3}),
    Conv("depthwise", (2, 5, 7, 7), (10, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 5}),
    Conv("wider-than-the-image", (1, 2, 3, 3), (2, 2, 5, 5), {"padding": 2}),  # no window lies inside
    Conv("stride-over-the-filter", (1, 2, 9, 9), (2, 2, 2, 2), {"stride": 4}),  # pixels that no window reads
    Conv("asymmetric", (2, 4, 8, 7), (3, 4, 3, 3), {"padding": ((0, 2), (3, 1)), "stride": 2}),
    Conv(
        "asymmetric-grouped", (1, 4, 6, 6), (6, 2, 4, 3), {"padding": ((2, 1), (0, 1)), "groups": 2, "dilation": (1, 2)}
    ),
]


def torch_conv2d(x: Tensor, w: Tensor, b: Tensor | None, options: dict[str, Any]) -> Tensor:
    padding = options.get("padding", 0)
    if isinstance(padding, tuple) and isinstance(padding[0], tuple):
        (top, bottom), (left, right) = padding
        x, options = F.pad(x, (left, right, top, bottom)), {**options, "padding": 0}
    return F.conv2d(x, w, b, **options)


@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)
def test_conv2d_and_its_gradients(case: Conv) -> None:
    x, w, b = (tensor(*shape).requires_grad_() for shape in (case.x, case.w, (case.w[0],)))
    theirs = torch_conv2d(x, w, b, case.options)
    dy = torch.randn_like(theirs)
    dx, dw, db = torch.autograd.grad(theirs, (x, w, b), dy)
    torch.testing.assert_close(reference.conv2d(x, w, b, **case.options), theirs)
    torch.testing.assert_close(reference.conv2d_dgrad(dy, w, x.shape, **case.options), dx)
    torch.testing.assert_close(reference.conv2d_wgrad(x, dy, w.shape, **case.options), dw)
    torch.testing.assert_close(reference.conv2d_bias_grad(dy), db)


def test_conv2d_takes_any_dtype_and_memory_format() -> None:
    x, w = torch.randn(2, 3, 5, 5).bfloat16().to(memory_format=torch.channels_last), torch.randn(4, 3, 3, 3).half()
    got = reference.conv2d(x, w)
    assert got.dtype == torch.float64
    assert got.is_contiguous()
    torch.testing.assert_close(got, F.conv2d(x.double(), w.double()))


def test_conv2d_activation() -> None:
    x, w = tensor(1, 2, 4, 4), tensor(3, 2, 3, 3)
    torch.testing.assert_close(reference.conv2d(x, w, activation="relu"), F.conv2d(x, w).relu())
    with pytest.raises(ValueError, match="activation='tanh'"):
        reference.conv2d(x, w, activation="tanh")


def test_conv2d_by_hand() -> None:
    """Independent of torch: correlation, not convolution, and the padding before comes first."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    w = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]])
    assert reference.conv2d(x, w).tolist() == [[[[4321.0]]]]
    padded = reference.conv2d(x, w, padding=((1, 0), (0, 1)))
    assert padded.tolist() == [[[[2100.0, 200.0], [4321.0, 402.0]]]]


class Pool(NamedTuple):
    """x [N, C, H, W], and why this row is here."""

    name: str
    x: tuple[int, int, int, int]
    options: dict[str, Any]


POOLS = [
    Pool("halves", (2, 3, 8, 6), {"kernel_size": 2}),
    Pool("overlapping", (1, 2, 13, 13), {"kernel_size": 3, "stride": 2}),
    Pool("padded", (1, 2, 7, 8), {"kernel_size": 3, "stride": 2, "padding": 1}),
    Pool("axes-differ", (2, 2, 9, 10), {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0)}),
    Pool("ceil", (1, 2, 8, 9), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    Pool("ceil-drops-a-window", (1, 1, 5, 5), {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True}),
    Pool(
        "dilated", (1, 2, 9, 11), {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": (2, 3), "ceil_mode": True}
    ),
]


def pool(x: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return reference.max_pool2d(
        x, *([options["kernel_size"]]), **{k: v for k, v in options.items() if k != "kernel_size"}
    )


@pytest.mark.parametrize("contents", ["normal", "ties", "nan", "infinite"])
@pytest.mark.parametrize("case", POOLS, ids=lambda case: case.name)
def test_max_pool2d(case: Pool, contents: str) -> None:
    x = tensor(*case.x)
    if contents == "ties":
        x = x.round()
    elif contents == "nan":
        x[torch.rand_like(x) < 0.3] = math.nan
    elif contents == "infinite":
        x[torch.rand_like(x) < 0.9] = -math.inf
    values, indices = pool(x, case.options)
    their_values, their_indices = F.max_pool2d(x, return_indices=True, **case.options)
    torch.testing.assert_close(values, their_values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, their_indices)


@pytest.mark.parametrize("case", POOLS, ids=lambda case: case.name)
def test_max_pool2d_backward(case: Pool) -> None:
    x = tensor(*case.x).round().requires_grad_()
    theirs = F.max_pool2d(x, **case.options)
    dy = torch.randn_like(theirs)
    (dx,) = torch.autograd.grad(theirs, x, dy)
    torch.testing.assert_close(reference.max_pool2d_backward(dy, pool(x, case.options)[1], x.shape), dx)


@pytest.mark.parametrize("size", [1, (3, 2), (6, 6), 9], ids=str)
def test_adaptive_avg_pool2d(size: int | tuple[int, int]) -> None:
    x = tensor(2, 3, 7, 6).requires_grad_()
    theirs = F.adaptive_avg_pool2d(x, size)
    dy = torch.randn_like(theirs)
    (dx,) = torch.autograd.grad(theirs, x, dy)
    torch.testing.assert_close(reference.adaptive_avg_pool2d(x, size), theirs)
    torch.testing.assert_close(reference.adaptive_avg_pool2d_backward(dy, x.shape), dx)


@pytest.mark.parametrize("shape", [(5, 7), (7,), (2, 3, 7)], ids=str)
def test_linear(shape: tuple[int, ...]) -> None:
    x, w, b = tensor(*shape), tensor(4, 7), tensor(4)
    torch.testing.assert_close(reference.linear(x, w, b), F.linear(x, w, b))
    torch.testing.assert_close(reference.linear(x, w, None, "relu"), F.linear(x, w).relu())


def test_relu_keeps_nan() -> None:
    got = reference.relu(torch.tensor([-1.0, 0.0, 2.0, math.nan, -math.inf, math.inf]))
    torch.testing.assert_close(got, torch.tensor([0, 0, 2, math.nan, 0, math.inf]).double(), equal_nan=True)


@pytest.mark.parametrize(
    ("got", "exact", "expected"),
    [
        ([1.0, 2.5], [1.0, 2.0], 0.5),
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([1.0, math.inf], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [1.0, math.nan], math.inf),  # a kernel that loses NaN
        ([math.nan, -math.inf], [math.nan, -math.inf], 0.0),
        ([math.inf], [-math.inf], math.inf),
        ([], [], 0.0),
    ],
)
def test_error(got: list[float], exact: list[float], expected: float) -> None:
    assert reference.error(torch.tensor(got), torch.tensor(exact)) == expected


def test_error_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*\(1, 2\)"):
        reference.error(torch.zeros(2), torch.zeros(1, 2))


def test_allowed_error() -> None:
    exact = torch.tensor([1.0, -8.0, math.inf]).double()
    theirs = torch.tensor([1.25, -8.0, math.inf]).half()
    assert reference.allowed_error(exact, theirs) == 2 * (0.25 + 2**-10 * 8)
    assert reference.allowed_error(exact, exact.bfloat16()) == 2 * (2**-7 * 8)
    assert reference.allowed_error(exact, exact) == 2 * (32 * 2**-52 * 8)
    assert reference.allowed_error(exact[2:], theirs[2:]) == 0.0
