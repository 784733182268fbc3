"""``sbs-edge compare``: two real bundles on the same rows, counted by hand."""

from __future__ import annotations

import json
import shutil

import pytest

from sbs_edge.analysis.intervals import gain_of
from sbs_edge.cli.app import main
from sbs_edge.data.example import Example
from sbs_edge.data.jsonl import write_examples
from sbs_edge.errors import UsageError
from sbs_edge.pipelines.compare import compare_bundles
from sbs_edge.pipelines.replace import check_served, judge_replacement, refusal, replace_bundle
from sbs_edge.report.compare import comparison_headline
from sbs_edge.runtime.student import Student


@pytest.fixture(scope="module")
def other_bundle(students, tmp_path_factory):
    return students.write_bundle(students.make_tiny(3), tmp_path_factory.mktemp("other") / "closed")


@pytest.fixture
def rows(some_texts, tiny_bundle):
    """Rows whose gold label is the first bundle's answer, but every fourth."""
    with Student.load(tiny_bundle) as student:
        labels = [answer.label for answer in student.predict(some_texts)]
    return [
        Example(str(i), text, ("stay" if label != "stay" else "go") if i % 4 == 0 else label)
        for i, (text, label) in enumerate(zip(some_texts, labels, strict=True))
    ]


def test_figures_are_those_of_the_answers(rows, tiny_bundle, other_bundle):
    found = compare_bundles(tiny_bundle, other_bundle, rows)
    with Student.load(tiny_bundle) as a, Student.load(other_bundle) as b:
        first, second = ([answer.label for answer in s.predict([r.input for r in rows])] for s in (a, b))
        sizes = [
            sum(f["bytes"] for name, f in s.manifest["files"].items() if name.startswith("cpu-fp32/"))
            for s in (a, b)
        ]
    right = [[given == row.label for given, row in zip(own, rows, strict=True)] for own in (first, second)]
    assert [bundle["accuracy"] for bundle in found["bundles"]] == [0.75, sum(right[1]) / 40]
    assert found["gain"] == gain_of(right[1], right[0])
    assert found["agreement"] == sum(x == y for x, y in zip(first, second, strict=True)) / 40
    assert found["outcomes"]["only_first"] == sum(x and not y for x, y in zip(*right, strict=True))
    assert sum(found["outcomes"].values()) == 40
    assert [bundle["bytes"] for bundle in found["bundles"]] == sizes
    assert [bundle["label_ms"]["calls"] for bundle in found["bundles"]] == [40, 40]
    recalls = {item["label"]: item["recall"] for item in found["labels"]}
    stay = [i for i, row in enumerate(rows) if row.label == "stay"]
    assert recalls["stay"] == [sum(own[i] == "stay" for i in stay) / len(stay) for own in (first, second)]
    assert all(item["labels"][0] != item["labels"][1] for item in found["differing"])
    assert found["differing"][0]["right"] == [True, False]
    assert "less accurate" in comparison_headline(found)


def test_a_bundle_beside_itself_differs_in_nothing(rows, tiny_bundle, tmp_path, capsys):
    write_examples(tmp_path / "rows.jsonl", rows)
    common = ["compare", str(tiny_bundle), str(tiny_bundle), "--data", str(tmp_path / "rows.jsonl")]
    assert main([*common, "--json", "--report", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["agreement"], found["gain"]["points"], found["differing"]) == (1.0, 0.0, [])
    page = (tmp_path / "page.html").read_text()
    assert page.index("No clear difference") < page.index("<table>")
    assert main(common) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "No clear difference: +0.0 points of accuracy for the second bundle (95 % interval +0.0 to +0.0)"
        in shown
    )


def test_rows_without_labels_are_compared_by_their_answers(rows, tiny_bundle, other_bundle):
    bare = [Example(row.id, row.input) for row in rows]
    found = compare_bundles(tiny_bundle, other_bundle, bare)
    assert (found["gain"], found["reference"], found["bundles"][0]["accuracy"]) == (None, None, None)
    assert "No row has a label to judge the bundles by" in comparison_headline(found)


def test_bundles_of_two_kinds_are_refused(rows, tiny_bundle, open_bundle):
    with pytest.raises(UsageError, match="Compare bundles of one task"):
        compare_bundles(tiny_bundle, open_bundle, rows)


def test_a_bundle_that_is_not_worse_takes_the_place_and_a_worse_one_does_not(
    rows, tiny_bundle, other_bundle, tmp_path
):
    served, candidate = tmp_path / "bundle", tmp_path / "candidate"
    shutil.copytree(tiny_bundle, served)
    shutil.copytree(other_bundle, candidate)
    found = judge_replacement(served, candidate, rows, 1.0)
    assert (found["accepted"], found["max_loss"]) == (False, 1.0)
    said = refusal(found, served, candidate)
    assert f"{found['gain']['points']:+.2f} points (95 % interval {found['gain']['low']:+.2f}" in said
    assert f"{served} was kept; the new bundle is {candidate}" in said
    assert (
        judge_replacement(served, candidate, rows, 100.0)["accepted"] is False
    )  # the interval is below zero
    assert judge_replacement(candidate, served, rows, 0.0)["accepted"]
    assert judge_replacement(served, served, rows, 0.0)["accepted"]
    bare = [Example(row.id, row.input) for row in rows]
    assert not judge_replacement(served, served, bare, 1.0)["accepted"]
    assert "No test row has a label" in refusal(
        judge_replacement(served, served, bare, 1.0), served, candidate
    )
    replace_bundle(served, candidate)
    assert not candidate.exists()
    assert (served / "manifest.json").read_bytes() == (other_bundle / "manifest.json").read_bytes()
    check_served(served)
    with pytest.raises(UsageError, match="There is no bundle at"):
        check_served(candidate)
