"""The built-in task: tickets to a building-service desk, with a programmatic teacher.

A ticket states three facts in random order, each in one of twelve phrases, among a site line and noise:
what the plant is set to, what the room needs, what the vent delivers. Air is *needed* when mode and room
agree, *delivered* when mode and supply agree; the four combinations are the four labels. No single fact
says anything about the label, two fix one of its bits, all three are needed. The rationale names the three
facts and never the label, so that it carries what the label alone does not. The task demonstrates the
method; it does not estimate what rationales are worth on real data.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.errors import UsageError

__all__ = ["LABELS", "NAME", "SIZES", "BuiltinSize", "builtin_splits", "facts_to_label"]

NAME = "hvac-desk"
LABELS = ("wait", "dispatch", "adjust", "close")
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "mode": {
        "heating": (
            "the winter program is active", "the plant runs in heating mode", "the boiler season has begun",
            "the changeover valve is set to hot", "the schedule says heating", "frost guard is armed",
            "the operator chose the warm cycle", "the controller shows a flame icon",
            "the heating curve is loaded", "it is January on this site", "the burner is enabled",
            "the radiator loop is in service",
        ),
        "cooling": (
            "the summer program is active", "the plant runs in cooling mode", "the chiller season has begun",
            "the changeover valve is set to chilled", "the schedule says cooling", "sun guard is armed",
            "the operator chose the cool cycle", "the controller shows a snowflake icon",
            "the cooling curve is loaded", "it is July on this site", "the compressor is enabled",
            "the glycol loop is in service",
        ),
    },
    "room": {
        "below": (
            "the room is three degrees under target", "staff wear coats at their desks",
            "the thermometer reads 15", "tenants complain that they freeze", "hands are numb in there",
            "the wall sensor sits below the setpoint", "the space never got up to the goal",
            "the comfort score says too cold", "people asked for blankets",
            "the morning check found it chilly", "the trend runs beneath the band",
            "visitors keep their scarves on",
        ),
        "above": (
            "the room is three degrees over target", "staff sit in short sleeves",
            "the thermometer reads 29", "tenants complain that they sweat",
            "the windows were opened for relief", "the wall sensor sits above the setpoint",
            "the space went far past the goal", "the comfort score says too hot", "people asked for fans",
            "the morning check found it stuffy", "the trend runs over the band",
            "visitors take their jackets off",
        ),
    },
    "supply": {
        "warm": (
            "the vent blows warm air", "the supply pipe burns the hand", "the duct probe shows 45",
            "the grille feels like a hair dryer", "the coil is hot", "the diffuser output is toasty",
            "the air handler sends out heat", "the outlet melts wax", "the riser is scalding",
            "paper near the slot curls from the heat", "the fan coil feels like an oven",
            "the return line steams",
        ),
        "cold": (
            "the vent blows cold air", "the supply pipe is icy", "the duct probe shows 9",
            "the grille feels like a fridge", "the coil is frosted", "the diffuser output is crisp",
            "the air handler sends out a chill", "the outlet drips with dew", "the riser is clammy",
            "paper near the slot is damp and cool", "the fan coil feels like a cellar",
            "the return line sweats",
        ),
    },
}  # fmt: skip
OPENINGS = ("ticket from the {}", "{} reports", "a call about the {}")
SITES = (
    "library", "town hall", "clinic", "school", "museum", "theatre", "warehouse", "bank", "hotel", "bakery",
    "station", "archive",
)  # fmt: skip
NOISE = (
    "this is the second message today", "the report came by radio", "the unit was installed last spring",
    "the sticker on the box is faded", "the manual is on the shelf", "the filter was replaced in May",
    "the cover is painted blue", "please answer by email", "the warranty card is missing",
    "a photo is attached", "the visitor book is full", "the key is with reception",
)  # fmt: skip

MAX_TRAIN = 1_000_000
"""The smaller size has about 2.5 million different tickets left beside its held-out splits."""

# Fixed seeds of the held-out splits: every training size is judged on the same rows.
_TEST_SEED, _VALIDATION_SEED, _TRAIN_SEED, _TEACHER_SEED = 10_001, 20_002, 30_003, 40_004


@dataclass(frozen=True, slots=True)
class BuiltinSize:
    """The size and difficulty of the generated task."""

    n_train: int
    n_validation: int
    n_test: int
    n_phrases: int
    n_noise: int
    rationale: Literal["sentence", "terse"]


SIZES: dict[str, BuiltinSize] = {
    "default": BuiltinSize(1000, 300, 1000, n_phrases=12, n_noise=1, rationale="sentence"),
    "ci": BuiltinSize(500, 300, 1000, n_phrases=8, n_noise=0, rationale="terse"),
}


def facts_to_label(mode: str, room: str, supply: str) -> str:
    """Apply the desk's policy to three facts."""
    needed = (mode == "heating") == (room == "below")
    delivered = (mode == "heating") == (supply == "warm")
    if needed:
        return "wait" if delivered else "dispatch"
    return "adjust" if delivered else "close"


def _rationale(facts: tuple[str, str, str], style: str) -> str:
    mode, room, supply = facts
    if style == "terse":
        return f"{mode} mode , room {room} target , supply air {supply} ."
    return f"the plant is in {mode} mode , the room is {room} target and the supply air is {supply} ."


# How a teacher that is asked several times words its reasons; the last is of little use to a student.
WORDINGS = (
    "the plant is in {mode} mode , the room is {room} target and the supply air is {supply} .",
    "the supply air is {supply} , the room is {room} target and the plant is in {mode} mode .",
    "the room is {room} target , the plant is in {mode} mode and the supply air is {supply} .",
    "the ticket says that the plant is in {mode} mode .",
)


