"""Every formulation of every pass against float64, on odd sizes; then the memory formats and the numbers' edges."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import checks, conv_tile, hardware, reference, tiles
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv as launch_conv

CHANNELS_LAST = torch.channels_last
OPS = torch.ops.tileconv


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    arguments: dict[str, Any] = field(default_factory=dict)
    formulations: tuple[str, ...] = conv_tile.FORMULATIONS  # what fprop can run as, besides gather


CASES = [
    Case("3x3", (3, 40, 5, 6), (24, 40, 3, 3), {"padding": 1}),
    Case("1x1", (2, 24, 3, 5), (40, 24, 1, 1)),
    Case("even kernel, uneven padding", (2, 16, 4, 5), (16, 16, 2, 4), {"padding": "same"}),
    Case("dilated beyond the image", (2, 16, 5, 4), (16, 16, 3, 3), {"padding": 3, "dilation": 3}),
    Case("no padding, more images than a tile", (17, 16, 4, 3), (16, 16, 3, 2)),
    Case("strided", (2, 16, 7, 6), (16, 16, 3, 3), {"stride": 2, "padding": 1}, ("pixel", "gather")),
    Case("stride and dilation share a factor", (2, 8, 9, 8), (8, 8, 3, 2), {"stride": (4, 3), "dilation": (2, 3),
         "padding": (2, 1)}, ("pixel", "gather")),
    Case("stride skips pixels", (1, 16, 8, 7), (16, 16, 1, 2), {"stride": 3}, ("pixel", "gather")),
    Case("grouped", (2, 48, 4, 3), (32, 24, 3, 3), {"padding": 1, "groups": 2}),
    Case("grouped by odd channels", (2, 15, 5, 5), (9, 5, 3, 3), {"padding": 1, "groups": 3}, ("gather",)),
    Case("depthwise", (2, 6, 5, 5), (12, 1, 3, 3), {"padding": 1, "groups": 6}, ("gather",)),
    Case("first layer", (2, 3, 19, 17), (16, 3, 7, 7), {"stride": 4, "padding": 2}),
    Case("first layer of odd stride", (2, 4, 9, 13), (8, 4, 4, 3), {"stride": (3, 2), "padding": (1, 0)}),
    Case("channels just beyond a tile", (1, 17, 4, 4), (33, 17, 3, 3), {"padding": 1}, ("gather",)),
    Case("more taps than bits", (1, 17, 31, 2), (8, 17, 30, 2), {"padding": 1}, ("gather",)),
    Case("one pixel, batch 1", (1, 16, 1, 1), (8, 16, 3, 3), {"padding": 1}),
]  # fmt: skip
RUNS = [pytest.param(case, formulation, id=f"{case.name}-{formulation}")
        for case in CASES for formulation in case.formulations]  # fmt: skip


def operands(case: Case, dtype: torch.dtype, memory_format: Any = CHANNELS_LAST) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(case.x).to(dtype).contiguous(memory_format=memory_format)
    w = (torch.randn(case.w) / case.w[1] ** 0.5).to(dtype).contiguous(memory_format=memory_format)
    return x, w, torch.randn(case.w[0]).to(dtype)


def run(conv: Any, x: Tensor, w: Tensor, b: Tensor, dy: Tensor | None) -> list[Tensor]:
    """The output and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    y = conv(*leaves)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy.to(y.dtype))
    return [y.detach(), *grads]


