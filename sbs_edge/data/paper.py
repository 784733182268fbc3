"""The data sets of *Distilling Step-by-Step* in their authors' layout (Hsieh et al. 2023, arXiv 2305.02301).

``<name>/<name>_<split>.json`` has one JSON object per line, ``<name>/llm/<split>_CoT_<k>.json`` the
teacher's raw outputs, one string per row in row order. A raw output continues with invented
questions: it is cut where the first of them begins, and then split into rationale and label.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.data.readers import RejectedRow
from sbs_edge.data.rows import RawRow, iterate_rows, read_json
from sbs_edge.errors import DataError, UsageError

__all__ = ["PAPER_DATASETS", "PaperFiles", "parse_teacher", "read_paper_files"]

NLI_LABELS = ("entailment", "neutral", "contradiction")


class _BadRow(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of a data set."""

    task: TaskSpec
    splits: tuple[str, ...]
    cut: str
    answer: str
    label: Callable[[str], str | None]
    row: Callable[[dict[str, Any]], tuple[str, str, tuple[str, ...] | None]]


def _string(values: dict[str, Any], name: str) -> str:
    if name not in values:
        raise _BadRow(f"missing column {name!r}")
    if not isinstance(values[name], str):
        raise _BadRow(f"wrong type of {name!r}")
    if not values[name].strip():
        raise _BadRow(f"empty {name!r}")
    return str(values[name])


def _question(values: dict[str, Any]) -> tuple[str, str, tuple[str, ...] | None]:
    question, answer = _string(values, "question"), _string(values, "answer")
    choices = values.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise _BadRow("wrong type of 'choices'")
    if answer not in choices:
        raise _BadRow("'answer' is not among 'choices'")
    lettered = "\n".join(f"({chr(ord('a') + i)}) {choice}" for i, choice in enumerate(choices))
    return (
        f"{question}\nAnswer Choices:\n{lettered}",
        answer.strip(),
        tuple(choice.strip() for choice in choices),
    )


def _problem(values: dict[str, Any]) -> tuple[str, str, tuple[str, ...] | None]:
    return _string(values, "input"), _string(values, "label"), None


def _pair(values: dict[str, Any]) -> tuple[str, str, tuple[str, ...] | None]:
    premise, hypothesis = _string(values, "premise"), _string(values, "hypothesis")
    label = values.get("label")
    if isinstance(label, bool) or label not in (0, 1, 2):
        raise _BadRow("'label' is not 0, 1 or 2")
    # The authors join the two with their tokenizer's end mark; words are the same for every tokenizer.
    return f"premise: {premise}\nhypothesis: {hypothesis}", NLI_LABELS[int(label)], None


def _lettered_label(text: str) -> str | None:
    parts = re.split(r"\(.\)", text)
    return parts[1].strip().removesuffix(".").strip() or None if len(parts) > 1 else None


def _equation_label(text: str) -> str | None:
    found = re.search(r"\(.*\)", text)
    return found.group() if found else None


def _nli_label(text: str) -> str | None:
    label = text.strip().removesuffix(".").strip().lower()
    return label if label in NLI_LABELS else None


def _nli(name: str, answer: str) -> _Layout:
    return _Layout(
        TaskSpec(name, "closed", NLI_LABELS),
        ("train", "valid", "test"),
        "Premise:",
        answer,
        _nli_label,
        _pair,
    )


_LAYOUTS: dict[str, _Layout] = {
    "cqa": _Layout(
        TaskSpec("cqa", "choices"), ("train", "test"), "Q:", "So the answer is", _lettered_label, _question
    ),
    "svamp": _Layout(
        TaskSpec("svamp", "open", compare="value"),
        ("train", "test"),
        "Q:",
        "The answer is",
        _equation_label,
        _problem,
    ),
    "anli1": _nli("anli1", "So the answer is"),
    "esnli": _nli("esnli", "Answer:"),
}
PAPER_DATASETS = tuple(_LAYOUTS)


@dataclass(slots=True)
class PaperFiles:
    """The files of a data set as they are, before any row is moved.

    Attributes:
        task: its description.
        splits: ``train``, ``validation`` (the NLI sets) and ``test`` to rows in file order.
        rejected: the same names to rows that cannot be used.
        unparsed: the same names to the number of teacher outputs without a readable label.

    """

    task: TaskSpec
    splits: dict[str, list[Example]] = field(default_factory=dict)
    rejected: dict[str, list[RejectedRow]] = field(default_factory=dict)
    unparsed: dict[str, int] = field(default_factory=dict)


