"""``bench compare``: what it calls worse, better or noise, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.bench.core.compare import compare, conditions
from sbs_edge.bench.core.results import Row, load_document
from sbs_edge.errors import DataError

Better = Literal["lower", "higher"]


def _document(value: float, rounds: list[float], better: Better = "lower") -> dict[str, Any]:
    row = Row("label", "sbs-edge", "label", "batch 1", "ms", better, value, rounds)
    return {"format": 1, "kind": "latency", "rows": [row.as_dict()]}


@given(
    st.lists(st.floats(9.9, 10.1), min_size=3, max_size=8),
    st.floats(0.2, 5.0).filter(lambda f: abs(f - 1.1) > 0.05 and abs(f - 1 / 1.1) > 0.05),
    st.sampled_from(["lower", "higher"]),
)
def test_a_change_beyond_noise_and_tolerance_is_named_in_the_right_direction(
    rounds: list[float], factor: float, better: Better
) -> None:
    after = [value * factor for value in rounds]
    (change,) = compare(_document(10.0, rounds, better), _document(10.0 * factor, after, better), 0.1)
    worse = factor if better == "lower" else 1 / factor
    expected = "worse" if worse > 1.1 else "better" if worse < 1 / 1.1 else "within tolerance"
    assert change.verdict == expected
    assert change.low <= change.change <= change.high
    (back,) = compare(_document(10.0 * factor, after, better), _document(10.0, rounds, better), 0.1)
    opposite = {"worse": "better", "better": "worse"}
    assert back.verdict == opposite.get(expected, expected)


@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=9))
def test_a_result_is_never_worse_than_itself(rounds: list[float]) -> None:
    document = _document(rounds[0], rounds)
    (change,) = compare(document, document, 0.0)
    assert change.change == pytest.approx(1.0)
    assert change.verdict != "worse"


def test_rounds_that_overlap_are_noise_however_far_the_medians() -> None:
    first = _document(10.0, [5.0, 10.0, 30.0])
    second = _document(14.0, [6.0, 14.0, 25.0])
    (change,) = compare(first, second, 0.1)
    assert change.change == pytest.approx(1.4)
    assert change.verdict == "within noise"


def test_results_that_share_nothing_are_refused(document: dict[str, Any]) -> None:
    other = copy.deepcopy(document)
    for row in other["rows"]:
        row["case"] += " of another run"
    with pytest.raises(DataError, match="no measured row in common"):
        compare(document, other)
    other["kind"] = "train"
    with pytest.raises(DataError, match="same bench"):
        compare(document, other)


def test_other_conditions_are_named(document: dict[str, Any]) -> None:
    other = copy.deepcopy(document)
    other["threads"] = 2
    other["versions"]["numpy"] = "0"
    other["machine"]["cpu"] = "another"
    found = "\n".join(conditions(document, other))
    assert "threads: 1 -> 2" in found
    assert "numpy" in found
    assert "machine.cpu" in found
    assert conditions(document, document) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not a result"),
        ('{"rows": [], "format": 99}', "format 99"),
        ('{"rows": [{"colour": 1}], "format": 1}', "a row"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_document(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_document(tmp_path / "absent.json")


def test_the_command_exits_1_past_the_tolerance_only(
    sbs_edge_cli: Callable[..., CompletedProcess[str]], tmp_path: Path, document: dict[str, Any]
) -> None:
    slower = copy.deepcopy(document)
    slower["rows"][0]["value"] = 13.0
    slower["rows"][0]["rounds"] = [12.9, 13.0, 13.1]
    slower["rows"][1]["value"] = 90.0  # a peer: not judged unless asked
    slower["rows"][1]["rounds"] = [90.0, 90.0]
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(document))
    new.write_text(json.dumps(slower))
    done = sbs_edge_cli("bench", "compare", old, new, "--json")
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert said["worse"] == 1
    assert {item["system"] for item in said["changes"]} == {"sbs-edge:cpu-int8"}
    assert sbs_edge_cli("bench", "compare", old, new, "--tolerance", "0.5").returncode == 0
    everyone = sbs_edge_cli("bench", "compare", old, new, "--system", "", "--json")
    assert json.loads(everyone.stdout)["worse"] == 2
    assert sbs_edge_cli("bench", "compare", old, tmp_path / "absent.json").returncode == 2
