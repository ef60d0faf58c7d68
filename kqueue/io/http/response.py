"""Responses: whole ones, and those that are read while they come."""

from __future__ import annotations

import zlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import h11

from ..closing import Closing
from ..errors import Closed, ConnectionLost, TimedOut
from ..operation import operation
from ..surroundings import deadline_in, left
from .decoding import Decoder
from .errors import HTTPBodyTooLarge, HTTPConnectionLost, HTTPProtocolError, HTTPStatusError
from .headers import Headers

if TYPE_CHECKING:

    from .exchange import Exchange
    from .pool import Connection

PIECE = 65536  # bytes that are received at a time
_GZIP = ("gzip", "x-gzip")


class _Head:
    """What is known when the headers have come."""

    __slots__ = ("headers", "history", "http_version", "method", "reason", "shown_url", "status", "url")

    def __init__(self, exchange: Exchange, head: h11.Response, history: tuple[Response, ...]) -> None:
        self.method = exchange.method
        self.url = str(exchange.url)  # after redirects; without a user
        self.shown_url = exchange.url.shown  # for messages and logs: without the query, too
        self.status = head.status_code
        self.reason = head.reason.decode("latin-1")
        self.http_version = head.http_version.decode("ascii")
        self.headers = Headers(head.headers)
        self.history = history  # the redirects before it, without their bodies

    @property
    def ok(self) -> bool:
        """Whether its status is below 400."""
        return self.status < 400

    @property
    def charset(self) -> str:
        """As Content-Type says; else UTF-8."""
        for part in self.headers.get("content-type", "").split(";")[1:]:
            name, _, value = part.partition("=")
            if name.strip().lower() == "charset":
                return value.strip(" \t\"'")
        return "utf-8"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status} of {self.method} {self.shown_url}>"


class Response(_Head):
    """All of a response. `body` is decoded (gzip, deflate)."""

    __slots__ = ("body",)

    def __init__(self, exchange: Exchange, head: h11.Response, history: tuple[Response, ...], body: bytes) -> None:
        super().__init__(exchange, head, history)
        self.body = body

    @property
    def text(self) -> str:
        """`body` by its charset; what that has no meaning for is replaced by U+FFFD."""
        try:
            return self.body.decode(self.charset, "replace")
        except LookupError:  # no such charset
            return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """What the body says as JSON. HTTPProtocolError when it is none."""
        from json import loads

        try:
            return loads(self.body)
        except ValueError as error:
            kind = self.headers.get("content-type", "of no type that is said")
            raise HTTPProtocolError(
                f"the answer ({self.status}, {len(self.body)} bytes, {kind}) is no JSON: {error}; it is in response.text",
                method=self.method, url=self.shown_url,
            ) from None  # fmt: skip

    def raise_for_status(self) -> Response:
        """The response itself, or HTTPStatusError for 4xx and 5xx."""
        if self.status >= 400:
            raise HTTPStatusError(self)
        return self


