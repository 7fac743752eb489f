"""Max-pool with its switches and adaptive average pool: values, indices and gradients, by PyTorch's odd rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileconv.kernels as tk
from tileconv.kernels import hardware, interpreter, plane_tiles, reference, strip_tiles, watch
from tileconv.kernels.geometry import AdaptivePool2dProblem, Pool2dProblem
from tileconv.kernels.launch import pool
from tileconv.kernels.plane_tiles import PlaneTile
from tileconv.kernels.strip_tiles import StripTile

CHANNELS_LAST = torch.channels_last
WINDOWS: dict[str, tuple[Any, ...]] = {
    "alexnet": (3, 2),
    "vgg": (2, 2),
    "padded": (3, 2, 1),
    "overlapping": (5, 1, 2),
    "gaps between windows": (2, 3),
    "ceil": (2, 2, 0, 1, True),
    "ceil and padding": (3, 3, 1, 1, True),
    "dilated": (3, 1, 1, 2),
    "uneven": ((3, 2), (2, 1), (1, 0), (1, 2), True),
    "windows without an element": (2, 1, 1, 9),
    "default stride": (3,),
}
MEMORY_FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"]
)


def pool_and_grad(pool: Any, x: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y, indices = pool(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype) if dy is None else dy
    return y.detach(), indices, torch.autograd.grad(y, x, dy)[0], dy


@MEMORY_FORMATS
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_max_pool_is_torchs(window: tuple[Any, ...], memory_format: torch.memory_format) -> None:
    x = torch.randint(-4, 5, (2, 5, 9, 8)).float()  # many ties
    x = x.contiguous(memory_format=memory_format)
    if window == WINDOWS["windows without an element"]:
        x = x[:, :, :8, :8].contiguous(memory_format=memory_format)
    want, want_indices = F.max_pool2d(x, *window, return_indices=True)
    y, indices = tk.max_pool2d(x, *window, return_indices=True)
    assert torch.equal(y, want)
    assert y.stride() == want.stride()
    assert indices.dtype == torch.int64
    assert torch.equal(indices, want_indices)
    assert torch.equal(tk.max_pool2d(x, *window), want)
    _, _, dx, dy = pool_and_grad(lambda x: tk.max_pool2d(x, *window, return_indices=True), x)
    if want_indices.max() < x.shape[2] * x.shape[3]:
        exact = reference.max_pool2d_backward(dy, want_indices, x.shape)
        assert reference.error(dx, exact) <= 1e-6 * exact.abs().max().item()
        assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@MEMORY_FORMATS
def test_nan_and_infinity(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 8, 8, 9).to(dtype)  # whole 16 bytes of channels: on a GPU in strips
    x[0, 0, 2:4, 2:4] = float("nan")
    x[0, 1] = float("-inf")
    x[1, 2, ::3, ::2] = float("inf")
    x = x.contiguous(memory_format=memory_format)
    want, want_indices = reference.max_pool2d(x, 3, 2, 1)
    y, indices = tk.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert y.dtype == dtype
    assert torch.equal(y.double().nan_to_num(), want.nan_to_num())
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(indices, want_indices)
    assert torch.equal(F.max_pool2d(x.float().contiguous(), 3, 2, 1).isnan(), want.isnan())


def test_a_window_of_more_than_256_elements_keeps_wider_switches() -> None:
    x = torch.randn(1, 2, 20, 21)
    want, want_indices = F.max_pool2d(x, 17, 3, return_indices=True)
    y, indices, dx, dy = pool_and_grad(lambda x: tk.max_pool2d(x, 17, 3, return_indices=True), x)
    assert torch.equal(y, want)
    assert torch.equal(indices, want_indices)
    assert reference.error(dx, reference.max_pool2d_backward(dy, want_indices, x.shape)) <= 1e-5


def test_what_backward_keeps_is_one_byte_an_output() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = tk.max_pool2d(torch.randn(2, 4, 9, 9, requires_grad=True), 3, 2)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, y.shape)]


@MEMORY_FORMATS
def test_relu_and_max_pool_in_one(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=memory_format) - 0.7
    pool = lambda x: (tk.max_pool2d(x, 3, 2, activation="relu"), None)  # noqa: E731
    y, _, dx, dy = pool_and_grad(pool, x)
    leaf = x.double().requires_grad_()
    want = F.max_pool2d(F.relu(leaf), 3, 2)
    assert torch.equal(y.double(), want)
    assert (y == 0).any()
    exact = torch.autograd.grad(want, leaf, dy.double())[0]
    assert reference.error(dx, exact) <= 1e-6 * exact.abs().max().item()


# Windows that overlap, with (long, wide of outputs, wide of cells): strips end inside the image, at or beyond its edge.
STRIPS: dict[str, tuple[Pool2dProblem, torch.dtype, tuple[int, int, int]]] = {
    "fp16": (Pool2dProblem(2, 8, 13, 7, (3, 3), (2, 2)), torch.float16, (2, 4, 3)),
    "bf16, padded": (Pool2dProblem(1, 24, 9, 8, (3, 3), (2, 2), (1, 1)), torch.bfloat16, (3, 2, 5)),
    "fp32, ceil": (Pool2dProblem(1, 4, 8, 10, (3, 3), (2, 2), ceil_mode=True), torch.float32, (5, 4, 3)),
    "stride 1": (Pool2dProblem(1, 8, 5, 6, (2, 2), (1, 1), (1, 1)), torch.float16, (4, 6, 3)),
    "rows alone": (Pool2dProblem(1, 8, 9, 9, (3, 2), (2, 2), (0, 1)), torch.float16, (2, 2, 4)),
    "uneven": (Pool2dProblem(1, 4, 7, 9, (4, 3), (2, 2), (2, 1)), torch.float32, (3, 4, 3)),
}


def odd_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Ties, both zeros, NaN, infinities, and an image channel of -inf alone, channels_last."""
    x, chance = torch.randint(-2, 3, shape).to(dtype), torch.rand(shape)
    for value, low, high in ((float("nan"), 0.0, 0.1), (float("-inf"), 0.1, 0.4), (-0.0, 0.4, 0.5), (1e30, 0.9, 1.0)):
        x[(chance >= low) & (chance < high)] = value
    x[0, 0] = float("-inf")
    return x.to(memory_format=CHANNELS_LAST)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 99 if dtype == torch.uint8 else float("nan"), dtype=dtype).to(memory_format=CHANNELS_LAST)


