"""Processors and memory that this process may use: affinity, control groups and resource limits.

A container with half a processor sees every core of its host, but threads beyond its quota only take turns. So
defaults come from here and not from ``os.cpu_count()``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

__all__ = [
    "ProcessPlan",
    "cpu_quota",
    "lacks_memory",
    "limit_torch_threads",
    "memory_advice",
    "memory_limit",
    "plan_processes",
    "share_cpus",
    "usable_cpus",
]

_own_share: int | None = None  # threads that this process keeps to, beside others of the same work

# Messages of onnxruntime, the C++ library and the dynamic loader when memory cannot be allocated.
_NO_MEMORY = (
    "bad_alloc", "failed to allocate memory", "cannot allocate memory", "out of memory", "enomem",
    "failed to map segment",
)  # fmt: skip


def usable_cpus(root: Path = Path("/")) -> int:
    """Return how many threads can run at once: the smaller of affinity and quota, rounded up.

    Args:
        root: the file system to read ``proc`` and ``sys`` from.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    limits = [allowed, *([] if quota is None else [-int(-quota // 1)]), *([_own_share] if _own_share else [])]
    return max(1, min(limits))


def share_cpus(threads: int | None) -> None:
    """Keep this process to ``threads`` threads from now on, because others do the same work beside it; None: no limit.

    Every default taken from :func:`usable_cpus` follows it.
    """
    global _own_share
    _own_share = threads


class ProcessPlan(NamedTuple):
    """The spread of a number of equal tasks over one machine."""

    processes: int
    threads: int  # of each process


def plan_processes(tasks: int, memory_each: int, threads: int | None = None) -> ProcessPlan:
    """Return how many processes run at once, and their threads, so that neither processors nor memory run out.

    Args:
        tasks: tasks to be done, at least 1.
        memory_each: bytes that one task needs at most.
        threads: threads of each; None: the processors shared out evenly.

    Example:
        >>> plan_processes(1, memory_each=1 << 30).processes
        1

    """
    cpus = usable_cpus()
    memory = memory_limit()
    if memory is None and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fitting = cpus if memory is None else int(0.8 * memory) // memory_each
    processes = max(1, min(tasks, cpus // (threads or 1), fitting))
    return ProcessPlan(processes, threads or max(1, cpus // processes))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many processors the control groups (cgroups) grant, such as 0.5; None if there is no limit.

    Reads ``cpu.max`` (version 2) or ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` (version 1) of this process's
    group and of every group above it; the smallest counts.
    """
    found = []
    for folder in _groups("cpu", root):
        limits = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        quota, period = [*map(_whole, limits), None, None][:2]
        if quota and period:
            found.append(quota / period)
    return min(found, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that control groups and ``ulimit -v`` allow; None if there is no limit.

    Reads ``memory.max`` (version 2) or ``memory.limit_in_bytes`` (version 1).
    """
    found = []
    for folder in _groups("memory", root):
        for word in _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes"):
            limit = _whole(word)
            if limit and limit < 1 << 60:  # version 1 writes "no limit" as a number near 2 ** 63
                found.append(limit)
    try:
        import resource
    except ImportError:  # Windows
        return min(found, default=None)
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY:
        found.append(own)
    return min(found, default=None)


def lacks_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that memory could not be allocated."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(part in text for part in _NO_MEMORY)


def memory_advice() -> str:
    """Return advice for a user who has run out of memory."""
    limit = memory_limit()
    known = f"This process may use {limit >> 20} MB" if limit else "No limit is set on this process"
    return f"{known}; docs/bundle.md says what a bundle needs."


def limit_torch_threads(threads: int | None = None) -> None:
    """Set torch's compute threads to ``threads``; None: torch's default, but no more than the CPU quota allows."""
    import torch

    if threads is None and cpu_quota() is None and _own_share is None:
        return
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cpus()))


def _whole(word: str) -> int | None:
    """Return a positive whole number, or None for ``max``, -1 and other values that are not a limit."""
    return int(word) if word.isascii() and word.isdigit() and int(word) > 0 else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the directories of this process's groups that may limit ``controller``, up to the mount."""
    own: dict[str, str] = {}  # controller -> path of the group; "" is version 2's
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        own.update(dict.fromkeys(names.split(","), path))
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        version2 = kind[0] == "cgroup2"
        if not version2 and not (kind[0] == "cgroup" and controller in kind[2].split(",")):
            continue
        group = own.get("" if version2 else controller)
        if group is None:
            continue
        mount = root / _unescaped(fields[4]).lstrip("/")
        yield from _upwards(mount, _unescaped(fields[3]), group)


def _upwards(mount: Path, mounted: str, group: str) -> Iterator[Path]:
    """Yield ``group`` and its parents below ``mount``, where the group ``mounted`` is what is mounted there."""
    try:
        relative = PurePosixPath(group).relative_to(mounted)
    except ValueError:  # the path is the host's and the mount is the container's own group
        relative = PurePosixPath()
    if ".." in relative.parts:
        relative = PurePosixPath()
    yield from (mount / part for part in (relative, *relative.parents))


def _unescaped(field: str) -> str:
    r"""Return a field of mountinfo with its octal escapes (``\040`` is a space) resolved."""
    head, *rest = field.split("\\")
    return head + "".join(
        chr(int(part[:3], 8)) + part[3:] if part[:3].isdigit() else "\\" + part for part in rest
    )
