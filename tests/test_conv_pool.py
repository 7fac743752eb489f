"""Convolution, ReLU and max-pool in one: float64's numbers and gradients, and when it runs as one kernel."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tileconv.kernels as tk
from tileconv.bench import fused, inspect, networks
from tileconv.bench.memory import saved_bytes
from tileconv.bench.traffic import Traffic, traffic
from tileconv.bench.workers import run_tasks
from tileconv.kernels import convert, explain, hardware, modules, pool_tiles, revert, tiles, watch
from tileconv.kernels.geometry import Conv2dProblem, Pool2dProblem
from tileconv.kernels.launch.conv_pool import plan_conv_pool

OPS = torch.ops.tileconv
CHANNELS_LAST = torch.channels_last
H100 = hardware.GPUS["H100"]
BOX: dict[str, Any] = {}  # what the interpreter's chooser takes where windows do not overlap
PIXEL = {"formulation": "pixel"}

# pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode
WINDOWS: dict[str, tuple[Any, ...]] = {
    "vgg": (2, 2, 0, 1, False),
    "alexnet": (3, 2, 0, 1, False),
    "overlapping, padded, ceil": (3, 2, 1, 1, True),
    "apart, padded, ceil": (2, 2, 1, 1, True),
    "uneven": ((4, 2), (4, 2), (1, 0), 1, True),
    "gaps between windows": (2, 3, 0, 1, False),
    "one element": (1, 1, 0, 1, False),
}
WHOLE = ("vgg", "apart, padded, ceil", "uneven")
LAYERS: dict[str, dict[str, Any]] = {
    "3x3": {"padding": 1},
    "grouped, dilated": {"padding": 2, "dilation": 2, "groups": 2},
    "strided": {"stride": 2, "padding": 1},
    "wide padding": {"padding": 3},  # whole windows see only the bias
}
ONE_KERNEL = [
    pytest.param(layer, window, tile, id=f"{layer}-{window}-{'pixel' if tile else 'box'}")
    for layer, window, tile in [
        *(("3x3", window, PIXEL) for window in WINDOWS),
        *(("3x3", window, BOX) for window in WHOLE),
        ("grouped, dilated", "vgg", BOX),
        ("grouped, dilated", "gaps between windows", PIXEL),
        ("strided", "alexnet", PIXEL),
        ("wide padding", "uneven", BOX),
        ("wide padding", "gaps between windows", PIXEL),
    ]
]


def settings(window: str) -> dict[str, Any]:
    names = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode")
    return dict(zip(names, WINDOWS[window], strict=True))


def whole_numbers(dtype: torch.dtype, groups: int = 1, channels: int = 16, filters: int = 24) -> list[Tensor]:
    """Operands whose products every dtype sums exactly, so that ties are ties everywhere."""
    shapes = (2, channels * groups, 7, 6), (filters * groups, channels, 3, 3), (filters * groups,)
    x, w, b = (torch.randint(-1, 2, shape).to(dtype) for shape in shapes)
    b -= torch.arange(len(b)) % 12  # some windows have nothing above zero
    return [x.contiguous(memory_format=CHANNELS_LAST), w.contiguous(memory_format=CHANNELS_LAST), b]


def override(tile: dict[str, Any]) -> Any:
    return tiles.override(**tile) if tile else contextlib.nullcontext()


def with_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    dy = torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def in_float64(layer: dict[str, Any], window: str, activation: str | None = "relu") -> Any:
    kernel, stride, padding, dilation, ceil_mode = WINDOWS[window]

    def compute(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.conv2d(x, w, b, **layer)
        return F.max_pool2d(F.relu(y) if activation else y, kernel, stride, padding, dilation, ceil_mode)

    return compute


@pytest.mark.parametrize(("layer", "window", "tile"), ONE_KERNEL)
def test_one_kernel_is_float64s_on_whole_numbers(layer: str, window: str, tile: dict[str, Any]) -> None:
    conv, pool = LAYERS[layer], settings(window)
    inputs = whole_numbers(torch.float16, conv.get("groups", 1))
    with override(tile):
        assert tk.functional.how_conv2d_max_pool2d_runs(*inputs, **conv, **pool) == "one kernel"
        ours = with_gradients(lambda *t: tk.conv2d_max_pool2d(*t, **conv, **pool), inputs)
    exact = with_gradients(in_float64(conv, window), [t.double() for t in inputs])
    assert (exact[0] == 0).any() and (exact[0] > 0).any()
    for got, want in zip(ours, exact, strict=True):
        assert torch.equal(got.double(), want)
    assert ours[0].is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("tile", [BOX, PIXEL], ids=["box", "pixel"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "tf32", "ieee", "fp64"])
def test_every_dtype_is_within_budget(dtype: str, tile: dict[str, Any], assert_within_budget: Any) -> None:
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
    kind, precision = kinds.get(dtype, torch.float32), "tf32" if dtype == "tf32" else "ieee"
    x, w, b = (torch.randn(shape).to(kind) for shape in ((3, 16, 7, 9), (40, 16, 3, 3), (40,)))
    x = x.contiguous(memory_format=CHANNELS_LAST)
    pool = settings("vgg")
    with override(tile) if dtype not in ("ieee", "fp64") else contextlib.nullcontext():
        one = tk.functional.how_conv2d_max_pool2d_runs(x, w, b, padding=1, precision=precision, **pool) == "one kernel"
        y = tk.conv2d_max_pool2d(x, w, b, padding=1, precision=precision, **pool)
    assert one == (dtype not in ("ieee", "fp64"))
    two = tk.max_pool2d(tk.conv2d(x, w, b, padding=1, precision=precision), 2, activation="relu")
    exact = in_float64(LAYERS["3x3"], "vgg")(x.double(), w.double(), b.double())
    assert_within_budget(y, two, exact)
    if kind.itemsize == 2:
        assert torch.equal(y, two), "sums are rounded before they are compared"


@pytest.mark.parametrize("tile", [BOX, PIXEL], ids=["box", "pixel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_switches_nan_and_infinity_are_the_separate_kernels(dtype: torch.dtype, tile: dict[str, Any]) -> None:
    x, w, b = whole_numbers(dtype)
    w = w[:, :, :1, :1].clone()  # a single tap, so that NaN and infinity reach some outputs of a window only
    w[w == 0] = 1
    x[0, 3, 2:4, 2], x[0, 5, 4, 4], x[1, 2, 2:] = float("nan"), float("-inf"), float("inf")
    x[1, 2, 1, 1] = -float("nan")
    geometry, window = ((1, 1), (0, 0, 0, 0), (1, 1), 1), ((2, 2), (2, 2), (1, 1), (1, 1), True)
    with override(tile):
        y, switch = OPS.conv2d_max_pool2d(x, w, b, *geometry, *window, "relu", "tf32", True, True)
    between = OPS.conv2d_fprop(x, w, b, *geometry, None, "tf32", True)
    want, places = OPS.max_pool2d(between, *window, "relu", True, True)
    assert y.isnan().any() and (y == float("inf")).any()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(nan=1.5), want.nan_to_num(nan=1.5))
    assert switch.dtype == torch.uint8 and switch.stride() == y.stride() and switch.max() < 4
    # A window passes a gradient on only where it is positive, so elsewhere its switch is free.
    assert torch.equal(switch[y > 0], places[y > 0])


def test_without_gradients_no_switches_are_written() -> None:
    x, w, _ = whole_numbers(torch.float16)
    geometry, window = ((1, 1), (1, 1, 1, 1), (1, 1), 1), ((2, 2), (2, 2), (0, 0), (1, 1), False)
    y, switch = OPS.conv2d_max_pool2d(x, w, None, *geometry, *window, "relu", "ieee", False, True)
    assert switch.numel() == 0
    assert torch.equal(y.double(), in_float64(LAYERS["3x3"], "vgg")(x.double(), w.double(), torch.zeros(24).double()))


@pytest.mark.parametrize("filters", [24, 32], ids=["switches by pointers", "switches by descriptors"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "sliced"])
def test_memory_formats(memory_format: str, filters: int) -> None:
    x, w, b = whole_numbers(torch.float16, filters=filters)
    w = w.contiguous()
    if memory_format != "channels_last":
        x = x.contiguous() if memory_format == "contiguous" else torch.cat([x, x], 1).contiguous()[:, ::2]
    y, dx, dw, _ = with_gradients(lambda *t: tk.conv2d_max_pool2d(*t, pool_kernel_size=2), [x, w, b])
    want = F.max_pool2d(F.conv2d(x.float(), w.float(), b.float()).relu(), 2)
    assert torch.equal(y.float(), want)
    assert y.is_contiguous(memory_format=CHANNELS_LAST if memory_format == "channels_last" else torch.contiguous_format)
    exact = with_gradients(in_float64({}, "vgg"), [x.double(), w.double(), b.double()])
    assert torch.equal(dx.double(), exact[1]) and torch.equal(dw.double(), exact[2])
    assert torch.equal(tk.conv2d_max_pool2d(x[0], w, b, pool_kernel_size=2), y[0])
    empty = tk.conv2d_max_pool2d(x[:0].detach().requires_grad_(), w, b, pool_kernel_size=2)
    assert empty.shape == (0, *y.shape[1:])
    empty.sum().backward()


# -- autograd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradcheck_and_gradgradcheck(activation: str | None) -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 4, 5, 4), (4, 2, 2, 3), (4,)))

    def layer(*t: Tensor) -> Tensor:
        return tk.conv2d_max_pool2d(
            *t, padding=1, groups=2, pool_kernel_size=3, pool_stride=2, pool_padding=1, activation=activation
        )

    assert torch.autograd.gradcheck(layer, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (x, w, b), fast_mode=True)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_second_order(activation: str | None) -> None:
    inputs = [t.float() for t in whole_numbers(torch.float16)]

    def second(function: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.sum() for g in first), leaves))

    ours = second(
        lambda *t: tk.conv2d_max_pool2d(*t, padding=1, pool_kernel_size=2, activation=activation, precision="tf32")
    )
    inputs = [t.double() for t in inputs]
    exact = second(in_float64(LAYERS["3x3"], "vgg", activation))
    for got, want in zip(ours, exact, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tileconv.kernels.autograd import conv_pool as autograd

    called: list[str] = []
    for name in ("conv2d_dgrad", "conv2d_wgrad", "bias_grad", "relu_bias_grad", "max_pool2d_backward"):
        real = getattr(autograd, name)
        monkeypatch.setattr(autograd, name, lambda *a, name=name, real=real: called.append(name) or real(*a))
    inputs = whole_numbers(torch.float16)
    pooled = ["max_pool2d_backward"]
    for wanted, calls in ((0, [*pooled, "conv2d_dgrad"]), (1, [*pooled, "conv2d_wgrad"]), (2, ["relu_bias_grad"])):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        called.clear()
        tk.conv2d_max_pool2d(*leaves, pool_kernel_size=2).sum().backward()
        assert called == calls


def test_training_keeps_a_byte_an_output_instead_of_the_activation() -> None:
    x, w, b = whole_numbers(torch.float16)
    w.requires_grad_()
    one = tk.conv2d_max_pool2d(x, w, b, padding=1, pool_kernel_size=2)
    between = tk.conv2d(x, w, b, padding=1)
    together = saved_bytes(lambda x: tk.conv2d_max_pool2d(x, w, b, padding=1, pool_kernel_size=2), x, [w])
    apart = saved_bytes(lambda x: tk.max_pool2d(tk.conv2d(x, w, b, padding=1, activation="relu"), 2), x, [w])
    assert together == 2 * x.numel() + 3 * one.numel()
    assert apart == 2 * x.numel() + 2 * between.numel() + one.numel()
    for shape in fused.fused_layers(2):
        problem, pool = fused.conv_problem(shape), fused.conv_pool_problem(shape)
        outputs, pooled = torch.Size(problem.y_shape).numel(), torch.Size(pool.y_shape).numel()
        assert fused.kept_bytes(shape, torch.float16) == (2 * outputs + pooled, 3 * pooled)


@pytest.mark.parametrize("tile", [BOX, {"formulation": "gather"}], ids=["one kernel", "two kernels"])
def test_opcheck(tile: dict[str, Any]) -> None:
    x, w, b = whole_numbers(torch.float16)
    window = ((2, 2), (2, 2), (0, 0), (1, 1), False)
    with override(tile):
        for with_switch in (True, False):
            arguments = (x, w, b, (1, 1), (1, 1, 1, 1), (1, 1), 1, *window, "relu", "ieee", with_switch, True)
            torch.library.opcheck(OPS.conv2d_max_pool2d.default, arguments)


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    layer = lambda *t: tk.conv2d_max_pool2d(*t, padding=1, pool_kernel_size=2)  # noqa: E731
    inputs = whole_numbers(torch.float16)
    for got, want in zip(
        with_gradients(torch.compile(layer, backend="aot_eager", fullgraph=True), inputs),
        with_gradients(layer, inputs),
        strict=True,
    ):
        assert torch.equal(got, want)


# -- which way ---------------------------------------------------------------------------------------------------------


def vgg_layer(width: int, size: int, kernel: int = 2, stride: int = 2) -> tuple[Conv2dProblem, Pool2dProblem]:
    problem = Conv2dProblem(128, width, size, size, width, 3, 3, padding=((1, 1), (1, 1)))
    return problem, Pool2dProblem(128, width, size, size, (kernel, kernel), (stride, stride))


def test_the_faster_way_is_taken() -> None:
    for operands in (vgg_layer(128, 112), vgg_layer(128, 112, 3)):
        one, two = pool_tiles.modelled_us(*operands, torch.float16, "ieee", H100)
        assert pool_tiles.fuse_pool(*operands, torch.float16, "ieee", H100) == (one < two)
    # Windows that overlap are convolved 2.25 times over, those side by side once.
    assert pool_tiles.fuse_pool(*vgg_layer(128, 112), torch.float16, "ieee", H100)
    reason = pool_tiles.why_separate(*vgg_layer(128, 112, 3), torch.float16, "ieee", H100)
    assert reason is not None and "modelled to take" in reason
    # Where DRAM bounds both, computing again costs nothing.
    problem = Conv2dProblem(128, 64, 56, 56, 64, 1, 1)
    assert pool_tiles.fuse_pool(problem, Pool2dProblem(128, 64, 56, 56, (3, 3), (2, 2)), torch.float16, "ieee", H100)


REASONS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no descriptors": ({}, "A100", "ieee", "needs tensor descriptors"),
    "fp32": ({}, "H100", "ieee", "do not run on tensor cores"),
    "parts of fp32": ({}, "H100", "bf16x6", "multiplies parts of fp32"),
    "windows that overlap, few images": ({}, "B200", "tf32", "no tile for 2 images and windows of (3, 3) fits B200"),
    "channels": ({"C": 6}, "H100", "tf32", "6 channels of torch.float32 are no multiple of 16 bytes"),
    "first layer": ({"C": 3, "stride": (2, 2)}, "H100", "tf32", "a first layer runs on blocks"),
    "depthwise": ({"groups": 64}, "H100", "tf32", "no multiple of 16 bytes"),
    "dilated pool": ({}, "H100", "tf32", "without dilation"),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_two_kernels(case: str) -> None:
    changes, gpu, precision, why = REASONS[case]
    problem = Conv2dProblem(**{"N": 2, "C": 64, "H": 20, "W": 20, "K": 64, "R": 3, "S": 3} | changes)
    dilation = (2, 2) if case == "dilated pool" else (1, 1)
    kernel = (3, 3) if "overlap" in case else (2, 2)
    pool = Pool2dProblem(2, 64, problem.P, problem.Q, kernel, (2, 2), dilation=dilation)
    reason = pool_tiles.why_separate(problem, pool, torch.float32, precision, hardware.GPUS[gpu])
    assert reason is not None and why in reason


def test_what_cannot_be_honoured_raises() -> None:
    x, w, b = whole_numbers(torch.float16)
    problem = Conv2dProblem(2, 16, 7, 6, 24, 3, 3)
    pool = Pool2dProblem(2, 24, 5, 4, (3, 3), (2, 2))
    y = torch.empty(pool.y_shape, dtype=torch.float16)
    for tile, why in (
        ({"formulation": "gather"}, "no gather"),
        ({"formulation": "box", "box": (4, 2, 2)}, "windows that do not overlap"),
        ({"formulation": "pixel", "splits": 2}, "no splits"),
        ({"formulation": "pixel", "half": True}, "no half boxes"),
    ):
        with tiles.override(**tile), pytest.raises(ValueError, match=f"cannot run as one kernel: .*{why}"):
            plan_conv_pool(problem, pool, x, w, b, y, None, gpu=hardware.INTERPRETER)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "window": ({"pool_kernel_size": 0}, ValueError, "pool_kernel_size is 0"),
    "stride": ({"pool_kernel_size": 2, "pool_stride": "2"}, TypeError, "pool_stride must be an int or a pair"),
    "padding": ({"pool_kernel_size": 2, "pool_padding": 2}, ValueError, "padding=.* must be at most half"),
    "nothing left": ({"pool_kernel_size": 9}, ValueError, "input of 5x4 is too small"),
    "activation": ({"pool_kernel_size": 2, "activation": "elu"}, ValueError, "activation is 'elu'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str) -> None:
    arguments, error, why = ERRORS[case]
    with pytest.raises(error, match=why):
        tk.conv2d_max_pool2d(*whole_numbers(torch.float16), **arguments)


# -- modules -----------------------------------------------------------------------------------------------------------


def test_module_is_the_three_layers(device: torch.device) -> None:
    layer = modules_of(tk.nn.ConvReLUMaxPool2d(8, 16, 3, padding=1, pool_kernel_size=3, pool_stride=2), device)
    x = torch.randint(-2, 3, (2, 8, 7, 6), device=device).half()
    want = F.max_pool2d(F.conv2d(x.float(), layer.weight.float(), layer.bias.float(), padding=1).relu(), 3, 2)
    assert torch.equal(layer(x).float(), want)
    assert layer.weight.is_contiguous(memory_format=CHANNELS_LAST)
    assert "pool=(3, 2, 0, 1, False)" in repr(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
    assert layer.how_it_runs(x).startswith("two kernels: in the interpreter" if hardware.interpreting() else "")
    with pytest.raises(ValueError, match="pool_kernel_size is 0"):
        tk.nn.ConvReLUMaxPool2d(8, 16, 3, pool_kernel_size=0)


def modules_of(layer: Any, device: torch.device) -> Any:
    """The layer in fp16 with whole numbers."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    return layer.to(device).half()


