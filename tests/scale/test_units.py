"""Units: every row in exactly one of them, wherever the cuts fall."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.errors import UsageError
from sbs_edge.scale.units import plan_units, read_unit, shard_name


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
    assert kinds[1].startswith("not valid JSON")
    assert kinds[2] == "not a JSON object"


def test_a_uri_names_the_same_units_as_its_path(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input": "a"}\n{"input": "b"}\n')
    (tmp_path / "notes.txt").write_text("not data")
    by_path, by_uri = (plan_units(where, 16) for where in (str(tmp_path), f"file://{tmp_path}"))
    assert [list(read_unit(unit)) for unit in by_uri] == [list(read_unit(unit)) for unit in by_path]
    assert [shard_name(u, "jsonl") for u in by_uri] == [shard_name(u, "jsonl") for u in by_path]


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"No \.jsonl"):
        plan_units(str(tmp_path / "*.jsonl"), 100)
