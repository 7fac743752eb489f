"""Pointer kernels whose programs share the depth of a tile: numbers, bits, what is refused, and when it is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import conv_tile, cost, hardware, reference, tiles
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv as launch_conv
from tileconv.kernels.launch import plans

OPS = torch.ops.tileconv
INTERPRETER = hardware.INTERPRETER
SMALL: dict[str, Any] = {"formulation": "gather", "box": (16, 1, 1), "block_k": 16, "block_c": 16, "flat": False}


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, contiguous: bool) -> Tensor:
    """NaN in an image, contiguous or with rows and columns that lie apart."""
    n, c, h, w = shape
    if contiguous:
        return torch.full(shape, torch.nan, dtype=dtype)
    return torch.full((n, 2 * h, 3 * w, c), torch.nan, dtype=dtype).permute(0, 3, 1, 2)[:, :, ::2, ::3]


def run(launches: list[Any], scratch: list[Tensor]) -> list[str]:
    for tensor in scratch:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
    for launch in launches:
        launch.run()
    return [launch.kernel.__name__ for launch in launches]


@dataclass(frozen=True)
class Sum:
    """A convolution [2, 40, 5, 4] -> 26 filters of `window`, and how far the largest number may be off."""

    dtype: torch.dtype
    splits: int
    allowed: float
    precision: str = "ieee"
    groups: int = 1
    window: tuple[int, int] = (3, 2)
    stride: tuple[int, int] = (2, 1)
    contiguous: bool = False


SUMS = {
    "fp32, 18 steps in shares of 3: the last has none": Sum(torch.float32, 7, 1e-6),
    "fp16 in groups": Sum(torch.float16, 4, 1e-3, groups=2),
    "fp64, 12 steps in shares of 2: the last three have none": Sum(torch.float64, 9, 1e-15, groups=2),
    "bf16x6": Sum(torch.float32, 5, 1e-6, "bf16x6"),
    "fp32 of one tap, contiguous": Sum(torch.float32, 2, 1e-6, window=(1, 1), stride=(1, 1), contiguous=True),
    "bf16x3 of one tap, fewer steps than programs": Sum(torch.float32, 4, 1e-4, "bf16x3", window=(1, 1)),
}


@pytest.mark.skipif(not hardware.interpreting(), reason="plans for Triton's interpreter")
@pytest.mark.parametrize("case", SUMS.values(), ids=SUMS.keys())
def test_numbers_against_float64(case: Sum) -> None:
    pad = tuple((extent // 2, extent // 2) for extent in case.window)
    problem = Conv2dProblem(2, 40, 5, 4, 26, *case.window, case.stride, pad, groups=case.groups)  # type: ignore[arg-type]
    x, w, dy = (torch.randn(shape).to(case.dtype).contiguous(memory_format=torch.channels_last)
                for shape in (problem.x_shape, problem.w_shape, problem.y_shape))  # fmt: skip
    bias = torch.randn(problem.K).to(case.dtype)
    y, dx = (poisoned(shape, case.dtype, case.contiguous) for shape in (problem.y_shape, problem.x_shape))
    settings: dict[str, Any] = {"gpu": INTERPRETER, "precision": case.precision}
    with tiles.override(**SMALL, splits=case.splits):
        with plans.allocations() as scratch:
            launches = launch_conv.plan_fprop(problem, x, w, bias, y, activation="relu", **settings)
        assert run(launches, scratch).count("fprop_finish") == 1
        with plans.allocations() as scratch:
            launches = launch_conv.plan_dgrad(problem, dy, w, dx, **settings)
        assert run(launches, scratch).count("fprop_finish") == len(problem.dgrad), "one for each residue"
    exact = F.relu(F.conv2d(x.double(), w.double(), bias.double(), case.stride, [p for p, _ in pad], 1, case.groups))
    gradient = reference.conv2d_dgrad(dy, w, problem.x_shape, case.stride, pad, 1, case.groups)  # type: ignore[arg-type]
    for what, ours, want in (("y", y, exact), ("dx", dx, gradient)):
        error = reference.error(ours, want)
        assert error <= case.allowed * want.abs().max().item(), f"{what}: error {error:.3g}"
    if not case.contiguous:
        around = torch.as_strided(y, (y.shape[0], 2 * y.shape[2], 3 * y.shape[3], y.shape[1]),
                                  (y.stride(0), y.stride(2) // 2, y.stride(3) // 3, 1))  # fmt: skip
        assert around[:, 1::2].isnan().all() and around[:, :, 1::3].isnan().all(), "written beside the output"


@pytest.mark.skipif(not hardware.interpreting(), reason="small tiles for Triton's interpreter")
def test_a_sample_has_the_same_bits_in_every_batch() -> None:
    x, w = torch.randn(3, 24, 3, 5), torch.randn(20, 24, 2, 2)

    def bits(x: Tensor) -> tuple[Tensor, Tensor]:
        with tiles.override(**SMALL, splits=3):
            y = tk.conv2d(x, w, batch_invariant=True)
            return y, OPS.conv2d_dgrad(y, w, x.shape, (1, 1), (0,) * 4, (1, 1), 1, "ieee", True)

    together = bits(x)
    for i in range(len(x)):
        for whole, alone in zip(together, bits(x[i : i + 1]), strict=True):
            assert torch.equal(whole[i], alone[0]), f"sample {i}"


def test_what_is_refused() -> None:
    x, w = torch.randn(1, 16, 4, 4), torch.randn(16, 16, 1, 1)
    for words, changes in (
        ("needs fprop and dgrad that step through channels", {"splits": 2, "flat": True}),
        ("shared or none", {"splits": 2, "tail": 1}),
        ("no second product", {"block_k": 32, "block_k2": 16}),
    ):
        with pytest.raises(ValueError, match=words), tiles.override(**SMALL | changes):
            tk.conv2d(x, w)


LAYERS = {
    "conv3": Conv2dProblem(1, 192, 13, 13, 384, 3, 3, padding=((1, 1), (1, 1))),
    "conv5": Conv2dProblem(1, 256, 13, 13, 256, 3, 3, padding=((1, 1), (1, 1))),
    "fc8": Conv2dProblem(1, 4096, 1, 1, 1000, 1, 1),
}


def programs(tile: conv_tile.ConvTile, problem: Conv2dProblem) -> int:
    return tile.boxes(problem) * -(-problem.K // tile.block_k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gpu", ["A100", "RTX 3090"])
def test_few_programs_share_their_depth_where_that_is_quicker(gpu: str, name: str, dtype: torch.dtype) -> None:
    device, shared = hardware.GPUS[gpu], []
    for batch in (1, 8, 128):
        problem = replace(LAYERS[name], N=batch)
        found = tiles.ranked(problem, "fprop", None, dtype, "ieee", device)
        best, whole = found[0], next(tile for tile in found if tile.splits == 1)
        times = [cost.predict(problem, "fprop", t, dtype, "ieee", device).modelled_us for t in (best, whole)]
        assert best == whole or times[0] < times[1]
        assert best.splits == 1 or programs(best, problem) < 2 * device.sms
        shared.append(best.splits > 1)
    assert shared[0] or gpu != "A100", "24 to 264 programs of one sample, on 108 SMs"
    assert not shared[-1] or name == "fc8"


@pytest.mark.parametrize("name", LAYERS)
def test_on_sm_80_the_batch_does_not_decide_the_order_of_a_sum(name: str) -> None:
    chosen = {
        tiles.order(
            tiles.choose(replace(LAYERS[name], N=batch), "fprop", torch.float16, "ieee", hardware.GPUS["A100"],
                         batch_invariant=True)
        )
        for batch in (1, 2, 7, 32, 128, 300)
    }  # fmt: skip
    assert len(chosen) == 1


def finish(name: str, batch: int) -> Any:
    """The kernel that adds what the programs of a layer leave on an A100, where three of them share each tile."""
    problem = replace(LAYERS[name], N=batch)
    x, w, y = (torch.empty(shape, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
               for shape in (problem.x_shape, problem.w_shape, problem.y_shape))  # fmt: skip
    with tiles.override(formulation="gather", box=(64, 1, 1), block_k=64, splits=3):
        return launch_conv.plan_fprop(problem, x, w, None, y, gpu=hardware.GPUS["A100"])[-1]


@pytest.mark.parametrize("name", LAYERS)
def test_few_outputs_are_finished_in_smaller_blocks(name: str) -> None:
    few, many = finish(name, 1), finish(name, 256)
    outputs = few.arguments["BLOCK_K"] * few.arguments["BLOCK_P"]
    assert few.grid[0] >= 0.8 * hardware.GPUS["A100"].sms
    assert few.grid[0] * outputs >= math.prod(LAYERS[name].y_shape)
    assert name == "fc8" or many.arguments["BLOCK_K"] > few.arguments["BLOCK_K"]