class StreamedResponse(_Head, Closing):
    """A response whose body is read while it comes. Closed by `with`, `close`, and the end of the job that asked for it."""

    __slots__ = ("__weakref__", "_connection", "_decoder", "_head", "_is_complete", "_left", "exchange")

    def __init__(
        self, exchange: Exchange, connection: Connection, head: h11.Response, history: tuple[Response, ...] = ()
    ) -> None:
        super().__init__(exchange, head, history)
        self.exchange = exchange
        self._connection: Connection | None = connection  # None: all of the body has come, or it was closed
        self._head = head
        self._is_complete = False  # all of the body has come
        self._left: bytes | bytearray = b""  # what has come and was not asked for yet
        coding = self.headers.get("content-encoding", "").strip().lower()
        is_coded = coding in (*_GZIP, "deflate") and not self.has_no_body
        self._decoder = Decoder("gzip" if coding in _GZIP else coding) if is_coded else None

    @operation
    def read(self, limit: int = PIECE, *, timeout: float | None = None) -> Generator[Any, Any, bytes]:
        """What is there of the body, at least a byte and at most `limit`; b"" at its end.

        `timeout`: seconds for this call, within those of the request.
        """
        if limit < 1:
            raise ValueError(f"read() takes at least 1 byte, not {limit}")
        return (yield from self._read(limit, deadline_in(timeout)))

    @operation
    def read_all(self, max_body: int | None = None) -> Generator[Any, Any, bytes]:
        """What is left of the body. HTTPBodyTooLarge over `max_body` bytes (None: those of the client)."""
        return (yield from self.whole(self.exchange.max_body if max_body is None else max_body))

    def raise_for_status(self) -> StreamedResponse:
        """The response itself, or HTTPStatusError for 4xx and 5xx. What came of the body until now is not in that."""
        if self.status >= 400:
            raise HTTPStatusError(self.with_body(b""))
        return self

    @property
    def closed(self) -> bool:
        """Whether it has no connection any more: all has come, or it was closed."""
        return self._connection is None

    def close(self) -> None:
        """At once. A connection whose response has not been read to its end is of no more use."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # -- how ----------------------------------------------------------------------------------------------------------

    def whole(self, max_body: int) -> Generator[Any, Any, bytes]:
        said = self.headers.get("content-length", "")
        if said.isdecimal() and int(said) > max_body and self._decoder is None and not self.has_no_body:
            self.close()
            raise self._too_large(f"{int(said)} bytes are announced", max_body)
        pieces, size = [], 0
        while piece := (yield from self._read(PIECE, None)):
            size += len(piece)
            if size > max_body:
                self.close()
                raise self._too_large("more has come", max_body)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def with_body(self, body: bytes) -> Response:
        return Response(self.exchange, self._head, self.history, body)

    @property
    def has_no_body(self) -> bool:
        """Whatever its headers say."""
        return self.method == "HEAD" or self.status in (204, 304)

    def _too_large(self, what: str, max_body: int) -> HTTPBodyTooLarge:
        return HTTPBodyTooLarge(
            f"{what}, allowed are max_body={max_body}: raise that, or read the body in pieces (io.http.stream)",
            method=self.method, url=self.shown_url,
        )  # fmt: skip

    def _read(self, limit: int, deadline: float | None) -> Generator[Any, Any, bytes]:
        decoder = self._decoder
        if decoder is None:
            data = self._left or (yield from self._receive(deadline))
            if len(data) <= limit:
                self._left = b""
                return bytes(data)
            self._left = data[limit:]
            return bytes(data[:limit])
        try:
            while True:
                data = decoder.take(limit)
                if data:
                    return data
                more = yield from self._receive(deadline)
                if not more:
                    break
                decoder.feed(bytes(more))
        except zlib.error as error:
            self.close()
            raise self._garbage(f"what came is not what its Content-Encoding says: {error}") from None
        if not decoder.is_complete:
            raise self._garbage("what came is compressed, and not all of it is there")
        return b""

    def _receive(self, deadline: float | None) -> Generator[Any, Any, bytes | bytearray]:
        """The next piece of the body as it was sent; b"" at its end."""
        connection = self._connection
        if connection is None:
            if self._is_complete:
                return b""
            raise Closed(f"the response of {self.method} {self.shown_url} was closed before its body had been read")
        stream, protocol, exchange = connection.stream, connection.protocol, self.exchange
        assert protocol is not None
        is_at_end, phase = False, "read"
        try:
            while True:
                event = protocol.next_event()
                if event is h11.NEED_DATA:
                    if connection.upload is not None and not stream.buffered:
                        phase = "write"
                        yield from exchange.send_on(connection, deadline)
                    phase, until = "read", exchange.until("read", deadline)
                    data = yield from stream.read(PIECE, timeout=left(until))
                    is_at_end = not data
                    protocol.receive_data(data)
                elif type(event) is h11.Data:
                    if event.data:
                        return event.data
                elif type(event) is h11.EndOfMessage:
                    if connection.upload is not None and self.status < 300:  # it wants the rest; who refuses it does not
                        phase = "write"
                        yield from exchange.send_on(connection, deadline)
                    self._connection, self._is_complete = None, True
                    connection.give_back()
                    return b""
                else:  # PAUSED, ConnectionClosed
                    raise h11.RemoteProtocolError("it ended before it had begun")
        except BaseException as error:
            self.close()
            if isinstance(error, h11.RemoteProtocolError):
                if is_at_end:
                    raise self._cut(f"{stream.peer} ended the connection in the middle of the body: {error}") from None
                raise self._garbage(f"what came is not HTTP: {error}") from None
            if isinstance(error, TimedOut):
                raise exchange.late(phase, deadline) from None
            if isinstance(error, (ConnectionLost, Closed)):
                raise self._cut(str(error)) from None
            raise

    def _cut(self, what: str) -> HTTPConnectionLost:
        return HTTPConnectionLost(what, method=self.method, url=self.shown_url, retryable=self.exchange.is_idempotent)

    def _garbage(self, what: str) -> HTTPProtocolError:
        return HTTPProtocolError(what, method=self.method, url=self.shown_url)
