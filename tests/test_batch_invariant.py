"""batch_invariant: a sample's result, and its input's gradient, have the same bits in a batch of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import conv_tile, cost, hardware, tiles
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv as launch_conv

H100 = hardware.GPUS["H100"]
BATCHES = (1, 2, 3, 5)


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[..., Tensor]
    sample: tuple[int, ...]
    weight: tuple[int, ...]
    settings: dict[str, Any]


# The interpreter multiplies with numpy, whose library adds in an order that the shape of a block decides.
CASES = [
    Case("box", tk.conv2d, (24, 6, 5), (20, 24, 3, 3), {"padding": 1, "activation": "relu"}),
    Case("strided", tk.conv2d, (8, 9, 7), (12, 8, 3, 3), {"stride": 2, "padding": 1}),
    Case("groups", tk.conv2d, (16, 5, 5), (16, 8, 3, 3), {"padding": 1, "groups": 2}),
    Case("unaddressable", tk.conv2d, (6, 5, 5), (9, 6, 3, 3), {}),
    Case("first layer", tk.conv2d, (3, 11, 11), (70, 3, 7, 7), {"stride": 4, "padding": 2}),
    Case("depthwise", tk.conv2d, (16, 6, 6), (16, 1, 3, 3), {"padding": 1, "groups": 16}),
    Case("linear", tk.linear, (300,), (50, 300), {}),
    Case("conv1d", tk.conv1d, (24, 17), (16, 24, 5), {"padding": 2}),
    Case("transposed", tk.conv_transpose2d, (12, 4, 5), (12, 8, 3, 3), {"stride": 2, "padding": 1}),
]


def bits(case: Case, x: Tensor, w: Tensor, dy: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """The result for every sample, and the gradient of its input."""
    leaf = x.detach().requires_grad_()
    y = case.call(leaf, w, **case.settings, **settings)
    dy = torch.cos(y.detach()) if dy is None else dy
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_sample_has_the_same_bits_in_every_batch(case: Case, dtype: torch.dtype) -> None:
    x, w = torch.randn(max(BATCHES), *case.sample, dtype=dtype), torch.randn(case.weight, dtype=dtype)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    alone = [bits(case, x[i : i + 1], w, batch_invariant=True) for i in range(len(x))]
    for batch in BATCHES[1:]:
        y, dx = bits(case, x[:batch], w, batch_invariant=True)
        for i in range(batch):
            assert torch.equal(y[i], alone[i][0][0]), f"sample {i} of {batch}"
            assert torch.equal(dx[i], alone[i][1][0]), f"gradient of sample {i} of {batch}"


def test_a_first_layer_whose_samples_start_beside_aligned_addresses() -> None:
    x = torch.randn(2, 3, 11, 12, dtype=torch.float16).to(memory_format=torch.channels_last)
    w = torch.randn(16, 3, 7, 7, dtype=torch.float16)
    whole = tk.conv2d(x, w, stride=4, padding=2, batch_invariant=True)
    assert (x[1:].data_ptr() - x.data_ptr()) % 16 == 8
    assert torch.equal(tk.conv2d(x[1:], w, stride=4, padding=2, batch_invariant=True), whole[1:])


ALEXNET = {"conv2": (64, 27, 192, 5, 2), "conv3": (192, 13, 384, 3, 1), "conv4": (384, 13, 256, 3, 1),
           "fc8": (4096, 1, 1000, 1, 0)}  # fmt: skip


def problem(name: str, batch: int) -> Conv2dProblem:
    C, H, K, R, pad = ALEXNET[name]
    return Conv2dProblem(batch, C, H, H, K, R, R, padding=((pad, pad), (pad, pad)))


def choice(name: str, pass_: str, batch: int, invariant: bool) -> tuple[Conv2dProblem, conv_tile.ConvTile]:
    sized = problem(name, batch)
    sized = sized.dgrad[0].problem if pass_ == "dgrad" else sized
    return sized, tiles.choose(sized, pass_, torch.float16, "ieee", H100, batch_invariant=invariant)


FEW = (1, 2, 3, 5, 7, 8, 31, 32, 64, 127, 128, 129, 256, 300)


@pytest.mark.parametrize(
    ("name", "pass_", "batches"),
    [("conv4", "fprop", range(1, 301)), ("fc8", "fprop", range(1, 301)), ("conv2", "dgrad", FEW),
     ("conv3", "dgrad", FEW), ("conv3", "fprop", FEW)],
)  # fmt: skip
def test_on_sm_90_the_batch_does_not_decide_the_order_of_a_sum(name: str, pass_: str, batches: Any) -> None:
    orders = {tiles.order(choice(name, pass_, batch, True)[1]) for batch in batches}
    assert len(orders) == 1
    assert len({tiles.order(choice(name, pass_, batch, False)[1]) for batch in FEW}) > 1, "else there is nothing to fix"
    formulation, step, flat, _, _, splits, tail, box = orders.pop()
    assert tail == 0 and (splits == 1) == (box is None) == (step is None)
    for batch in FEW:
        tile = choice(name, pass_, batch, True)[1]
        assert (tile.formulation, tile.flat, tile.splits) == (formulation, flat, splits)
        assert step in (None, tile.block_c)


@pytest.mark.parametrize("batch", FEW)
def test_a_plan_of_any_batch_shares_all_tiles_or_none(batch: int) -> None:
    for name in ALEXNET:
        p = problem(name, batch)
        x, w, y = (torch.empty(s, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
                   for s in (p.x_shape, p.w_shape, p.y_shape))  # fmt: skip
        first, *rest = launch_conv.plan_fprop(p, x, w, None, y, gpu=H100, batch_invariant=True)
        assert first.arguments["SPLITS"] == 1 or first.arguments["FULL"] == 0
        assert len(rest) == (first.arguments["SPLITS"] > 1)


def test_it_costs_little_where_batches_are_large() -> None:
    for name in ALEXNET:
        for pass_ in ("fprop", "dgrad"):
            times = []
            for invariant in (True, False):
                sized, tile = choice(name, pass_, 128, invariant)
                times.append(cost.predict(sized, pass_, tile, torch.float16, "ieee", H100).modelled_us)
            # Most in conv2's gradient: boxes of three rows, the quickest for a large batch, leave small ones SMs idle.
            assert times[0] <= (1.5 if (name, pass_) == ("conv2", "dgrad") else 1.35) * times[1], (name, pass_)


def test_the_context_covers_a_model_and_the_argument_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()
    real = tiles._choose

    def noted(p: Conv2dProblem, pass_: str, *arguments: Any) -> conv_tile.ConvTile:
        asked.add((pass_, p.N, arguments[-1]))
        return real(p, pass_, *arguments)

    monkeypatch.setattr(tiles, "_choose", noted)
    model = torch.nn.Sequential(tk.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), tk.nn.Linear(72, 3))
    w = torch.randn(8, 4, 3, 3)
    with tk.batch_invariant():
        y = model(torch.randn(11, 4, 5, 5, requires_grad=True))
        with tk.batch_invariant(False):
            tk.conv2d(torch.randn(12, 4, 5, 5), w)
        tk.conv2d(torch.randn(13, 4, 5, 5), w, batch_invariant=False)
    y.sum().backward()  # outside the block: it follows its forward pass
    tk.conv2d(torch.randn(14, 4, 5, 5), w)
    invariant, others = ({(name, n) for name, n, flag in asked if flag is wanted} for wanted in (True, False))
    assert invariant == {("fprop", 11), ("dgrad", 11)}
    assert others == {("wgrad", 11), ("fprop", 12), ("fprop", 13), ("fprop", 14)}


def test_compiled_with_it() -> None:
    torch._dynamo.reset()
    x, w = torch.randn(3, 8, 6, 5), torch.randn(16, 8, 3, 3)

    def call(x: Tensor, w: Tensor) -> Tensor:
        return tk.conv2d(x, w, padding=1)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with tk.batch_invariant():
        assert torch.equal(compiled(x, w)[:1], call(x[:1], w))


def test_what_is_no_bool_is_refused() -> None:
    with pytest.raises(TypeError, match="batch_invariant must be True or False, not 1"):
        tk.conv2d(torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3), batch_invariant=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="enabled must be True or False"), tk.batch_invariant("yes"):  # type: ignore[arg-type]
        pass


def test_a_reference_in_a_gpus_table_is_for_its_own_batch() -> None:
    tile = replace(choice("conv4", "fprop", 128, False)[1], splits=1, tail=0)
    assert tiles.order(replace(tile, tail=7)) == tiles.order(tile)  # by filters: an output's own sum stays as it is
    assert tiles.order(replace(tile, splits=2, tail=7)) != tiles.order(tile)
