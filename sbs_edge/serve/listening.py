"""The listening socket, TCP or Unix; it is bound before a model is loaded."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from sbs_edge.errors import UsageError
from sbs_edge.serve.settings import ServeSettings

__all__ = ["address_of", "bind", "unbind"]

_BACKLOG = 2048


def bind(settings: ServeSettings) -> socket.socket:
    """Return a listening socket.

    Raises:
        UsageError: the address is in use or not available.
    """
    if settings.uds is not None:
        return _bind_unix(settings.uds)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"The server cannot listen on {settings.host} port {settings.port}: {error.strerror or error}. Choose "
            "another host or port."
        ) from error
    return listener


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(str(path))
        os.chmod(path, 0o660)  # for this user and group; change the mode of the file to let others connect
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"The server cannot listen on the Unix socket {path}: {error.strerror or error}. Choose another uds path."
        ) from error
    except UsageError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that has ended; raise for anything else at ``path``."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} exists and is not a socket. Choose another uds path.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise UsageError(f"Another server listens on the Unix socket {path}. Choose another uds path.")


def unbind(listener: socket.socket, settings: ServeSettings) -> None:
    """Close the socket and remove its path."""
    listener.close()
    if settings.uds is not None:
        with contextlib.suppress(OSError):
            settings.uds.unlink()


def address_of(listener: socket.socket) -> dict[str, object]:
    """Return the address as fields for the log: ``host`` and ``port``, or ``uds``."""
    name = listener.getsockname()
    return {"uds": name} if isinstance(name, str) else {"host": name[0], "port": name[1]}
