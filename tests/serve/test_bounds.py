"""Limits on what one connection, body or text may cost, and how a connection ends: raw sockets, a real server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import pytest

TEXT = b'{"texts": ["The coil is frosted."], "model": "desk"}'
PAGE = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def bounded(server_class, bundles):
    options = ("--max-inside-bytes", 4_000_000, "--max-connections", 40, "--head-timeout-s", 3)
    process = server_class(f"desk={bundles['closed']}", *options)
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture
def connect(bounded, open_raw):
    return lambda server=bounded: open_raw(server)


def read_all(sock):
    """Return everything until the server ends the connection; a reset is an error."""
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def answers(data):
    """Split what was read into (status, headers, body)."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        size = int(headers["content-length"])
        found.append((int(lines[0].split()[1]), headers, rest[:size]))
        data = rest[size:]
    return found


def asked(body=TEXT, extra=b"", length=None, path=b"/v1/predict", version=b"1.1"):
    size = len(body) if length is None else length
    head = b"POST %b HTTP/%b\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n" % (path, version, extra, size)
    return head + body


CLOSE = b"Connection: close\r\n"


@pytest.mark.parametrize(
    "extra",
    [
        b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
        b"Connection: close, upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n",
        b"Connection: close\r\nUpgrade: h2c\r\n",
    ],
)
def test_a_wish_for_another_protocol_is_answered_in_this_one(connect, extra):
    for pieces in ([asked(extra=extra)], [asked(extra=extra)[:-30], TEXT[-30:]]):
        sock = connect()
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.05)
        ((status, _, body),) = answers(read_all(sock))
        assert (status, len(json.loads(body)["predictions"])) == (200, 1)


def test_upgrades_in_a_row_and_in_chunks_keep_their_bodies(connect):
    extra = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    chunked = (
        b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (extra, len(TEXT), TEXT)
    )
    sock = connect()
    sock.sendall(asked(extra=extra) + chunked + asked(extra=extra) + asked(extra=CLOSE))
    assert [status for status, _, _ in answers(read_all(sock))] == [200] * 4


