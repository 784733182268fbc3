"""Every peer against PyTorch on the same weights, and what a worker does when things go wrong."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbs_edge.bench.core import footprint
from sbs_edge.bench.core.protocol import Worker, WorkerFailed
from sbs_edge.bench.core.worker import open_loop, timed
from sbs_edge.bench.peers.convert import ConversionFailed, converted, digest
from sbs_edge.bench.peers.system import Spec, System, load_module


def _spec(system: str, artifact: Path, student: Path) -> Spec:
    card = json.loads((student / "sbs_edge.json").read_text())
    return Spec(system, str(artifact), str(student), labels=card["task"]["labels"], prefixes=card["prefixes"])


def _open(system: str, artifact: Path, student: Path) -> System:
    made: System = load_module(system).SYSTEM(_spec(system, artifact, student))
    made.open()
    return made


@pytest.fixture(scope="module")
def rows(tiny_student: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tiny_student / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def eager(tiny_student: Path) -> System:
    return _open("transformers", tiny_student, tiny_student)


def test_a_random_students_gold_labels_are_its_own_answers_and_are_spread(
    eager: System, rows: list[dict[str, Any]]
) -> None:
    gold = [row["label"] for row in rows]
    assert eager.restricted([row["input"] for row in rows]) == gold
    counts = [gold.count(label) for label in eager.spec.labels]
    assert min(counts) >= 0.1 * len(gold)


def test_plain_graphs_generate_what_pytorch_generates(
    eager: System, rows: list[dict[str, Any]], tiny_student: Path, tmp_path: Path
) -> None:
    """fp32, other batch sizes and lengths than the traced ones, with padding."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from sbs_edge.bench.peers.plain_graphs import GRAPHS, export_plain, greedy

    layers = export_plain(tiny_student, tmp_path)
    sessions = {name: onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx")) for name in GRAPHS}

    def run(name: str, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        wanted = {item.name for item in sessions[name].get_inputs()}
        found: list[np.ndarray] = sessions[name].run(None, {k: v for k, v in feed.items() if k in wanted})
        return found

    ids = eager.encode([row["input"] for row in rows[:5]], "rationale")
    tokens, mask = eager.padded(ids)
    found, logits = greedy(run, tokens, mask, layers=layers, steps=24, start=0, eos=1)
    assert [eager.cut(row) for row in found.tolist()] == eager.generate(ids, 24)
    judge = eager.first_logits(ids)
    assert judge is not None
    np.testing.assert_allclose(logits, judge, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("system", "least"),
    [
        ("ctranslate2", 0.9),
        # Per-tensor activations on random weights: the bench shows what that costs. Chance is a third.
        ("onnxruntime-int8", 0.4),
        pytest.param("openvino", 0.9, marks=pytest.mark.long),
        pytest.param("optimum", 0.4, marks=[pytest.mark.long, pytest.mark.optimum]),
    ],
)
def test_a_converted_peer_answers_like_pytorch(
    system: str, least: float, eager: System, rows: list[dict[str, Any]], tiny_student: Path, own_cache: Path
) -> None:
    try:
        artifact = converted(system, tiny_student, digest(tiny_student))
    except ConversionFailed as failure:
        pytest.skip(f"{system}: {failure}")
    assert artifact.is_relative_to(own_cache)
    stamp = (artifact / "conversion.json").stat().st_mtime_ns
    assert converted(system, tiny_student, digest(tiny_student)) == artifact
    assert (artifact / "conversion.json").stat().st_mtime_ns == stamp, "converted twice"
    peer = _open(system, artifact, tiny_student)
    texts = [row["input"] for row in rows]
    found = peer.restricted(texts)
    assert found is not None
    right = np.mean([a == row["label"] for a, row in zip(found, rows, strict=True)])
    assert right >= least
    # Every batching setting answers every request, in the order of the requests.
    first = eager.label(texts[:12], "label+eos")
    for setting in peer.settings():
        peer.apply(setting)
        answers = peer.stream(texts[:12], setting)
        assert len(answers) == 12
        if least == 0.9:
            assert np.mean([a == b for a, b in zip(answers, first, strict=True)]) >= 0.75
    assert [count for _, count in peer.rationale(texts[:2], 9)] == [9, 9]


def test_a_peer_that_is_not_installed_says_so(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_module("ctranslate2")
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    with pytest.raises(ConversionFailed, match="not installed: no-such-package"):
        converted("ctranslate2", tiny_student, "0")


def test_a_failed_conversion_gives_its_cause(tmp_path: Path, own_cache: Path) -> None:
    pytest.importorskip("ctranslate2")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    with pytest.raises(ConversionFailed) as caught:
        converted("ctranslate2", tmp_path / "student", "0")
    assert str(caught.value).strip()
    assert not list(own_cache.glob("**/conversion.json"))


# -- workers ------------------------------------------------------------------------------------------


def test_a_worker_is_pinned_and_reports_errors_and_lives_on(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    spec = Spec("sbs-edge:cpu-int8", str(tmp_path / "absent"), str(tmp_path), cpus=[cpu])
    with Worker(spec) as worker:
        with pytest.raises(WorkerFailed, match="first command must be 'open'"):
            worker.ask("memory")
        assert os.sched_getaffinity(worker.pid) == {cpu}
        with pytest.raises(WorkerFailed, match="absent"):
            worker.ask("open")


def test_a_worker_that_dies_names_its_last_words(tmp_path: Path) -> None:
    spec = Spec("no-such-system", "", str(tmp_path))
    with Worker(spec, "sbs_edge.no_such_module") as worker, pytest.raises(WorkerFailed) as caught:
        worker.ask("open")
    assert "exited with 1" in str(caught.value)
    assert "no_such_module" in str(caught.value)


def test_a_worker_over_its_limit_is_ended(eager: System) -> None:
    with Worker(eager.spec) as worker:
        with pytest.raises(WorkerFailed, match=r"more than 0\.05 s"):
            worker.ask("open", timeout_s=0.05)
        with pytest.raises(ProcessLookupError):
            os.kill(worker.pid, 0)


def test_timed_counts_what_it_should() -> None:
    calls: list[int] = []
    found = timed(lambda: calls.append(1), seconds=0.0, least=3, warm=2)
    assert (len(found), len(calls)) == (3, 5)
    naps = timed(lambda: time.sleep(0.002), seconds=0.02, least=1)
    assert min(naps) >= 2_000_000


def test_the_open_loop_measures_from_arrival_not_from_start() -> None:
    """A server of 10 ms a request, three requests at once, one at a time: 10, 20 and 30 ms."""
    found, left = open_loop(lambda picks: time.sleep(0.01 * len(picks)), [0.0, 0.0, 0.0], 1, 5.0)
    assert left == 0
    assert [round(ns / 1e6) >= at for ns, at in zip(found, (10, 20, 30), strict=True)] == [True] * 3
    _, left = open_loop(lambda picks: time.sleep(0.2), [0.0] * 50, 1, 0.1)
    assert left > 40


# -- footprint ----------------------------------------------------------------------------------------


def test_peak_memory_follows_what_was_touched() -> None:
    before = footprint.memory_mb()
    block = np.ones(40_000_000, dtype=np.uint8)
    during = footprint.memory_mb()
    assert during["anonymous_rss_mb"] - before["anonymous_rss_mb"] >= 0.9 * block.nbytes / 1e6
    assert during["peak_rss_mb"] >= during["rss_mb"] * 0.99


def test_installed_size_counts_the_closure_once_and_agrees_with_the_files() -> None:
    names = footprint.closure({"sbs-edge": ()})
    assert {"sbs-edge", "numpy", "tokenizers", "typer"} <= set(names)
    assert not {"torch", "transformers", "onnxruntime"} & set(names), "the base install grew"
    sizes = footprint.installed_bytes(names)
    import numpy

    on_disk = sum(
        path.stat().st_size
        for path in Path(numpy.__file__).parent.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    )
    assert on_disk <= sizes["numpy"] <= 2.5 * on_disk
