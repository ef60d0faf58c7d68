"""Jobs that look for the child which waits for a job beside them. Imported by the template only."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from pathlib import Path
from typing import Any

from kqueue import job
from kqueue.job import get_dispatcher

PATIENCE_S = 30.0


def _spare() -> int:
    """The pid of the spare, when there is one."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text()
        for pid in children.split():
            if Path(f"/proc/{pid}/cmdline").read_text().startswith("kqueued: spare child"):
                return int(pid)
    raise TimeoutError("there is no spare")


@job(isolated=True, keep_result=60)
def find() -> int:
    return _spare()


@job(isolated=True, keep_result=60)
def end(number: int) -> int:
    """Kill it, and see it gone."""
    pid = _spare()
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, number)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(PATIENCE_S * 1000), "it outlived that"
    return pid


@job(isolated=True, keep_result=60)
def pid() -> int:
    return os.getpid()


@job(isolated=True, keep_result=60)
def draw() -> float:
    return random.random()


@job(isolated=True, keep_result=60)
def surroundings() -> dict[str, Any]:
    return {
        "id": os.environ["KQUEUE_JOB_ID"], "fds": sorted(os.listdir("/proc/self/fd"))[:-1],
        "blocked": len(signal.pthread_sigmask(0, ())), "stdin": os.readlink("/proc/self/fd/0"),
        "dispatcher": getattr(get_dispatcher(), "__qualname__", ""), "output": os.readlink("/proc/self/fd/1")[:5],
        "title": Path("/proc/self/cmdline").read_text().rstrip("\0"),
    }  # fmt: skip
