"""Convolutions with a max-pool behind their ReLU: modelled as one kernel and as two, and what training keeps.

`python -m tileconv.bench.fused` prints the table for the networks below.  Times are modelled, never measured.
"""

from __future__ import annotations

import argparse
import math
from functools import cache
from typing import Any

import torch

from .cases import DTYPES, conv_problem, precision_of
from .networks import Shape, known
from .problems import conv_pool_problem

VGG = {"conv1_2": (64, 224), "conv2_2": (128, 112), "conv3_3": (256, 56), "conv4_3": (512, 28), "conv5_3": (512, 14)}
HEAD = ("layer", "pool", "runs as", "one, us", "two, us", "kept apart, MB", "kept fused, MB", "saved, MB")


@cache
def fused_layers(batch: int) -> tuple[Shape, ...]:
    """Conv2d, ReLU and MaxPool2d of AlexNet, VGG-16, GoogLeNet and LeNet-5, as the layers that convert() makes."""
    layers: dict[str, tuple[int, int, tuple[int, ...], tuple[Any, ...]]] = {
        "alexnet.conv1": (3, 224, (64, 11, 4, 2), (3, 2)),
        "alexnet.conv2": (64, 27, (192, 5, 1, 2), (3, 2)),
        "alexnet.conv5": (256, 13, (256, 3, 1, 1), (3, 2)),
        **{f"vgg16.{name}": (width, size, (width, 3, 1, 1), (2, 2)) for name, (width, size) in VGG.items()},
        "googlenet.conv1": (3, 224, (64, 7, 2, 3), (3, 2, 0, 1, True)),
        "googlenet.conv3": (64, 56, (192, 3, 1, 1), (3, 2, 0, 1, True)),
        "lenet5.conv1": (1, 28, (6, 5, 1, 2), (2, 2)),
        "lenet5.conv2": (6, 14, (16, 5), (2, 2)),
    }
    from tileconv.kernels.modules_fused import ConvReLUMaxPool2d

    make: Any = ConvReLUMaxPool2d
    names = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode")
    with torch.device("meta"):
        return tuple(
            Shape(name, "conv2d_max_pool2d",
                  make(channels, *settings, **dict(zip(names, pool, strict=False))),
                  (batch, channels, size, size), "relu")
            for name, (channels, size, settings, pool) in layers.items()
        )  # fmt: skip


def launch(shape: Shape, dtype: str, gpu: Any) -> Any:
    """The one kernel that such a layer can run as, on meta tensors and with switches, also where two are faster."""
    from tileconv.kernels.launch.conv_pool import plan_conv_pool

    def image(extents: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        return torch.empty(extents, dtype=kind, device="meta", memory_format=torch.channels_last)

    problem, pool, kind = conv_problem(shape), conv_pool_problem(shape), DTYPES[known("dtype", dtype, DTYPES)]
    x, w, y = (image(extents, kind) for extents in (problem.x_shape, problem.w_shape, pool.y_shape))
    bias, switch = torch.empty(problem.K, dtype=kind, device="meta"), image(pool.y_shape, torch.uint8)
    return plan_conv_pool(problem, pool, x, w, bias, y, switch, gpu=gpu, precision=precision_of(dtype))


def kept_bytes(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """What backward keeps of the outputs between a convolution and its pool: as separate layers, and as one.

    Apart, the convolution's output and a byte a pooled value.  As one, the pooled values, which the next layer keeps
    too if it is trained, and the byte.  The convolution's input is kept by both.
    """
    pool = conv_pool_problem(shape)
    outputs = math.prod(pool.y_shape)
    return dtype.itemsize * math.prod(conv_problem(shape).y_shape) + outputs, (dtype.itemsize + 1) * outputs


def row(shape: Shape, dtype: str, gpu: Any) -> dict[str, Any]:
    """One line of the table; times are None where one kernel cannot run."""
    from tileconv.kernels import pool_tiles

    known("dtype", dtype, DTYPES)
    operands = (conv_problem(shape), conv_pool_problem(shape), DTYPES[dtype], precision_of(dtype), gpu)
    reason = pool_tiles.why_separate(*operands)
    possible = pool_tiles.why_impossible(*operands) is None
    one, two = pool_tiles.modelled_us(*operands) if possible else (None, None)
    apart, fused = kept_bytes(shape, DTYPES[dtype])
    return {"layer": shape.name, "pool": shape.module.pool, "fused": reason is None, "why": reason, "one_us": one,
            "two_us": two, "kept_apart": apart, "kept_fused": fused}  # fmt: skip


def table(batch: int, dtype: str, gpu: Any) -> str:
    """All layers as a Markdown table, with the reasons of those that one kernel cannot run below it."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    notes = []
    for shape in fused_layers(batch):
        found = row(shape, dtype, gpu)
        pool = found["pool"]
        times = ["-" if us is None else f"{us:.0f}" for us in (found["one_us"], found["two_us"])]
        kept = [found["kept_apart"], found["kept_fused"], found["kept_apart"] - found["kept_fused"]]
        cells = [found["layer"], f"{pool.kernel_size}/{pool.stride}", "one" if found["fused"] else "two", *times]
        lines.append("| " + " | ".join([*cells, *(f"{size / 1e6:.1f}" for size in kept)]) + " |")
        if found["one_us"] is None:
            notes.append(f"{found['layer']}: {found['why']}.")
    return "\n".join([*lines, "", *notes])


def main() -> None:
    """Print the table."""
    from tileconv.kernels import hardware

    parser = argparse.ArgumentParser(prog="python -m tileconv.bench.fused", description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="fp16", choices=[name for name in DTYPES if name != "fp64"])
    parser.add_argument("--gpu", default="H100", choices=list(hardware.GPUS))
    arguments = parser.parse_args()
    print(f"{arguments.gpu}, {arguments.dtype}, batch {arguments.batch}; times are modelled\n")
    print(table(arguments.batch, arguments.dtype, hardware.GPUS[arguments.gpu]))


if __name__ == "__main__":
    main()
