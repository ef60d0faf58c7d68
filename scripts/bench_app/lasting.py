"""Lasting: what a supervisor keeps of the isolated jobs that it has run. 90,000 in the pool and 10,000 by fork, in one daemon.

Its memory is read when a fifth of them is done, by when caches and tables have their size, and when all are. Its open files must
be as many at the end as they were then, and below it nothing but the template, its spare child and the pool; a zombie counts.
"""

from __future__ import annotations

import os
import time

import procfs
from bench import Bench
from forked import forked_noop
from kqueued import Failure, Kqueued, connect
from throughput import fill
from warm import pooled_noop

PARTS = 5  # the memory is read after the first and after the last
BELOW = 4  # template, spare, and a pool of two
SETTLE_S = 30.0


def measure(bench: Bench) -> dict[str, float]:
    pooled, forked = bench.pick((90_000, 10_000), (4_500, 500))
    room, url = bench.empty_queue()
    client = connect(url)
    with Kqueued(room, url, ["light"], ["forked", "warm"]) as daemon:
        readings = []
        for part in range(1, PARTS + 1):
            fill(pooled_noop, pooled // PARTS)
            fill(forked_noop, forked // PARTS)
            daemon.finished(client, pooled_noop=part * pooled // PARTS, forked_noop=part * forked // PARTS)
            if part in (1, PARTS):
                _expect_at_rest(daemon.pid)
                readings.append((procfs.memory(daemon.pid).anonymous, len(os.listdir(f"/proc/{daemon.pid}/fd"))))
    (first_mib, first_files), (last_mib, last_files) = readings
    if last_files != first_files:
        raise Failure(f"{last_files} files are open in the end, and were {first_files} after a fifth of the jobs")
    return {"lasting_growth": last_mib - first_mib}


def _expect_at_rest(pid: int) -> None:
    """Failure when there is more below the supervisor than has to be, a zombie for example."""
    deadline = time.monotonic() + SETTLE_S
    while len(below := procfs.tree(pid)[1:]) > BELOW:
        if time.monotonic() > deadline:
            raise Failure(f"{len(below)} processes are left below the supervisor: {below}")
        time.sleep(0.1)
