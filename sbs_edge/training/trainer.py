"""transformers' Trainer for two tasks: global means, atomic checkpoints, exact positions.

These methods are overridden:

* ``get_batch_samples`` sums each task's target weights over all accumulated passes and all processes
  before the first of them runs. So a task's loss is the mean over every token of the step, not a
  mean of means, however the rows are distributed.
* ``_save_checkpoint`` writes under another name and renames, so that a kill leaves only whole checkpoints.
* ``create_optimizer`` shards the model first if ``fsdp`` is set (:mod:`sbs_edge.training.sharding`).
* ``evaluate`` reads validation rows once, both tasks in one pass, split over the processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from sbs_edge import files
from sbs_edge.errors import UsageError
from sbs_edge.training.batches import Batches, Encoded, MemoryRows
from sbs_edge.training.config import TrainConfig
from sbs_edge.training.doubt import doubtful
from sbs_edge.training.model import TwoTaskModel
from sbs_edge.training.sharding import Sharded, shard, spread_optimizer_state, whole, whole_optimizer_state

__all__ = ["TwoTaskTrainer", "find_checkpoint", "make_arguments"]

POSITION = "position.json"
WEIGHTS = "student.safetensors"
BEST = "best.safetensors"


def find_checkpoint(work: Path) -> Path | None:
    """Return the newest complete checkpoint under ``work``, or None."""
    found = [path for path in work.glob("checkpoint-*") if (path / POSITION).is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def make_arguments(config: TrainConfig, work: Path, steps: int, *, evaluates: bool) -> TrainingArguments:
    """Translate ``config`` for transformers' Trainer (4.57 and 5)."""
    every = config.eval_steps or max(1, steps // 6)
    save = every if config.save_steps is None else config.save_steps
    # transformers stores the precision of an earlier run of this process here, and would read it again.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.peak_learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip_norm,
        optim="adamw_torch_fused",
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=every,
        logging_strategy="no",
        save_strategy="steps" if save else "no",
        save_steps=save or 500,
        metric_for_best_model="eval_score" if evaluates else None,
        greater_is_better=True if evaluates else None,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,  # it would synchronise with the device in every step
        ignore_data_skip=True,  # Batches starts at the recorded position itself
        ddp_find_unused_parameters=False,
    )
    # A process uses one device; torchrun starts a process per device (DataParallel cannot split our batch).
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class TwoTaskTrainer(Trainer):  # type: ignore[misc]
    """See the module's text.

    Args:
        model: the two-task model.
        args: see :func:`make_arguments`.
        config: the run's configuration.
        batches: training passes of this process.
        validation: collated validation batches, all of them, the same on every process.
        label_tokens: first token of every closed label if they all differ, else None.
        label_answers: for each validation batch, the index of the right closed label of each label row.
        callbacks: transformers callbacks.
        score_at: steps before which all rows are scored, and those with doubtful rationales dropped.

    """

    def __init__(
        self,
        model: TwoTaskModel,
        args: TrainingArguments,
        *,
        config: TrainConfig,
        batches: Batches,
        validation: list[dict[str, Any]],
        label_tokens: Tensor | None,
        label_answers: list[Tensor],
        callbacks: list[Any],
        score_at: Iterable[int] = (),
    ) -> None:
        self.config = config
        self.batches = batches
        self.first_step = 0
        self.validation = validation
        self.label_tokens = label_tokens
        self.label_answers = label_answers
        # Taken before anything is wrapped or sharded: tied weights appear once.
        self.trained_names = [name for name, value in model.named_parameters() if value.requires_grad]
        self._sharded: Sharded | None = None
        self._sums = torch.zeros(8)  # losses, correct tokens, tokens, steps with the task; of both tasks
        self.score_at = frozenset(score_at)
        super().__init__(
            model=model, args=args, train_dataset=batches, eval_dataset=validation, callbacks=callbacks
        )
        self.model_accepts_loss_kwargs = True  # 4.57: the loss is already over all accumulated passes
        self.loss_is_scaled_for_ga = True  # 5: the same

    # ------------------------------------------------------------------ data and loss

    lr_scheduler: Any
    control: Any

    def get_train_dataloader(self) -> DataLoader:
        """Return the passes of this process, which are collated and need no sharding."""
        # Its own generator: opening the loader must not draw from the random state that a checkpoint restored.
        return DataLoader(
            self.batches, batch_size=None, collate_fn=lambda batch: batch, generator=torch.Generator()
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Fetch the passes of one step and set their common denominators."""
        if self.state.global_step in self.score_at:
            self._drop_doubtful_rows()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return [], None
        total = torch.stack([batch["denominators"] for batch in batches]).sum(0).to(device)
        world = self.accelerator.num_processes
        if world > 1:
            # Gradients are averaged over processes, so each divides by its share of the global sum.
            total = self.accelerator.reduce(total, "sum") / world
        self._sums = self._sums.to(device)
        self._sums[6:] += total > 0
        for batch in batches:
            batch["denominators"] = total
        return batches, total.sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the loss of one pass; keep its parts for the history, without synchronising."""
        outputs = model(**inputs)
        parts = torch.cat([outputs["losses"].float(), outputs["correct"].float(), outputs["counts"].float()])
        self._sums[:6] += parts.detach()
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def create_optimizer(self, *args: Any, **named: Any) -> Any:
        """Shard the model if ``fsdp`` is set, then create the optimiser of its parameters."""
        if self.config.fsdp and self._sharded is None:
            shard(self.model, self.args.device, self.accelerator.num_processes)
            self._sharded = Sharded(self.model)
        return super().create_optimizer(*args, **named)

    def _wrap_model(self, model: Any, *args: Any, **named: Any) -> Any:
        return self._sharded or super()._wrap_model(model, *args, **named)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the warm-up, hold and fall of the configuration."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: self.config.factor_at(step, num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ------------------------------------------------------------------ evaluation

    def _training_part(self) -> dict[str, float]:
        """Return mean losses and token accuracies since the last call, over all processes."""
        sums = self.accelerator.reduce(self._sums.to(self.args.device), "sum")
        self._sums = torch.zeros(8)
        values = sums.tolist()
        row: dict[str, float] = {}
        for task, (name, loss) in enumerate(self.mean_losses(sums).items()):
            if loss is not None:
                row[f"{name}_loss"] = loss
                row[f"{name}_token_accuracy"] = values[2 + task] / values[4 + task]
        return row

    def mean_losses(self, sums: Tensor | None = None) -> dict[str, float | None]:
        """Return the mean loss of each task over the steps that had it; None where no step had.

        Args:
            sums: (8,) as this process collects them; None: those of this process since the last evaluation.

        """
        values = (self._sums if sums is None else sums).tolist()
        return {
            name: values[task] / values[6 + task] if values[6 + task] else None
            for task, name in enumerate(("label", "rationale"))
        }

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return training and validation figures since the last evaluation; keep the best weights."""
        metrics: dict[str, float] = self._training_part()
        metrics["learning_rate"] = float(self.lr_scheduler.get_last_lr()[0])
        metrics["tokens"] = float(self.batches.tokens)
        if self.validation:
            metrics.update(self._validate())
            best = self.state.best_metric
            if self.config.select == "best" and (best is None or metrics["eval_score"] > best):
                self._write_best()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validate(self) -> dict[str, float]:
        model, device = self.model_wrapped, self.args.device
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        was_training = model.training
        model.eval()
        sums = torch.zeros(8, device=device)  # losses, correct, tokens, right labels, label rows
        # Sharded parameters need every process in every pass, so each process then reads all batches.
        shared = self.config.fsdp or world == 1
        tokens = None if self.label_tokens is None else self.label_tokens.to(device)
        for index, batch in enumerate(self.validation):
            if not shared and index % world != rank:
                continue
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                out = model(**inputs, label_tokens=tokens, label_exact=tokens is None)
            answers = self.label_answers[index].to(device)
            right = out["scores"].argmax(1) == answers if tokens is not None else out["exact"]
            known = answers >= 0
            sums[:2] += out["losses"].float() * inputs["denominators"]
            sums[2:4] += out["correct"]
            sums[4:6] += out["counts"]
            sums[6] += (right[: len(answers)] & known).sum()
            sums[7] += known.sum()
        model.train(was_training)
        if world > 1:  # sharded: equal sums, averaged so that all processes decide on the same bits
            sums = self.accelerator.reduce(sums, "mean" if shared else "sum")
        values = sums.tolist()
        row: dict[str, float] = {}
        for task, name in enumerate(("label", "rationale")):
            if values[4 + task]:
                row[f"eval_{name}_loss"] = values[task] / values[4 + task]
                row[f"eval_{name}_token_accuracy"] = values[2 + task] / values[4 + task]
        if values[7]:
            row["eval_label_accuracy"] = values[6] / values[7]
        # The loss decides between equal accuracies, and replaces them if no label is known.
        loss = row.get("eval_label_loss", row.get("eval_rationale_loss", 0.0))
        row["eval_score"] = row.get("eval_label_accuracy", 0.0) - 1e-5 * min(loss, 100.0)
        return row

    # ------------------------------------------------------------------ rows

    def _drop_doubtful_rows(self) -> None:
        """Score the rationale of every training row, dropped before or not, and drop the rows that stand apart."""
        source = self.batches.source
        if not isinstance(source, MemoryRows):
            return
        known = [index for index, row in enumerate(source.rows) if row.tasks[1] is not None]
        losses = self._rationale_losses([source.rows[index] for index in known])
        drops = doubtful(losses).tolist()
        if any(drops):  # otherwise what was decided before stands
            source.drop((index for index, drop in zip(known, drops, strict=True) if drop), self.rows_used())

    def _rationale_losses(self, rows: list[Encoded]) -> Tensor:
        """Return (N,) mean token losses of the rows' own rationales, the same on every process."""
        model, size = self.model_wrapped, self.config.eval_batch_size
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        shared = self.config.fsdp or world == 1  # sharded parameters need every process in every pass
        was_training = model.training
        model.eval()
        losses = torch.zeros(len(rows), device=self.args.device)
        for number, start in enumerate(range(0, len(rows), size)):
            if not shared and number % world != rank:
                continue
            part = [
                dataclasses.replace(row, tasks=(None, row.tasks[1]), further=((), ()))
                for row in rows[start : start + size]
            ]
            inputs = self._prepare_inputs(self.batches.collator(part))
            with torch.no_grad(), self.compute_loss_context_manager():
                losses[start : start + size] = model(**inputs, row_losses=True)["row_losses"].float()
        model.train(was_training)
        if world > 1:
            losses = self.accelerator.reduce(losses, "mean" if shared else "sum")
        return losses.cpu()

    # ------------------------------------------------------------------ files

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained parameters on the CPU, whole; every process must take part."""
        return self.whole_state(self.trained_names)

    def whole_state(self, names: list[str] | None = None) -> dict[str, Tensor]:
        """Return parameters (None: all, tied ones once) on the CPU, whole; every process must take part."""
        own = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        return {name: whole(own[name]).contiguous() for name in (own if names is None else names)}

    def load_state(self, path: Path) -> None:
        """Put weights saved by :meth:`trained_state` into the model."""
        values = load_file(path)
        own = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        missing = sorted(set(self.trained_names) ^ set(values))
        if missing or any(own[name].shape != value.shape for name, value in values.items()):
            raise UsageError(
                f"{path} does not fit this student ({missing[0] if missing else 'other shapes'}): it was "
                "made with another model or size. Train without resume, or write to another directory."
            )
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)

    def _write_best(self) -> None:
        state = self.trained_state()
        if self.args.should_save:
            target = Path(self.args.output_dir) / BEST
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".tmp")
            try:
                save_file(state, partial)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)  # a full disk needs the space

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters of a checkpoint, whole, once."""
        state = self.trained_state()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_state(Path(resume_from_checkpoint) / WEIGHTS)  # nothing is sharded yet

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or (self.args.device.type != "cpu" and self._sharded is None):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # transformers maps to this process's "cpu:0", a device that torch.load does not know.
        for part, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
            state = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            if self._sharded is not None and part is self.optimizer:
                state = spread_optimizer_state(self.optimizer, state)
            part.load_state_dict(state)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / ".partial")

    @property
    def rows_per_step(self) -> int:
        """Rows of a step, over all processes and accumulated passes."""
        passes = self.config.gradient_accumulation * self.accelerator.num_processes
        return int(self.config.batch_size * passes)

    def rows_used(self) -> int:
        """Return how many rows all processes together have used."""
        steps = self.state.global_step - self.first_step
        return int(self.batches.start_row + steps * self.rows_per_step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        work = Path(self.args.output_dir)
        partial = work / ".partial" / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(partial.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(partial.parent, ignore_errors=True)  # a full disk needs the space
            raise
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            files.write_json(
                partial / POSITION,
                {
                    "rows": self.rows_used(),
                    "step": self.state.global_step,
                    "world": self.accelerator.num_processes,
                    **self._dropped_rows(),
                },
            )
            for entry in partial.rglob("*"):
                if entry.is_file():
                    with entry.open("rb") as handle:
                        os.fsync(handle.fileno())
            final = work / partial.name
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            files.fsync_directory(work)
            shutil.rmtree(partial.parent, ignore_errors=True)
            found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            for old in found[: -self.config.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _dropped_rows(self) -> dict[str, Any]:
        source = self.batches.source
        if not isinstance(source, MemoryRows) or not source.dropped:
            return {}
        return {"dropped": sorted(source.dropped), "dropped_at": source.dropped_at}

    def start_at(self, checkpoint: Path | None, steps: int) -> None:
        """Set the data position recorded in ``checkpoint``; ``steps`` is the length of the whole run."""
        if checkpoint is None:
            return
        with contextlib.suppress(OSError):
            position = json.loads((checkpoint / POSITION).read_text(encoding="utf-8"))
            self.first_step = position["step"]
            self.batches.start_row = position["rows"]
            self.batches.steps = max(0, steps - self.first_step)
            # The head start is a number of steps, and those before the checkpoint may have had other batches.
            self.batches.labels_from += self.batches.start_row - self.first_step * self.rows_per_step
            if isinstance(self.batches.source, MemoryRows) and position.get("dropped"):
                self.batches.source.drop(position["dropped"], position["dropped_at"])
