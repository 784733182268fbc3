"""``sbs-edge bench train``: the optimizer step against the two-forward step that it replaces.

Each step runs in its own pinned process on the same seed, weights and batches; rounds are interleaved.
Peak memory is read in fresh processes that do nothing but three steps.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.protocol import Worker, WorkerFailed
from sbs_edge.bench.core.results import Row, new_document
from sbs_edge.bench.core.rounds import Series, fixed_ratio, median_row, rotated, shared_ratio
from sbs_edge.bench.core.shapes import SHAPES, check_shape
from sbs_edge.bench.peers.system import Spec
from sbs_edge.errors import DataError, UsageError

__all__ = ["TrainBenchOptions", "largest_difference", "make_pairs", "measure_train"]

Say = Callable[[str], None]
_STEPS = ("sbs-edge", "two-forward", "linear-cross-entropy")
_MODULE = "sbs_edge.bench.training.worker"
# fp32: rounding of a few hundred sums in another order; bf16 keeps 8 bits.
_FLOAT_NOISE = {"fp32": 2e-4, "bf16": 3e-2}


@dataclass(slots=True)
class TrainBenchOptions:
    """Conditions of the training bench; the command's help describes each."""

    data: str = "builtin"
    dataset: str | None = None
    shape: str = "t5-small"
    batch_size: int = 8
    examples: int = 64
    steps: int = 8
    rounds: int = 6
    device: str = "all"
    precisions: tuple[str, ...] = ("fp32",)
    threads: int = 1
    seed: int = 0
    rationale_weight: float = 1.0


def make_pairs(options: TrainBenchOptions) -> list[list[list[int]]]:
    """Token ids ``[label source, label target, rationale source, rationale target]`` of each example.

    Raises:
        DataError: fewer examples with label and rationale than one batch.
    """
    from sbs_edge.data.load import load_splits
    from sbs_edge.data.tokenizer import build_tokenizer

    splits = load_splits(
        None if options.data == "builtin" else options.data, dataset=options.dataset, seed=options.seed
    )
    rows = [row for row in splits.train if row.label is not None and row.rationale][: options.examples]
    if len(rows) < options.batch_size:
        raise DataError(
            f"{options.data} has {len(rows)} training rows with a label and a rationale, fewer than one "
            f"batch of {options.batch_size}. Give more data or a smaller batch_size."
        )
    texts = [text for row in rows for text in (row.input, str(row.label), str(row.rationale))]
    prefixes = ("[label] ", "[rationale] ")
    tokenizer = build_tokenizer(texts, prefixes)
    top = SHAPES[options.shape]["vocab_size"]

    def ids(text: str) -> list[int]:
        # A shape's vocabulary may be smaller than the text's: sizes matter here, words do not.
        return [token if token < top else 3 + token % (top - 3) for token in tokenizer.encode(text).ids]

    return [
        [ids(prefixes[0] + row.input), ids(str(row.label)), ids(prefixes[1] + row.input), ids(str(row.rationale))]
        for row in rows
    ]  # fmt: skip


def largest_difference(losses: list[float], others: list[float]) -> float:
    """Largest relative difference of two loss curves."""
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(losses, others, strict=True))


def _devices(wanted: str) -> list[str]:
    import torch

    if wanted not in ("cpu", "cuda", "all"):
        raise UsageError(f"device is cpu, cuda or all; found {wanted!r}.")
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if wanted == "all":
        return present
    if wanted not in present:
        raise UsageError("torch finds no CUDA device here: choose the device cpu.")
    return [wanted]


