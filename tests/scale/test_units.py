"""Units: every row in exactly one of them, wherever the cuts fall."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.errors import DataError, UsageError
from sbs_edge.scale.predict import COLUMNS
from sbs_edge.scale.units import plan_units, read_unit, shard_name, write_shard


@given(
    texts=st.lists(st.text(max_size=12), min_size=1, max_size=25),
    shard_bytes=st.integers(1, 200),
    final_newline=st.booleans(),
)
def test_cut_anywhere_every_line_is_read_once_and_in_order(
    tmp_path_factory, texts, shard_bytes, final_newline
):
    path = tmp_path_factory.mktemp("u") / "rows.jsonl"
    body = "\n".join(json.dumps({"input": text}, ensure_ascii=False) for text in texts)
    path.write_text(body + "\n" * final_newline, encoding="utf-8")
    units = plan_units(str(path), shard_bytes)
    rows = [item for unit in units for item in read_unit(unit)]
    assert [row["input"] for _, row in rows] == texts
    assert len({place for place, _ in rows}) == len(rows)
    assert len({shard_name(unit, "jsonl") for unit in units}) == len(units)


@pytest.mark.parametrize("shard_bytes", [1, 500, 10**9])
def test_parquet_is_cut_between_row_groups(tmp_path, shard_bytes):
    table = pa.table({"id": list(range(50)), "input": [f"text {i}" for i in range(50)]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    units = plan_units(str(tmp_path / "*.parquet"), shard_bytes)
    assert [row["id"] for unit in units for _, row in read_unit(unit)] == list(range(50))
    assert len(units) == {1: 8, 500: len(units), 10**9: 1}[shard_bytes]


def test_a_broken_line_is_a_message_at_its_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input": "a"}\n{oops\n[1]\n')
    (unit,) = plan_units(str(tmp_path), 10**6)
    kinds = [row if isinstance(row, str) else "row" for _, row in read_unit(unit)]
    assert kinds[0] == "row"
    assert kinds[1].startswith("broken JSON")
    assert kinds[2] == "not a JSON object (it is list)"


def test_a_line_that_cannot_be_read_costs_no_other(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"input": "a"}',
        b"[" * 100_000,
        b'{"input": "\xed\xa0\x80"}',
        b'{"id": NaN}',
        b'{"input": "b"}',
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    (unit,) = plan_units(str(tmp_path), 10**9)
    read = list(read_unit(unit))
    assert [row for _, row in read if isinstance(row, dict)] == [{"input": "a"}, {"input": "b"}]
    assert read[1] == (f"rows.jsonl@{len(lines[0]) + 1}", "broken JSON (nested too deeply)")
    assert "not UTF-8" in read[2][1]
    assert "NaN" in read[3][1]


def test_a_parquet_row_that_cannot_be_read_costs_no_other(tmp_path):
    raw = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    far = pa.array([0, 0, 2**60], pa.timestamp("ms"))
    pq.write_table(pa.table({"input": raw, "at": far}), tmp_path / "rows.parquet")
    (unit,) = plan_units(str(tmp_path), 10**9)
    rows = [row for _, row in read_unit(unit)]
    assert rows[0]["input"] == "a"
    assert rows[1] == "cannot be read ('input' is not UTF-8)"
    assert rows[2].startswith("cannot be read ('at'")


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=str(path)):
        plan_units(str(tmp_path), 100)
    path.unlink()
    (tmp_path / "rows.json").write_text('[\n{"input": "a"}\n]')
    with pytest.raises(DataError, match="one JSON array"):
        plan_units(str(tmp_path), 100)
    (tmp_path / "\udcff.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="not UTF-8"):
        plan_units(str(tmp_path), 100)


def test_every_shard_of_a_run_has_the_same_columns(tmp_path):
    rows = [
        {"id": 1, "label": "a", "probability": 0.5, "probabilities": {"a": 0.5}},
        {"id": "b"},
        {"id": 2**70},
    ]
    for number, part in enumerate((rows, [{"id": None, "error": "so \ud800"}], [])):
        write_shard(str(tmp_path), f"part-{number}.parquet", part, COLUMNS)
    table = pq.read_table(tmp_path)
    assert table.column_names == list(COLUMNS)
    assert table["id"].to_pylist() == ["1", "b", str(2**70), None]
    assert table["error"].to_pylist()[-1] == "so \\ud800"
    write_shard(str(tmp_path), "plain.parquet", rows)  # types of the rows' own, as far as they agree
    assert pq.read_table(tmp_path / "plain.parquet")["id"].to_pylist() == ["1", "b", str(2**70)]
    write_shard(str(tmp_path), "plain.parquet", rows[:1])
    assert pq.read_table(tmp_path / "plain.parquet")["id"].to_pylist() == [1]


def test_half_a_character_is_written_as_json_spells_it(tmp_path):
    write_shard(str(tmp_path), "part-0.jsonl", [{"rationale": "so \ud800"}])
    (unit,) = plan_units(str(tmp_path), 100)
    assert [row for _, row in read_unit(unit)] == [{"rationale": "so \ud800"}]


def test_a_uri_names_the_same_units_as_its_path(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input": "a"}\n{"input": "b"}\n')
    (tmp_path / "notes.txt").write_text("not data")
    by_path, by_uri = (plan_units(where, 16) for where in (str(tmp_path), f"file://{tmp_path}"))
    assert [list(read_unit(unit)) for unit in by_uri] == [list(read_unit(unit)) for unit in by_path]
    assert [shard_name(u, "jsonl") for u in by_uri] == [shard_name(u, "jsonl") for u in by_path]


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"No \.jsonl"):
        plan_units(str(tmp_path / "*.jsonl"), 100)
