"""The runtime's answers against PyTorch's, alone and in company."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sbs_edge.errors import AnswerError, UsageError
from sbs_edge.runtime.student import Student

LABELS = ("stay", "go", "wait")
COLLIDING = ("red one", "red two", "blue")
CHOICES = [["hot pump", "hot valve", "ice"], ["door", "belt"], ["north", "south", "day", "night", "hot pump"]]


def log_probability(tiny, text: str, label: str) -> float:
    """Sum of log P(token | prefix) of the label and its end-of-sequence, by PyTorch."""
    tokens = tiny.tokenizer.encode(label).ids
    logs = tiny.logits(text, tokens[:-1]).log_softmax(-1)
    return float(sum(logs[i, token] for i, token in enumerate(tokens)))


def test_probabilities_are_the_softmax_of_pytorchs_logits(tiny, tiny_bundle: Path, some_texts) -> None:
    columns = [tiny.tokenizer.encode(label).ids[0] for label in LABELS]
    with Student.load(tiny_bundle, threads=1) as student:
        for text, answer in zip(some_texts, student.predict(some_texts), strict=True):
            logits = tiny.logits(text)[0, columns].double().numpy() / 2.0  # the bundle's temperature
            expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            assert np.allclose([answer.probabilities[label] for label in LABELS], expected, atol=1e-5)
            assert answer.label == LABELS[int(expected.argmax())]
            assert answer.n_input_tokens == len(tiny.ids(text))


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_colliding_first_tokens_are_scored_whole(tiny, trie_bundle: Path, some_texts, target: str) -> None:
    with Student.load(trie_bundle, target, threads=1) as student:
        scores = student.label_scores(some_texts)
    expected = np.array([[log_probability(tiny, text, label) for label in COLLIDING] for text in some_texts])
    if target == "cpu-fp32":
        assert np.allclose(scores, expected, atol=1e-3, rtol=1e-4)
    else:
        # Random weights exaggerate rounding: the bound only tells int8 noise from a wrong formula.
        assert np.abs(scores - expected).mean() < 0.1 * np.abs(expected).mean()


def test_labels_of_the_request(tiny, tiny_bundle: Path, some_texts) -> None:
    asked = [CHOICES[i % 3] for i in range(len(some_texts))]
    with Student.load(tiny_bundle, threads=1) as student:
        answers = student.predict(some_texts, labels=asked)
        alone = student.predict(some_texts[:1], labels=asked[0])
    assert alone[0].label == answers[0].label
    for text, labels, answer in zip(some_texts, asked, answers, strict=True):
        scores = np.array([log_probability(tiny, text, label) for label in labels]) / 2.0
        expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        assert list(answer.probabilities) == labels
        assert np.allclose(list(answer.probabilities.values()), expected, atol=1e-4)


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_labels_of_the_request_are_scored_the_same_in_any_company(
    tiny_bundle: Path, some_texts, target: str
) -> None:
    # From two to six labels of one to five tokens: tries of many sizes, which are padded in a call.
    rng = random.Random(3)
    words = sorted({word for names in CHOICES for name in names for word in name.split()})
    asked = [
        ["stay", *{" ".join(rng.choices(words, k=rng.randint(1, 5))): None for _ in range(rng.randint(1, 5))}]
        for _ in some_texts
    ]
    with Student.load(tiny_bundle, target, threads=1) as student:
        together = student.predict(some_texts, labels=asked)
        alone = [
            student.predict([text], labels=[own])[0] for text, own in zip(some_texts, asked, strict=True)
        ]
        some = student.predict(some_texts[5:12], labels=asked[5:12])
    assert alone == together
    assert some == together[5:12]


def test_rationales_and_open_labels_are_the_greedy_tokens(
    tiny, tiny_bundle: Path, open_bundle: Path, some_texts
) -> None:
    import torch

    with Student.load(tiny_bundle, threads=1) as student:
        for text, answer in zip(some_texts, student.explain(some_texts, 12), strict=True):
            tokens = tiny.generated(text, 12)
            assert answer.rationale == tiny.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert answer.complete == (tokens[-1] == 1)
            assert answer.n_tokens == len(tokens)
    with Student.load(open_bundle, threads=1) as student:
        for text, found in zip(some_texts, student.predict(some_texts), strict=True):
            ids = torch.tensor([tiny.ids(text)])
            tokens = tiny.model.generate(ids, max_new_tokens=9, do_sample=False)[0, 1:].tolist()
            assert found.label == tiny.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            logs = tiny.logits(text, tokens[:-1]).log_softmax(-1)
            expected = float(np.exp(sum(float(logs[i, token]) for i, token in enumerate(tokens))))
            assert found.probability == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_company_changes_no_bit(tiny_bundle: Path, some_texts, target: str) -> None:
    """Rows keep the padded length they have alone, so int8 answers are bit-identical; float32's kernels
    may add in another order for one row than for many."""
    for budget in (64, 512):
        with Student.load(tiny_bundle, target, threads=1, max_batch_tokens=budget) as student:
            together = student.label_scores(some_texts)
            alone = np.concatenate([student.label_scores([text]) for text in some_texts])
            rationales = [answer.rationale for answer in student.explain(some_texts, 10)]
            assert rationales == [student.explain([text], 10)[0].rationale for text in some_texts]
        if target == "cpu-int8":
            assert np.array_equal(together, alone)
        assert np.allclose(together, alone, rtol=1e-5, atol=1e-5)
        assert (together.argmax(1) == alone.argmax(1)).all()


def test_long_inputs_are_refused_or_cut_as_allowed(tiny_bundle: Path) -> None:
    long = "pump " * 100
    with Student.load(tiny_bundle, threads=1) as student:
        with pytest.raises(UsageError, match=r"Text 1 has 102 tokens .* limit is 40"):
            student.predict(["pump", long])
        short, cut = student.predict(["pump", long], truncate=True)
        assert (short.truncated, cut.truncated, cut.n_input_tokens) == (False, True, 40)
        # A prefix, 38 words and end-of-sequence are 40 tokens: exactly what was kept.
        assert cut.probabilities == student.predict(["pump " * 38])[0].probabilities
        assert student.explain([long], 3, truncate=True)[0].truncated
        assert student.count_tokens(["pump", long]) == [3, 102]


def test_bad_requests_say_what_is_wrong(tiny_bundle: Path, open_bundle: Path) -> None:
    with Student.load(tiny_bundle, threads=1) as student:
        for call, match in (
            (lambda: student.predict(["pump", 3]), "not a string"),
            (lambda: student.predict(["pump"], labels=[["a", "b"], ["c"]]), "a list for each text"),
            (lambda: student.predict(["pump"], labels=[[]]), "non-empty"),
            (lambda: student.predict(["pump"], labels=[["hot", "hot"]]), "twice"),
            (lambda: student.predict(["pump"], labels=[["hot", "Hot"]]), "same tokens"),
            (lambda: student.predict(["pump"], labels=[["hot", " "]]), "no token"),
            (lambda: student.predict(["pump"], labels=[["hot", "hot " * 20]]), "limit is 8"),
            (lambda: student.explain(["pump"], 25), "between 1 and 24"),
            (lambda: student.explain(["pump"], 0), "between 1 and 24"),
            (lambda: student.explain(["pump"], 5, num_beams=4), "beam of width 4"),
        ):
            with pytest.raises(UsageError, match=match):
                call()
        assert student.predict([]) == []
        assert student.explain([]) == []
    with pytest.raises(UsageError, match=r"no target 'cpu-int4'.*export the student for 'cpu-int4'"):
        Student.load(tiny_bundle, "cpu-int4")
    with pytest.raises(UsageError, match="at least 1"):
        Student.load(tiny_bundle, max_batch_tokens=0)
    with Student.load(open_bundle, threads=1) as student:
        assert student.labels == ()


def test_some_of_the_closed_labels_without_a_choice_scorer(tiny_bundle: Path, tmp_path: Path) -> None:
    with Student.load(tiny_bundle, threads=1) as student:
        whole = student.predict(["hot pump"])[0].probabilities
        del student._sessions["choice_scorer"]
        some = student.predict(["hot pump"], labels=["wait", "go"])[0].probabilities
        assert some["go"] == pytest.approx(whole["go"] / (whole["go"] + whole["wait"]))
        with pytest.raises(UsageError, match="not 'fly'"):
            student.predict(["hot pump"], labels=["go", "fly"])


def test_doubtful_answers_are_marked(tiny_bundle: Path, some_texts) -> None:
    with Student.load(tiny_bundle, threads=1) as student:
        assert not any(answer.abstained for answer in student.predict(some_texts))
        for answer in student.predict(some_texts, abstain_below=0.6):
            assert answer.abstained == (answer.probability < 0.6)


def test_threads_and_the_event_loop_share_one_student(tiny_bundle: Path, some_texts) -> None:
    with Student.load(tiny_bundle, threads=1) as student:
        expected = student.predict(some_texts)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: student.predict(some_texts), range(8)):
                assert found == expected

        async def ask() -> None:
            found = await asyncio.gather(*(student.apredict([text]) for text in some_texts[:8]))
            assert [row[0].label for row in found] == [row.label for row in expected[:8]]
            assert (await student.aexplain(some_texts[:1], 4))[0].n_tokens <= 4

        asyncio.run(ask())


def test_answers_need_neither_torch_nor_transformers(tiny_bundle: Path) -> None:
    code = f"""
