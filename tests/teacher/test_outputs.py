"""Finished outputs: a Batch file made here, answered elsewhere, read back."""

from __future__ import annotations

import json

import pytest

from sbs_edge.errors import DataError
from sbs_edge.teacher.annotate import Settings, annotate_outputs
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.collect import calls_for, unfinished
from sbs_edge.teacher.cost import Prices
from sbs_edge.teacher.outputs import emit_batch, read_batch_outputs
from sbs_edge.teacher.presets import PRESETS

TASK = PRESETS["hvac"]
SETTINGS = Settings("desk", Sampling(0.7, 100), samples=2, prices=Prices(1.0, 2.0))


def answered(paths, answers, *, lose=()):
    """The service's answer to the input files: any order, some lines failed."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    for number, request in enumerate(reversed(lines)):
        assert set(request) == {"custom_id", "method", "url", "body"}
        body = request["body"]
        text = answers[body["messages"][-1]["content"]]
        if number in lose:
            yield {
                "id": "b",
                "custom_id": request["custom_id"],
                "response": None,
                "error": {"code": "expired"},
            }
            continue
        completion = {
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            ],
            "usage": {"prompt_tokens": 200, "completion_tokens": 20},
            "model": body["model"],
        }
        yield {
            "id": f"batch_req_{number}",
            "custom_id": request["custom_id"],
            "response": {"status_code": 200, "request_id": "r", "body": completion},
            "error": None,
        }


def test_a_batch_goes_out_and_comes_back(desk, desk_answers, tmp_path):
    rows = desk.train[:30]
    calls = list(calls_for(rows, TASK, "desk", SETTINGS.sampling, 2))
    paths = emit_batch(calls, "desk", SETTINGS.sampling, tmp_path / "in.jsonl", max_requests=25)
    assert [p.name for p in paths] == ["in-000.jsonl", "in-001.jsonl", "in-002.jsonl"]
    out = tmp_path / "out.jsonl"
    lost = answered(paths, desk_answers(rows), lose={0, 1})
    out.write_text("".join(json.dumps(line) + "\n" for line in lost))
    records = read_batch_outputs([out], SETTINGS.prices)
    result = annotate_outputs(rows, TASK, records, SETTINGS)
    # The two lost lines are both samples of the last row.
    assert [r.example.teacher_label for r in result.results[:-1]] == [r.teacher_label for r in rows[:-1]]
    assert result.results[-1].reason == "expired"
    assert sum(r.cost for r in result.records) == pytest.approx(58 * (200 * 1 + 20 * 2) / 1e6)
    left = list(unfinished(rows, TASK, "desk", SETTINGS.sampling, 2, records, retry_failed=True))
    assert {call.key for call in left} == {call.key for call in calls[-2:]}


def test_outputs_of_another_task_are_refused(desk, tmp_path):
    rows = desk.train[:3]
    with pytest.raises(DataError, match="custom_id"):
        annotate_outputs(rows, TASK, {"0" * 64: next(iter(records_of(tmp_path)))}, SETTINGS)
    with pytest.raises(DataError, match="3 rows"):
        annotate_outputs(rows, TASK, list(records_of(tmp_path)), SETTINGS)


def records_of(tmp_path):
    from sbs_edge.teacher.outputs import read_paper_outputs

    (tmp_path / "x_CoT_0.json").write_text(json.dumps(["one"]))
    return read_paper_outputs([tmp_path / "x_CoT_0.json"])


def test_numbered_files_are_read_in_the_order_of_their_numbers(tmp_path):
    from sbs_edge.teacher.outputs import read_paper_outputs

    for number in (10, 2, 0):
        (tmp_path / f"train_CoT_{number}.json").write_text(json.dumps([str(number)]))
    assert [r.text for r in read_paper_outputs(tmp_path.glob("*.json"))] == ["0", "2", "10"]
