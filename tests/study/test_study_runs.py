"""Studies carried out on tiny students: nothing is trained twice, whatever ends a study."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.cli.app import main
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Splits
from sbs_edge.errors import DataError, SbsEdgeError, UsageError
from sbs_edge.lock import held
from sbs_edge.pipelines.processes import run_in_processes
from sbs_edge.pipelines.study.config import StudyConfig
from sbs_edge.pipelines.study.page import study_markdown, study_page
from sbs_edge.pipelines.study.study import Placement, run_study
from sbs_edge.runtime.student import Student

Make = Callable[..., StudyConfig]
ONE = Placement(processes=1, threads=1)


def students(work: Path) -> dict[str, int]:
    """Return when each student of a study was written."""
    return {
        path.parent.parent.name: path.stat().st_mtime_ns for path in work.glob("runs/*/student/sbs_edge.json")
    }


@pytest.fixture(scope="module")
def done(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished study of four runs; read only."""
    work = tmp_path_factory.mktemp("study") / "work"
    study = StudyConfig(
        students=("one: d_model=16 d_ff=32 n_heads=2 1/1",), shares=(0.5, 1.0), seeds=1, steps=3,
        training={"batch_size": 8},
    )  # fmt: skip
    return work, run_study(splits, work, study, ONE)


def test_every_run_is_trained_exported_and_judged_by_its_bundle(
    done: tuple[Path, dict[str, Any]], splits: Splits
) -> None:
    work, report = done
    assert len(report["runs"]) == len(students(work)) == 4
    assert json.loads(json.dumps(report)) == report
    for run in report["runs"]:
        folder = work / "runs" / run["key"]
        assert not (folder / "student.training").exists()
        with Student.load(folder / "bundle-cpu-int8", threads=1) as student:
            answers = [found.label for found in student.predict([row.input for row in splits.test])]
        right = sum(
            same_answer(a, row.label or "", "text") for a, row in zip(answers, splits.test, strict=True)
        )
        assert run["accuracy"]["test"] == {"share": right / 20, "n": 20}
        files = [path for path in (folder / "bundle-cpu-int8").rglob("*") if path.is_file()]
        listed = [path for path in files if not path.name.startswith("manifest.json")]
        assert run["bytes"] == sum(path.stat().st_size for path in listed)
        assert run["label_ms"]["p50"] > 0
        assert (run["rationale_ms"] is not None) == (run["method"] == "step-by-step")
        assert run["layers"] == {"encoder": 1, "decoder": 1}
    teacher = sum(row.label == row.teacher_label for row in splits.test) / 20
    assert report["conclusions"]["teacher"]["test"] == teacher
    assert report["linear"]["accuracy"]["test"]["n"] == 20
    assert len(report["sentences"]) == 5


def test_the_page_and_the_table_hold_every_point(done: tuple[Path, dict[str, Any]]) -> None:
    report = done[1]
    page, table = study_page(report), study_markdown(report)
    assert page.count("<svg") == 1 + 2  # one student: nothing to draw by size
    assert page.count("http://") == page.count("http://www.w3.org") + page.count(
        "http://purl.org"
    ) + page.count("http://creativecommons.org")  # the SVGs' namespaces: nothing is loaded
    assert report["sentences"][0].replace("'", "&#x27;") in page
    assert len(table.splitlines()) == 2 + 4
    assert sum(line.startswith("| **") for line in table.splitlines()) == 1
    for group in report["groups"]:
        assert f"| {group['rows']} | " in table.replace("**", "")


def test_the_page_counts_the_rows_that_judged(done: tuple[Path, dict[str, Any]]) -> None:
    report = json.loads(json.dumps(done[1]))
    page = study_page({**report, "rows": {**report["rows"], "validation": 5000}})
    assert "chosen by their accuracy on 20 validation rows; 20 test rows only report" in page
    for group in [*report["groups"], report["conclusions"]["chosen"]]:
        group["validation"] = None
    assert "chosen by their accuracy on 20 test rows, the only ones with labels to judge by" in study_page(
        report
    )


def test_rows_that_a_run_left_out_are_counted_and_listed(
    splits: Splits, config: Make, tmp_path: Path
) -> None:
    odd = [
        dataclasses.replace(row, rationale="dew wax dew wax dew" if index % 4 == 0 else "the room is cold")
        for index, row in enumerate(splits.train)
    ]
    study = config(
        methods=("step-by-step",), labels="teacher", shares=(1.0,), steps=40,
        training={"learning_rate": 0.02, "batch_size": 32},
    )  # fmt: skip
    (run,) = run_study(dataclasses.replace(splits, train=odd), tmp_path, study, ONE)["runs"]
    assert run["dropped_rows"] == 16
    listed = (tmp_path / "runs" / run["key"] / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in listed] == [row.id for row in odd[::4]]


