"""How a task's labels are scored, decided with the real tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sbs_edge.data.example import TaskSpec
from sbs_edge.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["LabelPlan", "plan_labels"]

Method = Literal["first-token", "trie", "choices", "decode"]


@dataclass(frozen=True, slots=True)
class LabelPlan:
    """The scoring method and, for a closed set, every label's tokens (end-of-sequence included)."""

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


def plan_labels(task: TaskSpec, tokenizer: Tokenizer, eos_id: int) -> LabelPlan:
    """Choose how to score the labels.

    One decoder position decides when every label begins with a token of its own; otherwise the labels'
    prefix trie is scored. Labels that come with the request use the trie, open labels are decoded.

    Raises:
        UsageError: a label has no tokens that are known, or two have the same.
    """
    if task.label_kind == "open":
        return LabelPlan("open", "decode", (), ())
    if task.label_kind == "choices":
        return LabelPlan("choices", "choices", (), ())
    if len(task.labels) < 2:
        raise UsageError(
            f"The task {task.name!r} has {len(task.labels)} label(s); a closed set needs at least two."
        )
    tokens = []
    for label in task.labels:
        ids = tuple(tokenizer.encode(label).ids)
        if ids[-1:] != (eos_id,):
            ids = (*ids, eos_id)
        if not {*ids} - {eos_id, tokenizer.token_to_id("<unk>")}:
            raise UsageError(
                f"The label {label!r} has no token in this student's tokenizer. Rename the label, or train with "
                "a tokenizer that knows its characters."
            )
        tokens.append(ids)
    for index, ids in enumerate(tokens):
        if ids in tokens[:index]:
            other = task.labels[tokens.index(ids)]
            raise UsageError(
                f"The labels {other!r} and {task.labels[index]!r} have the same tokens, so no student can tell "
                "them apart. Rename one of them."
            )
    distinct = len({ids[0] for ids in tokens}) == len(tokens)
    return LabelPlan("closed", "first-token" if distinct else "trie", task.labels, tuple(tokens))