import sys
from sbs_edge import Student
with Student.load({str(tiny_bundle)!r}, threads=1) as student:
    student.warm_up()
    student.predict(["hot pump"], labels=["hot", "cold"])
    student.explain(["hot pump"], 4)
heavy = {{"torch", "transformers", "onnx", "sklearn", "pandas", "datasets", "sbs_edge.export", "sbs_edge.training"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_a_manifest_can_be_printed(tiny_bundle: Path) -> None:
    with Student.load(tiny_bundle, threads=1) as student:
        assert json.loads(json.dumps(student.manifest))["default_target"] == student.target


def test_a_closed_student_says_so(tiny_bundle: Path) -> None:
    with Student.load(tiny_bundle, threads=1) as student:
        student.predict(["hot pump"])
    for ask in (student.predict, student.explain):
        with pytest.raises(UsageError, match="was closed"):
            ask(["hot pump"])


def test_any_iterable_of_texts_is_gone_through_once_and_answered(tiny_bundle, some_texts):
    import numpy as np

    texts = some_texts[:6]
    with Student.load(tiny_bundle, "cpu-fp32", threads=1) as student:
        want, reasons = student.predict(texts), student.explain(texts, 3)
        for form in (lambda: (t for t in texts), lambda: iter(texts), lambda: tuple(texts),
                     lambda: dict.fromkeys(texts).keys() and (t for t in texts), lambda: np.array(texts)):  # fmt: skip
            assert student.predict(form()) == want
            assert student.explain(form(), 3) == reasons
            assert student.count_tokens(form()) == [p.n_input_tokens for p in want]
            np.testing.assert_array_equal(student.label_scores(form()), student.label_scores(texts))
        choices = [("wait", "close")] * len(texts)
        given = student.predict((t for t in texts), labels=((c for c in row) for row in choices))
        assert given == student.predict(texts, labels=choices)
        assert student.predict(iter([])) == student.explain(iter([])) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fine", None], "Text 1 is a NoneType"),
        (["fine", "x", float("nan")], "Text 2 is a float"),
        ([b"bytes"], "Text 0 is a bytes"),
        (["ok", "half \ud83d"], "Text 1 is not valid Unicode: character 6 is"),
        (b"one text", "must be a list of strings, not a bytes"),
        ({"a": 1}, "must be a list of strings, not a dict"),
        ({"a", "b"}, "must be a list of strings, not a set"),
        (None, "must be a list of strings, not a NoneType"),
        (7, "must be a list of strings, not a int"),
    ],
)
def test_what_is_not_a_list_of_texts_is_refused_with_its_row(tiny_bundle, texts, message):
    with Student.load(tiny_bundle, "cpu-fp32", threads=1) as student:
        for ask in (student.predict, student.explain, student.tokenize, student.count_tokens):
            with pytest.raises(UsageError, match=message):
                ask(iter(texts) if isinstance(texts, list) else texts)


