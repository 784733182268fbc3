"""Several processes on one socket, as a user starts them; and the Unix socket."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from sbs_edge.errors import UsageError
from sbs_edge.runtime.student import Student
from sbs_edge.serve import listening
from sbs_edge.serve.settings import ServeSettings
from sbs_edge.serve.workers import worker_settings

TEXT = "The coil is frosted."


def ask(url, texts=(TEXT,), **fields):
    """One request on a connection of its own, so that any worker may take it."""
    return httpx.post(f"{url}/v1/predict", json={"texts": list(texts), **fields}, timeout=30)


def await_true(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def ready(url):
    return httpx.get(f"{url}/v2/health/ready", timeout=10)


def value(url, start):
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))


def events(server, name):
    return [line for line in server.log() if line["event"] == name]


@pytest.fixture
def workers(bundles, serve_process, tmp_path):
    bundle = shutil.copytree(bundles["closed"], tmp_path / "bundle")
    server = serve_process(f"desk={bundle}", "--workers", "2", "--body-timeout-s", "60", ready=False)
    server.await_event("ready")
    server.bundle = bundle
    return server


def test_a_worker_has_its_part_of_the_limits_and_of_the_usable_cores(monkeypatch):
    monkeypatch.setattr("sbs_edge.serve.workers.usable_cpus", lambda: 7)  # by quota, whatever the affinity
    settings = ServeSettings(workers=3, max_concurrent=10, max_connections=9, max_queue_texts=3000)
    own = worker_settings(settings)
    assert (own.threads, own.max_concurrent, own.max_connections, own.max_queue_texts) == (2, 4, 3, 1000)
    assert worker_settings(settings.model_copy(update={"threads": 5})).threads == 5
    many = worker_settings(ServeSettings(workers=100))  # a full request still fits
    assert (many.threads, many.max_inside_bytes, many.max_queue_texts) == (1, 2_000_000, 32)


def test_workers_answer_alike_and_are_counted_together(workers, bundles):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(workers.url), range(60)))
    assert Counter(answer.status_code for answer in answers) == {200: 60}
    with Student.load(bundles["closed"], threads=1) as student:
        (want,) = student.predict([TEXT])
    for answer in answers:
        (got,) = answer.json()["predictions"]
        assert (got["label"], got["probability"]) == (want.label, want.probability)
    assert {line["worker"] for line in events(workers, "request")} == {0, 1}
    for _ in range(6):  # whichever worker is asked
        assert value(workers.url, 'sbs_edge_requests_total{code="200",model="desk"}') == 60
        assert value(workers.url, "sbs_edge_model_info{") == 1
        assert ready(workers.url).json() == {"ready": True, "workers": {"wanted": 2, "ready": 2}}


def test_a_dead_worker_is_started_again_and_readiness_says_so(workers):
    first = {line["worker"]: line["pid"] for line in events(workers, "worker_started")}
    os.kill(first[0], signal.SIGKILL)
    await_true(lambda: events(workers, "worker_died"))
    assert ready(workers.url).json()["workers"] == {"wanted": 2, "ready": 1}
    assert ready(workers.url).status_code == 200  # the other one answers
    assert [ask(workers.url).status_code for _ in range(10)] == [200] * 10
    await_true(lambda: ready(workers.url).json()["workers"]["ready"] == 2)
    died, again = events(workers, "worker_died"), events(workers, "worker_started")
    assert [(line["worker"], line["pid"]) for line in died] == [(0, first[0])]
    assert died[0]["again_in_s"] > 0
    assert [line["worker"] for line in again] == [0, 1, 0]


def test_sigterm_drains_every_worker_and_loses_nothing(workers):
    """Requests whose last byte is held back are admitted by both workers and cannot finish before the signal."""
    body = json.dumps({"texts": [TEXT] * 16, "explain": True}).encode()
    address = workers.url.removeprefix("http://")
    connections, processes = [], set()
    end = time.monotonic() + 30
    while len(connections) < 24 or len(processes) < 2:
        assert time.monotonic() < end
        connections.append(http.client.HTTPConnection(address, timeout=30))
        connections[-1].request("GET", "/v2/health/live")
        with connections[-1].getresponse() as answer:
            processes.add(answer.headers["x-request-id"][:8])  # digits of the process
            answer.read()
        connections[-1].putrequest("POST", "/v1/predict")
        connections[-1].putheader("Content-Length", str(len(body)))
        connections[-1].endheaders(body[:-1])
    await_true(lambda: value(workers.url, "sbs_edge_requests_in_flight") == len(connections))
    workers.process.send_signal(signal.SIGTERM)
    workers.process.send_signal(signal.SIGTERM)  # as `timeout` passes it on
    await_true(lambda: sum("in_flight" in line for line in events(workers, "draining")) == 2)
    held = {line["worker"]: line["in_flight"] for line in events(workers, "draining") if "in_flight" in line}
    assert held.keys() == {0, 1}
    assert min(held.values()) > 0
    assert sum(held.values()) == len(connections)
    assert ask(workers.url).status_code == 503  # a new request is told to go elsewhere
    for connection in connections:
        connection.send(body[-1:])
    assert Counter(connection.getresponse().status for connection in connections) == {200: len(connections)}
    for connection in connections:
        connection.close()
    assert workers.process.wait(30) == 0
    for line in events(workers, "worker_started"):
        with pytest.raises(ProcessLookupError):
            os.kill(line["pid"], 0)


def test_sighup_reloads_every_worker_and_a_changed_bundle_changes_nothing_before(workers, bundles):
    weights = workers.bundle / "cpu-int8" / "weights.bin"
    weights.write_bytes(bytes(255 - b for b in weights.read_bytes()))
    os.truncate(workers.bundle / "cpu-int8" / "explainer.bin", 0)
    before = ask(workers.url, explain=True).json()
    workers.process.send_signal(signal.SIGHUP)
    await_true(lambda: len(events(workers, "version_refused")) == 2)
    assert [ask(workers.url, explain=True).json() for _ in range(8)] == [before] * 8
    assert "still answers" in ready(workers.url).json()["problems"][0]
    assert value(workers.url, "sbs_edge_stale_versions{") == 1
    shutil.rmtree(workers.bundle)
    shutil.copytree(bundles["closed"], workers.bundle)
    workers.process.send_signal(signal.SIGHUP)
    await_true(lambda: len(events(workers, "version_retired")) == 2)
    await_true(lambda: "problems" not in ready(workers.url).json())
    assert ask(workers.url, explain=True).json() == before


def test_a_damaged_bundle_stops_every_worker_with_its_own_error(bundles, tmp_path, sbs_edge_cli):
    damaged = shutil.copytree(bundles["closed"], tmp_path / "damaged")
    os.truncate(damaged / "cpu-int8" / "weights.bin", 1000)
    done = sbs_edge_cli("serve", damaged, "--port", "0", "--workers", "2")
    assert done.returncode == 4
    assert "weights.bin has 1000 bytes" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_unix_socket_answers_and_is_removed(bundles, tmp_path, serve_process, workers):
    path = tmp_path / "app.sock"
    server = serve_process(f"desk={bundles['closed']}", "--uds", path, "--workers", workers, ready=False)
    server.await_event("ready")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://edge") as client:
        assert client.post("/v1/predict", json={"texts": [TEXT]}).status_code == 200
    assert path.stat().st_mode & 0o777 == 0o660
    with pytest.raises(UsageError, match="Another server listens"):
        listening.bind(ServeSettings(uds=path))
    assert server.stop() == 0
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced_and_another_file_is_not(tmp_path):
    stale, other = tmp_path / "stale.sock", tmp_path / "notes.txt"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(stale))
    settings = ServeSettings(uds=stale)
    listening.unbind(listening.bind(settings), settings)
    assert not stale.exists()
    other.write_text("mine")
    with pytest.raises(UsageError, match="is not a socket"):
        listening.bind(ServeSettings(uds=other))
    assert other.read_text() == "mine"
