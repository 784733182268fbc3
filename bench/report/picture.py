"""The README's picture: accuracy with and without rationales, and label latency of ours and the peers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.results import load_document, rows_of

__all__ = ["ACCURACY", "LATENCY", "PICTURE", "accuracy_bars", "latency_bars", "peers_svg"]

ACCURACY = "builtin-2026-11-25.json"
LATENCY = "amd-epyc-2core-t5-small-2026-11-23.json"
PICTURE = Path("docs/pictures/peers.svg")
_CASE = "batch 1, 64 tokens"
_OURS, _OTHER, _WORSE = "#3f51b5", "#9e9e9e", "#dcdcdc"
_LEAST_AGREEMENT = 95.0  # % of labels equal to fp32: the tolerance of the latency benchmark on random weights
# Matplotlib numbers the parts of an SVG from a random salt and adds the date: with both fixed, equal
# results give equal bytes. Text stays text, so that the picture can be read out and searched.
_STYLE = {"svg.hashsalt": "sbs-edge", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}

Bar = tuple[str, float, str]  # name, value, color


def accuracy_bars(document: dict[str, Any]) -> list[Bar]:
    """Return the label accuracy in % of the students with and without rationales."""
    names = {"step-by-step": "with\nrationales", "label-only": "labels\nonly"}
    found = {row.system: row.value for row in rows_of(document) if row.case == "label accuracy"}
    colors = {"step-by-step": _OURS, "label-only": _OTHER}
    return [(names[system], found[system], colors[system]) for system in names]


def latency_bars(document: dict[str, Any]) -> list[Bar]:
    """Return the label latency in ms of every system, fastest first.

    Peers are asked for the label and the end-of-sequence token. A system whose labels differ from the fp32
    weights' is drawn paler and marked with an asterisk: its speed is not a fair comparison.
    """
    systems = {system["name"]: system for system in document["systems"]}
    bars = []
    for row in rows_of(document):
        if (row.section, row.case) != ("label", _CASE) or row.variant == "one token":
            continue
        system = systems[row.system]
        ours = row.system.startswith("sbs-edge")
        worse = system["quality"]["label agreement with fp32"] < _LEAST_AGREEMENT
        name = row.system.partition(":")[0].removesuffix("-int8")
        precision = system["precision"].removesuffix(" weights")
        color = _OURS if ours else _WORSE if worse else _OTHER
        bars.append((f"{name}, {precision}{'*' if worse else ''}", row.value, color))
    return sorted(bars, key=lambda bar: bar[1])


def _draw(axis: Any, bars: list[Bar], title: str, shown: str) -> None:
    names, values, colors = zip(*bars, strict=True)
    drawn = axis.barh(names, values, color=colors, height=min(0.68, 0.2 * len(bars)))
    axis.bar_label(drawn, [shown.format(value) for value in values], padding=3)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlim(0, 1.35 * max(values))
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def peers_svg(results: Path) -> str:
    """Return the picture as SVG; equal results give equal text. Needs matplotlib.

    Args:
        results: the directory with :data:`ACCURACY` and :data:`LATENCY`.

    Raises:
        DataError: one of them cannot be read.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    accuracy, latency = load_document(results / ACCURACY), load_document(results / LATENCY)
    bars = latency_bars(latency)
    written = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 2.5), facecolor="white", layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        _draw(left, accuracy_bars(accuracy), "Label accuracy,\nbuilt-in task", "{:.1f} %")
        threads = latency["threads"]
        title = f"Label latency in ms, t5-small,\n64 tokens, {threads} thread, {latency['machine']['cpu']}"
        _draw(right, bars, title, "{:.1f}")
        if any("*" in name for name, _, _ in bars):
            figure.supxlabel("* answers differ from the fp32 model's", fontsize=8, x=0.99, ha="right")
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": "sbs-edge bench docs"})
    return written.getvalue()
