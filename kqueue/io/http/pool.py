"""Connections that are kept for the next request, and how many there may be at once.

Rule 1. A place is taken before there is a connection, and given back when that is closed; an idle connection has one, too.
Rule 2. Who finds no place waits, the longest waiting first. What becomes free goes to him at once: a connection to where he
        wants, or a place. He may be passed by whoever can use a connection as it is, by HEAD_START_S at most.
Rule 3. An idle connection is closed when its time is up, when its place is wanted for another server, and when a job finds no
        file descriptor. It never keeps anybody waiting. One that goes from request to request does not for long: see SHARE.
Rule 4. A connection is used by one request. Only where that has ended as it should does it come back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import h11

from ...context import forget, keep
from ...kernel.traps import sleep
from ..gate import gate
from ..surroundings import Signal, beside, left, local, now

if TYPE_CHECKING:
    from ..streams import Stream
    from .client import Client
    from .upload import Upload

Key = tuple[Any, ...]  # scheme, host, port, and the proxy in between

SHARE: Final = 8  # of so many connections that are given back, one is closed when others want a file descriptor
HEAD_START_S: Final = 0.1  # of who can use a connection as it is, before those for whom it has to be closed


class Connection:
    """A stream to a server, and where the protocol on it stands. Its request closes it or gives it back, or its job's end."""

    __slots__ = ("__weakref__", "_pool", "idle_until", "is_last", "key", "protocol", "stream", "upload", "uses")

    def __init__(self, stream: Stream, key: Key, pool: Pool) -> None:
        self.stream = stream
        self.key = key
        self.protocol: h11.Connection | None = None  # that of its request, from the first byte of the response on
        self.upload: Upload | None = None  # what is left to send of its request, once the response has begun
        self.uses = 0  # requests before the one that it serves now
        self.idle_until = 0.0
        self.is_last = False  # no request can follow, whatever the response says: the server took only a part of this one
        self._pool: Pool | None = pool  # None: it is closed
        stream.disown()
        self._lend()
        pool.connected()

    def give_back(self) -> None:
        """Its request has ended. It is kept if another one can follow."""
        pool, protocol, self.protocol = self._pool, self.protocol, None
        if pool is None:
            return
        states = protocol and (protocol.our_state, protocol.their_state)
        is_last = self.is_last or self.upload is not None
        if protocol is None or is_last or states != (h11.DONE, h11.DONE) or protocol.trailing_data[0]:
            self.close()
            return
        self.uses += 1
        forget(self)
        pool.take_back(self)

    def close(self) -> None:
        """At once, whatever it was doing. More than once does no harm."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        forget(self)
        self.stream.close()
        pool.give_place(self.key)
        self.end_upload()

    def end_upload(self) -> None:
        """No more is sent."""
        upload, self.upload = self.upload, None
        if upload is not None:
            upload.close()

    def _lend(self) -> None:
        keep(self)

    def lend(self) -> bool:
        """Whether it can serve another request, which has it from now on. It is not closed otherwise, but useless."""
        stream = self.stream
        if not stream.is_alive() or stream.buffered:
            return False
        self._lend()
        return True

    def bury(self) -> None:
        """It is dead. Its place is the caller's."""
        self._pool = None
        self.stream.close()

    def __del__(self) -> None:
        if self._pool is not None:
            self.close()


