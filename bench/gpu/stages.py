"""The stages of a session on a GPU; each keeps what it has after every row, so that a crash loses nothing."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sbs_edge.bench.kernels.cases import GPU_SHAPES, Case, make_inputs
from sbs_edge.bench.kernels.matmul_peak import Clock, copy_rate, product_rates
from sbs_edge.resources import usable_cpus

__all__ = ["SESSION_CASES", "SMALL_CASES", "correctness", "kernels", "matmul", "sweep", "targets", "train"]

Save = Callable[[Any], None]
Say = Callable[[str], None]
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


def matmul(device: Any, small: bool, save: Save) -> list[dict[str, Any]]:
    """Rates of the bare products: the slices' shapes at several widths, and of a copy."""
    import torch

    clock = Clock(device)
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
    return rows


def correctness(device: Any, small: bool, save: Save) -> list[dict[str, Any]]:
    """See :func:`sbs_edge.bench.gpu.checks.check_engines`."""
    from sbs_edge.bench.gpu.checks import check_engines

    return check_engines(device, small, save)


def kernels(device: Any, small: bool, save: Save, seconds: float, say: Say) -> dict[str, Any]:
    """The kernel bench over :data:`SESSION_CASES` in order of importance."""
    from sbs_edge.bench.kernels.bench import KernelOptions, measure_kernels
    from sbs_edge.bench.kernels.peers import names_for

    options = KernelOptions(
        cases=SMALL_CASES if small else SESSION_CASES,
        peers=names_for("eager,liger" if small else "all"),
        device=device.type,
        rounds=2 if small else 10,
        calls=1 if small else 3,
        threads=1 if small else usable_cpus(),
        minutes=seconds / 60,
        prepare_s=90.0,
        slow_cases=1,
        graph_cases=3,
    )
    return measure_kernels(options, say, save=save)


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
    """Tiles to try: those shipped for the device, and their neighbours in warps and stages."""
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


# Each choice of the launches that no GPU has timed, switched off by itself.
_UNTIMED: tuple[dict[str, Any], ...] = (
    {"cap_registers": False}, {"row_blocks_a_group": 1 << 20}, {"cast_bytes": 16 << 20}, {"whole_waves": False}
)  # fmt: skip


def sweep(device: Any, small: bool, save: Save) -> list[dict[str, Any]]:
    """Forward + backward over chunks, tiles, launch choices and workspaces; a row says why it failed."""
    import torch

    from sbs_edge.kernels import chunks
    from sbs_edge.kernels.cross_entropy import available_engines
    from sbs_edge.kernels.tile_table import tuned, use

    names = [status.name for status in available_engines() if status.available and status.name != "reference"]
    clock = Clock(device)
    rows: list[dict[str, Any]] = []
    cases = (
        [Case(33, 16, 70)]
        if small
        else [
            Case(*shape, "bfloat16") for shape in ((16384, 768, 32128), GPU_SHAPES[0], GPU_SHAPES[3], _MAIN)
        ]
    )
    workspaces = (1.0,) if small else (24.0, 48.0, 96.0, 192.0, 384.0)
    for case in cases:
        inputs = make_inputs(case, device, 0)
        # What may be tuned first: the tiles, each of which is compiled once, then the slices' size.
        tries: list[tuple[str, float | None, Any, str]] = [(name, None, None, "") for name in names]
        if "triton" in names:
            tries += [("triton", None, change, "") for change in _UNTIMED]
            tries += [("triton", None, None, order) for order in chunks.CHUNKS]
            tries += [("triton", None, tile, "") for tile in _tiles(device, inputs.hidden.element_size())]
            tries += [("triton", workspaces[-1], None, order) for order in chunks.CHUNKS]
        tries += [(name, mb, None, "") for name in names for mb in workspaces]
        for engine, workspace, tile, order in tries:
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
                    row["ms"] = _step_ms(clock, inputs, engine, workspace, 2 if small else 10)
            except Exception as error:
                row["why"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
                if "CUDA error" in row["why"]:
                    rows.append(row)
                    save(rows)
                    return rows
            rows.append(row)
            save(rows)
        del inputs
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def train(device: Any, small: bool, save: Save, say: Say) -> dict[str, Any]:
    """Compare the whole optimizer step of a t5-base-sized student with the two-forward step."""
    from sbs_edge.bench.training.bench import TrainBenchOptions, measure_train

    options = TrainBenchOptions(
        shape="tiny" if small else "flan-t5-base",
        batch_size=4 if small else 32,
        examples=8 if small else 128,
        steps=2 if small else 4,
        rounds=1 if small else 6,
        device=device.type,
        precisions=("fp32",) if small else ("bf16",),
    )
    document = measure_train(options, say)
    save(document)
    return document


def targets(device: Any, small: bool, save: Save, say: Say) -> list[dict[str, Any]]:
    """Export a student for the bundle targets of the device, and compare their answers with float32."""
    from sbs_edge.bench.core.shapes import random_student
    from sbs_edge.export.api import export
    from sbs_edge.export.targets import TARGETS, providers_here

    wanted: Sequence[str] = ("cuda-fp16", "cuda-bf16") if device.type == "cuda" else ("cpu-int8",)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        student = random_student("tiny" if small else "t5-small", Path(work) / "student", n_validation=16)
        for name in wanted:
            row: dict[str, Any] = {"target": name}
            try:
                if not providers_here(TARGETS[name]):
                    raise RuntimeError(f"this onnxruntime has none of {', '.join(TARGETS[name].providers)}")
                bundle = Path(work) / name
                before = time.perf_counter()
                export(
                    student,
                    bundle,
                    targets=("cpu-fp32", name),
                    max_drop=100.0,
                    min_rationale_agreement=0.0,
                    say=say,
                )
                row["export s"] = time.perf_counter() - before
                row |= _answers(bundle, name)
            except Exception as error:
                row["why"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            rows.append(row)
            save(rows)
    return rows


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
