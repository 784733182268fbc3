"""Nothing is answered from memory that can change: files are damaged under a loaded student."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sbs_edge.errors import IntegrityError
from sbs_edge.runtime import prepacked
from sbs_edge.runtime.student import Student

TEXTS = ["hot pump", "cold coil in the zone"]

# Damages every file below the directories given, then asks: a mapped file would end or change the process.
DAMAGED = """
import os, sys
from pathlib import Path
from sbs_edge.runtime import bundle, prepacked
bundle.MIN_BYTES = prepacked.MIN_BYTES = 1
from sbs_edge.runtime.student import Student
root, caches, how, cached = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "cached"
texts = ["hot pump", "cold coil in the zone"]
if cached:
    Student.load(root, "cpu-int8", threads=1).warm_up()  # makes the entries
student = Student.load(root, "cpu-int8", threads=1, prepacked_cache=cached, recheck=True)
student.warm_up()
before = student.predict(texts), student.explain(texts)
files = [p for top in (root, caches) for p in top.rglob("*") if p.is_file()]
assert any(p.name == "weights.bin" for p in files)
if cached:
    assert any("prepacked" in p.parts for p in files)
for path in files:
    content = path.read_bytes()
    if how == "unlink":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, 0)
    else:
        with path.open("r+b") as handle:
            handle.write(bytes(255 - b for b in content))
assert (student.predict(texts), student.explain(texts)) == before
maps = Path("/proc/self/maps").read_text()
assert str(root) not in maps
print("same")
"""


@pytest.mark.parametrize("cached", ["cached", "plain"])
@pytest.mark.parametrize("how", ["garbage", "truncate", "unlink"])
def test_a_loaded_student_answers_the_same_whatever_happens_to_files(
    own_bundle, tmp_path, how, cached
) -> None:
    caches = tmp_path / "caches"
    caches.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", DAMAGED, str(own_bundle), str(caches), how, cached],
        capture_output=True, text=True, check=False, env={**os.environ, "XDG_CACHE_HOME": str(caches)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def test_a_graph_that_changed_before_it_was_opened_is_refused(own_bundle: Path) -> None:
    with Student.load(own_bundle, "cpu-fp32", threads=1, prepacked_cache=False) as student:
        assert student.predict(TEXTS)
        for name in ("explainer.onnx", "explainer.bin", "weights.bin"):
            path = own_bundle / "cpu-fp32" / name
            if path.exists():
                content = bytearray(path.read_bytes())
                content[len(content) // 2] ^= 1
                path.write_bytes(content)
        with pytest.raises(IntegrityError, match="changed after the bundle was opened"):
            student.explain(TEXTS)
        shutil.rmtree(own_bundle)
        with pytest.raises(IntegrityError, match="cannot be read"):
            student.explain(TEXTS)
        assert student.predict(TEXTS)


def test_a_damaged_entry_of_the_cache_is_made_again(own_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    from sbs_edge.runtime import bundle

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle, "MIN_BYTES", 1)
    monkeypatch.setattr(prepacked, "MIN_BYTES", 1)

    def answers() -> object:
        with Student.load(own_bundle, "cpu-int8", threads=1) as student:
            return student.predict(TEXTS)

    expected = answers()
    (weights,) = prepacked.cache_directory().glob("*/weights.bin")
    sound = weights.read_bytes()
    weights.write_bytes(bytes(255 - b for b in sound))
    assert answers() == expected
    (again,) = prepacked.cache_directory().glob("*/weights.bin")
    assert again.read_bytes() == sound
    assert not list((tmp_path / "cache" / "sbs-edge" / "private").iterdir())  # copies are removed
