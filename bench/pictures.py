"""Which pictures of times a record gives: measured where there are timings, else modelled; each says which."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from .cases import DTYPES, PASSES
from .document import Figure, Word, listed
from .figures import Draw
from .figures_speed import (
    Chart,
    Curve,
    Heat,
    RooflinePoint,
    Step,
    Waterfall,
    draw_charts,
    draw_heat,
    draw_roofline,
    draw_waterfalls,
    series_of,
)
from .frames import CASE, OURS, case_frame, comparisons, first_condition, keep, timing_frame, under
from .networks import network_layers
from .records import Record, slug
from .targets import reference_batch

MAIN = "alexnet"
PRODUCTS = ("fprop", "dgrad", "wgrad")
COLUMNS = ("forward", "dgrad", "wgrad", "backward")
COLUMN_OF = {"fprop": "forward", "forward": "forward"}
DILATED = "dilated"
# name, title, description, drawing, size in inches, how the numbers came about -> the figure, its files written
Picture = Callable[[str, str, str, Draw, tuple[float, float], Word], Figure]


@dataclass(frozen=True)
class Speeds:
    """Times of cases in one table: `us` ours, `reference_us` what it is held to, `ratio` what the heat map shows.

    Modelled: the reference is the floor and the ratio is modelled time / floor. Measured: the reference is the best
    rival and the ratio its time / ours.
    """

    word: Literal["measured", "modelled"]
    where: str
    table: pd.DataFrame
    reference: str
    gaps: pd.DataFrame  # cases of ours without a time


def measured(record: Record) -> Speeds:
    """The comparisons under the record's first condition, joined with the bytes and roofs that inspections know."""
    table = comparisons(record.timings)
    condition = first_condition(table)
    table = under(table, condition)
    # Operations and bytes belong to the problem and not to the GPU; a roof belongs to the GPU of its name alone.
    known = case_frame(record.inspections)
    facts = known[[*CASE, "flops", "bytes_least"]].drop_duplicates(CASE)
    roofs = keep(known, (gpu in record.device.name for gpu in known["gpu"]))
    roofs = roofs[["dtype", "peak_tflops", "dram_gbs"]].dropna()
    table = table.merge(facts, on=CASE, how="left").merge(roofs.drop_duplicates("dtype"), on="dtype", how="left")
    where = record.device.name + (f", {condition[0]} L2 cache" if condition else "")
    table = table.assign(reference_us=table["best_us"], gpu=where)
    asked = under(timing_frame(record.timings), condition)
    asked = asked[asked["provider"] == OURS]
    return Speeds("measured", where, _sorted(table), "best rival", _missing(asked, table))


def modelled(record: Record) -> Speeds:
    """The cost model's sums over each case's launches, for the first architecture that it knows."""
    cases = case_frame(record.inspections)
    table = cases.dropna(subset=["modelled_us", "floor_us"])
    table = table[table["floor_us"] > 0]
    first = next(iter(table["arch"]), "")
    table = table[table["arch"] == first]
    gaps = _missing(cases[cases["arch"] == first], table)
    where = f"{table['gpu'].iloc[0]} ({first})" if len(table) else ""
    table = table.assign(us=table["modelled_us"], reference_us=table["floor_us"], hot=False)
    return Speeds("modelled", where, _sorted(table), "floor", gaps)


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """By dtype and pass, in the order in which this project names them; the rest stays as it is."""
    ranks = {name: i for i, name in enumerate((*DTYPES, *PASSES))}
    by = {"dtype": table["dtype"].map(ranks), "pass": table["pass"].map(ranks)}
    return table.assign(_dtype=by["dtype"], _pass=by["pass"]).sort_values(["_dtype", "_pass"], kind="stable")


