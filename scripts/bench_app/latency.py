"""Latency: one job every 25 ms to an idle daemon, from right before its dispatch to its start.

This process carries time.time() in the job as an argument; the job takes the difference when it starts, and writes that. So the
figure holds encoding and the client's round trip, too, but not the reply's way back. Inline jobs first, forked ones then, on one
daemon.
"""

from __future__ import annotations

import time
from typing import Any

import marks
from bench import Bench
from forked import forked_late, forked_noop
from kqueued import Kqueued, connect
from light import late, noop

PERIOD_S = 0.025


def measure(bench: Bench) -> dict[str, float]:
    jobs = bench.pick(300, 60)
    room, url = bench.empty_queue()
    client = connect(url)
    figures = {}
    with Kqueued(room, url, ["light"], ["forked"]) as daemon:
        noop.dispatch()
        forked_noop.dispatch()
        daemon.finished(client, noop=1, forked_noop=1)  # it is up, and so is the template
        for name, job in (("late", late), ("forked_late", forked_late)):
            _dispatch_at_a_pace(job, jobs)
            daemon.finished(client, **{name: jobs})
            delays = marks.read(daemon.marks, name)
            figures |= {f"{name}_p{percent}": marks.percentile(delays, percent) * 1000 for percent in (50, 99)}
    return figures


def _dispatch_at_a_pace(job: Any, count: int) -> None:
    due = time.monotonic()
    for _ in range(count):
        time.sleep(max(0.0, due - time.monotonic()))
        job.dispatch(time.time())
        due += PERIOD_S
