"""Isolated jobs that want what only their cgroup counts. See test_cgroup_limits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from kqueue import job

MIB = 1 << 20


def own_cgroup() -> Path:
    (line,) = (line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return Path("/sys/fs/cgroup") / line[4:]


@job(isolated=True, timeout=60)
def hoards(where: str, mib: int) -> int:
    """Fills files in memory that nobody maps; those of /dev/shm are closed as well."""
    if where == "memfd":
        fds = [os.memfd_create("hoard") for _ in range(mib)]
        for fd in fds:
            os.write(fd, b"x" * MIB)
    else:
        for number in range(mib):
            with open(f"{where}/{number}", "wb", buffering=0) as file:
                file.write(b"x" * MIB)
    return mib


@job(isolated=True, timeout=60)
def hoards_in_a_subprocess(where: str, mib: int) -> int:
    code = f"from tests.apps.hoarder import hoards; hoards.__wrapped__({where!r}, {mib})"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


@job(isolated=True, timeout=60)
def multiplies(count: int) -> int:
    """So many children at once, quicker than anybody looks; fails when one cannot be."""
    pids = []
    try:
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            pids.append(pid)
    finally:
        for pid in pids:
            os.kill(pid, 9)
    return count


@job(isolated=True, timeout=60, keep_result=60)
def tells_its_limits() -> list[str]:
    """The name of its cgroup, and what it may have there."""
    here = own_cgroup()
    names = ("memory.max", "memory.oom.group", "pids.max")
    return [str(here), *((here / name).read_text().strip() for name in names)]


@job(isolated=True, start="pool", timeout=60, keep_result=60)
def tells_those_of_the_pool() -> list[str]:
    return tells_its_limits.__wrapped__()  # type: ignore[no-any-return, attr-defined]


@job(isolated=True, start="exec", timeout=60, keep_result=60)
def tells_those_of_a_new_program() -> list[str]:
    return tells_its_limits.__wrapped__()  # type: ignore[no-any-return, attr-defined]


@job(isolated=True, timeout=60)
def shoots_itself() -> None:
    os.kill(os.getpid(), 9)
