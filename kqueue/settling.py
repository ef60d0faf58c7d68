"""Ending leases: what jobs came to, on its way to the broker, and in a file when the broker is not there as we must exit.

Outcomes are settled in batches, all that have come up since the last one. While the broker is away they wait; when MAX_UNSETTLED
do, the runtime reserves nothing more, and none is ever dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, Final, NamedTuple

from . import events as facts
from .brokers.base import MAX_BATCH, STALE, Broker, Lease, Settlement
from .context import JobContext
from .events import Events
from .kernel import Kernel, Park, Task, sleep
from .options import JobOptions
from .outbox import Outbox
from .outcome import Outcome
from .verdict import Verdict

Steps = Generator[Any, Any, Any]

NO_HURRY_S: Final = 0.002  # how long outcomes and free slots are gathered while jobs stand in line for the pool
MAX_UNSETTLED: Final = 10_000  # outcomes that await their settlement
AGAIN: Final = "they run again once our lease has expired, or when this daemon starts again"


DEFAULTS: Final = JobOptions()


class Held:
    """A lease that this process holds, while its job runs."""

    __slots__ = ("context", "is_dismissed", "job", "lease", "lost", "options", "started", "strategy", "taken_at", "task")

    task: Task

    def __init__(self, lease: Lease, started: float, taken_at: float) -> None:
        self.lease = lease
        self.is_dismissed = False  # it has not begun, and is to go back to its queue
        self.lost = False  # somebody else has it now: what comes of this run is nobody's
        self.taken_at = taken_at  # when the intake wrote it down
        self.started = started  # by the kernel's clock
        self.job = ""  # its name, once the envelope is decoded
        self.strategy = lease.lane
        self.options = DEFAULTS
        self.context: JobContext | None = None  # None: it has not come to run yet


class Ended(NamedTuple):
    """A lease that awaits its settlement. `ran` False: no attempt was made."""

    held: Held
    outcome: Outcome
    verdict: Verdict
    ran: bool = True


Settled = Callable[[Sequence[Ended], Sequence[str]], None]  # a batch, and the broker's answer to each


class Settling:
    """One for a runtime. `outbox`: where outcomes are kept over an exit; None: nowhere. `settled` hears the broker's answers."""

    def __init__(self, kernel: Kernel, broker: Broker, events: Events, outbox: Outbox | None, settled: Settled) -> None:
        self._kernel = kernel
        self._broker = broker
        self._events = events
        self._outbox = outbox
        self._settled = settled
        self.is_unhurried: Callable[[], bool] = lambda: False  # whether more outcomes come at once, and no slot waits for these
        self._waiting: deque[Ended] = deque()
        self._sent: list[Ended] = []  # and not answered
        self._idle: deque[Task] = deque()
        self._crowded: deque[Task] = deque()

    def __len__(self) -> int:
        """How many await the broker's answer."""
        return len(self._waiting) + len(self._sent)

    def add(self, ended: Ended) -> None:
        self._waiting.append(ended)
        if self._idle:
            self._kernel.unpark(self._idle)

    @property
    def full(self) -> bool:
        return len(self) >= MAX_UNSETTLED

    def room(self) -> Park:
        """What to yield to wait for the next batch to be settled."""
        return Park(self._crowded)

    def run(self) -> Steps:
        """Settle what comes, as long as the runtime runs."""
        while True:
            if not self._waiting:
                yield Park(self._idle)
            if self.is_unhurried():
                yield sleep(NO_HURRY_S)
            self._sent = batch = list(self._waiting)
            self._waiting.clear()
            answers = yield from self._broker.settle([ended.verdict.settlement for ended in batch])
            self._sent = []
            self._settled(batch, answers)
            self._kernel.unpark(self._crowded)

    def hold(self, running: Collection[Held]) -> Steps:
        """Take back what nobody has reserved since our lease ran out; the others of `running`, which are lost.

        What has ended and is not settled yet is taken back as well, or we might be the first to reserve it, and run it again.
        """
        ours: list[Held] = [*running, *(ended.held for ended in (*self._sent, *self._waiting))]
        lost = []
        for at in range(0, len(ours), MAX_BATCH):
            batch = ours[at : at + MAX_BATCH]
            holds = [Settlement(held.lease.token, held.lease.queue, "hold", held.lease.counters) for held in batch]
            answers = yield from self._broker.settle(holds)
            lost += [held for held, answer in zip(batch, answers, strict=True) if answer == STALE and held in running]
        return lost

    # -- over an exit -----------------------------------------------------------------------------------------------

    def kept(self) -> list[Settlement]:
        """What an earlier life of ours could not settle."""
        if self._outbox is None:
            return []
        try:
            return self._outbox.read()
        except (OSError, ValueError) as error:
            self._warn(f"the outcomes in {self._set_aside()} were not settled, so those jobs run again: {error}")
            return []

    def _set_aside(self) -> str:
        assert self._outbox is not None
        try:
            return self._outbox.set_aside()
        except OSError:
            return self._outbox.path

    def replayed(self, kept: Sequence[Settlement], answers: Sequence[str]) -> None:
        """The broker has answered to `kept`: it is not needed any longer."""
        if not kept or self._outbox is None:
            return
        late = answers.count(STALE)
        self._events.emit(facts.OutboxSettled(len(kept) - late, late))
        try:
            self._outbox.clear()
        except OSError as error:  # its tokens are used up, so that it changes nothing
            self._warn(f"{self._outbox.path} is settled, and could not be removed: {error.strerror}")

    def keep(self, running: int) -> None:
        """We must exit, and the broker is not there: what jobs came to is kept. `running` have not ended."""
        if running:
            self._warn(f"{running} jobs did not end in time; {AGAIN}")
        left = [ended.verdict.settlement for ended in (*self._sent, *self._waiting)]
        if not left:
            return
        if self._outbox is None:
            self._warn(f"the broker was not there to settle {len(left)} jobs, and there is no state_dir to keep that in; {AGAIN}")
            return
        try:
            self._outbox.write(left)
        except OSError as error:
            self._warn(f"the outcomes of {len(left)} jobs could be neither settled nor kept ({error.strerror}); {AGAIN}")
        else:
            self._warn(
                f"the broker was not there to settle {len(left)} jobs: their outcomes are kept in {self._outbox.path}, "
                "and settled when this daemon starts again; without that, they run again once our lease has expired"
            )

    def _warn(self, message: str) -> None:
        self._events.emit(facts.Warned(message))
