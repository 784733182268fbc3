"""Raw sockets against a real server: slow, endless and half-finished clients, and what a refusal leaves."""

from __future__ import annotations

import json
import socket
import time

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

LIMITS = ("--head-timeout-s", "0.5", "--body-timeout-s", "0.5", "--max-head-bytes", "8192")


@pytest.fixture(scope="module")
def guarded(server_class, bundles):
    process = server_class(f"desk={bundles['closed']}", *LIMITS, "--max-concurrent", "1")
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="module")
def full(server_class, bundles):
    """A server whose only place is held by a request without a body."""
    waits = ("--body-timeout-s", "600", "--timeout-s", "600", "--drain-timeout", "0")
    process = server_class(
        f"desk={bundles['closed']}", "--head-timeout-s", "0.5", "--max-concurrent", "1", *waits
    )
    try:
        host, port = process.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as holder:
            holder.sendall(post(b"", length=100))
            while not value(process, "sbs_edge_requests_in_flight"):
                pass
            yield process
    finally:
        process.stop()


def value(server, series):
    """One metric's value now, 0 where it has none."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(series)), 0.0)


@pytest.fixture
def connect(guarded, open_raw):
    return lambda server=guarded: open_raw(server)


def read_answer(sock):
    """Return (status, headers, body) of one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        assert piece, f"the connection closed after {data!r}"
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    while len(body) < int(headers["content-length"]):
        body += sock.recv(65536)
    return int(lines[0].split()[1]), headers, body


def read_answer_of(sock, request):
    sock.sendall(request)
    return read_answer(sock)


