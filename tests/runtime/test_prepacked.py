"""Pre-packed weights: the same bits, made once, never needed, never trusted from others."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbs_edge.errors import UsageError
from sbs_edge.runtime import bundle as bundle_module
from sbs_edge.runtime.prepacked import KEEP, MAX_MB_VARIABLE, cache_directory, usage
from sbs_edge.runtime.student import Student

TEXTS = ["hot pump", "cold room fan filter", "ice " * 20]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle_module, "MIN_BYTES", 0)
    return cache_directory()


def scores_of(bundle: Path, target: str, **options) -> tuple[np.ndarray, list[str]]:
    with Student.load(bundle, target, threads=1, **options) as student:
        return student.label_scores(TEXTS), [answer.rationale for answer in student.explain(TEXTS, 8)]


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_the_same_bits_with_and_without(tiny_bundle: Path, cache: Path, target: str) -> None:
    plain = scores_of(tiny_bundle, target, prepacked_cache=False)
    assert not cache.exists()
    making = scores_of(tiny_bundle, target)
    entries = {path.name: path.stat().st_ino for path in cache.iterdir()}
    assert len(entries) == 2  # label scorer and explainer: nobody asked for the choice scorer
    using = scores_of(tiny_bundle, target)
    assert {path.name: path.stat().st_ino for path in cache.iterdir()} == entries  # used, not made again
    for other in (making, using):
        assert np.array_equal(plain[0], other[0])
        assert plain[1] == other[1]


@pytest.mark.parametrize("damage", ["truncate", "remove", "garbage", "empty"])
def test_a_damaged_entry_is_made_again(tiny_bundle: Path, cache: Path, damage: str) -> None:
    expected = scores_of(tiny_bundle, "cpu-fp32")
    for entry in cache.iterdir():
        graph = entry / "model.onnx"
        size = graph.stat().st_size
        if damage == "truncate":
            graph.write_bytes(graph.read_bytes()[:-10])
        elif damage == "remove":
            (entry / "weights.bin").unlink()
        elif damage == "garbage":
            graph.write_bytes(b"\xff" * size)
        else:
            (entry / "sizes.json").write_text("[]")
    found = scores_of(tiny_bundle, "cpu-fp32")
    assert np.array_equal(expected[0], found[0])
    with Student.load(tiny_bundle, threads=1, eager=True):
        assert all((entry / "model.onnx").stat().st_size > 1000 for entry in cache.iterdir())


def test_nothing_depends_on_the_cache(tiny_bundle: Path, cache: Path, tmp_path: Path) -> None:
    expected = scores_of(tiny_bundle, "cpu-fp32", prepacked_cache=False)
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the directory should be")
    assert np.array_equal(scores_of(tiny_bundle, "cpu-fp32")[0], expected[0])
    cache.unlink()
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    assert np.array_equal(scores_of(tiny_bundle, "cpu-fp32")[0], expected[0])
    assert not list(cache.iterdir())  # others could write there: left alone


def test_a_full_disk_costs_the_saving_only(tiny_bundle: Path, cache: Path) -> None:
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from sbs_edge.runtime import bundle
bundle.MIN_BYTES = 0
from sbs_edge import Student
with Student.load({str(tiny_bundle)!r}, threads=1) as student:
    print(student.predict(["hot pump"])[0].label)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip()
    assert done.stderr.strip() == ""
    assert not [path for path in cache.iterdir() if path.name.endswith(".tmp")]
    assert resource.RLIM_INFINITY  # the limit was the child's


def test_old_entries_are_forgotten(tiny_bundle: Path, cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    for number in range(KEEP + 5):
        (cache / f"old-{number}").mkdir()
    scores_of(tiny_bundle, "cpu-fp32")
    names = {path.name for path in cache.iterdir()}
    assert len(names) == KEEP
    assert sum(not name.startswith("old-") for name in names) == 2


def test_small_students_are_not_cached(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scores_of(tiny_bundle, "cpu-fp32")
    assert not (tmp_path / "cache").exists()


def test_entries_stay_within_the_limit(
    tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True, mode=0o700)
    for number in range(3):
        old = cache / f"old-{number}"
        old.mkdir()
        (old / "weights.bin").write_bytes(bytes(400 << 10))
        os.utime(old, (number, number))
    monkeypatch.setenv(MAX_MB_VARIABLE, "1")
    expected = scores_of(tiny_bundle, "cpu-fp32")
    names = {path.name for path in cache.iterdir()}
    assert "old-0" not in names  # 3 * 400 KB and the new entries are over 1 MB: the oldest went
    assert "old-2" in names
    entries, size = usage()
    assert entries == len(names)
    assert size <= 1 << 20
    assert np.array_equal(scores_of(tiny_bundle, "cpu-fp32")[0], expected[0])


def test_an_entry_over_the_limit_is_made_once_and_not_kept(
    students: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = students.write_bundle(students.make_tiny(d_model=128, d_ff=512), tmp_path / "wide")
    monkeypatch.setenv(MAX_MB_VARIABLE, "1")
    expected = scores_of(wide, "cpu-fp32", prepacked_cache=False)
    for _ in range(2):
        assert np.array_equal(scores_of(wide, "cpu-fp32")[0], expected[0])
        assert all([file.name for file in entry.iterdir()] == ["too_large"] for entry in cache.iterdir())
    made = {entry: (entry / "too_large").stat().st_mtime_ns for entry in cache.iterdir()}
    scores_of(wide, "cpu-fp32")
    assert {entry: (entry / "too_large").stat().st_mtime_ns for entry in cache.iterdir()} == made
    monkeypatch.setenv(MAX_MB_VARIABLE, "100")
    scores_of(wide, "cpu-fp32")
    assert all((entry / "weights.bin").exists() for entry in cache.iterdir())


def test_zero_switches_the_cache_off(tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_MB_VARIABLE, "0")
    scores_of(tiny_bundle, "cpu-fp32")
    assert not cache.exists()


def test_a_limit_that_is_not_a_number_is_refused(
    tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MAX_MB_VARIABLE, "2G")
    with pytest.raises(UsageError, match="whole number of megabytes"):
        scores_of(tiny_bundle, "cpu-fp32")
