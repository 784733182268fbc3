"""Conclusions of a study from hand-made figures."""

from __future__ import annotations

import io
import math
from typing import Any
from zlib import crc32

import pytest

from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.pipelines.linear import BUCKETS, features, linear_baseline
from sbs_edge.pipelines.study.conclude import conclude, frontier, group_runs, sentences
from sbs_edge.pipelines.study.progress import StudyProgress

Run = dict[str, Any]
SIZES = {"small": (10_000, 1.0), "large": (90_000, 3.0)}


def run(method: str, student: str, rows: int, seed: int, validation: float, test: float | None = None) -> Run:
    n_bytes, ms = SIZES[student]
    accuracy = {
        "validation": {"share": validation, "n": 100},
        "test": {"share": validation if test is None else test, "n": 200},
    }
    return {
        "method": method, "student": student, "share": rows / 1000, "rows": rows, "seed": seed, "layers": {},
        "parameters": n_bytes, "bytes": n_bytes, "accuracy": accuracy, "label_ms": {"p50": ms + seed / 10},
        "rationale_ms": None if method == "label-only" else {"p50": 10 * ms}, "train_seconds": 1.0,
    }  # fmt: skip


def both(method: str, student: str, rows: int, *shares: float) -> list[Run]:
    return [run(method, student, rows, seed, share) for seed, share in enumerate(shares)]


RUNS = [
    *both("step-by-step", "large", 1000, 0.97, 0.99),
    *both("step-by-step", "large", 500, 0.90, 0.92),
    *both("step-by-step", "large", 250, 0.50, 0.60),
    *both("step-by-step", "small", 1000, 0.97, 0.98),
    *both("step-by-step", "small", 500, 0.97, 0.97),
    *both("step-by-step", "small", 250, 0.60, 0.70),
    *both("label-only", "large", 1000, 0.30, 0.32),
    *both("label-only", "small", 1000, 0.25, 0.27),
]


def found(runs: list[Run], within: float = 1.0, teacher: dict[str, Any] | None = None) -> dict[str, Any]:
    return conclude(group_runs(runs), runs, within, teacher)


def test_runs_of_different_seeds_are_one_group() -> None:
    groups = group_runs(RUNS)
    assert len(groups) == 8
    first = groups[0]
    assert (first["seeds"], first["label_ms"], first["rationale_ms"]) == ([0, 1], pytest.approx(3.05), 30.0)
    assert first["validation"] == {"mean": pytest.approx(0.98), "low": 0.97, "high": 0.99, "n": 100}


def test_the_smallest_student_that_is_good_enough_is_chosen_on_validation_rows() -> None:
    answer = found(RUNS)
    assert (answer["best"]["student"], answer["best"]["rows"]) == ("large", 1000)
    assert (answer["chosen"]["student"], answer["chosen"]["method"]) == ("small", "step-by-step")
    assert found(RUNS, within=0.25)["chosen"]["student"] == "large"
    # Test rows only report: the small student may look better there.
    swapped = [
        {
            **each,
            "accuracy": {
                **each["accuracy"],
                "test": {"share": 1.0 - each["accuracy"]["test"]["share"], "n": 200},
            },
        }
        for each in RUNS
    ]
    assert found(swapped, within=0.25)["chosen"]["student"] == "large"


def test_the_rows_needed_are_the_fewest_from_which_on_it_is_good_enough() -> None:
    assert found(RUNS)["rows"] == {"step-by-step": 500, "label-only": None}
    # A lucky smaller share does not count where a larger one falls short.
    lucky = [*both("step-by-step", "small", 1000, 0.98, 0.98), *both("step-by-step", "small", 500, 0.90, 0.90),
             *both("step-by-step", "small", 250, 0.98, 0.98)]  # fmt: skip
    assert found(lucky)["rows"] == {"step-by-step": 1000}


def test_the_teacher_is_a_level_of_its_own() -> None:
    near = found(RUNS, teacher={"validation": 0.984, "test": 0.75})
    assert near["like_teacher"]["student"] == "small"
    far = found(RUNS, teacher={"validation": 0.995, "test": 0.99})
    assert far["like_teacher"] is None
    assert far["nearest"]["student"] == "large"
    assert found(RUNS, teacher={"validation": None, "test": 0.97})["like_teacher"]["student"] == "small"
    texts = [sentences(each)[1] for each in (near, far, found(RUNS))]
    assert texts[0] == "It is also within 1 point of the teacher (98.4 % on validation rows)."
    assert texts[1] == (
        "No student is within 1 point of the teacher (99.5 % on validation rows); the nearest is step-by-step, large "
        "(98.0 % on validation rows)."
    )
    assert texts[2].startswith("The teacher's accuracy is unknown")


def test_twice_the_rows_are_worth_what_the_last_two_shares_say() -> None:
    runs = [*both("step-by-step", "large", 1000, 0.9, 0.8), *both("step-by-step", "large", 250, 0.6, 0.6)]
    more = found(runs)["more_rows"]
    # Errors 0.4 -> 0.1 over two doublings halve with each; 0.4 -> 0.2 fall by the square root of two.
    assert (more["low"], more["high"]) == (pytest.approx(5.0), pytest.approx(20 * (1 - math.sqrt(0.5))))
    assert more["doubling"] == pytest.approx((more["low"] + more["high"]) / 2)
    assert more["gained"] == pytest.approx(25.0)
    perfect = [*both("step-by-step", "large", 1000, 1.0), *both("step-by-step", "large", 500, 0.9)]
    assert found(perfect)["more_rows"]["doubling"] == 0
    assert "no errors are left" in " ".join(sentences(found(perfect)))
    worse = [*both("step-by-step", "large", 1000, 0.8), *both("step-by-step", "large", 500, 0.9)]
    assert found(worse)["more_rows"]["doubling"] < 0
    assert "twice the rows are not expected to help" in " ".join(sentences(found(worse)))
    alone = both("step-by-step", "large", 1000, 0.8)
    assert found(alone)["more_rows"] is None
    assert "it takes two shares" in " ".join(sentences(found(alone)))


