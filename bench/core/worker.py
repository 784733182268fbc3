"""A measured system in its own process, with JSON lines in and JSON lines out.

The first line is the :class:`~sbs_edge.bench.peers.system.Spec`; each later line is a command, and each
gets a line in reply.
Between commands the process sleeps in ``readline``, so that the system under test has the machine to itself.
Times are taken here with ``perf_counter_ns`` around the call, without the pipe.

    {"do": "open"}                                          -> memory after loading
    {"do": "first", "texts"}                                -> the first answer, memory after it
    {"do": "label", "texts", "variant", "seconds", ...}     -> ns of each call
    {"do": "rationale", "texts", "steps", ...}              -> ns of each call, tokens of each row
    {"do": "settings"} {"do": "apply", "setting"}           -> batching settings; make one current
    {"do": "stream", "texts", "setting"}                    -> ns of the whole stream
    {"do": "open_loop", "texts", "arrivals", ...}           -> ns from each arrival to its answer
    {"do": "answers", "texts", "rationales", "steps"}       -> free and restricted labels, rationales
    {"do": "memory"} {"do": "quit"}

Only the standard library is imported before the system itself: the cold start is measured.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from sbs_edge.bench.core.footprint import memory_mb
from sbs_edge.bench.peers.system import Spec, System, load_module

__all__ = ["answer", "open_loop", "serve", "timed"]

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def timed(call: Callable[[], Any], seconds: float, least: int, warm: int = 1, most: int = 1000) -> list[int]:
    """Call repeatedly for about ``seconds``; return the nanoseconds of each call after ``warm`` uncounted ones."""
    for _ in range(warm):
        call()
    gc.collect()
    found: list[int] = []
    end = time.perf_counter_ns() + int(seconds * 1e9)
    while len(found) < least or (time.perf_counter_ns() < end and len(found) < most):
        before = time.perf_counter_ns()
        call()
        found.append(time.perf_counter_ns() - before)
    return found


def open_loop(
    serve: Callable[[list[int]], Any], arrivals: list[float], most: int, patience: float
) -> tuple[list[int], int]:
    """Serve requests that arrive on their own clock; return the nanoseconds from each arrival to its answer.

    Args:
        serve: answers the requests of the given indices, all at once.
        arrivals: seconds from the start, ascending.
        most: requests taken from the queue at a time.
        patience: seconds after the last arrival at which the run is given up as saturated.

    Returns:
        Latencies in ns of the answered requests, and how many were left unanswered.
    """
    found: list[int] = []
    at, start = 0, time.perf_counter_ns()
    due = [int(second * 1e9) for second in arrivals]
    limit = (due[-1] if due else 0) + int(patience * 1e9)
    while at < len(due):
        now = time.perf_counter_ns() - start
        if now > limit:
            break
        if due[at] > now:
            time.sleep((due[at] - now) / 1e9)
            continue
        last = at
        while last < len(due) and last - at < most and due[last] <= now:
            last += 1
        serve(list(range(at, last)))
        done = time.perf_counter_ns() - start
        found.extend(done - due[index] for index in range(at, last))
        at = last
    return found, len(due) - at


def answer(system: System, order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one command."""
    do = order["do"]
    if do == "open":
        return {"precision": system.precision, **memory_mb()}
    if do == "label":
        texts, variant, choices = order["texts"], order["variant"], order.get("choices")
        ns = timed(
            lambda: system.label(texts, variant, choices), order["seconds"], order["least"], order["warm"]
        )
        return {"ns": ns}
    if do == "first":
        found = system.label(order["texts"], system.label_variants[0], order.get("choices"))
        return {"answer": found, **memory_mb()}
    if do == "rationale":
        texts, steps = order["texts"], order["steps"]
        tokens: list[int] = []

        def call() -> None:
            tokens[:] = [count for _, count in system.rationale(texts, steps)]

        ns = timed(call, order["seconds"], order["least"], order["warm"])
        return {"ns": ns, "tokens": tokens}
    if do == "settings":
        return {"settings": system.settings(), "variants": list(system.label_variants)}
    if do == "apply":
        system.apply(order["setting"])
        return {}
    if do == "stream":
        before = time.perf_counter_ns()
        system.stream(order["texts"], order["setting"], order.get("choices"))
        return {"ns": [time.perf_counter_ns() - before]}
    if do == "open_loop":
        texts, choices = order["texts"], order.get("choices")

        def serve(picks: list[int]) -> None:
            some = None if choices is None else [choices[pick] for pick in picks]
            system.stream([texts[pick] for pick in picks], order["setting"], some)

        ns, left = open_loop(
            serve,
            order["arrivals"],
            order["most"],
            order["patience"],
        )
        return {"ns": ns, "left": left}
    if do == "answers":
        texts, choices, variant = order["texts"], order.get("choices"), system.label_variants[0]
        free: list[str] = []
        for at in range(0, len(texts), 8):
            some = None if choices is None else choices[at : at + 8]
            free += system.label(texts[at : at + 8], variant, some)
        asked = texts[: order["rationales"]]
        rationales = system.rationale(asked, order["steps"]) if asked else []
        return {
            "free": free,
            "restricted": system.restricted(texts),
            "rationales": [text for text, _ in rationales],
        }
    if do == "memory":
        return memory_mb()
    raise ValueError(f"unknown command {do!r}")


def serve(start: Callable[[Spec], Answer]) -> None:
    """Answer commands from stdin on stdout until ``quit`` or the end of the input.

    Args:
        start: loads what is measured, on the command ``open``; returns the function that answers
            this and every later command.
    """
    spec = Spec(**json.loads(sys.stdin.readline()))
    if spec.cpus:
        os.sched_setaffinity(0, spec.cpus)
    # Libraries may print to stdout, so the protocol has its own descriptor.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answers: Answer | None = None
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "quit":
            break
        try:
            if order["do"] == "open":
                answers = start(spec)
            elif answers is None:
                raise RuntimeError("the first command must be 'open'")
            reply = answers(order)
        except Exception as error:
            import traceback  # imported here, so that it is not part of a system's first answer

            traceback.print_exc()
            gc.collect()  # a failed call may still have most of the memory
            first = str(error).strip().partition("\n")[0]
            reply = {"error": f"{type(error).__name__}: {first[:300]}"}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()
    channel.close()
    os._exit(0)  # some runtimes take seconds to unload


def _open(spec: Spec) -> Answer:
    system = load_module(spec.system).SYSTEM(spec)
    system.open()
    return functools.partial(answer, system)


if __name__ == "__main__":
    serve(_open)
