"""Measure the effect of padding on a target's label scores and answers.

A row is padded by its own length alone, so other rows cannot change its answer. This module measures the padding
itself, by scoring every row again at twice its padded length. In exact arithmetic nothing would change. In float32 the
attention's sums are split differently, and int8 may occasionally round a last-place difference to another step of an
activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbs_edge.data.example import Example
from sbs_edge.export.labels import LabelPlan
from sbs_edge.runtime.batches import padded_length, token_budget_batches
from sbs_edge.runtime.sessions import Session
from sbs_edge.runtime.student import Student
from sbs_edge.runtime.trie import batch_tries, build_trie
from sbs_edge.tokens import TextTokenizer, read_tokenizer, within_limit

__all__ = ["padding_figures"]

MOST_ROWS = 1000
BUDGET = 1024  # tokens per call


def padding_figures(student: Student, rows: Sequence[Example], plan: LabelPlan) -> dict[str, Any] | None:
    """Score the first 1,000 rows at their padded length and at twice that.

    Args:
        student: the target to measure.
        rows: inputs, with choices where the task has them.
        plan: how labels are scored.

    Returns:
        ``rows``; ``largest_move`` of a score, relative to the largest score; ``flips``: rows whose best label changed.
        None if labels are decoded, or there are no rows.
    """
    role = "choice_scorer" if plan.method == "choices" else "label_scorer"
    _, entry = student.bundle.target(student.target)
    if role not in entry or not rows:
        return None
    session = Session(student.bundle.member(entry[role]), entry["providers"], student.threads)
    rows, most = rows[:MOST_ROWS], student.limits["max_source_tokens"]
    model = student.manifest["model"]
    pad, eos, start = (model[f"{name}_token_id"] for name in ("pad", "eos", "decoder_start"))
    sources = [within_limit(ids, most, eos) for ids in student.tokenize([row.input for row in rows])]
    # The bundle's tokenizer, because its vocabulary may be smaller than the checkpoint's.
    texts = TextTokenizer(read_tokenizer(student.bundle.member("tokenizer.json")))
    labels = [[texts.encode_target(choice, eos) for choice in row.distinct_choices] for row in rows]
    move = largest = 0.0
    flips = 0
    for batch in token_budget_batches([2 * len(ids) for ids in sources], BUDGET):
        part = [sources[i] for i in batch]
        tries = [build_trie(labels[i], start) for i in batch] if plan.method == "choices" else []
        feeds = batch_tries(tries) if tries else {}
        counts = [len(trie.label_edges) for trie in tries] or [len(plan.labels)] * len(batch)
        short = max(padded_length(len(ids)) for ids in part)
        scores = []
        for length in (short, 2 * short):
            ids = np.array([[*row, *[pad] * (length - len(row))] for row in part], np.int64)
            mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in part], np.int64)
            scores.append(session.run({"input_ids": ids, "attention_mask": mask, **feeds})[0])
        for plain, padded, count in zip(*scores, counts, strict=True):
            move = max(move, float(np.abs(plain[:count] - padded[:count]).max()))
            largest = max(largest, float(np.abs(plain[:count]).max()))
            flips += int(plain[:count].argmax() != padded[:count].argmax())
    return {"rows": len(rows), "largest_move": move / max(largest, 1e-9), "flips": flips}
