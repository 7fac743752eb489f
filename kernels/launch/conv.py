"""Convolution on the host side: describe the operands, choose a tile, launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tileconv.kernels import cost, fp32, hardware, layout, tiles
from tileconv.kernels.conv_tile import ConvTile
from tileconv.kernels.device import conv as device
from tileconv.kernels.device import conv_across, conv_gather, conv_wgrad
from tileconv.kernels.geometry import Conv2dProblem, DgradPart, Filters
from tileconv.kernels.hardware import GPU
from tileconv.kernels.launch import depthwise, padded, runs
from tileconv.kernels.launch.common import TRITON_TYPE, Launch, accumulator, index_type, pitch, strides
from tileconv.kernels.launch.descriptors import (
    aligned,
    describable,
    for_descriptor,
    image_descriptor,
    matrix_descriptor,
    pixel_descriptor,
    row_length,
)
from tileconv.kernels.launch.layout import (
    by_channels_last,
    in_channels_last,
    plan_depth_to_space,
    plan_space_to_depth,
    plan_turn,
    with_channels_first,
)
from tileconv.kernels.launch.plans import scratch
from tileconv.kernels.launch.pointwise import dropout_scale, plan_add_slices
from tileconv.kernels.launch.split import plan_split

NO_DROPOUT: Mapping[str, Any] = {"seed": None, "dropout": None, "scale": None, "DROPOUT": None}


def plan_fprop(
    problem: Conv2dProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    seed: torch.Tensor | None = None,
    *,
    gpu: GPU,
    activation: str | None = None,
    precision: str = "ieee",
    batch_invariant: bool = False,
    dropout: float = 0.0,
) -> list[Launch]:
    """The launches that write y [N, K, P, Q] from x [N, C, H, W] and w [K, C/groups, R, S].

    Strides of x and y are free; a formulation that needs descriptors copies an operand that they cannot address.
    With a seed, for linear layers alone (outputs of one pixel), `dropout` follows the activation: plan_dropout's mask.
    """
    assert seed is None or problem.y_shape[2:] == problem.stride == (problem.groups, 1) == (1, 1)
    if _depthwise(problem):
        return depthwise.plan_fprop(problem, x, w, bias, y, gpu=gpu, activation=activation)
    if first := runs.prepare(problem, "fprop", x, precision, gpu=gpu, batch_invariant=batch_invariant):
        rows, image, before = first
        # Compiled by Triton 3.6 for sm_90, their stores into contiguous images spill 2,656 bytes and up, by 3.7 none.
        out, after = by_channels_last(y, gpu=gpu) if hardware.triton_version() < (3, 7) else (y, [])
        planned = runs.plan_fprop(
            rows, image, w, bias, out, gpu=gpu, activation=activation, precision=precision,
            batch_invariant=batch_invariant,
        )  # fmt: skip
        return [*before, *planned, *after]
    if padded.applies(problem, "fprop", x.dtype, precision, gpu, batch_invariant=batch_invariant):
        [(wide, _)] = padded.problems(problem, "fprop", x.dtype, precision)
        (x, copy_x), (w, copy_w) = padded.image(x, precision, gpu), padded.image(w, precision, gpu)
        rest = plan_fprop(
            wide, x, w, bias, y, seed, gpu=gpu, activation=activation, precision=precision,
            batch_invariant=batch_invariant, dropout=dropout,
        )  # fmt: skip
        return [*copy_x, *copy_w, *rest]
    if tiles.first_layer(problem, "fprop", x.dtype, precision, gpu):
        blocks, x, to_blocks = _to_depth(problem, x, gpu)
        w, filters_to_blocks = _filters_to_depth(problem, w, gpu)
        rest = plan_fprop(
            blocks, x, w, bias, y, gpu=gpu, activation=activation, precision=precision, batch_invariant=batch_invariant
        )
        return [to_blocks, filters_to_blocks, *rest]
    (x, copy_x), (w, copy_w) = (_as_multiplied(operand, precision, gpu) for operand in (x, w))
    out, after = by_channels_last(y, gpu=gpu)
    settings: dict[str, Any] = {"activation": activation, "precision": precision, "batch_invariant": batch_invariant}
    if seed is not None:
        settings["drops"] = {"seed": seed, "dropout": dropout, "scale": dropout_scale(dropout),
                             "DROPOUT": index_type(y)}  # fmt: skip
    product = _plan_product(problem, problem.filters, x, w, bias, out, gpu=gpu, **settings)
    return [*copy_x, *copy_w, *product, *after]


def _plan_product(
    problem: Conv2dProblem, filters: Filters, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None,
    y: torch.Tensor, *, gpu: GPU, activation: str | None, precision: str, batch_invariant: bool,
    drops: Mapping[str, Any] = NO_DROPOUT,
) -> list[Launch]:  # fmt: skip
    """The launches of plan_fprop's products; x and w are in parts if `precision` splits them.

    `filters` says how the problem reads w, the layer's own: dgrad runs on the filters of fprop, transposed, or as
    _filters_of_gradient leaves them.  `drops` are the kernels' arguments for dropout.
    """
    pass_ = _pass(filters)
    tile = tiles.choose(problem, pass_, y.dtype, precision, gpu, batch_invariant=batch_invariant)
    common: dict[str, Any] = {
        "bias": bias, "N": problem.N, "H": problem.H, "W": problem.W, "P": problem.P, "Q": problem.Q,
        "C": problem.group_channels, "K": problem.group_filters,
        **strides("y", y, "nkpq"), "pad_h": problem.padding[0][0], "pad_w": problem.padding[1][0],
        "R": problem.R, "S": problem.S, "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
        "GROUPS": problem.groups, "TAP_0": filters.first, "TAP_R": filters.step_r, "TAP_S": filters.step_s,
        "HAS_BIAS": bias is not None, "ACTIVATION": activation, **drops, **_arithmetic(x.dtype, precision),
        "OUT": TRITON_TYPE[y.dtype], "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
    }  # fmt: skip
    if tile.formulation == "gather":
        return _plan_gather(problem, filters, tile, x, w, y, common, gpu)
    if cost.filters_turned(tile, pass_, y.dtype, precision, gpu):
        filters = replace(filters, transposed=False)
    if tile.across:
        return [_plan_across(problem, filters, tile, x, w, y, common)]
    return _plan_box(problem, filters, tile, x, w, y, common, gpu)


def _pass(filters: Filters) -> str:
    return "dgrad" if filters.transposed else "fprop"


def plan_dgrad(
    problem: Conv2dProblem, dy: torch.Tensor, w: torch.Tensor, dx: torch.Tensor, *, gpu: GPU, precision: str = "ieee",
    batch_invariant: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launches that write dx."""
    if _depthwise(problem):
        return depthwise.plan_dgrad(problem, dy, w, dx, gpu=gpu)
    return plan_transpose(
        problem, dy, w, None, dx, gpu=gpu, precision=precision, batch_invariant=batch_invariant, gradient=True
    )


