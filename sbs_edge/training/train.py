"""``train`` turns examples into a student directory.

The directory ``out`` is written at the end, whole. Everything that is needed to resume is beside it in
``<out>.training/``: checkpoints, the best weights so far, and the settings of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any, Unpack

from sbs_edge import files
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.findings import STOPPING_CHECKS, examine, refuse_stops, seen_by
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
from sbs_edge.training.finish import TrainedRun, finish
from sbs_edge.training.options import DataOptions, TrainOptions
from sbs_edge.training.resume import fingerprint, prepare_work

__all__ = ["DROPPED", "TrainResult", "train"]

DROPPED = "dropped.jsonl"
"""The list of the rows that were left out, in the working directory."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of :func:`train`.

    Attributes:
        student_dir: the student directory.
        metrics: figures of the run and of the chosen weights (``mode``, ``parameters``, ``best_step``,
            ``teacher_agreement``, ``rows``, losses and accuracies).
        history: a row for each evaluation, with ``step``, the training figures ``label_loss``, ``rationale_loss``,
            ``label_token_accuracy`` and ``rationale_token_accuracy``, the same with ``eval_`` on
            validation rows, and ``eval_label_accuracy``.
        seconds: wall time of the call.

    """

    student_dir: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def _callbacks(
    config: TrainConfig, work: Path, head_start: int, evaluates: bool, first: bool
) -> tuple[list[Any], Any]:
    from sbs_edge.training.progress import EarlyStopping, ProgressBar, TensorBoard

    callbacks: list[Any] = []
    bar = ProgressBar() if first and ProgressBar.wanted(config.progress) else None
    if bar is not None:
        callbacks.append(bar)
    if config.early_stopping_patience is not None and evaluates:
        callbacks.append(EarlyStopping(config.early_stopping_patience, head_start))
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


def _rows(
    splits: Splits, config: TrainConfig, encoder: Any, stream: Callable[[], Iterable[Example]] | None
) -> tuple[Any, int | None]:
    """Return the training rows, in memory or as a stream, and how many there are (None: unknown).

    Raises:
        DataError: no row has the labels or rationales that the mode learns.
        UsageError: doubtful rows cannot be dropped from a stream.
    """
    from sbs_edge.training.batches import MemoryRows, StreamRows

    if stream is not None:
        if config.drop_doubtful:
            raise UsageError(
                "drop_doubtful compares all training rows with one another, and a stream never holds them. Train "
                "without a stream, or leave drop_doubtful out."
            )
        return StreamRows(stream, encoder, config.seed, config.shuffle_buffer), None
    encoded = [row for row in map(encoder, splits.train) if row is not None]
    if not encoded:
        raise DataError(
            f"No training row has what mode {config.mode!r} learns from "
            f"({'gold' if config.mode in ('finetune', 'stepwise') else 'teacher'} labels"
            f"{' or rationales' if config.uses_rationales else ''}). Choose another mode or add the column."
        )
    if config.uses_rationales and not any(example.rationale for example in splits.train):
        raise DataError(
            f"No training row has a rationale, and mode {config.mode!r} learns from them. Ask a teacher for some "
            "with 'sbs-edge annotate', name their column, or choose the mode 'finetune' or 'distill'."
        )
    return MemoryRows(encoded, config.seed, sample=config.rationales == "sample"), len(encoded)


def _validation(
    rows: Sequence[Example], splits: Splits, config: TrainConfig, encoder: Any, collator: Any, firsts: Any
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Collate validation rows, with the answers that the mode learns and no others."""
    import torch

    batches, answers = [], []
    for start in range(0, len(rows), config.eval_batch_size):
        part = rows[start : start + config.eval_batch_size]
        encoded = [encoder(row, plain=True) for row in part]
        batches.append(collator([item for item in encoded if item is not None]))
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
    from sbs_edge.training.long import bound_memory
    from sbs_edge.training.pretrained import load_opened

    if checkpoint is None:
        student = models.build_student(config, vocabulary)
    else:
        student = load_opened(checkpoint, config.dropout, config.encoder_layers, config.decoder_layers)
    if config.gradient_checkpointing:
        # transformers 5 renamed the method
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if config.long != "off":
        bound_memory(student)
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


def _student(splits: Splits, config: TrainConfig, checkpoint: Checkpoint | None) -> tuple[Any, Any]:
    """Return the tokenizer and the two-task model that the run starts with."""
    from sbs_edge.training.tokens import checkpoint_tokenizer, scratch_tokenizer

    tokenizer = (
        scratch_tokenizer(splits.train, splits.task, config)
        if checkpoint is None
        else checkpoint_tokenizer(checkpoint.tokenizer_folder, checkpoint.config["model_type"])
    )
    model = _make_model(config, tokenizer.get_vocab_size(), checkpoint)
    check_covered(
        tokenizer, model.student.get_input_embeddings().num_embeddings, config.model or "this student"
    )
    settings = model.student.config
    # Values that the config leaves open are written down, so that every reader of the student starts in the same way.
    settings.decoder_start_token_id = start_token_id(settings)
    model.student.generation_config.decoder_start_token_id = settings.decoder_start_token_id
    return tokenizer, model


