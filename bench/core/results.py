"""The record that every benchmark writes, and the document that holds the records.

A row is one measured figure: what was measured (``section``, ``case``), of which system (``system``,
``variant``), its unit, which direction is better, the value, and the value of every interleaved
round, from which spreads and comparisons are made later.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sbs_edge.bench.core.machine import provenance
from sbs_edge.errors import DataError

__all__ = ["FORMAT", "Row", "load_document", "new_document", "rows_of"]

FORMAT = 1
Key = tuple[str, str, str, str]


@dataclass(slots=True)
class Row:
    """A measured figure.

    Attributes:
        section: ``label``, ``rationale``, ``throughput``, ``open_loop``, ``cold_start``, ``memory``, ...
        system: ``sbs-edge:cpu-int8``, ``ctranslate2``, ...
        variant: the task of the system (``label+eos``, ``one token``), or empty.
        case: the measured case in words (``batch 1, 64 tokens``).
        unit: ``ms``, ``tokens/s``, ``MB``, ...
        better: ``lower`` or ``higher``.
        value: the figure (a median unless ``extra`` says otherwise).
        rounds: the figure of each interleaved round; empty for facts measured once.
        extra: percentiles, sample counts, settings; plain JSON values.
    """

    section: str
    system: str
    variant: str
    case: str
    unit: str
    better: Literal["lower", "higher"]
    value: float
    rounds: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Identify the same measurement in results of different runs."""
        return (self.section, self.system, self.variant, self.case)

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form for JSON."""
        return asdict(self)


def new_document(
    kind: str,
    model: dict[str, Any],
    *,
    threads: int,
    cpus: list[int] | None = None,
    command: list[str] | None = None,
    began: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Return a document with where and how it was measured, and ``fields``.

    Args:
        kind: the bench.
        model: what was measured.
        threads: compute threads.
        cpus: processors used; None: every one this process may use.
        command: what was run; None: this process's own arguments.
        began: :func:`~sbs_edge.bench.core.machine.provenance` as it was before the measurement; None: now.
        fields: everything else; a ``seed`` of 0 unless given.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        **(began or provenance(command)),
        "model": model,
        "threads": threads,
        "cpus": sorted(os.sched_getaffinity(0)) if cpus is None else cpus,
        "seed": 0,
        **fields,
    }


def rows_of(document: dict[str, Any]) -> list[Row]:
    """Return the rows of a document."""
    return [Row(**row) for row in document["rows"]]


def load_document(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        DataError: it cannot be read, is not a result of these benchmarks, or has another format number.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The result file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"The result file {path} is not JSON: {error}.") from error
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise DataError(
            f"{path} is not a result of 'sbs-edge bench latency', 'train' or 'kernels': it has no list 'rows'."
        )
    if document.get("format") != FORMAT:
        raise DataError(
            f"{path} has the result format {document.get('format')!r}; this version reads {FORMAT}. "
            "Measure again with this version."
        )
    try:
        rows_of(document)
    except TypeError as error:
        raise DataError(f"{path} holds a row that 'sbs-edge bench' did not write: {error}.") from error
    return document
