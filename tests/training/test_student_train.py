"""Real runs, small: modes, resume after SIGKILL, accumulation, the directory, the judge."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.data.jsonl import write_examples
from sbs_edge.errors import DataError, UsageError
from sbs_edge.training.config import TrainConfig, make_config
from sbs_edge.training.evaluate import evaluate, predict_labels
from sbs_edge.training.student_dir import StudentDir
from sbs_edge.training.train import train


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_directory_is_whole_and_repeatable(splits, small, tmp_path):
    one = train(splits, tmp_path / "a", max_steps=8, **small)
    two = train(splits, tmp_path / "b", max_steps=8, **small)
    assert_same_bits(weights(one.student_dir), weights(two.student_dir))
    opened = StudentDir.load(one.student_dir)
    assert opened.mode == "stepwise"
    assert opened.prefixes == {"label": "[label] ", "rationale": "[rationale] "}
    assert opened.task == splits.task
    assert [row.input for row in opened.validation()] == [row.input for row in splits.validation]
    assert 0 < len(opened.calibration()) <= 512
    assert one.metrics["teacher_agreement"]["total"] == len(splits.train)
    assert 0 < one.metrics["teacher_agreement"]["equal"] < len(splits.train)
    assert [row["step"] for row in one.history] == [4, 8]
    for key in ("label_loss", "rationale_loss", "eval_label_accuracy", "eval_rationale_token_accuracy"):
        assert all(key in row for row in one.history)
    # transformers reads the directory without us, and its tokenizer gives our ids
    theirs = AutoTokenizer.from_pretrained(one.student_dir)
    text = opened.prefixes["label"] + splits.train[0].input
    assert theirs(text).input_ids == opened.tokenizer().encode(text).ids
    assert AutoModelForSeq2SeqLM.from_pretrained(one.student_dir).config.d_model == 16


def test_the_teachers_modes_never_see_a_gold_label(splits, small, tmp_path):
    changed = dataclasses.replace(
        splits,
        train=[dataclasses.replace(row, label="close") for row in splits.train],
        validation=[dataclasses.replace(row, label="close") for row in splits.validation],
    )
    for mode in ("stepwise-teacher", "distill"):
        one = train(splits, tmp_path / "a", mode=mode, max_steps=8, **small)
        two = train(changed, tmp_path / "b", mode=mode, max_steps=8, **small)
        assert_same_bits(weights(one.student_dir), weights(two.student_dir))
        assert one.history[-1]["eval_label_loss"] == two.history[-1]["eval_label_loss"]
        assert ("rationale_loss" in one.history[0]) == (mode == "stepwise-teacher")


def test_the_test_split_is_never_read(splits, small, tmp_path):
    class Forbidden(list):
        def __iter__(self):
            raise AssertionError("the test split was read")

        def __getitem__(self, index):
            raise AssertionError("the test split was read")

    train(dataclasses.replace(splits, test=Forbidden()), tmp_path / "a", max_steps=2, **small)


def test_accumulated_passes_equal_one_large_batch(splits, small, tmp_path):
    # Rows without a rationale make the token counts of the passes differ: a mean of means would show.
    rows = [
        dataclasses.replace(row, rationale=None if index % 3 == 0 else row.rationale * (1 + index % 2))
        for index, row in enumerate(splits.train)
    ]
    uneven = dataclasses.replace(splits, train=rows)
    small.pop("batch_size")
    options = {**small, "max_steps": 3, "clip_norm": 0.0, "select": "last"}
    one = train(uneven, tmp_path / "a", batch_size=12, **options)
    two = train(uneven, tmp_path / "b", batch_size=4, gradient_accumulation=3, **options)
    assert two.history[-1]["rationale_loss"] == pytest.approx(one.history[-1]["rationale_loss"], rel=1e-4)
    for name, value in weights(one.student_dir).items():
        torch.testing.assert_close(weights(two.student_dir)[name], value, rtol=1e-3, atol=1e-4)


def test_options_that_change_memory_not_the_result(splits, small, tmp_path):
    one = train(splits, tmp_path / "a", max_steps=3, **small)
    two = train(splits, tmp_path / "b", max_steps=3, gradient_checkpointing=True, **small)
    for name, value in weights(one.student_dir).items():
        torch.testing.assert_close(weights(two.student_dir)[name], value, rtol=1e-4, atol=1e-6)


def test_bf16_lora_and_early_stopping_run(splits, small, tmp_path):
    base = train(splits, tmp_path / "base", max_steps=2, **small)
    result = train(
        splits, tmp_path / "lora", model=str(base.student_dir), lora_rank=2, bf16=True, max_steps=40,
        learning_rate=1e-12, early_stopping_patience=2, **small,
    )  # fmt: skip
    assert result.metrics["steps"] < 40
    assert "model.safetensors" in os.listdir(result.student_dir)
    assert not any("lora" in name for name in weights(result.student_dir))
    assert weights(result.student_dir).keys() == weights(base.student_dir).keys()


RUN = """
    import sys, time
    from pathlib import Path
    from sbs_edge.data.builtin import builtin_splits
    from sbs_edge.data.example import Splits
    from sbs_edge.training.train import train
    full = builtin_splits("ci", teacher_error=0.25)
    splits = Splits(full.task, full.train[:64], full.validation[:20], [])
    train(splits, Path(sys.argv[1]), max_steps=40, save_steps=4, eval_steps=4, d_model=16, d_ff=32, n_heads=2,
          n_layers=1, n_decoder_layers=1, batch_size=8, dropout=0.1, trackers=(), threads=1,
          resume="--resume" in sys.argv)
