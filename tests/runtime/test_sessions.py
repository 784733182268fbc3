"""Graphs are opened when they are first needed, once, and what is wrong is said as early as it can be known."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.runtime.bundle import Bundle, seal
from sbs_edge.runtime.sessions import Sessions
from sbs_edge.runtime.student import Student


def opened(student: Student) -> set[str]:
    return set(student._sessions.opened)


def test_a_label_opens_no_more_than_the_label_scorer(tiny_bundle: Path) -> None:
    with Student.load(tiny_bundle, threads=1) as student:
        assert opened(student) == set()
        student.predict(["hot pump"])
        assert opened(student) == {"label_scorer"}
        student.predict(["hot pump"], labels=["hot", "cold"])
        assert opened(student) == {"label_scorer", "choice_scorer"}
        student.explain(["hot pump"], 2)
        assert opened(student) == {"label_scorer", "choice_scorer", "explainer"}
    assert opened(student) == set()


def test_warming_up_opens_what_it_is_asked_for(tiny_bundle: Path, open_bundle: Path) -> None:
    with Student.load(tiny_bundle, threads=1) as student:
        student.warm_up(["label"])
        assert opened(student) == {"label_scorer", "choice_scorer"}
        student.warm_up()
        assert opened(student) == {"label_scorer", "choice_scorer", "explainer"}
        with pytest.raises(UsageError, match="'labels'"):
            student.warm_up(["labels"])
    with Student.load(tiny_bundle, threads=1) as student:
        student.warm_up(["rationale"])
        assert opened(student) == {"explainer"}
    with Student.load(open_bundle, threads=1) as student:
        student.warm_up(["label"])  # an open label is generated
        assert opened(student) == {"explainer"}
    with Student.load(tiny_bundle, threads=1, eager=True) as student:
        assert opened(student) == {"label_scorer", "choice_scorer", "explainer"}


def test_threads_that_arrive_together_open_a_graph_once(tiny_bundle: Path, monkeypatch) -> None:
    import onnxruntime

    graphs: list[str] = []
    real = onnxruntime.InferenceSession

    def counted(*args: Any, **kwargs: Any) -> Any:
        session = real(*args, **kwargs)
        graphs.append(session.get_outputs()[0].name)
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    gate = threading.Barrier(8)

    def ask(number: int) -> Any:
        gate.wait()
        return student.predict(["hot pump"]) if number % 2 else student.explain(["hot pump"], 2)

    with Student.load(tiny_bundle, threads=1) as student, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert sorted(graphs) == ["scores", "tokens"]
    assert answers[0] == answers[2] == answers[4]
    assert answers[1] == answers[3] == answers[5]


def test_an_opener_that_fails_is_asked_again_and_holds_nobody_up() -> None:
    calls: list[int] = []

    def fails_once() -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise IntegrityError("no")
        return "session"

    sessions = Sessions({"label_scorer": fails_once, "explainer": lambda: pytest.fail("opened")})  # type: ignore[arg-type]
    with pytest.raises(IntegrityError):
        sessions["label_scorer"]
    assert sessions["label_scorer"] == sessions["label_scorer"] == "session"
    assert len(calls) == 2
    assert "explainer" in sessions
    assert len(sessions) == 2
    sessions.clear()
    assert list(sessions) == []
    with pytest.raises(KeyError):
        sessions["label_scorer"]


def test_a_refused_graph_is_said_at_load_to_who_is_eager(own_bundle: Path) -> None:
    (own_bundle / "cpu-fp32" / "explainer.onnx").write_bytes(
        b""
    )  # well-formed and empty: the runtime's to refuse
    seal(own_bundle, json.loads((own_bundle / "manifest.json").read_text()))
    with pytest.raises(IntegrityError, match="rejects the graph"):
        Student.load(own_bundle, threads=1, eager=True)
    with Student.load(own_bundle, threads=1) as student:
        assert student.predict(["hot pump"])[0].label in student.labels
        with pytest.raises(IntegrityError, match="rejects the graph"):
            student.explain(["hot pump"])


def test_an_absent_provider_is_said_at_load(own_bundle: Path) -> None:
    def elsewhere(entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "providers": ["NoSuchExecutionProvider"]}

    manifest = json.loads((own_bundle / "manifest.json").read_text())
    seal(own_bundle, {**manifest, "targets": {n: elsewhere(e) for n, e in manifest["targets"].items()}})
    with pytest.raises(UsageError, match="NoSuchExecutionProvider"):
        Student(Bundle.open(own_bundle))


def test_a_bundle_for_labels_alone_says_how_to_get_rationales(own_bundle: Path) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    for target, entry in manifest["targets"].items():
        del entry["explainer"]
        (own_bundle / target / "explainer.onnx").unlink()
    seal(own_bundle, manifest)
    with Student.load(own_bundle, threads=1) as student:
        student.warm_up()
        with pytest.raises(UsageError, match=r"labels alone.*with label_only=False"):
            student.explain(["hot pump"])