def _missing(asked: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """The cases that were asked for and have no time."""
    have = set(found[CASE].itertuples(index=False, name=None))
    return keep(asked[CASE], (c not in have for c in asked[CASE].itertuples(index=False, name=None))).drop_duplicates()


def speed_pictures(record: Record, picture: Picture) -> list[Figure]:
    """Heat maps, roofline, waterfalls, time against dilation, time and memory against batch: those with data."""
    sources = [measured(record), modelled(record)]
    makers = (_heat, _roofline, _waterfall, _dilation, _batch)
    found: list[Figure] = []
    for make in makers:
        made: Sequence[Figure] = next((f for source in sources if (f := make(source, record, picture))), ())
        found += made
    return found


def at_batch(table: pd.DataFrame) -> pd.DataFrame:
    """Each layer at the batch that pictures are about (targets.reference_batch)."""
    if table.empty:
        return table
    chosen = table.groupby(["network", "layer"])["batch"].transform(reference_batch)
    return table[table["batch"] == chosen]


def _main(speeds: Speeds) -> pd.DataFrame:
    """The rows of AlexNet, or of the record's first network without it; not those that only vary a dilation."""
    table = speeds.table[speeds.table["network"] != DILATED]
    names = list(dict.fromkeys(table["network"]))
    return table[table["network"] == (MAIN if MAIN in names else names[0])] if names else table


def _in_order(network: str, layers: Iterable[str]) -> list[str]:
    """Layers as the network runs them (a record holds them pass by pass); those of an unknown network as they are."""
    found = list(dict.fromkeys(layers))
    if not re.fullmatch(r"[a-z0-9-]+", network):
        return found  # a user's file or function, which a report must not run
    try:
        known = [shape.name for shape in network_layers(network, 1)]
    except ValueError:
        return found
    return sorted(found, key=lambda layer: known.index(layer) if layer in known else len(known))


def _heat(speeds: Speeds, record: Record, picture: Picture) -> list[Figure]:
    table = at_batch(speeds.table[speeds.table["network"] != DILATED]).dropna(subset=["ratio"])
    better = speeds.word == "measured"
    found = []
    networks = sorted(dict.fromkeys(table["network"]), key=lambda n: n != MAIN)
    for network in networks:
        own = table[table["network"] == network]
        own = own.assign(column=own["pass"].map(lambda p: COLUMN_OF.get(p, p)))
        layers = _in_order(network, [*own["layer"], *_same(speeds.gaps, own)["layer"]])
        columns = list(dict.fromkeys(sorted(own["column"], key=lambda c: COLUMNS.index(c) if c in COLUMNS else 9)))
        panels = []
        for dtype in dict.fromkeys(own["dtype"]):
            part = own[own["dtype"] == dtype]
            values = part.pivot_table(index="layer", columns="column", values="ratio", aggfunc="first")
            hot = _cells(part[part["hot"].astype(bool)])
            lost = _cells(_same(speeds.gaps, part))
            panels.append(Heat(str(dtype), values.reindex(index=layers, columns=columns), better, hot, lost))
        batch = listed(str(b) for b in sorted(set(own["batch"])))
        if better:
            title = (
                f"speed-up over the best rival at equal precision, {network} at batch {batch}, on {speeds.where}. "
                "Below 1 we are slower."
            )
            if own["hot"].any():
                title += " Hatched: the GPU was throttled."
            label = "measured: the best rival's time / ours"
        else:
            title = (
                f"time as a multiple of the data sheet's floor, {network} at batch {batch}, for {speeds.where}. "
                "1 cannot be passed; nothing here was timed."
            )
            label = "modelled time / floor"
        about = f"Heat map, {label}, for every layer of {network} by pass and dtype"
        size = (10.0, 0.9 + 0.27 * len(layers) + 0.3)
        if network == networks[0]:
            found.append(picture("heat", title, about, draw_heat(panels, label), size, speeds.word))
        else:
            drawn = picture(f"heat-{slug(network)}", title, about, draw_heat(panels, label), size, speeds.word)
            found.append(dataclasses.replace(drawn, summary=f"Heat map of {network}"))
    return found


def _same(gaps: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The gaps of a table's networks, batches and dtypes."""
    keys = ["network", "batch", "dtype"]
    there = set(table[keys].itertuples(index=False, name=None))
    return keep(gaps, (key in there for key in gaps[keys].itertuples(index=False, name=None)))


def _cells(rows: pd.DataFrame) -> frozenset[tuple[str, str]]:
    """The places of a heat map that rows stand for."""
    return frozenset((str(r["layer"]), COLUMN_OF.get(r["pass"], r["pass"])) for r in rows.to_dict("records"))


def _roofline(speeds: Speeds, record: Record, picture: Picture) -> list[Figure]:
    table = at_batch(_main(speeds))
    table = table[table["pass"].isin(PRODUCTS)].dropna(subset=["tflops", "flops", "bytes_least"])
    points = [
        RooflinePoint(
            f"{r['gpu']}, {r['dtype']}: {speeds.word}", r["pass"], r["layer"], r["flops"] / r["bytes_least"],
            r["tflops"], _known(r["peak_tflops"]), _known(r["dram_gbs"]),
        )
        for _, r in table.iterrows()
    ]  # fmt: skip
    if not points:
        return []
    panels = len({p.panel for p in points})
    known = points[0].peak_tflops is not None
    roof = "under the data sheet's roof" if known else "without a roof, which the record does not know"
    title = f"TFLOP/s against operations a byte, {roof}, for {speeds.where}."
    about = f"Roofline: {speeds.word} TFLOP/s over operations a byte for every layer and pass, logarithmic scales"
    size = (10.0, 4.6 * math.ceil(panels / 2))
    return [picture("roofline", title, about, draw_roofline(points, speeds.word), size, speeds.word)]


def _known(value: float) -> float | None:
    return None if value != value else value


def _waterfall(speeds: Speeds, record: Record, picture: Picture) -> list[Figure]:
    table = at_batch(_main(speeds))
    if table.empty:
        return []
    network, dtype = table["network"].iloc[0], table["dtype"].iloc[0]
    table = table[table["dtype"] == dtype]
    layers = _in_order(network, table["layer"])
    forward = table[table["pass"].isin(COLUMN_OF)]
    backward = table[~table["pass"].isin(COLUMN_OF)]
    ahead = [_step(f"{layer}", forward[forward["layer"] == layer]) for layer in layers]
    back = [_step(f"{layer} back", backward[backward["layer"] == layer]) for layer in reversed(layers)]
    there, returned = (tuple(s for s in steps if s is not None) for steps in (ahead, back))
    if not there:
        return []
    batch = table["batch"].iloc[0]
    panels = [Waterfall(f"{network}, forward pass, batch {batch}, {dtype}: {speeds.word}", there)]
    if returned:
        panels.append(
            Waterfall(f"{network}, training step, batch {batch}, {dtype}: {speeds.word}", (*there, *returned))
        )
    title = (
        f"where the time of {network} goes, layer after layer, for {speeds.where}. Only the layers' kernels: no loss, "
        "optimiser, dropout or time of the host."
    )
    lost = _same(speeds.gaps, table)
    if len(lost):
        names = sorted(f"{r['layer']} {r['pass']}" for r in lost.to_dict("records"))
        title += f" Not in these sums, because there is no time: {', '.join(names)}."
    about = f"Waterfall of {speeds.word} microseconds, each layer's bar starting where the one before it ended"
    drawing = draw_waterfalls(panels, f"{speeds.word}, {speeds.reference}", f"{speeds.word} microseconds")
    size = (10.0, sum(0.24 * (len(p.steps) + 1) + 0.75 for p in panels) + 0.3)
    return [picture("waterfall", title, about, drawing, size, speeds.word)]


def _step(name: str, rows: pd.DataFrame) -> Step | None:
    if rows.empty:
        return None
    order = {p: i for i, p in enumerate(("fprop", "forward", "backward", "dgrad", "wgrad"))}  # as they run
    rows = rows.sort_values("pass", key=lambda p: p.map(lambda x: order.get(x, 9)), kind="stable")
    parts = {COLUMN_OF.get(p, p): float(us) for p, us in zip(rows["pass"], rows["us"], strict=True)}
    whole = rows["reference_us"].notna().all()
    return Step(name, parts, float(rows["reference_us"].sum()) if whole else None)


def _dilation(speeds: Speeds, record: Record, picture: Picture) -> list[Figure]:
    table = at_batch(speeds.table[speeds.table["network"] == DILATED])
    steps = table["layer"].str.extract(r"^dilation[ -](\d+)$", expand=False) if len(table) else pd.Series(dtype=str)
    table = table.assign(dilation=pd.to_numeric(steps)).dropna(subset=["dilation"]).sort_values("dilation")
    if table["dilation"].nunique() < 2:
        return []
    charts = []
    for dtype in list(dict.fromkeys(table["dtype"]))[:2]:
        curves = []
        for pass_ in (p for p in PRODUCTS if p in set(table["pass"])):
            i = series_of(pass_)
            own = table[(table["dtype"] == dtype) & (table["pass"] == pass_)]
            curves.append(Curve(f"{pass_}, {OURS}", _column(own, "dilation"), _column(own, "us"), i))
            known = own.dropna(subset=["reference_us"])
            label = f"{pass_}, {speeds.reference}"
            curves.append(Curve(label, _column(known, "dilation"), _column(known, "reference_us"), i, dashed=True))
        title = f"{dtype}, batch {table['batch'].iloc[0]}: {speeds.word}"
        charts.append(Chart(title, "dilation, at equal output size", f"{speeds.word} microseconds", tuple(curves)))
    title = (
        f"time against dilation, for {speeds.where}. Dilation only moves coordinates; taps that lie in the padding are "
        "skipped by tileconv."
    )
    about = (
        f"Lines of {speeds.word} time over dilations from {table['dilation'].min():g} to {table['dilation'].max():g}"
    )
    return [picture("dilation", title, about, draw_charts(charts), (10.0, 3.8), speeds.word)]


def _column(table: pd.DataFrame, name: str) -> tuple[float, ...]:
    return tuple(float(v) for v in table[name])


def _batch(speeds: Speeds, record: Record, picture: Picture) -> list[Figure]:
    table = _main(speeds)
    table = table[table["pass"] == "fprop"]
    if table.empty:
        return []
    dtype = table["dtype"].iloc[0]
    table = table[table["dtype"] == dtype]
    batches = sorted(set(table["batch"]))
    # A sum over other layers at each batch would show what was run and not what it costs.
    everywhere = table.groupby("layer")["batch"].nunique() == len(batches)
    layers = list(everywhere.index[everywhere])
    table = table[table["layer"].isin(layers)]
    if len(batches) < 2 or not layers:
        return []
    times = table.groupby("batch")[["us", "reference_us"]].sum(min_count=len(layers)).reset_index()
    curves = [Curve(OURS, _column(times, "batch"), _column(times, "us"), 0)]
    known = times.dropna(subset=["reference_us"])
    curves.append(Curve(speeds.reference, _column(known, "batch"), _column(known, "reference_us"), 1, dashed=True))
    axis, name = f"{speeds.word} microseconds", table["network"].iloc[0]
    charts = [Chart(f"{name}, forward, {dtype}: {speeds.word}", "batch", axis, tuple(curves), log=True)]
    memory, note = _memory(speeds, record, table)
    charts += memory
    title = (
        f"time {'and memory ' if memory else ''}against batch, the sum of {len(layers)} layers that multiply, for "
        f"{speeds.where}. {note}"
    )
    about = (
        f"Lines of {speeds.word} time, and of memory where it is known, over batch sizes {batches[0]} to {batches[-1]}"
    )
    return [picture("batch", title, about, draw_charts(charts), (10.0, 3.8), speeds.word)]


def _memory(speeds: Speeds, record: Record, table: pd.DataFrame) -> tuple[list[Chart], str]:
    """Memory of the layer that needs most: measured, beyond its operands; else counted, operands and what is extra."""
    axis = "MB, the layer that needs most"
    if speeds.word == "measured":
        return _peaks(record, table, axis)
    if table["bytes_least"].isna().any():
        return [], "The operands' sizes are not in this record, so memory is not drawn."
    largest = table.groupby("batch")["bytes_least"].max() / 1e6
    x = tuple(float(b) for b in largest.index)
    curves = [Curve("operands and result", x, tuple(largest), 0)]
    if table["extra_bytes"].isna().any():
        note = "What kernels need besides operands and result is not in this record, and not drawn."
    else:
        extra = table.assign(all=table["bytes_least"] + table["extra_bytes"]).groupby("batch")["all"].max() / 1e6
        curves.append(Curve("with what kernels need besides", x, tuple(extra), 1, dashed=True))
        note = "Memory is counted from the launches."
    return [Chart("memory: counted", "batch", axis, tuple(curves))], note


def _peaks(record: Record, table: pd.DataFrame, axis: str) -> tuple[list[Chart], str]:
    rows = timing_frame(record.timings).dropna(subset=["us", "peak_bytes"])
    rows = rows.merge(table[[*CASE, "l2", "method"]], on=[*CASE, "l2", "method"])
    if rows.empty:
        return [], "Peak memory is not in this record, and not drawn."
    curves = []
    plain = [p for p in dict.fromkeys(rows["provider"]) if not re.match(rf"{OURS}:", p)]
    for i, provider in enumerate(plain[:3]):
        peaks = rows[rows["provider"] == provider].groupby("batch")["peak_bytes"].max().astype(float) / 1e6
        curves.append(Curve(provider, tuple(float(b) for b in peaks.index), tuple(peaks), i))
    title = "memory allocated beyond the operands: measured"
    return [Chart(title, "batch", axis, tuple(curves))], "Memory is what the call allocated beyond its operands."
