"""The error analysis as sections of a page, and as a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sbs_edge.report.page import Page

__all__ = ["add_analysis", "analysis_headline", "analysis_lines", "evaluation_page", "percent"]

MOST_DRAWN_LABELS = 20
MOST_READ_LABELS = 6  # a larger matrix is hard to read on a narrow page: its largest numbers are listed too
SHOWN_NAME = 23


def percent(value: float | None) -> str:
    """Return a share as a percentage with one decimal, or a dash."""
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(found: dict[str, Any]) -> str:
    return f"95 % interval {100 * found['low']:.1f} to {100 * found['high']:.1f}"


def _judge(analysis: dict[str, Any]) -> str:
    return (
        "the gold label" if analysis["reference"] == "gold" else "the teacher's label (no row has a gold one)"
    )


def analysis_headline(analysis: dict[str, Any], name: str = "The student") -> str:
    """Return the main result in one sentence: the accuracy with its interval, and the gain over the commonest label."""
    sentence = (
        f"{name} gives {_judge(analysis)} in {percent(analysis['accuracy'])} of {analysis['n']:,} rows "
        f"({_interval(analysis)})"
    )
    gain, majority = analysis["gain"], analysis["majority"]
    if gain:
        more = "more" if gain["points"] >= 0 else "fewer"
        sentence += (
            f", {abs(gain['points']):.1f} points {more} than always answering {_short(majority['label'])!r} would "
            f"({gain['low']:+.1f} to {gain['high']:+.1f})"
        )
    return sentence + "."


def analysis_lines(analysis: dict[str, Any]) -> list[str]:
    """Return the analysis in a few lines of text."""
    lines = [analysis_headline(analysis)]
    scored = [item for item in analysis["labels"] if item["rows"]]
    if len(scored) > 1:
        worst = min(scored, key=lambda item: (item["f1"], item["label"]))
        lines.append(
            f"Macro F1 {analysis['macro_f1']:.3f}; lowest for {_short(worst['label'])!r}: F1 {worst['f1']:.3f}, precision "
            f"{percent(worst['precision'])}, recall {percent(worst['recall'])}, {worst['rows']:,} rows."
        )
    if analysis["confusions"]:
        most = analysis["confusions"][0]
        lines.append(
            f"Most frequent confusion: {_short(most['label'])!r} instead of {_short(most['wanted'])!r}, "
            f"{most['rows']:,} rows."
        )
    if analysis["reliability"]:
        lines.append(f"Expected calibration error {analysis['reliability']['ece']:.4f}.")
    if len(analysis["lengths"]) > 1:
        worst = min(analysis["lengths"], key=lambda group: group["accuracy"])
        lines.append(
            f"Least accurate length: {_span(worst)} tokens, {percent(worst['accuracy'])} of {worst['n']:,} rows "
            f"({_interval(worst)})."
        )
    for column, values in analysis["slices"].items():
        worst = min(values, key=lambda item: item["accuracy"])
        lines.append(
            f"Least accurate {column}: {_short(worst['value'])}, {percent(worst['accuracy'])} of {worst['n']:,} rows "
            f"({_interval(worst)})."
        )
    return lines


def _span(group: dict[str, Any]) -> str:
    low, high = f"{group['from']:.0f}", f"{group['to']:.0f}"
    return low if low == high else f"{low} to {high}"


def _short(name: str) -> str:
    """Leave out the middle of a long name: names of one kind differ at the end more often than there."""
    if len(name) <= SHOWN_NAME:
        return name
    kept = (SHOWN_NAME - 1) // 2
    return f"{name[:kept]}…{name[-kept:]}"


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names in short, numbered where two would look alike."""
    shown = [_short(name) for name in names]
    return [
        name if shown.count(name) == 1 else f"{name} ({shown[: place + 1].count(name)})"
        for place, name in enumerate(shown)
    ]


def add_analysis(page: Page, analysis: dict[str, Any], confidence_note: str) -> None:
    """Add the sections of an error analysis to a page.

    Args:
        page: receives the sections.
        analysis: result of :func:`sbs_edge.analysis.answers.analyse_answers`.
        confidence_note: says how the probabilities were calibrated.

    """
    if analysis["labels"]:
        _add_labels(page, analysis)
    if analysis["reliability"]:
        found = analysis["reliability"]
        page.section("Reliability")
        page.text(
            f"Expected calibration error {found['ece']:.4f} over {found['n']:,} answers: the mean gap between how sure "
            f"the student is and how often it is right. {confidence_note}"
        )
        page.figure(
            _reliability(found["bins"]),
            "Accuracy of the answers by the student's probability. On the diagonal, a probability means what it says; "
            "below it the student is too sure. Bars: share of the answers.",
        )
    if len(analysis["lengths"]) > 1:
        page.section("Accuracy by length")
        page.table(
            ["tokens read", "rows", "accuracy", "95 % interval"],
            [[_span(g), *_accuracy_cells(g)] for g in analysis["lengths"]],
        )
    for column, values in analysis["slices"].items():
        page.section(f"Accuracy by {column}")
        page.table(
            [column, "rows", "accuracy", "95 % interval"],
            [[item["value"], *_accuracy_cells(item)] for item in values],
        )
    _add_errors(page, analysis)


