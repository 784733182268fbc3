"""A larger model answers what the student is unsure of."""

from __future__ import annotations

import json

import httpx
import pytest

from sbs_edge.errors import UsageError
from sbs_edge.serve.escalate import Escalation, label_of
from sbs_edge.teacher.calls import Answer


def teacher(reply, calls):
    def handle(request):
        calls.append(json.loads(request.content))
        if isinstance(reply, int):
            return httpx.Response(reply)
        return httpx.Response(200, json={"choices": [{"message": {"content": reply}}]})

    return Escalation("http://teacher/v1", "big", transport=httpx.MockTransport(handle))


@pytest.mark.anyio
async def test_cascade_replaces_only_unsure_answers_and_says_so(hand_bundle, running):
    calls: list = []
    async with running(hand_bundle, escalation=teacher(" Wait. ", calls), abstain_below=0.9) as app:
        got = (await app.predict(["some text"])).json()["predictions"][0]
        assert (got["label"], got["escalated"], got["abstained"]) == ("wait", True, False)
        assert calls[0]["messages"][1]["content"] == "some text"
        assert calls[0]["model"] == "big"
    calls.clear()
    async with running(hand_bundle, escalation=teacher("wait", calls), abstain_below=0.5) as app:
        got = (await app.predict(["some text"])).json()["predictions"][0]
        assert (got["escalated"], calls) == (False, [])
    for reply, result in (("I think so", "unusable"), (500, "failed")):
        async with running(hand_bundle, escalation=teacher(reply, []), abstain_below=0.9) as app:
            got = (await app.predict(["some text"])).json()["predictions"][0]
            assert got["label"] == app.engine.answer("some text").label
            assert (got["escalated"], got["abstained"]) == (False, True)
            count = app.service.metrics.registry.get_sample_value(
                "sbs_edge_escalations_total", {"model": "hand", "result": result}
            )
            assert count == 1


@pytest.mark.anyio
async def test_the_cascade_goes_where_the_flag_says_and_nowhere_else(hand_bundle, running):
    """No field, header or redirect of anybody's chooses an address; proxies of the environment neither."""
    asked = []

    def handle(request):
        asked.append(str(request.url))
        return httpx.Response(307, headers={"Location": "http://elsewhere/latest/meta-data"})

    elsewhere = "http://elsewhere/v1"

    escalation = Escalation("http://teacher/v1", "big", transport=httpx.MockTransport(handle))
    assert escalation._client.trust_env is False
    async with running(hand_bundle, escalation=escalation, abstain_below=0.9) as app:
        for name in ("escalate_url", "url", "teacher", "base_url"):
            assert (await app.predict(["a"], **{name: elsewhere})).status_code == 400
        headers = {"Host": "elsewhere", "X-Forwarded-Host": "elsewhere", "X-Escalate-Url": elsewhere}
        got = (await app.predict([elsewhere], headers=headers)).json()["predictions"][0]
        assert (got["escalated"], got["abstained"]) == (False, True)
    assert asked == ["http://teacher/v1/chat/completions"]


@pytest.mark.anyio
async def test_the_larger_models_label_carries_none_of_the_students_figures(hand_bundle, running):
    async with running(hand_bundle, escalation=teacher("wait", []), abstain_below=0.9) as app:
        own = app.engine.answer("some text")
        got = (await app.predict(["some text"], explain=True)).json()["predictions"][0]
        assert (got["label"], got["probability"], got["probabilities"]) == ("wait", None, {})
        assert got["student"]["label"] == own.label
        assert got["student"]["probability"] == pytest.approx(own.probability)
        assert got["student"]["probabilities"] == pytest.approx(dict(own.probabilities))
        assert isinstance(got["rationale"], str)
        tensors = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["some text"]}]}
        answer = (await app.client.post("/v2/models/hand/infer", json=tensors)).json()["outputs"]
        values = {tensor["name"]: tensor["data"] for tensor in answer}
        assert (values["label"], values["escalated"], values["probability"]) == (["wait"], [True], [0.0])
        assert set(values["probabilities"]) == {0.0}


@pytest.mark.parametrize(
    "content",
    [
        "<think>hm, frost means the plant</think>\n\nwait",
        [{"type": "thinking", "thinking": []}, {"type": "text", "text": "**Wait**."}],
        "\\boxed{wait}<|im_end|>",
    ],
)
@pytest.mark.anyio
async def test_the_cascade_reads_an_answer_as_annotate_does(hand_bundle, running, content):
    async with running(hand_bundle, escalation=teacher(content, []), abstain_below=0.9) as app:
        got = (await app.predict(["some text"])).json()["predictions"][0]
        assert (got["label"], got["escalated"]) == ("wait", True)


@pytest.mark.parametrize("key", ["sk-\nSECRET", "“sk-SECRET”", "sk-\x00SECRET"])
def test_a_key_that_cannot_be_sent_is_refused_and_never_shown(key):
    with pytest.raises(UsageError, match="SBS_EDGE_SERVE_ESCALATE_KEY") as caught:
        Escalation("http://teacher/v1", "big", key=key)
    assert "SECRET" not in str(caught.value)
    sent = Escalation("http://teacher/v1", "big", key="sk-SECRET\n")._client.headers["authorization"]
    assert sent == "Bearer sk-SECRET"


def test_label_of_takes_a_whole_label_and_nothing_else():
    labels = ["call", "schedule a visit", "follow-up"]

    def read(text, known=labels, finish="stop"):
        return label_of(Answer(text, finish), known)

    assert read('"Call".') == "call"
    assert read("**Schedule a visit**") == "schedule a visit"
    assert read("follow\u2011up") == "follow-up"
    assert read("call or schedule a visit") is None
    assert read("") is None
    assert read("<think>call") is None
    assert read("call", finish="length") is None
    assert read(" 42 ", []) == "42"
    assert read("Saint", [], "length") is None
