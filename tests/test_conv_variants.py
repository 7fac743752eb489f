"""Transposed, one-dimensional and locally connected convolution, and layers exchanged for each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import modules_conv, reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def run(function: Any, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_close(ours: Any, theirs: Any, inputs: list[Tensor]) -> None:
    """Both functions on the inputs: ours, and its gradients, within the budget of the error that theirs makes."""
    dy = torch.randn(theirs(*inputs).shape, dtype=inputs[0].dtype)
    exact = run(theirs, [t.double() for t in inputs], dy)
    for name, got, their, want in zip("yabc", run(ours, inputs, dy), run(theirs, inputs, dy), exact, strict=False):
        assert got.dtype == their.dtype
        error, allowed = reference.error(got, want), reference.allowed_error(want, their)
        assert error <= allowed, f"{name}: error {error:.3g} is over the allowed {allowed:.3g}"


TRANSPOSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "doubling": {"stride": 2, "padding": 1, "output_padding": 1},
    "every setting": {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "groups": 2, "dilation": (2, 1)},
    "output padding beyond the stride": {"dilation": 3, "output_padding": 2, "padding": 2},
    "stride skips pixels": {"stride": 4},
}


@DTYPES
@pytest.mark.parametrize("name", TRANSPOSED)
def test_conv_transpose2d_against_float64(name: str, dtype: torch.dtype) -> None:
    settings = TRANSPOSED[name]
    x, w = torch.randn(2, 8, 5, 4).to(dtype), torch.randn(8, 3, 3, 2).to(dtype)
    b = torch.randn(3 * settings.get("groups", 1)).to(dtype)
    assert_close(
        lambda *t: tk.conv_transpose2d(*t, **settings), lambda *t: F.conv_transpose2d(*t, **settings), [x, w, b]
    )
    last = tk.conv_transpose2d(x.contiguous(memory_format=torch.channels_last), w, b, **settings)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(
        lambda *t: tk.conv_transpose2d(*t, **settings, activation="relu"),
        lambda *t: F.conv_transpose2d(*t, **settings).relu(),
        [x.double(), w.double(), b.double()],
    )


def test_conv_transpose2d_without_batch_bias_or_images() -> None:
    x, w = torch.randn(4, 5, 6), torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(tk.conv_transpose2d(x, w), F.conv_transpose2d(x, w))
    assert tk.conv_transpose2d(x[None][:0], w, stride=2).shape == (0, 2, 11, 13)
    layer = modules_conv.ConvTranspose2d(4, 2, 3, stride=2, padding=1)
    want = F.conv_transpose2d(x[None], layer.weight, layer.bias, 2, 1, 1)
    torch.testing.assert_close(layer(x[None], output_size=[10, 12]), want)


@DTYPES
@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": 3, "dilation": 2}, {"padding": "same"}, {"groups": 2}], ids=str
)
def test_conv1d_against_float64(settings: dict[str, Any], dtype: torch.dtype) -> None:
    w = torch.randn(6, 4 // settings.get("groups", 1), 3)
    operands = [t.to(dtype) for t in (torch.randn(2, 4, 13), w, torch.randn(6))]
    assert_close(lambda *t: tk.conv1d(*t, **settings), lambda *t: F.conv1d(*t, **settings), operands)
    x, w, b = operands
    assert tk.conv1d(x[0], w, b, **settings).shape == F.conv1d(x[0], w, b, **settings).shape
    layer = modules_conv.Conv1d(4, 6, 3, padding=1)
    torch.testing.assert_close(layer(x.float()), F.conv1d(x.float(), layer.weight, layer.bias, padding=1))


def local(x: Tensor, w: Tensor, b: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Tensor:
    """A locally connected layer from the definition: every pixel's patch times its own filters."""
    P, Q, _, C, R, S = w.shape
    patches = F.unfold(x, (R, S), dilation, padding, stride).unflatten(1, (C, R, S)).unflatten(-1, (P, Q))
    return torch.einsum("ncrspq,pqkcrs->nkpq", patches, w) + (b[:, None, None] if b.dim() == 1 else b)


LOCAL: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((3, 5, 4, 3), (4, 3, 7, 5, 3, 3), {"padding": 1}),
    "every setting": ((2, 4, 7, 6), (4, 3, 6, 4, 3, 2), {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 2)}),
    "larger than a block of 16": ((17, 6, 2, 2), (1, 1, 18, 6, 2, 2), {}),
}


@DTYPES
@pytest.mark.parametrize("name", LOCAL)
def test_locally_connected2d_against_float64(name: str, dtype: torch.dtype) -> None:
    shape, filters, settings = LOCAL[name]
    x, w = torch.randn(shape).to(dtype), (torch.randn(filters) / 4).to(dtype)
    p, q, k = filters[:3]
    for bias in (torch.randn(k), torch.randn(k, p, q)):
        assert_close(
            lambda *t: tk.locally_connected2d(*t, **settings), lambda *t: local(*t, **settings), [x, w, bias.to(dtype)]
        )
        x = x.contiguous(memory_format=torch.channels_last)


