"""Twenty: 20 inline jobs that wait 1 s, dispatched at once to an idle daemon. None waits for another.

Each job marks when it starts and when it ends. The figures: the last start after the first start, and the last end after it.
"""

from __future__ import annotations

import marks
from bench import Bench
from kqueued import Kqueued, connect
from light import noop, sleeper

from kqueue import dispatch_many

JOBS = 20


def measure(bench: Bench) -> dict[str, float]:
    room, url = bench.empty_queue()
    client = connect(url)
    with Kqueued(room, url) as daemon:
        noop.dispatch()
        daemon.finished(client, noop=1)  # it is up
        dispatch_many([sleeper.job(1) for _ in range(JOBS)])
        daemon.finished(client, starts=JOBS, ends=JOBS)
        starts, ends = marks.read(daemon.marks, "starts"), marks.read(daemon.marks, "ends")
    return {"twenty_spread": (starts[-1] - starts[0]) * 1000, "twenty_total": ends[-1] - starts[0]}
