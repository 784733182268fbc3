"""The names that users of transformers and scikit-learn expect of ``Student``."""

from __future__ import annotations

import asyncio
import doctest
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sbs_edge import IntegrityError, Student, UsageError
from sbs_edge.runtime.bundle import seal


@pytest.fixture
def student(tiny_bundle: Path):
    with Student.from_pretrained(tiny_bundle, threads=1) as loaded:
        yield loaded


def test_one_text_gives_one_answer_and_a_list_gives_a_list(student: Student, some_texts: list[str]) -> None:
    text = some_texts[0]
    (predicted,), (explained,) = student.predict([text]), student.explain([text], 4)
    assert student.predict(text) == predicted
    assert student.explain(text, 4) == explained
    choices = ["hot", "cold"]
    (chosen,) = student.predict([text], labels=choices)
    assert student.predict(text, labels=choices) == student.predict(text, labels=[choices]) == chosen
    assert student.predict(text, tokens=student.tokenize([text])) == predicted
    assert student.predict(text, abstain_below=1.0).abstained

    async def ask() -> None:
        assert await student.apredict(text, choices) == chosen
        assert await student.apredict([text], truncate=True) == [predicted]
        assert await student.aexplain(text, 4) == explained
        assert await student.aexplain([text], max_new_tokens=4) == [explained]

    asyncio.run(ask())
    for call in (student.predict, student.explain):
        with pytest.raises(UsageError, match="Text 0 is empty"):
            call("")


def test_predict_proba_has_the_probabilities_of_predict(student: Student, some_texts: list[str]) -> None:
    found = student.predict_proba(iter(some_texts))
    answers = student.predict(some_texts)
    assert (found.dtype, found.shape) == (np.float64, (len(some_texts), 3))
    assert student.classes_.tolist() == ["stay", "go", "wait"] == list(student.labels)
    assert found.tolist() == [[a.probabilities[name] for name in student.classes_] for a in answers]
    assert student.classes_[found.argmax(axis=1)].tolist() == [a.label for a in answers]
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-12
    assert student.predict_proba(some_texts[0]).tolist() == found[0].tolist()
    assert student.predict_proba([]).shape == (0, 3)
    with pytest.raises(UsageError, match="Text 1 has 102 tokens"):
        student.predict_proba(["pump", "pump " * 100])
    assert student.predict_proba(["pump " * 100], truncate=True).shape == (1, 3)


@pytest.mark.parametrize(("kind", "why"), [("open", "open"), ("choices", "own choices")])
def test_students_without_fixed_classes_say_why(tiny, students, tmp_path: Path, kind: str, why: str) -> None:
    with Student.from_pretrained(
        students.write_bundle(tiny, tmp_path / kind, kind=kind), threads=1
    ) as student:
        assert not hasattr(student, "classes_")
        with pytest.raises(AttributeError, match=why):
            _ = student.classes_
        with pytest.raises(UsageError, match=why):
            student.predict_proba(["pump"])


def test_load_is_from_pretrained_with_the_same_defaults() -> None:
    assert inspect.signature(Student.load) == inspect.signature(Student.from_pretrained)
    loading = inspect.signature(Student.from_pretrained).parameters
    for name, parameter in inspect.signature(Student).parameters.items():
        if name != "bundle":
            assert loading[name].default == parameter.default, name


def test_a_saved_bundle_answers_the_same(own_bundle: Path, tmp_path: Path, some_texts: list[str]) -> None:
    with Student.from_pretrained(own_bundle, "cpu-int8", threads=1) as student:
        out = student.save_pretrained(tmp_path / "saved")
        assert out == tmp_path / "saved"
        for wrong in (own_bundle / "inside", tmp_path):
            with pytest.raises(UsageError):
                student.save_pretrained(wrong)
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "mine.txt").write_text("mine")
        with pytest.raises(UsageError, match="not a bundle"):
            student.save_pretrained(tmp_path / "notes")
        assert student.save_pretrained(own_bundle) == own_bundle
        expected = student.predict(some_texts)
    with Student.from_pretrained(str(out), "cpu-int8", threads=1) as copied:
        assert copied.predict(some_texts) == expected
        assert copied.manifest == student.manifest


def test_a_bundle_that_changed_since_it_was_loaded_is_not_saved(own_bundle: Path, tmp_path: Path) -> None:
    with Student.from_pretrained(own_bundle, threads=1) as student:
        graph = own_bundle / "cpu-fp32" / "label_scorer.onnx"
        content = graph.read_bytes()
        graph.write_bytes(content[:-1] + b"x")
        with pytest.raises(
            IntegrityError, match=r"bundle/cpu-fp32/label_scorer\.onnx does not have the digest"
        ):
            student.save_pretrained(tmp_path / "saved")
        graph.write_bytes(content)
        manifest = json.loads((own_bundle / "manifest.json").read_text())
        seal(own_bundle, {**manifest, "version": "2"})
        for save in (
            lambda: student.save_pretrained(tmp_path / "saved"),
            lambda: student.push_to_hub("me/desk"),
        ):
            with pytest.raises(IntegrityError, match="was replaced after this student was loaded"):
                save()
    assert not (tmp_path / "saved").exists()


def test_a_place_that_is_not_a_bundle_is_refused_without_the_hub(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        Student.from_pretrained(Path("me/desk"))  # a Path is never a name on the hub
    with pytest.raises(UsageError, match="neither a directory nor a hub name"):
        Student.from_pretrained(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="has no revision 'v2'"):
        Student.from_pretrained(str(tiny_bundle), revision="v2")


def test_the_example_that_help_opens_with_runs(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "runs" / "latest" / "bundle")
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(Student) or "")
    assert len(examples) > 4
    scope: dict[str, object] = {}
    for example in examples:
        exec(example.source, scope)
    assert scope["probabilities"].shape == (2, 3)  # type: ignore[attr-defined]
    scope["student"].close()  # type: ignore[attr-defined]
