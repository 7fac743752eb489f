"""A small document model: the same blocks become Markdown and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from . import page

# How a number came about; one is never shown as another.
Word = Literal["measured", "modelled", "inspected", "checked"]
MISSED = "missed"  # among numbers: a yes-or-no target, of which there is no multiple
LONG = 60  # characters from which a cell may wrap
TALL = 20  # rows from which a table scrolls in its own box


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str
    level: int = 2

    @property
    def anchor(self) -> str:
        """What a link on the page calls it."""
        return re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def html(self) -> str:
        return f'<h{self.level} id="{self.anchor}">{html.escape(self.text)}</h{self.level}>'


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str

    def markdown(self) -> str:
        return self.text

    def html(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Facts:
    """A list of (name, text)."""

    items: tuple[tuple[str, str], ...]

    def markdown(self) -> str:
        return "\n".join(f"- **{name}**: {text}" for name, text in self.items)

    def html(self) -> str:
        rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in self.items)
        return f"<dl>{rows}</dl>"


@dataclass(frozen=True)
class Table:
    """Rows of text; columns whose cells are all numbers are set right-aligned. `summary` folds a long table away.

    On the page a script makes it sortable and, from 8 rows on, filterable; without one all rows are there.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    summary: str = ""
    caption: str = ""

    def _numeric(self) -> list[bool]:
        columns = [[row[i] for row in self.rows] for i in range(len(self.header))]
        return [any(column) and all(map(_is_number, column)) for column in columns]

    def markdown(self) -> str:
        def line(row: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

        rule = tuple("---:" if n else "---" for n in self._numeric())
        text = "\n".join(line(row) for row in (self.header, rule, *self.rows))
        if self.caption:
            text = f"{self.caption}\n\n{text}"
        return _folded(self.summary, f"\n\n{text}\n\n") if self.summary else text

    def html(self) -> str:
        numeric = self._numeric()
        heads = (
            f'<th scope="col"{" class=n" if n else ""}>{html.escape(name)}</th>'
            for name, n in zip(self.header, numeric, strict=True)
        )
        caption = f"<caption><span>{html.escape(self.caption)}</span></caption>" if self.caption else ""
        body = "\n".join(f"<tr>{''.join(_cells(row, numeric))}</tr>" for row in self.rows)
        table = (
            f'<table class="tools">{caption}<thead><tr>{"".join(heads)}</tr></thead><tbody>\n{body}\n</tbody></table>'
        )
        tall = " tall" if len(self.rows) > TALL else ""
        name = html.escape(self.caption or self.summary or "Table", quote=True)
        # A box that scrolls must be within reach of the keyboard; the script takes those out that do not scroll.
        text = f'<div class="scroll{tall}" role="region" aria-label="{name}" tabindex="0">{table}</div>'
        return _folded(self.summary, text) if self.summary else text


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{text}</details>"


def _cells(row: Sequence[str], numeric: Sequence[bool]) -> list[str]:
    cells = []
    for i, (cell, n) in enumerate(zip(row, numeric, strict=True)):
        kind = " class=n" if n else " class=long" if len(cell) > LONG else ""
        tag = 'th scope="row"' if i == 0 else "td"
        cells.append(f"<{tag}{kind}>{html.escape(cell)}</{tag[:2]}>")
    return cells


@dataclass(frozen=True)
class Figure:
    """A picture: a file beside the Markdown, and two SVGs (light, dark) inside the HTML. `summary` folds it away."""

    title: str
    description: str
    file: str
    light: bytes
    dark: bytes
    word: Word
    summary: str = ""

    def markdown(self) -> str:
        text = f"![{self.description}]({self.file})\n\n*{self.word.capitalize()}: {self.title}*"
        return _folded(self.summary, f"\n\n{text}\n\n") if self.summary else text

    def html(self) -> str:
        light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in (self.light, self.dark))
        about = html.escape(self.description, quote=True)
        # Print always takes the light picture; elsewhere the reader's setting decides.
        text = (
            f'<figure><figcaption><span class="badge {self.word}">{self.word}</span>{html.escape(self.title)}'
            f'</figcaption><div class="scroll" role="region" aria-label="Picture" tabindex="0"><picture>'
            f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{about}"></picture></div></figure>'
        )
        return _folded(self.summary, text) if self.summary else text


@dataclass(frozen=True)
class Card:
    """One of the four words: how much of it there is, and what it says."""

    word: Word
    figure: str
    text: str


@dataclass(frozen=True)
class Lead:
    """The first screen: on what, the headline with what speaks against it, and the four words."""

    title: str
    facts: tuple[tuple[str, str], ...]
    what: str
    value: str
    note: str
    table: Table
    cards: tuple[Card, ...]

    def markdown(self) -> str:
        items = [*self.facts, (self.what, f"{self.value}. {self.note}")]
        items += [(card.word.capitalize(), f"{card.figure} {card.text}") for card in self.cards]
        return f"# {self.title}\n\n{Facts(tuple(items)).markdown()}\n\n{self.table.markdown()}"

    def html(self) -> str:
        facts = "".join(f"<li>{html.escape(name)} <b>{html.escape(text)}</b></li>" for name, text in self.facts)
        cards = "".join(
            f'<section class="card {card.word}"><h2>{card.word.capitalize()}</h2>'
            f'<p class="figure">{html.escape(card.figure)}</p><p>{html.escape(card.text)}</p></section>'
            for card in self.cards
        )
        kind = "" if self.value[:1].isdigit() else " words"
        return (
            f'<header><h1>{html.escape(self.title)}</h1><ul class="facts">{facts}</ul></header>\n'
            f'<div class="lead"><div><p class="what">{html.escape(self.what)}</p>'
            f'<p class="value{kind}">{html.escape(self.value)}</p><p class="note">{html.escape(self.note)}</p></div>'
            f'<div>{self.table.html()}</div></div>\n<div class="cards">{cards}</div>'
        )


Block = Heading | Paragraph | Facts | Table | Figure | Lead


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML page that fetches nothing and needs no script; the sections are linked below the lead."""
    sections = [b for b in blocks if isinstance(b, Heading) and b.level == 2]
    links = "".join(f'<a href="#{b.anchor}">{html.escape(b.text)}</a>' for b in sections)
    parts = []
    for block in blocks:
        parts.append(block.html())
        if isinstance(block, Lead):
            parts.append(f'<nav aria-label="Sections">{links}</nav>')
    return page.frame(title, "\n".join(parts))


def listed(words: Iterable[str]) -> str:
    """Words as a sentence lists them."""
    *rest, last = [*words] or [""]
    return f"{', '.join(rest)} and {last}" if rest else last


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix("x").removesuffix(" %") or "0")
    except ValueError:
        return text in ("-", MISSED)
    return True
