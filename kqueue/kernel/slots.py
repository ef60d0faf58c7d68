"""Slots: a few places that tasks take in turn. With one, a lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from .traps import Park, this_kernel

if TYPE_CHECKING:
    from .loop import Kernel, Task


class Slots:
    """`count` places. `yield from slots.take()`, and `slots.give()` in a finally."""

    def __init__(self, count: int = 1) -> None:
        self._free = count
        self._waiting: deque[Task] = deque()
        self._kernel: Kernel | None = None  # None: nobody ever took one, so nobody waits

    def take(self) -> Generator[Any, Any, None]:
        """Wait until a place is free and take it."""
        kernel = self._kernel = yield this_kernel()
        try:
            while not self._free:
                yield Park(self._waiting)
        except BaseException:  # cancelled; the place that may have woken us is the next one's
            if self._free:
                kernel.unpark(self._waiting, count=1)
            raise
        self._free -= 1

    def give(self) -> None:
        """Give a place back; the longest waiting task is woken for it."""
        self._free += 1
        if self._kernel is not None:
            self._kernel.unpark(self._waiting, count=1)
