"""Lag: how long everybody waits for a turn of the loop while 10,000 inline jobs are parked and 2,000 no-ops a second come in.

The parked ones wait until all is over. A client, a process of its own, dispatches 20 jobs every 10 ms. What the daemon says
itself is asked for now and then, and the largest counts: `loop.lag_ms_p99` of `kqueue status --json`, the 99th percentile of
the last 512 turns of the loop, each from its first waking to the end of its last step; so it is how long a job that had become
ready waited for those before it. Seen from outside: from right before a batch of 20 is dispatched to the first line of each of
its jobs, first while nobody asks for a status, then while somebody does every 1.5 s. A status lists all 10,000 jobs, so that
the second is the worse one; the largest of all is mostly one full collection of Python's garbage, which no percentile of turns
shows. That the client kept its pace, and that no parked job ended meanwhile, is checked.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import marks
from bench import Bench
from kqueued import Failure, Kqueued, connect
from light import late, sleeper, warm_late
from redis_server import die_with_us
from throughput import fill

from kqueue import dispatch_many

PARKED = 10_000
BATCH, PERIOD_S = 20, 0.01
LOOK_S = 1.5  # between two, more than the 512 turns that one tells of
LATE_S = 0.5  # that the client may lose
REST_S = 4.0  # for all to be parked, and for whatever else takes time


def measure(bench: Bench) -> dict[str, float]:
    looks = bench.pick(3, 1)
    seconds = looks * LOOK_S
    room, url = bench.empty_queue()
    client = connect(url)
    with Kqueued(room, url, inline=PARKED + 2_000) as daemon:
        fill(sleeper, PARKED, 2 * seconds + REST_S)
        daemon.wait_for("starts", PARKED)
        with _dispatching(url, late, seconds):
            pass
        lags_ms = [_lag_ms(daemon)]
        with _dispatching(url, warm_late, seconds) as began:
            for number in range(1, looks + 1):
                time.sleep(max(0.0, began + number * LOOK_S - LOOK_S / 2 - time.monotonic()))
                lags_ms.append(_lag_ms(daemon))
        jobs = BATCH * round(seconds / PERIOD_S)
        daemon.wait_for("warm_late", jobs)
        if marks.count(daemon.marks, "ends"):
            raise Failure("some of the parked jobs ended before the last no-op")
        daemon.finished(client, starts=PARKED, ends=PARKED, late=jobs, warm_late=jobs)
        undisturbed, looked_at = (marks.read(daemon.marks, name) for name in ("late", "warm_late"))
    return {
        "lag_p99": max(lags_ms),
        "lag_late_p50": marks.percentile(undisturbed, 50) * 1000,
        "lag_late_p99": marks.percentile(undisturbed, 99) * 1000,
        "lag_looked_p99": marks.percentile(looked_at, 99) * 1000,
        "lag_largest": max(undisturbed[-1], looked_at[-1]) * 1000,
    }


def _lag_ms(daemon: Kqueued) -> float:
    return float(daemon.status()["loop"]["lag_ms_p99"])


@contextmanager
def _dispatching(url: str, job: Any, seconds: float) -> Iterator[float]:
    """The client, at its work while the `with` lasts, and until that is done: since when. Failure: it was too slow."""
    process = multiprocessing.get_context("fork").Process(target=_dispatch, args=(url, job, round(seconds / PERIOD_S)))
    began = time.monotonic()
    process.start()
    try:
        yield began
    finally:
        process.join()
    elapsed_s = time.monotonic() - began
    if process.exitcode or elapsed_s > seconds + LATE_S:
        raise Failure(f"the client took {elapsed_s:.1f} s for {seconds:.1f} s of jobs (status {process.exitcode})")


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
