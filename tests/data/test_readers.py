"""Readers against what other libraries wrote, and against rows that are broken in every listed way."""

from __future__ import annotations

import csv
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbs_edge.data.example import Example
from sbs_edge.data.jsonl import write_examples
from sbs_edge.data.readers import ColumnMap, read_examples, stream_examples
from sbs_edge.errors import DataError, UsageError

_texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
_words = _texts.map(str.strip)


@st.composite
def _examples(draw):
    rows = []
    for index in range(draw(st.integers(1, 6))):
        choices = draw(st.none() | st.lists(_words, min_size=2, max_size=4, unique=True).map(tuple))
        rows.append(
            Example(
                id=f"r{index}",
                input=draw(_texts),
                label=draw(st.none() | (st.sampled_from(choices) if choices else _texts)),
                teacher_label=draw(st.none() | _texts),
                rationale=draw(st.none() | _texts),
                choices=choices,
                confidence=draw(st.floats(0, 1, exclude_min=True)),
            )
        )
    return rows


def _bare(example):
    return (
        example.id,
        example.input,
        example.label,
        example.teacher_label,
        example.rationale,
        example.choices,
        example.confidence,
    )


_SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@_SETTINGS
@given(_examples())
def test_what_was_written_is_read_back(tmp_path, examples):
    path = tmp_path / "rows.jsonl"
    write_examples(path, examples)
    result = read_examples(path)
    assert result.rejected == []
    assert [_bare(row) for row in result.examples] == [_bare(row) for row in examples]
    assert [row.source for row in result.examples] == [f"{path}:{i + 1}" for i in range(len(examples))]


_shares = st.dictionaries(_words, st.floats(1e-3, 1.0), max_size=4)


@_SETTINGS
@given(st.lists(_texts, max_size=4, unique=True), _shares)
def test_rationales_and_the_teachers_distribution_are_read_back(tmp_path, rationales, shares):
    total = sum(shares.values())
    kept = tuple(rationales) if len(rationales) > 1 else ()
    row = Example(
        "r", "x", teacher_label="a", rationale=rationales[0] if rationales else None, rationales=kept,
        teacher_probs=tuple((label, share / total) for label, share in shares.items()),
    )  # fmt: skip
    path = tmp_path / "rows.jsonl"
    write_examples(path, [row])
    (found,) = read_examples(path).examples
    assert (found.rationale, found.rationales) == (row.rationale, row.rationales)
    assert dict(found.teacher_probs) == pytest.approx(dict(row.teacher_probs), abs=2e-6)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("teacher_probs", [0.5, 0.5], "wrong type of 'teacher_probs'"),
        ("teacher_probs", "refund", "wrong type of 'teacher_probs'"),
        ("teacher_probs", {"a": "much"}, "wrong type of 'teacher_probs'"),
        ("teacher_probs", {"a": -0.1, "b": 1.1}, "'teacher_probs' below 0 or not finite"),
        ("teacher_probs", {"a": 0}, "'teacher_probs' without a probability above 0"),
        ("teacher_probs", {" ": 1}, "empty 'teacher_probs'"),
        ("rationales", 3, "wrong type of 'rationales'"),
        ("rationales", ["a", ""], "empty 'rationales'"),
        ("rationales", ["a", None], "empty 'rationales'"),
    ],
)
def test_a_distribution_or_a_list_of_rationales_that_is_none_is_refused(tmp_path, field, value, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "x", field: value}) + "\n")
    (rejected,) = read_examples(path).rejected
    assert rejected.reason == reason


def test_cells_of_tables_hold_distributions_and_rationales(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["input", "teacher_probs", "why"])
        writer.writerow(["x", '{"a": 3, "b": 1}', '["one", "two"]'])
        writer.writerow(["y", "", "[only one"])
    first, second = read_examples(path, columns=ColumnMap(rationales="why")).examples
    assert first.teacher_probs == (("a", 0.75), ("b", 0.25))
    assert (first.rationale, first.rationales) == ("one", ("one", "two"))
    assert (second.teacher_probs, second.rationales) == ((), ())
    table = tmp_path / "rows.parquet"
    shares = pyarrow.array([{"a": 0.5, "b": 0.5}, {"c": 1.0}])
    pyarrow.parquet.write_table(pyarrow.table({"input": ["x", "y"], "teacher_probs": shares}), table)
    assert [row.teacher_probs for row in read_examples(table).examples] == [
        (("a", 0.5), ("b", 0.5)),
        (("c", 1.0),),
    ]