def plan_transpose(
    problem: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, *, gpu: GPU,
    activation: str | None = None, precision: str = "ieee", batch_invariant: bool = False, gradient: bool = False,
    only: DgradPart | None = None,
) -> list[Launch]:  # fmt: skip
    """As plan_dgrad, from x [N, K, P, Q] to y [N, C, H, W] of the problem, with a bias [C] and an activation.

    That is fprop on the rephrased problems, one for each residue of the input pixel, or on `only` one of them.  Of a
    `gradient` a NaN may reach the pixels beside its window.
    """
    parts: Sequence[DgradPart] = problem.dgrad if gradient else problem.transposed
    parts = parts if only is None else (only,)
    launches: list[Launch] = []
    if only is None and padded.applies(problem, "dgrad", x.dtype, precision, gpu, batch_invariant=batch_invariant):
        parts = padded.parts(problem, x.dtype, precision)
        (x, copy_x), (w, copy_w) = padded.image(x, precision, gpu), padded.transposed_filters(w, precision, gpu)
        launches = [*copy_x, *copy_w]
    x, copy_x = _as_multiplied(x, precision, gpu)
    launches += copy_x
    out, after = by_channels_last(y, gpu=gpu) if only is None else (y, [])
    copies: dict[tuple[bool, bool], torch.Tensor] = {}
    for part in parts:
        pass_ = _pass(part.filters)
        tile = tiles.choose(part.problem, pass_, y.dtype, precision, gpu, batch_invariant=batch_invariant)
        form = cost.filters_turned(tile, pass_, y.dtype, precision, gpu), tile.columns > 1
        if form not in copies:
            copies[form], copy_w = _filters_of_gradient(w, problem.groups, precision, gpu, *form)
            launches += copy_w
        residue = out[:, :, part.offset[0] :: part.stride[0], part.offset[1] :: part.stride[1]]
        launches += _plan_product(
            part.problem, part.filters, x, copies[form], bias, residue, gpu=gpu, activation=activation,
            precision=precision, batch_invariant=batch_invariant,
        )  # fmt: skip
    return launches + after


