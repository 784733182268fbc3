"""Rows and files that cannot be answered: they cost themselves, and what ends a run says where and why."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbs_edge.bench.scale.bench import write_rows
from sbs_edge.errors import DataError, IntegrityError, SbsEdgeError, UsageError
from sbs_edge.runtime.student import Student
from sbs_edge.scale import run as scale_run
from sbs_edge.scale.predict import answer_rows, predict_with_ray
from sbs_edge.scale.units import plan_units, read_unit, shard_name, unit_of, write_shard

ray_test = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Ray leaves sockets to the end
TEXT = "the vent blows cold air ."
POISON = {
    b'{"id": "p", "input": "so \\ud800"}': "character 4",
    b'{"id": "p", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested too deeply",
    b'{"id": "p", "input": "\xff"}': "not UTF-8",
    b'{"id": NaN, "input": "x"}': "NaN",
    b'{"id": "p", "input": 5}': "no text",
    b'{"id": "p", "input": "x", "choices": {"wait": 1, "close": 2}}': "list of strings",
    b'{"id": "p", "input": "x", "choices": []}': "list of strings",
    b'{"id": "p", "input": "x", "choices": [1, 2]}': "list of strings",
    b'{"id": "p", "input": "x", "choices": ["wait", "\\ud800"]}': "one of 'choices'",
    b'{"id": "p", "input": "x", "choices": "wait|nowhere"}': "not 'nowhere'",
}
ODD = {  # answered, whatever their ids
    b'{"id": "a\\ud800", "input": "x"}': "a\\ud800",
    b'{"id": 1180591620717411303424, "input": "x"}': 2**70,
    b'{"id": 1e999, "input": "x"}': None,
    b'{"id": [1, "a"], "input": "x"}': "[1, 'a']",
    b'{"id": 7, "input": "x"}': 7,
}


def good(name: str) -> bytes:
    return json.dumps({"id": name, "input": TEXT}).encode()


@pytest.fixture(scope="module")
def student(scale_bundle):
    with Student.load(scale_bundle, threads=1) as found:
        yield found


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_every_row_is_answered_or_says_why_not(student, tmp_path, form):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good("first"), *POISON, *ODD, good("last")]))
    (unit,) = plan_units(str(path), 10**9)
    answers = answer_rows(student, list(read_unit(unit)))
    assert [answer["id"] for answer in answers][-len(ODD) - 1 :] == [*ODD.values(), "last"]
    for answer, said in zip(answers[1:], POISON.values(), strict=False):
        assert said in answer["error"]
        assert "label" not in answer
    assert all("error" not in answer for answer in (answers[0], *answers[-len(ODD) - 1 :]))
    alone = answer_rows(student, [("", {"input": TEXT})])[0]["probabilities"]
    assert answers[0]["probabilities"] == answers[-1]["probabilities"] == alone
    write_shard(str(tmp_path), f"part.{form}", answers)
    assert len(list(read_unit(plan_units(str(tmp_path / f"part.{form}"), 10**9)[0]))) == len(answers)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "cells",
    [
        ["wait|close", '["wait", "close"]', None, "dispatch"],
        [["wait", "close"], ["wait", "wait", "close"], None, ["dispatch"]],
    ],
    ids=["cells", "lists"],
)
def test_both_engines_give_the_same_answers(student, scale_bundle, sbs_edge_cli, tmp_path, kind, cells):
    rows = [{"id": i, "input": f"{TEXT} {i}", "choices": cell} for i, cell in enumerate(cells)]
    path = tmp_path / f"rows{kind}"
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more, labels in (((), None), (("--label", "wait", "--label", "close"), ["wait", "close"])):
        done = sbs_edge_cli("predict", scale_bundle, path, "--threads", "1", *more)
        assert done.returncode == 0, done.stderr
        (unit,) = plan_units(str(path), 10**9)
        answers = answer_rows(student, list(read_unit(unit)), labels=labels)
        assert answers == [json.loads(line) for line in done.stdout.splitlines()]
    assert set(answers[0]["probabilities"]) == {"wait", "close"}


class Worker:
    """Writes a shard, or fails as its folder's name says."""

    def __init__(self, out: str, form: str, how: str = "fine") -> None:
        if how == "start":
            raise IntegrityError("The bundle is damaged.")
        self._out, self._form, self._how = out, form, how

    def __call__(self, batch):
        unit = unit_of(batch)
        if self._how == "request":
            raise UsageError("There is no such label.")
        if self._how == "data" and unit.index != 1:
            raise DataError(f"{unit.uri} is damaged.")
        if self._how == "group":
            raise ExceptionGroup("unhandled errors in a TaskGroup", [ValueError("the one\nthat counts")])
        write_shard(self._out, shard_name(unit, self._form), [{"id": unit.index}])
        return {
            "figures": [
                json.dumps({"unit": unit.index, "rows": 1, "errors": 0, "seconds": 0.0, "ended": 1.0})
            ]
        }


def test_a_workers_exception_keeps_its_words(tmp_path):
    batch = {"index": [0], "uri": ["a.jsonl"], "start": [0], "stop": [9], "name": ["a.jsonl"]}
    found = {}
    for how in ("fine", "start", "request", "data", "group"):
        worker = scale_run._guarded(Worker)(out=str(tmp_path), form="jsonl", how=how)
        found[how] = json.loads(worker(batch)["figures"][0])
        assert found[how]["unit"] == 0
    assert found["fine"]["rows"] == 1
    assert found["start"]["failed"] == "The bundle is damaged."
    assert found["group"]["failed"] == "ValueError: the one that counts"
    assert "Traceback" in found["group"]["trace"]
    assert {how: figures.get("exit_code") for how, figures in found.items()} == {
        "fine": None, "start": 4, "request": 2, "data": 2, "group": 1,
    }  # fmt: skip
    assert [how for how, figures in found.items() if figures.get("ends_run")] == ["start", "request"]
    assert scale_run._guarded(Worker).__name__ == "Worker"  # by which an actor's process is known


