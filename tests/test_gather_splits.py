"""Pointer kernels whose programs share the depth of a tile: numbers, bits, what is refused, and when it is chosen."""

from __future__ import annotations

from dataclasses import replace
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


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN in an image whose rows and columns lie apart."""
    n, c, h, w = shape
    return torch.full((n, 2 * h, 3 * w, c), torch.nan, dtype=dtype).permute(0, 3, 1, 2)[:, :, ::2, ::3]


def run(launches: list[Any], scratch: list[Tensor]) -> list[str]:
    for tensor in scratch:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
    for launch in launches:
        launch.run()
    return [launch.kernel.__name__ for launch in launches]


@pytest.mark.skipif(not hardware.interpreting(), reason="plans for Triton's interpreter")
@pytest.mark.parametrize(
    ("dtype", "precision", "groups", "splits", "allowed"),
    [
        (torch.float32, "ieee", 1, 7, 1e-6),  # 18 steps in shares of three: the last has none
        (torch.float16, "ieee", 2, 4, 1e-3),
        (torch.float64, "ieee", 2, 9, 1e-15),  # 12 steps in shares of two: the last three have none
        (torch.float32, "bf16x6", 1, 5, 1e-6),
    ],
    ids=["fp32", "fp16", "fp64", "bf16x6"],
)
def test_numbers_against_float64(dtype: torch.dtype, precision: str, groups: int, splits: int, allowed: float) -> None:
    problem = Conv2dProblem(2, 40, 5, 4, 26, 3, 2, (2, 1), ((1, 1), (1, 1)), groups=groups)
    x, w, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
                for shape in (problem.x_shape, problem.w_shape, problem.y_shape))  # fmt: skip
    bias = torch.randn(problem.K).to(dtype)
    y, dx = poisoned(problem.y_shape, dtype), poisoned(problem.x_shape, dtype)
    settings: dict[str, Any] = {"gpu": INTERPRETER, "precision": precision}
    with tiles.override(**SMALL, splits=splits):
        with plans.allocations() as scratch:
            launches = launch_conv.plan_fprop(problem, x, w, bias, y, activation="relu", **settings)
        assert run(launches, scratch)[-2:] == ["fprop_gather", "fprop_finish"]
        with plans.allocations() as scratch:
            launches = launch_conv.plan_dgrad(problem, dy, w, dx, **settings)
        assert run(launches, scratch)[-4:] == ["fprop_gather", "fprop_finish"] * 2, "a residue after the other"
    exact = F.relu(F.conv2d(x.double(), w.double(), bias.double(), (2, 1), 1, 1, groups))
    gradient = reference.conv2d_dgrad(dy, w, problem.x_shape, (2, 1), ((1, 1), (1, 1)), 1, groups)
    for what, ours, want in (("y", y, exact), ("dx", dx, gradient)):
        error = reference.error(ours, want)
        assert error <= allowed * want.abs().max().item(), f"{what}: error {error:.3g}"
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
