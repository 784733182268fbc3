"""The tutorial's Python blocks run as printed, one after the other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_the_tutorial_runs_as_printed(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 4
    done = subprocess.run(
        [sys.executable, "-P", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with_rationales, labels_only = (
        float(share) for share in re.findall(r"([\d.]+)% of the validation labels", done.stdout)
    )
    assert with_rationales > labels_only + 30, done.stdout
    assert re.search(r"^(wait|dispatch|adjust|close) [01]\.\d{3}$", done.stdout, flags=re.MULTILINE)
