"""Answers to long inputs: chunks through the encoder in groups, then a decoder over the states that are kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbs_edge.runtime.batches import pad_rows, padded_length
from sbs_edge.runtime.sessions import Session
from sbs_edge.windows import Chunk

__all__ = ["Documents", "LongReader"]

Documents = Mapping[int, Sequence[Chunk]]
"""Number of a text in its call -> the text's chunks; texts within the ordinary limit are absent."""

_PURPOSE = "inputs over max_source_tokens"


@dataclass(slots=True)
class _Opened:
    """A document under way: its states (1, N, d_model) and how many chunks are still missing."""

    text: int
    states: np.ndarray
    missing: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A chunk that waits for the encoder, and where its states go."""

    chunk: Chunk
    document: _Opened
    offset: int


class LongReader:
    """Reads long inputs with the graphs ``long_*`` of a target; safe to share between threads.

    A call holds the states of one document, or of a few small ones whose chunks share a run of the encoder: four
    bytes a token and unit of ``d_model``. A document's answer does not depend on what shares the run.
    """

    def __init__(
        self,
        session: Callable[[str, str], Session],
        *,
        top_k: int | None,
        d_model: int,
        pad_id: int,
        max_batch_tokens: int,
    ) -> None:
        """Bind the graphs.

        Args:
            session: role and purpose -> an open graph.
            top_k: states each attention head reads; None: all.
            d_model: width of a state.
            pad_id: the padding token.
            max_batch_tokens: most padded tokens a run of the encoder; at least one chunk.
        """
        self._session = session
        self._top_k = np.array(2**31 if top_k is None else top_k, np.int64)
        self._width, self._pad, self._budget = d_model, pad_id, max_batch_tokens

    def score_labels(
        self, documents: Documents, tries: Callable[[int], Mapping[str, np.ndarray]] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each text's number and scores (K,).

        Args:
            documents: the chunks of each text.
            tries: the trie inputs of a text that brings its own labels; None: the closed label set.
        """
        if not documents:
            return
        scorer = self._session("long_label_scorer" if tries is None else "long_choice_scorer", _PURPOSE)
        for text, feeds in self._read(documents):
            (scores,) = scorer.run(feeds if tries is None else {**feeds, **tries(text)})
            yield text, scores[0]

    def generate(self, documents: Documents, limit: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield each text's number, tokens (M,) and the () log-probability of their sum."""
        if not documents:
            return
        explainer = self._session("long_explainer", _PURPOSE)
        for text, feeds in self._read(documents):
            tokens, totals = explainer.run({**feeds, "max_new_tokens": np.array(limit, np.int64)})
            yield text, tokens[0], totals[0]

    def _read(self, documents: Documents) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each text's number and what its decoder reads; chunks of several texts share runs of the encoder."""
        group: list[_Place] = []
        under_way: deque[_Opened] = deque()

        def ready() -> Iterator[tuple[int, dict[str, Any]]]:
            while under_way and not under_way[0].missing:
                done = under_way.popleft()
                yield done.text, {"states": done.states, "top_k": self._top_k}

        for text, chunks in documents.items():
            kept = sum(chunk.stop - chunk.start for chunk in chunks)
            document = _Opened(text, np.empty((1, kept, self._width), np.float32), len(chunks))
            under_way.append(document)
            offset = 0
            for chunk in chunks:
                if group and not self._fits(group, chunk):
                    self._encode(group)
                    group = []
                    yield from ready()
                group.append(_Place(chunk, document, offset))
                offset += chunk.stop - chunk.start
        self._encode(group)
        group = []
        yield from ready()

    def _fits(self, group: Sequence[_Place], chunk: Chunk) -> bool:
        length = padded_length(len(chunk.ids))
        same = padded_length(len(group[0].chunk.ids)) == length
        return same and (len(group) + 1) * length <= self._budget

    def _encode(self, group: Sequence[_Place]) -> None:
        ids, mask = pad_rows([place.chunk.ids for place in group], self._pad)
        (states,) = self._session("long_encoder", _PURPOSE).run({"input_ids": ids, "attention_mask": mask})
        for row, place in zip(states, group, strict=True):
            kept = row[place.chunk.start : place.chunk.stop]
            place.document.states[0, place.offset : place.offset + len(kept)] = kept
            place.document.missing -= 1
