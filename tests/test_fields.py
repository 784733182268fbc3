"""Options of ``train`` come from its configuration; near misses, environment names, files and progress."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from sbs_edge import files
from sbs_edge.analysis.intervals import gain_of
from sbs_edge.cli._common import resolved
from sbs_edge.cli._fields import parse_fields
from sbs_edge.cli._suggest import suggested
from sbs_edge.cli.app import app, main
from sbs_edge.errors import UsageError
from sbs_edge.progress import EVERY_S, ProgressLine, duration
from sbs_edge.report.run import headline
from sbs_edge.training.config import TrainConfig, make_config


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


COMMANDS = dict(_commands(typer.main.get_command(app)))


def _options(command: str) -> Iterator[Any]:
    for item in COMMANDS[command].params:
        if item.param_type_name == "option":
            yield item


# A value other than the default for every field; pairs that exclude each other are set in two runs.
VALUES: dict[str, Any] = {
    "mode": "distill", "rationale_weight": 2.5, "alpha": 0.25, "head_start": 0.3, "drop_doubtful": True,
    "prefixes": "authors", "label_prefix": "no ",
    "rationale_prefix": "why: ", "row_weight": "confidence", "soft_labels": 0.5,
    "soft_temperature": 2.0, "rationales": "all", "model": "dir",
    "encoder_layers": 3, "decoder_layers": 2, "d_model": 128, "d_ff": 64, "n_heads": 8,
    "n_layers": 3, "n_decoder_layers": 1, "gated": True, "tied": False, "dropout": 0.2, "tokenizer": "unigram",
    "vocabulary": 100, "lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 0.002, "weight_decay": 0.5,
    "clip_norm": 0.0, "label_smoothing": 0.1, "z_loss": 0.01, "batch_size": 7, "gradient_accumulation": 2,
    "max_steps": 9, "epochs": 1.5, "warmup": 0, "schedule": "linear", "hold": 0.1, "final": 0.2,
    "long": "random", "max_long_tokens": 99, "chunk_overlap": 0.5, "chunk_header": " | ", "chunk_marker": True,
    "max_source_tokens": 33, "max_target_tokens": 22, "shuffle_buffer": 5, "seed": 3, "eval_steps": 4,
    "eval_batch_size": 6, "validation_rows": 11, "early_stopping_patience": 2, "select": "last", "save_steps": 0,
    "keep_checkpoints": 1, "resume": True, "bf16": True, "gradient_checkpointing": True, "fsdp": True, "threads": 1,
    "workspace_mb": 12.0, "loss_engine": "reference", "trackers": ("wandb",), "progress": False,
}  # fmt: skip


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Collect the configuration that ``train`` makes, and stop there."""
    seen: list[TrainConfig] = []

    def make(config: TrainConfig | None, overrides: dict[str, Any]) -> TrainConfig:
        seen.append(make_config(config, overrides))
        raise UsageError("seen")

    monkeypatch.setattr("sbs_edge.cli.train.make_config", make)
    return seen


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else ["--no-" + flag[2:]]
    return [flag, *value] if isinstance(value, tuple) else [flag, str(value)]


def test_the_values_cover_every_field() -> None:
    assert set(VALUES) == set(TrainConfig.model_fields)
    assert all(VALUES[name] != field.default for name, field in TrainConfig.model_fields.items())
    assert all(field.description for field in TrainConfig.model_fields.values())


@pytest.mark.parametrize("way", ["option", "file", "environment", "training"])
@pytest.mark.parametrize("left_out", [("alpha", "epochs"), ("rationale_weight", "max_steps")])
def test_every_field_can_be_set_in_every_way(
    settings: list[TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: str,
    left_out: tuple[str, str],
) -> None:
    values = {name: value for name, value in VALUES.items() if name not in left_out}
    if way == "option":
        arguments = [part for name, value in values.items() for part in _flag(name, value)]
        assert main(["train", *arguments]) == 2
    elif way == "file":
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(plain))
        assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    elif way == "environment":
        for name, value in values.items():
            shown = value[0] if isinstance(value, tuple) else value
            monkeypatch.setenv(f"SBS_EDGE_TRAIN_{name.upper()}", str(shown))
        assert main(["train"]) == 2
    else:
        texts = [
            f"{name}={','.join(value) if isinstance(value, tuple) else value}"
            for name, value in values.items()
        ]
        settings.append(make_config(None, parse_fields(texts, TrainConfig, {})))
    (found,) = settings
    assert {name: getattr(found, name) for name in values} == values


