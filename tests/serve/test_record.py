"""``serve --record`` keeps doubtful and escalated texts, privately and within its bounds, where ``annotate`` reads them."""

from __future__ import annotations

import asyncio
import json
import stat
import threading

import httpx
import pytest

from sbs_edge.data.check import check_dataset
from sbs_edge.data.readers import read_examples
from sbs_edge.errors import UsageError
from sbs_edge.runtime.student import Student
from sbs_edge.serve.escalate import Escalation
from sbs_edge.serve.inference_request import InferenceRequest
from sbs_edge.serve.metrics import Metrics
from sbs_edge.serve.record import MAX_WAITING_CHARACTERS, Recorder


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _answer(probability, **more):
    return {"label": "wait", "probability": probability, "abstained": False, "escalated": False, **more}


def _count(metrics, result):
    return metrics.registry.get_sample_value("sbs_edge_recorded_total", {"model": "m", "result": result}) or 0


def test_only_doubtful_and_escalated_answers_are_kept(hand_bundle, running, tmp_path):
    """The engine made by hand is always 0.7 sure."""
    path = tmp_path / "new" / "doubtful.jsonl"

    async def go():
        def reply(request):
            text = json.loads(request.content)["messages"][-1]["content"]
            label = "schedule" if "easy" in text else "nonsense"
            return httpx.Response(
                200, json={"choices": [{"message": {"content": label}, "finish_reason": "stop"}]}
            )

        teacher = Escalation("http://teacher/v1", "big", transport=httpx.MockTransport(reply))
        async with running(hand_bundle, None, teacher, abstain_below=0.9, record=path) as app:
            await app.predict(["an easy one", "a hard one"])
        async with running(hand_bundle, abstain_below=0.0, record=path, record_below=0.7) as app:
            await app.predict(["a sure one"])
            await app.predict(["x"] * 33)  # refused
        async with running(hand_bundle, abstain_below=0.0, record=path, record_below=0.71) as app:
            await app.predict(["naïve\nunsure"], explain=True)

    asyncio.run(asyncio.wait_for(go(), 30))
    first, second, third = _rows(path)
    assert (first["input"], first["reason"], first["teacher_label"]) == (
        "an easy one",
        "escalated",
        "schedule",
    )
    assert first["probability"] == 0.7
    assert first["student_label"] in ("call", "schedule", "wait")
    assert (second["input"], second["reason"], "teacher_label" in second) == ("a hard one", "unsure", False)
    assert (third["input"], third["model"], third["version"]) == ("naïve\nunsure", "hand", "1")
    assert len({row["id"] for row in (first, second, third)}) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    read = read_examples(path)
    assert ([row.input for row in read.examples], read.rejected) == (
        ["an easy one", "a hard one", "naïve\nunsure"],
        [],
    )
    assert [row.label for row in read.examples] == [None] * 3  # the student's guess is not a gold label


def test_without_the_flag_nothing_is_kept(hand_bundle, running, tmp_path):
    async def go():
        async with running(hand_bundle, abstain_below=0.9) as app:
            await app.predict(["unsure"])
            assert app.service.recorder is None

    asyncio.run(go())
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_slow_disk_stops_nobody_and_memory_stays_bounded(tmp_path, monkeypatch):
    go_on, metrics = threading.Event(), Metrics()
    written = []

    def slowly(self, line):
        go_on.wait(20)
        written.append(line)
        return "kept"

    monkeypatch.setattr(Recorder, "_append", slowly)
    recorder = Recorder(tmp_path / "r.jsonl", 0.8, 1.0, 1 << 20, metrics)
    request = InferenceRequest(texts=["t" * 9_500] * 10)
    for _ in range(100):  # 10 MB, none of it written yet
        recorder.offer("m", "1", request, [_answer(0.5)] * 10)
    dropped = _count(metrics, "dropped")
    assert dropped == 1000 - MAX_WAITING_CHARACTERS // 10_000
    go_on.set()
    recorder.close()
    assert (len(written), _count(metrics, "kept")) == (1000 - dropped, 1000 - dropped)
    recorder.offer("m", "1", request, [_answer(0.9)] * 10)  # sure: neither kept nor counted
    assert _count(metrics, "dropped") == dropped


def test_rows_that_a_stop_cuts_off_are_logged(tmp_path, monkeypatch, json_logs):
    go_on = threading.Event()
    monkeypatch.setattr(Recorder, "_append", lambda self, line: go_on.wait(20) and "kept")
    monkeypatch.setattr("sbs_edge.serve.record._CLOSE_S", 0.01)
    recorder = Recorder(tmp_path / "r.jsonl", 0.8, 1.0, 1 << 20, Metrics())
    recorder.offer("m", "1", InferenceRequest(texts=["secret text"] * 3), [_answer(0.5)] * 3)
    recorder.close()
    (line,) = [json.loads(line) for line in json_logs.getvalue().splitlines() if "record_cut_off" in line]
    assert line["waiting_characters"] >= 2 * len("secret text")  # the first row may be under way
    assert "secret" not in json_logs.getvalue()
    go_on.set()
    recorder._thread.join(20)


