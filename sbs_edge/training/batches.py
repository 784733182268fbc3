"""Turn examples into the tensors of a forward pass: tokens, both tasks in one batch, rows per process.

The order of rows depends only on the seed, not on the number of processes: row ``i`` of a step goes to
process ``i % world``. So a run can be resumed with another world size, and two processes
with half the batch make the same step as one process with the whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from sbs_edge.data.example import Example
from sbs_edge.data.rationales import best_rationale
from sbs_edge.data.targets import label_for, rationale_for, rationales_for, soft_label
from sbs_edge.tokens import TextTokenizer, within_limit
from sbs_edge.training.config import TrainConfig
from sbs_edge.training.long import chunk_tensors
from sbs_edge.windows import Chunk, ChunkReader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batches", "ChunkCollator", "Collator", "Encoded", "Encoder", "MemoryRows", "StreamRows"]

IGNORE = -100
Source = list[int] | list[Chunk]
"""An input's token ids, or its chunks in runs that read long inputs."""
LEAST_SHARE = 1e-3
"""A further target with a smaller share of its row costs a decoder row and moves nothing."""


Targets = tuple[tuple[list[int], float], ...]


@dataclass(slots=True)
class Encoded:
    """Tokens of one example.

    Attributes:
        tasks: per task ``(input, target)``, or None where the row lacks the target.
        weight: of the row, in both tasks.
        further: per task further targets of the same input with their shares of the row's weight; the
            target in ``tasks`` has the rest.
        id: the example's.

    """

    tasks: tuple[tuple[Source, list[int]] | None, tuple[Source, list[int]] | None]
    weight: float = 1.0
    further: tuple[Targets, Targets] = ((), ())
    id: str = ""

    def rationale_only(self) -> Encoded:
        """Return the row without its label; a row that has nothing else keeps it."""
        if self.tasks[1] is None:
            return self
        return dataclasses.replace(self, tasks=(None, self.tasks[1]), further=((), self.further[1]))

    def with_one_rationale(self, rng: random.Random) -> Encoded:
        """Return the row with one of its rationales, each equally likely."""
        pair = self.tasks[1]
        if pair is None or not self.further[1]:
            return self
        target = rng.choice([pair[1], *(ids for ids, _ in self.further[1])])
        return dataclasses.replace(
            self, tasks=(self.tasks[0], (pair[0], target)), further=(self.further[0], ())
        )


class Encoder:
    """Tokenises examples for a mode, and counts the cut ones.

    Args:
        tokenizer: the student's.
        config: see :class:`TrainConfig`.
        eos_id: ends every input and target.
        labels: the closed set; empty for other kinds of label.

    Attributes:
        cut_sources, cut_targets: rows that were longer than the limits, cut before the end token.

    """

    def __init__(
        self, tokenizer: Tokenizer, config: TrainConfig, eos_id: int, labels: Sequence[str] = ()
    ) -> None:
        self.texts = TextTokenizer(tokenizer)
        self.config = config
        self.eos_id = eos_id
        self.labels = tuple(labels)
        self.long = config.long_settings
        self.chunks = None if self.long is None else ChunkReader(self.texts, self.long, eos_id)
        self.cut_sources = 0
        self.cut_targets = 0

    def __call__(self, example: Example, *, plain: bool = False) -> Encoded | None:
        """Return the row's tokens, or None if it has no target that the mode learns from.

        Args:
            example: the row.
            plain: weigh it as every other row, with one target a task; validation reads rows so.

        """
        config = self.config
        label = label_for(example, config.mode)
        rationales = rationales_for(example, config.mode)
        if config.rationales == "best" and len(rationales) > 1:
            rationales = (
                best_rationale(rationales, example.input, label, self.labels or example.choices or ()),
            )
        if plain:
            rationales = rationales[:1]
        wanted: tuple[dict[str, float], dict[str, float]] = (
            {} if label is None else {label: 1.0},
            dict.fromkeys(rationales, 1.0 / max(1, len(rationales))),
        )
        if label is not None and config.soft_labels and not plain:
            known = self.labels or example.choices or ()
            wanted = (
                soft_label(example, label, known, config.soft_labels, config.soft_temperature),
                wanted[1],
            )
        tasks: list[tuple[Source, list[int]] | None] = []
        limit = config.max_source_tokens if self.long is None else self.long.max_tokens
        further: list[Targets] = []
        for prefix, shares in zip(config.prefix_pair, wanted, strict=True):
            targets = [(self._target(text), share) for text, share in shares.items() if text.strip()]
            if not targets:
                tasks.append(None)
                further.append(())
                continue
            source, cut_source = self.texts.encode_within(example.input, limit, self.eos_id, prefix)
            self.cut_sources += cut_source
            tasks.append((self._chunked(example, source, prefix), targets[0][0]))
            further.append(tuple((ids, share) for ids, share in targets[1:] if share >= LEAST_SHARE))
        if not any(tasks):
            return None
        weight = example.confidence if config.row_weight == "confidence" and not plain else 1.0
        return Encoded((tasks[0], tasks[1]), weight, (further[0], further[1]), example.id)

    def _chunked(self, example: Example, source: list[int], prefix: str) -> Source:
        if self.chunks is None:
            return source
        where = f"The input of {example.source or example.id}"
        return self.chunks.chunks(example.input, source, prefix, where)

    def _target(self, text: str) -> list[int]:
        ids = self.texts.encode_target(text, self.eos_id)
        self.cut_targets += len(ids) > self.config.max_target_tokens
        return within_limit(ids, self.config.max_target_tokens, self.eos_id)


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


