"""The export targets, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sbs_edge.errors import UsageError

__all__ = ["TARGETS", "Target", "check_runnable", "providers_here", "targets_named"]


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of machine and a number format.

    Attributes:
        name: the target's name.
        numbers: the number format of products with constant weights.
        providers: onnxruntime providers, the first that is installed is used.
        lossy: the accuracy check compares it with the float32 student.
        summary: one sentence for help texts and model cards.
        steps: rationales use an encoder and a step graph with a loop on the host, instead of one graph.
        standard: use only operators of the ONNX standard, as TensorRT requires.
        profiles: TensorRT's optimisation profiles are written beside the graphs.
    """

    name: str
    numbers: Literal["float32", "int8", "int4", "fp16", "bf16", "int8-pairs"]
    providers: tuple[str, ...]
    lossy: bool
    summary: str
    steps: bool = False
    standard: bool = False
    profiles: bool = False


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu-fp32", "float32", ("CPUExecutionProvider",), False, "float32 on any CPU"),
        Target(
            "cpu-int8", "int8", ("CPUExecutionProvider",), True,
            "int8 weights and activations; an answer does not depend on what shares its batch",
        ),
        Target(
            "cpu-int4", "int4", ("CPUExecutionProvider",), True,
            "cpu-int8 with calibrated 4-bit weights in the decoder's steps: quicker rationales one at a time",
        ),
        Target(
            "cuda-fp16", "fp16", ("CUDAExecutionProvider",), True,
            "fp16 on NVIDIA GPUs, rescaled so that it cannot overflow", steps=True, standard=True,
        ),
        Target(
            "cuda-bf16", "bf16", ("CUDAExecutionProvider",), True,
            "bf16 on NVIDIA GPUs from Ampere on", steps=True, standard=True,
        ),
        Target(
            "tensorrt-fp16", "fp16", ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"), True,
            "fp16 for TensorRT, rescaled so that it cannot overflow", steps=True, standard=True, profiles=True,
        ),
        Target(
            "tensorrt-int8", "int8-pairs", ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"), True,
            "fp16 for TensorRT with explicit calibrated int8 pairs", steps=True, standard=True, profiles=True,
        ),
    )
}  # fmt: skip


def providers_here(target: Target) -> list[str]:
    """Return the target's providers that the installed onnxruntime has."""
    from sbs_edge.runtime.ort import onnxruntime_module

    onnxruntime = onnxruntime_module()

    return [name for name in target.providers if name in onnxruntime.get_available_providers()]


def check_runnable(targets: Iterable[Target]) -> None:
    """Refuse targets that this machine cannot run, because their accuracy could not be measured.

    Raises:
        UsageError: the installed onnxruntime has none of a target's providers.
    """
    for target in targets:
        if not providers_here(target):
            raise UsageError(
                f"{target.name} runs on {' or '.join(target.providers)}, which this machine's onnxruntime does not have, "
                "so its loss of accuracy cannot be measured here; nothing was written. Export on a machine that "
                "has it (pip install 'sbs-edge[gpu]'), or write the target unmeasured with unguarded=True."
            )


def targets_named(names: tuple[str, ...]) -> list[Target]:
    """Return the targets, in order and without repetition.

    Raises:
        UsageError: a name is unknown, or none is given.
    """
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        wrong = f"There is no target {unknown[0]!r}" if unknown else "No target was given"
        raise UsageError(f"{wrong}; the targets are {', '.join(TARGETS)}.")
    return [TARGETS[name] for name in dict.fromkeys(names)]
