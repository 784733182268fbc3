"""The kernel bench: who gets figures, who gets a reason, and who gets no speed-up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from sbs_edge.bench.core import tables
from sbs_edge.bench.core.compare import compare, conditions
from sbs_edge.bench.core.protocol import WorkerFailed
from sbs_edge.bench.core.results import load_document
from sbs_edge.bench.kernels import peers as kernel_peers
from sbs_edge.bench.kernels.bench import KernelOptions, _unusable, measure_kernels
from sbs_edge.bench.kernels.cases import Case
from sbs_edge.bench.kernels.peers import FLOOR, PEERS, Peer
from sbs_edge.bench.kernels.tables import kernel_tables
from sbs_edge.bench.kernels.worker import CaseRunner
from sbs_edge.bench.peers.system import Spec
from sbs_edge.bench.report import docs
from sbs_edge.bench.report.document import write_report
from sbs_edge.errors import UsageError

CASE = Case(24, 8, 50, padding=0.25)


class HereWorker:
    """The worker's commands in this process, with the protocol's failures."""

    def __init__(self, spec: Spec) -> None:
        self.runner, self.alive = CaseRunner(spec), True

    def ask(self, do: str, timeout_s: float = 300.0, **order: Any) -> dict[str, Any]:
        if not self.alive:
            raise WorkerFailed("the worker is gone")
        try:
            return json.loads(json.dumps(self.runner.answer({"do": do, **order})))
        except SystemExit as error:
            self.alive = False
            raise WorkerFailed("the worker killed by signal 11") from error
        except Exception as error:
            raise WorkerFailed(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self.alive = False


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _measure(peers: tuple[str, ...], case: Case = CASE, **more: Any) -> dict[str, Any]:
    options = KernelOptions([case], ("sbs-edge:torch", *peers), rounds=3, **more)
    return measure_kernels(options, start=HereWorker)


def _states(document: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(s["name"], s["variant"]): s["why"] for s in document["systems"]}


def _eager() -> Callable[[Any], Any]:
    return PEERS["eager"].prepare(torch.device("cpu"), torch.float32)


def test_every_loss_has_its_figures_on_both_batches():
    peers = ("eager", "torch-linear-ce", "torch-linear-ce-chunked", FLOOR)
    document = _measure(peers)
    assert _states(document) == {}
    found = {(r["section"], r["system"], r["variant"]): r for r in document["rows"]}
    assert len(found) == len(document["rows"]), "a row appears twice"
    sections = {
        "forward", "forward + backward", "share of roof", "extra memory", "extra memory, forward",
        "gradient error", "loss error",
    }  # fmt: skip
    for peer in ("sbs-edge:torch", *peers):
        for variant in ("padded", "compacted"):
            wanted = sections - ({"gradient error", "loss error"} if peer == FLOOR else set())
            assert {s for s, system, v in found if (system, v) == (peer, variant)} == wanted
            step = found["forward + backward", peer, variant]
            assert len(step["rounds"]) == 3
            assert step["extra"]["p20"] <= step["value"] <= step["extra"]["p80"]
            share = found["share of roof", peer, variant]["value"]
            roof = found["roof", "slice products", ""]["value"]
            assert share == pytest.approx(100 * 6 * 24 * 8 * 50 / (step["value"] / 1e3 * roof * 1e12))
    # One engine of ours against four others, three figures each (no memory ratio to the products), two batches.
    assert len(document["ratios"]) == 2 * (3 * 3 + 2)
    assert {item["peer_variant"] for item in document["ratios"]} == {"padded", "compacted"}


def test_logits_cast_to_float32_are_a_peer_of_their_own_below_it():
    document = _measure(("eager", "eager-fp32-logits"), Case(24, 8, 50, "bfloat16"))
    assert _states(document) == {}
    errors = {r["system"]: r["value"] for r in document["rows"] if r["section"] == "gradient error"}
    assert errors["eager-fp32-logits"] <= 2 * errors["eager"]
    document = _measure(("eager-fp32-logits",), Case(24, 8, 50))
    assert "the same as eager" in _states(document)["eager-fp32-logits", ""]


def test_autocast_gets_float32_weights_and_their_gradients_in_float32():
    case = Case(24, 8, 50, "amp-bfloat16", padding=0.25)
    document = _measure(("eager", "torch-linear-ce", FLOOR), case)
    states = _states(document)
    assert ("sbs-edge:torch", "padded") not in states
    assert ("eager", "compacted") not in states
    errors = {
        (r["system"], r["variant"]): r["extra"] for r in document["rows"] if r["section"] == "gradient error"
    }
    for variant in ("padded", "compacted"):
        assert 0 < errors["sbs-edge:torch", variant]["weight_rel_l2"] < 0.02
        assert errors["sbs-edge:torch", variant]["ignored_rows" if variant == "padded" else "loss"] < 0.02
    runner = CaseRunner(Spec("kernels", "", "", options={"case": case.as_dict(), "device": "cpu", "seed": 0}))
    runner.losses["eager"] = _eager()
    inputs = runner.inputs["padded"]
    assert (inputs.hidden.dtype, inputs.weight.dtype) == (torch.bfloat16, torch.float32)
    _, grad_hidden, grad_weight = runner.step("eager", inputs)
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    assert runner.forward(FLOOR, inputs).dtype == torch.bfloat16, "the products run in 16 bits"


class GraphWorker(HereWorker):
    """A device's worker, its steps run on the CPU; one loss cannot be captured."""

    started = 0

    def __init__(self, spec: Spec) -> None:
        spec.options["device"] = "cpu"
        super().__init__(spec)
        GraphWorker.started += 1

    def ask(self, do: str, timeout_s: float = 300.0, **order: Any) -> dict[str, Any]:
        if do == "graph":
            if order["peer"] == "eager":
                raise WorkerFailed("RuntimeError: CUDA error: operation not permitted in a capture")
            do, order = "time", {**order, "what": "step", "warm": 1}
        return super().ask(do, timeout_s, **order)


