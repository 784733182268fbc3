"""A server's life in its own process: readiness, drain, signals, reload under load, overload, TLS."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time

import httpx
import pytest

from sbs_edge.runtime.student import Student


def metric(url, line_start):
    for row in httpx.get(f"{url}/metrics").text.splitlines():
        if row.startswith(line_start):
            return float(row.split()[-1])
    return 0.0


def client_for(url, n=300, **options):
    limits = httpx.Limits(max_connections=n, max_keepalive_connections=n)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=60, trust_env=False, **options)


@pytest.mark.anyio
async def test_drain_loses_none_of_200_requests(serve_process, bundles, texts):
    server = serve_process(
        bundles["closed"], "--max-queue-ms", 600_000, "--max-queue-texts", 100_000, "--no-access-log",
        "--max-batch-tokens", 64,
    )  # fmt: skip

    async with client_for(server.url) as client:
        plug = [
            asyncio.create_task(client.post("/v1/predict", json={"texts": [texts[0]] * 32, "explain": True}))
            for _ in range(40)
        ]
        await asyncio.sleep(0.3)
        bodies = [{"texts": [texts[i % 64]], "explain": True} for i in range(200)]
        mine = [asyncio.create_task(client.post("/v1/predict", json=body)) for body in bodies]
        end = time.monotonic() + 20
        inside = 0.0
        while time.monotonic() < end and inside < 240:
            answered = sum(task.done() for task in plug)  # before the look inside: never counts twice
            inside = answered + await asyncio.to_thread(metric, server.url, "sbs_edge_requests_in_flight")
        assert not any(task.done() for task in mine), "the plug was too short"
        assert inside == 240  # all 200 are in flight behind what is left of the plug
        server.process.terminate()
        told = time.monotonic()
        while (ready := (await client.get("/v2/health/ready")).status_code) == 200:
            assert time.monotonic() - told < 1
        assert ready == 503
        assert (await client.get("/v2/health/live")).status_code == 200
        refused = await client.post("/v1/predict", json=bodies[0])
        assert (refused.status_code, "stopping" in refused.json()["error"]) == (503, True)
        answers = await asyncio.gather(*mine, *plug)
        assert [a.status_code for a in answers] == [200] * 240
        with Student.load(bundles["closed"]) as student:
            want = student.explain([bodies[7]["texts"][0]])[0].rationale
        assert answers[7].json()["predictions"][0]["rationale"] == want
    assert server.process.wait(10) == 0
    assert {"draining", "drained"} <= {line["event"] for line in server.log()}


def test_second_signal_exits_at_once_and_drain_timeout_cuts(serve_process, bundles, texts):
    options = (
        bundles["closed"],
        "--max-queue-ms",
        600_000,
        "--max-queue-texts",
        100_000,
        "--max-batch-tokens",
        32,
    )

    async def busy(server, stop):
        async with client_for(server.url) as client:
            body = {"texts": texts[:32], "explain": True}
            tasks = [asyncio.create_task(client.post("/v1/predict", json=body)) for _ in range(100)]
            while await asyncio.to_thread(metric, server.url, "sbs_edge_requests_in_flight") < 90:
                pass
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(1.2)  # sooner, it would count as the same signal
            assert server.process.poll() is None
            code = await asyncio.to_thread(stop)
            await asyncio.gather(*tasks, return_exceptions=True)
            return code

    server = serve_process(*options)
    started = time.monotonic()

    def again():
        nonlocal started
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        return server.process.wait(5)

    assert asyncio.run(busy(server, again)) == 130
    assert time.monotonic() - started < 2
    cut = serve_process(*options, "--drain-timeout", "0.5")
    assert asyncio.run(busy(cut, lambda: cut.process.wait(10))) == 1


@pytest.mark.anyio
async def test_hot_reload_under_load_loses_nothing_and_a_bad_version_stays_out(
    serve_process, bundles, texts, tmp_path
):
    models = tmp_path / "models"
    shutil.copytree(bundles["closed"], models / "1")
    server = serve_process(f"desk={models}", "--watch", "0.2", "--no-access-log", "--max-queue-ms", "60000")

    def publish(version, damage=False):
        work = models / f".{version}"
        shutil.copytree(bundles["closed"], work)
        if damage:
            with (work / "cpu-int8" / "weights.bin").open("r+b") as handle:
                handle.seek(1000)
                byte = handle.read(1)
                handle.seek(1000)
                handle.write(bytes([byte[0] ^ 255]))
        work.rename(models / version)

    seen: dict[str, int] = {}
    codes: set[int] = set()
    stop = asyncio.Event()

    async def load(client, i):
        while not stop.is_set():
            answer = await client.post("/v1/predict", json={"texts": [texts[i]]})
            codes.add(answer.status_code)
            version = answer.json().get("version")
            seen[version] = seen.get(version, 0) + 1

    async with client_for(server.url) as client:
        clients = [asyncio.create_task(load(client, i)) for i in range(6)]
        await asyncio.sleep(0.3)
        for version, damage in (("2", False), ("3", True), ("4", False)):
            publish(version, damage)
            end = time.monotonic() + 15
            while time.monotonic() < end:
                events = [
                    line for line in server.log() if line["event"] in ("version_ready", "version_refused")
                ]
                if any(
                    str(e.get("version")) == version or str(e.get("bundle", "")).endswith(version)
                    for e in events
                ):
                    break
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)
        stop.set()
        await asyncio.gather(*clients)
        assert (await client.get("/v2/models/desk")).json()["versions"] == ["2", "4"]
        assert (await client.get("/v2/models/desk/versions/3")).status_code == 404
    assert codes == {200}
    assert set(seen) == {"1", "2", "4"}
    assert any(line["event"] == "version_refused" for line in server.log())
    server.process.send_signal(signal.SIGHUP)
    server.await_event("reload_requested")
    assert server.stop() == 0


@pytest.mark.anyio
async def test_overload_answers_200_or_429_and_comes_back(serve_process, bundles, texts):
    """Open loop: requests are sent whether or not earlier ones were answered, more than the server takes at once."""
    server = serve_process(
        bundles["closed"], "--max-queue-ms", "100", "--max-concurrent", "16", "--no-access-log"
    )

    codes: list[int] = []
    async with client_for(server.url) as client:

        async def one(i):
            answer = await client.post("/v1/predict", json={"texts": texts[:16], "explain": i % 4 == 0})
            codes.append(answer.status_code)
            assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1

        tasks = []
        for i in range(300):
            tasks.append(asyncio.create_task(one(i)))
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)
        assert set(codes) == {200, 429}
        await asyncio.sleep(0.3)
        assert (await client.post("/v1/predict", json={"texts": texts[:4]})).status_code == 200
    assert metric(server.url, "sbs_edge_requests_in_flight") == 0


def _certificate(folder):
    """Make a certificate for 127.0.0.1; return its file and its key's."""
    folder.mkdir()
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "1",
            "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_tls_and_token(serve_process, bundles, tmp_path, sbs_edge_cli):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine to make a certificate")
    token = tmp_path / "token"
    cert, key = _certificate(tmp_path / "first")
    token.write_text("s3cret\n")
    server = serve_process(bundles["closed"], "--tls-cert", cert, "--tls-key", key, "--token-file", token)
    import ssl

    context = ssl.create_default_context(cafile=str(cert))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.url}/v2/health/live", trust_env=False)
    with pytest.raises(httpx.RemoteProtocolError):  # no answer in clear on that port
        httpx.get(f"{server.url.replace('https', 'http')}/v2/health/live", trust_env=False)
    old = ssl.create_default_context(cafile=str(cert))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert httpx.get(f"{server.url}/v2/health/live", verify=old, trust_env=False).status_code == 200
    broken = tmp_path / "broken.pem"
    broken.write_text("junk")
    for given in (tmp_path / "none.pem", broken):
        done = sbs_edge_cli("serve", bundles["closed"], "--port", "0", "--tls-cert", given, "--tls-key", key)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert str(given) in done.stderr
    renewed = _certificate(tmp_path / "new")
    os.replace(broken, key)  # a renewal that is half done leaves the old pair in use
    server.process.send_signal(signal.SIGHUP)
    server.await_event("certificate_refused")
    assert httpx.get(f"{server.url}/v2/health/live", verify=context, trust_env=False).status_code == 200
    for new, old_file in zip(renewed, (cert, key), strict=True):
        os.replace(new, old_file)
    server.process.send_signal(signal.SIGHUP)
    server.await_event("certificate_loaded")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.url}/v2/health/live", verify=context, trust_env=False)
    context = ssl.create_default_context(cafile=str(cert))
    with httpx.Client(base_url=server.url, verify=context, trust_env=False) as client:
        assert client.get("/v2/health/ready").status_code == 200
        body = {"texts": ["the vent blows cold air"]}
        assert client.post("/v1/predict", json=body).status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        assert client.post("/v1/predict", json=body, headers=headers).status_code == 200


def test_an_address_in_use_is_one_clear_sentence(bundles, sbs_edge_cli):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = sbs_edge_cli("serve", bundles["closed"], "--port", port)
    assert ran.returncode == 2
    assert f"The server cannot listen on 127.0.0.1 port {port}" in " ".join(ran.stderr.split())
