"""An `async def` job declared isolated=True runs under asyncio.run in its child, so that asyncio libraries work there; here is
what our own traps then mean. Never imported by the supervisor.
"""

from __future__ import annotations

import asyncio
import os
import types
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import Any

from ..context import close_all
from ..kernel.loop import close_locals
from ..kernel.traps import READ, WRITE, Trap, set_foreign_loop, sleep, wait_any, wait_io, wait_process
from .jobtraps import _Nothing, _Request


def run_under_asyncio(steps: Coroutine[Any, Any, Any]) -> Any:
    """The value of `steps`, run by asyncio.run."""
    loop = _UnderAsyncio()
    set_foreign_loop(loop)
    try:
        return asyncio.run(_main(steps))
    finally:
        set_foreign_loop(None)
        close_locals(loop.locals)


async def _main(steps: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await steps
    finally:
        close_all()


class _UnderAsyncio:
    """Answers traps by asyncio."""

    def __init__(self) -> None:
        self.locals: dict[Any, Any] = {}
        self._found: dict[int, list[Callable[[int, int], None]]] = {}  # fd -> who waits for it

    def answer(self, trap: Trap) -> Generator[Any, Any, Any]:
        if isinstance(trap, wait_io):
            fds = yield from self._wait({trap.fd: trap.events}, trap.timeout_s).__await__()
            return fds.get(trap.fd, 0)
        if isinstance(trap, wait_any):
            return (yield from self._wait(trap.fds, trap.timeout_s).__await__())
        if isinstance(trap, sleep):
            return (yield from asyncio.sleep(max(0.0, trap.seconds)).__await__())
        if isinstance(trap, wait_process):
            return (yield from self._wait_process(trap.pid).__await__())
        if isinstance(trap, _Request):
            return (yield from trap._make())  # a child's services never wait by a trap
        if isinstance(trap, _Nothing):
            return None
        return (yield from trap.elsewhere())

    def spawn(self, steps: Generator[Any, Any, Any]) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(_drive(steps))

    def start(self, steps: Any, ended: Callable[[Any, BaseException | None], None]) -> _Started:
        task = asyncio.get_running_loop().create_task(steps if isinstance(steps, types.CoroutineType) else _drive(steps))
        task.add_done_callback(lambda task: ended(*_outcome(task)))
        return _Started(task)

    def interrupt_in(self, seconds: float) -> _Interruption:
        return _Interruption(seconds)

    def release(self, fd: int) -> None:
        for found in tuple(self._found.get(fd, ())):
            found(fd, READ | WRITE)

    async def _wait(self, fds: Mapping[int, int], timeout_s: float | None) -> dict[int, int]:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[dict[int, int]] = loop.create_future()

        def found(fd: int, events: int) -> None:
            if not ready.done():
                ready.set_result({fd: events})

        for fd, events in fds.items():
            self._found.setdefault(fd, []).append(found)
            if events & READ:
                loop.add_reader(fd, found, fd, READ)
            if events & WRITE:
                loop.add_writer(fd, found, fd, WRITE)
        try:
            if timeout_s is None:
                return await ready
            return await asyncio.wait_for(ready, timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            return {}
        finally:
            for fd, events in fds.items():
                if events & READ:
                    loop.remove_reader(fd)
                if events & WRITE:
                    loop.remove_writer(fd)
                waiting = self._found[fd]
                waiting.remove(found)
                if not waiting:
                    del self._found[fd]

    async def _wait_process(self, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            await self._wait({pidfd: READ}, None)
        finally:
            os.close(pidfd)


def _outcome(task: asyncio.Task[Any]) -> tuple[Any, BaseException | None]:
    if task.cancelled():
        return None, asyncio.CancelledError()
    error = task.exception()
    return (None, error) if error is not None else (task.result(), None)


class _Started:
    """A task of asyncio."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task

    def stop(self) -> None:
        self._task.cancel()


class _Interruption:
    """A time limit, as asyncio.timeout has it (which is younger than the oldest Python that we run on)."""

    def __init__(self, seconds: float) -> None:
        self._task = asyncio.current_task()
        self._is_up = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._up)

    def _up(self) -> None:
        if self._task is not None:
            self._is_up = True
            self._task.cancel()

    def ends(self, error: BaseException | None) -> bool:
        self._timer.cancel()
        if not self._is_up or self._task is None:
            return False
        uncancel = getattr(self._task, "uncancel", None)  # Python 3.11
        others = uncancel() if uncancel is not None else 0
        return isinstance(error, asyncio.CancelledError) and not others


@types.coroutine
def _step(steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Drive a generator that may yield traps as they are, and what asyncio waits for."""
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            asked = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as end:
            return end.value
        try:
            value, error = ((yield from asked) if isinstance(asked, Trap) else (yield asked)), None
        except BaseException as raised:
            value, error = None, raised


async def _drive(steps: Generator[Any, Any, Any]) -> Any:
    return await _step(steps)
