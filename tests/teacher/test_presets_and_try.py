"""Presets of servers, and ``task try``."""

from __future__ import annotations

import json
import os

from scripted import body

from sbs_edge.cli.app import main


def test_presets_are_read_and_give_their_own_names(scripted, annotate, monkeypatch):
    from sbs_edge.teacher.connect import servers

    asked_for = {"openai", "azure", "openrouter", "anthropic", "vllm", "llama.cpp", "ollama", "lmstudio"}
    assert asked_for <= set(servers())
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "sk-hidden")
    assert annotate("--server", "azure", url=scripted.url + "?api-version=1")[0] == 0
    assert scripted.headers[0]["api-key"] == "sk-hidden"
    assert "authorization" not in scripted.headers[0]
    assert "max_completion_tokens" in scripted.requests[0]
    assert os.environ["AZURE_OPENAI_API_KEY"] == "sk-hidden"


def test_task_try_shows_a_few_rows_and_its_answers_are_not_paid_for_again(
    scripted, annotate, tmp_path, capsys
):
    assert annotate(n=20)[0] == 0  # writes the files
    (tmp_path / "out.journal.jsonl").unlink()
    before = len(scripted.requests)
    files = [str(tmp_path / "rows.jsonl"), "--task", str(tmp_path / "task.yaml")]
    where = ["--model", "m", "--base-url", scripted.url, "--rows", "3"]
    keep = ["--journal", str(tmp_path / "out.journal.jsonl")]
    assert main(["task", "try", *files, *where, *keep, "--price-in", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\nROW ") == 3
    assert "The buyer asks for money back." in shown
    assert "label      refund" in shown
    assert "cost 0.000100" in shown
    assert "3 of 3 rows are usable" in shown
    assert len(scripted.requests) - before == 3
    assert annotate(n=20)[0] == 0
    assert annotate.sent == 17


def test_task_try_says_what_to_change(scripted, annotate, tmp_path, capsys):
    annotate(n=3)
    files = [str(tmp_path / "rows.jsonl"), "--task", str(tmp_path / "task.yaml")]
    where = ["--model", "m", "--base-url", scripted.url, "--json"]
    scripted.reply = lambda request, hit: (200, body("No reason, no marker."), {})
    assert main(["task", "try", *files, *where]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["usable"], report["rows"][0]["reason"]) == (0, "marker-missing")
    assert "answer_marker" in report["change"][0]
    scripted.reply = lambda request, hit: (
        400,
        {"error": {"message": "'temperature' does not support 0"}},
        {},
    )
    assert main(["task", "try", *files, *where]) == 1
    assert "--omit temperature" in json.loads(capsys.readouterr().out)["change"][0]
