"""The pool: warm processes, forked from the template, that run one job after another; who runs in which, and how long one lives.

    forked --take--> busy --give_back--> idle --take--> busy …
                      |                    |
                      +----- retired ------+     by jobs, age, memory, a trace that a job left, an interruption, a new template

A process is forked when a job wants one and none is idle; the one that ran last is taken first, since its caches are warm. One
that is retired is killed: between two jobs it has nothing that could be lost. What happens in a run is `attempt.py`'s business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from typing import Any, Final, NamedTuple

from ..events import Events, Warned
from ..kernel import Kernel, Park, Task
from ..process import resident_mib
from .attempt import Attempt
from .child_frames import Done
from .handle import Child
from .privileges import FIELDS
from .templates import Templates

Steps = Generator[Any, Any, Any]

LASTING: Final[tuple[str, ...]] = FIELDS
"""Fields of a request that hold for the life of a process, so that only jobs which agree on them share one."""


class PoolSettings(NamedTuple):
    """Of kqueue.yaml. 0: no limit, but for `size`."""

    size: int = 2  # processes at once, and so jobs
    max_jobs: int = 1000
    max_memory_mib: int = 256  # resident after a job
    max_age_s: float = 3600.0


LINE: Final = 4  # jobs that wait for a process, for each
DEFAULTS: Final = PoolSettings()


class Worker:
    """One process of the pool."""

    __slots__ = ("began", "child", "fresh_mib", "is_of_line", "jobs", "key", "memory_mib")

    def __init__(self, child: Child, key: tuple[Any, ...], began: float) -> None:
        self.child = child
        self.key = key
        self.began = began
        self.jobs = 0  # that it has begun
        self.is_of_line = True  # who has it stood in line for it, and holds one of `size` places
        self.fresh_mib = self.memory_mib = resident_mib(child.pid)  # at first, and after its last job

    @property
    def retained_mib(self) -> float:
        """What it keeps of its jobs."""
        return max(0.0, self.memory_mib - self.fresh_mib)


class Pool:
    """The processes that the current template forked."""

    def __init__(self, kernel: Kernel, events: Events, link: Templates, settings: PoolSettings) -> None:
        self._kernel = kernel
        self._events = events
        self._link = link
        self._settings = settings
        self._busy = 0  # processes that run a job, or are being forked for one
        self._waiting: deque[Task] = deque()
        self._idle: list[Worker] = []
        self._numbers = 0  # of processes so far
        self._said: set[tuple[str, str]] = set()  # (job, what it changes) that the operator has been told of

    @property
    def has_a_line(self) -> bool:
        """Whether so many jobs wait for a process that none will be without a job within the next milliseconds."""
        return len(self._waiting) > LINE * self._settings.size

    def take(self, request: Mapping[str, Any], in_line: bool = True) -> Steps:
        """A Worker for `request`, to be given back. Waits for one that is free. Raises NotStarted.

        `in_line` False: at once, beside the `size` that jobs may have. For calls of jobs that run already, and would wait for
        jobs that may take hours; whoever asks sees to it that they are few.
        """
        if in_line:
            yield from self._wait()
            self._busy += 1
        try:
            key = tuple(request.get(name) for name in LASTING)
            worker = self._idle_one(key)
            if worker is None:
                self._make_room()
                self._numbers += 1
                lasting = dict(zip(LASTING, key, strict=True))
                name = {"id": f"pool-{self._numbers}", "job": "(pool)", "limits": {}, "start": "pool"}
                child = yield from self._link.fork({**name, **lasting})
                worker = Worker(child, key, self._kernel.clock.monotonic())
        except BaseException:
            if in_line:
                self._leave()
            raise
        worker.jobs += 1
        worker.is_of_line = in_line
        return worker

    def give_back(self, worker: Worker, attempt: Attempt, job: str) -> None:
        """`worker` has run `job`, as `attempt` knows: keep it for the next, or retire it."""
        done = attempt.done
        if done is not None:
            worker.memory_mib = done.memory_mib
            self._tell(job, done, worker.is_of_line)
        if done is not None and attempt.is_reusable and self._may_go_on(worker, done.memory_mib):
            self._idle.append(worker)
        else:
            self._link.forget(worker.child)
        if worker.is_of_line:
            self._leave()

    def retire_idle(self) -> None:
        """Retire all that run nothing now."""
        while self._idle:
            self._link.forget(self._idle.pop().child)

    def forget_lost(self) -> None:
        """Let go of those that died idle with their template."""
        for worker in [worker for worker in self._idle if worker.child.lost]:
            self._idle.remove(worker)
            self._link.forget(worker.child)

    def _wait(self) -> Steps:
        """Until fewer are busy than may be."""
        try:
            while self._busy >= self._settings.size:
                yield Park(self._waiting)
        except BaseException:  # cancelled; the place that may have woken us is the next one's
            if self._busy < self._settings.size:
                self._kernel.unpark(self._waiting, count=1)
            raise

    def _leave(self) -> None:
        self._busy -= 1
        self._kernel.unpark(self._waiting, count=1)

    def _idle_one(self, key: tuple[Any, ...]) -> Worker | None:
        for worker in reversed(self._idle):
            if worker.key == key:
                self._idle.remove(worker)
                if self._may_go_on(worker, 0.0):
                    return worker
                self._link.forget(worker.child)
        return None

    def _make_room(self) -> None:
        """Idle processes of another key give way, the one that has been idle longest first."""
        while self._idle and self._busy + len(self._idle) > self._settings.size:
            self._link.forget(self._idle.pop(0).child)

    def _may_go_on(self, worker: Worker, memory_mib: float) -> bool:
        settings, child = self._settings, worker.child
        age_s = self._kernel.clock.monotonic() - worker.began
        spent = (
            bool(settings.max_jobs and worker.jobs >= settings.max_jobs)
            or bool(settings.max_memory_mib and memory_mib > settings.max_memory_mib)
            or bool(settings.max_age_s and age_s >= settings.max_age_s)
        )
        return not spent and child.exit is None and self._link.is_current(child)

    def _tell(self, job: str, done: Done, in_line: bool) -> None:
        """Once of each job and each thing that it changes. `in_line` False: it was a call, which has no `start`."""
        new = [(what, detail) for what, detail in done.changed if (job, what) not in self._said]
        if not new:
            return
        self._said.update((job, what) for what, _ in new)
        listed = "; ".join(f"{what} ({detail})" if detail else what for what, detail in new)
        do = 'Have it put things back, or declare it start="fork"' if in_line else "Have it put things back"
        what = f"{job} leaves its pool process changed, so that each of its runs costs a process: {listed}"
        self._events.emit(Warned(f"{what}. {do}"))
