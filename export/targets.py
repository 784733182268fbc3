"""What a bundle can be exported for, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sbs_edge.errors import UsageError

__all__ = ["TARGETS", "Target", "targets_named"]


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of machine and number format.

    Attributes:
        name: what ``--target`` takes.
        numbers: the number format of products with constant weights.
        providers: onnxruntime providers, the first that is installed is used.
        lossy: the guard compares it with the float32 student.
        summary: one sentence for help texts and model cards.
    """

    name: str
    numbers: Literal["float32", "int8"]
    providers: tuple[str, ...]
    lossy: bool
    summary: str


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu-fp32", "float32", ("CPUExecutionProvider",), False, "float32 on any CPU"),
        Target(
            "cpu-int8", "int8", ("CPUExecutionProvider",), True,
            "int8 weights and activations; an answer does not depend on what shares its batch",
        ),
    )
}  # fmt: skip


def targets_named(names: tuple[str, ...]) -> list[Target]:
    """Return the targets, in order and without repetition.

    Raises:
        UsageError: a name is unknown, or none is given.
    """
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise UsageError(
            f"There is no target {unknown[0]!r}; "
            if unknown
            else f"No target was given; known are {', '.join(TARGETS)}."
        )
    return [TARGETS[name] for name in dict.fromkeys(names)]