def assert_close(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    for name, our, their, want in zip(("y", "dx", "dw", "db"), ours, theirs, exact, strict=False):
        assert our.dtype == their.dtype, name
        error, allowed = reference.error(our, want), reference.allowed_error(want, their)
        assert error <= allowed, f"{name}: error {error:.3g} is over the allowed {allowed:.3g}"


def relu_conv(**arguments: Any) -> Any:
    return lambda x, w, b: F.relu(F.conv2d(x, w, b, **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("case", "formulation"), RUNS)
def test_formulations_against_float64(case: Case, formulation: str, dtype: torch.dtype) -> None:
    x, w, b = operands(case, dtype)
    dy = torch.randn(F.conv2d(x, w, b, **case.arguments).shape).to(dtype)
    exact = run(relu_conv(**case.arguments), x.double(), w.double(), b.double(), dy)
    theirs = run(relu_conv(**case.arguments), x, w, b, dy)
    ours = []
    for place in range(3):
        leaves = [t.detach().requires_grad_(i == place) for i, t in enumerate((x, w, b))]
        with tiles.override(formulation=formulation):
            y = tk.conv2d(*leaves, **case.arguments, activation="relu")
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
        # The input's gradient of a first layer has few columns: no descriptor reaches those.
        with tiles.override(formulation=formulation if place or case.x[1] > 4 else "gather"):
            ours += [y.detach(), torch.autograd.grad(y, leaves[place], dy)[0]]
    assert torch.equal(ours[0], ours[2]) and torch.equal(ours[0], ours[4])
    ours = [ours[0], *ours[1::2]]
    # The mask of a rounded output may differ from the exact one where it rounds to zero: hold it to our own output.
    masked = dy.double() * (ours[0] > 0)
    exact[1:] = run(lambda *t: F.conv2d(*t, **case.arguments), x.double(), w.double(), b.double(), masked)[1:]
    assert_close(ours, theirs, exact)


def test_a_strided_input_gradient_runs_as_boxes() -> None:
    case = CASES[6]
    x, w, b = operands(case, torch.float32)
    y = F.conv2d(x.double().requires_grad_(), w.double(), b.double(), **case.arguments)
    exact = run(lambda *t: F.conv2d(*t, **case.arguments), x.double(), w.double(), b.double(), None)[1]
    x.requires_grad_()
    y = tk.conv2d(x, w, b, **case.arguments)
    with tiles.override(formulation="box"):
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert reference.error(dx, exact) <= 1e-5 * exact.abs().max().item()


def test_the_largest_strides_paddings_and_dilations() -> None:
    most = checks.LARGEST
    x, w, b = operands(CASES[0], torch.float32)
    wanted = [run(lambda *t: F.conv2d(*t, stride=most), *(t.to(kind) for t in (x, w, b)), None)
              for kind in (torch.float32, torch.float64)]  # fmt: skip
    assert_close(run(lambda *t: tk.conv2d(*t, stride=most), x, w, b, None), *wanted)
    # The middle of the filters meets the image's first pixel, and nothing else does.
    met = x[..., :1, :1], w[..., 1:2, 1:2], b
    wanted = [[F.conv2d(*(t.to(kind) for t in met))] for kind in (torch.float32, torch.float64)]
    assert_close([tk.conv2d(x, w, b, stride=most, padding=most, dilation=most)], *wanted)


@pytest.mark.parametrize("formulation", conv_tile.FORMULATIONS)
def test_pixels_that_no_tap_reaches_get_zero_whatever_the_filters_hold(formulation: str) -> None:
    w = torch.full((16, 16, 2, 1), float("nan"), dtype=torch.float16)
    x = torch.zeros(2, 16, 9, 4, dtype=torch.float16).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    y = tk.conv2d(x, w, stride=4)
    with tiles.override(formulation=formulation, box=(16, 1, 1)):
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx[:, :, [0, 1, 4, 5], 0].isnan().all()
    assert not dx[..., 1:].any() and not dx[:, :, [2, 3, 6, 7]].any()


def test_a_strided_input_gradient_is_one_launch_a_residue() -> None:
    problem = Conv2dProblem(2, 16, 9, 9, 16, 3, 3, (2, 3), ((1, 1), (1, 1)))
    dy, w, dx = (torch.empty(shape) for shape in (problem.y_shape, problem.w_shape, problem.x_shape))
    launches = launch_conv.plan_dgrad(problem, dy, w, dx, gpu=hardware.INTERPRETER)
    turns = ["turn"] * 2, ["turn"]  # contiguous operands are turned once, and so is what all residues make
    assert [launch.kernel.__name__ for launch in launches] == [*turns[0], *["fprop_box"] * 2 * 3, *turns[1]]


@pytest.mark.parametrize(("batch", "turned"), [(1, ["turn"]), (128, ["turn", "turn"])], ids=["small", "large"])
def test_a_large_contiguous_output_is_made_channels_last_and_turned(batch: int, turned: list[str]) -> None:
    problem = Conv2dProblem(batch, 64, 13, 13, 32, 3, 3, padding=((1, 1), (1, 1)))
    x, w, y = (torch.empty(s, dtype=torch.float16, device="meta") for s in (problem.x_shape, problem.w_shape,
                                                                            problem.y_shape))  # fmt: skip
    w = w.to(memory_format=torch.channels_last)
    launches = launch_conv.plan_fprop(problem, x, w, None, y, gpu=hardware.GPUS["H100"])
    assert [launch.kernel.__name__ for launch in launches if launch.kernel.__name__ == "turn"] == turned
    assert launches[0].arguments["x"].untyped_storage()._cdata == x.untyped_storage()._cdata
    assert launches[-1].arguments["y"].untyped_storage()._cdata == y.untyped_storage()._cdata


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_which_formulations_can_run(case: Case) -> None:
    pair = lambda value: (value, value) if isinstance(value, int) else value  # noqa: E731
    padding = case.arguments.get("padding", 0)
    rows, columns = (2, 2) if padding == "same" else pair(padding)
    stride, dilation = (pair(case.arguments.get(name, 1)) for name in ("stride", "dilation"))
    problem = Conv2dProblem(*case.x, case.w[0], *case.w[2:], stride, ((rows, rows), (columns, columns)), dilation,
                            case.arguments.get("groups", 1))  # fmt: skip
    for gpu in (hardware.INTERPRETER, hardware.GPUS["H100"]):
        assert tiles.formulations(problem, "fprop", torch.float16, gpu) == case.formulations
    assert tiles.formulations(problem, "fprop", torch.float16, hardware.GPUS["A100"]) == ("gather",)


OTHER_DTYPES = pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[8], CASES[11]], ids=lambda case: case.name)


@OTHER_DTYPES
def test_bf16_against_float64(case: Case) -> None:
    x, w, b = operands(case, torch.bfloat16)
    dy = torch.randn(F.conv2d(x, w, b, **case.arguments).shape).bfloat16()
    exact = run(lambda *t: F.conv2d(*t, **case.arguments), x.double(), w.double(), b.double(), dy)
    theirs = run(lambda *t: F.conv2d(*t, **case.arguments), x, w, b, dy)
    assert_close(run(lambda *t: tk.conv2d(*t, **case.arguments), x, w, b, dy), theirs, exact)


