"""The report of one result: JSON, Markdown, pictures, and one HTML page that loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge import files
from sbs_edge.bench.core import pictures, tables
from sbs_edge.bench.kernels.pictures import kernel_pictures
from sbs_edge.bench.kernels.tables import kernel_tables
from sbs_edge.bench.long.tables import long_pictures, long_tables
from sbs_edge.bench.serving.tables import serving_tables
from sbs_edge.report.page import Page

if TYPE_CHECKING:
    from sbs_edge.bench.core.pictures import Picture

__all__ = ["HEADINGS", "SMOKE", "markdown_report", "page", "pictures_of", "tables_of", "write_report"]

SMOKE = (
    "A smoke run (--quick) with short inputs and two rounds: it shows that everything works, and its "
    "figures mean nothing."
)
HEADINGS = {
    "latency": "Latency, load, memory, size",
    "train": "Training",
    "kernels": "The fused linear + cross-entropy",
    "serving": "Serving",
}
_TITLES = {
    "latency": "Latency bench",
    "train": "Training bench",
    "kernels": "Kernel bench",
    "serving": "Serving bench",
    "scale": "Offline scoring bench",
    "stream-rows": "Streaming bench",
    "long": "Long-input bench",
}
_TABLES = {
    "latency": tables.latency_tables,
    "train": tables.train_tables,
    "kernels": kernel_tables,
    "serving": serving_tables,
    "scale": tables.scale_tables,
    "stream-rows": tables.stream_tables,
    "long": long_tables,
}
_PICTURES = {
    "latency": pictures.latency_pictures,
    "train": pictures.train_pictures,
    "kernels": kernel_pictures,
    "long": long_pictures,
}


def tables_of(document: dict[str, Any]) -> list[tables.Table]:
    """Return every table of a document."""
    return _TABLES[document["kind"]](document)


def pictures_of(document: dict[str, Any]) -> list[Picture]:
    """Return every picture of a document, which may be none; needs matplotlib."""
    make = _PICTURES.get(document["kind"])
    return make(document) if make else []


def markdown_report(document: dict[str, Any]) -> str:
    """Return the whole result as Markdown."""
    parts = [f"# {_TITLES[document['kind']]}: {tables.headline(document)}", ""]
    if document.get("quick"):
        parts += [f"**{SMOKE}**", ""]
    parts += [f"- {line}" for line in tables.provenance_lines(document)] + [""]
    parts += [tables.markdown(table, level=2) for table in tables_of(document)]
    return "\n".join(parts)


def page(document: dict[str, Any]) -> str:
    """Return the whole result as one self-contained HTML page."""
    made = Page(f"{_TITLES[document['kind']]}: {tables.headline(document)}")
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
