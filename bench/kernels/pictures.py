"""One picture a case: time, extra memory and gradient error of every loss. matplotlib is imported only here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sbs_edge.bench.core.results import Row, rows_of
from sbs_edge.bench.kernels.peers import OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["kernel_pictures"]

_LEAST_MIB = 0.5


def _points(rows: list[Row], case: str) -> dict[tuple[str, str], dict[str, Row]]:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.case == case:
            found.setdefault((row.system, row.variant), {})[row.section] = row
    wanted = {"forward + backward", "extra memory", "gradient error"}
    return {key: sections for key, sections in found.items() if wanted <= set(sections)}


def _pareto(points: dict[tuple[str, str], dict[str, Row]]) -> set[tuple[str, str]]:
    """Return the losses that no other beats in time, memory and error at once; noise counts as equal."""

    def figures(key: tuple[str, str]) -> tuple[float, float, float]:
        sections = points[key]
        return (
            sections["forward + backward"].value,
            max(sections["extra memory"].value, _LEAST_MIB),
            sections["gradient error"].value,
        )

    def beaten(key: tuple[str, str]) -> bool:
        ms, mib, error = figures(key)
        others = [figures(other) for other in points if other != key]
        return any(
            o_ms <= 1.02 * ms
            and o_mib <= 1.05 * mib
            and o_error <= 1.1 * error
            and (o_ms < ms / 1.05 or o_mib < mib / 1.05)
            for o_ms, o_mib, o_error in others
        )

    return {key for key in points if not beaten(key)}


def kernel_pictures(document: dict[str, Any]) -> list[tuple[str, Figure, str]]:
    """Time against extra memory, gradient error as colour; a ring marks what no other loss beats."""
    import matplotlib as mpl

    mpl.use("Agg", force=False)
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = rows_of(document)
    found = []
    for case in document["cases"]:
        points = _points(rows, case["name"])
        if not points:
            continue
        figure = Figure(figsize=(9.0, 5.0), layout="constrained")
        axis = figure.subplots()
        best = _pareto(points)
        keys = sorted(points, key=lambda key: points[key]["forward + backward"].value)
        errors = [
            math.log10(max(points[key]["gradient error"].extra.get("times_plain") or 1.0, 0.1))
            for key in keys
        ]
        times = [points[key]["forward + backward"].value for key in keys]
        memory = [max(points[key]["extra memory"].value, _LEAST_MIB) for key in keys]
        marks = axis.scatter(times, memory, c=errors, cmap="RdYlGn_r", vmin=-1, vmax=2, s=130, zorder=3)
        names = []
        for number, (key, x, y) in enumerate(zip(keys, times, memory, strict=True), 1):
            if key in best:
                axis.scatter([x], [y], s=260, facecolors="none", edgecolors="black", zorder=4)
            weight = "bold" if key[0].startswith(OURS) else "normal"
            axis.annotate(str(number), (x, y), ha="center", va="center", fontsize=7, weight=weight, zorder=5)
            wrong = points[key]["gradient error"].extra.get("wrong")
            label = ", ".join(part for part in key if part) + (" (fails the tolerance)" if wrong else "")
            names.append(Line2D([], [], linestyle="none", label=f"{number}  {label}"))
        axis.legend(
            handles=names,
            fontsize=7,
            handlelength=0,
            handletextpad=0,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.margins(0.15)
        axis.set_xlabel("forward + backward, ms")
        axis.set_ylabel("extra memory, MiB")
        axis.set_title(case["name"], fontsize=10)
        axis.grid(alpha=0.3)
        bar = figure.colorbar(marks, ax=axis, location="bottom", shrink=0.6, pad=0.02)
        bar.set_label("log10 of gradient error over plain torch's")
        slug = "-".join("".join(c if c.isalnum() else " " for c in case["name"]).split())
        caption = f"{case['name']}: lower left is better; a ring marks what no other loss beats in all three."
        found.append((f"pareto-{slug}", figure, caption))
    return found
