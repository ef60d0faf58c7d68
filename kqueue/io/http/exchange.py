"""One request and the head of its response: what is sent, how long that may take, and what went wrong, in words."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import h11

from ...errors import JobTimedOut
from ...kernel.traps import READ, wait_io
from ..dialing import connect
from ..errors import Closed, ConnectionLost, IOFailed, NoDescriptor, TimedOut
from ..gate import gate
from ..surroundings import left, now
from .bodies import Body
from .errors import (
    IDEMPOTENT,
    HTTPConnectFailed,
    HTTPConnectionLost,
    HTTPFailed,
    HTTPProtocolError,
    HTTPTimeout,
    InvalidRequest,
)
from .pool import Connection, Pool
from .proxies import basic, tunnel
from .upload import Upload
from .urls import URL

if TYPE_CHECKING:
    from ssl import SSLContext

    from .headers import Pair
    from .timeouts import Timeouts

MAX_HEAD: Final = 65536  # bytes of the headers of a response
MAX_INTERIM: Final = 100  # responses of 1xx before the one that counts
_SWITCHED: Final = "_SWITCH_UPGRADE"  # in what h11 says of a 101 that nobody asked for
_SMALL: Final = 65536  # bytes of a body that are sent together with the head
_PHASES: Final = {
    "pool": "no connection was free",
    "connect": "no connection came about",
    "tls": "the TLS handshake was not done",
    "write": "the server took no more of the request",
    "head": "the server sent no response",
    "read": "no more of the body came",
}


class Exchange:
    """A request, and its deadlines. The same one is sent again when a connection from the pool proves dead, and no other time."""

    __slots__ = ("_phase", "_was_sent", "body", "ends_at", "headers", "max_body", "method", "proxy", "timeouts", "tls", "url")

    def __init__(
        self, method: str, url: URL, headers: list[Pair], body: Body, timeouts: Timeouts, ends_at: float | None,
        max_body: int, proxy: URL | None, tls: bool | SSLContext,
    ) -> None:  # fmt: skip
        self.method = method
        self.url = url
        self.headers = headers
        self.body = body
        self.timeouts = timeouts
        self.max_body = max_body
        self.proxy = proxy
        self.tls = tls
        self.ends_at = ends_at  # when the total is up; None: it never is
        self._phase = "pool"
        self._was_sent = False  # at least a part of it

    @property
    def is_idempotent(self) -> bool:
        return self.method in IDEMPOTENT

    # -- time -------------------------------------------------------------------------------------------------------

    def until(self, phase: str, deadline: float | None = None) -> float | None:
        """When a wait of `phase` that begins now is over: by its own time, by the total, or at `deadline`. None: never."""
        seconds: float | None = getattr(self.timeouts, phase)
        until = self.ends_at
        if seconds is not None:
            own = now() + seconds
            until = own if until is None or own < until else until
        return until if deadline is None or (until is not None and until < deadline) else deadline

    def late(self, phase: str, deadline: float | None = None, why: str = "") -> HTTPTimeout:
        """What to raise when that was up."""
        words = why or f"{_PHASES[phase]} in time"
        moment, own = now(), getattr(self.timeouts, phase)
        if self.ends_at is not None and (moment >= self.ends_at or own is deadline is None):
            phase = "total"
            words += f", and the {self.timeouts.total:g} s of its timeout are over"
        elif deadline is not None and (moment >= deadline or own is None):
            words += ", which read(timeout=) gave it"
        else:
            words += f" ({own:g} s: the {phase!r} of its timeouts)"
        harmless = self.is_idempotent or not self._was_sent
        return HTTPTimeout(words, phase=phase, method=self.method, url=self.url.shown, retryable=harmless)

    # -- doing it ---------------------------------------------------------------------------------------------------

    def run(self, pool: Pool) -> Generator[Any, Any, tuple[Connection, h11.Response]]:
        """Send it; the connection, and the head of the response. The caller sees to the connection from then on.

        Here thousands wait at once, so it is one frame: each further one would be 300 bytes more of memory for each of them.
        """
        is_repeated = False
        while True:
            connection = yield from self._connection(pool)
            stream = connection.stream
            try:
                unsent = yield from self._send(connection)
                connection.is_last = unsent is not None
                self._phase = "head"
                until = self.until("head")
                events = READ
                while not stream.buffered:
                    if not (yield from wait_io(stream.fileno(), events, left(until))):
                        raise TimedOut("no response")
                    try:
                        events = stream.receive_now() or READ
                    except ConnectionLost as error:
                        raise unsent or _Died(str(error)) from None
                    if stream.ended:
                        raise unsent or _Died(f"{stream.peer} closed the connection without a response")
                if connection.protocol is None:
                    connection.protocol = _protocol()
                    self._begin(connection.protocol)
                return connection, (yield from self._receive_head(connection, connection.protocol, until))
            except BaseException as error:
                connection.close()
                if isinstance(error, _Died) and connection.uses and self._may_repeat and not is_repeated:
                    pool.drop_idle(connection.key)  # it was closed by the other side just as we began; so may these be
                    is_repeated = True
                    continue
                if isinstance(error, IOFailed | h11.ProtocolError):
                    raise self._explained(error, connection) from None
                raise

    @property
    def _may_repeat(self) -> bool:
        return self.is_idempotent and self.body.can_repeat

    def _connection(self, pool: Pool) -> Generator[Any, Any, Connection]:
        url, proxy = self.url, self.proxy
        key = (*url.origin, proxy)
        self._phase = "pool"
        try:
            found = yield from pool.take(key, self.until("pool"))
        except TimeoutError:
            raise self.late("pool", why=f"no connection was free in time ({pool.limit_met(key)})") from None
        except JobTimedOut as error:  # the job's own time: then it is told what it waited for
            error.args = (f"{error}; it waited for a connection to {url.authority}: {pool.limit_met(key)}",)
            raise
        if found is not None:
            return found
        try:
            return Connection((yield from self._connect(url, proxy)), key, pool)
        except BaseException as error:
            pool.not_connected(key)
            if isinstance(error, TimedOut):
                why = str(error) if isinstance(error, NoDescriptor) else ""
                raise self.late(self._phase, why=why) from None
            if isinstance(error, IOFailed) and not isinstance(error, HTTPFailed):  # that would be the proxy's
                raise HTTPConnectFailed(error, method=self.method, url=self.url.shown) from error
            raise

    def _connect(self, url: URL, proxy: URL | None) -> Generator[Any, Any, Any]:
        first = proxy or url
        patience = self.until("pool")
        while True:
            self._phase = "connect"
            try:
                until = self.until("connect", patience if gate().is_full else None)
                stream = yield from connect(first.host, first.port, timeout=left(until))
                break
            except NoDescriptor:  # to wait for a file descriptor is to wait for a connection of the pool
                self._phase = "pool"
                if left(patience) == 0:
                    raise
        try:
            if proxy is not None and proxy.scheme == "https":
                self._phase = "tls"
                stream = yield from stream.start_tls(proxy.host, True, timeout=left(self.until("tls")))
            if proxy is not None and url.scheme == "https":
                self._phase = "connect"
                yield from tunnel(stream, proxy, url, self.method, self.until("connect"))
            if url.scheme == "https":
                self._phase = "tls"
                stream = yield from stream.start_tls(url.host, self.tls, timeout=left(self.until("tls")))
        except BaseException:
            stream.close()
            raise
        return stream

    def _receive_head(
        self, connection: Connection, protocol: h11.Connection, until: float | None
    ) -> Generator[Any, Any, h11.Response]:
        stream, interim = connection.stream, 0
        while True:
            event = protocol.next_event()
            if event is h11.NEED_DATA:
                if connection.upload is not None and not stream.buffered:  # it said 100, or a part of its headers
                    self._phase = "write"
                    yield from self.send_on(connection)
                    self._phase, until = "head", self.until("head")
                data = yield from stream.read(timeout=left(until))
                if not data:
                    raise ConnectionLost(f"{stream.peer} ended the connection in the middle of the response's headers")
                protocol.receive_data(data)
            elif type(event) is h11.Response:
                return event
            elif type(event) is h11.InformationalResponse and event.status_code == 101:
                raise h11.RemoteProtocolError(_SWITCHED)
            elif type(event) is h11.InformationalResponse and interim < MAX_INTERIM:
                interim += 1
            else:
                raise h11.RemoteProtocolError("there is no end of interim responses")

    def _send(self, connection: Connection) -> Generator[Any, Any, IOFailed | None]:
        """Send all of it, or as much as there is time for before the response. What is returned kept us from that."""
        stream, data = connection.stream, self.body.data
        self._phase = "write"
        protocol = _protocol()
        head = self._begin(protocol)
        if 0 < len(data) <= _SMALL:
            head += bytes(data)
        self._was_sent = True
        try:
            yield from stream.write(head, timeout=left(self.until("write")))
        except ConnectionLost as error:
            return _Died(str(error))
        if len(data) > _SMALL or self.body.pieces is not None:
            connection.protocol = protocol  # it counts what is sent
            connection.upload = Upload(self, protocol)
            return (yield from self.send_on(connection))
        return None

    def send_on(self, connection: Connection, deadline: float | None = None) -> Generator[Any, Any, IOFailed | None]:
        """Send what is left, until something comes. What is returned kept us from that: the server may say why."""
        upload = connection.upload
        assert upload is not None
        try:
            is_done = yield from upload.run(connection.stream, deadline)
        except ConnectionLost as error:
            connection.is_last = True
            connection.end_upload()
            died = _Died(str(error))
            if connection.stream.closed:  # it was found out by reading, so there is nothing to read
                raise died from None
            return died
        if is_done:
            connection.end_upload()
        return None

    def _begin(self, protocol: h11.Connection) -> bytes:
        """Let `protocol` know what is sent; the head of it, as bytes.

        Done once to send it, and once more when the response comes: meanwhile a protocol would be 900 bytes.
        """
        head = protocol.send(self._head())
        assert head is not None
        if self.body.pieces is None:
            if len(self.body.data):
                protocol.send_with_data_passthrough(h11.Data(data=self.body.data))  # type: ignore[arg-type]  # a memoryview will do
            protocol.send(h11.EndOfMessage())
        return head

    def _head(self) -> h11.Request:
        url, target = self.url, self.url.target
        headers = self.headers  # most often those of the client, which all of its requests share
        if not any(name == b"host" for name, _ in headers):
            headers = [(b"host", url.authority.encode()), *headers]
        if self.proxy is not None and url.scheme == "http":
            target = f"http://{url.authority}{target}"
            if self.proxy.user:
                headers = [*headers, (b"proxy-authorization", basic(self.proxy.user, self.proxy.password))]
        return h11.Request(method=self.method, target=target, headers=headers)

    # -- what went wrong --------------------------------------------------------------------------------------------

    def _explained(self, error: Exception, connection: Connection) -> Exception:
        method, url = self.method, self.url.shown
        if isinstance(error, TimedOut):
            return self.late(self._phase)
        if isinstance(error, (ConnectionLost, Closed)):
            return HTTPConnectionLost(str(error), method=method, url=url, retryable=self.is_idempotent)
        if isinstance(error, h11.LocalProtocolError):
            return InvalidRequest(f"it cannot be sent: {error}", method=method, url=url)
        if isinstance(error, h11.RemoteProtocolError):
            if _SWITCHED in str(error):
                text = f"{connection.stream.peer} goes on in another protocol (101), and this client speaks HTTP/1.1 only: "
                return HTTPProtocolError(text + "ask without Upgrade, or use io.connect()", method=method, url=url)
            text = f"what {connection.stream.peer} sent is no HTTP response: {error}; is it the right port and scheme?"
            return HTTPProtocolError(text, method=method, url=url)
        return error


def _protocol() -> h11.Connection:
    return h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)


class _Died(ConnectionLost):
    """The connection was lost before anything of the response had come."""
