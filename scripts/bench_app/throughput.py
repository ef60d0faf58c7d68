"""Throughput: N jobs are enqueued first, then the daemon starts; (N - 1) jobs / (last mark - first mark).

That is the method under which the peers were measured. A job appends 8 bytes (the time) to a file, and does nothing else. While
the queue of inline jobs fills, the dispatch rates are taken: the first thousands one at a time, the others in batches of 1,000,
by one client in this process and with no daemon running. The queue's own count has to agree with what was dispatched.
"""

from __future__ import annotations

import time
from typing import Any

import marks
from bench import Bench
from forked import forked_noop
from kqueued import Kqueued, connect, expect_ready
from light import noop
from warm import fresh_noop, pooled_noop

from kqueue import dispatch_many

BATCH = 1_000
READ_AHEAD = "isolated: {max_concurrent: 32}"  # so that the two processes of the pool need not wait for the queue


def measure_inline(bench: Bench) -> dict[str, float]:
    singles = bench.pick(3_000, 1_000) if bench.broker == "redis" else bench.pick(1_000, 300)
    batched = bench.pick(50_000, 10_000)
    room, url = bench.empty_queue()
    client = connect(url)
    single_s = _timed(lambda: [noop.dispatch() for _ in range(singles)])
    batch_s = _timed(lambda: fill(noop, batched))
    expect_ready(client, singles + batched)
    with Kqueued(room, url) as daemon:
        daemon.finished(client, noop=singles + batched)
        rate = marks.rate(marks.read(daemon.marks, "noop"))
    return {"noop": rate, "dispatch_single": singles / single_s, "dispatch_batch": batched / batch_s}


def measure_forked(bench: Bench) -> dict[str, float]:
    jobs = bench.pick(1_000, 200)
    room, url = bench.empty_queue()
    client = connect(url)
    fill(forked_noop, jobs)
    expect_ready(client, jobs)
    with Kqueued(room, url, ["light"], ["forked"]) as daemon:
        daemon.finished(client, forked_noop=jobs)
        return {"forked_noop": marks.rate(marks.read(daemon.marks, "forked_noop"))}


def measure_pooled(bench: Bench) -> dict[str, float]:
    jobs = bench.pick(20_000, 4_000)
    room, url = bench.empty_queue()
    client = connect(url)
    fill(pooled_noop, jobs)
    expect_ready(client, jobs)
    with Kqueued(room, url, ["light"], ["warm"], more=READ_AHEAD) as daemon:
        daemon.finished(client, pooled_noop=jobs)
        return {"pooled_noop": marks.rate(marks.read(daemon.marks, "pooled_noop"))}


def measure_exec(bench: Bench) -> dict[str, float]:
    jobs = bench.pick(100, 20)
    room, url = bench.empty_queue()
    client = connect(url)
    fill(fresh_noop, jobs)
    expect_ready(client, jobs)
    with Kqueued(room, url, ["light"], ["warm"]) as daemon:
        daemon.finished(client, fresh_noop=jobs)
        return {"fresh_noop": marks.rate(marks.read(daemon.marks, "fresh_noop"))}


def fill(job: Any, count: int, *args: Any) -> None:
    """Dispatch `count` of `job` in batches."""
    for start in range(0, count, BATCH):
        dispatch_many([job.job(*args) for _ in range(min(BATCH, count - start))])


def _timed(work: Any) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
