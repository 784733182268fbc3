"""The built-in long task: a shift's log of many units, of which the first line names one.

    log of oak | 06:00 elm the coil is frosted . 06:02 oak the burner is enabled . 06:03 oak the key is with reception . ...

The named unit's three facts, in the phrases of the built-in task, stand in the first, second and last third of the log,
in random order; its label follows from them by the same policy, and the rationale names the unit with each of them: to
write a fact, the student looks its unit up. All other lines are of
other units, or noise. With ``latest``, each fact stands there several times, and the last one holds: the answer
then depends on the order of lines that may be thousands of tokens apart.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from sbs_edge.data.builtin import LABELS, NOISE, PHRASES, facts_to_label
from sbs_edge.data.example import Example, Splits, TaskSpec

__all__ = [
    "HEADER",
    "LATEST_NAME",
    "NAME",
    "UNITS",
    "ShiftLogSize",
    "shift_log_rows",
    "shift_log_splits",
]

NAME, LATEST_NAME = "shift-log", "shift-log-latest"
"""The two variants, as ``train`` and ``run`` take them in place of a file."""

HEADER = "|"
"""End of the line that names the unit; see the option --chunk-header."""

UNITS = ("oak", "elm", "ash", "fir")
Facts = tuple[str, str, str]
"""Mode, room and supply."""

_TOKEN = re.compile(r"\d+|[^\W\d]+|[^\w\s]")
_TEST_SEED, _VALIDATION_SEED, _TRAIN_SEED = 11_001, 22_002, 33_003


@dataclass(frozen=True, slots=True)
class ShiftLogSize:
    """The number of rows of a draw, and the length of the logs of its training rows.

    Attributes:
        n_train, n_validation, n_test: rows.
        tokens: lengths of training and validation rows, in words, numbers and signs; each as often.
        n_phrases: phrases for each value of a fact.
    """

    n_train: int = 8000
    n_validation: int = 200
    n_test: int = 200
    tokens: tuple[int, ...] = (40, 56, 80, 128)
    n_phrases: int = 3


def _lines(rng: random.Random, tokens: int, latest: bool, n_phrases: int) -> tuple[str, Facts, str]:
    """Draw a log of about ``tokens`` tokens; return it, the facts that hold, and why, as the teacher says it."""
    asked = rng.choice(UNITS)
    others = [unit for unit in UNITS if unit != asked]

    def phrase(fact: str, value: str) -> str:
        return rng.choice(PHRASES[fact][value][:n_phrases])

    order = rng.sample(sorted(PHRASES), 3)
    held = {fact: rng.choice(sorted(PHRASES[fact])) for fact in order}
    told = [(fact, held[fact]) for fact in order]
    if latest:
        earlier = [
            (fact, rng.choice(sorted(PHRASES[fact]))) for fact in order for _ in range(rng.randrange(2))
        ]
        told = [*rng.sample(earlier, len(earlier)), *told]
    about = [f"{asked} {phrase(*pair)}" for pair in told]
    rest: list[str] = []
    left = tokens - 5 - sum(len(_TOKEN.findall(line)) + 4 for line in about)
    while left > 0:
        fact = rng.choice(sorted(PHRASES))
        said = phrase(fact, rng.choice(sorted(PHRASES[fact]))) if rng.random() < 0.7 else rng.choice(NOISE)
        own = said in NOISE and rng.random() < 0.3
        rest.append(f"{asked if own else rng.choice(others)} {said}")
        left -= len(_TOKEN.findall(rest[-1])) + 4
    # Each part of the log has its share of the other lines, and one of the lines about the unit somewhere in it.
    parts = [rest[len(rest) * n // len(about) : len(rest) * (n + 1) // len(about)] for n in range(len(about))]
    lines: list[str] = []
    for own_line, part in zip(about, parts, strict=True):
        place = rng.randrange(len(part) + 1)
        lines += [*part[:place], own_line, *part[place:]]
    minute, stamped = 360, []
    for line in lines:
        stamped.append(f"{minute // 60 % 24:02d}:{minute % 60:02d} {line} .")
        minute += 1 + int(rng.random() * min(3.0, 1000 / len(lines)))
    facts = (held["mode"], held["room"], held["supply"])
    why = (
        f"{asked} is in {held['mode']} mode , {asked} room is {held['room']} target and {asked} supply air is "
        f"{held['supply']} ."
    )
    return f"log of {asked} {HEADER} " + " ".join(stamped), facts, why


def shift_log_rows(
    name: str, count: int, tokens: tuple[int, ...], seed: int, *, latest: bool = False, n_phrases: int = 3
) -> list[Example]:
    """Draw logs.

    Args:
        name: beginning of the rows' ids.
        count: how many.
        tokens: their lengths in words, numbers and signs, each as often.
        seed: decides what is drawn.
        latest: facts change, and the last of a kind holds.
        n_phrases: phrases for each value of a fact, 1 to 12.

    Example:
        >>> row = shift_log_rows("test", 1, (2048,), seed=0)[0]
        >>> row.input[:7], row.label in LABELS
        ('log of ', True)
    """
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        text, facts, why = _lines(rng, tokens[number % len(tokens)], latest, n_phrases)
        label = facts_to_label(*facts)
        rows.append(Example(f"{name}-{number}", text, label=label, teacher_label=label, rationale=why))
    return rows


def shift_log_splits(seed: int = 0, *, latest: bool = False, size: ShiftLogSize = ShiftLogSize()) -> Splits:
    """Draw training, validation and test rows of the lengths in ``size``; only training depends on ``seed``."""

    def rows(name: str, count: int, from_seed: int) -> list[Example]:
        return shift_log_rows(name, count, size.tokens, from_seed, latest=latest, n_phrases=size.n_phrases)

    return Splits(
        TaskSpec(LATEST_NAME if latest else NAME, "closed", LABELS),
        rows("train", size.n_train, _TRAIN_SEED + seed),
        rows("validation", size.n_validation, _VALIDATION_SEED),
        rows("test", size.n_test, _TEST_SEED),
    )
