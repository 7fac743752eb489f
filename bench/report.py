"""Renders a record as Markdown, as one self-contained HTML page and as pictures. Reads nothing but the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .document import Block, Facts, Figure, Heading, Paragraph, Table, to_html, to_markdown
from .figures import draw_errors, render
from .im2col import im2col_section
from .records import Check, Record, Saved, Timing, replace_bytes, replace_text
from .report_inspected import inspect_section, inspected_line, listed, modelled_line, peer_section

NO_SPEED = "nothing. No GPU ran these kernels, so no GPU speed was measured"


def headline(record: Record) -> list[str]:
    """The three most important lines: what was checked, inspected and measured."""
    facts = dict(_first_lines(record))
    return [f"{name}: {facts[name]}" for name in ("Checked", "Inspected", "Measured")]


def render_report(record: Record, out: Path) -> list[Path]:
    """Write <slug>.md, <slug>.html and figures/<slug>-*.png under `out`; returns the paths, the HTML page first.

    The same record gives the same bytes.
    """
    slug = record.device.slug
    blocks: list[Block] = [Heading(title_of(record), 1), Facts(tuple(_first_lines(record)))]
    pictures: list[Path] = []

    def picture(name: str, title: str, description: str, drawing: tuple[bytes, bytes, bytes]) -> Figure:
        light, dark, png = drawing
        file = f"figures/{slug}-{name}.png"
        replace_bytes(out / file, png)
        pictures.append(out / file)
        return Figure(title, description, file, light, dark)

    if record.timings:
        blocks += _timing_section(record.timings)
    if record.checks:
        drawing = render(draw_errors(record.checks), (10, 4.2))
        title = "Errors against float64, as a share of what is allowed. Below the line is within budget."
        text = "Error divided by allowed error for every layer, dtype and formulation, on a logarithmic scale"
        blocks += [Heading("Checked"), picture("errors", title, text, drawing), *_check_section(record.checks)]
    if record.inspections:
        blocks += inspect_section(record.inspections, picture)
    if record.saved:
        blocks += _saved_section(record.saved)
    if record.peers:
        blocks += peer_section(record)
    if record.im2col:
        blocks += im2col_section(record)
    blocks += _conditions(record)
    page = out / f"{slug}.html"
    replace_text(page, to_html(title_of(record), blocks))
    text_file = out / f"{slug}.md"
    replace_text(text_file, to_markdown(blocks))
    return [page, text_file, *pictures]


def title_of(record: Record) -> str:
    """What the report is about: the device, or that there was none."""
    return "tileconv, inspected" if record.device.kind == "none" else f"tileconv on {record.device.name}"


def _first_lines(record: Record) -> list[tuple[str, str]]:
    return [
        ("Checked", _checked(record)),
        ("Inspected", inspected_line(record.inspections)),
        ("Modelled", modelled_line(record.inspections)),
        ("Measured", _measured(record)),
    ]


def _checked(record: Record) -> str:
    checks = record.checks
    if not checks:
        return "nothing."
    passed = sum(c.passed for c in checks)
    where = "in Triton's interpreter on a CPU" if record.device.kind == "interpreter" else f"on {record.device.name}"
    text = f"{passed} of {len(checks)} comparisons with float64 are within budget, {where}."
    network = [c for c in checks if c.layer == "network" and c.error is not None and c.allowed is not None]
    if network:
        shares = listed(f"{_share(c)} in {c.dtype}" for c in network)
        text += f" AlexNet's forward pass on {network[0].shape[0]} photographs uses {shares} of the allowed error."
    return text


def _share(check: Check) -> str:
    if check.error is None or not check.allowed:
        return "-"
    return f"{100 * check.error / check.allowed:.3g} %"


def _measured(record: Record) -> str:
    if not record.timings:
        seconds = sum(c.seconds for c in record.checks)
        extra = f" (the checks took {seconds:.0f} s of interpreting, which says nothing about a GPU)" if seconds else ""
        return f"{NO_SPEED}{extra}."
    pairs = _pairs(record.timings)
    wrong = sum(not t.passed for t in record.timings)
    text = f"{len(record.timings)} rows on {record.device.name}, {wrong} of them without a speed"
    if pairs:
        mean = math.exp(sum(math.log(ratio) for _, _, ratio in pairs) / len(pairs))
        lost = sum(ratio < 1 for _, _, ratio in pairs)
        text += f"; {mean:.2f}x the speed of PyTorch at its better layout (geometric mean)"
        text += f", slower in {lost} of {len(pairs)}"
    return text + "."


def _pairs(timings: Sequence[Timing]) -> list[tuple[Timing, Timing, float]]:
    """(ours, the faster of torch's layouts, torch's time / ours), the losses first."""
    pairs = []
    for ours in timings:
        rivals = [t for t in timings if t.provider != "tileconv" and t.p50_us is not None and _key(t) == _key(ours)]
        if ours.provider != "tileconv" or ours.p50_us is None or not rivals:
            continue
        best = min(rivals, key=lambda t: t.p50_us or math.inf)
        assert best.p50_us is not None
        pairs.append((ours, best, best.p50_us / ours.p50_us))
    return sorted(pairs, key=lambda pair: pair[2])


def _key(t: Timing) -> tuple[str, ...]:
    return (t.network, t.layer, t.pass_, str(t.batch), t.dtype, t.l2)


def _timing_section(timings: Sequence[Timing]) -> list[Block]:
    compared = Table(
        ("layer", "pass", "dtype", "L2", "tileconv us", "PyTorch us", "layout", "speed-up"),
        tuple(
            (o.layer, o.pass_, o.dtype, o.l2, _number(o.p50_us), _number(b.p50_us), b.memory_format, f"{ratio:.2f}x")
            for o, b, ratio in _pairs(timings)
        ),
    )
    header = (
        "layer",
        "pass",
        "dtype",
        "provider",
        "layout",
        "L2",
        "p20 us",
        "p50 us",
        "p80 us",
        "n",
        "TFLOP/s",
        "note",
    )
    rows = tuple(
        (t.layer, t.pass_, t.dtype, t.provider, t.memory_format, t.l2, _number(t.p20_us), _number(t.p50_us),
         _number(t.p80_us), str(t.n), _number(t.tflops), t.note)
        for t in timings
    )  # fmt: skip
    return [Heading("Measured"), Paragraph("Losses first."), compared, Table(header, rows, "Every measurement")]


def _saved_section(saved: Sequence[Saved]) -> list[Block]:
    header = ("layer", "tileconv bytes an image", "PyTorch bytes an image", "share")
    rows = tuple(
        (s.layer, f"{s.tileconv:,}", f"{s.pytorch:,}", f"{s.tileconv / s.pytorch:.0%}" if s.pytorch else "-")
        for s in saved
    )
    text = "Counted in fp32: each storage that autograd keeps once, without parameters. Layers of a network share some."
    return [Heading("Kept for backward"), Paragraph(text), Table(header, rows)]


def _check_section(checks: Sequence[Check]) -> list[Block]:
    dtypes = list(dict.fromkeys(c.dtype for c in checks))
    worst = Table(
        ("layer", "operation", "input", *(f"{d}: worst error / allowed" for d in dtypes), "verdict"),
        tuple(_worst_row(layer, checks, dtypes) for layer in dict.fromkeys(c.layer for c in checks)),
    )
    failures = [c for c in checks if not c.passed]
    header = ("layer", "dtype", "formulation", "layout", "error", "torch's error", "allowed", "share", "verdict",
              "seconds", "note")  # fmt: skip
    every = tuple(
        (c.layer, c.dtype, c.formulation, c.memory_format, _tiny(c.error), _tiny(c.torch_error), _tiny(c.allowed),
         _share(c), _verdict(c.passed), f"{c.seconds:.2f}", c.note)
        for c in [*failures, *(c for c in checks if c.passed)]
    )  # fmt: skip
    rule = (
        "Allowed is 2 x (error of PyTorch in the same dtype on the same input + eps x the largest value); an error"
        " is the largest difference from float64. Inputs are the activations that real photographs bring to each "
        "layer. The formulation is what the library chose, or one that was forced. Seconds are wall time of the "
        "check, not a speed."
    )
    return [Paragraph(rule), worst, Table(header, every, "Every comparison")]


def _worst_row(layer: str, checks: Sequence[Check], dtypes: Sequence[str]) -> tuple[str, ...]:
    own = [c for c in checks if c.layer == layer]
    # A check that raised knows neither its shape nor its operation; another of the same layer does.
    known = next((c for c in own if c.op), own[0])

    def worst(dtype: str) -> str:
        rows = [c for c in own if c.dtype == dtype]
        if not rows:
            return "-"
        if any(c.error is None or c.allowed is None for c in rows):
            return "not finite" if all(not c.note for c in rows) else "failed"
        return f"{max(map(_ratio, rows)):.2g}"

    shape = "x".join(map(str, known.shape))
    return (layer, known.op, shape, *map(worst, dtypes), _verdict(all(c.passed for c in own)))


def _ratio(check: Check) -> float:
    if not check.error:
        return 0.0
    return check.error / check.allowed if check.allowed else math.inf


def _conditions(record: Record) -> list[Block]:
    v, m = record.versions, record.machine
    commit = (record.commit.hash or "unknown") + (" with uncommitted changes" if record.commit.dirty else "")
    items = [
        ("Device", record.device.name),
        ("Machine", f"{m.cpu}, {m.cores} cores, {m.memory_gib:g} GiB"),
        ("Versions", ", ".join(f"{k} {x}" for k, x in vars(v).items() if x is not None)),
        ("Commit", commit),
        ("Command", record.command),
        ("Started", f"{record.started}, took {record.seconds:.0f} s"),
    ]
    meaning = (
        "Checked: run and compared with float64. Inspected: compiled for a GPU and its machine code read; exact, "
        "and needs no GPU. Modelled: computed by a cost model, a bound. Measured: timed on the GPU that is named. "
        "One is never shown as another."
    )
    return [Heading("Conditions"), Facts(tuple(items)), Heading("How to read this"), Paragraph(meaning)]


def _verdict(passed: bool) -> str:
    return "within budget" if passed else "WRONG"


def _tiny(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
