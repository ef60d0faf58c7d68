"""Parked: thousands of inline jobs that wait at the same time.

1,000 and then 10,000 jobs that wait 1 s are enqueued, then the daemon starts; how long after the first start the last one ends.
With 10,000 in `inline.max_concurrent` (the default) they could all be there at once; how many are depends on how fast they start.

Memory: a daemon that has run 1,000 no-ops, and so has grown what it needs for its work, is given 10,000 jobs that wait long
enough for all to be parked together; RSS then, less RSS before, divided by the jobs. That none has ended by then is checked.
"""

from __future__ import annotations

import time

import marks
import procfs
from bench import Bench
from kqueued import Failure, Kqueued, connect, expect_ready
from light import noop, sleeper
from throughput import fill

WARM_UP = 1_000
PARKED = 10_000
REST_S = 1.0


def measure(bench: Bench) -> dict[str, float]:
    figures = {f"sleepers_{jobs}": _done_after_s(bench, jobs) for jobs in (1_000, 10_000)}
    return figures | {"parked_memory": _memory_kib(bench)}


def _done_after_s(bench: Bench, jobs: int) -> float:
    room, url = bench.empty_queue()
    client = connect(url)
    fill(sleeper, jobs, 1)
    expect_ready(client, jobs)
    with Kqueued(room, url) as daemon:
        daemon.finished(client, starts=jobs, ends=jobs)
        return marks.read(daemon.marks, "ends")[-1] - marks.read(daemon.marks, "starts")[0]


def _memory_kib(bench: Bench) -> float:
    wait_s = bench.pick(10, 7)
    room, url = bench.empty_queue()
    client = connect(url)
    with Kqueued(room, url) as daemon:
        fill(noop, WARM_UP)
        daemon.finished(client, noop=WARM_UP)
        time.sleep(REST_S)
        before_mib = procfs.resident_mib(daemon.pid)
        fill(sleeper, PARKED, wait_s)
        daemon.wait_for("starts", PARKED)
        then_mib = procfs.resident_mib(daemon.pid)
        if marks.count(daemon.marks, "ends"):
            raise Failure(f"{PARKED} jobs that wait {wait_s} s were not all parked before the first ended")
        daemon.finished(client, starts=PARKED, ends=PARKED)
    return (then_mib - before_mib) * 1024 / PARKED