def _filters_of_gradient(
    w: torch.Tensor, groups: int, precision: str, gpu: GPU, turned: bool, in_rows: bool
) -> tuple[torch.Tensor, list[Launch]]:
    """The layer's filters as an input gradient's kernels read them, and the launches that make them so.

    That is [K, C/groups, R, S], `turned` with_channels_first; `in_rows` a matrix for each row of taps, [PARTS or
    groups, R, A, B].
    """
    if turned:
        copy, turn = with_channels_first(_filters(w), groups, gpu=gpu, taps_first=in_rows)
        return copy, [turn]
    if not in_rows:
        return _as_multiplied(w, precision, gpu)
    parts, launches = fp32.parts(precision), []
    if parts > 1:
        w, launch = plan_split(w, precision, gpu=gpu, apart=True)
        launches = [launch]
    else:
        w, launches = in_channels_last(w, gpu=gpu)
    rows = aligned(_filters(w)).permute(0, 2, 3, 1).flatten(2)
    return rows.unflatten(0, (parts, -1)).transpose(1, 2), launches


def plan_wgrad(
    problem: Conv2dProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, *, gpu: GPU, precision: str = "ieee"
) -> list[Launch]:
    """The launches that write dw [K, C/groups, R, S] (channels_last): partial sums, then their sum in a fixed order."""
    if _depthwise(problem):
        return depthwise.plan_wgrad(problem, dy, x, dw, gpu=gpu)
    if first := runs.prepare(problem, "wgrad", x, precision, gpu=gpu):
        rows, image, copy_x = first
        dy, copy_dy = in_channels_last(dy, gpu=gpu)
        return [*copy_x, *copy_dy, *runs.plan_wgrad(rows, dy, image, dw, gpu=gpu, precision=precision)]
    if tiles.first_layer(problem, "wgrad", x.dtype, precision, gpu):
        blocks, x, to_blocks = _to_depth(problem, x, gpu)
        blocked = scratch(layout.empty_image(blocks.w_shape, dw, channels_last=True))
        last = plan_depth_to_space(blocked, dw, problem.blocks, gpu=gpu)
        return [to_blocks, *plan_wgrad(blocks, dy, x, blocked, gpu=gpu, precision=precision), last]
    if padded.applies(problem, "wgrad", x.dtype, precision, gpu):
        [(wide, _)] = padded.problems(problem, "wgrad", x.dtype, precision)
        (x, copy_x), (dy, copy_dy) = padded.image(x, precision, gpu), padded.image(dy, precision, gpu)
        more = scratch(layout.empty_image(wide.w_shape, dw, channels_last=True))
        sums = plan_wgrad(wide, dy, x, more, gpu=gpu, precision=precision)
        return [*copy_x, *copy_dy, *sums, padded.plan_narrow(more, dw, gpu=gpu)]
    tile = tiles.choose(problem, "wgrad", dw.dtype, precision, gpu)
    turned = tile.formulation == "pixel" and cost.turned(problem, x.dtype, precision, gpu)
    before: list[Launch] = []
    if not turned:
        (x, copy_x), (dy, copy_dy) = (_as_multiplied(operand, precision, gpu) for operand in (x, dy))
        before = [*copy_x, *copy_dy]
    matrix = dw.permute(0, 2, 3, 1)
    parts = matrix if tile.splits == 1 else _slices(tile.splits, dw)
    arguments: dict[str, Any] = {
        "dw": parts, "N": problem.N, "H": problem.H, "W": problem.W, "P": problem.P, "Q": problem.Q,
        "C": problem.group_channels, "K": problem.group_filters,
        "pad_h": problem.padding[0][0], "pad_w": problem.padding[1][0], "R": problem.R, "S": problem.S,
        "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1], "GROUPS": problem.groups, "SPLITS": tile.splits,
        **_arithmetic(x.dtype, precision), "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
    }  # fmt: skip
    columns = problem.group_channels
    if tile.formulation == "gather":
        kernel: Any = conv_gather.wgrad_gather
        columns *= problem.taps
        arguments |= {
            "x": x, "dy": dy, **strides("x", x, "nchw"), **strides("y", dy, "nkpq"), "STRIDE_H": problem.stride[0],
            "STRIDE_W": problem.stride[1], "INDEX": index_type(x, dy), "IMAGES": problem.N % tile.pixels == 0,
            "UNIT_X": _unit(*_row_strides(x)), "UNIT_Y": _unit(*_row_strides(dy)), "PIXELS": tile.pixels,
        }  # fmt: skip
    else:
        kernel = conv_wgrad.wgrad_box
        planes = problem.groups * fp32.parts(precision)
        pixel = tile.formulation == "pixel"
        describe: Callable[..., TensorDescriptor] = pixel_descriptor if pixel else image_descriptor
        # Elsewhere some spill with blocks that have no number, and here some whose channels do not fill them (136).
        hopper = gpu.arch // 10 == 9 or gpu.interprets
        matrices = {"x": x, "dy": dy}
        for name, image in matrices.items():
            if turned:
                matrices[name], turn = _turn(image if image.is_contiguous() else for_descriptor(image, planes), gpu)
                before.append(turn)
            else:
                matrices[name] = for_descriptor(image, planes)
        arguments |= {
            "x": describe(matrices["x"], planes, tile.box, tile.block_c),
            "x_half": describe(matrices["x"], planes, tile.box, tile.block_c // 2) if tile.half else None,
            "dy": describe(matrices["dy"], planes, tile.box, tile.block_k),
            "dy2": describe(matrices["dy"], planes, tile.box, tile.block_k2) if tile.block_k2 else None,
            "TAPS": tile.taps, "LAST": tile.last, "BLOCK_K2": tile.block_k2, "HALF": int(tile.half),
            "ONE_K": hopper and problem.group_filters <= tile.rows, "ONE_C": hopper and columns == tile.channels,
            "UNIT": 16 // x.itemsize if problem.group_channels % 16 else 0,
            "stride_h": problem.stride[0], "stride_w": problem.stride[1],
            "PIXEL": 2 if turned else int(pixel), "BOX_N": tile.box[0],
            "BOX_H": tile.box[1], "BOX_W": tile.box[2],
        }  # fmt: skip
    whole, left = (1, 0) if tile.formulation == "gather" else divmod(problem.taps, tile.taps)
    blocks = triton.cdiv(columns, tile.channels) * triton.cdiv(problem.group_filters, tile.rows) * problem.groups
    programs = blocks * (whole * tile.splits + (tile.last or tile.splits if left else 0))
    launches = [*before, Launch(kernel, (programs,), arguments, tile.num_warps, tile.num_stages, str(tile))]
    return launches if tile.splits == 1 else [*launches, plan_add_slices(parts, matrix, gpu=gpu)]


def _turn(image: torch.Tensor, gpu: GPU) -> tuple[torch.Tensor, Launch]:
    """An image [N, C, H, W] whose images lie next to each other, and the launch that writes it."""
    rows = image.as_strided((image.shape[0], row_length(tuple(image.shape), image.stride())), (image.stride(0), 1))
    turned = scratch(torch.empty(rows.shape[::-1], dtype=image.dtype, device=image.device))
    images = turned.as_strided(image.shape, (1, *(image.shape[0] * stride for stride in image.stride()[1:])))
    return images, plan_turn(rows[None, None], turned[None, None], gpu=gpu)


def _as_multiplied(operand: torch.Tensor, precision: str, gpu: GPU) -> tuple[torch.Tensor, list[Launch]]:
    """An operand of a product as its kernels read it, and the launches that make it so.

    It is split if `precision` asks for it, a contiguous one becomes channels_last.  Filters are so in every call: they
    are small, and a call cannot see whether they have changed.
    """
    if fp32.parts(precision) > 1:
        parts, launch = plan_split(operand, precision, gpu=gpu)
        return parts, [launch]
    return in_channels_last(operand, gpu=gpu)


def _arithmetic(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """How operands of `dtype` are multiplied and summed: parts are plain bf16 to the tensor cores."""
    parts = fp32.parts(precision)
    return {"PRECISION": precision if parts == 1 else "ieee", "PARTS": parts, "ACC": accumulator(dtype)}


def _depthwise(problem: Conv2dProblem) -> bool:
    """Whether a pass runs on the memory-bound kernels, which know none of the formulations that a test may force."""
    return depthwise.applies(problem) and not tiles.forced()


def _to_depth(problem: Conv2dProblem, x: torch.Tensor, gpu: GPU) -> tuple[Conv2dProblem, torch.Tensor, Launch]:
    """The stride-1 problem of a first layer, its image, and the launch that fills it."""
    blocks = problem.space_to_depth
    image = scratch(layout.empty_image(blocks.x_shape, x, channels_last=True))
    padding = problem.padding[0][0], problem.padding[1][0]
    return blocks, image, plan_space_to_depth(x, image, problem.blocks, problem.stride, padding, gpu=gpu)


def _filters_to_depth(problem: Conv2dProblem, w: torch.Tensor, gpu: GPU) -> tuple[torch.Tensor, Launch]:
    """The filters of that problem: blocked like an image of one filter each, without padding before."""
    blocked = scratch(layout.empty_image(problem.space_to_depth.w_shape, w, channels_last=True))
    return blocked, plan_space_to_depth(w, blocked, problem.blocks, problem.blocks, (0, 0), gpu=gpu)


def _slices(splits: int, dw: torch.Tensor) -> torch.Tensor:
    """One slice of partial sums for each split, in the accumulator's type."""
    return scratch(torch.empty((splits, dw.numel()), dtype=layout.sum_dtype(dw.dtype), device=dw.device))


def _plan_box(
    problem: Conv2dProblem, filters: Filters, tile: ConvTile,
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, common: dict[str, Any], gpu: GPU,
) -> list[Launch]:  # fmt: skip
    filter_box = _filter_boxes(problem, tile, filters, w)
    planes = problem.groups * common["PARTS"]
    store_box = _stores_boxes(problem, tile, y)

    def output_box(rows: int, box: tuple[int, int, int] | None = tile.box) -> TensorDescriptor | torch.Tensor | None:
        if not rows or box is None:
            return None
        box = box[0], box[1], box[2] * tile.columns
        return image_descriptor(y, problem.groups, box, rows // tile.columns) if store_box else y

    programs = tile.boxes(problem) * problem.groups * triton.cdiv(problem.group_filters, tile.filters)
    last = min(tile.tail or programs, programs)
    shared = last if tile.splits > 1 else 0
    narrow = last if tile.narrow else 0
    parts = _partial_sums(tile, shared, y)
    where = {"FULL": programs - shared - narrow, "SPLITS": tile.splits, "BOX_N": tile.box[0], "BOX_H": tile.box[1],
             "BOX_W": tile.box[2], **_columns(problem, tile)}  # fmt: skip
    image, half = for_descriptor(x, planes), tile.half_box
    arguments = common | where | {
        "x": image_descriptor(image, planes, tile.box, tile.block_c),
        "x_half": image_descriptor(image, planes, half, tile.block_c) if half else None,
        "y_half": output_box(tile.block_k, half), "y2_half": output_box(tile.block_k2, half),
        "WHOLE": tile.whole_columns(problem) if half and tile.columns == 1 else 0, "HALF": int(tile.half),
        "w": filter_box(tile.block_k), "w2": filter_box(tile.block_k2),
        "y": output_box(tile.block_k), "y2": output_box(tile.block_k2), "parts": parts,
        "stride_h": problem.stride[0], "stride_w": problem.stride[1],
        "TRANSPOSED": filters.transposed, "STORE_BOX": store_box, "INDEX": index_type(y), "BLOCK_K2": tile.block_k2,
        "NARROW": int(narrow > 0),
        # On sm_120 operands are registers, and those of both products would spill: 760 bytes of 128 x (128 + 64).
        "LOADS_FIRST": gpu.arch < 120,
    }  # fmt: skip
    if shared == programs:  # fprop_finish writes, and drops, for all of them
        arguments |= {"y": None, "y2": None, "STORE_BOX": False, **NO_DROPOUT}
    grid = programs + shared * (tile.splits - 1)
    if narrow:
        grid += narrow * (tile.rows // tile.block_k2 - 1)
    first = Launch(device.fprop_box, (grid,), arguments, tile.num_warps, tile.num_stages, str(tile))
    return [first] if parts is None else [first, _plan_finish(tile, parts, y, common | where, gpu)]


def _filter_boxes(
    problem: Conv2dProblem, tile: ConvTile, filters: Filters, w: torch.Tensor
) -> Callable[[int], TensorDescriptor | None]:  # fmt: skip
    """What describes so many rows of the filters that a step reads; None for none."""
    matrix = w if tile.columns > 1 else aligned(_filter_matrix(w))
    if filters.transposed and problem.groups > 1:
        matrix = matrix.unflatten(-2, (problem.groups, -1))

    def of_rows(rows: int) -> TensorDescriptor | None:
        box = (tile.block_c, rows) if filters.transposed else (rows, tile.block_c)
        return matrix_descriptor(matrix, box) if rows else None

    return of_rows


def _columns(problem: Conv2dProblem, tile: ConvTile) -> dict[str, int]:
    return {"COLUMNS": tile.columns, "COLUMN_K": problem.group_filters if tile.columns > 1 else 0}


def _stores_boxes(problem: Conv2dProblem, tile: ConvTile, y: torch.Tensor) -> bool:
    """Whether the copy engine writes y: of several columns only where their filters fill the one block."""
    filled = tile.columns == 1 or (tile.columns * problem.group_filters == tile.block_k and not tile.across)
    return describable(y, problem.groups) and filled


def _plan_across(
    problem: Conv2dProblem, filters: Filters, tile: ConvTile, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor,
    common: Mapping[str, Any],
) -> Launch:  # fmt: skip
    filter_box, store_box = _filter_boxes(problem, tile, filters, w), _stores_boxes(problem, tile, y)
    image, images = for_descriptor(x, problem.groups), (tile.box[0], 1, 1)

    def output_box(rows: int) -> TensorDescriptor | torch.Tensor:
        return image_descriptor(y, problem.groups, images, rows) if store_box else y

    arguments = {name: value for name, value in common.items() if name != "PARTS"} | {
        "x": pixel_descriptor(image, problem.groups, images, tile.block_c),
        "w": filter_box(tile.block_k), "w2": filter_box(tile.block_k2),
        "y": output_box(tile.block_k), "y2": output_box(tile.block_k2),
        "stride_h": problem.stride[0], "stride_w": problem.stride[1], "TRANSPOSED": filters.transposed,
        "STORE_BOX": store_box, "INDEX": index_type(y), "BLOCK_K2": tile.block_k2, "BOX_N": tile.box[0],
        "BOX_H": tile.box[1], **_columns(problem, tile),
    }  # fmt: skip
    programs = tile.boxes(problem) * problem.groups * triton.cdiv(problem.group_filters, tile.filters)
    kernel = conv_across.fprop_across
    return Launch(kernel, (programs,), arguments, tile.num_warps, tile.num_stages, str(tile))


def _partial_sums(tile: ConvTile, shared: int, y: torch.Tensor) -> torch.Tensor | None:
    """[tiles, splits, filters, pixels] for what the programs of `shared` tiles leave; None if there are none."""
    if not shared:
        return None
    shape = (shared, tile.splits, tile.rows, tile.pixels)
    return scratch(torch.empty(shape, dtype=layout.sum_dtype(y.dtype), device=y.device))


def _plan_finish(tile: ConvTile, parts: torch.Tensor, y: torch.Tensor, known: dict[str, Any], gpu: GPU) -> Launch:
    """The launch that adds the parts of shared tiles and finishes them as a whole tile would."""
    block_p = tile.pixels if gpu.interprets else min(tile.pixels, 32)
    # Of few outputs blocks of four a thread: more SMs take part, and as compiled three to six parts are on their way at
    # a time, where of sixteen a thread it is one.
    few = parts.numel() // tile.splits < 4 * gpu.sms * 64 * block_p
    block_k = math.gcd(tile.rows, 1024 if gpu.interprets else 16 if few else 64)
    names = ("bias", "FULL", "N", "P", "Q", "K", "stride_yn", "stride_yp", "stride_yq", "stride_yk", "GROUPS", "SPLITS",
             "HAS_BIAS", "ACTIVATION", "OUT", "BOX_N", "BOX_H", "BOX_W", "COLUMNS", "COLUMN_K",
             *NO_DROPOUT)  # fmt: skip
    arguments = {name: known[name] for name in names}
    arguments |= {"parts": parts, "y": y, "ROWS": tile.rows, "COUNTED": tile.formulation == "gather",
                  "INDEX": index_type(y), "BLOCK_K": block_k, "BLOCK_P": block_p}  # fmt: skip
    programs = parts.shape[0] * (tile.rows // block_k) * (tile.pixels // block_p)
    return Launch(device.fprop_finish, (programs,), arguments, 4, 1, f"{block_k}x{block_p}")


def _plan_gather(
    problem: Conv2dProblem, filters: Filters, tile: ConvTile,
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, common: dict[str, Any], gpu: GPU,
) -> list[Launch]:  # fmt: skip
    matrix = _filter_matrix(w)
    channels = w.shape[1]
    pitch = matrix.stride(0)
    rows, depth = (1, pitch) if filters.transposed else (pitch, 1)
    programs = tile.boxes(problem) * problem.groups * triton.cdiv(problem.group_filters, tile.block_k)
    parts = _partial_sums(tile, programs if tile.splits > 1 else 0, y)
    arguments = {
        "x": x, "w": matrix, "y": y, "parts": parts, "SPLITS": tile.splits,
        **strides("x", x, "nchw"),
        "stride_wg": w.shape[0] // problem.groups * pitch, "stride_wk": rows, "stride_wt": channels,
        "stride_wp": channels // common["PARTS"], "stride_wc": depth, "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1], "FLAT": tile.flat, "INDEX": index_type(x, w, y), "PIXELS": tile.pixels, **common,
        "TRANSPOSED": filters.transposed, "UNIT_X": _unit(*_row_strides(x)),
        "UNIT_W": _unit(channels // common["PARTS"]), "UNIT_Y": _unit(*_row_strides(y)),
    }  # fmt: skip
    if parts is not None:  # fprop_finish writes, and drops
        arguments |= {"y": None, **NO_DROPOUT}
    programs *= tile.splits
    first = Launch(conv_gather.fprop_gather, (programs,), arguments, tile.num_warps, tile.num_stages, str(tile))
    if parts is None:
        return [first]
    where = {"FULL": 0, "SPLITS": tile.splits, "BOX_N": tile.pixels, "BOX_H": 1, "BOX_W": 1, "COLUMNS": 1,
             "COLUMN_K": 0}  # fmt: skip
    return [first, _plan_finish(tile, parts, y, common | where, gpu)]


def _row_strides(image: torch.Tensor) -> tuple[int, ...]:
    return pitch(image, 0), pitch(image, 2), pitch(image, 3)


def _unit(*strides: int) -> int:
    """The largest power of two up to 16 that divides all of them."""
    return math.gcd(16, *strides)


def _filter_matrix(w: torch.Tensor) -> torch.Tensor:
    """The filters as [K, R * S * C/groups]: a view of channels_last weights, a copy of others."""
    return _filters(w).permute(0, 2, 3, 1).flatten(1)


def _filters(w: torch.Tensor) -> torch.Tensor:
    """The filters, copied if they are not channels_last."""
    return w.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
