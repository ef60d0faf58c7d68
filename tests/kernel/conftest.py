"""A kernel on a virtual clock, and what its tests drive it with."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from kqueue.kernel import (
    Kernel,
    Task,
    Trap,
    VirtualClock,
    join,
    sleep,
)

HOUR = 3600.0
Pair = tuple[socket.socket, socket.socket]


class Stop(BaseException):
    """What cancels a task here: like JobCancelled, no `except Exception` catches it."""


class Give(Trap):
    """Answers at once with what it was made with."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def arm(self, kernel: Kernel, task: Task) -> Any:
        return self.value


class Refuse(Trap):
    """Arms a timer, then raises: a trap that goes wrong half-way."""

    def __init__(self, error: BaseException, after_s: float = 1.0) -> None:
        self.error = error
        self.after_s = after_s

    def arm(self, kernel: Kernel, task: Task) -> Any:
        kernel.wake_at(task, kernel.clock.monotonic() + self.after_s, value="from a trap that was refused")
        raise self.error


def crashed(task: Task) -> None:
    raise AssertionError(f"{task} crashed, and nobody expected it") from task.error


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel(clock=VirtualClock())
    kernel.on_crash = crashed
    yield kernel
    kernel.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def ending(kernel: Kernel, *tasks: Task) -> Any:
    """Run until all `tasks` have ended; the value of the first."""
    while not all(task.ended for task in tasks):
        kernel.turn()
    return tasks[0].value


def turns(kernel: Kernel, count: int) -> None:
    for _ in range(count):
        kernel.turn()


def now(kernel: Kernel) -> float:
    return kernel.clock.monotonic()


def fill(sock: socket.socket) -> None:
    """Write until there is no room."""
    try:
        while True:
            sock.send(b"x" * 65536)
    except BlockingIOError:
        return


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def later(value: Any = None, error: BaseException | None = None, after_s: float = 1.0) -> Any:
    yield sleep(after_s)
    if error is not None:
        raise error
    return value


def joining(task: Task) -> Any:
    return (yield join(task))
