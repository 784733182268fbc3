"""Tables, page, pictures and the generated documentation."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.bench.core import tables
from sbs_edge.bench.core.pictures import latency_pictures
from sbs_edge.bench.core.results import load_document
from sbs_edge.bench.report import docs, picture
from sbs_edge.bench.report import document as document_module
from sbs_edge.bench.report.document import SMOKE, markdown_report, page, write_report
from sbs_edge.bench.serving.tables import serving_tables
from sbs_edge.cli.app import main


def test_every_system_has_a_row_and_a_peer_that_failed_says_why(document: dict[str, Any]) -> None:
    found = {table.title: table for table in tables.latency_tables(document)}
    states = {row[0]: row[-1] for row in found["Systems and their answers"].rows}
    assert states["openvino"] == "not installed: <openvino>"
    label = {row[0]: row[1] for row in found["Label, ms"].rows}
    assert label["sbs-edge:cpu-int8, label"] == "10.0 / 11.0 / 13.0"
    ratios = found["sbs-edge:cpu-int8 against each peer"].rows
    assert ratios[0][1] == "2.00x (1.90 to 2.10)"
    assert ratios[1][1] == "withheld: worse answers"


def test_markdown_tables_are_rectangular(document: dict[str, Any]) -> None:
    for table in tables.latency_tables(document):
        lines = [line for line in tables.markdown(table).splitlines() if line.startswith("|")]
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert widths == {len(table.columns) + 1}, table.title


class _Checker(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.svgs = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.outside.append(value)


def test_the_page_loads_nothing_and_escapes_what_it_was_given(document: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    text = page(document)
    checker = _Checker()
    checker.feed(text)
    assert checker.outside == []
    assert checker.svgs == 3
    assert "&lt;openvino&gt;" in text
    assert "<openvino>" not in text


def test_every_serving_scenario_is_in_the_table_and_unsent_requests_are_a_miss() -> None:
    case = {"serve_per_s": 20.0, "plain_per_s": 10.0, "ratio": 2.0, "ratios": [2.0, 2.0]}
    plain = {
        "cores": {"server": [0], "client": [1]}, "workers": 1, "cases": {"8 x 16": case},
        "held": {"8 x 16 not behind": True},
    }  # fmt: skip
    both = {"server": [0, 1], "client": [0, 1]}
    ends = {"start": 5, "end": 5}
    soak = {
        "requests": 90, "seconds": 1.0, "codes": {"200": 80, "400": 10}, "rss_slope_mib_per_10k": 0.0, "threads": ends,
        "descriptors": ends,
        "held": {"all_sent": False, "only_200_and_400": True, "rss_slope_1_mib_per_10k": True,
                 "threads_constant": True, "descriptors_constant": True},
    }  # fmt: skip
    scenarios = {
        "plain_shared_2": {**plain, "cores": both, "workers": 2}, "plain_2": {**plain, "workers": 2},
        "plain": plain, "soak": {**soak, "command": ["sbs-edge", "bench", "serving", "soak"]},
    }  # fmt: skip
    model = {"student": "desk", "version": "1", "target": "cpu-int8", "mb": 0.5}
    document = {"model": model, "scenarios": scenarios, "command": ["sbs-edge", "bench", "serving", "all"]}
    (table,) = serving_tables(document)
    assert table.note.endswith(
        "command of their own: `sbs-edge bench serving plain BUNDLE --rounds 2`; `sbs-edge bench serving soak`."
    )
    figures = {row[0]: row[2] for row in table.rows}
    assert figures["soak of 90 mixed requests in 1 s: sent within its time"] == "**90 requests, missed**"
    plain_case = "8 connections, 16 texts a request, against plain FastAPI"
    assert [row[0] for row in table.rows if row[0].startswith("8 ")] == [
        f"{plain_case}, 2 processes a server, shared processors", f"{plain_case}, 2 processes a server", plain_case,
    ]  # fmt: skip
    assert figures[plain_case] == "20 requests a second against 10 (2.00x)"


def test_a_smoke_run_says_so_everywhere(document: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    for quick in (False, True):
        made = {**document, "quick": quick}
        assert ('<p class="banner">' + SMOKE in page(made)) is quick
        assert (SMOKE in markdown_report(made)) is quick


def test_the_legend_names_every_system_once_and_covers_no_curve(document: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    for name, figure, _ in latency_pictures(document):
        figure.canvas.draw()
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert len(names) == len(set(names)) > 1, name
        for axis in figure.axes:
            assert axis.get_legend() is None
            assert not legend.get_window_extent().overlaps(axis.get_window_extent()), name


def test_the_report_is_written_whole(document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = {path.name for path in write_report(document, tmp_path / "out")}
    assert written == {
        "result.json", "result.md", "result.html",
        "latency-size-accuracy.png", "latency-by-length.png", "latency-percentiles.png",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == document
    assert all((tmp_path / "out" / name).stat().st_size > 500 for name in written)
    assert (tmp_path / "out" / "result.md").read_text() == markdown_report(document)


def test_the_benchmarks_page_is_up_to_date(repository: Path) -> None:
    page_file = repository / docs.PAGE
    assert page_file.is_file(), "run: sbs-edge bench docs"
    assert page_file.read_text(encoding="utf-8") == docs.generate(repository / docs.RESULTS), (
        "docs/benchmarks.md is out of date; run: sbs-edge bench docs"
    )


def test_the_newest_result_is_shown_and_older_ones_are_listed(
    document: dict[str, Any], tmp_path: Path
) -> None:
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for day in ("01", "02"):
        (results / f"m-2026-01-{day}.json").write_text(
            json.dumps({**document, "created": f"2026-01-{day}T00:00:00+00:00"})
        )
    (results / "other.json").write_text(json.dumps({"kind": "of another program"}))
    text = docs.generate(results)
    assert "Source: `bench/results/m-2026-01-02.json`" in text
    assert "Older results of the same: `m-2026-01-01.json`" in text
    assert text.count("Label, ms") == 1


def test_the_docs_command_writes_page_and_picture(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    shutil.copytree(repository / docs.RESULTS, tmp_path / docs.RESULTS)
    assert main(["bench", "docs", "--root", str(tmp_path)]) == 0
    assert (tmp_path / docs.PAGE).read_text() == docs.generate(repository / docs.RESULTS)
    assert (tmp_path / picture.PICTURE).read_text() == picture.peers_svg(repository / docs.RESULTS)
    assert main(["bench", "docs", "--root", str(tmp_path / "docs")]) == 2
    assert "give the root of the repository" in " ".join(capsys.readouterr().err.split())


def test_the_picture_shows_the_committed_figures(repository: Path) -> None:
    svg = (repository / picture.PICTURE).read_text(encoding="utf-8")
    shown = re.findall(r">([^<>]+)</(?:text|tspan)>", svg)
    results = repository / docs.RESULTS
    accuracy = picture.accuracy_bars(load_document(results / picture.ACCURACY))
    latency = picture.latency_bars(load_document(results / picture.LATENCY))
    assert [value for _, value, _ in accuracy] == [98.1, 25.6]
    assert latency[0][0] == "sbs-edge, int8"
    assert {name for name, _, _ in latency if name.endswith("*")} == {"onnxruntime, int8*", "optimum, int8*"}
    wanted = [f"{value:.1f} %" for _, value, _ in accuracy]
    wanted += [text for name, value, _ in latency for text in (name, f"{value:.1f}")]
    assert set(wanted) <= set(shown), "run: sbs-edge bench docs"
    assert "<dc:date>" not in svg


def test_an_older_serving_command_is_shown_as_it_is_given_today() -> None:
    command = ["python", "-m", "sbs_edge.bench.serving", "all", "runs/b", "--out", "runs/s.json"]
    assert tables._command({"command": command}) == "sbs-edge bench serving all runs/b --out runs/s"
    assert tables._command({"command": ["sbs-edge", "bench", "all "]}) == "sbs-edge bench all "


def test_committed_results_can_be_read(repository: Path) -> None:
    kinds = set()
    for path in (repository / docs.RESULTS).glob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        kinds.add(document["kind"])
        if document["kind"] in document_module.HEADINGS or document["kind"] in ("scale", "stream-rows"):
            assert document_module.tables_of(document)
    assert kinds == {"builtin", "kernels", "latency", "scale", "serving", "stream-rows", "study", "train"}
