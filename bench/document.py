"""A small document model: the same blocks become Markdown and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def html(self) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


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
    """Rows of text; columns whose cells are all numbers are set right-aligned. `summary` folds a long table away."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    summary: str = ""

    def _numeric(self) -> list[bool]:
        columns = [[row[i] for row in self.rows] for i in range(len(self.header))]
        return [any(column) and all(map(_is_number, column)) for column in columns]

    def markdown(self) -> str:
        def line(row: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

        rule = tuple("---:" if n else "---" for n in self._numeric())
        text = "\n".join(line(row) for row in (self.header, rule, *self.rows))
        if not self.summary:
            return text
        return f"<details><summary>{html.escape(self.summary)}</summary>\n\n{text}\n\n</details>"

    def html(self) -> str:
        numeric = self._numeric()

        def line(tag: str, row: Sequence[str]) -> str:
            cells = (
                f"<{tag}{' class=n' if n else ''}>{html.escape(cell)}</{tag}>"
                for cell, n in zip(row, numeric, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        body = "\n".join(line("td", row) for row in self.rows)
        table = f"<table><thead>{line('th', self.header)}</thead><tbody>\n{body}\n</tbody></table>"
        text = f"<div class=scroll>{table}</div>"
        return f"<details><summary>{html.escape(self.summary)}</summary>{text}</details>" if self.summary else text


@dataclass(frozen=True)
class Figure:
    """A picture: a file beside the Markdown, and two SVGs (light, dark) inside the HTML."""

    title: str
    description: str
    file: str
    light: bytes
    dark: bytes

    def markdown(self) -> str:
        return f"![{self.description}]({self.file})\n\n*{self.title}*"

    def html(self) -> str:
        light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in (self.light, self.dark))
        # Print always takes the light picture; elsewhere the reader's setting decides.
        return (
            f'<figure><picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{html.escape(self.description, quote=True)}"></picture>'
            f"<figcaption>{html.escape(self.title)}</figcaption></figure>"
        )


Block = Heading | Paragraph | Facts | Table | Figure

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2128; --soft: #57606a; --line: #d0d7de; --band: #f3f5f7; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171c; --text: #e3e7ec; --soft: #9aa4af; --line: #333a43; --band: #1d2229; }
}
body { background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 70rem; padding: 1rem 1.25rem 3rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; white-space: nowrap; }
.n { text-align: right; } tbody tr:nth-child(even) { background: var(--band); }
figure { margin: 1.5rem 0; } img { height: auto; max-width: 100%; } figcaption, summary { color: var(--soft); }
summary { cursor: pointer; padding: .5rem 0; }
@media (max-width: 40rem) { dl { display: block; } dd { margin-bottom: .75rem; } }
@media print { details::details-content { content-visibility: visible; } }
"""


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML page that fetches nothing and needs no script."""
    body = "\n".join(block.html() for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix("x").removesuffix(" %") or "0")
    except ValueError:
        return text == "-"
    return True
