"""The whole promise: raw inputs, a teacher behind HTTP, a student, a bundle, a service. No gold label.

The teacher is the built-in task's, wrong in a tenth of its answers, behind the protocol-true server;
every stage is a command of its own process, as a user runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.readers import read_examples

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

TEST_ROWS = 300


def sbs_edge(*arguments):
    command = [sys.executable, "-m", "sbs_edge", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def annotated(teacher, data, out):
    return json.loads(
        sbs_edge(
            "annotate", data, "--task", "hvac", "--base-url", teacher.url, "--model", "desk", "--out", out,
            "--price-in", "2.5", "--price-out", "10", "--json", "--concurrency", "16",
        )
    )  # fmt: skip


def served_labels(bundle, texts, log):
    """Start ``serve`` as a user does and ask it over HTTP."""
    with log.open("wb") as handle:
        process = subprocess.Popen(
            [sys.executable, "-m", "sbs_edge", "serve", str(bundle), "--port", "0"],
            stderr=handle,
            stdout=subprocess.DEVNULL,
        )
    try:
        deadline = time.monotonic() + 60
        events: dict[str, dict] = {}
        while not {"listening", "version_ready"} <= set(events):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            lines = [
                line for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")
            ]
            events = {event["event"]: event for event in map(json.loads, lines)}
            time.sleep(0.05)
        url = f"http://127.0.0.1:{events['listening']['port']}/v1/predict"
        labels = []
        for start in range(0, len(texts), 20):
            body = json.dumps({"texts": texts[start : start + 20]}).encode()
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as response:
                labels += [item["label"] for item in json.load(response)["predictions"]]
        return labels
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_raw_inputs_to_a_served_student_without_a_gold_label(http_teacher, desk_answers, raw_rows, tmp_path):
    splits = builtin_splits("ci", n_train=700, teacher_error=0.1)
    test = splits.test[:TEST_ROWS]
    http_teacher.answers = desk_answers([*splits.train, *test])

    report = annotated(http_teacher, raw_rows(splits.train), tmp_path / "annotated.jsonl")
    assert report["annotated"] == 700
    assert report["agreement"]["total"] == 0  # there was no gold label to agree with
    assert all(row.label is None for row in read_examples(tmp_path / "annotated.jsonl").examples)

    # Gold labels come in only here, to judge: on the test rows, and for the third arm.
    annotated(http_teacher, raw_rows(test, "test-raw.jsonl"), tmp_path / "test-annotated.jsonl")
    by_id = {row.id: row.label for row in (*splits.train, *test)}
    for name, rows in (("test", read_examples(tmp_path / "test-annotated.jsonl").examples),):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(
                json.dumps(
                    {"id": r.id, "input": r.input, "label": by_id[r.id], "teacher_label": r.teacher_label}
                )
                + "\n"
                for r in rows
            )
        )
    (tmp_path / "gold.jsonl").write_text(
        "".join(json.dumps({"id": r.id, "input": r.input, "label": r.label}) + "\n" for r in splits.train)
    )
    comparison = json.loads(
        sbs_edge(
            "compare-teacher", tmp_path / "annotated.jsonl", "--test", tmp_path / "test.jsonl",
            "--gold", tmp_path / "gold.jsonl", "--task", "hvac", "--out", tmp_path / "compare",
            "--steps", "700", "--core-hour-price", "0.05", "--json",
        )
    )  # fmt: skip
    teacher, student, golden = comparison["arms"]
    assert teacher["label_accuracy"] == pytest.approx(0.9, abs=0.05)
    # Trained on labels of which a tenth is wrong, the student comes near its teacher or above it.
    assert student["label_accuracy"] >= 0.75
    assert golden["label_accuracy"] >= 0.75
    for arm in (student, golden):
        assert arm["parameters"] < 1_000_000
        assert 0 < arm["bytes"] < 5_000_000
        assert arm["cost_per_1000"] < teacher["cost_per_1000"] / 100
    page = (tmp_path / "compare" / "report.html").read_text()
    assert "student on gold labels" in page

    labels = served_labels(
        tmp_path / "compare" / "teacher-labels" / "bundle",
        [row.input for row in test],
        tmp_path / "serve.log",
    )
    right = sum(label == row.label for label, row in zip(labels, test, strict=True)) / len(test)
    assert right == pytest.approx(student["label_accuracy"], abs=0.011)
