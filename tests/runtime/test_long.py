"""Inputs over the limit, read in chunks: against PyTorch, alone and in company, within and over the limits."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.runtime.bundle import seal
from sbs_edge.runtime.manifest import read_manifest
from sbs_edge.runtime.student import Student
from sbs_edge.tokens import TextTokenizer
from sbs_edge.windows import ChunkReader, LongSettings

LABELS = ("stay", "go", "wait")
COLLIDING = ("red one", "red two", "blue")
SETTINGS = LongSettings(chunk=40, max_tokens=400, header="door", trained="full")
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def long_bundle(students: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("long") / "closed"
    return Path(students.write_bundle(tiny, out, long=SETTINGS.describe()))


@pytest.fixture(scope="module")
def long_texts(students: Any) -> list[str]:
    texts = students.texts_of(9, 300, seed=4)
    return [f"noise leak door {text}" if row % 2 else text for row, text in enumerate(texts)]


def expected_logits(tiny: Any, text: str, fed: list[int], task: str = "[label] ") -> np.ndarray:
    """(T, V) decoder logits by PyTorch over the kept states of the text's chunks."""
    texts = TextTokenizer(tiny.tokenizer)
    chunks = ChunkReader(texts, SETTINGS, 1).chunks(text, texts.encode(text, task), task)
    with torch.no_grad():
        parts = [
            tiny.model.get_encoder()(input_ids=torch.tensor([c.ids])).last_hidden_state[:, c.start : c.stop]
            for c in chunks
        ]
        out = tiny.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=torch.cat(parts, 1)),
            decoder_input_ids=torch.tensor([fed]),
        )
    return np.asarray(out.logits[0].double().numpy())


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


def test_labels_and_rationales_of_long_texts_are_pytorchs(
    tiny: Any, long_bundle: Path, long_texts: list[str]
) -> None:
    columns = [tiny.tokenizer.encode(label).ids[0] for label in LABELS]
    with Student.load(long_bundle, threads=1) as student:
        assert student.max_input_tokens == 400
        answers, written = student.predict(long_texts), student.explain(long_texts, 12)
        proba = student.predict_proba(long_texts)
        choices = student.predict(long_texts, labels=["hot pump", "ice"])
    assert max(answer.n_chunks for answer in answers) > 5
    for row, (text, answer) in enumerate(zip(long_texts, answers, strict=True)):
        expected = softmax(expected_logits(tiny, text, [0])[0, columns] / 2.0)  # the bundle's temperature
        assert np.allclose([answer.probabilities[label] for label in LABELS], expected, atol=1e-5)
        assert answer.label == LABELS[int(expected.argmax())]
        assert np.array_equal(proba[row], list(answer.probabilities.values()))
        assert answer.n_input_tokens == len(tiny.ids(text))
        assert not answer.truncated
        fed = [0]
        while len(fed) < 13 and fed[-1] != 1:
            fed.append(int(expected_logits(tiny, text, fed, "[rationale] ")[-1].argmax()))
        assert written[row].rationale == tiny.tokenizer.decode(fed[1:])
        assert written[row].n_chunks == answer.n_chunks
        sums = []
        for label in ("hot pump", "ice"):
            ids = tiny.tokenizer.encode(label).ids
            logits = torch.tensor(expected_logits(tiny, text, [0, *ids[:-1]])).log_softmax(-1)
            sums.append(float(logits[range(len(ids)), ids].sum()))
        assert np.allclose(
            list(choices[row].probabilities.values()), softmax(np.array(sums) / 2.0), atol=1e-4
        )


@pytest.mark.parametrize("kind", ["trie", "open"])
def test_other_kinds_of_labels(
    students: Any, tiny: Any, tmp_path: Path, long_texts: list[str], kind: str
) -> None:
    if kind == "trie":
        out = students.write_bundle(tiny, tmp_path / "b", labels=COLLIDING, long=SETTINGS.describe())
    else:
        out = students.write_bundle(tiny, tmp_path / "b", kind="open", long=SETTINGS.describe())
    with Student.load(out, threads=1) as student:
        answers = student.predict(long_texts)
    for text, answer in zip(long_texts, answers, strict=True):
        if kind == "open":
            ids = [*tiny.tokenizer.encode(answer.label, add_special_tokens=False).ids]
            logits = torch.tensor(expected_logits(tiny, text, [0, *ids])).log_softmax(-1)
            assert logits.argmax(-1).tolist()[: len(ids)] == ids
            continue
        sums = []
        for label in COLLIDING:
            ids = tiny.tokenizer.encode(label).ids
            logits = torch.tensor(expected_logits(tiny, text, [0, *ids[:-1]])).log_softmax(-1)
            sums.append(float(logits[range(len(ids)), ids].sum()))
        assert np.allclose(list(answer.probabilities.values()), softmax(np.array(sums) / 2.0), atol=1e-4)


