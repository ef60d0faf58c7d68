"""Start: one inline job waits in the queue; from the moment before kqueued's exec to that job's own look at the clock.

The median of three daemons a round, which import one small module; and of three that have an isolated module as well, and so
start a template.
"""

from __future__ import annotations

from collections.abc import Sequence

import marks
from bench import Bench
from kqueued import Kqueued, connect
from light import noop


def measure(bench: Bench) -> dict[str, float]:
    return {"start": _median_ms(bench, []), "start_template": _median_ms(bench, ["forked"])}


def _median_ms(bench: Bench, isolated_modules: Sequence[str]) -> float:
    return marks.percentile(sorted(_start_s(bench, isolated_modules) for _ in range(3)), 50) * 1000


def _start_s(bench: Bench, isolated_modules: Sequence[str]) -> float:
    room, url = bench.empty_queue()
    client = connect(url)
    noop.dispatch()
    with Kqueued(room, url, ["light"], isolated_modules) as daemon:
        daemon.finished(client, noop=1)
        return marks.read(daemon.marks, "noop")[0] - daemon.executed_at
