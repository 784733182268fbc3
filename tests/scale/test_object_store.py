"""Input and output on an S3 server, which is a process of its own: moto's, from any environment.

It is not in the ``dev`` extra because botocore wants an older python-dateutil than the constraints
hold: ``python -m venv store && store/bin/pip install -r constraints/object_store.txt``, then name
``store/bin/moto_server`` in ``SBS_EDGE_MOTO_SERVER``. One that happens to be on the PATH is not taken:
older releases answer Arrow's multipart uploads with an error.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from sbs_edge.bench.scale.bench import write_rows
from sbs_edge.errors import UsageError
from sbs_edge.scale.annotate import annotate_with_ray
from sbs_edge.scale.units import Folder, plan_units, read_unit, write_shard

SERVER = os.environ.get("SBS_EDGE_MOTO_SERVER")
needs_server = pytest.mark.skipif(SERVER is None, reason="no S3 server: see this file's first lines")


@pytest.fixture(scope="module")
def store():
    """The environment of a program that uses the server, on which the bucket ``rows`` exists."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    own = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": ""}
    process = subprocess.Popen(
        [SERVER, "-H", "127.0.0.1", "-p", str(port)],
        env=own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        from pyarrow import fs

        fs.FileSystem.from_uri("s3://rows?allow_bucket_creation=true")[0].create_dir("rows")
        yield {**os.environ}
    finally:
        process.terminate()
        process.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@needs_server
@pytest.mark.long
def test_a_pattern_on_the_store_names_the_rows_of_the_files(store):
    lines = [json.dumps({"id": i, "input": f"text {i}"}).encode() + b"\n" for i in range(40)]
    for place, part in (("2026-1", lines[:20]), ("2026-2", lines[20:]), ("2025-1", lines)):
        Folder(f"s3://rows/{place}").write("part-0.jsonl", b"".join(part))
    units = plan_units("s3://rows/2026-?/part-*.jsonl", 100)
    read = [item for unit in units for item in read_unit(unit)]
    assert [row["id"] for _, row in read] == list(range(40))
    assert len({place for place, _ in read}) == 40  # the two files have one base name
    write_shard("s3://rows/out", "part-0.parquet", [{"id": 1, "probabilities": {"a": 1.0}}])
    (unit,) = plan_units("s3://rows/out/*.parquet", 100)
    assert [row for _, row in read_unit(unit)] == [{"id": 1, "probabilities": '{"a": 1.0}'}]
    with pytest.raises(UsageError, match=r"No \.jsonl"):
        plan_units("s3://rows/2024-*/part-*.jsonl", 100)


@needs_server
@pytest.mark.long
def test_the_command_reads_and_writes_the_store_and_goes_on_after_a_loss(store, scale_bundle, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 2000)
    Folder("s3://rows/in").write("rows.jsonl", data.read_bytes())

    def run(source, out):
        done = subprocess.run(
            [sys.executable, "-m", "sbs_edge", "predict", str(scale_bundle), source, "--engine", "ray",
             "--out", out, "--workers", "1", "--shard-mb", "0.05"],
            env=store, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    run(str(data), str(tmp_path / "local"))
    totals = run("s3://rows/in/*.jsonl", "s3://rows/scored")
    assert totals["rows_run"] == 2000
    local = {p.name: p.read_bytes() for p in (tmp_path / "local").glob("part-*")}
    remote = Folder("s3://rows/scored")
    assert {n: remote.read(n) for n in remote.names() if n.startswith("part-")} == local
    assert len(local) > 2
    from pyarrow import fs

    lost = sorted(local)[1]
    fs.FileSystem.from_uri("s3://rows")[0].delete_file(f"rows/scored/{lost}")
    assert run("s3://rows/in/*.jsonl", "s3://rows/scored")["units_run"] == 1
    assert remote.read(lost) == local[lost]


def test_journals_are_never_laid_on_an_object_store(tmp_path):
    with pytest.raises(UsageError, match="journal=FOLDER"):
        annotate_with_ray(str(tmp_path), "s3://rows/out", None, None, {})
