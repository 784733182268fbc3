"""Conclusions from a study's runs: means and spreads over seeds, the smallest student that will do, and how many rows.

Students are chosen by their accuracy on validation rows; the test rows only report. Pure arithmetic on plain values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from sbs_edge.pipelines.linear import linear_sentence

__all__ = ["Group", "conclude", "frontier", "group_runs", "sentences"]

Group = dict[str, Any]
"""The runs of one method, student and share: they differ in their seed alone."""


def group_runs(runs: Iterable[dict[str, Any]]) -> list[Group]:
    """Put the runs that differ in their seed alone together.

    Args:
        runs: each with ``method``, ``student``, ``share``, ``rows``, ``seed``, ``parameters``, ``bytes``, ``accuracy``
            (split -> ``share`` and ``n``, or None), ``label_ms`` and ``rationale_ms`` (``p50``, or None).

    Returns:
        Groups in the order in which they first appear. ``validation`` and ``test`` hold ``mean``, ``low`` and ``high``
        over the seeds, as shares, or are None; times are medians in milliseconds.

    """
    together: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        together.setdefault((run["method"], run["student"], run["share"]), []).append(run)
    groups = []
    for (method, student, share), own in together.items():
        first = own[0]
        groups.append(
            {
                "method": method,
                "student": student,
                "share": share,
                "rows": first["rows"],
                "seeds": sorted(run["seed"] for run in own),
                "parameters": first["parameters"],
                "layers": first["layers"],
                "bytes": round(statistics.median(run["bytes"] for run in own)),
                "label_ms": _median(run["label_ms"] for run in own),
                "rationale_ms": _median(run["rationale_ms"] for run in own),
                "train_seconds": _median(run.get("train_seconds") for run in own),
                **{name: _spread(run["accuracy"][name] for run in own) for name in ("validation", "test")},
            }
        )
    return groups


def _median(values: Iterable[Any]) -> float | None:
    found = [value["p50"] if isinstance(value, dict) else value for value in values if value is not None]
    return statistics.median(found) if found else None


def _spread(values: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    found = [value for value in values if value is not None]
    if not found:
        return None
    shares = [value["share"] for value in found]
    return {"mean": statistics.fmean(shares), "low": min(shares), "high": max(shares), "n": found[0]["n"]}


def score(group: Group) -> float:
    """Return the accuracy by which students are chosen: on validation rows, or on test rows where there are none."""
    spread = group["validation"] or group["test"]
    return float(spread["mean"])


def frontier(groups: Sequence[Group], cost: str) -> list[Group]:
    """Return the groups that no cheaper one equals in test accuracy, the cheapest first.

    Args:
        groups: with ``test``.
        cost: the field to be small: ``label_ms`` or ``bytes``.

    """
    found: list[Group] = []
    known = [group for group in groups if group[cost] is not None and group["test"]]
    for group in sorted(known, key=lambda each: (each[cost], -each["test"]["mean"])):
        if not found or group["test"]["mean"] > found[-1]["test"]["mean"]:
            found.append(group)
    return found


def conclude(
    groups: Sequence[Group], runs: Sequence[dict[str, Any]], within: float, teacher: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the answers of a study as plain values.

    Args:
        groups: of :func:`group_runs`, at least one.
        runs: the same runs one by one.
        within: points of accuracy that a student may be worse.
        teacher: split -> the teacher's accuracy as a share, or None where it is unknown.

    Returns:
        ``best``, ``chosen``, ``like_teacher`` (each a group; the last may be None), ``rows`` (see :func:`_rows_needed`)
        and ``more_rows`` (see :func:`_worth_of_more`).

    """
    best = max(groups, key=score)
    whole = max(group["share"] for group in groups)
    full = [group for group in groups if group["share"] == whole]
    least = score(best) - within / 100
    # The best may have been trained on a smaller share; then the best of the full ones stands in for it.
    chosen = _smallest([g for g in full if score(g) >= least - 1e-9] or [max(full, key=score)])
    level = None if teacher is None else teacher.get("validation") or teacher.get("test")
    like = [g for g in full if level is not None and score(g) >= level - within / 100 - 1e-9]
    return {
        "within": within,
        "best": best,
        "chosen": chosen,
        "teacher": teacher,
        "like_teacher": _smallest(like) if like else None,
        "nearest": max(full, key=score),
        "rows": _rows_needed(groups, chosen, least),
        "more_rows": _worth_of_more(groups, runs, chosen),
    }


