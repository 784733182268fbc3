"""The effect of padding, as an export reports it: measured on 1,000 rows, in int8 and in float32, without a flip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbs_edge.analysis.reliability import expected_calibration_error
from sbs_edge.data.example import Example
from sbs_edge.export.api import export
from sbs_edge.export.check.calibrate import calibrate
from sbs_edge.runtime.batches import padded_length
from sbs_edge.runtime.student import Student


def test_no_label_of_a_thousand_rows_turns_on_padding(
    trained: tuple[Path, Any], tmp_path: Path, rows: Any
) -> None:
    guard = [Example(row["id"], row["input"], row["label"]) for row in rows(1000, seed=11)]
    manifest = export(trained[0], tmp_path / "b", targets=("cpu-int8", "cpu-fp32"), guard_data=guard).manifest
    figures = manifest["targets"]["cpu-int8"]["accuracy"]
    assert figures["padding"]["rows"] == figures["padding_float32"]["rows"] == 1000
    assert figures["padding"]["flips"] == figures["padding_float32"]["flips"] == 0
    assert figures["padding_float32"]["largest_move"] < 1e-5
    assert figures["padding"]["largest_move"] < 0.02  # a rounding border crossed in a few activations
    assert "padding" not in manifest["targets"]["cpu-fp32"]["accuracy"]
    card = (tmp_path / "b" / "README.md").read_text()
    assert "changes 0 of 1000 labels" in card


def test_the_figure_is_what_the_runtime_gives(trained: tuple[Path, Any], tmp_path: Path, rows: Any) -> None:
    """An outside judge: two inputs of one length are padded further by a call's longest row of the same length only."""
    from sbs_edge.export.check.padding import padding_figures
    from sbs_edge.export.labels import LabelPlan

    guard = [Example(row["id"], row["input"], row["label"]) for row in rows(40, seed=12)]
    export(trained[0], tmp_path / "b", targets=("cpu-fp32",), guard_data=guard)
    with Student.load(tmp_path / "b", prepacked_cache=False) as student:
        plan = LabelPlan("closed", "first-token", student.labels, ())
        found = padding_figures(student, guard, plan)
        session = student._sessions["label_scorer"]
        moves, sizes = [], []
        for ids in student.tokenize([row.input for row in guard]):
            scores = []
            for length in (padded_length(len(ids)), 2 * padded_length(len(ids))):
                row = np.array([[*ids, *[0] * (length - len(ids))]], np.int64)
                scores.append(
                    session.run({"input_ids": row, "attention_mask": (row != 0).astype(np.int64)})[0]
                )
            moves.append(np.abs(scores[0] - scores[1]).max())
            sizes.append(np.abs(scores[0]).max())
        assert found is not None
        # One row alone is added up in another order than eight: the figures agree within float32's rounding.
        assert found["largest_move"] == pytest.approx(max(moves) / max(sizes), abs=2e-6)
    assert padding_figures(student, [], plan) is None


def test_no_row_judges_a_temperature_it_helped_to_choose() -> None:
    """Two of three wrong rows: a temperature fitted on all rows hides what it cost to fit; folds do not."""
    rng = np.random.default_rng(3)
    scores = list(rng.normal(size=(24, 3)) * 6)
    gold = [int(rng.integers(3)) for _ in scores]
    report = calibrate(scores, gold)
    assert report["ece_folds"] == 2
    assert 0 <= report["ece_after"] <= 1
    # The order of the rows does not decide who judges whom by their place in the file alone.
    sorted_rows = sorted(range(24), key=lambda i: gold[i])
    again = calibrate([scores[i] for i in sorted_rows], [gold[i] for i in sorted_rows])
    assert again["temperature"] == pytest.approx(report["temperature"], rel=1e-6)
    # Rows that contradict each other: half A asks for certainty in the wrong label of half B.
    sure = [np.array([8.0, 0.0])] * 12
    order = np.random.default_rng(0).permutation(12)
    gold = [0] * 12
    for i in order[6:]:
        gold[i] = 1
    contradicted = calibrate(sure, gold)
    fitted_on_all = expected_calibration_error(
        np.full(12, 1 / (1 + np.exp(-8.0 / contradicted["temperature"]))), np.array([g == 0 for g in gold])
    )
    assert fitted_on_all < 0.1 < 0.4 < contradicted["ece_after"]
    assert calibrate(sure[:1], [0])["ece_after"] is None
