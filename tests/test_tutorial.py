"""The tutorial's Python blocks run as printed, one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.long
def test_the_tutorial_runs_as_printed(repository: Path, python: Callable[..., str]) -> None:
    text = (repository / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 4
    printed = python("-c", "\n".join(blocks))
    with_rationales, labels_only = (
        float(share) for share in re.findall(r"([\d.]+)% of the validation labels", printed)
    )
    assert with_rationales > labels_only + 30, printed
    assert re.search(r"^(wait|dispatch|adjust|close) [01]\.\d{3}$", printed, flags=re.MULTILINE)
