"""Step one of the main job: every layer on the activations that real photographs bring to it, against float64."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from .cases import DEFAULT_DTYPES, DTYPES, EPS
from .images import images
from .networks import known
from .records import finite
from .workers import Progress, Task, run_tasks, serve

NETWORK = "network"
CHOSEN = "chosen"
# One program an output pixel: in the interpreter that is quick enough for the last maps only.
PIXEL_EXTENT = 13


def budget(torch_error: float, dtype: str, largest: float) -> float:
    """The allowed error: 2 x (error of torch in the same dtype on the same input + eps(dtype) x max |reference|)."""
    return 2 * (torch_error + EPS[dtype] * largest)


def largest_difference(a: Any, b: Any) -> float:
    """max |a - b| in float64; NaN where either holds one, and inf where the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


@cache
def _network(batch: int, device: str) -> tuple[Any, dict[str, Any]]:
    """The model, and the float64 activation that arrives at every layer (and the network's input)."""
    import torch

    from tileconv.model.alexnet import alexnet, layers

    model = alexnet(seed=0).eval().to(device)
    x = images(batch)[0].to(device).double()
    inputs = {NETWORK: x}
    with torch.no_grad():
        for layer in layers(model):
            inputs[layer.name] = x
            x = layer.reference(x)
    return model, inputs


@cache
def _model_in(batch: int, device: str, dtype: str) -> tuple[Any, Any]:
    """The model with parameters rounded to `dtype`: as they are, and widened to float64 for the reference."""
    import copy

    model, _ = _network(batch, device)
    narrow = copy.deepcopy(model).to(DTYPES[dtype])
    return narrow, copy.deepcopy(narrow).double()


def tasks(batch: int, dtypes: Sequence[str]) -> list[Task]:
    """What is checked: every layer as the library runs it, each formulation valid for it, and the whole network.

    Raises ValueError for an unknown dtype or a batch below 1.
    """
    from .networks import network_layers

    for dtype in dtypes:
        known("dtype", dtype, DEFAULT_DTYPES)
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    found: list[Task] = []
    for dtype in dtypes:
        common = {"batch": batch, "dtype": dtype}
        found.append(common | {"layer": NETWORK, "formulation": CHOSEN, "memory_format": "contiguous"})
        for shape in network_layers("alexnet", batch):
            # The first layer reads the photographs as they come; the others read what the layer before wrote.
            native = "contiguous" if len(shape.input) == 2 or shape.input[1] == 3 else "channels_last"
            found.append(common | {"layer": shape.name, "formulation": CHOSEN, "memory_format": native})
            if shape.op in ("conv2d", "max_pool2d") and native != "contiguous":
                found.append(common | {"layer": shape.name, "formulation": CHOSEN, "memory_format": "contiguous"})
            found.extend(
                common | {"layer": shape.name, "formulation": formulation, "memory_format": native}
                for formulation in valid_formulations(shape, dtype)
            )
    return found


def valid_formulations(shape: Any, dtype: str) -> list[str]:
    """The formulations of a convolution that are forced one by one: those the library says can run it."""
    import torch

    from tileconv.kernels import hardware, tiles

    from .cases import conv_problem

    if shape.op != "conv2d":
        return []
    problem = conv_problem(shape)
    gpu = hardware.INTERPRETER if hardware.interpreting() else hardware.gpu_of(torch.device("cuda"))
    found = tiles.formulations(problem, "fprop", DTYPES[dtype], gpu)
    if hardware.interpreting() and max(problem.P, problem.Q) > PIXEL_EXTENT:
        return [name for name in found if name != "pixel"]
    return list(found)


