"""Table and picture of a long-input document."""

from __future__ import annotations

from typing import Any

from sbs_edge.bench.core.tables import Table, number

__all__ = ["long_pictures", "long_tables"]

_FIGURES = (
    ("accuracy", "Label accuracy", "Share of right labels; a dash where the bundle has another task, or random weights."),
    ("ms", "Milliseconds a call", "Median of single calls, one input a call; led and longt5 get token ids instead of text."),
    ("peak_mb", "Peak memory, MB", "Resident memory of the process, weights and libraries included."),
    ("above_loaded_mb", "Memory beyond the loaded model, MB", "The peak over that after a short input."),
)  # fmt: skip


def _ways(document: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(record["way"] for record in document["records"]))


def long_tables(document: dict[str, Any]) -> list[Table]:
    """Return a table for each figure: a row for each length, a column for each way to read."""
    ways, found = _ways(document), []
    lengths = sorted({record["tokens"] for record in document["records"]})
    by_place = {(record["tokens"], record["way"]): record for record in document["records"]}
    for key, title, note in _FIGURES:
        rows = [
            [f"{tokens:,}", *(number(by_place.get((tokens, way), {}).get(key)) for way in ways)]
            for tokens in lengths
        ]
        found.append(Table(title, note, ["tokens", *ways], rows))
    failed = [record for record in document["records"] if record.get("failed")]
    if failed:
        rows = [[f"{record['tokens']:,}", record["way"], record["failed"]] for record in failed]
        found.append(Table("Not measured", "", ["tokens", "way", "reason"], rows))
    return found


def long_pictures(document: dict[str, Any]) -> list[Any]:
    """Return one picture: accuracy, time and memory against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    shown = (("accuracy", "label accuracy"), ("ms", "ms a call"), ("above_loaded_mb", "MB beyond the model"))
    for axis, (key, title) in zip(axes, shown, strict=True):
        for number_, way in enumerate(_ways(document)):
            points = [
                (record["tokens"], record[key])
                for record in document["records"]
                if record["way"] == way and record[key] is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=way, color=f"C{number_}")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if key != "accuracy":
            axis.set_yscale("log")
    named = {
        name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return [("long", figure, "Accuracy, time and memory against the length of the input.")]
