"""The depthwise kernels, called through their planners, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import hardware, layout, reference, small_tiles, tiles
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv as launch_conv
from tileconv.kernels.launch import depthwise, plans
from tileconv.kernels.ops.conv import conv2d_problem

GPU = hardware.INTERPRETER


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int]
    kernel: tuple[int, int]
    multiplier: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def settings(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.x[1]}

    @property
    def w(self) -> tuple[int, int, int, int]:
        return self.x[1] * self.multiplier, 1, *self.kernel

    @property
    def problem(self) -> Conv2dProblem:
        (top, left) = self.padding
        return conv2d_problem(self.x, self.w, self.stride, (top, top, left, left), self.dilation, self.x[1])


CASES = [
    Case("3x3", (2, 6, 7, 5), (3, 3), padding=(1, 1)),
    Case("strided", (2, 6, 8, 7), (3, 3), stride=(2, 2), padding=(1, 1)),
    Case("two filters a channel", (2, 5, 6, 7), (3, 2), 2, (2, 1), (1, 0), (1, 2)),
    Case("rows apart", (1, 5, 9, 8), (3, 2), dilation=(3, 1)),
    Case("stride and dilation share a factor", (1, 3, 9, 8), (3, 2), stride=(4, 3), padding=(2, 1), dilation=(2, 3)),
    Case("more taps than unroll", (1, 4, 8, 8), (7, 7), padding=(3, 3)),
    Case("one output row", (2, 4, 3, 6), (3, 3)),
]


def operands(case: Case, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    """x, w, b and dy."""
    problem = case.problem
    found = [torch.randn(shape) for shape in (case.x, case.w, (case.w[0],), problem.y_shape)]
    x, w, b, dy = (t.to(dtype) for t in found)
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return [x, w, b, dy]


def ours(case: Case, x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
    problem, last = case.problem, layout.is_channels_last(x)
    y, dx = layout.empty_image(problem.y_shape, x, last), layout.empty_image(case.x, x, last)
    dw = layout.empty_image(case.w, w, True)
    for launch in (
        *depthwise.plan_fprop(problem, x, w, b, y, gpu=GPU, activation="relu"),
        *depthwise.plan_dgrad(problem, dy, w, dx, gpu=GPU),
        *depthwise.plan_wgrad(problem, dy, x, dw, gpu=GPU),
    ):
        launch.run()
    return [y, dx, dw]


def theirs(case: Case, x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    y = F.conv2d(*leaves, b, **case.settings)
    return [y.detach().relu(), *torch.autograd.grad(y, leaves, dy)]


def assert_close(case: Case, inputs: list[Tensor]) -> None:
    exact = theirs(case, *(t.double() for t in inputs))
    for name, got, their, want in zip(
        ("y", "dx", "dw"), ours(case, *inputs), theirs(case, *inputs), exact, strict=True
    ):
        error, allowed = reference.error(got, want), reference.allowed_error(want, their)
        assert error <= allowed, f"{name}: error {error:.3g} is over the allowed {allowed:.3g}"


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case: Case, channels_last: bool) -> None:
    assert depthwise.applies(case.problem)
    assert_close(case, operands(case, torch.float32, channels_last))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    assert_close(case, operands(case, dtype, True))


def test_small_tiles_and_splits_make_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES[0], x=(2, 18, 7, 5))
    tile = small_tiles.DepthwiseTile(2, 16, 16)
    monkeypatch.setattr(small_tiles, "choose_depthwise", lambda *_: tile)
    monkeypatch.setattr(small_tiles, "choose_depthwise_wgrad", lambda *_: replace(tile, taps=4, splits=3))
    plans.forget()
    inputs = operands(case, torch.float32, True)
    assert_close(case, inputs)
    assert all(torch.equal(one, two) for one, two in zip(ours(case, *inputs), ours(case, *inputs), strict=True))
    plans.forget()


def test_tiles_for_a_gpu() -> None:
    problem = Conv2dProblem(32, 256, 28, 28, 256, 3, 3, padding=((1, 1), (1, 1)), groups=256)
    gpu = hardware.GPUS["H100"]
    tile = small_tiles.choose_depthwise(problem, True, torch.float16, gpu)
    assert (tile.lines, tile.columns * tile.channels) == (3, 128 * 8)  # 16 bytes a thread
    assert small_tiles.choose_depthwise(replace(problem, R=7, S=7), True, torch.float16, gpu).lines == 1
    assert small_tiles.choose_depthwise_wgrad(problem, True, torch.float16, gpu).splits * 4 >= 4 * gpu.sms


def test_a_first_layer_is_none() -> None:
    assert not depthwise.applies(Conv2dProblem(1, 1, 8, 8, 6, 3, 3))
    assert not depthwise.applies(Conv2dProblem(1, 8, 8, 8, 8, 3, 3, groups=4))


def test_conv2d_takes_this_way_unless_a_formulation_is_asked_for() -> None:
    x, w = torch.randn(2, 6, 5, 5, requires_grad=True), torch.randn(12, 1, 3, 3, requires_grad=True)
    problem = Conv2dProblem(2, 6, 5, 5, 12, 3, 3, padding=((1, 1), (1, 1)), groups=6)
    y = torch.empty(problem.y_shape)
    plan = lambda: launch_conv.plan_fprop(problem, x, w, None, y, gpu=hardware.INTERPRETER)  # noqa: E731
    assert "depthwise" in plan()[0].kernel.fn.__module__
    with tiles.override(formulation="gather"):
        assert "depthwise" not in plan()[0].kernel.fn.__module__
    ours = tk.conv2d(x, w, padding=1, groups=6)
    want = F.conv2d(x.double(), w.double(), padding=1, groups=6)
    assert reference.error(ours, want) <= 1e-5
    dy = torch.randn_like(ours)
    grads = zip(torch.autograd.grad(ours, (x, w), dy), torch.autograd.grad(want, (x, w), dy.double()), strict=True)
    for our, their in grads:
        torch.testing.assert_close(our, their.float(), rtol=1e-4, atol=1e-4)


def test_a_long_weight_gradient_is_rounded_once_a_step_and_once_a_level() -> None:
    case = Case("long", (2, 8, 160, 160), (3, 3), padding=(1, 1))
    x, dy, dw = torch.rand(case.x), torch.rand(case.x), layout.empty_image(case.w, torch.empty(0), True)
    first, second = depthwise.plan_wgrad(case.problem, dy, x, dw, gpu=GPU)
    first.run(), second.run()
    w = torch.zeros(case.w, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(F.conv2d(x.double(), w, padding=1, groups=8), w, dy.double())
    a = first.arguments
    roundings = 1 + a["LOOPS"] + math.log2(a["COLUMNS"]) + second.arguments["SLICES"]
    assert roundings < 24, "else the bound lets a sum pass that is added up one by one"
    assert ((dw.double() - exact).abs() <= roundings * 2**-24 * exact).all()
