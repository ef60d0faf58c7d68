"""Start: one inline job waits in the queue; from the moment before kqueued's exec to that job's own look at the clock.

The median of three daemons a round. They import one small module and start no template: what a job needs before it can run is in
the figure, what only other jobs need is not.
"""

from __future__ import annotations

import marks
from bench import Bench
from kqueued import Kqueued, connect
from light import noop


def measure(bench: Bench) -> dict[str, float]:
    return {"start": marks.percentile(sorted(_start_s(bench) for _ in range(3)), 50) * 1000}


def _start_s(bench: Bench) -> float:
    room, url = bench.empty_queue()
    client = connect(url)
    noop.dispatch()
    with Kqueued(room, url) as daemon:
        daemon.finished(client, noop=1)
        return marks.read(daemon.marks, "noop")[0] - daemon.executed_at
