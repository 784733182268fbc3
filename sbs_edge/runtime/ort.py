"""The installed onnxruntime, imported in one place and kept from reporting its use.

Some builds of onnxruntime (1.32 for Linux among them) keep a device id and a data base in the user's cache
directory, start a thread for them and report to their maker. A runtime that others embed must not: the variable
that turns this off is set before the first import. Who wants it sets ``ORT_DISABLE_TELEMETRY=0``; a
process that has imported onnxruntime itself before has chosen for itself.
"""

from __future__ import annotations

import os
from typing import Any

from sbs_edge.errors import MissingExtra

__all__ = ["onnxruntime_module"]


def onnxruntime_module() -> Any:
    """Return the module ``onnxruntime``.

    Raises:
        MissingExtra: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "cpu", "Running a bundle") from error
    return onnxruntime