@OTHER_DTYPES
def test_fp64_to_its_own_rounding(case: Case) -> None:
    x, w, b = operands(case, torch.float64)
    dy = torch.randn(F.conv2d(x, w, b, **case.arguments).shape)
    exact = run(lambda *t: F.conv2d(*t, **case.arguments), x, w, b, dy)
    ours = run(lambda *t: tk.conv2d(*t, **case.arguments), x, w, b, dy)
    for got, want in zip(ours, exact, strict=True):
        assert reference.error(got, want) <= 1e-14 * want.abs().max().item()


def test_tf32_rounds_operands_to_ten_bits() -> None:
    x, w, b = operands(CASES[0], torch.float32)
    exact = F.conv2d(x.double(), w.double(), b.double(), padding=1)
    ieee, tf32 = (reference.error(tk.conv2d(x, w, b, padding=1, precision=p), exact) for p in ("ieee", "tf32"))
    scale = exact.abs().max().item()
    assert ieee < 1e-6 * scale
    assert 1e-5 * scale < tf32 < 1e-3 * scale


def test_splits_add_up_to_the_same_gradient() -> None:
    case = CASES[4]
    x, w, b = operands(case, torch.float32)
    dy = torch.randn(F.conv2d(x, w, b).shape)
    exact = run(F.conv2d, x.double(), w.double(), b.double(), dy)
    for formulation in conv_tile.FORMULATIONS:
        for splits in (2, 7):
            # splits belong to wgrad alone; the forward pass would refuse nothing, it ignores them
            with tiles.override(formulation=formulation, splits=splits, box=(16, 1, 1)):
                dw = OPS.conv2d_wgrad(dy, x, w.shape, (1, 1), (0, 0, 0, 0), (1, 1), 1, "ieee")
            assert reference.error(dw, exact[2]) <= 1e-5 * exact[2].abs().max().item()


@pytest.mark.parametrize("formulation", conv_tile.FORMULATIONS)
def test_small_tiles_make_the_same_numbers_as_large_ones(formulation: str) -> None:
    x, w, b = operands(Case("", (5, 40, 6, 7), (56, 40, 3, 3)), torch.float32)
    exact = F.conv2d(x.double(), w.double(), b.double(), padding=1)
    box = (2, 4, 2) if formulation == "box" else (16, 1, 1)
    with tiles.override(formulation=formulation, box=box, block_k=32, block_c=16):
        y = tk.conv2d(x, w, b, padding=1)
    assert reference.error(y, exact) <= 1e-5 * exact.abs().max().item()


@pytest.mark.parametrize("gpu", ["H100", "A100"])
@pytest.mark.parametrize("size", [((1, 200, 1, 1), (136, 200, 1, 1)), ((2, 36, 7, 5), (52, 36, 3, 3))], ids=str)
def test_plain_fp32_in_the_tiles_of_small_batches(size: Any, gpu: str) -> None:
    x, w, b = operands(Case("", *size), torch.float32)
    pad = size[1][2] // 2
    exact = F.conv2d(x.double(), w.double(), b.double(), padding=pad)
    problem = Conv2dProblem(*size[0], size[1][0], *size[1][2:], padding=((pad, pad), (pad, pad)))
    fprop, dgrad = (
        tiles.choose(one, pass_, torch.float32, "ieee", hardware.GPUS[gpu])
        for one, pass_ in ((problem, "fprop"), (problem.dgrad[0].problem, "dgrad"))
    )
    assert fprop.pixels <= 32 and dgrad.pixels <= 32
    with tiles.override(**asdict(fprop)):
        y = tk.conv2d(x, w, b, padding=pad)
    with tiles.override(**asdict(dgrad)):
        dx = OPS.conv2d_dgrad(y, w, x.shape, (1, 1), (pad,) * 4, (1, 1), 1, "ieee", True)
    assert reference.error(y, exact) <= 1e-5 * exact.abs().max().item()
    exact = reference.conv2d_dgrad(y, w, x.shape, 1, pad, 1, 1)
    assert reference.error(dx, exact) <= 1e-5 * exact.abs().max().item()


SHARED = {
    "all tiles in two": {"splits": 2},
    "all tiles in five, some with nothing to do": {"splits": 5},
    "the last three tiles in three": {"splits": 3, "tail": 3},
    "a second product": {"block_k": 32, "block_k2": 16},
    "a second product, shared": {"block_k": 32, "block_k2": 16, "splits": 2, "tail": 2},
    "a second product, the filters of the last three tiles shared": {"block_k": 32, "block_k2": 16, "tail": 3},
    "half a box of images more": {"block_k": 32, "block_k2": 16, "half": True},
    "half a box of columns more": {"box": (1, 8, 2), "half": True},
}


