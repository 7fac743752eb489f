"""Two records side by side: which rows became slower by more than noise, and which machine code became worse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from .document import listed
from .frames import is_ours
from .records import Inspection, Record, Timing
from .report_inspected import inspection_faults
from .targets import CaseSum, case_sums

Verdict = Literal["REGRESSION", "throttled", "rival moved", "within noise", "changed", "faster", "same"]
Item = TypeVar("Item")
Key = tuple[str, ...]
COLUMNS = ("verdict", "case", "what", "A", "B", "B / A")


@dataclass(frozen=True)
class Row:
    """One number of both records; `ratio` is B / A, above 1 worse, infinite where something was lost."""

    case: str
    what: str
    before: str
    after: str
    ratio: float
    verdict: Verdict

    @property
    def cells(self) -> tuple[str, ...]:
        """As COLUMNS names them."""
        times = "-" if math.isinf(self.ratio) else f"{self.ratio:.3f}x"
        return (self.verdict, self.case, self.what, self.before, self.after, times)


@dataclass(frozen=True)
class Comparison:
    """What both records have, the worst first, and what only one of them has; `kind` says what sort of numbers."""

    kind: str
    rows: tuple[Row, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Row, ...]:
        """What a build should fail on."""
        return tuple(row for row in self.rows if row.verdict == "REGRESSION")


def percentage(text: str) -> float:
    """The share that a text such as "5%" names; ValueError without the sign, because 0.05 could mean two things."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if not found:
        raise ValueError(f"fail-above={text!r} must be a percentage that is not negative, such as 5%")
    return float(found[1]) / 100


def compare(a: Record, b: Record, fail_above: float, *, force: bool = False) -> Comparison:
    """Compare what both records hold: timings where they have some, else modelled times and machine code.

    A time of ours is a regression if its median grew by more than `fail_above` and the quantiles do not overlap (B's at
    20 % is above A's at 80 %), or if it was lost. Modelled times and instruction counts are exact, so there the share
    alone decides; new faults always count. Raises ValueError for records of different devices, or of which only one
    holds timings, unless forced; and for records that share no row.
    """
    if (a.device.name, a.device.kind) != (b.device.name, b.device.kind) and not force:
        raise ValueError(
            f"device: A ran on {a.device.name} and B on {b.device.name}, and a difference would be the device's; "
            "--force compares them all the same"
        )
    if bool(a.timings) != bool(b.timings) and not force:
        some, none = ("A", "B") if a.timings else ("B", "A")
        raise ValueError(
            f"timings: {some} holds measurements and {none} none; --force compares what was inspected and modelled"
        )
    if a.timings and b.timings:
        found = _matched(
            "measured", _unique(a.timings, _timing_key, "A", "timings"),
            _unique(b.timings, _timing_key, "B", "timings"),
            lambda x, y: [_timing_row(x, y, fail_above)] if x.p50_us is not None or y.p50_us is not None else [],
        )  # fmt: skip
    else:
        sums = [case_sums(r.inspections) for r in (a, b)]
        found = _matched(
            "modelled and inspected, not measured", _unique(sums[0], _case_key, "A", "inspections"),
            _unique(sums[1], _case_key, "B", "inspections"), lambda x, y: _case_rows(x, y, fail_above),
        )  # fmt: skip
    if found is None:
        raise ValueError(f"A and B share no row: A holds {_contents(a)}; B holds {_contents(b)}")
    return Comparison(*found, tuple(_versions(a, b)))


def _matched(
    kind: str, before: dict[Key, Item], after: dict[Key, Item], rows_of: Callable[[Item, Item], list[Row]]
) -> tuple[str, tuple[Row, ...], tuple[str, ...], tuple[str, ...]] | None:
    """Rows of what both have, and the names of what only one has; None if nothing is shared."""
    shared = [key for key in before if key in after]
    if not shared:
        return None
    rows = [row for key in shared for row in rows_of(before[key], after[key])]
    rows.sort(key=lambda row: (row.verdict != "REGRESSION", -row.ratio))
    lost, new = ([key for key in one if key not in other] for one, other in ((before, after), (after, before)))
    return kind, tuple(rows), tuple(map(" ".join, lost)), tuple(map(" ".join, new))


def _unique(items: Iterable[Item], key_of: Callable[[Item], Key], which: str, field: str) -> dict[Key, Item]:
    found: dict[Key, Item] = {}
    for item in items:
        if (key := key_of(item)) in found:
            raise ValueError(f"{field}: {which} holds {' '.join(key)} twice")
        found[key] = item
    return found


def _timing_key(t: Timing) -> Key:
    case = f"{t.network}/{t.layer}/{t.pass_}/{t.dtype}/n{t.batch}"
    return case, f"{t.provider},", f"{t.memory_format},", f"{t.l2} L2,", t.method


