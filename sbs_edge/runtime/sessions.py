"""onnxruntime sessions: their options, opening at first use, and errors with advice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sbs_edge.errors import IntegrityError, OutOfMemory, UsageError
from sbs_edge.resources import lacks_memory, memory_advice
from sbs_edge.runtime.external_data import inlined
from sbs_edge.runtime.int8_products import EXACT_OPTION, needs_exact_option
from sbs_edge.runtime.ort import onnxruntime_module
from sbs_edge.runtime.prepacked import load_prepacked
from sbs_edge.runtime.tensorrt import RTX, TENSORRT, tensorrt_options

__all__ = ["GraphSource", "Session", "Sessions", "usable_providers"]


def usable_providers(providers: Sequence[str]) -> list[str]:
    """Return those of ``providers`` that the installed onnxruntime has.

    Raises:
        MissingExtra: onnxruntime is not installed.
        UsageError: it has none of them.
    """
    available = onnxruntime_module().get_available_providers()
    usable = [provider for provider in providers if provider in available]
    if not usable:
        raise UsageError(
            f"This target needs {' or '.join(providers)}, and the installed onnxruntime offers only "
            f"{', '.join(available)}. Use a cpu target, or install 'sbs-edge[gpu]'."
        )
    return usable


def _return_freed_pages() -> None:
    """Return memory that loading has freed to the system; glibc would keep some megabytes per graph."""
    try:
        import ctypes  # numpy has it loaded

        ctypes.CDLL(None).malloc_trim(0)
    except (ImportError, OSError, AttributeError):
        return  # another C library


class GraphSource(NamedTuple):
    """Verified bytes of a graph, in memory or as temporary files.

    ``read()`` returns the content of the graph and of the files of its constants, by the names in the graph.
    ``copy()`` is a context with the path of a private copy of all of them. ``mapped`` says
    that a copy is mapped on the CPU too, because bytes in memory exist twice while a graph is loaded.
    """

    read: Callable[[], tuple[bytes, Mapping[str, bytes]]]
    copy: Callable[[], AbstractContextManager[Path]]
    mapped: bool = False


class Session:
    """One graph, ready to run; safe to share between threads."""

    def __init__(
        self,
        path: Path,
        providers: Sequence[str],
        threads: int,
        digests: Sequence[str] | None = None,
        source: GraphSource | None = None,
        *,
        int8: bool = True,
    ) -> None:
        """Load ``path``.

        Args:
            path: the graph; without ``source``, the file itself is mapped.
            providers: the wanted providers; the first that is installed is used.
            threads: threads per call.
            digests: SHA-256 of the graph's files, to cache this machine's form of them (pre-packed weights,
                TensorRT engines) in the user's cache directory; None: no cache.
            source: where the graph's bytes come from, if they must not change any more.
            int8: whether the graph may have int8 products; without any, the CPU is not probed.

        Raises:
            MissingExtra: onnxruntime is not installed.
            UsageError: no wanted provider is in the installed onnxruntime, or it does not start.
            IntegrityError: the runtime refuses the graph.
            OutOfMemory: there is not enough memory for the graph.
        """
        provider = usable_providers(providers)[0]
        onnxruntime = onnxruntime_module()
        settings: dict[str, Any] = {}

        on_cpu = provider == "CPUExecutionProvider"
        self.corrected = int8 and on_cpu and needs_exact_option()
        """Set if the session avoids this CPU's saturating int8 products."""

        def options() -> Any:
            found = onnxruntime.SessionOptions()
            if self.corrected:
                found.add_session_config_entry(*EXACT_OPTION)
            found.intra_op_num_threads = threads
            found.inter_op_num_threads = 1
            found.log_severity_level = 4 if digests else 3  # a cache that cannot be written is not an error
            return found

        def create(graph: Path, chosen: Any) -> Any:
            return onnxruntime.InferenceSession(str(graph), chosen, providers=[(provider, settings)])

        def make(chosen: Any) -> Any:
            if source is None:
                return create(path, chosen)
            if source.mapped or not on_cpu:
                try:
                    with source.copy() as copied:
                        settings.update(tensorrt_options(copied, provider, digests) if on_tensorrt else {})
                        return create(copied, chosen)
                except IntegrityError:
                    raise
                except OSError:  # no place for a copy: load from memory, which takes more of it
                    if not on_cpu:
                        raise
            return in_memory(chosen, *source.read())

        def in_memory(chosen: Any, content: bytes, constants: Mapping[str, bytes]) -> Any:
            content = inlined(content, constants) if constants else content
            return onnxruntime.InferenceSession(content, chosen, providers=[(provider, settings)])

        on_tensorrt = provider in (TENSORRT, RTX)
        if on_tensorrt and source is None:
            settings.update(tensorrt_options(path, provider, digests))
        session = None
        if digests and on_cpu:
            session = load_prepacked(path, digests, options, create, make, corrected=self.corrected)
        if session is None:
            try:
                session = make(options())
            except IntegrityError:
                raise
            except Exception as error:  # onnxruntime has no common base class for its load errors
                if lacks_memory(error):
                    raise OutOfMemory(
                        f"There is not enough memory to load the graph {path}: {error}. {memory_advice()}"
                    ) from error
                raise IntegrityError(f"onnxruntime rejects the graph {path}: {error}") from error
        started = session.get_providers()[0]
        if started != provider:  # it falls back to the CPU where the provider's libraries cannot be loaded
            raise UsageError(
                f"onnxruntime could not start {provider} and fell back to {started}: its libraries or "
                "the GPU's driver are missing or have another version (sbs-edge doctor lists what is installed). "
                "Install what is missing, or use a CPU target."
            )
        _return_freed_pages()
        self._session = session

    @property
    def inference(self) -> Any:
        """Return onnxruntime's own session, for callers that bind buffers themselves."""
        return self._session

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """Run the graph; returns its outputs in order.

        Raises:
            OutOfMemory: there is not enough memory for this call.
        """
        try:
            return list(self._session.run(None, dict(inputs)))
        except Exception as error:  # onnxruntime has no class of its own for this
            if not lacks_memory(error):
                raise
            shapes = ", ".join(f"{name} {np.shape(value)}" for name, value in inputs.items())
            raise OutOfMemory(
                f"There is not enough memory for a call with {shapes}. Lower max_batch_tokens, so that a call "
                f"has fewer rows, or send shorter inputs. {memory_advice()}"
            ) from error


