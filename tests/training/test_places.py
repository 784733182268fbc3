"""The directory that training writes: one process at a time, a disk that fills up, what is checked before any work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.cli.app import main
from sbs_edge.data.example import Splits
from sbs_edge.disk import lacks_space
from sbs_edge.errors import UsageError
from sbs_edge.lock import held
from sbs_edge.training.train import train

HOLDER = """
import sys, time
from sbs_edge.lock import held
with held(sys.argv[1], "training"):
    print(flush=True)
    time.sleep(120)
"""


def holding(place: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-P", "-c", HOLDER, str(place)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_second_training_into_one_place_is_refused_and_a_dead_one_taken_over(
    tmp_path: Path, splits: Splits, small: dict[str, Any]
) -> None:
    other = holding(tmp_path / "out")
    try:
        with pytest.raises(
            UsageError, match=rf"training of process {other.pid} on .*already writing to .*out"
        ):
            train(splits, tmp_path / "out", max_steps=2, **small)
        assert not (tmp_path / "out.training").exists()
        with held(tmp_path / "elsewhere", "training"):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()  # type: ignore[union-attr]
    assert (tmp_path / ".out.lock").exists()
    train(splits, tmp_path / "out", max_steps=2, **small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.training"]


LIMITED = """
    import os, resource, signal, sys
    from sbs_edge.cli.app import main
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[2:]))
"""


def limited(limit: int, *args: str) -> tuple[int, str]:
    """Run a command that may write no file of more than ``limit`` bytes, as on a disk that is full."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(LIMITED), str(limit), *args],
        capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    return run.returncode, " ".join(run.stderr.split())


def test_a_disk_that_fills_while_training_keeps_the_checkpoints(tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = [
        "train",
        "--d-model",
        "32",
        "--d-ff",
        "32",
        "--n-layers",
        "1",
        "--n-decoder-layers",
        "1",
        "--batch-size",
        "4",
    ]
    call += ["--eval-steps", "1000", "--save-steps", "2", "--out", str(out)]
    assert main([*call, "--max-steps", "3"]) == 0
    size = max(path.stat().st_size for path in (tmp_path / "out.training").rglob("*") if path.is_file())
    kept = sorted(path.name for path in (tmp_path / "out.training").glob("checkpoint-*"))
    before = (out / "model.safetensors").read_bytes()
    code, said = limited(size // 2, *call, "--max-steps", "6", "--resume")
    assert code == 1, said
    assert "The disk is full" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert "internal error" not in said
    assert [name for name in kept if (tmp_path / "out.training" / name).is_dir()] == kept
    assert not list((tmp_path / "out.training").glob("*.tmp"))
    assert not (tmp_path / "out.training" / ".partial").exists()
    assert (out / "model.safetensors").read_bytes() == before
    assert main([*call, "--max-steps", "6", "--resume"]) == 0  # with room again


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(27, "File too large"), True),
        (OSError(2, "No such file or directory"), False),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (ValueError("shape"), False),
    ],
)
def test_a_full_disk_is_told_from_other_failures(error: Exception, full: bool) -> None:
    assert lacks_space(error) is full
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = error
    assert lacks_space(wrapped) is full


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "torch", "transformers", "accelerate"])
def test_run_looks_for_its_packages_before_training(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sbs_edge.cli import _common

    there = _common.find_spec
    monkeypatch.setattr(_common, "find_spec", lambda name: None if name == missing else there(name))
    assert main(["run", "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"needs the package '{missing}'" in said
    assert "pip install 'sbs-edge[" in said
    assert not (tmp_path / "out").exists()


def test_a_student_given_for_a_bundle_and_the_reverse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], splits: Splits, small: dict[str, Any]
) -> None:
    train(splits, tmp_path / "s", max_steps=1, **small)
    for command in (["predict", str(tmp_path / "s"), "-"], ["serve", str(tmp_path / "s")]):
        if command[0] == "serve" and find_spec("structlog") is None:
            continue  # this environment has no [serve]
        assert main(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{tmp_path / 's'} is a student or another checkpoint, not a bundle" in said
        assert "sbs-edge export" in said
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{}")
    for command in (
        ["evaluate", str(tmp_path / "b")],
        ["export", str(tmp_path / "b"), "--out", str(tmp_path / "o")],
        ["train", "--model", str(tmp_path / "b"), "--out", str(tmp_path / "o")],
    ):
        assert main(command) == 2
        assert "is a bundle, which cannot be trained" in " ".join(capsys.readouterr().err.split())