def same_bits(a: Tensor, b: Tensor) -> bool:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


@pytest.mark.skipif(not hardware.interpreting(), reason="pins tiles of Triton's interpreter")
@pytest.mark.parametrize("masked", [False, True], ids=["", "relu"])
@pytest.mark.parametrize(("problem", "dtype", "size"), STRIPS.values(), ids=STRIPS)
def test_strips_give_the_same_bits(
    problem: Pool2dProblem, dtype: torch.dtype, size: tuple[int, int, int], masked: bool
) -> None:
    def tiles(pinned: bool) -> list[StripTile | None]:
        return [strip_tiles.strip_tile(problem, dtype, hardware.INTERPRETER, size[0], wide) if pinned else None
                for wide in size[1:]]  # fmt: skip

    give_the_same_bits(problem, dtype, tiles, masked, CHANNELS_LAST, "_strips")


def give_the_same_bits(
    problem: Pool2dProblem, dtype: torch.dtype, tiles: Any, masked: bool, memory: torch.memory_format, ending: str
) -> None:
    """Both ways by the tiles of `tiles(True)` as by the kernels without, and values as by the reference."""
    gpu, activation = hardware.INTERPRETER, "relu" if masked else None
    x = odd_values(problem.x_shape, dtype).contiguous(memory_format=memory)
    dy = torch.randn(problem.y_shape).to(dtype).contiguous(memory_format=memory)
    found = []
    for pinned in (False, True):
        tile, cells = tiles(pinned)
        shapes = (problem.y_shape, dtype), (problem.y_shape, torch.uint8), (problem.x_shape, dtype)
        y, switch, dx = (poisoned(*each).contiguous(memory_format=memory) for each in shapes)
        forward = pool.plan_max_forward(problem, x, y, switch, gpu=gpu, activation=activation, strips=tile)
        forward.run()
        backward = pool.plan_max_backward(problem, dy, switch, y if masked else None, dx, gpu=gpu, strips=cells)
        backward.run()
        assert forward.kernel.__name__.endswith(ending) == backward.kernel.__name__.endswith(ending) == pinned
        found.append((y, switch, dx))
    for ours, plain in zip(found[1], found[0], strict=True):
        assert same_bits(ours, plain)
    want, _ = reference.max_pool2d(x, problem.kernel, problem.stride, problem.padding, 1, problem.ceil_mode)
    y = found[1][0].double()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(), (want.relu() if masked else want).nan_to_num())


