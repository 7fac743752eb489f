"""Renders a record as Markdown, as one self-contained HTML page and as pictures. Reads nothing but the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .document import Block, Facts, Figure, Heading, Paragraph, Table, Word, listed, to_html, to_markdown
from .figures import Draw, draw_errors, render
from .im2col import im2col_section
from .images import NOISE
from .pictures import speed_pictures
from .records import Check, Record, Saved, replace_bytes, replace_text
from .report_inspected import inspect_section, peer_section
from .report_lead import cards, lead, title_of
from .report_measured import measured_section, tiny


def headline(record: Record) -> list[str]:
    """The three most important lines: what was checked, inspected and measured."""
    said = {card.word: f"{card.figure} {card.text}" for card in cards(record)}
    return [f"{word.capitalize()}: {said[word]}" for word in ("checked", "inspected", "measured")] + _mean(record)


def _mean(record: Record) -> list[str]:
    first = lead(record)
    return [f"{first.what}: {first.value}. {first.note}"] if record.timings else []


def render_report(record: Record, out: Path) -> list[Path]:
    """Write <slug>.md, <slug>.html and figures/<slug>-*.png under `out`; returns the paths, the HTML page first.

    The same record gives the same bytes.
    """
    slug = record.device.slug
    pictures: list[Path] = []

    def picture(name: str, title: str, about: str, draw: Draw, size: tuple[float, float], word: Word) -> Figure:
        light, dark, png = render(draw, size)
        file = f"figures/{slug}-{name}.png"
        replace_bytes(out / file, png)
        pictures.append(out / file)
        return Figure(title, about, file, light, dark, word)

    blocks: list[Block] = [lead(record)]
    if speeds := speed_pictures(record, picture):
        blocks += [Heading("Speed, in pictures"), *speeds]
    if record.checks:
        title = "errors against float64, as a share of what is allowed. Below the line is within budget."
        text = "Error divided by allowed error for every layer, dtype and formulation, on a logarithmic scale"
        drawn = picture("errors", title, text, draw_errors(record.checks), (10, 4.2), "checked")
        blocks += [Heading("Checked"), drawn, *_check_section(record.checks)]
    if record.timings:
        blocks += measured_section(record.timings)
    if record.inspections:
        blocks += inspect_section(record, picture)
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
    network = [c for c in checks if c.layer == "network" and c.error is not None and c.allowed is not None]
    failures = [c for c in checks if not c.passed]
    header = ("layer", "dtype", "formulation", "layout", "error", "torch's error", "allowed", "share", "verdict",
              "seconds", "note")  # fmt: skip
    every = tuple(
        (c.layer, c.dtype, c.formulation, c.memory_format, tiny(c.error), tiny(c.torch_error), tiny(c.allowed),
         _share(c), _verdict(c.passed), f"{c.seconds:.2f}", c.note)
        for c in [*failures, *(c for c in checks if c.passed)]
    )  # fmt: skip
    noise = any(NOISE in c.note for c in checks)
    seen = "pictures of smooth noise (scikit-image was not installed)" if noise else "real photographs"
    rule = (
        "Allowed is 2 x (error of PyTorch in the same dtype on the same input + eps x the largest value); an error"
        f" is the largest difference from float64. Inputs are the activations that {seen} bring to each "
        "layer. The formulation is what the library chose, or one that was forced. Seconds are wall time of the "
        "check, not a speed."
    )
    if network:
        shares = listed(f"{_share(c)} in {c.dtype}" for c in network)
        rule += f" AlexNet's forward pass on {network[0].shape[0]} pictures uses {shares} of the allowed error."
    return [Paragraph(rule), worst, Table(header, every, f"Every comparison ({len(every)})")]


def _share(check: Check) -> str:
    if check.error is None or not check.allowed:
        return "-"
    return f"{100 * check.error / check.allowed:.3g} %"


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
