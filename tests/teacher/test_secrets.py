"""Keys, headers and request fields that are secret: sent, and shown nowhere."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scripted import TASK, body

from sbs_edge.chat.endpoint import Endpoint, redacted_url
from sbs_edge.cli.app import main
from sbs_edge.errors import UsageError


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


def test_an_invalid_address_is_named_without_its_password():
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


@pytest.mark.parametrize("secret", ["sk-hidden", 'hid"den  key'])
@pytest.mark.parametrize(
    "words", [lambda s: {"refusal": f"I may not use {s} here."}, lambda s: {"reasoning_content": f"Key {s}."}]
)
def test_a_secret_in_an_answer_is_not_kept(scripted, annotate, tmp_path, secret, words):
    scripted.reply = lambda request, hit: (200, body(**words(secret)), {})
    _, shown, _ = annotate("--header", f"X-Key={secret}")
    assert scripted.headers[0]["x-key"] == secret
    assert "***" in (tmp_path / "out.journal.jsonl").read_text()
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    for spelled in (secret, json.dumps(secret)[1:-1], " ".join(secret.split())):
        assert spelled not in shown + written


def test_a_secret_that_an_error_quotes_as_json_is_hidden(scripted, annotate, tmp_path):
    secret = 'hid"den  key'
    scripted.reply = lambda request, hit: (400, {"error": {"headers": {"x-key": secret}}}, {})
    _, shown, _ = annotate("--header", f"X-Key={secret}")
    assert "x-key" in shown
    assert "den" not in (shown + (tmp_path / "out.journal.jsonl").read_text()).replace("hidden", "")


@pytest.mark.parametrize(
    "wrong",
    ['extra_body: {"api_key": "sk-hidden"}', "header: [X-Key=sk-hidden", "header: {X-Key: sk-hidden}"],
)
@pytest.mark.parametrize("debug", [False, True])
def test_a_wrong_file_is_named_by_its_place_and_not_quoted(annotate, tmp_path, monkeypatch, wrong, debug):
    if debug:
        monkeypatch.setenv("SBS_EDGE_DEBUG", "1")
    path = tmp_path / "wrong.yaml"
    path.write_text(f"samples: 1\n{wrong}\n")
    for flag in ("--config", "--task"):
        code, shown, _ = annotate(flag, str(path))
        assert (code, annotate.sent) == (2, 0)
        assert "wrong.yaml" in shown
        assert "hidden" not in shown
