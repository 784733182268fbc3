"""The HTTP layer over ASGI: routes, limits, deadlines, admission, the token."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib

import pytest


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


@pytest.mark.anyio
async def test_plain_route_answers_what_the_engine_answers(hand_bundle, running):
    async with running(hand_bundle) as app:
        texts = ["no heat at all", "filter is due", "a b c"]
        answer = (await app.predict(texts, explain=True)).json()
        assert answer["model"] == "hand"
        for text, got in zip(texts, answer["predictions"], strict=True):
            want = app.engine.answer(text)
            assert got["label"] == want.label
            assert got["probabilities"] == want.probabilities
            assert got["rationale"] == "because " + text[::-1]
            assert got["escalated"] is False


@pytest.mark.anyio
async def test_every_limit_names_itself(hand_bundle, running):
    async with running(hand_bundle, max_body_bytes=4000, max_texts=4) as app:
        many = await app.predict(["a"] * 5)
        assert (many.status_code, "limit is 4" in many.json()["error"]) == (400, True)
        long = await app.predict(["ok", "word " * 50])
        assert long.status_code == 400
        assert "texts[1] has 51 tokens" in long.json()["error"]
        assert "limit is 40" in long.json()["error"]
        cut = await app.predict(["word " * 50], truncate=True)
        assert cut.json()["predictions"][0]["truncated"] is True
        assert (await app.predict(["x" * 5000])).status_code == 413
        assert app.rejected("body") == 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw"])
@pytest.mark.anyio
async def test_compressed_bodies_are_counted_after_decompression(hand_bundle, running, encoding):
    def packed(raw: bytes) -> bytes:
        if encoding == "gzip":
            return gzip.compress(raw)
        if encoding == "deflate":
            return zlib.compress(raw)
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return deflate.compress(raw) + deflate.flush()

    async with running(hand_bundle, max_body_bytes=100_000) as app:
        headers = {"Content-Encoding": "gzip" if encoding == "gzip" else "deflate"}

        async def post(raw):
            return await app.client.post("/v1/predict", content=raw, headers=headers)

        body = json.dumps({"texts": ["a b"]}).encode()
        assert (await post(packed(body))).status_code == 200
        bomb = packed(json.dumps({"texts": ["a" * 5_000_000]}).encode())
        assert len(bomb) < 100_000  # small on the wire, large inside
        assert (await post(bomb)).status_code == 413
        assert (await post(packed(body)[:-3])).status_code == 400
        assert (await post(b"\x08garbage")).status_code == 400
        other = await app.client.post("/v1/predict", content=body, headers={"Content-Encoding": "br"})
        assert other.status_code == 415


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"texts": []}',
        b'{"texts": "a"}',
        b'{"texts": [1]}',
        b'{"texts": ["a"], "extra": 1}',
        b'{"texts": ["\\ud800"]}',
        b'{"texts": ["\xff"]}',
        b'{"texts": ["a"], "labels": [["x", "y"]]}',
        b'{"texts": ["a"], "max_new_tokens": 1000}',
        b'{"texts": [NaN]}',
        b'{"texts": ["a"], "texts": ["b"]}',
        b'{"texts": ["a"], "max_new_tokens": 1e999}',
        b'{"texts": ["a"], "max_new_tokens": 99999999999999999999}',
        b"[" * 100_000,
        b"9" * 5000,
    ],
    ids=lambda body: repr(body[:30]),
)
@pytest.mark.anyio
async def test_malformed_bodies_are_400_with_a_reason(hand_bundle, running, body):
    async with running(hand_bundle) as app:
        answer = await app.client.post("/v1/predict", content=body)
        assert answer.status_code == 400
        assert list(answer.json()) == ["error"]


@pytest.mark.anyio
async def test_a_burst_over_the_limit_is_429_before_any_tokenising(hand_bundle, running):
    engine = running.new_engine(label_s=0.05)
    async with running(hand_bundle, engine, max_concurrent=4) as app:
        counted = []
        real = engine.tokenize
        engine.tokenize = lambda texts, task="label": counted.append(texts) or real(texts, task)
        answers = await asyncio.gather(*(app.predict([f"text {i}"]) for i in range(20)))
        codes = sorted(a.status_code for a in answers)
        assert codes == [200] * 4 + [429] * 16
        assert len(counted) == 4
        refused = [a for a in answers if a.status_code == 429]
        assert all(int(a.headers["Retry-After"]) >= 1 for a in refused)
        assert app.rejected("concurrency") == 16
        assert app.service.gate.inside == 0
        assert (await app.predict(["again"])).status_code == 200


@pytest.mark.anyio
async def test_a_full_queue_of_texts_is_429_and_labels_do_not_wait_for_rationales(hand_bundle, running):
    engine = running.new_engine(rationale_s=0.4)
    async with running(hand_bundle, engine, max_queue_texts=32, max_queue_ms=60_000) as app:
        slow = asyncio.create_task(app.predict(["x"] * 32, explain=True))
        await asyncio.sleep(0.1)
        full = await app.predict(["y"], explain=True)
        assert (full.status_code, app.rejected("rationale_queue")) == (429, 1)
        quick = await asyncio.wait_for(app.predict(["z"]), 0.2)
        assert quick.status_code == 200
        assert not slow.done()
        assert (await slow).status_code == 200


@pytest.mark.anyio
async def test_estimated_wait_refuses_before_the_count_does(hand_bundle, running):
    engine = running.new_engine(label_s=0.05)
    async with running(hand_bundle, engine, max_queue_ms=100, max_batch_tokens=3) as app:
        assert (await app.predict(["learn the pace"])).status_code == 200
        answers = await asyncio.gather(*(app.predict([f"text {i}"]) for i in range(10)))
        codes = [a.status_code for a in answers]
        assert 2 <= codes.count(200) <= 4  # 100 ms of work at 50 ms each, and the one inside
        assert app.rejected("queue_time") == codes.count(429) > 0


@pytest.mark.anyio
async def test_deadline_is_504_and_frees_its_place(hand_bundle, running):
    engine = running.new_engine(label_s=0.3)
    async with running(hand_bundle, engine) as app:
        for headers in ({"X-Request-Timeout-Ms": "50"}, {"Request-Timeout": "0.05"}):
            late = await app.predict(["a"], headers=headers)
            assert late.status_code == 504
            assert app.service.gate.inside == 0
            assert app.service.registry.find("hand").label_gate.inside == 0
        assert (await app.predict(["a"], headers={"Request-Timeout": "soon"})).status_code == 400
        assert (await app.predict(["a"])).status_code == 200


@pytest.mark.anyio
async def test_a_client_that_leaves_frees_its_place_and_its_queued_work(hand_bundle, running):
    engine = running.new_engine(label_s=0.2)
    async with running(hand_bundle, engine) as app:
        first = asyncio.create_task(app.predict(["running"]))
        await asyncio.sleep(0.05)
        left = asyncio.Event()
        sent = []

        async def receive():
            if not sent:
                sent.append(1)
                body = json.dumps({"texts": ["never", "runs"]}).encode()
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/predict",
            "headers": [],
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "server": ("edge", 80),
            "client": ("c", 1),
            "root_path": "",
            "raw_path": b"/v1/predict",
            "asgi": {"version": "3.0"},
        }
        second = asyncio.create_task(app.asgi(scope, receive, send))
        await asyncio.sleep(0.05)
        version = app.service.registry.find("hand")
        assert (version.labels.queued, app.service.gate.inside) == (2, 2)
        left.set()
        await second
        assert (version.labels.queued, app.service.gate.inside) == (0, 1)
        await first
        assert (await app.predict(["after"])).status_code == 200
        assert ["never", "runs"] not in engine.batches
        assert app.rejected("client_left") == 1
        assert version.leases == 0


@pytest.mark.anyio
async def test_one_bad_text_does_not_fail_its_neighbours(hand_bundle, running):
    engine = running.new_engine(label_s=0.03, poison="poison")
    async with running(hand_bundle, engine) as app:
        first = asyncio.create_task(app.predict(["hold the worker"]))
        await asyncio.sleep(0.01)
        texts = ["good one", "poison one", "good two"]
        answers = await asyncio.gather(*(app.predict([t]) for t in texts))
        assert [a.status_code for a in answers] == [200, 400, 200]
        assert "poison" in answers[1].json()["error"]
        await first


@pytest.mark.anyio
async def test_not_ready_draining_and_unknown_names(hand_bundle, running):
    async with running(hand_bundle) as app:
        get = app.client.get
        assert (await get("/v2/health/ready")).status_code == 200
        assert (await get("/v2/models/other")).status_code == 404
        assert (await get("/v2/models/hand/versions/9/ready")).status_code == 404
        assert (await get("/v2/models/hand/versions/1/ready")).status_code == 200
        assert (await get("/nowhere")).json() == {"error": "There is no such route."}
        assert (await get("/v1/predict")).status_code == 405
        app.service.draining = True
        assert (await get("/v2/health/ready")).status_code == 503
        assert (await get("/v2/health/live")).status_code == 200
        assert (await app.predict(["a"])).status_code == 503
        app.service.draining, app.service.started = False, False
        assert (await app.predict(["a"])).status_code == 503


@pytest.mark.anyio
async def test_bearer_token_guards_all_but_probes_and_page(hand_bundle, running):
    async with running(hand_bundle, token="s3cret") as app:
        for path in ("/", "/openapi.json", "/v2/health/live", "/v2/health/ready"):
            assert (await app.client.get(path)).status_code == 200
        for path in ("/metrics", "/v2", "/v2/models/hand"):
            assert (await app.client.get(path)).status_code == 401
        for given in (None, "Bearer wrong", "s3cret", "Basic s3cret", "Bearer s3cret2", "Bearer \xff"):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            assert (await app.predict(["a"], headers=headers)).status_code == 401
        for given in ("Bearer s3cret", "bearer s3cret", "BEARER  s3cret"):  # RFC 9110: in any case
            good = await app.predict(["a"], headers={"Authorization": given})
            assert good.status_code == 200


def test_request_ids_are_echoed_and_texts_stay_out_of_the_log(hand_bundle, running, json_logs):
    async def go(**options):
        async with running(hand_bundle, **options) as app:
            answer = await app.predict(["a very private text"], headers={"X-Request-Id": "abc-1"})
            assert answer.headers["X-Request-Id"] == "abc-1"
            forged = await app.predict(["b"], headers={"X-Request-Id": 'x" injected'})
            assert forged.headers["X-Request-Id"] != 'x" injected'

    run(go())
    lines = [json.loads(line) for line in json_logs.getvalue().splitlines()]
    mine = next(line for line in lines if line.get("request_id") == "abc-1")
    assert (mine["code"], mine["model"], mine["n_texts"]) == (200, "hand", 1)
    assert "private" not in json.dumps(lines)
    run(go(log_inputs=True))
    assert "a very private text" in json_logs.getvalue()


@pytest.mark.anyio
async def test_metrics_carry_the_agreed_names(hand_bundle, running):
    async with running(hand_bundle) as app:
        await app.predict(["one two", "three"], explain=True)
        text = (await app.client.get("/metrics")).text
        for line in (
            'sbs_edge_requests_total{code="200",model="hand"} 1.0',
            'sbs_edge_input_tokens_total{model="hand"} 10.0',  # (3 + 2) for labels and rationales each
            'sbs_edge_output_tokens_total{model="hand"} 5.0',
            'sbs_edge_batch_size_sum{model="hand",task="label"} 2.0',
            'sbs_edge_queue_size{model="hand",task="label"} 0.0',
            "sbs_edge_ready 1.0",
        ):
            assert line in text
        for name in ("request", "queue", "tokenize", "inference"):
            assert f"sbs_edge_{name}_duration_seconds_bucket" in text
