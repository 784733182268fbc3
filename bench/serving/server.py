"""``sbs-edge serve`` as the server under test, in its own process and on its own processors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from sbs_edge.bench.serving.client import HOST

__all__ = ["Cores", "PinnedServer", "ServerUnderTest", "shared_cores", "split_cores"]

Cores = tuple[list[int], list[int]]  # processors of the server, processors of the client

_TICKS = os.sysconf("SC_CLK_TCK")


def shared_cores() -> Cores:
    """Server and client on every processor this process may use."""
    every = sorted(os.sched_getaffinity(0))
    return every, every


def split_cores() -> Cores:
    """The client on the last processor, the server on all others; both on the only one there is.

    A client on the server's processors slows down the server, and the more requests are refused, the
    more it does so.
    """
    every = sorted(os.sched_getaffinity(0))
    return (every[:-1], every[-1:]) if len(every) > 1 else (every, every)


class PinnedServer(ABC):
    """A server in a process of its own on ``cores[0]``; ``with`` waits until it answers, and always stops it.

    This process moves to ``cores[1]`` until then.
    """

    ready_s = 60.0

    def __init__(self, arguments: Sequence[str], cores: Cores, log: Any = None) -> None:
        command = [sys.executable, "-P", "-m", *arguments]
        self.cores = cores
        self.port = 0
        self._before = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[0])  # inherited by every thread of the child
        try:
            self.process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL)
        finally:
            os.sched_setaffinity(0, cores[1])

    @abstractmethod
    def is_ready(self) -> bool:
        """Return whether the server answers; it may set ``port``."""

    def last_words(self) -> str:
        """Return what the server said, for the error of one that did not start."""
        return ""

    def __enter__(self) -> Self:
        try:
            end = time.monotonic() + self.ready_s
            while time.monotonic() < end and self.process.poll() is None:
                if self.is_ready():
                    return self
                time.sleep(0.05)
            raise RuntimeError(f"The server did not get ready: {self.last_words()}")
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        os.sched_setaffinity(0, self._before)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class ServerUnderTest(PinnedServer):
    """``sbs-edge serve`` with ``arguments``."""

    ready_s = 120.0

    def __init__(self, bundle: Path | str, *arguments: str, cores: Cores | None = None) -> None:
        self._log = tempfile.NamedTemporaryFile("w", suffix=".log", delete=False)  # noqa: SIM115 (kept open)
        command = ("sbs_edge", "serve", str(bundle), "--port", "0", *arguments)
        super().__init__(command, cores or shared_cores(), self._log)

    def is_ready(self) -> bool:
        """Read the port and the server's own word that it is ready from its log."""
        for line in Path(self._log.name).read_text().splitlines():
            event = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if event.get("event") == "listening":
                self.port = int(event["port"])
            elif event.get("event") == "ready":
                return True
        return False

    def last_words(self) -> str:
        """Return the end of its log."""
        return Path(self._log.name).read_text()[-2000:]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._log.close()
        os.unlink(self._log.name)

    def _status(self, field_name: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field_name + ":"):
                return int(line.split()[1])
        return 0

    @property
    def rss_mib(self) -> float:
        """Resident memory in MiB."""
        return self._status("VmRSS") / 1024

    @property
    def n_threads(self) -> int:
        """Threads of the process."""
        return self._status("Threads")

    @property
    def cpu_s(self) -> float:
        """Processor time of all its threads so far, in seconds, to a hundredth."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def n_descriptors(self, *, connections: bool = False) -> int:
        """Open descriptors, with or without sockets."""
        count = 0
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                count += connections or not os.readlink(entry).startswith("socket:")
            except OSError:
                continue
        return count

    def metric(self, start: str) -> float:
        """Return the first metric whose line starts with ``start``; 0 if there is none."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(start):
                    return float(line.split()[-1])
        return 0.0
