"""Intake: how many jobs to ask for, from which queue, in which lane. Pure arithmetic; the runtime asks, and does the asking.

Limits are kept by reserving less, never by failing a job: slots of each lane, slots of all, slots and a rate of a queue, a rate
of all, and for isolated jobs what the memory budget has room for. Queues share each lane by weight, as in deficit round robin
(Shreedhar and Varghese, 1995): of every job that was taken, each queue that may have more earns its share as credit, the queue
that it came from pays for it, and one that ran dry keeps no credit. In strict order an earlier queue takes whatever it can.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from .codec import LANES
from .config import QueueSpec

BATCH: Final = 200  # jobs asked for at once: more would start in one turn of the loop
SMALLEST_BATCH: Final = 20
STARTING_S: Final = 0.005  # that the starts of one batch should take together, since they keep the loop from all others
WINDOW_S: Final = 60.0
MAX_CREDIT: Final = 50.0  # jobs: a queue that its own limits held back for an hour is not owed an hour of everybody else's


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
        while self._taken and self._taken[0][0] + WINDOW_S <= now:
            self._used -= self._taken.popleft()[1]
        return self._limit - self._used

    def take(self, count: int, now: float) -> None:
        if self._limit and count:
            self._taken.append((now, count))
            self._used += count

    def give_back(self, when: float) -> None:
        """One of those that were taken at `when` did not run after all."""
        for position in range(len(self._taken) - 1, -1, -1):
            taken_at, count = self._taken[position]
            if taken_at == when and count:
                self._taken[position] = (when, count - 1)
                self._used -= 1
                return

    def opens_in_s(self, now: float) -> float | None:
        """Seconds until another may be taken; None: one may now."""
        if self.left(now) != 0:
            return None
        return max(0.0, self._taken[0][0] + WINDOW_S - now)


class _Share:
    """What one queue may take of one lane."""

    def __init__(self) -> None:
        self.credit = 0.0  # jobs it is owed; below 0: that it had too many
        self.asked = 0  # when it was last asked
        self.came = 0  # of those

    @property
    def dry(self) -> bool:
        """It brought less than it was asked for, so it has no more. One that was asked for nothing may have some."""
        return self.came < self.asked

    @property
    def empty(self) -> bool:
        """It was asked, and brought nothing at all."""
        return self.asked > 0 and not self.came

    def ask(self, count: int) -> None:
        """It is about to be asked for `count` jobs."""
        if self.dry:
            self.credit = 0.0
        self.asked, self.came = count, 0


class _Queue:
    """A queue's shares, and what of it runs."""

    def __init__(self, spec: QueueSpec) -> None:
        self.spec = spec
        self.shares = {lane: _Share() for lane in LANES}
        self.lanes = deque(LANES)  # where both draw on one limit, the first is served first; they take turns
        self.running = 0
        self.rate = RateWindow(spec.per_minute)

    @property
    def credit(self) -> float:
        return sum(share.credit for share in self.shares.values() if not share.dry)


class Ask(NamedTuple):
    """Reserve up to `wants[lane]` jobs of `queue`."""

    queue: str
    wants: Mapping[str, int]


