"""docs/scale.md: its measured figures are those of the committed results, and its sums follow from its table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def newest(pattern: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sorted((ROOT / "bench" / "results").glob(pattern))[-1].read_text())
    return found


def table() -> dict[str, float]:
    rows = re.findall(r"^\| ([a-z_, ]+?) \| [^|]+ \| ([\d., ]+) \|", TEXT, re.M)
    values: dict[str, float] = {}
    for names, numbers in rows:
        each = [numbers.replace(",", "")] if "," not in names else numbers.split(",")
        values |= {name.strip(): float(number) for name, number in zip(names.split(","), each, strict=True)}
    return values


def test_measured_figures_are_the_committed_ones() -> None:
    scale, values = newest("*-scale-*.json"), table()
    assert values["r"] == round(scale["rows"] / scale["steady_seconds"]["loop"])
    assert values["q"] == round(newest("serving-*.json")["scenarios"]["overload"]["peak_texts_per_s"])
    assert f"{100 * scale['steady_overhead']:.1f} % steady" in TEXT
    assert f"{scale['steady_scaling_1_to_2']:.2f} steady" in TEXT


def test_sums_follow_from_the_table() -> None:
    v = table()
    row = (v["t_in"] * v["p_in"] + v["t_out"] * v["p_out"]) / 1e6  # money for a row of the teacher's
    r, q, cores, use = 1000, 500, 8, 0.6  # what the text puts in
    assert r < v["r"] / 3
    assert q < v["q"] / 5
    sample, share = 1e5, 0.01
    scored = 1e9 / r / 3600
    replicas = round(1e5 / (q * cores * use))
    spent = sample * row + scored * v["c"] + share * 1e9 * row
    for number in (
        f"**{1e4 * row + 1e-9:.2f}**",
        f"N / a = {1e4 / v['a']:.0f} s",
        f"= {1e8 / r / 3600:.1f} core",
        f"**{1e8 / r / 3600 * v['c']:.2f}** at c",
        f"**{1e9 * row:,.0f}** money",
        f"= {1e9 / v['a'] / 86400:.0f}\ndays",
        f"**{sample * row:.2f}** money",
        f"= {sample / v['a'] / 60:.0f} minutes",
        f"= {scored:.0f} core hours = **{scored * v['c']:.1f}** money",
        f"= {1e9 / r / 200:.0f} s = {1e9 / r / 200 / 60:.0f} minutes",
        f"At u = 1 %: **{share * 1e9 * row:,.0f}**",
        f"**{spent:,.0f}**",
        f"{1e9 * 200 / 4e6:,.0f} units",
        f"{1e9 * 200 / 4e6 * 150 / 1e6:.1f} MB",
        f"{4e6 / 200 / r:.0f} s of work",
        f"**{replicas}** replicas",
        f"= {replicas * cores} cores = {replicas * cores * v['c']:.1f} money",
        f"{replicas * cores * v['c'] / (1e5 * 3.6) * 1e5:.1f} × 10^-5",
    ):
        assert number in TEXT, number


@pytest.mark.parametrize("symbol", ["r", "q", "c", "t_in", "t_out", "p_in", "p_out", "a"])
def test_every_symbol_has_a_value(symbol: str) -> None:
    assert table()[symbol] > 0