def closes(sock):
    """Read until the server closes."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def post(body, path="/v1/predict", length=None):
    size = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n".encode() + body


def test_a_refused_request_leaves_its_connection_usable(connect, guarded):
    holder, sock = connect(), connect()
    holder.sendall(post(b"", length=100))
    while not value(guarded, "sbs_edge_requests_in_flight"):
        pass
    refused = 0
    while True:  # 408 ends the holder within half a second, then a request is let in
        sock.sendall(post(json.dumps({"texts": ["some text"], "model": "desk"}).encode() + b" " * 300_000))
        status, headers, _ = read_answer(sock)
        assert "connection" not in headers
        if status == 200:
            break
        assert (status, int(headers["retry-after"]) >= 1) == (429, True)
        refused += 1
    assert refused > 0
    status, headers, body = read_answer(holder)
    assert (status, headers["connection"]) == (408, "close")
    assert b"body_timeout_s" in body
    assert closes(holder)


def test_refusals_on_one_connection_follow_each_other_and_match_http(connect, full):
    body = json.dumps({"texts": ["some text"]}).encode()
    series = 'sbs_edge_rejected_total{reason="concurrency"}', 'sbs_edge_requests_total{code="429",model=""}'
    before = [value(full, name) for name in series]
    sock = connect(full)
    sock.sendall(post(body) * 3 + post(body, path="/v1/predict?x=1") + post(body, path="/v2/models/m/infer"))
    seen = b""
    while seen.count(b"HTTP/1.1 429 Too Many Requests\r\n") < 5 or not seen.endswith(b"}"):
        seen += sock.recv(65536)
    for answer in seen.split(b"HTTP/1.1 ")[1:]:
        head, _, rest = answer.decode().partition("\r\n\r\n")
        lines = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:])
        assert int(lines["content-length"]) == len(rest)
        assert list(json.loads(rest)) == ["error"]
        assert {"retry-after", "x-request-id", "date", "content-type"} <= set(lines)
    sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
    assert read_answer(sock)[0] == 200
    assert [value(full, name) for name in series] == [before[0] + 5, before[1] + 5]
    status, _, answer = read_answer_of(
        sock, b"POST /v1/other HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    )
    assert (status, json.loads(answer)["error"]) == (404, "There is no such route.")


@pytest.mark.parametrize(
    ("line", "version"),
    [("Connection: close", "1.1"), ("Expect: 100-continue", "1.1"), ("X-A: b", "1.0")],
)
def test_a_refusal_that_cannot_keep_the_connection_says_so(connect, full, line, version):
    sock = connect(full)
    head = f"POST /v1/predict HTTP/{version}\r\nHost: a\r\nContent-Length: 4\r\n{line}\r\n\r\n"
    status, headers, _ = read_answer_of(sock, head.encode())
    assert (status, headers["connection"]) == (429, "close")
    assert closes(sock)


def test_the_rest_of_a_refused_body_is_not_waited_for(connect, full):
    sock = connect(full)
    assert read_answer_of(sock, post(b"x" * 10, length=1000))[0] == 429
    sock.sendall(b"x")
    assert closes(sock)


def test_real_clients_understand_a_refusal(full):
    with httpx.Client(base_url=full.url, trust_env=False) as client:
        for _ in range(3):
            answer = client.post(
                "/v1/predict", json={"texts": ["a" * 200_000]}, headers={"X-Request-Id": "r"}
            )
            assert (answer.status_code, answer.headers["X-Request-Id"]) == (429, "r")
    with triton.InferenceServerClient(full.url.removeprefix("http://")) as client:
        text = triton.InferInput("text", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"a"], dtype=object))
        with pytest.raises(InferenceServerException, match="try again in") as caught:
            client.infer("desk", [text])
        assert caught.value.status() == "429"


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"POST /v1/pre",
        b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nX: ",
        b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\nGET /v2",
        post(b"", path="/nowhere", length=1000),
    ],
    ids=["nothing", "half a line", "half a header", "half a second request", "unread body"],
)
def test_a_client_that_does_not_finish_is_closed(connect, start):
    sock = connect()
    sock.sendall(start)
    assert closes(sock)


def test_empty_lines_do_not_keep_an_idle_connection(connect):
    sock = connect()
    sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
    assert read_answer(sock)[0] == 200
    sock.sendall(b"\r\n")
    assert closes(sock)


def test_one_byte_at_a_time_does_not_keep_a_connection(connect):
    sock = connect()
    sock.settimeout(0.05)
    end = time.monotonic() + 20
    sock.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nX: ")
    while time.monotonic() < end:
        try:
            sock.sendall(b"x")
            if not sock.recv(100):
                return
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return
    raise AssertionError("the connection was still open after 20 s")


@pytest.mark.parametrize("at_once", [True, False])
def test_endless_headers_are_431(connect, at_once):
    sock = connect()
    head = b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 9000
    try:
        if at_once:
            sock.sendall(head + b"\r\n\r\n")
        else:
            for i in range(0, len(head), 1000):
                sock.sendall(head[i : i + 1000])
    except (ConnectionResetError, BrokenPipeError):
        pass
    status, headers, body = read_answer(sock)
    assert (status, headers["connection"], headers["content-type"]) == (431, "close", "application/json")
    assert set(json.loads(body)) == {"error"}
    assert closes(sock)


def test_headers_under_the_limit_and_pipelined_requests_are_answered(connect):
    sock = connect()
    one = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 7000 + b"\r\n\r\n"
    sock.sendall(one * 5)
    got = b""
    while got.count(b'{"live": true}') < 5:
        got += sock.recv(65536)
    assert got.count(b"HTTP/1.1 200 OK") == 5


@pytest.mark.parametrize(
    "name",
    [
        "..", ".", "../..", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e", "%2e%2e%2f", "..%5c..%5c",
        "desk/../../etc", "desk%00", "desk%00.json", "%2Fetc%2Fpasswd", "/etc/passwd", "C:%5CWindows",
        "desk%0d%0aX-Bad:%201", "%ff%fe", "desk/", "~root", "desk;x", "..;/", "%c0%ae%c0%ae/",
    ],
)  # fmt: skip
def test_no_name_of_a_request_becomes_a_path(connect, name):
    for path in (f"/{name}", f"/v2/models/{name}", f"/v2/models/desk/versions/{name}"):
        for method in ("GET", "POST"):
            sock = connect()
            ending = "/infer" if method == "POST" else ""
            sock.sendall(
                f"{method} {path}{ending} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode("latin-1")
            )
            status, headers, body = read_answer(sock)
            assert status in (400, 404, 405), (path, status, body)
            assert "x-bad" not in headers
            assert b"root:" not in body
            sock.close()


def test_the_server_runs_on_the_fast_loop_and_parser(guarded):
    """A missing uvloop or httptools would halve what the server can refuse, without a word."""
    (line,) = [line for line in guarded.log() if line["event"] == "listening"]
    assert line["loop"] == "uvloop"