def test_a_text_that_fits_is_answered_as_by_a_bundle_without(
    tiny_bundle: Path, long_bundle: Path, long_texts: list[str], some_texts: list[str]
) -> None:
    with Student.load(tiny_bundle, threads=1) as plain, Student.load(long_bundle, threads=1) as student:
        assert student.predict(some_texts) == plain.predict(some_texts)
        assert student.explain(some_texts[:5]) == plain.explain(some_texts[:5])
        assert {answer.n_chunks for answer in student.predict(some_texts)} == {1}
        assert not [role for role in student._sessions.opened if role.startswith("long")]
        mixed = student.predict([some_texts[0], long_texts[0], some_texts[1]])
        assert [mixed[0], mixed[2]] == plain.predict(some_texts[:2])
    for target in ("cpu-fp32", "cpu-int8"):
        for path in sorted((tiny_bundle / target).iterdir()):
            assert path.read_bytes() == (long_bundle / target / path.name).read_bytes(), path.name


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_a_long_text_is_answered_the_same_in_any_company(
    long_bundle: Path, long_texts: list[str], some_texts: list[str], target: str
) -> None:
    company = [text for pair in zip(long_texts, some_texts, strict=False) for text in pair]
    with Student.load(long_bundle, target, threads=1) as student:
        together, written = student.predict(company), student.explain(company, 6)
        for row, text in enumerate(company):
            assert student.predict(text) == together[row]
            assert student.explain(text, 6) == written[row]


@pytest.mark.parametrize("budget", [1, 80, 10_000])
def test_the_budget_of_a_call_changes_no_bit_of_int8(
    long_bundle: Path, long_texts: list[str], budget: int
) -> None:
    with (
        Student.load(long_bundle, "cpu-int8", threads=1) as usual,
        Student.load(long_bundle, "cpu-int8", threads=1, max_batch_tokens=budget) as student,
    ):
        assert np.array_equal(student.label_scores(long_texts), usual.label_scores(long_texts))


def test_runs_of_the_encoder_keep_to_the_budget(long_bundle: Path, long_texts: list[str]) -> None:
    with Student.load(long_bundle, threads=1, max_batch_tokens=100) as student:
        real, shapes = student._sessions["long_encoder"].run, []

        class Counting:
            def run(self, inputs: dict[str, Any]) -> list[Any]:
                shapes.append(inputs["input_ids"].shape)
                return real(inputs)

        student._sessions["long_encoder"] = Counting()  # type: ignore[assignment]
        answers = student.predict(long_texts)
    n_chunks = sum(answer.n_chunks for answer in answers if answer.n_chunks > 1)
    assert sum(rows for rows, _ in shapes) == n_chunks
    assert max(rows * length for rows, length in shapes) == 80
    assert len(shapes) < 0.7 * n_chunks  # two chunks a run, also across texts


def test_one_chunk_forced_through_agrees(students: Any, tiny: Any, tmp_path: Path) -> None:
    """With a lower limit the same text takes the long path in a single chunk."""
    settings = LongSettings(chunk=40, max_tokens=400)
    out = students.write_bundle(tiny, tmp_path / "b", long=settings.describe())
    texts = [text for text in students.texts_of(40, 36, seed=9) if len(tiny.ids(text)) > 12]
    with Student.load(out, threads=1) as student:
        expected, rationales = student.label_scores(texts), student.explain(texts, 8)
    manifest = read_manifest(out)
    manifest["limits"]["max_source_tokens"] = 12
    seal(out, manifest)
    with Student.load(out, threads=1) as student:
        got = student.label_scores(texts)
        assert [e.rationale for e in student.explain(texts, 8)] == [e.rationale for e in rationales]
        assert {answer.n_chunks for answer in student.predict(texts)} == {1}
        assert "long_encoder" in student._sessions.opened
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_over_the_long_limit(long_bundle: Path, students: Any) -> None:
    (text,) = students.texts_of(1, 1, seed=1)
    text = " ".join([text] * 500)
    with Student.load(long_bundle, threads=1) as student:
        with pytest.raises(UsageError, match="this bundle's limit is 400"):
            student.predict(text)
        answer = student.predict(text, truncate=True)
        assert (answer.truncated, answer.n_input_tokens) == (True, 400)
        assert answer.n_chunks > 10
    with Student.load(long_bundle, threads=1, long=False) as student:
        assert student.max_input_tokens == 40
        with pytest.raises(UsageError, match="this bundle's limit is 40"):
            student.predict(text)
        answer = student.predict(text, truncate=True)
        assert (answer.truncated, answer.n_input_tokens, answer.n_chunks) == (True, 40, 1)


