"""What a call costs the host: choosing a tile, planning launches, describing operands, and whole calls without kernels.

`pytest bench/ --benchmark-json FILE` measures; otherwise each runs once. Launches are planned for an H100 that need not
be there, and nothing is launched.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tileconv.kernels import conv_tile, hardware, tiles
from tileconv.kernels import functional as TF
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv, descriptors
from tileconv.kernels.launch.common import Launch

pytestmark = pytest.mark.benchmark(warmup=True, warmup_iterations=20, min_rounds=20)  # the first call chooses tiles
H100 = hardware.GPUS["H100"]
# AlexNet's layers: the first takes another way, the second has the largest filters but for it, the third is plain.
PROBLEMS = {
    "conv1": Conv2dProblem(128, 3, 224, 224, 64, 11, 11, (4, 4), ((2, 2), (2, 2))),
    "conv2": Conv2dProblem(128, 64, 27, 27, 192, 5, 5, padding=((2, 2), (2, 2))),
    "conv3": Conv2dProblem(128, 192, 13, 13, 384, 3, 3, padding=((1, 1), (1, 1))),
}
PASSES = ("fprop", "dgrad", "wgrad")


def image(shape: tuple[int, ...], device: str = "meta") -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device=device, memory_format=torch.channels_last)


def planned(name: str, pass_: str) -> list[Launch]:
    problem = PROBLEMS[name]
    x, w, y = (image(shape) for shape in (problem.x_shape, problem.w_shape, problem.y_shape))
    if pass_ == "fprop":
        return conv.plan_fprop(problem, x, w, None, y, gpu=H100)
    if pass_ == "dgrad":
        return conv.plan_dgrad(problem, y, w, x, gpu=H100)
    return conv.plan_wgrad(problem, y, x, w, gpu=H100)


def chosen(pass_: str) -> conv_tile.ConvTile:
    problem = PROBLEMS["conv2"]
    asked = problem.dgrad[0].problem if pass_ == "dgrad" else problem
    return tiles.choose(asked, pass_, torch.float16, "ieee", H100)


@pytest.mark.parametrize("pass_", PASSES)
def test_choosing_a_tile_for_the_first_time(benchmark: Any, pass_: str) -> None:
    tile = benchmark.pedantic(chosen, (pass_,), setup=tiles._choose.cache_clear, rounds=5)
    assert tiles._choose.cache_info().misses == 1
    assert tile == chosen(pass_)


@pytest.mark.parametrize("pass_", PASSES)
def test_choosing_a_tile_again(benchmark: Any, pass_: str) -> None:
    first = chosen(pass_)
    misses = tiles._choose.cache_info().misses
    assert benchmark(chosen, pass_) is first
    assert tiles._choose.cache_info().misses == misses


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_planning_a_pass(benchmark: Any, name: str, pass_: str) -> None:
    launches = benchmark(planned, name, pass_)
    assert all(launch.grid[0] > 0 for launch in launches)
    kernels = [launch.kernel.__name__ for launch in launches]
    assert any(kernel.startswith("wgrad" if pass_ == "wgrad" else "fprop") for kernel in kernels)


def test_describing_an_image(benchmark: Any) -> None:
    x = image((2, 64, 27, 27), "cpu")
    descriptor = benchmark(descriptors.image_descriptor, x, 1, (1, 8, 8), 64)
    assert descriptor.base is x
    assert list(descriptor.shape) == [2, 27, 27, 64]
    assert list(descriptor.strides) == [27 * 27 * 64, 27 * 64, 64, 1]


# Whole calls


@pytest.fixture
def nothing_launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls go all the way down to the launch, as for an H100, and note the kernel in place of launching it."""
    kernels: list[str] = []

    def note(launch: Launch) -> None:
        kernels.append(launch.kernel.__name__)

    monkeypatch.setattr(Launch, "run", note)
    monkeypatch.setattr(hardware, "gpu_of", lambda device: H100)
    return kernels


def operands() -> tuple[Tensor, Tensor, Tensor]:
    x, w = image((2, 64, 27, 27), "cpu"), image((192, 64, 5, 5), "cpu")
    return x, w, torch.empty(192, dtype=torch.float16)


def test_calling_conv2d(benchmark: Any, nothing_launched: list[str]) -> None:
    x, w, b = operands()
    y = benchmark(TF.conv2d, x, w, b, padding=2, activation="relu")
    assert y.shape == (2, 192, 27, 27)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert set(nothing_launched) == {"fprop_box"}


def test_calling_conv2d_with_its_gradients(benchmark: Any, nothing_launched: list[str]) -> None:
    x, w, b = (t.requires_grad_() for t in operands())
    dy = image((2, 192, 27, 27), "cpu")

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(TF.conv2d(x, w, b, padding=2), (x, w, b), dy)

    gradients = benchmark(step)
    assert [g.shape for g in gradients] == [x.shape, w.shape, b.shape]
    assert {"fprop_box", "wgrad_box"} <= set(nothing_launched)


CALLS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "max_pool2d": (lambda x: TF.max_pool2d(x, 3, 2), "max"),
    "avg_pool2d": (lambda x: TF.avg_pool2d(x, 3, 2), "average_forward"),
    "local_response_norm": (lambda x: TF.local_response_norm(x, 5), "across_columns"),
    "relu": (TF.relu, "relu"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calling_a_streaming_layer(benchmark: Any, nothing_launched: list[str], name: str) -> None:
    call, kernel = CALLS[name]
    y = benchmark(call, image((2, 64, 27, 27), "cpu"))
    assert y.shape[:2] == (2, 64)
    assert len(set(nothing_launched)) == 1
    assert kernel in nothing_launched[0]
