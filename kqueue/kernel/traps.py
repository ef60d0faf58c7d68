"""Traps: everything a generator may yield to the kernel.

A generator asks the kernel for something by yielding a `Trap`; the kernel calls `trap.arm(kernel, task)` and either
gets a value at once or `PARKED`, which means that the task now waits and exactly one `kernel.wake` will resume it.
Because arming is the trap's own business, a new trap needs no change in the loop.

Rule 1. `arm` never blocks.
Rule 2. Before it returns PARKED, `arm` has registered every source that may wake the task, and `task.undo` (when it
        is set) takes all of them back. Timers need no undo: the task's wait number makes a stale one harmless.
Rule 3. The first source that fires calls `kernel.wake` once; the rest are gone by then.

`yield trap`, `yield from trap` and `await trap` all mean the same. What knows jobs or brokers must never live here.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from .loop import Kernel, Task
    from .poller import Poller

READ: Final = 1  # the values of selectors.EVENT_READ and EVENT_WRITE
WRITE: Final = 2


class _Parked:
    """The type of PARKED, so that it prints as itself."""

    def __repr__(self) -> str:
        return "PARKED"


PARKED: Final = _Parked()

class ForeignLoop(Protocol):
    """What answers traps in place of a kernel: asyncio, in a child that runs an `async def` job."""

    locals: dict[Any, Any]  # as those of a kernel

    def answer(self, trap: Trap) -> Generator[Any, Any, Any]:
        """Wait for `trap` as that loop waits, and return what it answers."""

    def spawn(self, steps: Generator[Any, Any, Any]) -> Any:
        """Run `steps` as a task of its own, that loop's kind of it."""

    def start(self, steps: Any, ended: Callable[[Any, BaseException | None], None]) -> Any:
        """Run a job's generator or coroutine: `ended(value, error)` hears of it. `stop` of what this returns ends it."""

    def interrupt_in(self, seconds: float) -> Any:
        """Interrupt this task then. `ends(error)` of what this returns takes it back, and says whether `error` was that."""

    def release(self, fd: int) -> None:
        """Wake whoever waits for `fd`, which is about to be closed."""


foreign_loop: ForeignLoop | None = None  # None: our kernel answers


def set_foreign_loop(loop: ForeignLoop | None) -> None:
    """Let `await trap` be answered by another event loop, or by our kernel again (None)."""
    global foreign_loop
    foreign_loop = loop


class Trap:
    """A request to the kernel. Subclasses define `arm`; those that another loop can answer as well, `elsewhere`."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, Any]:
        if foreign_loop is not None:
            return (yield from foreign_loop.answer(self))
        return (yield self)

    __iter__ = __await__

    def arm(self, kernel: Kernel, task: Task) -> Any:
        """Answer at once with a value, or register the wake sources and return PARKED. Must not block."""
        raise NotImplementedError(f"{type(self).__name__} does not define arm()")

    def elsewhere(self) -> Generator[Any, Any, Any]:
        """Wait for it under asyncio, by what asyncio has."""
        raise TypeError(f"{type(self).__name__} is not there under asyncio; use asyncio's own in an isolated async job")


class sleep(Trap):
    """Wait for `seconds` (float, wall time by the monotonic clock); 0 or less lets the others run once. Returns None."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def arm(self, kernel: Kernel, task: Task) -> Any:
        kernel.wake_at(task, kernel.clock.monotonic() + self.seconds)
        return PARKED


class wait_io(Trap):
    """Wait until `fd` is ready for `events` (READ, WRITE or both). Returns the ready events, 0 after `timeout_s` seconds.

    One task at a time may wait for a direction of an fd; a second one gets RuntimeError.
    """

    __slots__ = ("_poller", "_task", "events", "fd", "timeout_s")

    def __init__(self, fd: int, events: int, timeout_s: float | None = None) -> None:
        self.fd = fd
        self.events = events
        self.timeout_s = timeout_s
        self._poller: Poller
        self._task: Task

    def arm(self, kernel: Kernel, task: Task) -> Any:
        kernel.poller.add(self.fd, self.events, task, _of_one)
        self._poller, self._task = kernel.poller, task
        task.undo = self._undo  # closures would be 400 bytes for each that waits
        if self.timeout_s is not None:
            kernel.wake_at(task, kernel.clock.monotonic() + self.timeout_s, value=0)
        return PARKED

    def _undo(self) -> None:
        self._poller.remove(self.fd, self._task)


