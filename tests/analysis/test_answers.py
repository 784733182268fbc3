"""The error analysis counts what it says: confusion, precision, reliability, groups, slices, errors, intervals."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.analysis.answers import analyse_answers
from sbs_edge.analysis.intervals import accuracy_of
from sbs_edge.analysis.reliability import expected_calibration_error
from sbs_edge.data.answers import same_answer
from sbs_edge.data.columns import column_values
from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.data.readers import read_examples
from sbs_edge.errors import UsageError
from sbs_edge.report.analysis import _distinct, analysis_headline, analysis_lines, evaluation_page

TASK = TaskSpec("t", "closed", ("a", "b", "c"))
WANTED = ["a", "a", "a", "b", "b", "c"]
GIVEN = ["a", "a", "b", "b", "a", "b"]
SURE = [0.9, 0.8, 0.95, 0.6, 0.5, 0.99]


def _rows(labels=WANTED):
    return [Example(str(i), f"text {i}", label, None, f"why {i}") for i, label in enumerate(labels)]


def _analyse(rows, given, sure, task=TASK, n_tokens=None, **more):
    same = partial(same_answer, compare=task.compare)
    return analyse_answers(rows, given, sure, n_tokens or [9] * len(rows), task, same, **more)


def test_precision_recall_and_confusion_are_counted_by_hand():
    found = _analyse(_rows(), GIVEN, SURE)
    assert (found["reference"], found["n"], found["accuracy"]) == ("gold", 6, 0.5)
    assert found["confusion"] == {"labels": ["a", "b", "c"], "counts": [[2, 1, 0], [1, 1, 0], [0, 1, 0]]}
    a, b, c = found["labels"]
    assert (a["rows"], a["answered"], a["precision"], a["recall"], a["f1"]) == (3, 3, 2 / 3, 2 / 3, 2 / 3)
    assert (b["precision"], b["recall"], b["f1"]) == (1 / 3, 1 / 2, 0.4)
    assert (c["answered"], c["precision"], c["recall"], c["f1"]) == (0, None, 0.0, 0.0)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.4 + 0) / 3)
    assert found["majority"] == {"label": "a", "share": 0.5}
    assert (found["gain"]["points"], found["gain"]["n"]) == (0.0, 6)
    assert {(c["wanted"], c["label"], c["rows"]) for c in found["confusions"]} == {
        ("a", "b", 1), ("b", "a", 1), ("c", "b", 1),
    }  # fmt: skip


def test_the_surest_error_stands_first_with_input_labels_and_rationales():
    found = _analyse(_rows(), GIVEN, SURE, explain=lambda rows: [f"because {row.id}" for row in rows])
    assert [(e["id"], e["probability"]) for e in found["errors"]] == [("5", 0.99), ("2", 0.95), ("4", 0.5)]
    assert found["errors"][0] == {
        "id": "5", "source": "", "input": "text 5", "wanted": "c", "label": "b", "probability": 0.99,
        "rationale": "because 5", "teacher_label": None, "teacher_rationale": "why 5",
    }  # fmt: skip
    assert [e["rationale"] for e in _analyse(_rows(), GIVEN, SURE)["errors"]] == [None] * 3


def test_reliability_has_the_gap_of_every_bin():
    found = _analyse(_rows(list("aaaa")), list("aabb"), [0.9, 0.9, 0.9, 0.3])["reliability"]
    assert [(b["n"], b["accuracy"]) for b in found["bins"]] == [(1, 0.0), (3, pytest.approx(2 / 3))]
    assert found["ece"] == pytest.approx(0.25 * 0.3 + 0.75 * (0.9 - 2 / 3))
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0
    assert _analyse(_rows(), GIVEN, [None] * 6)["reliability"] is None


def test_lengths_fall_into_groups_of_equal_size_and_equal_lengths_stay_together():
    rows = _rows(["a"] * 100)
    lengths = [*range(1, 51), *[60] * 50]
    given_labels = ["a"] * 50 + ["b"] * 25 + ["a"] * 25
    found = _analyse(rows, given_labels, [0.5] * 100, n_tokens=lengths)["lengths"]
    assert sum(group["n"] for group in found) == 100
    assert (found[-1]["from"], found[-1]["to"], found[-1]["n"], found[-1]["accuracy"]) == (60, 60, 50, 0.5)
    assert all(group["accuracy"] == 1.0 for group in found[:-1])


def test_slices_are_read_from_the_rows_own_file(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"input": "one", "label": "a", "region": "north", "age": 3}\n\n'
        '{"input": "two", "label": "b", "region": "south"}\n'
        '{"input": "three", "label": "b", "region": "north"}\n'
    )
    rows = read_examples(file).examples
    values = column_values(rows, ["region", "age"])
    assert values == {"region": ["north", "south", "north"], "age": ["3", "(none)", "(none)"]}
    found = _analyse(rows, ["a", "a", "b"], [0.5] * 3, slices=values)["slices"]["region"]
    assert [(s["value"], s["n"], s["accuracy"]) for s in found] == [("north", 2, 1.0), ("south", 1, 0.0)]
    with pytest.raises(UsageError, match=r"column 'town'.*age, input, label, region"):
        column_values(rows, ["town"])
    with pytest.raises(UsageError, match="comes from no file"):
        column_values([Example("1", "x", "a")], ["region"])


def test_a_column_of_many_numbers_is_grouped_and_one_of_many_words_is_cut():
    rows = _rows(["a"] * 60)
    values = {"age": [str(i) for i in range(60)], "name": [f"n{i}" for i in range(59)] + ["n0"]}
    found = _analyse(rows, ["a"] * 60, [0.5] * 60, slices=values)["slices"]
    assert [s["value"] for s in found["age"]] == ["0 to 11", "12 to 23", "24 to 35", "36 to 47", "48 to 59"]
    assert (found["name"][0]["value"], found["name"][0]["n"]) == ("n0", 2)
    assert (found["name"][-1]["value"], found["name"][-1]["n"]) == ("(other)", 39)


def test_labels_that_differ_from_row_to_row_have_no_matrix():
    rows = [Example(str(i), "x", f"l{i}", choices=(f"l{i}", "no")) for i in range(9)]
    found = _analyse(rows, ["no"] * 9, [0.5] * 9, TaskSpec("t", "choices"))
    assert (found["confusion"], found["labels"], found["gain"]) == (None, [], None)
    assert len(found["errors"]) == 9


def test_an_open_answer_outside_the_right_labels_counts_as_other():
    found = _analyse(_rows(list("aabb")), ["a", "so", "b", ""], [0.5] * 4, TaskSpec("t", "open"))
    assert found["confusion"]["labels"] == ["a", "b", "(other)"]
    assert found["confusion"]["counts"] == [[1, 0, 1], [0, 1, 1], [0, 0, 0]]


def test_without_gold_the_teacher_is_the_judge_and_without_both_there_is_no_analysis():
    rows = [Example("1", "x", None, "a"), Example("2", "y", None, "b")]
    found = _analyse(rows, ["a", "a"], [0.5, 0.5])
    assert (found["reference"], found["accuracy"]) == ("teacher", 0.5)
    assert "teacher's label" in analysis_headline(found)
    assert _analyse([Example("1", "x")], ["a"], [0.5]) is None


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_an_interval_holds_its_accuracy(right):
    found = accuracy_of(right)
    assert 0 <= found["low"] <= found["accuracy"] + 1e-4
    assert found["accuracy"] - 1e-4 <= found["high"] <= 1
    assert found["low"] < found["high"]


def test_wilson_interval_is_the_textbook_one():
    # Agresti and Coull 1998: 10 of 10 gives (0.722, 1).
    assert accuracy_of([True] * 10)["low"] == pytest.approx(0.7225, abs=1e-4)
    assert accuracy_of([True] * 8 + [False] * 2)["high"] == pytest.approx(0.9433, abs=1e-4)


def test_the_page_opens_with_the_result_and_escapes_every_text():
    rows = [Example(str(i), f"<b>text {i}</b>", label) for i, label in enumerate(WANTED)]
    analysis = _analyse(rows, GIVEN, SURE, slices={"region": list("xxxyyy")})
    report = {"n": 6, "method": "trie", "teacher_agreement": None, "analysis": analysis}
    page = evaluation_page(report, "student", "test.jsonl")
    body = page[page.index("<h1>") :]
    assert body.index("50.0 % of 6 rows (95 % interval 18.8 to 81.2)") < body.index("<h2>")
    assert "<b>" not in page
    assert "&lt;b&gt;text 5&lt;/b&gt;" in page
    assert "1. b, 99.0 % sure; right: c" in page
    assert body.count("<svg") == 2
    assert _distinct(["x" * 30 + "a", "x" * 30 + "b", "x" * 40 + "a", "y"]) == [
        "x" * 11 + "…" + "x" * 10 + "a (1)", "x" * 11 + "…" + "x" * 10 + "b", "x" * 11 + "…" + "x" * 10 + "a (2)", "y",
    ]  # fmt: skip
    lines = analysis_lines(analysis)
    assert "lowest for 'c': F1 0.000" in lines[1]
    assert any(line.startswith("Least accurate region: y, 33.3 % of 3 rows") for line in lines)
