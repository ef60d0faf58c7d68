"""Stands between a client and Redis, and does to the connection what networks do: cut it within a reply or a request, swallow
replies, delay them, hold everything. It understands where replies end and which request each answers, and no more.

It runs in a thread of its own; attributes may be set, and methods called, from any other. All its sockets are non-blocking, so a
client that was stopped holds up nobody else.
"""

from __future__ import annotations

import hashlib
import selectors
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Final, NamedTuple

from . import resp
from .book import now

READ_SIZE: Final = 1 << 16
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST instead of FIN

RARE: Final = 0.05  # of the replies of a kind: a length that fewer have is not walked through
EMPTY_RESERVE: Final = 64  # bytes; a reply that is longer has jobs in it

Choose = Callable[[str, int], "int | None"]  # (kind of reply, its length) -> after how many bytes to cut; None: not


class Cut(NamedTuple):
    """A connection that was cut: `offset` bytes of a reply of `length` had passed."""

    kind: str
    offset: int
    length: int
    at: float  # CLOCK_MONOTONIC


def names() -> Mapping[bytes, str]:
    """What the scripts of KQueue are called, by digest. Only labels: a script that is not there is called by its digest."""
    from kqueue.brokers.commands.redis_client_scripts import CLIENT_SCRIPTS
    from kqueue.brokers.commands.redis_scripts import SCRIPTS

    scripts = {**CLIENT_SCRIPTS, **SCRIPTS}
    return {hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode(): name for name, text in scripts.items()}


class Proxy:
    """Listens on a free port of 127.0.0.1 for connections to `server_port` there."""

    def __init__(self, server_port: int, names: Mapping[bytes, str]) -> None:
        self.server_port = server_port
        self.mute = False  # replies are swallowed, and nobody is cut off; a connection that lost one gets no more of them
        self.delay_s = 0.0  # before a reply is passed on
        self.choose: Choose | None = None  # asked about every complete reply, in the thread
        self.choose_request: Choose | None = None  # the same for every complete request
        self.cuts: list[Cut] = []
        self.renewed_at: list[float] = []  # when renewals went to the server, CLOCK_MONOTONIC
        self._names = names
        self._held = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._obey)
        self._orders: deque[Callable[[], None]] = deque()
        self._links: list[_Link] = []
        self._running = True
        self._thread = threading.Thread(target=self._run, name=f"proxy {self.port}", daemon=True)
        self._thread.start()

    # -- from other threads -----------------------------------------------------------------------------------------

    def cut_all(self) -> None:
        """Cut every connection now."""
        self._order(self._cut_all)

    def hold(self, held: bool) -> None:
        """True: pass nothing on in either direction, and serve no new connection, as when a network splits. False: heal; what
        was sent meanwhile arrives, as TCP would have it."""
        self._order(lambda: self._hold(held))

    def heal(self) -> None:
        """Do nothing bad any more. Connections that lost replies are cut: no network delivers what comes after a gap."""
        self.mute, self.delay_s, self.choose, self.choose_request = False, 0.0, None, None
        self.hold(False)
        self._order(self._cut_muted)

    @property
    def dead(self) -> bool:
        """Whether its thread has ended by itself."""
        return self._running and not self._thread.is_alive()

    def stop(self) -> None:
        self._order(self._stop)
        self._thread.join()

    def _order(self, what: Callable[[], None]) -> None:
        self._orders.append(what)
        with suppress(OSError):
            self._wake_write.send(b"!")

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._running:
                due = [link.due_at for link in self._links if link.due_at is not None]
                for key, events in self._selector.select(max(0.0, min(due) - time.monotonic()) if due else None):
                    key.data(events)
                now = time.monotonic()
                for link in list(self._links):
                    if link.due_at is not None and link.due_at <= now:
                        link.deliver(now)
        finally:
            self._cut_all()
            self._listener.close()
            self._wake_read.close()
            self._wake_write.close()
            self._selector.close()

    def _obey(self, events: int) -> None:
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)
        while self._orders:
            self._orders.popleft()()

    def _stop(self) -> None:
        self._running = False

    def _cut_all(self) -> None:
        for link in list(self._links):
            link.close()

    def _cut_muted(self) -> None:
        for link in list(self._links):
            if link.muted:
                link.close()

    def _hold(self, held: bool) -> None:
        if self._held == held:
            return
        self._held = held
        if held:
            self._selector.unregister(self._listener)
        else:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        for link in list(self._links):
            link.watch()

    def _accept(self, events: int) -> None:
        with suppress(BlockingIOError):
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self.server_port), timeout=1)
            except OSError:
                client.close()
                return
            self._links.append(_Link(self, client, server))