def test_no_tracker_can_be_asked_for(settings: list[TrainConfig]) -> None:
    assert main(["train", "--trackers", "none"]) == 2
    assert settings[0].trackers == ()
    assert TrainConfig(trackers="none").trackers == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr=1", "Did you mean learning_rate?"),
        ("mode=distill", "cannot set mode: use --mode"),
        ("d_model", "takes FIELD=VALUE"),
    ],
)
def test_a_wrong_training_text_names_the_remedy(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        parse_fields([text], TrainConfig, {"mode": "--mode"})


def test_a_wrong_value_names_the_field_and_the_allowed_values() -> None:
    with pytest.raises(UsageError, match=r"prefixes = 'x': input should be 'seed' or 'authors'"):
        make_config(None, {"prefixes": "x"})
    with pytest.raises(UsageError, match="learning_rate = inf: input should be a finite number"):
        make_config(None, {"learning_rate": float("inf")})
    with pytest.raises(UsageError, match="similar fields are learning_rate"):
        make_config(None, {"learning_rat": 1})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--lr", "1"], "Did you mean --learning-rate?"),
        (["train", "--steps", "1"], "Did you mean --max-steps?"),
        (["run", "--epochs", "1"], "Did you mean --steps?"),
        (["fit"], "Did you mean 'train'?"),
        (["bench", "latncy"], "Did you mean 'latency'?"),
        (["check"], "Did you mean 'data check' or 'task check'?"),
    ],
)
def test_near_misses_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_an_alias_is_named_only_where_it_exists() -> None:
    assert suggested("--gpu", ["--target", "--out"]) == ["--target"]
    assert suggested("--gpu", ["--out"]) == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from sbs_edge import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sbs-edge {__version__}\n"


def test_parameters_have_the_names_of_their_options() -> None:
    """Environment names and keys of files come from the parameter."""
    for command in COMMANDS:
        for item in _options(command):
            assert "--" + item.name.replace("_", "-") in item.opts, command


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_fits_80_columns_and_cuts_nothing(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), "--help"]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    assert "…" not in page
    assert "[env var" not in page
    words = page.replace("\n", " ").split()
    for item in _options(command):
        assert item.hidden or item.opts[0] in words, item.name


def test_a_configuration_file_is_read_as_task_files_are(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "label: [no, yes]\nkeep-float: head\nlabel_only: no\nprune_vocabulary: on\n"
    )
    export = COMMANDS["export"]
    with export.make_context("export", ["s", "--out", "b", "--config", str(tmp_path / "c.yaml")]) as ctx:
        plan = resolved(ctx)
    assert plan["label"] == ["no", "yes"]
    assert plan["keep_float"] == ["head"]
    assert plan["label_only"] is False
    assert plan["prune_vocabulary"] is True


def test_a_list_for_a_single_value_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("name: [a, b]\n")
    assert main(["export", "s", "--out", "b", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "name takes a single value" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["bench", "train", "--out"], ["bench", "latency", "--shape", "tiny", "--out"],
                  ["bench", "kernels", "--out"], ["evaluate", "student", "--predictions"]]
)  # fmt: skip
def test_an_unwritable_place_is_found_before_the_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main([*arguments, str(tmp_path / "file" / "inner")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_checking_a_place_leaves_its_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    files.check_writable(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "kept"
    with pytest.raises(UsageError, match="is a directory"):
        files.check_writable(tmp_path)


def test_progress_lines_say_what_is_done_of_how_much_and_what_is_left() -> None:
    now, stream = [0.0], io.StringIO()
    line = ProgressLine("training", 600, "steps", stream=stream, start=100, clock=lambda: now[0])
    line.update(101)
    assert stream.getvalue() == ""
    now[0] = 2 * EVERY_S
    line.update(200, "label 0.5")
    line.update(201)
    assert stream.getvalue() == "training: 200 of 600 steps, 40 s left, label 0.5\n"
    unknown = ProgressLine("predicting", None, stream=stream, clock=lambda: now[0])
    now[0] = 4 * EVERY_S
    unknown.update(50)
    assert stream.getvalue().endswith("\npredicting: 50 rows, 5.0 per second\n")
    assert [duration(value) for value in (0.4, 75, 9000)] == ["0 s", "1 min 15 s", "2 h 30 min"]


def test_the_gain_of_rationales_has_a_paired_interval() -> None:
    first = [True] * 70 + [False] * 30
    second = [True] * 50 + [False] * 50
    gain = gain_of(first, second)
    assert (gain["points"], gain["n"]) == (20.0, 100)
    # 20 of 100 rows differ, all in one direction: 1.96 * sqrt(0.2 * 0.8 / 100) = 7.84 points
    assert gain["low"] == pytest.approx(12.2, abs=1.01)
    assert gain["high"] == pytest.approx(27.8, abs=1.01)
    assert gain_of(first, first) == {"points": 0.0, "low": 0.0, "high": 0.0, "n": 100}
    students = [
        {"name": "a", "test": {"label_accuracy": 0.7}},
        {"name": "b", "test": {"label_accuracy": 0.5}},
    ]
    assert (headline({"gain": gain, "students": students}) or "").startswith("Rationales gained 20.0 points")
    other = {"points": -1.0, "low": -2.0, "high": 0.0, "n": 9}
    assert (headline({"gain": other, "students": students}) or "").startswith("No clear effect")
    assert headline({"students": students}) is None
