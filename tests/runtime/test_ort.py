"""onnxruntime as a guest: it reports nothing of the process that embeds it, and only one module imports it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ANSWER = """
import sys
from sbs_edge.runtime.student import Student
with Student.load(sys.argv[1], threads=1, prepacked_cache=False) as student:
    print(student.predict(["hot pump"])[0].label)
"""


@pytest.mark.parametrize("wanted", [None, "0"])
def test_an_answer_leaves_no_trace_of_the_runtimes_own(
    tiny_bundle: Path, tmp_path: Path, wanted: str | None
) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path / "home")}
    env.pop("ORT_DISABLE_TELEMETRY", None)
    if wanted is not None:
        env["ORT_DISABLE_TELEMETRY"] = wanted
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(tiny_bundle)], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    if wanted is None:
        assert not written
    else:  # this build of onnxruntime may not report at all; where it does, its user has the last word
        assert all("onnxruntime" in str(path) for path in written)


def test_one_module_imports_onnxruntime() -> None:
    importing = [
        str(path.relative_to(ROOT))
        for package in ("sbs_edge", "export")
        for path in sorted((ROOT / package).rglob("*.py"))
        if re.search(
            r"^\s*(import onnxruntime\b(?!_)|from onnxruntime\b(?!_))", path.read_text(encoding="utf-8"), re.M
        )
    ]
    assert importing == ["sbs_edge/runtime/ort.py"]