@pytest.mark.parametrize(
    ("memory_format", "groups"), [(torch.contiguous_format, 2), (CHANNELS_LAST, 1)], ids=["contiguous", "channels_last"]
)
@pytest.mark.parametrize("tile", SHARED.values(), ids=SHARED)
def test_shared_depth_and_second_products(tile: dict[str, Any], memory_format: Any, groups: int) -> None:
    case = Case("", (3, 48, 5, 4), (112, 48 // groups, 3, 3))
    x, w, b = operands(case, torch.float32, memory_format)
    exact = F.relu(F.conv2d(x.double(), w.double(), b.double(), padding=1, groups=groups))
    with tiles.override(**({"formulation": "box", "box": (2, 4, 2), "block_k": 64, "block_c": 16} | tile)):
        y = tk.conv2d(x, w, b, padding=1, groups=groups, activation="relu")
        again = tk.conv2d(x, w, b, padding=1, groups=groups, activation="relu")
        dx = OPS.conv2d_dgrad(y, w, x.shape, (1, 1), (1,) * 4, (1, 1), groups, "ieee", memory_format == CHANNELS_LAST)
    assert reference.error(y, exact) <= 1e-5 * exact.abs().max().item()
    assert torch.equal(y, again)
    exact = reference.conv2d_dgrad(y, w, x.shape, 1, 1, 1, groups)
    assert reference.error(dx, exact) <= 1e-5 * exact.abs().max().item()


COLUMNS = {
    "two of 24 in 64": {"box": (4, 4, 1), "block_k": 64, "columns": 2},
    "one pixel": {"formulation": "pixel", "box": (16, 1, 1), "block_k": 64, "columns": 2},
    "five, more than there are": {"box": (4, 4, 1), "block_k": 128, "columns": 5},
    "shared": {"box": (4, 4, 1), "block_k": 64, "columns": 2, "splits": 3},
    "the last four shared": {"box": (4, 4, 1), "block_k": 128, "columns": 2, "splits": 2, "tail": 4},
    "half a box of rows more": {"box": (8, 2, 1), "block_k": 64, "columns": 2, "half": True},
}


@pytest.mark.parametrize(("channels", "groups"), [(24, 1), (32, 2)], ids=["24 channels", "32 of two groups"])
@pytest.mark.parametrize("tile", COLUMNS.values(), ids=COLUMNS)
def test_several_columns_of_a_gradient(tile: dict[str, Any], channels: int, groups: int) -> None:
    """Both ways out: blocks that their columns' channels fill leave as boxes, others by pointers."""
    if channels * tile["columns"] > tile["block_k"]:
        tile = tile | {"columns": tile["block_k"] // channels}
    x, w, _ = operands(Case("", (3, channels * groups, 5, 7), (48 * groups, channels, 3, 3)), torch.float32)
    for stride, padding, precision in (((1, 1), (1, 1), "ieee"), ((2, 1), (0, 2), "ieee"), ((1, 1), (2, 0), "tf32")):
        y = F.conv2d(x.double(), w.double(), None, stride, padding, 1, groups)
        dy = torch.randn(y.shape)
        pads = [side for side in padding for _ in (0, 1)]
        with tiles.override(**({"formulation": "box", "block_c": 32} | tile)):
            arguments = (stride, pads, (1, 1), groups, precision, True)
            dx = OPS.conv2d_dgrad(dy, w, x.shape, *arguments)
        exact = reference.conv2d_dgrad(dy, w, x.shape, stride, padding, 1, groups)
        assert reference.error(dx, exact) <= (1e-3 if precision == "tf32" else 1e-5) * exact.abs().max().item()


@pytest.mark.parametrize(
    ("channels", "groups", "rows", "columns", "arguments", "precision"),
    [
        (96, 1, 3, 1, {"padding": 1}, "ieee"),
        (72, 2, 1, 1, {"stride": 2, "padding": 1}, "tf32"),
        (80, 1, 2, 1, {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}, "ieee"),
        (48, 2, 2, 2, {"padding": 1}, "ieee"),  # AlexNet 2012's conv2
        (40, 1, 2, 2, {"padding": (2, 0)}, "tf32"),
        (24, 1, 4, 3, {"padding": 2, "dilation": (2, 1)}, "ieee"),
        (32, 1, 2, 2, {"padding": 1}, "ieee"),  # the first block is full, the second empty
    ],
)
def test_second_product_across(
    channels: int, groups: int, rows: int, columns: int, arguments: dict[str, Any], precision: str
) -> None:
    x, w, b = operands(Case("", (21, 32 * groups, 5, 7), (channels * groups, 32, 3, 3)), torch.float32)
    tile = {"formulation": "pixel", "box": (16, rows, 1), "block_k": 64, "block_k2": 32, "block_c": 16, "across": True}
    near = 1e-3 if precision == "tf32" else 1e-5
    if columns == 1:
        exact = F.relu(F.conv2d(x.double(), w.double(), b.double(), groups=groups, **arguments))
        with tiles.override(**tile):
            y = tk.conv2d(x, w, b, groups=groups, activation="relu", precision=precision, **arguments)
        assert reference.error(y, exact) <= near * exact.abs().max().item()
    given = ({"stride": 1, "padding": 0, "dilation": 1} | arguments).values()
    stride, padding, dilation = (n if isinstance(n, tuple) else (n, n) for n in given)
    w = w.transpose(0, 1) if groups == 1 else torch.randn(32 * groups, channels, 3, 3)
    shape = (21, channels * groups, 5, 7)
    dy = torch.randn(F.conv2d(torch.empty(shape), w, None, stride, padding, dilation, groups).shape)
    with tiles.override(**tile, columns=columns):
        pads = [side for side in padding for _ in (0, 1)]
        dx = OPS.conv2d_dgrad(dy, w, shape, stride, pads, dilation, groups, precision, True)
    exact = reference.conv2d_dgrad(dy, w, shape, stride, padding, dilation, groups)
    assert reference.error(dx, exact) <= near * exact.abs().max().item()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"block_k2": 0}, "across=True needs fprop or dgrad"),
        ({"splits": 2}, "across=True needs fprop or dgrad"),
        ({"box": (16, 5, 1)}, "across=True needs fprop or dgrad"),
        ({"box": (16, 1, 2)}, "pixel takes one row and one column"),
        ({"formulation": "gather", "block_k2": 0}, "across=True needs fprop or dgrad"),
    ],
    ids=str,
)
def test_second_products_that_cannot_turn(changes: dict[str, Any], error: str) -> None:
    x, w = torch.randn(16, 32, 5, 7), torch.randn(96, 32, 3, 3)
    tile = {"formulation": "pixel", "box": (16, 1, 1), "block_k": 64, "block_k2": 32, "block_c": 16, "across": True}
    with tiles.override(**tile | changes), pytest.raises(ValueError, match=error):
        tk.conv2d(x, w)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"columns": 3}, "columns=3 of 24 channels are more than block_k=64"),
        ({"columns": 0}, "columns=0: allowed is 1, and more in input gradients"),
        ({"columns": 2, "box": (2, 4, 2)}, "columns=2: allowed is 1, and more in input gradients"),
    ],
    ids=str,
)
def test_columns_that_cannot_be_made_together(changes: dict[str, Any], error: str) -> None:
    w, dy = torch.randn(48, 24, 3, 3), torch.randn(2, 48, 5, 7)
    tile = {"formulation": "box", "box": (4, 4, 1), "block_k": 64, "block_c": 32} | changes
    with tiles.override(**tile), pytest.raises(ValueError, match=error):
        OPS.conv2d_dgrad(dy, w, (2, 24, 5, 7), (1, 1), (1,) * 4, (1, 1), 1, "ieee", True)


