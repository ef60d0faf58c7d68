"""The processes of the pool: how one is forked, kept warm, and retired. Which job runs in which is `pool.py`'s business.

    forked --> in use --keep--> idle --idle_one--> in use …
                  |               |
                  +--- retired ---+     by jobs, age, memory, a trace that a job left, an interruption, a new template

The one that ran last is taken first, since its caches are warm. One that is retired is killed: between two jobs it has nothing
that could be lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Any, Final, NamedTuple

from ..events import Events, Warned
from ..kernel import Kernel, Task
from ..process import resident_mib
from .base import NotStarted
from .child_frames import Done
from .handle import Child
from .privileges import FIELDS
from .templates import Templates
from .tray import Tray, Until

Steps = Generator[Any, Any, Any]
Key = tuple[Any, ...]

LASTING: Final[tuple[str, ...]] = FIELDS
"""Fields of a request that hold for the life of a process, so that only jobs which agree on them, its key, share one."""


class PoolSettings(NamedTuple):
    """Of kqueue.yaml. 0: no limit, but for `size`."""

    size: int = 2  # processes at once, and so jobs
    max_jobs: int = 1000
    max_memory_mib: int = 256  # resident after a job
    max_age_s: float = 3600.0

    @property
    def until(self) -> Until:
        return Until(self.max_jobs, self.max_memory_mib, self.max_age_s)


DEFAULTS: Final = PoolSettings()


class Turn:
    """A run that wants a process, and how far it has come."""

    __slots__ = (
        "forks", "has_begun", "in_line", "is_dismissed", "is_unwanted", "key", "message", "task", "token", "tray_of", "worker",
    )  # fmt: skip

    def __init__(self, key: Key, message: bytes, token: bytes, task: Task, in_line: bool) -> None:
        self.key = key
        self.message = message  # a TAKE frame; b"": it goes into no tray
        self.token = token
        self.task = task
        self.in_line = in_line  # it takes one of the `size` places; False: it is beside them, and begins at once
        self.tray_of: Worker | None = None  # in whose tray it is, or was until that process took it; None: it is in line
        self.worker: Worker | None = None  # that runs it; None: none yet
        self.forks = False  # there is a place for it, and a process is to be forked
        self.has_begun = False  # its process has taken it from its tray
        self.is_dismissed = False  # it is out of line
        self.is_unwanted = False  # it was cancelled when that had happened, and we had not heard of it


class Worker:
    """One process of the pool. OSError: no fd is left."""

    __slots__ = ("began", "child", "doubted", "fresh_mib", "is_held", "jobs", "key", "memory_mib", "next", "tray", "turn")

    def __init__(self, child: Child, key: Key, began: float) -> None:
        self.child = child
        self.key = key
        self.began = began
        self.jobs = 0  # that it has begun
        self.turn: Turn | None = None  # the run that it is at, as far as it has told
        self.next: deque[Turn] = deque()  # in its tray, or taken from it and not told of
        self.is_held = False  # nothing may follow the run that it is at
        self.doubted: float | None = None  # when it was first seen to have gone on, by the clock; None: it was not
        self.fresh_mib = self.memory_mib = resident_mib(child.pid)  # at first, and after its last job
        self.tray = Tray()

    @property
    def is_of_line(self) -> bool:
        """Whether what it is at has one of the pool's places."""
        return self.turn is not None and self.turn.in_line

    @property
    def retained_mib(self) -> float:
        """What it keeps of its jobs."""
        return max(0.0, self.memory_mib - self.fresh_mib)


class Workers:
    """Those that the current template forked."""

    def __init__(self, kernel: Kernel, events: Events, link: Templates, settings: PoolSettings) -> None:
        self._kernel = kernel
        self._events = events
        self._link = link
        self._settings = settings
        self._idle: list[Worker] = []
        self._numbers = 0  # of processes so far
        self._said: set[tuple[str, str]] = set()  # (job, what it changes) that the operator has been told of

    def fork(self, key: Key) -> Steps:
        """A new one. Raises NotStarted."""
        self._numbers += 1
        request = {
            **dict(zip(LASTING, key, strict=True)),
            "id": f"pool-{self._numbers}", "job": "(pool)", "limits": {}, "start": "pool", "until": self._settings.until,
        }  # fmt: skip
        child: Child = yield from self._link.fork(request)
        try:
            worker = Worker(child, key, self._kernel.clock.monotonic())
        except OSError as error:
            self._link.forget(child)
            raise NotStarted(f"no tray for a process of the pool: {error.strerror}") from None
        child.give(worker.tray.its_fd)
        return worker

    def idle_one(self, key: Key) -> Worker | None:
        """One that runs nothing, and may run jobs of `key`."""
        for worker in reversed(self._idle):
            if worker.key == key:
                self._idle.remove(worker)
                if self.may_go_on(worker, 0.0):
                    return worker
                self._retire(worker)
        return None

    def leave(self, worker: Worker, is_reusable: bool) -> None:
        """It runs nothing any more. `is_reusable`: as far as its last run says."""
        if is_reusable and self.may_go_on(worker):
            self._idle.append(worker)
        else:
            self._retire(worker)

    def make_room(self, busy: int) -> None:
        """Idle ones give way to another beside the `busy`, the one that has been idle longest first."""
        while self._idle and busy + len(self._idle) > self._settings.size:
            self._retire(self._idle.pop(0))

    def is_current(self, worker: Worker) -> bool:
        """Whether its template is the one that forks now."""
        return self._link.is_current(worker.child)

    def may_go_on(self, worker: Worker, memory_mib: float | None = None) -> bool:
        """Whether its life is not over yet. `memory_mib`: that it has; None: after its last job."""
        age_s = self._kernel.clock.monotonic() - worker.began
        is_over = self._settings.until.is_over(worker.jobs, worker.memory_mib if memory_mib is None else memory_mib, age_s)
        return not is_over and worker.child.exit is None and self.is_current(worker)

    def retire_idle(self) -> None:
        """Retire all that run nothing now."""
        while self._idle:
            self._retire(self._idle.pop())

    def forget_lost(self) -> None:
        """Let go of those that died idle with their template."""
        for worker in [worker for worker in self._idle if worker.child.lost]:
            self._idle.remove(worker)
            self._retire(worker)

    def _retire(self, worker: Worker) -> None:
        self._link.forget(worker.child)
        worker.tray.close()

    def tell(self, job: str, done: Done, in_line: bool) -> None:
        """Once of each job and each thing that it changes. `in_line` False: it was a call, which has no `start`."""
        if not done.changed:
            return
        new = [(what, detail) for what, detail in done.changed if (job, what) not in self._said]
        if not new:
            return
        self._said.update((job, what) for what, _ in new)
        listed = "; ".join(f"{what} ({detail})" if detail else what for what, detail in new)
        do = 'Have it put things back, or declare it start="fork"' if in_line else "Have it put things back"
        what = f"{job} leaves its pool process changed, so that each of its runs costs a process: {listed}"
        self._events.emit(Warned(f"{what}. {do}"))
