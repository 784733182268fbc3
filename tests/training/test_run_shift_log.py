"""``sbs-edge run shift-log`` in small: every way is measured, the report is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbs_edge.cli.app import main
from sbs_edge.data.shift_log import ShiftLogSize, shift_log_rows
from sbs_edge.errors import UsageError
from sbs_edge.pipelines.lengths import WAYS, Reader, measure
from sbs_edge.pipelines.shift_log import ShiftLogConfig, run_shift_log
from sbs_edge.report.shift_log import shift_log_page, shift_log_table
from sbs_edge.runtime.student import Student


def test_a_small_run_measures_every_way(tmp_path: Path) -> None:
    config = ShiftLogConfig(
        steps=3, rows=4, lengths=(64, 512), max_drop=100, min_rationale_agreement=0, targets=("cpu-fp32",),
        training={"d_model": 16, "d_ff": 32, "n_heads": 2, "n_layers": 1, "trackers": (), "threads": 1},
    )  # fmt: skip
    size = ShiftLogSize(n_train=40, n_validation=8, n_test=4, tokens=(40, 150))
    report = run_shift_log(tmp_path, config, size)
    assert [(row["tokens"], row["way"]) for row in report["lengths"]] == [
        (tokens, way) for tokens in (64, 512) for way in WAYS
    ]
    assert all(row["rows"] == 4 and 0 <= row["accuracy"] <= 1 and row["ms"] > 0 for row in report["lengths"])
    assert report["bundle"]["long"]["trained"] == "full"
    page = shift_log_page(json.loads(json.dumps(report)))
    assert all(way in page for way in WAYS)
    assert len(shift_log_table(report).columns) == 1 + len(WAYS)

    (row,) = shift_log_rows("x", 1, (512,), 0)
    with Student.load(tmp_path / "bundle") as student:
        whole = student.predict(row.input)
        cut = Student.load(tmp_path / "bundle", long=False, truncate=True).predict(row.input)
    assert whole.n_chunks > 8
    for way, expected in (("all states", whole.label), ("truncation", cut.label)):
        with Reader(tmp_path / "bundle", way) as reader:  # type: ignore[arg-type]
            assert reader.label(row.input) == expected
    with Reader(tmp_path / "bundle", "full attention") as reader:
        assert reader._student.predict(row.input).n_chunks == 1
        assert not reader._student.predict(row.input).truncated
        assert measure(reader, [row])["rows"] == 1


def test_a_bundle_without_long_inputs_is_refused(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("tiny_long", Path(__file__).parents[1] / "runtime" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    tiny = module_from_spec(spec)
    sys.modules[spec.name] = tiny
    spec.loader.exec_module(tiny)
    with pytest.raises(UsageError, match="must read long inputs and have a closed label set"):
        Reader(tiny.write_bundle(tiny.make_tiny(), tmp_path / "b"), "voting")


def test_the_command_plans_and_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        main(["run", "shift-log-latest", "--dry-run", "--json", "--steps", "7", "--training", "d_model=32"])
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert (plan["latest"], plan["steps"], plan["training"]["d_model"]) == (True, 7, "32")
    assert main(["run", "shift-log", "--dry-run", "--controls"]) == 2
    assert "--controls has no effect" in " ".join(capsys.readouterr().err.split())
    assert main(["run", "shift-log", "--dry-run", "--training", "long=off"]) == 2
    assert "leave --training long=off out" in " ".join(capsys.readouterr().err.split())
