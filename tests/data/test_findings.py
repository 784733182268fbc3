"""Checks before training, label spellings, stratified hold-out, and rows that no quote may join."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from sbs_edge.cli._predict_rows import text_rows
from sbs_edge.data.check import check_dataset
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.data.findings import examine, verdict
from sbs_edge.data.jsonl import write_examples
from sbs_edge.data.labels import infer_task
from sbs_edge.data.load import load_splits
from sbs_edge.data.readers import read_examples
from sbs_edge.data.splits import hold_out
from sbs_edge.errors import DataError
from sbs_edge.teacher.new_task import PLACEHOLDER, task_from_examples
from sbs_edge.teacher.presets import load_task

LABELS = ("cannot", "follow-up", "refund")


def _rows(n, labels=LABELS, name="row"):
    return [
        Example(
            f"{name}{i}", f"{name} text {i}", labels[i * i % 7 % len(labels)], labels[i * i % 7 % len(labels)],
            f"word {i} means that much",
        )
        for i in range(n)
    ]  # fmt: skip


def _codes(splits, mode=None):
    return {finding.code: finding.level for finding in examine(splits, mode)}


def _splits(rows, labels=LABELS, **more):
    return Splits(TaskSpec("t", "closed", labels), rows, **more)


def test_tsv_has_no_quoting(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('input\tlabel\n"please pay\trefund\n5" hinge\tcannot\nthe "best"\tcannot\n')
    assert [(r.input, r.label) for r in read_examples(path).examples] == [
        ('"please pay', "refund"), ('5" hinge', "cannot"), ('the "best"', "cannot"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "inputs", "lines"),
    [
        ('"please pay,refund\nno parts,cannot\nthe hinge is 5",late\nlast,refund\n',
         ["no parts", 'the hinge is 5"', "last"], [2]),
        ('"never closed,b\nz,c\n', ["z"], [2]),
        ('"Hello,\nplease help, now",refund\nlast,late\n', ["Hello,\nplease help, now", "last"], []),
        ("x,a\ninput,label\ny,b\n", ["x", "y"], [3]),
    ],
)  # fmt: skip
def test_a_stray_quote_in_csv_costs_its_own_line(tmp_path, content, inputs, lines):
    path = tmp_path / "rows.csv"
    path.write_text("input,label\n" + content)
    result = read_examples(path)
    assert [row.input for row in result.examples] == inputs
    assert [row.line for row in result.rejected] == lines


def test_class_labels_of_parquet_have_names(tmp_path):
    features = {"input": {"_type": "Value"}, "label": {"_type": "ClassLabel", "names": ["no", "yes"]}}
    table = pyarrow.table({"input": ["a", "b", "c", "d"], "label": [0, 1, -1, 7]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    result = read_examples(tmp_path / "rows.parquet")
    assert [row.label for row in result.examples] == ["no", "yes", None]
    assert [row.line for row in result.rejected] == [4]


def test_numbers_and_truth_values_have_one_spelling(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"input": f"a{i}", "label": i % 2}) + "\n" for i in range(40))
    )
    (tmp_path / "test.csv").write_text("input,label\nx,0.0\ny,1.0\n")
    splits = load_splits(tmp_path)
    assert splits.task.labels == ("0", "1")
    assert [row.label for row in splits.test] == ["0", "1"]
    (tmp_path / "b.jsonl").write_text('{"input": "a", "label": true}\n{"input": "b", "label": 2.0}\n')
    assert [row.label for row in read_examples(tmp_path / "b.jsonl").examples] == ["true", "2"]


def test_a_teachers_spelling_becomes_the_sets(tmp_path, capsys):
    rows = [dataclasses.replace(r, teacher_label=f" {r.label.title()}") for r in _rows(100)]
    write_examples(tmp_path / "rows.jsonl", rows)
    splits = load_splits(tmp_path / "rows.jsonl")
    assert all(row.teacher_label == row.label for row in splits.train)
    assert "'Refund' is read as 'refund'" in capsys.readouterr().err
    report = check_dataset(tmp_path / "rows.jsonl")
    assert (report["verdict"], report["splits"][0]["agreement"]["equal"]) == ("warn", 100)


@pytest.mark.parametrize("seed", range(12))
def test_no_label_is_held_out_wholly(seed):
    rows = [*_rows(60, ("a", "b")), *(Example(f"x{i}", f"rare {i}", "rare") for i in range(2))]
    kept, held = hold_out(rows, 0.1, seed, stratify=True)
    assert len(held) == 6
    assert {row.label for row in kept} == {"a", "b", "rare"}
    counts = Counter(row.label for row in rows)
    for label, count in Counter(row.label for row in held).items():
        assert abs(count - 0.1 * counts[label]) < 1
    assert hold_out(rows, 0.1, seed, stratify=True) == (kept, held)


@pytest.mark.parametrize(("n", "labels", "kind"), [(12, 3, "closed"), (1000, 60, "closed"), (3, 3, "open")])
def test_one_rule_for_the_kind(n, labels, kind):
    rows = [Example(str(i), f"t{i}", f"l{i % labels}") for i in range(n)]
    assert infer_task("t", rows).label_kind == task_from_examples("t", rows).label_kind == kind


def test_a_shift_of_the_teachers_labels_is_found():
    rows = _rows(200)
    moved = [dataclasses.replace(r, teacher_label=rows[(i + 3) % 200].label) for i, r in enumerate(rows)]
    found = next(f for f in examine(_splits(moved)) if f.code == "agreement")
    assert found.level == "stop"
    assert "moved by -3 row(s) the teacher's labels agree in 197 of 197" in found.message
    assert _codes(_splits(rows)) == {}
    assert "agreement" not in _codes(_splits(moved), "finetune")


def test_what_stops_and_what_warns():
    rows = _rows(60)
    assert (
        _codes(_splits([dataclasses.replace(r, label="refund") for r in rows], LABELS))["one-label"] == "stop"
    )
    foreign = [dataclasses.replace(r, teacher_label="other") for r in rows]
    assert _codes(_splits(foreign))["foreign-labels"] == "stop"
    few = [*foreign[:5], *rows[5:]]
    assert _codes(_splits(few))["foreign-labels"] == "warn"
    test = [Example(f"n{i}", f"new {i}", "unseen") for i in range(4)]
    assert _codes(_splits(rows, (*LABELS, "unseen"), test=test))["labels-not-in-train"] == "stop"
    unparsed = [dataclasses.replace(r, teacher_label=None) for r in rows]
    assert _codes(_splits(unparsed, unparsed={"train": 60}))["unparsed"] == "stop"
    assert _codes(_splits([*rows, Example("z", "Row  text 1", "refund" if rows[1].label != "refund" else "cannot")])) == {
        "conflicting-labels": "warn"
    }  # fmt: skip
    assert verdict(examine(_splits(rows))) == "ok"


def test_train_refuses_before_the_first_step(tmp_path, sbs_edge_cli):
    write_examples(tmp_path / "rows.jsonl", [Example(str(i), f"t {i}", "a", "a", "r") for i in range(40)])
    for command in (("data", "check"), ("train", "--dry-run"), ("run", "--dry-run")):
        done = sbs_edge_cli(*command, tmp_path / "rows.jsonl")
        assert done.returncode == 2
        assert "have the label 'a'" in done.stdout + done.stderr


@pytest.mark.parametrize("content", [b"a\n\nb\n", b"a\rb\n", "a\nb\n".encode("utf-16"), b"a\0\n"])
def test_no_line_of_text_vanishes(content):
    with pytest.raises(DataError):
        list(text_rows(content.splitlines(keepends=True) if b"\r" not in content else [content], "in.txt"))


def test_json_documents_and_byte_order_marks(tmp_path):
    rows = [{"input": "x"}, {"input": "y"}]
    for name, text in (
        ("a.json", json.dumps({"data": rows, "version": "1"}, indent=2)),
        ("b.json", json.dumps({"data": rows})),
        ("c.jsonl", json.dumps(rows, indent=1)),
        ("d.jsonl", '\ufeff{"input": "x"}\n\ufeff{"input": "y"}\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        result = read_examples(tmp_path / name)
        assert ([row.input for row in result.examples], result.rejected) == (["x", "y"], [])
    (tmp_path / "e.jsonl").write_bytes(json.dumps(rows[0]).encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        read_examples(tmp_path / "e.jsonl")


def test_task_files_keep_labels_as_written(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("name: t\ninstruction: i\nlabel_kind: closed\nlabels: [yes, no, 1, 1.0]\nmax_tokens: 9\n")
    assert (load_task(path).labels, load_task(path).max_tokens) == (("yes", "no", "1", "1.0"), 9)


def test_task_new_folds_spellings_and_cuts_the_marker():
    rows = [Example(str(i), f"t{i}", label, rationale="It broke. So the answer is x.") for i, label in
            enumerate(["Refund", "refund ", "refund", "late", "late"])]  # fmt: skip
    task = task_from_examples("t", rows)
    assert task.labels == ("late", "refund")
    assert {shot.rationale for shot in task.shots} == {"It broke."}
    assert task_from_examples("t", [dataclasses.replace(r, rationale="So the answer is x") for r in rows]).shots[
        0
    ].rationale == PLACEHOLDER  # fmt: skip


def test_a_home_is_expanded_and_help_is_literal(tmp_path, sbs_edge_cli):
    write_examples(tmp_path / "rows.jsonl", _rows(12))
    done = sbs_edge_cli("task", "new", "~/rows.jsonl", "--out=~/t.yaml", HOME=str(tmp_path))
    assert (done.returncode, (tmp_path / "t.yaml").is_file()) == (0, True), done.stderr
    assert "[label]" in sbs_edge_cli("train", "--help").stdout


def test_python_train_refuses_what_data_check_stops_at(tmp_path):
    from sbs_edge.training.train import train

    rows = [Example(str(i), f"text {i}", "same") for i in range(30)]
    splits = _splits(rows)
    with pytest.raises(DataError, match="have the label 'same', so there is nothing to learn"):
        train(splits, tmp_path / "student", mode="finetune", max_steps=1)
    assert not list(tmp_path.iterdir())


def test_a_tsv_written_with_csv_quoting_is_warned_of(tmp_path):
    from sbs_edge.data.load import load_splits

    path = tmp_path / "rows.tsv"
    lines = [f'"text {i}"\t{"yes" if i % 2 else "no"}' for i in range(40)]
    path.write_text("\n".join(["input\tlabel", *lines]) + "\n")
    found = [f for f in examine(load_splits(path)) if f.code == "quoted-cells"]
    assert [f.level for f in found] == ["warn"] * 3
    assert "values of 'input'" in found[0].message
    path.write_text(
        "\n".join(["input\tlabel", '"Yes," he said\tyes', *lines[1:30]]).replace('"text', "text") + "\n"
    )
    assert not [f for f in examine(load_splits(path)) if f.code == "quoted-cells"]