@_SETTINGS
@given(st.lists(st.binary(max_size=60).map(lambda raw: raw.replace(b"\n", b" ")), max_size=8))
def test_no_bytes_break_the_reader(tmp_path, lines):
    """Between two good rows, any bytes are either a row or a reason, and no other row is touched."""
    good = [b'{"id": "first", "input": "a"}', b'{"id": "last", "input": "b"}']
    for suffix, between in ((".jsonl", lines), (".csv", [])):
        path = tmp_path / f"rows{suffix}"
        if suffix == ".jsonl":
            path.write_bytes(b"\n".join([good[0], *between, good[1]]))
        else:
            path.write_bytes(b"input,label\n" + b"\n".join(lines))
        result = read_examples(path)
        assert all(row.reason and row.line >= 1 for row in result.rejected)
        if suffix == ".jsonl":
            assert [row.id for row in result.examples if row.id in ("first", "last")] == ["first", "last"]


@_SETTINGS
@given(st.lists(st.tuples(_words, _words), min_size=1, max_size=5))
def test_csv_of_the_standard_writer(tmp_path, rows):
    rows = [(a.replace("\x00", "") or "x", b.replace("\x00", "") or "x") for a, b in rows]
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, quoting=csv.QUOTE_ALL)
        writer.writerow(["question", "answer"])
        writer.writerows(rows)
    result = read_examples(path, columns=ColumnMap(input="question", label="answer"))
    usable = [(a, b) for a, b in rows if a.strip() and b.strip()]
    assert [(row.input, row.label) for row in result.examples] == usable


def test_csv_rows_keep_their_line_across_quoted_line_ends(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffinput,label\n"two\nlines",a\n\nlast,b\n', encoding="utf-8")
    assert [row.source for row in read_examples(path).examples] == [f"{path}:2", f"{path}:5"]


def test_parquet_of_pyarrow_with_lists_and_nulls(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "input": ["q", "r", None],
                "label": ["b", None, "a"],
                "choices": [["a", "b"], ["a", "b"], ["a", "b"]],
            }
        ),
        path,
    )
    result = read_examples(path)
    assert [(row.label, row.choices) for row in result.examples] == [("b", ("a", "b")), (None, ("a", "b"))]
    assert [(row.line, row.reason) for row in result.rejected] == [(3, "empty 'input'")]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_examples(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"label": "a"}', "missing column 'input'"),
        (b'{"input": "  ", "label": "a"}', "empty 'input'"),
        (b'{"input": null}', "empty 'input'"),
        (b'{"input": 5}', "wrong type of 'input'"),
        (b'{"input": ["x"]}', "wrong type of 'input'"),
        (b'{"input": "x", "input": "y"}', "broken JSON"),
        (b'{"input": "x", "label": {"a": 1}}', "wrong type of 'label'"),
        (b'{"input": "x", "label": ""}', "empty 'label'"),
        (b'{"input": "x", "rationale": 3}', "wrong type of 'rationale'"),
        (b'{"input": "x", "choices": "a"}', "unusable 'choices'"),
        (b'{"input": "x", "choices": 3}', "wrong type of 'choices'"),
        (b'{"input": "x", "choices": ["a", "b"], "label": "c"}', "'label' is not among 'choices'"),
        (b'{"input": "x", "confidence": 0}', "'confidence' outside (0, 1]"),
        (b'{"input": "x", "confidence": "much"}', "wrong type of 'confidence'"),
        (b'{"input": "x", "confidence": NaN}', "broken JSON"),
        (b'{"input": "x"', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"input": ' + b"1" * 5000 + b"}", "broken JSON"),
        (b'"just a text"', "not a JSON object"),
        (b'{"input": "caf\xe9"}', "not UTF-8"),
        (b'{"input": "half \\ud800"}', "not UTF-8"),
        (b'{"id": "one", "input": "again"}', "duplicate 'id'"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "one", "input": "fine"}\n\n' + line + b'\n{"id": 2, "input": "fine too"}\n')
    result = read_examples(path)
    assert [row.id for row in result.examples] == ["one", "2"]
    (rejected,) = result.rejected
    assert (rejected.file, rejected.line, rejected.reason) == (str(path), 3, reason)
    if reason != "duplicate 'id'":
        with pytest.raises(DataError, match=r"rows\.jsonl:3: "):
            list(stream_examples(path))


def test_a_number_of_any_length_is_an_id(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": ' + "1" * 400 + ', "input": "x"}\n')
    assert [row.id for row in read_examples(path).examples] == ["1" * 400]


def test_what_is_said_of_a_row_can_be_written(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"\\ud800": "x"}, ' + '{"input": ' + "[" * 900 + "]" * 900 + "}]")
    first, second = read_examples(path).rejected
    assert (first.detail, first.raw) == ("the columns are \\ud800", '{"\\ud800": "x"}')
    assert second.reason == "wrong type of 'input'"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        read_examples(path)


def test_a_parquet_row_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    text = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"input": text}), path)
    result = read_examples(path)
    assert [row.input for row in result.examples] == ["a", "c"]
    assert [str(row) for row in result.rejected] == [f"{path}:2: cannot be read ('input' is not UTF-8)"]


