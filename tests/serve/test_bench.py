"""The load generator sends what it says and counts what it gets; the figures reach the page."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbs_edge.bench.core.tables import markdown
from sbs_edge.bench.report import docs
from sbs_edge.bench.report.document import pictures_of
from sbs_edge.bench.serving import scenarios
from sbs_edge.bench.serving.client import (
    BlockingClient,
    Client,
    Outcome,
    Record,
    closed_loop,
    open_loop,
    request_bytes,
    run,
)
from sbs_edge.bench.serving.server import shared_cores
from sbs_edge.bench.serving.tables import serving_tables
from sbs_edge.cli.app import main


class Peer:
    """A server by hand: answers each request with its own number, in pieces, or not at all."""

    def __init__(self, cuts=(), status=b"200 OK", silent=False, closing=False):
        self.cuts, self.status, self.silent, self.closing = cuts, status, silent, closing
        self.requests: list[bytes] = []
        self.connections = 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.talk, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def __aexit__(self, *error):
        self.server.close()

    async def talk(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                at = head.lower().find(b"content-length:")
                size = int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0
                body = await reader.readexactly(size)
                if b"/v2/health" not in head:
                    self.requests.append(body)
                    if self.silent:
                        continue
                end = b"connection: close\r\n" if self.closing else b""
                answer = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n%b\r\n%b" % (
                    self.status,
                    len(body),
                    end,
                    body,
                )
                for cut in sorted({min(c, len(answer)) for c in self.cuts} | {0, len(answer)}):
                    writer.write(answer[:cut][getattr(writer, "sent", 0) :])
                    writer.sent = cut
                    await writer.drain()
                    await asyncio.sleep(0)
                writer.sent = 0
                if self.closing:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def jobs(n):
    return [(request_bytes("/v1/predict", f"body {i}".encode()), 2) for i in range(n)]


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), closing=st.booleans())
def test_answers_are_read_whole_however_they_are_cut(cuts, closing):
    async def go():
        async with Peer(cuts, closing=closing) as port:
            client = Client(port, most=2)
            for raw, _ in jobs(3):
                assert await client.send(raw) == (200, raw[raw.index(b"\r\n\r\n") + 4 :])
            await client.close()

    run(asyncio.wait_for(go(), 20))


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), closing=st.booleans())
def test_a_lone_connection_reads_whole_answers_and_says_when_there_is_none(cuts, closing):
    def ask(port):
        with BlockingClient(port, timeout_s=20) as client:
            for raw, _ in jobs(1 if closing else 3):
                assert client.ask(raw) == (200, raw[raw.index(b"\r\n\r\n") + 4 :])
            if closing:
                with pytest.raises(ConnectionError):
                    client.ask(jobs(1)[0][0])

    async def go():
        async with Peer(cuts, closing=closing) as port:
            await asyncio.to_thread(ask, port)

    run(asyncio.wait_for(go(), 40))


def test_every_request_is_sent_once_and_counted_once():
    async def go():
        peer = Peer(status=b"429 Busy")
        async with peer as port:
            client = Client(port)
            closed = await closed_loop(client, jobs(50), concurrency=4, count=50)
            opened = await open_loop(client, jobs(50), rate=5000, seconds=30, count=50)
            await client.close()
        assert closed.codes == opened.codes == {"429": 50}
        assert (opened.unsent, len(opened.latencies(429))) == (0, 50)
        assert sorted(peer.requests) == sorted([f"body {i}".encode() for i in range(50)] * 2)
        assert closed.goodput() == 0

    run(asyncio.wait_for(go(), 20))


def test_what_finds_no_connection_is_reported_not_hidden():
    async def go():
        peer = Peer(silent=True)
        async with peer as port:
            client = Client(port, most=3)
            await client.open(3)
            loop = asyncio.create_task(open_loop(client, jobs(10), rate=1e6, seconds=30, count=10))
            while len(peer.requests) < 3:
                await asyncio.sleep(0)
            for writer in list(client._connections):
                writer.transport.close()
            record = await loop
        assert (record.unsent, record.codes) == (7, {"0": 3})

    run(asyncio.wait_for(go(), 20))


def test_connections_stay_within_their_number_however_fast_requests_come():
    async def go():
        peer = Peer()
        async with peer as port:
            client = Client(port, most=2)
            codes = []
            taken = [client.start(raw, lambda status, _: codes.append(status)) for raw, _ in jobs(5)]
            assert taken == [True, True, False, False, False]
            answers = await asyncio.gather(*(client.send(raw) for raw, _ in jobs(9)))
            await client.close()
        assert codes == [200, 200]
        assert [status for status, _ in answers] == [200] * 9
        assert peer.connections == 2

    run(asyncio.wait_for(go(), 20))


def test_who_waits_for_a_connection_gets_a_new_one_when_the_server_closes_it():
    async def go():
        peer = Peer(closing=True)
        async with peer as port:
            client = Client(port, most=1)
            answers = await asyncio.gather(*(client.send(raw) for raw, _ in jobs(4)))
            await client.close()
        assert [status for status, _ in answers] == [200] * 4
        assert peer.connections == 4

    run(asyncio.wait_for(go(), 20))


def test_a_patient_loop_sends_everything_and_tells_its_lateness_from_the_servers():
    async def go():
        async with Peer() as port:
            client = Client(port, most=1)
            record = await open_loop(client, jobs(20), rate=1e5, seconds=30, count=20, patient=True)
            await client.close()
        assert (record.unsent, record.codes) == (0, {"200": 20})
        assert record.lateness == sorted(record.lateness)  # one connection: each waits longer than the last
        for outcome, answer_s in zip(record.outcomes, record.answer_times(200), strict=True):
            assert outcome.latency_s == pytest.approx(outcome.late_s + answer_s)
            assert answer_s > 0
        assert record.oversleep

    run(asyncio.wait_for(go(), 20))


def test_goodput_counts_what_was_answered_in_time():
    record = Record(seconds=2.0)
    record.outcomes = [Outcome(200, 0.5, 1.0, 3), Outcome(200, 1.5, 1.0, 5), Outcome(429, 0.1, 0.1, 7)]
    assert record.goodput() == 1.5
    assert record.goodput(1.0) == 3.0
    assert record.goodput(1.6) == 0


def document(held):
    """A result with every scenario, as ``measure`` writes it."""
    overload = {
        "seconds": 60.0, "cores": {"server": [0], "client": [1]}, "codes": {"200": 10, "429": 30},
        "goodput_of_peak": 0.95, "goodput_of_peak_by_turn": [0.9, 0.95, 0.97],
        "peak_texts_per_s": 4000.0, "rejections_per_s": 700.0,
        "rejection_p99_ms": 5.0, "rss_growth": 0.01, "accepted_p99_ms": 500.0, "calm_p99_ms": 10.0,
        "server_cpu_s": 60.0, "client_cpu_s": 4.0, "unsent_by_client": 0,
        "client_late_p99_ms": 2.5, "client_loop_late_p99_ms": 1.5,
        "held": dict.fromkeys(
            ("only_200_and_429", "rejection_p99_20_ms", "goodput_90_percent", "rss_growth_5_percent",
             "accepted_p99_within_queue_budget"), held),
    }  # fmt: skip
    each = {"requests": 10, "server_us": 50.0, "client_us": 20.0}
    scenarios = {
        "latency": {"added_p50_ms": 0.9, "in_process_p50_ms": 0.5, "held": {"added_1_ms": True}},
        "cost": {"answered_1_texts": each, "answered_16_texts": each, "refused": each, "held": {}},
        "overload": overload,
    }
    machine = {
        "cpu": "a processor", "cpu_family": "1", "cpu_model": "2", "cpus": 2, "memory_gb": 4, "kernel": "6",
        "flags": [], "flags_absent": [], "load_average": [0.0], "gpus": [],
    }  # fmt: skip
    return {
        "kind": "serving", "created": "2026-01-01T00:00:00+00:00", "command": ["python"], "machine": machine,
        "versions": {}, "model": {"student": "desk", "version": "1", "target": "cpu-int8", "mb": 0.5},
        "threads": 1, "scenarios": scenarios,
    }  # fmt: skip


@pytest.mark.parametrize("held", [True, False])
def test_a_missed_promise_is_marked_on_the_page(tmp_path, held):
    (tmp_path / "serving.json").write_text(json.dumps(document(held)))
    page = docs.generate(tmp_path)
    assert "## Serving" in page
    assert "2.5 ms after a request was due, its loop 1.5 ms" in page
    assert page.count(", missed**") == (0 if held else 5)
    assert "95.0 % of 4000 texts a second (median of 3 turns, 90.0 % to 97.0 %)" in page
    assert pictures_of(document(held)) == []


@pytest.mark.long
def test_the_bench_gathers_scenarios_in_one_document(bundles, tmp_path):
    """Short: the figures mean nothing here, their consistency does."""
    out = tmp_path / "serving"
    short = ("--minutes", "0.034", "--requests", "400", "--soak-minutes", "1", "--out", out)
    command = [sys.executable, "-P", "-m", "sbs_edge", "bench", "serving"]
    for scenario, options in (("overload", ()), ("overload", ("--no-pin",)), ("soak", ())):
        done = subprocess.run(
            [*command, scenario, bundles["closed"], *short, *options],
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr[-3000:]
        assert json.loads(done.stdout.splitlines()[-1]) == json.loads((out / "result.json").read_text())
    document = json.loads((out / "result.json").read_text())
    figures = document["scenarios"]
    assert set(figures) == {"overload", "overload_shared", "soak"}
    for name in figures:
        assert sum(figures[name]["codes"].values()) == figures[name]["requests"], name
    assert figures["soak"]["requests"] + figures["soak"]["unsent_by_client"] == 400
    assert figures["soak"]["threads"]["start"] == figures["soak"]["threads"]["end"]
    (table,) = serving_tables(document)
    assert markdown(table).count("\n|") == len(table.rows) + 2
    other = subprocess.run(
        [*command, "latency", bundles["choices"], *short], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "holds other figures" in " ".join(other.stderr.split())


def test_the_server_is_compared_with_plain_fastapi(bundles, tmp_path):
    """The turns last a few hundredths of a second: requests and answers are checked, times are not."""
    pytest.importorskip("fastapi")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sbs_edge", "bench", "serving", "plain", bundles["closed"],
         "--minutes", "0.001", "--rounds", "1", "--no-pin", "--out", tmp_path],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["command"][:4] == ["sbs-edge", "bench", "serving", "plain"]
    plain = document["scenarios"]["plain_shared"]
    assert list(plain["cases"]) == ["1 x 1", "8 x 1", "64 x 1", "1 x 16", "8 x 16", "64 x 16"]
    for name, case in plain["cases"].items():
        assert case["failed"] == 0, name
        assert len(case["ratios"]) == 1, name
        assert case["plain_per_s"] > 0, name
        assert case["ratio"] == pytest.approx(case["serve_per_s"] / case["plain_per_s"], rel=0.01), name
    assert done.returncode == int(not all(plain["held"].values()))
    text = (tmp_path / "result.md").read_text()
    assert text.count("texts a request, against plain FastAPI") == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "x"], "SCENARIO is one of latency,"),
        (["latency"], "Give either a bundle or --shape"),
        (["latency", "x", "--shape", "tiny"], "Give either a bundle or --shape"),
        (["latency", "--shape", "giant"], "no shape 'giant'"),
    ],
)
def test_the_command_rejects_wrong_arguments(arguments, message, capsys):
    assert main(["bench", "serving", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_the_cost_of_a_refusal_is_taken_from_refusals_alone(bundles):
    figures = run(scenarios.cost(bundles["closed"], 1, shared_cores(), requests=200))
    assert figures["refused"]["codes"] == {"429": 200}
    assert figures["answered_1_texts"]["requests"] == 200
