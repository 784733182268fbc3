"""The report of ``sbs-edge study``: a table for the terminal, the same as Markdown, and a page with pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from sbs_edge.data.builtin import NAME as BUILTIN
from sbs_edge.pipelines.study.conclude import frontier, percent, size
from sbs_edge.report.page import Page
from sbs_edge.report.run import BUILTIN_CAVEAT

__all__ = ["study_markdown", "study_page", "study_table"]

_COLORS = ("#3f51b5", "#ef6c00", "#00897b", "#8e24aa")
_MARKERS = "osD^vP"
_SMALL = 8
_Row = list[str]


def _columns(
    report: dict[str, Any], narrow: bool = False
) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Return the table's columns, heading and how a group is shown in it; narrow ones fit 80 characters."""
    seeds = len(report["grid"]["seeds"])

    def accuracy(split: str) -> Callable[[dict[str, Any]], str]:
        def shown(group: dict[str, Any]) -> str:
            spread = group[split]
            if spread is None:
                return "–"
            mean = f"{100 * spread['mean']:.1f}"
            if seeds == 1:
                return mean
            if narrow:
                return f"{mean} ±{50 * (spread['high'] - spread['low']):.1f}"
            return f"{mean} ({100 * spread['low']:.1f}–{100 * spread['high']:.1f})"

        return shown

    def milliseconds(name: str, digits: int) -> Callable[[dict[str, Any]], str]:
        return lambda group: "–" if group[name] is None else f"{group[name]:.{digits}f}"

    parameters = ("parameters", lambda group: f"{group['parameters']:,}")
    return [
        ("method", lambda group: group["method"]),
        ("student", lambda group: group["student"]),
        ("rows", lambda group: f"{group['rows']:,}"),
        ("valid. %" if narrow else "validation, %", accuracy("validation")),
        ("test %" if narrow else "test, %", accuracy("test")),
        *([] if narrow else [parameters]),
        ("bundle", lambda group: size(group["bytes"])),
        ("label ms" if narrow else "label, ms", milliseconds("label_ms", 2)),
        ("rat. ms" if narrow else "rationale, ms", milliseconds("rationale_ms", 1)),
    ]


