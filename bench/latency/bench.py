"""``sbs-edge bench latency``: bundles and peers on the same weights, inputs, threads and minutes.

Order: the student is found (or made), converted for every peer, every system is loaded in a process
of its own and asked for its answers; only then the clock starts. What a section measures stands in
:mod:`sbs_edge.bench.latency.sections` and :mod:`sbs_edge.bench.latency.footprint`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.machine import provenance
from sbs_edge.bench.core.results import Row, new_document
from sbs_edge.bench.core.shapes import layers_of, shape_bundle, shape_student
from sbs_edge.bench.latency import footprint as latency_footprint
from sbs_edge.bench.latency import quality
from sbs_edge.bench.latency import sections as latency_sections
from sbs_edge.bench.latency.ratios import ratios
from sbs_edge.bench.latency.sections import Schedule
from sbs_edge.bench.latency.workers import (
    SECTIONS,
    WARM_SECTIONS,
    Benchmark,
    Entry,
    base_spec,
    make_inputs,
    peer_entries,
    start_workers,
    student_facts,
)
from sbs_edge.bench.peers.convert import digest
from sbs_edge.bench.peers.system import PEERS
from sbs_edge.errors import DataError, UsageError
from sbs_edge.runtime.manifest import read_manifest

__all__ = ["LatencyOptions", "measure_latency", "student_of"]

Say = Callable[[str], None]
# Shares of the time each section may take.
_SHARES = {"label": 0.42, "rationale": 0.2, "throughput": 0.16, "open_loop": 0.12, "cold_start": 0.1}


@dataclass(slots=True)
class LatencyOptions:
    """Conditions of the latency bench.

    Attributes:
        bundles: bundle directories.
        student: the student directory they were made from; looked for next to the bundle when None.
        shape: measure random weights of this shape instead of a bundle.
        encoder_layers: layers of the shape's encoder in place of its own; the full depth is measured beside them.
        decoder_layers: the same of the decoder.
        against: peers.
        targets: targets of each bundle; its default target when empty.
        threads: compute threads of every system.
        cpus: processors for the systems; the last ``threads`` allowed ones when empty.
        rows: validation rows for the accuracy.
        seed: of inputs, arrivals and random weights.
        prepare_only: make and check everything, time nothing.
        schedule: how long and how often.
    """

    bundles: tuple[Path, ...] = ()
    student: Path | None = None
    shape: str | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    against: tuple[str, ...] = tuple(PEERS)
    targets: tuple[str, ...] = ()
    threads: int = 1
    cpus: tuple[int, ...] = ()
    rows: int = 96
    seed: int = 0
    prepare_only: bool = False
    schedule: Schedule = field(default_factory=Schedule)


def student_of(bundle: Path, given: Path | None) -> Path | None:
    """Return the student directory of a bundle, as given or found next to it; None when there is none."""
    if given is not None:
        return given
    for name in ("student", "students/step-by-step", "step-by-step"):
        student = bundle.resolve().parent / name
        if (student / "sbs_edge.json").is_file():
            return student
    return None


def _our_entries(options: LatencyOptions, bundles: Sequence[Path], make: Callable[..., Any]) -> list[Entry]:
    entries = []
    for bundle in bundles:
        path = bundle / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            available, default = list(manifest["targets"]), manifest["default_target"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{bundle} is not a bundle: its manifest.json cannot be read ({error}). "
                "Give a directory that 'sbs-edge export' wrote."
            ) from error
        for target in options.targets or (default,):
            tail = f" ({bundle.name})" if len(bundles) > 1 else ""
            name = f"sbs-edge:{target}{tail}"
            if target not in available:
                entries.append(Entry(name, None, why=f"the bundle has no target {target!r}"))
            else:
                spec = make(system=f"sbs-edge:{target}", artifact=str(bundle.resolve()))
                explains = {"explainer", "decoder_step"} & set(manifest["targets"][target])
                sections = SECTIONS if explains else tuple(part for part in SECTIONS if part != "rationale")
                entries.append(Entry(name, spec, sections=sections))
    return entries


# Smaller exports of the same student. Without rationales, size, memory and cold start matter; with them the
# output layer does, because it is most of the cost of a token.
_IN_USE = {"prune_vocabulary": True, "prune_input_vocabulary": True}
_SMALLER: tuple[tuple[str, str, dict[str, bool], tuple[str, ...]], ...] = (
    ("cpu-int8", "label only", {"label_only": True}, ("cold_start",)),
    (
        "cpu-int8",
        "label only, input vocabulary pruned",
        {"label_only": True, "prune_input_vocabulary": True},
        ("cold_start",),
    ),
    ("cpu-int8", "vocabulary pruned", _IN_USE, ("rationale",)),
    ("cpu-int4", "vocabulary pruned", _IN_USE, ("rationale",)),
)


def _smaller_entries(student: Path, make: Callable[..., Any], say: Say) -> list[Entry]:
    """Return smaller exports of the same student, each measured where its size matters."""
    entries = []
    for target, name, switches, sections in _SMALLER:
        bundle = shape_bundle(student, [target], say, **switches)
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        spec = make(system=f"sbs-edge:{target}", artifact=str(bundle))
        entry = Entry(f"sbs-edge:{target} ({name})", spec, sections=sections)
        if manifest.get("vocabulary"):
            entry.facts["vocabulary"] = manifest["vocabulary"]
        entries.append(entry)
    return entries


def _full_depth_entries(options: LatencyOptions, shape: str, say: Say) -> list[Entry]:
    """Return our bundle and CTranslate2 at the shape's full depth, so that a cut is not credited to the runtime."""
    student = shape_student(shape, options.seed, say).resolve()
    card, config = student_facts(student)
    make = partial(base_spec, student, card, config, threads=options.threads, cpus=_cpus(options))
    golds = [row["label"] for row in make_inputs(student, card, options.rows, options.seed).rows]
    bundle = shape_bundle(student, ["cpu-int8"], say)
    entries = [Entry("sbs-edge:cpu-int8", make(system="sbs-edge:cpu-int8", artifact=str(bundle)))]
    entries += peer_entries([name for name in options.against if name == "ctranslate2"], student, make, say)
    encoder, decoder = layers_of(shape)
    for entry in entries:
        entry.name += f" (full depth, {encoder}/{decoder})"
        entry.sections, entry.golds = ("label", "rationale"), golds
    return entries


