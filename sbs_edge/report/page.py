"""A self-contained HTML page: sections of prose, tables and inline SVG pictures.

The module knows nothing of students or bundles; :mod:`sbs_edge.report.run` and the benchmarks fill the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page", "figure_svg", "table_html"]

SHOWN_CHARACTERS = 1200
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
*, *::before { box-sizing: border-box }
body { overflow-wrap: anywhere; font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
p.banner { border: 2px solid #c60; border-radius: 6px; padding: .5rem .8rem; font-weight: 600 }
p.headline { font-size: 1.15rem; font-weight: 600; border-left: 4px solid #06c; padding: .2rem .8rem }
p.note { opacity: .8; font-size: .92rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .93rem; margin: .8rem 0 }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left }
th { vertical-align: bottom; overflow-wrap: normal } td { overflow-wrap: break-word; max-width: 34rem }
td.number { white-space: nowrap } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tr.best td { font-weight: 600 }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem }
figure svg { display: block; max-width: 100%; height: auto }
figure .pictures { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
figcaption { font-size: .9rem; color: #333 }
article { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; margin: .8rem 0 }
article h3 { font-size: 1rem; margin: 0 0 .4rem }
article dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem .9rem; margin: 0 }
article dt { opacity: .75 } article dd { margin: 0; white-space: pre-wrap }
pre { white-space: pre-wrap; background: var(--soft); padding: .8rem; overflow-x: auto; border-radius: 6px }
@media (max-width: 40rem) {
  body { margin: 1rem auto; padding: 0 .8rem }
  thead { display: none }
  table, tbody { display: block }
  tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line) }
  td, td.number { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0;
    text-align: right; white-space: normal }
  td:first-child { font-weight: 600; text-align: left }
  article dl { grid-template-columns: minmax(0, 1fr); gap: 0 } article dd { margin-bottom: .4rem }
  td[data-label]::before { content: attr(data-label); text-align: left; font-weight: 400; opacity: .75 }
}
"""


_NUMBER = re.compile(r"–|[+-]?[\d.]+(?: %)?")


def figure_svg(figure: Figure) -> str:
    """Render a matplotlib figure as an inline ``<svg>`` element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_NUMBER.fullmatch(value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} … ({len(text) - SHOWN_CHARACTERS:,} more characters)"


def table_html(columns: Sequence[str], rows: Sequence[Sequence[Any]], best: int | None = None) -> str:
    """Return a table, with numeric columns right-aligned and row ``best`` in bold."""
    numeric = [
        bool(rows) and all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(columns))
    ]
    mark = [' class="number"' if number else "" for number in numeric]
    # Narrow pages show a row as a list, in which each cell but the first needs its column's name.
    label = ["", *(f' data-label="{escape(name)}"' for name in columns[1:])]
    head = "".join(f"<th{mark[i]}>{escape(name)}</th>" for i, name in enumerate(columns))
    body = "".join(
        ('<tr class="best">' if index == best else "<tr>")
        + "".join(f"<td{mark[i]}{label[i]}>{escape(_shown(cell))}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(slots=True)
class Page:
    """A page that is being built. Every text is escaped; only the output of :func:`figure_svg` is not."""

    title: str
    parts: list[str] = field(default_factory=list)

    def section(self, heading: str) -> None:
        """Start a section."""
        self.parts.append(f"<h2>{escape(heading)}</h2>")

    def text(self, paragraph: str, *, note: bool = False) -> None:
        """Add a paragraph; ``note`` sets it smaller."""
        opening = '<p class="note">' if note else "<p>"
        self.parts.append(f"{opening}{escape(paragraph)}</p>")

    def headline(self, sentence: str) -> None:
        """Add the main result, set large."""
        self.parts.append(f'<p class="headline">{escape(sentence)}</p>')

    def banner(self, warning: str) -> None:
        """Add a framed warning."""
        self.parts.append(f'<p class="banner">{escape(warning)}</p>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], best: int | None = None) -> None:
        """Add a table."""
        self.parts.append(table_html(columns, rows, best))

    def figure(self, figure: Figure, caption: str) -> None:
        """Add a picture with its caption."""
        self.figures([figure], caption)

    def figures(self, figures: Sequence[Figure], caption: str) -> None:
        """Add pictures with one caption: side by side where they fit, otherwise below each other."""
        drawn = "".join(f"<div>{figure_svg(figure)}</div>" for figure in figures)
        if len(figures) > 1:
            drawn = f'<div class="pictures">{drawn}</div>'
        self.parts.append(f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>")

    def sample(self, heading: str, fields: Sequence[tuple[str, str | None]]) -> None:
        """Add a card with a row to read: its fields by name, cut where they are long; absent ones are left out."""
        lines = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(_cut(text))}</dd>" for name, text in fields if text
        )
        self.parts.append(f"<article><h3>{escape(heading)}</h3><dl>{lines}</dl></article>")

    def preformatted(self, text: str) -> None:
        """Add text in a fixed-width font, unchanged."""
        self.parts.append(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        """Return the whole document."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>"
            f"<body><h1>{escape(self.title)}</h1>{''.join(self.parts)}</body></html>\n"
        )
