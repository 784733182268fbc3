"""The paper's layout: counts on the real files, the two NLI sets and damage on small ones."""

from __future__ import annotations

import json

import pytest

from sbs_edge.data.load import load_splits
from sbs_edge.data.paper import parse_teacher, read_paper_files
from sbs_edge.data.splits import find_overlaps
from sbs_edge.data.targets import teacher_agreement
from sbs_edge.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("name", "split", "rows", "equal", "no_label", "no_rationale"),
    [
        ("svamp", "train", 800, 586, 13, 11),
        ("svamp", "test", 200, 148, 2, 2),
        ("cqa", "train", 9741, 7234, 3, 0),
        ("cqa", "test", 1221, 943, 0, 0),
    ],
)
def test_known_counts(paper_data, name, split, rows, equal, no_label, no_rationale):
    found = read_paper_files(paper_data, name)
    examples = found.splits[split]
    assert len(examples) == rows
    assert teacher_agreement(examples, found.task.compare) == {"equal": equal, "total": rows - no_label}
    assert found.unparsed[split] == no_label
    assert sum(row.rationale is None for row in examples) == no_rationale
    assert not found.rejected[split]


def test_the_first_rows_are_what_stands_in_the_files(paper_data):
    first = read_paper_files(paper_data, "cqa").splits["train"][0]
    assert first.input.endswith(
        "(a) park\n(b) coloring book\n(c) garden center\n(d) math problem\n(e) gravity"
    )
    assert (first.label, first.teacher_label) == ("math problem", "math problem")
    assert first.choices is not None
    assert len(first.choices) == 5
    assert first.rationale is not None
    assert first.rationale.endswith("has to do with the above problem.")
    assert first.source.endswith("cqa_train.json:1")
    first = read_paper_files(paper_data / "svamp", "svamp").splits["train"][0]
    assert (first.label, first.teacher_label) == ("( 84.0 / 2.0 )", "(84 / 2)")


@pytest.mark.parametrize(("name", "sizes"), [("svamp", (720, 80, 200)), ("cqa", (8767, 974, 1221))])
def test_splits_are_disjoint_and_repeatable(paper_data, name, sizes):
    splits = load_splits(paper_data, dataset=name)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    assert find_overlaps(splits) == []
    other = load_splits(paper_data, dataset=name, seed=1)
    assert other.validation != splits.validation
    assert other.test == splits.test
    kinds = {"svamp": ("open", "value"), "cqa": ("choices", "text")}
    assert (splits.task.label_kind, splits.task.compare) == kinds[name]


def test_cqa_teacher_names_a_choice_in_19_of_20_rows(paper_data):
    """95.4 % of train and 96.2 % of test, as an independent count of the same files found."""
    found = read_paper_files(paper_data, "cqa")
    for split, share in (("train", 95.4), ("test", 96.2)):
        rows = found.splits[split]
        named = sum(row.teacher_label in (row.choices or ()) for row in rows)
        assert round(100 * named / len(rows), 1) == share


@pytest.mark.parametrize(
    ("name", "text", "parsed"),
    [
        ("cqa", "Why. So the answer is (d) math problem.\n\nQ: So the answer is", ("Why.", "math problem")),
        ("cqa", "Why. So the answer is math problem.", ("Why.", None)),
        ("cqa", "So the answer is (a). So the answer is (b) x.", (None, None)),
        ("cqa", "So the answer is (a) Ph.D..", (None, "Ph.D.")),
        ("svamp", "A. The answer is (84 / 2).\n\nQ: x The answer is (1)", ("A.", "(84 / 2)")),
        ("svamp", "A. The answer is ((1 + 2) * 3).", ("A.", "((1 + 2) * 3)")),
        ("svamp", "A. The answer is 42.", ("A.", None)),
        ("svamp", "", (None, None)),
        ("anli1", "R. So the answer is neutral.\n\nPremise: y", ("R.", "neutral")),
        ("anli1", "R. So the answer is maybe.", ("R.", None)),
        ("esnli", "R.\nAnswer: contradiction\n\nPremise: y", ("R.", "contradiction")),
    ],
)
def test_parse_rules(name, text, parsed):
    rationale, label = parse_teacher(text, name)
    assert ((rationale or "").strip() or None, label) == parsed