# Windows that overlap, with (long of outputs, of cells, lanes), and ReLU or not: planes end inside programs.
PLANES: dict[str, tuple[Pool2dProblem, torch.dtype, tuple[int, int, int], bool]] = {
    "fp16": (Pool2dProblem(2, 3, 13, 7, (3, 3), (2, 2)), torch.float16, (4, 3, 8), False),
    "bf16, padded, relu": (Pool2dProblem(1, 3, 9, 8, (3, 3), (2, 2), (1, 1)), torch.bfloat16, (3, 5, 8), True),
    "fp32, ceil, relu": (Pool2dProblem(1, 4, 8, 10, (3, 3), (2, 2), ceil_mode=True), torch.float32, (4, 2, 16), True),
    "stride 1": (Pool2dProblem(1, 3, 5, 6, (3, 3), (1, 1), (1, 1)), torch.float16, (2, 3, 8), False),
    "five wide": (Pool2dProblem(1, 2, 7, 9, (2, 5), (2, 2), (1, 2)), torch.float32, (2, 4, 16), False),
}


@pytest.mark.skipif(not hardware.interpreting(), reason="pins tiles of Triton's interpreter")
@pytest.mark.parametrize(("problem", "dtype", "size", "masked"), PLANES.values(), ids=PLANES)
def test_columns_of_planes_give_the_same_bits(
    problem: Pool2dProblem, dtype: torch.dtype, size: tuple[int, int, int], masked: bool
) -> None:
    def tiles(pinned: bool) -> list[PlaneTile | None]:
        return [PlaneTile(long, size[2]) if pinned else None for long in size[:2]]

    give_the_same_bits(problem, dtype, tiles, masked, torch.contiguous_format, "_planes")


def test_columns_of_planes_are_for_whole_contiguous_images() -> None:
    gpu, problem = hardware.GPUS["H100"], Pool2dProblem(8, 64, 27, 27, (3, 3), (2, 2))
    x, y = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in (problem.x_shape, problem.y_shape))
    switch = y.to(torch.uint8)
    slices = x.new_empty(8, 128, 27, 27)[:, ::2], y[:, :, :, :1].expand(y.shape)
    for image, grad, planes in ((x, y, True), (x.to(memory_format=CHANNELS_LAST), y, False), (*slices, False)):
        forward = pool.plan_max_forward(problem, image, y, switch, gpu=gpu)
        backward = pool.plan_max_backward(problem, grad, switch, None, image, gpu=gpu)
        assert forward.kernel.__name__.endswith("_planes") == backward.kernel.__name__.endswith("_planes") == planes
    with pytest.raises(ValueError, match=r"strips=.*contiguous, of 2 or 4 bytes"):
        pool.plan_max_forward(problem, x.double(), y.double(), switch, gpu=gpu, strips=PlaneTile(14))
    for windows in ((2, 2), (2, 2)), ((3, 3), (2, 2), (0, 0), (2, 2)), ((7, 7), (2, 2)):
        assert not plane_tiles.has_planes(Pool2dProblem(8, 64, 27, 27, *windows), torch.float16)
    few = plane_tiles.choose_planes(Pool2dProblem(1, 64, 27, 27, (3, 3), (2, 2)), "forward", torch.float16, gpu)
    many = plane_tiles.choose_planes(Pool2dProblem(512, 64, 27, 27, (3, 3), (2, 2)), "forward", torch.float16, gpu)
    assert few is not None and many is not None and few.long < many.long


def test_strips_without_switches_and_where_they_do_not_suit() -> None:
    problem, dtype, (long, wide, _) = STRIPS["fp16"]
    x, y, gpu = odd_values(problem.x_shape, dtype), poisoned(problem.y_shape, dtype), hardware.INTERPRETER
    tile = strip_tiles.strip_tile(problem, dtype, gpu, long, wide)
    if hardware.interpreting():
        pool.plan_max_forward(problem, x, y, None, gpu=gpu, strips=tile).run()
        want = F.max_pool2d(x.float().nan_to_num(torch.inf), problem.kernel, problem.stride)
        assert torch.equal(y.float().nan_to_num(torch.inf), want)
    for image in (x.contiguous(), x[:, :4]):
        with pytest.raises(ValueError, match=r"strips=.*whole 16 bytes of channels"):
            pool.plan_max_forward(
                Pool2dProblem(2, image.shape[1], 13, 7, (3, 3), (2, 2)), image, y, None, gpu=gpu, strips=tile
            )


