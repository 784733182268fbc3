"""Generates ``docs/benchmarks.md`` from the committed results: ``python -m sbs_edge.bench.core.docs``.

The newest result of each kind, machine and model is shown in full, older ones are listed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.bench.core import tables
from sbs_edge.bench.core.registry import HEADINGS, tables_of
from sbs_edge.errors import DataError

__all__ = ["generate", "main"]

RESULTS, PAGE = Path("bench/results"), Path("docs/benchmarks.md")
_INTRO = """# Benchmarks

This page is generated from the JSON files in `bench/results/`; do not edit it.
`python -m sbs_edge.bench.core.docs` writes it again, and a test checks that it is up to date.

How it is measured: every system in its own process, pinned to the same processors with the same number of
threads, warmed, asked in turn (A B C, then B C A, ...), so that a machine that drifts drifts for all of them.
Text goes in and a label or a rationale comes out: tokenising counts for everyone. Peers answer a label
question by generating the label and the end-of-sequence token, as their users do, and as a second row only
one token. Ratios are of medians, with the 95 % bootstrap interval over the interleaved rounds; a system whose
answers are worse than the peer's (by more than 1 point on a trained student, 5 on random weights) gets no
ratio. Repeat it with the command given under each result.

Rows named "label only" are the same student exported without the graph for rationales (`--label-only`), and with the
input vocabulary pruned to its rows and a margin (`--prune-input-vocabulary`): their speed is the bundle's own, so only
answers, cold start, memory and size are measured. A bundle's cold start uses this machine's caches (weights in the
order its kernels read them, digests of unchanged files), made when the bundle was first loaded; Python's byte code
is compiled beforehand for every system, as an installation does.

The kernel bench times losses, not answers: all of them in one process on the same tensors, in the same
interleaved rounds, with their gradient errors against float64 beside their times.

Differences under about 15 % are noise on an ordinary machine. Random weights give real latency, size and
memory; they say nothing about accuracy after quantisation, which `sbs-edge export` guards on trained ones.
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


def main(root: Path | None = None) -> int:
    """Write the page of the repository in ``root`` (the working directory); 1 outside a repository."""
    root = root or Path.cwd()
    if not (root / RESULTS).is_dir():
        sys.stderr.write(f"There is no {RESULTS} here: run it in the root of the repository.\n")
        return 1
    files.write_text(root / PAGE, generate(root / RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
