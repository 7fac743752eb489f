"""The bytes that reports give for a launch, held to the loads and stores that the interpreter counts.

Requested bytes are what programs ask for: traffic between L2 and the SMs.  Unique bytes are distinct addresses of a
launch: what DRAM delivers at least.
"""

from dataclasses import replace

import pytest
import torch

from tileconv.bench.traffic import Traffic, traffic
from tileconv.kernels import hardware, strip_tiles, tiles, watch
from tileconv.kernels.geometry import AdaptivePool2dProblem, Conv2dProblem, Pool2dProblem
from tileconv.kernels.launch import conv, depthwise, local, norm, pointwise, pool, softmax, unfold
from tileconv.kernels.launch.common import Launch
from tileconv.kernels.plane_tiles import PlaneTile

pytestmark = pytest.mark.skipif(not hardware.interpreting(), reason="counts in Triton's interpreter")
GPU = hardware.INTERPRETER


def image(*extents, dtype=torch.float16):
    return torch.randn(extents).to(dtype).to(memory_format=torch.channels_last)


def counted(launch):
    """Requested bytes read and written, and distinct bytes, of running one launch."""
    with watch.count_bytes() as count:
        launch.run()
    assert "?" not in count.read and "?" not in count.written, "an address outside every tensor"
    unique = sum(b.unique for way in (count.read, count.written) for b in way.values())
    return Traffic(
        sum(b.requested for b in count.read.values()), sum(b.requested for b in count.written.values()), unique
    )


def agrees(launches):
    for launch in launches:
        expected, found = traffic(launch), counted(launch)
        assert expected == found, f"{launch.kernel.__name__} {launch.tile}: formula, then count"


def square(pad, **changes):
    return Conv2dProblem(
        **{"N": 2, "C": 24, "H": 4, "W": 3, "K": 40, "R": 3, "S": 3, "padding": ((pad, pad),) * 2} | changes
    )


PROBLEMS = {
    "3x3": square(1),
    "no padding": square(0),
    "5x5 wide padding": square(3, R=5, S=5, N=2, H=3, W=3, C=16),
    "dilated": square(2, dilation=(2, 2)),
    "grouped": square(1, groups=2, C=32, K=48, N=2),
    "filters and channels end inside a block": square(1, C=40, K=56, N=2),
    "one by one": square(0, R=1, S=1),
}
STRIDED = {
    "strided": square(1, stride=(2, 2), H=9, W=7),
    "strided and dilated": square(2, stride=(2, 1), dilation=(1, 2)),
}
PIXEL = {"formulation": "pixel", "box": (16, 1, 1), "block_k": 32, "block_c": 16}
BOX = {"formulation": "box", "box": (1, 4, 4), "block_k": 32, "block_c": 16}
GATHER = {"formulation": "gather", "box": (16, 1, 1), "block_k": 32, "block_c": 16}


def tensors(problem):
    return image(*problem.x_shape), image(*problem.w_shape), torch.randn(problem.K).half(), image(*problem.y_shape)


@pytest.mark.parametrize("problem", (PROBLEMS | STRIDED).values(), ids=(PROBLEMS | STRIDED).keys())
@pytest.mark.parametrize("tile", [PIXEL, GATHER, GATHER | {"flat": True}], ids=["pixel", "gather", "gather flat"])
def test_fprop_any_stride(problem, tile):
    x, w, bias, y = tensors(problem)
    with tiles.override(**tile):
        agrees(conv.plan_fprop(problem, x, w, bias, y, gpu=GPU))


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_fprop_box(problem):
    x, w, bias, y = tensors(problem)
    with tiles.override(**BOX):
        agrees(conv.plan_fprop(problem, x, w, bias, y, gpu=GPU))