def _peak(spec: Spec, case: str) -> list[Row]:
    """Peak memory of three steps in a fresh process, and how far above the loaded model it lies."""
    with Worker(spec, _MODULE) as worker:
        before = worker.ask("open", timeout_s=600)
        worker.ask("step", seconds=0.0, least=3, warm=0)
        after = worker.ask("peak")
    name, peak = spec.system, after.get("device_peak_mb", after["peak_rss_mb"])
    extra = {"fresh_process": True, "steps": 3}
    rows = [Row("peak_memory", name, "", case, "MB", "lower", peak, extra=extra)]
    if "device_peak_mb" not in after:
        over = after["peak_rss_mb"] - before["rss_mb"]
        rows.append(Row("peak_above_loaded_model", name, "", case, "MB", "lower", over, extra=extra))
    return rows


def _rows(
    name: str, case: str, options: TrainBenchOptions, tokens: int, step: Series, epoch: Series
) -> list[Row]:
    """Times of a step and an epoch, and the examples and tokens a second; ``tokens`` are those of an epoch."""
    tokens_a_step = tokens / max(1, options.examples // options.batch_size)

    def rates(amount: float) -> list[float]:
        return [amount / ms * 1e3 for ms in step.rounds]

    return [
        step.row("step", name, "", case),
        epoch.row("epoch", name, "", case),
        median_row("rate", name, "", case, "examples/s", rates(options.batch_size)),
        median_row("token rate", name, "", case, "tokens/s", rates(tokens_a_step)),
    ]


class _Case:
    """The steps of one device and precision, each in its own process; one that fails drops out with its reason."""

    def __init__(
        self,
        options: TrainBenchOptions,
        device: str,
        precision: str,
        pairs: str,
        document: dict[str, Any],
        say: Say,
    ) -> None:
        self.options, self.precision, self.document, self.say = options, precision, document, say
        self.name = f"{device} {precision}, batch {options.batch_size}"
        given = {
            "device": device, "precision": precision, "pairs": pairs, "shape": options.shape, "seed": options.seed,
            "batch_size": options.batch_size, "rationale_weight": options.rationale_weight,
        }  # fmt: skip
        cpus = sorted(os.sched_getaffinity(0))[-options.threads :]
        self.specs = {name: Spec(name, "", "", options.threads, cpus, options=given) for name in _STEPS}
        self.workers: dict[str, Worker] = {}
        self.losses: dict[str, list[float]] = {}
        self.shares: dict[str, dict[str, list[int]]] = {}
        self.times: dict[tuple[str, str], Series] = {}

    def _dropping(self, name: str, what: str, call: Callable[[], None]) -> None:
        self.say(f"{self.name}: {what}")
        try:
            call()
        except WorkerFailed as failure:
            self.say(f"{self.name}: {name}: {failure}")
            state = {"name": f"{name}, {self.name}", "status": "failed", "why": str(failure)}
            self.document["systems"].append(state)
            if name in self.workers:
                self.workers.pop(name).close()

    def _start(self, name: str) -> None:
        worker = self.workers[name] = Worker(self.specs[name], _MODULE)
        worker.ask("open", timeout_s=600)
        self.losses[name] = worker.ask("curve", steps=self.options.steps, timeout_s=600)["losses"]
        self.shares[name] = worker.ask("padding")["padding"]
        self.document["systems"].append({"name": f"{name}, {self.name}", "status": "ok", "why": ""})

    def _time(self, name: str, do: str, **order: Any) -> None:
        reply = self.workers[name].ask(do, **order)
        self.times.setdefault((name, do), Series()).add(reply["ns"])

    def measure(self) -> list[Row]:
        """Time every step in turn, then epochs, then memory."""
        try:
            for name in self.specs:
                self._dropping(name, f"loss curve of {name}", partial(self._start, name))
            for number in range(self.options.rounds):
                order = {"seconds": 0.3, "least": 1, "warm": 1 if number == 0 else 0}
                for name in rotated(list(self.workers), number):
                    what = f"round {number + 1}, {name}"
                    self._dropping(name, what, partial(self._time, name, "step", **order))
            for number in range(2):
                for name in list(self.workers):
                    what = f"epoch {number + 1} of {name}"
                    self._dropping(name, what, partial(self._time, name, "epoch", timeout_s=600))
        finally:
            for worker in self.workers.values():
                worker.close()
        rows: list[Row] = []
        for name in self.workers:
            used = sum(total[1] for total in self.shares[name].values())
            step, epoch = (self.times[(name, do)] for do in ("step", "epoch"))
            rows += _rows(name, self.name, self.options, used, step, epoch)
            try:
                self.say(f"{self.name}: peak memory of {name}")
                rows += _peak(self.specs[name], self.name)
            except WorkerFailed as failure:
                self.document["systems"].append({"name": f"{name}, {self.name}, memory", "why": str(failure)})
        return rows

    def write(self, rows: list[Row]) -> None:
        """Add the case to the document."""
        self.document["rows"] += [row.as_dict() for row in rows]
        self.document["losses"][self.name] = self.losses
        self.document["padding"] |= {
            f"{name}, {self.name}": {
                part: f"{1 - used / held:.1%}" for part, (held, used) in self.shares[name].items()
            }
            for name in self.workers
        }
        _judge(self.name, self.precision, self.losses, rows, self.document)


def _judge(
    case: str, precision: str, losses: dict[str, list[float]], rows: list[Row], document: dict[str, Any]
) -> None:
    """Loss curves against the two-forward step's, and the ratios that agreement allows."""
    base, limit = losses.get("two-forward"), _FLOAT_NOISE[precision]
    same = False
    for name, curve in losses.items():
        if base is None or name == "two-forward":
            continue
        difference = largest_difference(curve, base)
        same |= name == "sbs-edge" and difference <= limit
        document["loss_curves"].append(
            {
                "case": f"{name}, {case}",
                "against": "two-forward",
                "largest_difference": difference,
                "limit": limit,
                "verdict": "equal within float noise" if difference <= limit else "DIFFERENT",
            }
        )
    mine = {row.section: row for row in rows if row.system == "sbs-edge"}
    for other in rows:
        row = mine.get(other.section)
        if row is None or other.system == "sbs-edge" or other.section in ("rate", "token rate"):
            continue
        ratio = None
        if same and row.rounds and len(row.rounds) == len(other.rounds):
            ratio = shared_ratio(other.rounds, row.rounds)
        elif same and row.value > 0:
            ratio = fixed_ratio(other.value / row.value)
        document["ratios"].append(
            {
                "section": other.section,
                "case": case,
                "ours": "sbs-edge",
                "peer": other.system,
                "peer_variant": "",
                "ratio": ratio,
                "withheld": None if same else "its loss is not the two-forward step's",
            }
        )


def measure_train(
    options: TrainBenchOptions, say: Say = lambda _: None, command: list[str] | None = None
) -> dict[str, Any]:
    """Run the bench; return its document (see :mod:`sbs_edge.bench.core.results`).

    Raises:
        UsageError: unknown shape, device or precision.
        DataError: too little data.
    """
    check_shape(options.shape)
    unknown = [name for name in options.precisions if name not in _FLOAT_NOISE]
    if unknown or not options.precisions:
        raise UsageError(f"precisions are fp32 and bf16; found {', '.join(unknown) or 'nothing'}.")
    devices = _devices(options.device)
    model = {
        "shape": options.shape,
        "random_weights": True,
        "config": SHAPES[options.shape],
        "data": options.dataset or options.data,
    }
    document = new_document(
        "train", model, threads=options.threads, cpus=sorted(os.sched_getaffinity(0))[-options.threads :],
        command=command, seed=options.seed, options=asdict(options), systems=[], rows=[], ratios=[], losses={},
        loss_curves=[], padding={},
    )  # fmt: skip
    pairs = make_pairs(options)
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "pairs.json"
        path.write_text(json.dumps(pairs), encoding="utf-8")
        for device in devices:
            for precision in options.precisions:
                case = _Case(options, device, precision, str(path), document, say)
                case.write(case.measure())
    return document
