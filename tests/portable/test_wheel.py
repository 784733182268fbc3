"""The wheel, alone in a clean environment with ``[cpu]``, runs a bundle: on every Python version that is at hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.runtime.student import Student

_SPEC = spec_from_file_location("wheel_students", Path(__file__).parents[1] / "runtime" / "conftest.py")
_TINY: Any = module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _TINY
_SPEC.loader.exec_module(_TINY)

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
TOO_OLD = "3.10"

pytestmark = pytest.mark.long


def interpreter(version: str) -> str | None:
    """Return a working ``python<version>`` from the PATH or from pyenv."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (*sorted(map(str, kept.glob(f"{version}.*/bin/python"))), shutil.which(f"python{version}")):
        if found and subprocess.run([found, "-c", "import venv"], capture_output=True).returncode == 0:
            return found
    return None


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=500, check=False, **options
    )


@pytest.fixture(scope="module")
def built(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and from that alone the wheel."""
    folder = tmp_path_factory.mktemp("built")
    make = run(interpreter("3.11") or sys.executable, "-m", "venv", folder / "env")
    assert make.returncode == 0, make.stderr
    python = folder / "env" / "bin" / "python"
    got = run(python, "-m", "pip", "install", "--quiet", "build")
    assert got.returncode == 0, got.stderr
    done = run(python, "-m", "build", "--outdir", folder / "dist", repository)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / "dist"


def test_both_distributions_hold_every_module_once(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        members = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
        assert not [m.name for m in archive.getmembers() if m.issym() or m.islnk()]
    linked = ("kernels", "export", "bench")
    packed = [
        f"sbs_edge/{name}" if name.split("/")[0] in linked else name
        for name in members
        if name.split("/")[0] in (*linked, "sbs_edge")
    ]
    names = zipfile.ZipFile(wheel).namelist()
    shipped = [name for name in names if name.startswith("sbs_edge/")]
    assert len(shipped) == len(set(shipped))
    assert sorted(packed) == sorted(shipped)
    assert "sbs_edge/serve/page.html" in shipped
    assert "sbs_edge/py.typed" in shipped


@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_alone_runs_a_bundle(built: Path, tmp_path: Path, version: str) -> None:
    found = interpreter(version)
    if found is None:
        pytest.skip(f"no Python {version} on the PATH or in pyenv")
    bundle = _TINY.write_bundle(_TINY.make_tiny(), tmp_path / "bundle")
    (wheel,) = built.glob("*.whl")
    python = tmp_path / "env" / "bin" / "python"
    assert run(found, "-m", "venv", tmp_path / "env").returncode == 0
    done = run(python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", f"{wheel}[cpu]")
    assert done.returncode == 0, done.stderr
    assert run(python, "-m", "pip", "check").returncode == 0
    for module in ("torch", "transformers", "onnx"):
        assert run(python, "-c", f"import {module}").returncode != 0
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SBS_EDGE"))}
    text = "hot pump"
    command = tmp_path / "env" / "bin" / "sbs-edge"
    answer = run(command, "predict", bundle, input=f"{text}\n", cwd=tmp_path, env=clean)
    assert answer.returncode == 0, answer.stderr
    with Student.load(bundle, threads=1, prepacked_cache=False) as student:
        assert json.loads(answer.stdout)["label"] == student.predict([text])[0].label


def test_an_older_python_is_told_which_one_is_needed(built: Path, tmp_path: Path) -> None:
    found = interpreter(TOO_OLD)
    if found is None:
        pytest.skip(f"no Python {TOO_OLD} on the PATH or in pyenv")
    assert run(found, "-m", "venv", tmp_path / "env").returncode == 0
    (wheel,) = built.glob("*.whl")
    done = run(tmp_path / "env" / "bin" / "python", "-m", "pip", "install", "--no-deps", wheel)
    assert done.returncode != 0
    assert "requires a different Python" in done.stderr
    assert ">=3.11" in done.stderr