"""


@pytest.mark.long
def test_a_killed_run_resumes_bit_for_bit(tmp_path, repository):
    """SIGKILL between checkpoints; dropout is on, so the random state must come back as well."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    command = [sys.executable, "-P", str(script)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, cwd=repository, timeout=300)
    process = subprocess.Popen([*command, str(killed)], cwd=repository)
    work = tmp_path / "killed.training"
    deadline = time.monotonic() + 200
    while not (work / "checkpoint-12").is_dir() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    done = subprocess.run([*command, str(killed), "--resume"], cwd=repository, timeout=300)
    assert done.returncode == 0
    card = json.loads((killed / "sbs_edge.json").read_text())
    assert card["training"]["resumed_from_step"] >= 12
    assert_same_bits(weights(whole), weights(killed))
    histories = [json.loads((path / "history.json").read_text()) for path in (whole, killed)]
    for one, two in zip(*histories, strict=True):
        assert {k: v for k, v in one.items() if k != "tokens"} == {
            k: v for k, v in two.items() if k != "tokens"
        }


def test_resume_refuses_another_run(splits, small, tmp_path):
    train(splits, tmp_path / "a", max_steps=4, **small)
    with pytest.raises(UsageError, match="d_ff was 32 and is now 40"):
        train(splits, tmp_path / "a", max_steps=8, resume=True, **{**small, "d_ff": 40})


def test_choices_and_open_labels_are_judged_as_a_slow_reading_would(small, tmp_path):
    words = ["red fox", "red hen", "blue fox", "blue hen"]
    rows = [
        Example(
            str(i),
            f"row {i} says {words[i % 4]}",
            words[i % 4],
            None,
            f"it says {words[i % 4]}",
            tuple(words),
        )
        for i in range(32)
    ]
    for kind in ("choices", "closed", "open"):
        labels = tuple(words) if kind == "closed" else ()
        made = train(
            Splits(TaskSpec("animals", kind, labels), rows[:24], rows[24:], []), tmp_path / kind, max_steps=6,
            tokenizer="word", **small,
        )  # fmt: skip
        opened = StudentDir.load(made.student_dir)
        model, tokenizer = opened.load_model(), opened.tokenizer()
        found = predict_labels(model, opened, tokenizer, rows[24:], batch_size=3)
        assert found.method == {"choices": "trie", "closed": "trie", "open": "decode"}[kind]
        for row, answer, probability in zip(rows[24:], found.labels, found.probabilities, strict=True):
            source = torch.tensor([tokenizer.encode("[label] " + row.input).ids])
            if kind == "open":
                out = model.generate(
                    input_ids=source, max_new_tokens=opened.limits["max_label_tokens"], max_length=None,
                    do_sample=False,
                )  # fmt: skip
                assert answer == tokenizer.decode(out[0].tolist(), skip_special_tokens=True)
                with torch.no_grad():
                    loss = float(model(input_ids=source, labels=out[:, 1:]).loss)
                assert probability == pytest.approx(np.exp(-loss * (out.shape[1] - 1)), rel=1e-4)
                continue
            scores = []
            with torch.no_grad():
                for word in words:
                    ids = torch.tensor([tokenizer.encode(word).ids])
                    scores.append(-float(model(input_ids=source, labels=ids).loss) * ids.shape[1])
            assert answer == words[max(range(4), key=scores.__getitem__)]
            shares = np.exp(scores) / np.exp(scores).sum()
            assert probability == pytest.approx(shares.max(), rel=1e-4)
        report = evaluate(opened, rows[24:], predictions=True)
        right = [p["label"] == p["gold"] for p in report["predictions"]]
        assert report["label_accuracy"] == pytest.approx(sum(right) / len(right))
        assert 0 <= report["rationale_exact"] <= 1


