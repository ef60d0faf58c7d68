"""An `async def` job declared isolated=True runs under asyncio.run in its child, so that asyncio libraries work there; here is
what our own traps then mean. Never imported by the supervisor.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Generator
from typing import Any

from ..kernel.traps import READ, WRITE, Trap, set_foreign_loop, sleep, wait_io, wait_process
from .jobtraps import _Nothing, _Request


def run_under_asyncio(steps: Coroutine[Any, Any, Any]) -> Any:
    """The value of `steps`, run by asyncio.run."""
    set_foreign_loop(_translate)
    try:
        return asyncio.run(_main(steps))
    finally:
        set_foreign_loop(None)


async def _main(steps: Coroutine[Any, Any, Any]) -> Any:
    return await steps


def _translate(trap: Trap) -> Generator[Any, Any, Any]:
    if isinstance(trap, sleep):
        return (yield from asyncio.sleep(max(0.0, trap.seconds)).__await__())
    if isinstance(trap, wait_io):
        return (yield from _wait_io(trap.fd, trap.events, trap.timeout_s).__await__())
    if isinstance(trap, wait_process):
        return (yield from _wait_process(trap.pid).__await__())
    if isinstance(trap, _Request):
        return (yield from trap._make())  # a child's services never wait by a trap
    if isinstance(trap, _Nothing):
        return None
    raise TypeError(f"{type(trap).__name__} is not there under asyncio; use asyncio's own in an isolated async job")


async def _wait_io(fd: int, events: int, timeout_s: float | None) -> int:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[int] = loop.create_future()

    def found(event: int) -> None:
        if not ready.done():
            ready.set_result(event)

    if events & READ:
        loop.add_reader(fd, found, READ)
    if events & WRITE:
        loop.add_writer(fd, found, WRITE)
    try:
        return await asyncio.wait_for(ready, timeout_s)
    except (asyncio.TimeoutError, TimeoutError):
        return 0
    finally:
        loop.remove_reader(fd)
        loop.remove_writer(fd)


async def _wait_process(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await _wait_io(pidfd, READ, None)
    finally:
        os.close(pidfd)
