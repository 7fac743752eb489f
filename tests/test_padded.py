"""Channel counts that no descriptor addresses: copies filled up with zeros, and what runs on them, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tileconv.kernels as tk
from tileconv.bench.cases import DTYPES, precision_of
from tileconv.kernels import hardware, reference, tiles
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv, padded, plans

CHANNELS_LAST = torch.channels_last
H100, A100 = hardware.GPUS["H100"], hardware.GPUS["A100"]
CASES = {
    "both odd": ((2, 17, 5, 4), 33, 3, {"padding": 1}),
    "channels odd": ((2, 21, 4, 5), 24, 2, {}),
    "filters odd": ((2, 24, 4, 5), 19, 3, {"padding": 2, "dilation": 2}),
    "strided": ((2, 19, 7, 6), 17, 3, {"stride": 2, "padding": 1}),
    "pixels that no tap reaches": ((1, 17, 7, 6), 18, 2, {"stride": 3}),
}


def kernels_of(launches: list[Any]) -> list[str]:
    return [launch.kernel.__name__ for launch in launches]


def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that run padded, as they are planned."""
    found: list[str] = []
    ask = padded.applies

    def asked(problem: Conv2dProblem, pass_: str, *arguments: Any, **settings: Any) -> bool:
        answer = ask(problem, pass_, *arguments, **settings)
        found.extend([pass_] * answer)
        return answer

    monkeypatch.setattr(padded, "applies", asked)
    return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("arithmetic", ["fp16", "bf16", "tf32", "bf16x6"])
@pytest.mark.parametrize("name", CASES)
def test_passes_on_padded_copies_against_float64(
    name: str, arithmetic: str, memory_format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = seen(monkeypatch)
    dtype = DTYPES[arithmetic]
    shape, filters, window, arguments = CASES[name]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    w = (torch.randn(filters, shape[1], window, window) / (3 * shape[1] ** 0.5)).to(dtype)
    w = w.contiguous(memory_format=memory_format).requires_grad_()
    b = torch.randn(filters).to(dtype)
    y = tk.conv2d(x, w, b, **arguments, precision=arithmetic if dtype == torch.float32 else None)
    dy = torch.randn(y.shape).to(dtype)
    ours = [y.detach(), *torch.autograd.grad(y, (x, w), dy)]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, w, b)]
    exact_y = F.conv2d(*wide, **arguments)
    exact = [exact_y.detach(), *torch.autograd.grad(exact_y, wide[:2], dy.double())]
    digits = {"fp16": 11, "bf16": 8, "tf32": 11, "bf16x6": 21}[arithmetic]
    for got, want in zip(ours, exact, strict=True):
        assert reference.error(got, want) <= 2 ** (1 - digits) * want.abs().max().item()
    odd = {"channels odd": ["fprop", "dgrad", "wgrad"], "filters odd": ["dgrad", "wgrad"]}
    granule = 4 if arithmetic == "tf32" else 8
    able = odd.get(name, ["fprop", "dgrad", "wgrad"]) if shape[1] % granule or filters % granule else []
    assert sorted(set(planned)) == sorted(able)


