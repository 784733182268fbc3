"""Texts of requests stay out of the log: at DEBUG, in refusals, and when the server itself fails."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from sbs_edge.serve import logs
from sbs_edge.serve.escalate import Escalation

SECRET = "the-patient-is-called-Zoltan"


class Failing:
    """Raises what libraries raise: messages that quote their input."""

    def __init__(self, engine, where):
        self._engine, self._where = engine, where

    def __getattr__(self, name):
        if name != self._where:
            return getattr(self._engine, name)

        def fail(texts, *args, **kwargs):
            if any(SECRET in text for text in texts):
                raise ValueError(f"cannot take {texts!r}")
            return getattr(self._engine, name)(texts, *args, **kwargs)

        return fail


async def everything(app):
    """Send the secret through every kind of answer; return their statuses."""
    text = f"{SECRET} sits here"
    post = app.client.post
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}
    answers = [
        await app.predict([text], explain=True),
        await app.predict([f"{text} " * 50]),
        await app.predict([text], labels=[text, "b"]),
        await app.predict([text], extra=text),
        await app.predict([text], model=SECRET),
        await app.predict([text] * 33),
        await app.predict([text], headers={"X-Request-Timeout-Ms": SECRET}),
        await app.predict([text], headers={"X-Request-Id": f"{SECRET} {SECRET}"}),
        await post("/v1/predict", content=f'{{"texts": ["{text}"'.encode()),
        await post("/v1/predict", content=text.encode(), headers={"Content-Encoding": "gzip"}),
        await post("/v1/predict", content=(text * 100_000).encode()),
        await post("/v2/models/hand/infer", json={"inputs": [tensor]}),
        await post("/v2/models/hand/infer", json={"inputs": [{**tensor, "name": text}]}),
    ]
    app.service.gate.enter(app.service.settings.max_concurrent)
    answers.append(await app.predict([text]))
    app.service.gate.leave(app.service.settings.max_concurrent)
    return {answer.status_code for answer in answers}


@pytest.mark.parametrize("where", ["nothing", "predict", "explain", "tokenize"])
@pytest.mark.anyio
async def test_texts_are_never_logged(hand_bundle, running, json_logs, where):
    logs.configure("debug", json_logs)
    engine = Failing(running.new_engine(), where)
    reply = httpx.MockTransport(lambda request: httpx.Response(500, text=request.content.decode()))
    teacher = Escalation("http://teacher/v1", "big", transport=reply)
    async with running(hand_bundle, engine, teacher, abstain_below=0.9) as app:
        statuses = await everything(app)
    assert {400, 404, 413, 429} <= statuses
    assert (500 in statuses) == (where != "nothing")
    assert (200 in statuses) == (where in ("nothing", "explain"))
    text = json_logs.getvalue()
    events = {json.loads(line)["event"] for line in text.splitlines()}
    assert "request" in events
    assert ("request_failed" in events) == (where != "nothing")
    assert "Zoltan" not in text


def test_a_failure_says_what_failed_and_where(hand_bundle, running, json_logs):
    async def go(**options):
        engine = Failing(running.new_engine(), "predict")
        async with running(hand_bundle, engine, **options) as app:
            answer = await app.predict([SECRET], headers={"X-Request-Id": "r1"})
            assert (answer.status_code, "Zoltan" in answer.text) == (500, False)

    asyncio.run(go())
    lines = [json.loads(line) for line in json_logs.getvalue().splitlines()]
    (failed,) = [line for line in lines if line["event"] == "request_failed"]
    assert (failed["error"], failed["request_id"]) == ("ValueError", "r1")
    assert any("test_privacy.py" in frame and frame.endswith(" fail") for frame in failed["at"])
    assert "message" not in failed
    asyncio.run(go(log_inputs=True))
    assert "cannot take" in json_logs.getvalue()


@pytest.mark.anyio
async def test_the_log_names_the_peer_and_bounds_what_a_client_chose(hand_bundle, running, json_logs):
    async with running(hand_bundle) as app:
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}
        body = {"id": "i" * 1_800_000, "inputs": [tensor]}
        answer = await app.client.post("/v2/models/hand/infer", json=body)
        assert answer.json()["id"] == body["id"]  # the protocol gives it back whole
        await app.client.post("/" + "p" * 5000)
        await asyncio.sleep(0)  # a line is logged in the loop's next iteration
    lines = [json.loads(line) for line in json_logs.getvalue().splitlines()]
    asked = [line for line in lines if line["event"] == "request"]
    assert [line["client"] for line in asked] == ["127.0.0.1"] * 2
    assert asked[0]["client_id"] == "i" * 256
    assert asked[1]["path"] == "/" + "p" * 255
