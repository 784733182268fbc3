"""Ray Data against the plain student: the same answers, once each, through kills and restarts."""

from __future__ import annotations

import json
import threading
import time

import psutil
import pytest

from sbs_edge.bench.scale.bench import write_rows
from sbs_edge.errors import UsageError
from sbs_edge.runtime.student import Student
from sbs_edge.scale.predict import predict_with_ray

pytestmark = [
    pytest.mark.long,
    # Ray leaves sockets and event loops to the interpreter's end.
    pytest.mark.filterwarnings("ignore"),
]


def shards(folder):
    return sorted(folder.glob("part-*.jsonl"))


def rows_of(folder):
    return [json.loads(line) for path in shards(folder) for line in path.read_text().splitlines()]


def expected(bundle, data):
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    with Student.load(bundle, threads=1) as student:
        answers = student.predict([line["input"] for line in lines])
    return [line["id"] for line in lines], [a.label for a in answers], [a.probability for a in answers]


def test_answers_equal_the_plain_student_row_by_row(scale_bundle, local_ray, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 3000)
    totals = predict_with_ray(scale_bundle, str(data), tmp_path / "out", shard_bytes=40_000, cpus_each=0.5)
    ids, labels, probabilities = expected(scale_bundle, data)
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == ids
    assert [row["label"] for row in rows] == labels
    assert [row["probability"] for row in rows] == pytest.approx(probabilities, abs=1e-5)
    assert totals["rows_run"] == 3000
    assert totals["units"] == len(shards(tmp_path / "out")) > 5


def test_a_killed_actor_costs_no_row_and_doubles_none(scale_bundle, local_ray, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 20_000)
    out = tmp_path / "out"
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        while not stop.is_set() and len(killed) < 2:
            done = len(shards(out)) if out.exists() else 0
            if done > 2 + 4 * len(killed):
                for process in psutil.process_iter(["pid", "name", "cmdline"]):
                    name = " ".join(process.info["cmdline"] or []) + (process.info["name"] or "")
                    if "PredictWorker" in name and process.pid not in killed:
                        process.kill()
                        killed.append(process.pid)
                        break
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        predict_with_ray(scale_bundle, str(data), out, shard_bytes=50_000)
    finally:
        stop.set()
        thread.join()
    assert killed, "no actor was found to kill"
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [f"row-{i}" for i in range(20_000)]
    assert not list(out.glob(".*.tmp")) or all(path.name.startswith(".") for path in out.glob(".*.tmp"))
    assert all("label" in row for row in rows)


def test_started_again_only_missing_shards_are_made(scale_bundle, local_ray, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 2000)
    out = tmp_path / "out"
    predict_with_ray(scale_bundle, str(data), out, shard_bytes=30_000)
    first = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards(out)}
    lost = list(first)[1:3]
    for name in lost:
        (out / name).unlink()
    totals = predict_with_ray(scale_bundle, str(data), out, shard_bytes=30_000)
    assert totals["units_run"] == 2
    for path in shards(out):
        mtime, content = first[path.name]
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == mtime) == (path.name not in lost)
    with pytest.raises(UsageError, match="differ in: settings"):
        predict_with_ray(scale_bundle, str(data), out, shard_bytes=30_000, explain=True)


def test_rows_that_cannot_be_answered_keep_their_place(scale_bundle, local_ray, tmp_path):
    lines = [
        '{"id": "a", "input": "the vent blows cold air ."}',
        "{oops",
        '{"id": "c"}',
        json.dumps({"id": "d", "input": "the vent blows cold air . " * 60}),
        '{"id": "e", "input": "the plant runs in heating mode ."}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    totals = predict_with_ray(scale_bundle, str(tmp_path / "rows.jsonl"), tmp_path / "out", form="parquet")
    import pyarrow.parquet as pq

    (shard,) = (tmp_path / "out").glob("part-*.parquet")
    rows = pq.read_table(shard).to_pylist()
    assert [row["id"] for row in rows] == ["a", "rows.jsonl@50", "c", "d", "e"]
    assert [row["error"] is None for row in rows] == [True, False, False, False, True]
    assert "limit" in rows[3]["error"]
    assert totals["errors"] == 3
