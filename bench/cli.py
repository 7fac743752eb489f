"""The `tileconv` command."""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tileconv.model.command import fail
from tileconv.model.shapes_command import shapes_command
from tileconv.model.train import train

from .records import Record
from .workers import Progress as Callback

if TYPE_CHECKING:
    from .job import Job

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Convolution kernels: check, inspect, measure, train."
)
TITLES = {
    "check": "Checking against float64",
    "inspect": "Compiling and reading",
    "measure": "Measuring",
    "peers": "Compiling peers",
    "selftest": "Testing every tile",
    "warm": "Compiling on all cores",
    "gauge": "Clocks",
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


def _say(console: Console, text: str) -> None:
    """Plain text: no markup, no colours, no wrapping at a terminal's width."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def bench(
    batch: Annotated[int, typer.Option(help="Photographs in the checks; at least 2.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("reports"),
    jobs: Annotated[int | None, typer.Option(help="Worker processes; default: one a core, at most 8.", min=1)] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="Whose layers to inspect, and on a GPU to time; may be given again.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="On a GPU: fp16, bf16, tf32, fp32 or fp64; may be given again.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="On a GPU: who is timed, such as cudnn-benchmark; may be given again.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="On a GPU: for the whole run; the most telling cases first.")] = 10.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the timings that are there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where there are timings.")] = False,
) -> None:
    """Check AlexNet on photographs, on a CUDA GPU time its layers, inspect its kernels, and write the report.

    Ctrl-C keeps what is measured, and --resume goes on from there. Exit status: 1 for a wrong result, 2 for a mistake
    in the arguments, 130 after Ctrl-C.
    """
    from .job import MEASURED, SUITES, Interrupted, Job, failures, run_job
    from .measure import LostDevice
    from .report import headline

    console = Console()
    job = Job(
        batch=batch, jobs=jobs or default_jobs(), suites=suite or SUITES, dtypes=dtype or MEASURED,
        providers=provider or (), minutes=minutes, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    interrupted = False
    try:
        with steps(console) as progress:
            record, paths = run_job(job, out, progress)
    except Interrupted as stop:
        record, paths, interrupted = stop.record, stop.paths, True
    except LostDevice as error:
        _begin_again(job, out, error)
    except KeyboardInterrupt:
        typer.echo("tileconv: interrupted before anything was measured; nothing was written", err=True)
        raise typer.Exit(130) from None
    except (ValueError, ImportError) as error:
        fail(error)
    _say(console, f"\nReport: {paths[0]} (also {paths[1].name}; data: {paths[-1]})")
    for line in headline(record):
        _say(console, line)
    if interrupted:
        typer.echo("tileconv: interrupted; what was measured is in the report, and --resume goes on from it", err=True)
        raise typer.Exit(130)
    if wrong := failures(record):
        for line in wrong[:10]:
            typer.echo(f"failed: {line}", err=True)
        if len(wrong) > 10:
            typer.echo(f"failed: and {len(wrong) - 10} more, in the report", err=True)
        raise typer.Exit(1)


def default_jobs() -> int:
    """One worker for each core that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def _begin_again(job: Job, out: Path, error: Exception) -> NoReturn:
    """After a kernel broke this process's hold of the GPU: a fresh process goes on behind the row that did it."""
    left = job.minutes - (time.monotonic() - job.clock) / 60
    typer.echo(f"tileconv: the GPU was lost to this process ({error}); going on in a fresh one", err=True)
    arguments = ["bench", *job.options(), "--minutes", f"{max(left, 0.5):.2f}", "--out", str(out), "--resume"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "tileconv.bench", *arguments])


@app.command()
def selftest(
    minutes: Annotated[float, typer.Option(help="Time budget; the tiles in use come first.")] = 5.0,
    jobs: Annotated[int | None, typer.Option(help="Worker processes; default: one a core, at most 8.", min=1)] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp16, bf16, tf32, fp32 or fp64; may be given again. Default: all.")
    ] = None,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="Under compute-sanitizer's memcheck and racecheck, where it is there.")
    ] = False,
) -> None:
    """Run every kernel, tile and dtype on this GPU against float64; what fails is left out of later choices.

    The list of what fails is excluded.json in the user's cache folder; TILECONV_EXCLUDE names another file. Without a
    GPU a few cases run in the interpreter. Exit status: 1 where something failed, 3 without compute-sanitizer.
    """
    from .selftest import run_selftest, sanitized, summary

    console = Console()
    try:
        if sanitize:
            raise typer.Exit(sanitized(minutes, dtype or ()))
        with steps(Console(stderr=True)) as progress:
            found = run_selftest(minutes=minutes, jobs=jobs or default_jobs(), dtypes=dtype or (),
                                 progress=progress("selftest"))  # fmt: skip
    except FileNotFoundError as error:
        typer.echo(f"tileconv: {error}", err=True)
        raise typer.Exit(3) from None
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    for line in summary(found):
        _say(console, line)
    if found.failed:
        raise typer.Exit(1)