@pytest.mark.parametrize(
    ("request_bytes", "status", "says"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "not valid HTTP"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "not valid HTTP"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "not valid HTTP"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "a Host"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400, "header host"),
        (asked(extra=b"Host: b\r\n"), 400, "header host"),
        (asked(extra=b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"), 400, "authorization"),
        (asked(extra=b"Content-Encoding: gzip\r\nContent-Encoding: identity\r\n"), 400, "content-encoding"),
        (asked(extra=b"X-Request-Id: a\r\nX-Request-Id: b\r\n"), 400, "x-request-id"),
        (asked(extra=b"Content-Length: 3\r\n"), 400, "HTTP"),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 405, "proxy"),
        (
            b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X%d:\r\n" % i for i in range(300)) + b"\r\n",
            431,
            "256",
        ),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
def test_what_is_not_http_is_told_so_in_json(connect, request_bytes, status, says):
    sock = connect()
    sock.sendall(request_bytes)
    ((got, headers, body),) = answers(read_all(sock))
    assert (got, headers["content-type"], headers["connection"]) == (status, "application/json", "close")
    (message,) = json.loads(body).values()
    assert says in message


def test_a_malformed_request_does_not_overtake_the_one_before_it(connect):
    sock = connect()
    sock.sendall(asked() + b"NOT HTTP\r\n\r\n" + asked())
    assert [status for status, _, _ in answers(read_all(sock))] == [200, 400]


def test_other_forms_of_a_request_are_understood(connect):
    sock = connect()
    sock.sendall(asked(path=b"http://a/v1/predict") + asked(path=b"/v1/predict?x=1", extra=CLOSE))
    assert [status for status, _, _ in answers(read_all(sock))] == [200, 200]


def test_trailers_are_not_headers_and_are_bounded(connect, bounded):
    head = b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n%b\r\n%x\r\n%b\r\n0\r\n"
    sock = connect()
    trailer = b"X-Request-Id: from-a-trailer\r\nContent-Encoding: br\r\n\r\n"
    sock.sendall(head % (CLOSE, len(TEXT), TEXT) + trailer)
    ((status, headers, _),) = answers(read_all(sock))
    assert status == 200
    assert headers["x-request-id"] != "from-a-trailer"
    endless = connect()
    endless.sendall(head % (b"", len(TEXT), TEXT) + b"X: ")
    sent = 0
    try:
        while sent < 20_000_000:
            sent += endless.send(b"x" * 65536)
    except (ConnectionResetError, BrokenPipeError, TimeoutError):
        pass
    assert sent < 20_000_000 or b" 431 " in endless.recv(65536)[:20]


def test_http_1_0_keeps_the_connection_where_it_is_asked_to(connect):
    sock = connect()
    keep = asked(extra=b"Connection: keep-alive\r\n", version=b"1.0")
    sock.sendall(keep)
    data = b""
    while not data.endswith(b"}]}"):
        data += sock.recv(65536)
    ((status, headers, _),) = answers(data)
    assert (status, headers["connection"]) == (200, "keep-alive")
    sock.sendall(asked(version=b"1.0"))
    ((status, headers, _),) = answers(read_all(sock))
    assert (status, headers["connection"]) == (200, "close")


@pytest.mark.parametrize("size", [2_500_000, 12_000_000])
def test_an_answer_reaches_a_client_that_sends_its_whole_body_first(connect, size):
    """Closing with data unread resets the connection, and the client's system drops the answer."""
    sock = connect()
    sock.sendall(asked(b"x" * size))
    time.sleep(0.2)
    ((status, headers, body),) = answers(read_all(sock))
    assert (status, headers["connection"]) == (413, "close")
    assert "max_body_bytes" in json.loads(body)["error"]


def test_what_arrives_after_the_end_is_bounded(connect):
    sock = connect()
    head = asked(b"", length=10**12)
    sock.sendall(head)
    sent = 0
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while sent < 200_000_000:
            sent += sock.send(b"x" * 65536)
    assert sent < 60_000_000


def rss(server):
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_pipelined_requests_that_nobody_reads_stay_with_their_sender(connect, bounded):
    before, sent = rss(bounded), 0
    socks = []
    for _ in range(20):
        sock = connect()
        socks.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        data = PAGE * 200_000  # 8 MB
        for _ in range(20):
            try:
                n = sock.send(data)
                sent, data = sent + n, data[n:]
            except BlockingIOError:
                time.sleep(0.005)
    assert httpx.get(f"{bounded.url}/v2/health/live").status_code == 200
    assert rss(bounded) - before < 16_000_000
    assert sent < 20 * 8_000_000  # the rest is still with the client
    first = socks[0]
    first.setblocking(True)
    got = 0
    while got < 1000:  # and all of it is answered once it is read
        got += first.recv(65536).count(b'{"live": true}')


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_bodies_inside_are_bounded_and_their_memory_goes_back(connect, bounded):
    for _ in range(3):
        httpx.post(f"{bounded.url}/v1/predict", content=TEXT)
    before = rss(bounded)
    body = json.dumps({"texts": ["ab " * 633_000], "truncate": True}).encode()
    socks = [connect() for _ in range(20)]
    for sock in socks:
        sock.sendall(asked(body[:1_800_000], length=len(body)))  # all but the end: every one is held
    highest = 0
    for _ in range(20):
        highest = max(highest, rss(bounded))
        time.sleep(0.02)
    metrics = httpx.get(f"{bounded.url}/metrics").text
    held = float(metrics.split("\nsbs_edge_requests_in_flight ")[1].split()[0])
    assert held <= 2  # of 1.8 MB, in 4 MB
    assert 'sbs_edge_rejected_total{reason="body_bytes"} ' in metrics
    for sock in socks:
        sock.sendall(body[1_800_000:])
    codes = []
    for sock in socks:
        codes += [int(sock.recv(65536).split()[1])]
    assert set(codes) == {200, 429}
    assert codes.count(200) <= 2
    assert highest - before < 4 * 4_000_000
    for sock in socks:
        sock.close()
    end = time.monotonic() + 15
    while rss(bounded) - before > 6_000_000:
        assert time.monotonic() < end, f"{rss(bounded) - before} bytes stay"
        time.sleep(0.1)


def test_connections_are_bounded(connect, bounded):
    socks = [connect() for _ in range(60)]
    time.sleep(0.2)
    refused = 0
    for sock in socks:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            refused += b" 503 " in sock.recv(4096)
        sock.close()
    assert refused >= 19
    end = time.monotonic() + 15
    while True:  # the places come back
        try:
            if httpx.get(f"{bounded.url}/v2/health/live").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end


def test_one_signal_that_arrives_twice_still_drains(serve_process, bundles):
    server = serve_process(bundles["closed"])
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        body = TEXT.replace(b', "model": "desk"', b"")
        sock.sendall(asked(body[:10], length=len(body), extra=CLOSE))
        while "sbs_edge_requests_in_flight 1.0" not in httpx.get(f"{server.url}/metrics").text:
            pass
        os.kill(server.process.pid, signal.SIGTERM)
        os.kill(server.process.pid, signal.SIGINT)
        server.await_event("draining")
        os.kill(server.process.pid, signal.SIGTERM)
        late = socket.create_connection((host, int(port)), timeout=20)  # refused, and may read why
        late.sendall(asked(b"x" * 1_500_000))
        ((status, _, answer),) = answers(read_all(late))
        assert (status, "stopping" in json.loads(answer)["error"]) == (503, True)
        late.close()
        sock.sendall(body[10:])
        assert answers(read_all(sock))[0][0] == 200
    assert server.process.wait(20) == 0


def test_a_head_may_be_cut_anywhere_whatever_follows_it(connect):
    request = asked(TEXT + b" " * 300_000, extra=b"X: " + b"y" * 60_000 + b"\r\n" + CLOSE)
    end = request.index(b"\r\n\r\n")
    for cut in range(end - 1, end + 6):
        sock = connect()
        sock.sendall(request[:cut])
        time.sleep(0.05)
        sock.sendall(request[cut:])
        ((status, _, _),) = answers(read_all(sock))
        assert status == 200, cut - end


def test_what_follows_a_refused_body_is_never_answered_twice(connect):
    """The rest of a body whose request was answered is broken: the connection ends without a second answer."""
    sock = connect()
    head = b"POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    sock.sendall(head)
    data = sock.recv(65536)
    sock.sendall(b"not a size\r\n")
    assert [status for status, _, _ in answers(data + read_all(sock))] == [404]
