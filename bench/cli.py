"""The `tileconv` command."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tileconv.model.shapes import shapes_command
from tileconv.model.train import train

from .records import Record
from .workers import Progress as Callback

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Convolution kernels: check, inspect, measure, train."
)
TITLES = {
    "check": "Checking against float64",
    "inspect": "Compiling and reading",
    "measure": "Measuring",
    "peers": "Compiling peers",
}


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
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp16, bf16, tf32, bf16x3, bf16x6, fp32 or fp64; may be given again.")
    ] = None,
    pass_: Annotated[
        list[str] | None,
        typer.Option("--pass", help="fprop, dgrad, wgrad, forward or backward; may be given again. Default: all."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size of the launches.")] = 128,
    layer: Annotated[list[str] | None, typer.Option(help="A layer's name; may be given again. Default: all.")] = None,
    jobs: Annotated[int, typer.Option(help="Worker processes.", min=1)] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write a record, which `tileconv report` renders.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also compile PyTorch Inductor's Triton convolutions, side by side.")
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile anew what an earlier run read.")] = False,
) -> None:
    """Compile what would be launched, for GPUs that need not be there: what it is made of, and the model's time for it.

    Facts are kept in the user's cache folder; TILECONV_CACHE names another one.
    """
    from datetime import UTC, datetime

    from .cases import PASSES, cases
    from .inspect import ARCHS, inspect_all
    from .job import inspection_record
    from .networks import known
    from .peers import inspect_peers
    from .records import save

    console = Console()
    started = datetime.now(UTC)
    try:
        archs = [known("arch", a, ARCHS) for a in arch or ["sm_90"]]
        todo = cases(suite, batch, dtype or ["fp16"], pass_ or PASSES, layer or ())
        if not todo:
            raise ValueError("no layer of the suite has such a pass: nothing to inspect")
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise ValueError(f"json={str(json_file)!r}: its directory does not exist")
        with steps(Console(stderr=True)) as progress:
            rows = inspect_all(todo, archs, jobs=jobs, cached=not no_cache, progress=progress("inspect"))
            others = []
            if peers:
                others = inspect_peers(todo, archs, jobs=jobs, cached=not no_cache, progress=progress("peers"))
        chosen = {"arch": archs, "dtype": dtype or [], "pass": pass_ or [], "layer": layer or []}
        options = [f"--{name} {value}" for name, values in chosen.items() for value in values]
        options += ["--peers"] if peers else []
        command = " ".join(["tileconv inspect", f"--suite {suite} --batch {batch}", *options])
        seconds = (datetime.now(UTC) - started).total_seconds()
        record = inspection_record(rows, suite, command, started, seconds, others)
        if json_file is not None:
            save(record, json_file)
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    _print_inspections(console, record)
    if any(item.failure for item in record.inspections):
        raise typer.Exit(1)


def _print_inspections(console: Console, record: Record) -> None:
    """A table of launches, then what falls short, as wide as they need to be when nobody watches."""
    from .report_inspected import inspected_line, inspection_cells, modelled_line, peer_table, shortfall_table

    rows = record.inspections
    wide = console if console.is_terminal else Console(width=500)
    short = shortfall_table(rows)
    beside = peer_table(record)
    parts = (
        ("", inspection_cells(rows)),
        ("Falls short", (short.header, short.rows)),
        ("Beside Inductor's templates (theirs at best, ours modelled)", (beside.header, beside.rows)),
    )
    for title, (header, cells) in parts:
        table = Table(box=None, pad_edge=False, title=title or None, title_justify="left")
        for name in header:
            table.add_column(name, overflow="fold")
        for line in cells:
            table.add_row(*line)
        if cells:
            wide.print(table, highlight=False, markup=False)
    if record.peers:
        _say(console, "Peers: FlagGems is not a dependency and not compared here.")
    _say(console, f"Inspected: {inspected_line(rows)}")
    _say(console, f"Modelled: {modelled_line(rows)}")


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
app.command("shapes")(shapes_command)


def _later(module: str, name: str, text: str) -> None:
    """A command whose module, and with it the kernels, is imported when it runs: `tileconv --help` stays quick."""

    def command(context: typer.Context) -> None:
        alone = typer.Typer(add_completion=False)
        alone.command()(getattr(importlib.import_module(module), name))
        alone(context.args, prog_name=f"tileconv {name}")

    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=text, context_settings=passed_on)(command)


_later("tileconv.model.look", "show", "Draw a network's filters and what its layers make of a picture.")
_later("tileconv.model.xo", "xo", "Tell an X from an O: three filters made by hand, then three found by training.")
