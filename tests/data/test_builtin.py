"""The built-in task does what its docs say: no fact alone tells the label, no split leaks, errors are consistent."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from sbs_edge.data.builtin import LABELS, PHRASES, SIZES, builtin_splits, facts_to_label
from sbs_edge.data.splits import check_disjoint
from sbs_edge.data.targets import teacher_agreement
from sbs_edge.errors import UsageError

VALUES = {fact: tuple(values) for fact, values in PHRASES.items()}


def _facts_in(text):
    """Find the three facts of a ticket from its phrases alone."""
    found = [
        (fact, value, phrase)
        for sentence in text.removesuffix(" .").split(" . ")
        for fact, values in PHRASES.items()
        for value, phrases in values.items()
        for phrase in phrases
        if phrase == sentence
    ]
    assert len(found) == 3
    by_fact = {fact: (value, phrase) for fact, value, phrase in found}
    return tuple(by_fact[fact][0] for fact in VALUES), tuple(by_fact[fact][1] for fact in VALUES)


def _facts_of_rationale(text):
    found = re.search(r"(heating|cooling) mode , (?:the )?room (?:is )?(below|above) .*(warm|cold)", text)
    assert found is not None
    return found.groups()


def test_all_three_facts_are_needed():
    """Over the 8 equally likely cells: best guess from one fact 25 %, from two 50 %, from three 100 %."""
    cells = [(*cell, facts_to_label(*cell)) for cell in itertools.product(*VALUES.values())]
    assert Counter(cell[3] for cell in cells) == dict.fromkeys(LABELS, 2)
    for known, best in ((1, 0.25), (2, 0.5), (3, 1.0)):
        for columns in itertools.combinations(range(3), known):
            groups: dict = {}
            for cell in cells:
                groups.setdefault(tuple(cell[c] for c in columns), Counter())[cell[3]] += 1
            assert sum(max(group.values()) for group in groups.values()) / 8 == best


def test_every_phrase_means_one_thing():
    phrases = [p for values in PHRASES.values() for those in values.values() for p in those]
    assert len(phrases) == len(set(phrases)) == 72
    assert all(" . " not in phrase for phrase in phrases)


@pytest.mark.parametrize("size", list(SIZES))
def test_rows_say_what_they_mean_and_splits_do_not_leak(size):
    splits = builtin_splits(size)
    chosen = SIZES[size]
    keys = {}
    for name, count in (
        ("train", chosen.n_train),
        ("validation", chosen.n_validation),
        ("test", chosen.n_test),
    ):
        rows = getattr(splits, name)
        assert len(rows) == count == len({row.id for row in rows})
        for row in rows:
            facts, phrases = _facts_in(row.input)
            assert row.label == row.teacher_label == facts_to_label(*facts)
            assert _facts_of_rationale(row.rationale) == facts
            assert not set(row.rationale.split()) & set(LABELS)
            keys.setdefault(name, set()).add(phrases)
        counts = Counter(row.label for row in rows)
        assert set(counts) == set(LABELS)
        assert max(counts.values()) / count < 0.34
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]
    check_disjoint(splits)


def test_seeds_redraw_training_only():
    first, again, other = builtin_splits("ci"), builtin_splits("ci"), builtin_splits("ci", seed=1)
    assert first == again
    assert first.train != other.train
    assert (first.validation, first.test) == (other.validation, other.test)
    assert builtin_splits("ci", n_train=50).train == first.train[:50]


def test_a_wrong_teacher_is_wrong_at_the_set_rate_and_argues_for_its_answer():
    clean, noisy = builtin_splits(), builtin_splits(teacher_error=0.25)
    agreement = teacher_agreement(noisy.train, "text")
    # 1000 draws at 0.75: five standard deviations are 68
    assert abs(agreement["equal"] - 750) < 68
    for right, wrong in zip(clean.train, noisy.train, strict=True):
        assert (right.input, right.label) == (wrong.input, wrong.label)
        assert wrong.teacher_label == facts_to_label(*_facts_of_rationale(wrong.rationale))
    assert teacher_agreement(builtin_splits(teacher_error=1.0).train, "text")["equal"] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": "huge"},
        {"teacher_error": 1.5},
        {"teacher_error": float("nan")},
        {"n_train": 0},
        {"n_train": 10**8},
    ],
)
def test_wrong_requests_are_refused(wrong):
    with pytest.raises(UsageError):
        builtin_splits(**wrong)


def test_a_teacher_asked_several_times_votes_and_keeps_what_agrees():
    splits = builtin_splits(teacher_error=0.25, teacher_samples=8)
    assert [row.input for row in splits.train] == [row.input for row in builtin_splits().train]
    wrong = sum(dict(row.teacher_probs).get(row.label, 0.0) < 0.5 for row in splits.train)
    mean = sum(1.0 - dict(row.teacher_probs).get(row.label, 0.0) for row in splits.train) / len(splits.train)
    assert mean == pytest.approx(0.25, abs=0.04)
    assert 100 < wrong < 300
    assert any(row.confidence == 1.0 for row in splits.train if row.teacher_label != row.label)
    for row in splits.train:
        shares = dict(row.teacher_probs)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert row.confidence == shares[row.teacher_label] == max(shares.values())
        kept = row.rationales or (row.rationale,)
        assert kept[0] == row.rationale
        assert len(set(kept)) == len(kept)
        for text in kept:  # each argues for the label, or says less
            facts = [
                value
                for value in ("heating", "cooling", "below", "above", "warm", "cold")
                if value in text.split()
            ]
            assert len(facts) in (1, 3)
            if len(facts) == 3:
                assert facts_to_label(*facts) == row.teacher_label


def test_a_linear_model_on_words_finds_no_shortcut():
    """A bag-of-words logistic regression, which sees every word, stays near the 25 % of guessing."""
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    splits = builtin_splits()
    words = text.CountVectorizer()
    model = linear.LogisticRegression(max_iter=500)
    model.fit(words.fit_transform([row.input for row in splits.train]), [row.label for row in splits.train])
    score = model.score(
        words.transform([row.input for row in splits.test]), [row.label for row in splits.test]
    )
    assert score < 0.33
