"""Answers that real servers send: other shapes, errors in a 200, redirects, limits; each through the command line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import GOOD, body

from sbs_edge.chat.protocol import failure, read_answer, token_count
from sbs_edge.cli.app import main
from sbs_edge.teacher.calls import CallFailed

# -- shapes ------------------------------------------------------------------------------------------------------

PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "or not?"}]},
    {"type": "text", "text": GOOD},
]


@pytest.mark.parametrize("content", [PARTS, [{"type": "text", "text": GOOD}], [GOOD]])
def test_parts_are_joined_without_thought_and_only_text_is_journalled(scripted, annotate, tmp_path, content):
    scripted.reply = lambda request, hit: (200, body(content), {})
    code, _, rows = annotate()
    assert (code, [row["teacher_label"] for row in rows]) == (0, ["refund"] * 6)
    assert {row["rationale"] for row in rows} == {"The buyer asks for money back."}
    journal = [json.loads(line) for line in (tmp_path / "out.journal.jsonl").read_text().splitlines()]
    assert {line["text"] for line in journal if not line["key"].startswith("#")} == {GOOD}
    assert annotate()[0] == 0
    assert annotate.sent == 0


@pytest.mark.parametrize(
    "strange",
    [
        {"choices": [{"index": 0, "finish_reason": "length"}]},
        {"choices": [None]},
        {"choices": {}},
        body({"text": GOOD}),
        body(42),
        [body()],
        body([{"type": "image_url", "image_url": {}}]),
        b"<html>Please sign in</html>",
        b"[" * 50_000,
    ],
)
def test_another_shape_costs_its_call_only_and_is_asked_again(scripted, annotate, strange):
    scripted.reply = lambda request, hit: (200, strange if hit == 3 else body(), {})
    code, said, rows = annotate()
    assert (code, len(rows), annotate.sent) == (0, 6, 7), said


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": "100", "completion_tokens": "20"}, (100, 20)),
        ({"prompt_tokens": 100.0, "completion_tokens": 20.5}, (100, None)),
        ({"prompt_tokens": -1, "completion_tokens": True}, (None, None)),
        ([], (None, None)),
        (None, (None, None)),
        ("many", (None, None)),
    ],
)
def test_usage_is_a_count_or_unknown(usage, counts):
    answer = read_answer({**body(), "usage": usage})
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == (GOOD, *counts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "text", "usage", "error", "type", "code", "finish_reason"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_any_json_is_an_answer_of_text_or_a_failed_call(value):
    for foreign in (value, {"choices": [{"message": value}]}, {"choices": [value], "usage": value}):
        try:
            answer = read_answer(foreign)
        except CallFailed:
            pass
        else:
            assert isinstance(answer.text, str)
            assert answer.prompt_tokens is None or answer.prompt_tokens >= 0
        assert isinstance(failure(400, foreign), CallFailed)
        assert token_count(foreign) is None or token_count(foreign) >= 0


def test_thought_in_its_own_field_is_never_the_answer(scripted, annotate):
    scripted.reply = lambda request, hit: (200, body(None, reasoning_content=GOOD), {})
    code, said, rows = annotate()
    assert (code, rows) == (1, [])
    assert "thought-only" in said


# -- errors ------------------------------------------------------------------------------------------------------


def test_a_configuration_error_stops_early_and_the_corrected_command_asks_for_all(scripted, annotate):
    def reply(request, hit):
        if "max_tokens" in request:
            words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return 400, {"error": {"message": words, "param": "max_tokens"}}, {}
        if request.get("temperature") == 0:
            return 400, {"error": {"message": "'temperature' does not support 0 with this model."}}, {}
        return 200, body(), {}

    scripted.reply = reply
    code, said, _ = annotate(n=60)
    assert code == 1
    assert annotate.sent <= 5 + 8  # the rule's five and those on their way
    assert "Use 'max_completion_tokens' instead" in said
    assert "--request max_completion_tokens" in said
    code, said, _ = annotate("--request", "max_completion_tokens=300", n=60)
    assert code == 1
    assert "--omit temperature" in said
    code, _, rows = annotate("--request", "max_completion_tokens=300", "--omit", "temperature", n=60)
    assert (code, len(rows), annotate.sent) == (0, 60, 60)
    sent = scripted.requests[-1]
    assert (sent["max_completion_tokens"], "max_tokens" in sent, "temperature" in sent) == (300, False, False)


def test_the_task_file_sets_renames_and_omits_too(scripted, annotate, monkeypatch):
    monkeypatch.setenv("GATEWAY", "hidden-value\n")
    task = {
        "request": {"max_completion_tokens": None},
        "omit": ["temperature"],
        "extra_body": {"reasoning_effort": "low"},
        "headers": {"X-Api-Key": "env:GATEWAY"},
    }
    assert annotate(task=task)[0] == 0
    sent = scripted.requests[-1]
    assert (sent["max_completion_tokens"], sent["reasoning_effort"]) == (256, "low")
    assert not {"max_tokens", "temperature"} & set(sent)
    assert scripted.headers[-1]["x-api-key"] == "hidden-value"
    code, said, _ = annotate(task={"headers": {"X-Api-Key": "hidden-value"}})
    assert code == 2
    assert "env:VARIABLE" in said
    assert "hidden-value" not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--request", "messages=[]"), "'messages' cannot be set"),
        (("--extra-body", "[1]"), "a JSON object"),
        (("--extra-body", '{"stream": true}'), "'stream' cannot be set"),
        (("--request", "temperature"), "not NAME=VALUE"),
        (("--request", "max_completion_tokens=many"), "whole number"),
        (("--header", "no-value"), "NAME=VALUE"),
        (("--header", "Host=elsewhere"), "cannot be set"),
        (("--header", "X-A=env:NOT_SET_ANYWHERE"), "not set"),
        (("--server", "nowhere"), "no server preset"),
    ],
)
def test_a_wrong_request_flag_is_named_before_anything_is_sent(annotate, flags, said):
    code, shown, _ = annotate(*flags)
    assert (code, annotate.sent) == (2, 0)
    assert said in shown


def test_a_refusal_holds_for_its_server_only(scripted, annotate):
    """One row is refused among good ones: kept for this server, asked again of another."""
    strict = lambda request, hit: (  # noqa: E731
        (400, {"error": {"message": "too long"}}, {})
        if request["messages"][-1]["content"] == "message 3"
        else (200, body(), {})
    )
    scripted.reply = strict
    code, said, rows = annotate(n=20)
    assert (code, len(rows)) == (0, 19)
    assert "too long" in said
    assert annotate(n=20)[0] == 0
    assert annotate.sent == 0
    scripted.reply = lambda request, hit: (200, body(), {})
    code, _, rows = annotate(n=20, url=scripted.url.replace("/v1", "/other/v1"))
    assert (code, len(rows), annotate.sent) == (0, 20, 1)


def test_more_than_a_tenth_refused_is_a_failure_and_what_is_done_is_written(scripted, annotate):
    scripted.reply = lambda request, hit: (
        (200, body(), {}) if request["messages"][-1]["content"] < "message 4" else (400, {"detail": "no"}, {})
    )
    code, said, rows = annotate("--concurrency", "1")
    assert (code, len(rows)) == (1, 4)
    assert "refused 2 of 6 rows" in said
    assert "--retry-failed" in said


@pytest.mark.parametrize(
    ("status", "content", "headers", "said"),
    [
        (301, b"", {"location": "/good/v1/chat/completions"}, "/good/v1."),
        (405, {"detail": "Method Not Allowed"}, {}, "Method Not Allowed"),
        (404, {"error": {"message": "Resource not found"}}, {}, "Resource not found"),
        (200, {"error": {"message": "Insufficient credits.", "code": 402}}, {}, "Insufficient credits"),
        (200, {"error": "Unexpected endpoint"}, {}, "Unexpected endpoint"),
        (200, b"<html>Please\x00 sign in</html>", {"content-type": "text/html"}, "Please sign in"),
        (200, b'data: {"choices": []}\n\ndata: [DONE]\n\n', {}, '"stream": false'),
    ],
)
def test_the_servers_words_and_a_remedy_are_shown(scripted, annotate, status, content, headers, said):
    scripted.reply = lambda request, hit: (status, content, headers)
    code, shown, _ = annotate(n=40)
    assert code == 1
    assert said in shown
    assert annotate.sent <= 13
    assert "\x00" not in shown


def test_an_address_without_v1_is_hinted_at(scripted, annotate):
    scripted.reply = lambda request, hit: (404, {"error": "Unexpected endpoint"}, {})
    _, shown, _ = annotate(url=scripted.url.removesuffix("/v1"))
    assert "/v1" in shown.split("try --base-url")[1]


def test_a_query_is_kept_in_every_request_and_its_secrets_nowhere(scripted, annotate, tmp_path):
    scripted.reply = lambda request, hit: (
        (400, {"error": {"message": "no such key: hidden-key"}}, {}) if hit == 3 else (200, body(), {})
    )
    url = (
        scripted.url.replace("http://", "http://user:hidden-word@") + "?api-version=2024-10-21&key=hidden-key"
    )
    code, shown, rows = annotate(url=url, n=12)
    assert (code, len(rows)) == (0, 11)
    assert set(scripted.paths) == {"/v1/chat/completions?api-version=2024-10-21&key=hidden-key"}
    assert scripted.headers[0]["authorization"].startswith("Basic ")
    written = shown + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "hidden" not in written
    assert "api-version=2024-10-21&key=***" in written
    saved = ["annotate", "--config", str(tmp_path / "out.config.yaml"), str(tmp_path / "rows.jsonl")]
    assert main([*saved, "--task", str(tmp_path / "task.yaml"), "--retry-failed"]) == 2
