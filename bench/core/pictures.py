"""Pictures of a result document. matplotlib is imported only here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sbs_edge.bench.core.results import Row, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["latency_pictures", "train_pictures"]

Picture = tuple[str, "Figure", str]
_MARKS = "osD^vPX*<>"


def _figure(width: float = 7.0, height: float = 4.2) -> Any:
    import matplotlib as mpl

    mpl.use("Agg", force=False)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _logarithmic(axis: Any) -> None:
    """Make the upright axis logarithmic, labelled 20, 30, 40 and not by powers of ten."""
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def _legend(figure: Any) -> None:
    """Add a legend below the axes, where it covers no curve."""
    named: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=min(4, len(named)), fontsize=8
    )


def _colours(systems: list[str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each system, the same in every picture."""
    return {name: (f"C{index % 10}", _MARKS[index % len(_MARKS)]) for index, name in enumerate(systems)}


def _best_variant(rows: list[Row]) -> list[Row]:
    """Return a row for each system and case, in the variant that a user runs (ours, or the peer's label + EOS)."""
    return [row for row in rows if row.variant != "one token"]


def _size_and_accuracy(rows: list[Row], look: dict[str, tuple[str, str]]) -> Picture | None:
    label = [r for r in _best_variant([r for r in rows if r.section == "label"]) if r.extra["batch"] == 1]
    if not label:
        return None
    source = 64 if any(row.extra["source"] == 64 for row in label) else label[0].extra["source"]
    latency = {row.system: row.value for row in label if row.extra["source"] == source}
    # All files of a system, ours with the graph for rationales, so that the sizes are comparable.
    disk = {r.system: r.value for r in rows if r.section == "disk" and r.variant == "label alone"}
    disk |= {r.system: r.value for r in rows if r.section == "disk" and r.variant != "label alone"}
    right = {
        row.system: row.value for row in rows if row.section == "quality" and row.case == "label accuracy"
    }
    figure = _figure(9.0)
    left_axis, right_axis = figure.subplots(1, 2, sharey=True)
    for axis, values, name in ((left_axis, disk, "MB on disk"), (right_axis, right, "label accuracy, %")):
        for system, ms in latency.items():
            if system in values:
                colour, mark = look[system]
                axis.scatter(values[system], ms, color=colour, marker=mark, s=60, label=system)
        axis.set_xlabel(name)
        _logarithmic(axis)
        axis.grid(alpha=0.3)
    left_axis.set_ylabel(f"label latency, ms (batch 1, {source} tokens)")
    _legend(figure)
    return (
        "latency-size-accuracy",
        figure,
        "Label latency (peers write the label and its end) against all files on disk and against accuracy.",
    )


def _by_length(rows: list[Row], look: dict[str, tuple[str, str]]) -> Picture | None:
    label = [row for row in _best_variant(rows) if row.section == "label"]
    batches = sorted({row.extra["batch"] for row in label})
    if not label:
        return None
    figure = _figure(4.5 * len(batches))
    axes = figure.subplots(1, len(batches), squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        for system, (colour, mark) in look.items():
            points = sorted(
                (row.extra["tokens"], row.value)
                for row in label
                if row.system == system and row.extra["batch"] == batch
            )
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker=mark, label=system)
        axis.set_xscale("log", base=2)
        _logarithmic(axis)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("source tokens")
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("label latency p50, ms")
    _legend(figure)
    return ("latency-by-length", figure, "Label latency by source length; peers write the label and its end.")


def _percentiles(rows: list[Row], look: dict[str, tuple[str, str]]) -> Picture | None:
    label = [r for r in _best_variant(rows) if r.section == "label" and r.extra["batch"] == 1]
    if not label:
        return None
    source = 64 if any(row.extra["source"] == 64 for row in label) else label[0].extra["source"]
    calls = [row for row in label if row.extra["source"] == source]
    load = [r for r in rows if r.section == "open_loop" and r.case.startswith("50%") and "p99" in r.extra]
    figure = _figure(9.0)
    axes = figure.subplots(1, 2)
    levels = ("p50", "p90", "p99")
    for axis, some, title in (
        (axes[0], calls, f"back to back, {source} tokens"),
        (axes[1], load, "Poisson arrivals, half of its own capacity"),
    ):
        for row in some:
            colour, mark = look[row.system]
            axis.plot(
                levels, [row.extra[level] for level in levels], color=colour, marker=mark, label=row.system
            )
        _logarithmic(axis)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms")
    _legend(figure)
    return (
        "latency-percentiles",
        figure,
        "Percentiles of one label call, and under Poisson arrivals at half of each system's own capacity.",
    )


def latency_pictures(document: dict[str, Any]) -> list[Picture]:
    """Latency against size and accuracy, by length, and percentiles."""
    rows = rows_of(document)
    look = _colours([system["name"] for system in document["systems"]])
    found = [_size_and_accuracy(rows, look), _by_length(rows, look), _percentiles(rows, look)]
    return [picture for picture in found if picture is not None]


def train_pictures(document: dict[str, Any]) -> list[Picture]:
    """The loss of every step on the same seed and data."""
    found: list[Picture] = []
    for case, curves in document.get("losses", {}).items():
        figure = _figure()
        axis = figure.subplots()
        for index, (name, losses) in enumerate(curves.items()):
            axis.plot(losses, label=name, color=f"C{index}", linestyle=("-", "--", ":")[index % 3])
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("loss")
        _legend(figure)
        axis.grid(alpha=0.3)
        name = "".join(c if c.isalnum() else "-" for c in case)
        found.append((f"loss-{name}", figure, f"Loss on the same seed and data, {case}."))
    return found