@pytest.mark.parametrize(
    ("window", "strips"),
    [(((3, 3), (2, 2)), True), (((2, 2), (1, 1)), True), (((4, 4), (2, 2)), True), (((2, 2), (2, 2)), False),
     (((3, 3), (1, 1)), False), (((2, 2), (3, 3)), False), (((3, 3), (2, 2), (0, 0), (2, 2)), False)],
    ids=["3x3/2", "2x2/1", "4x4/2", "no overlap", "two neighbours overlap", "gaps", "dilated"],
)  # fmt: skip
def test_strips_are_for_windows_that_overlap_with_their_neighbours(window: tuple[Any, ...], strips: bool) -> None:
    problem = Pool2dProblem(8, 64, 28, 28, *window)
    for pass_ in ("forward", "backward"):
        tile = strip_tiles.choose_strips(problem, pass_, torch.float16, hardware.GPUS["H100"])
        assert isinstance(tile, StripTile) == strips
        assert strip_tiles.choose_strips(problem, pass_, torch.float16, hardware.INTERPRETER) is None


def test_few_images_are_cut_into_short_strips() -> None:
    gpu = hardware.GPUS["H100"]
    strips = {}
    for batch in (1, 128):
        problem = Pool2dProblem(batch, 64, 55, 55, (3, 3), (2, 2))
        for pass_ in ("forward", "backward"):
            tile = strip_tiles.choose_strips(problem, pass_, torch.float16, gpu)
            assert tile is not None
            down, across = tile.strips((problem.P, problem.Q))
            strips[batch, pass_] = down * across
            assert batch * down * across * 64 // (tile.rows * tile.cols) >= gpu.sms // 2
    assert all(strips[1, pass_] > 4 * strips[128, pass_] for pass_ in ("forward", "backward"))


def test_sliced_input_and_expanded_gradient() -> None:
    x = torch.randn(3, 6, 9, 16).permute(0, 3, 1, 2)[:, 2:13, ::2]
    y, indices, dx, _ = pool_and_grad(
        lambda x: tk.max_pool2d(x, 2, return_indices=True), x, torch.ones(()).expand(3, 11, 1, 4)
    )
    want, want_indices = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, want)
    assert torch.equal(indices, want_indices)
    assert dx.sum() == y.numel()


def test_max_pool_without_a_batch_and_with_an_empty_one() -> None:
    x = torch.randn(3, 8, 8)
    assert torch.equal(tk.max_pool2d(x, 2), F.max_pool2d(x, 2))
    empty = torch.randn(0, 3, 8, 8, requires_grad=True)
    y = tk.max_pool2d(empty, 2)
    assert y.shape == (0, 3, 4, 4)
    y.sum().backward()
    assert empty.grad is not None and empty.grad.shape == empty.shape


@MEMORY_FORMATS
@pytest.mark.parametrize("size", [(6, 6), (3, 4), (5, None), (1, 1), (13, 2), 7], ids=str)
def test_adaptive_avg_pool_is_torchs(size: Any, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 6, 7).contiguous(memory_format=memory_format)
    leaf, double = x.requires_grad_(), x.detach().double().requires_grad_()
    want, theirs, ours = (F.adaptive_avg_pool2d(double, size), F.adaptive_avg_pool2d(x.detach(), size),
                          tk.adaptive_avg_pool2d(leaf, size))  # fmt: skip
    assert reference.error(ours, want) <= reference.allowed_error(want, theirs)
    assert ours.stride() == theirs.stride()
    dy = torch.randn_like(ours)
    exact = torch.autograd.grad(want, double, dy.double())[0]
    assert reference.error(torch.autograd.grad(ours, leaf, dy)[0], exact) <= 1e-6 * exact.abs().max().item()


