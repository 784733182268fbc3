"""Answers that real servers send: other shapes, errors in a 200, redirects, limits; each through the command line."""

from __future__ import annotations

import json
import os
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scripted import GOOD, TASK, body

from sbs_edge.chat.endpoint import Endpoint, redacted_url
from sbs_edge.chat.protocol import failure, read_answer, token_count
from sbs_edge.cli.app import main
from sbs_edge.errors import UsageError
from sbs_edge.teacher.calls import CallFailed
from sbs_edge.teacher.limits import RateGate, duration_seconds, retry_after_seconds

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
        (("--extra-body", "[1]"), "one JSON object"),
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


# -- secrets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["sk-\nhidden", "“sk-hidden”", "sk-\u200bhidden", "sk-hidd\u00e9n"])
@pytest.mark.parametrize("debug", [False, True])
def test_a_key_that_cannot_be_sent_is_refused_by_its_variables_name(annotate, monkeypatch, key, debug):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    if debug:
        monkeypatch.setenv("SBS_EDGE_DEBUG", "1")
    code, shown, _ = annotate()
    assert (code, annotate.sent) == (2, 0)
    assert "OPENAI_API_KEY" in shown
    assert "hid" not in shown


def test_white_space_around_a_key_is_taken_off_and_an_echo_is_hidden(scripted, annotate, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-hidden\r\n")
    echo = {"error": {"message": "x" * 280 + "Incorrect API key provided: sk-hidden."}}
    scripted.reply = lambda request, hit: (401, echo, {})
    code, shown, _ = annotate()
    assert code == 1
    assert scripted.headers[0]["authorization"] == "Bearer sk-hidden"
    assert "sk-" not in shown
    assert "Check the key" in shown


def test_secrets_of_headers_are_not_saved(scripted, annotate, tmp_path, monkeypatch):
    monkeypatch.setenv("GATEWAY", "hidden-two")
    code, shown, _ = annotate("--header", "X-One=hidden-one", "--header", "X-Two=env:GATEWAY")
    assert code == 0
    assert (scripted.headers[0]["x-one"], scripted.headers[0]["x-two"]) == ("hidden-one", "hidden-two")
    assert "hidden" not in shown + "".join(path.read_text() for path in tmp_path.iterdir())


@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=30),
    st.text(alphabet="abcKEY019-_", min_size=4, max_size=20),
)
def test_no_text_around_a_secret_shows_it(around, secret):
    endpoint = Endpoint.of("http://localhost/v1", key=secret)
    assert f"Q{secret}Q" not in endpoint.clean(f"{around}Q{secret}Q{around}")
    assert secret not in repr(endpoint)
    assert secret not in redacted_url(f"http://user:{secret}@h0st/v1?api-key={secret}").replace("api-key", "")


def test_an_address_that_is_none_is_named_without_its_password():
    for url in (
        "localhost:8000/v1",
        "ftp://u:hidden@h/v1",
        "http://",
        "http://h:port/v1",
        "http://u:hidden@h h/v1",
    ):
        with pytest.raises(UsageError, match="--base-url") as caught:
            Endpoint.of(url)
        assert "hidden" not in str(caught.value)
    assert (
        Endpoint.of("http://h/v1/chat/completions?a=b").url("/completions") == "http://h/v1/completions?a=b"
    )


# -- waiting -----------------------------------------------------------------------------------------------------