def test_old_parts_go_and_all_of_them_stay_below_the_bound(tmp_path):
    path, metrics = tmp_path / "r.jsonl", Metrics()
    recorder = Recorder(path, 0.8, 1.0, 8192, metrics)
    for number in range(200):
        recorder.offer("m", "1", InferenceRequest(texts=[f"row {number} {'x' * 100}"]), [_answer(0.5)])
    recorder.offer("m", "1", InferenceRequest(texts=["y" * 3000]), [_answer(0.5)])
    recorder.close()
    parts = [tmp_path / name for name in ("r.3.jsonl", "r.2.jsonl", "r.1.jsonl", "r.jsonl")]
    assert sum(part.stat().st_size for part in parts) <= 8192
    assert all(stat.S_IMODE(part.stat().st_mode) == 0o600 for part in parts)
    numbers = [int(row["input"].split()[1]) for part in parts for row in _rows(part)]
    assert numbers == list(range(200 - len(numbers), 200))
    assert (_count(metrics, "kept"), _count(metrics, "dropped")) == (200, 1)
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == sorted(part.name for part in parts)


def test_two_processes_may_share_the_file_and_an_open_one_becomes_private(tmp_path):
    path = tmp_path / "r.jsonl"
    path.touch(0o644)
    metrics = [Metrics(), Metrics()]
    pair = [Recorder(path, 0.8, 1.0, 16384, own) for own in metrics]
    for number in range(100):
        for recorder in pair:
            recorder.offer("m", "1", InferenceRequest(texts=[f"row {number}"]), [_answer(0.5)])
    for recorder in pair:
        recorder.close()
    parts = list(tmp_path.glob("*.jsonl"))
    rows = [row for part in parts for row in _rows(part)]  # whole rows only
    assert len(rows) == len({row["id"] for row in rows}) > 0
    assert sum(part.stat().st_size for part in parts) <= 16384
    assert [_count(own, "kept") for own in metrics] == [100, 100]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_share_is_kept_and_a_full_disk_is_counted(tmp_path, monkeypatch, json_logs):
    metrics = Metrics()
    recorder = Recorder(tmp_path / "r.jsonl", 0.8, 0.25, 1 << 22, metrics)
    for _ in range(100):
        recorder.offer("m", "1", InferenceRequest(texts=["secret text"] * 20), [_answer(0.5)] * 20)
    recorder.close()
    assert 400 < len(_rows(tmp_path / "r.jsonl")) < 600
    assert "secret" not in json_logs.getvalue()

    def full(self, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Recorder, "_append", full)
    recorder = Recorder(tmp_path / "s.jsonl", 0.8, 1.0, 1 << 22, metrics)
    recorder.offer("m", "1", InferenceRequest(texts=["secret text"] * 3), [_answer(0.5)] * 3)
    recorder.close()
    assert _count(metrics, "failed") == 3
    failures = [line for line in json_logs.getvalue().splitlines() if "record_failed" in line]
    assert len(failures) == 1
    assert "secret" not in json_logs.getvalue()


def test_a_place_that_cannot_be_written_and_another_suffix_are_refused(tmp_path, sbs_edge_cli, bundles):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        Recorder(tmp_path / "file" / "r.jsonl", 0.8, 1.0, 1 << 22, Metrics())
    done = sbs_edge_cli("serve", bundles["closed"], "--record", tmp_path / "rows.txt", "--dry-run")
    assert (done.returncode, "must end in .jsonl" in done.stderr) == (2, True), done.stderr
    done = sbs_edge_cli("serve", bundles["closed"], "--record", tmp_path / "file" / "r.jsonl", "--dry-run")
    assert (done.returncode, "cannot be written" in done.stderr) == (2, True), done.stderr


def test_a_server_records_and_the_rows_are_read_as_data(serve_process, bundles, texts, tmp_path):
    path = tmp_path / "doubtful.jsonl"
    server = serve_process(bundles["choices"], "--record", path, "--record-below", "1")
    choices = [["wait", "dispatch", "adjust"], ["close", "wait"]]
    answer = httpx.post(f"{server.url}/v1/predict", json={"texts": texts[:2], "labels": choices}).json()
    assert server.stop() == 0
    rows = _rows(path)
    assert [row["input"] for row in rows] == texts[:2]
    assert [row["choices"] for row in rows] == choices
    assert [row["student_label"] for row in rows] == [p["label"] for p in answer["predictions"]]
    assert [row["probability"] for row in rows] == [p["probability"] for p in answer["predictions"]]
    with Student.load(bundles["choices"]) as student:
        read = read_examples(path).examples
        again = student.predict([row.input for row in read], labels=[row.choices for row in read])
    assert [a.label for a in again] == [row["student_label"] for row in rows]
    assert "neither 'label' nor 'teacher_label'" in str(check_dataset(path)["splits"][0]["rejected"])
