"""Held-out inputs that nearly repeat a training input are found, whatever the number of rows."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from sbs_edge.data.check import check_dataset
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.data.findings import examine
from sbs_edge.data.jsonl import write_examples
from sbs_edge.data.near_duplicates import LEAST_ALIKE, find_near_duplicates
from sbs_edge.data.words import words

TASK = TaskSpec("t", "closed", ("a", "b"))


def _text(rng, n=40):
    return " ".join(f"w{rng.randrange(3000)}" for _ in range(n))


def _rows(texts, name, label="a"):
    return [Example(f"{name}{i}", text, label) for i, text in enumerate(texts)]


def _alike(first, second):
    def sequences(text):
        found = [*words(text), "", ""]
        return {tuple(found[i : i + 3]) for i in range(len(found) - 2)}

    own, other = sequences(first), sequences(second)
    return len(own & other) / len(own | other)


def test_a_changed_word_is_found_and_another_text_is_not():
    rng = random.Random(0)
    train = [_text(rng) for _ in range(9000)]  # more than a batch
    changed = [text.replace(text.split()[20], "changed") for text in train[::90]]
    fresh = [_text(rng) for _ in range(100)]
    found = find_near_duplicates(_rows([*changed, *fresh], "t"), _rows(train, "r"))
    assert len(found) >= 95
    assert all(int(pair.row.id[1:]) * 90 == int(pair.other.id[1:]) for pair in found)
    assert all(pair.alike == _alike(pair.row.input, pair.other.input) >= LEAST_ALIKE for pair in found)
    assert [pair.alike for pair in found] == sorted((pair.alike for pair in found), reverse=True)


def test_punctuation_does_not_hide_a_repeated_input_and_an_equal_one_is_an_overlap():
    held = _rows(["Hello, world!", "the same text"], "t")
    train = _rows(["hello world", "The  same TEXT", "something else entirely"], "r")
    assert [(p.row.id, p.other.id, p.alike) for p in find_near_duplicates(held, train)] == [("t0", "r0", 1.0)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=12), st.lists(st.text(max_size=30), max_size=12))
def test_any_text_is_taken_and_every_pair_is_alike(first, second):
    for pair in find_near_duplicates(_rows(first, "t"), _rows(second, "r")):
        assert pair.alike >= LEAST_ALIKE


def test_only_pairs_with_the_same_label_count_and_a_few_are_let_be():
    rng = random.Random(1)
    train = _rows([_text(rng) for _ in range(300)], "r")
    near = [f"{row.input} again" for row in train[:10]]
    fresh = [_text(rng) for _ in range(90)]

    def codes(label, count):
        test = [*_rows(near[:count], "n", label), *_rows(fresh, "f")]
        splits = Splits(TASK, train, test=test)
        return [f for f in examine(splits) if f.code == "near-duplicates"]

    (finding,) = codes("a", 10)
    assert finding.level == "warn"
    assert finding.message.startswith("10 of 100 rows of test nearly repeat")
    assert sorted(zip(finding.rows, finding.others, strict=True)) == sorted(
        (f"n{i}", f"r{i}") for i in range(10)
    )
    assert codes("b", 10) == []
    assert codes("a", 2) == []


def test_a_single_file_is_judged_by_the_splits_that_training_draws(tmp_path):
    rng = random.Random(2)
    texts = [_text(rng) for _ in range(100)]
    rows = [Example(f"{i}{k}", f"{text} copy {k}", "ab"[i % 2]) for i, text in enumerate(texts) for k in "xy"]
    write_examples(tmp_path / "rows.jsonl", rows)
    report = check_dataset(tmp_path / "rows.jsonl")
    found = {f["figures"]["split"]: f for f in report["findings"] if f["code"] == "near-duplicates"}
    assert set(found) == {"validation", "test"}
    assert report["verdict"] == "warn"
    sample = next(s for s in report["samples"] if "near duplicates" in s["reasons"])
    assert sample["other_input"].split(" copy ")[0] == sample["input"].split(" copy ")[0]