def test_a_finished_study_trains_nothing_again_and_writes_the_chosen_bundle(
    done: tuple[Path, dict[str, Any]], splits: Splits, config: Make, tmp_path: Path
) -> None:
    work, report = done
    before = students(work)
    again = run_study(splits, work, config(within=100.0), ONE, out=tmp_path / "bundle")
    assert students(work) == before
    assert again["runs_before"] == 4
    assert again["runs"] == report["runs"]
    chosen = again["conclusions"]["chosen"]
    assert chosen["bytes"] == min(group["bytes"] for group in again["groups"] if group["share"] == 1)
    assert again["bundle"] == str(tmp_path / "bundle")
    with Student.load(tmp_path / "bundle") as student:
        assert student.predict(splits.test[0].input).label in splits.task.labels
    # Another target exports the same students, and one more seed trains only that seed's.
    other = run_study(splits, work, config(target="cpu-fp32", methods=("label-only",)), ONE)
    assert students(work) == before
    assert {run["bytes"] for run in other["runs"]}.isdisjoint({run["bytes"] for run in report["runs"]})
    more = run_study(splits, work, config(seeds=2, methods=("label-only",), shares=(1.0,)), ONE)
    assert more["runs_before"] == 1
    assert before.items() < students(work).items()
    assert len(students(work)) == 5
    assert more["groups"][0]["seeds"] == [0, 1]


def test_a_damaged_run_is_carried_out_again(splits: Splits, config: Make, tmp_path: Path) -> None:
    study = config(methods=("label-only",), shares=(1.0,))
    (first,) = run_study(splits, tmp_path, study, ONE)["runs"]
    folder = tmp_path / "runs" / first["key"]
    (folder / "bundle-cpu-int8" / "manifest.json").unlink()
    (folder / "bundle-cpu-int8").rename(tmp_path / "gone")
    before = students(tmp_path)
    (second,) = run_study(splits, tmp_path, study, ONE)["runs"]
    assert students(tmp_path) == before  # exported again, not trained
    assert second["accuracy"] == first["accuracy"]


def arguments(rows_folder: Path, work: Path, steps: int) -> list[str]:
    return [
        "study", str(rows_folder), "--work", str(work), "--student", "one: d_model=16 d_ff=32 n_heads=2 1/1",
        "--share", "0.5", "--share", "1", "--seeds", "2", "--steps", str(steps), "--processes", "1", "--threads", "1",
        "--method", "step-by-step", "--training", "batch_size=8", "--training", "eval_steps=10",
    ]  # fmt: skip


