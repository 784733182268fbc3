"""Rationales and labels from which little can be learnt are named with their numbers, and rows to read are shown."""

from __future__ import annotations

import json
import random

import pytest

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.check import check_dataset
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.data.findings import examine
from sbs_edge.data.jsonl import write_examples
from sbs_edge.data.rationale_checks import rationale_figures

TASK = TaskSpec("t", "closed", ("adjust", "wait"))


def _rows(rationale, n=60, teacher=None):
    rng = random.Random(0)
    rows = []
    for i in range(n):
        label = TASK.labels[i % 2]
        text = " ".join(f"w{rng.randrange(500)}" for _ in range(12))
        told = teacher(i, label) if teacher else label
        rows.append(Example(str(i), text, label, told, rationale(i, label, text)))
    return rows


def _found(rows, mode=None, **more):
    return {f.code: f for f in examine(Splits(TASK, rows, **more), mode)}


def good(i, label, text):
    return f"because number {i * 37} is high and {text.split()[3]} is told, it is best to {label}"


def test_good_rationales_have_no_finding():
    assert _found(_rows(good)) == {}
    figures = rationale_figures(_rows(good), None)
    assert (figures["n"], figures["distinct"], figures["leaks"], figures["copies"]) == (60, 60, 1.0, 0.0)


@pytest.mark.parametrize(
    ("code", "rationale", "count"),
    [
        (
            "short-rationales",
            lambda i, label, text: f"so {label}" if i < 6 else good(i, label, text),
            "6 of 60",
        ),
        ("copied-rationales", lambda i, label, text: text if i < 15 else good(i, label, text), "15 of 60"),
        (
            "answers-in-rationales",
            lambda i, label, text: good(i, label, text) + ". The answer is x",
            "60 of 60",
        ),
        (
            "rationale-is-label",
            lambda i, label, text: f"the ticket asks for what we call {label}",
            "60 of 60",
        ),
        ("boilerplate", lambda i, label, text: f"let us think about it step by step and we see {i}", "92%"),
    ],
)
def test_each_fault_of_rationales_is_named_with_its_number(code, rationale, count):
    rows = _rows(rationale)
    finding = _found(rows)[code]
    assert finding.level == "warn"
    assert count in finding.message
    assert _found(rows, "finetune") == {}
    assert code not in _found(_rows(good))
    if code == "short-rationales":
        assert set(finding.rows) == {"0", "1", "2", "3", "4", "5"}


def test_a_teacher_that_is_often_wrong_is_named_with_the_label_it_misses():
    rows = _rows(good, 100, teacher=lambda i, label: "adjust" if label == "adjust" or i % 4 == 1 else "wait")
    found = _found(rows)
    assert "teacher-noise" not in found  # 25 of 100 rows, as the paper's teacher
    assert "'wait' 25 of 50" in found["teacher-misses-label"].message
    rows = _rows(good, 100, teacher=lambda i, label: "adjust" if i % 5 < 2 else label)
    assert "teacher-noise" not in _found(rows)
    rows = _rows(good, 100, teacher=lambda i, label: TASK.labels[(i // 3) % 2])
    assert _found(rows)["teacher-noise"].figures["wrong"] == 33


def test_other_shares_of_labels_in_a_held_out_split_are_named():
    rows, test = (
        _rows(good, 200),
        [row for row in _rows(good, 260) if row.label == "wait" or int(row.id) < 40],
    )
    test = [Example(f"t{row.id}", f"{row.input} now", row.label) for row in test]
    finding = _found(rows, test=test)["labels-differ"]
    assert finding.figures == {"split": "test", "distance": pytest.approx(0.5 - 20 / 150, abs=1e-3)}
    assert "labels-differ" not in _found(rows, test=test[:40])


def test_the_page_and_the_samples_show_the_worst_first(tmp_path, sbs_edge_cli):
    rows = _rows(lambda i, label, text: "<so>" if i < 6 else good(i, label, text))
    rows[2] = Example("2", rows[2].input, "adjust", "wait", "<so>")
    write_examples(tmp_path / "rows.jsonl", rows)
    page = tmp_path / "page.html"
    done = sbs_edge_cli("data", "check", tmp_path / "rows.jsonl", "--page", page, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "warn"
    first = report["samples"][0]
    assert (first["row"].endswith(":3"), first["label"], first["teacher_label"]) == (True, "adjust", "wait")
    assert first["reasons"] == [
        "short rationales", "the teacher's label is not the gold one", "1 word(s) of the rationale besides the label",
    ]  # fmt: skip
    assert [sample["reasons"] for sample in report["samples"][-5:]] == [["drawn at random"]] * 5
    shown = page.read_text()
    assert shown.index("Verdict warn") < shown.index("<h2>")
    assert "<so>" not in shown
    assert shown.count("<article>") == len(report["samples"])
    strict = sbs_edge_cli("data", "check", tmp_path / "rows.jsonl", "--strict")
    assert (strict.returncode, "Verdict: warn." in strict.stdout) == (2, True)


def test_the_built_in_task_is_ok_in_every_mode_and_with_an_erring_teacher():
    for mode in (None, "finetune", "distill", "stepwise", "stepwise-teacher"):
        assert check_dataset(mode=mode)["verdict"] == "ok"
    assert examine(builtin_splits(teacher_error=0.25)) == []
