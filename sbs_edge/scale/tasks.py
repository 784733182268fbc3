"""Call a function for many orders as Ray tasks, on a cluster or in this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sbs_edge.scale.run import session

__all__ = ["TICK_S", "run_as_tasks"]

TICK_S = 0.5
"""Seconds after which the caller is given a turn although no order has finished."""

TASK_RETRIES = 3
"""Number of times that a task whose worker or node died runs again."""


def run_as_tasks(
    function: Callable[[dict[str, Any]], dict[str, Any]],
    orders: Sequence[dict[str, Any]],
    *,
    cpus_each: float = 1.0,
    gpus_each: float = 0.0,
    at_once: int = 2,
    ray_address: str | None = None,
) -> Iterator[tuple[int, dict[str, Any]] | None]:
    """Yield (index, result) of each order as it finishes, and None at least every :data:`TICK_S` seconds.

    Args:
        function: importable on every node.
        orders: plain values; a path in them must lead to the same files on every node.
        cpus_each: CPUs that a task takes of its node.
        gpus_each: GPUs that a task takes of its node; fractions let tasks share.
        at_once: tasks that run at once if Ray is started in this machine; a cluster decides by itself.
        ray_address: a cluster; None: Ray is started in this machine.

    Returns:
        Results of ``function``. Where it was lost with its worker more than :data:`TASK_RETRIES` times: ``failed``,
        a sentence, and ``exit_code`` 1.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: no cluster answers at the address.

    """
    if not orders:
        return
    with session(ray_address, at_once, cpus_each) as ray:
        remote = ray.remote(num_cpus=cpus_each, num_gpus=gpus_each, max_retries=TASK_RETRIES)(function)
        pending = {remote.remote(order): index for index, order in enumerate(orders)}
        try:
            while pending:
                done, _ = ray.wait(list(pending), timeout=TICK_S)
                for task in done:
                    index = pending.pop(task)
                    try:
                        result = ray.get(task)
                    except ray.exceptions.RayError as error:
                        text = " ".join(str(error).split())[-500:]
                        result = {"failed": f"Ray lost it ({type(error).__name__}: {text})", "exit_code": 1}
                    yield index, result
                yield None
        finally:
            for task in pending:
                ray.cancel(task, force=True)