def _ordered(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups by method and student as they were named, the most rows first."""
    grid = report["grid"]
    return sorted(
        report["groups"],
        key=lambda g: (grid["methods"].index(g["method"]), grid["students"].index(g["student"]), -g["share"]),
    )


def _cells(report: dict[str, Any], narrow: bool = False) -> tuple[list[str], list[_Row], int]:
    """Return headings, rows, and the place of the chosen group."""
    columns, groups = _columns(report, narrow), _ordered(report)
    rows = [[shown(group) for _, shown in columns] for group in groups]
    return [name for name, _ in columns], rows, groups.index(report["conclusions"]["chosen"])


def study_table(report: dict[str, Any]) -> Table:
    """Return the groups as a rich table, the chosen one in bold; ± is half the spread over the seeds."""
    headings, rows, best = _cells(report, narrow=True)
    table = Table(title=f"{report['task']['name']}: {len(report['runs'])} runs", padding=(0, 0))
    for number, name in enumerate(headings):
        table.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number == best else None)
    return table


def study_markdown(report: dict[str, Any]) -> str:
    """Return the same table as Markdown, the chosen group in bold."""
    headings, rows, best = _cells(report)
    lines = [headings, ["---"] * 2 + ["---:"] * (len(headings) - 2)]
    lines += [[f"**{cell}**" for cell in row] if n == best else row for n, row in enumerate(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def study_page(report: dict[str, Any]) -> str:
    """Return ``study.html``: opens without a network, holds every figure of the JSON document's groups."""
    page = Page(f"sbs-edge study: {report['task']['name']}")
    page.headline(report["sentences"][0])
    for sentence in report["sentences"][1:]:
        page.text(sentence)
    if report["task"]["name"] == BUILTIN:
        page.text(BUILTIN_CAVEAT, note=True)
    grid, rows = report["grid"], report["rows"]
    page.text(
        f"{len(report['runs'])} runs of {grid['steps']} steps each: {', '.join(grid['methods'])}; "
        f"{', '.join(percent(share) for share in grid['shares'])} of {rows['train']:,} training rows; "
        f"{_counted(grid['students'], 'student')}; {_counted(grid['seeds'], 'seed')}. {_judging(report)} Labels are "
        f"judged by {report['judged_by']}. Accuracy and size are those of the exported bundle, {grid['target']}.",
        note=True,
    )
    if len(grid["shares"]) > 1:
        page.section("Fewer rows")
        page.figures(
            [_by_rows(report, name) for name in grid["students"]],
            "Accuracy by training rows, for each student: the mean over the seeds, and their spread as a band.",
        )
    if len(grid["students"]) > 1:
        page.section("Smaller students")
        page.figures(
            [_by_size(report)],
            "Accuracy by parameters with the largest share of the rows: mean and spread over the seeds.",
        )
    page.section("What accuracy costs")
    small = max(group["bytes"] for group in report["groups"]) < 1e6
    page.figures(
        [
            _costs(report, "label_ms", "median time of a label, ms", 1.0),
            _costs(report, "bytes", "bundle, kB" if small else "bundle, MB", 1e-3 if small else 1e-6),
        ],
        "Each point is a method and student with the largest share of the rows. A student on the line is matched by no "
        "cheaper one.",
    )
    page.section("All points")
    headings, cells, best = _cells(report)
    page.text(
        "In bold: the chosen student. Accuracies: mean over the seeds, and the lowest and highest.", note=True
    )
    page.table(headings, cells, best=best)
    page.text(
        "Latency: one text a call, one thread, one bundle at a time, on the machine that ran this.", note=True
    )
    page.section("All runs")
    page.text(
        "Drop: what the exported target lost against the float32 student on validation rows. Left out: training rows whose "
        "rationales were doubtful; dropped.jsonl in the run's directory lists them.",
        note=True,
    )
    page.table(
        ["method", "student", "rows", "seed", "validation, %", "test, %", "drop, points", "left out", "training, CPU s"],
        [
            [run["method"], run["student"], run["rows"], run["seed"],
             *(_run_accuracy(run, split) for split in ("validation", "test")), run["drop_points"],
             run.get("dropped_rows"), run["train_cpu_seconds"]]
            for run in report["runs"]
        ],
    )  # fmt: skip
    return page.html()


def _judging(report: dict[str, Any]) -> str:
    """Return on how many rows the students are chosen and judged."""
    group = report["groups"][0]
    validation, test = (
        group[split] and f"{group[split]['n']:,} {split} rows" for split in ("validation", "test")
    )
    if not (validation and test):
        return f"Students are chosen by their accuracy on {validation or test}, the only ones with labels to judge by."
    return f"Students are chosen by their accuracy on {validation}; {test} only report."


def _counted(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _run_accuracy(run: dict[str, Any], split: str) -> float | None:
    found = run["accuracy"][split]
    return None if found is None else round(100 * found["share"], 2)


# ---------------------------------------------------------------------- pictures


def _axes(x_label: str, legend_rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.2 + 0.18 * legend_rows), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(x_label, fontsize=_SMALL + 1)
    axis.set_ylabel("accuracy, %", fontsize=_SMALL + 1)
    axis.tick_params(labelsize=_SMALL)
    axis.grid(alpha=0.3)
    return figure, axis


def _finish(figure: Any, axis: Any, report: dict[str, Any]) -> Any:
    """Add the levels of the teacher and the linear model, and the legend below the axes, where no curve is."""
    split = _split(report)
    teacher = (report["conclusions"]["teacher"] or {}).get(split)
    if teacher is not None:
        axis.axhline(100 * teacher, color="#444", linestyle="--", linewidth=1, label="teacher")
    linear = (report["linear"].get("accuracy") or {}).get(split)
    if linear is not None:
        axis.axhline(100 * linear["share"], color="#999", linestyle=":", linewidth=1.2, label="linear model")
    figure.legend(loc="outside lower center", ncols=2, fontsize=_SMALL)
    return figure


def _split(report: dict[str, Any]) -> str:
    return "test" if report["groups"][0]["test"] else "validation"


def _line(axis: Any, places: Sequence[float], spreads: Sequence[dict[str, float]], **style: Any) -> None:
    """Draw means with their spread as a band; a single point gets a bar."""
    means, low, high = ([100 * spread[name] for spread in spreads] for name in ("mean", "low", "high"))
    axis.plot(places, means, markersize=4, linewidth=1.6, **style)
    if len(places) > 1:
        axis.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    else:
        axis.vlines(places, low, high, color=style["color"], alpha=0.4, linewidth=3)


def _by_rows(report: dict[str, Any], student: str) -> Any:
    figure, axis = _axes("training rows")
    split = _split(report)
    for number, method in enumerate(report["grid"]["methods"]):
        own = [g for g in report["groups"] if (g["method"], g["student"]) == (method, student) and g[split]]
        own.sort(key=lambda group: group["rows"])
        if own:
            _line(
                axis, [g["rows"] for g in own], [g[split] for g in own], label=method, color=_COLORS[number],
                marker=_MARKERS[number],
            )  # fmt: skip
            axis.set_xticks([g["rows"] for g in own], [f"{g['rows']:,}" for g in own])
    axis.set_title(student, fontsize=_SMALL + 2)
    return _finish(figure, axis, report)


def _whole(report: dict[str, Any]) -> list[dict[str, Any]]:
    most = max(report["grid"]["shares"])
    return [group for group in report["groups"] if group["share"] == most and group[_split(report)]]


def _by_size(report: dict[str, Any]) -> Any:
    figure, axis = _axes("parameters")
    split = _split(report)
    for number, method in enumerate(report["grid"]["methods"]):
        own = sorted(
            (g for g in _whole(report) if g["method"] == method), key=lambda group: int(group["parameters"])
        )
        if own:
            _line(
                axis, [g["parameters"] for g in own], [g[split] for g in own], label=method, color=_COLORS[number],
                marker=_MARKERS[number],
            )  # fmt: skip
    places = sorted({group["parameters"] for group in _whole(report)})
    if places[-1] > 3 * places[0]:
        axis.set_xscale("log")
    axis.set_xticks(places, [_count(place) for place in places], rotation=30 if len(places) > 4 else 0)
    axis.minorticks_off()
    return _finish(figure, axis, report)


def _count(number: int) -> str:
    return f"{number / 1e6:.3g}M" if number >= 1e6 else f"{number / 1e3:.3g}k"


def _costs(report: dict[str, Any], cost: str, x_label: str, scale: float) -> Any:
    """Draw accuracy against a cost, one marker a student and one colour a method, with the Pareto frontier."""
    students = report["grid"]["students"]
    figure, axis = _axes(x_label, legend_rows=len(students) // 2 + 2)
    split, whole = _split(report), _whole(report)
    for number, method in enumerate(report["grid"]["methods"]):
        axis.scatter([], [], color=_COLORS[number], s=24, label=method)
    for place, student in enumerate(students):
        marker = _MARKERS[place % len(_MARKERS)]
        axis.scatter([], [], color="#777", marker=marker, s=24, label=student)
        for number, method in enumerate(report["grid"]["methods"]):
            for group in whole:
                if (group["method"], group["student"]) == (method, student) and group[cost] is not None:
                    axis.scatter(
                        group[cost] * scale,
                        100 * group[split]["mean"],
                        color=_COLORS[number],
                        marker=marker,
                        s=36,
                    )
    edge = frontier(whole, cost)
    axis.plot(
        [g[cost] * scale for g in edge], [100 * g["test"]["mean"] for g in edge], color="#444", linewidth=0.9,
        zorder=0,
    )  # fmt: skip
    axis.set_xlim(left=0)
    return _finish(figure, axis, report)
