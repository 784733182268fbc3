"""Turn examples into the tensors of a forward pass: tokens, both tasks in one batch, rows per process.

The order of rows depends only on the seed, not on the number of processes: row ``i`` of a step goes to
process ``i % world``. So a run can be resumed with another world size, and two processes
with half the batch make the same step as one process with the whole.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from sbs_edge.data.example import Example
from sbs_edge.data.targets import label_for, rationale_for
from sbs_edge.tokens import TextTokenizer, within_limit
from sbs_edge.training.config import TrainConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batches", "Collator", "Encoded", "Encoder", "MemoryRows", "StreamRows"]

IGNORE = -100


@dataclass(slots=True)
class Encoded:
    """Token ids of an example: ``(input, target)`` for each task, or None if the row lacks the target."""

    tasks: tuple[tuple[list[int], list[int]] | None, tuple[list[int], list[int]] | None]
    weight: float = 1.0


class Encoder:
    """Tokenises examples for a mode, and counts the cut ones.

    Attributes:
        cut_sources, cut_targets: rows that were longer than the limits, cut before the end token.

    """

    def __init__(self, tokenizer: Tokenizer, config: TrainConfig, eos_id: int) -> None:
        self.texts = TextTokenizer(tokenizer)
        self.config = config
        self.eos_id = eos_id
        self.cut_sources = 0
        self.cut_targets = 0

    def __call__(self, example: Example) -> Encoded | None:
        """Return the row's tokens, or None if it has no target that the mode learns from."""
        config = self.config
        wanted = (label_for(example, config.mode), rationale_for(example, config.mode))
        tasks: list[tuple[list[int], list[int]] | None] = []
        for prefix, target in zip(config.prefix_pair, wanted, strict=True):
            if target is None or not target.strip():
                tasks.append(None)
                continue
            source, cut_source = self.texts.encode_within(
                example.input, config.max_source_tokens, self.eos_id, prefix
            )
            ids = self.texts.encode_target(target, self.eos_id)
            self.cut_sources += cut_source
            self.cut_targets += len(ids) > config.max_target_tokens
            ids = within_limit(ids, config.max_target_tokens, self.eos_id)
            tasks.append((source, ids))
        if not any(tasks):
            return None
        weight = example.confidence if config.row_weight == "confidence" else 1.0
        return Encoded((tasks[0], tasks[1]), weight)


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
        """Return tensors on the CPU, and ``denominators`` (2,): the sums of weights of this batch."""
        sources: list[list[int]] = []
        decoder_ids, targets, segments, weights = [], [], [], []
        for task in range(self.n_tasks):
            mine = [(pair, row.weight) for row in rows if (pair := row.tasks[task]) is not None]
            pairs = [pair for pair, _ in mine] or [([self.eos_id], [IGNORE])]
            factors = torch.tensor([weight for _, weight in mine] or [0.0])
            sources += [source for source, _ in pairs]
            wanted = _pad([target for _, target in pairs], IGNORE)
            shifted = torch.full_like(wanted, self.start_id)
            shifted[:, 1:] = wanted[:, :-1].masked_fill(wanted[:, :-1] == IGNORE, self.pad_id)
            decoder_ids.append(shifted)
            targets.append(wanted.reshape(-1))
            segments.append(torch.full((wanted.numel(),), task, dtype=torch.long))
            weights.append(factors.repeat_interleave(wanted.shape[1]))
        flat, segment_ids, row_weights = torch.cat(targets), torch.cat(segments), torch.cat(weights)
        valid = (flat != IGNORE).nonzero().squeeze(1)
        denominators = torch.zeros(2).index_add_(0, segment_ids[valid], row_weights[valid])
        input_ids = _pad(sources, self.pad_id)
        lengths = torch.tensor([len(source) for source in sources])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).long(),
            "decoder_ids": decoder_ids,
            "targets": flat,
            "segment_ids": segment_ids,
            "row_weights": row_weights,
            "valid_indices": valid,
            "denominators": denominators,
        }


class MemoryRows:
    """Rows in memory, tokenised once and repeated forever, in a new seeded order each epoch."""

    def __init__(self, rows: Sequence[Encoded], seed: int) -> None:
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def starting_at(self, start: int) -> Iterator[Encoded]:
        """Yield rows from position ``start`` of the endless order."""
        epoch, skip = divmod(start, len(self.rows))
        while True:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            for index in order[skip:]:
                yield self.rows[index]
            epoch, skip = epoch + 1, 0

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
        for example in self.open_rows():
            if not (label_for(example, mode) or rationale_for(example, mode)):
                continue
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
        for _ in range(self.steps):
            step = list(itertools.islice(rows, self.batch_size * self.passes * self.world))
            mine = [self.source.encode(row) for row in step[self.rank :: self.world]]
            for index in range(self.passes):
                part = mine[index * self.batch_size : (index + 1) * self.batch_size]
                batch = self.collator([row for row in part if row is not None])
                self.tokens += int(batch["attention_mask"].sum()) + len(batch["valid_indices"])
                yield batch
