"""Inputs of the kernel bench: shapes, data kinds and padding, as tensors on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "CPU_SHAPES",
    "DATA",
    "DTYPES",
    "GPU_SHAPES",
    "IGNORED",
    "Case",
    "Inputs",
    "cases_of",
    "make_inputs",
    "parse_shapes",
]

IGNORED = -100
# ``amp-*``: what autocast sees in a step of mixed precision, states in 16 bits and a float32 weight.
DTYPES = ("float32", "bfloat16", "float16", "amp-bfloat16", "amp-float16")
_AMP = "amp-"
DATA = ("random", "flat", "peaked", "student")
CPU_SHAPES = ((2048, 512, 32128),)
# The order is the order of importance: a time limit cuts the list from its end. mT5's vocabulary with few
# tokens first, then T5's from a small batch to one where the row count has made up for the vocabulary.
GPU_SHAPES = (
    (4096, 768, 250112),
    (16384, 768, 32128),
    (4096, 768, 32128),
    (65536, 768, 32128),
    (16384, 768, 250112),
    (8192, 768, 32128),
    (2048, 768, 32128),
    (32768, 768, 32128),
    (4096, 512, 32128),
    (4096, 1024, 32128),
    (2048, 768, 250112),
    (65536, 768, 250112),
)
_MARGIN = 14.0  # with |w| = 1: p(target) = e^14 / (e^14 + V), 0.97 at V = 32128


@dataclass(frozen=True, slots=True)
class Case:
    """One point of the bench.

    Attributes:
        n: rows that count.
        d: width of a row.
        v: classes.
        dtype: of states and weight, one of :data:`DTYPES`; under ``amp-`` the weight is float32.
        padding: share of ignored rows in the padded batch, in [0, 1); they come on top of ``n``.
        data: one of :data:`DATA`.
    """

    n: int
    d: int
    v: int
    dtype: str = "float32"
    padding: float = 0.0
    data: str = "random"

    @property
    def shape(self) -> str:
        """``N=2048 D=512 V=32128 float32``."""
        return f"N={self.n} D={self.d} V={self.v} {self.dtype}"

    @property
    def amp(self) -> bool:
        """True when the loss runs under autocast, with a float32 weight."""
        return self.dtype.startswith(_AMP)

    @property
    def states(self) -> torch.dtype:
        """Type of the states, and under autocast of the products."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype.removeprefix(_AMP))
        return found

    @property
    def name(self) -> str:
        """The shape with its padding and data kind."""
        return f"{self.shape}, {self.padding:.0%} padding, {self.data}"

    @property
    def variants(self) -> tuple[str, ...]:
        """Forms of the batch: padded and compacted where rows are ignored, otherwise the batch itself."""
        return ("padded", "compacted") if self.padding else ("",)

    @property
    def flops(self) -> float:
        """6NDV: forward, input gradient and weight gradient, without any recomputation."""
        return 6.0 * self.n * self.d * self.v

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form for JSON."""
        return asdict(self)


@dataclass(slots=True)
class Inputs:
    """Tensors of one batch.

    Attributes:
        hidden: (N, D) leaf that requires a gradient.
        weight: (V, D) leaf that requires a gradient.
        targets: (N,) int64, :data:`IGNORED` where a row is padding.
        valid: (M,) int64 positions of the rows that count.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    valid: Tensor

    def compacted(self) -> Inputs:
        """The same batch without its ignored rows; the weight is shared."""
        import torch

        hidden = self.hidden.detach().index_select(0, self.valid).requires_grad_()
        every = torch.arange(len(self.valid), device=hidden.device)
        return Inputs(hidden, self.weight, self.targets.index_select(0, self.valid), every)


