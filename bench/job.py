"""The main job: check, inspect, on a GPU also measure; then write the record and render the report from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import environment
from .cases import FORWARD, PASSES, cases
from .check import checks
from .inspect import inspect_all
from .memory import alexnet_saved
from .published import published_gemms
from .records import Check, Inspection, Published, Record, Saved, Timing, from_data, save
from .report import render_report
from .timing import Timer
from .workers import Progress

CHECKED = ("fp32", "fp16", "bf16")
# Every pass where the targets are stated; where kernels take pointers, the forward passes.
INSPECTED = {"sm_90": PASSES, "sm_80": FORWARD}
INSPECTED_DTYPES = ("fp16",)
MEASURED = ("fp16", "bf16", "tf32")
BATCH_ON_GPU = 128


@dataclass(frozen=True)
class Job:
    """What to do. `batch` is that of the checks; inspection and timing use the batch a GPU is for."""

    batch: int = 2
    jobs: int = 2
    check_dtypes: Sequence[str] = CHECKED
    inspected: Mapping[str, Sequence[str]] = field(default_factory=lambda: INSPECTED)
    inspect_batch: int = BATCH_ON_GPU

    @property
    def command(self) -> str:
        """The command that runs this job; it names no path, because a record holds none."""
        return f"tileconv bench --batch {self.batch} --jobs {self.jobs}"


def require_writable(out: Path) -> None:
    """Raise ValueError unless the report can be written under `out`: said before hours of measuring, not after."""
    for folder in (out, out / "data", out / "figures"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".write-probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"out={str(out)!r} is not a directory that can be written: {error.strerror}") from None


def run_job(
    job: Job, out: Path, progress: Callable[[str], Progress], timer: Timer | None = None
) -> tuple[Record, list[Path]]:
    """Run everything and write it under `out`; returns the record and the report's paths, the page first.

    `progress(step)` gives the callback of a step. `timer` stands in for CUDA events in tests.
    """
    if job.batch < 2:
        raise ValueError(f"batch={job.batch} must be at least 2: with one image, mixed-up images would go unseen")
    require_writable(out)
    started = datetime.now(UTC)
    clock = time.monotonic()
    device = environment.device()
    check_rows = checks(job.batch, job.check_dtypes, jobs=job.jobs, progress=progress("check"))
    inspect_rows = [
        row
        for arch, passes in job.inspected.items()
        for row in inspect_all(
            cases("alexnet", job.inspect_batch, INSPECTED_DTYPES, passes), [arch], jobs=job.jobs,
            progress=progress(f"Compiling and reading {arch}"),
        )
    ]  # fmt: skip
    timings: list[Timing] = []
    if device.kind == "cuda":
        from .providers import timings as measure
        from .timing import CudaTimer

        measured = cases("alexnet", job.inspect_batch, MEASURED, FORWARD)
        timings = measure(measured, timer or CudaTimer(), progress=progress("measure"))
    record = Record(
        device=device,
        versions=environment.versions(),
        commit=environment.commit(),
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.monotonic() - clock, 1),
        machine=environment.machine(),
        command=job.command,
        checks=_rows(Check, check_rows),
        inspections=_rows(Inspection, inspect_rows),
        timings=tuple(timings),
        saved=_rows(Saved, alexnet_saved()),
        published=_rows(Published, published_gemms()),
    )
    data = out / "data" / f"{device.slug}.json"
    save(record, data)
    return record, [*render_report(record, out), data]


def inspection_record(
    rows: Sequence[dict[str, Any]],
    suite: str,
    command: str,
    started: datetime,
    seconds: float,
    peers: Sequence[dict[str, Any]] = (),
) -> Record:
    """A record of inspections alone, which `tileconv report` renders like that of a whole run."""
    return Record(
        device=environment.no_device(f"inspect-{suite}"),
        versions=environment.versions(),
        commit=environment.commit(),
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(seconds, 1),
        machine=environment.machine(),
        command=command,
        inspections=_rows(Inspection, rows),
        peers=_rows(Inspection, peers),
        published=_rows(Published, published_gemms()),
    )


def _rows(cls: type[Any], rows: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """Worker output, validated as strictly as a file."""
    return tuple(from_data(cls, row, f"{cls.__name__.lower()}[{i}]") for i, row in enumerate(rows))


def failures(record: Record) -> list[str]:
    """What makes the command end with an error: wrong results, and launches that do not compile."""
    wrong = [f"{c.case}: {c.note or 'outside its budget'}" for c in record.checks if not c.passed]
    lost = [f"{i.layer} {i.pass_} {i.arch}: {i.failure}" for i in record.inspections if i.failure is not None]
    untimed = [
        f"{t.layer} {t.dtype} {t.l2}: {t.note}" for t in record.timings if t.provider == "tileconv" and not t.passed
    ]
    return [*wrong, *lost, *untimed]
