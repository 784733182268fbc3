"""``sbs-edge predict``: every format of the other commands gives the same answers as the same texts as lines."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXTS = ['a, "quoted" pump', "the hot fan\nis loud", "cold"]


def _answers(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _csv(path: Path, rows: list[dict[str, Any]], delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)


_WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    ".csv": lambda path, rows: _csv(path, rows, ","),
    ".TSV": lambda path, rows: _csv(path, rows, "\t"),
    ".jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".parquet": _parquet,
}


@pytest.mark.parametrize("suffix", list(_WRITERS))
def test_a_table_is_read_by_its_columns(
    tiny_bundle: Path, sbs_edge_cli: Run, tmp_path: Path, suffix: str
) -> None:
    from sbs_edge import Student

    rows = [{"number": f"n{i}", "text": text, "gold": "hot"} for i, text in enumerate(TEXTS)]
    _WRITERS[suffix](tmp_path / f"rows{suffix}", rows)
    got = _answers(
        sbs_edge_cli(
            "predict", tiny_bundle, tmp_path / f"rows{suffix}", "--column", "input=text", "--column", "id=number"
        )
    )  # fmt: skip
    with Student.load(tiny_bundle, threads=1) as student:
        wanted = student.predict(TEXTS)
    assert [row["id"] for row in got] == ["n0", "n1", "n2"]
    assert [row["probabilities"] for row in got] == [answer.probabilities for answer in wanted]


def test_choices_of_a_csv_cell(tiny_bundle: Path, sbs_edge_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('input,choices\nhot pump,hot|cold\nfan,"[""fan"", ""pump""]"\ncold,\n')
    got = _answers(sbs_edge_cli("predict", tiny_bundle, tmp_path / "rows.csv"))
    assert [set(row["probabilities"]) for row in got[:2]] == [{"hot", "cold"}, {"fan", "pump"}]
    assert len(got) == 3


def test_lines_stay_lines_and_stdin_may_be_json(tiny_bundle: Path, sbs_edge_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("input,label\nhot pump\n")
    assert len(_answers(sbs_edge_cli("predict", tiny_bundle, tmp_path / "texts.txt"))) == 2
    line = json.dumps({"id": 7, "text": "hot pump"}) + "\n"
    got = _answers(sbs_edge_cli("predict", tiny_bundle, "--jsonl", "--field", "text", stdin=line))
    assert [row["id"] for row in got] == [7]


def test_what_was_written_can_be_repeated(tiny_bundle: Path, sbs_edge_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\nhot pump\n")
    out = tmp_path / "out" / "answers.jsonl"
    done = sbs_edge_cli(
        "predict", tiny_bundle, tmp_path / "rows.csv", "--field", "text", "--out", out, "--abstain-below", "1"
    )
    assert done.returncode == 0, done.stderr
    first = out.read_bytes()
    assert json.loads(first)["abstained"] is True
    out.unlink()
    again = sbs_edge_cli(
        "predict", "--config", out.with_suffix(".config.yaml"), tiny_bundle, tmp_path / "rows.csv"
    )
    assert again.returncode == 0, again.stderr
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "content", "flags", "said"),
    [
        ("rows.csv", "question,label\nhot,hot\n", (), r"rows.csv:2 has no text in the column 'input'"),
        ("rows.csv", "input\nhot,pump\n", (), r"rows.csv:2: wrong number of cells"),
        ("rows.jsonl", '{"input": "hot"}\n{"input"\n', (), r"rows.jsonl:2: broken JSON"),
        ("rows.jsonl", '{"input": "hot", "choices": "[1"}\n', (), r"rows.jsonl:1: 'choices'"),
        ("rows.csv", "input\nhot\n", ("--column", "rationale=why"), "predict reads no column for 'rationale'"),
        ("rows.csv", "input\nhot\n", ("--column", "id=key"), "no column 'key'"),
        ("rows.csv", "input\nhot\n", ("--field", "a", "--column", "input=b"), "one of the two"),
    ],
)  # fmt: skip
def test_a_bad_table_stops_with_file_and_line(
    tiny_bundle: Path, sbs_edge_cli: Run, tmp_path: Path, name: str, content: str, flags: tuple[str, ...], said: str
) -> None:  # fmt: skip
    (tmp_path / name).write_text(content)
    done = sbs_edge_cli("predict", tiny_bundle, tmp_path / name, *flags)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
