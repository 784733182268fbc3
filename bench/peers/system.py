"""The interface of a measured system, and the list of the peers.

A system takes texts and returns answers. Tokenizing counts as measured time for all of them and uses the
same ``tokenizers`` file. A peer implements only the generation of token ids; the code that turns these
into a label, a rationale or an answered stream is shared. Imports are kept light because the cold start
of a worker is measured.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge.tokens import TextTokenizer, first_tokens, read_tokenizer

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PEERS", "Choices", "Spec", "System", "load_module", "plan_batches"]

PEERS: dict[str, str] = {
    "transformers": "transformers",
    "ctranslate2": "ctranslate2",
    "optimum": "optimum",
    "openvino": "openvino",
    "onnxruntime-int8": "onnxruntime",
}
_OURS = "sbs-edge"
Choices = Sequence[Sequence[str]] | None  # the labels to choose from, for each text


@dataclass(slots=True)
class Spec:
    """The configuration of a worker, as plain JSON values.

    Attributes:
        system: ``sbs-edge:TARGET`` or a key of :data:`PEERS`.
        artifact: the bundle, or the peer's converted model.
        student: directory with the tokenizer and ``sbs_edge.json``.
        threads: compute threads of the system.
        cpus: the processors this process may run on.
        labels: the closed label set, or empty.
        prefixes: of the ``label`` and the ``rationale`` task.
        label_steps: tokens a peer generates for label + EOS, at most.
        start, eos, pad: special token ids.
        options: settings that only one system reads.
    """

    system: str
    artifact: str
    student: str
    threads: int = 1
    cpus: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    prefixes: dict[str, str] = field(default_factory=lambda: {"label": "", "rationale": ""})
    label_steps: int = 2
    start: int = 0
    eos: int = 1
    pad: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def load_module(system: str) -> Any:
    """Import the module behind a system's name."""
    name = "ours" if system.split(":")[0] == _OURS else PEERS[system]
    return importlib.import_module(f"sbs_edge.bench.peers.{name}")


def plan_batches(lengths: Sequence[int], setting: dict[str, Any]) -> list[list[int]]:
    """Split a stream into batches of indices under a batching setting.

    Args:
        lengths: tokens of each request.
        setting: ``{"batch": n}`` takes ``n`` at a time in order of arrival; ``{"tokens": n}`` sorts by
            length and fills batches up to ``n`` padded tokens (a longer request goes alone).
    """
    if "batch" in setting:
        size = int(setting["batch"])
        return [list(range(at, min(at + size, len(lengths)))) for at in range(0, len(lengths), size)]
    budget = int(setting["tokens"])
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class System(ABC):
    """Base of the measured systems. A peer loads in ``open`` and implements ``generate``; all else is shared."""

    precision = "fp32"
    label_variants: tuple[str, ...] = ("label+eos", "one token")

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._tokenizer: Any = None

    # Implemented by a subclass.

    @abstractmethod
    def open(self) -> None:
        """Load the model; everything a first answer needs."""

    def generate(self, ids: list[list[int]], steps: int) -> list[list[int]]:
        """Greedy decoding: at most ``steps`` new tokens a row, without the EOS that ended it.

        Not abstract: this project's system answers texts, and replaces every method that calls it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not generate token ids.")

    def first_logits(self, ids: list[list[int]]) -> np.ndarray | None:
        """fp32 logits (B, V) of the first new token, or None when the system does not return them."""
        return None

    def settings(self) -> list[dict[str, Any]]:
        """Batching settings that the throughput sweep tries."""
        return [{"batch": 8}, {"tokens": 256}, {"tokens": 512}, {"tokens": 2048}]

    # Shared by all peers.

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = TextTokenizer(read_tokenizer(Path(self.spec.student) / "tokenizer.json"))
        return self._tokenizer

    def encode(self, texts: Sequence[str], task: str) -> list[list[int]]:
        """Token ids of each text under the task's prefix, EOS included."""
        found: list[list[int]] = self.tokenizer.encode_batch(texts, self.spec.prefixes[task])
        return found

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Text of generated ids, special tokens left out."""
        return [self.tokenizer.decode(row) for row in rows]

    def label(self, texts: Sequence[str], variant: str, choices: Choices = None) -> list[str]:
        """Answer the label task; peers generate freely, whatever the row's ``choices``."""
        del choices
        steps = 1 if variant == "one token" else self.spec.label_steps
        return self.decode(self.generate(self.encode(texts, "label"), steps))

    def restricted(self, texts: Sequence[str]) -> list[str] | None:
        """The best label of the closed set by its first token, or None where that cannot be asked."""
        import numpy as np

        columns = self.label_columns()
        logits = self.first_logits(self.encode(texts, "label")) if columns is not None else None
        if columns is None or logits is None:
            return None
        return [self.spec.labels[index] for index in np.asarray(logits)[:, columns].argmax(axis=1)]

    def label_columns(self) -> list[int] | None:
        """First token id of every label when they differ, else None."""
        if not self.spec.labels:
            return None
        return first_tokens([self.tokenizer.encode(label) for label in self.spec.labels])

    def rationale(self, texts: Sequence[str], steps: int) -> list[tuple[str, int]]:
        """Generate rationales: text and number of new tokens of each row."""
        rows = self.generate(self.encode(texts, "rationale"), steps)
        return list(zip(self.decode(rows), map(len, rows), strict=True))

    def apply(self, setting: dict[str, Any]) -> None:
        """Make a batching setting current; not part of any measured time."""
        del setting

    def stream(self, texts: Sequence[str], setting: dict[str, Any], choices: Choices = None) -> list[str]:
        """Answer many label requests at once under a batching setting, in their order."""
        del choices
        ids = self.encode(texts, "label")
        answers = [""] * len(ids)
        for batch in plan_batches([len(row) for row in ids], setting):
            found = self.generate([ids[index] for index in batch], self.spec.label_steps)
            for index, answer in zip(batch, self.decode(found), strict=True):
                answers[index] = answer
        return answers

    def padded(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask as (B, S) int64, padded at the end."""
        import numpy as np

        width = max(map(len, ids))
        tokens = np.full((len(ids), width), self.spec.pad, dtype=np.int64)
        mask = np.zeros((len(ids), width), dtype=np.int64)
        for row, found in enumerate(ids):
            tokens[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return tokens, mask

    def cut(self, row: Sequence[int]) -> list[int]:
        """The row up to its EOS."""
        found = [int(token) for token in row]
        return found[: found.index(self.spec.eos)] if self.spec.eos in found else found


def read_config(student: str) -> dict[str, Any]:
    """The student's ``config.json``."""
    content = json.loads((Path(student) / "config.json").read_text(encoding="utf-8"))
    return dict(content)
