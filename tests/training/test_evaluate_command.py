"""``sbs-edge evaluate``: the error analysis in the JSON, on the terminal and on a page."""

from __future__ import annotations

import json

import pytest

from sbs_edge.cli.app import main
from sbs_edge.data.jsonl import write_examples
from sbs_edge.training.train import train


@pytest.fixture(scope="module")
def student(splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "student"
    small = {"d_model": 16, "d_ff": 32, "n_heads": 2, "n_layers": 1, "batch_size": 8, "trackers": ()}
    return train(splits, folder, mode="stepwise", max_steps=4, threads=1, **small).student_dir


def test_errors_slices_and_page(student, splits, tmp_path, capsys):
    data, page, answers = tmp_path / "rows.jsonl", tmp_path / "page.html", tmp_path / "answers.jsonl"
    write_examples(data, splits.test)
    lines = [
        {**json.loads(line), "site": "ab"[i % 2]} for i, line in enumerate(data.read_text().splitlines())
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["evaluate", str(student), "--data", str(data), "--slice", "site"]
    assert main([*common, "--json", "--report", str(page), "--predictions", str(answers)]) == 0
    report = json.loads(capsys.readouterr().out)
    analysis = report["analysis"]
    told = [json.loads(line) for line in answers.read_text().splitlines()]
    assert analysis["accuracy"] == report["label_accuracy"]
    assert [s["n"] for s in analysis["slices"]["site"]] == [10, 10]
    wrong = [answer for answer in told if not answer["right"]]
    assert len(analysis["errors"]) == len(wrong)
    assert analysis["errors"][0]["probability"] == max(answer["probability"] for answer in wrong)
    by_id = {answer["id"]: answer["rationale"] for answer in told}
    assert all(error["rationale"] == by_id[error["id"]] for error in analysis["errors"])
    assert sum(map(sum, analysis["confusion"]["counts"])) == 20
    assert "The student gives the gold label in" in page.read_text()
    assert main(common) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The student gives the gold label in" in shown
    assert "Least accurate site:" in shown


def test_a_column_that_is_absent_is_refused_before_the_answers(student, splits, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    write_examples(data, splits.test)
    assert main(["evaluate", str(student), "--data", str(data), "--slice", "sites"]) == 2
    assert "No row has a value in the column 'sites'" in capsys.readouterr().err