def test_a_student_says_why_it_cannot_be_pickled_or_copied(tiny_bundle):
    import copy
    import pickle

    with Student.load(tiny_bundle, threads=1) as student:
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(
                UsageError, match=r"Send the bundle's path .* and call Student\.from_pretrained once"
            ):
                act(student)


def test_a_closed_student_says_so_whatever_it_is_asked(tiny_bundle):
    student = Student.load(tiny_bundle, threads=1)
    student.close()
    student.close()  # harmless
    for ask in (
        student.predict,
        student.explain,
        student.tokenize,
        student.label_scores,
        student.count_tokens,
    ):
        for texts in (["hot pump"], []):
            with pytest.raises(UsageError, match="was closed"):
                ask(texts)
    with pytest.raises(UsageError, match="was closed"):
        student.warm_up()
    with pytest.raises(UsageError, match="was closed"), student:
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error_that_names_the_text(tiny_bundle, value):
    """A session in the graph's place gives what a broken graph would; everything else is real."""
    import numpy as np

    with Student.load(tiny_bundle, "cpu-fp32", threads=1) as student:
        real = student._sessions["label_scorer"]

        class Broken:
            def run(self, inputs):
                (scores,) = real.run(inputs)
                broken = np.array(scores)
                broken[inputs["attention_mask"].sum(1) > 12] = value
                return [broken]

        student._sessions["label_scorer"] = Broken()
        texts = [
            "hot pump",
            "cold coil in the zone and the pump is hot and the coil is cold and the zone is hot",
        ]
        assert student.predict(texts[:1])
        for ask in (student.predict, student.label_scores, student.predict_proba):
            with pytest.raises(AnswerError, match=r"not finite .* for text 1"):
                ask(texts)
    assert AnswerError.exit_code == 1
