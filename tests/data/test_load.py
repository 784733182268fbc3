"""Splits from every kind of source: held out, given, saved by `datasets`, overlapping, broken."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.data.answers import normalise
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.data.jsonl import write_examples
from sbs_edge.data.load import infer_task, load_splits
from sbs_edge.data.readers import ColumnMap, stream_examples
from sbs_edge.data.splits import check_disjoint, find_overlaps, hold_out, shuffle_rationales
from sbs_edge.data.targets import MODES, label_for, rationale_for, teacher_agreement
from sbs_edge.errors import DataError


def _rows(n, labels=("yes", "no"), name="row"):
    return [
        Example(f"{name}{i}", f"{name} text {i}", labels[i % len(labels)], "yes", f"because {i}")
        for i in range(n)
    ]


def test_modes_take_gold_or_teacher_with_or_without_rationale():
    row = Example("1", "x", label="gold", teacher_label="teacher", rationale="why")
    assert {mode: (label_for(row, mode), rationale_for(row, mode)) for mode in MODES} == {
        "finetune": ("gold", None),
        "distill": ("teacher", None),
        "stepwise": ("gold", "why"),
        "stepwise-teacher": ("teacher", "why"),
    }
    assert all(label_for(Example("1", "x"), mode) is None for mode in MODES)
    rows = [row, Example("2", "x", label="a", teacher_label="a "), Example("3", "x", label="a")]
    assert teacher_agreement(rows, "text") == {"equal": 1, "total": 2}


def test_the_teacher_modes_never_see_a_gold_label():
    rows = _rows(20)
    other = [dataclasses.replace(row, label="another") for row in rows]
    for mode in ("distill", "stepwise-teacher"):
        assert [label_for(row, mode) for row in rows] == [label_for(row, mode) for row in other]


def test_one_file_is_held_out_by_seed(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_examples(path, _rows(100))
    splits = load_splits(path)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [81, 9, 10]
    assert splits.task == TaskSpec("mine", "closed", ("no", "yes"))
    assert load_splits(path) == splits
    assert load_splits(path, seed=1).test != splits.test
    assert find_overlaps(splits) == []


def test_a_folder_brings_its_own_splits(tmp_path):
    for name, split in (("train", "train"), ("dev", "validation"), ("test", "test")):
        write_examples(tmp_path / f"{name}.jsonl", _rows(10, name=split))
    splits = load_splits(tmp_path)
    for name in ("train", "validation", "test"):
        assert [row.id for row in getattr(splits, name)] == [f"{name}{i}" for i in range(10)]
    write_examples(tmp_path / "valid.jsonl", _rows(3))
    with pytest.raises(DataError, match="Keep one"):
        load_splits(tmp_path)


def test_overlaps_are_errors_that_name_rows_unless_skipped(tmp_path, capsys):
    train, test = _rows(10), _rows(5, name="held")
    test[2] = dataclasses.replace(test[2], input="  ROW text\u00a0 3 ")
    write_examples(tmp_path / "train.jsonl", train)
    write_examples(tmp_path / "test.jsonl", test)
    with pytest.raises(DataError, match=r"train row .*train\.jsonl:4 and test row .*test\.jsonl:3"):
        load_splits(tmp_path)
    skipped = tmp_path / "out" / "skipped.jsonl"
    splits = load_splits(tmp_path, skip_bad_rows=True, skipped_file=skipped)
    assert len(splits.test) == 5
    assert "row3" not in {row.id for row in [*splits.train, *splits.validation]}
    (line,) = skipped.read_text().splitlines()
    assert json.loads(line)["reason"] == "input of train is in test too"
    assert json.loads(line)["line"] == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Skipped 1 row(s)" in captured.err


def test_a_column_of_another_name_is_to_be_mapped_and_an_empty_file_is_called_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "hot", "answer": "wait"}\n')
    with pytest.raises(DataError, match=r"columns are text, answer.*map it with column=\['FIELD=COLUMN'\]"):
        load_splits(path)
    with pytest.raises(
        DataError, match=r"'question' \(it was mapped to 'input'; the columns are text, answer\)"
    ):
        load_splits(path, columns=ColumnMap(input="question"))
    with pytest.raises(DataError, match=r"neither 'label' nor 'teacher_label'.*map it with column="):
        load_splits(path, columns=ColumnMap(input="text"))
    path.write_text('{"input": 3, "label": "wait"}\n')
    with pytest.raises(DataError, match=r"wrong type.*\. Correct the rows, or leave them out"):
        load_splits(path)
    path.write_text("")
    with pytest.raises(DataError, match="no usable training row: it is empty"):
        load_splits(path)


def test_bad_rows_stop_or_are_counted_and_listed(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    write_examples(path, _rows(20))
    with path.open("ab") as handle:
        handle.write(b'{"input": "no label"}\n{"input": "caf\xe9"}\n{oops\n')
    with pytest.raises(DataError, match=r"3 row\(s\).*rows\.jsonl:21: neither 'label'.*:22: not UTF-8.*:23"):
        load_splits(path)
    skipped = tmp_path / "skipped.jsonl"
    splits = load_splits(path, skip_bad_rows=True, skipped_file=skipped)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 20
    listed = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in listed] == [
        (21, "neither 'label' nor 'teacher_label'"),
        (22, "not UTF-8"),
        (23, "broken JSON"),
    ]
    assert listed[1]["raw"] == '{"input": "caf\\xe9"}'
    assert "Skipped 3 row(s)" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "match"), [("", "no usable"), ('{"input": "x", "label": "y"}', "row")])
def test_too_few_rows(tmp_path, content, match):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=match):
        load_splits(path)


def test_a_saved_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})

    def part(start, stop):
        rows = {
            "text": [f"text {i}" for i in range(start, stop)],
            "label": [i % 2 for i in range(start, stop)],
        }
        return datasets.Dataset.from_dict(rows, features=features)

    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": part(0, 30), "dev": part(30, 40), "test": part(40, 50)}).save_to_disk(
        folder
    )
    columns = ColumnMap(input="text")
    splits = load_splits(folder, columns=columns)
    assert [len(rows) for rows in (splits.train, splits.validation, splits.test)] == [30, 10, 10]
    assert splits.task == TaskSpec("saved", "closed", ("no", "yes"))
    assert [row.label for row in splits.test[:2]] == ["no", "yes"]
    assert len(list(stream_examples(folder, columns=columns, split="dev"))) == 10
    with pytest.raises(DataError, match="no split 'nope'"):
        list(stream_examples(folder, columns=columns, split="nope"))
    with pytest.raises(DataError, match=r"train\]:1: missing column 'input'"):
        load_splits(folder)
    single = tmp_path / "single"
    part(0, 30).save_to_disk(single)
    assert len(load_splits(single, columns=columns).train) == 24


def test_an_unknown_data_set_name_names_the_remedy():
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="save_to_disk"):
        load_splits("nobody/has-this-data-set")


def test_the_paper_layout_is_recognised_and_the_parameter_named(paper_data):
    with pytest.raises(DataError, match="dataset='cqa'"):
        load_splits(paper_data)


def test_kinds_are_inferred():
    assert infer_task("t", _rows(20)).label_kind == "closed"
    assert infer_task("t", _rows(20, labels=[str(i) for i in range(20)])).label_kind == "open"
    choices = [dataclasses.replace(row, choices=("yes", "no")) for row in _rows(20)]
    assert infer_task("t", choices).label_kind == "choices"
    assert infer_task("t", _rows(20), compare="value").label_kind == "open"
    with pytest.raises(DataError, match="choices"):
        infer_task("t", _rows(3), kind="choices")
    only_teacher = [dataclasses.replace(row, label=None) for row in _rows(20)]
    assert infer_task("t", only_teacher).labels == ("yes",)


@given(st.lists(st.sampled_from(["a", "A ", "b", "c", "d", "e"]), min_size=2), st.integers(0, 5))
def test_equal_inputs_stay_together(texts, seed):
    rows = [Example(str(i), text) for i, text in enumerate(texts)]
    kept, held = hold_out(rows, 0.3, seed)
    assert sorted([*kept, *held], key=lambda row: int(row.id)) == rows
    assert not {normalise(row.input) for row in kept} & {normalise(row.input) for row in held}
    check_disjoint(Splits(TaskSpec("t", "open"), kept, held))


def test_shuffled_rationales_are_the_same_ones_elsewhere():
    rows = _rows(200)
    shuffled = shuffle_rationales(rows, seed=0)
    assert sorted(str(row.rationale) for row in shuffled) == sorted(str(row.rationale) for row in rows)
    assert sum(a.rationale == b.rationale for a, b in zip(rows, shuffled, strict=True)) < 10
    assert [dataclasses.replace(row, rationale=None) for row in shuffled] == [
        dataclasses.replace(row, rationale=None) for row in rows
    ]
    assert shuffle_rationales(rows, seed=0) == shuffled
