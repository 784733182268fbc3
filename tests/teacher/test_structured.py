"""Structured outputs against servers that take, refuse, ignore or only know them as function calls."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import GOOD, TASK, body

from sbs_edge.data.example import Example
from sbs_edge.teacher.annotate import Settings
from sbs_edge.teacher.annotate import annotate as annotate_rows
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.collect import row_keys
from sbs_edge.teacher.openai_api import OpenAITeacher
from sbs_edge.teacher.parse import parse_answer
from sbs_edge.teacher.presets import PRESETS
from sbs_edge.teacher.prompt import render
from sbs_edge.teacher.structured import form_fields, read_object
from sbs_edge.teacher.task import parse_task

OBJECT = json.dumps({"rationale": "The buyer asks for money back.", "label": "refund"})
SHOP = parse_task(TASK, "the task")


def form_of(request):
    """The form in which a request asks."""
    if "tools" in request:
        return "tool"
    return request.get("response_format", {}).get("type", "off")


def forms(server):
    return [form_of(request) for request in server.requests]


def takes(*known, refusal="Unknown parameter: 'response_format'."):
    """A server that answers with the object in the ``known`` forms and refuses the others."""

    def reply(request, hit):
        form = form_of(request)
        if form == "off":
            return 200, body(), {}
        if form not in known:
            return 400, {"error": {"message": refusal, "type": "invalid_request_error"}}, {}
        if form == "tool":
            call = {"id": "c1", "type": "function", "function": {"name": "answer", "arguments": OBJECT}}
            return 200, body(None, "tool_calls", tool_calls=[call]), {}
        return 200, body(OBJECT), {}

    return reply


def report_of(tmp_path):
    return json.loads((tmp_path / "out.report.json").read_text())


# -- the form is settled once -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "refusal", "sent"),
    [
        (("json_schema",), "", ["json_schema"] * 6),
        (
            ("json_object",),
            "'response_format.type' must be 'json_object'",
            ["json_schema"] + ["json_object"] * 6,
        ),
        ((), "Unknown parameter: 'response_format'.", ["json_schema", "json_object"] + ["off"] * 6),
        # Nothing in the words: the same row in the plain form tells that the form is the cause.
        ((), "Bad request.", ["json_schema", "off", "json_object"] + ["off"] * 5),
    ],
)
def test_a_server_is_asked_in_the_first_form_that_it_takes(
    scripted, annotate, tmp_path, known, refusal, sent
):
    scripted.reply = takes(*known, refusal=refusal)
    code, said, rows = annotate()
    assert (code, len(rows)) == (0, 6), said
    assert {(row["teacher_label"], row["rationale"]) for row in rows} == {
        ("refund", "The buyer asks for money back.")
    }
    assert sorted(forms(scripted)) == sorted(sent)
    assert forms(scripted)[: len(sent) - 5] == sent[: len(sent) - 5]
    assert report_of(tmp_path)["structured"] == sent[-1]
    assert annotate()[0] == 0
    assert annotate.sent == 0


def test_a_resumed_run_asks_in_the_form_of_the_first(scripted, annotate, tmp_path):
    scripted.reply = takes("json_object")
    assert annotate(n=4)[0] == 0
    scripted.reply = takes("json_schema", "json_object")  # the server has learnt since
    assert annotate(n=9)[0] == 0
    assert forms(scripted)[-5:] == ["json_object"] * 5
    assert annotate.sent == 5


def test_another_structured_is_another_request_and_the_first_answers_stay(scripted, annotate):
    scripted.reply = takes("json_schema", "tool")
    for flag, form in (("on", "json_schema"), ("tool", "tool"), ("off", "off"), ("json_schema", None)):
        assert annotate("--structured", flag)[0] == 0
        assert forms(scripted)[-annotate.sent :] == ([form] * 6 if form else forms(scripted))
        assert annotate.sent == (6 if form else 0)


def test_a_journal_of_plain_answers_keeps_to_them(scripted, annotate):
    """A journal that an older version began is not paid for again."""
    assert annotate("--structured", "off", n=4)[0] == 0
    scripted.reply = takes("json_schema")
    assert annotate(n=6)[0] == 0
    assert (annotate.sent, set(forms(scripted))) == (2, {"off"})


def test_new_rows_before_old_ones_do_not_hide_the_plain_answers(scripted, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    teacher = lambda: OpenAITeacher("m", scripted.url)  # noqa: E731
    rows = [Example(str(i), f"message {i}") for i in range(9)]
    plain, auto = Settings("m"), Settings("m", Sampling(structured="auto"))
    annotate_rows(rows[5:], SHOP, teacher(), tmp_path / "j.jsonl", plain)
    found = annotate_rows(rows, SHOP, teacher(), tmp_path / "j.jsonl", auto)
    assert (found.sampling.structured, found.stats.attempts, len(scripted.requests)) == ("off", 5, 9)


def test_a_server_that_ignores_the_form_costs_one_answer_which_is_used(scripted, annotate, tmp_path):
    code, _, rows = annotate("--price-in", "1")
    assert (code, len(rows)) == (0, 6)
    assert forms(scripted) == ["json_schema"] + ["off"] * 5
    calls = report_of(tmp_path)["calls"]
    assert (calls["prompt_tokens"], calls["cost"]) == (600, 0.0006)
    assert annotate("--price-in", "1")[0] == 0
    assert annotate.sent == 0
    assert report_of(tmp_path)["calls"]["prompt_tokens"] == 600


def test_the_answer_to_a_probe_that_is_of_no_use_is_paid_for_and_asked_again(scripted, annotate, tmp_path):
    scripted.reply = lambda request, hit: (200, body("Nothing." if hit == 1 else GOOD), {})
    for sent in (7, 0):
        code, _, rows = annotate("--price-in", "1")
        assert (code, len(rows), annotate.sent) == (0, 6, sent)
        assert report_of(tmp_path)["calls"]["prompt_tokens"] == 700


def test_thought_without_an_answer_does_not_decide(scripted, annotate):
    def reply(request, hit):
        return 200, body(OBJECT) if hit > 1 else body(None, reasoning_content="Hm."), {}

    scripted.reply = reply
    code, said, rows = annotate("--concurrency", "1")
    assert (code, len(rows)) == (0, 5)
    assert "thought-only" in said
    assert set(forms(scripted)) == {"json_schema"}


def test_a_form_that_no_route_takes_is_refused_and_its_request_counted(scripted, annotate, tmp_path):
    """A gateway without a backend for the form answers 404, which ends a run for any other reason."""
    refusal = {"error": {"message": "No endpoints found that support response_format"}}
    scripted.reply = lambda request, hit: (
        (404, refusal, {}) if "response_format" in request else (200, body(), {})
    )
    assert annotate()[0] == 0
    assert forms(scripted) == ["json_schema", "json_object"] + ["off"] * 6
    assert report_of(tmp_path)["run"]["attempts"] == annotate.sent == 8
    assert annotate()[0] == 0
    assert annotate.sent == 0


def test_on_fails_where_the_server_takes_no_form(scripted, annotate):
    scripted.reply = takes()
    code, said, rows = annotate("--structured", "on")
    assert (code, rows, annotate.sent) == (1, [], 2)
    assert "Unknown parameter: 'response_format'" in said
    assert "--structured" in said


def test_a_server_that_does_not_answer_is_not_taken_for_one_without_forms(scripted, annotate):
    scripted.reply = lambda request, hit: (401, {"error": {"message": "wrong key"}}, {})
    code, said, _ = annotate("--structured", "on")
    assert code == 1
    assert "wrong key" in said
    scripted.reply = lambda request, hit: (503, {"error": {"message": "loading the model"}}, {})
    code, said, _ = annotate("--structured", "on", "--max-attempts", "1")
    assert code == 1
    assert "loading the model" in said
    assert "JSON object" not in said
    scripted.reply = takes("json_schema")
    assert annotate("--structured", "on")[0] == 0


def test_a_configuration_error_is_not_taken_for_a_refused_form(scripted, annotate):
    words = {"error": {"message": "Unsupported parameter: 'max_tokens'."}}
    scripted.reply = lambda request, hit: (
        (400, words, {}) if "max_tokens" in request else (200, body(OBJECT), {})
    )
    assert annotate()[0] == 1
    assert annotate("--request", "max_completion_tokens")[0] == 0
    assert forms(scripted)[-6:] == ["json_schema"] * 6


def test_a_forced_form_that_is_refused_names_the_flag(scripted, annotate):
    scripted.reply = takes("json_schema", refusal="tools are not supported by this model")
    code, said, _ = annotate("--structured", "tool")
    assert code == 1
    assert "--structured off" in said


# -- when nothing is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "task"),
    [
        (("--omit", "response_format"), {}),
        (("--extra-body", '{"response_format": {"type": "text"}}'), {}),
        ((), {"request": {"grammar": "root ::= [a-z]+"}}),
        ((), {"form": "completion"}),
        ((), {"format_note": "One sentence in English, then 'So the answer is' and the label."}),
        ((), {"structured": "off"}),
    ],
)
def test_the_users_own_form_of_answer_is_left_alone(scripted, annotate, flags, task):
    if task.get("form") == "completion":
        scripted.reply = lambda request, hit: (
            200,
            {"choices": [{"text": GOOD, "finish_reason": "stop"}]},
            {},
        )
    code, said, _ = annotate(*flags, task=task)
    assert (code, annotate.sent) == (0, 6), said
    assert {form_of(request) for request in scripted.requests} <= {"off", "text"}


@pytest.mark.parametrize(
    ("flags", "task", "named"),
    [
        (("--structured", "on", "--omit", "response_format"), {}, "'response_format'"),
        (("--structured", "tool"), {"form": "completion"}, "completion"),
        (("--structured", "on", "--backend", "local"), {}, "--structured"),
    ],
)
def test_two_wishes_that_exclude_each_other_are_named(annotate, flags, task, named):
    code, said, _ = annotate(*flags, task=task)
    assert (code, annotate.sent) == (2, 0)
    assert named in said


def test_the_task_file_says_it_and_the_flag_wins(scripted, annotate):
    scripted.reply = takes("json_schema", "tool")
    assert annotate(task={"structured": "tool"})[0] == 0
    assert set(forms(scripted)) == {"tool"}
    assert annotate("--structured", "on", task={"structured": "tool"})[0] == 0
    assert forms(scripted)[-6:] == ["json_schema"] * 6


# -- the request ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("form", ["json_schema", "tool"])
def test_the_worked_examples_fit_the_schema_and_are_read_back(name, form):
    task = PRESETS[name]
    row = Example("1", "something else", choices=("one", "two") if task.label_kind == "choices" else None)
    prompt = render(task, row, form)
    assert list(prompt.schema["properties"]) == ["rationale", "label"]
    answers = [content for role, content in prompt.messages if role == "assistant"]
    assert len(answers) == len(task.shots)
    for shot, answer in zip(task.shots, answers, strict=True):
        assert list(json.loads(answer)) == ["rationale", "label"]
        parsed = parse_answer(task, answer, shot.choices)
        assert (parsed.label, parsed.reason) == (shot.label, None)
        assert task.answer_marker not in answer
    fields = form_fields(form, prompt.schema)
    assert (json.dumps(list(task.labels)) in json.dumps(fields)) == (task.label_kind == "closed")


def test_plain_requests_keep_the_keys_of_older_versions():
    """The key that version 0.2 gave this call: its journals are still good."""
    row = Example("1", "the lamp is broken")
    keys = [row_keys(row, SHOP, "m", Sampling(structured=form))[0] for form in ("off", "json_schema", "tool")]
    assert keys[0] == "db8be2c73a579fba0a585b6c8c25b8f5a0e0b95730d00d4dd647c2cee81b1b08"
    assert len(set(keys)) == 3


# -- the answer -----------------------------------------------------------------------------------------------------

R = '"rationale": "The buyer asks for money back."'


@pytest.mark.parametrize(
    "text",
    [
        OBJECT,
        "```json\n" + OBJECT + "\n```",
        "Here is the answer:\n\n```\n" + OBJECT + "\n```",
        "Here it is: " + OBJECT,
        "[" + OBJECT + "]",
        OBJECT + "\n\nIs there anything else?",
        OBJECT + "\n" + OBJECT,
        "<think>refund or not?</think>\n" + OBJECT,
        OBJECT + "<|im_end|>",
        "{" + R + ', "label": "refund",}',
        "{" + R + ', "label": "refund"',
        '{"label": "Refund.", ' + R + "}",
        "{" + R + ', "label": "**refund**"}',
        "{" + R + ', "label": "So the answer is refund."}',
        '{"Rationale": "The buyer asks\nfor money back.", "Label": "refund"}',
        '{"reasoning": ["The buyer asks", "for money back."], "answer": "refund"}',
        '{"rationale": "The buyer asks for money back. So the answer is refund.", "label": "refund"}',
    ],
)
def test_objects_as_models_write_them(text):
    parsed = parse_answer(SHOP, text)
    assert (parsed.label, parsed.rationale, parsed.reason) == (
        "refund",
        "The buyer asks for money back.",
        None,
    )


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ('{"rationale": "The buyer asks for', "length", "cut-off"),
        ('{"rationale": "So the answer is refund. Or is it', "length", "cut-off"),
        ("{" + R + ', "label": "ref', "length", "cut-off"),
        ('{"label": "refund", "rationale": "The buyer', "length", "cut-off"),
        ('{"label": "refund"', "length", "cut-off"),
        ('```json\n{"rationale": "The', "length", "cut-off"),
        ('{"rationale": "The buyer asks for', "stop", "cut-off"),
        ('{"rationale": "The "buyer" asks", "label": "refund"}', "stop", "json-unreadable"),
        ("{" + R + "}", "stop", "label-unreadable"),
        ("{" + R + ', "label": null}', "stop", "label-unreadable"),
        ("{" + R + ', "label": {"type": "string"}}', "stop", "label-unreadable"),
        (OBJECT + "\n" + OBJECT.replace('"refund"', '"follow-up"'), "stop", "marker-repeated"),
        ("<think>" + OBJECT, "length", "cut-off"),
    ],
)
def test_an_object_that_is_not_whole_is_not_an_answer(text, finish, reason):
    parsed = parse_answer(SHOP, text, None, finish)
    assert (parsed.label, parsed.reason) == (None, reason)


def test_an_object_inside_an_answer_in_words_is_not_the_answer():
    text = 'The form {"label": "follow-up"} was sent, and money is asked for. So the answer is refund.'
    assert parse_answer(SHOP, text).label == "refund"


@pytest.mark.parametrize(
    ("written", "label"),
    [("b", "vacuum flask"), ("(b) vacuum flask", "vacuum flask"), ("vacuum flask", "vacuum flask")],
)
def test_a_choice_is_its_letter_or_its_text(written, label):
    text = json.dumps({"rationale": "It keeps heat.", "label": written})
    assert parse_answer(PRESETS["cqa"], text, ("paper bag", "vacuum flask")).label == label


def test_numbers_halves_of_characters_and_control_characters_become_text():
    found = read_object(r'{"rationale": "half \ud800 and \u0000 nul", "label": 42}')
    assert (found.label, found.rationale.isprintable()) == ("42", True)
    found.rationale.encode()


@given(st.text(alphabet='{}[]":,\\ \nlabelrationaleanswer`json', max_size=80), st.booleans())
def test_no_text_breaks_the_reader(text, cut_off):
    for whole in (text, '{"rationale": ' + text, '{"label": "x", ' + text, OBJECT[:-1] + text):
        found = read_object(whole, cut_off=cut_off)
        assert found is None or (found.label is None) or isinstance(found.label, str)