class Net(nn.Module):
    """Sequences of a convolution, a ReLU and a max-pool that can become one, and one that is read in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.conv, self.relu, self.pool = nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.again, self.act, self.other = nn.Conv2d(8, 8, 1), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(self.stem(x)))
        z: Tensor = self.pool(y).sum() + y
        return self.other(self.act(self.again(z)))[0] * 2


def test_convert_fuses_sequences_and_revert_undoes_it(device: torch.device) -> None:
    model = modules_of(Net(), device)
    twin, parameters = copy.deepcopy(model), list(model.parameters())
    x = torch.randint(-1, 2, (2, 8, 9, 8), device=device).half()
    assert convert(model) is model
    fused_layer, relu, pool = model.stem
    assert (type(fused_layer), type(relu), type(pool)) == (
        tk.nn.ConvReLUMaxPool2d, tk.nn.FusedReLU, tk.nn.FusedMaxPool2d,
    )  # fmt: skip
    assert type(model.conv) is modules.ConvReLU2d, "what its ReLU makes is read twice"
    assert type(model.again) is modules.ConvReLU2d, "its pool returns indices"
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    rows = {row.name: row for row in explain(model, x)}
    assert rows["stem.0"].reason == "with its ReLU and its max-pool in one kernel"
    assert rows["stem.2"].reason == "done by the layer before it"
    wide = {row.name: row for row in explain(model.float(), x.float())}
    assert wide["stem.0"].reason.startswith("with its ReLU and its max-pool in two kernels: products of torch.float32")
    model.half()
    for copied in (model, pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), convert(copy.deepcopy(twin), ["conv2d", "relu", "max_pool2d"])(x))
        revert(copied)
        assert [type(m) for m in copied.modules()] == [type(m) for m in twin.modules()]
        assert [sorted(m.__dict__) for m in copied.modules()] == [sorted(m.__dict__) for m in twin.modules()]


def test_convert_leaves_pools_that_it_may_not_take() -> None:
    model = convert(Net(), ["fuse"])
    assert type(model.stem[0]) is modules.ConvReLU2d and type(model.stem[2]) is nn.MaxPool2d
    model = convert(Net(), filter_fn=lambda name, module: name != "stem.2")
    assert type(model.stem[0]) is modules.ConvReLU2d and type(model.stem[2]) is nn.MaxPool2d
    hooked = Net()
    hooked.stem[2].register_forward_hook(lambda m, x, y: None)
    assert type(convert(hooked).stem[0]) is modules.ConvReLU2d
    alone = convert(Net(), ["fuse_pool"])
    assert type(alone.stem[0]) is tk.nn.ConvReLUMaxPool2d and type(alone.conv) is nn.Conv2d


# -- bytes and machine code --------------------------------------------------------------------------------------------

COUNTED: dict[str, tuple[dict[str, Any], tuple[int, int, int], dict[str, Any]]] = {
    "boxes of the whole image": ({}, (2, 2, 0), {}),
    "small boxes, padded pool": ({}, (2, 2, 1), {"formulation": "box", "box": (1, 4, 4), "block_k": 32}),
    "grouped": ({"groups": 2, "C": 32, "K": 48}, (2, 2, 0), {"formulation": "box", "box": (4, 2, 2), "block_k": 16}),
    "overlapping": ({"H": 5, "W": 4}, (3, 2, 1), {"formulation": "pixel", "box": (16, 1, 1), "block_k": 32}),
    "strided": ({"stride": (2, 2), "H": 9}, (2, 2, 0), {"formulation": "pixel", "box": (16, 1, 1), "block_k": 32}),
}


@pytest.mark.skipif(not hardware.interpreting(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize("case", COUNTED)
def test_counted_bytes(case: str) -> None:
    changes, (kernel, stride, padding), tile = COUNTED[case]
    extents: dict[str, Any] = {"N": 2, "C": 24, "H": 7, "W": 6, "K": 40, "R": 3, "S": 3, "padding": ((1, 1), (1, 1))}
    problem = Conv2dProblem(**extents | changes)
    sizes = (problem.N, problem.K, problem.P, problem.Q)
    pool = Pool2dProblem(*sizes, (kernel, kernel), (stride, stride), (padding, padding), ceil_mode=True)
    x, w, y = (
        torch.randn(shape).half().to(memory_format=CHANNELS_LAST)
        for shape in (problem.x_shape, problem.w_shape, pool.y_shape)
    )
    switch = torch.empty_like(y, dtype=torch.uint8)
    with override(tile | {"block_c": 16} if tile else tile):
        launch = plan_conv_pool(problem, pool, x, w, torch.randn(problem.K).half(), y, switch, gpu=hardware.INTERPRETER)
    with watch.count_bytes() as count:
        launch.run()
    ways = (count.read.values(), count.written.values())
    found = Traffic(*(sum(b.requested for b in way) for way in ways), least=sum(b.unique for way in ways for b in way))
    assert traffic(launch) == found


PROBE = """
from tileconv.bench import fused
from tileconv.bench.inspect import inspect_launch
from tileconv.bench.workers import serve
from tileconv.kernels import hardware, tiles
def handle(task):
    [shape] = [shape for shape in fused.fused_layers(128) if shape.name == task["layer"]]
    with tiles.override(**task["tile"] | {"box": tuple(task["tile"]["box"])}):
        launch = fused.launch(shape, task["dtype"], hardware.gpu_of_arch(90))
    return inspect_launch(launch, "sm_90")
