"""A report as one HTML file that needs no other file and no network.

Notable: pictures are embedded in the page; all text is escaped; `paragraph`, `table` and `picture` each return a part,
and `write_page` puts parts into sections.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76; --line: #d0d7de; --paper: #fff; --card: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #8d96a0; --line: #30363d; --paper: #0d1117; --card: #161b22 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0 0 .25rem; font-size: 1.7rem } h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem }
p { max-width: 46rem } .lead { color: var(--faint) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: .5rem 0; border-bottom: 1px solid var(--line) }
a { color: inherit }
figure { margin: 1rem 0; padding: .75rem; overflow-x: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 8px }
figure img { display: block; max-width: 100%; height: auto; margin: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--faint); padding-bottom: .25rem }
th, td { padding: .3rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 } td.best { font-weight: 700 }
"""


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]], best: bool = False) -> str:
    """A table of text.

    Args:
        caption: text above the table.
        headings: one per column.
        rows: the cells.
        best: print the largest number of each column bold, except in the first column.
    """
    rows = [list(row) for row in rows]
    head = "".join(f"<th scope=col>{escape(heading)}</th>" for heading in headings)
    marked: set[tuple[int, int]] = set()
    if best and len(rows) > 1:
        for column in range(1, len(headings)):
            values = [_number(row[column]) for row in rows]
            marked |= {(place, column) for place, value in enumerate(values) if value == max(values)}
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=best' if (place, column) in marked else ''}>{escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        + "</tr>"
        for place, row in enumerate(rows)
    )
    return (
        f"<div class=scroll><table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _number(cell: str) -> float:
    """The number at the start of a cell; minus infinity without one."""
    try:
        return float(cell.split()[0])
    except (ValueError, IndexError):
        return float("-inf")


def picture(path: Path, description: str) -> str:
    """A picture within the page: SVG unchanged, other formats as WebP.

    Args:
        path: the picture.
        description: text for readers who do not see it.
    """
    if path.suffix == ".svg":
        kind, content = "svg+xml", path.read_bytes()
    else:
        sink = io.BytesIO()
        Image.open(path).convert("RGB").save(sink, "WEBP", quality=85)
        kind, content = "webp", sink.getvalue()
    encoded = base64.b64encode(content).decode()
    return f'<figure><img alt="{escape(description)}" src="data:image/{kind};base64,{encoded}"></figure>'


def write_page(title: str, lead: str, sections: Sequence[tuple[str, Sequence[str]]], out: Path) -> Path:
    """Write the page.

    Args:
        title: heading of the page.
        lead: the text below it.
        sections: pairs of a heading and its parts (`paragraph`, `table`, `picture`).
        out: the file.
    """
    links = "".join(f'<a href="#s{place}">{escape(heading)}</a>' for place, (heading, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{place}"><h2>{escape(heading)}</h2>{"".join(parts)}</section>'
        for place, (heading, parts) in enumerate(sections)
    )
    out.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p><nav>{links}</nav>{body}</body></html>\n"
    )
    return out
