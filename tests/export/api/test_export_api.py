"""Export end to end: what the bundle answers, what is refused, and that refusals change nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sbs_edge.analysis.reliability import expected_calibration_error
from sbs_edge.data.example import Example
from sbs_edge.errors import DataError, GuardError, UsageError
from sbs_edge.export import assemble, job
from sbs_edge.export.api import export
from sbs_edge.export.check.calibrate import calibrate, fit_temperature
from sbs_edge.runtime.bundle import Bundle
from sbs_edge.runtime.student import Student


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_trained_student_keeps_its_answers(trained, tmp_path: Path, rows) -> None:
    student, tiny = trained
    result = export(student, tmp_path / "bundle", targets=("cpu-int8", "cpu-fp32"))
    assert result.report["pytorch"]["max_relative_error"] < 1e-4
    unseen = rows(50, seed=9)
    for target in ("cpu-int8", "cpu-fp32"):
        with Student.load(result.path, target, threads=1) as loaded:
            labels = [answer.label for answer in loaded.predict([row["input"] for row in unseen])]
            expected = [
                max(("stay", "go", "wait"), key=lambda name, r=row: first_logit(tiny, r, name))
                for row in unseen
            ]
            assert labels == expected
            assert loaded.explain(["hot pump"])[0].complete
        figures = result.manifest["targets"][target]["accuracy"]
        assert figures["n"] == 60
        assert figures["label_agreement"] > 0.95
    card = (result.path / "README.md").read_text()
    assert "cpu-int8" in card
    assert "temperature" in card
    assert result.manifest["calibration"]["n"] == 60


def first_logit(tiny, row: dict, label: str) -> float:
    return float(tiny.logits(row["input"])[0, tiny.tokenizer.encode(label).ids[0]])


def test_the_guard_refuses_and_keeps_the_old_bundle(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _ = trained
    export(student, tmp_path / "bundle", targets=("cpu-fp32",))
    before = listing(tmp_path / "bundle")

    class Coarse(assemble.Int8):
        """An int8 so crude that answers change."""

        def linear(self, graph, x, weight, *, norm, site=None, relu=False):
            step = np.abs(weight).max() / 1.2
            coarse = (np.rint(weight / step) * step).astype(np.float32)
            return super().linear(graph, x, coarse, norm=norm, site=site, relu=relu)

    monkeypatch.setattr(assemble, "Int8", Coarse)
    with pytest.raises(
        GuardError, match=r"Nothing.*keep_float=\['(encoder|decoder|lm_head|shared)"
    ) as caught:
        export(student, tmp_path / "bundle", targets=("cpu-int8",), max_drop=1.0)
    assert caught.value.exit_code == 3
    assert listing(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    # A limit that allows any loss of accuracy does not allow worse rationales.
    with pytest.raises(
        GuardError, match=r"next token in .* % of the steps.*Nothing.*keep_float=.*label_only=True"
    ) as caught:
        export(student, tmp_path / "bundle", targets=("cpu-int8",), max_drop=100.0)
    assert caught.value.exit_code == 3
    assert listing(tmp_path / "bundle") == before
    labels = export(student, tmp_path / "labels", targets=("cpu-int8",), max_drop=100.0, label_only=True)
    assert "rationale_next_token_agreement" not in labels.manifest["targets"]["cpu-int8"]["accuracy"]
    accepted = {"max_drop": 100.0, "min_rationale_agreement": 0.0}
    result = export(student, tmp_path / "bundle", targets=("cpu-int8",), **accepted)
    assert result.manifest["targets"]["cpu-int8"]["accuracy"]["rationale_next_token_agreement"] < 0.9
    assert listing(tmp_path / "bundle") != before


def test_kept_layers_are_float(trained, tmp_path: Path) -> None:
    import onnx

    student, _ = trained
    counts = {}
    for keep in (
        (),
        ("encoder.block.0",),
        ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
    ):
        export(student, tmp_path / "b", targets=("cpu-int8",), keep_float=keep)
        graph = onnx.load(str(tmp_path / "b/cpu-int8/label_scorer.onnx"), load_external_data=False).graph
        counts[len(keep)] = sum(node.op_type == "MatMulIntegerToFloat" for node in graph.node)
    assert counts[0] > counts[1] > counts[4] == 0
    with pytest.raises(UsageError, match=r"no layer 'encoder\.block\.7'"):
        export(student, tmp_path / "b", keep_float=("encoder.block.7",))


def test_fewer_tokens_to_write(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, _ = trained
    export(student, tmp_path / "whole", targets=("cpu-fp32",))
    result = export(student, tmp_path / "pruned", targets=("cpu-fp32",), prune_vocabulary=True)
    assert result.manifest["targets"]["cpu-fp32"]["quantisation"]["output_tokens"] > 0
    assert result.manifest["pruning"]["rationale_token_agreement"] == 1.0
    assert "The smaller vocabulary alone" in (tmp_path / "pruned" / "README.md").read_text()
    texts = ["hot pump", "cold door fan", "ice"]
    with Student.load(tmp_path / "whole") as whole, Student.load(tmp_path / "pruned") as pruned:
        assert whole.explain(texts) == pruned.explain(texts)
    # A vocabulary too small to write the rationales is refused.
    monkeypatch.setattr(job, "output_tokens", lambda *_: np.array([1, 3, 4], np.int64))
    before = listing(tmp_path / "pruned")
    for targets in (("cpu-fp32",), ("cpu-int8",), ("cpu-int4", "cpu-fp32")):
        with pytest.raises(GuardError, match=r"pruned vocabulary.*rationales' tokens.*prune_vocabulary"):
            export(student, tmp_path / "pruned", targets=targets, prune_vocabulary=True)
        assert listing(tmp_path / "pruned") == before


def test_rows_of_the_users_own(trained, tmp_path: Path) -> None:
    student, _ = trained
    own = [
        Example(str(i), text, label)
        for i, (text, label) in enumerate([("hot fan", "stay"), ("cold fan", "go")])
    ]
    result = export(student, tmp_path / "b", targets=("cpu-fp32",), guard_data=own)
    assert result.manifest["calibration"]["n"] == 2
    with pytest.raises(DataError, match=r"row 1.*'fly'.*'stay', 'go', 'wait'"):
        export(student, tmp_path / "b", guard_data=[dataclasses.replace(own[0], label="fly")])


def test_no_rows_are_said_so(make_student, tmp_path: Path, sbs_edge_cli) -> None:
    student = make_student(tmp_path / "student", rows=0)
    result = export(student, tmp_path / "b", targets=("cpu-int8",))
    assert result.manifest["targets"]["cpu-int8"]["accuracy"] is None
    assert "without labelled rows" in (tmp_path / "b" / "README.md").read_text()
    done = sbs_edge_cli("predict", tmp_path / "b", stdin="hot pump\ncold fan\n")
    assert done.returncode == 0
    assert "never measured" in done.stderr
    assert [
        set(json.loads(line)) >= {"label", "probability", "probabilities"}
        for line in done.stdout.splitlines()
    ] == [True, True]


def test_bad_students_are_refused(make_student, trained, tmp_path: Path) -> None:
    good, _ = trained
    export(good, tmp_path / "out", targets=("cpu-fp32",))
    before = listing(tmp_path / "out")

    def broken(name: str, change) -> Path:
        folder = Path(shutil.copytree(good, tmp_path / name))
        change(folder)
        return folder

    def edit(file: str, **fields):
        def change(folder: Path) -> None:
            content = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps({**content, **fields}))

        return change

    task = {"name": "t", "label_kind": "closed", "compare": "text"}
    cases = {
        "bert": (edit("config.json", model_type="bert"), "students are of the T5 family"),
        "no-tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        "no-config": (lambda f: (f / "config.json").unlink(), "no config.json"),
        "broken-config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        "pickled": (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "not a file of PyTorch",
        ),
        "empty-label": (edit("sbs_edge.json", task={**task, "labels": ["go", " "]}), "has no token"),
        "same-label": (edit("sbs_edge.json", task={**task, "labels": ["go", "GO"]}), "same tokens"),
        "one-label": (edit("sbs_edge.json", task={**task, "labels": ["go"]}), "at least two"),
    }
    for name, (change, match) in cases.items():
        with pytest.raises(UsageError, match=match):
            export(broken(name, change), tmp_path / "out")
    for options, match in (
        ({"targets": ("cpu-int3",)}, "no target 'cpu-int3'"),
        ({"labels": ["a", "b"]}, "already gives"),
        ({"version": "../1"}, "version"),
    ):
        with pytest.raises(UsageError, match=match):
            export(good, tmp_path / "out", **options)
    assert listing(tmp_path / "out") == before


def test_a_full_disk_leaves_the_old_bundle(trained, tmp_path: Path) -> None:
    student, _ = trained
    export(student, tmp_path / "bundle", targets=("cpu-fp32",))
    before = listing(tmp_path / "bundle")
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
from sbs_edge.cli.app import main
sys.exit(main(["export", {str(student)!r}, "--out", {str(tmp_path / "bundle")!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert "The disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(tmp_path / "bundle") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_checkpoint_that_was_not_trained_here(make_student, tmp_path: Path) -> None:
    checkpoint = make_student(tmp_path / "checkpoint")
    for name in ("sbs_edge.json", "validation.jsonl", "calibration.jsonl"):
        (checkpoint / name).unlink()
    export(
        checkpoint,
        tmp_path / "labels",
        targets=("cpu-int8",),
        labels=["hot", "cold"],
        label_prefix="[label] ",
    )
    with Student.load(tmp_path / "labels") as student:
        assert set(student.predict(["pump"])[0].probabilities) == {"hot", "cold"}
    result = export(checkpoint, tmp_path / "plain", targets=("cpu-fp32",))
    assert result.manifest["labels"]["method"] == "decode"
    with Student.load(tmp_path / "plain") as student:
        assert student.explain(["pump"], 5)[0].n_tokens <= 5


def test_a_known_temperature_is_found() -> None:
    """Scores made too sharp by a known factor get it back, and are calibrated after it."""
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(4000, 3)) * 1.5
    chances = np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)
    gold = [int(rng.choice(3, p=row)) for row in chances]
    assert fit_temperature(list(honest * 4.0), gold) == pytest.approx(4.0, rel=0.06)
    report = calibrate(list(honest * 4.0), gold)
    assert report["ece_after"] < 0.03 < report["ece_before"]
    assert report["coverage"][0]["accuracy"] < report["coverage"][-1]["accuracy"]
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0


def test_certainty_is_bounded_by_the_rows() -> None:
    scores = [np.array([5.0, 0.0])] * 20
    temperature = fit_temperature(scores, [0] * 20)
    top = 1 / (1 + np.exp(-5.0 / temperature))
    assert 0.95 < top < 0.99


def test_the_command_keeps_its_configuration_beside_the_bundle(
    make_student, tmp_path: Path, sbs_edge_cli
) -> None:
    student = make_student(tmp_path / "student")
    flags = ("--target", "cpu-fp32", "--name", "kept", "--label-only")
    done = sbs_edge_cli("export", student, "--out", tmp_path / "b", *flags)
    assert done.returncode == 0, done.stderr
    first = listing(tmp_path / "b")
    assert "config.yaml" not in first
    shutil.rmtree(tmp_path / "b")
    again = sbs_edge_cli("export", "--config", tmp_path / "b.config.yaml")
    assert again.returncode == 0, again.stderr
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest["name"], list(manifest["targets"])) == ("kept", ["cpu-fp32"])
    graphs = {name: content for name, content in first.items() if name.startswith("cpu-fp32/")}
    assert {n: c for n, c in listing(tmp_path / "b").items() if n.startswith("cpu-fp32/")} == graphs