def test_no_forward_pass_makes_several_columns() -> None:
    """They multiply what is beside a window by zero; only a gradient may carry a NaN so far."""
    problem = Conv2dProblem(128, 64, 56, 56, 192, 3, 3, padding=((1, 1), (1, 1)))
    one, several = (
        tiles.choose(part.problem, "dgrad", torch.float16, "ieee", hardware.GPUS["H100"]).columns
        for (part,) in (problem.transposed, problem.dgrad)
    )
    assert (one, several) == (1, 2)
    x, w = torch.randn(2, 48, 5, 7), torch.randn(48, 24, 3, 3)
    tile = {"formulation": "box", "box": (4, 4, 1), "block_k": 64, "block_c": 32, "columns": 2}
    for run in (lambda: tk.conv2d(x, w.transpose(0, 1)), lambda: tk.conv_transpose2d(x, w)):
        with tiles.override(**tile), pytest.raises(ValueError, match="columns=2: allowed is 1"):
            run()


@pytest.mark.parametrize("box", [(16, 1, 1), (2, 4, 2)], ids=["pixel", "box"])
@pytest.mark.parametrize(
    "tile",
    [
        {"taps": 4}, {"block_k2": 16}, {"taps": 2, "block_k2": 16, "splits": 3}, {"block_c": 32, "half": True},
        {"block_c": 32, "half": True, "block_k2": 16, "splits": 3},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stride", [1, 2])
def test_filter_gradients_of_more_taps_and_more_filters(stride: int, tile: dict[str, Any], box: Any) -> None:
    if stride == 2 and box != (16, 1, 1):
        pytest.skip("a box of several rows or columns needs stride 1")
    x, w, _ = operands(Case("", (3, 72, 6, 5), (112, 72, 3, 3)), torch.float32)
    dy = torch.randn(F.conv2d(x, w, None, stride, 1).shape)
    formulation = "pixel" if box == (16, 1, 1) else "box"
    with tiles.override(**({"formulation": formulation, "box": box, "block_k": 32, "block_c": 16} | tile)):
        dw = OPS.conv2d_wgrad(dy, x, w.shape, (stride, stride), (1,) * 4, (1, 1), 1, "ieee")
    exact = reference.conv2d_wgrad(x, dy, w.shape, stride, 1)
    assert reference.error(dw, exact) <= 1e-5 * exact.abs().max().item()


@pytest.mark.parametrize("formulation", ["pixel", "box"])
@pytest.mark.parametrize(
    ("window", "tile", "arguments"),
    [
        ((2, 5), {"taps": 5}, {"padding": (1, 2), "dilation": (2, 1)}),  # a program's taps in one row
        ((3, 3), {"taps": 3}, {"padding": 2, "stride": 2}),
        ((3, 3), {"taps": 5}, {"padding": (0, 3), "dilation": (1, 3)}),  # from row to row, none left for one of the ten
        ((1, 3), {"taps": 5}, {"stride": (2, 1)}),  # more than there are
        # The taps that are left over by themselves: two of seven, which is one slice of zeros; one of ten, beside a
        # second product, which leaves two; four of nine; one of nine, of which a program has no pixel.
        ((1, 7), {"taps": 5, "splits": 3, "last": 2}, {"padding": (0, 3)}),
        ((5, 2), {"taps": 3, "block_k2": 16, "splits": 3, "last": 1}, {"padding": (2, 1), "stride": (2, 1)}),
        ((3, 3), {"taps": 5, "splits": 1, "last": 1}, {"padding": 1}),
        ((3, 3), {"taps": 2, "splits": 9, "last": 8}, {"padding": (0, 3), "dilation": (1, 3)}),
    ],
    ids=str,
)
def test_filter_gradients_of_many_taps(window: Any, tile: Any, arguments: dict[str, Any], formulation: str) -> None:
    if formulation == "box" and arguments.get("stride", 1) != 1:
        pytest.skip("a box of several rows or columns needs stride 1")
    x, w, _ = operands(Case("", (3, 80, 4, 5), (48, 40, *window)), torch.float32)
    dy = torch.randn(F.conv2d(x, w, None, groups=2, **arguments).shape)
    defaults = {"stride": 1, "padding": 0, "dilation": 1} | arguments
    stride, padding, dilation = (n if isinstance(n, tuple) else (n, n) for n in defaults.values())
    pads = [side for side in padding for _ in (0, 1)]
    box = (16, 1, 1) if formulation == "pixel" else (4, 2, 4)
    with tiles.override(**{"formulation": formulation, "box": box, "block_k": 32, "block_c": 64, "splits": 2} | tile):
        dw = OPS.conv2d_wgrad(dy, x, w.shape, stride, pads, dilation, 2, "ieee")
    exact = reference.conv2d_wgrad(x, dy, w.shape, stride, [(side, side) for side in padding], dilation, 2)
    assert reference.error(dw, exact) <= 1e-5 * exact.abs().max().item()


@pytest.mark.parametrize("precision", ["ieee", "bf16x6"])
@pytest.mark.parametrize("batch", [32, 20], ids=["steps of whole images", "steps across images"])
def test_filter_gradients_by_pointers(batch: int, precision: str) -> None:
    x, dy = (torch.randn(batch, channels, *size) for channels, size in ((10, (5, 6)), (18, (3, 4))))
    tile = {"formulation": "gather", "box": (16, 1, 1), "block_k": 16, "block_c": 32, "splits": 3}
    with tiles.override(**tile):
        dw = OPS.conv2d_wgrad(dy, x, (18, 5, 3, 2), (2, 1), (1, 1, 0, 0), (1, 2), 2, precision)
    exact = reference.conv2d_wgrad(x, dy, (18, 5, 3, 2), (2, 1), ((1, 1), (0, 0)), (1, 2), 2)
    assert reference.error(dw, exact) <= 1e-5 * exact.abs().max().item()


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=CHANNELS_LAST),
    "sliced channels": lambda t: torch.cat([t, t], 1).contiguous(memory_format=CHANNELS_LAST)[:, : t.shape[1]],
    "misaligned channels": lambda t: torch.cat([t, t], 1).contiguous(memory_format=CHANNELS_LAST)[
        :, 1 : t.shape[1] + 1
    ],
    "every other row": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("formulation", ["box", "gather"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_views_give_torchs_numbers_and_memory_format(kind: str, formulation: str) -> None:
    x, w, b = operands(CASES[0], torch.float32, torch.contiguous_format)
    x = LAYOUTS[kind](x)
    dy = torch.randn(x.shape[0], w.shape[0], *x.shape[2:])
    exact = run(relu_conv(padding=1), x.double(), w.double(), b.double(), dy)
    theirs = run(relu_conv(padding=1), x, w, b, dy)
    with tiles.override(formulation=formulation):
        ours = run(lambda *t: tk.conv2d(*t, padding=1, activation="relu"), x, w, b, dy)
    assert_close(ours, theirs, exact)
    want = F.conv2d(x, w, b, padding=1)
    assert ours[0].stride() == want.stride()


def test_a_weight_that_starts_off_16_bytes() -> None:
    x, w, b = operands(CASES[0], torch.float32)
    storage = torch.empty(w.numel() + 1)
    view = storage[1:].view(w.shape[0], 3, 3, w.shape[1]).permute(0, 3, 1, 2).copy_(w)
    dy = torch.randn(F.conv2d(x, w, padding=1).shape)
    for formulation in conv_tile.FORMULATIONS:
        with tiles.override(formulation=formulation):
            ours = run(lambda *t: tk.conv2d(*t, padding=1), x, view, b, dy)
        assert_close(ours, run(lambda *t: F.conv2d(*t, padding=1), x, w, b, dy), run(
            lambda *t: F.conv2d(*t, padding=1), x.double(), w.double(), b.double(), dy))  # fmt: skip


def test_a_channels_last_weight_makes_the_output_channels_last() -> None:
    x, w, b = operands(CASES[0], torch.float32, torch.contiguous_format)
    y = tk.conv2d(x, w.contiguous(memory_format=CHANNELS_LAST), b, padding=1)
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    assert tk.conv2d(x, w, b, padding=1).is_contiguous()


def test_runs_repeat_to_the_bit_and_leave_what_they_read_alone() -> None:
    x, w, b = operands(CASES[5], torch.float16)
    dy = torch.randn(F.conv2d(x, w, b, **CASES[5].arguments).shape).half()
    copies = [t.clone() for t in (x, w, b, dy)]
    first, second = (run(lambda *t: tk.conv2d(*t, **CASES[5].arguments), x, w, b, dy) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(copies, (x, w, b, dy), strict=True))


def test_empty_batch_and_unbatched_input() -> None:
    w, b = torch.randn(8, 16, 3, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    x = torch.randn(0, 16, 5, 5, requires_grad=True)
    y = tk.conv2d(x, w, b, padding=1, activation="relu")
    assert y.shape == (0, 8, 5, 5)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert w.grad is not None and torch.equal(w.grad, torch.zeros_like(w))
    assert b.grad is not None and torch.equal(b.grad, torch.zeros_like(b))
    image = torch.randn(16, 5, 5)
    torch.testing.assert_close(tk.conv2d(image, w, b), F.conv2d(image, w, b))


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (3, 2)], ids=["3x3", "first layer"])
def test_nan_and_infinity_go_where_torch_sends_them(channels: int, stride: int) -> None:
    x = torch.randn(1, channels, 9, 9)
    x[0, 1, 1, 1] = float("nan")
    x[0, 2, 5, 6] = float("inf")
    w = torch.randn(16, channels, 3, 3)
    want = F.relu(F.conv2d(x, w, stride=stride, padding=1))
    got = tk.conv2d(x, w, stride=stride, padding=1, activation="relu")
    assert want.isnan().any() and want.isinf().any()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


GROUPED = {
    "gather": {"formulation": "gather"},
    "box": {"formulation": "box"},
    "pixel": {"formulation": "pixel"},
    "columns": COLUMNS["two of 24 in 64"] | {"formulation": "box", "block_c": 16},
    "across": {"formulation": "pixel", "box": (16, 2, 1), "block_k": 64, "block_k2": 32, "block_c": 16, "across": True},
}


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("tile", GROUPED.values(), ids=GROUPED)
def test_infinities_of_one_group_stay_in_it(tile: dict[str, Any], precision: str) -> None:
    """24 channels and filters a group leave steps of 16 and 32 a block half full: beside it the next group lies."""
    x, w, _ = operands(Case("", (3, 72, 4, 5), (72, 24, 3, 3)), torch.float32)
    dy, rest = torch.randn(x.shape).to(memory_format=CHANNELS_LAST), ((1, 1), (1,) * 4, (1, 1), 3, precision)

    def groups_of(name: str, x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
        with tiles.override(**tile):
            if name == "y":
                return list(tk.conv2d(x, w, padding=1, groups=3, precision=precision).chunk(3, 1))
            if name == "dx":
                return list(OPS.conv2d_dgrad(dy, w, x.shape, *rest, True).chunk(3, 1))
            return list(OPS.conv2d_wgrad(dy, x, w.shape, *rest).chunk(3, 0))

    spoilt = x.clone(), w.clone(), dy.clone()
    for operand, axis in zip(spoilt, (1, 0, 1), strict=True):
        operand.narrow(axis, 24, 24).fill_(float("inf"))
    for name, (left, right) in {"y": (0, 1), "dx": (1, 2), "dw": (0, 2)}.items():
        if name != "dx" and tile.keys() > {"formulation"}:
            continue  # tiles of input gradients alone
        clean = groups_of(name, x, w, dy)
        for one in (left, right):
            operand = [spoilt[i] if i == one else whole for i, whole in enumerate((x, w, dy))]
            first, own, last = groups_of(name, *operand)
            assert not own.isfinite().all(), name
            assert torch.equal(first, clean[0]) and torch.equal(last, clean[2]), name


def test_patches_by_blocks_read_nothing_beside_their_windows() -> None:
    x, w, b = operands(Case("", (2, 3, 9, 8), (24, 3, 4, 4)), torch.float32)
    x[:, :, 8] = float("nan")  # no window holds this row
    exact = F.conv2d(x.double(), w.double(), b.double(), stride=4)
    with tiles.override(formulation="box"):
        y = tk.conv2d(x, w, b, stride=4)
        x[1, 2, 5, 2] = float("nan")
        holed = tk.conv2d(x, w, b, stride=4).isnan()
    assert exact.isfinite().all() and reference.error(y, exact) <= 1e-5 * exact.abs().max().item()
    assert holed[1, :, 1, 0].all() and holed.sum() == w.shape[0]


@pytest.mark.parametrize(
    ("formulation", "memory_format"), [("pixel", torch.contiguous_format), ("box", CHANNELS_LAST)], ids=["pixel", "box"]
)
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "padding"),
    [
        ((3, 3, 9, 11), (24, 3, 5, 7), (2, 3)),
        ((2, 1, 8, 7), (16, 1, 4, 5), (0, 1)),
        ((2, 2, 5, 6), (40, 2, 1, 3), (1, 0)),
    ],
    ids=["7x5", "one channel", "a row"],
)
def test_first_layers_without_a_stride_by_rows_of_their_windows(
    x_shape: Any, w_shape: Any, padding: tuple[int, int], formulation: str, memory_format: Any
) -> None:
    x, w, b = operands(Case("", x_shape, w_shape), torch.float32, memory_format)
    exact = F.conv2d(x.double(), w.double(), b.double(), padding=padding)
    dy = torch.randn(exact.shape)
    with tiles.override(formulation=formulation):
        y = tk.conv2d(x, w, b, padding=padding)
        dw = OPS.conv2d_wgrad(dy, x, w.shape, (1, 1), [p for p in padding for _ in (0, 1)], (1, 1), 1, "ieee")
        assert reference.error(y, exact) <= 1e-5 * exact.abs().max().item()
        exact = reference.conv2d_wgrad(x, dy, w.shape, 1, padding)
        assert reference.error(dw, exact) <= 1e-5 * exact.abs().max().item()
        x[-1, 0, 3, 2] = float("nan")
        holed = tk.conv2d(x, w, b, padding=padding).isnan()
    assert torch.equal(holed, F.conv2d(x, w, b, padding=padding).isnan())


def test_first_layers_without_a_stride_go_by_blocks_where_the_model_has_them_quicker() -> None:
    window = ((3, 3), (3, 3))
    large, small = Conv2dProblem(32, 3, 64, 64, 64, 7, 7, padding=window), Conv2dProblem(64, 3, 224, 224, 64, 3, 3)

    def by_blocks(problem: Conv2dProblem, pass_: str = "fprop", gpu: str = "H100") -> bool:
        return tiles.first_layer(problem, pass_, torch.float16, "ieee", hardware.GPUS[gpu])

    assert by_blocks(large) and not by_blocks(large, "wgrad"), "pointers wait there, and are modelled quicker"
    assert by_blocks(replace(large, N=1)), "the batch has no say"
    others = [small, replace(large, dilation=(2, 2)), replace(large, R=1, S=1, padding=((0, 0), (0, 0)))]
    assert not any(by_blocks(problem) for problem in others) and not by_blocks(large, gpu="A100")


def test_patches_of_plain_fp32_go_by_blocks_where_the_model_has_them_quicker() -> None:
    patches = Conv2dProblem(32, 3, 224, 224, 768, 16, 16, (16, 16))
    padded, overlapping = replace(patches, padding=((8, 8), (8, 8))), replace(patches, R=17)

    def by_blocks(problem: Conv2dProblem, pass_: str = "fprop", gpu: str = "H100") -> bool:
        return tiles.first_layer(problem, pass_, torch.float32, "ieee", hardware.GPUS[gpu])

    assert by_blocks(patches) and by_blocks(replace(patches, N=1))
    others = [by_blocks(padded), by_blocks(overlapping), by_blocks(patches, "wgrad"), by_blocks(patches, gpu="A100")]
    assert not any(others)
    assert not by_blocks(Conv2dProblem(32, 1, 28, 28, 64, 7, 7, (7, 7))), "too small for two more kernels"


@pytest.mark.parametrize("groups", [1, 2])
def test_programs_that_read_nothing_give_zero(groups: int) -> None:
    """A kernel goes through its loop once even there, and must meet no element: an infinite one would leave NaN."""
    x = torch.full((16, 32, 1, 2), torch.inf).contiguous(memory_format=CHANNELS_LAST)
    w, b = torch.full((32, 32 // groups, 1, 1), torch.inf), torch.randn(32)
    with tiles.override(formulation="pixel"):
        y = tk.conv2d(x, w, b, padding=(1, 2), groups=groups)
        pooled = tk.conv2d_max_pool2d(x, w, b, padding=(1, 2), groups=groups, pool_kernel_size=1)
        around = torch.ones(y.shape[2:], dtype=torch.bool)
        around[1, 2:4] = False
        assert torch.equal(y[..., around], b[:, None].expand(16, -1, int(around.sum())))
        assert torch.equal(pooled, y.relu()) and (y[..., ~around] == torch.inf).all()
        problem = Conv2dProblem(16, 32, 1, 2, 32, 3, 3, padding=((1, 1), (1, 1)), groups=groups)
        dy = torch.full(problem.y_shape, torch.inf).contiguous(memory_format=CHANNELS_LAST)
        dw = OPS.conv2d_wgrad(dy, x, problem.w_shape, [1, 1], [1, 1, 1, 1], [1, 1], groups, "ieee")
    assert (dw[:, :, ::2] == 0).all(), "a filter's first and last row never meet the image's only one"
    assert (dw[:, :, 1] == torch.inf).all()


def test_linear_with_relu() -> None:
    x, w, b = torch.randn(3, 5, 37), torch.randn(11, 37), torch.randn(11)
    exact = run(lambda *t: F.relu(F.linear(*t)), x.double(), w.double(), b.double(), None)
    theirs = run(lambda *t: F.relu(F.linear(*t)), x, w, b, None)
    assert_close(run(lambda *t: tk.linear(*t, activation="relu"), x, w, b, None), theirs, exact)
    assert tk.linear(torch.randn(0, 37), w, b).shape == (0, 11)
    torch.testing.assert_close(tk.linear(x[0, 0], w), F.linear(x[0, 0], w))
