"""Marks: what a job of the benchmark leaves behind, 8 bytes appended to a file, and what is read off them.

The job itself says when it ran, so nothing depends on what a queue reports about itself: `write` is one write(2) to a file opened
with O_APPEND, whose order and completeness the kernel guarantees across processes. A mark is a double, little endian: a moment
(time.time(), the one clock that two processes share) or a duration in seconds.

Nothing of KQueue is imported here, so that the jobs of any other queue can use it as they are.
"""

from __future__ import annotations

import array
import os
from collections.abc import Sequence
from pathlib import Path
from struct import Struct

DIRECTORY_VARIABLE = "BENCH_MARKS"  # names the directory of the files, in the environment of whoever runs jobs
_MARK = Struct("<d")
_fds: dict[str, int] = {}


def write(name: str, value: float) -> None:
    """Append one mark to the file `name`. For jobs."""
    fd = _fds.get(name)
    if fd is None:
        path = os.path.join(os.environ[DIRECTORY_VARIABLE], name)
        fd = _fds[name] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(fd, _MARK.pack(value))


def write_once(name: str, value: float) -> None:
    """The same for jobs in a pool process, where a file that stays open costs the process."""
    fd = os.open(os.path.join(os.environ[DIRECTORY_VARIABLE], name), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(fd, _MARK.pack(value))
    os.close(fd)


def count(directory: Path, name: str) -> int:
    """How many marks there are; a torn one counts as none."""
    try:
        return os.stat(directory / name).st_size // _MARK.size
    except FileNotFoundError:
        return 0


def read(directory: Path, name: str) -> list[float]:
    """All marks of the file `name`, sorted."""
    values = array.array("d")
    values.frombytes((directory / name).read_bytes())
    return sorted(values)


def rate(moments: Sequence[float]) -> float:
    """Jobs per second between the first and the last of sorted `moments`."""
    return (len(moments) - 1) / (moments[-1] - moments[0])


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest of `ordered` values that is not below `percent` % of them (the nearest rank; 50: the lower median)."""
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, int(rank) - 1)]
