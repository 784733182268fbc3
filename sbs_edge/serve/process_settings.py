"""One interpreter for the event loop and the workers: who gets it, who waits, and when it stands still.

The loop must answer within milliseconds while workers compute. On a machine with few processors three
things keep it from that: a worker that holds the interpreter for a whole switch interval, a worker
that holds the processor, and the garbage collector, which stops both.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading

__all__ = ["freeze_gc", "give_memory_back", "lower_thread_priority", "set_switch_interval"]

# Python hands the interpreter from thread to thread every 5 ms by default; a worker that comes back
# from onnxruntime would wait that long for a busy event loop. 0.5 ms keeps the wait below a label.
_SWITCH_INTERVAL_S = 0.0005

# What is left to collect are a few cycles a request: with Python's thresholds (700, 10, 10) the collector
# went 23 times a second through thousands of waiting texts that are no garbage, 60 ms in the worst case.
_THRESHOLDS = (20_000, 10, 10)


def set_switch_interval() -> None:
    """Shorten the time a thread may keep the interpreter; for this whole process."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def freeze_gc() -> None:
    """Collect garbage once and take what is left, modules and models, out of later collections."""
    gc.unfreeze()  # of what was frozen before, a retired version is garbage now
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


def lower_thread_priority(steps: int = 0) -> None:
    """Lower the priority of the calling thread by ``steps`` of niceness, where the system can do that.

    The event loop then gets a busy processor first. So do all other processes of the machine: beside busy
    neighbours five steps cost a worker half of its share, so this is off unless it is asked for.
    """
    if steps and sys.platform == "linux":  # elsewhere a thread has no priority of its own
        with contextlib.suppress(OSError):
            own = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, own) + steps
            os.setpriority(os.PRIO_PROCESS, own, min(nice, 19))


def give_memory_back() -> None:
    """Collect garbage and return to the system what the C library keeps of freed memory (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)
