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


def measure_inline(bench: Bench) -> dict[str, float]:
    singles = bench.pick(3_000, 1_000) if bench.broker == "redis" else bench.pick(1_000, 300)
    batched = bench.pick(50_000, 10_000)
    room, url = bench.empty_queue()
    client = connect(url)
    single_s = timed(lambda: [noop.dispatch() for _ in range(singles)])
    batch_s = timed(lambda: fill(noop, batched))
    expect_ready(client, singles + batched)
    with Kqueued(room, url) as daemon:
        daemon.finished(client, noop=singles + batched)
        rate = marks.rate(marks.read(daemon.marks, "noop"))
    return {"noop": rate, "dispatch_single": singles / single_s, "dispatch_batch": batched / batch_s}


def measure_forked(bench: Bench) -> dict[str, float]:
    return _rate_of(bench, forked_noop, bench.pick(1_000, 200), "forked")


def measure_pooled(bench: Bench) -> dict[str, float]:
    return _rate_of(bench, pooled_noop, bench.pick(20_000, 4_000), "warm")


def measure_exec(bench: Bench) -> dict[str, float]:
    return _rate_of(bench, fresh_noop, bench.pick(100, 20), "warm")


def _rate_of(bench: Bench, job: Any, count: int, module: str) -> dict[str, float]:
    """How many of `count` isolated jobs are done a second, from the first to the last, when all of them wait already."""
    room, url = bench.empty_queue()
    client = connect(url)
    fill(job, count)
    expect_ready(client, count)
    name = job.registration.name
    with Kqueued(room, url, ["light"], [module]) as daemon:
        daemon.finished(client, **{name: count})
        return {name: marks.rate(marks.read(daemon.marks, name))}


def fill(job: Any, count: int, *args: Any) -> None:
    """Dispatch `count` of `job` in batches."""
    for start in range(0, count, BATCH):
        dispatch_many([job.job(*args) for _ in range(min(BATCH, count - start))])


def timed(work: Any) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
