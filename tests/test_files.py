"""A crash or a full disk leaves the old file or the new one, never half of either."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sbs_edge import files
from sbs_edge.errors import SbsEdgeError, UsageError


def test_write_json_round_trip(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a" / "b.json", {"ö": [1, 2.5, None]})
    assert json.loads((tmp_path / "a" / "b.json").read_text(encoding="utf-8")) == {"ö": [1, 2.5, None]}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


def test_a_full_disk_keeps_the_old_file_and_leaves_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "kept.txt"
    target.write_text("old")
    code = (
        "import resource, signal, sys; from sbs_edge import files;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "files.write_bytes(sys.argv[1], b'x' * 100_000)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_atomic_directory_replaces_only_when_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with files.atomic_directory(target) as work:
        (work / "one").write_text("1")

    def fail_half_way() -> None:
        with files.atomic_directory(target) as work:
            (work / "two").write_text("2")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert [p.name for p in target.iterdir()] == ["one"]
    with files.atomic_directory(target) as work:
        (work / "three").write_text("3")
    assert [p.name for p in target.iterdir()] == ["three"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    mine, ours, empty, absent = (tmp_path / name for name in ("mine", "ours", "empty", "absent"))
    for folder in (mine, ours, empty):
        folder.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (ours / "manifest.json").write_text("{}")
    file = tmp_path / "file"
    file.write_text("x")
    for allowed in (ours, empty, absent):
        files.check_replaceable(allowed, ("manifest.json",), "bundle")
    for refused in (mine, file):
        with pytest.raises(UsageError, match=f"{refused.name} exists and is not a bundle"):
            files.check_replaceable(refused, ("manifest.json",), "bundle")


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_the_directory_one_stands_in_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match="runs in"):
        files.check_replaceable(name, ("manifest.json",), "bundle")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_never_holds_a_number_that_is_not_finite(tmp_path, value):
    path = tmp_path / "figures.json"
    files.write_json(path, {"loss": 1.5})
    before = path.read_bytes()
    with pytest.raises(SbsEdgeError, match=r"at steps\[1\]\.loss"):
        files.write_json(path, {"steps": [{"loss": 0.5}, {"loss": value}]})
    assert path.read_bytes() == before
    assert files.to_json({"text": "é", "n": [1, 2.5, None]}) == '{"text": "é", "n": [1, 2.5, null]}'
