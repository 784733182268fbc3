"""The commands end to end on a tiny model: structure and sanity, never a limit on time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from sbs_edge.bench.core.results import Row, load_document
from sbs_edge.bench.latency.bench import LatencyOptions, set_up
from sbs_edge.bench.latency.quality import withheld
from sbs_edge.bench.latency.ratios import ratios
from sbs_edge.bench.latency.workers import Benchmark, Entry, Inputs
from sbs_edge.bench.training.bench import largest_difference
from sbs_edge.bench.training.stream_rows import slope_mb
from sbs_edge.cli.app import main
from sbs_edge.errors import UsageError

Cli = Callable[..., "CompletedProcess[str]"]


def _benchmark(mine: float, other: float) -> tuple[Benchmark, list[Row]]:
    ours = Entry("sbs-edge:cpu-int8", None, facts={"quality": {"label accuracy": mine}})
    peer = Entry("ctranslate2", None, facts={"quality": {"label accuracy": other}})
    inputs = Inputs([], len, [], random_weights=False, max_source_tokens=64, seed=0)
    rows = [
        Row("label", ours.name, "label", "batch 1", "ms", "lower", 5.0, [5.0, 5.0]),
        Row("label", peer.name, "label+eos", "batch 1", "ms", "lower", 10.0, [10.0, 10.0]),
    ]
    return Benchmark([ours, peer], inputs, {}), rows


def test_a_fast_wrong_answer_prints_no_speed_up() -> None:
    (fine,) = ratios(*_benchmark(90.0, 90.5))
    assert fine.ratio is not None
    assert fine.ratio["value"] == 2.0
    (wrong,) = ratios(*_benchmark(50.0, 90.0))
    assert wrong.ratio is None
    assert wrong.withheld is not None
    assert "50.0 % right against 90.0 %" in wrong.withheld
    unknown = Entry("sbs-edge:cpu-int8", None)
    assert withheld(unknown, unknown, False) == "the accuracy of its answers is unknown"


def test_a_share_of_ones_own_capacity_is_not_compared() -> None:
    benchmark, _ = _benchmark(90.0, 90.0)
    rows = [
        Row("open_loop", entry.name, "", case, "ms", "lower", 5.0, [5.0, 5.0])
        for entry in benchmark.entries
        for case in ("50% of its capacity", "common rate")
    ]
    assert [row.case for row in ratios(benchmark, rows)] == ["common rate"]


def test_the_full_depth_is_compared_with_itself_and_a_shallower_student_with_both() -> None:
    shallow, _ = _benchmark(90.0, 90.0)
    full, _ = _benchmark(90.0, 90.0)
    for entry in full.entries:
        entry.name, entry.golds = f"{entry.name} (full)", ["a"]
    entries = [*shallow.entries, *full.entries]
    rows = [Row("label", entry.name, "label", "batch 1", "ms", "lower", 5.0, [5.0]) for entry in entries]
    pairs = {(row.ours, row.peer) for row in ratios(Benchmark(entries, shallow.inputs, {}), rows)}
    assert pairs == {
        ("sbs-edge:cpu-int8", "ctranslate2"), ("sbs-edge:cpu-int8", "ctranslate2 (full)"),
        ("sbs-edge:cpu-int8 (full)", "ctranslate2 (full)"),
    }  # fmt: skip


def test_numbers_of_layers_need_a_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sbs_edge.bench.latency.bench.read_manifest", lambda _: {})
    with pytest.raises(UsageError, match="give a shape, or leave them out"):
        set_up(LatencyOptions(bundles=(tmp_path,), decoder_layers=2), lambda _: None)


@pytest.mark.long
def test_a_shallower_shape_is_measured_beside_its_full_depth(sbs_edge_cli: Cli, tmp_path: Path) -> None:
    for package in ("ctranslate2", "transformers", "onnx", "matplotlib"):
        pytest.importorskip(package)
    done = sbs_edge_cli(
        "bench", "latency", "--shape", "tiny", "--encoder-layers", "3", "--decoder-layers", "1", "--quick",
        "--against", "ctranslate2", "--out", tmp_path / "out", XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert document["model"]["shape"] == "tiny at 3/1 layers"
    assert (document["model"]["config"]["num_layers"], document["model"]["config"]["num_decoder_layers"]) == (
        3,
        1,
    )
    states = {system["name"]: system["why"] for system in document["systems"]}
    full = ("sbs-edge:cpu-int8 (full depth, 2/2)", "ctranslate2 (full depth, 2/2)")
    assert {name: states[name] for name in full} == dict.fromkeys(full, "")
    quality = {system["name"]: system["quality"] for system in document["systems"]}
    for name in full:  # judged by the labels of their own weights, which are other weights than the student's
        assert quality[name]["label accuracy"] >= 95
        assert set(quality[name]) == {"label accuracy"}
        measured = {row["section"] for row in document["rows"] if row["system"] == name}
        assert measured == {"quality", "label", "rationale", "disk", "installed"}
    pairs = {(row["ours"], row["peer"]) for row in document["ratios"] if row["section"] == "label"}
    assert pairs == {("sbs-edge:cpu-int8", "ctranslate2"), ("sbs-edge:cpu-int8", full[1]), full}


def test_a_bundle_alone_is_told_where_its_student_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sbs_edge.bench.latency.bench.read_manifest", lambda _: {})
    with pytest.raises(UsageError, match=r"is not next to it .*give the student directory"):
        set_up(LatencyOptions(bundles=(tmp_path,)), lambda _: None)


def test_a_shape_without_transformers_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails, as where it is absent
    assert main(["bench", "latency", "--shape", "tiny"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "A random student needs the package 'transformers'" in said
    assert "pip install 'sbs-edge[bench]'" in said


@pytest.mark.long
def test_latency_smoke(sbs_edge_cli: Cli, tmp_path: Path) -> None:
    for package in ("ctranslate2", "transformers", "onnx", "matplotlib"):
        pytest.importorskip(package)
    out = tmp_path / "out"
    done = sbs_edge_cli(
        "bench", "latency", "--shape", "tiny", "--quick", "--against", "ctranslate2,onnxruntime-int8",
        "--out", out, XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert document == load_document(out / "result.json")
    states = {system["name"]: system["why"] for system in document["systems"]}
    smaller = "sbs-edge:cpu-int8 (label only)", "sbs-edge:cpu-int8 (label only, input vocabulary pruned)"
    pruned = "sbs-edge:cpu-int8 (vocabulary pruned)", "sbs-edge:cpu-int4 (vocabulary pruned)"
    assert states == dict.fromkeys(
        ("sbs-edge:cpu-int8", *smaller, *pruned, "ctranslate2", "onnxruntime-int8"), ""
    )
    sections = {row["section"] for row in document["rows"] if row["system"] == "sbs-edge:cpu-int8"}
    assert sections == {
        "quality", "label", "rationale", "throughput", "open_loop", "cold_start", "memory", "disk", "installed",
    }  # fmt: skip
    for name in smaller:
        found = {row["section"] for row in document["rows"] if row["system"] == name}
        assert found == {"quality", "cold_start", "memory", "disk", "installed"}
    for name in pruned:
        found = {row["section"] for row in document["rows"] if row["system"] == name}
        assert found == {"quality", "rationale", "disk", "installed"}
    rows: dict[Any, Any] = {
        (row["section"], row["system"], row["variant"], row["case"]): row for row in document["rows"]
    }
    assert len(rows) == len(document["rows"]), "a row appears twice"
    for row in document["rows"]:
        assert row["value"] > 0 or row["section"] == "quality" or row["variant"] == "a token", row
    label = rows["label", "sbs-edge:cpu-int8", "label", "batch 1, 32 tokens"]
    assert label["extra"]["tokens"] == 32
    sizes = [rows["disk", name, "label alone", "files"]["value"] for name in ("sbs-edge:cpu-int8", *smaller)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    vocabularies = {
        system["name"]: system["vocabulary"] for system in document["systems"] if "vocabulary" in system
    }
    assert set(vocabularies) == {smaller[1], *pruned}
    words = {name: (found["tokens"], found["tokens_of_the_student"]) for name, found in vocabularies.items()}
    assert words[smaller[1]][0] < words[smaller[1]][1]
    # One that also writes rationales keeps what these hold, which of so small a vocabulary may be all.
    assert all(kept <= whole for kept, whole in words.values())
    assert len(label["rounds"]) == 2
    assert label["extra"]["p50"] <= label["extra"]["p90"] <= label["extra"]["p99"]
    assert rows["label", "ctranslate2", "one token", "batch 8, 16 tokens"]["extra"]["n"] >= 2
    assert document["machine"]["cpu"]
    assert document["versions"]["ctranslate2"]
    text = (out / "result.md").read_text()
    assert "sbs-edge:cpu-int8 against each peer" in text
    config = sbs_edge_cli("bench", "compare", out / "result.json", out / "result.json", "--json")
    assert config.returncode == 0
    assert json.loads(config.stdout)["worse"] == 0


def test_latency_refuses_what_it_cannot_measure(sbs_edge_cli: Cli, tmp_path: Path) -> None:
    for arguments, message in (
        ([], "Give either bundles to measure or a shape"),
        ([str(tmp_path / "nowhere")], "nowhere is not a bundle: there is no such directory"),
        (["--shape", "giant"], "no shape 'giant'"),
        (["--shape", "tiny", "--sources", "a"], "--sources takes whole numbers"),
    ):
        done = sbs_edge_cli("bench", "latency", *arguments, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 2, done.stderr
        assert message in " ".join(done.stderr.split())


@pytest.mark.long
def test_train_smoke(sbs_edge_cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = sbs_edge_cli(
        "bench", "train", "--shape", "tiny", "--examples", "8", "--batch-size", "4", "--steps", "5",
        "--rounds", "2", "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    (curves,) = document["losses"].values()
    assert set(curves) >= {"sbs-edge", "two-forward"}
    assert len(curves["sbs-edge"]) == 5
    assert largest_difference(curves["sbs-edge"], curves["two-forward"]) < 1e-5
    assert curves["sbs-edge"][-1] != curves["sbs-edge"][0], "nothing was learnt"
    assert all(item["verdict"] == "equal within float noise" for item in document["loss_curves"])
    mine = {row["section"]: row["value"] for row in document["rows"] if row["system"] == "sbs-edge"}
    assert {"step", "epoch", "rate", "token_rate", "peak_memory"} <= {k.replace(" ", "_") for k in mine}
    assert document["padding"]
    assert (tmp_path / "out" / "result.html").is_file()


def test_a_loss_curve_is_judged_by_its_largest_relative_difference() -> None:
    assert largest_difference([2.0, 1.0], [2.0, 1.1]) == pytest.approx(0.1 / 1.1)


def test_streamed_rows_are_counted_and_too_much_memory_is_exit_1(sbs_edge_cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = sbs_edge_cli(
        "bench", "stream-rows", "--rows", "1001", "--max-rss-mb", "1", "--out", tmp_path / "out"
    )
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert document == json.loads((tmp_path / "out" / "result.json").read_text())
    assert (document["rows"], document["steps"], document["max_rss_mb"]) == (1001, 3, 1.0)
    assert document["rss_mb"][-1][0] == 1001
    assert "| 1,001 |" in (tmp_path / "out" / "result.md").read_text()


def test_growth_of_memory_is_a_least_squares_slope() -> None:
    assert slope_mb([(0, 1.0), (500_000, 1.0), (1_000_000, 4.0)]) == pytest.approx(3.0)
    assert slope_mb([(7, 5.0)]) == 0.0


def test_every_benchmark_has_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "latency",
        "train",
        "kernels",
        "serving",
        "scale",
        "stream-rows",
        "long",
        "gpu",
        "compare",
        "docs",
    ):
        assert f" {name} " in shown
