"""The admission filter: a full server rejects requests unread, counts them, and logs totals."""

from __future__ import annotations

import asyncio
import json

import pytest

from sbs_edge.serve.admission import AdmissionSlot
from sbs_edge.serve.admission_filter import Rejection, request_id


def scope(path="/v1/predict", method="POST", **headers):
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": raw,
        "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("edge", 80),
        "client": ("c", 1), "root_path": "", "asgi": {"version": "3.0"},
    }  # fmt: skip


async def call(app, given):
    """Call the application with a body that must not be asked for."""
    sent = []

    async def receive():
        raise AssertionError("the request was read")

    async def send(message):
        sent.append(message)

    await app.asgi(given, receive, send)
    start, body = sent
    assert int(dict(start["headers"])[b"content-length"]) == len(body["body"])
    return start["status"], dict(start["headers"]), json.loads(body["body"])


@pytest.mark.anyio
async def test_a_full_server_refuses_before_it_reads(hand_bundle, running):
    async with running(hand_bundle, max_concurrent=1) as app:
        app.service.gate.enter(1)
        for path in ("/v1/predict", "/v2/models/hand/infer", "/v2/models/hand/versions/1/infer"):
            status, headers, answer = await call(app, scope(path, x_request_id="mine-1"))
            assert (status, headers[b"x-request-id"]) == (429, b"mine-1")
            assert int(headers[b"retry-after"]) >= 1
            assert "try again" in answer["error"]
        assert app.rejected("concurrency") == 3
        value = app.service.metrics.registry.get_sample_value
        assert value("sbs_edge_requests_total", {"model": "", "code": "429"}) == 3
        assert (await app.client.get("/v2/health/live")).status_code == 200  # not work: never refused
        assert (await app.client.post("/v1/other")).status_code == 404
        app.service.gate.leave(1)
        assert (await app.predict(["a"])).status_code == 200


@pytest.mark.anyio
async def test_a_full_label_queue_refuses_labels_unread_and_admits_rationales(hand_bundle, running):
    async with running(hand_bundle, max_queue_texts=32) as app:
        version = app.service.registry.find("hand")
        version.label_gate.enter(32)
        status, _, _ = await call(app, scope())
        assert (status, app.rejected("label_queue")) == (429, 1)
        body = {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}],
            "outputs": [{"name": "rationale"}],
        }
        rationale = await app.client.post("/v2/models/hand/infer", json=body)
        assert rationale.status_code == 200
        body.pop("outputs")
        label = await app.client.post("/v2/models/hand/infer", json=body)
        assert (label.status_code, app.rejected("label_queue")) == (429, 2)
        version.label_gate.leave(32)


@pytest.mark.anyio
async def test_a_burst_is_counted_before_its_bodies_are_read(hand_bundle, running):
    """A queue of 32 texts, requests of 16 lately: the third of a burst is rejected before it is read."""

    async with running(hand_bundle, max_queue_texts=32) as app:
        for i in range(80):
            assert (await app.predict([f"{i} {j}" for j in range(16)])).status_code == 200
        asked = [app.asgi.state.admission_filter.admit("POST", "/v1/predict", []) for _ in range(3)]
        assert [type(each) for each in asked] == [AdmissionSlot, AdmissionSlot, Rejection]
        assert (app.service.gate.inside, app.service.pending.texts) == (2, 32)
        asked[0].withdraw_estimate()  # its body is still on its way
        assert app.service.pending.texts == 16
        last = app.asgi.state.admission_filter.admit("POST", "/v1/predict", [])
        assert isinstance(last, AdmissionSlot)
        for slot in (asked[0], asked[1], last, last):
            slot.leave()
        assert (app.service.gate.inside, app.service.pending.texts) == (0, 0)
        full = await asyncio.gather(*(app.predict([f"{i}"] * 16) for i in range(8)))
        assert {answer.status_code for answer in full} == {200, 429}
        assert (app.service.gate.inside, app.service.pending.texts) == (0, 0)