def test_the_sentences_name_the_figures() -> None:
    said = sentences(found(RUNS), {"accuracy": {"test": {"share": 0.3, "n": 200}}, "ms": 0.02})
    assert said[0] == (
        "The smallest student within 1 point of the best is step-by-step, small: 97.5 % on test rows, 10 kB, 1.05 ms a "
        "label, 10.0 ms a rationale. The best is step-by-step, large, 1,000 rows: 98.0 % on test rows, 90 kB, 3.05 ms a "
        "label, 30.0 ms a rationale."
    )
    assert said[2] == (
        "To bring small within 1 point of the best, step-by-step needs 500 of 1,000 rows, and label-only does not get there "
        "with 1,000 rows."
    )
    assert said[3].startswith(
        "From 500 to 1,000 rows, step-by-step, small changed by +0.5 points on validation rows"
    )
    assert said[4] == (
        "A linear model on word n-grams reaches 30.0 % on test rows, 0.020 ms a label: 68.0 points less than the best "
        "student."
    )
    easy = sentences(found(RUNS), {"accuracy": {"test": {"share": 0.975, "n": 200}}, "ms": 0.02})
    assert easy[4].startswith("A linear model on word n-grams solves this task as well")


def test_no_student_is_said_to_be_near_a_best_one_that_had_fewer_rows() -> None:
    runs = [*both("step-by-step", "large", 1000, 0.90), *both("step-by-step", "large", 500, 0.98),
            *both("step-by-step", "small", 1000, 0.85)]  # fmt: skip
    assert sentences(found(runs))[0].startswith(
        "No student with 1,000 rows is within 1 point of the best, step-by-step, large with 500 rows: 98.0 % on test rows"
    )
    assert ". The nearest is step-by-step, large: 90.0 % on test rows" in sentences(found(runs))[0]
    assert sentences(found(runs, within=10.0))[0].startswith(
        "The smallest student within 10 points of the best is"
    )


def test_the_frontier_leaves_out_what_a_cheaper_student_matches() -> None:
    whole = [group for group in group_runs(RUNS) if group["share"] == 1]
    edge = [(group["method"], group["student"]) for group in frontier(whole, "bytes")]
    assert edge == [("step-by-step", "small"), ("step-by-step", "large")]
    assert frontier(whole, "rationale_ms")[0]["student"] == "small"


def words(label: str, n: int) -> list[Example]:
    other = {"up": "rises", "down": "falls"}[label]
    return [
        Example(str(i), f"the price {other} by {i} today", label=label, teacher_label="up") for i in range(n)
    ]


def test_the_linear_model_solves_what_single_words_say_and_not_the_built_in_task() -> None:
    task = TaskSpec("moves", "closed", ("up", "down"))
    rows = [*words("up", 20), *words("down", 20)]
    answer = linear_baseline(Splits(task, rows, rows[10:30], rows[5:25]), gold=True)
    assert answer["accuracy"] == {"validation": {"share": 1.0, "n": 20}, "test": {"share": 1.0, "n": 20}}
    assert answer["ms"] > 0
    as_teacher = linear_baseline(Splits(task, rows, rows, rows), gold=False)
    assert as_teacher["accuracy"]["test"]["share"] == 1.0  # it says "up" to everything
    open_task = Splits(TaskSpec("texts", "open"), rows, rows, rows)
    assert "this task's are open" in linear_baseline(open_task, gold=True)["why"]

    from sbs_edge.data.builtin import builtin_splits

    hard = linear_baseline(builtin_splits("ci"), gold=True)
    assert hard["accuracy"]["test"]["share"] < 0.45


def test_features_do_not_depend_on_the_process() -> None:
    assert features("The pump, the Pump") == features("the pump , the pump")
    assert features("a b") != features("b a")
    assert features("a") == [crc32(b"a") % BUCKETS]
    assert features("") == []


def test_progress_says_what_is_left_by_the_work_in_the_runs() -> None:
    now, stream = [0.0], io.StringIO()
    progress = StudyProgress([4.0, 4.0, 2.0, 2.0], 2, finished=[0], stream=stream, clock=lambda: now[0])
    now[0] = 10.0
    progress.tick()
    assert stream.getvalue() == ""
    now[0] = 30.0
    progress.tick()
    assert stream.getvalue() == "study: 1 of 4 runs\n"
    progress.finish(1, "large: 90.0 %")
    # 4 units done and half of the 2 beside them in 30 s; 3 are left.
    assert progress.seconds_left() == pytest.approx(18.0)
    assert stream.getvalue().splitlines()[1] == "study: 2 of 4 runs, 18 s left, large: 90.0 %"
    now[0] = 36.0
    assert progress.seconds_left() == pytest.approx(12.0)  # it counts down between runs
    now[0] = 300.0
    assert progress.seconds_left() == pytest.approx(0.9)
    progress.finish(2, "small: 80.0 %")
    progress.finish(3, "small: 81.0 %")
    assert stream.getvalue().splitlines()[-1] == "study: 4 of 4 runs, small: 81.0 %"
