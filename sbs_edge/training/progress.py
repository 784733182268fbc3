"""Progress of a training run with both losses, tokens per second and the time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import EarlyStoppingCallback, TrainerCallback

from sbs_edge.progress import ProgressLine

__all__ = ["EarlyStopping", "ProgressBar", "TensorBoard"]

REFRESH_S = 0.5


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Shows the run on stderr: a bar on a terminal, a line every few seconds elsewhere.

    Args:
        trainer: where losses and tokens are summed; set after construction.

    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self._bar: Progress | None = None
        self._line: ProgressLine | None = None
        self._last = 0.0
        self._started = 0.0
        self._tokens_before = 0
        self._evaluated = ""

    @staticmethod
    def wanted(setting: bool | None) -> bool:
        """Return whether to show progress, which is on unless it is switched off."""
        return setting is not False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar or the lines."""
        if not state.is_world_process_zero:
            return
        self._started = time.monotonic()
        self._tokens_before = self.trainer.batches.tokens
        if not sys.stderr.isatty():
            self._line = ProgressLine("training", state.max_steps, "steps", start=state.global_step)
            return
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._bar.start()
        self._bar.add_task("training", total=state.max_steps, completed=state.global_step, text="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar, at most twice a second (reading a loss waits for the device)."""
        now = time.monotonic()
        if self._line is None and self._bar is None:
            return
        if not self._line.due if self._line is not None else now - self._last < REFRESH_S:
            return
        self._last = now
        losses = [
            f"{name} {loss:.3f}" for name, loss in self.trainer.mean_losses().items() if loss is not None
        ]
        tokens = (self.trainer.batches.tokens - self._tokens_before) * self.trainer.accelerator.num_processes
        rate = tokens / max(now - self._started, 1e-9)
        text = "  ".join([*losses, f"{rate:,.0f} tokens/s{self._evaluated}"])
        if self._line is not None:
            self._line.update(state.global_step, text.replace("  ", ", "))
        elif self._bar is not None:
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


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]
    """Stops a run whose validation score no longer rises, but never within the head start, which learns no labels.

    Args:
        patience: evaluations without a better score.
        head_start: steps that learn rationales alone.

    """

    def __init__(self, patience: int, head_start: int) -> None:
        super().__init__(patience)
        self._head_start = head_start

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **named: Any
    ) -> None:
        """Compare the score with the best one so far."""
        if state.global_step > self._head_start:
            super().on_evaluate(args, state, control, metrics, **named)


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
