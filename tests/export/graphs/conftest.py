"""Fixtures over graph_students.py, which the tests beside this file import by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from graph_students import STUDENTS, make_student


@pytest.fixture(params=list(STUDENTS))
def student(request: pytest.FixtureRequest) -> Any:
    """Every family once."""
    return make_student(request.param)
