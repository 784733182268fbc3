"""Write the student directory at the end of a run, from the weights that validation rows chose."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_edge import __version__, files
from sbs_edge.data.example import Splits
from sbs_edge.data.jsonl import write_examples
from sbs_edge.data.targets import label_for
from sbs_edge.tokens import TextTokenizer
from sbs_edge.training.config import TrainConfig
from sbs_edge.training.student_dir import CALIBRATION, CARD, FORMAT, VALIDATION, StudentDir
from sbs_edge.versions import installed_versions

__all__ = ["TrainedRun", "finish"]

CALIBRATION_ROWS = 512
_KEPT = ("label_loss", "rationale_loss", "label_token_accuracy", "rationale_token_accuracy")
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "peft")


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run whose last step is done.

    Attributes:
        trainer: the :class:`~sbs_edge.training.trainer.TwoTaskTrainer`.
        model: the two-task model.
        build: returns the same model again, with other weights.
        splits: the data.
        tokenizer: the student's.
        config: the run's configuration.
        work: checkpoints and the best weights so far.
        ids: ``pad_id`` and ``eos_id``.
    """

    trainer: Any
    model: Any
    build: Callable[[], Any]
    splits: Splits
    tokenizer: Any
    config: TrainConfig
    work: Path
    ids: dict[str, int]


def finish(run: TrainedRun, out: Path, history: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """Choose the weights, merge adapters, complete ``report``, and write ``out`` (first process only)."""
    from sbs_edge.training.model import merge_lora
    from sbs_edge.training.trainer import BEST

    trainer, config, model = run.trainer, run.config, run.model
    scored = [row for row in history if "eval_score" in row]
    kept = history[-1] if history else {}
    if scored and config.select == "best":
        kept = max(scored, key=lambda row: row["eval_score"])  # the first of equals, as in training
    report.update({name: kept[name] for name in _KEPT if name in kept})
    report.update({name: value for name, value in kept.items() if name.startswith("eval_")})
    report["best_step"] = kept.get("step")
    state = trainer.whole_state() if config.fsdp else None
    if trainer.args.should_save:
        if state is not None:
            model = run.build()
            model.load_state_dict(state, strict=False)  # tied weights are there once
            trainer.model = model
        if scored and config.select == "best" and (run.work / BEST).is_file():
            trainer.load_state(run.work / BEST)
        student = merge_lora(model.student)
        student.generation_config.max_new_tokens = config.max_target_tokens
        student.generation_config.max_length = None
        _write(run, student, out, history, report)
    trainer.accelerator.wait_for_everyone()


def _write(
    run: TrainedRun, student: Any, out: Path, history: list[dict[str, Any]], report: dict[str, Any]
) -> None:
    from sbs_edge.training.pretrained import save_model
    from sbs_edge.training.tokens import write_tokenizer

    calibration = list(run.splits.train)
    if len(calibration) > CALIBRATION_ROWS:
        calibration = random.Random(run.config.seed).sample(calibration, CALIBRATION_ROWS)
    with files.atomic_directory(out) as folder:
        save_model(student, folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors makes files that only their owner reads
        write_tokenizer(run.tokenizer, folder, **run.ids)
        files.write_json(folder / CARD, _card(run, report))
        files.write_json(folder / "history.json", history)
        write_examples(folder / VALIDATION, run.splits.validation)
        write_examples(folder / CALIBRATION, calibration)


def _card(run: TrainedRun, report: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``sbs_edge.json``."""
    splits, config = run.splits, run.config
    # Choices come with the row, and later ones may be longer than those of training.
    longest_label = config.max_target_tokens
    if splits.task.label_kind != "choices":
        longest_label = min(max(_longest_label(run), 2), config.max_target_tokens)
    return {
        "format": FORMAT,
        "task": StudentDir.task_card(splits.task),
        "prefixes": dict(zip(("label", "rationale"), config.prefix_pair, strict=True)),
        "mode": config.mode,
        "rationale_weight": config.lambda_,
        "max_source_tokens": config.max_source_tokens,
        "max_target_tokens": config.max_target_tokens,
        "max_label_tokens": longest_label,
        **({} if config.long_settings is None else {"long": config.long_settings.describe()}),
        "seed": config.seed,
        "versions": {"sbs-edge": __version__, **installed_versions(*_PACKAGES)},
        "config": config.model_dump(mode="json"),
        "training": report,
    }


def _longest_label(run: TrainedRun) -> int:
    """Return the number of tokens of the longest label of the task or its training rows."""
    some = run.splits.train[:20000]
    wanted = {*run.splits.task.labels, *(label_for(row, run.config.mode) or "" for row in some)}
    wanted.update(choice for row in some for choice in row.choices or ())
    texts = TextTokenizer(run.tokenizer)
    return max(len(texts.encode_target(text, run.ids["eos_id"])) for text in wanted)
