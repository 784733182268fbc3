"""Several server processes on one socket, and the supervisor that manages them.

The supervisor binds the socket, starts the workers, forwards signals, and restarts a worker that dies. A worker is a
complete server: event loop, queues, models. The workers share the listening socket (a free one accepts the next
connection), the verified copies of the weights (:mod:`sbs_edge.runtime.private`), the metrics (prometheus_client's
multiprocess mode) and a table of their states.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from sbs_edge.errors import GuardError, IntegrityError, SbsEdgeError, UsageError
from sbs_edge.resources import usable_cpus
from sbs_edge.runtime.private import forget_shared, share_copies
from sbs_edge.serve import listening, logs
from sbs_edge.serve.logs import logger
from sbs_edge.serve.settings import ServeSettings
from sbs_edge.serve.states import DRAINING, READY, STARTING, UNSOUND

__all__ = ["Peers", "supervise", "worker_settings"]

_SAME_SIGNAL_S = 1.0  # process managers may send a signal twice
_POLL_S = 0.2
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0
_HEALTHY_S = 60.0  # after running this long, a worker is restarted with the first delay
_KILL_AFTER_S = 5.0  # beyond the drain timeout
_PR_SET_PDEATHSIG = 1
_ERRORS = {kind.exit_code: kind for kind in (SbsEdgeError, UsageError, GuardError, IntegrityError)}
_DIVIDED = ("max_concurrent", "max_queue_texts", "max_inside_bytes", "max_connections")


class Peers:
    """The states of all workers, in shared memory."""

    def __init__(self, states: Any, index: int) -> None:
        self._states = states
        self._index = index

    def report(self, state: int) -> None:
        """Set this worker's state."""
        self._states[self._index] = state

    @property
    def ready(self) -> bool:
        """Return whether all workers have been ready once, and none has given an answer that is not finite."""
        states = list(self._states)
        return states[-1] == READY and UNSOUND not in states[:-1]

    @property
    def document(self) -> dict[str, int]:
        """The number of workers wanted, and of those ready."""
        states = list(self._states)[:-1]
        return {"wanted": len(states), "ready": states.count(READY)}


def supervise(sources: Sequence[tuple[str | None, Path]], settings: ServeSettings) -> int:
    """Serve with ``settings.workers`` processes until a signal to stop.

    Returns 0 after a clean drain of all workers, 1 if requests were cut off, 130 after a second signal.

    Raises:
        SbsEdgeError: the workers could not start.
    """
    listener = listening.bind(settings)
    folder = Path(tempfile.mkdtemp(prefix="sbs-edge-workers-"))
    try:
        return _Supervisor(sources, settings, listener, folder).run()
    finally:
        listening.unbind(listener, settings)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Worker:
    process: Any = None
    started_s: float = 0.0
    start_at_s: float = 0.0
    deaths: int = 0


