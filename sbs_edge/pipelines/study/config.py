"""Configuration of a study, and the runs that it asks for. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sbs_edge.data.example import Example, Splits
from sbs_edge.data.targets import Mode
from sbs_edge.errors import DataError, UsageError
from sbs_edge.training.config import TrainConfig, make_config

__all__ = [
    "METHODS",
    "Method",
    "Run",
    "StudentSpec",
    "StudyConfig",
    "effort",
    "gold_known",
    "parse_config",
    "parse_student",
    "plan_runs",
    "subset",
]

Method = Literal["label-only", "step-by-step"]
METHODS: dict[Method, dict[bool, Mode]] = {
    "step-by-step": {True: "stepwise", False: "stepwise-teacher"},
    "label-only": {True: "finetune", False: "distill"},
}
"""Method -> whether gold labels are learnt -> training mode."""

SCRATCH = ("small: d_model=32 1/1", "medium: d_model=32 2/2", "large: d_model=64 2/2")
"""Students from scratch that are compared where none are named; the last is the default of ``train``."""

# What makes one student another one; a student's text may set these and nothing else.
_SHAPE = (
    "model", "encoder_layers", "decoder_layers", "d_model", "d_ff", "n_heads", "n_layers", "n_decoder_layers", "gated",
    "tied", "tokenizer", "vocabulary", "lora_rank", "lora_alpha", "learning_rate", "rationale_weight",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """One student of the grid: its name, and the fields of the training configuration that make it."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """One training of the grid.

    Attributes:
        method: what is learnt.
        mode: the same as ``train`` knows it.
        share: of the training rows, in (0, 1].
        rows: the same as a number.
        student: the student's name.
        seed: of the rows chosen, the initial weights and the order of rows.
        config: the training configuration.
    """

    method: Method
    mode: Mode
    share: float
    rows: int
    student: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Name for messages and progress."""
        return f"{self.method}, {self.student}, {self.rows:,} rows, seed {self.seed}"


