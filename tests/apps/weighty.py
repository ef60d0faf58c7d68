"""A module of 150 MiB, as a model or a table would be: what its template has, no job of it has to answer for."""

from __future__ import annotations

import os
import time

from kqueue import job

DATA = bytearray(b"x") * (150 << 20)


@job(name="weighty_reads", isolated=True, max_memory=40, keep_result=60)
def reads() -> int:
    """All of it, for longer than it takes to be looked at."""
    return sum(_reads_for_a_while() for _ in range(3))


def _reads_for_a_while() -> int:
    found = DATA.count(b"y")
    time.sleep(0.3)
    return found


@job(isolated=True, max_memory=40, keep_result=60)
def reads_in_forks() -> int:
    pids = []
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            _reads_for_a_while()
            time.sleep(0.5)
            os._exit(0)
        pids.append(pid)
    return sum(os.waitpid(pid, 0)[1] for pid in pids)


@job(isolated=True, max_memory=40, timeout=20)
def writes() -> None:
    """A page of its own for each that it changes, and nothing more resident for it."""
    for position in range(0, len(DATA), 4096):
        DATA[position] = 0
    time.sleep(20)


@job(isolated=True, max_memory=40, timeout=20)
def adds(mib: int) -> None:
    data = bytearray(b"z") * (mib << 20)
    time.sleep(1.0 + len(data) * 0)