def run_check(task: Task, device: str = "cpu") -> dict[str, Any]:
    """One row of records.Check for a task: run it on our kernels, on torch in the same dtype and in float64."""
    import contextlib

    import torch

    from tileconv.kernels import tiles
    from tileconv.model.alexnet import layers, reference_forward

    from .providers import precision

    run: Any
    plain: Any
    batch, dtype, name = task["batch"], known("dtype", task["dtype"], DTYPES), task["layer"]
    _, inputs = _network(batch, device)
    narrow, wide = _model_in(batch, device, dtype)
    x = inputs[name].to(DTYPES[dtype])
    if x.dim() == 4:
        x = x.contiguous(memory_format=getattr(torch, _torch_format(task["memory_format"])))
    forced = task["formulation"] != CHOSEN
    with torch.no_grad(), precision(dtype):  # on a GPU PyTorch would compute fp32 convolutions in TF32
        if name == NETWORK:
            op, run, plain = "forward", narrow, partial(reference_forward, narrow)
            reference = reference_forward(wide, x.double())
        else:
            layer = next(item for item in layers(narrow) if item.name == name)
            op, run, plain = layer.op, layer.ours, layer.reference
            reference = next(item for item in layers(wide) if item.name == name).reference(x.double())
        theirs = plain(x)
        start = time.perf_counter()
        with tiles.override(formulation=task["formulation"]) if forced else contextlib.nullcontext():
            ours = run(x)
        seconds = time.perf_counter() - start
    error, torch_error = largest_difference(ours, reference), largest_difference(theirs, reference)
    allowed = budget(torch_error, dtype, float(reference.abs().max()) if reference.numel() else 0.0)
    right_type = ours.dtype == x.dtype and ours.shape == reference.shape
    return _row(task, op, tuple(x.shape)) | {
        "error": finite(error),
        "torch_error": finite(torch_error),
        "allowed": finite(allowed),
        "passed": bool(error <= allowed) and right_type,
        "seconds": round(seconds, 3),
        "note": images(1)[1] if right_type else f"output is {ours.dtype} {tuple(ours.shape)}",
    }


def _torch_format(name: str) -> str:
    return "channels_last" if name == "channels_last" else "contiguous_format"


def _row(task: Task, op: str, shape: tuple[int, ...]) -> dict[str, Any]:
    parts = ("alexnet", task["layer"], task["dtype"], task["memory_format"], task["formulation"])
    return {
        "case": "/".join(parts), "layer": task["layer"], "op": op, "shape": list(shape), "dtype": task["dtype"],
        "memory_format": task["memory_format"], "formulation": task["formulation"],
    }  # fmt: skip


def checks(
    batch: int,
    dtypes: Sequence[str] = ("fp32", "fp16", "bf16"),
    *,
    jobs: int = 2,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Check rows (JSON of records.Check) for AlexNet on `batch` photographs.

    `progress(done, total, label)` is called after each. A check that raises gives a row that did not pass, with the
    error as its note. With a GPU at most four workers share it; without, `jobs` workers interpret.
    """
    return answered(
        "tileconv.bench.check",
        tasks(batch, dtypes),
        blank=lambda task: _row(task, "", ()),
        label=lambda task: f"{task['layer']} {task['dtype']} {task['formulation']}",
        jobs=jobs,
        progress=progress,
    )


def answered(
    module: str,
    todo: Sequence[Task],
    *,
    blank: Callable[[Task], dict[str, Any]],
    label: Callable[[Task], str],
    jobs: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """The rows that workers of `module` answer; `blank` is what is known of a row before it was checked."""
    import torch

    gpu = torch.cuda.is_available()
    # A worker's arithmetic is small beside the interpreter's Python, so each takes its share of the cores.
    threads = str(max(1, len(os.sched_getaffinity(0)) // max(1, jobs)))
    environment = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    answers = run_tasks(
        module, todo, jobs=min(jobs, 4) if gpu else jobs, environment=environment, label=label, progress=progress
    )  # fmt: skip
    lost = {"error": None, "torch_error": None, "allowed": None, "passed": False, "seconds": 0.0}
    return [
        answer.get("row", blank(task) | lost | {"note": answer.get("error", "")})
        for task, answer in zip(todo, answers, strict=True)
    ]


def main() -> None:
    """The worker: a task a line in, {"row": {...}} a line out."""
    if sys.argv[1:] != ["--worker"]:
        raise SystemExit("usage: python -m tileconv.bench.check --worker (reads JSON tasks on stdin)")
    from tileconv.bench.environment import device

    where = "cuda" if device().kind == "cuda" else "cpu"
    serve(lambda task: {"row": run_check(task, where)})


if __name__ == "__main__":
    main()
