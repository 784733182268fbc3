"""The stages of a session on a GPU. Each saves its results after every row, so that a crash loses nothing."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_edge.bench.kernels.cases import GPU_SHAPES, Case, make_inputs
from sbs_edge.bench.kernels.matmul_peak import Clock, copy_rate, product_rates
from sbs_edge.resources import usable_cpus

__all__ = [
    "SESSION_CASES",
    "SMALL_CASES",
    "Stage",
    "correctness",
    "kernels",
    "matmul",
    "sweep",
    "targets",
    "train",
]

_FIRST = GPU_SHAPES[:4]
_MAIN = (4096, 768, 32128)
SESSION_CASES = [
    *(Case(*shape, "bfloat16") for shape in _FIRST),
    Case(*_MAIN, "bfloat16", data="peaked"),
    Case(16384, 768, 250112, "bfloat16"),
    Case(*_MAIN, "float16"),
    Case(*_MAIN, "amp-bfloat16"),
    Case(16384, 768, 32128, "bfloat16", padding=0.3),
    Case(*_MAIN, "bfloat16", data="flat"),
    *(Case(*shape, "bfloat16") for shape in GPU_SHAPES[5:]),
]
SMALL_CASES = [Case(40, 16, 300)]


@dataclass(frozen=True, slots=True)
class Stage:
    """The conditions of a stage.

    Attributes:
        device: where it measures.
        small: a rehearsal on small shapes.
        save: takes what was found so far.
        say: takes a line of progress.
        seconds: time for the stage.
    """

    device: Any
    small: bool
    save: Callable[[Any], None]
    say: Callable[[str], None]
    seconds: float

    @property
    def gpu(self) -> bool:
        """True for an NVIDIA GPU."""
        return bool(self.device.type == "cuda")


def matmul(stage: Stage) -> None:
    """Measure the rates of the bare products, in the slices' shapes at several widths, and of a copy."""
    import torch

    clock, small, save = Clock(stage.device), stage.small, stage.save
    rows: list[dict[str, Any]] = []
    shapes = [(32, 16)] if small else [(4096, 768), (16384, 768), (65536, 768), (4096, 512), (4096, 1024)]
    widths = (64, 128) if small else (1536, 3072, 6144, 12288, 32128)
    types = (torch.float32,) if small else (torch.bfloat16, torch.float16)
    copy = copy_rate(clock, 1 << 22 if small else 4 << 30, 3 if small else 10)
    rows.append({"what": "copy, GB/s read and written", "together": copy["gb_per_s"]})
    for dtype in types:
        for n, d in shapes[: None if dtype == types[0] else 1]:
            for width in widths:
                repeats = 2 if small else 10
                try:
                    found = product_rates(clock, n, d, width, dtype, repeats, warm=1 if small else 3)
                except torch.OutOfMemoryError:
                    continue
                shape = f"N={n} D={d} Vc={width} {found['dtype']}"
                rows.append({"what": shape, "together": found["tflops"], **found["each"]})
                save(rows)
    save(rows)


def correctness(stage: Stage) -> None:
    """See :func:`sbs_edge.bench.gpu.checks.check_engines`."""
    from sbs_edge.bench.gpu.checks import check_engines

    check_engines(stage.device, stage.small, stage.save)


def kernels(stage: Stage) -> None:
    """Run the kernel benchmark over :data:`SESSION_CASES` in order of importance."""
    from sbs_edge.bench.kernels.bench import KernelOptions, measure_kernels
    from sbs_edge.bench.kernels.peers import names_for

    small = stage.small
    options = KernelOptions(
        cases=SMALL_CASES if small else SESSION_CASES,
        peers=names_for("eager,liger" if small else "all"),
        device=stage.device.type,
        rounds=2 if small else 10,
        calls=1 if small else 3,
        threads=1 if small else usable_cpus(),
        minutes=0.93 * stage.seconds / 60,
        prepare_s=90.0,
        slow_cases=1,
        graph_cases=3,
    )
    stage.save(measure_kernels(options, stage.say, save=stage.save))


def _step_ms(clock: Clock, inputs: Any, engine: str, workspace_mb: float | None, repeats: int) -> float:
    import torch

    from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy

    def call() -> None:
        loss = fused_linear_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            valid_indices=inputs.valid,
            engine=engine,
            workspace_mb=workspace_mb,
        ).total
        torch.autograd.grad(loss, (inputs.hidden, inputs.weight))

    for _ in range(2):
        call()
    clock.wait()
    return statistics.median(clock.ms(call)[0] for _ in range(repeats))


def _tiles(device: Any, itemsize: int) -> list[Any]:
    """Return the tiles to try: those of the table for the device, and their neighbours in warps and stages."""
    import torch

    from sbs_edge.kernels.tile_table import Tile, architecture, candidates, pick

    if device.type != "cuda":
        return [pick(90, itemsize, 64)]
    arch = architecture(torch.cuda.get_device_capability(device))
    shipped = list(candidates(arch, itemsize))
    more = [
        Tile(128, 128, 64, 4, 4), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3),
        Tile(128, 128, 32, 8, 4), Tile(64, 256, 64, 4, 3),
    ]  # fmt: skip
    return list(dict.fromkeys([*shipped, *more]))


# Each launch choice that no GPU has timed, switched off by itself.
_UNTIMED: tuple[dict[str, Any], ...] = (
    {"cap_registers": False}, {"row_blocks_a_group": 1 << 20}, {"cast_bytes": 16 << 20}, {"whole_waves": False}
)  # fmt: skip


