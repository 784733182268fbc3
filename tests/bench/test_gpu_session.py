"""The GPU session, rehearsed on the CPU: every stage, and the results that survive a failing one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sbs_edge.bench.core.results import load_document
from sbs_edge.bench.gpu import session as gpu_session
from sbs_edge.bench.gpu import stages as gpu_stages
from sbs_edge.bench.report.docs import generate
from sbs_edge.bench.report.document import markdown_report
from sbs_edge.cli.app import main

torch = pytest.importorskip("torch")


def _session(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "sbs_edge", "bench", "gpu", "--device", "cpu", "--out", str(out)]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.long
def test_the_rehearsal_on_a_cpu_runs_every_stage(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    done = _session(tmp_path / "out", "--minutes", "8")
    assert done.returncode == 0, done.stderr + done.stdout
    document = load_document(tmp_path / "out" / "result.json")
    session = document["session"]
    assert [(s["stage"], s["state"]) for s in session["stages"]] == [(s, "done") for s in gpu_session.STAGES]
    assert session["matmul"][1]["together"] > 0
    verdicts = {(row["engine"], row["dtype"]): row["verdict"] for row in session["correctness"]}
    for engine in ("torch", "cublas", "triton"):
        assert verdicts[engine, "float32"] == verdicts[engine, "float16"] == "right"
    assert verdicts["torch", "bfloat16"] == "right"
    assert {row["scale"] for row in session["correctness"] if "scale" in row} == {1.0, 65536.0}
    assert {row["engine"] for row in session["sweep"] if "ms" in row} >= {"torch", "cublas"}
    assert {case["name"] for case in document["cases"]} == {case.name for case in gpu_stages.SMALL_CASES}
    # The GPU engines and Liger's kernels, in Triton's interpreter, through the whole bench.
    judged = {r["system"]: r["extra"] for r in document["rows"] if r["section"] == "gradient error"}
    assert set(judged) >= {"sbs-edge:torch", "sbs-edge:cublas", "sbs-edge:triton", "eager"}
    assert all(extra["wrong"] is None for extra in judged.values())
    assert session["train"]["kind"] == "train"
    assert session["train"]["rows"]
    (target,) = session["targets"]
    assert target["one label, ms"] > 0
    text = markdown_report(document)
    for title in ("Stages", "Bare matrix products", "Correctness on the device", "Training step on cpu"):
        assert title in text
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "session.json").write_text(json.dumps(document))
    assert "Bare matrix products" in generate(tmp_path / "results")


def test_a_stage_that_takes_too_long_or_fails_loses_nothing_of_the_others(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stage(name: str, device: str, where: Path, seconds: float) -> str:
        if name == "matmul":
            (where / "matmul.json").write_text(json.dumps([{"what": "N=1", "together": 1.5}]))
            return "ended after its 1 s; what it had found is kept"
        if name == "correctness":
            return "ended with -11: it said nothing"
        return "done"

    monkeypatch.setattr(gpu_session, "_run_stage", stage)
    document = gpu_session.run_session(out, "cpu", 1.0, ("matmul", "correctness", "sweep"))
    assert document["session"]["matmul"] == [{"what": "N=1", "together": 1.5}]
    states = {s["stage"]: s["state"] for s in document["session"]["stages"]}
    assert states == {
        "matmul": "ended after its 1 s; what it had found is kept",
        "correctness": "ended with -11: it said nothing",
        "sweep": "done",
    }
    assert load_document(out / "result.json") == document
    again = gpu_session.run_session(out, "cpu", 0.0, ("matmul",))
    assert again["session"]["stages"][0]["state"] == "not reached: the time was over"
    assert "matmul" not in again["session"], "an older session's figures were kept"


def test_a_stage_s_process_is_ended_at_its_limit_and_its_log_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session.sys, "executable", "/bin/sh")
    # `sh -P -m ...` refuses its options at once: a stage that fails before it begins.
    state = gpu_session._run_stage("matmul", "cpu", tmp_path, 30.0)
    assert state.startswith("ended with 2")
    assert (tmp_path / "matmul.log").read_text()


def test_a_wrong_engine_is_named_wrong(monkeypatch):
    from sbs_edge.bench.gpu import checks as gpu_checks
    from sbs_edge.kernels import cross_entropy

    real = cross_entropy.fused_linear_cross_entropy

    def stretched(*args, **options):
        found = real(*args, **options)
        return found._replace(total=found.total * 1.01)

    monkeypatch.setattr(gpu_checks, "SMALL_SHAPES", ((9, 8, 20),))
    right = gpu_checks.check_engines(torch.device("cpu"), True, lambda _: None)
    monkeypatch.setattr(cross_entropy, "fused_linear_cross_entropy", stretched)
    wrong = gpu_checks.check_engines(torch.device("cpu"), True, lambda _: None)
    mine = [row["verdict"] for row in right if row["engine"] == "torch"]
    assert mine == ["right"] * 6
    # 1 % is far above float32's and float16's error, and above twice bfloat16's.
    assert {row["verdict"] for row in wrong if row["engine"] == "torch"} == {"WRONG"}
    assert all(row["same bits again"] for row in right if row["engine"] == "torch")


def test_a_session_on_cuda_needs_a_cuda_device(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    assert main(["bench", "gpu", "--out", str(tmp_path)]) == 2
    assert "--device cpu rehearses" in " ".join(capsys.readouterr().err.split())
    assert (
        main(["bench", "gpu", "--out", str(tmp_path), "--device", "cpu", "--stages", "matmul,nothing"]) == 2
    )
    assert "found nothing" in " ".join(capsys.readouterr().err.split())
