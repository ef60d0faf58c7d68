"""Listening: `listen`, for tests and for what a job serves while it runs."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ..context import forget, keep
from ..errors import UsageError
from ..kernel.traps import READ, wait_io
from .closing import Closing
from .errors import Closed, IOFailed, TimedOut
from .gate import Gate, gate
from .names import shown
from .operation import operation
from .streams import Stream
from .surroundings import deadline_in, left, release

if TYPE_CHECKING:
    import ssl


def listen(
    host: str = "", port: int = 0, *, tls: ssl.SSLContext | None = None, unix: str = "", backlog: int = 128
) -> Listener:
    """Listen at `port` of the address `host` (0: a free one, see `Listener.port`), or at the new path `unix`."""
    if bool(host) == bool(unix):
        raise UsageError(f"listen() takes an address and a port, or unix=PATH, not {host!r} and unix={unix!r}")
    family = socket.AF_UNIX if unix else socket.AF_INET6 if ":" in host else socket.AF_INET
    where = unix or shown(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if unix:
            sock.bind(unix)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise IOFailed(f"cannot listen at {where}: {error.strerror or error}") from None
    return Listener(sock, where, unix, gate(), tls)


class Listener(Closing):
    """Accepts streams. Closed like a stream; a Unix socket's path is removed then."""

    __slots__ = ("__weakref__", "_gate", "_path", "_socket", "_tls", "where")

    def __init__(self, sock: socket.socket, where: str, path: str, gate: Gate, tls: ssl.SSLContext | None) -> None:
        self._socket: socket.socket | None = sock  # None: closed
        self._path = path
        self._tls = tls
        self._gate = gate
        gate.taken += 1
        self.where = where
        keep(self)

    @property
    def port(self) -> int:
        """The port; 0 for a Unix socket."""
        return 0 if self._path else int(self._open().getsockname()[1])

    @operation
    def accept(self, *, timeout: float | None = None) -> Generator[Any, Any, Stream]:
        """The next stream that somebody opens. With `tls`, TLSFailed when the handshake with that one fails."""
        deadline = deadline_in(timeout)
        fd = self._open().fileno()
        purpose = f"to accept a connection at {self.where}"
        yield from self._gate.take(purpose, deadline)
        try:
            while True:
                if not (yield from wait_io(fd, READ, left(deadline))):
                    raise TimedOut(f"nobody connected to {self.where} in {timeout:g} s")
                if self._socket is None:
                    raise Closed(f"the listener at {self.where} was closed while it was waited for")
                try:
                    sock, address = self._socket.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as error:
                    raise IOFailed(f"cannot accept a connection at {self.where}: {error.strerror or error}") from None
                sock.setblocking(False)
                break
        except BaseException:
            self._gate.give()
            raise
        client = shown(*address[:2]) if isinstance(address, tuple) else f"a client of {self.where}"  # a Unix socket has no name
        if self._tls is None:
            return Stream(sock, client, self._gate)
        from .tls import secure  # and with it ssl, which is 4 MB

        return (yield from secure(sock, self._gate, client, self._tls, None, deadline))

    def close(self) -> None:
        """At once; who waits for it gets Closed."""
        sock, self._socket = self._socket, None
        if sock is None:
            return
        forget(self)
        release(sock.fileno())
        sock.close()
        self._gate.give()
        if self._path:
            try:
                if stat.S_ISSOCK(os.lstat(self._path).st_mode):
                    os.unlink(self._path)
            except OSError:
                pass  # somebody else has removed it, or the place it was in

    def _open(self) -> socket.socket:
        if self._socket is None:
            raise Closed(f"the listener at {self.where} is closed")
        return self._socket

    def __del__(self) -> None:
        if self._socket is not None:
            self.close()
