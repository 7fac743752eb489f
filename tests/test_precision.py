"""fp32 on tensor cores: products of bf16 parts, held to float64 and to the error of strict fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.bench import cases, inspect
from tileconv.bench.predictions import predictions
from tileconv.bench.traffic import traffic
from tileconv.kernels import conv_tile, fp32, hardware, reference, tiles, watch
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv as launch_conv
from tileconv.kernels.launch.split import plan_split

CHANNELS_LAST = torch.channels_last
PARTS = ("bf16x3", "bf16x6")
LEFT_OUT = {"bf16x3": 2.0**-15, "bf16x6": 2.0**-24}  # of |x w|, as kernels/fp32.py says
INF, NAN = float("inf"), float("nan")
H100 = hardware.GPUS["H100"]


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    arguments: dict[str, Any] = field(default_factory=dict)
    formulations: tuple[str, ...] = conv_tile.FORMULATIONS
    memory_format: Any = CHANNELS_LAST


CASES = [
    Case("3x3", (3, 40, 3, 4), (24, 40, 3, 3), {"padding": 1}),
    Case("contiguous", (2, 16, 4, 5), (16, 16, 2, 3), {}, ("box",), torch.contiguous_format),
    Case("strided, dilated, grouped", (2, 32, 7, 6), (16, 16, 3, 2), {"stride": 2, "dilation": (1, 2), "groups": 2},
         ("pixel", "gather")),
    Case("grouped by odd channels", (2, 15, 5, 5), (9, 5, 3, 3), {"padding": 1, "groups": 3}, ("gather",)),
    Case("first layer", (2, 3, 15, 13), (16, 3, 7, 7), {"stride": 4, "padding": 2}, ("box",), torch.contiguous_format),
]  # fmt: skip
RUNS = [pytest.param(case, formulation, id=f"{case.name}-{formulation}")
        for case in CASES for formulation in case.formulations]  # fmt: skip


def run(conv: Callable[..., Tensor], x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and both gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    y = conv(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def ours(precision: str, **arguments: Any) -> Callable[..., Tensor]:
    return lambda x, w: tk.conv2d(x, w, **arguments, precision=precision)


@pytest.mark.parametrize(("case", "formulation"), RUNS)
def test_errors_against_float64_are_those_of_fp32(case: Case, formulation: str) -> None:
    x = torch.randn(case.x).contiguous(memory_format=case.memory_format)
    w = (torch.randn(case.w) / case.w[1] ** 0.5).contiguous(memory_format=case.memory_format)
    dy = torch.randn(F.conv2d(x, w, **case.arguments).shape).contiguous(memory_format=case.memory_format)

    def all_three(precision: str) -> list[Tensor]:
        with tiles.override(formulation=formulation):
            y = tk.conv2d(x, w, **case.arguments, precision=precision)
        # The input's gradient of a first layer has few columns: no descriptor reaches those.
        with tiles.override(formulation=formulation if case.x[1] > 4 else "gather"):
            dx = run(ours(precision, **case.arguments), x, w, dy)[1]
        with tiles.override(formulation=formulation):
            leaf = w.detach().requires_grad_()
            dw = torch.autograd.grad(tk.conv2d(x, leaf, **case.arguments, precision=precision), leaf, dy)[0]
        return [y, dx, dw]

    exact = run(lambda *t: F.conv2d(*t, **case.arguments), x.double(), w.double(), dy)
    magnitudes = run(lambda *t: F.conv2d(*t, **case.arguments), x.double().abs(), w.double().abs(), dy.abs())
    strict, six, three = all_three("ieee"), all_three("bf16x6"), all_three("bf16x3")
    for name, want, most, fp32s, got, less in zip(
        ("y", "dx", "dw"), exact, magnitudes, strict, six, three, strict=True
    ):
        error, allowed = reference.error(got, want), reference.allowed_error(want, fp32s)
        assert error <= allowed, f"{name}: error {error:.3g} is over the allowed {allowed:.3g}"
        room = 2 * torch.finfo(torch.float32).eps * want.abs().max()
        assert ((less - want).abs() <= LEFT_OUT["bf16x3"] * most + room).all(), name
        assert reference.error(less, want) > 4 * error, f"{name}: three products are as good as six"


TILES = {
    "a second product": {"block_k": 32, "block_k2": 16},
    "depth in three": {"block_k": 32, "splits": 3},
    "a second product, the last tiles shared": {"block_k": 32, "block_k2": 16, "splits": 2, "tail": 2},
    "half a box more": {"block_k": 32, "block_k2": 16, "half": True},
}


@pytest.mark.parametrize("precision", PARTS)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_every_kind_of_tile_goes_through_all_products(tile: dict[str, Any], precision: str) -> None:
    x, w = torch.randn(3, 48, 5, 4), torch.randn(80, 24, 3, 3) / 8
    x = x.contiguous(memory_format=CHANNELS_LAST)
    want = reference.conv2d(x, w, None, 1, 1, 1, 2)
    most = reference.conv2d(x.abs(), w.abs(), None, 1, 1, 1, 2)
    with tiles.override(**({"formulation": "box", "box": (2, 4, 2), "block_c": 16} | tile)):
        y = tk.conv2d(x, w, padding=1, groups=2, precision=precision)
        dx = torch.ops.tileconv.conv2d_dgrad(y, w, x.shape, (1, 1), (1,) * 4, (1, 1), 2, precision, True)
    assert ((y - want).abs() <= LEFT_OUT[precision] * most + 1e-6).all()
    want = reference.conv2d_dgrad(y, w, x.shape, 1, 1, 1, 2)
    assert reference.error(dx, want) <= (1e-4 if precision == "bf16x3" else 1e-5)


@pytest.mark.parametrize("precision", PARTS)
@pytest.mark.parametrize("splits", [1, 2])
def test_several_columns_of_a_gradient_go_through_all_products(splits: int, precision: str) -> None:
    w, dy = torch.randn(80, 24, 3, 3) / 8, torch.randn(3, 80, 5, 7).contiguous(memory_format=CHANNELS_LAST)
    want = reference.conv2d_dgrad(dy, w, (3, 48, 5, 7), 1, 1, 1, 2)
    tile = {"formulation": "box", "box": (4, 4, 1), "block_k": 64, "block_c": 16, "columns": 2, "splits": splits}
    with tiles.override(**tile):
        dx = torch.ops.tileconv.conv2d_dgrad(dy, w, (3, 48, 5, 7), (1, 1), (1,) * 4, (1, 1), 2, precision, True)
    assert reference.error(dx, want) <= (1e-4 if precision == "bf16x3" else 1e-5)


@pytest.mark.parametrize("precision", PARTS)
def test_tiles_that_share_their_filters_multiply_no_parts(precision: str) -> None:
    x, w = torch.randn(3, 24, 5, 4).contiguous(memory_format=CHANNELS_LAST), torch.randn(80, 24, 3, 3)
    tile = {"formulation": "box", "box": (2, 4, 2), "block_k": 32, "block_k2": 16, "block_c": 16, "tail": 2}
    with (
        tiles.override(**tile),
        pytest.raises(ValueError, match=f"tail=2 with splits=1 multiplies no parts, and precision='{precision}'"),
    ):
        tk.conv2d(x, w, padding=1, precision=precision)


@pytest.mark.parametrize(
    "tile",
    [{"splits": 3, "taps": 5, "last": 2}, {"taps": 4, "block_k2": 16}, {"block_c": 32, "half": True, "block_k2": 16}],
    ids=str,
)
@pytest.mark.parametrize("box", [(16, 1, 1), (2, 4, 2)], ids=["pixel", "box"])
def test_filter_gradients_go_through_all_products(box: tuple[int, int, int], tile: dict[str, Any]) -> None:
    x, dy = (torch.randn(3, c, 4, 3).contiguous(memory_format=CHANNELS_LAST) for c in (40, 56))
    formulation = "pixel" if box == (16, 1, 1) else "box"
    with tiles.override(**({"formulation": formulation, "box": box, "block_k": 32, "block_c": 16} | tile)):
        dw = torch.ops.tileconv.conv2d_wgrad(dy, x, (56, 40, 2, 3), (1, 1), (1, 0, 1, 1), (1, 1), 1, "bf16x6")
    want = reference.conv2d_wgrad(x, dy, (56, 40, 2, 3), 1, ((1, 0), (1, 1)))
    assert reference.error(dw, want) <= 1e-6 * want.abs().max().item()


@pytest.mark.parametrize("formulation", ["box", "gather"])
def test_a_large_dynamic_range(formulation: str) -> None:
    scale = lambda *shape: 2.0 ** torch.randint(-40, 40, shape)  # noqa: E731
    x, w = torch.randn(2, 16, 4, 4) * scale(2, 16, 4, 4), torch.randn(16, 16, 3, 3) * scale(16, 16, 3, 3)
    want, most = reference.conv2d(x, w, None, 1, 1), reference.conv2d(x.abs(), w.abs(), None, 1, 1)
    with tiles.override(formulation=formulation):
        strict, six = (tk.conv2d(x, w, padding=1, precision=p) for p in ("ieee", "bf16x6"))
    theirs, error = (((y - want).abs() / most).max().item() for y in (strict, six))
    assert error <= 2 * (theirs + torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("precision", PARTS)
@pytest.mark.parametrize("formulation", ["box", "gather"])
def test_infinities_and_nan_are_those_of_fp32(formulation: str, precision: str) -> None:
    # Filters that one bf16 part holds whole leave further parts of zero, which an infinity turns into NaN.
    x, w = torch.randn(6, 16, 3, 3), torch.randn(16, 16, 3, 3).bfloat16().float()
    x[0, 3, 1, 1], x[1, 3, 1, 1], x[2, 0, 0, 0], x[3, 2, 2, 0] = INF, -INF, NAN, torch.finfo(torch.float32).max
    x[4, 0, 1, 1], x[4, 1, 1, 1], w[5, 2, 0, 0] = INF, -INF, 0
    w *= 0.01
    dy = torch.randn(6, 16, 3, 3)
    dy[5, 1, 1, 1] = INF
    with tiles.override(formulation=formulation):
        strict = run(ours("ieee", padding=1), x, w, dy)
        got = run(ours(precision, padding=1), x, w, dy)
    for name, want, result in zip(("y", "dx", "dw"), strict, got, strict=True):
        special = ~want.isfinite()
        assert special.any() and not special.all(), name
        assert torch.equal(result.isnan(), want.isnan()), name
        assert torch.equal(result[special & ~want.isnan()], want[special & ~want.isnan()]), name
        torch.testing.assert_close(result[~special], want[~special], rtol=1e-4, atol=1e-4)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "NHWC": lambda t: t.contiguous(memory_format=CHANNELS_LAST),
    "NCHW": lambda t: t,
    "every other row": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "some channels": lambda t: torch.cat([t, t], 1).contiguous(memory_format=CHANNELS_LAST)[:, 1 : t.shape[1] + 1],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "one image expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(3, 24, 5, 7), (2, 1, 1, 9), (1, 5, 4, 1)], ids=str)
def test_parts_add_up_to_the_number(shape: tuple[int, int, int, int], view: str) -> None:
    x = VIEWS[view](torch.randn(shape) * 2.0 ** torch.randint(-100, 100, shape))
    for precision, most in (("bf16x6", 0.0), ("bf16x3", 2.0**-17)):
        y, launch = plan_split(x, precision, gpu=hardware.INTERPRETER)
        launch.run()
        parts = y.double().unflatten(1, (fp32.parts(precision), -1))
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=CHANNELS_LAST)
        assert ((parts.sum(1) - x).abs() <= most * x.abs()).all()


def test_parts_of_numbers_at_the_edges() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, -largest, 3.39e38, INF, -INF, NAN, 0.0, -0.0, 2.0**-110, 2.0**-149, 1e-40])
    y, launch = plan_split(x[None, :, None, None], "bf16x6", gpu=hardware.INTERPRETER)
    launch.run()
    parts = y.double().reshape(3, -1)
    assert torch.equal(parts[:, :3].sum(0), x[:3].double())
    assert parts[:, :3].isfinite().all()
    assert torch.equal(y.reshape(3, -1)[0, 3:5].float(), x[3:5]) and parts[0, 5].isnan()
    assert (parts[1:, 3:6] == 0).all()
    assert ((parts[:, 6:].sum(0) - x[6:]).abs() <= 2.0**-134).all()


OTHERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (tk.linear, F.linear, (3, 5, 37), (11, 37)),
    "conv1d": (tk.conv1d, F.conv1d, (2, 8, 13), (6, 8, 3)),
    "conv_transpose2d": (
        lambda *t, **p: tk.conv_transpose2d(*t, stride=2, padding=1, groups=2, **p),
        lambda *t: F.conv_transpose2d(*t, stride=2, padding=1, groups=2), (2, 8, 5, 4), (8, 4, 3, 2),
    ),
    "conv2d_im2col": (tk.conv2d_im2col, F.conv2d, (2, 8, 4, 4), (5, 8, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_layers_that_multiply(name: str) -> None:
    function, theirs, shape, filters = OTHERS[name]
    x, w = torch.randn(shape), torch.randn(filters)
    dy = torch.randn(theirs(x, w).shape)
    exact = run(theirs, x.double(), w.double(), dy)
    strict, six = (run(lambda *t, p=p: function(*t, precision=p), x, w, dy) for p in ("ieee", "bf16x6"))
    for want, fp32s, got in zip(exact, strict, six, strict=True):
        assert reference.error(got, want) <= reference.allowed_error(want, fp32s)


def test_bias_and_activation_stay_fused_and_second_derivatives_keep_the_precision() -> None:
    x, w, b = torch.randn(2, 16, 4, 3), torch.randn(8, 16, 3, 3), torch.randn(8)
    y = tk.conv2d(x, w, b, padding=1, activation="relu", precision="bf16x6")
    want = reference.conv2d(x, w, b, 1, 1, activation="relu")
    assert reference.error(y, want) <= 1e-6 * want.abs().max().item()

    def second(conv: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in operands]
        grads = torch.autograd.grad(conv(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    exact = second(lambda *t: F.conv2d(*t, padding=1), x.double(), w.double())
    for got, want in zip(second(ours("bf16x6", padding=1), x, w), exact, strict=True):
        assert reference.error(got, want) <= 4e-6 * want.abs().max().item()


def test_modules_take_the_names() -> None:
    x = torch.randn(2, 8, 4, 4)
    for layer, plain in ((tk.nn.Conv2d(8, 5, 3, precision="bf16x6"), F.conv2d),
                         (tk.nn.Linear(4, 5, precision="bf16x3"), F.linear)):  # fmt: skip
        exact = plain(x.double(), layer.weight.double(), layer.bias.double())
        assert reference.error(layer(x), exact) <= 1e-4
        assert repr(layer).endswith(f"precision={layer.precision!r})")


def test_depthwise_layers_are_computed_in_fp32_itself() -> None:
    x, w = torch.randn(2, 6, 5, 5), torch.randn(12, 1, 3, 3)
    strict, six = (tk.conv2d(x, w, padding=1, groups=6, precision=p) for p in ("ieee", "bf16x6"))
    assert torch.equal(six, strict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("precision", PARTS)
def test_only_fp32_is_split(precision: str, dtype: torch.dtype) -> None:
    x, w = torch.zeros(1, 8, 4, 4, dtype=dtype), torch.zeros(8, 8, 3, 3, dtype=dtype)
    calls = (tk.conv2d, tk.conv_transpose2d, lambda *t, **p: tk.linear(t[0], t[1][:, :4, 0, 0], **p))
    for call in calls:
        with pytest.raises(ValueError, match=f"precision is '{precision}': it splits torch.float32, .* {dtype}"):
            call(x, w, precision=precision)


def test_locally_connected_layers_have_no_parts() -> None:
    with pytest.raises(ValueError, match="precision is 'bf16x6': allowed are 'ieee', 'tf32'"):
        tk.locally_connected2d(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 2, 2, 3, 3), precision="bf16x6")


def cut_off(total: Tensor) -> Tensor:
    """float64 as fp32, rounded towards zero."""
    near = total.float()
    return torch.where(near.double().abs() > total.abs(), torch.nextafter(near, torch.zeros(())), near)


def test_sums_as_long_as_allowed_stay_within_twice_the_error_of_fp32() -> None:
    """Tensor cores cut a sum off after every 16 products; fp32's own instructions round it after each."""
    count, most = 1000, fp32.LONGEST_SUM
    for depth, runs in ((most, 1), (3 * most, 3), (3 * most, 1)):
        x, w = torch.randn(count, depth).relu(), torch.randn(count, depth) / depth**0.5
        exact = (x.double() * w.double()).sum(1)
        strict = torch.zeros(count)
        for k in range(depth):
            strict = (strict.double() + x[:, k].double() * w[:, k].double()).float()
        parts = []
        for t in (x, w):
            parts.append([t.bfloat16().double()])
            for _ in range(2):
                parts[-1].append((t.double() - sum(parts[-1])).bfloat16().double())
        total = torch.zeros(count)
        for some in torch.arange(depth).chunk(runs):
            mine = torch.zeros(count)
            for i, j in ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)):
                for at in some.split(16):
                    mine = cut_off(mine.double() + (parts[0][i][:, at] * parts[1][j][:, at]).sum(1))
            total += mine
        within = reference.error(total, exact) <= reference.allowed_error(exact, strict)
        assert within == (depth <= runs * most), f"{depth} products in {runs} sums"


