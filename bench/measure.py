"""Measures cases on a GPU: one provider after the other, gates before speed, what is measured saved as it comes."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .cases import FORWARD, Case, by_weight, flops_of, launches, shape_of
from .clocks import Gauge, Watch
from .gates import Reference, reference, verdict
from .networks import Shape
from .passes import Call, Tensors, Unsupported, operands, placed
from .providers import Provider, cudnn, label_of, level_of
from .records import Commit, Record, Timing, Versions, finite
from .suites import suite_of
from .timing import Call as AnyCall
from .timing import GraphError, Quantiles, Timer
from .workers import Answer, Progress, describe_error

SHORT_US = 100.0  # below this a call is also timed as replayed from a CUDA graph, without the host's part
BUFFERS = 3  # copies of the operands that cold calls go round
# What a pass reads; with its result, each byte once, this is what GB/s are counted of.
READS = {
    "fprop": ("x", "w", "b"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x"), "forward": ("x", "indices", "target"),
    "backward": ("dy", "y"),
}  # fmt: skip
Key = tuple[str, str, str, int, str, str, str]


class LostDevice(RuntimeError):
    """A kernel broke this process's hold of the GPU: nothing more can run in it. `rows` name the culprit."""

    def __init__(self, reason: str, rows: list[Timing]) -> None:
        super().__init__(reason)
        self.rows = rows


@dataclass
class Instruments:
    """What measures: tests put stand-ins in their places. One stream for all, because graphs need one of their own.

    `warmed` is what warm.first_calls found: our first call's time in a process where nothing was compiled yet, or that
    the case must not be run here because it cost its process.
    """

    timer: Timer
    gauge: Gauge | None = None
    device: str = "cuda"
    warmed: Mapping[Case, Answer] = field(default_factory=dict)
    stream: Any = None

    def on_stream(self) -> Any:
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        return torch.cuda.stream(self.stream)


def key_of(row: Timing) -> Key:
    """What says which measurement a row belongs to."""
    return row.network, row.layer, row.pass_, row.batch, row.dtype, row.provider, row.memory_format


def _blank(case: Case, shape: Shape, provider: Provider) -> Timing:
    images = len(shape.input) == 4
    return Timing(
        network=case.network, layer=case.layer, pass_=case.pass_, batch=case.batch, dtype=case.dtype,
        provider=provider.name, memory_format=provider.memory_format if images else "contiguous", l2="cold",
        p20_us=None, p50_us=None, p80_us=None, n=0, tflops=None, error=None, allowed=None, passed=False,
        precision=label_of(level_of(provider, case)), note="without the layer's dropout" if shape.dropout else "",
    )  # fmt: skip


def applicable(case: Case, providers: Sequence[Provider]) -> list[tuple[Provider, Timing]]:
    """The providers that compute a case, with their empty rows; where there is no image layouts are all one."""
    shape = shape_of(case)
    found: dict[Key, tuple[Provider, Timing]] = {}
    for provider in providers:
        if provider.applies(case, shape):
            blank = _blank(case, shape, provider)
            found.setdefault(key_of(blank), (provider, blank))
    return list(found.values())


def in_order(cases: Sequence[Case]) -> list[Case]:
    """The most telling first, for runs that may have to stop: dtypes as they come, in each what its suite says."""
    dtypes = dict.fromkeys(case.dtype for case in cases)
    return [case for dtype in dtypes for case in by_weight(c for c in cases if c.dtype == dtype)]


