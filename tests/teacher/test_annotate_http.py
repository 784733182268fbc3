"""Annotation against a real HTTP server: nothing paid twice, limits kept, failures kept and retried."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from sbs_edge.cli.app import main
from sbs_edge.data.readers import read_examples
from sbs_edge.teacher.annotate import Settings, annotate
from sbs_edge.teacher.ask import TeacherUnavailableError
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.cost import Prices
from sbs_edge.teacher.openai_api import OpenAITeacher
from sbs_edge.teacher.presets import PRESETS

TASK = PRESETS["hvac"]


def run(teacher, rows, journal, *, task=TASK, **settings):
    chosen = Settings("desk", Sampling(max_tokens=100), **settings)
    return annotate(rows, task, OpenAITeacher("desk", teacher.url), journal, chosen)


def command(teacher, data, out, *extra):
    return [
        *(sys.executable, "-m", "sbs_edge", "annotate", str(data), "--task", "hvac", "--out", str(out)),
        *("--base-url", teacher.url, "--model", "desk", "--max-tokens", "100", *extra),
    ]


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_both_protocols_give_the_teachers_own_answers(http_teacher, desk, tmp_path, form):
    task = TASK.model_copy(update={"form": form})
    rows = desk.train[:40]
    result = run(http_teacher, rows, tmp_path / "j.jsonl", task=task, concurrency=5)
    assert [r.example.teacher_label for r in result.results] == [row.teacher_label for row in rows]
    assert [r.example.rationale for r in result.results] == [row.rationale for row in rows]
    assert 1 < http_teacher.most_at_once <= 5
    # The gold label is in no request: neither as a field nor in the text that is asked about.
    assert all("label" not in body for body in http_teacher.bodies)


def test_half_a_character_of_the_teachers_is_spelt_out_and_paid_for_once(
    http_teacher, desk, raw_rows, tmp_path
):
    broken = desk.train[3].input
    http_teacher.answers[broken] = "half \ud800 " + http_teacher.answers[broken]
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        ran = subprocess.run(
            command(http_teacher, raw_rows(desk.train[:8]), out), capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr
    written = {row.input: row.rationale for row in read_examples(out).examples}
    assert written[broken].startswith(r"half \ud800 ")
    assert http_teacher.finished()[broken] == 1


def test_a_file_that_annotate_did_not_write_is_not_written_over(http_teacher, desk, raw_rows, tmp_path):
    data = raw_rows(desk.train[:2])
    mine = tmp_path / "answers.jsonl"  # --output for --outputs is one letter
    mine.write_text('{"text": "mine"}\n')
    for flag in ("--out", "--output"):
        call = [flag if part == "--out" else part for part in command(http_teacher, data, mine)]
        ran = subprocess.run(call, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 2
        assert "answers.jsonl exists" in " ".join(ran.stderr.split())
    assert mine.read_text() == '{"text": "mine"}\n'
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, data.name}
    assert not http_teacher.calls


def test_a_finished_run_asks_nothing_again_and_other_parameters_ask_again(http_teacher, desk, tmp_path):
    rows = desk.train[:10]
    run(http_teacher, rows, tmp_path / "j.jsonl")
    run(http_teacher, rows, tmp_path / "j.jsonl")
    assert sum(http_teacher.finished().values()) == 10
    annotate(
        rows,
        TASK,
        OpenAITeacher("desk", http_teacher.url),
        tmp_path / "j.jsonl",
        Settings("desk", Sampling(max_tokens=101)),
    )
    assert sum(http_teacher.finished().values()) == 20


def test_equal_prompts_are_paid_for_once(http_teacher, desk, tmp_path):
    import dataclasses

    twice = [*desk.train[:5], *(dataclasses.replace(r, id=f"again-{r.id}") for r in desk.train[:5])]
    result = run(http_teacher, twice, tmp_path / "j.jsonl")
    assert max(http_teacher.finished().values()) == 1
    assert [r.reason for r in result.results] == [None] * 5 + ["duplicate-input"] * 5


@pytest.mark.long
def test_sigkill_at_random_points_repeats_no_finished_call(http_teacher, desk, raw_rows, tmp_path):
    """Kill the client at random moments; every journalled answer must never be asked for again."""
    data, out = raw_rows(desk.train), tmp_path / "out.jsonl"
    journal = tmp_path / "out.journal.jsonl"
    http_teacher.latency_seconds = 0.05
    concurrency, kills, rng = 4, 0, random.Random(5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(40):
        done_before = set()
        if journal.exists():
            lines = journal.read_bytes().split(b"\n")[:-1]
            done_before = {json.loads(line)["key"] for line in lines}
        start = len(http_teacher.bodies)
        process = subprocess.Popen(
            command(http_teacher, data, out, "--concurrency", str(concurrency)),
            env=environment,
            stderr=subprocess.PIPE,
        )
        # Not before the first answer of this run, so that every kill falls into the work.
        while process.poll() is None and len(http_teacher.bodies) == start:
            time.sleep(0.01)
        try:
            process.wait(rng.uniform(0.0, 0.5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        from sbs_edge.teacher.collect import row_keys

        settings = Sampling(max_tokens=100)
        asked = {b["messages"][-1]["content"] for b in http_teacher.bodies[start:]}
        by_input = {row.input: row_keys(row, TASK, "desk", settings)[0] for row in desk.train}
        assert not {by_input[text] for text in asked} & done_before, "a finished call was paid for again"
        if process.returncode == 0:
            break
    assert process.returncode == 0
    assert kills >= 3
    # Every call beyond one a row was on its way when a kill came.
    assert len(http_teacher.bodies) <= len(desk.train) + kills * concurrency
    found = read_examples(out).examples
    assert [e.teacher_label for e in found] == [row.teacher_label for row in desk.train]
    assert all(e.label is None for e in found)


def test_announced_limits_are_kept(http_teacher, desk, tmp_path):
    """With the headers, the client waits by itself; at most the first burst may be refused."""
    http_teacher.window = (8, 0.5)
    result = run(http_teacher, desk.train[:40], tmp_path / "j.jsonl", concurrency=8)
    assert all(r.reason is None for r in result.results)
    assert http_teacher.statuses()[429] <= 8
    assert result.stats.waited_seconds > 1.0
    times = sorted(at for at, _, status in http_teacher.calls if status == 200)
    assert times[-1] - times[0] >= 1.9  # 40 calls, 8 a half second


def test_retry_after_is_obeyed_when_nothing_is_announced(http_teacher, desk, tmp_path):
    http_teacher.window, http_teacher.announce_limits = (8, 0.5), False
    result = run(http_teacher, desk.train[:24], tmp_path / "j.jsonl", concurrency=4, max_attempts=30)
    assert all(r.reason is None for r in result.results)
    assert http_teacher.statuses()[429] >= 1
    # Between a refusal and the next request lies the wait of 0.2 s that it asked for, up to the
    # calls that were on their way already.
    calls = sorted(http_teacher.calls)
    refused = [at for at, _, status in calls if status == 429]
    for at in refused:
        assert sum(at + 0.03 < other < at + 0.18 for other, *_ in calls) <= 4


def test_server_faults_are_retried_with_growing_waits(http_teacher, desk, tmp_path):
    http_teacher.fail_first = 6
    result = run(http_teacher, desk.train[:12], tmp_path / "j.jsonl", concurrency=3)
    assert all(r.reason is None for r in result.results)
    assert http_teacher.statuses()[500] == 6
    assert result.stats.attempts == 18


def test_unanswered_calls_are_left_to_the_next_run(http_teacher, desk, tmp_path):
    rows = desk.train[:6]
    http_teacher.status_for = {rows[2].input: 503}
    result = run(http_teacher, rows, tmp_path / "j.jsonl", max_attempts=2)
    assert [r.reason for r in result.results] == [None, None, "unanswered", None, None, None]
    assert result.stats.unanswered == {"http-503": 1}
    http_teacher.status_for = {}
    assert all(r.reason is None for r in run(http_teacher, rows, tmp_path / "j.jsonl").results)
    assert sum(http_teacher.finished().values()) == 6


def test_a_wrong_key_stops_the_run_at_once(http_teacher, desk, tmp_path):
    http_teacher.status_for = {row.input: 401 for row in desk.train}
    with pytest.raises(TeacherUnavailableError, match="http-401"):
        run(http_teacher, desk.train, tmp_path / "j.jsonl", concurrency=3)
    assert len(http_teacher.calls) <= 3


def test_a_dead_address_stops_the_run_and_names_it(desk, tmp_path):
    teacher = OpenAITeacher("desk", "http://127.0.0.1:9/v1")
    with pytest.raises(TeacherUnavailableError, match="connection"):
        annotate(desk.train, TASK, teacher, tmp_path / "j.jsonl", Settings("desk", max_attempts=1))


def test_bad_answers_are_kept_counted_and_retried(http_teacher, desk, tmp_path):
    rows = desk.train[:6]
    good = dict(http_teacher.answers)
    http_teacher.answers.update(
        {
            rows[0].input: "",
            rows[1].input: "I'm sorry, I cannot help with that.",
            rows[2].input: "the plant is in heating mode ,",
            rows[3].input: "It is warm. So the answer is perhaps.",
        }
    )
    http_teacher.status_for = {rows[4].input: 400}
    first = run(http_teacher, rows, tmp_path / "j.jsonl")
    assert [r.reason for r in first.results] == [
        *("empty", "refused", "marker-missing", "label-not-in-set", "rejected", None)
    ]
    assert [len(r.texts) for r in first.results] == [1] * 6  # kept, whatever they say
    http_teacher.answers, http_teacher.status_for = good, {}
    n_calls = len(http_teacher.calls)
    assert run(http_teacher, rows, tmp_path / "j.jsonl").results[0].reason == "empty"
    assert len(http_teacher.calls) == n_calls
    again = run(http_teacher, rows, tmp_path / "j.jsonl", retry_failed=True)
    assert all(r.reason is None for r in again.results)
    assert len(http_teacher.calls) == n_calls + 5


def test_cut_off_answers_are_recognised(http_teacher, desk, tmp_path):
    http_teacher.finish_reason = "length"
    http_teacher.answers = dict.fromkeys(http_teacher.answers, "the plant is in heating")
    result = run(http_teacher, desk.train[:3], tmp_path / "j.jsonl")
    assert {r.reason for r in result.results} == {"cut-off"}


def test_the_budget_is_never_exceeded_and_can_be_raised(http_teacher, desk, tmp_path):
    prices = Prices(100.0, 400.0)
    limit = 1.0
    first = run(http_teacher, desk.train, tmp_path / "j.jsonl", prices=prices, max_cost=limit, concurrency=8)
    spent = sum(record.cost for record in first.records)
    assert first.stats.stopped == "budget"
    # What the server counted, by its own numbers, at the given prices.
    counted = 0.0
    for line in (tmp_path / "j.jsonl").read_text().splitlines():
        row = json.loads(line)
        counted += (row["prompt_tokens"] * 100 + row["completion_tokens"] * 400) / 1e6
    assert counted == pytest.approx(spent)
    assert 0.8 * limit < spent <= limit
    n_calls = len(http_teacher.calls)
    run(http_teacher, desk.train, tmp_path / "j.jsonl", prices=prices, max_cost=limit)
    assert len(http_teacher.calls) - n_calls <= 3  # the journal's spending counts
    last = run(http_teacher, desk.train, tmp_path / "j.jsonl", prices=prices, max_cost=100.0)
    assert all(r.reason is None for r in last.results)
    assert max(http_teacher.finished().values()) == 1


def test_self_consistency_votes_and_keeps_the_share(http_teacher, desk, tmp_path):
    """Five samples, three of them right: the majority, its rationale and 0.6 come out."""
    rows = desk.train[:4]
    seen: dict[str, int] = {}
    right = dict(http_teacher.answers)

    def answer(prompt: str, _: int) -> str:
        seen[prompt] = seen.get(prompt, 0) + 1
        if seen[prompt] in (1, 4):
            return "who knows . So the answer is wait." if seen[prompt] == 1 else "So the answer is"
        return right[prompt]

    http_teacher.answer = answer
    rows = [row for row in desk.train if row.teacher_label != "wait"][:4]
    settings = Settings("desk", Sampling(temperature=0.7, max_tokens=100, seed=11), samples=5, concurrency=1)
    result = annotate(rows, TASK, OpenAITeacher("desk", http_teacher.url), tmp_path / "j.jsonl", settings)
    assert [r.example.teacher_label for r in result.results] == [row.teacher_label for row in rows]
    assert [r.example.rationale for r in result.results] == [row.rationale for row in rows]
    assert [r.example.confidence for r in result.results] == [0.6] * 4
    assert {body["seed"] for body in http_teacher.bodies} == {11, 12, 13, 14, 15}


def test_the_command_reports_as_json_and_a_dry_run_asks_nobody(http_teacher, desk, raw_rows, tmp_path):
    data, out = raw_rows(desk.train[:20]), tmp_path / "a" / "out.jsonl"
    prices = ("--price-in", "1", "--price-out", "2", "--json")
    dry = subprocess.run(
        command(http_teacher, data, out, *prices, "--dry-run"), capture_output=True, text=True, check=True
    )
    assert not http_teacher.calls
    assert not out.exists()
    real = subprocess.run(
        command(http_teacher, data, out, *prices), capture_output=True, text=True, check=True
    )
    plan, report = json.loads(dry.stdout), json.loads(real.stdout)
    assert plan["calls"] == report["rows"] == report["annotated"] == 20
    # The estimate is from characters; the server here counts four a token.
    assert plan["prompt_tokens"] == pytest.approx(report["calls"]["prompt_tokens"], rel=0.35)
    assert report["calls"]["cost"] <= plan["most_cost"]
    assert out.with_suffix(".report.html").read_text().startswith("<!doctype html>")


def test_input_and_output_are_other_names(http_teacher, desk, raw_rows, tmp_path):
    data, out = raw_rows(desk.train[:4]), tmp_path / "out.jsonl"
    begin = (sys.executable, "-m", "sbs_edge", "annotate", "--task", "hvac")
    asked = ("--base-url", http_teacher.url, "--model", "desk", "--max-tokens", "100")
    own = {**os.environ, "OPENAI_API_KEY": "none"}

    def run(*more):
        command = [*begin, *asked, *map(str, more)]
        return subprocess.run(command, env=own, capture_output=True, text=True, timeout=120, check=False)

    done = run("--input", data, "--output", out)
    assert done.returncode == 0, done.stderr
    assert len(read_examples(out).examples) == 4
    for wrong, said in (
        ((data, "--input", data), "INPUT and --input are two names of the same option"),
        ((data, "--out", out, "--output", out), "--out and --output are two names of the same option"),
        ((), "give the rows as INPUT, or with --input"),
    ):
        done = run(*wrong)
        assert done.returncode == 2
        assert said in done.stderr
    assert len(http_teacher.calls) == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"input": "half \\ud800"}', "a lone surrogate in 'input'"),
        ('{"id": "\\ud800", "input": "x"}', "a lone surrogate in 'id'"),
        ('{"input": ' + "[" * 100_000, "broken JSON (nested too deeply)"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(capsys, tmp_path, line, said):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"input": "x"}\n' + line + "\n")
    assert main(["annotate", str(data), "--task", "hvac", "--dry-run"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{data}:2: " in shown
    assert said in shown


def test_rows_that_a_server_recorded_are_annotated_as_they_are(http_teacher, desk, tmp_path):
    """An escalated row carries the larger model's label, which the teacher's replaces."""
    rows = desk.train[:3]
    recorded = [
        {
            "id": f"r{i}", "input": row.input, "student_label": "wait", "probability": 0.4, "reason": "unsure",
            "model": "desk", "version": "1", "time": "2026-01-01T00:00:00+00:00",
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    recorded[1] |= {"reason": "escalated", "teacher_label": "nonsense"}
    data, out = tmp_path / "doubtful.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in recorded))
    command = [
        sys.executable, "-m", "sbs_edge", "annotate", data, "--task", "hvac", "--base-url", http_teacher.url,
        "--model", "desk", "--max-tokens", "100", "--out", out,
    ]  # fmt: skip
    own = {**os.environ, "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [str(part) for part in command], env=own, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = read_examples(out).examples
    assert [row.id for row in found] == ["r0", "r1", "r2"]
    assert [(row.teacher_label, row.rationale, row.label) for row in found] == [
        (row.teacher_label, row.rationale, None) for row in rows
    ]
