"""The socket a server listens on: TCP or a Unix socket, bound before anything is loaded."""

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
        UsageError: the address is taken, or cannot be listened on.
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
            f"Nothing can listen on {settings.host} port {settings.port}: {error.strerror or error}. Choose another "
            "with --host and --port."
        ) from error
    return listener


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(str(path))
        os.chmod(path, 0o660)  # this user and group; anyone else needs leave for the file, as for any other
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"Nothing can listen on the Unix socket {path}: {error.strerror or error}. Choose another with --uds."
        ) from error
    except UsageError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that is gone; refuse anything else at ``path``."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} exists and is not a socket. Choose another path with --uds.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        try:
            asked.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise UsageError(f"Another server listens on the Unix socket {path}. Choose another with --uds.")


def unbind(listener: socket.socket, settings: ServeSettings) -> None:
    """Close the socket and remove its path."""
    listener.close()
    if settings.uds is not None:
        with contextlib.suppress(OSError):
            settings.uds.unlink()


def address_of(listener: socket.socket) -> dict[str, object]:
    """Return what the log says of the address: ``host`` and ``port``, or ``uds``."""
    name = listener.getsockname()
    return {"uds": name} if isinstance(name, str) else {"host": name[0], "port": name[1]}
