"""The tray of a pool process: what it will run next, while it is still busy with another. Whole messages, each of them one job.
Both sides of it stand here, and what both must know to do without asking each other.

    supervisor --put--> | B | C | D | --> the process takes one when it is through with A, before it says so
                        <-- take_back, all that it has not taken

The supervisor holds the process's end as well. So a message is either with the process or with us, and never with both: the
kernel gives it to who asks first. What is in the tray has not begun, and what was taken has begun as soon as the process says so.
"""

from __future__ import annotations

import fcntl
import socket
import termios
from typing import Final, NamedTuple

MAX_MESSAGE: Final = 16 * 1024  # bytes; a larger job waits for a process that is free
DEPTH: Final = 16  # jobs in one tray: of 0.1 ms each they last while a busy host has the supervisor wait for a CPU

DOUBT_S: Final = 0.5  # within which a process says that it has taken one, after it has

_AT_ONCE: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_ZERO: Final = bytes(4)  # of an int


class Until(NamedTuple):
    """What ends the life of a pool process, between two runs. 0: nothing."""

    jobs: int
    memory_mib: float  # resident after a job
    age_s: float

    def is_over(self, jobs: int, memory_mib: float, age_s: float) -> bool:
        return (
            0 < self.jobs <= jobs or 0 < self.memory_mib < memory_mib or 0 < self.age_s <= age_s
        )


class Tray:
    """The supervisor's side. OSError: no fd is left."""

    def __init__(self) -> None:
        self._ours, self._its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    @property
    def its_fd(self) -> int:
        return self._its.fileno()

    def put(self, message: bytes) -> bool:
        """False: it does not fit just now."""
        if len(message) > MAX_MESSAGE:
            return False
        try:
            self._ours.send(message, _AT_ONCE)
        except OSError:
            return False
        return True

    def take_back(self, most: int = DEPTH) -> set[bytes]:
        """Up to `most` messages that are in it, the oldest first. The process may take one between two of them."""
        messages: set[bytes] = set()
        while len(messages) < most and (message := take(self._its)):
            messages.add(message)
        return messages

    def close(self) -> None:
        self._ours.close()
        self._its.close()


def take(tray: socket.socket) -> bytes:
    """The process's side: the next message; b"": there is none."""
    try:
        return tray.recv(MAX_MESSAGE, _AT_ONCE)
    except OSError:
        return b""


def has_unread(fd: int) -> bool:
    """Whether there is something in pipe `fd` that nobody has read yet. OSError when it is none."""
    return fcntl.ioctl(fd, termios.FIONREAD, _ZERO) != _ZERO
