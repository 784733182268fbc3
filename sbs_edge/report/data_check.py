"""The page of ``sbs-edge data check``: the verdict, the findings, the figures of each split, and rows to read."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sbs_edge.report.analysis import percent
from sbs_edge.report.page import Page

__all__ = ["check_page"]

_VERDICTS = {
    "ok": "ok: no check found anything",
    "warn": "warn: training works, but read the findings first",
    "stop": "stop: training would fail or give a useless student",
}


def check_page(report: dict[str, Any]) -> str:
    """Return the report of :func:`sbs_edge.data.check.check_dataset` as one HTML page that needs no network."""
    page = Page(f"sbs-edge data check: {report['source']}")
    counts = Counter(finding["level"] for finding in report["findings"])
    rows = ", ".join(f"{split['rows']:,} of {split['name']}" for split in report["splits"])
    told = ", ".join(f"{counts[level]} {level}" for level in ("stop", "warn") if counts[level])
    page.headline(
        f"Verdict {_VERDICTS[report['verdict']]}. Rows: {rows}." + (f" Findings: {told}." if told else "")
    )
    for finding in sorted(report["findings"], key=lambda item: item["level"] != "stop"):
        (page.banner if finding["level"] == "stop" else page.text)(
            f"{finding['level']}: {finding['message']}"
        )
    page.section("Splits")
    task = report["task"]
    page.text(f"Task {task['name']}; labels are {task['label_kind']}, compared by {task['compare']}.")
    page.table(
        ["split", "rows", "rejected", "gold labels", "teacher's labels", "teacher wrong", "rationales", "repeated inputs"],
        [
            [split["name"], split["rows"], sum(split["rejected"].values()), split["gold_labels"],
             split["teacher_labels"], _wrong(split["teacher_errors"]), split["rationales"], split["repeated_inputs"]]
            for split in report["splits"]
        ],
    )  # fmt: skip
    _add_labels(page, report)
    _add_rationales(page, report)
    page.section("Lengths in tokens")
    page.text(f"Counted as {report['tokenizer']}.", note=True)
    page.table(
        ["split", "part", "mean", "median", "99th percentile", "longest"],
        [
            [split["name"], part, lengths["mean"], lengths["p50"], lengths["p99"], lengths["max"]]
            for split in report["splits"]
            for part, lengths in split["tokens"].items()
            if lengths
        ],
    )
    page.section("Rows to read")
    page.text("The rows with the most complaints come first; the last ones are drawn at random.", note=True)
    for number, sample in enumerate(report["samples"], start=1):
        page.sample(
            f"{number}. {'; '.join(sample['reasons'])}",
            [
                ("input", sample["input"]),
                ("gold label", sample["label"]),
                ("teacher's label", sample["teacher_label"]),
                ("rationale", sample["rationale"]),
                ("like this input", sample["other_input"]),
                ("row", f"{sample['row']} ({sample['split']})"),
            ],
        )
    return page.html()


def _wrong(errors: dict[str, Any] | None) -> str | None:
    return (
        None if errors is None else f"{errors['wrong']:,} of {errors['rows']:,} ({percent(errors['share'])})"
    )


def _add_labels(page: Page, report: dict[str, Any]) -> None:
    if report["task"]["label_kind"] != "closed":
        return
    page.section("Labels")
    names = [split["name"] for split in report["splits"]]
    counts = [split["labels"]["most_common"] for split in report["splits"]]
    errors = {
        item["label"]: item
        for split in report["splits"]
        if split["name"] == "train" and split["teacher_errors"]
        for item in split["teacher_errors"]["labels"]
    }
    labels = sorted(
        dict.fromkeys(label for own in counts for label in own), key=lambda label: -counts[0].get(label, 0)
    )
    columns = ["label", *(f"rows of {name}" for name in names)]
    if errors:
        columns.append("teacher wrong, training")
    page.table(
        columns,
        [
            [
                label,
                *(own.get(label, 0) for own in counts),
                *([_wrong_of(errors.get(label))] if errors else []),
            ]
            for label in labels
        ],
    )
    distinct = report["splits"][0]["labels"]["distinct"]
    if distinct > len(counts[0]):
        page.text(f"The most frequent of {distinct} labels are shown.", note=True)


def _wrong_of(item: dict[str, Any] | None) -> str | None:
    return None if item is None else f"{percent(item['wrong'] / item['rows'])}"


def _add_rationales(page: Page, report: dict[str, Any]) -> None:
    known = [
        (split["name"], split["rationale_quality"])
        for split in report["splits"]
        if split["rationale_quality"]
    ]
    if not known:
        return
    page.section("Rationales")
    page.table(
        ["split", "rationales", "different", "short", "name the label", "copy the input", "announce the answer",
         "boilerplate"],
        [
            [name, q["n"], q["distinct"], percent(q["short"]), percent(q["leaks"]), percent(q["copies"]),
             percent(q["marked"]), percent(q["boilerplate"])]
            for name, q in known
        ],
    )  # fmt: skip
    page.text(
        "Short: fewer than three words besides the label. Copy: nine tenths of the three-word sequences are the input's. "
        "Boilerplate: words in phrases that four fifths of the rationales have.",
        note=True,
    )
