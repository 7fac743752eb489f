"""Every kernel, tile and dtype on the GPU that is here against float64; wrong tiles are left out of later choices.

Each tile runs in a worker process: one that hangs, or breaks the process's hold of the GPU, costs its own answer alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from . import environment
from .cases import DEFAULT_DTYPES, DTYPES, Case, cases, conv_problem, passes_of, shape_of
from .check import budget, largest_difference
from .networks import Shape, known
from .passes import operands_of, placed, work
from .providers import precision
from .records import replace_text
from .workers import Progress, Task, describe_error, run_tasks, serve

PASSES = ("fprop", "dgrad", "wgrad")
SECONDS_EACH = 120.0  # for one tile: compiling takes one to three, a large fp32 tile a minute
REHEARSED = 6  # tiles that a run in the interpreter tries
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")


def _conv(channels: int, filters: int, kernel: int, size: int, images: int = 3, **settings: Any) -> Shape:
    with torch.device("meta"):
        module = nn.Conv2d(channels, filters, kernel, **settings)
    name = f"{channels}x{size}x{size}-{filters}-{kernel}x{kernel}" + "".join(f"-{k}{v}" for k, v in settings.items())
    return Shape(name, "conv2d", module, (images, channels, size, size), "relu")


# Small, and awkward in one way each: extents that no tile divides, padding on all sides, what descriptors cannot
# address, strides, dilation, groups, first layers (padded, and in rows at odd places), depths of less than one step.
PROBLEMS = (
    _conv(72, 104, 3, 9, padding=1),
    _conv(64, 96, 5, 7, padding=2),
    _conv(40, 48, 3, 9, stride=2, padding=1),
    _conv(48, 56, 3, 11, dilation=3, padding=3),
    _conv(64, 96, 3, 7, groups=2, padding=1),
    _conv(3, 40, 11, 39, stride=4, padding=2),
    _conv(3, 40, 11, 39, images=4, stride=4),
    _conv(17, 19, 3, 6, padding=1),
    _conv(136, 200, 1, 1, images=5),
)


def _other_layers() -> list[Shape]:
    """Everything beside conv2d's tiles, each on an awkward size."""
    from tileconv.kernels.nn import LocallyConnected2d

    image, rows = (3, 19, 11, 13), (5, 77)
    modules: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        ("conv1d", nn.Conv1d(19, 24, 5, 2, 2), (3, 19, 23)),
        ("conv_transpose2d", nn.ConvTranspose2d(19, 24, 3, 2, 1, 1), image),
        ("conv2d_im2col", nn.Conv2d(19, 24, 3, 2, 1), image),
        ("locally_connected2d", LocallyConnected2d(19, 24, (11, 13), 3, 2, 1), image),
        ("linear", nn.Linear(77, 40), rows),
        ("relu", nn.ReLU(), image),
        ("max_pool2d", nn.MaxPool2d(3, 2, 1), image),
        ("max_pool2d", nn.MaxPool2d(2, 3, 0, 2, ceil_mode=True), image),
        ("avg_pool2d", nn.AvgPool2d(3, 2, 1), image),
        ("lp_pool2d", nn.LPPool2d(2.0, 3, 2), image),
        ("adaptive_avg_pool2d", nn.AdaptiveAvgPool2d((4, 5)), image),
        ("adaptive_max_pool2d", nn.AdaptiveMaxPool2d((4, 5)), image),
        ("max_unpool2d", nn.MaxUnpool2d(2, 2), image),
        ("local_response_norm", nn.LocalResponseNorm(5), image),
        ("softmax", nn.Softmax(1), rows),
        ("log_softmax", nn.LogSoftmax(1), rows),
        ("cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1), rows),
        ("unfold", nn.Unfold(3, 1, 1, 2), image),
        ("fold", nn.Fold((9, 9), 3, 1, 1, 2), (3, 45, 25)),
    ]
    found = [Shape(f"{op}-{i}", op, module, extents, None) for i, (op, module, extents) in enumerate(modules)]
    return [*found, _conv(24, 24, 3, 9, groups=24, padding=1)]


@dataclass(frozen=True)
class Test:
    """One comparison: a layer's pass in a dtype, with a tile that is forced or, for none, what the library chooses."""

    shape: int  # in PROBLEMS, or behind them in the other layers
    pass_: str
    dtype: str
    tile: dict[str, Any] | None = None
    name: str = ""

    def __str__(self) -> str:
        return f"{shapes()[self.shape].name} {self.pass_} {self.dtype} {self.name}".rstrip()


@dataclass(frozen=True)
class Selftest:
    """What a run found: `failed` are the tests that did not pass, with reasons, `late` those not begun in time."""

    gpu: str
    passed: int
    failed: tuple[tuple[Test, str], ...]
    late: int
    excluded: int
    file: str


@cache
def shapes() -> tuple[Shape, ...]:
    """All layers that are tested, by the numbers that tests name them by."""
    return (*PROBLEMS, *_other_layers())


