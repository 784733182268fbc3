"""Writes a result: JSON, Markdown, pictures and one page that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.bench.core import tables
from sbs_edge.bench.core.registry import TITLES, pictures_of, tables_of
from sbs_edge.report.page import Page

__all__ = ["SMOKE", "markdown_report", "page", "write_report"]

SMOKE = "A smoke run (--quick): short inputs, two rounds. It shows that everything works; the figures mean nothing."


def markdown_report(document: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    parts = [f"# {TITLES[document['kind']]}: {tables.headline(document)}", ""]
    if document.get("quick"):
        parts += [f"**{SMOKE}**", ""]
    parts += [f"- {line}" for line in tables.provenance_lines(document)] + [""]
    parts += [tables.markdown(table, level=2) for table in tables_of(document)]
    return "\n".join(parts)


def page(document: dict[str, Any]) -> str:
    """The whole result as one self-contained HTML page."""
    made = Page(f"{TITLES[document['kind']]}: {tables.headline(document)}")
    if document.get("quick"):
        made.banner(SMOKE)
    for _, figure, caption in pictures_of(document):
        made.figure(figure, caption)
    for table in tables_of(document):
        made.section(table.title)
        if table.note:
            made.text(table.note, note=True)
        made.table(table.columns, table.rows)
    made.section("Provenance")
    made.preformatted("\n".join(tables.provenance_lines(document)))
    return made.html()


def write_report(document: dict[str, Any], out: Path) -> list[Path]:
    """Write ``result.json``, ``result.md``, ``result.html`` and the pictures (PNG) into ``out``."""
    files.write_json(out / "result.json", document)
    files.write_text(out / "result.md", markdown_report(document))
    files.write_text(out / "result.html", page(document))
    written = [out / name for name in ("result.json", "result.md", "result.html")]
    for name, figure, _ in pictures_of(document):
        path = out / f"{name}.png"
        figure.savefig(path, dpi=130, metadata={"Software": None})
        written.append(path)
    return written
