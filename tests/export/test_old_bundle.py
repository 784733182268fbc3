"""A bundle written by version 0.1 loads, passes its integrity check and gives the answers recorded then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbs_edge.runtime.bundle import Bundle
from sbs_edge.runtime.student import Student

DATA = Path(__file__).parents[1] / "data_files"
BUNDLE = DATA / "bundle-0.1"
RECORDED = json.loads((DATA / "bundle-0.1-answers.json").read_text(encoding="utf-8"))


def test_an_old_bundle_is_intact() -> None:
    assert Bundle.open(BUNDLE).target("cpu-fp32")[0] == "cpu-fp32"


def test_an_old_bundle_gives_the_recorded_answers() -> None:
    rows = RECORDED["rows"]
    texts = [row["input"] for row in rows]
    with Student.load(BUNDLE) as student:
        labels = student.predict(texts)
        choices = student.predict(texts, labels=RECORDED["choices"])
        rationales = student.explain(texts)
    assert [answer.label for answer in labels] == [row["label"] for row in rows]
    assert [answer.rationale for answer in rationales] == [row["rationale"] for row in rows]
    assert [answer.complete for answer in rationales] == [row["complete"] for row in rows]
    for row, answer, chosen in zip(rows, labels, choices, strict=True):
        assert dict(answer.probabilities) == pytest.approx(row["probabilities"], abs=1e-5)
        assert dict(chosen.probabilities) == pytest.approx(row["among_choices"], abs=1e-5)
