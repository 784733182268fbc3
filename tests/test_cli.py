"""The command line's frame: help, precedence of settings, exit codes, one paragraph an error."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sbs_edge.cli import doctor
from sbs_edge.cli.app import main
from sbs_edge.report.run import run_page

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_help_is_quick_to_load_and_names_every_command(sbs_edge_cli: Run) -> None:
    done = sbs_edge_cli("--help")
    assert done.returncode == 0
    for command in ("run", "data", "train", "evaluate", "export", "predict", "annotate", "task", "serve",
                    "bench", "doctor"):  # fmt: skip
        assert f" {command} " in done.stdout, command


def test_doctor_as_json_names_engines_and_providers(sbs_edge_cli: Run) -> None:
    done = sbs_edge_cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "CPUExecutionProvider" in report["providers"]
    engines = {engine["name"]: engine for engine in report["loss_engines"]}
    assert engines["torch"]["available"] is True
    missing = [package for package in report["packages"] if package["version"] is None]
    assert all(package["add"].startswith("pip install 'sbs-edge[") for package in missing)


def test_an_unknown_command_is_a_usage_error(sbs_edge_cli: Run) -> None:
    assert sbs_edge_cli("frobnicate").returncode == 2


def _plan(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    plan: dict[str, object] = json.loads(done.stdout)
    return plan


def test_flags_win_over_environment_over_file_over_defaults(sbs_edge_cli: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("steps: 11\nrationale-weight: 2.5\n")
    common = ("run", "--dry-run", "--json", "--out", tmp_path / "out")
    assert _plan(sbs_edge_cli(*common))["steps"] == 600
    assert _plan(sbs_edge_cli(*common, "--config", config))["steps"] == 11
    assert _plan(sbs_edge_cli(*common, "--config", config))["rationale_weight"] == 2.5
    assert _plan(sbs_edge_cli(*common, "--config", config, SBS_EDGE_RUN_STEPS="12"))["steps"] == 12
    plan = _plan(sbs_edge_cli(*common, "--config", config, "--steps", "13", SBS_EDGE_RUN_STEPS="12"))
    assert plan["steps"] == 13
    assert not (tmp_path / "out").exists(), "a dry run changes nothing"


@pytest.mark.parametrize(
    ("content", "said"),
    [("stepz: 3\n", "stepz"), ("- 1\n", "mapping"), ("a: [\n", "not valid YAML"), (None, "cannot be read")],
)
def test_a_wrong_configuration_file_is_one_paragraph_and_exit_2(
    sbs_edge_cli: Run, tmp_path: Path, content: str | None, said: str
) -> None:
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    done = sbs_edge_cli("run", "--dry-run", "--config", config)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in sbs_edge_cli("--debug", "run", "--dry-run", "--config", config).stderr


@pytest.mark.parametrize("mode", ["finetune", "distill"])
def test_run_without_rationales_ends_with_a_bundle_and_a_report(
    sbs_edge_cli: Run, tmp_path: Path, mode: str
) -> None:
    done = sbs_edge_cli(
        "run", "--mode", mode, "--steps", "4", "--train-rows", "64", "--max-drop", "100", "--json",
        "--training", "validation_rows=32", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [student["mode"] for student in report["students"]] == [mode]
    assert (tmp_path / "out" / "bundle" / "manifest.json").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "rationale, as the bundle" not in page
    analysis = report["analysis"]
    assert (analysis["target"], analysis["n"]) == ("cpu-int8", report["rows"]["test"])
    assert analysis["accuracy"] == report["bundle"]["targets"][0]["label_accuracy"]
    assert sum(map(sum, analysis["confusion"]["counts"])) == analysis["n"]
    assert [error["rationale"] for error in analysis["errors"]] == [None] * 20
    assert page.index("The bundle gives the gold label in") < page.index("<h2>")
    assert report["linear"]["accuracy"]["test"]["n"] == report["rows"]["test"]
    assert report["linear"]["sentence"].startswith("A linear model on word n-grams")
    assert report["linear"]["sentence"] in page
    bold = re.compile(r'<tr class="best"><td>([^<]*)')
    assert bold.findall(page) == []
    for shares, best in (((0.5, 0.75, 0.25), ["b"]), ((0.5, 0.5, 0.5), []), ((None, None, 0.1), ["c"])):
        students = [
            {
                **report["students"][0],
                "name": name,
                "test": {**report["students"][0]["test"], "label_accuracy": share},
            }
            for name, share in zip("abc", shares, strict=True)
        ]
        assert bold.findall(run_page({**report, "students": students})) == best


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_dry_run_writes_no_list_of_skipped_rows(sbs_edge_cli: Run, tmp_path: Path, command: str) -> None:
    rows = [{"input": f"case {i}", "label": "ab"[i % 2], "rationale": "so"} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    out = tmp_path / "out" / "student"
    common = (command, data, "--skip-bad-rows", "--json", "--out", out)
    done = sbs_edge_cli(*common, "--dry-run")
    assert _plan(done)["skip_bad_rows"] is True
    assert "Skipped 1 row(s)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_run_weighs_rationales_as_train_does(sbs_edge_cli: Run, tmp_path: Path) -> None:
    for model, weight in (((), 3.0), (("--model", tmp_path / "checkpoint"), 1.0)):
        for command in ("run", "train"):
            plan = _plan(sbs_edge_cli(command, "--dry-run", "--json", "--out", tmp_path / "out", *model))
            assert plan["lambda"] == weight, command
    plan = _plan(sbs_edge_cli("run", "--dry-run", "--json", "--training", "alpha=0.2"))
    assert plan["lambda"] == pytest.approx(4.0)


def test_serve_looks_for_its_bundles_in_a_dry_run_too(sbs_edge_cli: Run, tmp_path: Path) -> None:
    for flags in ((), ("--dry-run",)):
        done = sbs_edge_cli("serve", tmp_path / "nowhere", *flags)
        assert done.returncode == 2
        assert "There is no directory" in done.stderr
    done = sbs_edge_cli("serve", tmp_path, "--dry-run")
    assert done.returncode == 4
    assert "no manifest.json" in done.stderr


def test_doctor_warns_of_two_runtimes_in_one_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.diagnose()["warnings"] == []
    monkeypatch.setattr(doctor, "installed_versions", lambda *names: dict.fromkeys(names, "1.0"))
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: onnxruntime and onnxruntime-gpu are both installed" in shown
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in shown
