"""A bundle answers the same on a processor without VNNI, emulated instruction by instruction."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.runtime import int8_products

_SPEC = spec_from_file_location("portable_students", Path(__file__).parents[1] / "runtime" / "conftest.py")
_TINY: Any = module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _TINY
_SPEC.loader.exec_module(_TINY)

ANSWERS = Path(__file__).with_name("answers.py")
EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")

pytestmark = [
    pytest.mark.skipif(EMULATOR is None, reason="no qemu-x86_64: apt-get install qemu-user-static brings it"),
    pytest.mark.skipif(not int8_products.on_x86(), reason="the emulator runs this machine's x86-64 Python"),
]


def answers(bundle: Path, target: str, *emulator: str) -> dict[str, Any]:
    import onnxruntime

    python = Path(sys.executable).resolve()
    folders = [
        str(Path(__file__).parents[2]), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"),
        str(Path(onnxruntime.__file__).parents[1]),  # where another environment's packages are used
    ]  # fmt: skip
    done = subprocess.run(
        [*emulator, str(python), str(ANSWERS), str(bundle), target, json.dumps(_TINY.texts_of(6))],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student, wide enough that saturation would change its answers."""
    wide = _TINY.make_tiny(d_model=64, d_kv=16, d_ff=256)
    return _TINY.write_bundle(wide, tmp_path_factory.mktemp("bundles") / "wide")


def test_answers_on_a_processor_without_vnni_are_those_of_one_with_it(bundle: Path) -> None:
    here, there = answers(bundle, "cpu-int8"), answers(bundle, "cpu-int8", EMULATOR, "-cpu", "Haswell")
    assert there["saturates"]
    assert there["labels"] == here["labels"]
    assert there["rationales"] == here["rationales"]
    # The float32 operators between the products add up in another order: now and then a value rounds to the next step.
    moved = [
        abs(a - b)
        for rows in zip(there["scores"], here["scores"], strict=True)
        for a, b in zip(*rows, strict=True)
    ]
    assert max(moved) < 0.05