class Sessions(MutableMapping[str, Session]):
    """Sessions by role, each opened at its first use. It is safe to share between threads.

    Threads that use the same role at once wait until one of them has opened it; other roles are not delayed. If a
    role cannot be opened, the next call tries again.
    """

    def __init__(self, openers: Mapping[str, Callable[[], Session]]) -> None:
        """Take, for every role, the function that opens its graph."""
        self._openers = dict(openers)
        self._locks = {role: threading.Lock() for role in openers}
        self._opened: dict[str, Session] = {}

    def __getitem__(self, role: str) -> Session:
        """Return the session of ``role``, opened if necessary; raise KeyError if there is none."""
        found = self._opened.get(role)
        if found is None:
            opener = self._openers[role]
            with self._locks[role]:
                found = self._opened.get(role)
                if found is None:
                    found = opener()
                    if role in self._openers:  # else it was closed meanwhile: the caller keeps its own
                        self._opened[role] = found
        return found

    def __setitem__(self, role: str, session: Session) -> None:
        """Set the open session of ``role``."""
        self._locks.setdefault(role, threading.Lock())
        self._openers[role] = lambda: session
        self._opened[role] = session

    def __delitem__(self, role: str) -> None:
        """Forget ``role``."""
        del self._openers[role]
        self._opened.pop(role, None)

    def __contains__(self, role: object) -> bool:
        """Return whether there is a graph for ``role``, open or not."""
        return role in self._openers

    def __iter__(self) -> Iterator[str]:
        """Go through the roles."""
        return iter(list(self._openers))

    def __len__(self) -> int:
        """Return the number of roles."""
        return len(self._openers)

    def open_all(self) -> None:
        """Open all roles that are not open yet."""
        for role in self:
            self[role]

    def clear(self) -> None:
        """Forget every role without opening it."""
        self._openers.clear()
        self._opened.clear()

    @property
    def opened(self) -> tuple[str, ...]:
        """Return the roles whose graph is open."""
        return tuple(self._opened)
