"""Latency: one job every 25 ms to an idle daemon, from right before its dispatch to its start.

This process carries time.time() in the job as an argument; the job takes the difference when it starts, and writes that. So the
figure holds encoding and the client's way to the broker, too, but not the reply's way back. Inline jobs first, forked ones then,
those of the pool last, on one daemon.

After 25 ms of idleness, a shared machine has given the caches to somebody else, and the same code runs several times slower. The
inline figure is therefore taken once more with a job every 2 ms: the difference is the machine's, not KQueue's.
"""

from __future__ import annotations

import time
from typing import Any

import marks
from bench import Bench
from forked import forked_late, forked_noop
from kqueued import Kqueued, connect
from light import late, noop, warm_late
from warm import pooled_late, pooled_noop

PERIOD_S = 0.025
WARM_PERIOD_S = 0.002


def measure(bench: Bench) -> dict[str, float]:
    jobs = bench.pick(300, 60)
    room, url = bench.empty_queue()
    client = connect(url)
    figures = {}
    with Kqueued(room, url, ["light"], ["forked", "warm"]) as daemon:
        noop.dispatch()
        forked_noop.dispatch()
        pooled_noop.dispatch()
        daemon.finished(client, noop=1, forked_noop=1, pooled_noop=1)  # it is up, and so are the template and the pool
        for name, job, period_s in (
            ("late", late, PERIOD_S), ("warm_late", warm_late, WARM_PERIOD_S), ("forked_late", forked_late, PERIOD_S),
            ("pooled_late", pooled_late, PERIOD_S),
        ):  # fmt: skip
            dispatch_at_a_pace(job, jobs, period_s)
            daemon.finished(client, **{name: jobs})
            delays = marks.read(daemon.marks, name)
            figures |= {f"{name}_p{percent}": marks.percentile(delays, percent) * 1000 for percent in (50, 99)}
    return figures


def dispatch_at_a_pace(job: Any, count: int, period_s: float) -> None:
    due = time.monotonic()
    for _ in range(count):
        time.sleep(max(0.0, due - time.monotonic()))
        job.dispatch(time.time())
        due = max(due + period_s, time.monotonic())
