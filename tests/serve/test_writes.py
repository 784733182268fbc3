"""A response has uvicorn's own bytes, in as few writes as its body has parts."""

from __future__ import annotations

import asyncio

import pytest
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from sbs_edge.serve.protocol import Connection

SIZED = [(b"content-length", b"6")]
TYPED = [(b"content-type", b"text/plain")]


class Wire(asyncio.Transport):
    """A transport that keeps each write apart."""

    def __init__(self):
        super().__init__()
        self.writes = []
        self.closed = False

    def write(self, data):
        self.writes.append(bytes(data))

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


def answering(status, headers, *pieces, whole=True):
    """An application that answers every request alike, and reads its body first."""

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for at, piece in enumerate(pieces):
            more = not whole or at + 1 < len(pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": more})

    return app


async def failing(scope, receive, send):
    raise ValueError("before anything was sent")


async def failing_late(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": SIZED})
    raise ValueError("after the head")


def asked(method="GET", headers=b"", body=b""):
    return b"%b /x HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n%b" % (
        method.encode(),
        headers,
        len(body),
        body,
    )


def exchange(protocol, app, *pieces):
    """Feed the pieces to one connection; return its writes, and whether it was closed."""

    async def talk():
        config = Config(app, log_level="critical", access_log=False)
        config.load()
        connection = protocol(config=config, server_state=ServerState(), app_state={})
        wire = Wire()
        connection.connection_made(wire)
        for piece in pieces:
            connection.data_received(piece)
            for _ in range(20):
                await asyncio.sleep(0)
        closed = wire.closed
        connection.connection_lost(None)
        return wire.writes, closed

    return asyncio.run(talk())


CASES = {
    "a sized body": (answering(200, SIZED, b"answer"), [asked()], 1),
    "a body of pieces": (answering(200, SIZED, b"ans", b"wer"), [asked()], 2),
    "a body of chunks": (answering(200, TYPED, b"ans", b"wer", b""), [asked()], 3),
    "no body": (answering(204, [], b""), [asked("POST", body=b"text")], 1),
    "HEAD": (answering(200, SIZED, b"answer"), [asked("HEAD")], 1),
    "HEAD, then closed": (answering(200, SIZED, b"answer"), [asked("HEAD", b"Connection: close\r\n")], 1),
    "two at once": (answering(200, SIZED, b"answer"), [asked() * 2], 2),
    "one after another": (answering(200, SIZED, b"answer"), [asked("POST", body=b"a"), asked("HEAD")], 2),
    "a patient client": (
        answering(200, SIZED, b"answer"),
        [asked("POST", b"Expect: 100-continue\r\n", b"text")[:-4], b"text"],
        2,
    ),
    "a failure": (failing, [asked()], 1),
    "a failure after the head": (failing_late, [asked()], 1),
    "an answer that stops": (answering(200, SIZED, b"ans", whole=False), [asked()], 1),
    "an answer that only begins": (answering(200, SIZED), [asked()], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_uvicorns_in_as_few_writes_as_it_has_pieces(name):
    app, pieces, count = CASES[name]
    plain, plain_closed = exchange(HttpToolsProtocol, app, *pieces)
    ours, closed = exchange(Connection, app, *pieces)
    assert b"".join(ours) == b"".join(plain)
    assert closed == plain_closed
    assert len(ours) == count
    assert all(ours)
