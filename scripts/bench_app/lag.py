"""Lag: how long everybody waits for a turn of the loop while 10,000 inline jobs are parked and 2,000 no-ops a second come in.

The parked ones wait until all is over. A client, a process of its own, dispatches 20 jobs every 10 ms. What the daemon says itself
is asked for every 1.5 s meanwhile, and the largest counts: `loop.lag_ms_p99` of `kqueue status --json`, the 99th percentile of the
last 512 turns of the loop, each from its first waking to the end of its last step; so it holds the longest that a job which became
ready had to wait for those before it. A status lists all 10,000 jobs that run, and the turns in which it does count, too. Seen
from outside: from right before a batch of 20 is dispatched to the first line of each of its jobs. That the client kept its pace,
and that no parked job ended meanwhile, is checked.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import marks
from bench import Bench
from kqueued import Failure, Kqueued, connect
from light import late, sleeper
from redis_server import die_with_us
from throughput import fill

from kqueue import dispatch_many

PARKED = 10_000
BATCH, PERIOD_S = 20, 0.01
LOOK_S = 1.5  # more than the 512 turns that one look tells of
SLOWEST = 0.9  # of the pace
START_S = 4.0  # for all to be parked, in addition


def measure(bench: Bench) -> dict[str, float]:
    looks = bench.pick(4, 2)
    batches = round(looks * LOOK_S / PERIOD_S)
    room, url = bench.empty_queue()
    client = connect(url)
    with Kqueued(room, url, inline=PARKED + 2_000) as daemon:
        fill(sleeper, PARKED, looks * LOOK_S * 2 + START_S)
        daemon.wait_for("starts", PARKED)
        pacer = multiprocessing.get_context("fork").Process(target=_dispatch, args=(url, late, batches))
        began = time.monotonic()
        pacer.start()
        lags_ms = []
        for number in range(1, looks + 1):
            time.sleep(max(0.0, began + number * LOOK_S - 0.1 - time.monotonic()))
            lags_ms.append(daemon.status()["loop"]["lag_ms_p99"])
        pacer.join()
        elapsed_s = time.monotonic() - began
        daemon.wait_for("late", BATCH * batches)
        if marks.count(daemon.marks, "ends"):
            raise Failure("some of the parked jobs ended before the last no-op")
        if pacer.exitcode or batches * PERIOD_S < SLOWEST * elapsed_s:
            raise Failure(f"the client took {elapsed_s:.1f} s for {batches * PERIOD_S:.1f} s of jobs (status {pacer.exitcode})")
        daemon.finished(client, starts=PARKED, ends=PARKED, late=BATCH * batches)
        delays = marks.read(daemon.marks, "late")
    return {
        "lag_p99": max(lags_ms),
        "lag_late_p50": marks.percentile(delays, 50) * 1000,
        "lag_late_p99": marks.percentile(delays, 99) * 1000,
    }


def _dispatch(url: str, job: Any, batches: int) -> None:
    """In a process of its own."""
    die_with_us()
    connect(url)
    due = time.monotonic()
    for _ in range(batches):
        time.sleep(max(0.0, due - time.monotonic()))
        now = time.time()
        dispatch_many([job.job(now) for _ in range(BATCH)])
        due += PERIOD_S
