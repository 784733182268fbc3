"""Annotation on Ray Data: one output row an input row, and no finished call asked again."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.readers import read_examples
from sbs_edge.errors import SbsEdgeError, UsageError
from sbs_edge.scale.annotate import annotate_with_ray
from sbs_edge.teacher.annotate import Settings
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.presets import PRESETS

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Ray leaves sockets to the end


@pytest.fixture
def counting_teacher():
    """The chat protocol and a count of calls, without any limit."""
    rows = builtin_splits("ci", n_train=300).train
    answers = {row.input: f"{row.rationale} So the answer is {row.teacher_label}." for row in rows}
    calls: Counter = Counter()
    calls.answers, calls.fault = answers, 503  # what a test may change
    broken: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["messages"][-1]["content"]
            status = calls.fault if prompt in broken else 200
            calls[prompt] += status == 200
            message = {"role": "assistant", "content": answers[prompt]}
            content = {
                "id": "1", "object": "chat.completion", "created": 1, "model": "desk",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
            }  # fmt: skip
            payload = json.dumps(content if status == 200 else {"error": {"message": "busy"}}).encode()
            time.sleep(0.01)
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield rows, calls, broken, f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_every_row_once_and_a_second_run_finishes_the_first(counting_teacher, local_ray, tmp_path):
    rows, calls, broken, url = counting_teacher
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"id": r.id, "input": r.input}) + "\n" for r in rows) + "{oops\n")
    broken.add(rows[150].input)
    settings = Settings("desk", Sampling(max_tokens=60), concurrency=4, max_attempts=1)
    connection = {"backend": "openai", "base_url": url}

    def run():
        return annotate_with_ray(
            str(data), tmp_path / "out", PRESETS["hvac"], settings, connection, shard_bytes=8000
        )

    with pytest.raises(SbsEdgeError, match="unfinished"):
        run()  # one call stays unanswered, so its unit has no shard yet
    finished = len(list((tmp_path / "out").glob("part-*.jsonl")))
    broken.clear()
    totals = run()
    assert totals["units_run"] == totals["units"] - finished == 1
    lines = [
        json.loads(line)
        for shard in sorted((tmp_path / "out").glob("part-*.jsonl"))
        for line in shard.read_text().splitlines()
    ]
    assert [line["id"] for line in lines[:-1]] == [row.id for row in rows]
    assert [line["teacher_label"] for line in lines[:-1]] == [row.teacher_label for row in rows]
    assert "JSON" in lines[-1]["error"]
    assert set(calls.values()) == {1}  # through both runs
    assert len(read_examples(tmp_path / "out" / "part-*.jsonl").examples) == 300


def test_one_budget_holds_over_all_actors_and_a_greater_one_goes_on(counting_teacher, local_ray, tmp_path):
    rows, calls, _, url = counting_teacher
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"id": r.id, "input": r.input}) + "\n" for r in rows))
    connection = {"backend": "openai", "base_url": url}

    def run(limit):
        settings = Settings(
            "desk", Sampling(max_tokens=20), concurrency=4, max_attempts=1, max_total_tokens=limit
        )
        return annotate_with_ray(
            str(data), tmp_path / "out", PRESETS["hvac"], settings, connection, shard_bytes=8000
        )

    limit, each, most = (
        9_000,
        120,
        1_100,
    )  # a call is counted at 120 tokens, and reserved at what its text may take
    with pytest.raises(SbsEdgeError, match="The budget was used up"):
        run(limit)
    spent = sum(calls.values()) * each
    assert limit - most < spent <= limit  # none of it is stranded with a unit that did not need it
    with pytest.raises(SbsEdgeError, match="The budget was used up"):
        run(limit)
    assert sum(calls.values()) * each <= limit  # what earlier runs spent counts
    totals = run(len(rows) * each + most)
    assert set(calls.values()) == {1}
    assert len(calls) == len(rows)
    assert totals["errors"] == 0


def test_failed_rows_are_asked_again_and_no_others(counting_teacher, local_ray, tmp_path):
    rows, calls, _, url = counting_teacher
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"id": r.id, "input": r.input}) + "\n" for r in rows[:90]))
    connection = {"backend": "openai", "base_url": url}

    def run(**more):
        settings = Settings("desk", Sampling(max_tokens=60), concurrency=4, max_attempts=1, **more)
        return annotate_with_ray(
            str(data), tmp_path / "out", PRESETS["hvac"], settings, connection, shard_bytes=4000
        )

    good = calls.answers[rows[40].input]
    calls.answers[rows[40].input] = "I would rather not say."
    first = run()
    assert first["errors"] == 1
    shards = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*.jsonl")}
    assert run()["units_run"] == 0  # not asked again unless wanted
    calls.answers[rows[40].input] = good
    again = run(retry_failed=True)
    assert again["units_run"] == 1
    assert again["errors"] == 0
    assert [text for text, count in calls.items() if count > 1] == [rows[40].input]
    changed = [name for name, content in shards.items() if (tmp_path / "out" / name).read_bytes() != content]
    assert len(changed) == 1


def test_rows_that_cannot_be_asked_cost_themselves(counting_teacher, local_ray, tmp_path):
    rows, calls, _, url = counting_teacher
    lines = [json.dumps({"number": row.id, "input": row.input}).encode() for row in rows[:3]]
    bad = {
        b'{"number": "b", "input": "half \\ud800"}': ("b", "not UTF-8 (a lone surrogate in 'input')"),
        b'{"number": "\\ud800", "input": "x"}': ("\\ud800", "not UTF-8 (a lone surrogate in 'id')"),
        b'{"number": "c", "\\ud800": "x"}': ("c", "missing column 'input' (the columns are number, \\ud800)"),
        b'{"number": "d", "input": "x", "choices": {"a": 1}}': ("d", "wrong type of 'choices'"),
        b'{"input": ' + b"[" * 100_000: (None, "broken JSON (nested too deeply)"),
    }
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*lines[:2], *bad, lines[2]]))
    settings = Settings("desk", Sampling(max_tokens=60), concurrency=4, max_attempts=1)
    how = (tmp_path / "out", PRESETS["hvac"], settings, {"backend": "openai", "base_url": url})
    with pytest.raises(UsageError, match="is not a column mapping"):
        annotate_with_ray(str(tmp_path / "rows.jsonl"), *how, columns=["key=number"])
    totals = annotate_with_ray(str(tmp_path / "rows.jsonl"), *how, columns=["id=number"])
    assert (totals["rows_run"], totals["errors"], totals["annotated"]) == (8, 5, 3)
    (shard,) = (tmp_path / "out").glob("part-*.jsonl")
    got = [json.loads(line) for line in shard.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in (*got[:2], got[-1])] == [row.id for row in rows[:3]]
    assert len(calls) == 3
    for row, (identity, said) in zip(got[2:-1], bad.values(), strict=True):
        assert row["id"] == (identity or f"rows.jsonl@{sum(map(len, [*lines[:2], *bad][:-1])) + 6}")
        assert row["error"].startswith(said)


def test_input_and_output_are_other_names(counting_teacher, sbs_edge_cli, tmp_path):
    rows, calls, _, url = counting_teacher
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"id": r.id, "input": r.input}) + "\n" for r in rows[:5]))
    command = (
        "annotate", "--engine", "ray", "--input", tmp_path / "*.jsonl", "--output", out, "--task", "hvac",
        "--base-url", url, "--model", "desk", "--workers", "1", "--json",
    )  # fmt: skip
    done = sbs_edge_cli(*command, OPENAI_API_KEY="none")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["annotated"] == 5
    assert len(calls) == 5
    said = (tmp_path / "out.config.yaml").read_text()
    assert f"data: {tmp_path}/*.jsonl\n" in said
    assert f"out: {out}\n" in said


def test_what_a_teacher_refuses_ends_the_run_with_its_words(counting_teacher, sbs_edge_cli, tmp_path):
    rows, calls, broken, url = counting_teacher
    broken.add(rows[0].input)
    calls.fault = 401
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"id": "a", "input": rows[0].input}) + "\n")
    done = sbs_edge_cli(
        "annotate", data, "--engine", "ray", "--output", tmp_path / "out", "--task", "hvac", "--workers", "1",
        "--base-url", url, "--model", "desk", OPENAI_API_KEY="none",
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: The teacher 'desk' refuses every call (" in done.stderr
    assert "That ended the run at part-000000-" in done.stderr
    assert f" (from {data}, bytes 0 to " in done.stderr
