"""A plain FastAPI server around a ``Student``, and the comparison of ``sbs-edge serve`` with it.

Both servers run at the same time, and requests go to each in turns of a second or two, so that other load
on the machine affects both.
"""

from __future__ import annotations

import os
import socket
import statistics
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from sbs_edge.bench.serving.client import HOST, Client, Job, closed_loop
from sbs_edge.bench.serving.server import Cores, PinnedServer, ServerUnderTest
from sbs_edge.errors import MissingExtra

__all__ = ["CASES", "PlainServer", "against_plain", "main"]

CASES = tuple((connections, n_texts) for n_texts in (1, 16) for connections in (1, 8, 64))
_NOISE = 0.05  # of the ratio: below it, a difference is the machine's


def plain_app(bundle: Path, threads: int) -> Any:
    """Return a FastAPI application with the one route ``POST /v1/predict``."""
    try:
        from fastapi import FastAPI
    except ImportError as error:
        raise MissingExtra("fastapi", "bench", "The plain server") from error
    from dataclasses import asdict

    from pydantic import BaseModel

    from sbs_edge.runtime.student import Student

    student = Student.load(bundle, threads=threads)
    student.warm_up(["label"])
    app = FastAPI()

    class Request(BaseModel):
        texts: list[str]

    def predict(request: Request) -> dict[str, Any]:  # not async: FastAPI runs it on a thread
        return {"predictions": [asdict(answer) for answer in student.predict(request.texts)]}

    predict.__annotations__["request"] = Request
    app.post("/v1/predict")(predict)
    app.get("/v2/health/live")(lambda: {"live": True})
    return app


def from_environment() -> Any:
    """Build the application in each of uvicorn's own worker processes."""
    return plain_app(Path(os.environ["SBS_EDGE_PLAIN_BUNDLE"]), int(os.environ["SBS_EDGE_PLAIN_THREADS"]))


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle with a closed label set.")],
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 8081,
    threads: Annotated[int, typer.Option(help="Threads of one inference.")] = 1,
    workers: Annotated[int, typer.Option(help="uvicorn's worker processes.")] = 1,
) -> None:
    """Run the plain server until it is stopped."""
    import uvicorn

    os.environ["SBS_EDGE_PLAIN_BUNDLE"], os.environ["SBS_EDGE_PLAIN_THREADS"] = str(bundle), str(threads)
    name = "sbs_edge.bench.serving.plain_server:from_environment"
    uvicorn.run(
        name, factory=True, host=HOST, port=port, workers=workers, log_level="error", access_log=False
    )


class PlainServer(PinnedServer):
    """The plain server."""

    def __init__(self, bundle: Path, threads: int, workers: int, cores: Cores) -> None:
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        options = ("--port", str(port), "--threads", str(threads), "--workers", str(workers))
        super().__init__(("sbs_edge.bench.serving.plain_server", str(bundle), *options), cores)
        self.port = port

    def is_ready(self) -> bool:
        """Return whether it answers."""
        try:
            urllib.request.urlopen(f"http://{HOST}:{self.port}/v2/health/live", timeout=5).close()
        except OSError:
            return False
        return True


async def against_plain(
    bundle: Path, threads: int, seconds: float, cores: Cores, jobs_of: Any, workers: int = 1, rounds: int = 5
) -> dict[str, Any]:
    """Requests a second of both servers, in turns of ``seconds``, for every case of :data:`CASES`.

    Args:
        bundle: a bundle with a closed label set.
        threads: threads of one inference.
        seconds: length of a turn.
        cores: processors of the servers, and of the client.
        jobs_of: makes the requests of so many texts.
        workers: processes of each server.
        rounds: turns of each server and case; the median counts.
    """
    many = ("--workers", str(workers)) if workers > 1 else ()
    # A plain server rejects nothing, so neither does ours here.
    unbounded = ("--max-queue-texts", "4096", "--max-queue-ms", "60000")
    ours = ServerUnderTest(
        bundle, "--threads", str(threads), *many, *unbounded, "--no-access-log", cores=cores
    )
    cases: dict[str, Any] = {}
    with ours, PlainServer(bundle, threads, workers, cores) as plain:
        for connections, n_texts in CASES:
            jobs: list[Job] = jobs_of(n_texts)
            rates: dict[str, list[float]] = {"serve": [], "plain": []}
            n_failed = 0
            for turn in range(rounds + 1):
                for name, port in (("serve", ours.port), ("plain", plain.port)):
                    client = Client(port, connections)
                    await client.open(connections)
                    record = await closed_loop(client, jobs, concurrency=connections, seconds=seconds)
                    await client.close()
                    failed = sum(outcome.status != 200 for outcome in record.outcomes)
                    n_failed += failed
                    if turn:  # the first warms up
                        rates[name].append((len(record.outcomes) - failed) / record.seconds)
            ratios = [a / b if b else 0.0 for a, b in zip(rates["serve"], rates["plain"], strict=True)]
            cases[f"{connections} x {n_texts}"] = {
                "serve_per_s": round(statistics.median(rates["serve"]), 1),
                "plain_per_s": round(statistics.median(rates["plain"]), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "failed": n_failed,
            }
    return {
        "cores": {"server": cores[0], "client": cores[1]},
        "workers": workers,
        "cases": cases,
        "held": {
            f"{name} not behind": case["ratio"] >= 1 - _NOISE and not case["failed"]
            for name, case in cases.items()
        },
    }


if __name__ == "__main__":
    typer.run(main)
