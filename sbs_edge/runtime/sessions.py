"""onnxruntime sessions: options in one place, and refusals that say what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbs_edge.errors import IntegrityError, MissingExtra, UsageError

__all__ = ["Session", "default_threads"]


def default_threads() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Session:
    """One graph, ready to run; safe to share between threads."""

    def __init__(self, path: Path, providers: Sequence[str], threads: int) -> None:
        """Load ``path``.

        Raises:
            MissingExtra: onnxruntime is not installed.
            UsageError: no wanted provider is in the installed onnxruntime.
            IntegrityError: the runtime refuses the graph.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra("onnxruntime", "cpu", "Running a bundle") from error
        available = onnxruntime.get_available_providers()
        usable = [provider for provider in providers if provider in available]
        if not usable:
            raise UsageError(
                f"This target needs {' or '.join(providers)}, and the installed onnxruntime offers only "
                f"{', '.join(available)}. Use a cpu target, or install 'sbs-edge[gpu]'."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=usable)
        except Exception as error:  # onnxruntime has no common base class for its load errors
            raise IntegrityError(f"onnxruntime refuses the graph {path}: {error}") from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """Run the graph; returns its outputs in order."""
        return list(self._session.run(None, dict(inputs)))
