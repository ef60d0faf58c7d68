"""Where an operation runs: on our kernel (the daemon's, or that of a job's own process), or under asyncio in such a process.

Operations wait by traps, which both answer. Here is what cannot be had by a trap: the time, what is kept once for each loop
(`local`), tasks of no job (`beside`), waking somebody (`Signal`), and saying that an fd is about to be closed (`release`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UsageError
from ..kernel import traps
from ..kernel.loop import running
from ..kernel.traps import PARKED, Trap

if TYPE_CHECKING:
    from ..kernel.loop import Kernel, Task

T = TypeVar("T")


def now() -> float:
    """Seconds, by the clock of whoever drives this task."""
    kernel = running()
    return time.monotonic() if kernel is None else kernel.clock.monotonic()


def deadline_in(timeout_s: float | None) -> float | None:
    """When `timeout_s` seconds will have passed; None: never."""
    return None if timeout_s is None else now() + timeout_s


def left(deadline: float | None) -> float | None:
    """Seconds until `deadline`, at least 0; None: there is none."""
    return None if deadline is None else max(0.0, deadline - now())


def local(key: Callable[[], T]) -> T:
    """What `key` makes, once for each loop. Its `close`, if it has one, is called when the loop ends."""
    kernel, foreign = running(), traps.foreign_loop
    if kernel is not None:
        locals = kernel.locals
    elif foreign is not None:
        locals = foreign.locals
    else:
        raise UsageError("kqueue.io works in a running job only: in an inline one, or an isolated generator or `async def`")
    found: T | None = locals.get(key)
    if found is None:
        found = locals[key] = key()
    return found


def beside(steps: Generator[Any, Any, Any], name: str) -> None:
    """Run `steps` in a task of no job, as long as the loop lasts."""
    kernel, foreign = running(), traps.foreign_loop
    if kernel is not None:
        kernel.spawn(steps, name=name, context=Context())
    elif foreign is not None:
        foreign.spawn(steps)


def release(fd: int) -> None:
    """Wake whoever waits for `fd`, which is about to be closed: else he would wait for the next fd of that number."""
    kernel, foreign = running(), traps.foreign_loop
    if kernel is not None:
        for task in kernel.poller.waiting(fd):
            kernel.wake(task, traps.READ | traps.WRITE)
    elif foreign is not None:
        foreign.release(fd)


class Signal(Trap):
    """Waits until somebody calls `set`, and answers with what that was given; at once when it was set before. For one waiter.

    `within(seconds)` bounds the wait. Who waited so, or was interrupted, looks at `is_set`, or he might lose what came just then.
    """

    __slots__ = ("_future", "_kernel", "_task", "_timeout_s", "is_set", "value")

    def __init__(self) -> None:
        self.is_set = False
        self.value: Any = None
        self._timeout_s: float | None = None
        self._kernel: Kernel | None = None
        self._task: Task | None = None  # None: nobody waits in a kernel
        self._future: Any = None  # None: nobody waits under asyncio

    def within(self, timeout_s: float | None) -> Signal:
        """The same wait, of at most `timeout_s` seconds (None: without end)."""
        self._timeout_s = timeout_s
        return self

    def set(self, value: Any = None) -> None:
        """Only the first counts."""
        if self.is_set:
            return
        self.is_set, self.value = True, value
        if self._kernel is not None and self._task is not None:
            self._kernel.wake(self._task, value)
        elif self._future is not None and not self._future.done():
            self._future.set_result(None)

    def arm(self, kernel: Kernel, task: Task) -> Any:
        if self.is_set:
            return self.value
        self._kernel, self._task = kernel, task
        task.undo = self._leave
        if self._timeout_s is not None:
            kernel.wake_at(task, kernel.clock.monotonic() + self._timeout_s)
        return PARKED

    def _leave(self) -> None:
        self._task = None

    def elsewhere(self) -> Generator[Any, Any, Any]:
        return (yield from self._elsewhere().__await__())

    async def _elsewhere(self) -> Any:
        import asyncio  # loaded already: it drives this

        if not self.is_set:
            self._future = asyncio.get_running_loop().create_future()
            try:
                await asyncio.wait_for(self._future, self._timeout_s)
            except (asyncio.TimeoutError, TimeoutError):
                pass
            finally:
                self._future = None
        return self.value


def in_line(line: deque[Signal], timeout_s: float | None, pass_on: Callable[[], None]) -> Generator[Any, Any, bool]:
    """Wait at the end of `line` for whoever takes us off it and sets our signal; False: not within `timeout_s` seconds.

    `pass_on` is called when that was done, and we are interrupted in the same moment: what was for us is the next one's.
    """
    signal = Signal()
    line.append(signal)
    try:
        yield from signal.within(timeout_s)
    except BaseException:
        if signal.is_set:
            pass_on()
        raise
    finally:
        if not signal.is_set:
            line.remove(signal)
    return signal.is_set