class Collator:
    """Builds the arguments of :meth:`TwoTaskModel.forward` from encoded rows.

    A task without a row in this batch gets a placeholder row of weight 0. Every process then runs the same
    passes, as sharded parameters require, and an empty batch is not a special case.
    """

    def __init__(self, *, pad_id: int, eos_id: int, start_id: int, n_tasks: int = 2) -> None:
        self.pad_id = pad_id
        self.eos_id = eos_id
        self.start_id = start_id
        self.n_tasks = n_tasks

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Return tensors on the CPU, and ``denominators`` (2,): the sums of weights of this batch.

        A row's first targets come first in each task, its further ones behind them, in segment ``task + 2``:
        they share the encoder's pass, and ``decoder_rows`` names the row of it that each belongs to.
        """
        sources: list[Source] = []
        decoder_ids, targets, segments, weights = [], [], [], []
        decoder_rows: list[Tensor] = []
        for task in range(self.n_tasks):
            mine = [row for row in rows if row.tasks[task] is not None]
            pairs = [pair for row in mine if (pair := row.tasks[task])] or [(self._nothing(), [IGNORE])]
            further = [
                (owner, ids, row.weight * share)
                for owner, row in enumerate(mine)
                for ids, share in row.further[task]
            ]
            first = [
                row.weight * max(0.0, 1.0 - sum(share for _, share in row.further[task])) for row in mine
            ]
            factors = torch.tensor([*(first or [0.0]), *(weight for _, _, weight in further)])
            owners = [*range(len(pairs)), *(owner for owner, _, _ in further)]
            decoder_rows.append(torch.tensor(owners) + len(sources))
            sources += [source for source, _ in pairs]
            wanted = _pad([*(target for _, target in pairs), *(ids for _, ids, _ in further)], IGNORE)
            shifted = torch.full_like(wanted, self.start_id)
            shifted[:, 1:] = wanted[:, :-1].masked_fill(wanted[:, :-1] == IGNORE, self.pad_id)
            decoder_ids.append(shifted)
            targets.append(wanted.reshape(-1))
            segment = torch.full(wanted.shape, task, dtype=torch.long)
            segment[len(pairs) :] = task + 2
            segments.append(segment.reshape(-1))
            weights.append(factors.repeat_interleave(wanted.shape[1]))
        flat, segment_ids, row_weights = torch.cat(targets), torch.cat(segments), torch.cat(weights)
        valid = (flat != IGNORE).nonzero().squeeze(1)
        denominators = torch.zeros(2).index_add_(0, segment_ids[valid] % 2, row_weights[valid])
        several = sum(map(len, decoder_rows)) > len(sources)
        return {
            **self._inputs(sources),
            "decoder_ids": decoder_ids,
            "targets": flat,
            "segment_ids": segment_ids,
            "row_weights": row_weights,
            "valid_indices": valid,
            "denominators": denominators,
            **({"decoder_rows": decoder_rows} if several else {}),
        }

    def _nothing(self) -> Source:
        """Return the input of a row that weighs nothing."""
        return [self.eos_id]

    def _inputs(self, sources: Sequence[Any]) -> dict[str, torch.Tensor]:
        input_ids = _pad(sources, self.pad_id)
        lengths = torch.tensor([len(source) for source in sources])
        mask = (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).long()
        return {"input_ids": input_ids, "attention_mask": mask}


class ChunkCollator(Collator):
    """A collator of rows whose inputs are chunks; ``input_ids`` and ``attention_mask`` hold the chunks of all rows."""

    def _nothing(self) -> Source:
        return [Chunk([self.eos_id], 0, 1)]

    def _inputs(self, sources: Sequence[Any]) -> dict[str, torch.Tensor]:
        return chunk_tensors(sources, self.pad_id)


def _rng(seed: int, epoch: int, key: int | str) -> random.Random:
    """The generator that draws a row's rationale: the same wherever and whenever an epoch is entered."""
    return random.Random(f"{seed}/{epoch}/{key}")


