"""CTranslate2, weights in int8: the fastest general T5 runtime on a CPU that we know of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbs_edge.bench.peers.system import Choices, System

__all__ = ["PACKAGES", "ROOTS", "SYSTEM", "prepare"]

ROOTS: dict[str, tuple[str, ...]] = {"ctranslate2": (), "tokenizers": ()}
PACKAGES = ("ctranslate2", "transformers")


def prepare(student: Path, out: Path) -> dict[str, Any]:
    """Convert with CTranslate2's own converter to int8."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(student)).convert(str(out), quantization="int8", force=True)
    return {"files": ["."]}


class CTranslate2(System):
    """``Translator.translate_batch``, beam 1."""

    precision = "int8"

    def open(self) -> None:
        """Load the converted model."""
        import ctranslate2

        self.translator = ctranslate2.Translator(
            self.spec.artifact,
            device="cpu",
            compute_type="int8",
            intra_threads=self.spec.threads,
            inter_threads=1,
        )

    def _words(self, ids: list[list[int]]) -> list[list[str]]:
        word = self.tokenizer.tokenizer.id_to_token
        return [[word(token) for token in row] for row in ids]

    def _ids(self, words: Sequence[str]) -> list[int]:
        # Rows beyond the tokenizer's vocabulary are padding of the checkpoint: they read as EOS-free noise.
        found = (self.tokenizer.tokenizer.token_to_id(word) for word in words)
        return [token if token is not None else self.spec.pad for token in found]

    def _translate(self, ids: list[list[int]], steps: int, **batching: Any) -> list[list[int]]:
        results = self.translator.translate_batch(
            self._words(ids), beam_size=1, max_decoding_length=steps, **batching
        )
        return [self.cut(self._ids(result.hypotheses[0])) for result in results]

    def generate(self, ids: list[list[int]], steps: int) -> list[list[int]]:
        """Greedy decoding of one batch."""
        return self._translate(ids, steps)

    def restricted(self, texts: Sequence[str]) -> list[str] | None:
        """Score every label with ``score_batch``: CTranslate2's own way to choose among candidates."""
        if not self.spec.labels:
            return None
        sources = self._words(self.encode(texts, "label"))
        word = self.tokenizer.tokenizer.id_to_token
        totals = []
        for label in self.spec.labels:
            target = [word(token) for token in self.tokenizer.encode(label) if token != self.spec.eos]
            scored = self.translator.score_batch(sources, [target] * len(sources))
            # The last probability is EOS's where the library adds it; the label's own tokens decide.
            totals.append([sum(result.log_probs[: len(target)]) for result in scored])
        return [
            self.spec.labels[max(range(len(totals)), key=lambda k: totals[k][row])]
            for row in range(len(sources))
        ]

    def settings(self) -> list[dict[str, Any]]:
        """Its own batching: by examples or by tokens, sorted by length inside the library."""
        return [
            {"max_batch_size": 8, "batch_type": "examples"},
            {"max_batch_size": 512, "batch_type": "tokens"},
            {"max_batch_size": 2048, "batch_type": "tokens"},
        ]

    def stream(self, texts: Sequence[str], setting: dict[str, Any], choices: Choices = None) -> list[str]:
        """Hand the whole stream over and let the library batch it."""
        del choices
        return self.decode(self._translate(self.encode(texts, "label"), self.spec.label_steps, **setting))


SYSTEM = CTranslate2
