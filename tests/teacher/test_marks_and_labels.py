"""Thought, turn marks, ornaments and letters: what small and large models put around an answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.chat.labels import choice_letter, fold, match_label, plain_label, read_choice
from sbs_edge.chat.marks import unmark
from sbs_edge.data.example import Example
from sbs_edge.errors import DataError
from sbs_edge.teacher.annotate import Settings, annotate_outputs
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.collect import unfinished
from sbs_edge.teacher.cost import Prices
from sbs_edge.teacher.journal import Journal, Record
from sbs_edge.teacher.outputs import read_batch_outputs, read_paper_outputs
from sbs_edge.teacher.parse import parse_answer
from sbs_edge.teacher.prompt import render
from sbs_edge.teacher.task import TaskFile

CLOSED = TaskFile(
    name="shop", instruction="Do.", label_kind="closed", labels=("refund", "follow-up", "can't fix")
)
OPEN = TaskFile(name="shop", instruction="Do.", label_kind="open")
CHOICE = TaskFile(name="shop", instruction="Do.", label_kind="choices", parser="choice")
WHY = "The buyer asks for money."
ANSWER = f"{WHY} So the answer is refund."
THOUGHT = "Hm. So the answer is follow-up. Or not?"

MARKED = [
    f"<think>{THOUGHT}</think>{ANSWER}",
    f"{THOUGHT}</think>\n\n{ANSWER}",
    f"<thinking>{THOUGHT}</thinking>{ANSWER}",
    f"<THOUGHT>{THOUGHT}</THOUGHT>\n{ANSWER}",
    f"<reasoning>{THOUGHT}</reasoning>{ANSWER}",
    f"<seed:think>{THOUGHT}</seed:think>{ANSWER}",
    f"[THINK]{THOUGHT}[/THINK]{ANSWER}",
    f"◁think▷{THOUGHT}◁/think▷{ANSWER}",
    f"<|begin_of_thought|>{THOUGHT}<|end_of_thought|><|begin_of_solution|>{ANSWER}<|end_of_solution|>",
    f"<unused94>thought\n{THOUGHT}<unused95>{ANSWER}",
    f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}<|return|>",
    f"analysis{THOUGHT}assistantfinal{ANSWER}",
    f"<think>{THOUGHT} <think> again</think>{ANSWER}",
    f"<think>{THOUGHT}</think><answer>{ANSWER}</answer>",
    f"{ANSWER}<|im_end|>\n<|im_start|>user\nmore",
    f"<|im_start|>assistant\n{ANSWER}<|im_end|>",
    f"<start_of_turn>model\n{ANSWER}<end_of_turn>",
    f"<s>{ANSWER}</s>",
    f"{ANSWER}<|eot_id|>",
    f"{ANSWER}<｜end▁of▁sentence｜>",
    f"\ufeff{WHY}\u200b So the\u00a0answer is\u202frefund.",
    f"Q: message\nA: {ANSWER}",
    f"{WHY} **So the answer is:** refund.",
    f"{WHY}\n\n**So the answer is: refund.**",
    f"{WHY} The answer is refund.",
    f"{WHY} Therefore, the final answer is: refund.",
    f"{WHY}\nAnswer: refund",
    f"> {WHY}\n\n### So the answer is\n\nrefund",
    f"{WHY} _So the answer is refund._",
    f"[INST] {ANSWER} [/INST]",
    f"Here is my thought process:\n{THOUGHT}\nHere is my response:\n{ANSWER}",
    f"{WHY} So the answer is (refund).",
    f"{WHY} So the answer is <label>refund</label>.",
    f"{WHY} So the answer is 「refund」。",
]


@pytest.mark.parametrize("task", [CLOSED, OPEN])
@pytest.mark.parametrize("text", MARKED)
def test_marks_are_taken_out_and_the_answer_is_read(task, text):
    parsed = parse_answer(task, text, None, "stop")
    assert (parsed.label, parsed.rationale, parsed.reason) == ("refund", WHY, None)


@pytest.mark.parametrize("task", [CLOSED, OPEN])
@pytest.mark.parametrize("finish", ["length", "stop", None])
@pytest.mark.parametrize(
    "text",
    [
        f"<think>\n{ANSWER} Hmm, wait, we only need to",
        f"[THINK]{ANSWER}",
        f"◁think▷{ANSWER}",
        f"<thought>{ANSWER}",
        f"<|channel|>analysis<|message|>{ANSWER}",
        f"analysisWe need a label. {ANSWER}",
    ],
)
def test_thought_that_is_not_finished_is_not_an_answer(task, text, finish):
    assert parse_answer(task, text, None, finish)[:3] == (None, None, "cut-off")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"<musing>{THOUGHT}</musing>{ANSWER}", "<musing>"),
        (f"{THOUGHT}</musing>{ANSWER}", "</musing>"),
        (f"<|strange|>{ANSWER}", "<|strange|>"),
        (f"[PONDER]{THOUGHT}[/PONDER]{ANSWER}", "[PONDER]"),
    ],
)
def test_a_mark_nobody_knows_is_refused_by_name(text, name):
    assert unmark(text).reason == f"unknown-mark: {name}"
    assert parse_answer(CLOSED, text, None, "stop").reason == "unknown-mark"


def test_the_tasks_own_marks_and_plain_html_are_left_alone():
    tagged = TaskFile(name="t", instruction="Do.", answer_marker="<answer>")
    assert parse_answer(tagged, "It is so. <answer> yes", None, "stop")[:2] == ("yes", "It is so.")
    html = "The page has <b>bold</b> text and </div> is not closed. So the answer is refund."
    assert parse_answer(CLOSED, html, None, "stop").label == "refund"


@pytest.mark.parametrize(
    "written",
    ["**refund**", "`refund`", '"refund"', "\\boxed{refund}", "$\\boxed{\\text{refund}}$", "<refund>", "[refund]",
     "“refund”", "refund.", "***refund***.", "re\u00adfund", "refund\u200b",
     '"refund" (money back)', "**refund** - see above", "_refund_", "refund!"],
)  # fmt: skip
@pytest.mark.parametrize("task", [CLOSED, OPEN])
def test_ornaments_are_not_part_of_a_label(task, written):
    assert parse_answer(task, f"{WHY} So the answer is {written}", None, "stop").label == "refund"


@pytest.mark.parametrize(
    ("written", "label"),
    [("follow\u2011up", "follow-up"), ("follow\u2013up", "follow-up"), ("Follow up", "follow-up"),
     ("can\u2019t fix", "can't fix"), ("CAN\u02bcT\u202fFIX", "can't fix"), ("ｒｅｆｕｎｄ", "refund")],
)  # fmt: skip
def test_typography_is_folded(written, label):
    assert parse_answer(CLOSED, f"{WHY} So the answer is {written}.", None, "stop").label == label
    assert "\u2011" not in parse_answer(OPEN, f"{WHY} So the answer is {written}.", None, "stop").label


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("So. So the answer is Saint", "length", "cut-off"),
        ("So. So the answer is St. Peters", "length", "cut-off"),
        ("So. So the answer is Saint.\nAnd", "length", None),
        ("So. So the answer is Saint.<|im_end|>", "length", None),
        ('So. So the answer is {\n  "intent": "refund"}', "stop", "label-unreadable"),
        ("So. So the answer is ...", "stop", "label-unreadable"),
        ("So. The answer is not clear, because it depends.", "stop", "marker-missing"),
    ],
)
def test_an_open_label_is_whole_or_not_taken(text, finish, reason):
    assert parse_answer(OPEN, text, None, finish).reason == reason


@given(st.sampled_from(["refund", "follow-up", "can't fix", "C++", "New York"]), st.sampled_from(
    ["**{}**", '"{}"', "`{}`", "\\boxed{{{}}}", "{}.", "<{}>", " {}\u200b", "\\text{{{}}}"]), st.integers(1, 3))  # fmt: skip
def test_nested_ornaments_come_off(label, form, times):
    text = label
    for _ in range(times):
        text = form.format(text)
    assert plain_label(text).rstrip(".") == label
    assert match_label(text, ["other", label]) == label


@given(st.text())
def test_folding_is_stable(text):
    assert fold(fold(text)) == fold(text)
    assert isinstance(plain_label(text), str)
    assert match_label(text, [text, "other"]) in (text, "other", None)


def test_two_labels_equal_after_folding_are_told_apart_exactly_or_not_at_all():
    assert match_label("Refund", ["refund", "Refund"]) == "Refund"
    assert match_label("REFUND", ["refund", "Refund"]) is None
    assert read_choice("(b) REFUND", ["refund", "Refund"]) == "Refund"


MANY = tuple(f"choice number {i}" for i in range(60))


@pytest.mark.parametrize(
    ("text", "choices", "label"),
    [
        ("(c) math problem", ("park", "garden", "math problem"), "math problem"),
        ("option (C)", ("park", "garden", "math problem"), "math problem"),
        ("**C.** Math Problem", ("park", "garden", "math problem"), "math problem"),
        ("Vitamin (B) complex", ("iron", "zinc", "vitamin (B) complex"), "vitamin (B) complex"),
        ("plan (b)", ("plan (b)", "plan (a)"), "plan (b)"),
        ("(a) plan (b)", ("plan (b)", "plan (a)"), "plan (b)"),
        ("(e) adult", ("child", "old", "wise", "tall", "become adult"), "become adult"),
        ("(a) garden", ("park", "garden", "math problem"), None),
        ("(a) park, (b) garden", ("park", "garden"), None),
        ("(e) unknown", ("child", "old", "wise", "tall", "become adult"), None),
        ("(z)", ("park", "garden"), None),
        ("b", ("b", "a"), "b"),
        ("(b)", ("b", "a"), "a"),
        ("(aa)", MANY, MANY[26]),
        ("(ab) choice number 27", MANY, MANY[27]),
        ("(a) choice number 26", MANY, None),
    ],
)
def test_choices(text, choices, label):
    assert read_choice(text, choices) == label
    parsed = parse_answer(CHOICE, f"{WHY} So the answer is {text}.", choices, "stop")
    assert (parsed.label if parsed.label in choices else None) == label


def test_letters_are_unique_and_every_choice_is_shown_under_its_own():
    letters = [choice_letter(i) for i in range(1000)]
    assert letters[:2] + letters[25:28] == ["a", "b", "z", "aa", "ab"]
    assert len(set(letters)) == 1000
    shown = render(CHOICE, Example("1", "Which?", choices=MANY)).messages[-1][1]
    for index, choice in enumerate(MANY):
        assert f"({letters[index]}) {choice}" in shown.splitlines()
        assert read_choice(f"({letters[index]}) {choice}", MANY) == choice


# -- the journal and files of outputs ------------------------------------------------------------------------------


def test_a_journal_with_lists_and_wrong_types_is_still_read(tmp_path):
    path = tmp_path / "j.jsonl"
    lines = [
        {"key": "a", "text": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": ANSWER}]},
        {"key": "b", "text": {"text": ANSWER}},
        {"key": "c", "text": ANSWER, "cost": "much"},
        {"key": "d", "text": ANSWER, "prompt_tokens": "12", "completion_tokens": None},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = path.read_bytes()
    with Journal(path) as journal:
        assert {key: record.text for key, record in journal.records.items()} == {"a": ANSWER, "d": ANSWER}
        assert (journal.skipped, journal.total_tokens) == (2, 12)
    assert path.read_bytes() == before


def test_a_refusal_of_another_server_or_of_one_that_answered_nothing_is_asked_again():
    rows = [Example("1", "x"), Example("2", "y")]
    calls = list(unfinished(rows, CLOSED, "m", Sampling(), 1, {}))
    keys = [call.key for call in calls]
    refused = Record(keys[0], "", error="rejected: HTTP 400", server="http://one/v1")

    def left(records, server):
        found = unfinished(rows, CLOSED, "m", Sampling(), 1, {r.key: r for r in records}, server=server)
        return [call.key for call in found]

    answered = Record(keys[1], ANSWER, server="http://one/v1")
    assert left([refused, answered], "http://one/v1") == []
    assert left([refused, answered], "http://two/v1") == [keys[0]]
    assert left([refused], "http://one/v1") == keys
    old = Record(keys[0], "", error="rejected: HTTP 400")
    assert left([old, answered], "http://one/v1") == [keys[0]]


def test_a_batch_line_of_another_shape_costs_its_row_only(tmp_path):
    rows = [Example(str(i), f"message {i}") for i in range(6)]
    keys = [call.key for call in unfinished(rows, CLOSED, "m", Sampling(), 1, {})]

    def line(key, body, status=200):
        return {"custom_id": key, "response": {"status_code": status, "body": body}, "error": None}

    good = {
        "choices": [{"message": {"content": [{"type": "text", "text": ANSWER}]}}],
        "usage": {"prompt_tokens": "9"},
    }
    lines = [
        line(keys[0], good),
        line(keys[1], {"choices": [{"index": 0}]}),
        line(keys[2], "nothing"),
        {"custom_id": keys[3], "response": "text", "error": None},
        line(keys[4], {"error": {"message": "too long"}}, 400),
        {"custom_id": keys[5], "error": "lost"},
    ]
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))
    records = read_batch_outputs([path], Prices(1.0, 1.0))
    result = annotate_outputs(rows, CLOSED, records, Settings("m"))
    assert [item.reason for item in result.results] == [
        *(None, "not-the-protocol", "not-the-protocol", "not-the-protocol", "http-400", "failed")
    ]
    assert result.results[4].detail == "http-400: HTTP 400: too long"
    assert records[keys[0]].prompt_tokens == 9


def test_recorded_outputs_are_texts_parts_or_named(tmp_path):
    path = tmp_path / "x_CoT_0.json"
    path.write_text(json.dumps([ANSWER, None, [{"type": "text", "text": ANSWER}]]))
    assert [record.text for record in read_paper_outputs([path])] == [ANSWER, "", ANSWER]
    path.write_text(json.dumps([ANSWER, {"answer": 1}]))
    with pytest.raises(DataError, match="entry 2"):
        read_paper_outputs([path])
