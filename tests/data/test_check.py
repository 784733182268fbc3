"""`sbs-edge data check`, as a user runs it first: counts, lengths, overlaps, exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.check import check_dataset
from sbs_edge.data.example import Example
from sbs_edge.data.jsonl import write_examples
from sbs_edge.data.tokenizer import build_tokenizer


def test_svamp_as_json(paper_data, sbs_edge_cli):
    done = sbs_edge_cli("data", "check", paper_data, "--dataset", "svamp", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    train, test = report["splits"]
    assert (train["rows"], test["rows"]) == (800, 200)
    assert train["agreement"] == {"equal": 586, "total": 787, "rows": 800}
    assert test["agreement"] == {"equal": 148, "total": 198, "rows": 200}
    assert (train["teacher_unparsed"], test["teacher_unparsed"]) == (13, 2)
    assert report["overlaps"] == {"count": 0, "rows": []}
    assert report["ok"] is True
    assert report["tokenizer"].startswith("words")


def test_cqa_as_a_table(paper_data, sbs_edge_cli):
    done = sbs_edge_cli("data", "check", paper_data, "--dataset", "cqa")
    assert done.returncode == 0
    assert "7234 of 9741" in done.stdout
    assert "943 of 1221" in done.stdout


def test_a_teacher_without_gold_is_not_a_teacher_that_is_always_wrong(tmp_path, sbs_edge_cli):
    rows = [Example(str(i), f"text {i}", None, "yes" if i % 2 else "no") for i in range(20)]
    write_examples(tmp_path / "rows.jsonl", rows)
    done = sbs_edge_cli("data", "check", tmp_path / "rows.jsonl")
    assert done.returncode == 0
    assert "no gold" in done.stdout
    assert "0 of" not in done.stdout


def test_broken_input_exits_with_2_and_names_rows(tmp_path, sbs_edge_cli):
    rows = [Example(str(i), f"[bold]text {i}", "[red]yes" if i % 2 else "no") for i in range(20)]
    write_examples(tmp_path / "train.jsonl", rows)
    write_examples(tmp_path / "test.jsonl", [Example("t", "[BOLD]Text  3", "no"), Example("u", "new", "no")])
    with (tmp_path / "train.jsonl").open("ab") as handle:
        handle.write(b"{broken\n\xff\n")
    done = sbs_edge_cli("data", "check", tmp_path)
    assert done.returncode == 2
    assert "1 rejected: broken JSON" in done.stdout
    assert "1 rejected: not UTF-8" in done.stdout
    assert "train.jsonl:21" in done.stdout
    assert "Overlaps between splits: 1" in done.stdout
    assert "train.jsonl:4 and test row" in done.stdout
    assert "[red]yes 10" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent.jsonl"], "no file or directory"),
        ([".", "--dataset", "svamp"], "svamp_train.json"),
        ([".", "--dataset", "gsm8k"], "svamp"),
        (["builtin", "--column", "nonsense"], "FIELD=COLUMN"),
        (["builtin", "--tokenizer", "absent"], "tokenizer.json"),
    ],
)
def test_wrong_requests_are_one_paragraph(tmp_path, sbs_edge_cli, monkeypatch, arguments, says):
    if "--dataset" in arguments:
        arguments = [str(tmp_path), *arguments[1:]]
    done = sbs_edge_cli("data", "check", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_lengths_are_the_given_tokenizers(tmp_path):
    splits = builtin_splits()
    texts = [text for row in splits.train for text in (row.input, row.label, row.rationale) if text]
    tokenizer = build_tokenizer(texts)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    by_words, by_file = check_dataset(), check_dataset(tokenizer=tmp_path)
    # the tokenizer of the built-in task cuts as the default counter does
    assert [s["tokens"] for s in by_words["splits"]] == [s["tokens"] for s in by_file["splits"]]
    lengths = [len(tokenizer.encode(row.input).ids) for row in splits.test]
    counted = by_file["splits"][2]["tokens"]["input"]
    assert counted["mean"] == pytest.approx(np.mean(lengths), abs=0.05)
    assert counted["max"] == max(lengths)
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert abs(counted[name] - np.percentile(lengths, share)) <= 1


def test_empty_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    report = check_dataset(tmp_path / "rows.jsonl")
    assert report["problems"] == ["train: no usable row"]
    assert report["ok"] is False


def test_one_file_shows_the_splits_that_training_draws(tmp_path, sbs_edge_cli):
    from sbs_edge.data.load import load_splits

    path = tmp_path / "rows.jsonl"
    write_examples(path, [Example(str(i), f"text {i}", "yes" if i % 4 else "no") for i in range(80)])
    done = sbs_edge_cli("data", "check", path, "--seed", "3", "--json")
    drawn = json.loads(done.stdout)["drawn"]
    splits = load_splits(path, seed=3)
    for name in ("train", "validation", "test"):
        rows = getattr(splits, name)
        labels = {label: sum(row.label == label for row in rows) for label in ("yes", "no")}
        assert drawn["splits"][name] == {"rows": len(rows), "labels": labels}
    assert check_dataset()["drawn"] is None
    assert "  test: 8 rows; yes 6, no 2" in sbs_edge_cli("data", "check", path).stdout
