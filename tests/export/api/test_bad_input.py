"""An export that fails gives a clear error and an exit code, and leaves the previous bundle untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbs_edge.cli.app import main
from sbs_edge.data.example import Example
from sbs_edge.errors import DataError, SbsEdgeError, UsageError
from sbs_edge.export import assemble
from sbs_edge.export.api import export
from sbs_edge.export.check.parity import accept
from sbs_edge.export.targets import TARGETS, providers_here
from sbs_edge.runtime.bundle import Bundle


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def previous(make_student: Any, tmp_path: Path) -> Callable[[], None]:
    """Write a bundle to ``out``; the function returned checks that nothing else is there and no byte moved."""
    export(make_student(tmp_path / "first"), tmp_path / "out", targets=("cpu-fp32",))
    before, names = listing(tmp_path / "out"), {path.name for path in tmp_path.iterdir()}

    def check(*made: str) -> None:
        assert listing(tmp_path / "out") == before
        assert {path.name for path in tmp_path.iterdir()} == names | set(made)

    return check


@pytest.mark.parametrize("target", ["cuda-fp16", "tensorrt-int8"])
def test_a_target_that_cannot_run_here(
    previous: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    if providers_here(TARGETS[target]):
        pytest.skip(f"this machine runs {target}")
    command = ["export", str(tmp_path / "first"), "--out", str(tmp_path / "out"), "--target", target]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert TARGETS[target].providers[0] in said
    assert "--unguarded" in said
    previous()
    result = export(tmp_path / "first", tmp_path / "b", targets=(target,), unguarded=True)
    assert TARGETS[target].providers[0] in result.manifest["targets"][target]["unmeasured"]
    assert "not measured: the machine that exported it" in (tmp_path / "b" / "README.md").read_text()


def test_rows_with_labels_the_student_cannot_give(
    make_student: Any, previous: Callable[..., None], tmp_path: Path
) -> None:
    for name in ("validation.jsonl", "calibration.jsonl"):
        student = Path(shutil.copytree(tmp_path / "first", tmp_path / name))
        lines = (student / name).read_text().splitlines()
        lines[4] = json.dumps({**json.loads(lines[4]), "label": "fly"})
        (student / name).write_text("\n".join(lines) + "\n")
        with pytest.raises(DataError, match=rf"{name}.*'fly'.*'stay', 'go', 'wait'") as caught:
            export(student, tmp_path / "out")
        assert caught.value.exit_code == 2
    # A teacher's label is not a gold label of the data: training accepts it, and so does export.
    student = Path(shutil.copytree(tmp_path / "first", tmp_path / "teacher"))
    row = {"id": "t", "input": "hot pump", "teacher_label": "fly", "rationale": "so"}
    (student / "calibration.jsonl").write_text(json.dumps(row) + "\n")
    export(student, tmp_path / "taught", targets=("cpu-fp32",))
    previous("validation.jsonl", "calibration.jsonl", "teacher", "taught")


class Full:
    """A disk that is full from the n-th write below a folder on."""

    def __init__(self, root: Path, allowed: int) -> None:
        self.root, self.allowed = root, allowed
        self.met = False

    def guard(self, function: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            path = path_of(*args)
            if str(path).startswith(str(self.root)):
                self.allowed -= 1
                if self.allowed < 0:
                    self.met = True
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return function(*args, **options)

        return guarded


@pytest.mark.parametrize("allowed", [0, 1, 2, 4, 6, 8, 10, 12, 14])
def test_a_disk_that_fills_up_half_way(
    previous: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    disk = Full(tmp_path / ".out", allowed)  # the temporary directory beside the bundle: .out.*.tmp
    real_open = Path.open

    def opens(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return (guarded_open if "w" in mode else real_open)(path, mode, *args, **options)

    guarded_open = disk.guard(real_open, lambda path, *_: path)
    monkeypatch.setattr(Path, "open", opens)
    monkeypatch.setattr(shutil, "copyfile", disk.guard(shutil.copyfile, lambda source, target: target))
    monkeypatch.setattr(os, "fsync", disk.guard(os.fsync, lambda fd: os.readlink(f"/proc/self/fd/{fd}")))
    code = main(["export", str(tmp_path / "first"), "--out", str(tmp_path / "out"), "--target", "cpu-int8"])
    monkeypatch.undo()
    assert disk.met
    assert code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "The disk is full" in said
    assert "Traceback" not in said
    previous()
    Bundle.open(tmp_path / "out")


def spoiled(builder: Callable[..., Any]) -> Callable[..., Any]:
    """A graph writer with a mistake: every attention output a little too large."""

    def build(weights: Any, *args: Any, **options: Any) -> Any:
        arrays = {
            name: array * np.float32(1.02) if name.endswith("EncDecAttention.o.weight") else array
            for name, array in weights.arrays.items()
        }
        return builder(type(weights)(**{**vars(weights), "arrays": arrays}), *args, **options)

    return build


def test_a_score_that_is_not_finite_never_agrees_with_pytorch() -> None:
    expected = [np.array([1.0, 0.0])] * 2
    with pytest.raises(SbsEdgeError, match="label_scorer differs from PyTorch"):
        accept("label_scorer", [expected[0], np.array([np.nan, 0.0])], expected)


@pytest.mark.parametrize(
    ("builder", "kind", "labels", "graph"),
    [
        ("build_label_classifier", "closed", ("stay", "go", "wait"), "label_scorer"),
        ("build_trie_classifier", "closed", ("red one", "red two", "blue"), "label_scorer"),
        ("build_choice_classifier", "choices", (), "choice_scorer"),
        ("build_rationale_generator", "open", (), "explainer"),
        ("build_rationale_generator", "closed", ("stay", "go", "wait"), "explainer"),
    ],
)
def test_graphs_that_differ_from_pytorch_are_never_written(
    make_student: Any, previous: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    builder: str, kind: str, labels: tuple[str, ...], graph: str,
) -> None:  # fmt: skip
    student = make_student(tmp_path / "student", kind=kind, labels=labels)
    guard = [
        Example(
            str(i), text, None, None, None, ("red pump", "red fan", "door") if kind == "choices" else None
        )
        for i, text in enumerate(("hot fan", "cold door room", "ice"))
    ]
    for name in ("validation.jsonl", "calibration.jsonl"):
        (student / name).write_text("")
    good = export(student, tmp_path / "good", targets=("cpu-fp32",), guard_data=guard)
    figures = {name.split(" ")[0]: f for name, f in good.report["pytorch"]["graphs"].items()}
    assert figures[graph]["max_relative_error"] < 1e-4
    assert figures[graph]["rows"] == 3
    monkeypatch.setattr(assemble, builder, spoiled(getattr(assemble, builder)))
    with pytest.raises(SbsEdgeError, match=rf"{graph} differs from PyTorch .*nothing was written") as caught:
        export(student, tmp_path / "out", targets=("cpu-fp32",), guard_data=guard)
    assert caught.value.exit_code == 1
    # Without rows it is compared on the labels themselves, where a task has labels.
    if labels:
        with pytest.raises(SbsEdgeError, match=f"{graph} differs"):
            export(student, tmp_path / "out", targets=("cpu-fp32",))
    previous("student", "good")


def test_absent_targets_and_options_are_refused_before_any_work(
    previous: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no target"):
        export(tmp_path / "nothing", tmp_path / "out", targets=("tpu",))
    previous()


def test_an_export_replaces_nothing_but_an_export(make_student: Any, tmp_path: Path) -> None:
    student = make_student(tmp_path / "students" / "first")
    before = listing(tmp_path)
    for out in (student, tmp_path / "students"):
        with pytest.raises(UsageError, match="is the student's own directory"):
            export(student, out, targets=("cpu-fp32",))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        export(student, tmp_path / "notes", targets=("cpu-fp32",))
    assert listing(tmp_path) == {**before, "notes/a.txt": b"mine"}


def test_an_unknown_target_is_answered_with_the_known_ones(make_student: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no target 'tpu'; the targets are cpu-fp32, .*tensorrt-int8"):
        export(make_student(tmp_path / "first"), tmp_path / "out", targets=("tpu",))


def _edit_tensors(student: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(student / "model.safetensors")
    edit(tensors)
    save_file(tensors, student / "model.safetensors", {"format": "pt"})


def _edit_tokenizer(student: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    saved = json.loads((student / "tokenizer.json").read_text())
    edit(saved)
    (student / "tokenizer.json").write_text(json.dumps(saved))


def _edit_line(student: Path, name: str, number: int, text: str) -> None:
    lines = (student / name).read_text().splitlines()
    lines[number - 1] = text
    (student / name).write_text("\n".join(lines) + "\n")


def _cut(student: Path) -> None:
    whole = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(whole[: len(whole) // 2])


WO = "encoder.block.1.layer.1.DenseReluDense.wo.weight"

DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor is missing": (
        lambda s: _edit_tensors(s, lambda t: t.pop(WO)),
        rf"lacks 1 tensor\(s\).*{WO}",
    ),
    "a tensor has another shape": (
        lambda s: _edit_tensors(s, lambda t: t.update({WO: t[WO][:, :-1].contiguous()})),
        r"in the shape \(32, 63\), but its config.json describes \(32, 64\)",
    ),
    "a tensor is not finite": (
        lambda s: _edit_tensors(s, lambda t: t[WO][0].fill_(float("nan"))),
        rf"{WO} has numbers that are not finite",
    ),
    "the weights are cut off": (_cut, "cannot be read .* damaged or cut"),
    "the tokenizer is damaged": (
        lambda s: (s / "tokenizer.json").write_text("{}"),
        "tokenizer.json is not a tokenizer",
    ),
    "the tokenizer is another model's": (
        lambda s: _edit_tokenizer(s, lambda t: t["model"]["vocab"].update(elsewhere=9999)),
        "'elsewhere' the number 9999.*do not belong together",
    ),
    "a validation row is damaged": (
        lambda s: _edit_line(s, "validation.jsonl", 7, '{"id": "6", "inp'),
        r"validation.jsonl:7: .*copy the student again",
    ),
    "a calibration row is damaged": (
        lambda s: _edit_line(s, "calibration.jsonl", 3, '{"id": "2", "input": 5}'),
        r"calibration.jsonl:3: wrong type of 'input'",
    ),
}


@pytest.mark.parametrize("what", list(DAMAGE))
def test_a_damaged_student_is_not_exported(
    previous: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    import re

    student = Path(shutil.copytree(tmp_path / "first", tmp_path / "damaged"))
    damage, said = DAMAGE[what]
    damage(student)
    assert main(["export", str(student), "--out", str(tmp_path / "out"), "--target", "cpu-int8"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(said, error), error
    assert "internal error" not in error
    previous("damaged")


def test_a_label_of_unknown_words_is_refused(make_student: Any, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", labels=("stay", "日本"))
    with pytest.raises(UsageError, match="label '日本' has no token in this student's tokenizer"):
        export(student, tmp_path / "out", guard_data=[])