class Intake:
    """The books of what runs and of what may be reserved. `slots`: lane -> how many may run at once.

    `room`: how many isolated jobs more there is memory for, with so many running; None: for any number. `ahead`: how many may be
    reserved beyond their slots now, since they have their turn as soon as those before them have ended.
    """

    def __init__(
        self, queues: Sequence[QueueSpec], slots: Mapping[str, int], *, strict_order: bool = False, concurrent: int = 0,
        per_minute: int = 0, max_jobs: int = 0, clock: Callable[[], float],
        room: Callable[[int], int | None] = lambda running: None, ahead: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self._queues = {spec.name: _Queue(spec) for spec in queues}
        self._slots = dict(slots)
        self._strict_order = strict_order
        self._concurrent = concurrent
        self._per_minute = per_minute
        self._rate = RateWindow(per_minute)
        self._clock = clock
        self._room = room
        self._ahead = ahead
        self._batch = BATCH  # by what starts took lately
        self._starts = (0, 0.0)  # how many are on their way, and since when
        self.taken_at = 0.0  # when the last jobs were taken
        self.remaining = max_jobs or None  # jobs that may still be taken in this process's life; None: any number
        self.running = dict.fromkeys(LANES, 0)

    @property
    def queues(self) -> list[str]:
        return list(self._queues)

    @property
    def total_running(self) -> int:
        return sum(self.running.values())

    @property
    def excess(self) -> int:
        """Isolated jobs beyond their slots."""
        return max(0, self.running["isolated"] - self._slots.get("isolated", 0))

    def starts_begin(self, count: int) -> None:
        """The first of `count` jobs, which were taken together, is about to run."""
        self._starts = count, self._clock()

    def starts_end(self) -> None:
        """The last of them has: how many may be asked for at once follows from how long that took."""
        (count, began), self._starts = self._starts, (0, 0.0)
        if not count:
            return
        seconds = self._clock() - began
        fitting = BATCH if seconds <= 0 else int(count * STARTING_S / seconds)
        self._batch = max(SMALLEST_BATCH, min(BATCH, (self._batch + fitting) // 2))

    def started(self, queue: str, lane: str) -> None:
        """A job of `queue` took a slot of `lane`, at the expense of the others that want one."""
        self.running[lane] += 1
        payer = self._queues[queue]
        payer.running += 1
        payer.shares[lane].came += 1
        if len(self._queues) == 1:
            return
        payer.shares[lane].credit -= 1
        weight = self._weight(payer, lane)
        for each in self._queues.values():
            share = each.shares[lane]
            if each is payer or not share.dry:
                share.credit = max(-MAX_CREDIT, min(share.credit + each.spec.weight / weight, MAX_CREDIT))

    def ended(self, queue: str, lane: str) -> None:
        """It gave the slot back."""
        self.running[lane] -= 1
        self._queues[queue].running -= 1

    def has_slots(self) -> bool:
        """Whether only the queues limit what can be had now: there is a slot in each lane, and some left of each limit."""
        if any(self.running[lane] >= self._slots_of(lane) for lane, slots in self._slots.items() if slots):
            return False
        if self._free("isolated") == 0 < self._slots.get("isolated", 0):
            return False
        limits = [(self._concurrent, self.total_running)]
        limits += [(queue.spec.max_concurrent, queue.running) for queue in self._queues.values()]
        return all(used < limit for limit, used in limits if limit)

    def may_get_more(self, lane: str) -> bool:
        """Whether another round could bring something: `lane` has a free slot, for which not every queue has just had nothing."""
        free = self.running[lane] < self._slots_of(lane)
        return free and any(not queue.shares[lane].empty for queue in self._queues.values())

    def order(self) -> list[str]:
        """The queues in the order in which to ask them now; one twice, when both its lanes have a chance of one job only."""
        names = list(self._queues)
        if not self._strict_order:
            names.sort(key=lambda name: (-self._queues[name].credit, -self._queues[name].spec.weight))
        return [name for name in names for _ in range(2 if self._is_scarce(name) and self._left(name) == 1 else 1)]

    def ask(self, name: str, share: bool = True) -> Ask | None:
        """What to ask `name` for now; None: nothing.

        Where there are several queues, each is asked for its share, and then once more (`share` False) for what is still free,
        which those share that have not just run dry.
        """
        queue = self._queues[name]
        left = self._left(name)
        wants = {lane: max(0, min(left, self._free(lane))) for lane in LANES}
        if self._is_scarce(name):  # half to each lane, and more of what the other has no slots for
            first, second = queue.lanes
            wants[first] = min(wants[first], max(left - left // 2, left - wants[second]))
            wants[second] = min(wants[second], left - wants[first])
        for lane, mine in queue.shares.items():
            if not share and mine.dry and len(self._queues) > 1:
                wants[lane] = 0
                continue
            if not self._strict_order:
                portion = wants[lane] * queue.spec.weight / self._weight(queue, lane, share)
                least, most = (0, portion + mine.credit) if share else (1, portion)
                wants[lane] = min(wants[lane], max(least, round(most)))
            mine.ask(wants[lane])
        return Ask(name, wants) if any(wants.values()) else None

    def has_room(self, name: str) -> bool:
        """Whether a job of `name`, in some lane, could start now."""
        return self._left(name) > 0 and any(self._free(lane) > 0 for lane in LANES)

    def ask_one(self, name: str, lane: str) -> Ask | None:
        """To ask `name` for one job of `lane`, whatever its share is; None: its limits do not let one through."""
        queue = self._queues.get(name)
        if queue is None or self._left(name) < 1 or self._slots.get(lane, 0) <= self.running[lane]:
            return None
        queue.shares[lane].ask(1)
        return Ask(name, {each: int(each == lane) for each in LANES})

    def got(self, ask: Ask, count: int) -> None:
        """`ask` brought `count` jobs. Each of them is `started` next."""
        queue = self._queues[ask.queue]
        now = self.taken_at = self._clock()
        self._rate.take(count, now)
        queue.rate.take(count, now)
        if self.remaining is not None:
            self.remaining -= count
        queue.lanes.rotate()

    def give_back(self, name: str, taken_at: float) -> None:
        """A job of queue `name` was taken and did not run: it was moved to its lane, or nobody here knows it."""
        self._rate.give_back(taken_at)
        self._queues[name].rate.give_back(taken_at)
        if self.remaining is not None:
            self.remaining += 1

    def opens_in_s(self) -> float | None:
        """Seconds until a rate lets another job through; None: no rate holds one back now."""
        now = self._clock()
        waits = [self._rate.opens_in_s(now), *(queue.rate.opens_in_s(now) for queue in self._queues.values())]
        known = [wait for wait in waits if wait is not None]
        return min(known) if known else None

    def _free(self, lane: str) -> int:
        """How many jobs of `lane` there are slots for, and memory."""
        free = self._slots_of(lane) - self.running[lane]
        room = self._room(self.running[lane]) if lane == "isolated" else None
        return free if room is None else min(free, room)

    def _slots_of(self, lane: str) -> int:
        """With those for jobs that wait for their turn here."""
        slots = self._slots.get(lane, 0)
        return slots + self._ahead() if slots and lane == "isolated" else slots

    def _left(self, name: str) -> int:
        """How many jobs of `name` the limits that both lanes draw on let through now."""
        queue = self._queues[name]
        now = self._clock()
        limits = [self._batch, self._rate.left(now), queue.rate.left(now), self.remaining]
        limits += [self._concurrent - self.total_running] if self._concurrent else []
        limits += [queue.spec.max_concurrent - queue.running] if queue.spec.max_concurrent else []
        return max(0, min(limit for limit in limits if limit is not None))

    def _weight(self, queue: _Queue, lane: str, all_of_them: bool = False) -> int:
        """Of `queue` and of those that may have more for `lane`, or of all."""
        return sum(q.spec.weight for q in self._queues.values() if all_of_them or q is queue or not q.shares[lane].dry)

    def _is_scarce(self, name: str) -> bool:
        """Whether there are such limits, so that what one lane gets the other does not."""
        spec = self._queues[name].spec
        return self.remaining is not None or any((self._concurrent, self._per_minute, spec.max_concurrent, spec.per_minute))
