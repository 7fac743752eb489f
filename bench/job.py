"""The main job: check, on a GPU measure, inspect; then write the record and render the report from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import environment
from .cases import DEFAULT_DTYPES, FORWARD, PASSES, Case, cases
from .check import checks
from .clocks import open_gauge
from .im2col import im2col_rows
from .inspect import inspect_all
from .measure import Instruments, Measurement, kept_rows
from .memory import alexnet_saved
from .networks import known
from .providers import Provider, chosen
from .published import published_gemms
from .records import (
    Check,
    Device,
    Im2col,
    Inspection,
    Published,
    Record,
    Saved,
    Timing,
    from_data,
    load,
    save,
)
from .report import render_report
from .timing import CudaTimer, Timer
from .warm import first_calls
from .whole import network_checks
from .workers import Progress

CHECKED = ("fp32", "fp16", "bf16")
SUITES = ("alexnet",)
NETWORKS = "networks"  # the suite of whole networks: checked and timed; their layers are other suites'
MEASURED = ("fp16", "bf16", "tf32", "fp32")
BATCH_ON_GPU = 128
RESERVED_MINUTES = 1.0  # of a run's time budget, for inspecting and the report


@dataclass(frozen=True)
class Inspected:
    """Cases that a run compiles and reads, without a GPU too. batch: None is the suite's own."""

    suite: str
    batch: int | None
    arch: str
    passes: Sequence[str]

    @property
    def title(self) -> str:
        """For the progress of a run."""
        return f"Compiling and reading {self.suite} {f'at batch {self.batch} ' if self.batch else ''}for {self.arch}"


# Every pass where the targets are stated; where kernels take pointers, the forward passes. Then what time is drawn
# against: dilation, and batch.
INSPECTED = (
    Inspected("alexnet", BATCH_ON_GPU, "sm_90", PASSES),
    Inspected("alexnet", BATCH_ON_GPU, "sm_80", FORWARD),
    Inspected("dilated", 16, "sm_90", ("fprop",)),
    *(Inspected("alexnet", batch, "sm_90", ("fprop",)) for batch in (1, 8, 32, 512)),
)
INSPECTED_DTYPES = ("fp16",)


@dataclass(frozen=True)
class Job:
    """What to do. `batch` is that of the checks; inspection and timing use the batch a GPU is for.

    `suites` other than AlexNet are inspected in place of `inspected`. On a GPU `suites`, `dtypes` and `providers` (all
    for none) are measured, for `minutes` in all. `resume` goes on from the record that is there, `overwrite` begins
    anew; with neither, a record that holds timings is not touched.
    """

    batch: int = 2
    jobs: int = 2
    suites: Sequence[str] = SUITES
    dtypes: Sequence[str] = MEASURED
    providers: Sequence[str] = ()
    minutes: float = 10.0
    resume: bool = False
    overwrite: bool = False
    check_dtypes: Sequence[str] = CHECKED
    inspected: Sequence[Inspected] = INSPECTED
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.monotonic)

    def options(self) -> list[str]:
        """The command's options, those that say only how long and where aside."""
        found = ["--batch", str(self.batch), "--jobs", str(self.jobs)]
        for name, values, usual in (
            ("suite", self.suites, SUITES), ("dtype", self.dtypes, MEASURED), ("provider", self.providers, ()),
        ):  # fmt: skip
            if tuple(values) != usual:
                found += [part for value in values for part in (f"--{name}", value)]
        return found

    def command(self, device: Device) -> str:
        """The command that runs this job; it names no path, because a record holds none."""
        timed = ["--minutes", f"{self.minutes:g}"] if device.kind == "cuda" else []
        return " ".join(["tileconv bench", *self.options(), *timed])

    def to_inspect(self) -> Sequence[Inspected]:
        """What is compiled and read: the suites that were asked for, or what every run shows."""
        if tuple(self.suites) == SUITES:
            return self.inspected
        return [Inspected(suite, None, "sm_90", PASSES) for suite in self.suites if suite != NETWORKS]

    def measured(self) -> list[Case]:
        """The cases to time, each suite at its own batch. Raises ValueError for an unknown suite or dtype."""
        for dtype in self.dtypes:
            known("dtype", dtype, DEFAULT_DTYPES)
        return [case for suite in self.suites for case in cases(suite, None, self.dtypes)]


