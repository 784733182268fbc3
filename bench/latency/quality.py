"""Accuracy and agreement of every system, and whether a speed-up may be printed at all.

For a trained student accuracy is against the gold labels: free generation for peers, as their users
run them. For random weights the gold label is what fp32 answers among the label set, so every system
is asked for its best label of the set; its accuracy is its agreement with fp32.
"""

from __future__ import annotations

from typing import Any

from sbs_edge.bench.core.results import Row
from sbs_edge.bench.latency.workers import Benchmark, Entry
from sbs_edge.data.answers import same_answer

__all__ = ["measure", "rationale_withheld", "share_equal", "withheld"]

RATIONALE_ROWS = 8
# Points a system may lose against its peer: the export guard's default for trained students; int8 on
# random weights has no training to make it robust, and the peers it is compared with are int8 too.
SLACK_TRAINED, SLACK_RANDOM = 1.0, 5.0
# Greedy texts part at the first differing token and stay apart, so words at the same place are a harsh
# measure: this much less than the peer (or than 75 %) is another text, not rounding.
SLACK_RATIONALE, RATIONALE_TOP = 25.0, 75.0


def share_equal(texts: list[str], others: list[str]) -> float | None:
    """Share of words of ``others`` that ``texts`` has at the same place, in percent."""
    equal = total = 0
    for text, other in zip(texts, others, strict=True):
        words, judge = text.split(), other.split()
        equal += sum(a == b for a, b in zip(words, judge, strict=False))
        total += max(len(words), len(judge))
    return 100.0 * equal / total if total else None


def _percent(hits: list[bool]) -> float:
    return 100.0 * sum(hits) / len(hits)


def _ask(benchmark: Benchmark, entry: Entry, steps: int) -> dict[str, Any] | None:
    rows = benchmark.inputs.rows
    choices = [row.get("choices") for row in rows] if benchmark.inputs.choices else None
    return entry.ask(
        "answers",
        texts=[row["input"] for row in rows],
        choices=choices,
        rationales=RATIONALE_ROWS if "rationale" in entry.sections else 0,
        steps=steps,
    )


def measure(benchmark: Benchmark, compare: Any, steps: int) -> list[Row]:
    """Ask every living entry for answers; rows of accuracy and agreement, and ``facts['quality']``.

    Args:
        benchmark: its entries; the reference (eager fp32) is the judge of agreement.
        compare: the task's comparison, ``text`` or ``value``.
        steps: tokens of a rationale.
    """
    golds = [row.get("label") for row in benchmark.inputs.rows]
    judge = benchmark.reference or next((e for e in benchmark.entries if e.name == "transformers"), None)
    found = {entry.name: _ask(benchmark, entry, steps) for entry in benchmark.alive}
    if judge is not None and judge.name not in found:
        found[judge.name] = _ask(benchmark, judge, steps)
    reference = found.get(judge.name) if judge is not None else None
    rows: list[Row] = []
    for entry in benchmark.entries:
        said = found.get(entry.name)
        if said is None:
            continue
        field = "restricted" if benchmark.inputs.random_weights else "free"
        answers = said[field]
        base = reference if entry.golds is None else None  # other weights have other answers
        quality: dict[str, float] = {}
        if answers is not None:
            hits = [
                same_answer(answer, gold, compare)
                for answer, gold in zip(answers, entry.golds or golds, strict=True)
                if gold is not None
            ]
            if hits:
                quality["label accuracy"] = _percent(hits)
        if answers is not None and base is not None and base[field] is not None:
            pairs = zip(answers, base[field], strict=True)
            quality["label agreement with fp32"] = _percent([same_answer(a, b, compare) for a, b in pairs])
        if base is not None and "rationale" in entry.sections:
            equal = share_equal(said["rationales"], base["rationales"])
            if equal is not None:
                quality["rationale agreement with fp32"] = equal
        entry.facts["quality"] = quality
        rows += [
            Row("quality", entry.name, "", name, "%", "higher", value, extra={"n": len(golds)})
            for name, value in quality.items()
        ]
    return rows


def withheld(ours: Entry, peer: Entry, random_weights: bool) -> str | None:
    """Return the reason why no ratio of these two is printed, or None."""
    mine = ours.facts.get("quality", {}).get("label accuracy")
    other = peer.facts.get("quality", {}).get("label accuracy")
    if mine is None:
        return "the accuracy of its answers is unknown"
    slack = SLACK_RANDOM if random_weights else SLACK_TRAINED
    if other is not None and mine < other - slack:
        return f"its answers are worse: {mine:.1f} % right against {other:.1f} %"
    return None


def rationale_withheld(ours: Entry, peer: Entry) -> str | None:
    """Return the reason why rationale speeds of these two are not compared, or None."""
    name = "rationale agreement with fp32"
    mine, other = (entry.facts.get("quality", {}).get(name) for entry in (ours, peer))
    if mine is None or other is None or mine >= min(other, RATIONALE_TOP) - SLACK_RATIONALE:
        return None
    return f"its rationales are others: {mine:.0f} % of fp32's words against {other:.0f} %"
