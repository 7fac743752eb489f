"""Pictures of times, measured or modelled: heat map, roofline, waterfall, and lines against a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .figures import Draw, Theme, panels_of

MARKS = ("o", "^", "s", "D")
# A pass has the same colour and mark in every picture.
PASS_SERIES = {"fprop": 0, "forward": 0, "dgrad": 1, "wgrad": 2, "backward": 3}
STRONGEST = 2.0  # powers of two from 1 at which a heat map's colour is full: one odd cell must not pale the others


def series_of(pass_: str) -> int:
    """The place of a pass among a theme's series and MARKS."""
    return PASS_SERIES.get(pass_, 3)


def _plain_logarithm(axis: Any) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


@dataclass(frozen=True)
class Heat:
    """One panel of a heat map: rows are layers, columns passes; `around_one` says that above 1 is better, not worse.

    `hot`: the GPU was throttled. `lost`: there should be a number, and is none.
    """

    title: str
    values: pd.DataFrame
    around_one: bool
    hot: frozenset[tuple[str, str]] = frozenset()
    lost: frozenset[tuple[str, str]] = frozenset()


def draw_heat(panels: Sequence[Heat], label: str) -> Draw:
    """Every cell says its number; its colour is the number's logarithm, a loss always in the second series' colour."""

    def draw(figure: Any, theme: Theme) -> None:
        known = [abs(math.log2(v)) for p in panels for v in p.values.to_numpy().ravel() if v == v and v > 0]
        reach = min(max([1.0, *known]), STRONGEST)
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, panel in zip(grid, panels, strict=True):
            layers, passes = list(panel.values.index), list(panel.values.columns)
            for y, layer in enumerate(layers):
                for x, pass_ in enumerate(passes):
                    _cell(axes, theme, panel, (x, y), panel.values.loc[layer, pass_], reach, (layer, pass_))
            axes.set_xlim(-0.5, len(passes) - 0.5)
            axes.set_ylim(len(layers) - 0.5, -0.5)
            axes.set_xticks(range(len(passes)), passes)
            axes.set_yticks(range(len(layers)), layers)
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.set_title(panel.title, loc="left")
        figure.supxlabel(label, fontsize=9, color=theme.text)

    return draw


def _cell(
    axes: Any, theme: Theme, panel: Heat, place: tuple[int, int], value: float, reach: float, name: tuple[str, str]
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    x, y = place
    if value != value:
        if name in panel.lost:
            axes.text(x, y, "no time", ha="center", va="center", color=theme.alarm)
        return
    better = value >= 1 if panel.around_one else value <= 1
    share = min(abs(math.log2(value)) / reach, 1.0)
    ground, full = to_rgb(theme.page), to_rgb(theme.series[0] if better else theme.series[1])
    color = tuple(g + (f - g) * (0.08 + 0.82 * share) for g, f in zip(ground, full, strict=True))
    hatch = "///" if name in panel.hot else None
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor=theme.page, linewidth=1.5, hatch=hatch)
    )
    light = 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2] > 0.45
    axes.text(x, y, f"{value:.2f}x", ha="center", va="center", color="#14171c" if light else "#ffffff")


@dataclass(frozen=True)
class RooflinePoint:
    """One case: operations a byte (each operand once) and TFLOP/s, under the roof of the panel's GPU, if known."""

    panel: str
    pass_: str
    layer: str
    intensity: float
    tflops: float
    peak_tflops: float | None
    dram_gbs: float | None


def draw_roofline(points: Sequence[RooflinePoint], word: str) -> Draw:
    """Speed under the data sheet's roof, on logarithmic scales."""
    titles = list(dict.fromkeys(p.panel for p in points))
    passes = list(dict.fromkeys(p.pass_ for p in points))

    def draw(figure: Any, theme: Theme) -> None:
        for axes, title in zip(panels_of(figure, len(titles)), titles, strict=True):
            own = [p for p in points if p.panel == title]
            low, high = _roof(axes, theme, own)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(low, high)
            top = max([p.tflops for p in own] + [p.peak_tflops or 0 for p in own])
            floor = min(p.tflops for p in own)
            axes.set_ylim(floor / (top / floor) ** 0.35 / 1.3, top * 1.8)
            for pass_ in passes:
                there, i = [p for p in own if p.pass_ == pass_], series_of(pass_)
                axes.scatter(
                    [p.intensity for p in there], [p.tflops for p in there], s=26, marker=MARKS[i],
                    color=theme.series[i], zorder=3, alpha=0.9,
                )  # fmt: skip
            _plain_logarithm(axes.xaxis)
            _plain_logarithm(axes.yaxis)
            _name_layers(axes, theme, own, math.log(high / low))
            axes.set_title(title, loc="left")
            axes.set_xlabel("operations a byte, each operand moved once")
            axes.set_ylabel(f"{word} TFLOP/s")
            axes.grid(which="major", linewidth=0.6)
            axes.set_axisbelow(True)
        _legend(figure, theme, passes)

    return draw


def _roof(axes: Any, theme: Theme, points: Sequence[RooflinePoint]) -> tuple[float, float]:
    """Draw the roof, if there is one, and return the limits of the axis."""
    low, high = min(p.intensity for p in points) / 2.5, max(p.intensity for p in points) * 2
    peak, bandwidth = points[0].peak_tflops, points[0].dram_gbs
    if not peak or not bandwidth:
        return low, high
    dram = bandwidth / 1e3  # TB/s, so that operations a byte give TFLOP/s
    low, high = min(low, peak / dram / 2), max(high, peak / dram * 2)
    axes.plot([low, peak / dram, high], [low * dram, peak, peak], color=theme.text, linewidth=1.2)
    axes.annotate(f"{peak:.0f} TFLOP/s", (high, peak), xytext=(-2, 3), textcoords="offset points", ha="right")
    near = low * (peak / dram / low) ** 0.4
    axes.annotate(
        f"{dram:.3g} TB/s", (near, near * dram), xytext=(-6, 4), textcoords="offset points", ha="right", va="bottom"
    )
    return low, high