def _cpus(options: LatencyOptions) -> list[int]:
    allowed = sorted(os.sched_getaffinity(0))
    if options.cpus:
        absent = [cpu for cpu in options.cpus if cpu not in allowed]
        if absent:
            raise UsageError(f"Processor {absent[0]} is not among the allowed ones: {allowed}.")
        return list(options.cpus)
    return allowed[-options.threads :]


def set_up(options: LatencyOptions, say: Say) -> tuple[Benchmark, str]:
    """Find or make student and bundles, convert, load; return the benchmark and the task's comparison."""
    if bool(options.shape) == bool(options.bundles):
        raise UsageError("Give either bundles to measure or a shape for random weights.")
    for path in options.bundles:
        read_manifest(path)  # first: a mistyped path has no student next to it either
    asked = (options.encoder_layers, options.decoder_layers)
    if not options.shape and asked != (None, None):
        raise UsageError(
            "The numbers of layers are those of a random student: give a shape, or leave them out. A bundle has the layers "
            "that it was trained with."
        )
    shape = options.shape
    if options.shape:
        student: Path | None = shape_student(options.shape, options.seed, say, *asked)
        layers, full = layers_of(options.shape, *asked), layers_of(options.shape)
        if layers != full:
            shape = f"{options.shape} at {layers[0]}/{layers[1]} layers"
    else:
        student = student_of(options.bundles[0], options.student)
    if student is None:
        raise UsageError(
            f"The student directory of {options.bundles[0]} is not next to it (student, step-by-step "
            "or students/step-by-step). Peers and accuracy need its "
            "checkpoint and validation rows: give the student directory."
        )
    card, config = student_facts(student)
    make = partial(base_spec, student.resolve(), card, config, threads=options.threads, cpus=_cpus(options))
    bundles = list(options.bundles)
    smaller: list[Entry] = []
    why = ""
    if options.shape:
        try:
            bundles = [shape_bundle(student, options.targets or ("cpu-int8",), say)]
            smaller = _smaller_entries(student, make, say)
        except Exception as error:  # the peers are measured all the same
            if os.environ.get("SBS_EDGE_DEBUG"):
                raise
            why = f"{type(error).__name__}: {error}"
    entries = _our_entries(options, bundles, make) if bundles else [Entry("sbs-edge", None, why=why)]
    entries += smaller
    entries += peer_entries(options.against, student.resolve(), make, say)
    if options.shape and shape != options.shape:
        entries += _full_depth_entries(options, options.shape, say)
    benchmark = Benchmark(
        entries,
        make_inputs(student, card, options.rows, options.seed),
        {
            "student": student.name,
            "shape": shape,
            "random_weights": bool(card.get("training", {}).get("random_weights")),
            "weights_sha256": digest(student),
            "task": card["task"]["name"],
            "label_kind": card["task"]["label_kind"],
            "config": {key: config.get(key) for key in ("d_model", "d_kv", "d_ff", "num_layers",
                       "num_decoder_layers", "num_heads", "vocab_size", "feed_forward_proj",
                       "tie_word_embeddings")},
        },
    )  # fmt: skip
    if "transformers" not in options.against:
        benchmark.reference = peer_entries(["transformers"], student.resolve(), make, say)[0]
    start_workers([*entries, *([benchmark.reference] if benchmark.reference else [])], say)
    return benchmark, str(card["task"].get("compare", "text"))


