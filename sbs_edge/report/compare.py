"""The comparison of two bundles: one sentence, a table for the terminal, and a page."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from sbs_edge.report.analysis import percent
from sbs_edge.report.page import Page

__all__ = ["compare_page", "compare_table", "comparison_headline"]


def comparison_headline(report: dict[str, Any]) -> str:
    """Return the result in one sentence: what the second bundle gains or costs, with its interval."""
    gain = report["gain"]
    agree = f"they give the same answer to {percent(report['agreement'])} of {report['rows']:,} rows"
    if gain is None:
        return f"No row has a label to judge the bundles by; {agree}."
    judge = "" if report["reference"] == "gold" else ", judged by the teacher's labels"
    interval = f"95 % interval {gain['low']:+.1f} to {gain['high']:+.1f}"
    first, second = (percent(bundle["accuracy"]) for bundle in report["bundles"])
    if gain["low"] > 0:
        result = f"The second bundle is {gain['points']:.1f} points more accurate ({interval})"
    elif gain["high"] < 0:
        result = f"The second bundle is {-gain['points']:.1f} points less accurate ({interval})"
    else:
        result = f"No clear difference: {gain['points']:+.1f} points of accuracy for the second bundle ({interval})"
    return f"{result}: {first} and {second} of {gain['n']:,} rows{judge}; {agree}."


def _cells(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    first, second = report["bundles"]

    def both(name: str, show: Any) -> tuple[str, str, str]:
        return name, show(first), show(second)

    return [
        both("accuracy", lambda b: percent(b["accuracy"])),
        both(
            "95 % interval",
            lambda b: "–" if b["low"] is None else f"{100 * b['low']:.1f} to {100 * b['high']:.1f}",
        ),
        both("macro F1", lambda b: "–" if b["macro_f1"] is None else f"{b['macro_f1']:.3f}"),
        both("expected calibration error", lambda b: "–" if b["ece"] is None else f"{b['ece']:.4f}"),
        both("label p50", lambda b: f"{b['label_ms']['p50']:.2f} ms"),
        both("label p90", lambda b: f"{b['label_ms']['p90']:.2f} ms"),
        both("size", lambda b: f"{b['bytes'] / 1e6:.2f} MB"),
        both("version", lambda b: str(b["version"])),
        both("target", lambda b: b["target"]),
    ]


def compare_table(report: dict[str, Any]) -> Table:
    """Return the comparison as a table for the terminal."""
    table = Table(title=f"{report['task']}: {report['rows']:,} rows")
    table.add_column("figure")
    for bundle in report["bundles"]:
        table.add_column(bundle["path"], justify="right", overflow="fold")
    for cells in _cells(report):
        table.add_row(*cells)
    for item in report["labels"]:
        table.add_row(f"recall of {item['label']} ({item['rows']:,})", *map(percent, item["recall"]))
    return table


def compare_page(report: dict[str, Any]) -> str:
    """Return the comparison as one HTML page that needs no network."""
    page = Page(f"sbs-edge compare: {report['task']}")
    page.headline(comparison_headline(report))
    page.table(["figure", "first bundle", "second bundle"], [list(cells) for cells in _cells(report)])
    first, second = report["bundles"]
    page.text(f"First: {first['path']}. Second: {second['path']}.")
    page.text("Latency: one text a call, one thread, both bundles in turns.", note=True)
    if outcomes := report["outcomes"]:
        page.section("Rows answered correctly")
        page.table(
            ["by", "rows"],
            [
                ["both", outcomes["both_right"]],
                ["the first alone", outcomes["only_first"]],
                ["the second alone", outcomes["only_second"]],
                ["neither", outcomes["none_right"]],
            ],
        )
    if report["labels"]:
        page.section("Each label")
        page.table(
            ["label", "rows", "recall, first", "recall, second", "precision, first", "precision, second"],
            [
                [item["label"], item["rows"], *map(percent, item["recall"]), *map(percent, item["precision"])]
                for item in report["labels"]
            ],
        )
    if report["differing"]:
        page.section("Rows answered differently")
        page.text("Rows that only the first bundle answers correctly come first.", note=True)
    for number, item in enumerate(report["differing"], start=1):
        sure = [
            f"{label} ({percent(p)} sure)"
            for label, p in zip(item["labels"], item["probabilities"], strict=True)
        ]
        page.sample(
            f"{number}. {item['labels'][0] or '(nothing)'} became {item['labels'][1] or '(nothing)'}"
            + (f"; right: {item['wanted']}" if item["wanted"] is not None else ""),
            [("input", item["input"]), ("first", sure[0]), ("second", sure[1]), ("row", item["row"])],
        )
    return page.html()
