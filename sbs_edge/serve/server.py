"""Run the service under uvicorn: signals, drain, exit code.

SIGTERM or SIGINT turns readiness off at once, lets admitted requests finish, and exits with 0 within the drain
timeout. A second signal, a second or more later, exits at once. SIGHUP reads the model directories and the TLS
certificate again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from sbs_edge.errors import UsageError
from sbs_edge.serve import process_settings
from sbs_edge.serve.app import create_app
from sbs_edge.serve.engine import Loader, student_loader
from sbs_edge.serve.escalate import Escalation
from sbs_edge.serve.listening import address_of, bind, unbind
from sbs_edge.serve.logs import logger
from sbs_edge.serve.metrics import Metrics
from sbs_edge.serve.protocol import connections
from sbs_edge.serve.record import Recorder
from sbs_edge.serve.registry import Registry
from sbs_edge.serve.service import Service
from sbs_edge.serve.settings import ServeSettings
from sbs_edge.serve.telemetry import tracing_to

if TYPE_CHECKING:
    from sbs_edge.serve.workers import Peers

__all__ = ["create_service", "serve", "serve_on"]

# glibc gives every thread its own heap and returns little of it to the system. Two heaps for all threads keep memory
# constant under bursts. mallopt's M_ARENA_MAX is -8.
_M_ARENA_MAX, _ARENAS = -8, 2

# `timeout` and process managers send a signal to the process and to its group, so it arrives twice.
_SAME_SIGNAL_S = 1.0
_CERTIFICATE_TICKS = 100  # tenths of a second between two checks of the certificate's files


def create_service(
    sources: Sequence[tuple[str | None, Path]], settings: ServeSettings, loader: Loader | None = None
) -> Service:
    """Return a service; its models are loaded when the application's lifespan starts."""
    metrics = Metrics()
    loader = loader or student_loader(settings.target, settings.threads, settings.max_batch_tokens)
    escalation = None
    if settings.escalate_url:
        escalation = Escalation(
            settings.escalate_url,
            settings.escalate_model,
            key=settings.escalate_key.get_secret_value() if settings.escalate_key else None,
            timeout_s=settings.escalate_timeout_s,
            concurrency=settings.escalate_concurrency,
        )
    tracing = tracing_to(settings.otel_endpoint) if settings.otel_endpoint else None
    recorder = None
    if settings.record is not None:
        recorder = Recorder(
            settings.record, settings.record_below, settings.record_share, settings.record_max_bytes, metrics
        )
    return Service(
        settings,
        Registry(sources, settings, metrics, loader),
        metrics,
        escalation=escalation,
        tracing=tracing,
        recorder=recorder,
    )