def tests(dtypes: Sequence[str], gpu: Any) -> list[Test]:
    """All tests for a GPU: the kernels as the library chooses them first, then tiles in use, then all others.

    Each tile of a pass and dtype is tested once, on the first problem that can run it, those that AlexNet uses on two.
    """
    for dtype in dtypes:
        known("dtype", dtype, DTYPES)
    first = [
        Test(number, pass_, dtype)
        for dtype in dtypes
        for number, shape in enumerate(shapes())
        for pass_ in passes_of(shape)
    ]
    used = [test for dtype in dtypes for test in _tile_tests(_in_use(dtype, gpu), dtype, gpu, problems=2)]
    # Round by round, so that a budget that ends cuts all passes and dtypes alike.
    rest = [list(_tile_tests(_candidates(dtype, pass_, gpu), dtype, gpu)) for dtype in dtypes for pass_ in PASSES]
    mixed = [test for round_ in itertools.zip_longest(*rest) for test in round_ if test is not None]
    return list({(t.shape, t.pass_, t.dtype, t.name): t for t in [*first, *used, *mixed]}.values())


def _inner(shape: Shape, pass_: str, dtype: str, gpu: Any) -> list[Any]:
    """The problems that tiles are chosen for in a pass: dgrad's parts, a first layer's blocks."""
    from tileconv.kernels import tiles

    problem = conv_problem(shape)
    if pass_ == "dgrad":
        return [part.problem for part in problem.dgrad]
    return [tiles.blocked(problem, pass_, DTYPES[dtype], _level(dtype), gpu)]


def _level(dtype: str) -> str:
    return "tf32" if dtype == "tf32" else "ieee"


def _in_use(dtype: str, gpu: Any) -> Iterator[tuple[str, Any]]:
    """(pass, tile) for every layer of AlexNet at the batch a GPU is for."""
    from tileconv.kernels import tiles

    for case in cases("alexnet", 128, [dtype], PASSES):
        for problem in _inner(shape_of(case), case.pass_, dtype, gpu):
            yield case.pass_, tiles.choose(problem, case.pass_, DTYPES[dtype], _level(dtype), gpu)


def _candidates(dtype: str, pass_: str, gpu: Any) -> Iterator[tuple[str, Any]]:
    from tileconv.kernels import conv_candidates

    for shape in PROBLEMS:
        for problem in _inner(shape, pass_, dtype, gpu):
            for tile in conv_candidates.clean_candidates(problem, pass_, DTYPES[dtype], _level(dtype), gpu):
                yield pass_, tile


def _tile_tests(found: Iterator[tuple[str, Any]], dtype: str, gpu: Any, problems: int = 1) -> Iterator[Test]:
    from tileconv.kernels import conv_tile

    for pass_, tile in dict.fromkeys(found):
        left = problems
        for number, shape in enumerate(PROBLEMS):
            if shape.reads_image and pass_ == "dgrad":
                continue
            inner = _inner(shape, pass_, dtype, gpu)
            reasons = (conv_tile.why_invalid(tile, p, pass_, DTYPES[dtype], _level(dtype), gpu) for p in inner)
            if left and not any(reasons):
                yield Test(number, pass_, dtype, dataclasses.asdict(tile), str(tile))
                left -= 1


def run_test(test: Test, device: str) -> str:
    """Run one test; returns why it failed, empty for one that passed."""
    from tileconv.kernels import tiles

    shape = shapes()[test.shape]
    case = Case("selftest", shape.name, test.pass_, shape.input[0], test.dtype)
    t = operands_of(shape, case, device)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in t.items()}
    native = placed(t, shape, "native")
    tile = {} if test.tile is None else test.tile | {"box": tuple(test.tile["box"])}
    with torch.no_grad(), precision(test.dtype):
        exact = work("torch", case, shape, wide)()
        theirs = work("torch", case, shape, t)()
        with tiles.override(**tile):
            run = work("ours", case, shape, native)
            ours, again = run(), run()
    error = largest_difference(ours, exact)
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    allowed = budget(largest_difference(theirs, exact), test.dtype, largest)
    if not error <= allowed:
        return f"error {error:.3g}, allowed is {allowed:.3g}"
    return "" if torch.equal(ours, again) else "a second call gives other bits"


