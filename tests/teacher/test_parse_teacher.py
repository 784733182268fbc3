"""Parsing, judged by PaLM's recorded outputs and the authors' own rules as ``sbs_edge.data`` reads them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.data.answers import same_answer
from sbs_edge.data.paper import parse_teacher, read_paper_files
from sbs_edge.teacher.annotate import Settings, annotate_outputs
from sbs_edge.teacher.outputs import read_paper_outputs
from sbs_edge.teacher.parse import check_quality, parse_answer
from sbs_edge.teacher.presets import PRESETS
from sbs_edge.teacher.task import Filters

OPEN_FILTERS = Filters(
    label_in_set=False,
    contradiction=False,
    duplicates=False,
    min_rationale_words=0,
    max_rationale_words=10_000,
)


def palm(folder, name, split, *, filters=None):
    task = PRESETS[name]
    if filters is not None:
        task = task.model_copy(update={"filters": filters})
    found = read_paper_files(folder, name)
    outputs = read_paper_outputs((folder / name / "llm").glob(f"{split}_CoT_*.json"))
    if found.rejected[split]:  # keep the outputs beside their rows
        taken = {int(row.id.rsplit("-", 1)[1]) for row in found.splits[split]}
        outputs = [output for index, output in enumerate(outputs) if index in taken]
    rows = found.splits[split]
    return rows, outputs, annotate_outputs(rows, task, outputs, Settings("palm")).results


# Agreement of PaLM with gold by value. The authors' rule reads 586 and 148: of "(13 * 17) + 8" it takes the bracket.
@pytest.mark.parametrize(("split", "agree"), [("train", 594), ("test", 155)])
def test_svamp_answers_are_read_whole(paper_data, split, agree):
    rows, _, results = palm(paper_data, "svamp", split, filters=OPEN_FILTERS)
    got = sum(
        same_answer(row.label, r.example.teacher_label or "", "value")
        for row, r in zip(rows, results, strict=True)
    )
    assert got == agree


def test_cqa_agrees_with_the_authors_rules_up_to_letter_case(paper_data):
    """Our rule finds each choice that the authors' rule finds, unless the letter beside it is another's."""
    rows, outputs, results = palm(paper_data, "cqa", "train", filters=OPEN_FILTERS)
    theirs = [parse_teacher(output.text, "cqa")[1] for output in outputs]
    exact = folded = 0
    contradicted = []
    for row, label, result in zip(rows, theirs, results, strict=True):
        if label in row.choices and result.example.teacher_label != label:
            contradicted.append((label, result.example.teacher_label))
        exact += label == row.label
        folded += result.example.teacher_label == row.label
    assert exact == 7234  # the count of the authors' rules on these files
    # 100 more in another case, 1 abbreviated; "(a) closet, (b) chest or (c) drawer" is not an answer.
    assert folded == 7335
    assert contradicted == [("unimportant", "(e) unimportant")]  # (e) is "petty"


def test_the_contradiction_filter_removes_mostly_wrong_answers(paper_data):
    """A filter earns its place only if what it drops is worse than what it keeps."""
    rows, _, loose = palm(paper_data, "svamp", "train", filters=OPEN_FILTERS)
    _, _, strict = palm(paper_data, "svamp", "train")
    right = [
        same_answer(r.label, x.example.teacher_label or "", "value") for r, x in zip(rows, loose, strict=True)
    ]
    kept = [ok for ok, x in zip(right, strict, strict=True) if x.reason is None]
    dropped = [ok for ok, x in zip(right, strict, strict=True) if x.reason == "rationale-contradicts-label"]
    assert len(dropped) > 50
    assert sum(kept) / len(kept) > 0.80
    assert sum(dropped) / len(dropped) < 0.40


def test_every_lost_row_has_a_reason(paper_data):
    _, _, results = palm(paper_data, "svamp", "train")
    reasons = Counter(r.reason for r in results)
    assert reasons == {
        None: 701,
        "rationale-contradicts-label": 66,
        "label-unreadable": 22,
        "marker-missing": 11,
    }


CQA, SVAMP, ANLI, ESNLI = (PRESETS[name] for name in ("cqa", "svamp", "anli1", "esnli"))
CHOICES = ("park", "garden center", "math problem")


@pytest.mark.parametrize(
    ("task", "text", "choices", "finish", "label", "reason"),
    [
        (CQA, "It counts. So the answer is (c) math problem.", CHOICES, "stop", "math problem", None),
        (CQA, "It counts. So the answer is (c).", CHOICES, "stop", "math problem", None),
        (CQA, "It counts. So the answer is C.", CHOICES, "stop", "math problem", None),
        (CQA, "It counts.\n\nSo the answer is: **(c) Math Problem**", CHOICES, "stop", "math problem", None),
        (CQA, "<think>So the answer is (a)</think>It. So the answer is (c).", CHOICES, None, "math problem", None),
        (CQA, "So the answer is (a) park. No, so the answer is (c).", CHOICES, "stop", None, "marker-repeated"),
        (CQA, "A. So the answer is (a) park. Thus so the answer is (a) park.", CHOICES, "stop", "park", None),
        (CQA, "It counts. So the answer is (c) math pro", CHOICES, "length", None, "cut-off"),
        (CQA, "It counts. So the", CHOICES, "length", None, "cut-off"),
        (CQA, "It counts.", CHOICES, "stop", None, "marker-missing"),
        (CQA, "  \n", CHOICES, "stop", None, "empty"),
        (CQA, "anything", CHOICES, "content_filter", None, "refused"),
        (CQA, "I'm sorry, I can't help with that.", CHOICES, "stop", None, "refused"),
        (SVAMP, "84 / 2 = 42. The answer is (84 / 2).\n\nQ: more\nA: The answer is (1).", None, "length", "(84 / 2)", None),
        (SVAMP, "So 42. The answer is 84 / 2 = 42.", None, "stop", "84 / 2", None),
        (SVAMP, "So 42. The answer is $1,200.", None, "stop", "1200", None),
        # As SmolLM2 writes them: a bracket that is only a part, the value and words behind it.
        (SVAMP, "So 48. The answer is (48 / 12) + 1.", None, "stop", "(48 / 12) + 1", None),
        (SVAMP, "The answer is (110 - 110) / 11 = 1. The answer is (110 - 110) / 11 = 1.", None, "stop",
         "(110 - 110) / 11", None),
        (SVAMP, "So 96. The answer is (18 * 54) / 5 days = 96 days.", None, "stop", "(18 * 54) / 5", None),
        (SVAMP, "So 35. The answer is (15 + 18 + 97) / 2 = 15 + 18 = 35 kids.", None, "stop", "(15 + 18 + 97) / 2", None),
        (SVAMP, "So 5. The answer is 2 * (9 - 4).", None, "stop", "2 * (9 - 4)", None),
        (SVAMP, "So 26. The answer is (11 * 2) + 2. The answer is (11 + 2) + 2.", None, "stop", None, "marker-repeated"),
        (SVAMP, "Two. The answer is (8 / 4) and (6 / 4).", None, "stop", None, "label-unreadable"),
        (SVAMP, "So 8. The answer is (some bags + 4 bags).", None, "stop", None, "label-unreadable"),
        (SVAMP, "So 8. The answer is " + "(1 + " * 300, None, "stop", None, "label-unreadable"),
        # A label repeated until the limit is one label.
        (ANLI, "A film is named." + " So the answer is neutral." * 9 + " So t", None, "length", "neutral", None),
        (CQA, "A theatre. So the answer is (c) park.", CHOICES, "stop", "(c) park", None),  # the letter is another's
        (CQA, "The answer is (a) park. So the answer is (b) garden center.", CHOICES, "stop", "garden center", None),
        (SVAMP, "So. The answer is (2 * x).", None, "stop", None, "label-unreadable"),
        (SVAMP, "So. The answer is __import__('os').", None, "stop", None, "label-unreadable"),
        (ANLI, "Nobody there. So the answer is Contradiction.\n\npremise: another", None, "stop", "contradiction", None),
        (ESNLI, "Nobody there. Answer: neutral", None, "stop", "neutral", None),
    ],
)  # fmt: skip
def test_answers_as_models_write_them(task, text, choices, finish, label, reason):
    parsed = parse_answer(task, text, choices, finish)
    assert (parsed.label, parsed.reason) == (label, reason)


@pytest.mark.parametrize(
    ("filters", "label", "rationale", "reason"),
    [
        (Filters(), "park", "only the park fits", None),
        (Filters(leak=True), "park", "only the Park fits", "rationale-leaks-label"),
        (Filters(leak=True), "park", "parking is hard", None),
        (Filters(), "park", "only the garden  center fits", "rationale-contradicts-label"),
        (Filters(), "beach", "fits", "label-not-in-set"),
        (Filters(), "park", "", "rationale-missing"),
        (Filters(min_rationale_words=3), "park", "it fits", "rationale-too-short"),
        (Filters(max_rationale_words=3), "park", "it fits very well", "rationale-too-long"),
    ],
)
def test_filters(filters, label, rationale, reason):
    from sbs_edge.teacher.parse import Parsed

    task = CQA.model_copy(update={"filters": filters})
    assert check_quality(task, Parsed(label, rationale), CHOICES) == reason


@given(st.text(), st.sampled_from([CQA, SVAMP, ANLI, ESNLI]), st.sampled_from(["stop", "length", None]))
def test_no_text_breaks_the_parser(text, task, finish):
    for body in (text, f"because {task.answer_marker} {text}"):
        parsed = parse_answer(task, body, CHOICES if task is CQA else None, finish)
        assert (parsed.reason is None) == (parsed.label is not None)
        if parsed.label is not None:
            check_quality(task, parsed, CHOICES if task is CQA else None)
