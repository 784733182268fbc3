"""The kinds of result documents: their titles, tables and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sbs_edge.bench.core import pictures, tables
from sbs_edge.bench.kernels import pictures as kernel_pictures
from sbs_edge.bench.kernels import tables as kernel_tables
from sbs_edge.bench.serving import tables as serving_report

if TYPE_CHECKING:
    from sbs_edge.bench.core.pictures import Picture

__all__ = ["HEADINGS", "TITLES", "pictures_of", "tables_of"]

TITLES = {
    "latency": "Latency bench",
    "train": "Training bench",
    "kernels": "Kernel bench",
    "serving": "Serving bench",
}
HEADINGS = {
    "latency": "Latency, load, memory, size",
    "train": "Training",
    "kernels": "The fused linear + cross-entropy",
    "serving": "Serving",
}
_TABLES = {
    "latency": tables.latency_tables,
    "train": tables.train_tables,
    "kernels": kernel_tables.kernel_tables,
    "serving": serving_report.serving_tables,
}
_PICTURES = {
    "latency": pictures.latency_pictures,
    "train": pictures.train_pictures,
    "kernels": kernel_pictures.kernel_pictures,
}


def tables_of(document: dict[str, Any]) -> list[tables.Table]:
    """Every table of a document."""
    return _TABLES[document["kind"]](document)


def pictures_of(document: dict[str, Any]) -> list[Picture]:
    """Every picture of a document, for serving none; needs matplotlib."""
    make = _PICTURES.get(document["kind"])
    return make(document) if make else []