@pytest.mark.parametrize(
    "changes",
    [
        {"splits": 3},
        {"splits": 2, "tail": 5},
        {"block_k2": 16},
        {"block_k2": 16, "splits": 2, "tail": 4},
        {"block_k": 64, "block_k2": 16, "tail": 4},
    ],
    ids=["all tiles shared", "the last five shared", "second product", "both", "the last four by filters"],
)
def test_shared_depth_and_second_product(changes):
    problem = PROBLEMS["filters and channels end inside a block"]
    x, w, bias, y = tensors(problem)
    for tile in (PIXEL, BOX):
        with tiles.override(**tile | changes):
            agrees(conv.plan_fprop(problem, x, w, bias, y, gpu=GPU))


@pytest.mark.parametrize("more", [0, 16], ids=["one product", "a second product"])
@pytest.mark.parametrize("box", [(16, 1, 1), (1, 4, 4), (2, 4, 2)], ids=str)
def test_half_a_box_more(box, more):
    problem = square(1, C=40, K=56, N=3, W=7)
    x, w, bias, y = tensors(problem)
    form = PIXEL if box[1] == 1 else BOX
    with tiles.override(**form | {"box": box, "block_k2": more, "half": True}):
        agrees(conv.plan_fprop(problem, x, w, bias, y, gpu=GPU))
        agrees(conv.plan_dgrad(problem, y, w, x, gpu=GPU))


@pytest.mark.parametrize("name", ["grouped", "strided and dilated"])
def test_shared_depth_by_pointers(name):
    problem = (PROBLEMS | STRIDED)[name]
    x, w, bias, y = tensors(problem)
    with tiles.override(**GATHER, splits=4):
        agrees(conv.plan_fprop(problem, x, w, bias, y, gpu=GPU, activation="relu"))
        agrees(conv.plan_dgrad(problem, y, w, x, gpu=GPU))


COLUMNS = BOX | {"box": (4, 4, 1), "block_k": 64, "columns": 2}