class Interrupted(Exception):
    """Ctrl-C after something was measured: what there is has been written and rendered."""

    def __init__(self, record: Record, paths: list[Path]) -> None:
        super().__init__("interrupted")
        self.record, self.paths = record, paths


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

    `progress(step)` gives the callback of a step. `timer` stands in for CUDA events in tests. Raises ValueError for bad
    arguments, a record that must not be overwritten and a GPU on which nothing can be launched, Interrupted after
    Ctrl-C, LostDevice where a kernel took the GPU away; the last two when what was measured is written.
    """
    if job.batch < 2:
        raise ValueError(f"batch={job.batch} must be at least 2: with one image, mixed-up images would go unseen")
    if not job.minutes > 0:  # as NaN is not
        raise ValueError(f"minutes={job.minutes:g} must be more than 0")
    todo, providers = job.measured(), chosen(job.providers)
    require_writable(out)
    device = environment.device()
    if tuple(job.suites) == (NETWORKS,):  # a report of its own
        device = replace(device, slug=f"{device.slug}-{NETWORKS}")
    data = out / "data" / f"{device.slug}.json"
    blank = Record(
        device=device, versions=environment.versions(), commit=environment.commit(),
        started=job.started.strftime("%Y-%m-%dT%H:%M:%SZ"), seconds=0.0, machine=environment.machine(),
        command=job.command(device), published=rows_of(Published, published_gemms()),
    )  # fmt: skip
    if device.kind != "cuda":
        return _finish(job, _checked(job, blank, progress), out, data, progress)
    earlier = earlier_record(job, data)
    environment.require_launches()
    if earlier is not None:
        kept = kept_rows(earlier, blank.versions, blank.commit)
        blank = replace(blank, started=earlier.started, checks=earlier.checks, timings=kept)
    record = blank if blank.checks else _checked(job, blank, progress)
    record, stopped = _measured(job, record, todo, providers, data, progress, timer)
    if stopped:
        raise Interrupted(record, _write(job, record, out, data))
    return _finish(job, record, out, data, progress)


def earlier_record(job: Job, data: Path) -> Record | None:
    """The record that --resume goes on from, if there is one.

    Raises ValueError for a record with timings that neither flag releases, and for a file that cannot be read; a record
    without timings is one that any run replaces.
    """
    if job.resume and job.overwrite:
        raise ValueError("resume and overwrite exclude each other: go on from what is there, or begin anew")
    if job.overwrite or not data.exists():
        return None
    found = load(data)
    if job.resume:
        return found
    if found.timings:
        raise ValueError(
            f"{data.name} already holds {len(found.timings)} timings: --resume goes on from them, --overwrite begins "
            "anew, --out writes elsewhere"
        )
    return None


def _checked(job: Job, record: Record, progress: Callable[[str], Progress]) -> Record:
    """The record with its checks: networks whole where their suite is asked for, AlexNet's layers for every other."""
    rows = []
    if set(job.suites) - {NETWORKS}:
        rows += checks(job.batch, job.check_dtypes, jobs=job.jobs, progress=progress("check"))
    if NETWORKS in job.suites:
        rows += network_checks(
            job.batch, dtypes=job.check_dtypes, jobs=job.jobs, progress=progress("Checking whole networks")
        )
    return replace(record, checks=rows_of(Check, rows))


def _measured(
    job: Job, record: Record, todo: Sequence[Case], providers: Sequence[Provider], data: Path,
    progress: Callable[[str], Progress], timer: Timer | None,
) -> tuple[Record, bool]:  # fmt: skip
    """The record with its timings, saved as they come; and whether Ctrl-C ended it."""
    from tileconv.kernels import hardware

    gauge, missing = open_gauge()
    if missing:
        progress("gauge")(1, 1, missing)

    def with_rows(rows: Sequence[Timing]) -> Record:
        return replace(record, timings=tuple(rows), seconds=_seconds(job))

    instruments = Instruments(timer or CudaTimer(), gauge, "cpu" if hardware.interpreting() else "cuda")
    deadline = job.clock + 60 * max(job.minutes - RESERVED_MINUTES, job.minutes / 2)
    run = Measurement(
        todo, providers, instruments, kept=record.timings, deadline=deadline,
        save=lambda rows: save(with_rows(rows), data), progress=progress("measure"),
    )  # fmt: skip
    ours = [case for case, able in run.todo() if any(provider.name == "tileconv" for provider, _ in able)]
    try:
        half = (deadline + time.monotonic()) / 2
        instruments.warmed = first_calls(ours, jobs=job.jobs, deadline=half, progress=progress("warm"))
        run.go()
    except KeyboardInterrupt:
        if not run.rows:
            raise
        return with_rows(run.rows), True
    return with_rows(run.rows), False


def _finish(
    job: Job, record: Record, out: Path, data: Path, progress: Callable[[str], Progress]
) -> tuple[Record, list[Path]]:
    """Inspect, count what backward keeps, write and render."""
    rows = [
        row
        for step in job.to_inspect()
        for row in inspect_all(
            cases(step.suite, step.batch, INSPECTED_DTYPES, step.passes), [step.arch], jobs=job.jobs,
            progress=progress(step.title),
        )
    ]  # fmt: skip
    record = replace(record, inspections=rows_of(Inspection, rows))
    if "alexnet" in job.suites:
        compared = rows_of(Im2col, im2col_rows("alexnet", BATCH_ON_GPU))
        record = replace(record, saved=rows_of(Saved, alexnet_saved()), im2col=compared)
    record = replace(record, seconds=_seconds(job))
    return record, _write(job, record, out, data)


def _write(job: Job, record: Record, out: Path, data: Path) -> list[Path]:
    save(record, data)
    return [*render_report(record, out), data]


def _seconds(job: Job) -> float:
    return round(time.monotonic() - job.clock, 1)


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
        inspections=rows_of(Inspection, rows),
        peers=rows_of(Inspection, peers),
        published=rows_of(Published, published_gemms()),
    )


def rows_of(cls: type[Any], rows: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """Worker output, validated as strictly as a file."""
    return tuple(from_data(cls, row, f"{cls.__name__.lower()}[{i}]") for i, row in enumerate(rows))


def failures(record: Record) -> list[str]:
    """What makes the command end with an error: wrong results, and launches that do not compile."""
    wrong = [f"{c.case}: {c.note or 'outside its budget'}" for c in record.checks if not c.passed]
    lost = [f"{i.layer} {i.pass_} {i.arch}: {i.failure}" for i in record.inspections if i.failure is not None]
    untimed = [
        f"{t.layer} {t.pass_} {t.dtype} {t.provider}: {t.note}"
        for t in record.timings
        if t.provider.split(":")[0] == "tileconv" and t.status in ("wrong", "failed")
    ]
    return [*wrong, *lost, *untimed]
