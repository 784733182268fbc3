"""Compare the float32 graphs with their PyTorch model on real rows, at every export.

PyTorch runs one row at a time, without padding or cache. Scores are sums of log-probabilities from plain forward
passes, and every generated token must be the most probable one after its predecessors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbs_edge.data.example import Example
from sbs_edge.errors import SbsEdgeError
from sbs_edge.export.labels import LabelPlan
from sbs_edge.runtime.batches import pad_rows
from sbs_edge.runtime.sessions import Session
from sbs_edge.runtime.trie import batch_tries, build_trie
from sbs_edge.tokens import start_token_id
from sbs_edge.training.student_dir import StudentDir
from sbs_edge.windows import Chunk, LongSettings

__all__ = ["FLOAT_TOLERANCE", "Judge", "accept", "check_tokens", "compare_with_pytorch"]

FLOAT_TOLERANCE = 1e-4
LABEL_ROWS = 64
TEXT_ROWS = 8
BATCH = 8


Source = Sequence[int] | Sequence[Chunk]
"""A row's tokens, or the chunks of a long one."""


class Judge:
    """The PyTorch model, run on the tokens or the chunks of one row."""

    def __init__(self, model: Any) -> None:
        self._model, self.config = model, model.config
        self.start_id = start_token_id(model.config)

    def logits(self, source: Source, targets: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return, for each target, the logits (len(target), V) float64 at the positions of its tokens."""
        import torch

        longest = max(len(target) for target in targets)
        fed = [[self.start_id, *target[:-1], *[0] * (longest - len(target))] for target in targets]
        with torch.no_grad():
            encoder = self._model.get_encoder()
            kept = [
                encoder(input_ids=torch.tensor([chunk.ids])).last_hidden_state[:, chunk.start : chunk.stop]
                for chunk in _chunks(source)
            ]
            states = torch.cat(kept, 1)
            out = self._model(
                encoder_outputs=(states.expand(len(fed), -1, -1),), decoder_input_ids=torch.tensor(fed)
            ).logits.double()
        return [rows[: len(target)].numpy() for rows, target in zip(out, targets, strict=True)]

    def log_probabilities(self, source: Source, targets: Sequence[Sequence[int]]) -> np.ndarray:
        """Return (len(targets),) float64, the log-probability of each target as a whole."""
        return np.array(
            [
                _log_softmax(logits)[np.arange(len(target)), list(target)].sum()
                for logits, target in zip(self.logits(source, targets), targets, strict=True)
            ]
        )


def _chunks(source: Source) -> list[Chunk]:
    ids = [item for item in source if isinstance(item, int)]
    return [Chunk(ids, 0, len(ids))] if ids else [item for item in source if isinstance(item, Chunk)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def compare_with_pytorch(
    root: Path,
    graphs: Mapping[str, Any],
    model: Any,
    opened: StudentDir,
    rows: Sequence[Example],
    plan: LabelPlan,
    long: LongSettings | None = None,
) -> dict[str, Any]:
    """Compare every float32 graph of a target with the model.

    Args:
        root: the directory that ``graphs`` is relative to.
        graphs: a target's entry in the manifest.
        model: the transformers model in float32.
        opened: the student.
        rows: rows to compare on; if there are none, the labels themselves are the inputs.
        plan: how labels are scored.
        long: how long inputs are read, if the target has graphs for them.

    Returns:
        ``max_relative_error`` over all graphs, and ``graphs``: error and rows of each.

    Raises:
        SbsEdgeError: a graph differs by more than 1e-4 (relative), or gives another answer.
    """
    judge, tokenizer = Judge(model), opened.text_tokenizer()
    most, eos = opened.limits["max_source_tokens"], int(model.config.eos_token_id)

    def encoded(task: str, count: int) -> list[list[int]]:
        texts = [row.input for row in rows[:count]] or [*plan.labels, opened.task.name][:count]
        return [tokenizer.encode_within(text, most, eos, opened.prefixes[task])[0] for text in texts]

    def session(role: str) -> Session:
        return Session(root / graphs[role], ["CPUExecutionProvider"], 1)

    found: dict[str, Any] = {}
    pad = int(model.config.pad_token_id)
    if "label_scorer" in graphs:
        sources = encoded("label", LABEL_ROWS)
        ours = _scored(session("label_scorer"), sources, pad)
        found["label_scorer"] = _closed(judge, ours, sources, plan)
    if "choice_scorer" in graphs and any(row.choices for row in rows):
        asked = [row for row in rows[:LABEL_ROWS] if row.choices]
        found["choice_scorer"] = _choices(judge, session("choice_scorer"), asked, opened, most, eos, pad)
    if "explainer" in graphs:
        explainer = session("explainer")
        for task in ("label", "rationale") if plan.method == "decode" else ("rationale",):
            limit = opened.limits["max_target_tokens"]
            sources = encoded(task, TEXT_ROWS)
            found[f"explainer ({task})"] = _generated(judge, explainer, sources, limit, eos, pad)
    if long is not None:
        from sbs_edge.export.check.parity_long import compare_long

        found |= compare_long(judge, session, graphs, opened, rows, plan, long)
    errors = [figures["max_relative_error"] for figures in found.values()]
    return {
        "max_relative_error": max(errors, default=0.0),
        "rows": max((figures["rows"] for figures in found.values()), default=0),
        "same_labels": True,
        "graphs": found,
    }


def _scored(session: Session, sources: Sequence[Sequence[int]], pad: int) -> list[np.ndarray]:
    out: list[np.ndarray] = []
    for low in range(0, len(sources), BATCH):
        ids, mask = pad_rows(sources[low : low + BATCH], pad)
        out += list(session.run({"input_ids": ids, "attention_mask": mask})[0])
    return out


def _closed(
    judge: Judge, ours: Sequence[np.ndarray], sources: Sequence[Sequence[int]], plan: LabelPlan
) -> dict[str, Any]:
    if plan.method == "first-token":
        columns = [ids[0] for ids in plan.token_ids]
        theirs = [judge.logits(source, [[columns[0]]])[0][0, columns] for source in sources]
    else:
        theirs = [judge.log_probabilities(source, plan.token_ids) for source in sources]
    return accept("label_scorer", ours, theirs)


def _choices(
    judge: Judge,
    session: Session,
    rows: Sequence[Example],
    opened: StudentDir,
    most: int,
    eos: int,
    pad: int,
) -> dict[str, Any]:
    tokenizer, prefix = opened.text_tokenizer(), opened.prefixes["label"]
    ours, theirs = [], []
    for low in range(0, len(rows), BATCH):
        part = rows[low : low + BATCH]
        sources = [tokenizer.encode_within(row.input, most, eos, prefix)[0] for row in part]
        labels = [[tokenizer.encode_target(choice, eos) for choice in row.distinct_choices] for row in part]
        ids, mask = pad_rows(sources, pad)
        tries = batch_tries([build_trie(row, judge.start_id) for row in labels])
        (scores,) = session.run({"input_ids": ids, "attention_mask": mask, **tries})
        ours += [row[: len(names)] for row, names in zip(scores, labels, strict=True)]
        theirs += [judge.log_probabilities(*pair) for pair in zip(sources, labels, strict=True)]
    return accept("choice_scorer", ours, theirs)


def accept(role: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return the figures if the scores agree, or raise an error."""
    scale = max(max(float(np.abs(row).max()) for row in theirs), 1e-9)
    # np.max and not max, which passes over NaN.
    error = float(np.max([np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)])) / scale
    # The label must be the same, unless two labels are closer than the tolerance.
    behind = max(float(b.max() - b[int(a.argmax())]) for a, b in zip(ours, theirs, strict=True)) / scale
    if not (error <= FLOAT_TOLERANCE and behind <= FLOAT_TOLERANCE):
        raise _differs(role, f"by {error:.2e} relative on {len(ours)} rows")
    return {"max_relative_error": error, "rows": len(ours)}