def test_filters_all_alike_make_it_a_convolution() -> None:
    x, w, b = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    want = F.conv2d(x, w, b, padding=1)
    torch.testing.assert_close(tk.locally_connected2d(x, w.expand(6, 5, *w.shape), b, padding=1), want)
    layer = modules_conv.LocallyConnected2d(3, 4, (6, 5), 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(w.expand(layer.weight.shape))
        layer.bias.copy_(b[:, None, None].expand(layer.bias.shape))
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x[0]), want[0])
    assert layer.weight.permute(0, 1, 2, 4, 5, 3).is_contiguous()
    assert sum(p.numel() for p in layer.parameters()) == 30 * (4 * 27 + 4)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.stride() == layer.weight.stride()
    assert modules_conv.LocallyConnected2d(3, 4, 6, 3, shared_bias=True).bias.shape == (4,)


def test_runs_repeat_to_the_bit() -> None:
    shape, filters, settings = LOCAL["every setting"]
    operands = [torch.randn(shape), torch.randn(filters), torch.randn(6)]
    dy = torch.randn(local(*operands, **settings).shape)
    first, second = (run(lambda *t: tk.locally_connected2d(*t, **settings), operands, dy) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_gradcheck_and_gradgradcheck() -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    for function, inputs in (
        (lambda *t: tk.conv_transpose2d(*t, stride=2, padding=1, output_padding=1, groups=2),
         (random(1, 4, 3, 2), random(4, 1, 3, 2), random(2))),
        (lambda *t: tk.conv1d(*t, padding=1), (random(2, 2, 5), random(3, 2, 3), random(3))),
        (lambda *t: tk.locally_connected2d(*t, padding=1, stride=2),
         (random(2, 2, 3, 3), random(2, 2, 2, 2, 2, 3), random(2, 2, 2))),
    ):  # fmt: skip
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_a_fully_connected_layer_as_a_convolution_and_back() -> None:
    layer = tk.nn.Linear(3 * 4 * 5, 7)
    conv = tk.fc_to_conv(layer, (3, 4, 5))
    assert isinstance(conv, torch.nn.Conv2d) and conv.weight.shape == (7, 3, 4, 5)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(conv(x).flatten(1), layer(x.flatten(1)))
    wide = torch.randn(1, 3, 6, 6)  # every position of a larger image at once
    torch.testing.assert_close(conv(wide)[0, :, 2, 1], layer(wide[:, :, 2:, 1:].flatten(1))[0])
    back = tk.conv_to_fc(conv, (3, 4, 5))
    assert torch.equal(back.weight, layer.weight) and torch.equal(back.bias, layer.bias)
    assert tk.fc_to_conv(torch.nn.Linear(60, 7, bias=False).double(), (3, 4, 5)).bias is None
    first = tk.nn.Conv2d(3, 7, (4, 5))  # the other way round
    again = tk.fc_to_conv(tk.conv_to_fc(first, (3, 4, 5)), (3, 4, 5))
    assert torch.equal(again.weight, first.weight) and torch.equal(again.bias, first.bias)
    assert torch.equal(again(x), first(x))


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2, "padding": 1, "groups": 2}, {"padding": "same", "dilation": (1, 2)}, {"bias": False}],
    ids=str,
)
def test_a_convolution_as_a_matrix(settings: dict[str, Any]) -> None:
    conv = torch.nn.Conv2d(4, 6, (3, 2), **settings).double()
    layer = tk.conv_to_fc(conv, (4, 5, 6))
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    want = conv(x).flatten(1)
    assert layer.weight.shape == (want.shape[1], 120)
    torch.testing.assert_close(F.linear(x.flatten(1), layer.weight, layer.bias), want)
    values = set(conv.weight.flatten().tolist()) | {0.0}
    assert set(layer.weight.flatten().tolist()) <= values


X, W = torch.zeros(1, 4, 5, 5), torch.zeros(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("need weight.shape.0. = 4", lambda: tk.conv_transpose2d(X, W[:3])),
        ("groups is 3: it must divide", lambda: tk.conv_transpose2d(X, W, groups=3)),
        (r"bias has shape \(4,\): allowed is \(2,\)", lambda: tk.conv_transpose2d(X, W, torch.zeros(4))),
        ("output_padding is .2, 2.: allowed is less", lambda: tk.conv_transpose2d(X, W, stride=2, output_padding=2)),
        ("leaves an output of -1x-1", lambda: tk.conv_transpose2d(X, W, padding=4)),
        (r"allowed is \[K, C/groups, S\]", lambda: tk.conv1d(X[0], W)),
        ("stride is .1, 2.: allowed are an int or a sequence of one", lambda: tk.conv1d(X[0], W[0], stride=(1, 2))),
        ("the output has 3x3 pixels", lambda: tk.locally_connected2d(X, torch.zeros(2, 3, 2, 4, 3, 3))),
        ("need weight.shape.3. = 4", lambda: tk.locally_connected2d(X, torch.zeros(3, 3, 2, 3, 3, 3))),
        (r"allowed are \(2,\) and \(2, 3, 3\)",
         lambda: tk.locally_connected2d(X, torch.zeros(3, 3, 2, 4, 3, 3), torch.zeros(3))),
        ("linear has 9 inputs, not 8", lambda: tk.fc_to_conv(torch.nn.Linear(9, 1), (2, 2, 2))),
        ("conv has 2 input channels", lambda: tk.conv_to_fc(torch.nn.Conv2d(2, 2, 1), (3, 2, 2))),
        ("padding_mode 'reflect'", lambda: tk.conv_to_fc(torch.nn.Conv2d(2, 2, 1, padding_mode="reflect"), (2, 2, 2))),
    ],
)  # fmt: skip
def test_bad_input(match: str, call: Any) -> None:
    with pytest.raises(ValueError, match=match):
        call()