@pytest.mark.parametrize(
    ("content", "reason", "line"),
    [
        (b"input,label\nx,a\ny\n", "wrong number of cells", 3),
        (b"input,label\nx,a\ny,b,c\n", "wrong number of cells", 3),
        (b"input,label\nx,a\n,b\n", "empty 'input'", 3),
        (b"input,label\nx,a\ncaf\xe9,b\n", "not UTF-8", 3),
        (b"input,label\nx,a\n" + b"y" * 200_000 + b",b\n", "broken CSV", 3),
    ],
)
def test_bad_csv_rows(tmp_path, content, reason, line):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    result = read_examples(path)
    assert [row.input for row in result.examples] == ["x"]
    assert [(row.line, row.reason) for row in result.rejected] == [(line, reason)]


@pytest.mark.parametrize("header", [b"input,input\n", b"caf\xe9,input\n", b'"input\n'])
def test_a_bad_csv_header_stops(tmp_path, header):
    path = tmp_path / "rows.csv"
    path.write_bytes(header + b"x,y\n")
    with pytest.raises(DataError, match="header"):
        read_examples(path)


def test_a_named_column_must_be_in_every_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "x", "gold": 3, "input": "no"}\n{"q": "y"}\n')
    result = read_examples(path, columns=ColumnMap.parse(["input=q", "label=gold"]))
    assert [(row.input, row.label) for row in result.examples] == [("x", "3")]
    assert [(row.line, row.reason) for row in result.rejected] == [(2, "missing column 'gold'")]
    for wrong in ("input", "input=", "inputs=q", "=q"):
        with pytest.raises(UsageError, match="FIELD=COLUMN"):
            ColumnMap.parse([wrong])


def test_a_json_array_is_read_like_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"input": "x"}, 3]))
    result = read_examples(path)
    assert [row.input for row in result.examples] == ["x"]
    assert result.rejected[0].reason == "not a JSON object"
    path.write_text('[{"input": "x"}')
    with pytest.raises(DataError, match="broken JSON"):
        read_examples(path)


def test_unknown_sources_name_the_remedy(tmp_path):
    with pytest.raises(DataError, match="no data at"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"\.xml"):
        read_examples(tmp_path / "rows.xml")


def test_limit_and_patterns(tmp_path):
    for part in ("b", "a"):
        write_examples(tmp_path / f"{part}.jsonl", [Example(f"{part}{i}", f"{part}{i}") for i in range(3)])
    assert [row.id for row in stream_examples(tmp_path / "*.jsonl")] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert [row.id for row in stream_examples(tmp_path)] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert len(read_examples(tmp_path, limit=4).examples) == 4


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_streaming_memory_does_not_grow_with_rows(tmp_path, suffix):
    """Ten times the rows must not take twice the memory."""

    def peak(n_rows: int) -> int:
        path = tmp_path / f"rows{n_rows}.{suffix}"
        texts = [f"{i} " + "x" * 200 for i in range(n_rows)]
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"input": texts}), path, row_group_size=500)
        elif suffix == "csv":
            path.write_text("input\n" + "".join(f"{text}\n" for text in texts))
        else:
            path.write_text("".join(json.dumps({"input": text}) + "\n" for text in texts))
        del texts
        sum(1 for _ in stream_examples(path))  # imports and caches
        tracemalloc.start()
        assert sum(1 for _ in stream_examples(path)) == n_rows
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(20_000) < 2 * peak(2_000)
