"""Two: two daemons on one queue, against one, on the same machine: no-op inline jobs, and such that use 100 µs of CPU.

All jobs stand in the queue when the daemons start, at the same time; they write their marks into the same files, and the rate
is that of throughput.py. One and two are taken by turns, twice in a round. The scheduler places the processes, as it does for a
user: on two CPUs, two daemons and Redis are three for two places, which is why no-ops, of which Redis does a large part, need
not get faster. How much CPU each of them used for a job is in `--only costs`.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any

import marks
from bench import Bench
from kqueued import Kqueued, connect, expect_ready
from light import burn, noop
from throughput import fill


def measure(bench: Bench) -> dict[str, float]:
    if bench.broker != "redis":
        return {}
    figures = {}
    for name, job, jobs in (("noop", noop, bench.pick(60_000, 15_000)), ("burn", burn, bench.pick(20_000, 5_000))):
        rates: dict[int, list[float]] = {1: [], 2: []}
        for daemons in (1, 2, 2, 1):
            rates[daemons].append(_rate(bench, job, jobs, daemons))
        one, two = (statistics.mean(rates[daemons]) for daemons in (1, 2))
        figures |= {f"two_{name}": two, f"two_{name}_times": two / one}
    return figures


def _rate(bench: Bench, job: Any, jobs: int, daemons: int) -> float:
    name = job.registration.name
    room, url = bench.empty_queue()
    client = connect(url)
    fill(job, jobs)
    expect_ready(client, jobs)
    with ExitStack() as stack:
        first = stack.enter_context(Kqueued(room, url))
        for number in range(1, daemons):
            stack.enter_context(Kqueued(room.with_name(f"{room.name}-{number}"), url, marks_in=first.marks))
        first.finished(client, **{name: jobs})
        return marks.rate(marks.read(first.marks, name))
