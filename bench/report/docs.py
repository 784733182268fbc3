"""``sbs-edge bench docs``: ``docs/benchmarks.md`` and the README's picture, from the committed results.

The newest result of each kind, machine and model is shown in full; older ones are listed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.bench.core import tables
from sbs_edge.bench.report.document import HEADINGS, tables_of
from sbs_edge.bench.report.picture import PICTURE, peers_svg
from sbs_edge.errors import DataError, UsageError

__all__ = ["generate", "write_docs"]

RESULTS, PAGE = Path("bench/results"), Path("docs/benchmarks.md")
_INTRO = """# Benchmarks

This page is generated from the JSON files in `bench/results/`; do not edit it.
`sbs-edge bench docs` writes it again, and a test checks that it is up to date.

Every system runs in its own process, pinned to the same processors with the same number of threads. Systems are
warmed up and then asked in turn (A B C, then B C A, ...), so that a change of the machine's speed affects all of them.
Text goes in and a label or a rationale comes out, so tokenizing counts for every system. Peers answer the label task
by generating the label and the end-of-sequence token, as their users do; a second row generates one token only.
Ratios are of medians, with the 95 % bootstrap interval over the interleaved rounds. A system whose answers are worse
than the peer's (by more than 1 point on a trained student, 5 on random weights) gets no ratio. The command under each
result repeats it.

Rows named "label only" are the same student exported without the graph for rationales (`--label-only`), and with the
input vocabulary pruned to its rows and a margin (`--prune-input-vocabulary`). Their speed is that of the full bundle,
so only answers, cold start, memory and size are measured. The cold start of a bundle uses the machine's caches (weights
in the order in which its kernels read them, digests of unchanged files), which the first load fills. Python's byte code
is compiled beforehand for every system, as an installation does.

The kernel bench times losses, not answers. All losses run in one process on the same tensors, in the same
interleaved rounds, and their gradient errors against float64 stand beside their times.

Differences under about 15 % are noise on an ordinary machine. Random weights give real latency, size and
memory. They say nothing about accuracy after quantization, which `sbs-edge export` checks on trained weights.
"""


def _shown(document: dict[str, Any]) -> str:
    parts = [f"### {tables.headline(document)}", ""]
    parts += [f"- {line}" for line in tables.provenance_lines(document)] + [""]
    parts += [tables.markdown(table, level=4) for table in tables_of(document)]
    return "\n".join(parts)


def generate(results: Path) -> str:
    """Return the page for the result files in a directory.

    Raises:
        DataError: a file is not JSON.
    """
    found: dict[str, dict[str, list[tuple[str, str, dict[str, Any]]]]] = {}
    for path in sorted(results.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"The result file {path} is not JSON: {error}.") from error
        kind = document.get("kind")
        if kind in HEADINGS:
            points = [case["name"] for case in document.get("cases", [])]
            same = f"{tables.headline(document)[:-12]} threads {document.get('threads')} {points}"
            group = found.setdefault(kind, {}).setdefault(same, [])
            group.append((document["created"], path.name, document))
    parts = [_INTRO]
    for kind, title in HEADINGS.items():
        if kind not in found:
            continue
        parts.append(f"## {title}\n")
        for group in found[kind].values():
            newest = max(group, key=lambda item: (item[0], item[1]))
            parts.append(_shown(newest[2]))
            parts.append(f"Source: `bench/results/{newest[1]}`.\n")
            older = sorted(name for _, name, _ in group if name != newest[1])
            if older:
                parts.append("Older results of the same: " + ", ".join(f"`{name}`" for name in older) + ".\n")
    if not found:
        parts.append("No result has been committed yet.\n")
    return "\n".join(parts)


def write_docs(root: Path) -> list[Path]:
    """Write the page and the picture of the repository in ``root``; return their paths.

    Raises:
        UsageError: ``root`` has no ``bench/results``.
        DataError: a result cannot be read.
    """
    results = root / RESULTS
    if not results.is_dir():
        raise UsageError(f"{root.resolve()} has no {RESULTS}: give the root of the repository.")
    contents = {PAGE: generate(results), PICTURE: peers_svg(results)}
    for path, content in contents.items():
        files.write_text(root / path, content)
    return [root / path for path in contents]
