"""Bundles for labels alone, and with a smaller vocabulary: the same answers, less on disk, refused when it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbs_edge.errors import GuardError, UsageError
from sbs_edge.export.api import export
from sbs_edge.export.vocabulary import input as input_vocabulary
from sbs_edge.export.vocabulary import output as vocabulary
from sbs_edge.runtime.student import Student


def size(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


def test_labels_alone(trained, tmp_path: Path, rows) -> None:
    student, _ = trained
    export(student, tmp_path / "whole", targets=("cpu-int8",))
    result = export(student, tmp_path / "labels", targets=("cpu-int8",), label_only=True)
    assert not [name for name in result.manifest["files"] if "explainer" in name]
    assert size(tmp_path / "labels") < size(tmp_path / "whole")
    # What the label scorer maps is the same file in both: the explainer's constants lie elsewhere.
    digests = [
        json.loads((tmp_path / name / "manifest.json").read_text())["files"]["cpu-int8/weights.bin"]["sha256"]
        for name in ("whole", "labels")
    ]
    assert digests[0] == digests[1]
    texts = [row["input"] for row in rows(40, seed=5)]
    with Student.load(tmp_path / "whole") as whole, Student.load(tmp_path / "labels") as small:
        assert whole.predict(texts) == small.predict(texts)
        small.warm_up()
        with pytest.raises(UsageError, match="with label_only=False"):
            small.explain(texts)


def test_open_labels_are_generated_and_cannot_do_without(make_student, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", kind="open", labels=())
    with pytest.raises(UsageError, match="leave out label_only"):
        export(student, tmp_path / "bundle", label_only=True)
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_vocabulary, "MARGIN", 0)
    monkeypatch.setattr(input_vocabulary, "MULTIPLE", 1)
    monkeypatch.setattr(vocabulary, "MULTIPLE", 1)


@pytest.mark.usefixtures("no_margin")
@pytest.mark.parametrize("prune_output", [False, True])
def test_fewer_tokens_to_read(trained, tmp_path: Path, rows, prune_output: bool) -> None:
    student, tiny = trained
    targets = ("cpu-fp32", "cpu-int8")
    export(student, tmp_path / "whole", targets=targets)
    result = export(
        student,
        tmp_path / "small",
        targets=targets,
        prune_input_vocabulary=True,
        prune_vocabulary=prune_output,
    )
    figures = result.manifest["vocabulary"]
    assert figures["tokens"] < figures["tokens_of_the_student"] == tiny.tokenizer.get_vocab_size()
    assert figures["validation_tokens_unchanged"] == 1.0
    assert 0.9 < figures["unseen_tokens_unchanged"] <= 1.0
    assert result.manifest["model"]["vocab_size"] == figures["tokens"]
    assert json.loads((tmp_path / "small" / "config.json").read_text())["vocab_size"] == figures["tokens"]
    texts = [row["input"] for row in rows(60, seed=11)]
    for target in targets:
        with (
            Student.load(tmp_path / "whole", target) as whole,
            Student.load(tmp_path / "small", target) as small,
        ):
            # The rows' words are all kept: labels and their probabilities are the same, bit for bit.
            assert whole.predict(texts) == small.predict(texts)
            assert whole.explain(texts[:20]) == small.explain(texts[:20])
            # A word that is gone is unknown, and is answered all the same.
            assert small.count_tokens(["motor leak"]) == whole.count_tokens(["motor leak"])
            assert small.predict(["motor leak"])[0].label in small.labels


@pytest.mark.usefixtures("no_margin")
def test_choices_and_open_labels_with_fewer_tokens(make_student, tmp_path: Path, rows) -> None:
    """Random weights, untied, colliding labels: the trie's log-probabilities are over the kept tokens."""
    labels = ("red one", "red two", "blue")
    student = make_student(tmp_path / "trie", labels=labels, tie_word_embeddings=False)
    for name in ("validation.jsonl", "calibration.jsonl"):
        found = [json.loads(line) for line in (student / name).read_text().splitlines()]
        lines = [json.dumps({**row, "label": labels[index % 3]}) for index, row in enumerate(found)]
        (student / name).write_text("\n".join(lines))
    texts = [row["input"] for row in rows(30, seed=4)]
    result = export(
        student, tmp_path / "bundle", targets=("cpu-fp32",), prune_input_vocabulary=True, max_drop=100.0
    )
    assert result.manifest["labels"]["method"] == "trie"
    export(student, tmp_path / "whole", targets=("cpu-fp32",))
    with Student.load(tmp_path / "whole") as whole, Student.load(tmp_path / "bundle") as small:
        pairs = list(zip(whole.predict(texts), small.predict(texts), strict=True))
    assert sum(a.label == b.label for a, b in pairs) >= 0.8 * len(pairs)
    opened = make_student(tmp_path / "open", kind="open", labels=())
    # Random weights: what they write hangs on the last bits.
    accepted = {"max_drop": 100.0, "min_rationale_agreement": 0.0}
    export(opened, tmp_path / "opened", targets=("cpu-int8",), prune_input_vocabulary=True, **accepted)
    with Student.load(tmp_path / "opened") as answering:
        assert all(isinstance(answer.label, str) for answer in answering.predict(texts))


@pytest.mark.usefixtures("no_margin")
@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_too_few_tokens_are_refused(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    student, _ = trained
    export(student, tmp_path / "bundle", targets=("cpu-fp32",))
    before = {path: path.read_bytes() for path in sorted((tmp_path / "bundle").rglob("*")) if path.is_file()}

    def labels_alone(opened, _, texts):
        return [texts.encode(text) for text in (*opened.task.labels, *opened.prefixes.values())]

    monkeypatch.setattr(input_vocabulary, "_ids", labels_alone)  # no row was looked at
    with pytest.raises(GuardError, match=r"pruned vocabulary the float32 student.*prune_input_vocabulary"):
        export(student, tmp_path / "bundle", targets=(target,), prune_input_vocabulary=True)
    assert before == {
        path: path.read_bytes() for path in sorted((tmp_path / "bundle").rglob("*")) if path.is_file()
    }


def test_what_cannot_be_pruned_is_said(make_student, trained, tmp_path: Path) -> None:
    student, _ = trained
    for options in ({"layout": "optimum"}, {"single_file": True}):
        with pytest.raises(UsageError, match="leave out prune_input_vocabulary"):
            export(student, tmp_path / "b", prune_input_vocabulary=True, **options)
    bare = make_student(tmp_path / "bare", rows=0)
    with pytest.raises(UsageError, match="needs rows"):
        export(bare, tmp_path / "b", prune_input_vocabulary=True)