@app.command()
def inspect(
    suite: Annotated[
        str, typer.Option(help="Which layers: a suite's name (tileconv suites lists them), or a YAML or CSV file.")
    ] = "alexnet",
    from_model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:CALLABLE", help="Instead: the layers that the model it returns calls."),
    ] = None,
    arch: Annotated[list[str] | None, typer.Option(help="sm_80 ... sm_120 or gfx942; may be given again.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp16, bf16, tf32, bf16x3, bf16x6, fp32 or fp64; may be given again.")
    ] = None,
    pass_: Annotated[
        list[str] | None,
        typer.Option("--pass", help="fprop, dgrad, wgrad, forward or backward; may be given again. Default: all."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Batch size of the launches. Default: the suite's own.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="A layer's name; may be given again. Default: all.")] = None,
    memory_format: Annotated[
        str,
        typer.Option(help="Of activations and weights: channels_last, or contiguous, with the kernels that turn them."),
    ] = "channels_last",
    jobs: Annotated[int, typer.Option(help="Worker processes.", min=1)] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write a record, which `tileconv report` renders.")
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="Also compile PyTorch Inductor's (and FlagGems', if installed) Triton convolutions."
        ),
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile anew what an earlier run read.")] = False,
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="Force a field of the convolutions' tiles, as num_stages=2 or box=128x1x1; may be given again."
        ),
    ] = None,
) -> None:
    """Compile what would be launched, for GPUs that need not be there: what it is made of, and the model's time for it.

    Facts are kept in the user's cache folder; TILECONV_CACHE names another one.
    """
    from datetime import UTC, datetime

    from .cases import MEMORY_FORMATS, PASSES, cases
    from .inspect import ARCHS, inspect_all
    from .job import inspection_record
    from .networks import known
    from .peers import inspect_peers
    from .records import save
    from .suites import suite_of

    # Kernels are compiled, in processes of their own: nothing here runs in the interpreter.
    warnings.filterwarnings("ignore", message="tileconv runs in Triton's interpreter")
    console = Console()
    started = datetime.now(UTC)
    try:
        if from_model is not None:
            from .recorded import parted

            suite = ":".join(parted(from_model))
        archs = [known("arch", a, ARCHS) for a in arch or ["sm_90"]]
        forced = _tile_fields(override or [])
        todo = cases(suite, batch, dtype or ["fp16"], pass_ or PASSES, layer or (), memory_format)
        if not todo:
            raise ValueError("no layer of the suite has such a pass: nothing to inspect")
        if peers and memory_format != MEMORY_FORMATS[0]:
            raise ValueError(f"memory_format={memory_format!r}: --peers compares {MEMORY_FORMATS[0]} kernels alone")
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise ValueError(f"json={str(json_file)!r}: its directory does not exist")
        with steps(Console(stderr=True)) as progress:
            rows = inspect_all(
                todo, archs, jobs=jobs, cached=not no_cache, override=forced, progress=progress("inspect")
            )
            others = []
            if peers:
                others = inspect_peers(todo, archs, jobs=jobs, cached=not no_cache, progress=progress("peers"))
        batches = [] if batch is None else [str(batch)]
        formats = [memory_format] if memory_format != MEMORY_FORMATS[0] else []
        chosen = {"batch": batches, "arch": archs, "dtype": dtype or [], "pass": pass_ or [], "layer": layer or [],
                  "override": override or [], "memory-format": formats}  # fmt: skip
        options = [f"--{name} {value}" for name, values in chosen.items() for value in values]
        options += ["--peers"] if peers else []
        which = f"--from-model {suite}" if from_model else f"--suite {suite}"
        command = " ".join(["tileconv inspect", which, *options])
        seconds = (datetime.now(UTC) - started).total_seconds()
        record = inspection_record(rows, suite_of(suite).name, command, started, seconds, others)
        if json_file is not None:
            save(record, json_file)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    _print_inspections(console, record)
    for name in suite_of(suite).left_out:
        _say(console, f"Left out, because there is no kernel for it: {name}")
    if any(item.failure for item in record.inspections):
        raise typer.Exit(1)


def _tile_fields(settings: list[str]) -> dict[str, Any]:
    """Fields of ConvTile from texts such as num_stages=2; ValueError for an unknown field or another type."""
    from dataclasses import fields

    from tileconv.kernels.conv_tile import ConvTile

    from .networks import known

    kinds = {field.name: str(field.type) for field in fields(ConvTile)}
    found: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        kind = kinds[known("override", name, kinds)]
        try:
            values = [int(part) for part in text.split("x")] if kind not in ("str", "bool") else []
        except ValueError:
            values = []
        if kind == "str":
            found[name] = text
        elif kind == "bool" and text.lower() in ("true", "false"):
            found[name] = text.lower() == "true"
        elif values and len(values) == kind.count("int"):
            found[name] = values if len(values) > 1 else values[0]
        else:
            raise ValueError(f"override={setting!r}: {name} takes {kind}, as num_stages=2, box=128x1x1 or half=true")
    return found


