"""First layers read in runs: which images lie right for it, forward and filter gradient against float64, and tiles."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tileconv.kernels as tk
from tileconv.bench import inspect, predictions
from tileconv.bench.cases import Case, launches
from tileconv.kernels import cost, hardware, run_tiles, tiles, watch
from tileconv.kernels.conv_tile import ConvTile
from tileconv.kernels.geometry import Conv2dProblem, Runs
from tileconv.kernels.launch import conv, plans, runs

BEFORE_3_7 = hardware.triton_version() < (3, 7)
# name: x, w, arguments of conv2d
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "11x11 s4": ((2, 3, 31, 32), (20, 3, 11, 11), {"stride": 4, "padding": 2}),
    "7x7 s2": ((2, 3, 14, 18), (70, 3, 7, 7), {"stride": 2, "padding": 3}),
    "rows strided by three and dilated": ((1, 1, 20, 24), (8, 1, 5, 5), {"stride": (3, 2), "dilation": (2, 1)}),
    "stride wider than the filter": ((2, 4, 9, 16), (16, 4, 3, 3), {"stride": (1, 8), "padding": 1}),
    "11x11 s4, channels last": ((2, 3, 19, 20), (18, 3, 11, 11), {"stride": 4, "padding": (1, 3)}),
    "7x7 s2, channels last": ((1, 3, 14, 18), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "rows at any address": ((2, 3, 17, 23), (12, 3, 5, 5), {"stride": 4, "padding": 1}),
    "rows at any address, channels last": ((2, 3, 15, 17), (16, 3, 7, 7), {"stride": 2, "padding": (0, 3)}),
    "no padding": ((5, 3, 16, 23), (96, 3, 11, 11), {"stride": 4}),
    "no padding, channels last": ((6, 3, 15, 19), (90, 3, 7, 7), {"stride": 4}),
    "no padding, rows dilated": ((3, 2, 12, 25), (9, 2, 3, 5), {"stride": 2, "dilation": (2, 1)}),
    "no padding, one image": ((1, 3, 15, 15), (8, 3, 11, 11), {"stride": 4}),
    "one column of filters": ((3, 2, 8, 10), (17, 2, 2, 1), {"stride": 2}),
    "more output columns than a step of wgrad": ((1, 1, 3, 4200), (4, 1, 3, 3), {"stride": 2, "padding": 1}),
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which passes were planned in runs; nothing is kept, so that every call plans."""
    monkeypatch.setattr(plans, "_plan", lambda *_: None)
    found: list[str] = []
    for name in ("plan_fprop", "plan_wgrad"):
        real = getattr(runs, name)

        def spy(*a: Any, name: str = name, real: Any = real, **k: Any) -> Any:
            found.append(name)
            return real(*a, **k)

        monkeypatch.setattr(runs, name, spy)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients(name, dtype, planned, assert_within_budget):
    x_shape, w_shape, arguments = LAYERS[name]
    x, w, b = torch.randn(x_shape), torch.randn(w_shape) / w_shape[2], torch.randn(w_shape[0])
    layout = torch.channels_last if "7x7" in name else torch.contiguous_format
    x, w, b = x.to(dtype), w.to(dtype).contiguous(memory_format=layout), b.to(dtype)
    if "channels last" in name:
        x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, w, b, **arguments)
    dy = torch.randn_like(y)

    def run(conv, kind):
        leaves = [t.detach().clone().to(kind).requires_grad_() for t in (w, b)]
        y = conv(x.to(kind), *leaves, **arguments)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind))]

    for ours, theirs, exact in zip(
        run(tk.conv2d, dtype), run(F.conv2d, dtype), run(F.conv2d, torch.float64), strict=True
    ):
        assert_within_budget(ours, theirs, exact)
    assert planned == ["plan_fprop", "plan_wgrad"]


@pytest.mark.parametrize("name", LAYERS)
def test_tf32(name, planned):
    x_shape, w_shape, arguments = LAYERS[name]
    memory = torch.channels_last if "channels last" in name else torch.contiguous_format
    x = torch.randn(x_shape).contiguous(memory_format=memory)
    w = torch.randn(w_shape) / w_shape[2]
    dy = torch.randn_like(F.conv2d(x, w, **arguments))

    def run(conv, *operands):
        x, w, dy = operands
        w = w.detach().requires_grad_()
        y = conv(x, w, **arguments)
        return y.detach(), *torch.autograd.grad(y, w, dy)

    exact = run(F.conv2d, *(t.double() for t in (x, w, dy)))
    magnitudes = run(F.conv2d, *(t.double().abs() for t in (x, w, dy)))
    found = run(functools.partial(tk.conv2d, precision="tf32"), x, w, dy)
    assert planned == ["plan_fprop", "plan_wgrad"]
    for ours, theirs, magnitude in zip(found, exact, magnitudes, strict=True):
        # One rounding of each operand to eleven bits.
        assert ((ours - theirs).abs() <= 2**-10 * magnitude).all()
    run(functools.partial(tk.conv2d, precision="ieee"), x, w, dy)
    assert planned == ["plan_fprop", "plan_wgrad"], "fp32 at its own precision does not need tensor cores' operands"


