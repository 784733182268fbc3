"""From examples to the tensors of one forward pass: tokens, both tasks in one batch, who sees which row.

The order of rows depends on the seed alone, not on the number of processes: row ``i`` of a step goes to
process ``i % world``. So a run continues at another world size where it stopped, and two processes
with half the batch do what one does with the whole.
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
from sbs_edge.training.long import chunk_tensors
from sbs_edge.windows import Chunk, ChunkReader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batches", "ChunkCollator", "Collator", "Encoded", "Encoder", "MemoryRows", "StreamRows"]

IGNORE = -100
Source = list[int] | list[Chunk]
"""An input's token ids, or its chunks in runs that read long inputs."""


@dataclass(slots=True)
class Encoded:
    """Tokens of one example: per task ``(input, target)`` or None where the row lacks the target."""

    tasks: tuple[tuple[Source, list[int]] | None, tuple[Source, list[int]] | None]
    weight: float = 1.0


class Encoder:
    """Tokenises examples for a mode; counts what had to be cut.

    Attributes:
        cut_sources, cut_targets: rows that were longer than the limits, cut before the end token.

    """

    def __init__(self, tokenizer: Tokenizer, config: TrainConfig, eos_id: int) -> None:
        self.texts = TextTokenizer(tokenizer)
        self.config = config
        self.eos_id = eos_id
        self.long = config.long_settings
        self.chunks = None if self.long is None else ChunkReader(self.texts, self.long, eos_id)
        self.cut_sources = 0
        self.cut_targets = 0

    def __call__(self, example: Example) -> Encoded | None:
        """Return the row's tokens, or None when it has neither target the mode learns from."""
        config = self.config
        wanted = (label_for(example, config.mode), rationale_for(example, config.mode))
        tasks: list[tuple[Source, list[int]] | None] = []
        limit = config.max_source_tokens if self.long is None else self.long.max_tokens
        for prefix, target in zip(config.prefix_pair, wanted, strict=True):
            if target is None or not target.strip():
                tasks.append(None)
                continue
            source, cut_source = self.texts.encode_within(example.input, limit, self.eos_id, prefix)
            ids = self.texts.encode_target(target, self.eos_id)
            self.cut_sources += cut_source
            self.cut_targets += len(ids) > config.max_target_tokens
            ids = within_limit(ids, config.max_target_tokens, self.eos_id)
            tasks.append((self._chunked(example, source, prefix), ids))
        if not any(tasks):
            return None
        weight = example.confidence if config.row_weight == "confidence" else 1.0
        return Encoded((tasks[0], tasks[1]), weight)

    def _chunked(self, example: Example, source: list[int], prefix: str) -> Source:
        if self.chunks is None:
            return source
        where = f"The input of {example.source or example.id}"
        return self.chunks.chunks(example.input, source, prefix, where)


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


class Collator:
    """Makes the arguments of :meth:`TwoTaskModel.forward` out of encoded rows.

    A task without a row in this batch gets one placeholder row that weighs nothing: every process
    then runs the same passes, which sharded parameters need, and an empty batch is no special case.
    """

    def __init__(self, *, pad_id: int, eos_id: int, start_id: int, n_tasks: int = 2) -> None:
        self.pad_id = pad_id
        self.eos_id = eos_id
        self.start_id = start_id
        self.n_tasks = n_tasks

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Return tensors on the CPU, and ``denominators`` (2,): the sums of weights of this batch."""
        sources: list[Source] = []
        decoder_ids, targets, segments, weights = [], [], [], []
        for task in range(self.n_tasks):
            mine = [(pair, row.weight) for row in rows if (pair := row.tasks[task]) is not None]
            pairs = [pair for pair, _ in mine] or [(self._nothing(), [IGNORE])]
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
        return {
            **self._inputs(sources),
            "decoder_ids": decoder_ids,
            "targets": flat,
            "segment_ids": segment_ids,
            "row_weights": row_weights,
            "valid_indices": valid,
            "denominators": denominators,
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


class MemoryRows:
    """Rows held in memory, tokenised once, in a new seeded order every epoch, without end."""

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
        """Return ``row``: it is tokenised already."""
        return row


class StreamRows:
    """Rows that are read again for every pass and never held: memory does not grow with their number.

    Shuffled within a buffer. To resume, the rows before the position are read again but not tokenised.
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
    """The forward passes of one process, ``gradient_accumulation`` of them a step, ready as tensors.

    Args:
        source: where rows come from, in what order.
        collator: see :class:`Collator`.
        start_row: rows that all processes together have already used.
        last_row: stop there (the last step may then have fewer rows, even none here); None: no end.
        steps: optimiser steps to give.
        batch_size: examples a forward pass.
        passes: forward passes a step.
        rank, world: this process and how many there are.

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
