"""The tiles that a chooser weighs: those that compile to clean loops, see tests/test_inspect.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tileconv.kernels import cost, fp32
from tileconv.kernels.conv_tile import MOST_ROWS, ConvTile, addressable, power_of_two, powers
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU, triton_version


def clean_candidates(
    problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU
) -> list[ConvTile]:  # fmt: skip
    """The tiles that compile to clean loops, see tests/test_inspect.py."""
    if not fp32.on_tensor_cores(dtype, precision):
        return _scalar_candidates(problem, pass_, dtype, gpu)
    read = fp32.multiplied(dtype, precision)
    found = _gather_candidates(problem, pass_, read, gpu)
    if gpu.has_descriptors and addressable(problem, pass_, read):
        boxes = (
            _wgrad_candidates(problem, read, gpu) if pass_ == "wgrad" else _box_candidates(problem, pass_, read, gpu)
        )
        found = boxes + found
    return found if read == dtype else _of_parts(problem, pass_, found, precision, gpu)


def _of_parts(problem: Conv2dProblem, pass_: str, tiles: list[ConvTile], precision: str, gpu: GPU) -> list[ConvTile]:
    """Those of the tiles for bf16 that multiply the parts of fp32 without spilling, in sums that are not too long."""
    wgrad = pass_ == "wgrad"
    depth = problem.N * problem.P * problem.Q if wgrad else problem.taps * problem.group_channels
    least = -(-depth // fp32.LONGEST_SUM) if precision == "bf16x6" else 1
    wide = addressable(problem, pass_, torch.bfloat16)
    found = []
    for tile in tiles:
        if tile.last or tile.across:
            continue  # of parts those would be four loops, and these multiply none
        if not wgrad and (tile.narrow or (tile.half and least > 1)):
            continue  # their programs multiply no parts, or share no depth
        size = tile.rows * (tile.channels * tile.taps if wgrad else tile.pixels + tile.pixels // 2 * tile.half)
        if tile.formulation == "gather":  # a step's products have a sum of their own before they are added
            most = (4096 if wgrad else 8192) // (1 if wide else 2)
            if precision == "bf16x6" and tile.splits > 1 and not wgrad:
                most = 2048  # shared, 4096 sums of three parts spill 8 bytes
            if size <= most and (tile.pixels if wgrad else tile.block_c) <= 32:  # steps of 64 spill
                found.append(replace(tile, num_warps=8) if size > 4096 or wgrad or not wide else tile)
            continue
        if gpu.arch >= 100 and (size > 32_768 or tile.taps > 1):
            continue
        if gpu.arch >= 100 and tile.columns > 1 and (tile.half or tile.block_c < 64):
            continue  # 8 to 24 bytes
        # There fp32 outputs line up for their store.
        if not wgrad and 4 * tile.block_k * tile.pixels > gpu.shared_block:
            continue
        if (tile.block_k2 and tile.taps > 1) or (gpu.arch >= 100 and size > 16_384):
            tile = replace(tile, num_warps=8)
        found.append(tile if least == 1 else replace(tile, splits=max(tile.splits, least), tail=0))
    return list(dict.fromkeys(found))


def _depths(channels: int, dtype: torch.dtype) -> list[int]:
    """Steps of 128 bytes of the channels, of 64 if those leave less of a tap's depth empty, of 256 if no more.

    Shorter ones have more barriers than products to hide them: 36 other instructions for each.
    """
    whole = 128 // dtype.itemsize
    by_half, covered, by_two = (-(-channels // depth) * depth for depth in (whole // 2, whole, 2 * whole))
    return [whole] + [whole // 2] * (16 * by_half <= 15 * covered) + [2 * whole] * (by_two == covered)


_MOST_COLUMNS = 8  # of a program: with 5 x 5 taps two thirds of their products are by zero then


def _box_candidates(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    found = []
    # Outputs that no descriptor reaches take an address each: compiled for sm_90, 192 of a thread spill 150 times, 128
    # of four bytes 102 times, and so do 64 where a second way out is for shared tiles.
    odd = problem.group_filters * dtype.itemsize % 16 != 0
    rows_of = [(64, 0, 1), (128, 0, 1), (256, 0, 1), (128, 64, 1), (256, 128, 1)]
    if problem.together and problem.dilation[1] == 1 and not odd:
        together = [(block_k, block_k // problem.group_filters) for block_k in (64, 128, 256)]
        rows_of += [(block_k, 0, own) for block_k, own in together if 1 < own <= _MOST_COLUMNS]
    for depth, pixels, (block_k, block_k2, own), half in itertools.product(
        _depths(problem.group_channels, dtype), (64, 128, 256, 512), rows_of, (False, True)
    ):
        rows, columns = block_k + block_k2, pixels + pixels // 2 * half
        # Sums of 24,576 elements are the most that four warps hold without spilling (219 registers), twice that eight.
        # Compiled for one tap, transposed filters of 128 rows or more wait for every product; 128 + 64 do not.
        if pass_ == "dgrad" and problem.taps == 1 and block_k > 64 and not block_k2:
            continue
        if rows * columns > 49_152 or (own == 1 and 64 < rows > power_of_two(problem.group_filters)):
            continue
        warps = 4 if rows * columns <= (32_768 // dtype.itemsize if odd else 24_576) else 8
        # Columns that do not fill their block leave it by pointers, eight channels beside each other: 128 sums of a
        # thread spill 12 times and up for sm_90.
        by_eight = own > 1 and own * problem.group_filters < block_k and problem.group_filters % 16 > 0
        if by_eight and rows * columns > 96 * 32 * warps:
            continue
        if odd and rows * columns > 65_536 // dtype.itemsize:
            continue
        # Long steps are for small tiles, whose products are few beside a step's barriers: with 64 x 192 13 other
        # instructions for each instead of 22.  Larger tiles have no room for three buffers of them.
        most = max(3, 4 * 128 // (depth * dtype.itemsize))
        if depth * dtype.itemsize > 128 and (rows + columns > 256 or own > 1):
            continue
        stages = min(most, (gpu.shared_block - 2048) // ((rows + columns) * depth * dtype.itemsize))
        if stages < 2:
            continue
        if half and (odd or pixels not in (128, 256)):
            continue
        # For sm_120, whose products take registers, half a box more spills 224 bytes and up, 2 x 128 filters 160, in
        # Triton 3.6 also 128 + 64 filters, 64 to 80.
        if gpu.arch >= 120 and (half or (own > 1 and block_k > 128) or (block_k2 and triton_version() < (3, 7))):
            continue
        short = own > 1 and depth * dtype.itemsize < 128
        if gpu.arch >= 120 and short and (rows * columns == 4096 or triton_version() < (3, 7)):
            continue  # 8 bytes, in Triton 3.6 up to 48
        if dtype.itemsize * block_k * pixels > gpu.shared_block:  # outputs on their way out
            continue
        for box in _columns(problem, pixels, half) if own > 1 else _boxes(problem, pixels):
            formulation = "pixel" if box[1:] == (1, 1) else "box"
            tile = ConvTile(formulation, box, block_k, depth, warps, stages, block_k2=block_k2, columns=own, half=half)
            if half:
                found += [tile] if own > 1 or (box[2] < problem.Q and box[0] * box[2] > 1) else []
                continue
            found += [tile, *_shared_depth(problem, tile, gpu)]
            if stages == most == 4:  # fewer buffers may let one more program onto the SM
                tile = replace(tile, num_stages=3)
                found += [tile, *_shared_depth(problem, tile, gpu)]
    if gpu.arch // 10 == 9 and not odd:
        found += _across_candidates(problem, dtype, gpu)
    if pass_ == "dgrad" and dtype == torch.float32 and gpu.arch // 10 == 9:
        found += _single_warp_tiles(problem, gpu)
    # As with one tap above, compiled for sm_90: where the last 128 of 256 + 128 turned 2-byte filters are shared, their
    # products wait in the loop of 128 alone.
    alone = gpu.arch // 10 == 9 and pass_ == "dgrad" and problem.taps == 1 and dtype.itemsize == 2
    return [tile for tile in found if not (tile.tail and (odd or (alone and tile.narrow and tile.block_k2 > 64)))]


def _across_candidates(problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    """Tiles for what fills one and a half blocks of rows: on Hopper, whose tensor cores take rows in 64s.

    Up to 24,576 sums in four warps, 36,864 in eight: three rows.
    """
    if problem.N < 64:
        return []
    filters, found = problem.group_filters, []
    most = _MOST_COLUMNS if problem.together and problem.dilation[1] == 1 else 1
    for own, depth, images, rows in itertools.product(
        range(1, most + 1), _depths(problem.group_channels, dtype), (64, 128), range(1, MOST_ROWS + 1)
    ):
        pixels = images * rows
        if not 64 < own * filters <= 96 or images > power_of_two(problem.N) or rows > problem.P:
            continue
        if pixels > 384 or depth * dtype.itemsize > 128:
            continue
        stages = min(4, (gpu.shared_block - 2048) // ((96 + pixels) * depth * dtype.itemsize))
        warps = 4 if pixels <= 256 else 8
        if own > 1 and filters % 16 and pixels > 32 * warps:
            continue  # they leave by pointers, eight channels beside each other: 192 sums of a thread spill 96 bytes
        box = images, rows, 1
        tile = ConvTile("pixel", box, 64, depth, warps, stages, block_k2=32, columns=own, across=True)
        found += [replace(tile, num_stages=few) for few in range(2, stages + 1)]
    return found


def _single_warp_tiles(problem: Conv2dProblem, gpu: GPU) -> list[ConvTile]:
    """Tiles of an input gradient in TF32 that multiply by mma.sync, for linear layers: the copy of their filters that
    warp groups need takes longer than their product."""
    if problem.taps * problem.P * problem.Q > 1 or problem.group_filters * 4 % 16:
        return []
    sizes = [(pixels, 64) for pixels in (16, 32, 64, 128)] + [(128, 32), (64, 128)]
    found = [ConvTile("pixel", (pixels, 1, 1), block_k, 32, 2, 4) for pixels, block_k in sizes]
    return found + [one for tile in found for one in _shared_depth(problem, tile, gpu)]


def _boxes(problem: Conv2dProblem, pixels: int) -> list[tuple[int, int, int]]:
    """One pixel of many images, and the boxes that waste fewest pixels."""
    images = min(power_of_two(problem.N), pixels)
    found = [(pixels, 1, 1)] if images == pixels or problem.stride != (1, 1) or problem.P * problem.Q == 1 else []
    if problem.stride != (1, 1):
        return found
    boxes = [
        (n, pixels // n // columns, columns)
        for n in powers(images)
        for columns in powers(min(power_of_two(problem.Q), pixels // n))
        if pixels // n // columns <= power_of_two(problem.P) and (n, columns) != (pixels, 1)
    ]
    return found + sorted(boxes, key=lambda box: (_covered(problem, box), -box[0], box[1]))[:3]


def _columns(problem: Conv2dProblem, pixels: int, half: bool) -> list[tuple[int, int, int]]:
    """Boxes of one column, with `half` with half a box below each."""
    images = min(power_of_two(problem.N), pixels)
    tall = [(n, pixels // n, 1) for n in powers(images) if pixels // n <= power_of_two(problem.P)]
    tall = [box for box in tall if problem.stride[0] == 1 or box[1] == 1]
    if half:
        tall = [box for box in tall if box[1] > 1]
    return sorted(tall, key=lambda box: (_covered(problem, (box[0], box[1] + box[1] // 2 * half, 1)), -box[0]))[:2]


def _covered(problem: Conv2dProblem, box: tuple[int, int, int]) -> int:
    extents = zip((problem.N, problem.P, problem.Q), box, strict=True)
    return math.prod(-(-extent // size) * size for extent, size in extents)


def _shared_depth(problem: Conv2dProblem, tile: ConvTile, gpu: GPU) -> list[ConvTile]:
    """The tile with its depth shared: everywhere, or in boxes where the last wave would leave most SMs idle.

    By pointers where there are no descriptors alone: compiled for sm_90, 128 x 32 sums of fp16 spill 8 bytes, gradients
    of 64 x 128 sums of fp32 16.
    """
    by_pointers = tile.formulation == "gather"
    if by_pointers and (gpu.has_descriptors or tile.flat):
        return []
    programs = tile.boxes(problem) * problem.groups * -(-problem.group_filters // tile.filters)
    steps = problem.taps * -(-problem.group_channels // tile.block_c)
    tail = programs % gpu.sms
    found = [replace(tile, splits=splits) for splits in (2, 3, 4, 6, 8, 12, 16, 24, 32)
             if steps >= 4 * splits and programs * splits <= 4 * gpu.sms]  # fmt: skip
    if tail and programs > gpu.sms and not by_pointers:
        found += [replace(tile, splits=splits, tail=tail) for splits in (2, 3, 4, 6) if steps >= 4 * splits]
        if tile.block_k2:
            found.append(replace(tile, tail=tail))
    return found


def _wgrad_candidates(problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    depth = 128 // dtype.itemsize
    found = []
    # For sm_100 4-byte operands, which are turned on their way, take the shared memory of two more steps.
    turned = 2 if gpu.arch // 10 == 10 and dtype.itemsize == 4 else 0
    # A second loop is compiled for Hopper alone, and for operands that do not pass registers.
    second = gpu.arch // 10 == 9 and (dtype.itemsize == 2 or cost.turned(problem, dtype, "tf32", gpu))
    rows_of = ((64, 0), (128, 0), (256, 0), (128, 64))
    columns_of = ((1, False), (2, False), (3, False), (4, False), (5, False), (1, True))
    for (block_k, block_k2), block_c, (taps, half) in itertools.product(rows_of, (64, 128, 256), columns_of):
        rows, columns = block_k + block_k2, block_c * taps + block_c // 2 * half
        if rows * columns > 49_152 or taps > problem.taps or (half and block_c == 64):
            continue
        left = second and problem.taps % taps > 0
        together = taps <= 2 or 0.9 * taps * -(-problem.taps // taps) < problem.taps
        if not left and not together:
            continue  # the last program's missing taps cost more than what the others share
        if taps > 2 and rows > 128 and (rows * columns > 40_960 or gpu.arch >= 100):
            continue  # 256 x 64 of three taps spill 96 bytes, for sm_100 (128 + 64) x 64 8 bytes
        if gpu.arch >= 100 and not block_k2 and rows * columns > 16_384:
            continue  # compiled for sm_100 the sums' way out of tensor memory spills
        if half and gpu.arch >= 100 and not block_k2:
            continue  # so it does with 64 x (128 + 64): 56 bytes
        if gpu.arch >= 120 and (half or block_k2):
            continue  # compiled for sm_120, whose products take registers, 16 to 1256 bytes spill
        most = dtype.itemsize == 4 and block_k2 > 0 and taps == 2
        as_turned = most or (dtype.itemsize == 4 and half)
        if as_turned and not cost.turned(problem, dtype, "tf32", gpu):
            continue  # 4-byte operands pass registers on their way, and the sums of four products leave too few: spills
        warps = 8 if most or rows * columns + (taps > 2) > (24_576 if gpu.arch < 100 or block_k2 else 8192) else 4
        for box in dict.fromkeys([*_boxes(problem, depth), *_lines(problem, depth)]):
            stages = min(4, (gpu.shared_block - 2048) // ((rows + columns) * 128) - turned) * (depth // math.prod(box))
            if stages < 2:
                continue
            formulation = "pixel" if box[1:] == (1, 1) else "box"
            if (as_turned and formulation == "box") or (taps > 2 and max(box[1:]) > 1):
                continue
            tile = ConvTile(formulation, box, block_k, block_c, warps, stages, block_k2=block_k2, taps=taps, half=half)
            shared = [replace(tile, splits=splits) for splits in _splits(problem, tile, gpu)] if together else []
            # 192 sums a thread and two loops of several groups spill 8 to 72 bytes.
            if left and formulation == "pixel" and rows * columns < 6144 * warps:
                shared += _with_last(problem, tile, gpu)
            if gpu.arch >= 120 and dtype.itemsize == 2 and rows * columns == 4096:
                # Unsplit, the way out of four warps spills 16 bytes.
                shared = [replace(one, num_warps=8) if one.splits == 1 else one for one in shared]
            if gpu.arch >= 120 and dtype.itemsize == 2 and taps > 2 and tile.pixels < depth:
                shared = [one for one in shared if one.splits > 1]  # unsplit, steps of half a box spill 8 bytes there
            found += [one for one in shared if not _waits(one, problem, dtype, gpu)]
    return found


def _lines(problem: Conv2dProblem, pixels: int) -> list[tuple[int, int, int]]:
    """Boxes along one axis, half as long where that covers fewer pixels: how tensor cores take a filter gradient's."""
    along: list[Callable[[int], tuple[int, int, int]]] = [lambda images: (images, 1, 1)]
    if problem.stride == (1, 1) and problem.groups == 1:
        along.append(lambda columns: (1, 1, columns))
    found = []
    for box in along:
        whole, half = box(pixels), box(pixels // 2)
        found.append(half if _covered(problem, half) < _covered(problem, whole) else whole)
    return found


def _waits(tile: ConvTile, problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> bool:
    """Whether a filter gradient's products wait for each other, or spill, as Triton 3.7.1 compiles them for sm_90.

    A box along one axis is the matrix that tensor cores take; another passes registers on its way.  Then ptxas (its
    remark C7515) waits for every product of 128 channels, of 256 where the sums leave as 2-byte elements, and of a
    second row of products; not for those of 64 channels, nor for 256 with splits.  4-byte operands wait in any shape.
    """
    line = tile.box[1:] == (1, 1) or (tile.box[:2] == (1, 1) and problem.groups == 1)
    if line or gpu.arch // 10 != 9:
        return False
    if tile.half:
        return True
    if dtype.itemsize == 4:
        return tile.block_k2 > 0  # with 9 to 52 spills
    return (
        tile.block_c == 128 or (tile.block_c == 256 and tile.splits == 1) or (tile.block_c == 64 and tile.block_k2 > 0)
    )


def _splits(problem: Conv2dProblem, tile: ConvTile, gpu: GPU) -> list[int]:
    """How many programs may share the pixels of one tile of a filter gradient: up to four waves, eight steps each."""
    channels = problem.group_channels * (problem.taps if tile.flat else 1)
    taps = 1 if tile.flat else problem.taps / tile.taps if tile.last else -(-problem.taps // tile.taps)
    programs = -(-channels // tile.channels) * -(-problem.group_filters // tile.rows) * taps * problem.groups
    steps = max(1, problem.N * problem.P * problem.Q // tile.pixels)
    most = max(1, min(steps // 8, math.ceil(4 * gpu.sms / programs)))
    filled = max(1, min(most, int(gpu.sms / programs)))  # one wave
    return sorted({*range(1, min(most, 12) + 1), *(1 << i for i in range(most.bit_length())), filled, most})


def _with_last(problem: Conv2dProblem, tile: ConvTile, gpu: GPU) -> list[ConvTile]:
    """The tile with its pixels shared, where the taps that are left over are made by programs of their own.

    They are as many as take as long as the others, by their products or by what they load, or as many as SMs are idle.
    """
    whole, left = divmod(problem.taps, tile.taps)
    blocks = -(-problem.group_channels // tile.channels) * -(-problem.group_filters // tile.rows) * problem.groups
    loads = tile.rows + left * tile.channels, tile.rows + tile.taps * tile.channels
    found = []
    for splits in _splits(problem, replace(tile, last=1), gpu):
        idle = -(blocks * whole * splits) % gpu.sms // blocks
        shares = -(-splits * left // tile.taps), -(-splits * loads[0] // loads[1]), min(max(idle, 1), splits)
        found += [replace(tile, splits=splits, last=last) for last in sorted(set(shares))]
    return found


def _gather_candidates(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    if pass_ == "wgrad":
        tiles = _gather_gradient_tiles(problem, dtype, gpu)
        return [replace(tile, splits=splits) for tile in tiles for splits in _splits(problem, tile, gpu)]
    if problem.group_channels < 16:
        # Two-byte loads and their addresses fill the registers: 64 filters and 8 warps are the most without spills.
        return [ConvTile("gather", (128, 1, 1), block_k, 32, 8, 2, flat=True) for block_k in (16, 32, 64)]
    # Channels that do not come in 16 bytes are fetched one by one, those of fp16 through registers; filters that do not
    # come in 8 bytes are stored one by one: with four warps 128 x 128 spills 2586 times, 128 x 64 161 times, 128 x 32
    # 144 to 280 bytes; with eight warps 128 x 64 never.
    narrow = not _wide(problem, dtype)
    depth, stages = 64 // dtype.itemsize, _gather_stages(gpu)
    most = 8192 if dtype == torch.float32 or narrow else 16_384
    found = [
        (pixels, block_k, depth, 8 if narrow and pixels * block_k >= 4096 and (pixels, block_k) != (64, 64) else 4)
        for pixels, block_k in itertools.product((64, 128), (16, 32, 64, 128))
        if pixels * block_k <= most
    ]
    if gpu.arch < 90 and not narrow:
        # Twice the depth has twice the products for a step's masks and offsets.  128 x 64 of it takes all registers of
        # four warps, and so do 256 x 64 and 128 x 256: eight.
        found += [(64, 16, 2 * depth, 4), (64, 32, 2 * depth, 4), (64, 64, 2 * depth, 4), (64, 128, 2 * depth, 4)]
        found += [(128, 64, 2 * depth, 8), (128, 128, depth, 8), (128, 128, 2 * depth, 8)]
        if dtype.itemsize == 2:
            found += [(256, 64, depth, 8), (128, 256, depth, 8), (256, 128, depth, 8)]
    tiles = [ConvTile("gather", (pixels, 1, 1), block_k, block_c, warps, stages)
             for pixels, block_k, block_c, warps in found]  # fmt: skip
    alone = (128, 64, 8) if pass_ == "dgrad" and dtype.itemsize == 4 else None  # shared, they spill 8 bytes for sm_86
    shared = [tile for tile in tiles if (tile.pixels, tile.block_k, tile.num_warps) != alone]
    return tiles + [one for tile in shared for one in _shared_depth(problem, tile, gpu)]


def _wide(problem: Conv2dProblem, dtype: torch.dtype) -> bool:
    """Whether pointers fetch channels 16 bytes at a time and store filters 8 at a time."""
    return problem.group_channels * dtype.itemsize % 16 == 0 and problem.group_filters * dtype.itemsize % 8 == 0


def _gather_stages(gpu: GPU) -> int:
    return 4 if gpu.shared_block > 120_000 else 3


def _gather_gradient_tiles(problem: Conv2dProblem, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    """The tiles of a filter gradient, their pixels not yet split."""
    depth = 64 // dtype.itemsize
    if (
        gpu.arch < 90 and _wide(problem, dtype) and problem.N % depth == 0
    ):  # steps of whole images: few registers go into addresses
        sizes = [(32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)]
        found = [(pixels, *size) for pixels in (depth, 2 * depth) if problem.N % pixels == 0 for size in sizes]
        if problem.N % (2 * depth) == 0:
            found.append((2 * depth, 32, 128, 4))  # shorter steps of it spill for sm_89
        if dtype.itemsize == 2:
            found += [(depth, 128, 256, 8), (depth, 256, 128, 8)]
        return [ConvTile("gather", (pixels, 1, 1), block_k, block_c, warps, _gather_stages(gpu), flat=True)
                for pixels, block_k, block_c, warps in found]  # fmt: skip
    spilling = () if _wide(problem, dtype) else _SPILLING.get(100 if gpu.arch // 10 == 10 else gpu.arch, ())
    return [
        ConvTile("gather", (pixels, 1, 1), block_k, block_c, 8, 3, flat=True)
        for pixels, block_k, block_c in itertools.product((depth, 2 * depth), (32, 64, 128), (32, 64, 128))
        if block_k * block_c * dtype.itemsize <= 32_768  # 128 x 128 of 4-byte elements spills
        and (pixels == depth or min(block_k, block_c) == 128)
        and (pixels, block_k, block_c) not in spilling
    ]


# (pixels of a step, filters, channels) of filter gradients by pointers that spill 8 to 56 bytes, compiled for these,
# where channels or filters come one by one.
_SPILLING = {
    80: ((32, 64, 128),),
    86: ((64, 128, 128),),
    89: ((64, 128, 128),),
    100: ((32, 32, 128), (32, 128, 128), (64, 128, 128), (16, 128, 64)),
}


# (pixels, filters, depth of a step, warps): 64 sums a thread, which take 1.12 to 1.16 instructions a product; 32 take
# 1.25, and no more of them fit beside the addresses of elements that come one by one.
_SCALAR = ((64, 64, 16, 2), (128, 64, 16, 4), (64, 128, 16, 4), (128, 128, 16, 8))
_SCALAR_BOXES = (*_SCALAR, (128, 64, 32, 4), (128, 128, 32, 8))
_SCALAR_NARROW = ((64, 64, 16, 4),)
# For small batches and images, whose pixels would leave most rows of those empty: 4 to 32 sums a thread.
_SCALAR_FEW = ((16, 16, 64, 2), (16, 32, 32, 2), (32, 32, 32, 2), (32, 64, 16, 2), (32, 64, 32, 4))
_SCALAR_FEW_NARROW = ((16, 16, 64, 2), (32, 32, 16, 2))
# (pixels of a step, filters, channels, warps)
_SCALAR_WGRAD = ((16, 32, 32, 4), (16, 64, 64, 4), (16, 128, 64, 4), (16, 128, 128, 8))
_SCALAR_WGRAD_WIDE = (*_SCALAR_WGRAD, (16, 64, 128, 4))
_SCALAR_WGRAD_BOXES = (*_SCALAR_WGRAD_WIDE, (32, 64, 64, 4), (32, 128, 128, 8))


def _scalar_candidates(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, gpu: GPU) -> list[ConvTile]:
    """fp64, and fp32 at its own precision: registers, not tensor cores, set the size."""
    wgrad = pass_ == "wgrad"
    flat = wgrad or problem.group_channels < 16
    narrow = not _wide(problem, dtype) or (flat and not wgrad)  # each element has its address

    def stages(pixels: int, one_by_one: bool = False) -> int:
        # One fewer are buffers, and one is filled again when its last product is done: with two stages a step's
        # operands are asked for when it begins.  Those of few products take two other steps to arrive.
        if dtype == torch.float64 or one_by_one:
            return 2
        return 4 if pixels < 64 and not wgrad else 3

    by_pointers: Sequence[tuple[int, int, int, int]]
    by_boxes: Sequence[tuple[int, int, int, int]]
    if wgrad:
        by_pointers, by_boxes = _SCALAR_WGRAD if narrow else _SCALAR_WGRAD_WIDE, _SCALAR_WGRAD_BOXES
    else:
        by_pointers = _SCALAR_NARROW + _SCALAR_FEW_NARROW if narrow else _SCALAR + _SCALAR_FEW
        by_boxes = _SCALAR_BOXES + _SCALAR_FEW
    if dtype == torch.float64:
        by_pointers = ((16, 32, 32, 4),) if wgrad else ((32, 32, 16, 4),)
    if pass_ == "dgrad" and gpu.arch > 80:  # compiled for all but sm_80 and sm_90 turned filters spill 8 or 16 bytes
        spilling = ((64, 64, 16, 2), (128, 64, 16, 4)) if gpu.arch < 90 else ((32, 32, 32, 2), (32, 64, 16, 2))
        by_pointers = [size for size in by_pointers if size not in spilling]
    # With three stages 64 x 64 sums of elements that come one by one spill 8 to 16 bytes, in Triton 3.6 all gradients.
    apart = narrow and wgrad and triton_version() < (3, 7), narrow
    found = [
        ConvTile("gather", (pixels, 1, 1), block_k, block_c, warps, stages(pixels, apart[block_k == 64]), flat=flat)
        for pixels, block_k, block_c, warps in by_pointers
    ]
    if gpu.arch // 10 == 10:  # compiled for sm_100 these spill 8 bytes
        by_boxes = [size for size in by_boxes if size not in ((64, 128, 16, 4), (128, 128, 16, 8), (32, 64, 64, 4))]
    if triton_version() < (3, 7) and not wgrad:  # there the first spills 8 bytes for sm_90, the others 512 for sm_100
        spill = ((32, 64, 16, 2), (128, 64, 32, 4), (128, 128, 32, 8))
        by_boxes = [size for size in by_boxes if size not in spill[: 1 if gpu.arch < 100 else 3]]
    if gpu.has_descriptors and addressable(problem, pass_, dtype):
        found += [
            ConvTile("pixel" if box[1:] == (1, 1) else "box", box, block_k, block_c, warps, stages(pixels))
            for pixels, block_k, block_c, warps in by_boxes
            for box in _boxes(problem, pixels)
            # The pixels of a box pass registers on their way into a filter gradient: more sums spill 328 bytes and up.
            if not wgrad or box[1:] == (1, 1) or pixels * block_k * block_c <= 65_536
        ]
    found = [tile for tile in found if tile.block_k <= max(64, power_of_two(problem.group_filters))]
    if wgrad:
        return [replace(tile, splits=splits) for tile in found for splits in _splits(problem, tile, gpu)]
    # Shared, 64 x 64 sums of elements that come one by one spill 8 bytes.
    large = [tile for tile in found if tile.formulation == "gather" and narrow and tile.block_k == 64]
    return found + [one for tile in found if tile not in large for one in _shared_depth(problem, tile, gpu)]
