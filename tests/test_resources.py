"""Processors and memory: affinity, control groups of both versions, resource limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.resources import cpu_quota, memory_limit, usable_cpus

ALLOWED = len(os.sched_getaffinity(0))
VERSION_2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
VERSION_1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def machine(root: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    """Write a file system with the parts of ``/proc`` and ``/sys`` that describe control groups."""
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("50000 100000", 0.5),
        ("150000 100000", 1.5),
        ("max 100000", None),
        ("", None),
        ("what 1", None),
        ("-1 5", None),
    ],
)
def test_version_2_in_a_container(tmp_path: Path, text: str, quota: float | None) -> None:
    root = machine(tmp_path, VERSION_2, "0::/\n", {"sys/fs/cgroup/cpu.max": text + "\n"})
    assert cpu_quota(root) == quota
    assert usable_cpus(root) == (ALLOWED if quota is None else min(ALLOWED, -int(-quota // 1)))


def test_the_least_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path, VERSION_2, "0::/kubepods/pod1/app\n",
        {"sys/fs/cgroup/kubepods/pod1/app/cpu.max": "max 100000",
         "sys/fs/cgroup/kubepods/pod1/cpu.max": "25000 100000", "sys/fs/cgroup/kubepods/cpu.max": "400000 100000",
         "sys/fs/cgroup/kubepods/pod1/app/memory.max": "536870912", "sys/fs/cgroup/kubepods/memory.max": "max"},
    )  # fmt: skip
    assert cpu_quota(root) == 0.25
    assert usable_cpus(root) == 1
    assert memory_limit(root) == 512 << 20


@pytest.mark.parametrize("group", ["/", "/docker/0123abc", "/../../elsewhere"])
def test_version_1_also_where_the_path_is_the_hosts(tmp_path: Path, group: str) -> None:
    root = machine(
        tmp_path, VERSION_1, f"4:memory:{group}\n2:cpu,cpuacct:{group}\n0::/\n",
        {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
         "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
         "sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n"},
    )  # fmt: skip
    assert cpu_quota(root) == 0.5
    assert memory_limit(root) == 256 << 20


def test_version_1_without_limits(tmp_path: Path) -> None:
    root = machine(
        tmp_path, VERSION_1, "4:memory:/\n2:cpu,cpuacct:/\n",
        {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
         "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
         "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
    )  # fmt: skip
    assert cpu_quota(root) is None
    assert memory_limit(root) is None


def test_a_group_mounted_below_the_hierarchys_root(tmp_path: Path) -> None:
    mounts = "30 24 0:26 /docker/app /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    root = machine(tmp_path, mounts, "0::/docker/app/inner\n", {"sys/fs/cgroup/inner/cpu.max": "20000 10000"})
    assert cpu_quota(root) == 2.0


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    mounts = r"30 24 0:26 / /sys/my\040groups rw - cgroup2 cgroup2 rw" + "\n"
    root = machine(tmp_path, mounts, "0::/\n", {"sys/my groups/cpu.max": "10000 10000"})
    assert cpu_quota(root) == 1.0


def test_a_machine_without_any_of_it(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert usable_cpus(tmp_path) == ALLOWED


@given(mounts=st.text(max_size=200), groups=st.text(max_size=200))
def test_whatever_proc_holds_there_is_at_least_one_thread(
    tmp_path_factory: pytest.TempPathFactory, mounts: str, groups: str
) -> None:
    root = tmp_path_factory.mktemp("root")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(mounts, errors="replace", encoding="utf-8")
    (root / "proc/self/cgroup").write_text(groups, errors="replace", encoding="utf-8")
    assert usable_cpus(root) == ALLOWED


def test_the_affinity_bounds_a_quota() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from sbs_edge.resources import usable_cpus; print(usable_cpus())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_ulimit_is_a_memory_limit() -> None:
    code = "from sbs_edge.resources import memory_limit; print(memory_limit())"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v 4000000; exec {sys.executable} -P -c '{code}'"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) <= 4000000 * 1024
