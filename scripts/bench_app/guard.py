"""Runs a worker of a peer, and ends all of it when its own stdin ends or the worker does: so, too, when the benchmark is killed.

    python guard.py STOP_S PROGRAM [ARGUMENT …]

It prints the worker's pid first. A worker's processes may have left its session (RQ's do) or lost their parent (Dramatiq's,
when that is killed); so this process adopts orphans, and whatever stands below it is the worker's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import procfs
from redis_server import die_with_us

LOOK_S = 0.005
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def main(stop_s: float, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=die_with_us)
    print(worker.pid, flush=True)
    ended = os.pidfd_open(worker.pid)
    if ended not in select.select([sys.stdin, ended], [], [])[0]:
        worker.send_signal(signal.SIGTERM)
        select.select([ended], [], [], stop_s)
    while left := procfs.tree(os.getpid())[1:]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
