"""Files that were checked and are unchanged are not read again; any write makes them be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sbs_edge.errors import IntegrityError
from sbs_edge.runtime import bundle as bundle_module
from sbs_edge.runtime import integrity
from sbs_edge.runtime import verified_files as checked
from sbs_edge.runtime.bundle import Bundle
from sbs_edge.runtime.cache import cache_directory
from sbs_edge.runtime.student import Student


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files hashed; the cache is the test's own, and files count as settled at once."""
    names: list[str] = []
    real = integrity.file_digest

    def counted(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle_module, "MIN_BYTES", 0)
    monkeypatch.setattr(checked, "SETTLED_NS", 0)
    monkeypatch.setattr(integrity, "file_digest", counted)
    return names


def test_unchanged_files_are_read_once(own_bundle: Path, reads: list[str]) -> None:
    everything = len(Bundle.open(own_bundle, recheck=False).manifest["files"])
    assert len(reads) == everything
    Bundle.open(own_bundle, recheck=False)
    assert len(reads) == everything  # nothing was read again
    Bundle.open(own_bundle)  # a complete check is still to be had
    assert len(reads) == 2 * everything
    entry = next(cache_directory("checked").iterdir())
    assert entry.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_byte_is_found(own_bundle: Path, reads: list[str], keep_times: bool) -> None:
    Bundle.open(own_bundle, recheck=False)
    reads.clear()
    path = own_bundle / "cpu-int8" / "weights.bin"
    times = path.stat()
    with path.open("r+b") as handle:
        byte = handle.read(1)[0]
        handle.seek(0)
        handle.write(bytes([byte ^ 1]))
    if keep_times:  # a program can set the modification time back, not the change time
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(IntegrityError, match="digest"):
            Student.load(own_bundle, "cpu-fp32")
    assert reads == ["weights.bin"] * 2


def test_a_replaced_file_an_extra_file_and_another_manifest_are_found(
    own_bundle: Path, reads: list[str]
) -> None:
    Bundle.open(own_bundle, recheck=False)
    path = own_bundle / "tokenizer.json"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + b" ")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json does not have the digest"):
        Bundle.open(own_bundle, recheck=False)
    path.write_bytes(content)
    (own_bundle / "extra").write_bytes(b"")
    with pytest.raises(IntegrityError, match="does not list"):
        Bundle.open(own_bundle, recheck=False)
    (own_bundle / "extra").unlink()
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"]["sha256"] = "0" * 64
    text = json.dumps(manifest).encode()
    (own_bundle / "manifest.json").write_bytes(text)
    import hashlib

    (own_bundle / "manifest.json.sha256").write_text(hashlib.sha256(text).hexdigest() + "\n")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json does not have the digest"):
        Bundle.open(own_bundle, recheck=False)


def test_young_files_are_not_remembered(own_bundle: Path, reads: list[str], monkeypatch) -> None:
    monkeypatch.setattr(checked, "SETTLED_NS", 3600 * 10**9)
    Bundle.open(own_bundle, recheck=False)
    once = len(reads)
    Bundle.open(own_bundle, recheck=False)
    assert len(reads) == 2 * once


@pytest.mark.parametrize("content", ["", "[]", '{"tokenizer.json": 1}', "\0"])
def test_a_damaged_memory_costs_the_saving_only(own_bundle: Path, reads: list[str], content: str) -> None:
    Bundle.open(own_bundle, recheck=False)
    once = len(reads)
    entry = next(cache_directory("checked").iterdir())
    entry.write_text(content)
    Bundle.open(own_bundle, recheck=False)
    assert len(reads) == 2 * once
    Bundle.open(own_bundle, recheck=False)
    assert len(reads) == 2 * once


def test_a_directory_that_others_can_write_is_not_believed(own_bundle: Path, reads: list[str]) -> None:
    Bundle.open(own_bundle, recheck=False)
    once = len(reads)
    cache_directory("checked").chmod(0o777)
    Bundle.open(own_bundle, recheck=False)
    assert len(reads) == 2 * once


def test_no_cache_is_touched_without_permission(own_bundle: Path, reads: list[str], tmp_path: Path) -> None:
    with Student.load(own_bundle, threads=1, prepacked_cache=False) as student:
        student.predict(["hot pump"])
    assert reads
    assert not (tmp_path / "cache").exists()
