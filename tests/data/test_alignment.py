"""Labels and rationales that stand beside the wrong rows are found, and rightly placed ones are left alone."""

from __future__ import annotations

import dataclasses
import random

import pytest

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.check import check_dataset
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.data.findings import examine
from sbs_edge.data.load import load_splits

ANIMALS = ("otter", "heron", "badger", "weasel", "magpie", "lizard")


def _moved(rows, field, shift):
    """Row i gets the value that belongs to row i + shift."""
    values = [getattr(row, field) for row in rows]
    return [
        dataclasses.replace(row, **{field: values[(i + shift) % len(rows)]}) for i, row in enumerate(rows)
    ]


def _rows(n=240, seed=0):
    rng = random.Random(seed)
    found = []
    for i in range(n):
        animal, place = rng.choice(ANIMALS), f"place{rng.randrange(10**6)}"
        text = f"somebody saw the {animal} near {place} in the morning"
        found.append(Example(str(i), text, animal[0], None, f"at {place} there lives the {animal}"))
    return found


def _splits(rows, kind="closed"):
    labels = tuple(sorted({row.label for row in rows})) if kind == "closed" else ()
    return Splits(TaskSpec("t", kind, labels), rows)


def _shifts(splits, mode=None):
    return [
        (f.figures["field"], f.figures["shift"]) for f in examine(splits, mode) if f.code == "shifted-rows"
    ]


@pytest.mark.parametrize("shift", [1, -1, 5])
def test_rationales_and_labels_beside_the_wrong_rows_stop(shift):
    rows = _rows()
    assert _shifts(_splits(rows)) == []
    # The rationale of row i + shift shares its words with the input there.
    assert _shifts(_splits(_moved(rows, "rationale", shift))) == [("rationale", shift)]
    # The label that belongs to row i stands at row i - shift.
    assert _shifts(_splits(_moved(rows, "label", shift))) == [("label", -shift)]
    moved = _splits(_moved(rows, "rationale", shift))
    assert _shifts(moved, "finetune") == []
    found = next(f for f in examine(moved) if f.code == "shifted-rows")
    assert found.level == "stop"
    assert found.figures["shifted"] > 0.95
    assert found.figures["own"] < 0.3


def test_open_labels_are_compared_with_their_inputs():
    rows = [
        Example(str(i), f"Ann has {i * 7} pens and {i * 3} cards", f"( {i * 7}.0 + {i * 3}.0 )")
        for i in range(99)
    ]
    assert _shifts(_splits(rows, "open")) == []
    assert _shifts(_splits(_moved(rows, "label", 2), "open")) == [("label", 2)]


def test_rationales_without_the_inputs_words_are_told_by_what_they_go_with():
    splits = builtin_splits("ci")
    assert _shifts(splits) == []
    moved = dataclasses.replace(splits, train=_moved(splits.train, "rationale", 1))
    assert _shifts(moved) == [("rationale", -1)]


@pytest.mark.parametrize("order", ["sorted", "random labels", "triplets"])
def test_no_false_alarm(order):
    rows = _rows()
    if order == "sorted":
        rows = sorted(rows, key=lambda row: row.label)
    elif order == "random labels":
        rng = random.Random(1)
        rows = [dataclasses.replace(row, label=rng.choice("abc")) for row in rows]
    else:  # three labels in a fixed order for each premise, as in natural language inference
        rows = [
            dataclasses.replace(row, id=f"{row.id}{label}", label=label, input=f"{row.input} {word} {i}")
            for i, row in enumerate(rows[:80])
            for label, word in (("e", "so it was there"), ("n", "perhaps hungry"), ("c", "nobody saw it"))
        ]
    assert _shifts(_splits(rows)) == []


@pytest.mark.parametrize("name", ["cqa", "svamp"])
def test_the_papers_data_stands_right_and_is_found_when_moved(paper_data, name):
    report = check_dataset(paper_data, dataset=name)
    assert report["verdict"] == {"cqa": "warn", "svamp": "ok"}[name]
    assert {f["code"] for f in report["findings"]} <= {"foreign-labels"}
    splits = load_splits(paper_data, dataset=name)
    for shift in (1, -3):
        moved = dataclasses.replace(splits, test=_moved(splits.test, "rationale", shift))
        assert _shifts(moved) == [("rationale", shift)]
