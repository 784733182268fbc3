"""The systems of a latency bench and their inputs.

An entry is a system with its worker, or the reason why it has none. Nothing is measured here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.protocol import Worker, WorkerFailed
from sbs_edge.bench.latency.inputs import mixed_lengths, texts_of_length
from sbs_edge.bench.peers.convert import ConversionFailed, converted, digest
from sbs_edge.bench.peers.system import PEERS, Spec
from sbs_edge.errors import DataError, UsageError
from sbs_edge.tokens import TextTokenizer, read_tokenizer, start_token_id

__all__ = [
    "SECTIONS",
    "WARM_SECTIONS",
    "Benchmark",
    "Entry",
    "Inputs",
    "peer_entries",
    "start_workers",
    "student_facts",
]

Say = Callable[[str], None]


WARM_SECTIONS = ("label", "rationale", "throughput", "open_loop")  # asked of a process that stays
SECTIONS = (*WARM_SECTIONS, "cold_start")  # the last in new processes


@dataclass(slots=True)
class Entry:
    """One system of the benchmark.

    Attributes:
        sections: what is measured of it besides its answers and its size.
        golds: labels that its own weights give in float32, where these are not the benchmark's student's: the same
            shape at its full depth, beside a shallower one. It is judged by them.
    """

    name: str
    spec: Spec | None
    why: str = ""
    worker: Worker | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    sections: tuple[str, ...] = SECTIONS
    golds: list[str] | None = None

    @property
    def ours(self) -> bool:
        """True for this project's bundle."""
        return self.name.startswith("sbs-edge")

    @property
    def variants(self) -> tuple[str, ...]:
        """Forms of the label task that are measured."""
        return ("label",) if self.ours else ("label+eos", "one token")

    def ask(self, do: str, **order: Any) -> dict[str, Any] | None:
        """Return the worker's answer; None where there is no worker, or it failed: then the entry has its reason."""
        if self.worker is None:
            return None
        try:
            return self.worker.ask(do, **order)
        except WorkerFailed as failure:
            self.give_up(f"{do}: {failure}")
            return None

    def give_up(self, why: str) -> None:
        """End the worker and keep the reason; the row stays."""
        self.why = why
        self.dismiss()

    def dismiss(self) -> None:
        """End its worker, if it has one."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None


@dataclass(slots=True)
class Inputs:
    """The texts that every system gets."""

    words: list[str]
    count: Callable[[str], int]
    rows: list[dict[str, Any]]
    random_weights: bool
    max_source_tokens: int
    seed: int
    choices: list[str] | None = None

    def texts(self, tokens: int, n: int) -> list[str]:
        """``n`` texts of ``tokens`` tokens, the same for the same arguments."""
        rng = random.Random(f"{self.seed}/{tokens}/{n}")
        return texts_of_length(self.words, tokens, n, self.count, rng)

    def stream(self, n: int) -> list[str]:
        """A mixed-length stream: the data set's own rows, or drawn lengths for random weights."""
        rng = random.Random(f"{self.seed}/stream")
        if not self.random_weights:
            return [rng.choice(self.rows)["input"] for _ in range(n)]
        top = min(256, self.max_source_tokens)
        lengths = mixed_lengths(n, min(16, top), top, rng)
        return [texts_of_length(self.words, length, 1, self.count, rng)[0] for length in lengths]

    def choice_sets(self, n: int) -> list[list[str]] | None:
        """The same choices for each of ``n`` synthetic rows, for tasks that bring their own."""
        return None if self.choices is None else [self.choices] * n


@dataclass(slots=True)
class Benchmark:
    """Entries and inputs of one run."""

    entries: list[Entry]
    inputs: Inputs
    model: dict[str, Any]
    reference: Entry | None = None

    @property
    def alive(self) -> list[Entry]:
        """Entries that can be measured."""
        return [entry for entry in self.entries if entry.worker is not None]

    def participants(self, section: str) -> list[Entry]:
        """Return the entries that take part in a section, with or without a worker."""
        return [entry for entry in self.entries if section in entry.sections]

    def release(self, *sections: str) -> None:
        """End the workers that none of ``sections``, those still to come, needs."""
        for entry in self.alive:
            if not set(sections) & set(entry.sections):
                entry.dismiss()

    def close(self) -> None:
        """End every worker."""
        for entry in [*self.entries, *([self.reference] if self.reference else [])]:
            if entry.worker is not None:
                entry.worker.close()
                entry.worker = None


