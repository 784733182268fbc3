"""A document of 65,536 tokens needs the memory of its states and of one run of the encoder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

READ = """
import resource, sys
from sbs_edge.runtime.student import Student
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
student = Student.load(sys.argv[1], "cpu-int8", threads=1, prepacked_cache=False, eager=True)
student.predict("pump " * 300), student.explain("pump " * 300, 2)
loaded = peak()
text = "pump valve hot room " * 16383
answer = student.predict(text)
assert answer.n_input_tokens > 65500, answer.n_input_tokens
labelled = peak()
student.explain(text, 3)
print(loaded, labelled, peak())
"""


@pytest.mark.long
def test_a_document_of_65536_tokens_stays_under_400_mb(students: Any, tmp_path: Path) -> None:
    shape = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6, "num_decoder_layers": 6,
             "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}  # fmt: skip
    long = {"chunk": 512, "max_tokens": 65536, "overlap": 0.25, "header": "", "marker": False, "top_k": None,
            "trained": "never"}  # fmt: skip
    out = students.write_bundle(students.make_tiny(**shape), tmp_path / "b", long=long)
    done = subprocess.run(
        [sys.executable, "-P", "-c", READ, str(out)], capture_output=True, text=True, check=True
    )
    loaded, labelled, explained = map(float, done.stdout.split())
    assert labelled - loaded < 400, done.stdout
    assert explained - loaded < 400, done.stdout
