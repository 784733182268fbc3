"""The long-input bench on a tiny bundle: every way and peer has figures, and a failure has its reason."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.bench.long import bench as bench_long
from sbs_edge.bench.long.bench import _run
from sbs_edge.bench.long.tables import long_tables
from sbs_edge.bench.long.ways import WAYS, Reader
from sbs_edge.bench.long.worker import measure_peer, measure_way
from sbs_edge.cli.app import main
from sbs_edge.errors import UsageError
from sbs_edge.runtime.student import Student
from sbs_edge.windows import LongSettings


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = spec_from_file_location("tiny_long", Path(__file__).parents[1] / "runtime" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    tiny: Any = module_from_spec(spec)
    sys.modules[spec.name] = tiny
    spec.loader.exec_module(tiny)
    long = LongSettings(chunk=40, max_tokens=400, header="|").describe()
    made = tiny.write_bundle(tiny.make_tiny(), tmp_path_factory.mktemp("long") / "b", long=long)
    return Path(made)


def test_the_command_measures_every_way(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        "--lengths",
        "150",
        "--rows",
        "1",
        "--calls",
        "1",
        "--against",
        "",
        "--out",
        str(out),
        "--json",
    ]
    assert main(["bench", "long", str(bundle), *arguments]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [record["way"] for record in document["records"]] == list(WAYS)
    for record in document["records"]:
        assert record["ms"] > 0, record
        assert record["peak_mb"] > record["above_loaded_mb"] >= 0
        assert record["accuracy"] is None  # another task's bundle
    assert "Memory beyond the loaded model" in (out / "result.md").read_text()
    assert (out / "long.png").stat().st_size > 1000


def test_what_is_not_measured_is_listed_with_its_reason(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_long, "FULL_ATTENTION_TOKENS", 60)
    monkeypatch.setattr(bench_long, "WAYS", ("truncation", "full attention"))
    arguments = [
        "--lengths",
        "50,70",
        "--rows",
        "1",
        "--calls",
        "1",
        "--against",
        "",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["bench", "long", str(bundle), *arguments]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["tokens"], r["way"], r["ms"] is None) for r in document["records"]] == [
        (50, "truncation", False), (50, "full attention", False),
        (70, "truncation", False), (70, "full attention", True),
    ]  # fmt: skip
    assert (document["format"], document["seed"]) == (1, 0)
    text = (tmp_path / "out" / "result.md").read_text()
    assert "| 70 | full attention | full attention is measured up to 60 tokens" in text
    monkeypatch.setattr(bench_long, "FULL_ATTENTION_TOKENS", 1000)
    monkeypatch.setattr(bench_long, "WAYS", ("voting", "all states", "full attention"))
    assert (
        main(
            ["bench", "long", str(bundle), "--lengths", "500", "--rows", "1", "--calls", "1", "--against", ""]
        )
        == 0
    )
    voting, *others = json.loads(capsys.readouterr().out.splitlines()[-1])["records"]
    assert voting["ms"] > 0
    for record in others:  # cut to the bundle's 400 tokens, it would have the figures of a shorter input
        assert record["ms"] is None
        assert record["failed"].startswith("Text 0 has more than 400 tokens")
    monkeypatch.setattr(bench_long, "FULL_ATTENTION_TOKENS", 60)
    monkeypatch.setattr(bench_long, "WAYS", ("full attention",))
    assert main(["bench", "long", str(bundle), "--lengths", "70", "--against", ""]) == 1


@pytest.mark.parametrize("peer", ["led", "longt5"])
def test_models_made_for_long_inputs_are_measured_in_the_same_shape(bundle: Path, peer: str) -> None:
    found = measure_peer({"bundle": str(bundle), "peer": peer, "tokens": 300, "calls": 1, "threads": 1})
    assert found["ms"] > 0
    assert found["accuracy"] is None


def test_accuracy_is_that_of_the_shift_logs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"bundle": str(bundle), "way": "all states", "tokens": 150, "rows": 4, "calls": 1, "top_k": 8,
            "target": None, "threads": 1, "seed": 0}  # fmt: skip
    assert measure_way(spec)["accuracy"] is None
    monkeypatch.setattr("sbs_edge.data.shift_log.NAME", "tiny")
    assert measure_way(spec)["accuracy"] == 0  # its labels are others


def test_a_failure_is_a_row_with_its_reason() -> None:
    record = {"tokens": 9, "way": "voting", **_run({"way": "voting", "bundle": "absent", "threads": 1})}
    assert record["ms"] is None
    tables = long_tables({"records": [record]})
    assert tables[-1].title == "Not measured"
    assert "absent" in tables[-1].rows[0][2]


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--against", "bert"], "no peer 'bert'"), (["--lengths", "7"], "--lengths")]
)
def test_wrong_arguments_are_refused(
    bundle: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "long", str(bundle), *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_ways_read_what_they_say(bundle: Path) -> None:
    text = "noise | " + "pump valve fan door " * 30
    with Student.load(bundle) as student, Student.load(bundle, long=False, truncate=True) as plain:
        expected = {"all states": student.predict(text).label, "truncation": plain.predict(text).label}
    for way, label in expected.items():
        with Reader(bundle, way) as reader:  # type: ignore[arg-type]
            assert reader.label(text) == label
    with Reader(bundle, "full attention") as reader:
        whole = reader._student.predict(text)
        assert (whole.n_chunks, whole.truncated, whole.n_input_tokens) == (1, False, 124)
    with Reader(bundle, "voting") as reader, Student.load(bundle, long=False) as student:
        ids = student.tokenize([text])[0]
        assert reader._chunks is not None
        chunks = reader._chunks.chunks(text, ids, "[label] ")
        votes = student.predict(["x"] * len(chunks), tokens=[chunk.ids for chunk in chunks])
        sums = {label: sum(vote.probabilities[label] for vote in votes) for label in student.labels}
        assert len(chunks) > 3
        assert reader.label(text) == max(sums, key=sums.__getitem__)


def test_a_bundle_without_long_inputs_is_refused(tmp_path: Path, bundle: Path) -> None:
    import shutil

    from sbs_edge.runtime.bundle import seal
    from sbs_edge.runtime.manifest import read_manifest

    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    manifest = read_manifest(copy)
    del manifest["long"]
    seal(copy, manifest)
    with pytest.raises(UsageError, match="must read long inputs and have a closed label set"):
        Reader(copy, "voting")
