"""The PyTorch judge of a student: label accuracy and rationale agreement on rows never trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.student.encode import IGNORE, pad
from sbs_edge.student.student_dir import StudentDir

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["evaluate", "evaluate_model", "predict_labels"]


def evaluate(
    student: str | os.PathLike[str],
    examples: Sequence[Example],
    *,
    rationales: bool = True,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Judge a student directory.

    Args:
        student: its path.
        examples: rows; those without a gold label do not count for accuracy.
        rationales: also compare rationales with the rows' own, where the student writes them.
        batch_size: rows a forward pass.

    Returns:
        ``n``, ``label_accuracy`` (None without gold labels), ``right`` (a flag a judged row), and for
        rationales ``rationale_token_accuracy`` (teacher-forced) and ``rationale_exact`` (greedy).
    """
    opened = StudentDir.load(student)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = opened.load_model().to(device)
    return evaluate_model(
        model, opened.tokenizer(), opened.task, opened.prefixes, opened.limits, examples,
        rationales=rationales and opened.mode.startswith("stepwise"), exact=True, batch_size=batch_size,
    )  # fmt: skip


def evaluate_model(
    model: Any,
    tokenizer: Tokenizer,
    task: TaskSpec,
    prefixes: Any,
    limits: Any,
    examples: Sequence[Example],
    *,
    rationales: bool,
    exact: bool,
    batch_size: int = 64,
    gold: str = "label",
) -> dict[str, Any]:
    """Judge a live model; ``gold`` names the field of the row that counts as right."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            rows = [row for row in examples if getattr(row, gold) is not None]
            answers = predict_labels(model, tokenizer, task, prefixes["label"], limits, rows, batch_size)
            right = [
                same_answer(answer, getattr(row, gold), task.compare)
                for answer, row in zip(answers, rows, strict=True)
            ]
            result: dict[str, Any] = {
                "n": len(rows),
                "label_accuracy": sum(right) / len(right) if right else None,
                "right": right,
            }
            explained = [row for row in examples if row.rationale] if rationales else []
            if explained:
                result["n_rationales"] = len(explained)
                result["rationale_token_accuracy"] = _token_accuracy(
                    model, tokenizer, prefixes["rationale"], limits, explained, batch_size
                )
                if exact:
                    texts = _generate(
                        model, tokenizer, [prefixes["rationale"] + row.input for row in explained],
                        limits["max_source_tokens"], limits["max_target_tokens"], batch_size,
                    )  # fmt: skip
                    pairs = zip(texts, explained, strict=True)
                    hits = [text == _normal(tokenizer, row.rationale or "") for text, row in pairs]
                    result["rationale_exact"] = sum(hits) / len(hits)
    finally:
        model.train(training)
    return result


def predict_labels(
    model: Any,
    tokenizer: Tokenizer,
    task: TaskSpec,
    prefix: str,
    limits: Any,
    rows: Sequence[Example],
    batch_size: int = 64,
) -> list[str]:
    """Answer every row as the bundle does: first tokens, label likelihoods, or greedy text."""
    texts = [prefix + row.input for row in rows]
    if task.label_kind == "open":
        return _generate(
            model, tokenizer, texts, limits["max_source_tokens"], limits["max_label_tokens"] + 1, batch_size
        )
    sources = _encode(tokenizer, texts, limits["max_source_tokens"])
    sets = [task.labels if task.label_kind == "closed" else (row.choices or ()) for row in rows]
    answers: list[str] = []
    for low in range(0, len(rows), batch_size):
        part = slice(low, low + batch_size)
        scores = _label_scores(model, tokenizer, sources[part], sets[part])
        answers += [names[best] for names, best in zip(sets[part], scores, strict=True)]
    return answers


def _encode(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> list[list[int]]:
    rows = [item.ids for item in tokenizer.encode_batch(list(texts))]
    return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows]


def _padded(model: Any, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    ids = pad(rows, model.config.pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        mask[index, : len(row)] = 1
    device = model.get_input_embeddings().weight.device
    return ids.to(device), mask.to(device)


def _label_scores(
    model: Any, tokenizer: Tokenizer, sources: Sequence[list[int]], sets: Sequence[Sequence[str]]
) -> list[int]:
    """Return the index of the best label of every row."""
    tokens = {name: tokenizer.encode(name).ids for names in sets for name in names}
    ids, mask = _padded(model, sources)
    encoded = model.encoder(input_ids=ids, attention_mask=mask, return_dict=True)
    start = model.config.decoder_start_token_id
    first = {tuple(names): [tokens[name][0] for name in names] for names in sets}
    if len(first) == 1 and all(len(set(f)) == len(f) for f in first.values()):
        inputs = torch.full((len(sources), 1), start, device=ids.device)
        out = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=inputs)
        (columns,) = first.values()
        return [int(i) for i in out.logits[:, 0, columns].argmax(dim=1)]
    # One teacher-forced row for every (row, label): the sum of log-probabilities, end-of-sequence included.
    owner = [row for row, names in enumerate(sets) for _ in names]
    targets = pad([tokens[name] for names in sets for name in names], IGNORE).to(ids.device)
    inputs = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1].clamp(min=0)], dim=1)
    index = torch.tensor(owner, device=ids.device)
    state = type(encoded)(last_hidden_state=encoded.last_hidden_state[index])
    out = model(encoder_outputs=state, attention_mask=mask[index], decoder_input_ids=inputs)
    log_p = out.logits.float().log_softmax(dim=-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    totals = log_p.masked_fill(targets == IGNORE, 0.0).sum(dim=1)
    best, offset = [], 0
    for names in sets:
        best.append(int(totals[offset : offset + len(names)].argmax()))
        offset += len(names)
    return best


def _token_accuracy(
    model: Any, tokenizer: Tokenizer, prefix: str, limits: Any, rows: Sequence[Example], batch_size: int
) -> float:
    sources = _encode(tokenizer, [prefix + row.input for row in rows], limits["max_source_tokens"])
    targets = _encode(tokenizer, [row.rationale or "" for row in rows], limits["max_target_tokens"])
    right = total = 0
    for low in range(0, len(rows), batch_size):
        ids, mask = _padded(model, sources[low : low + batch_size])
        labels = pad(targets[low : low + batch_size], IGNORE).to(ids.device)
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        real = labels != IGNORE
        right += int((out.logits.argmax(dim=-1) == labels)[real].sum())
        total += int(real.sum())
    return right / total if total else 0.0


def _normal(tokenizer: Tokenizer, text: str) -> str:
    """Return ``text`` as it looks after the tokenizer, to compare with generated text."""
    return str(tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True)).strip()


def _generate(
    model: Any, tokenizer: Tokenizer, texts: Sequence[str], max_source: int, max_new: int, batch_size: int
) -> list[str]:
    sources = _encode(tokenizer, texts, max_source)
    out: list[str] = []
    for low in range(0, len(sources), batch_size):
        ids, mask = _padded(model, sources[low : low + batch_size])
        tokens = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False, num_beams=1
        )
        out += [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in tokens.tolist()]
    return out