def test_ids_differ_and_need_nothing_of_the_system():
    ids = [request_id([]) for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(len(each) == 16 for each in ids)
    assert request_id([(b"x-request-id", b"mine")]) == b"mine"


@pytest.mark.anyio
async def test_draining_and_loading_close_or_keep_the_connection_as_they_say(hand_bundle, running):
    async with running(hand_bundle) as app:
        app.service.draining = True
        status, headers, _ = await call(app, scope())
        assert (status, headers[b"connection"]) == (503, b"close")
        app.service.draining, app.service.started = False, False
        status, headers, _ = await call(app, scope())
        assert (status, b"connection" in headers) == (503, False)


@pytest.mark.anyio
async def test_requests_without_the_token_get_401_even_if_the_server_is_full(hand_bundle, running):
    async with running(hand_bundle, max_concurrent=1, token="s3cret") as app:
        app.service.gate.enter(1)
        for given in ({}, {"authorization": "Bearer s3cre"}):
            status, headers, _ = await call(app, scope(**given))
            assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
        assert app.rejected("concurrency") == 0
        status, _, _ = await call(app, scope(authorization="Bearer s3cret"))
        assert status == 429
        app.service.gate.leave(1)


@pytest.mark.parametrize("access_log", [True, False])
@pytest.mark.anyio
async def test_refusals_are_one_line_a_second_not_one_each(hand_bundle, running, json_logs, access_log):
    async with running(hand_bundle, max_concurrent=1, access_log=access_log) as app:
        app.service.gate.enter(1)
        for _ in range(500):
            await call(app, scope())
        app.service.gate.leave(1)
    lines = [json.loads(line) for line in json_logs.getvalue().splitlines()]
    refused = [line for line in lines if line["event"] == "refused"]
    assert sum(line["n_requests"] for line in refused) == (500 if access_log else 0)
    assert {(line["reason"], line["code"]) for line in refused} <= {("concurrency", 429)}
    assert len(refused) < 50
    assert not any(line["event"] == "request" for line in lines)


@pytest.mark.anyio
async def test_unknown_names_make_no_new_series(hand_bundle, running):
    """Labels come from what is served and from fixed sets, never from a request."""

    async with running(hand_bundle) as app:

        async def ask(i):
            assert (await app.predict([f"text {i}"], model=f"m{i}")).status_code == 404
            assert (await app.predict([f"text {i}"], version=f"9{i}")).status_code == 404
            assert (await app.client.post(f"/v2/models/m{i}/infer", json={})).status_code == 404
            assert (await app.client.get(f"/v2/models/m{i}/versions/{i}")).status_code == 404
            assert (await app.client.request(f"M{i}", f"/x{i}")).status_code in (404, 405)
            assert (await app.predict([f"text {i}"])).status_code == 200
            return len((await app.client.get("/metrics")).text.splitlines())

        await ask(0)  # the first of each status makes its series
        assert await ask(1) == await ask(2) == await ask(3)


@pytest.mark.anyio
async def test_a_model_of_labels_alone_promises_no_rationales(hand_bundle, running):
    app = running(hand_bundle)
    kind = type(app.engine)
    targets = {"by-hand": {"label_scorer": "a.onnx"}}
    app.engine.__class__ = type(
        "LabelsOnly",
        (kind,),
        {"manifest": property(lambda self: {**kind.manifest.fget(self), "targets": targets})},
    )
    async with app:
        metadata = (await app.client.get("/v2/models/hand")).json()
        names = {output["name"] for output in metadata["outputs"]}
        assert "label" in names
        assert not names & {"rationale", "rationale_complete"}
        answer = await app.predict(["a"], explain=True)
        assert (answer.status_code, "label_only" in answer.json()["error"]) == (400, True)
        assert (await app.predict(["a"])).status_code == 200
        missing = await app.client.get("/v2/models/nobody")
        assert (missing.status_code, "there are: hand" in missing.json()["error"]) == (404, True)
