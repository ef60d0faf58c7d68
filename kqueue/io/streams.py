"""Streams of bytes over non-blocking sockets: TCP, Unix sockets, TLS on either.

    with (yield io.connect("example.org", 443, tls=True)) as stream:
        yield stream.write(b"GET / HTTP/1.0\r\nHost: example.org\r\n\r\n")
        head = yield stream.read_until(b"\r\n\r\n")

Reading waits for the socket before each recv(), even where there may be something already. So whoever reads from a peer that is
never slow gives way with every piece; and a first recv() that mostly finds nothing would cost more than the wait does. Writing
tries first, since there mostly is room, and gives way after FAIR bytes. What has been received and not been asked for is at
most as much as one recv() brought (RECEIVE), or the `limit` of a read_until.

One task may read a stream while another one writes it; two that read it get RuntimeError.

An interrupted read loses nothing, and the stream can be read on. A write that is interrupted after a part of its bytes went out
closes the stream, since nobody could say where it stands.
"""

from __future__ import annotations

import socket
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ..context import forget, keep
from ..kernel.traps import READ, WRITE, wait_io
from .closing import Closing
from .errors import Closed, ConnectionLost, IncompleteRead, IOFailed, StreamLimit, TimedOut
from .gate import Gate
from .operation import operation
from .surroundings import deadline_in, left, release

if TYPE_CHECKING:
    import ssl

RECEIVE: Final = 65536  # bytes that one recv() may bring
FAIR: Final = 262144  # bytes that are written before others may run

Wait = Generator[Any, Any, Any]


