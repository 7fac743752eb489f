"""Speeds of GEMMs that others measured and published, beside what the cost model says of the same problem."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gemm:
    """A published product: `size` x `size` outputs, `depth` multiplications each, fp16."""

    size: int
    depth: int
    tflops: float


GPU = "H100"
SOURCE = "Triton's Gluon tutorial 07-persistence, Hopper results, pipelined persistent kernel with 128 x 256 x 64 tiles"
GEMMS = tuple(
    Gemm(8192, depth, tflops)
    for depth, tflops in (
        (512, 539.88), (1024, 602.52), (2048, 625.91), (4096, 640.48), (8192, 661.57), (16384, 670.00),
    )
)  # fmt: skip


def modelled_tflops(gemm: Gemm) -> float:
    """The cost model's speed for a published product, in the tile that was published with it."""
    import torch

    from tileconv.kernels import conv_tile, cost, hardware
    from tileconv.kernels.geometry import Conv2dProblem

    problem = Conv2dProblem(gemm.size, gemm.depth, 1, 1, gemm.size, 1, 1)
    tile = conv_tile.ConvTile("pixel", (256, 1, 1), 128, 64, 8, 3)
    predicted = cost.predict(problem, "fprop", tile, torch.float16, "ieee", hardware.GPUS[GPU])
    return problem.flops / predicted.modelled_us / 1e6


def published_gemms() -> list[dict[str, str | float]]:
    """A row for every published product, as a record holds it."""
    return [
        {
            "problem": f"{g.size} x {g.size} x {g.depth}", "dtype": "fp16", "gpu": GPU, "published_tflops": g.tflops,
            "modelled_tflops": round(modelled_tflops(g), 1), "source": SOURCE,
        }
        for g in GEMMS
    ]  # fmt: skip