def test_who_cannot_be_captured_keeps_its_other_figures():
    GraphWorker.started = 0
    cases = [Case(24, 8, 50), Case(16, 8, 50)]
    options = KernelOptions(cases, ("sbs-edge:torch", "eager", FLOOR), "cuda", rounds=3, graph_cases=1)
    document = measure_kernels(options, start=GraphWorker)
    assert GraphWorker.started == 3, "a process for each case, and a new one after the failed capture"
    section = "forward + backward, CUDA graph"
    captured = {(r["system"], r["case"]): r for r in document["rows"] if r["section"] == section}
    assert set(captured) == {("sbs-edge:torch", cases[0].name), (FLOOR, cases[0].name)}
    assert all(len(row["rounds"]) == 3 for row in captured.values())
    timed = {r["system"] for r in document["rows"] if r["section"] == "forward + backward"}
    assert timed == {"sbs-edge:torch", "eager", FLOOR}
    (state,) = document["systems"]
    assert (state["name"], state["status"], state["case"]) == ("eager", "no CUDA graph", cases[0].name)
    assert "in a capture" in state["why"]
    found = {t.title: t for t in kernel_tables(document)}
    at = found[f"cuda, {cases[0].name}"].columns.index("as a CUDA graph, ms")
    shown = {row[0]: row[at] for row in found[f"cuda, {cases[0].name}"].rows}
    assert shown["eager"] == "–"
    assert shown["sbs-edge:torch"] != "–"
    assert "as a CUDA graph, ms" not in found[f"cuda, {cases[1].name}"].columns


def test_gradients_are_not_counted_as_extra_memory_of_a_gpu():
    case = Case(32, 8, 4096)
    runner = CaseRunner(Spec("kernels", "", "", options={"case": case.as_dict(), "device": "cpu", "seed": 0}))
    runner.losses["eager"] = _eager()

    class Counters:
        """Torch's allocator: 100 MiB held, 200 MiB at most; 300 MiB reserved, then 450."""

        def __getattr__(self, name: str) -> Any:
            figures = {"memory_allocated": 100, "max_memory_allocated": 200}
            figures |= {"memory_reserved": 300, "max_memory_reserved": 450}
            return lambda *_: figures.get(name, 0) << 20

    class Torch:
        cuda = Counters()

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    runner.torch = Torch()
    found = runner._gpu_memory("eager", runner.inputs[""])
    gradients = (32 * 8 + 4096 * 8) * 4 / 2**20
    assert found == {
        "forward": 100.0, "forward_reserved": 150.0, "step": 100.0 - gradients, "step_reserved": 150.0
    }  # fmt: skip


