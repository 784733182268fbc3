"""Ray is started once for all tests of the room; a real bundle of an untrained student."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def scale_bundle(tmp_path_factory) -> Path:
    """The students' speed and format matter here, not their accuracy."""
    from sbs_edge.bench.scale.bench import make_bundle

    return make_bundle(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def local_ray():
    pytest.importorskip("ray")
    from sbs_edge.scale.run import session

    with session(None, 2, 1.0) as ray:
        yield ray
