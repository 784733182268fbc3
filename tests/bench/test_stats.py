"""Percentiles and bootstrap intervals against numpy and scipy; arrivals and batches against theory."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbs_edge.bench.core.stats import paired_ratio, percentiles, unpaired_ratio
from sbs_edge.bench.latency.inputs import mixed_lengths, poisson_arrivals, text_of_length
from sbs_edge.bench.peers.system import plan_batches

positive = st.floats(0.01, 1e4)


@given(st.lists(positive, min_size=1, max_size=60))
def test_percentiles_are_numpys(samples: list[float]) -> None:
    found = percentiles(samples)
    assert list(found) == ["p50", "p90", "p99"]
    assert list(found.values()) == pytest.approx(np.percentile(samples, [50, 90, 99]).tolist())


def test_paired_interval_agrees_with_scipys_bootstrap() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(5)
    drift = rng.lognormal(0, 0.3, 40)  # a machine that slows down for both
    peer, ours = 20 * drift * rng.lognormal(0, 0.05, 40), 10 * drift * rng.lognormal(0, 0.05, 40)
    mine = paired_ratio(peer, ours)
    judge = scipy_stats.bootstrap(
        (peer, ours),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert mine.value == pytest.approx(np.median(peer) / np.median(ours))
    assert (mine.low, mine.high) == pytest.approx((judge.low, judge.high), rel=0.03)


def test_pairing_removes_a_drift_that_both_systems_suffer() -> None:
    rng = np.random.default_rng(7)
    drift = rng.lognormal(0, 0.5, 30)
    paired, unpaired = paired_ratio(2 * drift, drift), unpaired_ratio(2 * drift, drift)
    assert paired.low > 1.9 or paired.high - paired.low < unpaired.high - unpaired.low
    assert paired.value == pytest.approx(2.0)


def test_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(120):
        ours = rng.lognormal(0, 0.1, 15)
        peer = 2 * rng.lognormal(0, 0.1, 15)
        found = paired_ratio(peer, ours)
        hits += found.low <= 2 <= found.high
    assert hits / 120 >= 0.88


@pytest.mark.parametrize(("top", "bottom"), [([1.0], [1.0, 2.0]), ([], [])])
def test_rounds_that_do_not_pair_are_refused(top: list[float], bottom: list[float]) -> None:
    with pytest.raises(ValueError, match="paired rounds"):
        paired_ratio(top, bottom)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=50),
    st.one_of(
        st.builds(lambda n: {"batch": n}, st.integers(1, 9)),
        st.builds(lambda n: {"tokens": n}, st.integers(16, 2048)),
    ),
)
def test_batches_hold_every_request_once_and_keep_their_budget(
    lengths: list[int], setting: dict[str, int]
) -> None:
    batches = plan_batches(lengths, setting)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        if "batch" in setting:
            assert len(batch) <= setting["batch"]
        elif len(batch) > 1:
            assert len(batch) * max(lengths[index] for index in batch) <= setting["tokens"]


def test_arrivals_have_the_gaps_of_a_poisson_process() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    arrivals = poisson_arrivals(50.0, 1e9, random.Random(3), most=2000)
    gaps = np.diff([0.0, *arrivals])
    assert scipy_stats.kstest(gaps, "expon", args=(0, 1 / 50)).pvalue > 0.01


def test_mixed_lengths_stay_inside_and_spread() -> None:
    found = mixed_lengths(2000, 16, 256, random.Random(0))
    assert min(found) == 16
    assert max(found) == 256
    assert 60 < np.median(found) < 75


@given(st.integers(3, 120))
def test_a_text_has_the_tokens_asked_for(tokens: int) -> None:
    """A tokenizer whose words cost 1 to 3 tokens, plus two for prefix and EOS."""
    words = ["a", "bb", "ccc"]

    def count(text: str) -> int:
        return 2 + sum(map(len, text.split()))

    assert count(text_of_length(words, tokens, count, random.Random(tokens))) == tokens


def test_a_text_never_exceeds_the_length_where_no_word_fits() -> None:
    def count(text: str) -> int:
        return 2 + 3 * len(text.split())

    assert count(text_of_length(["x", "y"], 64, count, random.Random(0))) == 62