ALEXNET = ("conv2", "conv3", "conv4", "conv5")
CONVOLUTIONS = [case for dtype in PARTS for case in cases.cases("alexnet", 128, [dtype], conv_tile.PASSES, ALEXNET)]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_modelled_faster_than_fp32s_units_at_their_peak(case: cases.Case) -> None:
    planned = cases.launches(case, H100)
    rows = predictions(case, planned, H100)
    assert sum(launch.kernel.__name__ == "split" for launch in planned) == 2
    ffma_us = 1e6 * cases.flops_of(case) / H100.peak(torch.float32, "ieee")
    assert sum(row["modelled_us"] for row in rows) <= (0.85 if case.dtype == "bf16x6" else 0.45) * ffma_us


@pytest.mark.parametrize("gpu", hardware.GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("pass_", conv_tile.PASSES)
def test_choices_are_valid_and_keep_sums_short(pass_: str, gpu: hardware.GPU) -> None:
    for channels, precision in ((256, "bf16x6"), (512, "bf16x6"), (512, "bf16x3")):
        problem = Conv2dProblem(64, channels, 13, 13, 384, 3, 3, padding=((1, 1), (1, 1)))
        tile = tiles.choose(problem, pass_, torch.float32, precision, gpu)
        assert conv_tile.why_invalid(tile, problem, pass_, torch.float32, precision, gpu) is None
        depth = 64 * 13 * 13 if pass_ == "wgrad" else 9 * channels
        if precision == "bf16x6" and tile.formulation != "gather":  # which adds to fp32 at every step
            assert depth / tile.splits <= fp32.LONGEST_SUM and not tile.tail


@pytest.mark.skipif(not hardware.interpreting(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize("formulation", conv_tile.FORMULATIONS)
def test_counted_bytes(formulation: str) -> None:
    problem = Conv2dProblem(2, 48, 3, 3, 32, 2, 3, padding=((1, 0), (1, 1)), groups=2)
    x, w, y = (torch.randn(s).contiguous(memory_format=CHANNELS_LAST)
               for s in (problem.x_shape, problem.w_shape, problem.y_shape))  # fmt: skip
    box = (1, 4, 4) if formulation == "box" else (16, 1, 1)
    with tiles.override(formulation=formulation, box=box, block_k=32, block_c=16):
        settings = {"gpu": hardware.INTERPRETER, "precision": "bf16x6"}
        planned = [
            *launch_conv.plan_fprop(problem, x, w, None, y, **settings),
            *launch_conv.plan_dgrad(problem, y, w, x, **settings),
            *launch_conv.plan_wgrad(problem, y, x, w, **settings),
        ]  # fmt: skip
    counted(planned)


@pytest.mark.parametrize("changes", [{}, {"taps": 5, "block_k2": 16, "splits": 2, "last": 1}], ids=str)
@pytest.mark.parametrize("arguments", [{"padding": (2, 1)}, {"stride": 2, "groups": 2}], ids=str)
def test_filter_gradients_of_tf32_read_images_last(arguments: dict[str, Any], changes: dict[str, Any]) -> None:
    # Small integers: every product and sum is exact in TF32 too.
    x = torch.randint(-8, 8, (4, 48, 5, 4)).float().contiguous(memory_format=CHANNELS_LAST)[:, 8:40]
    w = torch.randint(-8, 8, (48, 32 // arguments.get("groups", 1), 3, 2)).float().requires_grad_()
    dy = torch.randint(-8, 8, F.conv2d(x, w, **arguments).shape).float()
    tile = {"formulation": "pixel", "box": (16, 1, 1), "block_k": 32, "block_c": 16} | changes
    y = tk.conv2d(x, w, **arguments, precision="tf32")
    with tiles.override(**tile):
        (dw,) = torch.autograd.grad(y, w, dy)
    (want,) = torch.autograd.grad(F.conv2d(x, w, **arguments), w, dy)
    assert torch.equal(dw, want)


def test_images_are_turned_once_an_operand_and_only_in_batches_that_descriptors_address() -> None:
    for batch, turns in ((64, 2), (66, 0)):
        problem = Conv2dProblem(batch, 64, 13, 13, 64, 3, 3, padding=((1, 1), (1, 1)))
        x, w, y = (torch.empty(s, device="meta", memory_format=CHANNELS_LAST)
                   for s in (problem.x_shape, problem.w_shape, problem.y_shape))  # fmt: skip
        with tiles.override(formulation="pixel"):
            planned = launch_conv.plan_wgrad(problem, y, x, w, gpu=H100, precision="tf32")
            strict = launch_conv.plan_wgrad(problem, y, x, w, gpu=H100, precision="ieee")
        assert [launch.kernel.__name__ for launch in planned].count("turn") == turns
        assert "turn" not in [launch.kernel.__name__ for launch in strict]


def dgrad_of(gpu: hardware.GPU, precision: str, layer: Conv2dProblem) -> list[Any]:
    x, w, y = (torch.empty(s, device="meta", memory_format=CHANNELS_LAST)
               for s in (layer.x_shape, layer.w_shape, layer.y_shape))  # fmt: skip
    return launch_conv.plan_dgrad(layer, y, w, x, gpu=gpu, precision=precision)


@pytest.mark.parametrize(
    ("gpu", "precision", "turns", "warps"),
    [("H100", "tf32", (1, 0), 2), ("H100", "ieee", (0, 0), 4), ("RTX 5090", "tf32", (0, 0), 4)],
)
def test_filters_are_turned_for_warp_groups_and_where_the_copy_is_cheap(
    gpu: str, precision: str, turns: tuple[int, int], warps: int
) -> None:
    strided = Conv2dProblem(128, 64, 13, 13, 64, 3, 3, (2, 2), padding=((1, 1), (1, 1)))
    linear = Conv2dProblem(128, 9216, 1, 1, 4096, 1, 1)
    found = [dgrad_of(hardware.GPUS[gpu], precision, layer) for layer in (strided, linear)]
    assert tuple([launch.kernel.__name__ for launch in launches].count("turn") for launches in found) == turns
    assert found[1][0].num_warps == warps


@pytest.mark.skipif(not hardware.interpreting(), reason="counts in Triton's interpreter")
def test_counted_bytes_of_images_last() -> None:
    problem = Conv2dProblem(4, 24, 3, 3, 40, 3, 2, padding=((1, 1), (1, 0)))
    x, w, y = (torch.randn(s).contiguous(memory_format=CHANNELS_LAST)
               for s in (problem.x_shape, problem.w_shape, problem.y_shape))  # fmt: skip
    with tiles.override(formulation="pixel", box=(16, 1, 1), block_k=32, block_c=16, taps=3):
        counted(launch_conv.plan_wgrad(problem, y, x, w, gpu=hardware.INTERPRETER, precision="tf32"))


def counted(planned: list[Any]) -> None:
    """The traffic that is said of every launch is what the interpreter counts."""
    for launch in planned:
        with watch.count_bytes() as count:
            launch.run()
        found = traffic(launch)
        assert found.read == sum(b.requested for b in count.read.values()), launch.kernel.__name__
        assert found.written == sum(b.requested for b in count.written.values()), launch.kernel.__name__
        assert found.least == sum(b.unique for way in (count.read, count.written) for b in way.values())


@pytest.mark.slow
def test_loops_compile_without_spills_and_multiply_asynchronously() -> None:
    tf32 = cases.cases("alexnet", 128, ["tf32"], ["wgrad"], ALEXNET)
    rows = inspect.inspect_all([case for case in CONVOLUTIONS if case.layer in ("conv2", "conv5")] + tf32, ["sm_90"])
    for row in rows:
        name = f"{row['case']} {row['kernel']} {row['tile']}"
        assert row["failure"] is None and row["fits"], name
        assert row["stack_bytes"] == row["spills"] == 0, name
        if row["role"] == "main":
            kind = "TF32" if row["dtype"] == "tf32" else "BF16"
            assert "HGMMA" in row["mma"] and kind in row["mma"] and not row["serialised"], name
            assert row["loop_loads"].keys() == {"UTMALDG"}, name
            assert row["other_per_mma"] <= (48 if row["pass"] == "wgrad" else 20), name
        elif row["kernel"] in ("split", "turn"):
            assert {"LDG.128", "STG.128"} == {kind for kind in row["loop_loads"] if "G." in kind}, name


@pytest.mark.slow
def test_linear_layers_read_4_byte_filters_as_they_lie_by_single_warps() -> None:
    rows = inspect.inspect_all(cases.cases("alexnet", 128, ["tf32"], ["dgrad"], ["fc7"]), ["sm_90"])
    row = rows[0]
    assert row["failure"] is None and row["stack_bytes"] == row["spills"] == 0
    assert row["mma"] == "HMMA.1688.F32.TF32" and row["loop_loads"].keys() == {"UTMALDG", "LDSM.128", "LDS.32"}
    assert row["other_per_mma"] <= 1.5
