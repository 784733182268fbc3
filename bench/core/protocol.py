"""Start a worker process, send it commands, and stop it after a time limit."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

from sbs_edge.bench.peers.convert import cache_root
from sbs_edge.bench.peers.system import Spec
from sbs_edge.errors import SbsEdgeError

__all__ = ["Worker", "WorkerFailed"]

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerFailed(SbsEdgeError):
    """A system stopped, failed or took too long; the message is the reason in its row."""


class Worker:
    """A system in its own process.

    Args:
        spec: the system and its conditions.
        module: the worker's module; the training and kernel benches have their own.
    """

    def __init__(self, spec: Spec, module: str = "sbs_edge.bench.core.worker") -> None:
        self.spec = spec
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.started_ns = time.perf_counter_ns()
        threads = {name: str(spec.threads) for name in _THREAD_VARIABLES}
        # Byte code is kept between starts, as after an installation. A read-only source tree would otherwise
        # be compiled at every start, which would slow down this project alone.
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **inherited,
                **threads,
                "PYTHONPYCACHEPREFIX": str(cache_root() / "bytecode"),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONWARNINGS": "ignore",
            },
        )
        self._buffer = b""
        self._send(asdict(spec))

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.poll() is None

    def _send(self, content: dict[str, Any]) -> None:
        if self._process.stdin is None:
            raise WorkerFailed("the worker has no input")
        try:
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise WorkerFailed(self._last_words()) from error

    def _last_words(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the worker closed its output but did not end"
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        cause = f"killed by signal {-code}" if code < 0 else f"exited with {code}"
        return f"the worker {cause}" + (f": {lines[-1][:300]}" if lines else "")

    def ask(self, do: str, timeout_s: float = 300.0, **order: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            WorkerFailed: the worker ended, the command failed in it, or the limit passed (it is killed).
        """
        self._send({"do": do, **order})
        if self._process.stdout is None:
            raise WorkerFailed("the worker has no output")
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self.close()
                raise WorkerFailed(f"'{do}' took more than {timeout_s:g} s")
            chunk = os.read(descriptor, 1 << 20)
            if not chunk:
                raise WorkerFailed(self._last_words())
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(str(reply["error"]))
        return reply

    def close(self) -> None:
        """End the process and wait for it."""
        if self._process.poll() is None:
            try:
                self._send({"do": "quit"})
                self._process.wait(timeout=5)
            except (WorkerFailed, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