def test_every_spelling_of_a_moment_is_read():
    from email.utils import formatdate

    now = time.time()
    assert [duration_seconds(text) for text in ("1m2s", "120ms", "1.5", "2 s", "1H", "0")] == [
        62,
        0.12,
        1.5,
        2,
        3600,
        0,
    ]
    for moment in (str(int(now) + 30), str(int((now + 30) * 1000)), formatdate(now + 30, usegmt=True)):
        assert duration_seconds(moment) == pytest.approx(30, abs=3)
    assert [duration_seconds(text) for text in ("nan", "inf", "soon", "", None)] == [None] * 5
    assert duration_seconds(str(int(now) - 30)) == 0
    assert retry_after_seconds({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after_seconds({"retry-after": "1e9"}) <= 3600


def test_a_gate_says_that_it_waits_and_ignores_a_count_below_zero():
    import asyncio

    said: list[tuple[float, str]] = []

    async def go():
        gate = RateGate(lambda seconds, reason: said.append((seconds, reason)))
        await gate.enter(10)
        gate.leave(10, {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "60s"})
        await gate.enter(10)
        gate.leave(10, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(time.time() + 1.3)})
        await gate.enter(10)

    asyncio.run(go())
    assert len(said) == 1
    assert said[0][0] == pytest.approx(1.3, abs=0.3)
    assert "x-ratelimit-remaining: 0" in said[0][1]


def test_presets_are_read_and_give_their_own_names(scripted, annotate, monkeypatch):
    from sbs_edge.teacher.connect import servers

    asked_for = {"openai", "azure", "openrouter", "anthropic", "vllm", "llama.cpp", "ollama", "lmstudio"}
    assert asked_for <= set(servers())
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "sk-hidden")
    assert annotate("--server", "azure", url=scripted.url + "?api-version=1")[0] == 0
    assert scripted.headers[0]["api-key"] == "sk-hidden"
    assert "authorization" not in scripted.headers[0]
    assert "max_completion_tokens" in scripted.requests[0]
    assert os.environ["AZURE_OPENAI_API_KEY"] == "sk-hidden"


def test_task_try_shows_a_few_rows_and_its_answers_are_not_paid_for_again(
    scripted, annotate, tmp_path, capsys
):
    assert annotate(n=20)[0] == 0  # writes the files
    (tmp_path / "out.journal.jsonl").unlink()
    before = len(scripted.requests)
    files = [str(tmp_path / "rows.jsonl"), "--task", str(tmp_path / "task.yaml")]
    where = ["--model", "m", "--base-url", scripted.url, "--rows", "3"]
    keep = ["--journal", str(tmp_path / "out.journal.jsonl")]
    assert main(["task", "try", *files, *where, *keep, "--price-in", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\nROW ") == 3
    assert "The buyer asks for money back." in shown
    assert "label      refund" in shown
    assert "cost 0.000100" in shown
    assert "3 of 3 rows are usable" in shown
    assert len(scripted.requests) - before == 3
    assert annotate(n=20)[0] == 0
    assert annotate.sent == 17


def test_task_try_says_what_to_change(scripted, annotate, tmp_path, capsys):
    annotate(n=3)
    files = [str(tmp_path / "rows.jsonl"), "--task", str(tmp_path / "task.yaml")]
    where = ["--model", "m", "--base-url", scripted.url, "--json"]
    scripted.reply = lambda request, hit: (200, body("No reason, no marker."), {})
    assert main(["task", "try", *files, *where]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["usable"], report["rows"][0]["reason"]) == (0, "marker-missing")
    assert "answer_marker" in report["change"][0]
    scripted.reply = lambda request, hit: (
        400,
        {"error": {"message": "'temperature' does not support 0"}},
        {},
    )
    assert main(["task", "try", *files, *where]) == 1
    assert "--omit temperature" in json.loads(capsys.readouterr().out)["change"][0]


def test_secrets_among_request_fields_are_hidden_everywhere_but_in_the_request(scripted, tmp_path, capsys):
    secret = "s3cr3t-value-41"
    rows, task, out = tmp_path / "rows.jsonl", tmp_path / "task.yaml", tmp_path / "out.jsonl"
    rows.write_text('{"id": "1", "input": "Money back please"}\n')
    task.write_text(yaml.safe_dump(TASK))
    scripted.reply = lambda request, hit: (400, {"error": {"message": f"no {secret} here"}}, {})
    code = main(
        ["annotate", str(rows), "--task", str(task), "--out", str(out), "--base-url", scripted.url, "--request",
         f"api_key={secret}", "--extra-body", json.dumps({"provider": {"auth": {"value": secret}}, "top_k": 4})]
    )  # fmt: skip
    assert code == 1
    sent = scripted.requests[0]
    assert (sent["api_key"], sent["provider"]["auth"]["value"], sent["top_k"]) == (secret, secret, 4)
    captured = capsys.readouterr()
    assert secret not in captured.out + captured.err
    written = [path for path in tmp_path.iterdir() if path.is_file()]
    assert [path.name for path in written if secret in path.read_text()] == []
    config = yaml.safe_load((tmp_path / "out.config.yaml").read_text())
    assert config["request"] == ["api_key=***"]
    assert json.loads(config["extra_body"]) == {"provider": {"auth": {"value": "***"}}, "top_k": 4}