def alive(work: Path) -> list[int]:
    """Return the processes that work in a study: its name stands in their command or their open files."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            links = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except OSError:
            continue
        if any(link.startswith(str(work)) for link in links):
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.long),
    ],
)
def test_an_interrupted_study_goes_on_where_it_stopped(
    rows_folder: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    work = tmp_path / "work"
    command = [sys.executable, "-P", "-m", "sbs_edge", *arguments(rows_folder, work, steps=60)]
    # Under a job in the background SIGINT is ignored, and a program that starts so keeps to it.
    started = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 400  # a bound for a broken study only
    # One run finished, and the next one has saved a checkpoint.
    while time.monotonic() < deadline and started.poll() is None:
        if list(work.glob("runs/*/cpu-int8-*.json")) and list(
            work.glob("runs/*/student.training/checkpoint-*")
        ):
            break
        time.sleep(0.02)
    started.send_signal(stop)
    _, said = started.communicate(timeout=120)
    assert started.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL), said
    if stop == signal.SIGINT:
        assert f"are in {work}. The same command continues with them" in " ".join(said.split())
    deadline = time.monotonic() + 60
    while alive(work) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(work) == []
    finished = students(work)
    assert 1 <= len(finished) < 4
    unfinished = [path.parent.name for path in work.glob("runs/*/student.training")]

    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    after = students(work)
    assert finished.items() <= after.items()
    assert len(after) == 4
    report = json.loads((work / "study.json").read_text())
    assert report["runs_before"] >= 1
    assert {run["key"] for run in report["runs"]} == set(after)
    if stop == signal.SIGKILL or unfinished:  # a checkpoint was there: the training went on from it
        cards = [
            json.loads((work / "runs" / key / "student" / "sbs_edge.json").read_text()) for key in unfinished
        ]
        assert any(card["training"]["resumed_from_step"] > 0 for card in cards)


def test_two_studies_do_not_share_a_directory(splits: Splits, config: Make, tmp_path: Path) -> None:
    with held(tmp_path / "work", "study"), pytest.raises(UsageError, match="already writing"):
        run_study(splits, tmp_path / "work", config(), ONE)


def test_a_run_that_fails_is_named_and_the_others_are_kept(
    splits: Splits, config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The workers' log cannot be opened as the student's directory: something else is in its place.
    from sbs_edge.pipelines.study.study import plan_study

    study = config(methods=("label-only",), shares=(0.5, 1.0))
    plan = plan_study(splits, tmp_path, study, ONE)
    blocked = Path(plan.orders[0]["folder"])
    (blocked / "student").mkdir(parents=True)
    (blocked / "student" / "mine.txt").write_text("kept")
    with pytest.raises(SbsEdgeError) as caught:
        run_study(splits, tmp_path, study, ONE)
    assert plan.runs[0].name in str(caught.value)
    assert "is not a student" in str(caught.value)
    assert "Finished runs are kept" in str(caught.value)
    assert caught.value.exit_code == 2
    assert (blocked / "student" / "mine.txt").read_text() == "kept"
    assert len(students(tmp_path)) == 1
    (blocked / "student" / "mine.txt").unlink()
    (blocked / "student").rmdir()
    assert run_study(splits, tmp_path, study, ONE)["runs_before"] == 1


MODULE = """
import os, signal, time
def answer(order):
    if order.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"double": 2 * order["n"], "pid": os.getpid()}
"""


def test_a_process_that_dies_costs_its_own_order_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "answering_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import answering_module  # type: ignore[import-not-found]

    orders = [{"n": n, "die": n == 1} for n in range(5)]
    items = list(run_in_processes(answering_module.answer, orders, 2, tmp_path / "log"))
    results = dict(item for item in items if item is not None)
    assert {n: found.get("double") for n, found in results.items()} == {0: 0, 1: None, 2: 4, 3: 6, 4: 8}
    assert "SIGKILL, often for lack of memory" in results[1]["failed"]
    assert len({found["pid"] for found in results.values() if "pid" in found}) <= 3
    assert None in items


@pytest.mark.long
def test_ray_gives_what_processes_give(
    done: tuple[Path, dict[str, Any]], splits: Splits, config: Make, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    study = config(methods=("label-only",))
    found = run_study(splits, tmp_path / "work", study, Placement("ray", processes=2))
    kept = ("method", "rows", "seed", "key", "accuracy", "bytes", "parameters")
    assert [{name: run[name] for name in kept} for run in found["runs"]] == [
        {name: run[name] for name in kept} for run in done[1]["runs"] if run["method"] == "label-only"
    ]
    assert run_study(splits, tmp_path / "work", study, Placement("ray"))["runs_before"] == 2


def test_the_command_plans_without_writing(rows_folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([*arguments(rows_folder, tmp_path / "work", 5), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["runs"]) == 4
    assert (plan["finished"], plan["at_once"], plan["threads_each"]) == (0, 1, 1)
    assert plan["rows"] == {"train": 64, "validation": 20, "test": 20}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--share", "0"], "lies in (0, 1]"),
        (["--student", "big"], "found 'big'"),
        (["--target", "cpu-int7"], "cpu-int7"),
        (["--training", "max_steps=3"], "use --steps for it"),
        (["--worker-gpus", "1"], "belong to --engine ray"),
        (["--decoder-layers", "2"], "give model too"),
        (["--labels", "gold", "--column", "label=nothing"], ""),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_trained(
    rows_folder: Path, tmp_path: Path, capsys: Any, more: list[str], said: str
) -> None:
    assert main(["study", str(rows_folder), "--work", str(tmp_path / "work"), *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "work" / "runs").exists()


def test_a_bundles_place_with_something_else_is_refused_first(
    splits: Splits, config: Make, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="is not a bundle"):
        run_study(splits, tmp_path / "work", config(), ONE, out=tmp_path)
    assert not (tmp_path / "work").exists()
    with pytest.raises(DataError, match="None of the 0 training rows of a share has a label"):
        run_study(Splits(splits.task, [], splits.validation, []), tmp_path / "work", config(), ONE)
