"""The journal survives a cut at any byte, and never two writers."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.errors import DataError, UsageError
from sbs_edge.teacher.journal import Journal, Record

RECORDS = [
    Record(f"key-{i}", f"text {i} … ü\n\u2028end", cost=0.25, prompt_tokens=3, at=1.5) for i in range(4)
]


def write(path):
    with Journal(path) as journal:
        journal.append(*RECORDS)
    return path.read_bytes()


@given(st.data())
def test_a_journal_cut_at_any_byte_loses_only_the_torn_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("j") / "j.jsonl"
    whole = write(path)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    with Journal(path) as journal:
        assert list(journal.records) == [f"key-{i}" for i in range(complete)]
        assert journal.total_cost == pytest.approx(0.25 * complete)
        journal.append(Record("next", "after the cut"))
    with Journal(path) as journal:
        assert list(journal.records) == [*(f"key-{i}" for i in range(complete)), "next"]
        assert all(journal.records[r.key].text == r.text for r in RECORDS[:complete])


def test_a_damaged_line_in_the_middle_is_named_not_swallowed(tmp_path):
    path = tmp_path / "j.jsonl"
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[2])
    with pytest.raises(DataError, match="line 2"):
        Journal(path)
    assert path.read_bytes() == lines[0] + b"{broken\n" + lines[2]  # nothing was thrown away


def test_two_runs_cannot_share_a_journal(tmp_path):
    with Journal(tmp_path / "j.jsonl"), pytest.raises(UsageError, match="in use"):
        Journal(tmp_path / "j.jsonl")
    Journal(tmp_path / "j.jsonl").close()


def test_every_record_is_flushed_before_it_is_reported(tmp_path, monkeypatch):
    """``append_soon`` returns only after an fsync that followed the record's bytes."""
    synced: list[int] = []
    real = os.fsync

    def spy(fd):
        real(fd)
        synced.append(os.fstat(fd).st_size)

    async def one(journal, record):
        await journal.append_soon(record)
        on_disk = (tmp_path / "j.jsonl").read_bytes()
        position = on_disk.index(record.key.encode())
        assert synced
        assert synced[-1] > position

    async def every(journal):
        await asyncio.gather(*(one(journal, record) for record in RECORDS))

    with Journal(tmp_path / "j.jsonl") as journal:
        monkeypatch.setattr(os, "fsync", spy)
        asyncio.run(every(journal))
    assert len((tmp_path / "j.jsonl").read_text().split("\n")) == len(RECORDS) + 1


def test_later_lines_win_and_unknown_fields_are_ignored(tmp_path):
    path = tmp_path / "j.jsonl"
    rows = [{"key": "a", "text": "1"}, {"key": "a", "text": "2", "from_a_later_version": True}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Journal(path) as journal:
        assert journal.records["a"].text == "2"
