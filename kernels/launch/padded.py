"""Channel counts whose rows begin between multiples of 16 bytes, filled up with zeros: copies, then a product of these.

Tensor descriptors do not reach 255 channels of fp16, nor do 16-byte copies: pointers fetch them two bytes at a time.
As compiled for sm_80 and sm_90 such loads are not asked for ahead: each step waits for memory, and takes two loads or
stores and five instructions for each element.  What is copied are the pass's inputs: beside its operands a pass takes
the memory of one more x (fprop), dy (dgrad) or of both (wgrad), each only where its own count is odd, and of one more
w.  Outputs y and dx are written where they lie, by pointers where no descriptor fits; dw, whose partial sums are
written many times, is narrowed at the end: stored by pointers, its sums' addresses fill the registers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch

from tileconv.kernels import conv_tile, cost, fp32, layout, tiles
from tileconv.kernels.geometry import Conv2dProblem, DgradPart
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch.common import Launch
from tileconv.kernels.launch.layout import in_channels_last, plan_widen
from tileconv.kernels.launch.plans import scratch
from tileconv.kernels.run_tiles import TYPICAL_BATCH

MULTIPLE = 16  # whole sectors of DRAM, and the divisor by which Triton specialises: descriptors need 16 bytes alone
FEWEST = 16  # channels and filters: below, boxes of 64 channels would be mostly empty


def applies(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU, *, batch_invariant: bool = False
) -> bool:
    """Whether a pass of a layer (in dgrad not the rephrased one) runs on padded copies of what it reads.

    That is where only the count of channels keeps it from tensor descriptors or 16-byte copies, and the model finds the
    copies and their product quicker.  With batch_invariant it finds that for one batch size for all of them.
    """
    able = fp32.on_tensor_cores(dtype, precision) and problem.groups == 1 and min(problem.C, problem.K) >= FEWEST
    if not able or tiles.forced() or conv_tile.addressable(problem, pass_, fp32.multiplied(dtype, precision)):
        return False
    if gpu.interprets:
        return True
    return _quicker(replace(problem, N=TYPICAL_BATCH) if batch_invariant else problem, pass_, dtype, precision, gpu)


def problems(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str) -> list[tuple[Conv2dProblem, str]]:
    """What the products solve instead, each with the pass that tiles are chosen for.

    In dgrad that is fprop: the copy of the filters has them transposed.
    """
    if pass_ == "dgrad":
        return [(part.problem, "fprop") for part in parts(problem, dtype, precision)]
    channels, filters = (_padded(count, dtype, precision) for count in (problem.C, problem.K))
    return [(replace(problem, C=channels, K=problem.K if pass_ == "fprop" else filters), pass_)]


def parts(problem: Conv2dProblem, dtype: torch.dtype, precision: str) -> list[DgradPart]:
    """problem.dgrad for operands from `image` and `transposed_filters`."""
    return [
        replace(
            part,
            problem=replace(part.problem, C=_padded(problem.K, dtype, precision), together=False),
            filters=replace(part.filters, transposed=False),
        )
        for part in problem.dgrad
    ]


def image(x: torch.Tensor, precision: str, gpu: GPU) -> tuple[torch.Tensor, list[Launch]]:
    """x [N, C, H, W], any strides, or its copy in which C is a multiple of 16, and what fills that."""
    channels = _padded(x.shape[1], x.dtype, precision)
    if channels == x.shape[1]:
        return x, []
    copy, launches = in_channels_last(x, gpu=gpu, channels=channels)
    if launches:
        return copy, launches
    copy = scratch(layout.empty_image((x.shape[0], channels, *x.shape[2:]), x, channels_last=True))
    return copy, [plan_widen(x.permute(0, 2, 3, 1), copy.permute(0, 2, 3, 1), gpu=gpu)]


def transposed_filters(w: torch.Tensor, precision: str, gpu: GPU) -> tuple[torch.Tensor, list[Launch]]:
    """The filters [K, C, R, S] as those of an input gradient, [C, K filled up, R, S], and the launch."""
    turned, filters = w.transpose(0, 1), _padded(w.shape[0], w.dtype, precision)
    copy = scratch(layout.empty_image((w.shape[1], filters, *w.shape[2:]), w, channels_last=True))
    return copy, [plan_widen(turned.permute(0, 2, 3, 1), copy.permute(0, 2, 3, 1), gpu=gpu)]


def plan_narrow(wide: torch.Tensor, dw: torch.Tensor, *, gpu: GPU) -> Launch:
    """The launch that writes dw [K, C, R, S] (channels_last) from its filters and channels in `wide`."""
    return plan_widen(wide[: dw.shape[0]].permute(0, 2, 3, 1), dw.permute(0, 2, 3, 1), gpu=gpu)


def _padded(channels: int, dtype: torch.dtype, precision: str) -> int:
    read = fp32.multiplied(dtype, precision)
    return -(-channels // MULTIPLE) * MULTIPLE if channels * read.itemsize % 16 else channels


@lru_cache(maxsize=1024)
def _quicker(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> bool:
    as_it_is = [(part.problem, pass_) for part in problem.dgrad] if pass_ == "dgrad" else [(problem, pass_)]
    before, after = (
        sum(
            cost.predict(own, as_, tiles.choose(own, as_, dtype, precision, gpu), dtype, precision, gpu).modelled_us
            for own, as_ in found
        )
        for found in (as_it_is, problems(problem, pass_, dtype, precision))
    )
    copies = sum(cost.streaming_us(moved, gpu) for moved in _copied(problem, pass_, dtype, precision))
    return copies + after < before


def _copied(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str) -> list[int]:
    """Bytes read and written by each copy."""
    channels, filters = (_padded(count, dtype, precision) for count in (problem.C, problem.K))
    x = problem.N * problem.H * problem.W * (problem.C + channels)
    dy = problem.N * problem.P * problem.Q * (problem.K + filters)
    elements = []
    if pass_ != "dgrad" and channels != problem.C:
        elements.append(x)
    if pass_ != "fprop" and filters != problem.K:
        elements.append(dy)
    elements.append(2 * math.prod(problem.w_shape))
    return [dtype.itemsize * count for count in elements]