class StudyConfig(BaseModel):
    """Configuration of ``sbs-edge study``: every method on every share of the rows for every student and seed.

    Attributes:
        methods: ``step-by-step`` learns labels and rationales, ``label-only`` labels.
        labels: learn gold or the teacher's labels; None: gold where any training row has one.
        shares: shares of the training rows, each in (0, 1].
        students: see :func:`parse_student`; empty: three from scratch, or a checkpoint at three depths.
        seeds: trainings of each point, whose spread is shown.
        seed: the first seed.
        steps: optimiser steps of every training.
        within: points of accuracy that the chosen student may be worse than the best one.
        target: what students are exported for.
        evaluation_rows: most validation rows and most test rows that judge a student.
        training: further fields of the training configuration, the same for every student.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[Method, ...] = Field(("step-by-step", "label-only"), min_length=1)
    labels: Literal["gold", "teacher"] | None = None
    shares: tuple[float, ...] = Field((0.25, 0.5, 1.0), min_length=1)
    students: tuple[str, ...] = ()
    seeds: int = Field(2, ge=1)
    seed: int = Field(0, ge=0)
    steps: int = Field(600, ge=1)
    within: float = Field(1.0, ge=0)
    target: str = "cpu-int8"
    evaluation_rows: int = Field(2000, ge=1)
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _shares_in_range(self) -> StudyConfig:
        for share in self.shares:
            if not 0 < share <= 1:
                raise ValueError(f"a share of the training rows lies in (0, 1], not at {share:g}")
        return self

    def specs(self) -> list[StudentSpec]:
        """Return the students, each once; parsed and checked.

        Raises:
            UsageError: a text does not describe a student, or two have the same name.

        """
        model = self.training.get("model")
        if self.students:
            found = [parse_student(text, model is not None) for text in dict.fromkeys(self.students)]
            twice = [
                spec.name for n, spec in enumerate(found) if spec.name in {each.name for each in found[:n]}
            ]
            if twice:
                raise UsageError(f"Two students are named {twice[0]!r}. Give each a name of its own.")
            return found
        if model is None:
            return [parse_student(text) for text in SCRATCH]
        cut = [self.training.get(f"{stack}_layers") for stack in ("encoder", "decoder")]
        if any(layers is not None for layers in cut):
            return [
                StudentSpec("/".join("all" if layers is None else str(layers) for layers in cut) + " layers")
            ]
        return _depths(str(model))


def parse_student(text: str, from_checkpoint: bool = False) -> StudentSpec:
    """Read a student: ``E/D`` layers, ``FIELD=VALUE`` of the training configuration, or several with blanks between.

    From scratch ``E/D`` are the numbers of layers; of a checkpoint they say which layers are kept. A name and a colon
    may come first; otherwise the text itself is the name.

    Args:
        text: for example ``"narrow: d_model=32 1/1"``, or ``"6/2"`` and ``"0,3,5/0,5"`` for a checkpoint.
        from_checkpoint: whether students start from a checkpoint although ``text`` names none.

    Raises:
        UsageError: it does not describe a student.

    Example:
        >>> parse_student("narrow: d_model=32 2/1").fields
        {'d_model': '32', 'n_layers': '2', 'n_decoder_layers': '1'}

    """
    fields: dict[str, Any] = {}
    depths: list[str] = []
    label, colon, shape = text.partition(": ")
    if not colon or "=" in label or "/" in label:
        label, shape = text, text
    for part in shape.split():
        name, equals, value = part.partition("=")
        if equals:
            name = name.replace("-", "_")
            if name not in _SHAPE:
                raise UsageError(
                    f"student={text!r} sets {name}, which does not make another student. It may set "
                    f"{', '.join(_SHAPE)}; training sets the other fields, for all students alike."
                )
            fields[name] = value
        elif part.count("/") == 1 and all(part.split("/")):
            depths.append(part)
        else:
            raise UsageError(
                "student takes ENCODER/DECODER layers such as 6/2, FIELD=VALUE such as d_model=32, or several with "
                f"blanks between, and a name and a colon before them if you like; found {text!r}."
            )
    if len(depths) > 1 or not (fields or depths):
        raise UsageError(f"student={text!r} must say one depth, or fields, of one student.")
    if depths:
        names = ("n_layers", "n_decoder_layers")
        if from_checkpoint or "model" in fields:
            names = ("encoder_layers", "decoder_layers")
        fields |= dict(zip(names, depths[0].split("/"), strict=True))
    return StudentSpec(" ".join(label.split()), fields)


def _depths(model: str) -> list[StudentSpec]:
    """Return a checkpoint at three depths: whole, a third of the decoder, and two thirds of the encoder besides."""
    from sbs_edge.training.checkpoint import open_checkpoint

    config = open_checkpoint(model).config
    # mT5 and UMT5 have 8 layers where the configuration says nothing.
    encoder = int(config.get("num_layers") or (6 if config["model_type"] == "t5" else 8))
    decoder = int(config.get("num_decoder_layers") or encoder)
    third, most = max(1, decoder // 3), max(1, 2 * encoder // 3)
    depths = dict.fromkeys([(encoder, decoder), (encoder, third), (most, third)])
    return [parse_student(f"{e}/{d}", from_checkpoint=True) for e, d in depths]


def gold_known(config: StudyConfig, splits: Splits) -> bool:
    """Return whether gold labels are learnt, or the teacher's.

    Raises:
        DataError: the training rows have no labels of the kind that was asked for.

    """
    gold = any(row.label is not None for row in splits.train)
    if config.labels is None:
        return gold
    teacher = any(row.teacher_label is not None for row in splits.train)
    if not (gold if config.labels == "gold" else teacher):
        raise DataError(
            f"No training row has a {'gold' if config.labels == 'gold' else 'teacher'} label, and labels={config.labels!r} "
            "asks to learn them. Leave labels out, or name the column."
        )
    return config.labels == "gold"


def plan_runs(config: StudyConfig, splits: Splits) -> list[Run]:
    """Return the runs of a study, the largest first, so that no long one starts last.

    Raises:
        UsageError: a student or the training configuration is not valid.
        DataError: the rows have no labels of the kind that was asked for.

    """
    gold, runs = gold_known(config, splits), []
    counts = {share: max(1, round(share * len(splits.train))) for share in config.shares}
    for spec in config.specs():
        for method in dict.fromkeys(config.methods):
            for share in sorted(set(counts), reverse=True):
                for seed in range(config.seed, config.seed + config.seeds):
                    mode = METHODS[method][gold]
                    fields = {**config.training, **spec.fields}
                    settings = make_config(
                        None, {**fields, "mode": mode, "max_steps": config.steps, "seed": seed}
                    )
                    runs.append(Run(method, mode, share, counts[share], spec.name, seed, settings))
    return sorted(runs, key=lambda run: (-effort(run.config), -run.share, run.seed))


def effort(config: TrainConfig) -> float:
    """Return about how much work a training is beside others of the same study; checkpoints all count alike."""
    tasks = 1 + 2 * config.uses_rationales  # a rationale is several times as long as a label
    if config.model is not None:
        return float(tasks)
    return float(tasks * config.d_model * (config.n_layers + config.n_decoder_layers))


def subset(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Return ``count`` of the rows in their order; for one seed a smaller subset lies within a larger one."""
    import random

    chosen = list(range(len(rows)))
    random.Random(f"study {seed}").shuffle(chosen)
    return [rows[index] for index in sorted(chosen[:count])]


def parse_config(**given: Any) -> StudyConfig:
    """Return the configuration; raise :class:`UsageError` in one paragraph where a value is wrong."""
    try:
        return StudyConfig(**given)
    except ValidationError as error:
        parts = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}".removeprefix(
                ": "
            )
            for item in error.errors()
        ]
        raise UsageError(f"The study's configuration is not valid: {'; '.join(parts)}.") from error
