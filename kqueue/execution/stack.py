"""Where a job stood when it had to be killed: asked for by a signal, answered by faulthandler into a pipe of its own.

Its handler is C and async-signal-safe, so it answers for a job that loops in C, or ignores SIGTERM. It does not for one that is
stopped, that sleeps in the kernel where no signal reaches it, that blocks the signal, or that has become another program.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final

from ..outcome import cut
from ..redact import shorten_paths

SIGNAL: Final = 62  # a real-time signal that no library is known to use
PATIENCE_S: Final = 0.5  # for the first of its answer: on a busy host it has to get the processor for that
SHORT_S: Final = 0.1  # for that of one that is taking more than it may
QUIET_S: Final = 0.005  # after the last of it
_SIZE: Final = 16384  # of what is kept
_LAUNCHERS: Final = ('  File "<frozen runpy>"', '  File "<string>", line 1 in <module>')  # of a template, and of a start by exec
_OURS: Final = re.compile(r'  File "(?:.*/)?kqueue/(?:execution|kernel|registry)[/.].* in \S+$')


def can_answer(pid: int) -> bool:
    """Whether `pid` has a handler for the signal, which would end it otherwise, and can be reached by it."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file.read().split(b"\n") if b":" in line)
        bit = 1 << (SIGNAL - 1)
        if int(fields[b"SigBlk"], 16) & bit or not int(fields[b"SigCgt"], 16) & bit:
            return False
        return fields[b"State"].split()[0] not in (b"T", b"t", b"Z", b"X")
    except (OSError, KeyError, ValueError, IndexError):
        return False


class Stack:
    """What came through the pipe. A job may write there, too: it is text, and bounded."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.came = False
        self.open = True  # False: its end is closed, so that nothing can come

    def read(self, fd: int) -> bool:
        """Take what is there; False when nothing more can come."""
        try:
            data = os.read(fd, _SIZE)
        except BlockingIOError:
            return True
        self.came, self.open = self.came or bool(data), bool(data)
        if len(self._data) < 4 * _SIZE:
            self._data += data
        return bool(data)

    def text(self, roots: Sequence[str] | None = None) -> str:
        """As people read it: without KQueue's own frames at its end, files by the names that they are imported by."""
        told = _without_ours(self._data.decode("utf-8", "replace").split("\n"))
        return cut(shorten_paths("\n".join(told), roots), _SIZE).strip("\n")


def _without_ours(lines: Sequence[str]) -> list[str]:
    """Without the frames at the outer end of each thread that are the same in every job."""
    told, outer = [], True
    for line in reversed(lines):
        if not line.startswith("  File "):
            outer = True
        elif outer and (_OURS.match(line) or line.startswith(_LAUNCHERS)):
            continue
        else:
            outer = False
        told.append(line)
    told.reverse()
    return told if any(line.startswith("  File ") for line in told) else []  # KQueue's own alone say nothing of the job