class _Supervisor:
    def __init__(
        self,
        sources: Sequence[tuple[str | None, Path]],
        settings: ServeSettings,
        listener: socket.socket,
        folder: Path,
    ) -> None:
        self._sources, self._settings, self._listener, self._folder = sources, settings, listener, folder
        self._context = multiprocessing.get_context("spawn")
        self._workers = [_Worker() for _ in range(settings.workers)]
        # A state for each worker, and a last one that is READY once all of them have been.
        self._states = self._context.RawArray("i", settings.workers + 1)
        self._stop_at_s = 0.0
        self._reload = False
        self._clean = True
        for name in ("metrics", "copies"):
            (folder / name).mkdir(mode=0o700)
        # Read by prometheus_client when a worker imports it.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder / "metrics")

    def run(self) -> int:
        logger.info(
            "listening",
            **listening.address_of(self._listener),
            tls=self._settings.tls_cert is not None,
            workers=len(self._workers),
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_reload)
        for index in range(len(self._workers)):
            self._start(index)
        drain_sent = False
        while True:
            alive = [w.process for w in self._workers if w.process is not None]
            if self._stop_at_s and not alive:
                break
            connection.wait([process.sentinel for process in alive], timeout=_POLL_S)
            self._reap()
            if self._stop_at_s and not drain_sent:
                drain_sent = True
                logger.info("draining", workers=len(alive))
                self._send(signal.SIGTERM)
            if self._stop_at_s:
                if time.monotonic() > self._stop_at_s + self._settings.drain_timeout_s + _KILL_AFTER_S:
                    self._clean = False
                    self._send(signal.SIGKILL)
                continue
            if self._reload:
                self._reload = False
                logger.info("reload_requested")
                self._send(signal.SIGHUP, starting=False)  # those that are starting read the files anyway
            for index, worker in enumerate(self._workers):
                if worker.process is None and time.monotonic() >= worker.start_at_s:
                    self._start(index)
            if list(self._states)[:-1].count(STARTING) == 0:
                if self._states[-1] != READY:
                    self._states[-1] = READY
                    logger.info("ready", workers=len(self._workers))
                forget_shared(self._folder / "copies")
        logger.info("drained" if self._clean else "drain_timeout")
        return 0 if self._clean else 1

    def _start(self, index: int) -> None:
        worker = self._workers[index]
        self._states[index] = STARTING
        arguments = (
            index,
            self._sources,
            self._settings,
            self._listener,
            self._states,
            str(self._folder),
            logs.level,
        )
        worker.process = self._context.Process(target=_work, args=arguments, name=f"sbs-edge-worker-{index}")
        worker.process.start()
        worker.started_s = time.monotonic()
        logger.info("worker_started", worker=index, pid=worker.process.pid)

    def _reap(self) -> None:
        """Handle workers that have ended; while serving, schedule their restart."""
        for index, worker in enumerate(self._workers):
            if worker.process is None or worker.process.is_alive():
                continue
            worker.process.join()
            code, pid = worker.process.exitcode, worker.process.pid
            worker.process = None
            self._states[index] = STARTING
            for path in (self._folder / "metrics").glob(f"gauge_live*_{pid}.db"):
                path.unlink(missing_ok=True)
            if self._stop_at_s:
                self._clean = self._clean and code in (
                    0,
                    -signal.SIGTERM,
                )  # SIGTERM ends a worker that was still starting
                continue
            failure = self._folder / f"failure-{pid}"
            if self._states[-1] != READY and failure.exists():
                self._send(signal.SIGKILL)
                error = json.loads(failure.read_text(encoding="utf-8"))
                raise _ERRORS.get(error["code"], SbsEdgeError)(error["message"])
            lived_s = time.monotonic() - worker.started_s
            worker.deaths = 1 if lived_s > _HEALTHY_S else worker.deaths + 1
            delay_s = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** (worker.deaths - 1))
            worker.start_at_s = time.monotonic() + delay_s
            logger.error("worker_died", worker=index, pid=pid, code=code, again_in_s=delay_s)

    def _send(self, number: int, *, starting: bool = True) -> None:
        for worker, state in zip(self._workers, list(self._states)[:-1], strict=True):
            if worker.process is not None and (starting or state != STARTING):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid, number)

    def _on_stop(self, *_: object) -> None:
        now = time.monotonic()
        if not self._stop_at_s:
            self._stop_at_s = now
            self._states[-1] = DRAINING  # this turns readiness off in every worker
        elif now - self._stop_at_s >= _SAME_SIGNAL_S:
            self._send(signal.SIGKILL)
            listening.unbind(self._listener, self._settings)
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(130)

    def _on_reload(self, *_: object) -> None:
        self._reload = True


def worker_settings(settings: ServeSettings) -> ServeSettings:
    """Return the settings of one worker: an equal part of the limits, but enough for a full request, and of the cores."""
    count = settings.workers
    share: dict[str, Any] = {name: -(-getattr(settings, name) // count) for name in _DIVIDED}
    share["max_queue_texts"] = max(share["max_queue_texts"], settings.max_texts)
    share["max_inside_bytes"] = max(share["max_inside_bytes"], settings.max_body_bytes)
    share["threads"] = settings.threads or max(1, usable_cpus() // count)
    return settings.model_copy(update=share)


def _work(
    index: int,
    sources: Sequence[tuple[str | None, Path]],
    settings: ServeSettings,
    listener: socket.socket,
    states: Any,
    folder: str,
    log_level: str,
) -> None:
    """Run a worker; the process exits with the exit code of a server."""
    with contextlib.suppress(OSError):
        os.setsid()  # Ctrl-C reaches only the supervisor, which forwards it once
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # end with the supervisor
    from sbs_edge.serve import server

    logs.configure(log_level, worker=index)
    share_copies(Path(folder, "copies"))
    try:
        code = server.serve_on(listener, sources, worker_settings(settings), peers=Peers(states, index))
    except SbsEdgeError as error:
        failure = {"code": error.exit_code, "message": str(error)}
        Path(folder, f"failure-{os.getpid()}").write_text(json.dumps(failure), encoding="utf-8")
        code = error.exit_code
    sys.stderr.flush()
    os._exit(code)  # nothing is left to clean up, and a thread inside a graph would delay the exit