class _Server(uvicorn.Server):
    """A uvicorn server with the signals described above."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()
        self.clean = True
        self._stop_requested_s = 0.0  # time of the first signal to stop
        self._certificate = _certificate_state(service.settings)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and self._service.peers is None:
            loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
            logger.info("listening", **address_of(sockets[0]), tls=self.config.is_ssl, loop=loop)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._service.draining:
            if now - self._stop_requested_s < _SAME_SIGNAL_S:
                return
            logger.warning("stopped_at_once", in_flight=self._service.gate.inside)
            sys.stderr.flush()
            os._exit(130)  # threads inside a graph cannot be interrupted
        self._service.draining = True
        self._stop_requested_s = now
        logger.info("draining", in_flight=self._service.gate.inside)
        self._spawn(self._drain())

    async def _drain(self) -> None:
        """Wait for admitted requests, at most for the drain timeout, then let uvicorn close."""
        service = self._service
        loop = asyncio.get_running_loop()
        end = loop.time() + service.settings.drain_timeout_s
        while service.gate.inside and loop.time() < end:
            await asyncio.sleep(0.01)
        self.clean = not service.gate.inside
        logger.info("drained" if self.clean else "drain_timeout", in_flight=service.gate.inside)
        # After this uvicorn only flushes responses that are already written.
        self.config.timeout_graceful_shutdown = 1 if not self.clean else 3
        self.should_exit = True

    def _reload_certificate(self) -> None:
        """Use a renewed certificate for new connections; keep the old one if the new one does not load."""
        settings, state = self._service.settings, _certificate_state(self._service.settings)
        if self.config.ssl is None or state == self._certificate:
            return
        self._certificate = state
        files = str(settings.tls_cert), str(settings.tls_key)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files)
            self.config.ssl.load_cert_chain(*files)
        except OSError as error:  # includes ssl.SSLError
            logger.error("certificate_refused", certificate=files[0], error=str(error.strerror or error))
        else:
            logger.info("certificate_loaded", certificate=files[0])

    def _reload(self) -> None:
        self._reload_certificate()
        if self._service.started and not self._service.draining:
            logger.info("reload_requested")
            self._spawn(self._service.registry.refresh(retry_refused=True))

    async def on_tick(self, counter: int) -> bool:
        if self._service.peers is not None:
            self._service.report_to_peers()
        if self._service.failure is not None:
            self.should_exit = True
        if counter % _CERTIFICATE_TICKS == 0:
            self._reload_certificate()
        return await super().on_tick(counter)


def _certificate_state(settings: ServeSettings) -> list[tuple[int, int]]:
    """Return times and inodes of the certificate and its key; an empty list without TLS."""
    state = []
    for path in filter(None, (settings.tls_cert, settings.tls_key)):
        with contextlib.suppress(OSError):
            info = path.stat()
            state.append((info.st_mtime_ns, info.st_ino))
    return state


def serve(
    sources: Sequence[tuple[str | None, Path]], settings: ServeSettings, loader: Loader | None = None
) -> int:
    """Serve until told to stop; return 0 after a clean drain and 1 if the drain timed out.

    Raises:
        SbsEdgeError: a bundle could not be loaded at the start (exit code 4 for an ``IntegrityError``).
    """
    if (
        settings.uds is None
        and settings.host not in ("127.0.0.1", "::1", "localhost")
        and settings.token is None
    ):
        logger.warning(
            "open_to_the_network", host=settings.host, hint="anyone who can connect may use it; set a token"
        )
    if settings.workers > 1:
        from sbs_edge.serve.workers import supervise

        return supervise(sources, settings)
    listener = bind(settings)
    try:
        return serve_on(listener, sources, settings, loader)
    finally:
        unbind(listener, settings)


def serve_on(
    listener: socket.socket,
    sources: Sequence[tuple[str | None, Path]],
    settings: ServeSettings,
    loader: Loader | None = None,
    peers: Peers | None = None,
) -> int:
    """Serve on a listening socket; with ``peers``, as one of several processes."""
    process_settings.set_switch_interval()
    # The tokenizer's thread pool would occupy the event loop's core and save only microseconds.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(_M_ARENA_MAX, _ARENAS)
    service = create_service(sources, settings, loader)
    service.registry.on_change = process_settings.freeze_gc
    service.peers = peers
    app = create_app(service)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        http=connections(
            app.state.admission_filter,
            settings.head_timeout_s,
            settings.max_head_bytes,
            settings.max_connections,
        ),
        ws="none",
        proxy_headers=False,  # the log shows the peer address; a header could be forged
        timeout_keep_alive=75,
        backlog=2048,
        ssl_certfile=str(settings.tls_cert) if settings.tls_cert else None,
        ssl_keyfile=str(settings.tls_key) if settings.tls_key else None,
    )
    try:
        config.load()
    except OSError as error:  # includes ssl.SSLError
        raise UsageError(
            f"The certificate {settings.tls_cert} and the key {settings.tls_key} cannot be used: "
            f"{error.strerror or error}. Both must be PEM files that belong together (tls_cert, tls_key)."
        ) from error
    server = _Server(config, service)
    server.run([listener])
    if service.failure is not None:
        raise service.failure
    return 0 if server.clean else 1