class _Stretched(torch.autograd.Function):
    """The identity, with a gradient that is 1 % too long."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def test_a_wrong_gradient_prints_no_speed_up(monkeypatch):
    eager = _eager()
    monkeypatch.setitem(
        kernel_peers.PEERS, "wrong", Peer("", lambda *_: lambda x: _Stretched.apply(eager(x)))
    )
    monkeypatch.setitem(kernel_peers.PEERS, "biased", Peer("", lambda *_: lambda x: eager(x) + 1e-3))
    document = _measure(("eager", "wrong", "biased"))
    withheld = {(r["peer"], r["section"]): (r["ratio"], r["withheld"]) for r in document["ratios"]}
    for section in ("forward", "forward + backward", "extra memory"):
        assert withheld["eager", section][0]["value"] > 0
        for peer, what in (("wrong", "its dX"), ("biased", "its loss")):
            ratio, why = withheld[peer, section]
            assert ratio is None
            assert what in why
            assert "plain torch's error" in why
    timed = {r["system"] for r in document["rows"] if r["section"] == "forward + backward"}
    assert timed == {"sbs-edge:torch", "eager", "wrong", "biased"}
    (table, reasons) = kernel_tables(document)
    cells = {row[0]: row[-1] for row in table.rows}
    assert cells["wrong, padded"] == cells["biased, compacted"] == "withheld"
    assert cells["eager, padded"] not in ("withheld", "–")
    assert {row[1] for row in reasons.rows} == {"no speed-up"}


def test_an_engine_of_ours_that_is_wrong_gets_no_ratio_either(monkeypatch):
    eager = _eager()
    monkeypatch.setitem(
        kernel_peers.PEERS, "sbs-edge:torch", Peer("", lambda *_: lambda x: _Stretched.apply(eager(x)))
    )
    document = _measure(("eager",))
    assert document["ratios"]
    assert all(item["ratio"] is None for item in document["ratios"])


def test_peers_that_fail_are_rows_that_say_why(monkeypatch):
    eager = _eager()

    def absent(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'nowhere'")

    def fails_without_gradient(x: Any) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError("needs a gradient")
        return eager(x)

    calls = []

    def dies_when_timed(x: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise SystemExit(1)
        return eager(x)

    monkeypatch.setitem(kernel_peers.PEERS, "absent", Peer("", absent))
    monkeypatch.setitem(kernel_peers.PEERS, "half", Peer("", lambda *_: fails_without_gradient))
    monkeypatch.setitem(kernel_peers.PEERS, "dies", Peer("", lambda *_: dies_when_timed))
    monkeypatch.setitem(
        kernel_peers.PEERS, "nan", Peer("", lambda *_: lambda x: eager(x) * torch.tensor(float("nan")))
    )
    case = Case(24, 8, 50)
    document = _measure(("absent", "half", "dies", "nan", "cce", "eager"), case)
    states = _states(document)
    assert "No module named 'nowhere'" in states["absent", ""]
    assert "needs a gradient" in states["half", ""]
    assert "killed by signal" in states["dies", ""]
    assert "NVIDIA GPUs only" in states["cce", ""]
    assert "off by nan" in states["nan", ""]
    timed = {r["system"] for r in document["rows"] if r["section"] == "forward + backward"}
    assert timed == {"sbs-edge:torch", "eager", "nan"}
    json.dumps(document, allow_nan=False)
    rows = {row[0]: row[1] for row in kernel_tables(document)[1].rows}
    assert rows["dies"] == "failed"
    assert rows["nan"] == "no speed-up"


def test_a_device_error_means_a_new_process_but_a_lack_of_memory_does_not():
    assert _unusable("RuntimeError: CUDA error: an illegal memory access was encountered")
    assert not _unusable("OutOfMemoryError: CUDA out of memory. Tried to allocate 30 GiB")
    assert not _unusable("RuntimeError: shapes do not fit")


def test_cases_the_time_does_not_reach_are_rows_that_say_so():
    options = KernelOptions([CASE], ("eager",), minutes=0.0)
    document = measure_kernels(options, start=HereWorker)
    (state,) = document["systems"]
    assert state["case"] == CASE.name
    assert "the time was over" in state["why"]
    assert document["rows"] == []


def test_a_document_is_read_compared_shown_and_generated(tmp_path):
    pytest.importorskip("matplotlib")
    document = _measure(("eager",))
    saved: list[int] = []
    options = KernelOptions([CASE, Case(8, 8, 50)], ("eager",), rounds=3)
    measure_kernels(options, start=HereWorker, save=lambda part: saved.append(len(part["cases"])))
    assert saved == [1, 2]
    names = {path.name for path in write_report(document, tmp_path / "out")}
    assert {"result.json", "result.md", "result.html"} < names
    assert sum(name.startswith("pareto-") for name in names) == 1
    again = load_document(tmp_path / "out" / "result.json")
    assert again == document
    changes = compare(document, again)
    assert {c.system for c in changes} == {"sbs-edge:torch", "eager", "slice products"}
    assert all(c.verdict == "within tolerance" for c in changes)
    assert conditions(document, again) == []
    slower = json.loads(json.dumps(document))
    for row in again["rows"]:  # rounds that agree: how steady this machine is is no matter here
        row["rounds"] = [row["value"]] * len(row["rounds"])
    for row in slower["rows"]:
        row["value"] *= 2
        row["rounds"] = [row["value"]] * len(row["rounds"])
    worse = {c.section for c in compare(again, slower) if c.verdict == "worse"}
    assert {"forward", "forward + backward", "gradient error"} <= worse
    assert "share of roof" not in worse  # more of it is better
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "kernels.json").write_text(json.dumps(document))
    text = docs.generate(results)
    assert tables.headline(document) in text
    assert f"cpu, {CASE.name}" in text
    assert "Source: `bench/results/kernels.json`" in text


def test_two_results_of_different_shapes_are_both_shown(tmp_path):
    for name, case in (("a", CASE), ("b", Case(8, 8, 50))):
        (tmp_path / f"{name}.json").write_text(json.dumps(_measure(("eager",), case)))
    text = docs.generate(tmp_path)
    assert "`bench/results/a.json`" in text
    assert "`bench/results/b.json`" in text


def test_unknown_peers_are_refused():
    with pytest.raises(UsageError, match="nobody"):
        kernel_peers.names_for("eager,nobody")
    with pytest.raises(UsageError, match="nobody"):
        _measure(("nobody",))
    assert kernel_peers.names_for("eager")[-1] == "eager"
    assert "torch-compile" not in kernel_peers.names_for("all", quick=True)


def test_the_command_measures_in_processes_of_their_own(
    sbs_edge_cli: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    done = sbs_edge_cli(
        "bench", "kernels", "--quick", "--device", "cpu", "--threads", "1", "--peers", "quack",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert document == load_document(tmp_path / "out" / "result.json")
    timed = {r["system"] for r in document["rows"] if r["section"] == "forward + backward"}
    assert timed == {"sbs-edge:torch"}
    assert "NVIDIA GPUs only" in _states(document)["quack", ""]
    (case,) = document["cases"]
    assert case["facts"]["auto"] == "sbs-edge:torch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2"], "triples"),
        (["--shapes", "a,b,c"], "whole numbers"),
        (["--dtype", "int8"], "dtype takes"),
        (["--padding", "100"], "below 100"),
        (["--data", "student"], "needs a student"),
        (["--peers", "nobody"], "found nobody"),
        (["--device", "tpu"], "--device takes"),
    ],
)
def test_the_command_refuses_what_it_cannot_measure(arguments, message):
    from typer.testing import CliRunner

    from sbs_edge.cli.app import app

    done = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)
