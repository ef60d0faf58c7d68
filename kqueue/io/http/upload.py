"""The body of a request, sent while the response is read, should that begin before all of it is sent.

A server may answer what it reads as it comes, and take no more until somebody reads that; or refuse a body, and read none of it.
So who sends looks for what has come: before each piece, and whenever the socket takes no more.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Generator
from typing import TYPE_CHECKING, Any

import h11

from ...kernel.traps import READ, wait_io
from ..errors import TimedOut
from ..streams import FAIR
from ..surroundings import left
from .bodies import next_piece
from .errors import InvalidRequest

if TYPE_CHECKING:
    from ..streams import Stream
    from .exchange import Exchange


class Upload:
    """What is left to send of a request."""

    __slots__ = ("_exchange", "_protocol", "_steps", "_unsent")

    def __init__(self, exchange: Exchange, protocol: h11.Connection) -> None:
        """Its head has been sent by `protocol`."""
        body = exchange.body
        self._exchange = exchange
        self._protocol = protocol
        self._unsent: list[Any] = []  # the first one last
        self._steps: Any = None  # None: there are no more pieces
        if body.pieces is None:
            self._unsent.append(memoryview(body.data))
        else:
            self._steps = aiter(body.pieces) if isinstance(body.pieces, AsyncIterable) else iter(body.pieces)

    def run(self, stream: Stream, deadline: float | None = None) -> Generator[Any, Any, bool]:
        """Whether all is sent; if not, something has come on `stream`, or its end. TimedOut when a piece is not taken in time."""
        until, turn = self._exchange.until("write", deadline), 0
        while True:
            if not self._unsent:
                if self._steps is None:
                    return True
                if _has_come(stream):
                    return False
                yield from self._make()
                until = self._exchange.until("write", deadline)
                continue
            count, events = stream.send_now(self._unsent[-1])
            if events:
                ready = yield from wait_io(stream.fileno(), events | READ, left(until))
                if not ready:
                    raise TimedOut(f"{stream.peer} takes no more")
                if ready & READ and _has_come(stream):
                    return False
                turn = 0
                continue
            rest = self._unsent.pop()[count:]
            if len(rest):
                self._unsent.append(rest)
            turn += count
            if turn >= FAIR:
                turn = 0
                yield

    def _make(self) -> Generator[Any, Any, None]:
        """The next piece, or what says that there is none."""
        piece = yield from next_piece(self._steps)
        if piece is None:
            self.close()
            data = [self._protocol.send(h11.EndOfMessage()) or b""]
        elif isinstance(piece, (bytes, bytearray, memoryview)):
            data = self._protocol.send_with_data_passthrough(h11.Data(data=piece)) if len(piece) else []  # type: ignore
        else:
            exchange = self._exchange
            raise InvalidRequest(
                f"a body is made of bytes, not of {type(piece).__name__}", method=exchange.method, url=exchange.url.shown
            )
        self._unsent = [memoryview(part).cast("B") for part in reversed(data) if len(part)]

    def close(self) -> None:
        """No other piece is asked for."""
        steps, self._steps = self._steps, None
        close = getattr(steps, "close", None)
        if close is not None and steps is not self._exchange.body.pieces:
            close()


def _has_come(stream: Stream) -> bool:
    if not stream.buffered and not stream.ended:
        stream.receive_now()
    return bool(stream.buffered) or stream.ended
