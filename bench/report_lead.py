"""A report's first screen: device, versions, the geometric mean with what speaks against it, and the four words."""

from __future__ import annotations

import pandas as pd

from .document import Card, Lead, Table, listed
from .frames import comparisons, first_condition, geometric_mean, under
from .pictures import MAIN
from .records import Check, Record
from .report_inspected import (
    SHORT_HEADER,
    archs_of,
    inspection_faults,
    modelled_sums,
    named_faults,
    short_cells,
)
from .report_measured import number, times
from .targets import lines

SHOWN = 5  # rows of the first screen's table
NO_SPEED = "No GPU ran these kernels, so no GPU speed was measured."


def lead(record: Record) -> Lead:
    """The first screen of a record's report."""
    v = record.versions
    facts = (
        ("device", record.device.name), ("torch", v.torch), ("triton", v.triton), ("CUDA", v.cuda or "none"),
        ("cuDNN", v.cudnn or "none"), ("driver", v.driver or "none"), ("tileconv", v.tileconv),
        ("commit", (record.commit.hash or "unknown")[:10] + (" with changes" if record.commit.dirty else "")),
        ("run", record.started[:10]),
    )  # fmt: skip
    what, value, note, table = _against_cudnn(record) if record.timings else _not_measured(record)
    return Lead(title_of(record), facts, what, value, note, table, cards(record))


def title_of(record: Record) -> str:
    """What the report is about: the device, or that there was none."""
    return "tileconv, inspected" if record.device.kind == "none" else f"tileconv on {record.device.name}"


def cards(record: Record) -> tuple[Card, ...]:
    """What was measured, modelled, inspected and checked."""
    return (_measured(record), _modelled(record), _inspected(record), _checked(record))


def _against_cudnn(record: Record) -> tuple[str, str, str, Table]:
    """The geometric mean over cuDNN (over the best rival, where no cuDNN was timed), and the losses."""
    compared = comparisons(record.timings)
    condition = first_condition(compared)
    first = under(compared, condition)
    column, name = ("cudnn_ratio", "cuDNN") if first["cudnn_ratio"].notna().any() else ("ratio", "the best rival")
    known = first.dropna(subset=[column]).sort_values(column, kind="stable")
    cool = known[~known["hot"]]
    mean = geometric_mean(cool[column])
    losses = int((cool[column] < 1).sum())
    what = f"Speed-up over {name}, geometric mean"
    if condition is None or mean is None:
        return (
            what,
            "not known",
            "No case has a time of ours and one of a rival at equal precision.",
            _losses(known, column),
        )
    note = f"{len(cool)} cases at equal precision, {condition[0]} L2 cache; slower in {losses}."
    if hot := len(known) - len(cool):
        note += f" Left out, because the GPU was throttled: {hot}."
    if name == "cuDNN":
        note += f" Over the best of all rivals: {times(geometric_mean(cool['ratio']))}."
    elsewhere = [
        f"{times(geometric_mean(rows[column]))} with a {l2} L2 cache ({method})"
        for (l2, method), rows in compared[~compared["hot"]].groupby(["l2", "method"], sort=False)
        if (l2, method) != condition
    ]
    if elsewhere:
        note += f" Elsewhere: {listed(elsewhere)}."
    return what, times(mean), note, _losses(known, column)


def _losses(known: pd.DataFrame, column: str) -> Table:
    rival = "cudnn" if column == "cudnn_ratio" else "best"
    header = ("layer", "pass", "dtype", "speed-up", "tileconv us", "rival us", "batch")
    rows = tuple(
        (r["layer"] if r["network"] == MAIN else f"{r['network']} {r['layer']}", r["pass"], r["dtype"],
         times(r[column]) + (" (throttled)" if r["hot"] else ""), number(r["us"]), number(r[f"{rival}_us"]),
         str(r["batch"]))
        for r in known.head(SHOWN).to_dict("records")
    )  # fmt: skip
    lost = int((known[column] < 1).sum())
    caption = f"Losses first, {min(SHOWN, lost)} of {lost}" if lost else "No losses; the closest cases first"
    return Table(header, rows, caption=caption)


def _not_measured(record: Record) -> tuple[str, str, str, Table]:
    note = f"{NO_SPEED} What follows is modelled or inspected, and says so."
    held = lines(record.inspections)
    short = [line for line in held if not line.met]
    rows = tuple(short_cells(line) for line in short[:SHOWN])
    caption = f"Furthest from target, {len(rows)} of {len(short)}; inspected and modelled"
    several = ("architecture",) if len(archs_of(record.inspections)) > 1 else ()
    shown = ("layer", "pass", "dtype", *several, "target", "times the limit")
    keep = [SHORT_HEADER.index(name) for name in shown]
    header = tuple(SHORT_HEADER[i] for i in keep)
    table = Table(header, tuple(tuple(row[i] for i in keep) for row in rows), caption=caption if held else "")
    return "Speed-up over cuDNN", "not measured", note, table


def _measured(record: Record) -> Card:
    rows = record.timings
    if not rows:
        return Card("measured", "Nothing.", NO_SPEED)
    without = sum(t.p50_us is None for t in rows)
    hot = sum(bool(t.throttled) for t in rows)
    text = f"rows timed on {record.device.name}"
    if without:
        text += "; the rest say why they have no speed"
    if hot:
        text += f"; the GPU was throttled in {hot}"
    return Card("measured", f"{len(rows) - without} of {len(rows)}", text + ".")


def _modelled(record: Record) -> Card:
    sums = modelled_sums(record.inspections)
    if not sums:
        return Card("modelled", "Nothing.", "No inspected launch has a prediction.")
    first, *others = sums
    more = f"; {listed(f'{s.pass_} {s.ratio:.2f}x' for s in others)}" if others else ""
    text = (
        f"the data sheet's floor for {first.network}'s {first.pass_}, {first.us:.0f} us{more}. {first.gpu} "
        f"({first.arch}), {first.dtype}, batch {first.batch}: a bound, nobody's measurement."
    )
    return Card("modelled", f"{first.ratio:.2f}x", text)


def _inspected(record: Record) -> Card:
    rows = record.inspections
    if not rows:
        return Card("inspected", "Nothing.", "No kernel was compiled and read.")
    bad = [i for i in rows if inspection_faults(i)]
    held = lines(rows)
    short = sum(not line.met for line in held)
    text = f"launches for {listed(archs_of(rows))} compile without spills, serialised products or other faults."
    if bad:
        text += f" Not so: {named_faults(bad)}."
    if held:
        text += f" {short} of {len(held)} targets are missed, the modelled ones included."
    return Card("inspected", f"{len(rows) - len(bad)} of {len(rows)}", text)


def _checked(record: Record) -> Card:
    checks = record.checks
    if not checks:
        return Card("checked", "Nothing.", "No result was compared with float64.")
    passed = sum(c.passed for c in checks)
    where = "in Triton's interpreter on a CPU" if record.device.kind == "interpreter" else f"on {record.device.name}"
    text = f"comparisons with float64 are within budget, {where}."
    worst = max((c for c in checks if c.error is not None and c.allowed), key=_share, default=None)
    if worst is not None:
        text += f" The worst uses {100 * _share(worst):.3g} % of it: {worst.layer} in {worst.dtype}."
    return Card("checked", f"{passed} of {len(checks)}", text)


def _share(check: Check) -> float:
    return (check.error or 0.0) / check.allowed if check.allowed else 0.0
