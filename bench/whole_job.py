"""`tileconv bench --suite networks`: the five networks whole, in a record and a report of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from . import environment
from .job import MEASURED, Job, require_writable, rows_of
from .records import Check, Record, Timing, save
from .report import render_report
from .timing import Timer
from .whole import network_checks
from .workers import Progress

BATCHES = (1, 128)
"""Latency and throughput."""


def run_networks(
    job: Job, out: Path, progress: Callable[[str], Progress], timer: Timer | None = None
) -> tuple[Record, list[Path]]:
    """As job.run_job: checks of every network, on a GPU also times; the record's slug ends in -networks."""
    require_writable(out)
    started = datetime.now(UTC)
    clock = time.monotonic()
    device = environment.device()
    checks = network_checks(job.batch, dtypes=job.check_dtypes, jobs=job.jobs, progress=progress("check"))
    timings: list[Timing] = []
    if device.kind == "cuda":
        from .timing import CudaTimer
        from .whole_calls import network_timings

        for batch in BATCHES:
            step = progress(f"Measuring batch {batch}")
            timer = timer or CudaTimer()
            timings += network_timings(batch, MEASURED, timer, graphs=batch == 1, progress=step)
    record = Record(
        device=replace(device, slug=f"{device.slug}-networks"),
        versions=environment.versions(),
        commit=environment.commit(),
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.monotonic() - clock, 1),
        machine=environment.machine(),
        command=job.command,
        checks=rows_of(Check, checks),
        timings=tuple(timings),
    )
    data = out / "data" / f"{record.device.slug}.json"
    save(record, data)
    return record, [*render_report(record, out), data]
