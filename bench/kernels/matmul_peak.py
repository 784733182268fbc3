"""Rates of the device's own matrix products at the shapes of a sliced loss.

A sliced loss multiplies X (N, D) by a slice of the weight (Vc, D), and the result P (N, Vc) by both. The
rate of these three products, with nothing between them, is the roof that every loss is measured against.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["PRODUCTS", "Clock", "copy_rate", "product_rates", "slice_width"]

PRODUCTS = ("X W^T", "P W", "P^T X")
# P fills this much: on a GPU enough tiles for two waves at 16384 rows, on a CPU what the engine takes.
_SLICE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
_FLUSH_BYTES = 256 << 20  # several times the second-level cache of any GPU so far


class Clock:
    """Times one call on a device: events on a GPU, with its cache flushed before; the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if self.gpu else None

    @property
    def gpu(self) -> bool:
        """True for an NVIDIA GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Return when everything given to the device is done."""
        if self.gpu:
            import torch

            torch.cuda.synchronize(self.device)

    def ms(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds of ``call`` on the device, and until the host was free again."""
        import torch

        if self._flush is None:
            before = time.perf_counter_ns()
            call()
            took = (time.perf_counter_ns() - before) / 1e6
            return took, took
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        self._flush.zero_()  # not waited for: the first launches hide behind it, as in a training step
        before = time.perf_counter_ns()
        first.record()
        call()
        last.record()
        host = (time.perf_counter_ns() - before) / 1e6
        last.synchronize()
        return float(first.elapsed_time(last)), host


def slice_width(n: int, v: int, itemsize: int, device: str) -> int:
    """Classes in one slice: a multiple of 128 whose P fills the slice's bytes, at least 1024, at most V."""
    fitting = _SLICE_BYTES.get(device, 64 << 20) // (n * itemsize) // 128 * 128
    return min(v, max(1024, fitting))


def product_rates(
    clock: Clock, n: int, d: int, width: int, dtype: torch.dtype, repeats: int, warm: int = 1
) -> dict[str, Any]:
    """Time the three products on random data.

    Returns:
        ``tflops`` of the three together (6 N D Vc over the sum of their medians), ``each`` product's own,
        ``ms`` of each, and the shape.
    """
    import torch

    hidden, weight, wide = (
        torch.randn(size, dtype=torch.float32, device=clock.device).to(dtype)
        for size in ((n, d), (width, d), (n, width))
    )
    calls: dict[str, Callable[[], Any]] = {
        PRODUCTS[0]: lambda: torch.mm(hidden, weight.t()),
        PRODUCTS[1]: lambda: torch.mm(wide, weight),
        PRODUCTS[2]: lambda: torch.mm(wide.t(), hidden),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm + repeats):
        for name, call in calls.items():
            took, _ = clock.ms(call)
            if number >= warm:
                times[name].append(took)
    medians = {name: statistics.median(values) for name, values in times.items()}
    each = 2.0 * n * d * width
    return {
        "n": n,
        "d": d,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "tflops": 3 * each / sum(medians.values()) / 1e9,
        "each": {name: each / ms / 1e9 for name, ms in medians.items()},
        "ms": medians,
        "repeats": repeats,
    }


def copy_rate(clock: Clock, n_bytes: int, repeats: int) -> dict[str, Any]:
    """Rate of a copy within the device's memory, bytes read and written, in GB/s."""
    import torch

    source = torch.empty(n_bytes, dtype=torch.uint8, device=clock.device).fill_(1)
    target = torch.empty_like(source)
    times = [clock.ms(lambda: target.copy_(source))[0] for _ in range(repeats + 1)][1:]
    return {"bytes": n_bytes, "gb_per_s": 2 * n_bytes / statistics.median(times) / 1e6, "repeats": repeats}
