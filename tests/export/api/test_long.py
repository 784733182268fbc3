"""Export of bundles that read long inputs: the float32 graphs are compared with PyTorch, the lossy ones with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.data.example import Example
from sbs_edge.errors import UsageError
from sbs_edge.export.api import export
from sbs_edge.runtime.student import Student

Make = Callable[..., Path]
ROLES = {"long_encoder", "long_label_scorer", "long_explainer"}


def long_rows(rows: Callable[..., list[dict[str, Any]]], count: int) -> list[Example]:
    """Rows far over the limit of 40 tokens; the label follows from the last word."""
    return [
        Example(id=row["id"], input=("pump valve room " * 40) + row["input"], label=row["label"])
        for row in rows(count, seed=7)
    ]


def test_a_bundle_with_long_inputs_is_checked_and_answers(
    trained: tuple[Path, Any], rows: Any, tmp_path: Path
) -> None:
    guard = long_rows(rows, 24)
    result = export(
        trained[0], tmp_path / "b", targets=("cpu-int8", "cpu-fp32", "cpu-int4"), guard_data=guard,
        max_drop=100, min_rationale_agreement=0, long={"max_tokens": 1000, "header": "|"},
    )  # fmt: skip
    assert result.manifest["long"] == {
        "chunk": 40, "max_tokens": 1000, "overlap": 0.25, "header": "|", "marker": False, "top_k": None,
        "trained": "never",
    }  # fmt: skip
    compared = result.report["pytorch"]["graphs"]
    assert {"long_label_scorer", "long_explainer (rationale)"} <= set(compared)
    assert all(figures["max_relative_error"] < 1e-4 for figures in compared.values())
    for target in ("cpu-int8", "cpu-fp32", "cpu-int4"):
        assert set(result.manifest["targets"][target]) >= ROLES
        assert result.report["targets"][target]["n"] == 24
    card = (tmp_path / "b" / "README.md").read_text()
    assert "Longer inputs, up to 1000 tokens, are read in chunks of 40" in card
    assert "The student was not trained on such inputs." in card
    with Student.load(tmp_path / "b") as student:
        answer = student.predict(guard[0].input)
    assert answer.n_chunks == 4  # 38 of 40 tokens are the text's, and 29 of them new: 124 <= 38 + 3 * 29


def test_the_other_graphs_are_what_they_are_without(trained: tuple[Path, Any], tmp_path: Path) -> None:
    targets = ("cpu-fp32", "cpu-int8")
    plain = export(trained[0], tmp_path / "a", targets=targets, guard_data=[])
    export(trained[0], tmp_path / "b", targets=targets, guard_data=[], long=True)
    assert "long" not in plain.manifest
    for target in targets:
        for path in sorted((tmp_path / "a" / target).iterdir()):
            assert path.read_bytes() == (tmp_path / "b" / target / path.name).read_bytes()
        size = {
            name: sum(path.stat().st_size for path in (tmp_path / name / target).glob("*.bin"))
            for name in "ab"
        }
        weights = (tmp_path / "a" / target / "weights.bin").stat().st_size
        assert size["b"] - size["a"] < 0.5 * weights  # the encoder and most of the decoder are there once


@pytest.mark.parametrize("kind", ["choices", "open"])
def test_other_kinds_of_labels(make_student: Make, tmp_path: Path, rows: Any, kind: str) -> None:
    student = make_student(tmp_path / "s", kind=kind, labels=())
    own = [Example(id=str(n), input="pump hot", label="go", choices=("go", "stay")) for n in range(3)]
    for name in ("validation.jsonl", "calibration.jsonl"):
        lines = [
            {"id": row.id, "input": row.input, "label": row.label}
            | ({"choices": list(row.choices or ())} if kind == "choices" else {})
            for row in own
        ]
        (student / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = export(student, tmp_path / "b", targets=("cpu-fp32",), long=True)
    role = "long_choice_scorer" if kind == "choices" else "long_explainer (label)"
    assert result.report["pytorch"]["graphs"][role]["rows"] == 3


def test_the_marker_and_top_k_reach_the_bundle(make_student: Make, tmp_path: Path) -> None:
    student = make_student(tmp_path / "s")
    result = export(
        student, tmp_path / "b", targets=("cpu-fp32",), guard_data=[], long={"marker": True, "top_k": 8}
    )
    assert (result.manifest["long"]["marker"], result.manifest["long"]["top_k"]) == (True, 8)
    assert "reads its 8 best states" in (tmp_path / "b" / "README.md").read_text()


def test_a_student_trained_on_long_inputs_says_how(make_student: Make, tmp_path: Path) -> None:
    student = make_student(tmp_path / "s")
    card = json.loads((student / "sbs_edge.json").read_text())
    card["long"] = {"chunk": 24, "max_tokens": 200, "overlap": 0.5, "header": "", "marker": True, "top_k": None,
                    "trained": "random"}  # fmt: skip
    (student / "sbs_edge.json").write_text(json.dumps(card))
    result = export(student, tmp_path / "b", targets=("cpu-fp32",), guard_data=[])
    assert result.manifest["long"] == card["long"] | {"max_tokens": 65536}
    assert "with states drawn at random" in (tmp_path / "b" / "README.md").read_text()
    assert (
        "long"
        not in export(student, tmp_path / "c", targets=("cpu-fp32",), guard_data=[], long=False).manifest
    )
    with pytest.raises(UsageError, match="says itself how they are cut; leave overlap out"):
        export(student, tmp_path / "d", targets=("cpu-fp32",), guard_data=[], long={"overlap": 0.1})
    with pytest.raises(UsageError, match="triton layout cannot hold"):
        export(student, tmp_path / "d", targets=("cpu-fp32",), guard_data=[], layout="triton")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ("cuda-fp16",), "unguarded": True}, "cuda-fp16 is not one; leave it out"),
        ({"layout": "optimum"}, "The optimum layout cannot hold"),
        ({"layout": "triton"}, "The triton layout cannot hold"),
        ({"single_file": True}, "A single file cannot hold"),
        ({"long": {"chunk": 64}}, "longer than the 40 tokens"),
        ({"long": {"max_token": 64}}, "no field 'max_token'"),
        ({"long": {"trained": "full"}}, "no field 'trained'"),
        ({"long": {"max_tokens": 20}}, "less than one chunk of 40"),
    ],
)
def test_what_cannot_be_had_is_refused(
    make_student: Make, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    student = make_student(tmp_path / "s")
    with pytest.raises(UsageError, match=said):
        export(
            student, tmp_path / "b", **{"targets": ("cpu-fp32",), "guard_data": [], "long": True, **options}
        )
    assert not (tmp_path / "b").exists()


def test_the_command_takes_the_settings(
    make_student: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sbs_edge.cli.app import main

    student = str(make_student(tmp_path / "s"))
    out = str(tmp_path / "b")
    assert main(["export", student, "--out", out, "--target", "cpu-fp32", "--top-k", "4", "--no-long"]) == 2
    assert "--no-long leaves long inputs out" in " ".join(capsys.readouterr().err.split())
    arguments = ["--target", "cpu-fp32", "--long", "--max-long-tokens", "900", "--chunk-marker"]
    assert main(["export", student, "--out", out, *arguments, "--chunk-overlap", "0.5", "--json"]) == 0
    long = json.loads(capsys.readouterr().out)["manifest"]["long"]
    assert (long["max_tokens"], long["marker"], long["overlap"]) == (900, True, 0.5)