class MemoryRows:
    """Rows in memory, tokenised once and repeated forever, in a new seeded order each epoch.

    With ``sample``, each epoch draws one of a row's rationales.

    Attributes:
        dropped: rows that are left out of the order from position ``dropped_at`` on.

    """

    def __init__(self, rows: Sequence[Encoded], seed: int, *, sample: bool = False) -> None:
        self.rows = rows
        self.seed = seed
        self.sample = sample
        self.dropped: frozenset[int] = frozenset()
        self.dropped_at = 0

    def __len__(self) -> int:
        return len(self.rows)

    def drop(self, rows: Iterable[int], position: int) -> None:
        """Leave ``rows`` out from ``position`` on, where a new order of the others starts."""
        self.dropped, self.dropped_at = frozenset(rows), position

    def starting_at(self, start: int) -> Iterator[Encoded]:
        """Yield rows from position ``start`` of the endless order."""
        position = start
        while True:
            after = bool(self.dropped) and position >= self.dropped_at
            order = [index for index in range(len(self.rows)) if not (after and index in self.dropped)]
            base = self.dropped_at if after else 0
            epoch, skip = divmod(position - base, len(order))
            random.Random(f"{self.seed}/{base}/{epoch}" if after else f"{self.seed}/{epoch}").shuffle(order)
            for index in order[skip:]:
                row = self.rows[index]
                yield row.with_one_rationale(_rng(self.seed, epoch, index)) if self.sample else row
                position += 1
                if self.dropped and position == self.dropped_at:  # dropped while this order was being read
                    break

    def encode(self, row: Encoded) -> Encoded:
        """Return ``row``, which is tokenised already."""
        return row


class StreamRows:
    """Rows that are read again for every pass, so that memory does not grow with their number.

    They are shuffled within a buffer. To resume, earlier rows are read but not tokenised.
    """

    def __init__(
        self, open_rows: Callable[[], Iterable[Example]], encoder: Encoder, seed: int, buffer: int
    ) -> None:
        self.open_rows = open_rows
        self.encoder = encoder
        self.seed = seed
        self.buffer = buffer

    def _one_pass(self, epoch: int) -> Iterator[Example]:
        rng = random.Random(f"{self.seed}/{epoch}")
        held: list[Example] = []
        mode = self.encoder.config.mode
        sample = self.encoder.config.rationales == "sample"
        for example in self.open_rows():
            if not (label_for(example, mode) or rationale_for(example, mode)):
                continue
            if sample and example.rationales:
                drawn = _rng(self.seed, epoch, example.id).choice(rationales_for(example, mode) or (None,))
                example = dataclasses.replace(example, rationale=drawn, rationales=())
            if len(held) < self.buffer:
                held.append(example)
                continue
            index = rng.randrange(self.buffer)
            yielded, held[index] = held[index], example
            yield yielded
        rng.shuffle(held)
        yield from held

    def starting_at(self, start: int) -> Iterator[Example]:
        """Yield rows from position ``start`` of the endless order."""

        def endless() -> Iterator[Example]:
            for epoch in itertools.count():
                n = 0
                for n, example in enumerate(self._one_pass(epoch), 1):  # noqa: B007 (n is used below)
                    yield example
                if n == 0:
                    return

        return itertools.islice(endless(), start, None)

    def encode(self, row: Example) -> Encoded | None:
        """Tokenise ``row``."""
        return self.encoder(row)


class Batches(IterableDataset):
    """The forward passes of a process as tensors, ``gradient_accumulation`` of them per step.

    Args:
        source: the rows, in order.
        collator: see :class:`Collator`.
        start_row: rows that all processes together have already used.
        last_row: stop there (the last step may then have fewer rows, even none here); None: no end.
        labels_from: a row before this position that has a rationale gives that task alone.
        steps: number of optimiser steps.
        batch_size: examples per forward pass.
        passes: forward passes per step.
        rank, world: number of this process, and how many there are.

    Attributes:
        tokens: real input and target tokens given out so far by this process.

    """

    def __init__(
        self,
        source: MemoryRows | StreamRows,
        collator: Collator,
        *,
        start_row: int = 0,
        last_row: int | None = None,
        labels_from: int = 0,
        steps: int,
        batch_size: int,
        passes: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source = source
        self.collator = collator
        self.start_row = start_row
        self.last_row = last_row
        self.labels_from = labels_from
        self.steps = steps
        self.batch_size = batch_size
        self.passes = passes
        self.rank = rank
        self.world = world
        self.tokens = 0

    def __len__(self) -> int:
        return self.steps * self.passes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows: Iterator[Any] = self.source.starting_at(self.start_row)
        if self.last_row is not None:
            rows = itertools.islice(rows, max(0, self.last_row - self.start_row))
        position = self.start_row
        for _ in range(self.steps):
            step = list(itertools.islice(rows, self.batch_size * self.passes * self.world))
            mine = [self.source.encode(row) for row in step[self.rank :: self.world]]
            if position < self.labels_from:
                mine = [row and row.rationale_only() for row in mine]
            position += len(step)
            for index in range(self.passes):
                part = mine[index * self.batch_size : (index + 1) * self.batch_size]
                batch = self.collator([row for row in part if row is not None])
                self.tokens += int(batch["attention_mask"].sum()) + len(batch["valid_indices"])
                yield batch
