"""Import onnxruntime in one place, with its usage reports switched off.

Some builds of onnxruntime (1.32 for Linux among them) keep a device id and a database in the user's cache
directory, start a thread for them and report to their maker. A runtime that is embedded in other programs must not
do this, so the variable that turns it off is set before the first import. ``ORT_DISABLE_TELEMETRY=0`` keeps the
reports; a process that imported onnxruntime earlier has its own setting.
"""

from __future__ import annotations

import os
from importlib import util
from typing import Any

from sbs_edge.errors import MissingExtra, OutOfMemory, SbsEdgeError
from sbs_edge.resources import lacks_memory, memory_advice

__all__ = ["onnxruntime_module"]


def onnxruntime_module() -> Any:
    """Return the module ``onnxruntime``.

    Raises:
        MissingExtra: it is not installed.
        OutOfMemory: its libraries do not fit into memory.
        SbsEdgeError: it is installed and its libraries cannot be loaded for another reason.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except (ImportError, MemoryError) as error:
        if util.find_spec("onnxruntime") is None:
            raise MissingExtra("onnxruntime", "cpu", "Running a bundle") from error
        if lacks_memory(error):
            raise OutOfMemory(
                f"There is not enough memory to load onnxruntime: {error}. {memory_advice()}"
            ) from error
        raise SbsEdgeError(
            f"onnxruntime is installed but cannot be loaded: {error}. Remove it and "
            "install it again: pip uninstall onnxruntime, then pip install 'sbs-edge[cpu]'."
        ) from error
    return onnxruntime
