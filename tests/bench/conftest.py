"""Shared fixtures: a tiny random student, and results that were not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from sbs_edge.bench.core.shapes import random_student

    return random_student("tiny", tmp_path_factory.mktemp("bench") / "tiny", n_validation=48)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def document() -> dict[str, Any]:
    """A small latency result, as ``measure_latency`` writes it."""
    from sbs_edge.bench.core.machine import provenance
    from sbs_edge.bench.core.results import FORMAT, Row

    def label(system: str, variant: str, ms: float) -> Row:
        rounds = [ms * factor for factor in (0.98, 1.0, 1.03)]
        extra = {"p50": ms, "p90": ms * 1.1, "p99": ms * 1.3, "n": 30, "batch": 1, "source": 64, "tokens": 64}
        return Row("label", system, variant, "batch 1, 64 tokens", "ms", "lower", ms, rounds, extra)

    rows = [
        label("sbs-edge:cpu-int8", "label", 10.0),
        label("ctranslate2", "label+eos", 20.0),
        label("ctranslate2", "one token", 15.0),
        Row("disk", "sbs-edge:cpu-int8", "label alone", "files", "MB", "lower", 50.0),
        Row("disk", "ctranslate2", "all of it", "files", "MB", "lower", 60.0),
        Row("quality", "sbs-edge:cpu-int8", "", "label accuracy", "%", "higher", 90.0),
        Row("quality", "ctranslate2", "", "label accuracy", "%", "higher", 90.0),
    ]
    ratio = {"value": 2.0, "low": 1.9, "high": 2.1, "rounds": 3}
    return {
        "format": FORMAT,
        "kind": "latency",
        **provenance(["sbs-edge", "bench", "latency", "bundle"]),
        "model": {"shape": None, "task": "a | task", "random_weights": False, "weights_sha256": "0"},
        "threads": 1,
        "cpus": [0],
        "seed": 0,
        "validation_rows": 48,
        "systems": [
            {"name": "sbs-edge:cpu-int8", "status": "ok", "why": "", "quality": {"label accuracy": 90.0}},
            {"name": "ctranslate2", "status": "ok", "why": "", "quality": {"label accuracy": 90.0}},
            {"name": "openvino", "status": "failed", "why": "not installed: <openvino>"},
        ],
        "rows": [row.as_dict() for row in rows],
        "ratios": [
            {
                "section": "label", "case": "batch 1, 64 tokens", "ours": "sbs-edge:cpu-int8",
                "peer": "ctranslate2", "peer_variant": "label+eos", "ratio": ratio, "withheld": None,
            },
            {
                "section": "label", "case": "batch 1, 64 tokens", "ours": "sbs-edge:cpu-int8",
                "peer": "ctranslate2", "peer_variant": "one token", "ratio": None, "withheld": "worse answers",
            },
        ],
    }  # fmt: skip
