"""The grid of a study: what is trained, how students are described, and what makes a run another one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.data.example import Splits
from sbs_edge.errors import DataError, UsageError
from sbs_edge.pipelines.study.config import StudyConfig, parse_config, parse_student, plan_runs, subset
from sbs_edge.pipelines.study.execute import _read_data, order_of, rows_digest, write_data
from sbs_edge.pipelines.study.study import plan_study

Make = Callable[..., StudyConfig]


def test_every_method_share_student_and_seed_is_run_once(splits: Splits) -> None:
    config = StudyConfig(
        shares=(0.25, 1.0, 0.25), seeds=2, seed=5, students=("a: d_model=16 1/1", "d_model=32 2/1")
    )
    runs = plan_runs(config, splits)
    points = {(run.method, run.mode, run.share, run.rows, run.student, run.seed) for run in runs}
    assert len(runs) == len(points) == 2 * 2 * 2 * 2
    assert {(method, mode) for method, mode, *_ in points} == {
        ("step-by-step", "stepwise"), ("label-only", "finetune")
    }  # fmt: skip
    assert {(share, rows) for _, _, share, rows, _, _ in points} == {(0.25, 16), (1.0, 64)}
    assert {run.student for run in runs} == {"a", "d_model=32 2/1"}
    assert {run.seed for run in runs} == {5, 6}
    assert all(run.config.seed == run.seed and run.config.max_steps == 600 for run in runs)
    assert runs[0].student == "d_model=32 2/1"  # the largest first
    assert runs[0].method == "step-by-step"


def test_the_teachers_labels_are_learnt_where_there_is_no_gold(splits: Splits) -> None:
    bare = dataclasses.replace(splits, train=[dataclasses.replace(row, label=None) for row in splits.train])
    assert {run.mode for run in plan_runs(StudyConfig(), bare)} == {"stepwise-teacher", "distill"}
    asked = StudyConfig(labels="teacher")
    assert {run.mode for run in plan_runs(asked, splits)} == {"stepwise-teacher", "distill"}
    with pytest.raises(DataError, match="No training row has a gold label"):
        plan_runs(StudyConfig(labels="gold"), bare)


@pytest.mark.parametrize(
    ("text", "model", "name", "fields"),
    [
        ("6/2", True, "6/2", {"encoder_layers": "6", "decoder_layers": "2"}),
        ("0,3,5/0,5", True, "0,3,5/0,5", {"encoder_layers": "0,3,5", "decoder_layers": "0,5"}),
        (
            "d-model=32 1/2",
            False,
            "d-model=32 1/2",
            {"d_model": "32", "n_layers": "1", "n_decoder_layers": "2"},
        ),
        ("mine: model=x 2/1", False, "mine", {"model": "x", "encoder_layers": "2", "decoder_layers": "1"}),
    ],
)
def test_students_are_described(text: str, model: bool, name: str, fields: dict[str, Any]) -> None:
    found = parse_student(text, model)
    assert (found.name, found.fields) == (name, fields)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("small", "found 'small'"),
        ("6/2 4/2", "must say one depth"),
        ("", "must say one depth"),
        ("steps=3", "sets steps, which does not make another student"),
        ("6/", "found '6/'"),
    ],
)
def test_what_is_not_a_student_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        parse_student(text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shares": (0.0, 1.0)}, r"lies in (0, 1], not at 0"),
        ({"shares": ()}, "shares: "),
        ({"seeds": 0}, "seeds: "),
        ({"methods": ("both",)}, "methods.0: "),
    ],
)
def test_a_wrong_configuration_is_one_paragraph(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        parse_config(**given)


def test_two_students_of_one_name_and_wrong_fields_are_refused(splits: Splits) -> None:
    with pytest.raises(UsageError, match="Two students are named 'a'"):
        plan_runs(StudyConfig(students=("a: 1/1", "a: 2/2")), splits)
    with pytest.raises(UsageError, match="d_model = '33'"):
        plan_runs(StudyConfig(students=("d_model=33",)), splits)
    with pytest.raises(UsageError, match="give model too"):
        plan_runs(StudyConfig(training={"decoder_layers": 2}), splits)


@pytest.mark.parametrize(
    "changes", [{"students": ("a: d_model=16 1/1", "b: d_model=16 1/1")}, {"shares": (0.999, 1.0)}]
)
def test_one_student_is_not_trained_by_two_runs(
    splits: Splits, config: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="Two runs would train the same student: 'step-by-step, "):
        plan_study(splits, tmp_path / "work", config(**changes))


def test_a_smaller_share_lies_within_a_larger_one(splits: Splits) -> None:
    small, large = (subset(splits.train, count, seed=3) for count in (10, 40))
    assert {row.id for row in small} < {row.id for row in large}
    assert subset(splits.train, len(splits.train), seed=3) == splits.train
    assert {row.id for row in small} != {row.id for row in subset(splits.train, 10, seed=4)}


def test_the_key_changes_with_everything_that_changes_a_student(
    splits: Splits, config: Make, tmp_path: Path
) -> None:
    def keys(study: StudyConfig, rows: Splits = splits, threads: int = 1) -> list[str]:
        return [
            order_of(run, study, rows, tmp_path, tmp_path, True, threads)["key"]
            for run in plan_runs(study, rows)
        ]

    base = keys(config())
    assert len(set(base)) == len(base) == 4
    assert keys(config(), threads=2) == base
    assert (
        keys(config(target="cpu-fp32", within=3.0, evaluation_rows=5)) == base
    )  # the student stays the same
    assert keys(config(training={"batch_size": 8, "save_steps": 0})) == base
    changed = [
        config(steps=4), config(seed=1), config(training={"batch_size": 4}), config(students=("one: d_model=16 1/1",)),
    ]  # fmt: skip
    for other in changed:
        assert not set(keys(other)) & set(base)
    more = dataclasses.replace(
        splits, train=[*splits.train[:-1], dataclasses.replace(splits.train[-1], label="wait?")]
    )
    assert keys(config(shares=(1.0,)), more) != keys(config(shares=(1.0,)))
    fewer = dataclasses.replace(splits, validation=splits.validation[:-1])
    assert not set(keys(config(), fewer)) & set(base)
    tests = dataclasses.replace(splits, test=splits.test[:-1])
    assert keys(config(), tests) == base  # the test rows change no student


def test_another_checkpoint_of_the_same_name_is_another_student(
    tmp_path: Path, splits: Splits, config: Make
) -> None:
    from sbs_edge.pipelines.study.execute import _checkpoint_digest
    from sbs_edge.training.train import train

    out = tmp_path / "checkpoint"
    keys = []
    for seed in (0, 1):
        train(
            splits,
            out,
            d_model=16,
            d_ff=32,
            n_heads=2,
            n_layers=2,
            max_steps=1,
            seed=seed,
            trackers=(),
            threads=1,
        )
        _checkpoint_digest.cache_clear()
        study = config(students=(), training={"model": str(out)})
        plan = plan_study(splits, tmp_path / "work", study)
        assert {run.student for run in plan.runs} == {"2/2", "2/1", "1/1"}
        keys.append({order["key"] for order in plan.orders})
    assert not keys[0] & keys[1]


def test_rows_come_back_as_they_were_written(tmp_path: Path, splits: Splits) -> None:
    row = dataclasses.replace(
        splits.train[0],
        confidence=0.5,
        choices=("a", "b"),
        label="a",
        teacher_label="b",
        rationale="x",
        rationales=("x", "y"),
        teacher_probs=(("b", 0.75), ("a", 0.25)),
    )
    mixed = Splits(splits.task, [row, *splits.train[1:4]], splits.validation, [])
    again = _read_data(str(write_data(tmp_path, mixed)))
    for name in ("train", "validation", "test"):
        assert rows_digest(getattr(again, name)) == rows_digest(getattr(mixed, name))
    assert again.task == mixed.task


def test_too_small_a_share_is_found_before_any_training(splits: Splits, config: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 64 training rows are too few"):
        plan_study(splits, tmp_path / "work", config(shares=(0.01, 1.0)))
    unlabelled = dataclasses.replace(
        splits,
        test=[],
        validation=[dataclasses.replace(r, label=None, teacher_label=None) for r in splits.validation],
    )
    with pytest.raises(DataError, match="no student can be judged"):
        plan_study(unlabelled, tmp_path / "work", config())