def _print_inspections(console: Console, record: Record) -> None:
    """A table of launches, then what falls short, as wide as they need to be when nobody watches."""
    from . import flaggems
    from .report_inspected import inspected_line, inspection_cells, modelled_line, peer_table, shortfall_table

    rows = record.inspections
    short = shortfall_table(rows)
    beside = peer_table(record)
    parts = (
        ("", inspection_cells(rows)),
        ("Falls short", (short.header, short.rows)),
        ("Beside peers (theirs at best, ours modelled)", (beside.header, beside.rows)),
    )
    for title, (header, cells) in parts:
        _print_table(console, title, header, cells)
    if record.peers and (lost := flaggems.missing()):
        _say(console, f"Peers: {lost}.")
    _say(console, f"Inspected: {inspected_line(rows)}")
    _say(console, f"Modelled: {modelled_line(rows)}")


@app.command("suites")
def list_suites() -> None:
    """List the built-in suites: how many layers, at which batch sizes, and where they come from."""
    from .suites import SUITES

    table = Table(box=None, pad_edge=False)
    for name in ("suite", "layers", "batch", "what", "source"):
        table.add_column(name, overflow="fold")
    for suite in SUITES.values():
        table.add_row(suite.name, str(len(suite.shapes())), suite.batch, suite.description, suite.source)
    console = Console()
    (console if console.is_terminal else Console(width=500)).print(table, highlight=False, markup=False)


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
        fail(error)
    console = Console()
    _say(console, f"Report: {paths[0]}")
    for line in headline(loaded):
        _say(console, line)


@app.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="The record to hold the other one against.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="The newer record.")],
    fail_above: Annotated[str, typer.Option(help="How much slower a row may be, in percent.")] = "5%",
    force: Annotated[bool, typer.Option("--force", help="Compare records of different devices all the same.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also list the rows that did not change.")] = False,
) -> None:
    """Compare two records: exit status 1 where ours became slower by more than noise, 2 where they cannot be compared.

    Timings, where both have some; else modelled times and machine code.
    """
    from .compare import COLUMNS, compare, percentage
    from .records import load

    try:
        found = compare(load(a), load(b), percentage(fail_above), force=force)
    except (ValueError, OSError) as error:
        fail(error)
    console = Console()
    shown = [row.cells for row in found.rows if every or row.verdict != "same"]
    _print_table(console, f"{b} against {a}: {found.kind}", COLUMNS, shown)
    for title, names in (("Only in A", found.only_a), ("Only in B", found.only_b)):
        for name in names[:20]:
            _say(console, f"{title}: {name}")
        if len(names) > 20:
            _say(console, f"{title}: and {len(names) - 20} more")
    for note in found.notes:
        _say(console, f"Different versions: {note}")
    moved = sum(row.verdict == "rival moved" for row in found.rows)
    if moved:
        _say(console, f"{moved} rows of rivals moved as well: the machine may not be in the same state.")
    _say(
        console,
        f"{len(found.regressions)} regressions above {fail_above} in {len(found.rows)} rows ({found.kind}); "
        f"{len(found.only_a)} rows only in A, {len(found.only_b)} only in B",
    )
    if found.regressions:
        raise typer.Exit(1)


def _print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table, as wide as it needs to be when nobody watches; nothing for no rows."""
    wide = console if console.is_terminal else Console(width=500)
    table = Table(box=None, pad_edge=False, title=title or None, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for line in rows:
        table.add_row(*line)
    if rows:
        wide.print(table, highlight=False, markup=False)


@app.command()
def env() -> None:
    """Show the device and the versions that a run here would record."""
    from . import environment

    try:
        device, versions, machine = environment.device(), environment.versions(), environment.machine()
        from tileconv.kernels import excluded

        left_out = len(excluded.listed(device.name))
    except (ImportError, ValueError) as error:
        fail(error)
    console = Console()
    _say(console, f"device: {device.name} ({device.kind})")
    _say(console, f"machine: {machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB")
    for name, version in vars(versions).items():
        _say(console, f"{name}: {version or '-'}")
    if device.kind == "cuda":
        _say(console, f"excluded tiles: {left_out} ({excluded.path() or 'no file'})")


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
_later("tileconv.bench.dense", "dense", "Compare dense evaluation with separate crops: operations, modelled time.")
_later("tileconv.bench.tune", "tune", "Time tiles on a CUDA GPU and keep those that win over the cost model's choice.")