def parse_shapes(text: str) -> tuple[tuple[int, int, int], ...]:
    """Read ``N,D,V`` triples: ``2048,512,32128,4096,768,32128`` or with ``;`` between them.

    Raises:
        UsageError: the numbers are not triples of positive integers.
    """
    try:
        numbers = [int(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"shapes are N,D,V in whole numbers; found {text!r}.") from error
    if not numbers or len(numbers) % 3 or min(numbers) < 1:
        raise UsageError(
            f"shapes are positive triples N,D,V[,N,D,V...]; found {len(numbers)} numbers in {text!r}."
        )
    return tuple((numbers[at], numbers[at + 1], numbers[at + 2]) for at in range(0, len(numbers), 3))


def make_inputs(case: Case, device: torch.device, seed: int, student: Path | None = None) -> Inputs:
    """Make the padded batch of a case.

    ``random``: logits of unit variance. ``flat``: almost none, so that every probability is about 1/V.
    ``peaked``: the target has nearly all of the mass, as late in training. ``student``: the decoder's
    states and the head of a trained student on its own validation rows, repeated up to N rows.

    Raises:
        UsageError: unknown data kind, or no student for ``student``.
        DataError: the student has no validation rows, or other sizes than the case.
    """
    import torch

    if case.data not in DATA:
        raise UsageError(f"data is one of {', '.join(DATA)}; found {case.data!r}.")
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype, master = case.states, torch.float32 if case.amp else case.states
    if case.data == "student":
        hidden, weight, targets = _student_inputs(case, device, student)
    else:
        hidden = torch.randn(case.n, case.d, generator=generator, device=device)
        weight = torch.randn(case.v, case.d, generator=generator, device=device).mul_(case.d**-0.5)
        targets = torch.randint(0, case.v, (case.n,), generator=generator, device=device)
        if case.data == "flat":
            hidden.mul_(1e-2)
        elif case.data == "peaked":
            hidden.mul_(0.1).add_(weight.index_select(0, targets), alpha=_MARGIN)
    total = round(case.n / (1.0 - case.padding))
    valid = torch.randperm(total, generator=generator, device=device)[: case.n].sort().values
    batch = torch.randn(total, case.d, generator=generator, device=device) if total > case.n else hidden
    if total > case.n:
        batch.index_copy_(0, valid, hidden)
    labels = torch.full((total,), IGNORED, device=device)
    labels[valid] = targets
    return Inputs(batch.to(dtype).requires_grad_(), weight.to(master).requires_grad_(), labels, valid)


def _student_inputs(case: Case, device: torch.device, student: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    if student is None:
        raise UsageError("The data kind 'student' needs a student: the directory that sbs-edge train wrote.")
    states, targets, head = student_states(student)
    if head.shape != (case.v, case.d):
        raise DataError(
            f"The head of {student} is {tuple(head.shape)}, the case asks for ({case.v}, {case.d})."
        )
    picks = torch.arange(case.n) % len(targets)
    return states[picks].to(device), head.to(device), targets[picks].to(device)


def student_states(student: Path, rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Return states (N, D) at the head's input, their targets (N,) and the head (V, D), all float32.

    Raises:
        DataError: the student kept no validation rows.
    """
    import torch

    from sbs_edge.training.student_dir import StudentDir

    opened = StudentDir.load(student)
    model, tokenizer = opened.load_model(), opened.tokenizer()
    examples = opened.validation()[:rows]
    pairs = [
        (opened.prefixes[task] + row.input, text)
        for row in examples
        for task, text in (("label", row.label), ("rationale", row.rationale))
        if text
    ]
    if not pairs:
        raise DataError(f"The student {student} has no validation rows with answers to take states from.")
    seen: list[Tensor] = []
    found: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    try:
        with torch.no_grad():
            for source, text in pairs:
                ids, labels = (torch.tensor([tokenizer.encode(part).ids]) for part in (source, text))
                model(input_ids=ids, labels=labels)
                found.append(labels.flatten())
    finally:
        hook.remove()
    states = torch.cat([part.flatten(0, 1) for part in seen])
    return states, torch.cat(found), model.lm_head.weight.detach().clone()


def cases_of(
    shapes: Sequence[tuple[int, int, int]],
    dtypes: Sequence[str],
    paddings: Sequence[float],
    data: Sequence[str],
    student: Path | None = None,
) -> list[Case]:
    """Every combination, the first shape first; a student's head decides D and V of its own cases.

    Raises:
        UsageError: an unknown dtype or data kind, or a share outside [0, 1).
    """
    for name, given, known in (("dtype", dtypes, DTYPES), ("data", data, DATA)):
        wrong = [item for item in given if item not in known]
        if wrong or not given:
            raise UsageError(f"{name} takes {', '.join(known)}; found {', '.join(wrong) or 'nothing'}.")
    if not paddings or not all(0.0 <= share < 1.0 for share in paddings):
        raise UsageError("padding is the share of ignored rows in percent, from 0 to below 100.")
    if "student" in data and student is None:
        raise UsageError("The data kind 'student' needs a student: the directory that sbs-edge train wrote.")
    found = []
    for n, d, v in shapes:
        for dtype in dtypes:
            for kind in data:
                width, classes = _head_size(student) if kind == "student" and student else (d, v)
                found += [Case(n, width, classes, dtype, share, kind) for share in paddings]
    return list(dict.fromkeys(found))


def _head_size(student: Path) -> tuple[int, int]:
    """(D, V) as the student's config.json has them; the head may hold padded rows."""
    import json

    try:
        config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{student} is not a student directory: its config.json cannot be read. Give one that sbs-edge train wrote."
        ) from error
    return int(config["d_model"]), int(config["vocab_size"])