def _nli(folder, name, rows=7, batch=3):
    here = folder / name
    (here / "llm").mkdir(parents=True)
    mark = "Answer:" if name == "esnli" else "So the answer is"
    for split in ("train", "valid", "test"):
        lines = [
            {"uid": str(i), "premise": f"{split} premise {i}", "hypothesis": f"h {i}", "label": i % 3}
            for i in range(rows)
        ]
        (here / f"{name}_{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        outputs = [f"Because {i}. {mark} neutral.\n\nPremise: and on" for i in range(rows)]
        for k in range(0, rows, batch):
            (here / "llm" / f"{split}_CoT_{k // batch}.json").write_text(json.dumps(outputs[k : k + batch]))
    return here


@pytest.mark.parametrize("name", ["anli1", "esnli"])
def test_the_nli_sets(tmp_path, name):
    _nli(tmp_path, name)
    splits = load_splits(tmp_path, dataset=name)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [7, 7, 7]
    assert splits.task.label_kind == "closed"
    assert splits.task.labels == ("entailment", "neutral", "contradiction")
    row = splits.validation[4]
    assert row.input == "premise: valid premise 4\nhypothesis: h 4"
    assert (row.label, row.teacher_label, (row.rationale or "").strip()) == (
        "neutral",
        "neutral",
        "Because 4.",
    )


def test_outputs_that_cannot_be_matched_stop(tmp_path):
    llm = _nli(tmp_path, "anli1") / "llm"
    whole = (llm / "train_CoT_0.json").read_text()
    (llm / "train_CoT_0.json").write_text(json.dumps(json.loads(whole)[:2]))
    with pytest.raises(DataError, match="belong to the wrong rows"):
        read_paper_files(tmp_path, "anli1")
    (llm / "train_CoT_0.json").unlink()
    with pytest.raises(DataError, match=r"train_CoT_0\.json is missing"):
        read_paper_files(tmp_path, "anli1")
    (llm / "train_CoT_0.json").write_text(whole)
    (llm / "train_CoT_2.json").write_text("[]")
    with pytest.raises(DataError, match="6 teacher outputs for 7 rows"):
        read_paper_files(tmp_path, "anli1")
    (llm / "train_CoT_2.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="array of strings"):
        read_paper_files(tmp_path, "anli1")
    for file in llm.glob("train_*"):
        file.unlink()
    assert all(row.teacher_label is None for row in read_paper_files(tmp_path, "anli1").splits["train"])


def test_a_bad_row_keeps_the_others_beside_their_outputs(tmp_path):
    file = _nli(tmp_path, "esnli") / "esnli_train.json"
    lines = file.read_text().splitlines()
    lines[2] = lines[2].replace('"label": 2', '"label": 7')
    lines[4] = "{broken"
    file.write_text("\n".join(lines) + "\n")
    found = read_paper_files(tmp_path, "esnli")
    assert [(row.line, row.reason) for row in found.rejected["train"]] == [
        (3, "'label' is not 0, 1 or 2"),
        (5, "broken JSON"),
    ]
    for row in found.splits["train"]:
        assert (row.rationale or "").strip() == f"Because {row.id.rsplit('-', 1)[1]}."
    with pytest.raises(DataError, match=r"esnli_train\.json:3"):
        load_splits(tmp_path, dataset="esnli")
    assert len(load_splits(tmp_path, dataset="esnli", skip_bad_rows=True).train) == 5


def test_wrong_names_and_places(tmp_path):
    with pytest.raises(UsageError, match="cqa, svamp, anli1, esnli"):
        read_paper_files(tmp_path, "gsm8k")
    with pytest.raises(DataError, match=r"svamp_train\.json"):
        read_paper_files(tmp_path, "svamp")
