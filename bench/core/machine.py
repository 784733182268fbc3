"""Provenance of a figure: the machine and its flags, versions, threads and the command.

The standard library suffices; where onnxruntime is installed, its int8 products are probed too.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sbs_edge.resources import cpu_quota, memory_limit
from sbs_edge.runtime.int8_products import int8_products
from sbs_edge.versions import installed_versions

__all__ = ["VERSIONED", "machine", "provenance", "slug", "versions"]

VERSIONED = (
    "sbs-edge",
    "numpy",
    "tokenizers",
    "onnxruntime",
    "torch",
    "transformers",
    "ctranslate2",
    "optimum",
    "optimum-onnx",
    "openvino",
    "nncf",
    "onnx",
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "onnxruntime-gpu",
)
_GPU_STATE = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,pstate"
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(index / name)) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _gpus(fields: str = "name,driver_version,memory.total") -> list[str]:
    """Return a line for each GPU with fields of nvidia-smi, without importing torch."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def machine() -> dict[str, Any]:
    """Describe the machine: processor, flags that decide speed, caches, memory, GPUs, load now."""
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "cpus_allowed": sorted(os.sched_getaffinity(0)),
        "cpu_quota": cpu_quota(),
        "int8_products": int8_products(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "flags_absent": [flag for flag in _FLAGS if flag not in flags],
        "caches": _caches(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_gb": round(pages / 1e9, 1),
        "memory_limit": memory_limit(),
        "kernel": platform.release(),
        "gpus": _gpus(),
        "gpu_state": _gpus(_GPU_STATE),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of every installed package that takes part in a benchmark."""
    return {"python": platform.python_version(), **installed_versions(*VERSIONED)}


def provenance(command: list[str] | None = None) -> dict[str, Any]:
    """Return machine and versions, with the time and the command (paths as they were given)."""
    given = command if command is not None else ["sbs-edge", *sys.argv[1:]]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": given,
        "machine": machine(),
        "versions": versions(),
    }


def slug(description: dict[str, Any]) -> str:
    """A short name of a machine for file names: ``xeon-6-207-2cpu``."""
    name = description["gpus"][0].split(",")[0] if description.get("gpus") else str(description["cpu"])
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    drop = {"intel", "r", "tm", "cpu", "processor", "amd", "nvidia", "core", "ghz"}
    kept = [word for word in words if word not in drop][:3] or ["machine"]
    return "-".join([*kept, f"{description['cpus']}cpu"])
