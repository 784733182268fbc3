"""Process-wide settings that keep the event loop responsive while workers compute.

On a machine with few cores three things delay the loop: a worker that holds the interpreter lock for a whole switch
interval, a worker that holds the core, and the garbage collector, which stops both.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading

__all__ = ["freeze_gc", "give_memory_back", "lower_thread_priority", "set_switch_interval"]

# Python switches threads every 5 ms by default; a worker that returns from onnxruntime would wait that long for a
# busy event loop. 0.5 ms keeps the wait below the time of a label.
_SWITCH_INTERVAL_S = 0.0005

# Requests leave few cycles to collect. With Python's thresholds (700, 10, 10) the collector traversed thousands of
# waiting texts 23 times a second, for up to 60 ms.
_THRESHOLDS = (20_000, 10, 10)


def set_switch_interval() -> None:
    """Shorten the time that a thread may hold the interpreter lock, for the whole process."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def freeze_gc() -> None:
    """Collect garbage once, and exclude what remains (modules and models) from later collections."""
    gc.unfreeze()  # a version retired since the last freeze is garbage now
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


def lower_thread_priority(steps: int = 0) -> None:
    """Lower the priority of the calling thread by ``steps`` of niceness, where the system supports it.

    The event loop then gets a busy core first, but so do all other processes of the machine: beside busy
    processes five steps cost a worker half of its time, so the default is 0.
    """
    if steps and sys.platform == "linux":  # other systems have no priority per thread
        with contextlib.suppress(OSError):
            own = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, own) + steps
            os.setpriority(os.PRIO_PROCESS, own, min(nice, 19))


def give_memory_back() -> None:
    """Collect garbage, and return the memory that glibc keeps for later to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)
