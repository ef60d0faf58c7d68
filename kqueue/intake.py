"""Intake: how many jobs to ask for, from which queue, in which lane. Pure arithmetic; the runtime asks, and does the asking.

Limits are kept by reserving less, never by failing a job: slots of each lane, slots of all, slots and a rate of a queue, a rate
of all. Queues share by weight, as in deficit round robin (Shreedhar and Varghese, 1995): of every job that was taken, each queue
that had some earns its share as credit, the queue that it came from pays for it, and one that had nothing keeps no credit. In
strict order an earlier queue takes whatever it can.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from .codec import LANES
from .config import QueueSpec

BATCH: Final = 200  # jobs asked for at once: more would start in one turn of the loop
WINDOW_S: Final = 60.0


class RateWindow:
    """At most `limit` in any minute (0: no limit), exactly: it remembers when each of the last `limit` was taken."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: deque[tuple[float, int]] = deque()
        self._used = 0

    def left(self, now: float) -> int | None:
        """How many may be taken now; None: any number."""
        if not self._limit:
            return None
        while self._taken and self._taken[0][0] <= now - WINDOW_S:
            self._used -= self._taken.popleft()[1]
        return self._limit - self._used

    def take(self, count: int, now: float) -> None:
        if self._limit and count:
            self._taken.append((now, count))
            self._used += count

    def opens_in_s(self, now: float) -> float | None:
        """Seconds until another may be taken; None: one may now."""
        if self.left(now) != 0:
            return None
        return max(0.0, self._taken[0][0] + WINDOW_S - now)


class _Queue:
    """A queue's share and what of it runs."""

    def __init__(self, spec: QueueSpec) -> None:
        self.spec = spec
        self.credit = 0.0  # jobs it is owed; below 0: that it had too many
        self.idle = False  # it had nothing when it was last asked
        self.running = 0
        self.rate = RateWindow(spec.per_minute)


class Ask(NamedTuple):
    """Reserve up to `wants[lane]` jobs of `queue`."""

    queue: str
    wants: Mapping[str, int]


class Intake:
    """The books of what runs and of what may be reserved. `slots`: lane -> how many may run at once."""

    def __init__(
        self, queues: Sequence[QueueSpec], slots: Mapping[str, int], *, strict_order: bool = False, concurrent: int = 0,
        per_minute: int = 0, max_jobs: int = 0, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._queues = {spec.name: _Queue(spec) for spec in queues}
        self._total_weight = sum(spec.weight for spec in queues)
        self._slots = dict(slots)
        self._strict_order = strict_order
        self._concurrent = concurrent
        self._per_minute = per_minute
        self._rate = RateWindow(per_minute)
        self._clock = clock
        self.remaining = max_jobs or None  # jobs that may still be taken in this process's life; None: any number
        self._lanes = deque(LANES)
        self.running = dict.fromkeys(LANES, 0)

    @property
    def queues(self) -> list[str]:
        return list(self._queues)

    @property
    def total_running(self) -> int:
        return sum(self.running.values())

    def started(self, queue: str, lane: str) -> None:
        """A job of `queue` took a slot of `lane`."""
        self.running[lane] += 1
        self._queues[queue].running += 1

    def ended(self, queue: str, lane: str) -> None:
        """It gave the slot back."""
        self.running[lane] -= 1
        self._queues[queue].running -= 1

    def has_slots(self) -> bool:
        """Whether nothing but the queues themselves limits what can be had now: a slot in each lane, and of all limits some left."""
        if any(self.running[lane] >= slots for lane, slots in self._slots.items() if slots):
            return False
        limits = [(self._concurrent, self.total_running)]
        limits += [(queue.spec.max_concurrent, queue.running) for queue in self._queues.values()]
        return all(used < limit for limit, used in limits if limit)

    def order(self) -> list[str]:
        """The queues in the order in which to ask them now."""
        if self._strict_order or len(self._queues) == 1:
            return list(self._queues)
        return sorted(self._queues, key=lambda name: (-self._queues[name].credit, -self._queues[name].spec.weight))

    def ask(self, name: str, share: bool = True) -> Ask | None:
        """What to ask `name` for now; None: nothing. `share` False: whatever is free, since no other queue had use for it."""
        queue = self._queues[name]
        total = BATCH
        for limit, used in ((self._concurrent, self.total_running), (queue.spec.max_concurrent, queue.running)):
            if limit:
                total = min(total, limit - used)
        for left in (self._rate.left(self._clock()), queue.rate.left(self._clock()), self.remaining):
            if left is not None:
                total = min(total, left)
        if share and not self._strict_order and len(self._queues) > 1:
            total = min(total, max(1, round(total * queue.spec.weight / self._total_weight + queue.credit)))
        wants = {}
        self._lanes.rotate()  # where both lanes draw on one limit, each is served first half of the time
        for lane in self._lanes:
            wants[lane] = max(0, min(total, self._slots.get(lane, 0) - self.running[lane]))
            total -= wants[lane] if self._is_scarce(queue) else 0
        return Ask(name, wants) if any(wants.values()) else None

    def got(self, ask: Ask, count: int) -> None:
        """`ask` brought `count` jobs."""
        queue = self._queues[ask.queue]
        now = self._clock()
        self._rate.take(count, now)
        queue.rate.take(count, now)
        if self.remaining is not None:
            self.remaining -= count
        queue.idle = count == 0
        if queue.idle:
            queue.credit = 0.0
            return
        busy = [other for other in self._queues.values() if not other.idle]
        for other in busy:
            other.credit += count * other.spec.weight / sum(each.spec.weight for each in busy)
        queue.credit -= count

    def opens_in_s(self) -> float | None:
        """Seconds until a rate lets another job through; None: no rate holds one back now."""
        now = self._clock()
        waits = [self._rate.opens_in_s(now), *(queue.rate.opens_in_s(now) for queue in self._queues.values())]
        known = [wait for wait in waits if wait is not None]
        return min(known) if known else None

    def _is_scarce(self, queue: _Queue) -> bool:
        """Whether both lanes draw on one limit, so that what one may get the other may not."""
        spec = queue.spec
        return self.remaining is not None or any((self._concurrent, self._per_minute, spec.max_concurrent, spec.per_minute))
