"""Several things at once within one job: `gather` waits for all of them, `race` for the first.

    pages = yield io.gather(*(get(url) for url in urls), limit=20)
    answer = yield io.race(ask(one), ask(other))

Each thing is a task of its own, with a copy of the context variables. None outlives the call: when one fails, when the caller
is interrupted or its job ends, the others are cancelled, and waited for. What a task opened belongs to its job, and is closed
with that.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Awaitable, Coroutine, Generator
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..errors import JobCancelled, UsageError
from ..execution.guard import calls_jobs
from ..kernel import traps
from ..kernel.loop import running
from ..kernel.traps import Trap
from .operation import Operation, operation
from .surroundings import Signal

if TYPE_CHECKING:
    from ..kernel.loop import Kernel, Task

GRACE_S: Final = 1.0  # for a task of a job that is cancelled, as for the job itself

Thing = Generator[Any, Any, Any] | Coroutine[Any, Any, Any] | Trap


@operation
def gather(*things: Thing, limit: int | None = None) -> Generator[Any, Any, list[Any]]:
    """What `things` (generators, coroutines, operations, traps) return, in their order. `limit`: how many run at once; None: all.

    The first error cancels the others, and is raised when they have ended.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"gather() takes limit= of at least 1, not {limit!r}")
    group = _Group(things)
    try:
        while group.unfinished and group.failed is None:
            while group.waiting and group.failed is None and (limit is None or len(group.running) < limit):
                group.begin()
            yield from group.change()
    except BaseException:
        yield from group.end()
        raise
    yield from group.end()
    if group.failed is not None:
        raise group.failed
    return [group.results[number] for number in range(len(things))]


@operation
def race(*things: Thing) -> Generator[Any, Any, Any]:
    """What the first of `things` to end returns, or its error. The others are cancelled, and have ended when this returns."""
    if not things:
        raise UsageError("race() takes at least one thing that can be first")
    group = _Group(things)
    try:
        while group.waiting and not group.results and group.failed is None:
            group.begin()
        while not group.results and group.failed is None:
            yield from group.change()
    except BaseException:
        yield from group.end()
        raise
    yield from group.end()
    if group.failed is not None and not group.results:
        raise group.failed
    return next(iter(group.results.values()))


class _Group:
    """Tasks that end together."""

    def __init__(self, things: tuple[Thing, ...]) -> None:
        for thing in things:
            if not isinstance(thing, (types.GeneratorType, types.CoroutineType, Trap)):
                raise TypeError(
                    f"gather() and race() take generators, coroutines, operations and traps, not {type(thing).__name__}: "
                    "call the function, and do not wait for it before"
                )
        self.waiting = deque(enumerate(things))
        self.running: dict[int, Any] = {}  # by number: what stops it
        self.results: dict[int, Any] = {}
        self.failed: BaseException | None = None  # the first error
        self._changed = Signal()
        self._is_ending = False

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def begin(self) -> None:
        """Start the next one."""
        number, thing = self.waiting.popleft()
        steps = _steps_of(thing)
        kernel = running()
        if kernel is not None and kernel.current is not None:
            parent = kernel.current
            self.running[number] = None
            task = kernel.spawn(run_thing(steps), name=f"{parent.name}/{number}", context=copy_context())
            task.mark = parent.mark  # it is the same job's code

            def end(task: Task) -> None:
                if isinstance(steps, types.CoroutineType):
                    steps.close()  # one that was cancelled before it began would complain
                self._ended(number, task.value, task.error)

            task.on_end = end
            self.running[number] = _OnKernel(kernel, task)
        elif traps.foreign_loop is not None:
            self.running[number] = traps.foreign_loop.start(steps, partial(self._ended, number))

    def change(self) -> Generator[Any, Any, None]:
        """Wait until one has ended since this was last asked."""
        yield from self._changed
        self._changed = Signal()

    def end(self) -> Generator[Any, Any, None]:
        """Cancel what runs, and wait for it, whatever else is raised here meanwhile."""
        self._is_ending = True
        while self.waiting:
            _drop(self.waiting.popleft()[1])
        error: BaseException | None = None
        self._stop()
        while self.running:
            try:
                yield from self.change()
            except BaseException as another:  # the caller is cancelled while it cancels: once more, and harder
                error = another
                self._stop()
        if error is not None:
            raise error

    def _stop(self) -> None:
        for handle in tuple(self.running.values()):
            handle.stop()

    def _ended(self, number: int, value: Any, error: BaseException | None) -> None:
        del self.running[number]
        if self._is_ending:
            pass  # what comes of it is of no interest any more
        elif error is None:
            self.results[number] = value
        elif self.failed is None:
            self.failed = error
        self._changed.set()


class _OnKernel:
    """Stops a task of our kernel."""

    def __init__(self, kernel: Kernel, task: Task) -> None:
        self._kernel = kernel
        self._task = task

    def stop(self) -> None:
        """Gently, unless the job itself is being cancelled, which has its grace."""
        parent = self._kernel.current
        error = JobCancelled("it ran beside something that ended first")
        if parent is not None and parent.grace_s is not None:
            self._kernel.cancel(self._task, error, GRACE_S)
        else:
            self._kernel.interrupt(self._task, error)


def _steps_of(thing: Thing) -> Any:
    return thing.__await__() if isinstance(thing, Trap) else thing


def _drop(thing: Thing) -> None:
    """It is not going to run."""
    if isinstance(thing, Operation):
        thing.drop()
    elif not isinstance(thing, Trap):
        thing.close()


@calls_jobs
def run_thing(steps: Any) -> Generator[Any, Any, Any]:
    """The body of a task; the guard knows it as what calls a job's code."""
    awaitable: Awaitable[Any] = steps
    return (yield from (awaitable.__await__() if isinstance(steps, types.CoroutineType) else steps))