class _Link:
    """One connection: from the client to us, and from us to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client, self._server = client, server
        self._to_client, self._to_server = bytearray(), bytearray()  # what the sockets have not taken yet
        self._requests, self._replies = bytearray(), bytearray()  # what has come, and is not complete
        self._asked: deque[str] = deque()  # kinds of the requests that await a reply
        self._later: deque[tuple[float, bytes]] = deque()  # replies that are delayed, and until when
        self.muted = False  # a reply was swallowed
        self._closed = False
        for end in (client, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        proxy._selector.register(client, selectors.EVENT_READ, self._on_client)
        proxy._selector.register(server, selectors.EVENT_READ, self._on_server)

    @property
    def due_at(self) -> float | None:
        return self._later[0][0] if self._later and not self._proxy._held else None

    def watch(self) -> None:
        """Have the selector tell what we can use now."""
        if self._closed:
            return
        for end, on, out in (
            (self._client, self._on_client, self._to_client), (self._server, self._on_server, self._to_server),
        ):  # fmt: skip
            events = 0 if self._proxy._held else selectors.EVENT_READ | (selectors.EVENT_WRITE if out else 0)
            registered = end in self._proxy._selector.get_map()
            if registered and not events:
                self._proxy._selector.unregister(end)
            elif registered:
                self._proxy._selector.modify(end, events, on)
            elif events:
                self._proxy._selector.register(end, events, on)

    def deliver(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            self._to_client += self._later.popleft()[1]
        self._flush()

    def close(self, reset: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        self._proxy._links.remove(self)
        for end in (self._client, self._server):
            with suppress(KeyError):
                self._proxy._selector.unregister(end)
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.close()

    def _on_client(self, events: int) -> None:
        data = self._receive(self._client, events)
        if data is None:
            return
        self._requests += data
        while not self._closed and (end := resp.end_of(self._requests)) is not None:
            request = bytes(self._requests[:end])
            del self._requests[:end]
            kind = resp.kind_of(request, self._proxy._names)
            offset = self._proxy.choose_request(kind, end) if self._proxy.choose_request else None
            if offset is not None:
                self._cut(self._server, self._to_server, request[:offset], f"request {kind}", offset, end)
                return
            self._asked.append(kind)
            if kind == "renew":
                self._proxy.renewed_at.append(now())
            self._to_server += request
        self._flush()

    def _on_server(self, events: int) -> None:
        data = self._receive(self._server, events)
        if data is None:
            return
        self._replies += data
        while not self._closed and (end := resp.end_of(self._replies)) is not None:
            reply = bytes(self._replies[:end])
            del self._replies[:end]
            self._pass_on(reply)
        self._flush()

    def _pass_on(self, reply: bytes) -> None:
        proxy = self._proxy
        if reply[0] == resp.PUSH:
            kind = "push"
            if self._asked and self._asked[0] == "SUBSCRIBE":
                kind = self._asked.popleft()  # answered by a push for each channel; those that follow count as pushes
        else:
            kind = self._asked.popleft() if self._asked else "?"
        offset = proxy.choose(kind, len(reply)) if proxy.choose else None
        if offset is not None:
            self._cut(self._client, self._to_client, reply[:offset], kind, offset, len(reply))
            return
        self.muted = self.muted or proxy.mute
        if self.muted:
            return
        if proxy.delay_s or self._later:
            self._later.append((time.monotonic() + proxy.delay_s, reply))
        else:
            self._to_client += reply

    def _cut(self, to: socket.socket, waiting: bytearray, part: bytes, kind: str, offset: int, length: int) -> None:
        """Let `part` through, and close: in a reply by FIN, so that the part arrives; in a request by RST, and whatever does."""
        with suppress(OSError):
            to.send(bytes(waiting) + part)
        self._proxy.cuts.append(Cut(kind, offset, length, now()))
        self.close(reset=to is self._server)

    def _receive(self, source: socket.socket, events: int) -> bytes | None:
        """What came; None: there is nothing to do, or no connection any more."""
        if self._closed:
            return None
        if events & selectors.EVENT_WRITE:
            self._flush()
        if self._closed or not events & selectors.EVENT_READ:
            return None
        try:
            data = source.recv(READ_SIZE)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self.close()
            return None
        return data

    def _flush(self) -> None:
        if self._closed:
            return
        for end, out in ((self._client, self._to_client), (self._server, self._to_server)):
            try:
                while out:
                    del out[: end.send(out)]
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
        self.watch()


class Walk:
    """Cuts at every byte: each of `kinds` of replies after 0, 1, 2 … bytes, up to `limit` or the longest that is not rare.

    `stride`: only every so many bytes, from `first` on.
    """

    def __init__(self, kinds: Collection[str], limit: int, stride: int = 1, first: int = 0) -> None:
        self.kinds = kinds
        self.limit = limit
        self.stride = stride
        self.first = first % stride
        self.lock = threading.Lock()
        self.next = dict.fromkeys(kinds, self.first)  # the offset that comes next
        self.lengths: dict[str, Counter[int]] = {kind: Counter() for kind in kinds}  # how many replies had them

    def length(self, kind: str) -> int | None:
        """The longest that is not rare: RARE of the replies are longer at most. None: none came."""
        lengths = self.lengths[kind]
        longer, rare = 0, int(RARE * lengths.total())
        for length in sorted(lengths, reverse=True):
            longer += lengths[length]
            if longer > rare:
                return length
        return None

    def left(self) -> dict[str, int]:
        """How many offsets are still to come, by kind; of one that was not seen yet, 1."""
        left = {}
        with self.lock:
            for kind in self.kinds:
                length = self.length(kind)
                left[kind] = 1 if length is None else len(range(self.next[kind], min(length, self.limit) + 1, self.stride))
        return {kind: count for kind, count in left.items() if count}


class Walker:
    """A walk's part in one proxy, as its `choose`.

    Between two cuts the connection must have come to life: a reservation or a dispatch has passed whole, and on that of a daemon,
    whose lease is to last, a renewal in the last `fresh_s` seconds. `kinds`: those to cut here.
    """

    def __init__(self, walk: Walk, proxy: Proxy, kinds: Collection[str], fresh_s: float | None) -> None:
        self._walk = walk
        self._proxy = proxy
        self._fresh_s = fresh_s
        self._used = False
        self._spare = False  # one cut may be made before it is used again
        self.kinds = kinds

    @property
    def alive(self) -> bool:
        renewed_at = self._proxy.renewed_at
        fresh = self._fresh_s is None or (bool(renewed_at) and now() - renewed_at[-1] < self._fresh_s)
        return self._used and fresh

    def renew(self) -> None:
        """Its daemon is about to be replaced: the new one's first words may be cut."""
        self._used, self._spare = False, True

    def __call__(self, kind: str, length: int) -> int | None:
        walk = self._walk
        label = "reserve, with jobs" if kind == "reserve" and length > EMPTY_RESERVE else kind
        if label in walk.kinds:
            with walk.lock:
                walk.lengths[label][length] += 1
                offset = walk.next[label]
                if label in self.kinds and (self.alive or self._spare) and offset <= min(length, walk.limit):
                    walk.next[label] = offset + walk.stride
                    self._used = self._spare = False
                    return offset
        self._used = self._used or kind in ("reserve", "enqueue")
        return None
