"""``train``: from examples to a student directory.

The directory ``out`` is written once, whole, at the end. What is needed to resume lives beside it in
``<out>.training/``: checkpoints, the best weights so far, what the run was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any, Unpack

from sbs_edge import __version__, files
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.findings import examine, refuse_stops, seen_by
from sbs_edge.data.jsonl import write_examples
from sbs_edge.data.targets import label_for, rationale_for, teacher_agreement
from sbs_edge.data.tokenizer import check_covered
from sbs_edge.errors import DataError, MissingExtra, UsageError
from sbs_edge.label_tokens import check_choices, label_ids, spelling_of_rows, spelling_sentences
from sbs_edge.lock import held
from sbs_edge.resources import limit_torch_threads
from sbs_edge.tokens import TextTokenizer, first_tokens, start_token_id
from sbs_edge.training.checkpoint import Checkpoint, open_checkpoint
from sbs_edge.training.config import TrainConfig, make_config
from sbs_edge.training.options import DataOptions, TrainOptions
from sbs_edge.training.student_dir import CALIBRATION, CARD, FORMAT, VALIDATION, StudentDir

__all__ = ["TrainResult", "train"]

CALIBRATION_ROWS = 512


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of :func:`train`.

    Attributes:
        student_dir: the student directory.
        metrics: figures of the run and of the weights kept (``mode``, ``parameters``, ``best_step``,
            ``teacher_agreement``, ``rows``, losses and accuracies).
        history: one row for each evaluation: ``step``, training ``label_loss``, ``rationale_loss``,
            ``label_token_accuracy``, ``rationale_token_accuracy``, and the same with ``eval_`` on
            validation rows, besides ``eval_label_accuracy``.
        seconds: wall time of the call.

    """

    student_dir: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def _versions() -> dict[str, str]:
    found = {"sbs-edge": __version__}
    for name in ("torch", "transformers", "accelerate", "tokenizers", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _fingerprint(config: TrainConfig, splits: Splits, streamed: bool) -> dict[str, str]:
    """What must be the same for a run to be continued; world size and batch size may differ."""
    may_change = {
        "resume", "batch_size", "gradient_accumulation", "progress", "trackers", "threads", "workspace_mb",
        "loss_engine", "save_steps", "keep_checkpoints", "eval_batch_size", "gradient_checkpointing", "max_steps",
        "epochs", "fsdp",
    }  # fmt: skip
    print_ = {k: json.dumps(v) for k, v in config.model_dump(mode="json").items() if k not in may_change}
    if not streamed:
        digest = hashlib.sha256()
        for example in splits.train:
            digest.update(
                repr((example.input, example.label, example.teacher_label, example.rationale)).encode()
            )
        print_["training rows"] = digest.hexdigest()[:16]
    return print_


def _prepare_work(work: Path, config: TrainConfig, asked: dict[str, str], first: bool) -> Path | None:
    """Return the checkpoint to continue from; clear what an earlier, other run left."""
    from sbs_edge.training.trainer import find_checkpoint

    record = work / "run.json"
    checkpoint = find_checkpoint(work) if config.resume else None
    if checkpoint is not None:
        before = json.loads(record.read_text(encoding="utf-8"))
        for name in sorted(set(before) | set(asked)):
            if before.get(name) != asked.get(name):
                raise UsageError(
                    f"The run in {work} cannot be continued: {name} was {before.get(name)} and is now "
                    f"{asked.get(name)}. Give what it was started with, or train without resume to start again."
                )
        return checkpoint
    if first:
        shutil.rmtree(work, ignore_errors=True)
        files.write_json(record, asked)
    return None


def _callbacks(config: TrainConfig, work: Path, evaluates: bool, first: bool) -> tuple[list[Any], Any]:
    from transformers import EarlyStoppingCallback

    from sbs_edge.training.progress import ProgressBar, TensorBoard

    callbacks: list[Any] = []
    bar = ProgressBar() if first and ProgressBar.wanted(config.progress) else None
    if bar is not None:
        callbacks.append(bar)
    if config.early_stopping_patience is not None and evaluates:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    if first:
        installed = util.find_spec("tensorboard") is not None
        wanted = ("tensorboard",) if config.trackers is None and installed else config.trackers or ()
        if "tensorboard" in wanted:
            if not installed:
                raise MissingExtra("tensorboard", "train", "Writing TensorBoard files")
            callbacks.append(TensorBoard(str(work / "tensorboard")))
        if "wandb" in wanted:
            if util.find_spec("wandb") is None:
                raise UsageError("Tracking with W&B needs the package wandb: pip install wandb.")
            from transformers.integrations import WandbCallback

            callbacks.append(WandbCallback())
    return callbacks, bar


def _validation(
    rows: Sequence[Example], splits: Splits, config: TrainConfig, encoder: Any, collator: Any, firsts: Any
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Collate validation rows; the answer to each is what the mode learns from, never more."""
    import torch

    batches, answers = [], []
    for start in range(0, len(rows), config.eval_batch_size):
        part = rows[start : start + config.eval_batch_size]
        encoded = [encoder(row) for row in part]
        batch_rows = [item for item in encoded if item is not None]
        for item in batch_rows:
            item.weight = 1.0
        batches.append(collator(batch_rows))
        indices = []
        for row, item in zip(part, encoded, strict=True):
            if item is None or item.tasks[0] is None:
                continue
            label = label_for(row, config.mode) or ""
            if firsts is None:
                indices.append(0)
            else:
                same = (
                    n
                    for n, own in enumerate(splits.task.labels)
                    if same_answer(own, label, splits.task.compare)
                )
                indices.append(next(same, -1))
        answers.append(torch.tensor(indices or [-1]))
    return batches, answers


def _make_model(config: TrainConfig, vocabulary: int, checkpoint: Checkpoint | None) -> Any:
    """Build or load the student, with adapters if asked for, and put the two-task loss around it."""
    from sbs_edge.training import model as models
    from sbs_edge.training.long import recompute_decoder
    from sbs_edge.training.pretrained import load_opened

    if checkpoint is None:
        student = models.build_student(config, vocabulary)
    else:
        student = load_opened(checkpoint, config.dropout)
    if config.gradient_checkpointing:
        # transformers 5 renamed the method
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if config.long != "off":
        recompute_decoder(student)
    if config.lora_rank:
        if util.find_spec("peft") is None:
            raise MissingExtra("peft", "train", "LoRA")
        student = models.add_lora(student, config.lora_rank, config.lora_alpha)
    return models.TwoTaskModel(
        student,
        config.lambda_,
        drawn_states=config.max_source_tokens if config.long == "random" else None,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        workspace_mb=config.workspace_mb,
        engine=config.loss_engine,
    )


def train(
    data: str | os.PathLike[str] | Splits | None = None,
    out: str | os.PathLike[str] = "runs/student",
    config: TrainConfig | None = None,
    *,
    stream: Callable[[], Iterable[Example]] | None = None,
    data_options: DataOptions | None = None,
    **options: Unpack[TrainOptions],
) -> TrainResult:
    """Train a student and write its directory.

    Validation rows alone choose the weights and stop the run; ``splits.test`` is never read.

    Args:
        data: ``"builtin"`` for the built-in task, a path or data set name for
            :func:`sbs_edge.data.load.load_splits`, or splits.
        out: the student directory; an existing one is replaced at the end, in one step.
        config: see :class:`TrainConfig`.
        stream: opens the training rows again for each pass; they are never held in memory. ``data``
            then gives the task, the validation rows, and training rows for tokenizer and calibration.
        data_options: keyword arguments of ``load_splits``, for ``data`` that is a path or a name.
        options: fields of the configuration, which replace those of ``config``.

    Raises:
        UsageError: there is no data, the configuration is wrong, or a run cannot be continued.
        DataError: no row has what the mode learns from.

    Under ``torchrun`` every process calls this with the same arguments; the first one writes.

    Example:
        >>> from sbs_edge import train
        >>> result = train("rows.jsonl", out="runs/student", mode="stepwise", max_steps=400)
        >>> print(result.student_dir, result.metrics["eval_label_accuracy"])
    """
    started = time.perf_counter()
    settings = make_config(config, dict(options))
    if data is None:
        raise UsageError(
            'train needs data: "builtin" for the built-in task, a path such as "rows.jsonl", the name of a data set, '
            "or splits."
        )
    if isinstance(data, Splits):
        if data_options:
            raise UsageError("data_options say how a file or data set is read; leave them out with splits.")
        splits = data
    else:
        from sbs_edge.data.load import load_splits

        splits = load_splits(os.fspath(data), **(data_options or {}))
    # Under torchrun the first process writes, and holds the place for all.
    alone = held(out, "training") if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext()
    with alone:
        return _run(splits, Path(out), settings, stream, started)


def _run(
    splits: Splits,
    out: Path,
    config: TrainConfig,
    stream: Callable[[], Iterable[Example]] | None,
    started: float,
) -> TrainResult:
    import torch
    import transformers
    from transformers import set_seed

    from sbs_edge.training.batches import Batches, ChunkCollator, Collator, Encoder, MemoryRows, StreamRows
    from sbs_edge.training.tokens import checkpoint_tokenizer, scratch_tokenizer
    from sbs_edge.training.trainer import TwoTaskTrainer, make_arguments

    transformers.logging.set_verbosity_error()
    limit_torch_threads(config.threads)
    set_seed(config.seed)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = rank == 0
    if config.fsdp and world < 2:
        raise UsageError(
            "fsdp shards parameters over processes, and this is the only one. Start several: torchrun "
            "--nproc-per-node 2 -m sbs_edge train ... --fsdp, or leave --fsdp out."
        )
    files.check_replaceable(out, ("sbs_edge.json",), "student")
    refuse_stops(examine(seen_by(splits, config.mode), config.mode))
    work = out.with_name(out.name + ".training")

    checkpoint = None if config.model is None else open_checkpoint(config.model)
    tokenizer = (
        scratch_tokenizer(splits.train, splits.task, config)
        if checkpoint is None
        else checkpoint_tokenizer(checkpoint.tokenizer_folder, checkpoint.config["model_type"])
    )
    model = _make_model(config, tokenizer.get_vocab_size(), checkpoint)
    check_covered(
        tokenizer, model.student.get_input_embeddings().num_embeddings, config.model or "this student"
    )
    texts, settings = TextTokenizer(tokenizer), model.student.config
    # What the config leaves open is written down, so that everything that reads the student starts alike.
    settings.decoder_start_token_id = start_token_id(settings)
    model.student.generation_config.decoder_start_token_id = settings.decoder_start_token_id
    label_tokens = label_ids(splits.task.labels, texts, settings.eos_token_id)
    check_choices(splits.train, texts, settings.eos_token_id)
    learned = [dataclasses.replace(row, rationale=rationale_for(row, config.mode)) for row in splits.train]
    spelling = spelling_of_rows(learned, texts)
    if first:
        for sentence in spelling_sentences(spelling):
            sys.stderr.write(f"{sentence}\n")
    # adapters are counted by what they are merged into
    n_parameters = sum(value.numel() for name, value in model.named_parameters() if ".lora_" not in name)
    ids = {"pad_id": settings.pad_token_id, "eos_id": settings.eos_token_id}

    encoder = Encoder(tokenizer, config, ids["eos_id"])
    kind = Collator if config.long == "off" else ChunkCollator
    collator = kind(**ids, start_id=settings.decoder_start_token_id, n_tasks=1 + config.uses_rationales)
    source: MemoryRows | StreamRows
    if stream is None:
        encoded = [row for row in map(encoder, splits.train) if row is not None]
        if not encoded:
            raise DataError(
                f"No training row has what mode {config.mode!r} learns from "
                f"({'gold' if config.mode in ('finetune', 'stepwise') else 'teacher'} labels"
                f"{' or rationales' if config.uses_rationales else ''}). Choose another --mode or add the column."
            )
        if config.uses_rationales and not any(example.rationale for example in splits.train):
            raise DataError(
                f"No training row has a rationale, and mode {config.mode!r} learns from them. Ask a teacher for some "
                "with 'sbs-edge annotate', name their column, or choose --mode finetune or distill."
            )
        source = MemoryRows(encoded, config.seed)
        used: int | None = len(encoded)
    else:
        source = StreamRows(stream, encoder, config.seed, config.shuffle_buffer)
        used = None
    global_batch = config.batch_size * config.gradient_accumulation * world
    steps = config.steps_for(used, global_batch)
    last_row = None if config.epochs is None or used is None else int(config.epochs * used)

    validation_rows = list(splits.validation)
    if len(validation_rows) > config.validation_rows:
        validation_rows = random.Random(config.seed).sample(validation_rows, config.validation_rows)
    firsts = None
    if splits.task.label_kind == "closed":
        heads = first_tokens(label_tokens)
        firsts = None if heads is None else torch.tensor(heads)
    batches, answers = _validation(validation_rows, splits, config, encoder, collator, firsts)

    newest = _prepare_work(work, config, _fingerprint(config, splits, stream is not None), first)
    arguments = make_arguments(config, work, steps, evaluates=bool(batches))
    callbacks, bar = _callbacks(config, work, bool(batches), first)
    trainer = TwoTaskTrainer(
        model,
        arguments,
        config=config,
        batches=Batches(
            source, collator, last_row=last_row, steps=steps, batch_size=config.batch_size,
            passes=config.gradient_accumulation, rank=rank, world=world,
        ),
        validation=batches,
        label_tokens=firsts,
        label_answers=answers,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.pop_callback(transformers.PrinterCallback)
    if bar is not None:
        bar.trainer = trainer
    trainer.start_at(newest, steps)
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        if bar is not None:
            bar.close()
    evaluated = {row.get("step") for row in trainer.state.log_history if "tokens" in row}
    if trainer.state.global_step not in evaluated:
        trainer.evaluate()

    # transformers counts epochs of the loader it was given, which is shorter after a resume: left out
    history = [
        {name: value for name, value in row.items() if name != "epoch"}
        for row in trainer.state.log_history
        if "tokens" in row
    ]
    result = _finish(trainer, model, checkpoint, splits, tokenizer, config, out, work, history, ids, {
        "mode": config.mode,
        "rationale_weight": config.lambda_,
        "parameters": n_parameters,
        "steps": trainer.state.global_step,
        "rows": {"train": used, "validation": len(validation_rows)},
        "teacher_agreement": teacher_agreement(splits.train, splits.task.compare),
        "rationales": sum(rationale_for(row, config.mode) is not None for row in splits.train),
        "spelling": spelling,
        "cut_inputs": encoder.cut_sources,
        "cut_targets": encoder.cut_targets,
        "world": world,
        "resumed_from_step": trainer.first_step,
    })  # fmt: skip
    return dataclasses.replace(result, seconds=time.perf_counter() - started)


def _finish(
    trainer: Any,
    model: Any,
    checkpoint: Checkpoint | None,
    splits: Splits,
    tokenizer: Any,
    config: TrainConfig,
    out: Path,
    work: Path,
    history: list[dict[str, Any]],
    ids: dict[str, int],
    report: dict[str, Any],
) -> TrainResult:
    """Choose the weights, merge adapters, and write the directory (first process only)."""
    from sbs_edge.training.model import merge_lora
    from sbs_edge.training.pretrained import save_model
    from sbs_edge.training.tokens import write_tokenizer
    from sbs_edge.training.trainer import BEST

    scored = [row for row in history if "eval_score" in row]
    kept = history[-1] if history else {}
    if scored and config.select == "best":
        kept = max(scored, key=lambda row: row["eval_score"])  # the first of equals, as while training
    names = ("label_loss", "rationale_loss", "label_token_accuracy", "rationale_token_accuracy")
    report.update({name: kept[name] for name in names if name in kept})
    report.update({name: value for name, value in kept.items() if name.startswith("eval_")})
    report["best_step"] = kept.get("step")
    state = trainer.whole_state() if config.fsdp else None
    if trainer.args.should_save:
        if state is not None:
            model = _make_model(config, tokenizer.get_vocab_size(), checkpoint)
            model.load_state_dict(state, strict=False)  # tied weights are there once
            trainer.model = model
        if scored and config.select == "best" and (work / BEST).is_file():
            trainer.load_state(work / BEST)
        student = merge_lora(model.student)
        student.generation_config.max_new_tokens = config.max_target_tokens
        student.generation_config.max_length = None
        some = splits.train[:20000]
        wanted = {*splits.task.labels, *(label_for(row, config.mode) or "" for row in some)}
        wanted.update(choice for row in some for choice in row.choices or ())
        texts = TextTokenizer(tokenizer)
        longest = max(len(texts.encode_target(text, ids["eos_id"])) for text in wanted)
        card = {
            "format": FORMAT,
            "task": StudentDir.task_card(splits.task),
            "prefixes": dict(zip(("label", "rationale"), config.prefix_pair, strict=True)),
            "mode": config.mode,
            "rationale_weight": config.lambda_,
            "max_source_tokens": config.max_source_tokens,
            "max_target_tokens": config.max_target_tokens,
            # Choices come with the row: one asked about later may be longer than any trained on.
            "max_label_tokens": config.max_target_tokens
            if splits.task.label_kind == "choices"
            else min(max(longest, 2), config.max_target_tokens),
            "seed": config.seed,
            "versions": _versions(),
            "config": config.model_dump(mode="json"),
            "training": report,
        }
        if config.long_settings is not None:
            card["long"] = config.long_settings.describe()
        calibration = list(splits.train)
        if len(calibration) > CALIBRATION_ROWS:
            calibration = random.Random(config.seed).sample(calibration, CALIBRATION_ROWS)
        with files.atomic_directory(out) as folder:
            save_model(student, folder)
            for weights in folder.glob("*.safetensors"):
                weights.chmod(0o644)  # safetensors makes files that only their owner reads
            write_tokenizer(tokenizer, folder, **ids)
            files.write_json(folder / CARD, card)
            files.write_json(folder / "history.json", history)
            write_examples(folder / VALIDATION, splits.validation)
            write_examples(folder / CALIBRATION, calibration)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(out, report, history)