def run_selftest(
    *, minutes: float = 5.0, jobs: int = 2, dtypes: Sequence[str] = (), progress: Progress | None = None
) -> Selftest:
    """Test for `minutes`, then write what failed to the file that tiles.py reads (kernels/excluded.py).

    A tile that passed is taken off the file, one that was not reached in time stays as it was. Without a GPU the first
    few tests and tiles of an H100 run in the interpreter, and the file is not written.
    """
    from tileconv.kernels import hardware

    if not minutes > 0:  # as NaN is not
        raise ValueError(f"minutes={minutes:g} must be more than 0")
    deadline = time.monotonic() + 60 * minutes
    rehearsal = hardware.interpreting()
    if not rehearsal:
        environment.require_launches()  # or every tile would fail, and be excluded
    gpu = hardware.GPUS["H100"] if rehearsal else hardware.gpu_of(torch.device("cuda"))
    todo = tests(dtypes or DEFAULT_DTYPES, gpu)
    if rehearsal:
        todo = _rehearsed(todo)
    answers = run_tasks(
        "tileconv.bench.selftest", [dataclasses.asdict(test) for test in todo], jobs=jobs,
        environment={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}, label=lambda task: str(Test(**task)),
        progress=progress, seconds_each=SECONDS_EACH, deadline=deadline,
    )  # fmt: skip
    ran = [(test, answer) for test, answer in zip(todo, answers, strict=True) if "late" not in answer]
    failed = tuple((test, reason) for test, a in ran if (reason := a.get("reason", a.get("error", "no answer"))))
    name = hardware.INTERPRETER.name if rehearsal else gpu.name
    count, file = (0, "") if rehearsal else exclude(name, [test for test, _ in ran], failed)
    return Selftest(name, len(ran) - len(failed), failed, len(todo) - len(ran), count, file)


def _rehearsed(todo: Sequence[Test]) -> list[Test]:
    """A few of each kind that the interpreter runs in a second."""
    plain = [test for test in todo if not test.name and test.dtype == "fp32" and test.pass_ in ("fprop", "forward")]
    tiled = [test for test in todo if test.tile and test.dtype == "fp16" and test.tile["formulation"] == "box"]
    return [*plain[:REHEARSED], *tiled[: REHEARSED // 3]]


def exclude(gpu: str, ran: Sequence[Test], failed: Sequence[tuple[Test, str]]) -> tuple[int, str]:
    """Bring the file up to date: how many tiles it holds for this GPU and Triton now, and its name."""
    import triton

    from tileconv.kernels import excluded

    file = excluded.path()
    if file is None:
        return 0, ""
    tested = {(test.pass_, test.name) for test in ran if test.name}
    mine = (gpu, triton.__version__)
    kept = [e for e in excluded.load(file) if (e["gpu"], e["triton"]) != mine or (e["pass"], e["tile"]) not in tested]
    reasons = {(test.pass_, test.name): f"{test.dtype}: {reason}" for test, reason in failed if test.name}
    added = [
        {"gpu": gpu, "triton": triton.__version__, "pass": pass_, "tile": tile, "reason": reason}
        for (pass_, tile), reason in reasons.items()
    ]
    if added or file.exists():
        replace_text(file, json.dumps([*kept, *added], indent=1) + "\n")
    excluded.forget()
    return len(excluded.listed(gpu)), str(file)


def summary(found: Selftest) -> list[str]:
    """What a run found, for people: failures first."""
    lines = [f"failed: {test}: {reason}" for test, reason in found.failed]
    lines.append(f"{found.gpu}: {found.passed} tests passed, {len(found.failed)} failed, {found.late} not reached")
    if found.excluded:
        lines.append(f"{found.excluded} tiles are excluded on this GPU: {found.file}")
    if found.failed and any(not test.name for test, _ in found.failed):
        lines.append("A kernel without a choice of tiles failed: it cannot be left out, and its results are wrong here")
    return lines


def sanitized(minutes: float, dtypes: Sequence[str]) -> int:
    """Run the self-test under NVIDIA's compute-sanitizer, half the time for each tool; the worse exit status.

    Raises FileNotFoundError where it is not installed. Its findings go to stderr as they come.
    """
    program = shutil.which(SANITIZER)
    if program is None:
        raise FileNotFoundError(f"{SANITIZER} is not on PATH: it comes with NVIDIA's CUDA toolkit")
    # PyTorch's own allocator hands out parts of large blocks, in which a stray access is no error.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    chosen = [part for dtype in dtypes for part in ("--dtype", dtype)]
    status = 0
    for tool in TOOLS:
        command = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "1", sys.executable, "-m",
                   "tileconv.bench", "selftest", "--jobs", "1", "--minutes", f"{minutes / 2:g}", *chosen]  # fmt: skip
        status = max(status, subprocess.run(command, env=environment, check=False).returncode)
    return status


def answer(task: Task, device: str) -> dict[str, Any]:
    """A worker's answer to one test. After an error that stays with the process it is the worker's last."""
    try:
        reason = run_test(Test(**task), device)
    except Exception as error:
        reason = describe_error(error)
        try:
            torch.cuda.synchronize()
        except (RuntimeError, AssertionError):
            return {"reason": reason} | ({"last": True} if device == "cuda" else {})
    return {"reason": reason}


def main() -> None:
    """The worker: a test a line in, {"reason": "..."} a line out, empty for a pass."""
    if sys.argv[1:] != ["--worker"]:
        raise SystemExit("usage: python -m tileconv.bench.selftest --worker (reads JSON tests on stdin)")
    from tileconv.kernels import hardware

    device = "cpu" if hardware.interpreting() else "cuda"
    serve(lambda task: answer(task, device))


if __name__ == "__main__":
    main()
