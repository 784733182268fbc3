"""Too little memory is told as that: exit code 1, never as a damaged bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sbs_edge.errors import IntegrityError
from sbs_edge.resources import lacks_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit is set on the address space")

CODE = """
import resource, sys
from sbs_edge.errors import SbsEdgeError
from sbs_edge.runtime.student import Student

def limit(extra):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

student = Student.load(sys.argv[1], "cpu-fp32", threads=1, prepacked_cache=False, max_batch_tokens=1 << 20)
if sys.argv[2] == "call":
    student.predict(["hot pump"])
    texts = [" ".join(["ice"] * 30)] * 20_000
    tokens = student.tokenize(texts)
    limit(8 << 20)
else:
    texts, tokens = ["hot pump"], None
    limit(int(sys.argv[3]))
try:
    student.predict(texts, tokens=tokens)
except SbsEdgeError as error:
    print(type(error).__name__, error.exit_code, error)
"""


def told(bundle: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE, str(bundle), *arguments],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


def test_a_graph_that_does_not_fit(students: Any, tmp_path: Path) -> None:
    wide = students.write_bundle(students.make_tiny(d_model=768, d_ff=3072), tmp_path / "wide")
    said = told(wide, "load", str(1 << 20))
    assert said.startswith("OutOfMemory 1 There is not enough memory to load the graph")
    assert "This process may use" in said


def test_a_call_that_does_not_fit(tiny_bundle: Path) -> None:
    said = told(tiny_bundle, "call")
    assert said.startswith("OutOfMemory 1 There is not enough memory for a call with input_ids (20000, ")
    assert "Lower max_batch_tokens" in said


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9"), True),
        (ImportError("libonnxruntime.so: failed to map segment from shared object"), True),
        (RuntimeError("Protobuf parsing failed"), False),
        (IntegrityError("the graph is refused"), False),
    ],
)  # fmt: skip
def test_messages_of_lacking_memory_are_known(error: BaseException, expected: bool) -> None:
    assert lacks_memory(error) is expected
