"""The requests of the serving benchmark: prepared bytes, the same ones every time."""

from __future__ import annotations

import gzip
import json
import random

from sbs_edge.bench.serving.client import Job, request_bytes
from sbs_edge.data.builtin import builtin_splits

__all__ = ["job_of", "mixed_requests", "requests_of", "some_texts"]


def some_texts(n: int = 512) -> list[str]:
    """Return ``n`` inputs of the built-in task."""
    rows = [example.input for example in builtin_splits("ci").test]
    return (rows * (n // len(rows) + 1))[:n]


def job_of(texts: list[str], explain: bool = False) -> Job:
    """Return a request for the answers to ``texts``."""
    body = json.dumps({"texts": texts, "explain": explain}).encode()
    return request_bytes("/v1/predict", body), len(texts)


def requests_of(n_texts: int, count: int = 64, explain: bool = False) -> list[Job]:
    """Return prepared requests of ``n_texts`` texts each, the same ones every time."""
    rng, texts = random.Random(0), some_texts()
    return [job_of(rng.sample(texts, n_texts), explain) for _ in range(count)]


def mixed_requests(n: int) -> list[Job]:
    """A mix of what a server meets: sizes, rationales, both protocols, compression, mistakes."""
    rng, texts = random.Random(1), some_texts()
    jobs: list[Job] = []
    for _ in range(n):
        kind = rng.random()
        size = min(32, 1 + int(rng.expovariate(0.5)))
        chosen = [
            " ".join(rng.sample(text.split(), rng.randint(1, len(text.split()))))
            for text in rng.sample(texts, size)
        ]
        if kind < 0.05:
            jobs.append(job_of(chosen[:2], explain=True))
        elif kind < 0.3:
            tensor = {"name": "text", "datatype": "BYTES", "shape": [size], "data": chosen}
            name = "/v2/models/bench/infer"
            jobs.append((request_bytes(name, json.dumps({"inputs": [tensor]}).encode()), size))
        elif kind < 0.4:
            packed = gzip.compress(json.dumps({"texts": chosen}).encode())
            jobs.append((request_bytes("/v1/predict", packed, "Content-Encoding: gzip\r\n"), size))
        elif kind < 0.45:
            bad = rng.choice([b"{", b'{"texts": []}', json.dumps({"texts": ["word " * 5000]}).encode()])
            jobs.append((request_bytes("/v1/predict", bad), 0))
        else:
            jobs.append(job_of(chosen))
    return jobs
