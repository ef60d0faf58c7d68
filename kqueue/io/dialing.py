"""From an address to a connected stream: `connect`."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Generator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

from ..errors import UsageError
from ..kernel.traps import WRITE, sleep, wait_any
from .errors import ConnectFailed, TimedOut
from .gate import gate
from .names import Address, addresses_of, shown
from .operation import operation
from .streams import Stream
from .surroundings import deadline_in, left, now

if TYPE_CHECKING:
    import ssl

_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY)
_TCP_OPTIONS: Final = (  # what is written goes out at once; and a peer that vanished without a word is noticed in half a minute
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
STAGGER_S: Final = 0.25  # RFC 8305, section 8: "Connection Attempt Delay"
BUSY_S: Final = 0.01  # until a Unix socket whose backlog is full is asked again, or a gate that is


@operation
def connect(
    host: str = "", port: int = 0, *, tls: bool | ssl.SSLContext = False, unix: str = "", server_name: str = "",
    timeout: float | None = None,
) -> Generator[Any, Any, Stream]:  # fmt: skip
    """A stream to `port` of `host`, or to the Unix socket at the path `unix`.

    `server_name`: what its certificate must be for, where that is not `host`. `timeout`: seconds for all of it.

    Raises NameNotFound, ConnectFailed, TLSFailed or TimedOut.
    """
    if bool(host) == bool(unix) or (host and not 0 < port < 65536):
        raise UsageError(f"connect() takes a host and a port from 1 to 65535, or unix=PATH, not {host!r}, {port!r} and {unix!r}")
    server_name = (server_name or host).rstrip(".")
    if tls is not False and not server_name:
        raise UsageError("connect() with unix= and tls= needs server_name=, the name that the certificate is for")
    deadline = deadline_in(timeout)
    peer = unix or shown(host, port)
    addresses: list[Address] = [(socket.AF_UNIX, unix)] if unix else (yield from addresses_of(host, port, deadline))
    sock = yield from _first(addresses, peer, deadline)
    if tls is False:
        return Stream(sock, peer, gate())
    from .tls import default_context, secure  # and with it ssl, which is 4 MB

    context = default_context() if tls is True else tls
    return (yield from secure(sock, gate(), peer, context, server_name, deadline))


class _Attempts:
    """Sockets that are being connected, each with its place of the gate."""

    def __init__(self, peer: str, deadline: float | None) -> None:
        self.gate = gate()
        self.under_way: dict[int, socket.socket] = {}  # by fd
        self.refusals: list[str] = []
        self._peer = peer
        self._deadline = deadline

    def begin(self, address: Address) -> Generator[Any, Any, socket.socket | None]:
        """Try one more; the socket if it is connected already, None if that is under way or has failed."""
        family, at = address
        try:
            sock = yield from self.gate.socket(family, f"to connect to {self._peer}", self._deadline)
        except TimedOut:
            raise
        except OSError as error:  # the host has no such family
            self.refusals.append(error.strerror or str(error))
            return None
        self.under_way[sock.fileno()] = sock
        try:
            if family != socket.AF_UNIX:
                for level, option, value in _TCP_OPTIONS:
                    sock.setsockopt(level, option, value)
            error_number = sock.connect_ex(at)
        except OSError as error:  # a path that is too long
            self._failed(sock, error.strerror or str(error))
            return None
        while error_number == errno.EAGAIN:  # of a Unix socket alone: nobody has accepted the ones before
            remaining = left(self._deadline)
            if remaining == 0:
                raise self.late()
            yield from sleep(BUSY_S if remaining is None else min(BUSY_S, remaining))
            error_number = sock.connect_ex(at)
        return None if error_number in _UNDER_WAY else self._judge(sock, error_number)

    def wait(self, timeout_s: float | None) -> Generator[Any, Any, socket.socket | None]:
        """Wait for one of them to be decided; the socket if one is connected."""
        ready = yield from wait_any(dict.fromkeys(self.under_way, WRITE), timeout_s)
        won = None
        for fd in ready:
            sock = self.under_way[fd]
            if won is None:
                won = self._judge(sock, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        return won

    def end(self) -> None:
        """Close what has not won."""
        for sock in tuple(self.under_way.values()):
            self._drop(sock)

    def late(self) -> TimedOut:
        return TimedOut(f"{self._peer} did not answer in time: no connection came about")

    def _judge(self, sock: socket.socket, error_number: int) -> socket.socket | None:
        if error_number:
            self._failed(sock, os.strerror(error_number))
            return None
        del self.under_way[sock.fileno()]
        return sock

    def _failed(self, sock: socket.socket, why: str) -> None:
        self._drop(sock)
        self.refusals.append(why)

    def _drop(self, sock: socket.socket) -> None:
        del self.under_way[sock.fileno()]
        sock.close()
        self.gate.give()


def _first(addresses: Sequence[Address], peer: str, deadline: float | None) -> Generator[Any, Any, socket.socket]:
    """The first of `addresses` that answers, by RFC 8305: the next is tried when one has failed, or been silent for STAGGER_S."""
    attempts = _Attempts(peer, deadline)
    waiting = deque(alternating(addresses))
    next_at = 0.0
    try:
        while waiting or attempts.under_way:
            alone = not attempts.under_way
            if waiting and (alone or (now() >= next_at and not attempts.gate.is_full)):
                next_at = now() + STAGGER_S
                won = yield from attempts.begin(waiting.popleft())
            else:
                remaining = left(deadline)
                if remaining == 0:
                    raise attempts.late()
                pause_s = max(next_at - now(), BUSY_S) if waiting else remaining
                won = yield from attempts.wait(pause_s if remaining is None or pause_s is None else min(pause_s, remaining))
            if won is not None:
                return won
    finally:
        attempts.end()
    raise ConnectFailed(f"cannot connect to {peer}: {', '.join(dict.fromkeys(attempts.refusals)) or 'it has no address'}")


def alternating(addresses: Sequence[Address]) -> list[Address]:
    """The two families in turn, the one first that the system prefers (RFC 8305, section 4)."""
    first = [address for address in addresses if address[0] == addresses[0][0]]
    others = [address for address in addresses if address[0] != addresses[0][0]]
    return [address for pair in zip_longest(first, others) for address in pair if address is not None]