def _smallest(groups: Sequence[Group]) -> Group:
    return min(groups, key=lambda g: (g["bytes"], g["label_ms"] or math.inf, -score(g)))


def _curve(groups: Sequence[Group], method: str, student: str) -> list[Group]:
    own = [group for group in groups if (group["method"], group["student"]) == (method, student)]
    return sorted(own, key=lambda group: group["rows"])


def _rows_needed(groups: Sequence[Group], chosen: Group, least: float) -> dict[str, Any]:
    """Return for each method the fewest rows from which on the chosen student is good enough, or None."""
    needed: dict[str, Any] = {}
    for method in dict.fromkeys(group["method"] for group in groups):
        found = None
        for group in reversed(_curve(groups, method, chosen["student"])):
            if score(group) < least - 1e-9:
                break
            found = group["rows"]
        needed[method] = found
    return needed


def _worth_of_more(
    groups: Sequence[Group], runs: Sequence[dict[str, Any]], chosen: Group
) -> dict[str, Any] | None:
    """Return how many points twice the rows would add if errors went on falling as between the last two shares.

    The error is taken to fall as a power of the number of rows. Each seed gives an estimate; ``low`` and ``high`` are
    their ends. None: the study has one share, or the accuracy is unknown.
    """
    curve = _curve(groups, chosen["method"], chosen["student"])
    if len(curve) < 2:
        return None
    before, last = curve[-2], curve[-1]
    split = "validation" if last["validation"] else "test"
    errors: dict[int, dict[float, float]] = {}
    for run in runs:
        if (run["method"], run["student"]) == (chosen["method"], chosen["student"]) and run["accuracy"][
            split
        ]:
            errors.setdefault(run["seed"], {})[run["share"]] = 1 - run["accuracy"][split]["share"]
    gains = []
    for own in errors.values():
        if before["share"] not in own or last["share"] not in own:
            continue
        earlier, now = own[before["share"]], own[last["share"]]
        if now == 0:
            gains.append(0.0)
        else:
            slope = math.log(max(earlier, 1e-9) / now) / math.log(last["rows"] / before["rows"])
            gains.append(100 * now * (1 - 2**-slope))
    if not gains:
        return None
    return {
        "split": split,
        "from": before["rows"],
        "to": last["rows"],
        "gained": 100 * (last[split]["mean"] - before[split]["mean"]),
        "doubling": statistics.median(gains),
        "low": min(gains),
        "high": max(gains),
        "errors_left": 100 * (1 - last[split]["mean"]),
    }


# ---------------------------------------------------------------------- in words


def percent(value: float | None) -> str:
    """Return a share as people read it."""
    return "unknown" if value is None else f"{100 * value:.1f} %"


def named(group: Group) -> str:
    """Return method and student of a group."""
    return f"{group['method']}, {group['student']}"


def size(n_bytes: float) -> str:
    """Return bytes as people read them.

    Example:
        >>> size(1_250_000), size(62_400)
        ('1.2 MB', '62 kB')

    """
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


def _points(value: float) -> str:
    return f"{value:g} point{'' if value == 1 else 's'}"


def _figures(group: Group) -> str:
    spread = group["test"] or group["validation"]
    where = "test" if group["test"] else "validation"
    parts = [f"{percent(spread['mean'])} on {where} rows", size(group["bytes"])]
    if group["label_ms"] is not None:
        parts.append(f"{group['label_ms']:.2f} ms a label")
    if group["rationale_ms"] is not None:
        parts.append(f"{group['rationale_ms']:.1f} ms a rationale")
    return ", ".join(parts)


