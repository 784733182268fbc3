"""Reasoning that servers send apart from the answer: kept apart, used as the rationale, shortened by a second call."""

from __future__ import annotations

import json

import pytest
from scripted import GOOD, TASK, body

from sbs_edge.chat.marks import unmark
from sbs_edge.chat.protocol import read_answer, reasoning_text
from sbs_edge.data.readers import read_examples
from sbs_edge.teacher.annotate import Settings, estimate
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.cost import Prices
from sbs_edge.teacher.journal import Journal, Record
from sbs_edge.teacher.parse import parse_answer
from sbs_edge.teacher.task import parse_task

THOUGHT = "The buyer wants money. Or a new lamp? No: money back is what the message says."
SUMMARY = "The message asks for money back."


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": THOUGHT},
        {"reasoning": THOUGHT},
        {"thinking": THOUGHT},
        {"reasoning": {"content": THOUGHT}},
        {"reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": [{"text": THOUGHT}]}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
                {"type": "text", "text": GOOD},
            ]
        },
        {"reasoning": THOUGHT, "reasoning_content": THOUGHT},
    ],
)
def test_every_field_for_reasoning_is_read(message):
    answer = read_answer({"choices": [{"message": {"content": GOOD, **message}, "finish_reason": "stop"}]})
    assert (answer.text, answer.reasoning) == (GOOD, THOUGHT)


@pytest.mark.parametrize(
    "value", [None, 7, [], {}, [None], {"type": "reasoning.encrypted", "data": "x"}, [[[[[["deep"]]]]]]]
)
def test_a_field_without_text_is_not_reasoning(value):
    assert reasoning_text({"reasoning": value, "content": GOOD}) == ""


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"tool_calls": [{"function": {"name": "answer", "arguments": '{"label": "x"}'}}]}, '{"label": "x"}'),
        ({"tool_calls": [{"function": {"name": "answer", "arguments": {"label": "x"}}}]}, '{"label": "x"}'),
        ({"function_call": {"name": "answer", "arguments": '{"label": "x"}'}}, '{"label": "x"}'),
        ({"content": GOOD, "tool_calls": [{"function": {"arguments": '{"label": "x"}'}}]}, '{"label": "x"}'),
        ({"content": GOOD, "tool_calls": []}, GOOD),
        ({"content": GOOD, "tool_calls": [None, {"function": None}, {"function": {"arguments": 3}}]}, GOOD),
        ({"content": GOOD, "tool_calls": "none"}, GOOD),
    ],
)
def test_the_arguments_of_a_function_call_are_the_answer(message, text):
    answer = read_answer({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    assert (answer.text, answer.finish_reason) == (text, "stop")


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        (f"<think>\n{THOUGHT}\n</think>\n{GOOD}", THOUGHT),
        (f"{THOUGHT}</think>{GOOD}", THOUGHT),
        (f"[THINK]{THOUGHT}[/THINK]{GOOD}", THOUGHT),
        (f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}", THOUGHT),
        (f"Here is my thought process:\n{THOUGHT}\nHere is my response:\n{GOOD}", THOUGHT),
        (f"<think>One.</think><think>Two.</think>{GOOD}", "One.\nTwo."),
        (GOOD, ""),
    ],
)  # fmt: skip
def test_thought_between_marks_is_kept_apart(text, thought):
    found = unmark(text)
    assert (found.text, found.thought, found.reason) == (GOOD, thought, None)


def test_marks_are_named_in_the_task_file():
    text = f"<musing>{THOUGHT}</musing>\n{GOOD}"
    assert parse_answer(parse_task(TASK, "t"), text).reason == "unknown-mark"
    parsed = parse_answer(parse_task({**TASK, "thinking_marks": ["musing", "think"]}, "t"), text)
    assert (parsed.label, parsed.reasoning, parsed.reason) == ("refund", THOUGHT, None)


# -- through annotate ---------------------------------------------------------------------------------------------


def reasons(request, hit):
    """A reasoning server: thought in a field of its own; asked to rewrite, it gives the summary."""
    if request["messages"][0]["content"].startswith("Below are"):
        return 200, body(SUMMARY, reasoning_content="Shorter, then."), {}
    return 200, body(GOOD, reasoning_content=THOUGHT), {}


def test_reasoning_is_in_journal_and_rows_and_the_answers_rationale_stays(scripted, annotate, tmp_path):
    scripted.reply = reasons
    assert annotate()[0] == 0
    with Journal(tmp_path / "out.journal.jsonl") as journal:
        assert {record.reasoning for record in journal.records.values()} == {THOUGHT}
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {(row["rationale"], row["reasoning"]) for row in rows} == {
        ("The buyer asks for money back.", THOUGHT)
    }
    assert len(read_examples(str(tmp_path / "out.jsonl")).examples) == 6


def test_reasoning_becomes_the_rationale_without_another_request(scripted, annotate):
    scripted.reply = lambda request, hit: (200, body(f"<think>{THOUGHT}</think>{GOOD}"), {})
    assert annotate()[0] == 0
    code, _, rows = annotate("--rationale-from", "reasoning")
    assert (code, annotate.sent) == (0, 0)
    assert {row["rationale"] for row in rows} == {THOUGHT}
    code, _, rows = annotate(task={"rationale_from": "reasoning", "filters": {"max_rationale_words": 5}})
    assert (code, rows) == (1, [])