def test_what_a_long_text_cannot_have_is_said(
    long_bundle: Path, tiny_bundle: Path, long_texts: list[str]
) -> None:
    with Student.load(long_bundle, threads=1) as student:
        with pytest.raises(UsageError, match="no graph for a beam of width 3"):
            student.explain("pump", num_beams=3)
        with pytest.raises(UsageError, match=r"Text 1 is over 40 tokens .* leave out num_beams"):
            student.explain(["pump", long_texts[0]], num_beams=3)
    with pytest.raises(UsageError, match="exported without them"):
        Student.load(tiny_bundle, top_k=4)
    with pytest.raises(UsageError, match="long=False leaves them out"):
        Student.load(long_bundle, long=False, top_k=4)
    with pytest.raises(UsageError, match="top_k must be at least 1, not 0"):
        Student.load(long_bundle, top_k=0)


def test_a_header_that_takes_half_a_chunk_is_read_as_text(tiny: Any, long_bundle: Path) -> None:
    late = "pump " * 60 + "door " + "fan " * 60
    texts, plain = TextTokenizer(tiny.tokenizer), LongSettings(chunk=40, max_tokens=400)
    ids = texts.encode(late, "[label] ")
    found = ChunkReader(texts, SETTINGS, 1).chunks(late, ids, "[label] ")
    assert found == ChunkReader(texts, plain, 1).chunks(late, ids, "[label] ")
    with Student.load(long_bundle, threads=1) as student:
        assert student.predict(late).n_chunks == len(found) == 4


def test_rows_of_a_unit_are_read_in_chunks(long_bundle: Path, long_texts: list[str], tmp_path: Path) -> None:
    from sbs_edge.scale.predict import answer_rows, columns_of
    from sbs_edge.scale.units import write_shard

    too_long = "pump " * 500
    rows = [(f"f@{n}", {"input": text}) for n, text in enumerate([*long_texts, too_long, "pump"])]
    with Student.load(long_bundle, threads=1) as student:
        answers = answer_rows(student, rows, explain=True)
        assert [answer["label"] for answer in answers[: len(long_texts)]] == [
            answer.label for answer in student.predict(long_texts)
        ]
        columns = columns_of(student.manifest)
    assert "limit is 400" in answers[-2]["error"]
    assert "n_chunks" not in answers[-1]
    parquet = pytest.importorskip("pyarrow.parquet")
    write_shard(str(tmp_path), "one.parquet", answers, columns)
    table = parquet.read_table(tmp_path / "one.parquet")
    assert table.column("n_chunks").to_pylist() == [answer.get("n_chunks") for answer in answers]
    assert "n_chunks" not in columns_of({})


def test_top_k_of_all_states_reads_all(long_bundle: Path, long_texts: list[str]) -> None:
    with (
        Student.load(long_bundle, threads=1) as every,
        Student.load(long_bundle, threads=1, top_k=400) as same,
        Student.load(long_bundle, threads=1, top_k=2) as few,
    ):
        expected = every.label_scores(long_texts)
        assert np.array_equal(same.label_scores(long_texts), expected)
        assert not np.allclose(few.label_scores(long_texts), expected, atol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [{"chunk": 2}, {"unknown": 1}, {"top_k": 0}, {"overlap": "x"}, {"chunk": 40.5}, {"marker": None}],
)
def test_a_manifest_with_wrong_settings_is_refused(
    long_bundle: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    import shutil

    out = Path(shutil.copytree(long_bundle, tmp_path / "b"))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["long"] |= wrong
    seal(out, manifest)
    with pytest.raises(IntegrityError, match=r"field\(s\) long"):
        Student.load(out)


def test_predict_says_how_many_chunks_it_read(
    long_bundle: Path,
    long_texts: list[str],
    tmp_path: Path,
    sbs_edge_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    (tmp_path / "in.txt").write_text("pump fan\n" + long_texts[0] + "\n")
    done = sbs_edge_cli("predict", long_bundle, tmp_path / "in.txt", "--explain")
    assert done.returncode == 0, done.stderr
    short, long = map(json.loads, done.stdout.splitlines())
    assert "n_chunks" not in short
    assert long["n_chunks"] > 1
    with Student.load(long_bundle, threads=1) as student:
        assert [short["rationale"], long["rationale"]] == [
            explanation.rationale for explanation in student.explain(["pump fan", long_texts[0]])
        ]
    (tmp_path / "in.txt").write_text("pump fan\n" + "pump " * 500 + "\n")
    done = sbs_edge_cli("predict", long_bundle, tmp_path / "in.txt")
    assert done.returncode == 2
    assert "in.txt:2 has" in done.stderr
    assert "limit is 400" in " ".join(done.stderr.split())