def test_a_view_of_a_wider_image(planned, assert_within_budget):
    wide, w = torch.randn(2, 3, 16, 40).half(), (torch.randn(8, 3, 5, 5) / 5).half()
    for x in (wide[..., 4:36], wide[..., 8:40], wide[:, :, ::2, :33]):
        ours, theirs = tk.conv2d(x, w, stride=4), F.conv2d(x, w, stride=4)
        assert_within_budget(ours, theirs, F.conv2d(x.double(), w.double(), stride=4))
    assert planned == ["plan_fprop"] * 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("size", "batch", "padding", "batch_invariant", "kernels"),
    [
        pytest.param(224, 128, 2, False, ["fprop_runs"], id="aligned"),
        pytest.param(227, 128, 2, False, ["widen", "fprop_runs"], id="padded: what is beside a row would count"),
        pytest.param(227, 128, 0, False, ["fprop_inner_runs"], id="rows anywhere"),
        pytest.param(225, 6, 0, False, ["fprop_inner_runs"], id="more images of one class"),
        pytest.param(227, 7, 0, False, ["widen", "fprop_inner_runs"], id="a last load would pass the end"),
        pytest.param(227, 128, 0, True, ["widen", "fprop_inner_runs"], id="batch invariant"),
        pytest.param(224, 128, 0, True, ["fprop_inner_runs"], id="aligned, batch invariant"),
    ],
)
def test_which_images_are_copied(size, batch, padding, batch_invariant, kernels, layout):
    w = torch.empty(64, 3, 11, 11, dtype=torch.float16, device="meta")
    problem = Conv2dProblem(batch, 3, size, size, 64, 11, 11, (4, 4), ((padding,) * 2,) * 2)
    x = torch.empty(problem.x_shape, dtype=torch.float16, device="meta", memory_format=layout)
    y = torch.empty(problem.y_shape, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    planned = conv.plan_fprop(problem, x, w, None, y, gpu=hardware.GPUS["H100"], batch_invariant=batch_invariant)
    names = [launch.kernel.__name__ for launch in planned]
    assert names == [*kernels[:-1], "filters_to_runs", kernels[-1]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(("width", "padding"), [(23, 0), (24, 2)], ids=["no padding", "padding"])
def test_nan_and_infinity_stay_in_the_windows_that_hold_them(width, padding, layout, planned):
    x, w = torch.randn(4, 3, 15, width).half(), (torch.randn(70, 3, 7, 7) / 7).half()
    clean = tk.conv2d(x.contiguous(memory_format=layout), w, stride=4, padding=padding)
    x[0, 0, 4, 0], x[1, 2, 14, 22], x[2, 1, 7, 11] = float("nan"), float("inf"), float("-inf")
    x[3, :, :, -1] = float("nan")  # the column after it, in memory, begins the next row
    got = tk.conv2d(x.contiguous(memory_format=layout), w, stride=4, padding=padding)
    assert planned == ["plan_fprop"] * 2
    want = F.conv2d(x.double(), w.double(), stride=4, padding=padding)
    assert want.isnan().any() and want.isinf().any() and want.isfinite().any()
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    plain = want.isfinite()
    for y in (clean, got):  # a window beside one that holds them is made once more, its sum in another order
        assert (y[plain] - want[plain]).abs().max() <= 2**-9 * want[plain].max()


@pytest.mark.parametrize("turned", [True, False], ids=["rows are pixels", "rows are filters"])
@pytest.mark.parametrize(("filters", "width", "padding"), [(96, 21, 0), (70, 20, 2), (200, 22, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_blocks_of_64_and_32_filters(filters, width, padding, turned, layout, monkeypatch):
    problem = Conv2dProblem(2, 3, 15, width, filters, 5, 5, (4, 4), ((padding,) * 2,) * 2)
    x, w, bias = torch.randn(problem.x_shape).half(), torch.randn(problem.w_shape).half(), torch.randn(filters).half()
    y = torch.full(problem.y_shape, float("nan"), dtype=torch.float16).contiguous(memory_format=layout)
    monkeypatch.setattr(run_tiles, "choose_runs", lambda *_, **__: ConvTile("runs", (16, 1, 1), 64, 32, block_k2=32))
    monkeypatch.setattr(run_tiles, "turned", lambda *_: turned)
    launches = conv.plan_fprop(problem, x, w, bias, y, gpu=hardware.INTERPRETER, activation="relu")
    assert launches[-1].kernel.__name__.endswith("_runs") and launches[-1].grid[0] % -(-filters // 96) == 0
    for launch in launches:
        launch.run()
    want = F.conv2d(x.double(), w.double(), bias.double(), stride=4, padding=padding).relu()
    assert (y - want).abs().max() <= 2**-10 * want.max()


def test_only_blocks_that_waste_fewer_filters_have_a_second_product():
    for arch, dtype in (("H100", torch.float16), ("H100", torch.float32), ("A100", torch.float16)):
        precision = "tf32" if dtype == torch.float32 else "ieee"
        chosen = {}
        for filters in (32, 64, 65, 70, 96, 97, 128, 160, 192):
            problem = Conv2dProblem(128, 3, 224, 224, filters, 11, 11, (4, 4))
            chosen[filters] = run_tiles.choose_runs(problem, "fprop", dtype, precision, hardware.GPUS[arch])
        assert {filters for filters, tile in chosen.items() if tile.block_k2} == {65, 70, 96}, (arch, dtype)
        assert all(tile.rows == 96 for tile in chosen.values() if tile.block_k2)


def test_what_lies_around_an_image_is_never_used():
    for layout in (torch.contiguous_format, torch.channels_last):
        w, dy = (torch.randn(8, 3, 7, 7) / 7).half(), torch.randn(2, 8, 3, 5).half()
        inner = torch.randn(2, 3, 15, 23).half().contiguous(memory_format=layout)
        memory = torch.full((inner.numel() + 64,), float("nan"), dtype=torch.float16)
        x = memory[32:].as_strided(inner.shape, inner.stride()).copy_(inner)
        for image in (x, inner):
            w.requires_grad_()
            y = tk.conv2d(image, w, stride=4)
            found = y.detach(), *torch.autograd.grad(y, w, dy)
            if image is x:
                amid = found
        assert all(map(torch.equal, amid, found)) and found[1].isfinite().all()


@pytest.mark.parametrize("batch", [2, 3])
def test_fewer_images_than_classes_are_read_and_no_more(batch, planned, assert_within_budget):
    wide = torch.randn(batch, 3, 17, 17).half().contiguous(memory_format=torch.channels_last)
    view = wide[:, :, :16, : 18 - batch]
    last = sum((extent - 1) * stride for extent, stride in zip(view.shape, view.stride(), strict=True))
    x = torch.randn(last + 1).half().as_strided(view.shape, view.stride())  # memory that ends with the last image
    w = (torch.randn(8, 3, 11, 11) / 11).half().requires_grad_()
    problem = Conv2dProblem(*x.shape, *w.shape[:1], 11, 11, (4, 4)).interleaved
    found = problem.inner_runs(2, "fprop", (x.stride(0), x.stride(0), x.stride(2)))
    assert found is not None and found.align == 4 and x.stride(0) % 2, "four classes"
    exact_w, plain_w = w.detach().double().requires_grad_(), w.detach().clone().requires_grad_()
    with watch.bounds_check():
        y = tk.conv2d(x, w, stride=4)
        y.sum().backward()
    exact, plain = F.conv2d(x.double(), exact_w, stride=4), F.conv2d(x, plain_w, stride=4)
    exact.sum().backward()
    plain.sum().backward()
    assert_within_budget(y, plain, exact)
    assert_within_budget(w.grad, plain_w.grad, exact_w.grad)
    assert planned == ["plan_fprop", "plan_wgrad"]


@pytest.mark.parametrize(
    ("x", "stride"),
    [
        pytest.param(torch.zeros(2, 3, 16, 32), 4, id="fp32 without tensor cores"),
        pytest.param(torch.zeros(2, 5, 16, 32, dtype=torch.float16), 4, id="many channels"),
        pytest.param(torch.zeros(2, 3, 16, 32, dtype=torch.float16), 3, id="loads of two bytes"),
        pytest.param(torch.zeros(2, 3, 16, 32, dtype=torch.float16), 1, id="no stride"),
    ],
)
def test_layers_that_go_another_way(x, stride, planned):
    w = torch.randn(4, x.shape[1], 5, 5, dtype=x.dtype)
    assert torch.equal(tk.conv2d(x, w, stride=stride), F.conv2d(x, w, stride=stride))
    assert planned == []


def test_the_runs_of_a_problem():
    problem = Conv2dProblem(128, 3, 224, 224, 64, 11, 11, (4, 4), ((2, 2), (2, 2)))
    whole = Runs(length=16, lead=2, align=4)
    assert problem.runs(2, "fprop") == whole, "from 4 q - 4, two pixels before the filter: 13 pixels"
    assert (problem.runs(4, "fprop"), problem.runs(4, "wgrad")) == (Runs(16, 0, 2), Runs(11, 0, 1))
    resnet = Conv2dProblem(128, 3, 224, 224, 64, 7, 7, (2, 2), ((3, 3), (3, 3)))
    assert resnet.runs(2, "wgrad") == Runs(8, 1, 2)
    flat = resnet.interleaved
    assert (flat.C, flat.W, flat.S, flat.P, flat.Q, flat.flops) == (1, 672, 21, 112, 112, resnet.flops)
    assert flat.runs(2, "wgrad") == Runs(32, 1, 2)
    assert Conv2dProblem(1, 3, 9, 9, 4, 3, 3, (1, 1)).runs(2, "fprop") is None, "two bytes are no asynchronous load"
    assert Conv2dProblem(1, 3, 9, 9, 4, 3, 3, (1, 1)).runs(4, "fprop") == Runs(4, 0, 1)


def test_the_inner_runs_of_a_problem():
    problem = Conv2dProblem(128, 3, 227, 227, 96, 11, 11, (4, 4))
    pitches = (3 * 227 * 227, 227 * 227, 227)
    assert problem.inner_runs(2, "fprop", pitches) == Runs(12, 0, 2, True, 2), (
        "13 elements from multiples of 4 would take 16"
    )
    assert problem.interleaved.inner_runs(2, "fprop", (3 * 227 * 227, 0, 681)) == Runs(36, 0, 4, True, 4), (
        "33, and up to 3 before them"
    )
    pitches_of_aligned = (3 * 227 * 228, 227 * 228, 228)
    assert replace(problem, W=228).inner_runs(2, "fprop", pitches_of_aligned) == Runs(12, 0, 4, True, 1)
    assert problem.inner_runs(2, "fprop", pitches_of_aligned) is None, "a last load would pass the end of such a view"
    assert replace(problem, padding=((0, 0), (1, 0))).inner_runs(2, "fprop", pitches) is None
    assert replace(problem, W=226, padding=((0, 0), (0, 1))).inner_runs(2, "fprop", pitches) is None, (
        "one column is padding"
    )
    assert replace(problem, N=127).inner_runs(2, "fprop", pitches) is None, "an odd number of elements"
    assert replace(problem, stride=(1, 4)).inner_runs(2, "fprop", pitches) is None, (
        "a run moves from row to row of outputs"
    )


@pytest.mark.parametrize("arch", ["H100", "A100", "RTX 4090"])
@pytest.mark.parametrize("batch", [1, 8, 32, 128])
def test_small_batches_fill_half_of_the_sms(arch, batch):
    gpu = hardware.GPUS[arch]
    problem = Conv2dProblem(batch, 3, 224, 224, 64, 11, 11, (4, 4), ((2, 2), (2, 2)))
    for pass_ in ("fprop", "wgrad"):
        tile = run_tiles.choose_runs(problem, pass_, torch.float16, "ieee", gpu)
        predicted = cost.predict(problem, pass_, tile, torch.float16, "ieee", gpu)
        assert predicted.ctas >= gpu.sms / 2, tile
        assert predicted.modelled_us >= predicted.floor_us


def test_runs_are_modelled_faster_than_a_rewritten_image():
    gpu = hardware.GPUS["H100"]
    problem = Conv2dProblem(128, 3, 224, 224, 64, 11, 11, (4, 4), ((2, 2), (2, 2)))
    for pass_ in ("fprop", "wgrad"):
        tile = run_tiles.choose_runs(problem, pass_, torch.float16, "ieee", gpu)
        blocks = problem.space_to_depth
        rewritten = tiles.choose(blocks, pass_, torch.float16, "ieee", gpu)
        times = [cost.predict(p, pass_, t, torch.float16, "ieee", gpu).modelled_us
                 for p, t in ((problem, tile), (blocks, rewritten))]  # fmt: skip
        moved = 2 * (math.prod(problem.x_shape) + math.prod(blocks.x_shape))
        assert times[0] < times[1] + cost.streaming_us(moved, gpu)


@pytest.mark.parametrize(("pass_", "limit"), [("fprop", 1.8), ("wgrad", 2.5)])
def test_rows_that_start_anywhere_are_modelled_without_a_copy(pass_, limit):
    case, gpu = Case("alexnet-2012", "conv1", pass_, 128, "fp16"), hardware.GPUS["H100"]
    rows = predictions.predictions(case, launches(case, gpu), gpu)
    times, floor = [row["modelled_us"] for row in rows], rows[0]["floor_us"]
    assert sum(times) <= limit * floor
    image = 2 * 128 * 3 * 227 * 227
    assert sum(times) + cost.streaming_us(2 * image, gpu) > limit * floor, "the limit leaves no room for a copy"


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "suites"), [("sm_80", ["alexnet"]), ("sm_90", ["alexnet", "alexnet-2012"])])
def test_compiled(arch, suites):
    chosen = (("fprop", "fp16"), ("wgrad", "fp16"), ("wgrad", "tf32"))
    cases = [Case(suite, "conv1", pass_, 128, dtype) for suite in suites for pass_, dtype in chosen]
    rows = [row for row in inspect.inspect_all(cases, [arch]) if row["kernel"].endswith("_runs")]
    main = [row for row in rows if row["role"] == "main"]
    expected = ["fprop_runs", "wgrad_runs", "wgrad_runs", "fprop_inner_runs", "wgrad_inner_runs", "wgrad_runs"]
    assert [row["kernel"] for row in main] == expected[: 3 * len(suites)]
    for row in main:
        assert row["failure"] is None and row["stack_bytes"] == row["spills"] == 0 and row["fits"]
        assert not row["serialised"]
        loads = row["loop_loads"]
        if row["dtype"] == "tf32":
            assert row["mma"] == "HMMA.1688.F32.TF32"
            # Triton 3.6 gets tiles of two warps, whose gradients come by ldmatrix.
            assert loads.keys() - ({"LDSM.128"} if BEFORE_3_7 else set()) == {"LDGSTS.128", "LDGSTS.32", "LDS.32"}
            assert loads.get("LDSM.128", 0) <= row["loop_mma"] / 8
            assert loads["LDS.32"] <= 1.1 * row["loop_mma"], "a warp makes 64 x 64"
            continue
        if row["kernel"] == "fprop_inner_runs":
            assert row["mma"] == "HGMMA.64x128x16.F32 + HGMMA.64x32x16.F32" and row["ctas_per_sm"] == 3
        pixels, count = ("LDGSTS.32", (16, 32)) if "inner" in row["kernel"] else ("LDGSTS.64", (8, 16))
        assert loads[pixels] in count and not row["register_operand"]
        assert not {"LDG.16", "LDG.32", "LDGSTS.32"} & (loads.keys() - {pixels})


# A launch makes constants of integers equal to one, which the interpreter does not.
ONE_ROW = """
import torch
from tileconv.bench.inspect import compile_launch
from tileconv.kernels import hardware
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv

gpu = hardware.GPUS["H100"]
problem = Conv2dProblem(8, 3, 1, 64, 16, 1, 7, (1, 4), ((0, 0), (2, 2)))
for dtype, precision in ((torch.float16, "ieee"), (torch.float32, "tf32")):
    x, w, y = (torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
               for shape in (problem.x_shape, problem.w_shape, problem.y_shape))
    planned = conv.plan_fprop(problem, x.contiguous(), w, None, y, gpu=gpu, precision=precision)
    planned += conv.plan_wgrad(problem, y, x.contiguous(), w, gpu=gpu, precision=precision)
    main = [launch for launch in planned if launch.kernel.__name__ in ("fprop_runs", "wgrad_runs")]
    assert len(main) == 2
    for launch in main:
        compile_launch(launch, "sm_90")
"""


def test_images_of_one_row_compile():
    environment = os.environ | inspect.COMPILING
    ran = subprocess.run([sys.executable, "-c", ONE_ROW], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("suite", "kernel"), [("alexnet", "fprop_runs"), ("alexnet-2012", "fprop_inner_runs")])
def test_no_launch_rewrites_the_image(suite, kernel):
    planned = launches(Case(suite, "conv1", "fprop", 128, "fp16"), hardware.GPUS["H100"])
    assert [launch.kernel.__name__ for launch in planned] == ["filters_to_runs", kernel]