def test_wrong_configurations_say_field_value_and_reason(splits, tmp_path):
    for options, words in (
        ({"learning_rat": 1.0}, "learning_rat is not a field"),
        ({"alpha": 0.5, "rationale_weight": 1.0}, "not both"),
        ({"batch_size": 0}, r"batch_size = 0.*greater than or equal to 1"),
        ({"mode": "magic"}, "mode = 'magic'"),
        ({"label_prefix": "x", "rationale_prefix": "x"}, "tell the tasks apart"),
    ):
        with pytest.raises(UsageError, match=words):
            make_config(None, options)
    with pytest.raises(UsageError, match="There is no directory"):
        train(splits, tmp_path / "a", model=str(tmp_path / "nothing"), trackers=())
    bare = [dataclasses.replace(row, teacher_label=None) for row in splits.train]
    with pytest.raises(DataError, match="labels that no training row has"):
        train(dataclasses.replace(splits, train=bare), tmp_path / "a", mode="distill", trackers=())


def test_schedule_is_the_documented_one():
    config = TrainConfig()
    assert config.factor_at(0, 600) == pytest.approx(1 / 50)
    assert config.factor_at(49, 600) == config.factor_at(359, 600) == 1.0
    assert config.factor_at(599, 600) == pytest.approx(0.05)
    assert TrainConfig(epochs=2).steps_for(100, 32) == 7


def test_the_command_trains_and_evaluates(splits, tmp_path, sbs_edge_cli):
    rows, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    write_examples(rows, splits.train)
    write_examples(held, splits.validation)
    out = tmp_path / "student"
    flags = ("--max-steps", "2", "--d-model", "16", "--d-ff", "32", "--validation", held, "--out", out)
    done = sbs_edge_cli("train", rows, *flags, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mode"] == "stepwise"
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    judged = sbs_edge_cli(
        "evaluate",
        out,
        "--data",
        held,
        "--rationales",
        "2",
        "--json",
        "--predictions",
        tmp_path / "answers.jsonl",
    )
    assert "rationales: 2" in (tmp_path / "answers.config.yaml").read_text()
    assert judged.returncode == 0, judged.stderr
    assert json.loads(judged.stdout)["n"] == len(splits.validation)
    streamed = sbs_edge_cli("train", rows, *flags, "--stream", "--json")
    assert streamed.returncode == 0, streamed.stderr
    assert "malformed_rows_left_out" not in json.loads(streamed.stdout)
    with rows.open("a", encoding="utf-8") as handle:
        handle.write('{"input": "no label"\n\n{"input": 3}\n')
    skipping = sbs_edge_cli("train", rows, *flags, "--stream", "--skip-bad-rows", "--json")
    assert skipping.returncode == 0, skipping.stderr
    assert json.loads(skipping.stdout)["malformed_rows_left_out"] == 2
    assert "2 malformed row(s) left out" in skipping.stderr
    assert f"rows.jsonl:{len(splits.train) + 1}" in skipping.stderr.replace("\n", "")
