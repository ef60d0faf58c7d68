"""The pool: which job runs in which of its warm processes (`workers.py`), and when.

    a run:  in line --> in the tray of a process that is busy --> begun
               |  <------ taken back ------+                       |
               +------------------------- a process is free ------>+

A process is forked when a job wants one and none is idle. While all are busy, those that are first in line go into their trays
(tray.py), so that neither side has to wait for the other between two jobs. What is in a tray has not begun: it is taken back when
a process is free, when its own dies or is retired, and before anything is done about the run before it (`hold`). What happens in
a run is `attempt.py`'s business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Generator, Mapping
from typing import Any, Final

from ..errors import JobCancelled
from ..events import Events
from ..kernel import Kernel, Park, Task
from .attempt import Attempt
from .templates import Templates
from .tray import DEPTH, DOUBT_S
from .workers import LASTING, PoolSettings, Turn, Worker, Workers

Steps = Generator[Any, Any, Any]

LINE: Final = 4  # jobs that have not begun, for each process, from which on there is no hurry with more
MOST_AHEAD: Final = 32  # jobs that are to be reserved before their turn, for each process
AHEAD_S: Final = 0.02  # and those only that have their turn within so long
MOST_WAITING: Final = 8  # jobs that may stand in line, for each process, before those that are for elsewhere wait behind them
SLOW_S: Final = 1.0  # how long jobs take, as long as nothing is known


class Pool:
    """The processes that the current template forked."""

    def __init__(self, kernel: Kernel, events: Events, link: Templates, settings: PoolSettings) -> None:
        self._kernel = kernel
        self._workers = Workers(kernel, events, link, settings)
        self.size = settings.size  # processes at once, but for calls
        self._busy = 0  # places that are taken: processes that run a job, or are being forked for one
        self._line: deque[Turn] = deque()  # without a place, and in no tray
        self._parked: deque[Task] = deque()  # of those in line and in trays
        self._running: list[Worker] = []
        self._usual_s = SLOW_S  # what a run takes, of late
        self._no_wait_until = 0.0  # by the clock; until then nobody is to wait here who may have his turn elsewhere

    @property
    def has_a_line(self) -> bool:
        """Whether so many jobs wait for a process that none will be without a job within the next milliseconds."""
        return len(self._parked) > LINE * self.size

    @property
    def held(self) -> int:
        """Jobs that run, and those that wait for their turn."""
        return self._busy + len(self._parked)

    @property
    def ahead(self) -> int:
        """How many jobs may be reserved beyond those that run.

        As many as it could do with, so that none of its processes has to wait for the queue. 0 as long as one is free, since
        whoever comes then runs at once. Where runs take so long that there is no hurry, as many as wait here already: they need
        nothing that somebody else could have, and behind them there may be jobs that are not for the pool.
        """
        size = self.size
        if self.held < size:
            return 0
        useful = min(MOST_AHEAD, int(AHEAD_S / self._usual_s)) * size
        if useful or self._kernel.clock.monotonic() < self._no_wait_until:
            return useful
        return min(len(self._parked), MOST_WAITING * size)

    @property
    def is_slow(self) -> bool:
        """Whether its runs take so long that nothing is to be reserved for them ahead."""
        return self._usual_s > AHEAD_S

    def slow_down(self, no_wait_s: float = 0.0) -> None:
        """What was reserved ahead was not for here. `no_wait_s`: and nobody is to wait for so long."""
        self._usual_s = SLOW_S
        self._no_wait_until = max(self._no_wait_until, self._kernel.clock.monotonic() + no_wait_s)

    def take(self, request: Mapping[str, Any], message: bytes = b"", token: bytes = b"", in_line: bool = True) -> Steps:
        """A Worker for `request`, to be given back. Waits for one that is free, or takes it up. Raises NotStarted.

        `message` with `token`: what it is told to begin; when `Worker.turn.has_begun` then, it has been. `in_line` False: at
        once, beside the `size` that jobs may have. For calls of jobs that run already, and would wait for jobs that may take
        hours; whoever asks sees to it that they are few.
        """
        turn = Turn(tuple(request.get(name) for name in LASTING), message, token, self._current(), in_line)
        if in_line:
            yield from self._wait(turn)
        else:
            self._begin(turn)
        if turn.worker is None:
            yield from self._fork(turn)
        return turn.worker

    def give_back(self, worker: Worker, attempt: Attempt, job: str) -> None:
        """`worker` has run `job`, as `attempt` knows: it goes on with the next, is kept for it, or is retired."""
        done = attempt.done
        if worker.is_of_line:
            self._usual_s += ((SLOW_S if done is None else done.duration_s) - self._usual_s) / 8
        if done is not None:
            worker.memory_mib = done.memory_mib
            self._workers.tell(job, done, worker.is_of_line)
            if done.next and attempt.is_reusable and self._goes_on(worker, done.next):
                return
        undisturbed = done is not None and not done.next and attempt.is_reusable
        self._leave(worker, undisturbed)

    def hold(self, worker: Worker) -> bool:
        """Let nothing follow the run that `worker` is at. False: something has already, as its process is about to say.

        When it does not say so for DOUBT_S, it has not: the job has emptied the tray itself, and what was there has not begun.
        """
        if not worker.is_held:
            worker.is_held = True
            self._take_back(worker)
            self._assign()
        if not worker.next:
            return True
        now = self._kernel.clock.monotonic()
        if worker.doubted is None:
            worker.doubted = now
        return now >= worker.doubted + DOUBT_S

    def waiting(self) -> set[Task]:
        """Those whose runs have not begun, as far as we know."""
        return set(self._parked)

    def dismiss(self, tasks: Container[Task], most: int | None = None) -> list[Task]:
        """Take up to `most` (None: all) of `tasks` that have not begun out of line, the last first: they are to be cancelled."""
        self._take_all_back()
        out: list[Task] = []
        for turn in [turn for turn in self._line if turn.task in tasks][::-1][:most]:
            self._line.remove(turn)
            turn.is_dismissed = True
            out.append(turn.task)
        self._assign()
        return out

    def renew(self) -> None:
        """There is a new template: what has not begun begins in processes of it."""
        self.retire_idle()
        self._take_all_back()
        self._assign()

    def retire_idle(self) -> None:
        """Retire all processes that run nothing now."""
        self._workers.retire_idle()

    def forget_lost(self) -> None:
        """Let go of those that died idle with their template."""
        self._workers.forget_lost()

    def _wait(self, turn: Turn) -> Steps:
        """Until it has a process, or is to fork one."""
        self._line.append(turn)
        if self._line[0] is turn:  # else there has been no room for those before it
            self._assign()
        while turn.worker is None and not turn.forks:
            try:
                yield Park(self._parked)
            except BaseException:
                if self._withdraw(turn):
                    raise
                turn.is_unwanted = True
        if turn.is_unwanted and not turn.has_begun:  # its process has died, or had not begun it
            self._withdraw(turn)
            raise JobCancelled("it had not begun")

    # -- who is next ------------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Give those in line a free place, or room in the tray of a process that is busy: in their order, without overtaking."""
        line = self._line
        while line:
            turn = line[0]
            if self._busy < self.size:
                self._busy += 1
                self._begin(line.popleft())
            elif not self._put_into_a_tray(turn):
                return
            else:
                line.popleft()
        if self._busy < self.size:
            self._share()

    def _share(self) -> None:
        """A place is free, and nobody is in line: then nobody is to wait in a tray behind a run that may take long.

        Half of the fullest tray is taken, so that two with short runs do not take everything from each other all the time.
        """
        fullest = max(self._running, key=lambda worker: len(worker.next), default=None)
        if fullest is not None and fullest.next:
            self._take_back(fullest, (len(fullest.next) + 1) // 2)
            if self._line:
                self._assign()

    def _begin(self, turn: Turn) -> None:
        """It has a place: in a process that is idle, or in one that its own task has to fork."""
        worker = self._workers.idle_one(turn.key)
        if worker is None:
            self._workers.make_room(self._busy)
            turn.forks = True
        else:
            self._run(worker, turn)
        self._kernel.wake(turn.task)

    def _run(self, worker: Worker, turn: Turn) -> None:
        worker.turn, turn.worker = turn, worker
        worker.is_held, worker.doubted = not turn.in_line, None
        worker.jobs += 1
        self._running.append(worker)

    def _put_into_a_tray(self, turn: Turn) -> bool:
        """Into the one that has the fewest; False: there is no room for it."""
        if not turn.message:
            return False
        emptiest: Worker | None = None
        for worker in self._running:
            if (
                len(worker.next) < (DEPTH if emptiest is None else len(emptiest.next))
                and worker.key == turn.key and not worker.is_held and self._workers.is_current(worker)
            ):  # fmt: skip
                emptiest = worker
        if emptiest is None or not emptiest.tray.put(turn.message):
            return False
        emptiest.next.append(turn)
        turn.tray_of = emptiest
        return True

    def _take_back(self, worker: Worker, most: int = DEPTH) -> None:
        """What its process has not taken from its tray is first in line again."""
        if worker.next:
            messages = worker.tray.take_back(most)
            for turn in reversed([turn for turn in worker.next if turn.message in messages]):
                worker.next.remove(turn)
                self._back_in_line(turn)

    def _take_all_back(self) -> None:
        for worker in self._running:
            self._take_back(worker)

    def _back_in_line(self, turn: Turn) -> None:
        turn.tray_of = None
        self._line.appendleft(turn)

    def _goes_on(self, worker: Worker, token: bytes) -> bool:
        """It has begun the run of `token`, as it says; False: it cannot have."""
        if not worker.next or worker.next[0].token != token:
            return False
        turn = worker.next.popleft()
        worker.turn, turn.worker = turn, worker
        turn.has_begun = True
        worker.is_held, worker.doubted = False, None
        worker.jobs += 1
        self._kernel.wake(turn.task)
        self._assign()
        return True

    def _tell_next(self, worker: Worker) -> bool:
        """Its process waits to be told what its tray had for it; False: that is not there."""
        turn = worker.next[0]
        self._take_back(worker, 1)
        if not self._line or self._line[0] is not turn:
            return False
        self._line.popleft()
        self._running.remove(worker)
        self._run(worker, turn)
        self._kernel.wake(turn.task)
        self._assign()
        return True

    def _withdraw(self, turn: Turn) -> bool:
        """It is not to begin; False: it has."""
        if turn.is_dismissed or turn.has_begun:
            return turn.is_dismissed
        if turn.tray_of is not None and turn.worker is None:
            self._take_back(turn.tray_of)
        if turn.worker is not None:
            self._leave(turn.worker, is_reusable=True)
        elif turn.forks:
            self._busy -= 1
        elif turn.tray_of is None:
            self._line.remove(turn)
        else:  # its process has it, and has not said so yet
            self._assign()
            return False
        self._assign()
        return True

    def _leave(self, worker: Worker, is_reusable: bool) -> None:
        """It runs nothing now. What it has not said to have begun it has not: the one that it took last, when it died then."""
        if is_reusable and worker.next and self._workers.may_go_on(worker) and self._tell_next(worker):
            return
        self._running.remove(worker)
        self._busy -= worker.is_of_line
        worker.turn = None
        self._take_back(worker)
        is_reusable = is_reusable and not worker.next
        while worker.next:
            self._back_in_line(worker.next.pop())
        self._workers.leave(worker, is_reusable)
        self._assign()

    def _fork(self, turn: Turn) -> Steps:
        """A process for `turn`, which has a place for it."""
        try:
            worker: Worker = yield from self._workers.fork(turn.key)
        except BaseException:
            self._busy -= turn.in_line
            self._assign()
            raise
        self._run(worker, turn)
        self._assign()

    def _current(self) -> Task:
        task = self._kernel.current
        assert task is not None
        return task
