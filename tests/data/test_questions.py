"""Rows to answer: what is refused, what an id becomes, and that a row's choices cost no other row anything."""

from __future__ import annotations

import datetime
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.data.questions import Unanswerable, answers_of, choices_of, id_of, text_of
from sbs_edge.errors import UsageError


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans() | st.dates() | st.decimals())
def test_an_id_is_always_written(value):
    identity = id_of(value)
    json.dumps(identity, ensure_ascii=False, allow_nan=False).encode("utf-8")
    if not isinstance(value, float | str):
        assert identity == (value if isinstance(value, int | None) else str(value))


def test_ids_beyond_utf8_and_json():
    assert id_of("a\ud800") == "a\\ud800"
    assert id_of(float("nan")) is None
    assert id_of(2**70) == 2**70
    assert id_of(datetime.date(2026, 11, 23)) == "2026-11-23"
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Unanswerable, match="nested too deeply"):
        id_of(deep)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, r"no text in the column 'input' \(it has text\)"),
        ({"\ud800": 1}, r"it has \\ud800"),
        ({"input": 3}, "not text"),
        ({"input": " \n"}, "is empty"),
        ({"input": "so \ud800"}, r"character 4 is \\ud800"),
    ],
)
def test_what_is_no_text(row, said):
    with pytest.raises(Unanswerable, match=said):
        text_of(row, "input")


@pytest.mark.parametrize("cell", [["a", "b", "a"], ("a", "b"), "a|b", '["a", "b"]'])
def test_choices_of_a_list_and_of_a_cell(cell):
    assert choices_of(cell) == ["a", "b"]


@pytest.mark.parametrize(
    "cell", [5, {"a": 1, "b": 2}, [], [1, 2], [["a"]], "[1", "[" * 100_000, ["a", "\ud800"], "a|\ud800"]
)
def test_what_are_no_choices(cell):
    with pytest.raises(Unanswerable, match="choices"):
        choices_of(cell)


class Student:
    """Answers with what it was given; ``bad`` cannot be chosen."""

    def __init__(self, method):
        self.manifest = {"labels": {"method": method}}

    def predict(self, texts, labels=None, tokens=None):
        if labels and any("bad" in names for names in labels):
            raise UsageError("no such label")
        return [(text, labels and tuple(labels[i]), tokens and tokens[i]) for i, text in enumerate(texts)]


@given(st.lists(st.sampled_from([None, ("a", "b"), ("bad", "b")]), max_size=12), st.booleans())
def test_every_row_is_answered_as_if_it_were_alone(choices, with_tokens):
    texts = [f"text {i}" for i in range(len(choices))]
    tokens = [[i] for i in range(len(choices))] if with_tokens else None
    answers = answers_of(Student("first-token"), texts, choices, tokens=tokens)
    for i, (answer, names) in enumerate(zip(answers, choices, strict=True)):
        if names and "bad" in names:
            assert isinstance(answer, UsageError)
        else:
            assert answer == (texts[i], names, tokens and tokens[i])


def test_rows_without_choices_where_rows_bring_their_own():
    lacking, answer = answers_of(Student("choices"), ["x", "y"], [None, ("a", "b")])
    assert "no 'choices'" in str(lacking)
    assert answer == ("y", ("a", "b"), None)


def test_a_request_that_is_wrong_for_every_row_is_no_rows_fault():
    with pytest.raises(UsageError, match="no such label"):
        answers_of(Student("choices"), ["x", "y"], [None, ("a", "b")], ["bad", "b"])