def _name_layers(axes: Any, theme: Theme, points: Sequence[RooflinePoint], width: float) -> None:
    """A layer's passes move the same operands, so they share an x: name each place once, below its lowest point."""
    places: list[list[RooflinePoint]] = []
    for point in sorted(points, key=lambda p: p.intensity):
        if places and math.log(point.intensity / places[-1][0].intensity) < 0.045 * width:
            places[-1].append(point)
        else:
            places.append([point])
    for place in places:
        x = math.exp(sum(math.log(p.intensity) for p in place) / len(place))
        lowest = min(p.tflops for p in place)
        names = ", ".join(sorted({p.layer for p in place}))
        axes.annotate(
            names, (x, lowest), xytext=(0, -8), textcoords="offset points", rotation=90, ha="center", va="top",
            fontsize=8, color=theme.text,
        )  # fmt: skip


def _legend(figure: Any, theme: Theme, names: Sequence[str]) -> None:
    axes = figure.axes[0]
    handles = [
        axes.scatter([], [], color=theme.series[series_of(name)], marker=MARKS[series_of(name)], label=name)
        for name in names
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))


@dataclass(frozen=True)
class Step:
    """One row of a waterfall: microseconds of ours by part (a pass), and of what it is compared with, if known."""

    name: str
    parts: dict[str, float]
    reference: float | None


@dataclass(frozen=True)
class Waterfall:
    """Steps that run one after the other."""

    title: str
    steps: tuple[Step, ...]


def draw_waterfalls(panels: Sequence[Waterfall], reference: str, axis: str) -> Draw:
    """Each step starts where the one before it ended; below it, thinner, what it is compared with."""
    there = {part for panel in panels for step in panel.steps for part in step.parts}
    parts = sorted(there, key=series_of)

    def draw(figure: Any, theme: Theme) -> None:
        heights = [len(panel.steps) + 2 for panel in panels]
        grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        colors = {part: theme.series[series_of(part)] for part in parts}
        for axes, panel in zip(grid, panels, strict=True):
            _waterfall(axes, theme, panel, colors)
            axes.set_xlabel(axis)
        handles = [axes.barh([0], [0], color=colors[part], label=part) for part in parts]
        handles.append(axes.barh([0], [0], color=theme.muted, label=reference))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))

    return draw


def _waterfall(axes: Any, theme: Theme, panel: Waterfall, colors: dict[str, str]) -> None:
    at = beside = 0.0
    unknown = 0
    for y, step in enumerate(panel.steps):
        for part, width in step.parts.items():
            axes.barh(y - 0.14, width, left=at, height=0.5, color=colors[part])
            at += width
        axes.annotate(
            f"{sum(step.parts.values()):.3g}", (at, y - 0.14), xytext=(3, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
        if step.reference is None:
            unknown += 1
            continue
        axes.barh(y + 0.27, step.reference, left=beside, height=0.24, color=theme.muted)
        beside += step.reference
    last = len(panel.steps)
    axes.barh(last - 0.14, at, height=0.5, color=theme.text)
    axes.barh(last + 0.27, beside, height=0.24, color=theme.muted)
    note = f"; the latter without {unknown} steps" if unknown else ""
    axes.annotate(
        f"{at:.4g} us against {beside:.4g} us{note}", (max(at, beside), last), xytext=(3, 0),
        textcoords="offset points", va="center", fontweight="bold",
    )  # fmt: skip
    axes.set_yticks(range(last + 1), [*(step.name for step in panel.steps), "together"])
    axes.set_ylim(last + 0.7, -0.7)
    axes.set_xlim(0, max(at, beside) * 1.22)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(panel.title, loc="left")


@dataclass(frozen=True)
class Curve:
    """A line of (x, y); `low` and `high` are its quantiles where it has some. A dashed one is what ours is held to."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: int
    dashed: bool = False
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Curves over a size that doubles from tick to tick; `log` for a y axis that does so too, else one from zero."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log: bool = False


def draw_charts(charts: Sequence[Chart]) -> Draw:
    """Charts side by side, each with its own legend."""

    def draw(figure: Any, theme: Theme) -> None:
        for axes, chart in zip(panels_of(figure, len(charts)), charts, strict=True):
            for curve in chart.curves:
                color = theme.series[curve.color % len(theme.series)]
                # Lines often coincide: each is thinner than the one below it, so that none is hidden.
                weight = max(3.2 - curve.color, 1.2)
                axes.plot(
                    curve.x, curve.y, color=color, marker=MARKS[curve.color % len(MARKS)], markersize=3 + 1.5 * weight,
                    linewidth=weight, linestyle="--" if curve.dashed else "-", label=curve.name,
                    markerfacecolor=theme.page if curve.dashed else color,
                )  # fmt: skip
                if curve.low:
                    axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
            ticks = sorted({x for curve in chart.curves for x in curve.x})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
            if chart.log:
                axes.set_yscale("log")
                _plain_logarithm(axes.yaxis)
            else:
                axes.set_ylim(0, max(y for curve in chart.curves for y in (*curve.y, *curve.high)) * 1.3)
            axes.set_xlabel(chart.x_label)
            axes.set_ylabel(chart.y_label)
            axes.set_title(chart.title, loc="left")
            axes.grid(linewidth=0.6)
            axes.set_axisbelow(True)
            axes.legend(loc="best", ncols=2 if len(chart.curves) > 3 else 1, fontsize=8)

    return draw