def _of_one(ready: dict[int, int]) -> int:
    return next(iter(ready.values()))


class wait_any(Trap):
    """Wait for the first of several fds: `{fd: events}`. Returns `{fd: ready events}`, empty after `timeout_s` seconds."""

    __slots__ = ("fds", "timeout_s")

    def __init__(self, fds: Mapping[int, int], timeout_s: float | None = None) -> None:
        self.fds = fds
        self.timeout_s = timeout_s

    def arm(self, kernel: Kernel, task: Task) -> Any:
        fds = dict(self.fds)

        def undo() -> None:
            for fd in fds:
                kernel.poller.remove(fd, task)

        task.undo = undo
        for fd, events in fds.items():
            kernel.poller.add(fd, events, task, lambda ready: ready)
        if self.timeout_s is not None:
            kernel.wake_at(task, kernel.clock.monotonic() + self.timeout_s, value={})
        return PARKED


class wait_process(Trap):
    """Wait until process `pid` has ended (it may still be a zombie). Returns None, at once when there is none."""

    __slots__ = ("pid",)

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def arm(self, kernel: Kernel, task: Task) -> Any:
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None

        def undo() -> None:
            kernel.poller.remove(pidfd, task)
            os.close(pidfd)

        task.undo = undo
        kernel.poller.add(pidfd, READ, task, lambda ready: None)
        return PARKED


class Park(Trap):
    """Wait in `queue` until somebody calls `kernel.unpark(queue, value)`. Returns that value, None after `timeout_s`."""

    __slots__ = ("queue", "timeout_s")

    def __init__(self, queue: deque[Task], timeout_s: float | None = None) -> None:
        self.queue = queue
        self.timeout_s = timeout_s

    def arm(self, kernel: Kernel, task: Task) -> Any:
        self.queue.append(task)
        task.undo = lambda: self.queue.remove(task)
        if self.timeout_s is not None:
            kernel.wake_at(task, kernel.clock.monotonic() + self.timeout_s)
        return PARKED


class join(Trap):
    """Wait until `task` has ended. Returns its value or raises its error. Cancelling the waiter leaves `task` alone."""

    __slots__ = ("task",)

    def __init__(self, task: Task) -> None:
        self.task = task

    def arm(self, kernel: Kernel, task: Task) -> Any:
        other = self.task
        if other.ended:
            if other.error is not None:
                raise other.error
            return other.value
        other.joiners.append(task)
        task.undo = lambda: other.joiners.remove(task)
        return PARKED


class run(Trap):
    """Run `generator` as a task of its own and wait for its value; it is cancelled together with the waiter.

    This is how a request that takes several steps (a broker verb, a child) can be yielded as if it were one trap.
    """

    __slots__ = ("generator",)

    def __init__(self, generator: Generator[Any, Any, Any]) -> None:
        self.generator = generator

    def arm(self, kernel: Kernel, task: Task) -> Any:
        name = f"{task.name}/{getattr(self.generator, '__name__', 'run')}"
        inner = kernel.spawn(self.generator, name=name, context=task.context.copy())
        inner.joiners.append(task)

        def undo() -> None:
            inner.joiners.remove(task)
            if not inner.ended:
                kernel.cancel(inner, GeneratorExit())

        task.undo = undo
        return PARKED


class this_kernel(Trap):
    """Answers with the kernel that drives the task: for what must spawn or wake others."""

    __slots__ = ()

    def arm(self, kernel: Kernel, task: Task) -> Any:
        return kernel
