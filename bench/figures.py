"""The report's pictures, drawn from a record's rows, in a light and a dark version."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .records import Check, Inspection


@dataclass(frozen=True)
class Theme:
    """Colours of one version of a picture. The first three series stay apart for colour-blind readers."""

    page: str
    text: str
    grid: str
    series: tuple[str, str, str, str]
    muted: str
    alarm: str


LIGHT = Theme("#ffffff", "#1c2128", "#d0d7de", ("#1f6fc9", "#d9632a", "#14916a", "#7146a8"), "#c3cad2", "#b3123f")
DARK = Theme("#14171c", "#e3e7ec", "#333a43", ("#5ba3f0", "#f08a55", "#3fc798", "#bf9cf0"), "#4a535e", "#ff6b8f")
MARKERS = {"chosen": "o", "box": "s", "gather": "^", "pixel": "D"}
Draw = Callable[[Any, Theme], None]


def render(draw: Draw, size: tuple[float, float]) -> tuple[bytes, bytes, bytes]:
    """Draw once in each theme; return (light SVG, dark SVG, light PNG). The same rows give the same bytes."""
    light = _render(draw, size, LIGHT, "svg")
    return light, _render(draw, size, DARK, "svg"), _render(draw, size, LIGHT, "png")


def _render(draw: Draw, size: tuple[float, float], theme: Theme, form: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.hashsalt": "tileconv", "font.size": 9, "axes.edgecolor": theme.grid, "axes.facecolor": theme.page,
        "axes.labelcolor": theme.text, "axes.titlecolor": theme.text, "text.color": theme.text,
        "xtick.color": theme.text, "ytick.color": theme.text, "grid.color": theme.grid, "figure.facecolor": theme.page,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, theme)
        # Dates and version strings would make equal pictures differ.
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(buffer, format=form, dpi=144, metadata=metadata)
    return buffer.getvalue()


def draw_errors(checks: Sequence[Check]) -> Draw:
    """Error as a fraction of the allowed error, per layer and dtype, on a log scale with the budget at 1."""
    layers = list(dict.fromkeys(c.layer for c in checks))
    dtypes = list(dict.fromkeys(c.dtype for c in checks))
    ratios = [c.error / c.allowed for c in checks if c.error and c.allowed]
    floor = min([*ratios, 0.01]) / 4

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.add_subplot()
        for dtype, color in zip(dtypes, _cycle(theme, len(dtypes)), strict=True):
            shift = (dtypes.index(dtype) - (len(dtypes) - 1) / 2) * 0.29
            for formulation in dict.fromkeys(c.formulation for c in checks):
                rows = [c for c in checks if c.dtype == dtype and c.formulation == formulation]
                place = (list(MARKERS).index(formulation) - 1.5) * 0.065 if formulation in MARKERS else 0.0
                x = [layers.index(c.layer) + shift + place for c in rows]
                y = [_height(c, floor) for c in rows]
                edges = [color if c.passed else theme.alarm for c in rows]
                # An error of exactly zero has no place on a log scale: hollow, on the floor.
                faces = ["none" if c.error == 0 else edge for c, edge in zip(rows, edges, strict=True)]
                axes.scatter(x, y, s=15, marker=MARKERS.get(formulation, "o"), facecolors=faces, edgecolors=edges)
        axes.axhline(1.0, color=theme.text, linewidth=1.2)
        axes.annotate("budget", (1.0, 1.0), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set_yscale("log")
        axes.set_ylim(floor / 2, 30 if any(not c.passed for c in checks) else 4)
        axes.set_xticks(range(len(layers)), layers)
        axes.set_ylabel("error / allowed error")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        handles = [
            axes.scatter([], [], color=c, label=d) for d, c in zip(dtypes, _cycle(theme, len(dtypes)), strict=True)
        ]
        used = [f for f in MARKERS if any(c.formulation == f for c in checks)]
        handles += [axes.scatter([], [], color=theme.muted, marker=MARKERS[f], label=f) for f in used]
        handles.append(axes.scatter([], [], facecolors="none", edgecolors=theme.text, label="exact (error 0)"))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))

    return draw


def _height(check: Check, floor: float) -> float:
    if check.error is None or not check.allowed:
        return floor if check.passed else 20.0
    return min(max(check.error / check.allowed, floor), 20.0)


def _cycle(theme: Theme, count: int) -> list[str]:
    return [theme.series[i % len(theme.series)] for i in range(count)]


def draw_loops(inspections: Sequence[Inspection]) -> Draw:
    """What the main loop of every multiplying launch is made of, one panel an architecture."""
    rows = [i for i in inspections if i.loop_instructions and i.loop_mma]
    archs = list(dict.fromkeys(i.arch for i in rows))

    def draw(figure: Any, theme: Theme) -> None:
        if not rows:
            figure.text(0.5, 0.5, "no main loops were inspected", ha="center")
            return
        panels = panels_of(figure, len(archs))
        for axes, arch in zip(panels, archs, strict=True):
            own = [i for i in rows if i.arch == arch]
            several = len({o.dtype for o in own}) > 1
            names = [f"{i.layer} {i.pass_}" + (f" {i.dtype}" if several else "") for i in own]
            parts = [loop_parts(i) for i in own]
            left = [0] * len(own)
            colors = (theme.series[0], theme.series[1], theme.muted)
            for part, color in zip(("multiply", "loads and stores", "other"), colors, strict=True):
                widths = [p[part] for p in parts]
                axes.barh(range(len(own)), widths, left=left, color=color, label=part, height=0.7)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for y, (item, total) in enumerate(zip(own, left, strict=True)):
                axes.annotate(
                    "" if item.other_per_mma is None else f" {item.other_per_mma:.1f}", (total, y), va="center"
                )
            axes.set_yticks(range(len(own)), names)
            axes.invert_yaxis()
            axes.set_xlim(0, max(left) * 1.15)
            axes.set_title(f"{arch} ({own[0].gpu})", loc="left")
            axes.set_xlabel("instructions in the main loop; at the bar's end: others per multiply")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)

    return draw


def panels_of(figure: Any, count: int) -> list[Any]:
    """Panels two abreast, without an empty one at the end."""
    columns = min(2, count)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.remove()
    return list(grid[:count])


def loop_parts(item: Inspection) -> dict[str, int]:
    """A loop's instructions in three sorts that add up to its length."""
    memory = sum(item.loop_loads.values())
    return {
        "multiply": item.loop_mma,
        "loads and stores": memory,
        "other": (item.loop_instructions or 0) - item.loop_mma - memory,
    }
