"""A connected socket that speaks Redis' protocol and never blocks, and the short errand: connect, ask, leave.

Who waits for what, and what to do when it breaks, is not known here: trouble is a BrokerUnavailable that says what happened.
hiredis packs and parses. Nothing here may import redis-py (20 MB, asyncio), or ssl unless the URL says TLS.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from hiredis import ProtocolError, Reader

from ..errors import BrokerUnavailable
from ..kernel.traps import READ, WRITE, wait_io
from .base import Verb
from .commands.redis_asking import Command, last_word, pack
from .commands.redis_url import Target
from .dial import dial, tls_context

if TYPE_CHECKING:
    from collections.abc import Generator

READ_SIZE: Final = 65536
_NOTHING: Final = object()

Clock = Callable[[], float]


class Wire:
    """`put` commands, `flush` them, `read` what came (pushes among it); `wait` for either."""

    def __init__(self, sock: socket.socket, tls: bool, clock: Clock) -> None:
        self.heard_at = clock()  # when something came last
        self._clock = clock
        self._socket = sock
        self._tls = tls
        self._out = bytearray()
        self._reader: Any = Reader(notEnoughData=_NOTHING)
        self._again: tuple[type[OSError], ...] = (BlockingIOError,)  # what a socket raises that has nothing to say now
        if tls:
            import ssl

            self._again = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

    @property
    def sending(self) -> bool:
        """Something was put that the socket has not taken yet."""
        return bool(self._out)

    def put(self, commands: Sequence[Command]) -> None:
        self._out += pack(commands)

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except self._again:
            return
        except OSError as error:
            raise _broken(error) from None

    def wait(self, timeout_s: float | None = None) -> Generator[Any, Any, bool]:
        """Until something came, or more may be sent; False after `timeout_s` seconds."""
        events = READ | WRITE if self._out else READ
        return bool((yield wait_io(self._socket.fileno(), events, timeout_s)))

    def read(self) -> list[Any]:
        """Whatever came."""
        found: list[Any] = []
        while True:
            try:
                data = self._socket.recv(READ_SIZE)
            except self._again:
                return found
            except OSError as error:
                raise _broken(error) from None
            if not data:
                if found:
                    return found  # a last word, such as "max number of clients reached"; the end comes with the next read
                raise BrokerUnavailable("it closed the connection")
            self.heard_at = self._clock()
            try:
                self._reader.feed(data)
                while (reply := self._reader.gets()) is not _NOTHING:
                    found.append(reply)
            except ProtocolError as error:
                raise BrokerUnavailable(f"what answers there does not speak Redis ({error})") from None
            if len(data) < READ_SIZE and not self._tls:
                return found

    def close(self) -> None:
        self._socket.close()


def _broken(error: OSError) -> BrokerUnavailable:
    return BrokerUnavailable(f"the connection broke: {error.strerror or error}")


def connect(at: Target, timeout_s: float, clock: Clock) -> Verb[Wire]:
    """A wire to `at`. BrokerUnavailable, within `timeout_s` seconds; BrokerRefused: its certificate."""
    context = None if at.tls is None else tls_context(*at.tls[:4], at.tls.checks_host)
    return Wire((yield from dial(at.host, at.port, at.path, context, timeout_s, clock)), at.tls is not None, clock)


def login(at: Target) -> list[Command]:
    """The command that authenticates us, if there is anything to say."""
    if not (at.password or at.username):
        return []
    return [("AUTH", at.username, at.password) if at.username else ("AUTH", at.password)]


def errand(at: Target, command: Command, timeout_s: float, clock: Clock) -> Verb[Any]:
    """Ask `at` one thing by a connection of its own. The reply, an error among them as a ReplyError; raises as `connect`."""
    deadline = clock() + timeout_s
    wire = yield from connect(at, timeout_s, clock)
    try:
        first = login(at)
        wire.put([*first, command])
        replies: list[Any] = []
        while len(replies) <= len(first):
            wire.flush()
            if not (yield from wire.wait(max(0.0, deadline - clock()))):
                raise BrokerUnavailable(f"{at.host}:{at.port} did not answer in {timeout_s:.2g} s")
            replies += wire.read()
        return last_word(replies)
    finally:
        wire.close()
