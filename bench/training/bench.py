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
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.machine import provenance
from sbs_edge.bench.core.protocol import Worker, WorkerFailed
from sbs_edge.bench.core.results import FORMAT, Row
from sbs_edge.bench.core.shapes import SHAPES
from sbs_edge.bench.core.stats import paired_ratio, percentiles
from sbs_edge.bench.latency.sections import Series
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
    rows = [step.row("step", name, "", case), epoch.row("epoch", name, "", case)]
    tokens_a_step = tokens / max(1, options.examples // options.batch_size)
    for section, unit, amount in (
        ("rate", "examples/s", options.batch_size),
        ("token rate", "tokens/s", tokens_a_step),
    ):
        rates = [amount / ms * 1e3 for ms in step.rounds]
        rows.append(Row(section, name, "", case, unit, "higher", percentiles(rates)["p50"], rates))
    return rows


def _case(
    options: TrainBenchOptions, device: str, precision: str, pairs: str, document: dict[str, Any], say: Say
) -> None:
    case = f"{device} {precision}, batch {options.batch_size}"
    given = {
        "device": device, "precision": precision, "pairs": pairs, "shape": options.shape, "seed": options.seed,
        "batch_size": options.batch_size, "rationale_weight": options.rationale_weight,
    }  # fmt: skip
    cpus = sorted(os.sched_getaffinity(0))[-options.threads :]
    specs = {name: Spec(name, "", "", threads=options.threads, cpus=cpus, options=given) for name in _STEPS}
    workers: dict[str, Worker] = {}
    losses: dict[str, list[float]] = {}
    shares: dict[str, dict[str, list[int]]] = {}
    steps: dict[str, Series] = {}
    epochs: dict[str, Series] = {}

    def drop(name: str, failure: WorkerFailed) -> None:
        say(f"{case}: {name}: {failure}")
        document["systems"].append({"name": f"{name}, {case}", "status": "failed", "why": str(failure)})
        if name in workers:
            workers.pop(name).close()

    try:
        for name, spec in specs.items():
            say(f"{case}: loss curve of {name}")
            try:
                workers[name] = Worker(spec, _MODULE)
                workers[name].ask("open", timeout_s=600)
                losses[name] = workers[name].ask("curve", steps=options.steps, timeout_s=600)["losses"]
                shares[name] = workers[name].ask("padding")["padding"]
                document["systems"].append({"name": f"{name}, {case}", "status": "ok", "why": ""})
            except WorkerFailed as failure:
                drop(name, failure)
        for number in range(options.rounds):
            say(f"{case}: round {number + 1}")
            names = list(workers)
            for name in names[number % max(1, len(names)) :] + names[: number % max(1, len(names))]:
                order = {"seconds": 0.3, "least": 1, "warm": 1 if number == 0 else 0}
                try:
                    steps.setdefault(name, Series()).add(workers[name].ask("step", **order)["ns"])
                except WorkerFailed as failure:
                    drop(name, failure)
        for number in range(2):
            for name in list(workers):
                say(f"{case}: epoch {number + 1} of {name}")
                try:
                    epochs.setdefault(name, Series()).add(workers[name].ask("epoch", timeout_s=600)["ns"])
                except WorkerFailed as failure:
                    drop(name, failure)
    finally:
        for worker in workers.values():
            worker.close()
    rows: list[Row] = []
    for name in workers:
        used = sum(total[1] for total in shares[name].values())
        rows += _rows(name, case, options, used, steps[name], epochs[name])
        try:
            say(f"{case}: peak memory of {name}")
            rows += _peak(specs[name], case)
        except WorkerFailed as failure:
            document["systems"].append({"name": f"{name}, {case}, memory", "why": str(failure)})
    document["rows"] += [row.as_dict() for row in rows]
    document["losses"][case] = losses
    document["padding"] |= {
        f"{name}, {case}": {part: f"{1 - used / held:.1%}" for part, (held, used) in shares[name].items()}
        for name in workers
    }
    _judge(case, precision, losses, rows, document)


def _judge(
    case: str, precision: str, losses: dict[str, list[float]], rows: list[Row], document: dict[str, Any]
) -> None:
    """Loss curves against the two-forward step's, and the ratios that agreement allows."""
    base = losses.get("two-forward")
    agree: dict[str, bool] = {}
    for name, curve in losses.items():
        if base is None or name == "two-forward":
            continue
        difference = largest_difference(curve, base)
        agree[name] = difference <= _FLOAT_NOISE[precision]
        document["loss_curves"].append(
            {
                "case": f"{name}, {case}",
                "against": "two-forward",
                "largest_difference": difference,
                "limit": _FLOAT_NOISE[precision],
                "verdict": "equal within float noise" if agree[name] else "DIFFERENT",
            }
        )
    mine = {row.section: row for row in rows if row.system == "sbs-edge"}
    for other in rows:
        row = mine.get(other.section)
        if row is None or other.system == "sbs-edge" or other.section in ("rate", "token rate"):
            continue
        same = agree.get("sbs-edge", False)
        ratio = None
        if same and row.rounds and len(row.rounds) == len(other.rounds):
            ratio = asdict(paired_ratio(other.rounds, row.rounds))
        elif same and row.value > 0:
            value = other.value / row.value
            ratio = {"value": value, "low": value, "high": value, "rounds": 0}
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
    if options.shape not in SHAPES:
        raise UsageError(f"There is no shape {options.shape!r}; choose one of {', '.join(SHAPES)}.")
    unknown = [name for name in options.precisions if name not in _FLOAT_NOISE]
    if unknown or not options.precisions:
        raise UsageError(f"precisions are fp32 and bf16; found {', '.join(unknown) or 'nothing'}.")
    devices = _devices(options.device)
    document: dict[str, Any] = {
        "format": FORMAT,
        "kind": "train",
        **provenance(command),
        "model": {
            "shape": options.shape,
            "random_weights": True,
            "config": SHAPES[options.shape],
            "data": options.dataset or options.data,
        },
        "threads": options.threads,
        "cpus": sorted(os.sched_getaffinity(0))[-options.threads :],
        "seed": options.seed,
        "options": asdict(options),
        "systems": [],
        "rows": [],
        "ratios": [],
        "losses": {},
        "loss_curves": [],
        "padding": {},
    }
    pairs = make_pairs(options)
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "pairs.json"
        path.write_text(json.dumps(pairs), encoding="utf-8")
        for device in devices:
            for precision in options.precisions:
                _case(options, device, precision, str(path), document, say)
    return document
