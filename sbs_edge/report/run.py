"""The report of ``sbs-edge run``: a table for the terminal and a page with pictures."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from sbs_edge.data.builtin import NAME as BUILTIN
from sbs_edge.report.analysis import add_analysis, analysis_headline, percent
from sbs_edge.report.compare import comparison_headline
from sbs_edge.report.page import Page

__all__ = ["headline", "run_page", "run_table"]

BUILTIN_CAVEAT = (
    "The built-in task was made so that labels alone fail: no single fact in a ticket says anything about "
    "the label, and all three are needed. It demonstrates that rationales carry what labels do not; it does "
    "not estimate what they are worth on your data."
)


def headline(report: dict[str, Any]) -> str | None:
    """Return the main result in a sentence: the gain from rationales, with its interval.

    If only one student was trained, or no test row has a gold label: how often the bundle's answers are right.
    None if no test row has any label.
    """
    gain, analysis = report.get("gain"), report.get("analysis")
    if not gain:
        return analysis_headline(analysis, "The bundle") if analysis else None
    main, other = (
        f"{student['name']} {percent(student['test']['label_accuracy'])}"
        for student in report["students"][:2]
    )
    rows = f"on {gain['n']:,} test rows"
    interval = f"95 % interval {gain['low']:+.1f} to {gain['high']:+.1f}"
    if gain["low"] > 0:
        result = f"Rationales gained {gain['points']:.1f} points of label accuracy {rows} ({interval})"
    elif gain["high"] < 0:
        result = f"Rationales cost {-gain['points']:.1f} points of label accuracy {rows} ({interval})"
    else:
        result = f"No clear effect of rationales: {gain['points']:+.1f} points of label accuracy {rows} ({interval})"
    return f"{result}: {main}, {other}."


def run_table(report: dict[str, Any]) -> Table:
    """Return the comparison as a rich table, with a row for each student and each exported target."""
    table = Table(title=f"{report['task']['name']}: test split, {report['rows']['test']} rows")
    for column in ("student", "steps", "label", "rationale", "size", "p50", "trained"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for student in report["students"]:
        test = student["test"]
        table.add_row(
            student["name"],
            str(student["steps"]),
            percent(test["label_accuracy"]),
            percent(test.get("rationale_token_accuracy")),
            f"{student['metrics']['parameters'] / 1e6:.2f}M par.",
            "",
            f"{student['train_seconds']:.0f} s",
        )
    table.add_section()
    for target in report["bundle"]["targets"]:
        latency = target["label_ms"]
        table.add_row(
            target["target"],
            "",
            percent(target["label_accuracy"]),
            "",
            f"{target['bytes'] / 1e6:.2f} MB",
            f"{latency['p50']:.2f} ms" if latency else "–",
            "",
        )
    return table


def _curves(report: dict[str, Any], keys: tuple[tuple[str, str], ...]) -> list[Any]:
    """Return one figure for each ``(key of the history, title)`` that some student has."""
    from matplotlib.figure import Figure

    figures = []
    for key, title in keys:
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axis = figure.subplots()
        for student in report["students"]:
            points = [(row["step"], row[key]) for row in student["history"] if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=student["name"])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
        if names := axis.get_legend_handles_labels()[1]:  # below the axes, where no curve is
            figure.legend(loc="outside lower center", ncols=min(2, len(names)), fontsize=8)
            figures.append(figure)
    return figures


def _coverage(calibration: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    points = calibration["coverage"]
    axis.plot([p["coverage"] for p in points], [p["accuracy"] for p in points], marker=".")
    axis.set_xlabel("share of rows answered")
    axis.set_ylabel("accuracy on them")
    axis.grid(alpha=0.3)
    return figure


def run_page(report: dict[str, Any]) -> str:
    """Return ``report.html``, which needs no network and has every figure of the JSON report."""
    page = Page(f"sbs-edge run: {report['task']['name']}")
    rows = report["rows"]
    if replacement := report.get("replacement"):
        kept = "It replaced the one in use" if replacement["accepted"] else "The one in use was kept"
        added = (report.get("added") or {}).get("added", 0)
        page.headline(
            f"{comparison_headline(replacement)} The second was trained on {added:,} more rows. {kept}."
        )
    if sentence := headline(report):
        page.headline(sentence)
    if sentence := (report.get("linear") or {}).get("sentence"):
        page.text(sentence)
    if report["task"]["name"] == BUILTIN:
        page.text(BUILTIN_CAVEAT, note=True)
    page.text(
        f"Mode {report['mode']}. {rows['train']:,} training rows, {rows['validation']:,} for model selection, "
        f"{rows['test']:,} for the test, which was read once, at the end. All students saw the same label "
        f"examples; the whole run took {report['seconds']:.0f} s."
    )
    agreement = report["teacher_agreement"]
    if agreement["total"]:
        page.text(
            f"Teacher and gold label agree on {agreement['equal']:,} of {agreement['total']:,} training rows "
            f"({percent(agreement['equal'] / agreement['total'])})."
        )

    for warning in report.get("warnings", ()):
        page.text(f"Warning about the data: {warning}")

    page.section("Compared students")
    reached = [s["test"]["label_accuracy"] for s in report["students"]]
    most = max((share for share in reached if share is not None), default=None)
    best = reached.index(most) if len(reached) > 1 and most is not None and reached.count(most) == 1 else None
    if best is not None:
        page.text("In bold: the highest label accuracy on the test split.", note=True)
    page.table(
        ["student", "mode", "steps", "label accuracy", "rationale token accuracy", "rationales exact",
         "parameters", "training s"],
        [
            [s["name"], s["mode"], s["steps"], percent(s["test"]["label_accuracy"]),
             percent(s["test"].get("rationale_token_accuracy")), percent(s["test"].get("rationale_exact")),
             s["metrics"]["parameters"], s["train_seconds"]]
            for s in report["students"]
        ],
        best=best,
    )  # fmt: skip
    page.figures(
        _curves(
            report,
            (("label_loss", "label loss (training)"), ("rationale_loss", "rationale loss (training)")),
        ),
        "Learning curves of both tasks.",
    )
    page.figures(
        _curves(
            report,
            (
                ("eval_label_accuracy", "label accuracy (validation)"),
                ("eval_rationale_token_accuracy", "rationale token accuracy (validation)"),
            ),
        ),
        "Validation while training.",
    )

    page.section("Bundle")
    page.table(
        ["target", "label accuracy", "same label as the first target", "bytes", "label p50 ms", "label p90 ms"],
        [
            [t["target"], percent(t["label_accuracy"]), percent(t["agreement_with_first"]), t["bytes"],
             (t["label_ms"] or {}).get("p50"), (t["label_ms"] or {}).get("p90")]
            for t in report["bundle"]["targets"]
        ],
    )  # fmt: skip
    page.text("Latency: one text a call, one thread, on the machine that ran this.", note=True)
    guarded = [(t["target"], t["guard"]) for t in report["bundle"]["targets"] if t["guard"]]
    if guarded:
        page.section("Accuracy check: each target beside the float32 student, on validation rows")
        page.table(
            ["target", "rows", "float32", "target's", "drop, points", "95 % bound", "same label", "same next token"],
            [
                [name, g["n"], percent(g["before"]), percent(g["after"]), round(g["drop_points"], 2),
                 round(g["drop_bound"], 2), percent(g["label_agreement"]),
                 percent(g.get("rationale_next_token_agreement"))]
                for name, g in guarded
            ],
        )  # fmt: skip
    calibration = report["bundle"].get("calibration") or {}
    if calibration.get("coverage"):
        after = calibration["ece_after"]
        page.section("Confidence")
        page.text(
            f"Temperature {calibration['temperature']:.3f}, fitted on {calibration.get('n', 0):,} validation rows; "
            f"expected calibration error {calibration['ece_before']:.4f} before and "
            + ("too few rows to tell" if after is None else f"{after:.4f}")
            + " after, each half of the rows at the other half's temperature."
        )
        page.figure(_coverage(calibration), "Accuracy against coverage when doubtful rows are passed on.")
    if analysis := report.get("analysis"):
        page.section(f"Where {analysis['target']} is right and wrong")
        page.text(analysis_headline(analysis, f"The target {analysis['target']}"))
        add_analysis(page, analysis, "Calibrated with the bundle's temperature.")
    rationales = [
        f"{t['target']}: {t['example_rationale']}"
        for t in report["bundle"]["targets"]
        if t["example_rationale"]
    ]
    if rationales:
        page.section("A rationale, as the bundle gives it")
        page.preformatted("\n".join(rationales))
    return page.html()
