"""Timers: a heap of deadlines that never needs a removal.

Almost every timer here is a time-out, and almost no time-out fires. So cancelling must cost nothing: an entry
carries the task's wait number at the time it was armed, every wake raises that number, and an entry whose number is old
is skipped when it surfaces. What such a heap must not do is grow: at 10,000 jobs a second with a time-out of 30 s,
300,000 dead entries would stand in it. So when it has doubled since it was last looked through, it is looked through.
Both halves are O(log n) amortised, and nobody has to remember to cancel anything.
"""

from __future__ import annotations

import heapq
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .loop import Task

ANY_WAIT: Final = -1  # the timer holds whatever the task waits for, until it is cancelled
_SMALL: Final = 1024  # entries that are not worth looking through


class Timer:
    """One armed deadline of one task.

    `error`, when given, is thrown into the task, which cancels it unless it only `interrupts`; else `value` is sent. `task` is
    None once it was cancelled.
    """

    __slots__ = ("error", "interrupts", "task", "value", "wait_number")

    def __init__(
        self, task: Task, wait_number: int, value: Any, error: BaseException | None, interrupts: bool = False
    ) -> None:
        self.task: Task | None = task
        self.wait_number = wait_number
        self.value = value
        self.error = error
        self.interrupts = interrupts

    def cancel(self) -> None:
        """Make it stale. For timers of ANY_WAIT; the others go stale by themselves."""
        self.task = self.error = None

    @property
    def stale(self) -> bool:
        task = self.task
        return task is None or task.ended or self.wait_number not in (task.wait_number, ANY_WAIT)


class Timers:
    """The heap. Times are seconds of the kernel's clock."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._tick = count()  # equal deadlines fire in the order they were armed
        self._look_through_at = _SMALL

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, timer: Timer) -> None:
        """Arm `timer`; infinity: it never fires. ValueError for NaN, which has no order and would break the heap for all."""
        if when != when:
            raise ValueError("a time to wait until must be a number, not NaN")
        if when == inf:
            return
        heapq.heappush(self._heap, (when, next(self._tick), timer))
        if len(self._heap) > self._look_through_at:
            self._heap = [entry for entry in self._heap if not entry[2].stale]
            heapq.heapify(self._heap)
            self._look_through_at = max(_SMALL, 2 * len(self._heap))

    def next_deadline(self) -> float | None:
        """When the earliest live timer is due; None: there is none."""
        heap = self._heap
        while heap:
            if not heap[0][2].stale:
                return heap[0][0]
            heapq.heappop(heap)
        return None

    def pop_due(self, now: float) -> list[Timer]:
        """The timers due at `now`, earliest first. Look whether each is `stale` when it is its turn: one may silence the next."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        return due
