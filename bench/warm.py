"""First calls in worker processes: Triton compiles on all cores, and a kernel that kills its process kills a worker.

Triton keeps what it compiles on disk, so the process that measures finds it there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from .cases import Case, shape_of
from .passes import first_image, operands, placed, stands_alone, work
from .providers import SEARCHED
from .workers import Answer, Progress, Task, describe_error, run_tasks, serve

MODULE = "tileconv.bench.warm"
SECONDS_EACH = 180.0
WORKERS = 8  # each holds a GPU context, about half a GiB


def first_calls(cases: Sequence[Case], *, jobs: int, deadline: float, progress: Progress) -> dict[Case, Answer]:
    """{"first_call_ms": time} for every case whose first call on our kernels came back.

    {"lost": reason} for one that took its process, or its process's hold of the GPU, with it or did not come back.
    Other errors come again where the case is measured, and past the deadline nothing is begun: those are left out.
    """
    answers = run_tasks(
        MODULE, [case.to_json() for case in cases], jobs=min(jobs, WORKERS),
        environment={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        label=lambda task: f"{task['layer']} {task['pass_']} {task['dtype']}", progress=progress,
        seconds_each=SECONDS_EACH, deadline=deadline,
    )  # fmt: skip
    found: dict[Case, Answer] = {}
    for case, answer in zip(cases, answers, strict=True):
        if "error" in answer:  # the worker's own end; errors that it lives through are "failed"
            found[case] = {"lost": answer["error"]}
        elif "late" not in answer and "failed" not in answer:
            found[case] = answer
    return found


def first_call(task: Task, device: str) -> dict[str, Any]:
    """A worker's answer: the milliseconds of one case's first call, and a second shape's for the gates."""
    case = Case.from_json(task)
    shape = shape_of(case)
    try:
        with torch.no_grad(), SEARCHED(case):
            t = placed(operands(case, device), shape, "native")
            call = work("ours", case, shape, t)
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            milliseconds = (time.perf_counter() - start) * 1e3
            if stands_alone(case, shape, t):
                work("ours", case, shape, first_image(t))()
                torch.cuda.synchronize()
    except Exception as error:
        reason = describe_error(error)
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return {"lost": reason, "last": True}
        return {"failed": reason}
    torch.cuda.empty_cache()
    return {"first_call_ms": milliseconds}


def main() -> None:
    """The worker: a case a line in, a line out."""
    if sys.argv[1:] != ["--worker"]:
        raise SystemExit(f"usage: python -m {MODULE} --worker (reads JSON cases on stdin)")
    torch.ones(1, device="cuda").sum().item()  # starting CUDA is not the first case's
    serve(lambda task: first_call(task, "cuda"))


if __name__ == "__main__":
    main()