@pytest.mark.parametrize(
    ("window", "width", "kernel", "abreast"),
    [((2, 2), 224, "max_backward_cells", 2), ((2, 2), 55, "max_backward_cells", 1),
     ((3, 2), 55, "max_backward_planes", None), ((3, 1, 1), 28, "max_backward_planes", None),
     ((7, 1, 3), 28, "max_backward", None)],
    ids=["aligned rows", "odd rows", "overlap", "a window for every pixel", "large windows"],
)  # fmt: skip
def test_contiguous_gradients_are_made_in_cells(
    window: tuple[int, ...], width: int, kernel: str, abreast: int | None
) -> None:
    """Pixels beside each other share what they load, and rows that begin at 16 bytes are stored 16 bytes at a time."""
    extent, step, *pad = ((size, size) for size in window)
    problem = Pool2dProblem(4, 8, width, width, extent, step, *pad)
    x, y = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in (problem.x_shape, problem.y_shape))
    launch = pool.plan_max_backward(problem, y, y.to(torch.uint8), None, x, gpu=hardware.GPUS["H100"])
    assert launch.kernel.__name__ == kernel
    assert launch.arguments.get("ABREAST") == abreast


@pytest.mark.parametrize("kind", ["any window", "cells", "strips", "planes", "adaptive"])
def test_a_gradient_of_more_windows_than_two_to_the_31_takes_64_bit_offsets(kind: str) -> None:
    """The switch alone reaches so far: the gradient is expanded, and the image has fewer pixels than windows."""
    window = {"any window": ((8, 7), (1, 1), (4, 3), (1, 1)), "strips": ((2, 2), (1, 1), (1, 1), (1, 1))}
    window["planes"] = window["strips"]
    problem = Pool2dProblem(1, 16384, 8, 15_000, *window.get(kind, ((2, 1), (1, 1), (1, 0), (1, 1))))
    memory = torch.contiguous_format if kind in ("any window", "planes") else CHANNELS_LAST
    dx = torch.empty(problem.x_shape, dtype=torch.float16, device="meta").contiguous(memory_format=memory)
    switch = torch.empty(problem.y_shape, dtype=torch.uint8, device="meta").contiguous(memory_format=memory)
    dy = dx.new_empty(1).expand(problem.y_shape)
    assert dx.numel() < 2**31 - 2**20 < 2**31 < switch.numel()
    if kind == "adaptive":
        size = AdaptivePool2dProblem(*problem.x_shape, *problem.y_shape[2:])
        launch = pool.plan_adaptive_max_backward(size, dy, switch, dx, gpu=hardware.GPUS["H100"])
    else:
        if kind == "planes":
            dy = torch.empty(problem.y_shape, dtype=torch.float16, device="meta")
        elif kind == "strips":
            dy = dx.new_empty(1, 16384, 1, 1).contiguous(memory_format=memory).expand(problem.y_shape)
        launch = pool.plan_max_backward(problem, dy, switch, None, dx, gpu=hardware.GPUS["H100"])
    names = {"any window": "max_backward", "cells": "max_backward_cells", "strips": "max_backward_strips",
             "planes": "max_backward_planes"}  # fmt: skip
    assert launch.kernel.__name__ == names.get(kind, "adaptive_max_backward")
    assert str(launch.arguments["INDEX"]) == "int64"


@pytest.mark.skipif(not hardware.interpreting(), reason="runs one program of Triton's interpreter")
def test_a_plane_of_more_than_two_to_the_31_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last program alone, over memory that nothing else touches."""
    builder = interpreter.stock.interpreter_builder
    problem = Pool2dProblem(1, 1, 46_401, 46_401, (3, 3), (2, 2))
    assert problem.H * problem.W > 2**31
    x, dx = (torch.from_numpy(np.zeros(problem.x_shape, np.float16)) for _ in range(2))
    y, dy = (torch.from_numpy(np.zeros(problem.y_shape, np.float16)) for _ in range(2))
    switch = torch.from_numpy(np.zeros(problem.y_shape, np.uint8))
    x[..., -1, -1], dy[..., -1, -1] = 3, 5
    forward = pool.plan_max_forward(problem, x, y, switch, gpu=hardware.INTERPRETER, strips=PlaneTile(2))
    backward = pool.plan_max_backward(problem, dy, switch, None, dx, gpu=hardware.INTERPRETER, strips=PlaneTile(2))
    for launch in (forward, backward):
        last = launch.grid[0] - 1
        monkeypatch.setattr(builder, "set_grid_idx", lambda *_, last=last: setattr(builder, "grid_idx", (last, 0, 0)))
        with watch.bounds_check():
            replace(launch, grid=(1,)).run()
    assert y[..., -1, -1] == 3 and switch[..., -1, -1] == 8
    assert dx[..., -2:, -2:].flatten().tolist() == [0, 0, 0, 5]