@pytest.mark.parametrize(
    "tile",
    [PIXEL, BOX, GATHER, COLUMNS, COLUMNS | {"splits": 2, "tail": 3}, COLUMNS | {"box": (8, 2, 1), "half": True}],
    ids=["pixel", "box", "gather", "columns", "columns, the last three shared", "columns, half a box more"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["3x3", "grouped", "5x5 wide padding"])
def test_dgrad(name, tile):
    problem = PROBLEMS[name]
    x, w, _, y = tensors(problem)
    with tiles.override(**tile):
        agrees(conv.plan_dgrad(problem, y, w, x, gpu=GPU))


ACROSS = PIXEL | {"block_k": 64, "block_k2": 32, "across": True}


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("name", ["3x3", "grouped", "5x5 wide padding", "strided and dilated"])
def test_second_product_across(name, rows):
    problem = (PROBLEMS | STRIDED)[name]
    x, w, bias, y = tensors(problem)
    with tiles.override(**ACROSS | {"box": (16, rows, 1)}):
        agrees(conv.plan_fprop(problem, x, w, bias, y, gpu=GPU, activation="relu"))
    for columns in (1, 2) if problem.stride == (1, 1) else ():
        with tiles.override(**ACROSS | {"box": (16, rows, 1), "columns": columns}):
            agrees(conv.plan_dgrad(problem, y, w, x, gpu=GPU))


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_wgrad_descriptors(problem):
    x, w, _, y = tensors(problem)
    for tile in (PIXEL, BOX):
        with tiles.override(**tile):
            agrees(conv.plan_wgrad(problem, y, x, w, gpu=GPU))


@pytest.mark.parametrize(
    "changes",
    [{"splits": 2}, {"taps": 5}, {"taps": 2, "block_k2": 16, "splits": 3, "last": 2}, {"block_c": 32, "half": True}],
    ids=str,
)
@pytest.mark.parametrize("name", ["5x5 wide padding", "grouped"])
def test_wgrad_shared_pixels_and_taps(name, changes):
    x, w, _, y = tensors(PROBLEMS[name])
    for tile in (PIXEL, BOX):
        with tiles.override(**tile | changes):
            agrees(conv.plan_wgrad(PROBLEMS[name], y, x, w, gpu=GPU))


IMAGES = {"whole images a step": square(1, N=16, H=3, W=2)}


@pytest.mark.parametrize("problem", (PROBLEMS | STRIDED | IMAGES).values(), ids=(PROBLEMS | STRIDED | IMAGES).keys())
def test_wgrad_gather(problem):
    x, w, _, y = tensors(problem)
    with tiles.override(**GATHER, flat=True, splits=2):
        agrees(conv.plan_wgrad(problem, y, x, w, gpu=GPU))


RUNS = {
    "7x7 s2": Conv2dProblem(N=2, C=3, H=15, W=16, K=70, R=7, S=7, stride=(2, 2), padding=((3, 3), (3, 3))),
    "11x11 s4": Conv2dProblem(N=2, C=3, H=21, W=20, K=20, R=11, S=11, stride=(4, 4), padding=((2, 2), (2, 2))),
    "unaligned": Conv2dProblem(N=1, C=3, H=15, W=19, K=16, R=5, S=5, stride=(4, 4), padding=((2, 2), (1, 1))),
    "s3 s2, rows dilated": Conv2dProblem(N=1, C=1, H=19, W=18, K=16, R=3, S=5, stride=(3, 2), dilation=(2, 1)),
    "no padding, rows anywhere": Conv2dProblem(N=6, C=3, H=11, W=15, K=96, R=5, S=5, stride=(2, 4)),
}


@pytest.mark.parametrize("problem", RUNS.values(), ids=RUNS.keys())
def test_first_layer_in_runs(problem):
    x, w, bias, y = tensors(problem)
    x = x.contiguous()
    launches = [*conv.plan_fprop(problem, x, w, bias, y, gpu=GPU), *conv.plan_wgrad(problem, y, x, w, gpu=GPU)]
    kernels = {launch.kernel.__name__ for launch in launches}
    inner = "inner_" if problem.padding == ((0, 0), (0, 0)) else ""
    assert {"filters_to_runs", f"fprop_{inner}runs", f"wgrad_{inner}runs", "runs_to_filters"} <= kernels
    for launch in launches:
        expected, found = traffic(launch), counted(launch)
        if "inner" in launch.kernel.__name__:  # rows begin and end inside an aligned load
            beside = problem.N * problem.C * problem.H * 2 * (launch.arguments["ALIGN"] - 1) * 2
            assert expected.least <= found.least <= expected.least + beside
            found = Traffic(found.read, found.written, expected.least)
        if launch.kernel.__name__ == "runs_to_filters":  # it reads what another launch left out of the runs
            found = Traffic(found.read, found.written, expected.least)
        assert expected == found, launch.kernel.__name__


def test_odd_channels_with_their_copies():
    problem = square(1, C=19, K=35)
    x, w, bias, y = tensors(problem)
    fprop, dgrad = conv.plan_fprop(problem, x, w, bias, y, gpu=GPU), conv.plan_dgrad(problem, y, w, x, gpu=GPU)
    wgrad = conv.plan_wgrad(problem, y, x, w, gpu=GPU)
    assert [launch.kernel.__name__ for launch in (*fprop, *wgrad)].count("widen") == 5
    agrees([*fprop, *dgrad, *wgrad])


def test_contiguous_operands_with_their_turns():
    problem = square(1, C=19, K=32, groups=1)
    x, w, bias, y = (None if t is None else t.contiguous() for t in tensors(problem))
    launches = [*conv.plan_fprop(problem, x, w, bias, y, gpu=GPU), *conv.plan_dgrad(problem, y, w, x, gpu=GPU)]
    assert [launch.kernel.__name__ for launch in launches].count("turn") >= 4
    agrees(launches)


@pytest.mark.parametrize(
    ("stride", "forced"), [(3, {}), (1, {"formulation": "box"})], ids=["strided", "rows of windows"]
)
def test_first_layer_with_its_rearrangements(stride, forced):
    shape = {"N": 2, "C": 3, "H": 19, "W": 23, "K": 16, "R": 5, "S": 5}
    problem = Conv2dProblem(**shape, stride=(stride, stride), padding=((2, 2), (1, 1)))
    x, w, bias, y = tensors(problem)
    with tiles.override(**forced):
        launches = [
            *conv.plan_fprop(problem, x.contiguous(), w, bias, y, gpu=GPU), *conv.plan_wgrad(problem, y, x, w, gpu=GPU)
        ]  # fmt: skip
    assert {"space_to_depth", "depth_to_space"} <= {launch.kernel.__name__ for launch in launches}
    for launch in launches:
        expected, found = traffic(launch), counted(launch)
        if launch.kernel.__name__ == "depth_to_space":  # it reads what another launch left out of the blocked filters
            found = Traffic(found.read, found.written, expected.least)
        assert expected == found, launch.kernel.__name__


POOLS = {
    "3x3 s2": Pool2dProblem(2, 8, 9, 7, (3, 3), (2, 2)),
    "3x3 s2 padded": Pool2dProblem(2, 8, 8, 6, (3, 3), (2, 2), (1, 1)),
    "2x2 s2": Pool2dProblem(1, 16, 6, 6, (2, 2), (2, 2)),
    "dilated": Pool2dProblem(1, 8, 9, 9, (2, 2), (1, 1), (0, 0), (2, 2)),
    "ceil": Pool2dProblem(1, 8, 6, 6, (3, 3), (2, 2), ceil_mode=True),
}


@pytest.mark.parametrize("problem", POOLS.values(), ids=POOLS.keys())
def test_max_pool_both_ways(problem):
    x, y = image(*problem.x_shape), image(*problem.y_shape)
    switch = torch.zeros(problem.y_shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    forward = pool.plan_max_forward(problem, x, y, switch, gpu=GPU)
    agrees([forward])
    backward = pool.plan_max_backward(problem, torch.randn_like(y), switch, None, torch.empty_like(x), gpu=GPU)
    agrees([backward])


@pytest.mark.parametrize("problem", POOLS.values(), ids=POOLS.keys())
def test_masked_max_pool_backward(problem):
    x, y = image(*problem.x_shape), image(*problem.y_shape)
    switch = torch.zeros(problem.y_shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    pool.plan_max_forward(problem, x, y, switch, gpu=GPU, activation="relu").run()
    y[0] = 0
    launch = pool.plan_max_backward(problem, torch.randn_like(y), switch, y, torch.empty_like(x), gpu=GPU)
    expected, found = traffic(launch), counted(launch)
    assert found.written == expected.written
    if launch.kernel.__name__ == "max_backward":
        dead = int((y <= 0).sum())
        assert found.read == expected.read - dead * 2, "gradients of windows that ReLU cut are not loaded"
    else:
        assert found == expected, "whole vectors, whatever ReLU cut"


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("name", "long", "wide", "cells"), [("3x3 s2", 2, 2, 3), ("3x3 s2 padded", 3, 4, 1),
                                                             ("ceil", 2, 2, 3)])  # fmt: skip
def test_max_pool_in_strips(name, long, wide, cells, masked):
    problem = POOLS[name]
    x, y = image(*problem.x_shape), image(*problem.y_shape)
    switch = torch.zeros(problem.y_shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    across = [strip_tiles.strip_tile(problem, x.dtype, GPU, long, columns) for columns in (wide, cells)]
    forward = pool.plan_max_forward(problem, x, y, switch, gpu=GPU, strips=across[0])
    agrees([forward])
    backward = pool.plan_max_backward(
        problem, torch.randn_like(y), switch, y if masked else None, torch.empty_like(x), gpu=GPU, strips=across[1]
    )
    agrees([backward])


@pytest.mark.parametrize(("name", "long", "masked"), [("3x3 s2", 2, False), ("3x3 s2 padded", 3, True),
                                                      ("ceil", 2, False)])  # fmt: skip
def test_max_pool_in_columns_of_planes(name, long, masked):
    problem, tile = replace(POOLS[name], C=3), PlaneTile(long, 8)
    x, y = torch.randn(problem.x_shape).half(), torch.randn(problem.y_shape).half()
    switch = torch.zeros(problem.y_shape, dtype=torch.uint8)
    agrees([pool.plan_max_forward(problem, x, y, switch, gpu=GPU, strips=tile)])
    mask, dx = y if masked else None, torch.empty_like(x)
    agrees([pool.plan_max_backward(problem, torch.randn_like(y), switch, mask, dx, gpu=GPU, strips=tile)])


def test_average_pool_both_ways():
    problem = AdaptivePool2dProblem(2, 8, 7, 9, 3, 4)
    x, y = image(2, 8, 7, 9), image(2, 8, 3, 4)
    agrees(
        [
            pool.plan_adaptive_avg_forward(problem, x, y, gpu=GPU),
            pool.plan_adaptive_avg_backward(problem, y, x, gpu=GPU),
        ]
    )


AVERAGES = {
    "average": pool.Averaging(True, None),
    "average without padding": pool.Averaging(False, None),
    "norm": pool.Averaging(True, None, 2.0),
}


@pytest.mark.parametrize("averaging", AVERAGES.values(), ids=AVERAGES.keys())
@pytest.mark.parametrize("name", ["3x3 s2", "3x3 s2 padded", "2x2 s2", "ceil"])
def test_window_averages_both_ways(name, averaging):
    problem = POOLS[name]
    x, y = image(*problem.x_shape), image(*problem.y_shape)
    saved = (x, y) if averaging.norm else (None, None)
    agrees(
        [
            pool.plan_average_forward(problem, averaging, x, y, gpu=GPU),
            pool.plan_average_backward(problem, averaging, torch.randn_like(y), *saved, torch.empty_like(x), gpu=GPU),
        ]
    )


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (1, 1), (7, 9), (9, 10)], ids=["uneven", "all", "same", "more"])
def test_adaptive_max_both_ways_and_its_indices(rows, columns):
    problem = AdaptivePool2dProblem(2, 8, 7, 9, rows, columns)
    x, y = image(2, 8, 7, 9), image(2, 8, rows, columns)
    switch = torch.zeros(y.shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    index = torch.zeros_like(switch, dtype=torch.int64)
    for launch in (
        pool.plan_adaptive_max_forward(problem, x, y, switch, gpu=GPU),
        pool.plan_adaptive_max_backward(problem, y, switch, torch.empty_like(x), gpu=GPU),
        pool.plan_adaptive_switch_to_index(problem, switch, index, gpu=GPU),
    ):
        agrees([launch])


def test_unpool_both_ways_and_the_indices_it_takes():
    problem = POOLS["2x2 s2"]
    x, y = image(*problem.x_shape), image(*problem.y_shape)
    switch = torch.zeros(y.shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    index = torch.zeros_like(switch, dtype=torch.int64)
    pool.plan_max_forward(problem, x, y, switch, gpu=GPU).run()
    agrees([pool.plan_switch_to_index(problem, switch, index, gpu=GPU)])
    agrees([pool.plan_unpool(y, index, torch.zeros_like(x), gpu=GPU)])
    agrees([pool.plan_unpool_backward(x, index, torch.empty_like(y), gpu=GPU)])


@pytest.mark.parametrize("name", ["3x3", "dilated", "strided and dilated"])
@pytest.mark.parametrize("patches", [True, False], ids=["patches", "pixels"])
def test_unfold_and_fold(name, patches):
    problem = (PROBLEMS | STRIDED)[name]
    depth, pixels = problem.im2col_shape
    cols = torch.randn(problem.N, pixels, depth).half().mT if patches else torch.randn(problem.N, depth, pixels).half()
    x = image(*problem.x_shape)
    for run in (1, problem.C):
        agrees([unfold.plan_unfold(problem, x, cols, run, gpu=GPU), unfold.plan_fold(problem, cols, x, run, gpu=GPU)])


DEPTHWISE = {
    "3x3": square(1, K=24, groups=24, H=7),
    "strided": square(1, K=24, groups=24, H=9, W=7, stride=(2, 2)),
    "dilated": square(2, K=24, groups=24, H=9, dilation=(2, 2)),
    "two filters each": square(1, K=48, groups=24, H=5),
    "5x5": square(2, K=24, groups=24, H=6, R=5, S=5),
}


@pytest.mark.parametrize("problem", DEPTHWISE.values(), ids=DEPTHWISE.keys())
def test_depthwise(problem):
    x, w, bias, y = tensors(problem)
    agrees(depthwise.plan_fprop(problem, x, w, bias, y, gpu=GPU))
    for launch in depthwise.plan_dgrad(problem, y, w, x, gpu=GPU):
        expected, found = traffic(launch), counted(launch)
        if problem.stride[0] > 1:  # each residue's launch reads a part of the taps, and its filters hold all
            found = Traffic(found.read, found.written, expected.least)
        assert expected == found, launch.tile
    agrees(depthwise.plan_wgrad(problem, y, x, w.contiguous(), gpu=GPU))


@pytest.mark.parametrize("shared_bias", [True, False], ids=["shared bias", "own biases"])
@pytest.mark.parametrize("name", ["3x3", "no padding", "strided"])
def test_locally_connected(name, shared_bias):
    problem = (PROBLEMS | STRIDED)[name]
    x, y = image(*problem.x_shape), image(*problem.y_shape)
    w = torch.randn(problem.P * problem.Q, problem.K, problem.C * problem.taps).half()
    bias = torch.randn(problem.y_shape[1:2] if shared_bias else problem.y_shape[1:]).half()
    agrees(
        [
            local.plan_fprop(problem, x, w, bias, y, gpu=GPU, precision="ieee"),
            local.plan_dgrad(problem, y, w, torch.empty_like(x), gpu=GPU, precision="ieee"),
            local.plan_wgrad(problem, y, x, torch.empty_like(w), gpu=GPU, precision="ieee"),
        ]
    )


def rows_of(shape):
    """[OUTER, D, INNER] of channels_last pixels, or of plain rows."""
    if len(shape) == 2:
        return torch.randn(shape).half().unsqueeze(2)
    return image(*shape).flatten(2)


@pytest.mark.parametrize("shape", [(5, 1000), (2, 21, 4, 3)], ids=["rows", "pixels"])
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_both_ways(shape, log):
    x = rows_of(shape)
    y = torch.randn(x.shape).half()
    agrees(
        [
            softmax.plan_softmax(x, y, log, gpu=GPU),
            softmax.plan_softmax_backward(y, y.clone(), torch.empty_like(y), log, gpu=GPU),
        ]
    )


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_walks_twice_along_rows_that_do_not_fit(log):
    x = torch.randn(2, 1000, 1).half()
    for launch in (
        softmax.plan_softmax(x, x.clone(), log, gpu=GPU),
        softmax.plan_softmax_backward(x, x.clone(), x.clone(), log, gpu=GPU),
    ):
        launch.arguments.update(ONE=False, COLS=256)
        agrees([launch])


@pytest.mark.parametrize("kind", ["classes", "weighted classes", "probabilities", "to probabilities"])
@pytest.mark.parametrize("shape", [(5, 100), (2, 21, 4, 3)], ids=["rows", "pixels"])
def test_cross_entropy_both_ways(shape, kind):
    x = rows_of(shape)
    count = x.shape[0] * x.shape[2]
    target = torch.rand(x.shape).half() if "prob" in kind else torch.ones(x.shape[0], x.shape[2], dtype=torch.int64)
    weight = torch.rand(x.shape[1]).half() if kind.startswith("weighted") else None
    losses, saved = torch.empty(2, count), torch.zeros(3, count)
    settings = (-100, 0.1)
    agrees([softmax.plan_cross_entropy(x, target, weight, losses, saved, *settings, gpu=GPU)])
    grad, divisor, dx = torch.ones(()).half(), torch.ones(()), torch.empty(x.shape).half()
    for grads in (grad, torch.ones(count).half()):
        agrees(
            [
                softmax.plan_cross_entropy_backward(
                    grads, divisor, x, target, weight, saved, dx, *settings, kind == "to probabilities", gpu=GPU
                )
            ]
        )


def test_local_response_norm_of_contiguous_images():
    x, dy = torch.randn(2, 24, 3, 5).half(), torch.randn(2, 24, 3, 5).half()
    for gradient in (None, dy):
        launch = norm.plan_local_response_norm(x, gradient, torch.empty_like(x), 5, 2e-5, 0.75, 2.0, gpu=GPU)
        assert launch.kernel.__name__.startswith("along_rows")
        agrees([launch])
        launch.arguments["CHUNK"] = 10
        agrees([Launch(launch.kernel, (3 * launch.grid[0],), launch.arguments)])


def test_dropout():
    x, seed = torch.randn(3000).half(), torch.zeros(1, dtype=torch.int64)
    agrees([pointwise.plan_dropout(x, torch.empty_like(x), seed, 0.5, gpu=GPU)])
    problem = square(0, R=1, S=1, H=1, W=1, N=20)
    x, w, bias, y = tensors(problem)
    across = PIXEL | {"block_k2": 16, "across": True}
    for tile in (PIXEL, PIXEL | {"block_k2": 16, "splits": 2, "tail": 2}, across, GATHER):
        with tiles.override(**tile):
            agrees(conv.plan_fprop(problem, x, w, bias, y, seed, gpu=GPU, dropout=0.5))


def test_local_response_norm_both_ways():
    x, dy = image(2, 24, 3, 5), image(2, 24, 3, 5)
    for gradient in (None, dy):
        agrees([norm.plan_local_response_norm(x, gradient, torch.empty_like(x), 5, 2e-5, 0.75, 2.0, gpu=GPU)])


def test_pointwise():
    y, dy = image(2, 24, 5, 3), image(2, 24, 5, 3)
    flat = [t.permute(0, 2, 3, 1).reshape(-1) for t in (dy, y, torch.empty_like(y))]
    sums = torch.empty(24, dtype=torch.float16)
    agrees([
        pointwise.plan_relu(flat[1], flat[2], gpu=GPU), pointwise.plan_relu_backward(*flat, gpu=GPU),
        *pointwise.plan_bias_backward(dy, y, torch.empty_like(y), sums, gpu=GPU),
        *pointwise.plan_bias_backward(dy, None, None, sums, gpu=GPU),
    ])  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_pool_touches_its_least_and_asks_for_little_more(memory_format):
    """What windows share goes to L2 again where each window is loaded alone, and stays in registers in a strip."""
    problem = Pool2dProblem(128, 64, 55, 55, (3, 3), (2, 2))
    x, y = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in (problem.x_shape, problem.y_shape))
    x, y = (t.to(memory_format=memory_format) for t in (x, y))
    switch = torch.empty_like(y, dtype=torch.uint8)
    alone = traffic(pool.plan_max_forward(problem, x, y, switch, gpu=GPU))
    assert alone.least == problem.bytes_least(2, switch=True)
    assert 1.5 < alone.requested / alone.least < 2.0
    for launch in (
        pool.plan_max_forward(problem, x, y, switch, gpu=hardware.GPUS["H100"]),
        pool.plan_max_backward(problem, y, switch, None, x, gpu=hardware.GPUS["H100"]),
    ):
        found = traffic(launch)
        assert found.least == alone.least
        assert found.requested <= 1.1 * found.least


def test_unknown_kernels_have_no_traffic():
    assert traffic(Launch(test_pointwise, (1,), {})) is None
