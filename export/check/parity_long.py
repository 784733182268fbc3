"""The float32 graphs that read long inputs beside PyTorch: chunks through its encoder, all states for its decoder.

``top_k`` is left out of this comparison, because PyTorch's model has no such step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sbs_edge.data.example import Example
from sbs_edge.export.check.parity import Judge, accept, check_tokens
from sbs_edge.export.labels import LabelPlan
from sbs_edge.runtime.long import LongReader
from sbs_edge.runtime.sessions import Session
from sbs_edge.runtime.trie import batch_tries, build_trie
from sbs_edge.tokens import most_characters, within_limit
from sbs_edge.training.student_dir import StudentDir
from sbs_edge.windows import Chunk, ChunkReader, LongSettings

__all__ = ["compare_long"]

DOCUMENTS = 3
MOST_CHUNKS = 6


def compare_long(
    judge: Judge,
    session: Callable[[str], Session],
    graphs: Mapping[str, Any],
    opened: StudentDir,
    rows: Sequence[Example],
    plan: LabelPlan,
    long: LongSettings,
) -> dict[str, Any]:
    """Compare the graphs ``long_*`` of a target with the model on a few documents of several chunks.

    Args:
        judge: the PyTorch model.
        session: opens the graph of a role.
        graphs: the target's entry in the manifest.
        opened: the student.
        rows: their inputs, joined and cut, are the documents; without rows, the labels are.
        plan: how labels are scored.
        long: how long inputs are read.

    Returns:
        ``max_relative_error`` and ``rows`` for each graph.

    Raises:
        SbsEdgeError: a graph differs by more than 1e-4 relative, or answers something else.
    """
    config = judge.config
    reader = LongReader(
        lambda role, _: session(role), top_k=None, d_model=config.d_model, pad_id=config.pad_token_id,
        max_batch_tokens=2 * long.chunk,
    )  # fmt: skip
    found: dict[str, Any] = {}
    labels = _documents(opened, rows, plan, long, "label", config.eos_token_id)
    if "long_label_scorer" in graphs:
        ours = [scores for _, scores in reader.score_labels(labels)]
        if plan.method == "first-token":
            columns = [ids[0] for ids in plan.token_ids]
            theirs = [judge.logits(labels[i], [[columns[0]]])[0][0, columns] for i in labels]
        else:
            theirs = [judge.log_probabilities(labels[i], plan.token_ids) for i in labels]
        found["long_label_scorer"] = accept("long_label_scorer", ours, theirs)
    choices = next((row.distinct_choices for row in rows if row.choices), None)
    if "long_choice_scorer" in graphs and choices:
        tokenizer = opened.text_tokenizer()
        tokens = [tokenizer.encode_target(choice, config.eos_token_id) for choice in choices]
        trie = batch_tries([build_trie(tokens, judge.start_id)])
        ours = [scores[: len(tokens)] for _, scores in reader.score_labels(labels, lambda _: trie)]
        theirs = [judge.log_probabilities(labels[i], tokens) for i in labels]
        found["long_choice_scorer"] = accept("long_choice_scorer", ours, theirs)
    if "long_explainer" in graphs:
        limit, eos = opened.limits["max_target_tokens"], config.eos_token_id
        for task in ("label", "rationale") if plan.method == "decode" else ("rationale",):
            documents = _documents(opened, rows, plan, long, task, eos)
            errors = [
                check_tokens(
                    judge, documents[i], _ended(tokens, eos), float(total), limit, eos, "long_explainer"
                )
                for i, tokens, total in reader.generate(documents, limit)
            ]
            found[f"long_explainer ({task})"] = {"max_relative_error": max(errors), "rows": len(errors)}
    return found


def _ended(tokens: np.ndarray, eos: int) -> list[int]:
    row: list[int] = tokens.tolist()
    return row[: row.index(eos) + 1] if eos in row else row


def _documents(
    opened: StudentDir, rows: Sequence[Example], plan: LabelPlan, long: LongSettings, task: str, eos: int
) -> dict[int, list[Chunk]]:
    """Return the chunks of a few documents of at most six chunks."""
    tokenizer, prefix = opened.text_tokenizer(), opened.prefixes[task]
    # Joined rows have no header; what a header repeats are tokens like others.
    reader = ChunkReader(tokenizer, replace(long, header=""), eos)
    texts = [row.input for row in rows] or [*plan.labels, opened.task.name]
    most = min(MOST_CHUNKS * long.chunk // 2, long.max_tokens)
    documents: dict[int, list[Chunk]] = {}
    for number in range(DOCUMENTS):
        start = DOCUMENTS * number % len(texts)
        text = " ".join([*texts[start:], *texts[:start]])
        ids = tokenizer.encode(text[: most_characters(most)], prefix)
        while len(ids) <= most and len(text) < most_characters(most):  # a few short rows: again and again
            text = f"{text} {text}"
            ids = tokenizer.encode(text[: most_characters(most)], prefix)
        documents[number] = reader.chunks(text, within_limit(ids, most, eos), prefix)
    return documents
