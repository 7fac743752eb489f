"""The cost model against published speeds, and the chooser: pure, valid, quick."""

from __future__ import annotations

import time

import pytest
import torch

from tileconv.bench import published
from tileconv.kernels import conv_tile, cost, hardware, tiles
from tileconv.kernels.geometry import Conv2dProblem

H100 = hardware.GPUS["H100"]
ALEXNET = {
    "conv2": (64, 27, 192, 5, 2),
    "conv3": (192, 13, 384, 3, 1),
    "conv4": (384, 13, 256, 3, 1),
    "conv5": (256, 13, 256, 3, 1),
}


def layer(name: str, batch: int = 128, dilation: int = 1) -> Conv2dProblem:
    C, H, K, R, pad = ALEXNET[name]
    pad *= dilation
    return Conv2dProblem(batch, C, H, H, K, R, R, padding=((pad, pad), (pad, pad)), dilation=(dilation, dilation))


def modelled(problem: Conv2dProblem, pass_: str, dtype: torch.dtype = torch.float16, precision: str = "ieee") -> float:
    parts = [part.problem for part in problem.dgrad] if pass_ == "dgrad" else [problem]
    chosen = [(part, tiles.choose(part, pass_, dtype, precision, H100)) for part in parts]
    return sum(cost.predict(part, pass_, tile, dtype, precision, H100).modelled_us for part, tile in chosen)


# The model's constants come from figures of this kind, so this holds the calibration; it is no independent test.
@pytest.mark.parametrize("gemm", published.GEMMS, ids=lambda gemm: f"depth {gemm.depth}")
def test_published_gemm_speeds_come_out_within_15_percent(gemm: published.Gemm) -> None:
    assert published.modelled_tflops(gemm) == pytest.approx(gemm.tflops, rel=0.15)


def test_idle_sms_in_the_last_wave_are_counted() -> None:
    # 169 programs on 132 SMs work for two waves.
    tile = conv_tile.ConvTile("pixel", (128, 1, 1), 256, 64, 8, 3)
    predicted = cost.predict(layer("conv4"), "fprop", tile, torch.float16, "ieee", H100)
    assert predicted.ctas == 169
    assert predicted.wave_efficiency == pytest.approx(169 / 264)


def test_floors_are_the_arithmetic_of_the_data_sheet() -> None:
    conv2, conv5 = layer("conv2"), layer("conv5")
    assert cost.floor_us(conv2, torch.float16, "ieee", H100) == pytest.approx(57.3e9 / 989e12 * 1e6, rel=0.01)
    assert cost.floor_us(conv5, torch.float32, "tf32", H100) == pytest.approx(25.5e9 / 495e12 * 1e6, rel=0.01)


def test_skipped_taps_are_not_paid_for() -> None:
    tile = conv_tile.ConvTile("pixel", (128, 1, 1), 64, 64, 4, 4)
    predicted = cost.predict(layer("conv2"), "fprop", tile, torch.float16, "ieee", H100)
    assert predicted.flops_done / predicted.flops_needed == pytest.approx(1 - 0.087, abs=0.001)
    box = conv_tile.ConvTile("box", (8, 4, 4), 64, 64, 4, 4)
    assert cost.predict(layer("conv2"), "fprop", box, torch.float16, "ieee", H100).flops_done > predicted.flops_done


@pytest.mark.parametrize("name", ALEXNET)
def test_fprop_is_modelled_within_175_percent_of_the_floor(name: str) -> None:
    problem = layer(name)
    assert modelled(problem, "fprop") <= 1.75 * cost.floor_us(problem, torch.float16, "ieee", H100)


def test_alexnets_passes_together_are_modelled_within_their_limits() -> None:
    floors = sum(cost.floor_us(layer(name), torch.float16, "ieee", H100) for name in ALEXNET)
    assert sum(modelled(layer(name), "fprop") for name in ALEXNET) <= 1.6 * floors
    assert sum(modelled(layer(name), "wgrad") for name in ALEXNET) <= 1.85 * floors


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("name", ALEXNET)
def test_small_batches_use_half_the_gpu(name: str, batch: int) -> None:
    problem = layer(name, batch)
    tile = tiles.choose(problem, "fprop", torch.float16, "ieee", H100)
    assert cost.predict(problem, "fprop", tile, torch.float16, "ieee", H100).ctas >= H100.sms / 2


@pytest.mark.parametrize("gpu", ["A100", "H100"])
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_linear_layers_of_small_batches_leave_few_rows_empty_in_plain_fp32(batch: int, gpu: str) -> None:
    for channels, filters in ((9216, 4096), (4096, 4096), (4096, 1000)):
        problem = Conv2dProblem(batch, channels, 1, 1, filters, 1, 1)
        tile = tiles.choose(problem, "fprop", torch.float32, "ieee", hardware.GPUS[gpu])
        assert tile.pixels == 16, tile
        if filters == 4096:  # the weights from DRAM, and little else
            predicted = cost.predict(problem, "fprop", tile, torch.float32, "ieee", hardware.GPUS[gpu])
            assert predicted.modelled_us <= 1.2 * predicted.floor_us, tile