def parse_teacher(text: str, name: str) -> tuple[str | None, str | None]:
    """Return (rationale, label) of a raw output of the teacher; None for a missing part.

    The mark before the answer must occur exactly once in the first answer, as in the authors' rules.
    """
    rules = _LAYOUTS[name]
    parts = text.split(rules.cut)[0].rstrip().split(rules.answer)
    if len(parts) != 2:
        return None, None
    return parts[0].strip() or None, rules.label(parts[1])


def _teacher_outputs(folder: Path, split: str, n_rows: int) -> list[str] | None:
    """Return an output for each row, matched by position, or None if the split has no teacher."""
    numbered = sorted(
        (int(found.group(1)), path)
        for path in folder.glob(f"{split}_CoT_*.json")
        if (found := re.fullmatch(rf"{split}_CoT_(\d+)\.json", path.name))
    )
    if not numbered:
        return None
    outputs: list[str] = []
    batch = 0
    for expected, (number, path) in enumerate(numbered):
        if number != expected:
            raise DataError(
                f"{folder}/{split}_CoT_{expected}.json is missing, so later outputs would belong to "
                "the wrong rows. Fetch the file."
            )
        content = read_json(path)
        if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
            raise DataError(f"{path} must be a JSON array of strings, the teacher's raw outputs.")
        batch = batch or len(content)
        if len(content) != batch and number != len(numbered) - 1:
            raise DataError(
                f"{path} has {len(content)} outputs instead of {batch}, so later ones would belong to the wrong "
                "rows. Fetch the file again."
            )
        outputs += content
    if len(outputs) != n_rows:
        raise DataError(
            f"{folder} has {len(outputs)} teacher outputs for {n_rows} rows of the split {split!r}. They "
            "are matched by position, so the numbers must be equal; fetch the files again."
        )
    return outputs


def _find(root: Path, name: str) -> Path:
    for folder in (root / name, root):
        if (folder / f"{name}_train.json").is_file():
            return folder
    raise DataError(
        f"{root} has no {name}/{name}_train.json. Give the folder with the authors' layout "
        f"({name}/{name}_<split>.json and {name}/llm/<split>_CoT_<k>.json), or the folder {name} itself."
    )


def _read_row(rules: _Layout, row: RawRow, identity: str, source: str, output: str | None) -> Example:
    if row.values is None:
        raise _BadRow(row.problem)
    text, label, choices = rules.row(row.values)
    rationale, teacher_label = (None, None) if output is None else parse_teacher(output, rules.task.name)
    return Example(
        id=identity,
        input=text,
        label=label,
        teacher_label=teacher_label,
        rationale=rationale,
        choices=choices,
        source=source,
    )


def read_paper_files(root: str | Path, name: str) -> PaperFiles:
    """Read a data set's files as they are; rows stay aligned with the teacher's outputs.

    Raises:
        DataError: a file is missing or broken, or the outputs cannot be matched to the rows.

    """
    if name not in _LAYOUTS:
        raise UsageError(f"There is no data set {name!r} of the paper; there are {', '.join(_LAYOUTS)}.")
    rules, folder = _LAYOUTS[name], _find(Path(root), name)
    result = PaperFiles(rules.task)
    for split in rules.splits:
        file = folder / f"{name}_{split}.json"
        rows = list(iterate_rows(file))
        outputs = _teacher_outputs(folder / "llm", split, len(rows))
        ours = "validation" if split == "valid" else split
        examples, rejected = result.splits.setdefault(ours, []), result.rejected.setdefault(ours, [])
        result.unparsed[ours] = 0
        for index, row in enumerate(rows):
            output = outputs[index] if outputs else None
            try:
                example = _read_row(rules, row, f"{name}-{split}-{index}", f"{file}:{row.line}", output)
            except _BadRow as error:
                rejected.append(RejectedRow(str(file), row.line, str(error), row.raw, row.detail))
                continue
            examples.append(example)
            result.unparsed[ours] += output is not None and example.teacher_label is None
    return result
