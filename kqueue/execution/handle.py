"""A job's process as the supervisor holds it: its pidfd, our ends of its socket and pipes, and how it ended.

All of them are in one epoll, so whoever is with it waits for one fd (see decision 16).
"""

from __future__ import annotations

import _socket  # socket.socket asks the kernel for what is known here, at three times the price
import array
import os
import select
import signal
import socket
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .cgroup import Seen
from .wire import Frames

if TYPE_CHECKING:
    from ..kernel import Task
    from .link import TemplateLink


class ChildExit(NamedTuple):
    """What the template saw when it reaped a child. `status` as wait(2) has it."""

    status: int
    cpu_user_s: float
    cpu_system_s: float
    max_memory_mib: float
    seen: Seen = Seen()


class Child:
    """A forked job, as the supervisor holds it. All fds are its own and non-blocking; `close` closes them."""

    def __init__(self, serial: int, link: TemplateLink) -> None:
        self.serial = serial
        self.link = link
        self.pid = 0  # 0: not started yet
        self.pidfd = -1
        self.exit: ChildExit | None = None  # None: not reaped yet, or lost
        self.failure: str | None = None  # why it never started; None: it did, or nothing is known yet
        self.lost = False  # the template died first
        self.news: deque[Task] = deque()  # who waits for any of the above
        self.unsent = b""  # what it was told before it started, and its socket had no room for
        self.frames = Frames()  # what came through its socket; after one run's last there may be the next one's first
        self.is_muted = False  # `ears` do not listen to stdout and stderr
        self.socket, self._its_socket = _socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        fds: list[int] = []
        try:  # all or nothing: fds may run out between two of them
            self.socket.setblocking(False)
            for make in (pipe, pipe, _stack_pipe):
                fds += make()
            self.stdout, self._its_stdout, self.stderr, self._its_stderr, self.stack, self._its_stack = fds
            self.ears = select.epoll()  # of all its fds, so that whoever listens waits for one
            for fd in (self.socket.fileno(), self.stdout, self.stderr):
                self.ears.register(fd, select.EPOLLIN)
        except BaseException:
            self.socket.close()
            self._its_socket.close()
            for fd in fds:
                os.close(fd)
            raise

    def tell(self, data: bytes) -> None:
        """Send it `data` before it starts, so that it finds it there."""
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        self.unsent = data[sent:]

    def started(self, pid: int, pidfd: int) -> None:
        """The template has forked it. `pidfd` -1: no fd is left for one."""
        self.pid, self.pidfd = pid, pidfd
        if pidfd < 0:
            self.failure = "no fd is left for its pidfd"
        else:
            self.ears.register(pidfd, select.EPOLLIN)

    @property
    def is_pending(self) -> bool:
        """Whether the template has not yet said what became of the request."""
        return not self.pid and not self.lost and self.failure is None

    @property
    def its_fds(self) -> list[int]:
        return [self._its_socket.fileno(), self._its_stdout, self._its_stderr, self._its_stack]

    def close_its_ends(self) -> None:
        """After they were sent: as long as we hold them there is no end-of-file."""
        if self._its_socket.fileno() >= 0:
            self._its_socket.close()
            os.close(self._its_stdout)
            os.close(self._its_stderr)
            os.close(self._its_stack)

    @property
    def has_ended(self) -> bool:
        """Whether its process is a zombie, or was reaped."""
        if self.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def give(self, fd: int) -> None:
        """Send it `fd`, before anything else. -1: nothing."""
        if fd >= 0:
            with suppress(OSError):  # it has died, as will be seen
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
                self.socket.sendmsg([b"\0"], [rights], socket.MSG_NOSIGNAL)

    def mute(self) -> None:
        """Do not wait for output: what there is concerns a run that is not at its turn yet."""
        if not self.is_muted:
            self.is_muted = True
            for fd in (self.stdout, self.stderr):
                with suppress(FileNotFoundError):  # it has come to its end
                    self.ears.unregister(fd)

    def unmute(self) -> None:
        if self.is_muted:
            self.is_muted = False
            for fd in (self.stdout, self.stderr):
                self.ears.register(fd, select.EPOLLIN)

    def kill(self, number: int) -> None:
        """Signal the process itself, by pidfd: never a number that somebody else may have by now."""
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                return

    def close(self) -> None:
        self.close_its_ends()
        self.socket.close()
        self.ears.close()
        for fd in (self.stdout, self.stderr, self.stack, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.stdout = self.stderr = self.stack = self.pidfd = -1


def _stack_pipe() -> tuple[int, int]:
    """Nobody may have to wait for room in it: what writes there is a signal handler."""
    return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)


def pipe() -> tuple[int, int]:
    """Its end to read, which does not block, and its end to write. OSError: no fd is left."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read_fd, False)
    return read_fd, write_fd


PIECE: Final = 1024 * 1024  # bytes that are copied in one turn of the loop


def memory_file(data: bytes) -> Generator[Any, Any, int]:
    """An fd from which `data` can be read, however much it is: no pipe has to be filled, and no reader waited for."""
    fd = os.memfd_create("kqueue", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view[:PIECE]) :]
            yield
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
