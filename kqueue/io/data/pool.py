"""Pools: connections that are lent to jobs and taken back, a pool for each URL and loop.

Rule 1. No more than `size` are lent at once. Who comes too many waits, the longest waiting first, until its own time is up.
Rule 2. What is lent is asked first whether it is alive; what is not is replaced, and nobody hears of it.
Rule 3. What lay idle for too long is closed, by a task that ends when nothing lies there; and so is what others need an fd for.
Rule 4. A lease ends with its job at the latest: what comes back by then is not known to be clean, so it is closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable
from typing import Any, Final, Generic, Protocol, TypeVar

from ...context import forget, keep
from ...errors import JobTimedOut
from ...kernel.traps import sleep
from ..errors import Closed, TimedOut
from ..gate import gate
from ..surroundings import Signal, beside, in_line, left, local, now

IDLE_S: Final = 60.0  # that a connection may lie unused
LIFE_S: Final = 1800.0  # after which one is not lent again, so that what stands behind a name is found


class Connection(Protocol):
    """What can be pooled."""

    def is_alive(self) -> bool:
        """Whether it can be used, as far as can be told without waiting."""

    def close(self) -> None:
        """At once. More than once does no harm."""

    def abandon(self) -> None:
        """The same when its loop has ended, so that nobody will see to what it was in the middle of."""


C = TypeVar("C", bound=Connection)
Open = Callable[[float | None], Generator[Any, Any, C]]  # by a deadline


class Lease(Generic[C]):
    """A connection that is lent. `give` it back when it is clean, else `close` it; only the first counts."""

    __slots__ = ("__weakref__", "_pool", "born", "connection", "is_handed_over")

    def __init__(self, pool: Pool[C], connection: C, born: float) -> None:
        self._pool: Pool[C] | None = pool  # None: it has ended
        self.connection = connection
        self.born = born
        self.is_handed_over = False  # a task of its own sees to its end
        keep(self)

    def give(self) -> None:
        self._end(is_clean=True)

    def close(self) -> None:
        self._end(is_clean=False)

    def hand_over(self) -> None:
        """Let it outlive the job: a task of its own sees to it from now on."""
        self.is_handed_over = True
        forget(self)

    def _end(self, is_clean: bool) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            forget(self)
            pool.take_back(self, is_clean)


class Pool(Generic[C]):
    """Connections that `open` makes, up to `size` at once. `what` ("redis://…") is for messages."""

    def __init__(self, open: Open[C], what: str, size: float, idle_s: float, life_s: float = LIFE_S) -> None:
        self.what = what
        self.size = size
        self.lent = 0  # places that are taken, be the connection there yet or not
        self._open = open
        self._idle_s, self._life_s = idle_s, life_s
        self._gate = gate()
        self._gate.spare.append(self._close_one)
        self._idle: deque[tuple[C, float, float]] = deque()  # with when it was made, and came back; the longest idle first
        self._out: set[C] = set()  # those that are lent
        self._waiting: deque[Signal] = deque()  # who is woken has the place already
        self._is_closed = False
        self._is_reaped = False  # a task sees to what is idle

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def take(self, deadline: float | None) -> Generator[Any, Any, Lease[C]]:
        """Lend one. TimedOut at `deadline`; or whatever making one raises."""
        yield from self._place(deadline)
        try:
            while self._idle:
                connection, born, since = self._idle.pop()
                if now() - since < self._idle_s and now() - born < self._life_s and connection.is_alive():
                    break
                connection.close()
            else:
                connection, born = (yield from self._open(deadline)), now()
        except BaseException:
            self._free()
            raise
        self._out.add(connection)
        return Lease(self, connection, born)

    def take_back(self, lease: Lease[C], is_clean: bool) -> None:
        """For a lease that ends."""
        connection = lease.connection
        self._out.discard(connection)
        if is_clean and not self._is_closed and now() - lease.born < self._life_s and not self._gate.waiting:
            self._idle.append((connection, lease.born, now()))
            self._see_to_the_idle()
        else:
            connection.close()
        self._free()

    def close(self) -> None:
        """The loop ends."""
        self._is_closed = True
        while self._idle:
            self._idle.pop()[0].close()
        for connection in tuple(self._out):
            connection.abandon()

    def _close_one(self) -> bool:
        """Close the one that has been idle for the longest; False: none is."""
        if not self._idle:
            return False
        self._idle.popleft()[0].close()
        return True

    def _place(self, deadline: float | None) -> Generator[Any, Any, None]:
        if self._is_closed:
            raise Closed(f"the pool of {self.what} is closed: its loop has ended")
        if self.lent < self.size and not self._waiting:
            self.lent += 1
            return
        try:
            has_it = yield from in_line(self._waiting, left(deadline), self._free)
        except BaseException as error:
            if isinstance(error, JobTimedOut) and self.what not in str(error):
                error.args = (f"{error}; {self._shortage()}",)
            raise
        if not has_it:
            raise TimedOut(self._shortage())

    def _free(self) -> None:
        self.lent -= 1
        while self._waiting and self.lent < self.size:
            self.lent += 1
            self._waiting.popleft().set()

    def _shortage(self) -> str:
        return (
            f"no connection to {self.what} was free in time: all {self.size} are in use; raise max_connections=, or let fewer "
            "jobs run at once"
        )

    def _see_to_the_idle(self) -> None:
        if not self._is_reaped:
            self._is_reaped = True
            beside(self._reap(), f"idle connections to {self.what}")

    def _reap(self) -> Generator[Any, Any, None]:
        while self._idle:
            yield from sleep(max(0.0, self._idle[0][2] + self._idle_s - now()))
            while self._idle and now() - self._idle[0][2] >= self._idle_s:
                self._idle.popleft()[0].close()
        self._is_reaped = False


class _Pools:
    """Those of one loop."""

    def __init__(self) -> None:
        self.of: dict[Hashable, Pool[Any]] = {}

    def close(self) -> None:
        while self.of:
            self.of.popitem()[1].close()


def pool_of(key: Hashable, make: Callable[[], Pool[C]]) -> Pool[C]:
    """That of this loop for `key`."""
    pools = local(_Pools).of
    found: Pool[C] | None = pools.get(key)
    if found is None:
        found = pools[key] = make()
    return found
