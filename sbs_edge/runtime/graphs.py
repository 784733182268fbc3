"""The graphs of a target, from token ids to scores or tokens. This module knows nothing of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from sbs_edge.errors import AnswerError, UsageError
from sbs_edge.runtime.batches import pad_rows, token_budget_batches
from sbs_edge.runtime.bundle import Bundle
from sbs_edge.runtime.choices import tries_of
from sbs_edge.runtime.generation import StepLoop
from sbs_edge.runtime.int8_products import warn_of_old_loops
from sbs_edge.runtime.long import Documents, LongReader
from sbs_edge.runtime.manifest import LONG_ROLES
from sbs_edge.runtime.sessions import GraphSource, Session, Sessions, usable_providers
from sbs_edge.runtime.trie import batch_tries, build_trie

__all__ = ["TargetGraphs"]

_ROLES = ("label_scorer", "choice_scorer", "explainer", "encoder", "decoder_step", *LONG_ROLES)
_BEAM = "explainer_beam"


class TargetGraphs:
    """The graphs of a target, each opened at its first use. They are safe to share between threads.

    Attributes:
        sessions: onnxruntime's sessions by role.
        closed: :meth:`close` was called.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str,
        entry: Mapping[str, Any],
        *,
        threads: int,
        max_batch_tokens: int,
        providers: Sequence[str],
        prepacked_cache: bool,
        top_k: int | None = None,
    ) -> None:
        """Prepare to open the graphs of ``entry``, which is the manifest's description of ``target``.

        ``top_k`` is the number of encoder states that each attention head reads of a long input; None: all.

        Raises:
            UsageError: onnxruntime has none of ``providers`` here.
        """
        usable_providers(providers)  # raises now, although graphs are opened when they are first used
        self._root, self._target, self._entry = bundle.root, target, entry
        self._max_batch_tokens = max_batch_tokens
        model = bundle.manifest["model"]
        self._pad, self._eos, self._start = (
            model["pad_token_id"], model["eos_token_id"], model["decoder_start_token_id"],
        )  # fmt: skip
        self.closed = False
        quantisation = entry.get("quantisation") or {}
        int8 = quantisation.get("numbers") != "float32"
        small = "CPUExecutionProvider" not in providers  # an engine is worth keeping at any size

        def opener(role: str, name: str) -> Callable[[], Session]:
            path = bundle.member(name)
            digests = bundle.weight_digests(name, small=small) if prepacked_cache else None
            source = GraphSource(
                partial(bundle.read_graph, name),
                partial(bundle.private_copy, name),
                mapped=bundle.weight_digests(name) is not None,
            )

            def opened() -> Session:
                session = Session(path, providers, threads, digests, source, int8=int8)
                old = role.startswith("explainer") and not quantisation.get("loop_weights")
                if session.corrected and old:
                    warn_of_old_loops(path)
                return session

            return opened

        roles = [role for role in entry if role in _ROLES or role.startswith(_BEAM)]
        self.sessions = Sessions({role: opener(role, entry[role]) for role in roles})
        self._top_k, self._width = top_k, model.get("d_model", 0)

    @property
    def beams(self) -> list[int]:
        """Return the widths of beam search for which the target has a graph."""
        return [int(role.removeprefix(_BEAM)) for role in self.sessions if role.startswith(_BEAM)]

    def label_scores(self, rows: Sequence[Sequence[int]], documents: Documents) -> list[np.ndarray]:
        """Return the scores (K,) of the closed label set for every row of token ids; those in chunks are read so."""
        session = self._session("label_scorer", "a closed label set")
        found = self._in_batches(
            rows, documents, lambda _, ids, mask: session.run({"input_ids": ids, "attention_mask": mask})[0]
        )
        for i, scores in self._reader().score_labels(documents):
            found[i] = scores
        return found

    def choice_scores(
        self,
        rows: Sequence[Sequence[int]],
        documents: Documents,
        choices: Sequence[tuple[str, ...]],
        tokens_of: Callable[[str], Sequence[int]],
    ) -> list[np.ndarray]:
        """Return a score for each of a row's own labels; ``tokens_of`` gives a label's token ids."""
        session = self._session("choice_scorer", "labels given with the request")
        tries = tries_of(choices, tokens_of, self._start)

        def scores(batch: list[int], ids: np.ndarray, mask: np.ndarray) -> Iterable[np.ndarray]:
            trie_inputs = batch_tries([tries[choices[i]] for i in batch])
            (found,) = session.run({"input_ids": ids, "attention_mask": mask, **trie_inputs})
            return (found[position, : len(choices[i])] for position, i in enumerate(batch))

        found = self._in_batches(rows, documents, scores, [tries[names].padded_shape for names in choices])
        for i, own in self._reader().score_labels(documents, lambda i: batch_tries([tries[choices[i]]])):
            found[i] = own[: len(choices[i])]
        return found

    def generate(
        self, rows: Sequence[Sequence[int]], documents: Documents, limit: int, num_beams: int = 1
    ) -> list[tuple[list[int], float]]:
        """Return the tokens written for every row, end-of-sequence included, and their log-probability."""
        write = self._generator(num_beams)

        def written(batch: list[int], ids: np.ndarray, mask: np.ndarray) -> Iterable[tuple[list[int], float]]:
            tokens, log_probability = write(ids, mask, limit)
            for position, i in enumerate(batch):
                yield self._ended(i, tokens[position], log_probability[position])

        found = self._in_batches(rows, documents, written)
        for i, tokens, log_probability in self._reader().generate(documents, limit):
            found[i] = self._ended(i, tokens, log_probability)
        return found

    def _ended(self, i: int, tokens: np.ndarray, log_probability: np.ndarray) -> tuple[list[int], float]:
        """Return the tokens of text ``i`` up to end-of-sequence, and their log-probability."""
        row: list[int] = tokens.tolist()
        stop = row.index(self._eos) + 1 if self._eos in row else len(row)
        self.check_finite(log_probability, i)
        return row[:stop], float(log_probability)

    def run_choices_once(self, row: Sequence[int]) -> None:
        """Score two made-up choices, so that the first request does not wait for the graph."""
        ids, mask = pad_rows([row], self._pad)
        trie = build_trie([(self._eos,), (self._pad, self._eos)], self._start)
        self.sessions["choice_scorer"].run({"input_ids": ids, "attention_mask": mask, **batch_tries([trie])})

    def check_finite(self, scores: Any, index: int) -> None:
        """Raise AnswerError if a score of text ``index`` is NaN or infinite."""
        if not math.isfinite(scores.sum(dtype=np.float64)):  # the sum of 64-bit floats cannot overflow
            raise AnswerError(
                f"The target {self._target!r} of the bundle {self._root} computed a score that is not finite "
                f"(NaN or infinity) for text {index}, so there is no answer. Check the exported student with "
                "sbs-edge evaluate, or export it with another precision."
            )

    def check_open(self) -> None:
        """Raise UsageError after :meth:`close`."""
        if self.closed:
            raise UsageError(
                "This Student was closed; load the bundle again, or use it inside the with block."
            )

    def close(self) -> None:
        """Release the graphs."""
        self.closed = True
        self.sessions.clear()

    def _in_batches(
        self,
        rows: Sequence[Sequence[int]],
        documents: Documents,
        call: Callable[[list[int], np.ndarray, np.ndarray], Iterable[Any]],
        shapes: Sequence[Hashable] | None = None,
    ) -> list[Any]:
        """Pad rows of one length together, and return what ``call`` gives for each, in the order of the rows.

        Rows that are read in chunks are left out.
        """
        out: list[Any] = [None] * len(rows)
        most_rows: int | None = self._entry.get("max_batch_rows")
        whole = [i for i in range(len(rows)) if i not in documents]
        lengths = [len(rows[i]) for i in whole]
        own = shapes and [shapes[i] for i in whole]
        for places in token_budget_batches(lengths, self._max_batch_tokens, most_rows, own):
            batch = [whole[place] for place in places]
            ids, mask = pad_rows([rows[i] for i in batch], self._pad)
            for i, found in zip(batch, call(batch, ids, mask), strict=False):
                out[i] = found
        return out

    def _reader(self) -> LongReader:
        return LongReader(
            self._session, top_k=self._top_k, d_model=self._width, pad_id=self._pad,
            max_batch_tokens=self._max_batch_tokens,
        )  # fmt: skip

    def _generator(self, num_beams: int) -> Callable[[np.ndarray, np.ndarray, int], Sequence[np.ndarray]]:
        """Return a function from ids, mask and limit to tokens (B, N) and their log-probabilities (B,)."""
        if num_beams == 1 and "decoder_step" in self._entry:
            purpose = "rationales and open labels"
            encoder, step = self._session("encoder", purpose), self._session("decoder_step", purpose)
            return StepLoop(encoder, step, self._start, self._eos).run
        if num_beams == 1:
            session = self._session("explainer", "rationales and open labels")
        else:
            session = self._session(f"{_BEAM}{num_beams}", f"a beam of width {num_beams}")
        return lambda ids, mask, limit: session.run(
            {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(limit, np.int64)}
        )

    def _session(self, role: str, purpose: str) -> Session:
        self.check_open()
        if role not in self.sessions:
            only_labels = role == "explainer" and "label_scorer" in self.sessions
            raise UsageError(
                f"The target {self._target!r} of this bundle has no graph for {purpose}; "
                + (
                    "it answers with labels alone. Export a student that was trained with rationales, with label_only=False."
                    if only_labels
                    else "export the bundle again with it."
                )
            )
        return self.sessions[role]