@dataclass
class Measurement:
    """A run over cases and providers. `rows` holds what is measured so far, also after an interruption.

    Every case's first turn (ours and the strongest baseline) comes before anybody's second. `kept` are rows of an
    earlier run: what they hold is not measured again. `save` is called whenever a case has new rows. Past `deadline`
    (of `now`) nothing is begun: what is left gets rows that say "skipped".
    """

    cases: Sequence[Case]
    providers: Sequence[Provider]
    instruments: Instruments
    kept: Sequence[Timing] = ()
    deadline: float | None = None
    save: Callable[[list[Timing]], None] = lambda rows: None
    progress: Progress = lambda done, total, label: None
    now: Callable[[], float] = time.monotonic
    rows: list[Timing] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [row for row in self.kept if row.status != "skipped"]

    def todo(self) -> list[tuple[Case, list[tuple[Provider, Timing]]]]:
        """What is left to do, in order: cases with the providers of one turn."""
        done = {key_of(row) for row in self.rows}
        found = []
        ranked = [(case, applicable(case, self.providers)) for case in in_order(self.cases)]
        for turn in sorted({provider.turn for provider in self.providers}):
            for case, able in ranked:
                left = [(p, blank) for p, blank in able if p.turn == turn and key_of(blank) not in done]
                if left:
                    found.append((case, left))
        return found

    def go(self) -> list[Timing]:
        """Measure. Raises LostDevice, after `save`, where a kernel took the GPU away."""
        todo = self.todo()
        for number, (case, able) in enumerate(todo):
            if self.deadline is not None and self.now() > self.deadline:
                note = "skipped: the time budget was spent"
                late = [blank for _, others in todo[number:] for _, blank in others]
                self.rows += [dataclasses.replace(blank, status="skipped", note=note) for blank in late]
                self.save(self.rows)
                break
            try:
                for rows in time_case(case, able, self.instruments):
                    self.rows += rows
            except LostDevice as error:
                self.rows += error.rows
                self.save(self.rows)
                raise
            self.save(self.rows)
            self.progress(number + 1, len(todo), f"{case.layer} {case.pass_} {case.dtype}")
        return self.rows


def kept_rows(earlier: Record, versions: Versions, commit: Commit) -> tuple[Timing, ...]:
    """The rows that --resume goes on from. Raises ValueError where they are of other versions or another commit."""
    for name in (f.name for f in dataclasses.fields(Versions)):
        then, today = getattr(earlier.versions, name), getattr(versions, name)
        if then != today:
            raise ValueError(f"resume: the rows there were measured with {name} {then}, this is {today}")
    if earlier.commit != commit:
        then, today = (f"{c.hash or 'unknown'}{' with changes' if c.dirty else ''}" for c in (earlier.commit, commit))
        raise ValueError(f"resume: the rows there were measured at commit {then}, this is {today}")
    return earlier.timings


def time_case(
    case: Case, able: Sequence[tuple[Provider, Timing]], instruments: Instruments
) -> Iterator[list[Timing]]:  # fmt: skip
    """The rows of each provider in turn: judged against float64, then timed. `able` comes from `applicable`.

    One that is wrong, raises or runs out of memory gets a row without a speed that says why, and the next one goes on.
    """
    shape = shape_of(case)
    base: Tensors = {}
    references: dict[str, Reference] = {}
    for provider, blank in able:
        warmed = instruments.warmed.get(case, {}) if provider.ours else {}
        if "lost" in warmed:
            note = f"not timed: the call did not come back from a process of its own: {warmed['lost']}"
            yield [dataclasses.replace(blank, status="failed", note=note)]
            continue
        try:
            with torch.no_grad():
                base = base or operands(case, instruments.device)
                level = level_of(provider, case)
                if level not in references:
                    with cudnn(benchmark=False)(dataclasses.replace(case, dtype=level)):
                        references[level] = reference(case, shape, base, level)
                torch.cuda.synchronize()
                with provider.around(case), instruments.on_stream():
                    rows = list(_judged_and_timed(case, shape, provider, blank, base, references[level], instruments))
                if provider.name == "tileconv" and "first_call_ms" in warmed:
                    rows = [dataclasses.replace(row, first_call_ms=warmed["first_call_ms"]) for row in rows]
        except Unsupported as error:
            rows = [dataclasses.replace(blank, status="skipped", note=f"skipped: {error}")]
        except torch.cuda.OutOfMemoryError:
            rows = [dataclasses.replace(blank, status="out of memory", note="not timed: out of GPU memory")]
        except Exception as error:  # one provider's failure must not cost the rest of the run
            rows = [dataclasses.replace(blank, status="failed", note=f"not timed: {describe_error(error)}")]
            _still_there(rows)
        if rows[0].status in ("failed", "out of memory"):
            gc.collect()  # a traceback's frames hold their tensors in cycles
        torch.cuda.empty_cache()
        yield rows


