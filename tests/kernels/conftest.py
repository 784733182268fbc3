"""Two ways to run these tests: compiled, and with TRITON_INTERPRET=1 in Triton's interpreter.

Triton reads the variable once, when kernels are defined, so each way is a pytest call of its own (see the Makefile).
A test that is marked for the other way is deselected, not skipped: a skip means that something is missing here.
"""

from __future__ import annotations

import os

import pytest

OTHER = "compiled" if os.environ.get("TRITON_INTERPRET") == "1" else "interpreted"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to the other way."""
    here = [item for item in items if item.get_closest_marker(OTHER) is None]
    config.hook.pytest_deselected(
        items=[item for item in items if item.get_closest_marker(OTHER) is not None]
    )
    items[:] = here