@pytest.mark.skipif(not hardware.interpreting(), reason="plans for another GPU, run in Triton's interpreter")
@pytest.mark.parametrize("arithmetic", ["fp16", "tf32", "bf16x3"])
@pytest.mark.parametrize("name", CASES)
def test_padded_copies_by_pointers_against_float64(name: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU without tensor descriptors runs them: 16-byte copies need the same rows."""
    dtype = DTYPES[arithmetic]
    monkeypatch.setattr(padded, "_quicker", lambda *_: True)
    shape, filters, window, arguments = CASES[name]
    given = {"stride": 1, "padding": 0, "dilation": 1} | arguments
    stride, pad, dilation = ((n, n) for n in given.values())
    problem = Conv2dProblem(*shape, filters, window, window, stride, (pad, pad), dilation)
    x, w, dy = (torch.randn(extents).to(dtype).contiguous(memory_format=CHANNELS_LAST)
                for extents in (problem.x_shape, problem.w_shape, problem.y_shape))  # fmt: skip
    w /= 3 * shape[1] ** 0.5
    y, dx, dw = (torch.full_like(t, torch.nan) for t in (dy, x, w))
    settings: dict[str, Any] = {"gpu": A100, "precision": precision_of(arithmetic)}
    with plans.allocations() as scratch:
        launches = [
            *conv.plan_fprop(problem, x, w, None, y, **settings),
            *conv.plan_dgrad(problem, dy, w, dx, **settings),
            *conv.plan_wgrad(problem, dy, x, dw, **settings),
        ]
    for tensor in scratch:
        tensor.fill_(torch.nan)
    for launch in launches:
        launch.run()
    names = kernels_of(launches)
    assert "widen" in names and {"fprop_gather", "wgrad_gather"} <= set(names)
    wide = [t.double().requires_grad_() for t in (x, w)]
    exact = F.conv2d(*wide, **arguments)
    for got, want in zip((y, dx, dw), (exact, *torch.autograd.grad(exact, wide, dy.double())), strict=True):
        assert reference.error(got, want) <= 2**-10 * want.abs().max().item()


def test_what_lies_in_memory_beside_the_channels_is_not_read() -> None:
    whole = torch.full((2, 40, 4, 4), float("nan"), dtype=torch.float16).contiguous(memory_format=CHANNELS_LAST)
    x = whole[:, 8:25].copy_(torch.randn(2, 17, 4, 4))
    w = torch.randn(16, 17, 3, 3).half().mul_(0.1)
    exact = F.conv2d(x.double(), w.double(), padding=1)
    assert reference.error(tk.conv2d(x, w, padding=1), exact) <= 1e-3 * exact.abs().max().item()


@pytest.mark.parametrize(
    ("changes", "pass_", "dtype", "precision", "gpu"),
    [
        pytest.param({"H": 2, "W": 2}, "fprop", torch.float32, "tf32", A100, id="4-byte copies come ahead"),
        pytest.param({}, "fprop", torch.float32, "ieee", H100, id="fp32 at its own precision"),
        pytest.param({"C": 256}, "fprop", torch.float32, "bf16x6", H100, id="parts that need no copy"),
        pytest.param({}, "wgrad", torch.float64, "ieee", H100, id="fp64"),
        pytest.param({"C": 256, "K": 255}, "fprop", torch.float16, "ieee", H100, id="filters alone are odd"),
        pytest.param({"C": 15}, "fprop", torch.float16, "ieee", H100, id="few channels"),
        pytest.param({"C": 255, "K": 255, "groups": 3}, "fprop", torch.float16, "ieee", H100, id="grouped"),
        pytest.param(
            {"N": 1, "H": 3, "W": 3, "C": 17, "K": 17, "padding": ((0, 0), (0, 0)), "R": 1, "S": 1},
            "fprop",
            torch.float16,
            "ieee",
            H100,
            id="small",
        ),
    ],
)
def test_where_pointers_stay(changes: dict[str, int], pass_: str, dtype: Any, precision: str, gpu: Any) -> None:
    sizes = {"N": 64, "C": 255, "H": 28, "W": 28, "K": 256, "R": 3, "S": 3, "padding": ((1, 1), (1, 1))}
    problem = Conv2dProblem(**(sizes | changes))  # type: ignore[arg-type]
    assert not padded.applies(problem, pass_, dtype, precision, gpu)


def problem_of(channels: int, filters: int) -> Conv2dProblem:
    return Conv2dProblem(64, channels, 28, 28, filters, 3, 3, padding=((1, 1), (1, 1)))


@pytest.mark.parametrize("gpu", [H100, A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(
    ("channels", "filters", "copies"),
    [(255, 255, (2, 2, 3)), (256, 255, (0, 2, 2)), (255, 256, (2, 1, 2))],
    ids=["both odd", "filters odd", "channels odd"],
)
def test_only_odd_operands_and_filters_are_copied(
    channels: int, filters: int, copies: tuple[int, ...], gpu: hardware.GPU
) -> None:
    problem = problem_of(channels, filters)
    x, w, y = (
        torch.empty(shape, dtype=torch.float16, device="meta", memory_format=CHANNELS_LAST)
        for shape in (problem.x_shape, problem.w_shape, problem.y_shape)
    )
    passes = [
        conv.plan_fprop(problem, x, w, None, y, gpu=gpu),
        conv.plan_dgrad(problem, y, w, x, gpu=gpu),
        conv.plan_wgrad(problem, y, x, w, gpu=gpu),
    ]
    for launches, count in zip(passes, copies, strict=True):
        names = kernels_of(launches)
        assert names.count("widen") == count
        assert any("box" in name for name in names) == gpu.has_descriptors
    with tiles.override(formulation="gather"):
        assert kernels_of(conv.plan_fprop(problem_of(255, 256), x, w, None, y, gpu=gpu)) == ["fprop_gather"]


def test_the_choice_for_all_batches_does_not_ask_for_the_batch() -> None:
    answers = {
        padded.applies(Conv2dProblem(n, 63, 7, 7, 64, 3, 3), "fprop", torch.float16, "ieee", H100, batch_invariant=True)
        for n in (1, 8, 512)
    }
    assert len(answers) == 1
