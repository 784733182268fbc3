"""``answers.py BUNDLE TARGET TEXTS``: print this machine's probe, scores and rationales of a bundle as JSON.

Runs under the emulator of another processor too, so it imports the runtime alone.
"""

from __future__ import annotations

import json
import platform
import sys

from sbs_edge import Student
from sbs_edge.runtime.int8_products import products_saturate

texts = json.loads(sys.argv[3])
with Student.load(sys.argv[1], sys.argv[2], threads=1, prepacked_cache=False) as student:
    closed = student.manifest["labels"]["method"] in ("first-token", "trie")
    json.dump(
        {
            "machine": platform.machine(),
            "saturates": products_saturate(),
            "scores": student.label_scores(texts, truncate=True).tolist() if closed else [],
            "labels": [answer.label for answer in student.predict(texts, truncate=True)],
            "rationales": [answer.rationale for answer in student.explain(texts, truncate=True)],
        },
        sys.stdout,
    )
