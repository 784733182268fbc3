"""``sbs-edge doctor``: what is installed, what works, what is missing and the command that adds it."""

from __future__ import annotations

import os
import platform
import sys
from importlib import util
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from sbs_edge import __version__
from sbs_edge.cli._common import JsonOption, print_json
from sbs_edge.resources import cpu_quota, memory_limit, usable_cpus
from sbs_edge.runtime.int8_products import int8_products
from sbs_edge.runtime.prepacked import cache_directory, max_bytes, usage
from sbs_edge.versions import installed_versions

__all__ = ["diagnose", "register"]

# distribution, module to look for, extra that brings it, what is lost without it
_PACKAGES: tuple[tuple[str, str, str, str], ...] = (
    ("onnxruntime", "onnxruntime", "cpu", "predict and serve on CPU"),
    ("onnxruntime-gpu", "onnxruntime", "gpu", "predict and serve on NVIDIA GPUs"),
    ("torch", "torch", "train", "training and export"),
    ("triton", "triton", "train", "kernels on NVIDIA GPUs"),
    ("transformers", "transformers", "train", "training and export"),
    ("accelerate", "accelerate", "train", "training"),
    ("datasets", "datasets", "train", "Hugging Face data sets"),
    ("pyarrow", "pyarrow", "train", "Parquet files"),
    ("peft", "peft", "train", "LoRA"),
    ("matplotlib", "matplotlib", "train", "pictures in reports"),
    ("onnx", "onnx", "export", "export"),
    ("onnxruntime-extensions", "onnxruntime_extensions", "single-file", "the tokenizer inside the graph"),
    ("optimum-onnx", "optimum.onnxruntime", "optimum", "checks against optimum's loader"),
    ("starlette", "starlette", "serve", "the HTTP service"),
    ("uvicorn", "uvicorn", "serve", "the HTTP service"),
    ("prometheus-client", "prometheus_client", "serve", "metrics"),
    ("httpx", "httpx", "teacher", "annotation by an OpenAI-compatible teacher"),
    ("ctranslate2", "ctranslate2", "bench", "a peer in `bench latency`"),
    ("openvino", "openvino", "bench", "a peer in `bench latency`"),
    ("liger-kernel", "liger_kernel", "bench", "a peer in `bench kernels`"),
    ("ray", "ray", "scale", "`--engine ray`"),
)

_PRODUCTS = {
    "exact": "exact on this CPU",
    "corrected": "saturate on this CPU (no VNNI); bundles are loaded with exact ones, which take a little longer",
}


def _cpu() -> dict[str, Any]:
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    flags = set(value.split())
                elif name.strip() == "model name":
                    model = value.strip()
    except OSError:
        pass
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
    return {
        "model": model,
        "cores": os.cpu_count(),
        "features": [f for f in wanted if f in flags],
        "quota": cpu_quota(),
        "threads": usable_cpus(),
        "int8_products": int8_products(),
    }


def _memory() -> dict[str, int | None]:
    try:
        installed: int | None = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        installed = None
    return {"installed_bytes": installed, "limit_bytes": memory_limit()}


def _prepacked() -> dict[str, Any]:
    try:
        entries, size = usage()
    except RuntimeError:  # no home directory
        return {}
    return {"directory": str(cache_directory()), "entries": entries, "bytes": size, "max_bytes": max_bytes()}


def _providers() -> list[str]:
    if util.find_spec("onnxruntime") is None:
        return []
    from sbs_edge.runtime.ort import onnxruntime_module

    onnxruntime = onnxruntime_module()

    return list(onnxruntime.get_available_providers())


def _engines() -> list[dict[str, Any]]:
    if util.find_spec("torch") is None:
        return []
    from sbs_edge.kernels.cross_entropy import available_engines

    return [engine._asdict() for engine in available_engines()]


def _gpus() -> list[dict[str, Any]]:
    if util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(index),
            "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(index)),
            "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
        }
        for index in range(torch.cuda.device_count())
    ]


def _warnings() -> list[str]:
    if len(installed_versions("onnxruntime", "onnxruntime-gpu")) < 2:
        return []
    return [
        "onnxruntime and onnxruntime-gpu are both installed. They write the same files, so that the one installed last "
        "is what runs, and removing either breaks the other. Remove both (pip uninstall -y onnxruntime "
        "onnxruntime-gpu), then install the one this machine needs."
    ]


def diagnose() -> dict[str, Any]:
    """Return what is installed and what works, as plain values."""
    return {
        "warnings": _warnings(),
        "sbs_edge": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "cpu": _cpu(),
        "memory": _memory(),
        "prepacked_cache": _prepacked(),
        "gpus": _gpus(),
        "providers": _providers(),
        "loss_engines": _engines(),
        "packages": [
            {
                "name": name,
                "version": installed_versions(name).get(name),
                "purpose": purpose,
                "add": f"pip install 'sbs-edge[{extra}]'",
            }
            for name, _, extra, purpose in _PACKAGES
        ],
    }


def _show(report: dict[str, Any]) -> None:
    console = Console()
    for warning in report["warnings"]:
        console.print(f"[bold red]warning:[/] {warning}", highlight=False)
    cpu = report["cpu"]
    console.print(f"sbs-edge {report['sbs_edge']}, Python {report['python']}, {report['platform']}")
    features = " ".join(cpu["features"]) or "no vector features known"
    console.print(f"CPU: {cpu['model']}, {cpu['cores']} cores, {features}")
    quota = f"a quota of {cpu['quota']:g} processors" if cpu["quota"] else "no CPU quota"
    console.print(f"Threads by default: {cpu['threads']} ({quota})")
    if cpu["int8_products"]:
        console.print(f"int8 products: {_PRODUCTS[cpu['int8_products']]}")
    memory, stored = report["memory"], report["prepacked_cache"]
    limit = f"limited to {memory['limit_bytes'] / 2**20:.0f} MiB" if memory["limit_bytes"] else "no limit set"
    if memory["installed_bytes"]:
        console.print(f"Memory: {memory['installed_bytes'] / 2**30:.1f} GiB, {limit}")
    if stored:
        console.print(
            f"Pre-packed weights: {stored['entries']} entries, {stored['bytes'] / 2**20:.0f} of at most "
            f"{stored['max_bytes'] / 2**20:.0f} MiB in {stored['directory']}",
            soft_wrap=True,
        )
    for gpu in report["gpus"]:
        console.print(f"GPU: {gpu['name']}, {gpu['capability']}, {gpu['memory_gib']} GiB")
    if not report["gpus"]:
        console.print("GPU: none that torch can use")
    console.print(f"Execution providers: {', '.join(report['providers']) or 'none (no onnxruntime)'}")
    if report["loss_engines"]:
        engines = Table("loss engine", "works", "why", title="Fused linear + cross-entropy")
        for engine in report["loss_engines"]:
            engines.add_row(
                str(engine["name"]), "yes" if engine["available"] else "no", str(engine.get("reason", ""))
            )
        console.print(engines)
    packages = Table("package", "version", "for", "to add it", title="Packages")
    for package in report["packages"]:
        missing = package["version"] is None
        packages.add_row(
            package["name"],
            "[red]absent[/]" if missing else package["version"],
            package["purpose"],
            package["add"].replace("[", "\\[") if missing else "",
        )
    console.print(packages)


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def doctor(json: JsonOption = False) -> None:
        """Say what is installed, which engines and providers work, and what would add the rest.

        Example: sbs-edge doctor --json
        """
        report = diagnose()
        if json:
            print_json(report)
        else:
            _show(report)
