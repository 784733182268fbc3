"""``run --add``: a new bundle replaces the one in use only if it is not worse on the same test rows."""

from __future__ import annotations

import json
import random

import pytest

from sbs_edge.analysis.intervals import gain_of
from sbs_edge.cli.app import main
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.data.jsonl import write_examples
from sbs_edge.errors import DataError
from sbs_edge.pipelines.replace import add_rows, next_version
from sbs_edge.runtime.student import Student

WORDS = {"otter": "water", "heron": "water", "badger": "wood", "weasel": "wood"}
FILLER = ("a", "the", "seen", "near", "old", "road", "and", "today", "again", "twice")


def _rows(n, seed, wrong=False):
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        animal = rng.choice(list(WORDS))
        text = " ".join([*rng.choices(FILLER, k=4), animal, *rng.choices(FILLER, k=3)])
        label = WORDS[animal]
        if wrong:
            label = "wood" if label == "water" else "water"
        rows.append(Example(f"{seed}-{i}", text, None, label))
    return rows


TASK = TaskSpec("t", "closed", ("water", "wood"))


def test_added_rows_are_counted_and_the_held_out_splits_stay():
    train, test = _rows(20, 0), _rows(5, 1)
    splits = Splits(TASK, train, _rows(5, 2), test)
    rows = [
        *_rows(3, 3),
        Example("held", test[0].input.upper(), None, "water"),
        Example("again", train[0].input, None, train[0].teacher_label),
        Example(train[1].id, "a new text under an old id", None, " Wood "),
        Example("bare", "no label here", "water"),
    ]
    found, counts = add_rows(splits, rows, "distill")
    assert counts == {"rows": 7, "added": 4, "held_out": 1, "repeated": 1, "unlabelled": 1}
    assert (found.validation, found.test, found.train[:20]) == (splits.validation, test, train)
    assert [row.teacher_label for row in found.train[-1:]] == ["wood"]
    assert len({row.id for row in found.train}) == 24
    with pytest.raises(
        DataError, match="None of the 1 rows can be added: 1 have no label that the mode stepwise learns"
    ):
        add_rows(splits, rows[:1], "stepwise")
    assert (next_version("9"), next_version("a")) == ("10", "a.1")


@pytest.mark.long
def test_a_worse_bundle_is_refused_and_a_better_one_takes_the_place(tmp_path, capsys):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    write_examples(data, _rows(300, 0))
    small = (
        "d_model=32",
        "d_ff=64",
        "n_heads=2",
        "n_layers=1",
        "n_decoder_layers=1",
        "trackers=none",
        "threads=1",
    )
    common = [
        "run", str(data), "--mode", "distill", "--steps", "100", "--target", "cpu-fp32", "--out", str(out), "--json",
        *(part for option in small for part in ("--training", option)),
    ]  # fmt: skip
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    write_examples(bad, _rows(900, 5, wrong=True))
    write_examples(good, _rows(40, 6))

    assert main([*common, "--add", str(bad)]) == 2
    assert "There is no bundle at" in capsys.readouterr().err
    assert main(common) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["replacement"] is None
    manifest = (out / "bundle" / "manifest.json").read_bytes()

    assert main([*common, "--add", str(bad)]) == 3
    told = capsys.readouterr()
    report = json.loads(told.out)
    replacement = report["replacement"]
    assert not replacement["accepted"]
    assert (report["added"]["added"], report["rows"]["test"]) == (900, first["rows"]["test"])
    assert replacement["bundles"][0]["accuracy"] == first["analysis"]["accuracy"]
    assert replacement["bundles"][1]["accuracy"] == report["analysis"]["accuracy"] < 0.5
    assert replacement["gain"]["high"] < 0
    assert "was kept; the new bundle is" in " ".join(told.err.split())
    assert (out / "bundle" / "manifest.json").read_bytes() == manifest
    page = (out / "report.html").read_text()
    assert page.index("less accurate") < page.index("The one in use was kept") < page.index("<h2>")

    assert main([*common, "--add", str(good)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["replacement"]["accepted"]
    assert report["bundle"]["path"] == str(out / "bundle")
    assert not (out / "candidate").exists()
    with Student.load(out / "bundle") as student:
        assert student.manifest["version"] == "2"
    outcomes = report["replacement"]["outcomes"]
    right = (
        [True] * outcomes["both_right"] + [True] * outcomes["only_second"] + [False] * outcomes["only_first"]
    )
    before = (
        [True] * outcomes["both_right"] + [False] * outcomes["only_second"] + [True] * outcomes["only_first"]
    )
    rest = [False] * outcomes["none_right"]
    assert report["replacement"]["gain"]["points"] == gain_of([*right, *rest], [*before, *rest])["points"]