def _system(entry: Entry) -> dict[str, Any]:
    kept = ("precision", "seconds", "setting", "quality", "vocabulary", "peak_rss_mb", "anonymous_rss_mb")
    facts = {key: entry.facts[key] for key in kept if key in entry.facts}
    if "seconds" in facts:
        facts["conversion_seconds"] = facts.pop("seconds")
    return {"name": entry.name, "status": "failed" if entry.why else "ok", "why": entry.why, **facts}


def measure_latency(
    options: LatencyOptions, say: Say = lambda _: None, command: list[str] | None = None
) -> dict[str, Any]:
    """Run the bench; return its document (see :mod:`sbs_edge.bench.core.results`).

    Raises:
        UsageError: neither or both of bundles and shape; an unknown peer or processor.
        DataError: a bundle or student that cannot be read.
    """
    began = provenance(command)
    benchmark, compare = set_up(options, say)
    schedule, rows = options.schedule, []
    try:
        say("asking every system for its answers")
        rows += quality.measure(benchmark, compare, schedule.rationale_steps)
        if benchmark.reference is not None:
            benchmark.reference.dismiss()
        benchmark.release(*WARM_SECTIONS)
        clock = time.monotonic()
        if not options.prepare_only:
            rows += latency_sections.label(benchmark, schedule, _SHARES["label"], say)
            rows += latency_sections.rationale(benchmark, schedule, _SHARES["rationale"], say)
            benchmark.release("throughput", "open_loop")
            rows += latency_sections.throughput(benchmark, schedule, _SHARES["throughput"], say)
            rows += latency_sections.open_loop(benchmark, schedule, _SHARES["open_loop"], say)
            rows += latency_footprint.cold_start(benchmark, schedule, _SHARES["cold_start"], say)
        rows += latency_footprint.disk(benchmark)
        rows += latency_footprint.installed(benchmark)
        compared = [row.as_dict() for row in ratios(benchmark, rows)]
        timed = time.monotonic() - clock
    finally:
        benchmark.close()
    return new_document(
        "latency", benchmark.model, threads=options.threads, cpus=_cpus(options), began=began,
        seed=options.seed, finished_load_average=[round(load, 2) for load in os.getloadavg()],
        validation_rows=len(benchmark.inputs.rows), schedule=asdict(schedule), timed_seconds=round(timed, 1),
        systems=[_system(entry) for entry in benchmark.entries], rows=[_rounded(row) for row in rows],
        ratios=compared,
    )  # fmt: skip


def _rounded(row: Row) -> dict[str, Any]:
    """A row with figures cut to six significant digits: the rest is noise and bulk."""

    def cut(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, list):
            return [cut(item) for item in value]
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        return value

    content: dict[str, Any] = cut(row.as_dict())
    return content