def student_facts(student: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``sbs_edge.json`` and ``config.json`` of a student directory.

    Raises:
        DataError: one of them is missing or damaged.
    """
    found = []
    for name in ("sbs_edge.json", "config.json"):
        path = student / name
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{student} is not a student directory: {path.name} cannot be read ({error}). "
                "Give the directory that 'sbs-edge train' wrote."
            ) from error
    return found[0], found[1]


def make_inputs(student: Path, card: dict[str, Any], rows: int, seed: int) -> Inputs:
    """Read tokenizer and validation rows of a student."""
    tokenizer = TextTokenizer(read_tokenizer(student / "tokenizer.json"))
    prefix = card["prefixes"]["label"]
    path = student / "validation.jsonl"
    if not path.is_file():
        raise DataError(
            f"{student} has no validation.jsonl, so its accuracy cannot be measured. Train it again."
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines if line.strip()]
    if not found:
        raise DataError(f"{path} is empty, so the accuracy cannot be measured. Train the student again.")
    random.Random(seed).shuffle(found)
    words = sorted({word for row in found for word in row["input"].split()})
    choices = next((list(row["choices"]) for row in found if row.get("choices")), None)
    return Inputs(
        words=words,
        count=lambda text: len(tokenizer.encode(text, prefix)),
        rows=found[:rows],
        random_weights=bool(card.get("training", {}).get("random_weights")),
        max_source_tokens=int(card.get("max_source_tokens") or 512),
        seed=seed,
        choices=choices if card["task"]["label_kind"] == "choices" else None,
    )


def base_spec(student: Path, card: dict[str, Any], config: dict[str, Any], **given: Any) -> Spec:
    """The part of a spec that all systems share."""
    tokenizer = TextTokenizer(read_tokenizer(student / "tokenizer.json"))
    labels = list(card["task"].get("labels") or [])
    longest = max((len(tokenizer.encode(label)) for label in labels), default=0)
    return Spec(
        student=str(student),
        labels=labels,
        prefixes=dict(card["prefixes"]),
        # A closed label's tokens and EOS; otherwise what training allowed.
        label_steps=longest or int(card.get("max_label_tokens") or 8),
        start=start_token_id(config),
        eos=int(config.get("eos_token_id", 1)),
        pad=int(config.get("pad_token_id", 0)),
        **given,
    )


def peer_entries(names: Sequence[str], student: Path, make: Callable[..., Spec], say: Say) -> list[Entry]:
    """Convert the student for every peer; one that cannot be made is an entry with its reason.

    Raises:
        UsageError: a name is not in :data:`~sbs_edge.bench.peers.system.PEERS`.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(f"There is no peer {unknown[0]!r}; choose among {', '.join(PEERS)}.")
    weights = digest(student)
    entries = []
    for name in names:
        say(f"preparing {name}")
        try:
            artifact = converted(name, student, weights)
        except ConversionFailed as failure:
            entries.append(Entry(name, None, why=str(failure)))
            continue
        facts = json.loads((artifact / "conversion.json").read_text(encoding="utf-8"))
        entry = Entry(name, make(system=name, artifact=str(artifact)), facts=facts)
        entries.append(entry)
    return entries


def start_workers(entries: Iterable[Entry], say: Say) -> None:
    """Start each entry's worker and let it load; one that fails drops out with its reason."""
    for entry in entries:
        if entry.spec is None:
            say(f"{entry.name}: {entry.why}")
            continue
        say(f"loading {entry.name}")
        try:
            entry.worker = Worker(entry.spec)
            entry.facts |= entry.worker.ask("open", timeout_s=600)
        except WorkerFailed as failure:
            entry.give_up(str(failure))
            say(f"{entry.name}: {entry.why}")
