"""The options of every command: numbers have bounds, messages name only what is there, Ctrl-C is answered."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_args, get_origin

import pytest
import typer

from sbs_edge.cli._command import _with_options
from sbs_edge.cli.app import app, main
from sbs_edge.cli.serve import _FLAGS
from sbs_edge.serve.settings import ServeSettings

Run = Callable[..., subprocess.CompletedProcess[str]]
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
# Flags of other programs that texts of the package name: Triton's, pip's, and the pages' CSS variables.
_FOREIGN = {"--model-repository", "--no-deps", "--line", "--soft"}


def _commands(group: typer.Typer = app, prefix: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield prefix + (command.name or command.callback.__name__), command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from _commands(inner.typer_instance, f"{inner.name} ")


COMMANDS = dict(_commands())


def _declared(callback: Callable[..., Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (parameter, type, what typer was told) of a command."""
    for name, hint in typing.get_type_hints(callback, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, told = get_args(hint)[:2]
            yield name, kind, told


def _flags(callback: Callable[..., Any]) -> set[str]:
    found = {"--help"}
    for name, kind, told in _declared(callback):
        if isinstance(told, typer.models.OptionInfo):
            given = (
                told.default,
                *(told.param_decls or ()),
            )  # in Annotated the first name is typer's "default"
            named = [name for name in given if isinstance(name, str) and name.startswith("-")]
            plain = name.replace("_", "-")
            named = [part for name in named for part in name.split("/")]
            found |= set(named or ({f"--{plain}", f"--no-{plain}"} if kind is bool else {f"--{plain}"}))
    return found


FLAGS = {name: _flags(callback) for name, callback in COMMANDS.items()}


def _atoms(kind: Any) -> set[Any]:
    return {kind} if not get_args(kind) else set().union(*map(_atoms, get_args(kind)))


def test_every_number_has_a_least_value() -> None:
    loose = [
        f"{command} {name}"
        for command, callback in COMMANDS.items()
        for name, kind, told in _declared(callback)
        if _atoms(kind) & {int, float} and told.min is None
    ]
    assert loose == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "student", "--rationales", "-5"),
        ("export", "student", "--out", "b", "--calibration-rows", "0"),
        ("export", "student", "--out", "b", "--max-drop", "-1"),
        ("export", "student", "--out", "b", "--max-drop", "nan"),
        ("predict", "bundle", "--abstain-below", "1.5"),
        ("serve", "bundle", "--watch", "inf"),
        ("run", "--teacher-error", "2"),
    ],
)
def test_a_number_out_of_bounds_is_a_usage_error(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert arguments[-2] in said
    if math.isinf(float(arguments[-1])):
        assert "finite" in said


@pytest.mark.parametrize("option", [("--teacher-error", "0.2"), ("--teacher-samples", "3")])
def test_options_of_the_built_in_teacher_are_refused_for_other_data(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "a", "label": "x"}\n')
    assert main(["run", str(rows), *option, "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "built-in task's own teacher" in " ".join(capsys.readouterr().err.split())
    assert main(["run", *option, "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0


def _texts(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def test_texts_name_flags_that_some_command_has(repository: Path) -> None:
    known = set().union(*FLAGS.values()) | _FOREIGN | {"--debug"}
    wrong = [
        f"{path.relative_to(repository)}: {flag}"
        for folder in ("sbs_edge", "export", "kernels")
        for path in sorted((repository / folder).rglob("*.py"))
        for text in _texts(ast.parse(path.read_text(encoding="utf-8")))
        for flag in _FLAG.findall(text)
        if flag not in known
    ]
    assert wrong == []


def _modules(repository: Path) -> Iterator[tuple[str, set[str], ast.Module]]:
    """Yield (module, flags of its commands, source) of the modules that register commands."""
    for path in sorted((repository / "sbs_edge" / "cli").glob("*.py")):
        name = f"sbs_edge.cli.{path.stem}"
        own = [FLAGS[command] for command, call in COMMANDS.items() if call.__module__ == name]
        if own:
            yield name, set().union(*own), ast.parse(path.read_text(encoding="utf-8"))


def test_a_command_that_fails_names_its_own_flags(repository: Path) -> None:
    wrong = [
        f"{name}: {flag}"
        for name, own, tree in _modules(repository)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        for text in _texts(node)
        for flag in _FLAG.findall(text)
        if flag not in own
    ]
    assert wrong == []


def test_who_can_meet_bad_rows_can_go_on_without_them(repository: Path) -> None:
    """The readers' remedy is ``--skip-bad-rows``, whichever command asked them."""
    met = []
    for name, own, tree in _modules(repository):
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if called & {"refuse", "read_rows", "load_rows", "load_splits", "open_stream"}:
            met.append(name.rpartition(".")[2])
            assert "--skip-bad-rows" in own, name
    assert set(met) >= {"annotate", "compare_teacher", "evaluate", "export", "run", "train"}


def test_what_the_server_refuses_is_named_by_its_flag() -> None:
    for field in set(ServeSettings.model_fields) - {"token", "escalate_key"}:
        assert "--" + _FLAGS.get(field, field).replace("_", "-") in FLAGS["serve"], field


def test_ctrl_c_says_what_is_left_and_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sbs_edge.cli.doctor.diagnose", stop)
    assert main(["doctor"]) == 130
    assert "interrupted: No incomplete file" in capsys.readouterr().err
    monkeypatch.setattr("sbs_edge.training.train.train", stop)
    assert main(["train", "--out", str(tmp_path / "student")]) == 130
    said = "".join(capsys.readouterr().err.split())
    assert f"arein{tmp_path}/student.training;continuewiththesamecommandand--resume" in said


def test_guard_rows_that_cannot_be_used_may_be_left_out(sbs_edge_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "hot", "label": "stay"}\n{broken\n')
    flags = ("--data", tmp_path / "rows.jsonl", "--column", "input=text")
    done = sbs_edge_cli("evaluate", tmp_path, *flags)
    assert done.returncode == 2
    assert "--skip-bad-rows" in done.stderr
    left = sbs_edge_cli("evaluate", tmp_path, *flags, "--skip-bad-rows")
    assert "1 malformed row(s) left out; the first: " in left.stderr
    assert "is not a checkpoint: it has no config.json" in left.stderr


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("or leave them out with skip_bad_rows=True, which reports them.", "--skip-bad-rows, which"),
        (
            "keep_float=['encoder.0', 'head'], which cost most",
            "--keep-float encoder.0 --keep-float head, which",
        ),
        ("choose another label_kind.", "another --label-kind."),
        ("pass dataset='cqa'.", "pass --dataset cqa."),
        ("Map its column with column=['input=NAME'].", "with --column input=NAME."),
        (
            "the file runs/label_kind/x.jsonl and the column 'label_kind'",
            "runs/label_kind/x.jsonl and the column 'label",
        ),
        ("the dataset has no column", "the dataset has"),
        ("with column=['input=my text']", "with --column 'input=my text'"),
    ],
)
def test_the_command_line_names_a_parameter_by_its_option(message: str, shown: str) -> None:
    names = ("skip-bad-rows", "keep-float", "label-kind", "dataset", "column")
    options = [
        SimpleNamespace(name=name.replace("-", "_"), opts=[f"--{name}"], param_type_name="option")
        for name in names
    ]
    assert shown in _with_options(message, options)


def test_library_errors_name_parameters_not_options(repository: Path) -> None:
    found = []
    for folder in ("sbs_edge", "export", "kernels"):
        for path in (repository / folder).rglob("*.py"):
            if "cli" in path.relative_to(repository).parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and re.search(r"['\" (]--(?!no-deps)[a-z]", ast.unparse(node)):
                    found.append(f"{path.relative_to(repository)}:{node.lineno}")
    assert found == []