def test_products_on_ordinary_cores_wait_for_a_single_buffer() -> None:
    one, two = (conv_tile.ConvTile("pixel", (128, 1, 1), 128, 32, 8, stages) for stages in (2, 3))
    waits, runs = (cost.predict(layer("conv4"), "fprop", tile, torch.float32, "ieee", H100) for tile in (one, two))
    assert waits.ctas_per_sm == runs.ctas_per_sm == 1
    assert waits.modelled_us > 1.1 * runs.modelled_us


@pytest.mark.parametrize("gpu", ["A100", "H100"])
def test_operands_that_come_in_pieces_are_paid_for_each(gpu: str) -> None:
    tile = conv_tile.ConvTile("gather", (128, 1, 1), 64, 32, 8, 4)

    def modelled(pass_: str, channels: int, filters: int) -> cost.Prediction:
        problem = Conv2dProblem(64, channels, 28, 28, filters, 3, 3, padding=((1, 1), (1, 1)))
        return cost.predict(problem, pass_, tile, torch.float16, "ieee", hardware.GPUS[gpu])

    for pass_ in ("fprop", "dgrad"):
        even, odd = modelled(pass_, 256, 256), modelled(pass_, 255, 256)
        assert odd.modelled_us > 1.1 * even.modelled_us and odd.issue_us > 1.3 * even.issue_us
    eight, four, two = (modelled("fprop", channels, 256) for channels in (252, 254, 255))  # bytes at a time
    assert even.issue_us < eight.issue_us < four.issue_us < two.issue_us
    assert four.modelled_us < 0.95 * two.modelled_us, "four bytes are copied ahead, two are waited for"
    # An input gradient's filters lie across: their rows begin with the channels that are made.
    filters, both = modelled("dgrad", 256, 255), modelled("dgrad", 255, 255)
    assert even.issue_us < filters.issue_us < odd.issue_us < both.issue_us
    assert modelled("fprop", 256, 255).issue_us == pytest.approx(modelled("fprop", 256, 256).issue_us)


def test_dilation_costs_nothing_at_equal_output_size() -> None:
    # A map so large that few taps lie in its padding: there dilation would skip work, and seem faster.
    times = []
    for dilation in (1, 2, 4, 8, 16):
        problem = Conv2dProblem(128, 64, 64 + 2 * dilation, 64 + 2 * dilation, 128, 3, 3, dilation=(dilation, dilation))
        assert problem.y_shape == (128, 128, 64, 64)
        times.append(modelled(problem, "fprop"))
    assert max(times) <= 1.03 * min(times)


@pytest.mark.parametrize("gpu", hardware.GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("pass_", conv_tile.PASSES)
def test_every_choice_is_valid_and_fits(pass_: str, gpu: hardware.GPU) -> None:
    for dtype, precision in ((torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
        for batch in (1, 128):
            for name in ALEXNET:
                problem = layer(name, batch)
                tile = tiles.choose(problem, pass_, dtype, precision, gpu)
                assert conv_tile.why_invalid(tile, problem, pass_, dtype, precision, gpu) is None
                columns = tile.block_c * tile.taps if pass_ == "wgrad" else tile.pixels
                depth = tile.pixels if pass_ == "wgrad" else tile.block_c
                stage = (tile.rows + columns) * depth * dtype.itemsize
                if tile.formulation != "gather":
                    assert tile.num_stages * stage + 1024 <= gpu.shared_block
                assert tile.rows * columns // (32 * tile.num_warps) <= 192


def test_choosing_is_pure_and_quick_after_the_first_time() -> None:
    problem = layer("conv3")
    first = tiles.choose(problem, "fprop", torch.float16, "ieee", H100)
    start = time.perf_counter()
    for _ in range(100):
        again = tiles.choose(layer("conv3"), "fprop", torch.float16, "ieee", H100)
    assert again == first
    assert (time.perf_counter() - start) / 100 < 100e-6


def test_occupancy_follows_the_hardwares_granules() -> None:
    assert cost.occupancy(154, 131_104, 4, H100) == 1  # shared memory
    assert cost.occupancy(90, 49_000, 4, H100) == 4
    assert cost.occupancy(255, 10_000, 8, H100) == 1  # 8 warps x 8,192 registers
    assert cost.occupancy(32, 0, 4, H100) == 16  # 64 warps
    assert cost.occupancy(32, 0, 4, hardware.GPUS["RTX 4090"]) == 12  # 48 warps