def _generated(
    judge: Judge, session: Session, sources: Sequence[Sequence[int]], limit: int, eos: int, pad: int
) -> dict[str, Any]:
    """Check greedy decoding: each token is the most probable one, the end is right, and so is the log-probability."""
    worst, n_tokens = 0.0, 0
    for low in range(0, len(sources), BATCH):
        ids, mask = pad_rows(sources[low : low + BATCH], pad)
        tokens, totals = session.run(
            {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(limit, np.int64)}
        )
        for source, row, total in zip(sources[low : low + BATCH], tokens.tolist(), totals, strict=True):
            target = row[: row.index(eos) + 1] if eos in row else row
            worst = max(worst, check_tokens(judge, source, target, float(total), limit, eos))
            n_tokens += len(target)
    return {"max_relative_error": worst, "rows": len(sources), "tokens": n_tokens}


def check_tokens(
    judge: Judge,
    source: Source,
    target: list[int],
    total: float,
    limit: int,
    eos: int,
    role: str = "explainer",
) -> float:
    """Return the relative error of a decoded text's log-probability; raise an error if a token is not the best one."""
    if eos not in target and len(target) != limit:
        raise _differs(role, f"by stopping after {len(target)} of {limit} tokens without an end")
    (logits,) = judge.logits(source, [target])
    places = np.arange(len(target))
    behind = (logits.max(axis=1) - logits[places, target]) / np.maximum(np.abs(logits).max(axis=1), 1e-9)
    if not (behind <= FLOAT_TOLERANCE).all():
        first = int(np.argmax(~(behind <= FLOAT_TOLERANCE)))
        raise _differs(role, f"in token {first + 1} of {len(target)} of a decoded text")
    expected = float(_log_softmax(logits)[places, target].sum())
    # A sum over n tokens has n roundings, however certain each token is.
    error = abs(total - expected) / max(abs(expected), len(target))
    if not error <= FLOAT_TOLERANCE:
        raise _differs(role, f"by {error:.2e} relative in its log-probabilities")
    return error


def _differs(role: str, how: str) -> SbsEdgeError:
    return SbsEdgeError(
        f"The exported float32 graph {role} differs from PyTorch {how} (limit {FLOAT_TOLERANCE:.0e} relative, the "
        "same tokens); nothing was written. Please report the checkpoint's config.json."
    )