def _train_and_evaluate(trainer: Any, bar: Any, newest: Path | None, steps: int) -> list[dict[str, Any]]:
    """Run the trainer to its last step; return a row for each evaluation."""
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
    return [
        {name: value for name, value in row.items() if name != "epoch"}
        for row in trainer.state.log_history
        if "tokens" in row
    ]


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

    Only validation rows choose the weights and stop the run; ``splits.test`` is never read.

    Args:
        data: ``"builtin"`` for the built-in task, a path or data set name for
            :func:`sbs_edge.data.load.load_splits`, or splits.
        out: the student directory; an existing one is replaced at the end, in one step.
        config: see :class:`TrainConfig`.
        stream: opens the training rows again for each pass, so that they are not in memory. ``data``
            then gives the task, the validation rows, and training rows for tokenizer and calibration.
        data_options: keyword arguments of ``load_splits``, for ``data`` that is a path or a name.
        options: fields of the configuration, which replace those of ``config``.

    Raises:
        UsageError: there is no data, the configuration is wrong, or a run cannot be resumed.
        DataError: no row has the labels or rationales that the mode learns.

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
            raise UsageError(
                "data_options describe how a file or data set is read; leave them out if you pass splits."
            )
        splits = data
    else:
        from sbs_edge.data.load import load_splits

        splits = load_splits(os.fspath(data), **(data_options or {}))
    # Under torchrun only the first process writes, and it holds the lock for all.
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

    from sbs_edge.training.batches import Batches, ChunkCollator, Collator, Encoder
    from sbs_edge.training.trainer import TwoTaskTrainer, make_arguments

    transformers.logging.set_verbosity_error()
    limit_torch_threads(config.threads)
    set_seed(config.seed)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = rank == 0
    if config.fsdp and world < 2:
        raise UsageError(
            "fsdp shards parameters over processes, but this is the only one. Start several with torchrun, or leave out "
            "fsdp."
        )
    files.check_replaceable(out, ("sbs_edge.json",), "student")
    refuse_stops(examine(seen_by(splits, config.mode), config.mode, STOPPING_CHECKS))
    work = out.with_name(out.name + ".training")

    checkpoint = None if config.model is None else open_checkpoint(config.model)
    tokenizer, model = _student(splits, config, checkpoint)
    texts, settings = TextTokenizer(tokenizer), model.student.config
    label_tokens = label_ids(splits.task.labels, texts, settings.eos_token_id)
    check_choices(splits.train, texts, settings.eos_token_id)
    learned = [dataclasses.replace(row, rationale=rationale_for(row, config.mode)) for row in splits.train]
    spelling = spelling_of_rows(learned, texts)
    if first:
        for sentence in spelling_sentences(spelling):
            sys.stderr.write(f"{sentence}\n")
    # adapters do not count: they are merged into the weights
    n_parameters = sum(value.numel() for name, value in model.named_parameters() if ".lora_" not in name)
    ids = {"pad_id": settings.pad_token_id, "eos_id": settings.eos_token_id}

    encoder = Encoder(tokenizer, config, ids["eos_id"], splits.task.labels)
    kind = Collator if config.long == "off" else ChunkCollator
    collator = kind(**ids, start_id=settings.decoder_start_token_id, n_tasks=1 + config.uses_rationales)
    source, used = _rows(splits, config, encoder, stream)
    global_batch = config.batch_size * config.gradient_accumulation * world
    steps = config.steps_for(used, global_batch)
    head_start = int(config.head_start_ * steps)
    last_row = None if config.epochs is None or used is None else int(config.epochs * used)

    validation_rows = list(splits.validation)
    if len(validation_rows) > config.validation_rows:
        validation_rows = random.Random(config.seed).sample(validation_rows, config.validation_rows)
    firsts = None
    if splits.task.label_kind == "closed":
        heads = first_tokens(label_tokens)
        firsts = None if heads is None else torch.tensor(heads)
    batches, answers = _validation(validation_rows, splits, config, encoder, collator, firsts)

    newest = prepare_work(work, config, fingerprint(config, splits, stream is not None), first)
    arguments = make_arguments(config, work, steps, evaluates=bool(batches))
    callbacks, bar = _callbacks(config, work, head_start, bool(batches), first)
    trainer = TwoTaskTrainer(
        model,
        arguments,
        config=config,
        batches=Batches(
            source, collator, last_row=last_row, labels_from=head_start * global_batch, steps=steps,
            batch_size=config.batch_size, passes=config.gradient_accumulation, rank=rank, world=world,
        ),
        validation=batches,
        label_tokens=firsts,
        label_answers=answers,
        callbacks=callbacks,
        score_at=config.score_steps(steps, (used or 0) / global_batch),
    )  # fmt: skip
    trainer.pop_callback(transformers.PrinterCallback)
    history = _train_and_evaluate(trainer, bar, newest, steps)
    dropped = {source.rows[index].id for index in sorted(getattr(source, "dropped", ()))}
    if first and dropped:
        write_examples(work / DROPPED, [row for row in splits.train if row.id in dropped])
        sys.stderr.write(
            f"{len(dropped)} of {used} training rows were left out: their rationales stand apart from the others', as "
            f"those of wrong labels do. {work / DROPPED} lists them; drop_doubtful=False keeps them.\n"
        )
    report = {
        "mode": config.mode,
        "rationale_weight": config.lambda_,
        "parameters": n_parameters,
        "layers": {"encoder": settings.num_layers, "decoder": settings.num_decoder_layers},
        "steps": trainer.state.global_step,
        "rows": {"train": used, "validation": len(validation_rows)},
        "teacher_agreement": teacher_agreement(splits.train, splits.task.compare),
        "head_start_steps": head_start,
        "dropped_rows": len(dropped),
        "rationales": sum(rationale_for(row, config.mode) is not None for row in splits.train),
        "spelling": spelling,
        "cut_inputs": encoder.cut_sources,
        "cut_targets": encoder.cut_targets,
        "world": world,
        "resumed_from_step": trainer.first_step,
    }
    run = TrainedRun(
        trainer, model, lambda: _make_model(config, tokenizer.get_vocab_size(), checkpoint), splits, tokenizer,
        config, work, ids,
    )  # fmt: skip
    finish(run, out, history, report)
    return TrainResult(out, report, history, time.perf_counter() - started)
