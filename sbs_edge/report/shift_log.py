"""The report of ``sbs-edge run shift-log``: accuracy and time against length, a column for each way to read."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from sbs_edge.report.page import Page

__all__ = ["shift_log_page", "shift_log_table"]

CAVEAT = (
    "The task was made so that its three facts stand far apart: no chunk of a long log holds all of them. It shows that "
    "a student can collect facts from a text that it cannot read in one piece; it does not estimate what that is worth "
    "on your documents."
)


def _ways(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in report["lengths"]))


def _cells(report: dict[str, Any], figure: str, shown: str) -> list[list[str]]:
    """Return a row for each length: the length, and the figure of each way."""
    found = {(row["tokens"], row["way"]): row[figure] for row in report["lengths"]}
    lengths = sorted({row["tokens"] for row in report["lengths"]})
    return [
        [f"{tokens:,}", *(shown.format(found[tokens, way]) for way in _ways(report))] for tokens in lengths
    ]


def shift_log_table(report: dict[str, Any]) -> Table:
    """Return label accuracy and milliseconds a call as a rich table: one length a row."""
    rows = report["lengths"][0]["rows"]
    table = Table(title=f"{report['task']}: accuracy (ms a call), {rows} logs of each length")
    table.add_column("tokens", justify="right")
    for way in _ways(report):
        table.add_column(way, justify="right")
    for right, taken in zip(
        _cells(report, "accuracy", "{:.0%}"), _cells(report, "ms", "{:.1f}"), strict=True
    ):
        table.add_row(right[0], *(f"{a} ({b})" for a, b in zip(right[1:], taken[1:], strict=True)))
    return table


def _picture(report: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for way in _ways(report):
        points = [(row["tokens"], row["accuracy"]) for row in report["lengths"] if row["way"] == way]
        axis.plot(*zip(*points, strict=True), marker=".", label=way)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens of the log")
    axis.set_ylabel("label accuracy")
    axis.axhline(0.25, color="grey", linewidth=0.8, linestyle=":")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def shift_log_page(report: dict[str, Any]) -> str:
    """Return ``report.html``: opens without a network, holds the figures of the JSON report."""
    page = Page(f"sbs-edge run: {report['task']}")
    page.text(CAVEAT, note=True)
    long, trained = report["bundle"]["long"], report["student"]
    page.text(
        f"Chunks of {long['chunk']} tokens with an overlap of {long['overlap']:.0%}; top-k reads {report['top_k']} states "
        f"a head. Trained in {trained['seconds']:.0f} s, {trained['metrics']['steps']} steps; the whole run took "
        f"{report['seconds']:.0f} s."
    )
    page.section("Label accuracy")
    ways = _ways(report)
    page.table(["tokens", *ways], _cells(report, "accuracy", "{:.1%}"))
    page.figure(
        _picture(report), "Label accuracy against the length of the log; the dotted line is guessing."
    )
    page.section("Milliseconds a call")
    page.table(["tokens", *ways], _cells(report, "ms", "{:.1f}"))
    page.text("Median of single calls, one thread, on the machine that ran this.", note=True)
    return page.html()