def _accuracy_cells(found: dict[str, Any]) -> list[Any]:
    return [
        found["n"],
        percent(found["accuracy"]),
        f"{100 * found['low']:.1f} to {100 * found['high']:.1f}",
    ]


def _add_labels(page: Page, analysis: dict[str, Any]) -> None:
    page.section("Precision and recall of each label")
    page.text(
        f"Macro F1 {analysis['macro_f1']:.3f}. Precision: how often the label is right where it is answered. Recall: "
        "how often it is found where it is right. F1: their harmonic mean."
    )
    page.table(
        ["label", "rows", "answered", "precision", "recall", "F1"],
        [
            [item["label"], item["rows"], item["answered"], percent(item["precision"]), percent(item["recall"]),
             "–" if item["f1"] is None else f"{item['f1']:.3f}"]
            for item in analysis["labels"]
        ],
    )  # fmt: skip
    if not analysis["confusions"]:
        return
    page.section("Confusions")
    n_labels = len(analysis["confusion"]["labels"])
    if n_labels <= MOST_DRAWN_LABELS:
        page.figure(
            _confusion(analysis["confusion"]),
            "Confusion matrix: a row for each right label, a column for each answer; numbers are rows of data.",
        )
    if n_labels > MOST_READ_LABELS:
        page.table(
            ["confusion", "rows"],
            [
                [f"{item['wanted']}, answered as {item['label']}", item["rows"]]
                for item in analysis["confusions"]
            ],
        )


def _add_errors(page: Page, analysis: dict[str, Any]) -> None:
    if not analysis["errors"]:
        return
    gold = analysis["reference"] == "gold"
    page.section("The most confident errors")
    page.text(
        "The student is surest of these wrong answers. Where the student seems right, the label may be wrong.",
        note=True,
    )
    for number, error in enumerate(analysis["errors"], start=1):
        sure = "" if error["probability"] is None else f", {percent(error['probability'])} sure"
        page.sample(
            f"{number}. {error['label'] or '(nothing)'}{sure}; right: {error['wanted']}",
            [
                ("input", error["input"]),
                ("student's rationale", error["rationale"]),
                ("teacher's rationale", error["teacher_rationale"]),
                ("teacher's label", error["teacher_label"] if gold else None),
                ("row", error["source"] or error["id"]),
            ],
        )


def _reliability(bins: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    total = sum(item["n"] for item in bins)
    middles = [(item["low"] + item["high"]) / 2 for item in bins]
    axis.bar(
        middles, [item["n"] / total for item in bins], width=bins[0]["high"] - bins[0]["low"], color="#d5dce4"
    )
    axis.plot([0, 1], [0, 1], color="#999", linestyle="--", linewidth=1)
    axis.plot(
        [item["confidence"] for item in bins], [item["accuracy"] for item in bins], marker="o", color="#06c"
    )
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="the student's probability", ylabel="accuracy")
    axis.grid(alpha=0.3)
    return figure


def _confusion(confusion: dict[str, Any]) -> Any:
    import numpy as np
    from matplotlib.figure import Figure

    names = _distinct(confusion["labels"])
    counts = np.array(confusion["counts"], float)
    # Only answers outside the label set fill the last row; a right label never stands there.
    wanted = names if counts[-1].any() else names[:-1] if confusion["labels"][-1] == "(other)" else names
    counts = counts[: len(wanted)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(3.6, 1.4 + 0.55 * len(names))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column]:
            color = "white" if shares[row, column] > 0.6 else "black"
            text = f"{int(counts[row, column]):,}"
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(wanted)), wanted)
    axis.set(xlabel="student's answer", ylabel="right label")
    return figure


def evaluation_page(report: dict[str, Any], student: str, data: str | None) -> str:
    """Return the page of ``sbs-edge evaluate --report``: one HTML document that needs no network.

    Args:
        report: result of :func:`sbs_edge.training.evaluate.evaluate` with ``analysis``.
        student: name of the student directory.
        data: name of the file of rows; None: the student's own validation rows.

    """
    page = Page(f"sbs-edge evaluate: {student}")
    analysis = report["analysis"]
    rows = f"{report['n']:,} rows of {data}" if data else f"the student's own {report['n']:,} validation rows"
    if analysis is None:
        page.headline(f"None of {rows} has a label to judge by.")
        return page.html()
    page.headline(analysis_headline(analysis))
    page.text(f"Judged on {rows}; answers by {report['method']}.")
    if not data:
        page.text(
            "These rows chose the student's weights, so its accuracy on new rows is likely lower.", note=True
        )
    figures = [
        ("agrees with the teacher's label", percent(report["teacher_agreement"])),
        ("rationale, next token right", percent(report.get("rationale_token_accuracy"))),
        ("rationale, whole text right", percent(report.get("rationale_exact"))),
    ]
    shown = [list(item) for item in figures if item[1] != "–"]
    if shown:
        page.table(["figure", "value"], shown)
    add_analysis(
        page, analysis, "Before calibration: export fits a temperature, which a bundle's probabilities use."
    )
    return page.html()