class Stream(Closing):
    """A connected stream. Closed by `close`, by the end of its `with`, and by the end of the job that opened it.

    `peer` says whom it is connected to, as error messages do. Timeouts are in seconds; None: until the job's own is up.
    """

    __slots__ = ("__weakref__", "_buffer", "_ended", "_fd", "_gate", "_socket", "peer")

    def __init__(self, sock: socket.socket, peer: str, gate: Gate) -> None:
        self.peer = peer
        self._socket: socket.socket | None = sock  # None: closed
        self._fd = sock.fileno()
        self._gate = gate  # a place of which is ours
        self._buffer = bytearray()  # received, and not asked for yet
        self._ended = False  # the other side has said that no more will come
        keep(self)

    def __repr__(self) -> str:
        return f"<Stream {self.peer} {'closed' if self._socket is None else f'fd {self._fd}'}>"

    @property
    def closed(self) -> bool:
        return self._socket is None

    @property
    def buffered(self) -> int:
        """Bytes that were received and not read."""
        return len(self._buffer)

    @property
    def ended(self) -> bool:
        """The other side has said that it sends no more. What is `buffered` can still be read."""
        return self._ended

    def fileno(self) -> int:
        """The fd. Raises Closed."""
        self._open()
        return self._fd

    # -- reading ----------------------------------------------------------------------------------------------------

    @operation
    def read(self, limit: int = RECEIVE, *, timeout: float | None = None) -> Generator[Any, Any, bytes]:
        """What is there, at least a byte and at most `limit`; b"" when the other side has ended the stream."""
        if limit < 1:
            raise ValueError(f"read() takes at least 1 byte, not {limit}")
        if not self._buffer:
            if limit >= RECEIVE:
                return (yield from self._receive(limit, timeout, deadline_in(timeout)))
            yield from self._fill(timeout, deadline_in(timeout))
        return self._take(limit)

    @operation
    def read_until(
        self, separator: bytes, limit: int = RECEIVE, *, timeout: float | None = None
    ) -> Generator[Any, Any, bytes]:
        """All up to and with the next `separator`. StreamLimit when it is not among the next `limit` bytes.

        IncompleteRead when the stream ends first. What it has in `partial`, and what is over the limit, can still be read.
        """
        if not separator:
            raise ValueError("read_until() needs a separator of at least 1 byte")
        deadline = deadline_in(timeout)
        buffer, looked = self._buffer, 0
        while True:
            at = buffer.find(separator, looked)
            end = at + len(separator)
            if end > limit if at >= 0 else len(buffer) >= limit:
                raise StreamLimit(
                    f"{self.peer} sent no {separator!r} in {limit} bytes; raise limit= if it may take so long to come, "
                    "or do not trust this peer"
                )
            if at >= 0:
                return self._take(end)
            looked = max(0, len(buffer) - len(separator) + 1)
            if not (yield from self._fill(timeout, deadline)):
                raise IncompleteRead(f"{self.peer} ended the stream before a {separator!r} came", bytes(buffer))

    @operation
    def read_exactly(self, count: int, *, timeout: float | None = None) -> Generator[Any, Any, bytes]:
        """`count` bytes; IncompleteRead when the stream ends first. What it has in `partial` can still be read."""
        if count < 0:
            raise ValueError(f"read_exactly() takes a number of bytes, not {count}")
        deadline = deadline_in(timeout)
        while len(self._buffer) < count:
            if not (yield from self._fill(timeout, deadline)):
                raise IncompleteRead(
                    f"{self.peer} ended the stream after {len(self._buffer)} of {count} bytes", bytes(self._buffer)
                )
        return self._take(count)

    def _take(self, limit: int) -> bytes:
        buffer = self._buffer
        if len(buffer) <= limit:
            taken = bytes(buffer)
            buffer.clear()
        else:
            taken = bytes(memoryview(buffer)[:limit])
            del buffer[:limit]
        return taken

    def _fill(self, timeout: float | None, deadline: float | None) -> Generator[Any, Any, bool]:
        """Receive some more; False: nothing more will come."""
        data = yield from self._receive(RECEIVE, timeout, deadline)
        self._buffer += data
        return bool(data)

    def _receive(self, limit: int, timeout: float | None, deadline: float | None) -> Generator[Any, Any, bytes]:
        sock = self._open()
        events = READ
        while not self._ended:
            if not self._has_more(sock):
                if not (yield from wait_io(self._fd, events, left(deadline))):
                    raise TimedOut(f"{self.peer} did not send what was asked for in {timeout:g} s")
                if self._socket is None:
                    raise Closed(f"the stream to {self.peer} was closed while it was read")
            try:
                data = sock.recv(limit)
            except self._blocked as error:
                events = self._events(error, READ)
                continue
            except OSError as error:
                data = self._orderly_end(error)
            if data:
                return data
            self._ended = True
        return b""

    def receive_now(self) -> int:
        """Receive once, without waiting, into what is `buffered`; for who has waited for the fd himself. Raises ConnectionLost.

        Returns what to wait for before the next try; 0: something came, or the end did (`ended`).
        """
        try:
            data = self._open().recv(RECEIVE)
        except self._blocked as error:
            return self._events(error, READ)
        except OSError as error:
            data = self._orderly_end(error)
        self._ended = not data
        self._buffer += data
        return 0

    def _orderly_end(self, error: OSError) -> bytes:
        """b"" when `error` of reading amounts to an orderly end; else the stream is closed, and ConnectionLost raised."""
        lost = self._lost(error)
        if lost is None:
            return b""
        self._break()
        raise lost from None

    # What is different over TLS.

    _blocked: ClassVar[tuple[type[OSError], ...]] = (BlockingIOError,)  # what is raised where a call would have to wait
    _remembers_what_was_tried: ClassVar[bool] = False  # a send() that had to wait must be followed by the same one

    def _events(self, error: OSError, usual: int) -> int:
        """What to wait for after a call said so by `error`."""
        return usual

    def _has_more(self, sock: socket.socket) -> bool:
        """Whether something has been received that select() does not know of."""
        return False

    def _lost(self, error: OSError) -> ConnectionLost | None:
        """What `error` of reading amounts to; None: to an orderly end."""
        return ConnectionLost(f"{self.peer} broke the connection: {error.strerror or error}")

    def _say_goodbye(self, sock: socket.socket) -> None:
        """Before it is closed. Must not wait."""

    # -- writing ----------------------------------------------------------------------------------------------------

    @operation
    def write(self, data: bytes | bytearray | memoryview, *, timeout: float | None = None) -> Generator[Any, Any, None]:
        """Returns when the kernel has taken all of `data`: who sends faster than the other side reads waits here.

        ConnectionLost when the other side takes no more; what it has sent before can still be read.
        """
        sock = self._open()
        deadline = deadline_in(timeout)
        view = memoryview(data).cast("B")
        sent, turn, is_torn = 0, 0, False
        try:
            while sent < len(view):
                try:
                    count = sock.send(view[sent : sent + FAIR])
                except self._blocked as error:
                    events = self._events(error, WRITE)
                    is_torn = is_torn or self._remembers_what_was_tried
                    if not (yield from wait_io(self._fd, events, left(deadline))):
                        raise TimedOut(f"{self.peer} took {sent} of {len(view)} bytes in {timeout:g} s") from None
                    turn = 0
                else:
                    sent += count
                    turn += count
                    is_torn = sent < len(view)
                    if turn >= FAIR and sent < len(view):
                        turn = 0
                        yield
                if self._socket is None:
                    raise Closed(f"the stream to {self.peer} was closed while it was written")
        except OSError as error:
            if isinstance(error, IOFailed):
                raise
            is_torn = False  # nothing can follow, so nobody can mistake it
            raise ConnectionLost(f"{self.peer} takes no more: {error.strerror or error}") from None
        finally:
            if is_torn:
                self.close()

    def send_now(self, data: memoryview) -> tuple[int, int]:
        """Send some of `data` without waiting, for who waits for the fd himself. Raises ConnectionLost.

        Returns how many bytes went out, or 0 and what to wait for before the same is tried again.
        """
        try:
            return self._open().send(data[:FAIR]), 0
        except self._blocked as error:
            return 0, self._events(error, WRITE)
        except OSError as error:
            raise ConnectionLost(f"{self.peer} takes no more: {error.strerror or error}") from None

    @operation
    def start_tls(
        self, host: str, tls: bool | ssl.SSLContext = True, *, timeout: float | None = None
    ) -> Generator[Any, Any, Stream]:
        """The stream to use from now on: TLS with `host` over this one, which is closed to others. For STARTTLS and proxies.

        TLSFailed when the other side sent something before; CertificateRefused when it is not `host`.
        """
        from .tls import start  # and with it ssl, which is 4 MB

        return (yield from start(self, host, tls, deadline_in(timeout)))

    def hand_over(self) -> tuple[socket.socket, Gate]:
        """The socket and its place, which are the caller's from now on; this stream is closed."""
        sock = self._open()
        self.disown()
        release(self._fd)
        self._socket = None
        return sock, self._gate

    @operation
    def finish(self, *, timeout: float | None = None) -> Generator[Any, Any, None]:
        """Tell the other side that no more will be written. It can still be read; over TLS, only to its end."""
        sock = self._open()
        yield from ()
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise ConnectionLost(f"{self.peer} is gone: {error.strerror or error}") from None

    # -- ending -----------------------------------------------------------------------------------------------------

    def is_alive(self) -> bool:
        """Whether it can be used, as far as can be told without waiting. What has come meanwhile is `buffered`."""
        if self._socket is None:
            return False
        while not self._ended and len(self._buffer) < RECEIVE:
            try:
                if self.receive_now():
                    break
            except ConnectionLost:
                return False
        return not self._ended

    def close(self) -> None:
        """At once; who waits for it gets Closed. What was written still goes out. More than once does no harm."""
        self._break()
        self._buffer.clear()

    def _break(self) -> None:
        """Close it, but keep what was received before."""
        sock, self._socket = self._socket, None
        if sock is None:
            return
        forget(self)
        release(self._fd)
        self._say_goodbye(sock)
        sock.close()
        self._gate.give()

    def disown(self) -> None:
        """Leave it open when the job ends. For a pool, which closes it itself."""
        forget(self)

    def _open(self) -> socket.socket:
        if self._socket is None:
            raise Closed(f"the stream to {self.peer} is closed")
        return self._socket

    def __del__(self) -> None:
        if self._socket is not None:
            self.close()
