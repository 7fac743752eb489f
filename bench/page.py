"""What makes a report's blocks one HTML page: its style sheet, its script, and the frame around them."""

from __future__ import annotations

import html

# Both colour schemes keep text at 4.5:1 or more against its ground; the four words differ in hue for colour-blind
# readers too, and are always written out.
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2128; --soft: #57606a; --line: #d8dee4; --band: #f5f7f9;
  --focus: #1f6fc9; --measured: #0f7a57; --modelled: #b4501a; --inspected: #1b62b5; --checked: #7146a8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171c; --text: #e3e7ec; --soft: #9aa4af; --line: #333a43; --band: #1b2027; --focus: #5ba3f0;
    --measured: #3fc798; --modelled: #f08a55; --inspected: #6db0f7; --checked: #bf9cf0; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  margin: 0 auto; max-width: 78rem; padding: 1.25rem 1.5rem 4rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; }
h1 { font-size: 1.6rem; margin: 0 0 .35rem; } h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0 1rem; max-width: 50rem; }
a { color: var(--inspected); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; max-width: 60rem; }
dt { font-weight: 600; } dd { margin: 0; min-width: 0; }

.facts { color: var(--soft); display: flex; flex-wrap: wrap; font-size: .875rem; gap: .1rem 1.1rem; list-style: none;
  margin: 0; padding: 0; }
.facts b { color: var(--text); font-weight: 600; }
.lead { border-bottom: 1px solid var(--line); display: grid; gap: 1rem 2.5rem;
  grid-template-columns: minmax(15rem, 5fr) minmax(0, 8fr); margin: 1rem 0; padding-bottom: 1rem; }
.lead .what { font-weight: 600; margin: 0; }
.lead .value { font-size: 3.25rem; font-variant-numeric: tabular-nums; font-weight: 650; letter-spacing: -.02em;
  line-height: 1.15; margin: 0; }
.lead .value.words { font-size: 2.25rem; }
.lead .note { color: var(--soft); font-size: .9rem; margin: .25rem 0 0; }
.lead .scroll { margin: 0; }
.cards { display: grid; gap: .75rem 1.5rem; grid-template-columns: repeat(4, minmax(0, 1fr)); }
.card { border-top: 3px solid var(--line); padding-top: .5rem; }
.card h2 { font-size: .95rem; margin: 0; }
.card .figure { font-size: 1.25rem; font-variant-numeric: tabular-nums; font-weight: 600; line-height: 1.3; margin: 0; }
.card p { font-size: .85rem; line-height: 1.4; margin: .15rem 0 0; } .card p + p { color: var(--soft); }
.measured { --hue: var(--measured); } .modelled { --hue: var(--modelled); }
.inspected { --hue: var(--inspected); } .checked { --hue: var(--checked); }
.card.measured, .card.modelled, .card.inspected, .card.checked { border-top-color: var(--hue); }
.card h2, .badge { color: var(--hue, var(--text)); }
.badge { border: 1px solid; border-radius: 1em; font-size: .75rem; font-weight: 600; margin-right: .5em;
  padding: .05em .6em; white-space: nowrap; }
nav { font-size: .9rem; margin-top: 1.25rem; } nav a { margin-right: 1.1rem; }

figure { margin: 1.5rem 0 2rem; } figure .scroll { margin: 0; }
figcaption { color: var(--soft); font-size: .9rem; margin-bottom: .5rem;
  max-width: 60rem; }
img { display: block; height: auto; max-width: 100%; }
.scroll { container-type: inline-size; margin-bottom: 1.5rem; overflow: auto; } .scroll.tall { max-height: 34rem; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; line-height: 1.4; }
caption { color: var(--soft); padding: 0 0 .4rem; text-align: left; }
caption span { display: inline-block; left: 0; max-width: 100cqi; position: sticky; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top;
  white-space: nowrap; }
thead th { background: var(--page); border-bottom-width: 2px; position: sticky; top: 0; vertical-align: bottom;
  z-index: 1; }
