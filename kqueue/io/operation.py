"""Operations: generator functions whose calls can be yielded like traps.

    @operation
    def read_line(stream):
        return (yield from stream.read_until(b"\n"))

    line = yield read_line(stream)         line = yield from read_line(stream)         line = await read_line(stream)

All three run its steps in the task that waits, in its context: there is no task in between to pay for, to cancel or to forget.
What is thrown at the task is raised in the operation, at the trap where it stands, and comes out of it at the line that yielded
it.

Rule 1. Within an operation traps are waited for by `yield from trap`, never by a bare `yield trap`: then an `async def` job of
        its own process, where asyncio answers, is served as well.
Rule 2. An operation that is interrupted leaves what it worked on usable or closed, and no fd behind.
Rule 3. It runs when it is waited for, and once. One that is never waited for does nothing but to warn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from ..kernel.traps import Trap

if TYPE_CHECKING:
    from ..kernel.loop import Kernel, Task

P = ParamSpec("P")
T = TypeVar("T")
Steps = Generator[Any, Any, T]


class Operation(Trap, Generic[T]):
    """Something that takes several waits, to be waited for as one. T: what it answers."""

    __slots__ = ("_steps",)

    def __init__(self, steps: Steps[T]) -> None:
        self._steps: Steps[T] | None = steps  # None: they were taken

    def __await__(self) -> Steps[T]:
        steps, self._steps = self._steps, None
        if steps is None:
            raise RuntimeError("an operation is waited for once: call its function again")
        return steps

    __iter__ = __await__

    def arm(self, kernel: Kernel, task: Task) -> Any:
        inside: Any = _Inside(task, self.__await__())
        task.generator = inside

    def drop(self) -> None:
        """It is not going to be waited for, on purpose."""
        self._steps = None

    def __del__(self) -> None:
        if self._steps is not None:
            name = getattr(self._steps, "__qualname__", "an operation")
            warnings.warn(f"{name}() did nothing: write `yield` or `await` before it", RuntimeWarning, 2)


class _Inside:
    """Stands in for a task's generator, which yielded an operation, until that has ended; then it is put back."""

    __slots__ = ("_outer", "_steps", "_task")

    def __init__(self, task: Task, steps: Steps[Any]) -> None:
        self._task = task
        self._outer: Any = task.generator
        self._steps = steps

    @property
    def gi_yieldfrom(self) -> Any:
        """For `Task.where`: the job's line says more than ours."""
        return self._outer

    def send(self, value: Any) -> Any:
        try:
            return self._steps.send(value)
        except StopIteration as end:
            value = end.value
        except BaseException as error:
            return self._back().throw(error)
        return self._back().send(value)

    def throw(self, error: BaseException) -> Any:
        try:
            return self._steps.throw(error)
        except StopIteration as end:
            value = end.value
        except BaseException as raised:
            return self._back().throw(raised)
        return self._back().send(value)

    def _back(self) -> Any:
        self._task.generator = self._outer
        return self._outer


def operation(function: Callable[P, Steps[T]]) -> Callable[P, Operation[T]]:
    """Make of a generator function one whose calls are operations."""

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Operation[T]:
        return Operation(function(*args, **kwargs))

    return make
