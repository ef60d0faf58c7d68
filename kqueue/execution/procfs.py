"""Reading /proc/PID: what `killing.py` and `sampler.py` both need of it, and no more. Nothing here knows what a job is.

A process may be gone at any moment: then its files cannot be opened, or read as nothing, or fail with ESRCH in the middle.
"""

from __future__ import annotations

import os
from typing import Final

MAY_BE_MORE: Final = 2048  # bytes: the kernel gives a page at a time, and of a list what fits that, so there may be from here on


def read(path: str) -> bytes:
    """All of a file of /proc. OSError when it cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, 65536)
        more = data
        while len(more) >= MAY_BE_MORE and (more := os.read(fd, 65536)):
            data += more
        return data
    finally:
        os.close(fd)


def stat_fields(stat: bytes) -> list[bytes]:
    """Of proc_pid_stat(5), the fields from the third to resident memory: so field N is at N - 3, and the rest is one more.

    The name before them, in parentheses, may hold anything. ProcessLookupError for a process that is gone.
    """
    end = stat.rfind(b")")
    if end < 0:
        raise ProcessLookupError
    return stat[end + 2 :].split(b" ", 22)


def stat_name(stat: bytes) -> str:
    """The second field."""
    return stat[stat.find(b"(") + 1 : stat.rfind(b")")].decode("utf-8", "replace")
