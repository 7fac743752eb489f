"""Linear layers with bias, ReLU and dropout in one kernel: the mask, the numbers, the gradients, and that it is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

import tileconv.kernels as tk
from tileconv.kernels import reference, tiles
from tileconv.kernels.launch.common import Launch

PIXEL: dict[str, Any] = {"formulation": "pixel", "box": (16, 1, 1), "block_k": 16, "block_c": 16}
ODD, EVEN = (5, 37, 19), (20, 40, 56)


@dataclass(frozen=True)
class Way:
    """A formulation of a layer [N, C] x [K, C], and the kernels that it takes forward."""

    kernels: tuple[str, ...]
    dtype: torch.dtype = torch.float16
    size: tuple[int, int, int] = EVEN
    tile: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    p: float = 0.4


WAYS = {
    "pixels": Way(("fprop_box",), tile=PIXEL),
    "a box": Way(("fprop_box",), tile=PIXEL | {"formulation": "box", "box": (8, 2, 1)}),
    "second product": Way(("fprop_box",), tile=PIXEL | {"block_k": 32, "block_k2": 16}),
    "second product across": Way(
        ("fprop_across",), size=(20, 40, 88), tile=PIXEL | {"block_k": 64, "block_k2": 32, "across": True}
    ),
    "second product across, fp32": Way(
        ("fprop_across",), torch.float32, (20, 40, 88), PIXEL | {"block_k": 64, "block_k2": 32, "across": True}
    ),
    "depth shared": Way(("fprop_box", "fprop_finish"), tile=PIXEL | {"splits": 2}),
    "depth of the last tiles shared": Way(
        ("fprop_box", "fprop_finish"),
        torch.float32,
        tile=PIXEL | {"block_k": 32, "block_k2": 16, "splits": 2, "tail": 3},
    ),
    "filters of the last tiles shared": Way(("fprop_box",), tile=PIXEL | {"block_k": 32, "block_k2": 16, "tail": 3}),
    "padded copies": Way(("widen", "widen", "fprop_box"), size=ODD),
    "bf16": Way(("fprop_box",), torch.bfloat16),
    "fp32 by pointers": Way(("fprop_gather",), torch.float32, ODD),
    "depth shared by pointers": Way(
        ("fprop_gather", "fprop_finish"),
        torch.float32,
        tile=PIXEL | {"formulation": "gather", "flat": False, "splits": 2},
    ),
    # The factor is an fp32 number in every dtype: only one that is exact in it lets fp64 show its own rounding.
    "fp64": Way(("fprop_gather",), torch.float64, ODD, p=0.5),
    "bf16x3": Way(("split", "split", "fprop_box"), torch.float32, settings={"precision": "bf16x3"}),
    "bf16x6 by pointers": Way(
        ("split", "split", "fprop_gather"),
        torch.float32,
        ODD,
        PIXEL | {"formulation": "gather", "flat": False},
        {"precision": "bf16x6"},
    ),
    "any batch": Way(("fprop_box",), settings={"batch_invariant": True}),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    names: list[str] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: names.append(self.kernel.__name__) or run(self))
    return names


def seeded(function: Callable[..., Tensor], *arguments: Any, **settings: Any) -> Tensor:
    torch.manual_seed(3)
    return function(*arguments, **settings)


def operands(n: int, c: int, k: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shapes = ((n, c), (k, c), (k,))
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def by_mask(function: Callable[..., Tensor], mask: Tensor, p: float) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs) * mask.to(inputs[0].dtype) / (1 - p)


# Kernels finish alike with a ReLU and without; what differs without one is the gradient, by dtype.
CASES = [(name, "relu") for name in WAYS] + [(name, None) for name in ("padded copies", "bf16", "fp64")]


@pytest.mark.parametrize(("name", "activation"), CASES, ids=lambda value: value or "no activation")
def test_one_kernel_gives_what_two_would(
    name: str, activation: str | None, device: torch.device, launched: list[str]
) -> None:
    way = WAYS[name]
    inputs = operands(*way.size, way.dtype, device)
    settings = {"activation": activation, **way.settings}
    with tiles.override(**way.tile):
        plain = tk.linear(*inputs, **settings)
        without = [*launched]
        launched.clear()
        y = seeded(tk.linear, *inputs, dropout=way.p, **settings)
    assert tuple(launched) == tuple(without) == way.kernels
    mask = seeded(tk.dropout, torch.ones_like(plain), way.p) != 0
    assert 0.3 < mask.double().mean() < 0.8
    assert torch.equal(y != 0, mask & (plain != 0))
    if way.dtype.itemsize > 2:
        assert torch.equal(y, seeded(tk.dropout, plain, way.p))

    def layer(*leaves: Tensor) -> Tensor:
        return F.linear(*leaves).relu() if activation else F.linear(*leaves)

    dy = torch.randn_like(y)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    results = []
    for out, leaves in (
        (y, inputs),
        (by_mask(layer, mask, way.p)(*inputs), inputs),
        (by_mask(layer, mask, way.p)(*doubles), doubles),
    ):
        results.append([out, *torch.autograd.grad(out, leaves, dy.to(out.dtype))])
    for what, ours, theirs, exact in zip(("y", "dx", "dw", "db"), *results, strict=True):
        error, allowed = reference.error(ours, exact), reference.allowed_error(exact, theirs)
        # bf16x3 has 16 bits of fp32's 24.
        allowed *= 256 if way.settings.get("precision") == "bf16x3" else 1
        assert error <= allowed, f"{what}: error {error:.3g} is over the allowed {allowed:.3g}"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_relus_gradient_launches_no_more_with_dropout(bias: bool, device: torch.device, launched: list[str]) -> None:
    x, w, b = operands(*EVEN, torch.float16, device)
    names = []
    for p in (0.0, 0.4):
        y = tk.linear(x, w, b if bias else None, activation="relu", dropout=p)
        launched.clear()
        torch.autograd.grad(y, (x, w, b) if bias else (x, w), torch.ones_like(y))
        names.append([*launched])
    assert names[0] == names[1]
    assert ("bias_backward" if bias else "relu_backward") in names[0]


def test_masks_are_drawn_from_torchs_generator(device: torch.device) -> None:
    x, w, b = (t.detach() for t in operands(3, 32, 80, torch.float16, device))
    first, second = seeded(tk.linear, x, w, b, dropout=0.5), tk.linear(x, w, b, dropout=0.5)
    assert not torch.equal(first != 0, second != 0)
    assert torch.equal(seeded(tk.linear, x, w, b, dropout=0.5), first)
    kept = [(seeded(tk.linear, x, w, b, dropout=p) != 0).double().mean().item() for p in (0.1, 0.9)]
    assert kept == pytest.approx([0.9, 0.1], abs=0.1), "a plan is of one probability"
    rows = seeded(tk.linear, x.view(1, 3, 32), w, b, dropout=0.5)
    assert torch.equal(rows, first[None])


@pytest.mark.parametrize("activation", [None, "relu"])
def test_probabilities_of_nothing_and_all(activation: str | None, device: torch.device) -> None:
    x, w, b = operands(*ODD, torch.float32, device)
    plain = tk.linear(x, w, b, activation=activation)
    state = torch.get_rng_state()
    for off in ({"dropout": 0.0}, {"dropout": 0.7, "training": False}):
        assert torch.equal(tk.linear(x, w, b, activation=activation, **off), plain)
    assert torch.equal(torch.get_rng_state(), state)
    y = tk.linear(x * float("inf"), w, b, activation=activation, dropout=1)
    assert torch.equal(y, torch.zeros_like(y))
    y = tk.linear(x, w, b, activation=activation, dropout=1.0)
    for gradient in torch.autograd.grad(y, (x, w, b), torch.full_like(y, 1e30)):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert tk.linear(x[:0], w, b, activation=activation, dropout=0.5).shape == (0, 19)
    with pytest.raises(ValueError, match="dropout is 2: allowed is 0 to 1"):
        tk.linear(x, w, dropout=2)


def test_gradients_to_second_order(device: torch.device) -> None:
    inputs = operands(3, 4, 2, torch.float64, device)
    for activation in (None, "relu"):

        def layer(*leaves: Tensor, activation: str | None = activation) -> Tensor:
            return seeded(tk.linear, *leaves, activation=activation, dropout=0.3)

        assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)


def test_compile_vmap_and_autocast(device: torch.device) -> None:
    x, w, b = operands(*EVEN, torch.float32, device)

    def layer(x: Tensor) -> Tensor:
        return tk.linear(x, w, b, activation="relu", dropout=0.5)

    torch._dynamo.reset()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y[y != 0], 2 * tk.linear(x, w, b, activation="relu")[y != 0])
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, b, dy)[0], (2 * dy * (y != 0)).sum(0))
    groups = x.detach().view(2, 10, 40)
    with pytest.raises(RuntimeError, match="randomness"):  # as torch.nn.functional.dropout
        vmap(layer)(groups)
    same = vmap(layer, randomness="same")(groups[:1].expand(2, -1, -1))
    assert torch.equal(same[0], same[1])
    other = vmap(layer, randomness="different")(groups[:1].expand(2, -1, -1))
    assert not torch.equal(other[0] != 0, other[1] != 0)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
