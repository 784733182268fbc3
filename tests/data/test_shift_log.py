"""The long task: labels follow from the named unit's lines alone, wherever they stand."""

from __future__ import annotations

import itertools
import re

import pytest

from sbs_edge.data.builtin import PHRASES, facts_to_label
from sbs_edge.data.load import load_splits
from sbs_edge.data.shift_log import UNITS, ShiftLogSize, shift_log_rows, shift_log_splits

LINE = re.compile(r"(\d\d):(\d\d) (\w+) ([^.]+) \.")
FACT_OF = {
    phrase: (fact, value)
    for fact, values in PHRASES.items()
    for value, phrases in values.items()
    for phrase in phrases
}


@pytest.mark.parametrize("latest", [False, True])
@pytest.mark.parametrize("tokens", [64, 512, 8192])
def test_the_label_follows_from_the_named_units_last_facts(tokens: int, latest: bool) -> None:
    repeated = 0
    for row in shift_log_rows("x", 20, (tokens,), seed=tokens, latest=latest):
        header, _, log = row.input.partition(" | ")
        unit = header.removeprefix("log of ")
        assert unit in UNITS
        lines = LINE.findall(log)
        assert " ".join(f"{h}:{m} {u} {said} ." for h, m, u, said in lines) == log
        told = [(place, *FACT_OF[said]) for place, (*_, about, said) in enumerate(lines)
                if about == unit and said in FACT_OF]  # fmt: skip
        held = {fact: value for _, fact, value in told}
        assert set(held) == set(PHRASES)
        assert row.label == facts_to_label(held["mode"], held["room"], held["supply"])
        assert all(word in (row.rationale or "") for word in held.values())
        n_tokens = len(re.findall(r"\w+|[^\w\s]", row.input))
        assert n_tokens == pytest.approx(tokens, rel=0.1, abs=14)
        assert len(told) == 3 or latest
        repeated += len(told) > 3
        if not latest and tokens > 500:  # one in each third
            third = len(lines) / 3
            assert all(n * third - 1 <= place <= (n + 1) * third + 1 for n, (place, *_) in enumerate(told))
        minutes = [int(h) * 60 + int(m) for h, m, *_ in lines]
        if minutes[-1] > minutes[0]:  # no midnight between
            assert minutes == sorted(minutes)
    assert (repeated > 5) == latest


def test_no_stamp_repeats_and_a_day_is_enough() -> None:
    (row,) = shift_log_rows("x", 1, (8192,), seed=0)
    minutes = [int(h) * 60 + int(m) for h, m, *_ in LINE.findall(row.input)]
    assert len(set(minutes)) == len(minutes)
    assert all(later > earlier for earlier, later in itertools.pairwise(minutes))


def test_a_word_of_the_other_units_says_nothing() -> None:
    """Labels are even whatever the other lines say, so a count of phrases cannot answer."""
    labels = [row.label for row in shift_log_rows("x", 400, (512,), seed=1)]
    assert min(labels.count(label) for label in set(labels)) > 70


def test_splits_are_disjoint_and_only_training_depends_on_the_seed() -> None:
    size = ShiftLogSize(n_train=50, n_validation=20, n_test=20)
    first, second = shift_log_splits(0, size=size), shift_log_splits(1, size=size)
    assert first.test == second.test
    assert first.validation == second.validation
    assert first.train != second.train
    inputs = [row.input for part in (first.train, first.validation, first.test) for row in part]
    assert len(set(inputs)) == 90


@pytest.mark.parametrize(("name", "latest"), [("shift-log", False), ("shift-log-latest", True)])
def test_the_task_is_loaded_by_its_name(name: str, latest: bool) -> None:
    splits = load_splits(name, seed=3)
    assert splits.task.name == name
    assert splits.train[:5] == shift_log_splits(3, latest=latest).train[:5]
