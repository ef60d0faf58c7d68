"""Clocks: the real one, and one for tests in which an hour passes as soon as nobody has anything to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from .poller import Poller

LONGEST_S: Final = 86400.0  # of one wait; epoll takes no more than 24 days


class Clock:
    """The machine's monotonic clock. Durations never come from wall time, which jumps."""

    monotonic: Callable[[], float] = staticmethod(time.monotonic)  # seconds since some fixed moment; a dozen calls a job

    def boottime(self) -> float:
        """The same, but that it counts the time that the machine slept, too: what others see pass."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def select(self, poller: Poller, timeout_s: float | None) -> list[tuple[int, int]]:
        """Wait for events up to `timeout_s` seconds (None: without end), or less."""
        return poller.select(timeout_s if timeout_s is None else min(timeout_s, LONGEST_S))


class VirtualClock(Clock):
    """Time that jumps to the next timer whenever nothing else is left to do. Starts at 0.

    Real I/O still happens in real time: what is ready is served before time moves. What is not ready is waited for up to
    `patience_s` seconds, which then have passed here, too; after that, time jumps over it. While it is `held`, by as many as
    hold it, time is that of the machine.
    """

    def __init__(self, patience_s: float = 0.0) -> None:
        self.now = 0.0
        self.held = 0
        self._patience_s = patience_s

    def monotonic(self) -> float:
        return self.now

    def boottime(self) -> float:
        return self.now

    def select(self, poller: Poller, timeout_s: float | None) -> list[tuple[int, int]]:
        if timeout_s is None:
            if not len(poller):
                raise RuntimeError("every task waits for another one: nothing can ever happen")
            return poller.select(None)
        began = time.monotonic()
        patience_s = LONGEST_S if self.held else self._patience_s
        events = poller.select(min(timeout_s, patience_s) if len(poller) else 0)
        if not events:
            self.now += min(timeout_s, patience_s) if self.held else timeout_s
        elif patience_s:
            self.now += min(timeout_s, time.monotonic() - began)
        return events
