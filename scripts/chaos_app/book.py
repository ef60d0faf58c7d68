"""The book: what was dispatched, started and finished, written by those who did it, in one file outside the system under test.

A mark must not be lost when its writer is killed the moment after, nor be torn when it is killed meanwhile. So a mark is one
write(2) of RECORD bytes to a file open with O_APPEND: the kernel appends it whole, in one order for all writers, and what it has
taken survives the writer. A write that crosses a page may be cut short by a SIGKILL (generic_perform_write looks for one between
two pages); all records have one size that divides a page, so none crosses one.

Time is CLOCK_MONOTONIC, which is one for all processes of a host, and which no nemesis moves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

PATH_VARIABLE: Final = "KQUEUE_CHAOS_BOOK"
DAEMON_VARIABLE: Final = "KQUEUE_CHAOS_DAEMON"  # "a.3": the third process of daemon a
RECORD: Final = 128  # bytes, newline included; a power of two
NOBODY: Final = "-"

ATTEMPTED = "A"  # about to dispatch; word: what is owed ("done", "dead", "maybe")
RETURNED = "R"  # dispatch returned
UNKNOWN = "U"  # dispatch raised; word: what
STARTED = "S"  # word: the attempt
FINISHED = "F"
FAILED = "X"  # it raises, as it should
CANCELLED = "C"  # it was interrupted; word: by what
DYING = "K"  # it kills its own process now; word: "child" or "daemon"
PROMISED = "T"  # current().then(…) was called; word: id of the follow-up


class Mark(NamedTuple):
    kind: str
    at: float  # CLOCK_MONOTONIC, seconds
    job: str
    run: str  # of that job, 8 hex digits; NOBODY: a dispatcher
    daemon: str  # DAEMON_VARIABLE of the writer
    pid: int
    parent: int
    word: str


def now() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def note(kind: str, job: str, run: str = NOBODY, word: object = NOBODY) -> None:
    """Write a mark into the book that the environment names."""
    daemon = os.environ.get(DAEMON_VARIABLE, NOBODY)
    text = f"{kind} {now():.6f} {job} {run} {daemon} {os.getpid()} {os.getppid()} {word}"
    data = text.encode()[: RECORD - 1].ljust(RECORD - 1) + b"\n"
    written = os.write(_fd(), data)
    if written != RECORD:
        raise OSError(f"the book took {written} of {RECORD} bytes")


def read(data: bytes) -> Iterator[Mark]:
    """The marks in `data`, which begins where a record does; an incomplete last one is left out."""
    for start in range(0, len(data) - RECORD + 1, RECORD):
        record = data[start : start + RECORD]
        kind, at, job, run, daemon, pid, parent, word = record.decode().split()
        yield Mark(kind, float(at), job, run, daemon, int(pid), int(parent), word)


class Reader:
    """Reads a book that grows."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._read = 0

    def more(self) -> list[Mark]:
        """What came since the last time."""
        size = os.fstat(self._fd).st_size
        if size % RECORD:
            raise OSError(f"the book has {size} bytes, which is no multiple of {RECORD}: a mark was torn")
        data = os.pread(self._fd, size - self._read, self._read) if size > self._read else b""
        self._read += len(data) - len(data) % RECORD
        return list(read(data))

    def close(self) -> None:
        os.close(self._fd)


_open: tuple[int, int] | None = None  # (pid, fd): a forked child has its own


def _fd() -> int:
    global _open
    if _open is None or _open[0] != os.getpid():
        _open = (os.getpid(), os.open(os.environ[PATH_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))
    return _open[1]
