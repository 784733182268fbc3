"""Writes a result: JSON, Markdown, pictures and one page that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.bench import pictures, tables
from sbs_edge.report.page import Page

__all__ = ["markdown_report", "page", "write_report"]

_TITLES = {"latency": "Latency bench", "train": "Training bench"}


def _tables(document: dict[str, Any]) -> list[tables.Table]:
    make = tables.train_tables if document["kind"] == "train" else tables.latency_tables
    return make(document)


def _pictures(document: dict[str, Any]) -> list[pictures.Picture]:
    make = pictures.train_pictures if document["kind"] == "train" else pictures.latency_pictures
    return make(document)


def markdown_report(document: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    parts = [f"# {_TITLES[document['kind']]}: {tables.headline(document)}", ""]
    parts += [f"- {line}" for line in tables.provenance_lines(document)] + [""]
    parts += [tables.markdown(table, level=2) for table in _tables(document)]
    return "\n".join(parts)


def page(document: dict[str, Any]) -> str:
    """The whole result as one self-contained HTML page."""
    made = Page(f"{_TITLES[document['kind']]}: {tables.headline(document)}")
    for _, figure, caption in _pictures(document):
        made.figure(figure, caption)
    for table in _tables(document):
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
    for name, figure, _ in _pictures(document):
        path = out / f"{name}.png"
        figure.savefig(path, dpi=130, metadata={"Software": None})
        written.append(path)
    return written
