"""onnxruntime sessions: options in one place, pre-packed weights, and refusals that say what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbs_edge.errors import IntegrityError, MissingExtra, UsageError
from sbs_edge.runtime.prepacked import load_prepacked

__all__ = ["Session", "default_threads"]


def default_threads() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Session:
    """One graph, ready to run; safe to share between threads."""

    def __init__(
        self, path: Path, providers: Sequence[str], threads: int, digests: Sequence[str] | None = None
    ) -> None:
        """Load ``path``.

        Args:
            path: the graph.
            providers: wanted, the first that is installed is used.
            threads: threads a call may use.
            digests: SHA-256 of the graph's files, to use this machine's pre-packed weights; None: do not.

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

        def options() -> Any:
            found = onnxruntime.SessionOptions()
            found.intra_op_num_threads = threads
            found.inter_op_num_threads = 1
            found.log_severity_level = 4 if digests else 3  # a cache that cannot be written is no error
            return found

        def create(graph: Path, chosen: Any) -> Any:
            return onnxruntime.InferenceSession(str(graph), chosen, providers=usable)

        session = None
        if digests and usable == ["CPUExecutionProvider"]:
            session = load_prepacked(path, digests, options, create)
        if session is None:
            try:
                session = create(path, options())
            except Exception as error:  # onnxruntime has no common base class for its load errors
                raise IntegrityError(f"onnxruntime refuses the graph {path}: {error}") from error
        self._session = session

    @property
    def inference(self) -> Any:
        """The runtime's own session, for callers that bind buffers themselves."""
        return self._session

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """Run the graph; returns its outputs in order."""
        return list(self._session.run(None, dict(inputs)))
