"""``task try``: a few rows from prompt to label at 80 columns, and what to change."""

from __future__ import annotations

import json

import pytest
import yaml
from scripted import GOOD, TASK, body

from sbs_edge.cli.app import main

OBJECT = json.dumps({"rationale": "The buyer asks for money back.", "label": "refund"})
ROWS = [
    ("the lamp came broken, i want my money back", "refund"),
    ("you promised a new pump by tuesday", "follow-up"),
    ("please pay me back", "refund"),
    ("any news on the hinge", "follow-up"),
]


@pytest.fixture
def attempt(scripted, tmp_path, capsys, monkeypatch):
    """Run ``task try``; return the exit code, the report and the text at 80 columns."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*flags, task=None):
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({**TASK, **(task or {})}))
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps({"input": text, "label": label}) + "\n" for text, label in ROWS)
        )
        scripted.requests.clear()
        files = [str(tmp_path / "rows.jsonl"), "--task", str(tmp_path / "task.yaml")]
        where = ["--model", "m", "--base-url", scripted.url, "--journal", str(tmp_path / "j.jsonl"), *flags]
        main(["task", "try", *files, *where])
        text = capsys.readouterr().out
        code = main(["task", "try", *files, *where, "--json"])
        return code, json.loads(capsys.readouterr().out), text

    return run


def one_line(text):
    return " ".join(text.split())


def test_an_answer_is_shown_with_all_that_is_read_from_it(scripted, attempt):
    thought = "Money, or a lamp? " * 60
    scripted.reply = lambda request, hit: (200, body(OBJECT, reasoning_content=thought), {})
    code, report, text = attempt("--price-in", "1", "--price-out", "10")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\nROW ") == 4
    first = report["rows"][0]
    assert (first["answer"], first["label"], first["rationale"]) == (
        OBJECT, "refund", "The buyer asks for money back.",
    )  # fmt: skip
    assert (first["reasoning"], first["cost"]) == (thought.strip(), 0.0003)
    assert (report["structured"], report["usable"], report["agreement"]) == (
        "json_schema", 4, {"equal": 2, "total": 4},
    )  # fmt: skip
    said = one_line(text)
    for words in (
        "a JSON object (response_format json_schema)", "reasoning Money, or a lamp?", "more characters; --json",
        "label refund (gold: refund)", "100 prompt, 20 answer", "cost 0.000300, ended by stop",
        "4 of 4 rows are usable; 2 of 4 agree with the gold label", "--rationale-from reasoning or summary",
    ):  # fmt: skip
        assert words in said
    assert "every row got the label 'refund'" in report["change"][0]
    assert "4 of 4 rows have the same rationale" in report["change"][1]


def test_a_refused_form_is_a_note_and_the_plain_answers_are_shown(scripted, attempt):
    words = {"error": {"message": "response_format is not supported"}}
    scripted.reply = lambda request, hit: (
        (400, words, {}) if "response_format" in request else (200, body(), {})
    )
    code, report, text = attempt()
    assert (code, report["structured"], report["usable"]) == (0, "off", 4)
    assert "response_format is not supported" in report["notes"][0]
    assert "plain text that ends in the answer marker" in text


@pytest.mark.parametrize(
    ("reply", "flags", "said"),
    [
        (body("Refund it."), (), "the marker is 'So the answer is'"),
        (body(GOOD.replace("refund.", "exchange.")), (), "the model wrote 'exchange', and labels are refund"),
        (body('{"rationale": "The buyer', "length"), (), "the limit is 256 tokens"),
        (body("<think>Or is it", "length"), (), "4 of these answers had not ended their reasoning"),
        (body(None, "length", reasoning_content="Or"), (), "4 of these answers had not ended their reasoning"),
        (body(None, reasoning_content="Or is it"), (), "thought and wrote no answer"),
        (body("{" + '"rationale": "a "b" c", "label": "refund"}'), ("--structured", "on"), "--structured off"),
        (body(), ("--rationale-from", "reasoning"), "--rationale-from answer"),
        (body("<musing>Hm.</musing> " + GOOD), (), "thinking_marks"),
    ],
)  # fmt: skip
def test_what_to_change_follows_from_the_answers(scripted, attempt, reply, flags, said):
    scripted.reply = lambda request, hit: (200, reply, {})
    if flags[:1] == ("--structured",):  # settled by a first good answer
        scripted.reply = lambda request, hit: (200, body(OBJECT) if hit == 1 else reply, {})
    code, report, text = attempt(*flags)
    assert code == (0 if flags[:1] == ("--structured",) else 1)
    assert said in " ".join(report["change"])
    assert said in one_line(text)


def test_a_server_that_wants_a_function_call_is_named_the_flag(scripted, tmp_path, capsys, attempt):
    def reply(request, hit):
        if "tools" not in request:
            return (
                400,
                {"error": {"message": "tools is required: this model answers function calls only"}},
                {},
            )
        call = {"function": {"name": "answer", "arguments": OBJECT}}
        return 200, body(None, "tool_calls", tool_calls=[call]), {}

    scripted.reply = reply
    code, report, _ = attempt("--structured", "tool")
    assert (code, report["usable"], report["rows"][0]["answer"]) == (0, 4, OBJECT)
    (tmp_path / "j.jsonl").unlink()
    files = [str(tmp_path / "rows.jsonl"), "--task", str(tmp_path / "task.yaml")]
    assert main(["task", "try", *files, "--model", "m", "--base-url", scripted.url]) == 1
    assert "--structured tool" in capsys.readouterr().err


def test_rationales_taken_from_a_worked_example_are_named(scripted, attempt):
    shot = {"input": "x", "rationale": "The buyer asks for money back.", "label": "refund"}
    scripted.reply = lambda request, hit: (200, body(OBJECT), {})
    _, report, _ = attempt(task={"shots": [shot]})
    assert any("4 of 4 rationales repeat a worked example" in sentence for sentence in report["change"])


def test_every_preset_is_complete_and_named_in_the_help(capsys):
    from sbs_edge.teacher.connect import servers

    main(["annotate", "--help"])
    shown = "".join(c for c in capsys.readouterr().out if c not in "│\n ")
    for name, server in servers().items():
        assert name in shown
        assert server.base_url.startswith("http") or name == "azure"
        local = server.base_url.startswith("http://localhost")
        assert server.api_key_env == "OPENAI_API_KEY" if local else server.api_key_env.endswith("_API_KEY")


def test_annotate_says_how_many_rationales_are_a_worked_examples(scripted, annotate, tmp_path):
    shot = {"input": "x", "rationale": "The buyer asks for money back.", "label": "refund"}
    other = body(OBJECT.replace("The buyer asks for money back.", "Money is asked for."))
    scripted.reply = lambda request, hit: (200, other if hit > 4 else body(OBJECT), {})
    code, said, _ = annotate("--concurrency", "1", n=7, task={"shots": [shot]})
    assert code == 0
    assert "4 rationales repeat a worked example word for word" in said
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert (report["copied_rationales"], report["most_repeated_rationale"]) == (4, 3)
    assert "4 rationales are a worked example" in (tmp_path / "out.report.html").read_text()
