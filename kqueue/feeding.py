"""Feeding: jobs are reserved for every slot that is free, and started. No backlog is held: others might run it meanwhile.

    reserve what there are slots for -> start it, and ask for more while it runs -> nothing came, or no slot is free -> wait

What it waits for: a doorbell of the broker, a job that is due, a rate that lets another one through, a slot. All but the times
are `nudge`d. While it waits, the broker may hand over a job that nobody asked for (decision 0023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from .brokers.base import Lease
from .intake import Ask
from .kernel import Park, Task, sleep
from .settling import NO_HURRY_S

if TYPE_CHECKING:
    from .runtime import KQueueRuntime

Steps = Generator[Any, Any, Any]


class Feeding:
    """One for a runtime, whose books are its `intake`."""

    def __init__(self, runtime: KQueueRuntime) -> None:
        self.burst = False  # it ends when nothing is left
        self._runtime = runtime
        self._nudged = False
        self._nudging = False  # a nudge is on its way
        self._sated = False  # the last round had a free slot in every lane, so that a slot more changes nothing
        self._waiting: deque[Task] = deque()  # the feeder, for slots or jobs

    def run(self) -> Steps:
        """Reserve as long as we run; then see that nothing more comes."""
        yield from self._keep_fed()
        for queue in self._runtime.queues:
            yield from self._runtime.broker.withdraw(queue)

    def _keep_fed(self) -> Steps:
        """Reserve for every slot that is free, start what came, then wait for a doorbell, a due job, a rate or a slot."""
        runtime = self._runtime
        while runtime.state == "running":
            if runtime.settling.full:
                yield runtime.settling.room()
                continue
            if runtime.upkeep.in_doubt:
                yield from runtime.upkeep.renew()
            self._nudged, turn = False, runtime.kernel.turns
            took, next_due_s = yield from self._reserve()
            if took:
                if runtime.kernel.turns == turn:
                    yield  # a broker that answers at once: let them run before more are taken. Others are asked while they run
                if runtime.ahead.has_to_be_watched:
                    runtime.background(runtime.ahead.watch(self.nudge))
                if self._nudged or self._is_hungry():
                    continue
                self._sated = False  # a slot that is freed is news
            if not self._nudged and self._is_finished():
                runtime.stop("burst" if self.burst else "max-jobs")
                return
            waits = (next_due_s, runtime.intake.opens_in_s(), runtime.quarantine.opens_in_s())
            if not self._nudged:
                yield Park(self._waiting, min((wait for wait in waits if wait is not None), default=None))

    def _reserve(self) -> Steps:
        """One round over the queues: how many jobs started, and in how many seconds the next one is due (None: none is)."""
        runtime, intake = self._runtime, self._runtime.intake
        if took := (yield from self._reserve_what_waited()):
            return took, None
        took = 0
        next_due_s: float | None = None
        self._sated = intake.has_slots()
        for share in (True, False) if len(runtime.queues) > 1 else (False,):
            for queue in intake.order():
                ask = intake.ask(queue, share)
                if ask is None or runtime.state != "running":
                    continue
                reserved = yield from self._take(ask)
                took += len(reserved.leases)
                if reserved.next_due_s is not None and (next_due_s is None or reserved.next_due_s < next_due_s):
                    next_due_s = reserved.next_due_s
        for queue in runtime.queues:
            if not intake.has_room(queue):
                yield from runtime.broker.withdraw(queue)
        return took, next_due_s

    def _reserve_what_waited(self) -> Steps:
        """The job that waited for memory, now that there is enough: before any other, which might take it; how many came."""
        queue = self._runtime.memory.next_up()
        ask = self._runtime.intake.ask_one(queue, "isolated") if queue is not None else None
        if ask is None:
            return 0
        return len((yield from self._take(ask)).leases)

    def _take(self, ask: Ask) -> Steps:
        """Reserve what is asked for, and start it."""
        runtime = self._runtime
        reserved = yield from runtime.broker.reserve(ask.queue, ask.wants)
        runtime.intake.got(ask, len(reserved.leases))
        if reserved.leases:
            runtime.kernel.spawn(self._begin_starts(len(reserved.leases)), name="starts")
            for lease in reserved.leases:
                runtime.begin(lease)
            runtime.kernel.spawn(self._end_starts(), name="started")
        return reserved

    def take_handed(self, lease: Lease) -> bool:
        """A job came that was not asked for. It starts now, unless something is being reserved; whether it does."""
        runtime, intake = self._runtime, self._runtime.intake
        if not self._waiting or runtime.state != "running" or runtime.settling.full or runtime.upkeep.in_doubt:
            return False
        ask = intake.ask_one(lease.queue, lease.lane) if runtime.memory.waiting is None else None
        if ask is None:
            return False
        intake.got(ask, 1)
        runtime.begin(lease)
        return True

    def _begin_starts(self, count: int) -> Steps:
        """Runs right before those that were just taken."""
        self._runtime.intake.starts_begin(count)
        yield from ()

    def _end_starts(self) -> Steps:
        """Runs right after them."""
        self._runtime.intake.starts_end()
        yield from ()

    def _is_finished(self) -> bool:
        """For --burst and --max-jobs: nothing was there to take, and nothing that was taken is still on its way."""
        runtime, intake = self._runtime, self._runtime.intake
        if not self.burst and intake.remaining != 0:
            return False
        if self.burst and runtime.quarantine.opens_in_s() is not None:
            return False  # those that it put back are not due yet
        return not runtime.busy() and (intake.remaining == 0 or intake.opens_in_s() is None)

    def listen(self) -> Steps:
        """Pass doorbells on to the feeder."""
        while True:
            yield from self._runtime.broker.wait(None)
            self.nudge()

    def _is_hungry(self) -> bool:
        """Whether another round is worth it, now that one has brought something."""
        runtime, intake = self._runtime, self._runtime.intake
        if intake.may_get_more("inline"):
            return True
        hungry = intake.may_get_more("isolated")
        if hungry and runtime.isolated.pool.has_a_line:
            self._fill_slot()
            return False
        return hungry

    def slot_is_free(self) -> None:
        """A job has ended."""
        if not self._sated:
            self._fill_slot()

    def _fill_slot(self) -> None:
        """While jobs stand in line for the pool there is no hurry, and soon there are more of them."""
        if not self._runtime.isolated.pool.has_a_line:
            self.nudge()
        elif not self._nudging:
            self._nudging = True
            self._runtime.background(self._nudge_soon())

    def _nudge_soon(self) -> Steps:
        yield sleep(NO_HURRY_S)
        self._nudging = False
        self.nudge()

    def nudge(self) -> None:
        """Have the feeder look again: something may be ready, or a slot is free that something may have waited for."""
        self._nudged = True
        if self._waiting:
            self._runtime.kernel.unpark(self._waiting)
