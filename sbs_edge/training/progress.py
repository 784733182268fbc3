"""A progress bar with both losses, tokens a second and the time left; nothing off a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["ProgressBar", "TensorBoard"]

REFRESH_S = 0.5


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Shows the run on stderr.

    Args:
        trainer: where losses and tokens are summed; set after construction.

    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self._bar: Progress | None = None
        self._last = 0.0
        self._started = 0.0
        self._tokens_before = 0
        self._evaluated = ""

    @staticmethod
    def wanted(setting: bool | None) -> bool:
        """Whether a bar is to be shown: as set, else only on a terminal."""
        return sys.stderr.isatty() if setting is None else setting

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        if not state.is_world_process_zero:
            return
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._bar.start()
        self._bar.add_task("training", total=state.max_steps, completed=state.global_step, text="")
        self._started = time.monotonic()
        self._tokens_before = self.trainer.batches.tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar, at most twice a second (reading a loss waits for the device)."""
        now = time.monotonic()
        if self._bar is None or now - self._last < REFRESH_S:
            return
        self._last = now
        passes = max(1, self.trainer._passes // self.trainer.config.gradient_accumulation)
        losses = [value / passes for value in self.trainer._sums[:2].tolist()]
        tokens = (self.trainer.batches.tokens - self._tokens_before) * self.trainer.accelerator.num_processes
        rate = tokens / max(now - self._started, 1e-9)
        second = f"  rationale {losses[1]:.3f}" if self.trainer.config.uses_rationales else ""
        text = f"label {losses[0]:.3f}{second}  {rate:,.0f} tokens/s{self._evaluated}"
        self._bar.update(self._bar.task_ids[0], completed=state.global_step, text=text)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Remember the validation accuracy for the text beside the bar."""
        if "eval_label_accuracy" in metrics:
            self._evaluated = f"  validation {metrics['eval_label_accuracy']:.1%}"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class TensorBoard(TrainerCallback):  # type: ignore[misc]
    """Writes every figure of the history as a scalar.

    Args:
        folder: where event files go.

    """

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Write one row of figures."""
        if state.is_world_process_zero:
            for name, value in logs.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Flush to disk."""
        self._writer.close()
