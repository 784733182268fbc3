"""Fixtures of all tests: one thread, the paper's data, a way to run the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Tests never assert on time: a busy machine must not fail one.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Two cores are often shared: one thread keeps tests repeatable and out of each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository under test."""
    return ROOT


@pytest.fixture(scope="session")
def paper_data() -> Path:
    """The folder with the paper's data sets; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("SBS_EDGE_TEST_DATA", ROOT.parent / "shared" / "datasets"))
    if not (folder / "svamp" / "svamp_train.json").is_file():
        pytest.skip(f"the paper's data sets are not at {folder}; set SBS_EDGE_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def sbs_edge_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own, as a user does."""

    def run(*args: str | Path, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "sbs_edge", *map(str, args)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "COLUMNS": "200", **env},
            check=False,
        )

    return run


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., str]:
    """Run Python in a process of its own, in the test's folder; return what it printed."""

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
