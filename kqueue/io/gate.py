"""The gate: how many fds jobs may have open at once, for each loop.

A process has RLIMIT_NOFILE of them, and the daemon needs some that nobody may take from it: for the broker, for its children's
pipes. So whoever opens a socket for a job takes a place first, and waits for one when there is none: a job that comes too many
is slower, and does not fail, unless its time is up. Where the limit is met all the same (jobs that open files by other means),
that is waited for, too.
"""

from __future__ import annotations

import errno
import resource
import socket
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Final

from ..errors import JobTimedOut
from ..kernel.traps import sleep
from .errors import NoDescriptor
from .surroundings import Signal, in_line, left, local

RESERVE: Final = 256  # fds that are not for jobs, or a quarter where that is less
LOOK_AGAIN_S: Final = 0.05  # when the process has no fd although the gate has a place
_NO_FD: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def room() -> int:
    """The fds that jobs may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit - min(RESERVE, limit // 4)


class Gate:
    """The places of one loop. Who took one gives it back, once, when the fd is closed."""

    def __init__(self) -> None:
        self.taken = 0
        self._waiting: deque[Signal] = deque()  # the longest waiting first; who is woken has the place already
        self.spare: list[Callable[[], bool]] = []  # of pools: each closes one that lies idle, and says whether there was one

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        return bool(self._waiting) or self.taken >= room()

    def take(self, purpose: str, deadline: float | None) -> Generator[Any, Any, None]:
        """Wait for a place. NoDescriptor at `deadline`; `purpose` ("to connect to …") is for the message."""
        is_full = self.is_full
        if is_full and any(close() for close in self.spare):
            is_full = self.is_full
        if not is_full:
            self.taken += 1
            return
        try:
            has_it = yield from in_line(self._waiting, left(deadline), self.give)
        except BaseException as error:
            _explain(error, self._shortage(purpose))
            raise
        if not has_it:
            raise NoDescriptor(self._shortage(purpose))

    def give(self) -> None:
        """Give a place back; the longest waiting has it then."""
        self.taken -= 1
        while self._waiting and self.taken < room():
            self.taken += 1
            self._waiting.popleft().set()

    def socket(self, family: int, purpose: str, deadline: float | None) -> Generator[Any, Any, socket.socket]:
        """A new non-blocking stream socket, and its place. OSError when there is no such family."""
        yield from self.take(purpose, deadline)
        try:
            while True:
                try:
                    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
                except OSError as error:
                    if error.errno not in _NO_FD:
                        raise
                remaining = left(deadline)
                if remaining == 0:
                    raise NoDescriptor(self._shortage(purpose))
                yield from sleep(LOOK_AGAIN_S if remaining is None else min(LOOK_AGAIN_S, remaining))
        except BaseException as error:
            self.give()
            _explain(error, self._shortage(purpose))
            raise

    def _shortage(self, purpose: str) -> str:
        return (
            f"no file descriptor was free in time {purpose}: jobs have {self.taken} open, and may have {room()}; raise the "
            "limit of open files (LimitNOFILE= of the service), or let fewer jobs run at once"
        )


def gate() -> Gate:
    """That of this loop."""
    return local(Gate)


def _explain(error: BaseException, shortage: str) -> None:
    """Tell a job whose own time was up here why it had to wait."""
    if isinstance(error, JobTimedOut) and shortage not in str(error):
        error.args = (f"{error}; {shortage}",)