def test_an_answer_without_reasoning_is_named(annotate):
    code, said, rows = annotate("--rationale-from", "reasoning")
    assert (code, rows) == (1, [])
    assert "reasoning-missing" in said


def test_a_summary_is_a_second_call_paid_once_and_counted(scripted, annotate, tmp_path):
    scripted.reply = reasons
    flags = ("--rationale-from", "summary", "--price-in", "1", "--price-out", "10", "--structured", "off")
    code, _, rows = annotate(*flags, task={"filters": {"max_rationale_words": 7}})
    assert (code, annotate.sent) == (0, 12)
    assert {(row["rationale"], row["reasoning"]) for row in rows} == {(SUMMARY, THOUGHT)}
    asked = [r["messages"][1]["content"] for r in scripted.requests if len(r["messages"]) == 2][-6:]
    assert all(THOUGHT in text and "Answer: refund" in text and "message " in text for text in asked)
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert (report["calls"]["finished"], report["run"]["attempts"]) == (12, 12)
    assert (report["calls"]["prompt_tokens"], report["calls"]["cost"]) == (1200, 12 * 0.0003)
    assert annotate(*flags)[0] == 0
    assert annotate.sent == 0
    assert json.loads((tmp_path / "out.report.json").read_text())["calls"]["finished"] == 12


def test_a_summary_that_did_not_come_leaves_the_row_for_the_next_run(scripted, annotate):
    def reply(request, hit):
        summing = request["messages"][0]["content"].startswith("Below are")
        return (500, {}, {}) if summing and "message 2" in str(request) else reasons(request, hit)

    scripted.reply = reply
    code, said, rows = annotate("--rationale-from", "summary")
    assert (code, len(rows)) == (1, 5)
    assert "unanswered" in said
    scripted.reply = reasons
    assert annotate("--rationale-from", "summary")[0] == 0
    assert annotate.sent == 1


def test_a_summary_that_is_cut_off_is_asked_again_on_request(scripted, annotate):
    scripted.reply = lambda request, hit: (
        (200, body("The message", "length"), {})
        if request["messages"][0]["content"].startswith("Below are")
        else reasons(request, hit)
    )
    code, said, _ = annotate("--rationale-from", "summary")
    assert code == 1
    assert "summary-missing" in said
    scripted.reply = reasons
    assert annotate("--rationale-from", "summary")[0] == 1
    assert annotate.sent == 0
    assert annotate("--rationale-from", "summary", "--retry-failed")[0] == 0
    assert annotate.sent == 6


def test_the_budget_holds_over_summaries(scripted, annotate):
    scripted.reply = reasons
    code, said, rows = annotate(
        "--rationale-from", "summary", "--max-total-tokens", "1150", "--structured", "off",
        "--max-tokens", "20", "--concurrency", "1",
    )  # fmt: skip
    assert code == 1
    assert "budget" in said
    assert 0 < len(rows) < 6
    assert len(scripted.requests) * 120 <= 1150


def test_a_refused_summary_is_a_refusal_of_its_row(scripted, annotate):
    """The next run leaves it alone, as it does a row whose first call was refused."""

    def reply(request, hit):
        summing = request["messages"][0]["content"].startswith("Below are")
        too_long = summing and any(f"message {i}" in str(request) for i in (1, 3))
        return (400, {"error": {"message": "too long"}}, {}) if too_long else reasons(request, hit)

    scripted.reply = reply
    for sent in (12, 0):
        code, said, rows = annotate("--rationale-from", "summary", "--structured", "off")
        assert (code, len(rows), annotate.sent) == (1, 4, sent)
        assert "refused 2 of 6 rows" in said
        assert "too long" in said
    scripted.reply = reasons
    assert annotate("--rationale-from", "summary", "--structured", "off", "--retry-failed")[0] == 0
    assert annotate.sent == 2


def _rows(folder):
    (folder / "all.jsonl").write_text("".join(json.dumps({"input": f"message {i}"}) + "\n" for i in range(6)))
    return folder / "all.jsonl"


def test_the_estimate_counts_the_calls_for_summaries(scripted, annotate, tmp_path):
    scripted.reply = reasons
    task = parse_task({**TASK, "rationale_from": "summary"}, "t")
    rows = read_examples(str(_rows(tmp_path))).examples
    settings = Settings("m", Sampling(max_tokens=20), prices=Prices(1.0, 10.0))
    plain = estimate(rows, parse_task(TASK, "t"), settings, {})
    both = estimate(rows, task, settings, {})
    assert (plain.calls, both.calls, both.most_completion_tokens) == (6, 12, 240)
    assert both.most_cost > 2 * plain.most_cost
    flags = ("--rationale-from", "summary", "--structured", "off", "--max-tokens", "20")
    assert annotate(*flags, n=4)[0] == 0
    with Journal(tmp_path / "out.journal.jsonl") as journal:
        assert estimate(rows, task, settings, journal.records).calls == 4
        first = {key: record for key, record in journal.records.items() if record.text == GOOD}
        assert estimate(rows, task, settings, first).calls == 4 + 4


def test_finished_outputs_cannot_be_summarised(annotate, tmp_path):
    (tmp_path / "o.json").write_text("[]")
    code, said, _ = annotate("--rationale-from", "summary", "--outputs", str(tmp_path / "o.json"))
    assert code == 2
    assert "second call" in said


def test_half_a_character_in_reasoning_is_spelt_out():
    assert Record("k", "", reasoning="half \ud800").reasoning == "half \\ud800"