def units_of(tmp_path, count: int):
    for number in range(count):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number:02}.jsonl").write_bytes(good("a"))
    return str(tmp_path / "in")


class TestRay:
    """On a cluster of one."""

    pytestmark = ray_test

    @pytest.mark.parametrize(
        ("how", "kind", "said"),
        [
            ("start", IntegrityError, "A worker could not start: The bundle is damaged. Finished"),
            ("request", UsageError, "There is no such label. That ended the run at part-"),
            ("group", SbsEdgeError, "ValueError: the one that counts. Finished"),
        ],
    )
    def test_what_ends_a_run_is_said(self, local_ray, tmp_path, how, kind, said):
        data, out = units_of(tmp_path, 20), tmp_path / "out"
        with pytest.raises(kind) as caught:
            scale_run.run_units(Worker, {"how": how}, data, str(out), settings={}, workers=1)
        assert said in str(caught.value)
        assert caught.value.exit_code == kind.exit_code
        assert "in a worker" in str(caught.value.__cause__)
        assert "\n" not in str(caught.value)
        assert [path.name for path in out.iterdir()] == ["_plan.json"]
        # The actors are gone, and the same cluster serves the next run.
        assert scale_run.run_units(Worker, {}, data, str(out), settings={}, workers=2)["units_run"] == 20

    def test_a_damaged_file_costs_itself_alone(self, local_ray, tmp_path):
        data, out = units_of(tmp_path, 3), tmp_path / "out"
        with pytest.raises(
            UsageError, match=r"2 shards could not be made, the first is part-000000-"
        ) as caught:
            scale_run.run_units(Worker, {"how": "data"}, data, str(out), settings={}, workers=1)
        assert f"(from {data}/00.jsonl, bytes 0 to " in str(caught.value)
        assert len(list(out.glob("part-000001-*"))) == 1
        assert scale_run.run_units(Worker, {}, data, str(out), settings={}, workers=1)["units_run"] == 2

    def test_the_command_answers_what_it_can(self, scale_bundle, sbs_edge_cli, tmp_path):
        lines = [good("first"), *POISON, *ODD, good("last")]
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "rows.jsonl").write_bytes(b"\n".join(lines))
        for form in ("jsonl", "parquet"):
            out = tmp_path / form
            done = sbs_edge_cli(
                "predict", scale_bundle, "--engine", "ray", "--input", tmp_path / "in" / "*.jsonl", "--output", out,
                "--shard-mb", "0.001", "--shard-format", form, "--workers", "1",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            totals = json.loads(done.stdout.splitlines()[-1])
            assert (totals["rows_run"], totals["errors"]) == (len(lines), len(POISON))
        table = pq.ParquetDataset(tmp_path / "parquet").read().to_pylist()
        shards = sorted((tmp_path / "jsonl").glob("part-*"))
        rows = [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
        assert len(rows) == len(table) == len(lines)
        for row, cells in zip(rows, table, strict=True):
            assert cells["id"] == (row["id"] if isinstance(row["id"], str | None) else json.dumps(row["id"]))
            assert (row.get("label"), row.get("error")) == (cells["label"], cells["error"])

    def test_a_page_that_cannot_be_read_is_named_and_the_rest_is_answered(
        self, scale_bundle, sbs_edge_cli, tmp_path
    ):
        path, out = tmp_path / "rows.parquet", tmp_path / "out"
        whole = pa.table({"input": [f"{TEXT} {i}" for i in range(30)], "note": ["x" * 200] * 30})
        pq.write_table(whole, path, row_group_size=10, compression="none", use_dictionary=False)
        sound = path.read_bytes()
        start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
        path.write_bytes(sound[:start] + b"\xff" * 40 + sound[start + 40 :])
        command = (
            "predict", scale_bundle, path, "--engine", "ray", "--out", out, "--shard-mb", "0.001", "--workers", "1",
        )  # fmt: skip
        done = sbs_edge_cli(*command)
        assert done.returncode == 2
        assert f"(from {path}, row groups 1 to 2) could not be made: {path} cannot be read" in done.stderr
        assert len(list(out.glob("part-*"))) == 2
        path.write_bytes(sound)
        assert sbs_edge_cli(*command).returncode == 0
        assert sum(len(shard.read_text().splitlines()) for shard in out.glob("part-*")) == 30

    def test_an_engine_that_stops_says_at_which_file(self, local_ray, tmp_path, monkeypatch):
        monkeypatch.setattr(scale_run, "UNIT_RETRIES", 0)

        class Crash(Worker):
            def __call__(self, batch):
                os._exit(1)

        with pytest.raises(
            SbsEdgeError, match=r"Ray ended the run \(Actor.*part-000000-.*00\.jsonl, bytes 0"
        ):
            scale_run.run_units(
                Crash, {}, units_of(tmp_path, 1), str(tmp_path / "out"), settings={}, workers=1
            )

    def test_poison_among_many_units_is_all_that_is_not_answered(self, scale_bundle, local_ray, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", 500)
        data.write_bytes(data.read_bytes() + b"\n".join(POISON))
        totals = predict_with_ray(scale_bundle, str(data), tmp_path / "out", shard_bytes=5_000, cpus_each=0.5)
        assert (totals["rows_run"], totals["errors"]) == (500 + len(POISON), len(POISON))
