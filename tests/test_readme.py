"""The README's examples run as they stand."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.long
def test_the_python_example_runs_as_printed(repository: Path, python: Callable[..., str]) -> None:
    """The example asks the demo's bundle; a shorter demo makes one."""
    (code,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), flags=re.DOTALL)
    python("-m", "sbs_edge", "run", "--out", "runs/demo", "--steps", "60")
    assert re.match(r"(wait|dispatch|adjust|close) [01]\.\d+\n\w+", python("-c", code))


def test_every_document_the_readme_links_exists(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (repository / link).is_file(), link


def test_no_absolute_path_or_host_of_a_machine_is_in_the_repository(repository: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    homes = re.compile(r"(?<![\w.~-])/(work|farm|root|home)/[A-Za-z.]")
    wrong = []
    for name in filter(None, tracked):
        path = repository / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if name != "tests/test_readme.py" and homes.search(text):
            wrong.append(name)
    assert wrong == []
