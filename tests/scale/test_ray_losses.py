"""Losses that a cluster survives: the driver, an actor for good, the address it runs at."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sbs_edge.bench.scale.bench import write_rows
from sbs_edge.errors import SbsEdgeError
from sbs_edge.scale import run as scale_run
from sbs_edge.scale.units import Folder, shard_name, unit_of

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Ray leaves sockets to the end

CLI = [sys.executable, "-P", "-m", "sbs_edge"]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.jsonl"))


def predict(bundle: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = [
        "--engine",
        "ray",
        "--out",
        str(out),
        "--workers",
        "2",
        "--worker-cpus",
        "0.5",
        "--shard-mb",
        "0.05",
    ]
    return [*CLI, "predict", str(bundle), str(data), *options, *more]


def test_a_driver_that_is_killed_leaves_whole_shards_and_the_command_goes_on(scale_bundle, tmp_path):
    pytest.importorskip("ray")
    data, out = write_rows(tmp_path / "rows.jsonl", 20_000), tmp_path / "out"
    command = predict(scale_bundle, data, out)
    driver = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while driver.poll() is None and len(shards(out) if out.exists() else []) < 4:
            time.sleep(0.01)
        assert driver.poll() is None, "the run ended before it could be killed"
    finally:
        driver.kill()  # SIGKILL to the driver alone: what Ray started notices by itself
        driver.wait()
    early = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards(out)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for path in shards(out) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"row-{i}" for i in range(20_000)]
    plan = json.loads((out / "_plan.json").read_text())
    totals = json.loads((out / "_done.json").read_text())
    assert totals["units"] == len(plan["units"]) == len(shards(out))
    assert totals["units_run"] <= len(plan["units"]) - 4
    # A dying actor may have finished a shard meanwhile; what stood there before was not made again.
    kept = [name for name, (mtime, _) in early.items() if (out / name).stat().st_mtime_ns == mtime]
    assert len(kept) >= 4
    assert all((out / name).read_bytes() == content for name, (_, content) in early.items())


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A head node in processes of its own, as ``ray start`` makes it; not ``ray stop``, which would end others' too."""
    pytest.importorskip("ray")
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # of the cluster and of who uses it
    home = tempfile.mkdtemp(prefix="ray-")  # pytest's own path is too long for Ray's sockets
    log = (tmp_path / "ray.log").open("wb")
    head = subprocess.Popen(
        [
            sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block",
            f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", f"--temp-dir={home}",
        ],
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while head.poll() is None and time.monotonic() < deadline:
            if b"Ray runtime started" in (tmp_path / "ray.log").read_bytes():
                break
            time.sleep(0.1)
        assert head.poll() is None, (tmp_path / "ray.log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        try:
            head.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


def test_a_cluster_gives_the_bytes_that_this_machine_gives(scale_bundle, cluster, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 2_000)
    outs = tmp_path / "here", tmp_path / "there"
    for out, more in zip(outs, ([], ["--ray-address", cluster]), strict=True):
        done = subprocess.run(
            predict(scale_bundle, data, out, *more), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    assert [path.name for path in shards(outs[0])] == [path.name for path in shards(outs[1])]
    assert len(shards(outs[0])) > 2
    for here, there in zip(*map(shards, outs), strict=True):
        assert here.read_bytes() == there.read_bytes()


class _Poisoned:
    """A worker that one unit takes down, every time."""

    def __init__(self, out: str, form: str) -> None:
        self._out, self._form = out, form

    def __call__(self, batch):
        unit = unit_of(batch)
        if unit.index == 2:
            os._exit(1)
        Folder(self._out).write(shard_name(unit, self._form), b'{"fine": true}\n')
        return {"figures": [json.dumps({"rows": 1, "errors": 0, "seconds": 0.0, "ended": time.time()})]}


def test_a_unit_that_takes_down_every_actor_ends_the_run_and_keeps_the_rest(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(scale_run, "UNIT_RETRIES", 1)
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"input": f"text {i}"}) + "\n" for i in range(4)))
    with pytest.raises(SbsEdgeError, match="run the same command again"):
        scale_run.run_units(
            _Poisoned,
            {},
            str(data),
            str(out),
            settings={},
            workers=1,
            shard_bytes=1 + len(data.read_bytes()) // 4,
        )
    assert "_done.json" not in {path.name for path in out.iterdir()}
    names = {path.name for path in out.iterdir()}
    assert names >= {"_plan.json"}
    assert all(path.read_bytes() == b'{"fine": true}\n' for path in shards(out))
    assert not any(name.endswith(".tmp") for name in names)