def _timing_row(a: Timing, b: Timing, fail_above: float) -> Row:
    case, *what = _timing_key(a)
    ours = is_ours(a.provider)
    if a.p50_us is None or b.p50_us is None:
        lost = b.p50_us is None
        verdict: Verdict = "faster" if not lost else "REGRESSION" if ours else "rival moved"
        return Row(case, " ".join(what), _spread(a), _spread(b), math.inf if lost else 0.0, verdict)
    ratio = b.p50_us / a.p50_us
    moved = max(ratio, 1 / ratio) > 1 + fail_above
    apart = _low(b) > _high(a) if ratio > 1 else _high(b) < _low(a)
    if a.precision and b.precision and a.precision != b.precision:
        verdict = "changed"
        what = [*what, f"(precision {a.precision} in A, {b.precision} in B)"]
    elif not moved:
        verdict = "same"
    elif a.throttled or b.throttled:
        verdict = "throttled"
    elif not apart:
        verdict = "within noise"
    elif not ours:
        verdict = "rival moved"
    else:
        verdict = "REGRESSION" if ratio > 1 else "faster"
    return Row(case, " ".join(what), _spread(a), _spread(b), ratio, verdict)


def _low(t: Timing) -> float:
    return t.p20_us or t.p50_us or 0.0


def _high(t: Timing) -> float:
    return t.p80_us or t.p50_us or 0.0


def _spread(t: Timing) -> str:
    if t.p50_us is None:
        return t.note or t.status
    return f"{t.p50_us:.4g} us ({_low(t):.4g} to {_high(t):.4g})"


def _case_key(case: CaseSum) -> Key:
    return case.first.case, case.first.arch


def _case_rows(a: CaseSum, b: CaseSum, fail_above: float) -> list[Row]:
    """The case's modelled time, then the machine code of each launch."""
    case, arch = _case_key(a)
    rows = []
    if a.modelled_us is not None and b.modelled_us is not None:
        texts = (f"{a.modelled_us:.4g} us", f"{b.modelled_us:.4g} us")
        rows.append(_exact(case, f"{arch}, modelled time", texts, b.modelled_us / a.modelled_us, fail_above))
    before, after = ([(i.kernel, i.tile) for i in c.rows] for c in (a, b))
    if before != after:
        texts = (_launches(before), _launches(after))
        rows.append(Row(case, f"{arch}, launches", *texts, 1.0, "changed"))
    for i, launch in enumerate(b.rows):
        rows += _launch_rows(a.rows[i] if i < len(a.rows) else None, launch, fail_above)
    return rows


def _launches(items: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{kernel} {tile}".strip() for kernel, tile in items)


def _launch_rows(a: Inspection | None, b: Inspection, fail_above: float) -> list[Row]:
    """Faults and spills always count; instructions where kernel and tile are the same; registers are only shown."""
    name = f"{b.arch}, {b.kernel}"
    rows = []
    known = inspection_faults(a) if a is not None else []
    if new := [fault for fault in inspection_faults(b) if fault not in known]:
        texts = (listed(known) or "clean", b.failure or listed(inspection_faults(b)))
        rows.append(Row(b.case, f"{name}, {listed(new)}", *texts, math.inf, "REGRESSION"))
    if a is None:
        return rows
    if not new and (b.stack_bytes > a.stack_bytes or b.spills > a.spills):
        texts = (f"{a.stack_bytes} bytes, {a.spills} accesses", f"{b.stack_bytes} bytes, {b.spills} accesses")
        rows.append(Row(a.case, f"{name}, spills", *texts, math.inf, "REGRESSION"))
    compiled = a.failure is None and b.failure is None
    if compiled and (a.kernel, a.tile) == (b.kernel, b.tile):
        counts = (f"{a.instructions}", f"{b.instructions}")
        rows.append(
            _exact(a.case, f"{name}, instructions", counts, b.instructions / max(a.instructions, 1), fail_above)
        )
        if a.registers != b.registers:
            texts = (f"{a.registers}", f"{b.registers}")
            ratio = b.registers / max(a.registers, 1)
            rows.append(Row(a.case, f"{name}, registers", *texts, ratio, "changed"))
    return rows


def _exact(case: str, what: str, texts: tuple[str, str], ratio: float, fail_above: float) -> Row:
    verdict: Verdict = "REGRESSION" if ratio > 1 + fail_above else "faster" if ratio < 1 / (1 + fail_above) else "same"
    return Row(case, what, *texts, ratio, verdict)


def _versions(a: Record, b: Record) -> list[str]:
    pairs = [(name, value, getattr(b.versions, name)) for name, value in vars(a.versions).items()]
    notes = [f"{name}: {x or 'none'} in A, {y or 'none'} in B" for name, x, y in pairs if x != y]
    if a.device.name != b.device.name:
        notes.insert(0, f"device: {a.device.name} in A, {b.device.name} in B; a difference may be the device's")
    return notes


def _contents(record: Record) -> str:
    """What there is to compare: how many rows, of which networks at which batches."""
    rows = record.timings or record.inspections
    if not rows:
        return "neither timings nor inspections"
    networks, batches = dict.fromkeys(r.network for r in rows), sorted({r.batch for r in rows})
    return f"{len(rows)} rows of {listed(networks)} at batch {listed(map(str, batches))}"
