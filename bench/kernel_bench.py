"""Time, extra memory and gradient error of the fused loss beside its peers on this CPU, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

__all__ = ["PEERS", "measure"]

PEERS = ("eager", "torch-linear-cross-entropy", "sbs-edge")


def _loss(peer: str) -> Callable[[Any, Any, Any], Any]:
    """The mean loss of ``peer``; raises AttributeError where this torch has no such function."""
    import torch.nn.functional as F

    from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy

    if peer == "eager":
        return lambda h, w, t: F.cross_entropy(h @ w.t(), t)
    if peer == "sbs-edge":
        return lambda h, w, t: fused_linear_cross_entropy(h, w, t).total
    function = F.linear_cross_entropy  # type: ignore[attr-defined,unused-ignore]
    return lambda h, w, t: function(h, w, t)


def _inputs(n: int, d: int, v: int) -> tuple[Any, Any, Any]:
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(n, d, requires_grad=True)
    weight = (torch.randn(v, d) * d**-0.5).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,))


def _gradients(peer: str, inputs: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    import torch

    return torch.autograd.grad(_loss(peer)(*inputs), inputs[:2])


def _high_water() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _extra_mib(peer: str, shape: tuple[int, int, int]) -> float:
    """Peak growth of a fresh process over one pass, the gradients themselves left out, in MiB."""
    n, d, v = shape
    _gradients(peer, _inputs(4, d, 8))  # the library's own buffers are not the method's
    inputs = _inputs(n, d, v)
    before = _high_water()
    _gradients(peer, inputs)
    return max(0.0, _high_water() - before - (n * d + v * d) * 4 / 2**20)


def measure(n: int = 2048, d: int = 512, v: int = 32128, repeats: int = 3) -> dict[str, Any]:
    """Return one row a peer: seconds (median, forward + backward), extra MiB, gradient error to float64."""
    import torch

    inputs = _inputs(n, d, v)
    exact = _gradients("eager", tuple(x.detach().double().requires_grad_() for x in inputs[:2]) + inputs[2:])
    rows: list[dict[str, Any]] = []
    for peer in PEERS:
        try:
            found = _gradients(peer, inputs)
        except AttributeError as error:
            rows.append({"peer": peer, "absent": str(error)})
            continue
        errors = [float((g - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True)]
        with get_context("spawn").Pool(1) as pool:
            extra = pool.apply(_extra_mib, (peer, (n, d, v)))
        rows.append({"peer": peer, "gradient_error": max(errors), "extra_mib": extra, "seconds": []})
    for _ in range(repeats):
        for row in rows:
            if "seconds" in row:
                start = time.perf_counter()
                _gradients(row["peer"], inputs)
                row["seconds"].append(time.perf_counter() - start)
    for row in rows:
        if "seconds" in row:
            row["seconds"] = statistics.median(row["seconds"])
    shape = {"n": n, "d": d, "v": v, "dtype": "float32", "threads": torch.get_num_threads()}
    return {"kind": "kernels", "torch": torch.__version__, "shape": shape, "repeats": repeats, "rows": rows}