def sentences(found: dict[str, Any], linear: dict[str, Any] | None = None) -> list[str]:
    """Return the answers in words, one sentence or two each.

    Args:
        found: of :func:`conclude`.
        linear: of :func:`sbs_edge.pipelines.linear.linear_baseline`, if it was trained.

    """
    chosen, best, within = found["chosen"], found["best"], _points(found["within"])
    said = [f"The smallest student within {within} of the best is {named(chosen)}: {_figures(chosen)}."]
    if score(chosen) < score(best) - found["within"] / 100 - 1e-9:
        said[0] = (
            f"No student with {chosen['rows']:,} rows is within {within} of the best, {named(best)} with "
            f"{best['rows']:,} rows: {_figures(best)}. The nearest is {named(chosen)}: {_figures(chosen)}."
        )
    elif best is chosen:
        said[0] = f"No smaller student is within {within} of the best, {named(chosen)}: {_figures(chosen)}."
    else:
        said[0] += f" The best is {named(best)}, {best['rows']:,} rows: {_figures(best)}."
    said += [_of_teacher(found), _of_rows(found), _of_more(found)]
    split = "test" if best["test"] else "validation"
    said.append(linear_sentence(linear or {}, split, best[split]["mean"], found["within"]) or "")
    return [sentence for sentence in said if sentence]


def _of_teacher(found: dict[str, Any]) -> str:
    teacher, like, within = found["teacher"], found["like_teacher"], _points(found["within"])
    if teacher is None:
        return (
            "The teacher's accuracy is unknown: no row outside training has both its label and a gold label."
        )
    near = found["nearest"]
    split = "validation" if teacher.get("validation") else "test"  # the one that decided
    level = f"{percent(teacher[split])} on {split} rows"
    if like is None:
        reached = f"{percent(score(near))} on {'validation' if near['validation'] else 'test'} rows"
        return f"No student is within {within} of the teacher ({level}); the nearest is {named(near)} ({reached})."
    if like is found["chosen"]:
        return f"It is also within {within} of the teacher ({level})."
    return (
        f"The smallest student within {within} of the teacher ({level}) is {named(like)}: {_figures(like)}."
    )


def _of_rows(found: dict[str, Any]) -> str:
    chosen, rows = found["chosen"], found["rows"]
    parts = []
    for method, needed in sorted(rows.items(), key=lambda item: item[0] != chosen["method"]):
        if needed is None:
            parts.append(f"{method} does not get there with {chosen['rows']:,} rows")
        elif needed == chosen["rows"]:
            parts.append(f"{method} needs all {needed:,} rows")
        else:
            parts.append(f"{method} needs {needed:,} of {chosen['rows']:,} rows")
    return (
        f"To bring {chosen['student']} within {_points(found['within'])} of the best, {', and '.join(parts)}."
    )


def _of_more(found: dict[str, Any]) -> str:
    more, chosen = found["more_rows"], found["chosen"]
    if more is None:
        return "What more rows would be worth is unknown: it takes two shares of the training rows to see a trend."
    trend = (
        f"From {more['from']:,} to {more['to']:,} rows, {named(chosen)} changed by {more['gained']:+.1f} points "
        f"on {more['split']} rows"
    )
    if more["errors_left"] == 0:
        return (
            f"{trend}; no errors are left there, so more rows are worth nothing that these rows could show."
        )
    if more["doubling"] <= 0:
        return f"{trend}; twice the rows are not expected to help."
    spread = f" ({more['low']:.1f} to {more['high']:.1f} by seed)" if more["low"] != more["high"] else ""
    return (
        f"{trend}; if errors go on falling at this rate, twice the rows would be worth {more['doubling']:.1f} points"
        f"{spread}. This is an extrapolation from two points."
    )
