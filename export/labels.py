"""Choose how a task's labels are scored, with the student's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sbs_edge.data.example import TaskSpec
from sbs_edge.errors import UsageError
from sbs_edge.label_tokens import label_ids
from sbs_edge.tokens import TextTokenizer, first_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["LabelPlan", "plan_labels"]

Method = Literal["first-token", "trie", "choices", "decode"]


@dataclass(frozen=True, slots=True)
class LabelPlan:
    """The scoring method and, for a closed set, the tokens of each label (end-of-sequence included)."""

    kind: str
    method: Method
    labels: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]

    def describe(self) -> dict[str, Any]:
        """Return the plan for the manifest."""
        return {
            "kind": self.kind,
            "method": self.method,
            "labels": list(self.labels),
            "token_ids": [list(ids) for ids in self.token_ids],
        }


def plan_labels(task: TaskSpec, tokenizer: Tokenizer | TextTokenizer, eos_id: int) -> LabelPlan:
    """Choose how to score the labels.

    If the first tokens of all labels differ, one decoder position decides; otherwise the labels' prefix trie is
    scored. Labels that come with the request use the trie, and open labels are decoded.

    Raises:
        UsageError: a label has no known token, or two labels have the same tokens.
    """
    if task.label_kind == "open":
        return LabelPlan("open", "decode", (), ())
    if task.label_kind == "choices":
        return LabelPlan("choices", "choices", (), ())
    if len(task.labels) < 2:
        raise UsageError(
            f"The task {task.name!r} has {len(task.labels)} label(s); a closed set needs at least two."
        )
    tokens = label_ids(task.labels, TextTokenizer.of(tokenizer), eos_id)
    return LabelPlan(
        "closed", "trie" if first_tokens(tokens) is None else "first-token", task.labels, tuple(tokens)
    )
