"""Task files for the paper's four data sets and the built-in task, in our own words.

Form and order follow the few-shot prompts of Hsieh et al., 2023 (rationale, then a marker, then
the label). The instruction and the worked examples were written for this project.
"""

from __future__ import annotations

from pathlib import Path

from sbs_edge.errors import UsageError
from sbs_edge.teacher.task import Shot, TaskFile, read_task

__all__ = ["PRESETS", "load_task"]


def _shot(text: str, rationale: str, label: str, choices: tuple[str, ...] | None = None) -> Shot:
    return Shot(input=text, rationale=rationale, label=label, choices=choices)


_CQA = TaskFile(
    name="cqa",
    instruction="Answer the question by common sense. Exactly one of the choices is right.",
    label_kind="choices",
    parser="choice",
    shots=(
        _shot(
            "Where would you keep soup warm for a walk in the snow?",
            "It must be something that holds a liquid and keeps heat while it is carried. Of the "
            "choices, only a vacuum flask does both.",
            "vacuum flask",
            ("paper bag", "vacuum flask", "fridge", "soup plate", "kitchen"),
        ),
        _shot(
            "What does a person need before they can lend out an umbrella?",
            "Only what one has can be lent. Of the choices, owning it is what makes lending possible.",
            "own one",
            ("rain", "a queue", "own one", "borrow money", "wet shoes"),
        ),
        _shot(
            "The choir sang so loudly that the windows did what?",
            "Loud sound makes panes of glass move quickly to and fro. Of the choices, rattle means that.",
            "rattle",
            ("melt", "open a shop", "sleep", "rattle", "whisper"),
        ),
    ),
)

_SVAMP = TaskFile(
    name="svamp",
    instruction=(
        "Solve the word problem. Say what is counted, then give the arithmetic expression in parentheses "
        "that yields the answer; do not give its value as the answer."
    ),
    label_kind="open",
    compare="value",
    parser="expression",
    answer_marker="The answer is",
    shots=(
        _shot(
            "A baker filled 6 trays with 12 rolls each and sold 20 rolls.\nHow many rolls are left?",
            "6 trays of 12 rolls are 6 * 12 = 72 rolls. After 20 are sold, 72 - 20 = 52 are left.",
            "((6 * 12) - 20)",
        ),
        _shot(
            "Mira read 45 pages on Monday and 18 on Tuesday.\nHow many more pages did she read on Monday?",
            "The question asks for a difference. 45 - 18 = 27.",
            "(45 - 18)",
        ),
        _shot(
            "Nine friends share 63 marbles and 4 kites.\nHow many marbles does each get?",
            "The kites do not matter. 63 marbles among 9 friends are 63 / 9 = 7 each.",
            "(63 / 9)",
        ),
    ),
)

_NLI_LABELS = ("entailment", "neutral", "contradiction")


def _nli(name: str, instruction: str, marker: str, output_marker: str) -> TaskFile:
    return TaskFile(
        name=name,
        instruction=instruction,
        label_kind="closed",
        labels=_NLI_LABELS,
        answer_marker=marker,
        input_marker="Premise:",
        output_marker=output_marker,
        shots=(
            _shot(
                "premise: A woman in a red coat walks two dogs along the canal.\nhypothesis: Someone is outdoors.",
                "A path along a canal is outdoors, and the woman walks there.",
                "entailment",
            ),
            _shot(
                "premise: Two men are playing chess in a park.\nhypothesis: The men are brothers.",
                "The premise says nothing about how the men are related; they may be or not.",
                "neutral",
            ),
            _shot(
                "premise: The hall was empty when the concert was called off.\nhypothesis: The audience sang along.",
                "An empty hall has no audience, so nobody in it can have sung.",
                "contradiction",
            ),
        ),
    )


_ANLI1 = _nli(
    "anli1",
    "Decide whether the hypothesis follows from the premise (entailment), is excluded by it "
    "(contradiction), or neither (neutral). Use nothing that the premise does not say.",
    "So the answer is",
    "Answer:",
)
_ESNLI = _nli(
    "esnli",
    "A premise describes a picture. Decide whether the hypothesis must be true of it (entailment), "
    "cannot be true (contradiction), or may be either (neutral).",
    "Answer:",
    "Reason:",
)

_HVAC = TaskFile(
    name="hvac-desk",
    instruction=(
        "Read the building-service ticket. Find out whether the plant is in heating or in cooling mode, "
        "whether the room is below or above target, and whether the supply air is warm or cold. The room "
        "needs the mode if heating meets below or cooling meets above; the mode is delivered if heating "
        "meets warm or cooling meets cold. Needed and delivered: wait. Needed only: dispatch. Delivered "
        "only: adjust. Neither: close."
    ),
    label_kind="closed",
    labels=("wait", "dispatch", "adjust", "close"),
    shots=(
        _shot(
            "the boiler is running . the air from the vent is cool . people at their desks are freezing .",
            "the plant is in heating mode , the room is below target and the supply air is cold .",
            "dispatch",
        ),
    ),
)

PRESETS: dict[str, TaskFile] = {
    "cqa": _CQA,
    "svamp": _SVAMP,
    "anli1": _ANLI1,
    "esnli": _ESNLI,
    "hvac": _HVAC,
}


def load_task(source: str | Path) -> TaskFile:
    """Return the task file at ``source``, or the preset of that name (``cqa``, ``svamp``, ...) if there is no such file.

    Raises:
        UsageError: the file cannot be read.
        DataError: the file is not a valid task file; the message names the field.

    """
    path = Path(source)
    if str(source) in PRESETS and not path.exists():
        return PRESETS[str(source)]
    try:
        return read_task(path)
    except OSError as error:
        raise UsageError(
            f"The task file {path} cannot be read: {error.strerror}. Give a file written by "
            f"'sbs-edge task new', or one of the presets: {', '.join(PRESETS)}."
        ) from error
