"""The `tileconv` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tileconv.model.train import train

from .workers import Progress as Callback

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Convolution kernels: check, inspect, measure, train.")
TITLES = {"check": "Checking against float64", "inspect": "Compiling and reading", "measure": "Measuring"}


class Steps:
    """Progress of the job's steps: bars on a terminal, one line every tenth elsewhere."""

    def __init__(self, console: Console, bars: Progress | None) -> None:
        self.console, self.bars = console, bars
        self.tasks: dict[str, TaskID] = {}
        self.said: dict[str, int] = {}

    def __call__(self, step: str) -> Callback:
        """The callback of one step."""

        def report(done: int, total: int, label: str) -> None:
            title = TITLES.get(step, step)
            if self.bars is not None:
                if step not in self.tasks:
                    self.tasks[step] = self.bars.add_task(title, total=total)
                self.bars.update(self.tasks[step], completed=done, description=f"{title}: {label}")
            elif done == total or done * 10 // total > self.said.get(step, -1):
                self.said[step] = done * 10 // total
                self.console.print(f"{title}: {done}/{total} ({label})", highlight=False, soft_wrap=True)

        return report


@contextmanager
def steps(console: Console) -> Iterator[Steps]:
    """Progress for a terminal, or for a log file."""
    if not console.is_terminal:
        yield Steps(console, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        yield Steps(console, bars)


def _fail(error: Exception) -> NoReturn:
    """A user's mistake: one line on stderr, exit status 2."""
    typer.echo(f"tileconv: {error}", err=True)
    raise typer.Exit(2)


def _say(console: Console, text: str) -> None:
    """Plain text: no markup, no colours, no wrapping at a terminal's width."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def bench(
    batch: Annotated[int, typer.Option(help="Photographs in the checks; at least 2.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("reports"),
    jobs: Annotated[int, typer.Option(help="Worker processes.", min=1)] = 2,
) -> None:
    """Check AlexNet on photographs, inspect its kernels, on a CUDA GPU also time them, and write the report."""
    from .job import Job, failures, run_job
    from .report import headline

    console = Console()
    try:
        with steps(console) as progress:
            record, paths = run_job(Job(batch=batch, jobs=jobs), out, progress)
    except (ValueError, ImportError) as error:
        _fail(error)
    _say(console, f"\nReport: {paths[0]} (also {paths[1].name}; data: {paths[-1]})")
    for line in headline(record):
        _say(console, line)
    if wrong := failures(record):
        for line in wrong[:10]:
            typer.echo(f"failed: {line}", err=True)
        if len(wrong) > 10:
            typer.echo(f"failed: and {len(wrong) - 10} more, in the report", err=True)
        raise typer.Exit(1)


@app.command()
def inspect(
    suite: Annotated[str, typer.Option(help="Which network's layers.")] = "alexnet",
    arch: Annotated[list[str] | None, typer.Option(help="sm_80 ... sm_120 or gfx942; may be given again.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp16, bf16, tf32, fp32 or fp64; may be given again.")] = None,
    pass_: Annotated[list[str] | None, typer.Option("--pass", help="fprop or forward; may be given again.")] = None,
    batch: Annotated[int, typer.Option(help="Batch size of the launches.")] = 128,
    jobs: Annotated[int, typer.Option(help="Worker processes.", min=1)] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Compile what would be launched, for GPUs that need not be there, and show what the machine code is made of."""
    import json

    from .cases import PASSES, cases, known
    from .inspect import ARCHS, inspect_all
    from .records import replace_text

    console = Console()
    try:
        archs = [known("arch", a, ARCHS) for a in arch or ["sm_90"]]
        todo = cases(suite, batch, dtype or ["fp16"], pass_ or list(PASSES))
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise ValueError(f"json={str(json_file)!r}: its directory does not exist")
        with steps(Console(stderr=True)) as progress:
            rows = inspect_all(todo, archs, jobs=jobs, progress=progress("inspect"))
        if json_file is not None:
            replace_text(json_file, json.dumps(rows, indent=1) + "\n")
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    _print_inspections(console, rows)
    if any(row["failure"] for row in rows):
        raise typer.Exit(1)


def _print_inspections(console: Console, rows: list[dict[str, Any]]) -> None:
    """A table of inspection rows, as wide as it needs to be when nobody watches."""
    from .records import Inspection, from_data
    from .report import inspection_cells

    header, cells = inspection_cells([from_data(Inspection, row) for row in rows])
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for line in cells:
        table.add_row(*line)
    wide = console if console.is_terminal else Console(width=400)
    wide.print(table, highlight=False, markup=False)


@app.command()
def report(
    record: Annotated[Path, typer.Argument(metavar="JSON", help="A record, such as reports/data/interpreter.json.")],
    out: Annotated[Path | None, typer.Option(help="Where the report goes; default: beside the data folder.")] = None,
) -> None:
    """Render a record again: Markdown, HTML and pictures."""
    from .job import require_writable
    from .records import load
    from .report import headline, render_report

    try:
        loaded = load(record)
        folder = out or (record.parent.parent if record.parent.name == "data" else record.parent)
        require_writable(folder)
        paths = render_report(loaded, folder)
    except (ValueError, OSError) as error:
        _fail(error)
    console = Console()
    _say(console, f"Report: {paths[0]}")
    for line in headline(loaded):
        _say(console, line)


@app.command()
def env() -> None:
    """Show the device and the versions that a run here would record."""
    from . import environment

    try:
        device, versions, machine = environment.device(), environment.versions(), environment.machine()
    except ImportError as error:
        _fail(error)
    console = Console()
    _say(console, f"device: {device.name} ({device.kind})")
    _say(console, f"machine: {machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB")
    for name, version in vars(versions).items():
        _say(console, f"{name}: {version or '-'}")


app.command()(train)
