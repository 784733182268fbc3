"""The accuracy check of rationales counts how often the same token follows the same beginning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.export.check.accuracy import compare_rationales, drifted

texts = st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=6)


@pytest.mark.parametrize(
    ("reference", "got", "same", "followed"),
    [
        ([[5, 6, 7, 1]], [[5, 6, 7, 1]], 1.0, 1.0),
        # One token turned, and the same words a place later: a reader sees a sixth, the student erred once in two.
        ([[5, 6, 7, 8, 9]], [[5, 0, 6, 7, 8, 9]], 1 / 6, 1 / 2),
        ([[5, 6, 1]], [[5, 6]], 2 / 3, 2 / 3),  # it did not end where the reference ended
        ([[5, 1], [6, 7, 1]], [[5, 1], [0, 0, 0]], 2 / 5, 2 / 3),
        ([[5, 1]], [[]], 0.0, 0.0),
        ([], [], 1.0, 1.0),
        ([[]], [[]], 1.0, 1.0),
    ],
)
def test_agreements_by_hand(
    reference: list[list[int]], got: list[list[int]], same: float, followed: float
) -> None:
    figures = compare_rationales(reference, got)
    assert figures["rationale_token_agreement"] == pytest.approx(same)
    assert figures["rationale_next_token_agreement"] == pytest.approx(followed)
    assert drifted(figures, 0.9) == (followed < 0.9)


@given(texts, texts)
def test_agreements_are_shares_and_one_only_for_equal_texts(
    first: list[list[int]], second: list[list[int]]
) -> None:
    pairs = min(len(first), len(second))
    first, second = first[:pairs], second[:pairs]
    forth, back = compare_rationales(first, second), compare_rationales(second, first)
    assert forth == back
    for name in ("rationale_token_agreement", "rationale_next_token_agreement"):
        assert 0.0 <= forth[name] <= 1.0
        assert (forth[name] == 1.0) == (first == second)


def test_figures_without_rationales_refuse_nothing() -> None:
    assert not drifted({"drop_points": 0.0}, 1.0)
