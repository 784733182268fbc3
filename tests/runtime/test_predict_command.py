"""``sbs-edge predict``: every format of the other commands gives the same answers as the same texts as lines."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.cli.app import main

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXTS = ['a, "quoted" pump', "the hot fan\nis loud", "cold"]


def _answers(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _csv(path: Path, rows: list[dict[str, Any]], delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        if delimiter == "\t":  # which has no quoting
            lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
            handle.writelines("\t".join(line) + "\n" for line in lines)
            return
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

    texts = [text.replace("\n", " ") for text in TEXTS] if suffix == ".TSV" else TEXTS
    rows = [{"number": f"n{i}", "text": text, "gold": "hot"} for i, text in enumerate(texts)]
    _WRITERS[suffix](tmp_path / f"rows{suffix}", rows)
    got = _answers(
        sbs_edge_cli(
            "predict", tiny_bundle, tmp_path / f"rows{suffix}", "--column", "input=text", "--column", "id=number"
        )
    )  # fmt: skip
    with Student.load(tiny_bundle, threads=1) as student:
        wanted = student.predict(texts)
    assert [row["id"] for row in got] == ["n0", "n1", "n2"]
    assert [row["probabilities"] for row in got] == [answer.probabilities for answer in wanted]


def test_a_file_without_rows_and_a_folder_are_named(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["predict", str(tiny_bundle), str(tmp_path / "empty.jsonl")]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "has no rows, so there are no answers" in " ".join(captured.err.split())
    assert main(["predict", str(tiny_bundle), str(tmp_path)]) == 2
    assert "Name a file, or use --engine ray for a folder." in " ".join(capsys.readouterr().err.split())


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
        ("rows.csv", "question,label\nhot,hot\n", (), r"rows.csv:2: no text in the column 'input'"),
        ("rows.csv", "input\nhot,pump\n", (), r"rows.csv:2: wrong number of cells"),
        ("rows.jsonl", '{"input": "hot"}\n{"input"\n', (), r"rows.jsonl:2: broken JSON"),
        ("rows.jsonl", '{"input": "hot", "choices": "[1"}\n', (), r"rows.jsonl:1: 'choices'"),
        ("rows.jsonl", '{"input": "hot"}\n{"input": "\\ud800"}\n', (), "rows.jsonl:2: the text in the column"),
        ("rows.jsonl", '{"input": "hot", "choices": ["\\ud800", "hot"]}\n', (), "rows.jsonl:1: one of 'choices' is"),
        ("rows.jsonl", '{"input": "hot", "choices": ["hot", ""]}\n', (), "rows.jsonl:1: The label ''"),
        ("rows.jsonl", '{"input": "hot", "choices": {"hot": 1, "cold": 2}}\n', (), "rows.jsonl:1: 'choices' must be a list"),
        ("rows.jsonl", '{"input": ' + "[" * 100_000, (), "rows.jsonl:1: broken JSON (nested too deeply)"),
        ("rows.json", '[{"input": ' + "[" * 100_000, (), "rows.json is broken JSON: nested too deeply"),
        ("rows.jsonl", '{"input": " "}\n', (), "rows.jsonl:1: the text in the column 'input' is empty"),
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


def test_half_a_character_is_spelt_out_in_an_id(tiny_bundle: Path, sbs_edge_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a\\ud800", "input": "hot pump"}\n')
    (answer,) = _answers(sbs_edge_cli("predict", tiny_bundle, tmp_path / "rows.jsonl"))
    assert answer["id"] == "a\\ud800"


def test_bytes_of_a_parquet_text_that_are_no_utf8(
    tiny_bundle: Path, sbs_edge_cli: Run, tmp_path: Path
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"input": pa.array([b"hot", b"\xff"]).view(pa.string())}), path)
    done = sbs_edge_cli("predict", tiny_bundle, path)
    assert done.returncode == 2
    assert f"{path}:2: cannot be read ('input' is not UTF-8)" in done.stderr


def test_an_answer_does_not_depend_on_what_the_other_rows_bring(
    tiny_bundle: Path, sbs_edge_cli: Run, tmp_path: Path
) -> None:
    alone, company = tmp_path / "alone.jsonl", tmp_path / "company.jsonl"
    alone.write_text('{"input": "hot pump"}\n')
    company.write_text(alone.read_text() + '{"input": "fan", "choices": "fan|pump"}\n')
    first = _answers(sbs_edge_cli("predict", tiny_bundle, alone))
    assert _answers(sbs_edge_cli("predict", tiny_bundle, company))[:1] == first
    got = _answers(sbs_edge_cli("predict", tiny_bundle, company, "--label", "fan", "--label", "pump"))
    assert [set(row["probabilities"]) for row in got] == [{"fan", "pump"}] * 2


def test_input_and_output_are_other_names(tiny_bundle: Path, sbs_edge_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("input\nhot pump\n")
    rows, out = tmp_path / "rows.csv", tmp_path / "answers.jsonl"
    done = sbs_edge_cli("predict", tiny_bundle, "--input", rows, "--output", out)
    assert done.returncode == 0, done.stderr
    said = out.with_suffix(".config.yaml").read_text()
    assert f"source: {rows}\n" in said
    assert f"out: {out}\n" in said
    assert "input:" not in said
    first = out.read_bytes()
    out.unlink()
    again = sbs_edge_cli("predict", tiny_bundle, "--config", out.with_suffix(".config.yaml"))
    assert again.returncode == 0, again.stderr
    assert out.read_bytes() == first
    other = tmp_path / "other.jsonl"
    done = sbs_edge_cli(
        "predict", tiny_bundle, "--config", out.with_suffix(".config.yaml"), "--output", other
    )  # a flag wins over the file
    assert done.returncode == 0, done.stderr
    assert other.read_bytes() == first
    for both in ((rows, "--input", rows), ("--input", rows, "--out", out, "--output", out)):
        done = sbs_edge_cli("predict", tiny_bundle, *both)
        assert done.returncode == 2
        assert "two names of the same option" in done.stderr
