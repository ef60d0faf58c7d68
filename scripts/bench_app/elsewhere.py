"""Round trips out of an inline job: `offload(abs, -1)` in the pool, and `kqueue.io.run(["true"])`, one after another in one job.

From the line that asks to the line that has the answer.
"""

from __future__ import annotations

import marks
from bench import Bench
from calls import offloads, runs
from kqueued import Kqueued, connect


def measure(bench: Bench) -> dict[str, float]:
    calls, programs = bench.pick(3_000, 300), bench.pick(300, 60)
    room, url = bench.empty_queue()
    client = connect(url)
    figures = {}
    with Kqueued(room, url, ["light", "calls"]) as daemon:
        for name, job, count in (("offload", offloads, calls), ("program", runs, programs)):
            job.dispatch(count)
            daemon.finished(client, **{name: count})
            took = marks.read(daemon.marks, name)
            figures |= {f"{name}_p{percent}": marks.percentile(took, percent) * 1000 for percent in (50, 99)}
    return figures
