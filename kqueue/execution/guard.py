"""The guard: an inline job that keeps the loop for longer than `inline.hard_slice` is interrupted where it stands.

One timer (ITIMER_REAL) does it, and the hot path pays nothing for it. A step of a job arms it only when it is not armed; when it
fires, the handler looks how long the slice that runs now has lasted, and arms it for what is left of that. So a busy daemon has
one signal for each `max_slice`, whatever its number of jobs, and an idle one has one more after its last job, then none.

At `max_slice` it notes where the job stands, for whoever reports the slice (slices.py): afterwards nobody could tell. When KQueue
is just loading a part of itself, which the first job that uses it brings about, that is noted, and is not the job's fault.

The handler runs between two bytecodes of whatever runs just then, and raises only in the job's own code, or in what that
called. Where KQueue itself is at work for the job, it looks again soon. A blocking system call is interrupted, too, since PEP 475
repeats it only when the handler returns. What never looks at signals (a loop in C) goes on to its end.

A handler that comes late proves nothing against the job: the process may have been stopped (SIGSTOP, a frozen container), or the
host was short of CPU, or the job was in such a C loop. It then has another `hard_slice`, once in a slice.

A job that swallows that is interrupted again, MAX_THROWN times in all; then the process has to go, since nothing else ends it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Final, NoReturn, TypeVar

from ..errors import JobBlocked
from ..job import JobFunction
from ..kernel import Kernel, Task
from ..outcome import describe_error
from ..registry import Registration, call_target
from ..retries import ask_backoff
from . import instead
from .inline import GRACE_S, InlineExecutionStrategy
from .instead import OURS, Standing

MAX_THROWN: Final = 3  # in one slice, GRACE_S apart
LATE_S: Final = 1.0  # after the time for which it was armed
SHORTEST_S: Final = 0.001  # what rounds to 0 µs would disarm it
SOON_S: Final = 0.05  # until the next look, when KQueue's own code was met

F = TypeVar("F", bound=Callable[..., Any])
GiveUp = Callable[[Task, JobBlocked], NoReturn]


class SliceGuard:
    """Interrupts marked tasks of `kernel` after `hard_slice_s` seconds; `give_up` ends the process. Main thread only.

    `max_slice_s`: after so many seconds it notes where they stand; 0: it does not.
    """

    def __init__(self, kernel: Kernel, hard_slice_s: float, give_up: GiveUp, max_slice_s: float = 0.0) -> None:
        self._kernel = kernel
        self._hard_slice_s = hard_slice_s
        self._first_s = min(max_slice_s, hard_slice_s) or hard_slice_s  # until the first look at a slice
        self._noted = -1.0  # when the slice began of which this is known:
        self._standing: Standing | None = None
        self._give_up = give_up
        self._due = 0.0  # by the kernel's clock: when the handler is to be called
        self._slice = -1.0  # when the slice began of which this is known:
        self._spared = False
        self._thrown = 0
        self._blocked: dict[Task, JobBlocked] = {}
        self._old: list[Any] = []

    def start(self) -> None:
        self._old = [signal.signal(signal.SIGALRM, self._look), signal.signal(signal.SIGCONT, self._resumed)]
        self._kernel.watch = self._arm
        self._kernel.unwatched = True

    def close(self) -> None:
        """Put back what was there before."""
        self._kernel.unwatched = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in zip((signal.SIGALRM, signal.SIGCONT), self._old, strict=True):
            signal.signal(number, old)

    def blocked(self, task: Task) -> JobBlocked | None:
        """What was last thrown into `task`; None: nothing was, or it has ended long ago."""
        return self._blocked.get(task)

    def standing(self) -> Standing | None:
        """Where the slice that runs now, or ran last, stood at `max_slice`; None: it was shorter, or could not be looked at."""
        return self._standing if self._noted == self._kernel.slice_began else None

    def _arm(self) -> None:
        """A job's step begins."""
        self._kernel.unwatched = False
        self._set(self._first_s)

    def _resumed(self, number: int, frame: FrameType | None) -> None:
        self._kernel.resumed_at = self._kernel.clock.monotonic()

    def _set(self, seconds: float) -> None:
        self._due = self._kernel.clock.monotonic() + seconds
        signal.setitimer(signal.ITIMER_REAL, max(seconds, SHORTEST_S))

    def _look(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler: raises JobBlocked when it is time, else decides when to look again."""
        kernel = self._kernel
        task = kernel.current
        if task is None or not task.mark:
            kernel.unwatched = True  # the next step of a job arms it
            return
        now, began = kernel.clock.monotonic(), kernel.slice_began
        if now - began < self._first_s:
            self._set(self._first_s - (now - began))
            return
        where = _job_stands_at(frame)
        if self._noted != began or (self._standing is not None and self._standing.is_ours and where is not None):
            note = where or _loading(frame)
            if note is not None:
                self._noted, self._standing = began, note
        if now - began < self._hard_slice_s:
            # Not later, since meanwhile another slice may begin that has to be looked at.
            self._set(min(self._hard_slice_s - (now - began), self._first_s if where is not None else SOON_S))
            return
        if self._slice != began:
            self._slice, self._spared, self._thrown = began, False, 0
        if now - self._due > LATE_S and not self._spared:
            self._spared = True
            self._set(self._hard_slice_s)
            return
        if where is None:
            self._set(SOON_S)
            return
        error = JobBlocked(f"blocked the loop for {now - began:.3g} s at {where}: {where.instead}", self._hard_slice_s)
        if self._thrown == MAX_THROWN:
            self._give_up(task, error)
        self._thrown += 1
        self._set(GRACE_S)
        self._blocked = {other: why for other, why in self._blocked.items() if not other.ended}
        self._blocked[task] = error
        kernel.condemn(task, GRACE_S)
        raise error


# Those of our functions that call into a job, and are ready for whatever comes out of it.
_CALLERS: Final[set[CodeType]] = {
    InlineExecutionStrategy.execute.__code__, Registration.call.__code__, call_target.__code__, ask_backoff.__code__,
    describe_error.__code__,
}  # fmt: skip
_TRANSPARENT: Final = JobFunction.__call__.__code__  # a job that calls another one's function


def calls_jobs(function: F) -> F:
    """Say of a function of ours on a higher floor that it is one of those."""
    _CALLERS.add(function.__code__)
    return function


def _job_stands_at(innermost: FrameType | None) -> Standing | None:
    """Where the job stands, when `innermost` is of its own code, or of what that called; None: it is KQueue's."""
    frame = innermost
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            if innermost is None or frame is innermost:
                return None
            if code is not _TRANSPARENT:
                return instead.standing(innermost, code) if code in _CALLERS else None
        frame = frame.f_back
    return None


def _loading(innermost: FrameType | None) -> Standing | None:
    """When KQueue is importing something just now on behalf of a job; None: it is not."""
    frame, wanted = innermost, ""
    loader: FrameType | None = None  # KQueue's own, that imports
    while frame is not None:
        code = frame.f_code
        if code in _CALLERS:
            return None if loader is None else Standing(instead.standing(loader, code).line, instead.IMPORT + wanted, True)
        if loader is None:
            wanted = instead.imported(frame) or wanted
            if wanted and code.co_filename.startswith(OURS):
                loader = frame
        frame = frame.f_back
    return None
