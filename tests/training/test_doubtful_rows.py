"""A teacher that errs: rationales first, then without the rows whose rationales stand apart."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.errors import UsageError
from sbs_edge.training.batches import Batches, Collator, Encoded, MemoryRows
from sbs_edge.training.config import TrainConfig
from sbs_edge.training.doubt import LEAST_ROWS, doubtful
from sbs_edge.training.evaluate import evaluate
from sbs_edge.training.train import train


def groups(low: int, high: int, ratio: float, seed: int) -> torch.Tensor:
    drawn = torch.randn(low + high, generator=torch.Generator().manual_seed(seed)).mul(0.3).exp()
    return torch.cat([drawn[:low], ratio * drawn[low:]])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(60, 600),
    st.floats(0.05, 0.45),
    st.floats(20.0, 100.0),
    st.integers(0, 10**6),
    st.floats(1e-3, 1e3),
)
def test_rows_that_stand_apart_are_found_whatever_the_unit(count, share, ratio, seed, unit):
    high = max(3, int(share * count))
    found = doubtful(unit * groups(count - high, high, ratio, seed))
    assert found.tolist() == [False] * (count - high) + [True] * high


@pytest.mark.parametrize("count", [50, 200, 1000])
def test_one_group_is_left_whole(count):
    found = [bool(doubtful(groups(count, 0, 1.0, seed)).any()) for seed in range(200)]
    assert sum(found) <= 2


def test_most_rows_are_never_dropped_and_few_rows_never_split():
    assert not doubtful(groups(40, 60, 30.0, 0)).any()
    assert not doubtful(groups(LEAST_ROWS - 11, 10, 30.0, 0)).any()
    assert not doubtful(torch.zeros(100)).any()
    assert not doubtful(torch.empty(0)).any()
    assert int(doubtful(groups(LEAST_ROWS - 10, 10, 30.0, 0)).sum()) == 10


def test_labels_join_at_their_row_and_a_row_without_rationale_never_waits():
    both = Encoded((([5, 1], [6, 1]), ([7, 1], [8, 9, 1])))
    label = Encoded((([5, 1], [6, 1]), None))
    rows = MemoryRows([both, both, label, both], 0)
    collate = Collator(pad_id=0, eos_id=1, start_id=0)

    def tokens(start_row):
        batches = Batches(
            rows, collate, start_row=start_row, labels_from=8, steps=3 - start_row // 4, batch_size=4
        )
        return [
            (
                int((b["segment_ids"][b["valid_indices"]] == 0).sum()),
                int((b["segment_ids"][b["valid_indices"]] == 1).sum()),
            )
            for b in batches
        ]

    assert tokens(0) == [(2, 9), (2, 9), (8, 9)]
    assert tokens(4) == tokens(0)[1:]


def test_dropped_rows_leave_the_order_from_their_position_on():
    some = [Encoded((([5, 1], [index, 1]), None)) for index in range(10, 20)]
    rows = MemoryRows(some, 3)
    before = list(itertools.islice(rows.starting_at(0), 60))
    reading = rows.starting_at(0)
    first = [next(reading) for _ in range(14)]
    rows.drop({2, 5, 7}, 14)
    rest = [next(reading) for _ in range(35)]
    assert first == before[:14]
    kept = [row for index, row in enumerate(some) if index not in {2, 5, 7}]
    for start in range(0, 35, 7):  # every epoch has each kept row once
        assert sorted(row.tasks[0][1] for row in rest[start : start + 7]) == [row.tasks[0][1] for row in kept]
    assert rest[:7] != rest[7:14]
    # A reader that starts later or earlier gets the same rows.
    assert list(itertools.islice(rows.starting_at(20), 29)) == rest[6:]
    assert list(itertools.islice(rows.starting_at(9), 40)) == [*first[9:], *rest]


@pytest.mark.parametrize(
    ("fields", "head_start", "drops"),
    [
        ({"mode": "stepwise-teacher"}, 0.4, True),
        ({"mode": "stepwise-teacher", "model": "a checkpoint"}, 0.0, False),
        ({"mode": "stepwise-teacher", "head_start": 0.2}, 0.2, False),
        ({"mode": "stepwise-teacher", "head_start": 0.0, "drop_doubtful": True}, 0.0, True),
        ({"mode": "stepwise-teacher", "drop_doubtful": False}, 0.4, False),
        ({"mode": "stepwise"}, 0.0, False),
        ({"mode": "distill", "head_start": 0.5, "drop_doubtful": True}, 0.0, False),
    ],
)
def test_the_default_is_for_students_from_scratch_in_the_teachers_mode(fields, head_start, drops):
    config = TrainConfig(**fields)
    assert (config.head_start_, config.drop_doubtful_) == (head_start, drops)


def test_rows_are_scored_again_as_far_as_that_is_cheap():
    config = TrainConfig(mode="stepwise-teacher")
    assert config.score_steps(600, 32) == [240, 300, 360, 420]  # 19 epochs
    assert config.score_steps(600, 10) == [240, 300, 360, 420, 480]
    assert config.score_steps(600, 600) == [240]
    assert config.score_steps(5, 1) == [2]
    assert TrainConfig(mode="stepwise-teacher", head_start=0.9, drop_doubtful=True).score_steps(10, 1) == [9]
    assert TrainConfig(mode="stepwise").score_steps(600, 32) == []


@pytest.fixture
def odd(splits):
    """Every fourth row argues otherwise than all others."""
    train_rows = [
        dataclasses.replace(row, rationale="dew wax dew wax dew" if index % 4 == 0 else "the room is cold")
        for index, row in enumerate(splits.train)
    ]
    return dataclasses.replace(splits, train=train_rows)


def test_a_stream_refuses_to_drop_rows_it_never_holds(odd, small, tmp_path):
    with pytest.raises(UsageError, match="drop_doubtful compares all training rows"):
        train(
            odd, tmp_path / "s", **small, mode="stepwise-teacher", max_steps=4, drop_doubtful=True,
            stream=lambda: iter(odd.train),
        )  # fmt: skip
    assert not (tmp_path / "s").exists()


def test_dropped_rows_are_the_odd_ones_and_a_run_resumes_on_both_sides_of_the_drop(
    odd, small, tmp_path, capsys
):
    options = {
        **small, "mode": "stepwise-teacher", "max_steps": 40, "learning_rate": 0.02, "eval_steps": 10, "keep_checkpoints": 9,
        "select": "last", "batch_size": 32,
    }  # fmt: skip
    assert TrainConfig(**options).score_steps(40, 2)[:2] == [16, 20]  # the second is a checkpoint's step
    whole = train(odd, tmp_path / "whole", **options)
    assert whole.metrics["head_start_steps"] == 16
    assert whole.metrics["dropped_rows"] == len(odd.train) // 4
    assert "16 of 64 training rows were left out" in capsys.readouterr().err
    position = json.loads((tmp_path / "whole.training" / "checkpoint-20" / "position.json").read_text())
    assert position["dropped"] == list(range(0, len(odd.train), 4))
    assert position["dropped_at"] == 16 * 32
    listed = (tmp_path / "whole.training" / "dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in listed] == [row.id for row in odd.train[::4]]
    assert "label_loss" not in whole.history[0]
    assert "label_loss" in whole.history[1]
    for step in (10, 20):
        cut = tmp_path / f"cut{step}"
        shutil.copytree(tmp_path / "whole.training", tmp_path / f"cut{step}.training")
        for path in (tmp_path / f"cut{step}.training").glob("checkpoint-*"):
            if int(path.name.rpartition("-")[2]) > step:
                shutil.rmtree(path)
        again = train(odd, cut, **options, resume=True)
        assert again.metrics["resumed_from_step"] == step
        first, second = (load_file(folder / "model.safetensors") for folder in (whole.student_dir, cut))
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_early_stopping_waits_for_labels_and_losses_are_means_over_the_steps_that_had_them(
    splits, small, tmp_path
):
    result = train(
        splits, tmp_path / "s", **small, mode="stepwise-teacher", max_steps=60, head_start=0.25, learning_rate=1e-12,
        early_stopping_patience=1, save_steps=0,
    )  # fmt: skip
    assert result.metrics["head_start_steps"] == 15
    losses = {row["step"]: row.get("label_loss") for row in result.history}
    assert [losses[step] for step in (4, 8, 12)] == [None] * 3
    assert 15 < result.metrics["steps"] < 60  # nothing improves, but labels were learnt
    # Of the four steps before 16, one had labels.
    assert losses[16] == pytest.approx(result.history[-1]["eval_label_loss"], rel=0.1)


def test_the_head_start_is_a_number_of_steps_after_a_resume_with_larger_batches(splits, small, tmp_path):
    options = {**small, "mode": "stepwise-teacher", "max_steps": 16, "head_start": 0.5, "keep_checkpoints": 9}
    train(splits, tmp_path / "s", **options)
    shutil.rmtree(tmp_path / "s.training" / "checkpoint-16")
    shutil.rmtree(tmp_path / "s.training" / "checkpoint-12")
    assert json.loads((tmp_path / "s.training" / "checkpoint-8" / "position.json").read_text())["rows"] == 64
    again = train(splits, tmp_path / "s", **{**options, "batch_size": 16}, resume=True)
    assert again.metrics["resumed_from_step"] == 8
    assert [("label_loss" in row) for row in again.history] == [False, False, True, True]


@pytest.mark.long
def test_a_teacher_that_is_wrong_in_a_quarter_of_its_answers_still_teaches(tmp_path):
    splits = builtin_splits(seed=5, teacher_error=0.25)
    result = train(splits, tmp_path / "student", mode="stepwise-teacher", seed=5, trackers=())
    wrong = sum(row.teacher_label != row.label for row in splits.train)
    assert 0.5 * wrong < result.metrics["dropped_rows"] < 0.5 * len(splits.train)
    assert evaluate(result.student_dir, splits.test, rationales=0)["label_accuracy"] >= 0.75
