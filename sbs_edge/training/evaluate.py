"""Evaluate a student with PyTorch: the accuracy of its labels, and the agreement of its rationales.

Labels are chosen as the runtime chooses them. If the labels of a closed set differ in their first token, one
decoder step decides. Other sets, and choices in the rows, are scored by the sum of log p(token | prefix) over the
whole label with its end token, normalised over the vocabulary. Open labels are decoded greedily. Answers are
compared by :func:`sbs_edge.data.answers.same_answer`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from sbs_edge.analysis.answers import analyse_answers
from sbs_edge.data.answers import normalise, same_answer
from sbs_edge.data.columns import column_values
from sbs_edge.data.example import Example
from sbs_edge.errors import DataError
from sbs_edge.progress import ProgressLine
from sbs_edge.resources import limit_torch_threads
from sbs_edge.tokens import TextTokenizer, first_tokens, start_token_id, within_limit
from sbs_edge.training.long import chunk_tensors, encode_chunks
from sbs_edge.training.model import cache_options
from sbs_edge.training.student_dir import StudentDir
from sbs_edge.windows import ChunkReader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OnProgress = Callable[[int, int], None]
"""Called with the number of rows done and the total."""

__all__ = ["LabelAnswers", "evaluate", "predict_labels", "predict_rationales"]


@dataclass(slots=True)
class LabelAnswers:
    """A student's labels for some rows.

    Attributes:
        method: how they were found: first-token, trie or decode.
        labels: the answers.
        probabilities: of the answers, before calibration: among the labels asked about, or of a decoded label's tokens.
        n_tokens: tokens read of each input, prefix and end token included.

    """

    method: str
    labels: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)


def _chunks(texts: Sequence[str], size: int) -> Iterator[tuple[int, Sequence[str]]]:
    for start in range(0, len(texts), size):
        yield start, texts[start : start + size]


def _read(
    model: Any, student: StudentDir, tokenizer: TextTokenizer, texts: Sequence[str], prefix: str
) -> tuple[BaseModelOutput, Tensor]:
    """Return the encoder's states (B, N, d_model) of ``texts`` and their mask (B, N).

    Inputs over ``max_source_tokens`` are read in chunks if the student was trained so. Inputs over the limit are
    cut before their end token.
    """
    config, long = model.config, student.long
    limit = student.limits["max_source_tokens"] if long is None else long.max_tokens
    rows = [
        within_limit(row, limit, config.eos_token_id)
        for row in tokenizer.encode_beginnings(texts, limit, prefix)
    ]
    if long is None or all(len(row) <= student.limits["max_source_tokens"] for row in rows):
        ids, mask = (part.to(model.device) for part in _padded(rows, config))
        return BaseModelOutput(_encode(model, ids, mask)), mask
    reader = ChunkReader(tokenizer, long, config.eos_token_id)
    chunks = [reader.chunks(text, row, prefix) for text, row in zip(texts, rows, strict=True)]
    tensors = chunk_tensors(chunks, config.pad_token_id)
    ids, mask, index = (part.to(model.device) for part in tensors.values())
    states, mask = encode_chunks(partial(_encode, model), ids, mask, index)
    return BaseModelOutput(states), mask


def _encode(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    states: Tensor = model.get_encoder()(
        input_ids=ids, attention_mask=mask, return_dict=True
    ).last_hidden_state
    return states


def _padded(rows: Sequence[Sequence[int]], config: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[config.pad_token_id] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return ids, (torch.arange(width) < lengths).long()


def _first_step(model: Any, read: BaseModelOutput, mask: Tensor, tokens: Tensor) -> Tensor:
    start = torch.full((len(mask), 1), start_token_id(model.config), device=mask.device)
    logits: Tensor = model(
        encoder_outputs=read, attention_mask=mask, decoder_input_ids=start, use_cache=False
    ).logits
    return logits[:, 0, tokens].float()


def _sequence_scores(
    model: Any, read: BaseModelOutput, mask: Tensor, candidates: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Return, for each row, the log-probability of each candidate (token ids with end token)."""
    config, states = model.config, read[0]
    owner = torch.tensor([row for row, own in enumerate(candidates) for _ in own], device=mask.device)
    flat = [list(candidate) for own in candidates for candidate in own]
    width = max(map(len, flat))
    wanted = torch.tensor([[*c, *[-100] * (width - len(c))] for c in flat], device=mask.device)
    decoder = torch.full_like(wanted, start_token_id(config))
    decoder[:, 1:] = wanted[:, :-1].masked_fill(wanted[:, :-1] == -100, config.pad_token_id)
    scores: list[float] = []
    step = max(1, (1 << 24) // (width * config.vocab_size))  # at most 64 MiB of float32 logits
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        logits = model(
            encoder_outputs=(states[owner[part]],),
            attention_mask=mask[owner[part]],
            decoder_input_ids=decoder[part],
            use_cache=False,
        ).logits
        log_p = logits.float().log_softmax(-1).gather(-1, wanted[part].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        scores += log_p.masked_fill(wanted[part] == -100, 0.0).sum(1).tolist()
    rows, position = [], 0
    for own in candidates:
        rows.append(scores[position : position + len(own)])
        position += len(own)
    return rows


@torch.no_grad()
def _generate(
    model: Any,
    student: StudentDir,
    texts: Sequence[str],
    prefix: str,
    tokenizer: TextTokenizer,
    new_tokens: int,
    batch_size: int,
    on_progress: OnProgress | None = None,
) -> Iterator[tuple[BaseModelOutput, Tensor, list[list[int]]]]:
    """Decode greedily; yield the states and mask of each batch, and each row's tokens, the end token included if it came."""
    eos = model.config.eos_token_id
    for start, part in _chunks(texts, batch_size):
        if on_progress is not None:
            on_progress(start, len(texts))
        read, mask = _read(model, student, tokenizer, part, prefix)
        out = model.generate(
            encoder_outputs=read, attention_mask=mask, max_new_tokens=new_tokens, max_length=None,
            do_sample=False, num_beams=1, **cache_options(model),
        )  # fmt: skip
        yield read, mask, [row[: row.index(eos) + 1] if eos in row else row for row in out[:, 1:].tolist()]


def _softmax_best(scores: Sequence[float]) -> tuple[int, float]:
    """Return the place of the highest score and its share in the softmax."""
    best = max(range(len(scores)), key=scores.__getitem__)
    return best, 1.0 / sum(math.exp(score - scores[best]) for score in scores)


@torch.no_grad()
def predict_labels(
    model: Any,
    student: StudentDir,
    tokenizer: Tokenizer | TextTokenizer,
    examples: Sequence[Example],
    batch_size: int = 64,
    on_progress: OnProgress | None = None,
) -> LabelAnswers:
    """Return the label of every example, with its probability, and the method used."""
    texts, prefix = [example.input for example in examples], student.prefixes["label"]
    tokenizer = TextTokenizer.of(tokenizer)
    kind, labels = student.task.label_kind, student.task.labels
    eos = model.config.eos_token_id
    if kind == "open":
        found = LabelAnswers("decode")
        new = student.limits["max_label_tokens"]
        for read, mask, rows in _generate(
            model, student, texts, prefix, tokenizer, new, batch_size, on_progress
        ):
            found.labels += [tokenizer.decode([token for token in row if token != eos]) for row in rows]
            scores = _sequence_scores(model, read, mask, [[row] for row in rows])
            found.probabilities += [min(1.0, math.exp(score)) for (score,) in scores]
            found.n_tokens += mask.sum(1).tolist()
        return found
    encoded = {label: tokenizer.encode_target(label, eos) for label in labels}
    heads = first_tokens(list(encoded.values())) if kind == "closed" else None
    found = LabelAnswers("trie" if heads is None else "first-token")
    for start, part in _chunks(texts, batch_size):
        if on_progress is not None:
            on_progress(start, len(texts))
        read, mask = _read(model, student, tokenizer, part, prefix)
        own: list[Sequence[str]] = []
        for example in examples[start : start + len(part)]:
            choices = labels if kind == "closed" else example.choices
            if not choices:
                raise DataError(f"{example.source or example.id} has no choices, which its task needs.")
            own.append(choices)
        if heads is not None:
            values = _first_step(model, read, mask, torch.tensor(heads, device=mask.device)).tolist()
        else:
            candidates = [[encoded.get(c) or tokenizer.encode_target(c, eos) for c in row] for row in own]
            values = _sequence_scores(model, read, mask, candidates)
        best = [_softmax_best(row) for row in values]
        found.labels += [row[place] for row, (place, _) in zip(own, best, strict=True)]
        found.probabilities += [probability for _, probability in best]
        found.n_tokens += mask.sum(1).tolist()
    return found


def predict_rationales(
    model: Any,
    student: StudentDir,
    tokenizer: Tokenizer | TextTokenizer,
    examples: Sequence[Example],
    batch_size: int = 64,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """Decode the rationale of every example greedily."""
    texts = [example.input for example in examples]
    tokenizer = TextTokenizer.of(tokenizer)
    prefix, eos = student.prefixes["rationale"], model.config.eos_token_id
    target = student.limits["max_target_tokens"]
    return [
        tokenizer.decode([token for token in row if token != eos])
        for _, _, rows in _generate(model, student, texts, prefix, tokenizer, target, batch_size, on_progress)
        for row in rows
    ]


@torch.no_grad()
def _teacher_forced(
    model: Any, student: StudentDir, tokenizer: TextTokenizer, examples: Sequence[Example], batch_size: int
) -> tuple[int, int, float]:
    """Return correct tokens, tokens, and the sum of their cross-entropies, of the rationales."""
    limits, config = student.limits, model.config
    correct = total = 0
    loss = 0.0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        texts, prefix = [example.input for example in part], student.prefixes["rationale"]
        read, mask = _read(model, student, tokenizer, texts, prefix)
        targets, keep = (
            t.to(model.device)
            for t in _padded(
                [
                    within_limit(
                        tokenizer.encode_target(example.rationale or "", config.eos_token_id),
                        limits["max_target_tokens"],
                        config.eos_token_id,
                    )
                    for example in part
                ],
                config,
            )
        )
        decoder = torch.full_like(targets, start_token_id(config))
        decoder[:, 1:] = targets[:, :-1]
        logits = model(
            encoder_outputs=read, attention_mask=mask, decoder_input_ids=decoder, use_cache=False
        ).logits.float()
        real = keep.bool()
        correct += int(((logits.argmax(-1) == targets) & real).sum())
        total += int(real.sum())
        loss += float(torch.nn.functional.cross_entropy(logits[real], targets[real], reduction="sum"))
    return correct, total, loss


def evaluate(
    student: StudentDir | str | os.PathLike[str],
    examples: Sequence[Example] | None = None,
    *,
    model: Any = None,
    batch_size: int = 64,
    rationales: int | None = None,
    predictions: bool = False,
    analysis: bool = False,
    slices: Sequence[str] = (),
    device: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a student on ``examples`` with PyTorch.

    Args:
        student: a student directory.
        examples: rows; None: its own validation rows.
        model: evaluate this transformers model instead of the directory's weights.
        batch_size: rows per forward pass.
        rationales: decode at most this many rationales; None: all, 0: none. It only applies to modes with
            rationales.
        predictions: add ``predictions``: the answer to each example, whether it is ``right`` (None
            without a gold label), its probability, and the rationale.
        analysis: add ``analysis``, the error analysis (:func:`sbs_edge.analysis.answers.analyse`), against the gold
            labels, or the teacher's if no row has a gold label (``reference``); None if no row has either.
        slices: columns of the rows' file by whose values the error analysis gives accuracies.
        device: where to run; None: a GPU if there is one.
        progress: write a line on stderr every few seconds.

    Returns:
        ``n``, ``method``, ``label_accuracy`` over the ``label_n`` rows with a gold label (None
        without any), ``labels_respelled`` (gold labels of an open task whose spelling the tokenizer changes; the
        student is right when it writes the changed form),
        ``teacher_agreement`` (share of rows with a teacher label in which the student gives the same label), and for
        rationales ``rationale_n``, ``rationale_token_accuracy`` and
        ``rationale_loss`` (next token, given the reference so far) and ``rationale_exact`` (share
        of decoded rationales equal to the reference up to case and white space).

    """
    opened = student if isinstance(student, StudentDir) else StudentDir.load(Path(student))
    rows = list(opened.validation() if examples is None else examples)
    if not rows:
        raise DataError(f"There are no rows to evaluate {opened.path} on; give a file with examples.")
    tokenizer = opened.text_tokenizer()
    if model is None:
        limit_torch_threads()
    judged = opened.load_model() if model is None else model.eval()
    judged.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def lines(what: str) -> OnProgress | None:
        line: ProgressLine | None = None

        def update(done: int, total: int) -> None:
            nonlocal line
            line = line or ProgressLine(f"evaluating {what}", total)
            line.update(done)

        return update if progress else None

    further = column_values(rows, slices)  # now, not after all answers
    found = predict_labels(judged, opened, tokenizer, rows, batch_size, lines("labels"))
    answers, method = found.labels, found.method
    compare = opened.task.compare

    def same(answer: str, wanted: str) -> bool:
        # A decoded label is right if it is the gold label as the tokenizer spells it, as in training.
        return same_answer(answer, wanted, compare) or (method == "decode" and answer == spelled(wanted))

    spelled = cache(tokenizer.respelled)

    def share(pairs: list[tuple[str, str]]) -> float | None:
        return sum(same(a, b) for a, b in pairs) / len(pairs) if pairs else None

    gold = [(answer, row.label) for answer, row in zip(answers, rows, strict=True) if row.label is not None]
    taught = [
        (answer, row.teacher_label)
        for answer, row in zip(answers, rows, strict=True)
        if row.teacher_label is not None
    ]
    report: dict[str, Any] = {
        "n": len(rows),
        "method": method,
        "label_n": len(gold),
        "label_accuracy": share(gold),
        "labels_respelled": sum(not same_answer(spelled(wanted), wanted, compare) for _, wanted in gold)
        if method == "decode"
        else 0,
        "teacher_agreement": share(taught),
    }
    explained: Mapping[str, str] = {}
    known = [row for row in rows if row.rationale]
    if known and opened.mode in ("stepwise", "stepwise-teacher"):
        correct, total, loss = _teacher_forced(judged, opened, tokenizer, known, batch_size)
        report.update(
            rationale_n=len(known), rationale_token_accuracy=correct / total, rationale_loss=loss / total
        )
        asked = known if rationales is None else known[:rationales]
        if asked:
            texts = predict_rationales(judged, opened, tokenizer, asked, batch_size, lines("rationales"))
            exact = [
                normalise(t) == _canonical(tokenizer, r.rationale or "")
                for t, r in zip(texts, asked, strict=True)
            ]
            report.update(rationale_exact=sum(exact) / len(exact), rationale_decoded=len(exact))
            explained = {row.id: text for row, text in zip(asked, texts, strict=True)}
    if predictions:
        report["predictions"] = [
            {
                "id": row.id,
                "label": answer,
                "gold": row.label,
                "right": None if row.label is None else same(answer, row.label),
                "probability": probability,
                "rationale": explained.get(row.id),
            }
            for row, answer, probability in zip(rows, answers, found.probabilities, strict=True)
        ]
    if analysis:
        explains = opened.mode in ("stepwise", "stepwise-teacher") and rationales != 0
        report["analysis"] = analyse_answers(
            rows, answers, found.probabilities, found.n_tokens, opened.task, same, further,
            partial(predict_rationales, judged, opened, tokenizer, batch_size=batch_size) if explains else None,
        )  # fmt: skip
    return report


def _canonical(tokenizer: TextTokenizer, text: str) -> str:
    """Return ``text`` as the tokenizer spells it, so that the spacing of signs is not an error."""
    return normalise(tokenizer.respelled(text))
