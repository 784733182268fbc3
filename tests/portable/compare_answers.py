"""``compare_answers.py REFERENCE OTHER NAME``: fail unless labels and rationales are equal; say how far scores moved."""

from __future__ import annotations

import json
import sys
from pathlib import Path

reference, other = (json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:3])
moved = max(
    (
        abs(a - b)
        for rows in zip(reference["scores"], other["scores"], strict=True)
        for a, b in zip(*rows, strict=True)
    ),
    default=0.0,
)
wrong = [name for name in ("labels", "rationales") if reference[name] != other[name]]
print(
    f"{sys.argv[3]} ({other['machine']}): scores moved by at most {moved:.3g}, int8 products "
    f"{'saturate' if other['saturates'] else 'are exact'}, {', '.join(wrong) or 'nothing'} different"
)
sys.exit(bool(wrong))