class Pool:
    """The connections of one client in one loop."""

    def __init__(self, max_connections: int, max_per_host: int, idle_timeout_s: float) -> None:
        self._max_connections = max_connections
        self._max_per_host = max_per_host
        self._idle_timeout_s = idle_timeout_s
        self._places: dict[Key, int] = {}  # that are taken
        self._taken = 0  # all of these
        self._idle: dict[Key, deque[Connection]] = {}  # who came last at the right
        self._waiting: dict[Key, dict[Signal, float]] = {}  # who waits for a place or a connection, since when
        self._connecting = 0  # places that have no connection yet
        self._handed = 0  # connections that went from one request right to the next
        self._is_reaping = False
        self._is_closed = False

    @property
    def counts(self) -> tuple[int, int, int]:
        """Connections in use, idle ones, and requests that wait."""
        idle = sum(map(len, self._idle.values()))
        return self._taken - idle, idle, sum(map(len, self._waiting.values()))

    def limit_met(self, key: Key) -> str:
        """For messages: what keeps a request to `key` waiting."""
        if self._places.get(key, 0) >= self._max_per_host:
            return f"{self._max_per_host} connections to it are in use, which is max_per_host"
        if self._taken < self._max_connections:
            return f"jobs have {gate().taken} file descriptors open, and may have no more; see LimitNOFILE= of the service"
        return f"{self._max_connections} connections are in use, which is max_connections"

    # -- taking -----------------------------------------------------------------------------------------------------

    def take(self, key: Key, deadline: float | None) -> Generator[Any, Any, Connection | None]:
        """An idle connection to `key`, or None: a place for a new one, which is the caller's. TimeoutError at `deadline`."""
        found = self._idle_one(key)
        if found is not None or self._place(key):
            return found
        signal = Signal()
        self._waiting.setdefault(key, {})[signal] = now()
        try:
            yield from signal.within(left(deadline))
        except BaseException:
            self._leave(key, signal)
            raise
        if not signal.is_set:
            self._leave(key, signal)
            raise TimeoutError
        connection: Connection | None = signal.value
        if connection is not None and not connection.lend():
            connection.bury()
            self._connecting += 1
            return None
        return connection

    def _idle_one(self, key: Key) -> Connection | None:
        idle = self._idle.get(key)
        while idle:
            connection = idle.pop()
            if not idle:
                del self._idle[key]
            if connection.lend():
                return connection
            connection.close()
        return None

    def _place(self, key: Key) -> bool:
        """Take a place, if there is one."""
        if self._places.get(key, 0) >= self._max_per_host:
            return False
        if self._taken >= self._max_connections and not self.close_an_idle_one():
            return False
        if self._taken >= self._max_connections or not self._may_connect():  # perhaps somebody had waited for that one
            return False
        self._give(key)
        return True

    def _may_connect(self) -> bool:
        """Where there is no file descriptor, one at a time stands in that queue for all; others can use what is given back."""
        return not self._connecting or not gate().is_full

    def _give(self, key: Key) -> None:
        """A place, for somebody to connect."""
        self._places[key] = self._places.get(key, 0) + 1
        self._taken += 1
        self._connecting += 1

    def _leave(self, key: Key, signal: Signal) -> None:
        """Who waited does not any more; what he was given already goes on to the next."""
        if not signal.is_set:
            self._forget(key, signal)
        elif signal.value is None:
            self.not_connected(key)
        else:
            self.take_back(signal.value)

    def _forget(self, key: Key, signal: Signal) -> None:
        waiting = self._waiting[key]
        del waiting[signal]
        if not waiting:
            del self._waiting[key]

    # -- giving back ------------------------------------------------------------------------------------------------

    def take_back(self, connection: Connection) -> None:
        """It is idle."""
        key = connection.key
        self._handed += 1
        is_wanted = gate().waiting > self._connecting and self._handed % SHARE == 0
        if key in self._waiting and not is_wanted and self._longest_waiting(key) == key:
            self._next_of(key).set(connection)
        elif self._is_closed or self._longest_waiting() is not None or gate().waiting:
            connection.close()
        else:
            connection.idle_until = now() + self._idle_timeout_s
            self._idle.setdefault(key, deque()).append(connection)
            self._reap()

    def connected(self) -> None:
        """A place has its connection."""
        self._connecting -= 1
        self._go_on()

    def not_connected(self, key: Key) -> None:
        """It does not get one."""
        self._connecting -= 1
        self.give_place(key)

    def give_place(self, key: Key) -> None:
        """A connection to `key` is closed."""
        left_over = self._places[key] - 1
        if left_over:
            self._places[key] = left_over
        else:
            del self._places[key]
        self._taken -= 1
        self._go_on()

    def _go_on(self) -> None:
        """Give the places that are free to those who wait."""
        while self._waiting and self._taken < self._max_connections and self._may_connect():
            following = self._longest_waiting()
            if following is None:
                return
            self._give(following)
            self._next_of(following).set(None)

    def _longest_waiting(self, favoured: Key | None = None) -> Key | None:
        """To where the request goes that has waited longest, of those to servers that may have a connection more.

        To `favoured` there is one already, which spares us another: so it counts, and HEAD_START_S more than it has waited.
        """
        found = [key for key in self._waiting if key == favoured or self._places.get(key, 0) < self._max_per_host]

        def since(key: Key) -> float:
            return next(iter(self._waiting[key].values())) - (HEAD_START_S if key == favoured else 0)

        return min(found, key=since, default=None)

    def _next_of(self, key: Key) -> Signal:
        signal = next(iter(self._waiting[key]))
        self._forget(key, signal)
        return signal

    # -- ending -----------------------------------------------------------------------------------------------------

    def close_an_idle_one(self) -> bool:
        """The one that has been idle longest; False: there is none."""
        if not self._idle:
            return False
        key = min(self._idle, key=lambda key: self._idle[key][0].idle_until)
        self._close_oldest(key)
        return True

    def drop_idle(self, key: Key) -> None:
        """Close what is idle to `key`."""
        while key in self._idle:
            self._close_oldest(key)

    def close(self) -> None:
        """Close what is idle now, and the others when their requests have ended."""
        self._is_closed = True
        while self.close_an_idle_one():
            pass

    def _close_oldest(self, key: Key) -> None:
        idle = self._idle[key]
        connection = idle.popleft()
        if not idle:
            del self._idle[key]
        connection.close()

    def _reap(self) -> None:
        """See to it that nothing stays idle for too long."""
        if not self._is_reaping:
            self._is_reaping = True
            beside(self._reaping(), "http pool")

    def _reaping(self) -> Generator[Any, Any, None]:
        try:
            while self._idle:
                key = min(self._idle, key=lambda key: self._idle[key][0].idle_until)
                pause_s = self._idle[key][0].idle_until - now()
                if pause_s > 0:
                    yield from sleep(pause_s)
                else:
                    self._close_oldest(key)
        finally:
            self._is_reaping = False


class Pools:
    """Those of one loop, by client. That of a client which nobody has any more is closed."""

    def __init__(self) -> None:
        self._of: dict[ref[Client], Pool] = {}
        gate().spare.append(self.close_an_idle_one)

    def __iter__(self) -> Iterator[Pool]:
        return iter(tuple(self._of.values()))

    def of(self, client: Client, make: Callable[[], Pool]) -> Pool:
        pool = self._of.get(ref(client))
        if pool is None:
            pool = self._of[ref(client, self._gone)] = make()
        return pool

    def end(self, client: Client) -> None:
        self._gone(ref(client))

    def close_an_idle_one(self) -> bool:
        return any(pool.close_an_idle_one() for pool in self)

    def close(self) -> None:
        for pool in self:
            pool.close()

    def _gone(self, client: ref[Client]) -> None:
        pool = self._of.pop(client, None)
        if pool is not None:
            pool.close()


def pools() -> Pools:
    """Those of this loop."""
    return local(Pools)