def _sampled(rng: random.Random, facts: tuple[str, str, str], error: float, samples: int) -> dict[str, Any]:
    """Answer one ticket several times, and vote.

    Tickets differ: the share of samples that misread one is drawn from a beta distribution with the mean
    ``error``, most near 0 or 1, and all of them misread the same fact, as a model's samples repeat its mistakes.
    """
    hard = rng.betavariate(error, 1.0 - error) if 0.0 < error < 1.0 else error
    wrong = _misread(facts, rng.randrange(3))
    rationales: dict[str, dict[str, None]] = {}
    votes: Counter[str] = Counter()
    for _ in range(samples):
        seen = wrong if rng.random() < hard else facts
        label = facts_to_label(*seen)
        votes[label] += 1
        wording = rng.choice(WORDINGS)
        rationales.setdefault(label, {})[wording.format(**dict(zip(PHRASES, seen, strict=True)))] = None
    (label, count), *_ = votes.most_common()
    kept = tuple(rationales[label])
    return {
        "teacher_label": label,
        "rationale": kept[0],
        "rationales": kept if len(kept) > 1 else (),
        "teacher_probs": tuple((name, n / samples) for name, n in votes.most_common()),
        "confidence": count / samples,
    }


def _misread(facts: tuple[str, str, str], place: int) -> tuple[str, str, str]:
    seen = [
        _other(name, value) if i == place else value
        for i, (name, value) in enumerate(zip(PHRASES, facts, strict=True))
    ]
    return (seen[0], seen[1], seen[2])


def _other(fact: str, value: str) -> str:
    return next(other for other in PHRASES[fact] if other != value)


def _draw(rng: random.Random, size: BuiltinSize) -> tuple[str, tuple[str, str, str], tuple[str, ...]]:
    values = tuple(rng.choice(tuple(PHRASES[fact])) for fact in PHRASES)
    phrases = tuple(
        rng.choice(PHRASES[fact][value][: size.n_phrases])
        for fact, value in zip(PHRASES, values, strict=True)
    )
    sentences = [rng.choice(OPENINGS).format(rng.choice(SITES)), *phrases, *rng.sample(NOISE, size.n_noise)]
    rng.shuffle(sentences)
    return " . ".join(sentences) + " .", (values[0], values[1], values[2]), phrases


def _split(
    name: str,
    count: int,
    seed: int,
    size: BuiltinSize,
    taken: set[tuple[str, ...]],
    error: float,
    samples: int,
) -> list[Example]:
    """Draw rows; none shares its phrase triple with a split drawn before."""
    rng = random.Random(seed)
    teacher = random.Random(seed + _TEACHER_SEED)
    rows: list[Example] = []
    inputs: set[str] = set()
    keys: set[tuple[str, ...]] = set()
    while len(rows) < count:
        text, facts, phrases = _draw(rng, size)
        if phrases in taken or text in inputs:
            continue
        inputs.add(text)
        keys.add(phrases)
        if samples > 1:
            answer = _sampled(teacher, facts, error, samples)
        else:
            # A wrong teacher misreads one fact: any misread fact changes the label, and the
            # rationale argues for the wrong answer, as a large model's does.
            seen = _misread(facts, teacher.randrange(3)) if teacher.random() < error else facts
            answer = {"teacher_label": facts_to_label(*seen), "rationale": _rationale(seen, size.rationale)}
        rows.append(Example(id=f"{name}-{len(rows)}", input=text, label=facts_to_label(*facts), **answer))
    taken |= keys
    return rows


def builtin_splits(
    size: str = "default",
    seed: int = 0,
    teacher_error: float = 0.0,
    n_train: int | None = None,
    teacher_samples: int = 1,
) -> Splits:
    """Generate the built-in task.

    Args:
        size: a key of :data:`SIZES`.
        seed: redraws the training rows; validation and test are the same for every seed.
        teacher_error: share of rows where the teacher misreads one fact, and so gives a wrong label
            and a rationale for it; 0.25 is about PaLM's share on the paper's sets.
        n_train: training rows instead of the size's own number.
        teacher_samples: answers of the teacher to each input. With several, tickets differ in how often they
            are misread, ``teacher_error`` is the mean, the label with most votes is the row's, and the votes
            and all rationales that agree are kept.

    Returns:
        Disjoint splits: no phrase triple of validation or test occurs in training.

    Raises:
        UsageError: an unknown size, a share outside [0, 1], or more rows than can differ.

    """
    if size not in SIZES:
        raise UsageError(f"The built-in task has no size {size!r}; it has {', '.join(SIZES)}.")
    if not 0.0 <= teacher_error <= 1.0:
        raise UsageError(f"teacher_error is a share of rows between 0 and 1, not {teacher_error}.")
    if teacher_samples < 1:
        raise UsageError(f"teacher_samples must be at least 1, not {teacher_samples}.")
    if n_train is not None and not 1 <= n_train <= MAX_TRAIN:
        raise UsageError(
            f"The built-in task draws 1 to {MAX_TRAIN:,} different training rows, not {n_train}."
        )
    chosen = SIZES[size]
    taken: set[tuple[str, ...]] = set()
    test = _split("test", chosen.n_test, _TEST_SEED, chosen, taken, teacher_error, teacher_samples)
    validation = _split(
        "validation", chosen.n_validation, _VALIDATION_SEED, chosen, taken, teacher_error, teacher_samples
    )
    # The training rows may share triples with each other, not with the held-out splits.
    train = _split(
        "train",
        n_train or chosen.n_train,
        _TRAIN_SEED + seed,
        chosen,
        set(taken),
        teacher_error,
        teacher_samples,
    )
    return Splits(TaskSpec(NAME, "closed", LABELS), train, validation, test)