Try = tuple[str, float | None, Any, str]  # engine, workspace in MiB, tile or changed launch choice, order


def _tries(stage: Stage, names: list[str], itemsize: int) -> list[Try]:
    """Return the choices to try: first the tiles, each of which is compiled once, then the sizes of the slices."""
    from sbs_edge.kernels import chunks

    workspaces = (1.0,) if stage.small else (24.0, 48.0, 96.0, 192.0, 384.0)
    tries: list[Try] = [(name, None, None, "") for name in names]
    if "triton" in names:
        tries += [("triton", None, change, "") for change in _UNTIMED]
        tries += [("triton", None, None, order) for order in chunks.CHUNKS]
        tries += [("triton", None, tile, "") for tile in _tiles(stage.device, itemsize)]
        tries += [("triton", workspaces[-1], None, order) for order in chunks.CHUNKS]
    return [*tries, *((name, mb, None, "") for name in names for mb in workspaces)]


def _tried(clock: Clock, inputs: Any, case: Case, chosen: Try, repeats: int) -> dict[str, Any]:
    """Return the row of one choice: its ms, or why it failed."""
    from sbs_edge.kernels import chunks
    from sbs_edge.kernels.tile_table import tuned, use

    engine, workspace, tile, order = chosen
    change = tile if isinstance(tile, dict) else {}
    row: dict[str, Any] = {
        "case": case.name,
        "engine": engine,
        "workspace, MiB": "planned" if workspace is None else workspace,
        "tile": "table" if tile is None or change else ",".join(map(str, tile)),
        "changed": ", ".join(f"{key}={value}" for key, value in change.items()),
        "order": order or "planned",
    }
    try:
        with (
            tuned(**change),
            nullcontext() if tile is None or change else use(tile),
            chunks.use(order) if order else nullcontext(),
        ):
            row["ms"] = _step_ms(clock, inputs, engine, workspace, repeats)
    except Exception as error:
        row["why"] = _reason(error, 160)
    return row


def _reason(error: Exception, most: int) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:most]}"


def sweep(stage: Stage) -> None:
    """Forward + backward over chunks, tiles, launch choices and workspaces; a row says why it failed."""
    import torch

    from sbs_edge.kernels.cross_entropy import available_engines

    names = [status.name for status in available_engines() if status.available and status.name != "reference"]
    clock = Clock(stage.device)
    rows: list[dict[str, Any]] = []
    shapes = ((16384, 768, 32128), GPU_SHAPES[0], GPU_SHAPES[3], _MAIN)
    for case in [Case(33, 16, 70)] if stage.small else [Case(*shape, "bfloat16") for shape in shapes]:
        inputs = make_inputs(case, stage.device, 0)
        for chosen in _tries(stage, names, inputs.hidden.element_size()):
            rows.append(_tried(clock, inputs, case, chosen, 2 if stage.small else 10))
            stage.save(rows)
            if "CUDA error" in rows[-1].get("why", ""):
                return
        del inputs
        if stage.gpu:
            torch.cuda.empty_cache()


def train(stage: Stage) -> None:
    """Compare the whole optimizer step of a t5-base-sized student with the two-forward step."""
    from sbs_edge.bench.training.bench import TrainBenchOptions, measure_train

    small = stage.small
    options = TrainBenchOptions(
        shape="tiny" if small else "flan-t5-base",
        batch_size=4 if small else 32,
        examples=8 if small else 128,
        steps=2 if small else 4,
        rounds=1 if small else 6,
        device=stage.device.type,
        precisions=("fp32",) if small else ("bf16",),
    )
    stage.save(measure_train(options, stage.say))


def targets(stage: Stage) -> None:
    """Export a student for the bundle targets of the device, and compare their answers with float32."""
    from sbs_edge.bench.core.shapes import random_student
    from sbs_edge.export.api import export
    from sbs_edge.export.targets import TARGETS, providers_here

    wanted: Sequence[str] = ("cuda-fp16", "cuda-bf16") if stage.gpu else ("cpu-int8",)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        student = random_student(
            "tiny" if stage.small else "t5-small", Path(work) / "student", n_validation=16
        )
        for name in wanted:
            row: dict[str, Any] = {"target": name}
            try:
                if not providers_here(TARGETS[name]):
                    raise RuntimeError(f"this onnxruntime has none of {', '.join(TARGETS[name].providers)}")
                bundle = Path(work) / name
                before = time.perf_counter()
                export(
                    student, bundle, targets=("cpu-fp32", name), max_drop=100.0, min_rationale_agreement=0.0,
                    say=stage.say,
                )  # fmt: skip
                row["export s"] = time.perf_counter() - before
                row |= _answers(bundle, name)
            except Exception as error:
                row["why"] = _reason(error, 200)
            rows.append(row)
            stage.save(rows)


def _answers(bundle: Path, name: str) -> dict[str, Any]:
    from sbs_edge.runtime.student import Student

    texts = [" ".join(f"w{5 + (7 * i + j) % 400}" for j in range(8 + i)) for i in range(16)]
    truth = [found.label for found in Student.load(bundle, target="cpu-fp32").predict(texts)]
    student = Student.load(bundle, target=name)
    labels = [found.label for found in student.predict(texts)]
    times = []
    for _ in range(10):
        before = time.perf_counter_ns()
        student.predict(texts[:1])
        times.append((time.perf_counter_ns() - before) / 1e6)
    return {
        "labels equal to fp32, %": 100.0
        * sum(a == b for a, b in zip(labels, truth, strict=True))
        / len(texts),
        "one label, ms": statistics.median(times),
    }