def _still_there(rows: list[Timing]) -> None:
    """Raise LostDevice if the GPU no longer answers: errors such as an illegal address stay with the process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise LostDevice(describe_error(error), rows) from error


def _judged_and_timed(
    case: Case, shape: Shape, provider: Provider, blank: Timing, base: Tensors, ref: Reference, instruments: Instruments
) -> Iterator[Timing]:
    t = placed(base, shape, provider.layout)

    def make(tensors: Tensors) -> Call:
        return provider.make(case, shape, tensors)

    call = make(t)
    torch.cuda.synchronize()
    start = time.perf_counter()
    first = call()
    torch.cuda.synchronize()
    first_ms = (time.perf_counter() - start) * 1e3
    # The second call: the first one's memory holds what compilers and cuDNN's search needed.
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    found = verdict(make, first, t, case, shape, ref, provider.ours, alone=provider.alone)
    blank = dataclasses.replace(
        blank, error=found.error, allowed=finite(ref.allowed), repeatable=found.repeatable,
        batch_invariant=found.batch_invariant, tile=_tile(case) if provider.ours else "", first_call_ms=first_ms,
        peak_bytes=torch.cuda.max_memory_allocated() - before,
    )  # fmt: skip
    if found.reason:
        yield dataclasses.replace(blank, status="wrong", note=f"not timed: {found.reason}")
        return
    if case.pass_ in FORWARD and provider.turn == 0 and shape.op != "network":
        blank = dataclasses.replace(blank, saved_bytes=_saved(make, t))
    moved = sum(value.nbytes for name, value in t.items() if name in READS.get(case.pass_, ())) + first.nbytes
    counts = flops_of(case), moved if shape.op != "network" else None
    graphs = suite_of(case.network).graph
    yield from _timed([call, *_more_buffers(make, t)], blank, counts, instruments, graphs)


def _more_buffers(make: Callable[[Tensors], Call], t: Tensors) -> list[Call]:
    """Calls on copies of the operands, as many as a quarter of the free memory holds, at most BUFFERS in all."""
    free, _ = torch.cuda.mem_get_info()
    size = max(1, sum(value.nbytes for value in t.values()))
    copies = max(0, min(BUFFERS - 1, free // 4 // size))
    return [make({name: value.clone() for name, value in t.items()}) for _ in range(copies)]


def _timed(
    calls: Sequence[AnyCall], blank: Timing, counts: tuple[int | None, int | None], instruments: Instruments,
    graphs: bool,
) -> Iterator[Timing]:  # fmt: skip
    """Rows for a cold and a warm L2 cache; for short calls, and with `graphs`, again as replayed from CUDA graphs."""
    flops, moved = counts

    def row(*, cold: bool, graph: bool) -> Timing:
        watch = Watch(instruments.gauge)
        q = Quantiles.of(instruments.timer(calls, cold=cold, graph=graph, watch=watch.look))
        found: dict[str, Any] = watch.fields
        return dataclasses.replace(
            blank, l2="cold" if cold else "warm", method="graph" if graph else "events", passed=True,
            p20_us=q.p20, p50_us=q.p50, p80_us=q.p80, p99_us=q.p99, n=q.n,
            tflops=None if flops is None else flops / q.p50 / 1e6,
            gbs=None if moved is None else moved / q.p50 / 1e3, **found,
        )  # fmt: skip

    rows = [row(cold=True, graph=False), row(cold=False, graph=False)]
    assert rows[1].p50_us is not None
    if rows[1].p50_us >= SHORT_US and not graphs:
        yield from rows
        return
    try:
        rows += [row(cold=True, graph=True), row(cold=False, graph=True)]
    except GraphError as error:
        rows = [dataclasses.replace(r, note=f"no CUDA graph: {describe_error(error)}") for r in rows]
    yield from rows


def _saved(make: Callable[[Tensors], Call], t: Tensors) -> int | None:
    """Bytes that autograd keeps for backward; None where the layer has none."""
    from .memory import saved_bytes

    if not t["x"].is_floating_point():
        return None
    with torch.enable_grad():
        x = t["x"].detach().requires_grad_()
        parameters = [t[name].detach().requires_grad_() for name in ("w", "b") if name in t]
        operands = t | {"x": x} | dict(zip([n for n in ("w", "b") if n in t], parameters, strict=True))
        try:
            return saved_bytes(lambda leaf: make(operands | {"x": leaf})(), x, parameters)
        except (RuntimeError, AssertionError):  # no gradient, or a provider that computes outside autograd
            return None


def _tile(case: Case) -> str:
    """The tile of a case's product, as the library chooses or was told to; of other kernels the first launch's."""
    from tileconv.kernels import hardware

    from .inspect import describe_tile
    from .predictions import PRODUCTS

    try:
        planned = launches(case, hardware.gpu_of(torch.device("cuda")))
    except (KeyError, ValueError, AssertionError):
        return ""
    main = [launch for launch in planned if launch.kernel.__name__ in PRODUCTS] or planned
    return " + ".join(dict.fromkeys(describe_tile(launch) for launch in main))[:200]
