"""What tasks of one job share: `Semaphore`, how many may do something at once, and `Queue`, to hand things over.

    slots = io.Semaphore(5)
    with (yield slots.acquire()): ...          async with slots: ...

    queue = io.Queue(100)
    yield queue.put(row)      row = yield queue.get()      queue.close()

Who waited longest is first. Who is interrupted while he waits has taken nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from types import TracebackType
from typing import Any, Generic, TypeVar

from ..errors import UsageError
from .errors import Closed, TimedOut
from .operation import operation
from .surroundings import Signal, deadline_in, in_line, left

T = TypeVar("T")


class Semaphore:
    """`count` places. With one, a lock."""

    def __init__(self, count: int = 1) -> None:
        if count < 1:
            raise UsageError(f"Semaphore() takes a count of at least 1, not {count!r}")
        self._free = count
        self._waiting: deque[Signal] = deque()

    @operation
    def acquire(self, *, timeout: float | None = None) -> Generator[Any, Any, Semaphore]:
        """Wait for a place. What it returns gives it back at the end of its `with`; or call `release`."""
        if self._free:
            self._free -= 1
            return self
        if not (yield from in_line(self._waiting, timeout, self.release)):
            raise TimedOut(f"no place was free in {timeout:g} s")
        return self

    def release(self) -> None:
        """Give a place back: to who has waited longest, if anybody does."""
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._free += 1

    def __enter__(self) -> Semaphore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    async def __aenter__(self) -> Semaphore:
        return await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Queue(Generic[T]):
    """At most `size` things between who puts and who gets."""

    def __init__(self, size: int) -> None:
        self._things: deque[T] = deque()
        self._room = Semaphore(size)
        self._filled: deque[Signal] = deque()  # who waits for a thing
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._things)

    @operation
    def put(self, thing: T, *, timeout: float | None = None) -> Generator[Any, Any, None]:
        """Wait for room, and put `thing` at the end. Closed when it was closed."""
        if not self._is_closed:
            yield from self._room.acquire(timeout=timeout)
        if self._is_closed:
            self._room.release()
            raise Closed("the queue was closed: nobody is to put anything into it any more")
        self._things.append(thing)
        self._wake()

    @operation
    def get(self, *, timeout: float | None = None) -> Generator[Any, Any, T]:
        """Wait for the next thing. Closed when the queue was closed, and is empty."""
        deadline = deadline_in(timeout)
        while not self._things:
            if self._is_closed:
                raise Closed("the queue was closed, and nothing is left in it")
            if not (yield from in_line(self._filled, left(deadline), self._wake)):
                raise TimedOut(f"nothing came in {timeout:g} s")
        thing = self._things.popleft()
        self._room.release()
        return thing

    def close(self) -> None:
        """Nothing more will be put: who gets has what is left, and then Closed."""
        self._is_closed = True
        while self._filled:
            self._filled.popleft().set()
        for _ in range(len(self._room._waiting)):
            self._room.release()

    def _wake(self) -> None:
        if self._filled:
            self._filled.popleft().set()