tbody th { background: var(--page); font-weight: 600; left: 0; position: sticky; }
tbody td.long { max-width: 22rem; min-width: 12rem; white-space: normal; }
.n { text-align: right; }
tbody tr:hover > * { background: var(--band); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--focus); }
th button::after { content: "\\2195"; color: var(--soft); display: inline-block; font-size: .85em; opacity: .55;
  text-align: center; width: 1.2em; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: var(--focus); opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; color: var(--focus); opacity: 1; }
.filter { color: var(--soft); display: block; font-size: .85rem; margin: .5rem 0; }
.filter input { background: var(--page); border: 1px solid var(--line); border-radius: .3rem; color: var(--text);
  font: inherit; margin: 0 .75rem 0 .5rem; max-width: 100%; padding: .25rem .5rem; width: 16rem; }
summary { color: var(--soft); cursor: pointer; padding: .5rem 0; }
code { font-size: .9em; }

@media (max-width: 60rem) { .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 40rem) {
  body { padding: 1rem 1rem 3rem; } h1 { font-size: 1.35rem; }
  .lead { grid-template-columns: minmax(0, 1fr); } .lead .value { font-size: 2.5rem; }
  dl { display: block; } dd { margin-bottom: .75rem; } nav a { display: inline-block; padding: .2rem 0; }
  figure img { max-width: none; min-width: 44rem; }
}
@media (max-width: 26rem) { .cards { grid-template-columns: minmax(0, 1fr); } }
@page { margin: 14mm; size: A4 landscape; }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; } nav, .filter { display: none; }
  .scroll, .scroll.tall { max-height: none; overflow: visible; }
  figure, .card, .lead, tr { break-inside: avoid; } h2, h3, caption, figcaption { break-after: avoid; }
  figure img { max-height: 165mm; max-width: 100%; min-width: 0; }
  table { font-size: 7pt; width: 100%; } thead { display: table-header-group; } thead th, tbody th { position: static; }
  th, td { padding: .1rem .5rem .1rem 0; white-space: normal; } th button::after { content: none; }
  details::details-content { content-visibility: visible; } details > summary { list-style: none; }
}
"""

# Adds to what is there already: without it, every row is on the page in the report's own order.
SCRIPT = """
"use strict";
for (const box of document.querySelectorAll(".scroll"))
  if (!box.closest("details") && box.scrollWidth <= box.clientWidth && box.scrollHeight <= box.clientHeight)
    box.removeAttribute("tabindex");

const value = cell => {
  const text = cell.textContent.trim();
  const number = /^[-+]?[\\d,.]+(e[-+]?\\d+)?\\s*(x|%)?$/i.test(text) ? parseFloat(text.replace(/,/g, "")) : NaN;
  return text === "" || text === "-" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
};
const compare = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === typeof b) return a.localeCompare(b, undefined, {numeric: true});
  return typeof a === "number" ? -1 : 1;
};

for (const table of document.querySelectorAll("table.tools")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.title = "Sort by this column";
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = rows.map(row => [value(row.cells[column]), row]);
      keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null)
        : down ? compare(b, a) : compare(a, b));
      body.append(...keyed.map(([, row]) => row));
    });
  });
  if (rows.length < 8) continue;
  const label = document.createElement("label"), input = document.createElement("input"),
    count = document.createElement("output");
  label.className = "filter";
  input.type = "search";
  input.placeholder = "words that a row must hold";
  label.append("Filter", input, count);
  // A space between cells, so that no word is found across two of them.
  const texts = rows.map(row => [...row.cells].map(cell => cell.textContent.toLowerCase()).join(" "));
  const apply = () => {
    const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every(word => texts[i].includes(word));
      shown += !row.hidden;
    });
    count.textContent = `${shown} of ${texts.length} rows`;
  };
  input.addEventListener("input", apply);
  apply();
  table.closest(".scroll").before(label);
}
"""


def frame(title: str, body: str) -> str:
    """A page that fetches nothing, whatever reads it; the policy keeps it so."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script></body></html>\n"
    )