serve(handle)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_candidates_compile_without_spills_to_asynchronous_products(dtype: str, tmp_path: Any) -> None:
    (tmp_path / "pool_probe.py").write_text(PROBE)
    shapes = {shape.name: shape for shape in fused.fused_layers(128)}
    todo: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in ("vgg16.conv3_3", "googlenet.conv3"):
        problem, pool = fused.conv_problem(shapes[name]), fused.conv_pool_problem(shapes[name])
        for tile in pool_tiles.candidates(problem, pool, fused.DTYPES[dtype], H100):
            crowded = dtype == "fp16" or tile.block_k * tile.pixels >= 8192
            if crowded and (tile.formulation == "box") == (name == "vgg16.conv3_3"):
                kind = (tile.formulation, tile.pixels, tile.block_k)
                todo.setdefault(kind, {"layer": name, "dtype": dtype, "tile": dataclasses.asdict(tile)})  # the deepest
    assert {kind[0] for kind in todo} == {"box", "pixel"}
    rows = run_tasks(
        "pool_probe", list(todo.values()), jobs=1, label=str,
        environment=inspect.COMPILING | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    for kind, row in zip(todo, rows, strict=True):
        assert "error" not in row, (kind, row)
        assert (row["stack_bytes"], row["spills"], row["serialised"], row["fits"]) == (0, 0, False, True), (kind, row)
        assert row["mma"].startswith("HGMMA") and row["loop_loads"] == {"UTMALDG": 2}, (kind, row)
        if kind[1] * kind[2] == 4096 * row["num_warps"]:  # what a warp group can hold
            assert row["other_per_mma"] <= 14, (kind, row)


def test_the_table_says_which_way_each_layer_runs() -> None:
    text = fused.table(128, "fp16", H100)
    for shape in fused.fused_layers(128):
        found = fused.row(shape, "fp16", H100)
        assert f"| {shape.name} |" in text
        assert found["kept_fused"] < found["kept_apart"]
        assert found["fused"] == (found["why"] is None)
        if found["one_us"] is not None:
            assert found["fused"] == (found["one_us"] < found["two_us"])
    assert isinstance(shape, networks.Shape)
