"""What is measured, in which unit, and what it must reach. A figure that a measurement returns stands here, or the run fails.

The targets are those of the issues that were built. A figure without one is there to be watched. To tighten a target,
change its line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

BROKERS = ("redis", "sqlite")


class Figure(NamedTuple):
    key: str
    label: str
    unit: str
    target: float | Mapping[str, float] | None = None  # a mapping: by broker; None: there is none
    more: bool = False  # True: the target is a minimum; False: a maximum

    def target_on(self, broker: str) -> float | None:
        return self.target.get(broker) if isinstance(self.target, Mapping) else self.target

    def reached(self, broker: str, value: float) -> bool | None:
        """None: there is no target."""
        target = self.target_on(broker)
        if target is None:
            return None
        return value >= target if self.more else value <= target


FIGURES: Sequence[Figure] = (
    # idle.py
    Figure("idle_pss", "idle: supervisor, memory (PSS)", "MiB", {"redis": 18}),
    Figure("idle_anonymous", "idle: supervisor, anonymous part of it", "MiB"),
    Figure("idle_resident", "idle: supervisor, RSS (PSS if no other Python ran)", "MiB"),
    Figure("idle_tree_pss", "idle: supervisor and template (PSS)", "MiB", 30),
    Figure("idle_cpu", "idle: supervisor, CPU in 5 s", "ms", 10),
    Figure("idle_wakeups", "idle: supervisor, wake-ups", "/s", 1),
    Figure("heavy_growth", "idle: growth of it by a heavy isolated module", "MiB", 0.25),
    Figure("heavy_tree_pss", "idle: whole tree with that module (PSS)", "MiB"),
    # starting.py
    Figure("start", "start of kqueued to its first job", "ms", 200),
    Figure("start_template", "the same, with a template to start", "ms", 300),
    # twenty.py
    Figure("twenty_spread", "20 jobs of 1 s: last start after the first", "ms", 50),
    Figure("twenty_total", "20 jobs of 1 s: all done after", "s", 1.1),
    # latency.py
    Figure("late_p50", "dispatch to start, inline, p50", "ms", 0.5),
    Figure("late_p99", "dispatch to start, inline, p99", "ms", 2),
    Figure("warm_late_p50", "the same with one every 2 ms, p50", "ms"),
    Figure("warm_late_p99", "the same with one every 2 ms, p99", "ms"),
    Figure("forked_late_p50", "dispatch to start, fork, p50", "ms", 4),
    Figure("forked_late_p99", "dispatch to start, fork, p99", "ms", 10),
    Figure("pooled_late_p50", "dispatch to start, pool, p50", "ms", 1),
    Figure("pooled_late_p99", "dispatch to start, pool, p99", "ms", 3),
    # throughput.py
    Figure("noop", "no-op inline jobs", "/s", {"redis": 25_000, "sqlite": 15_000}, more=True),
    Figure("forked_noop", "no-op forked jobs", "/s", 400, more=True),
    Figure("pooled_noop", "no-op jobs in the pool", "/s", 8_000, more=True),
    Figure("fresh_noop", "no-op Python jobs by exec", "/s"),
    Figure("dispatch_single", "dispatch, one at a time", "/s"),
    Figure("dispatch_batch", "dispatch, in batches of 1,000", "/s", 40_000, more=True),
    # elsewhere.py
    Figure("offload_p50", "an offloaded call, there and back, p50", "ms"),
    Figure("offload_p99", "an offloaded call, there and back, p99", "ms"),
    Figure("program_p50", "kqueue.io.run of `true`, p50", "ms"),
    Figure("program_p99", "kqueue.io.run of `true`, p99", "ms"),
    # parked.py
    Figure("sleepers_1000", "1,000 jobs that wait 1 s: done after", "s"),
    Figure("sleepers_10000", "10,000 jobs that wait 1 s: done after", "s", 1.6),
    Figure("parked_memory", "memory of a parked job (of 10,000)", "KiB", 4),
    # lasting.py
    Figure("lasting_growth", "supervisor: growth from 20,000 to 100,000 isolated jobs", "MiB", 0.5),
    # http_jobs.py
    Figure("http", "5,000 HTTP requests of 100 ms in flight", "/s", 2_000, more=True),
    Figure("http_memory", "memory of the daemon meanwhile (RSS)", "MiB", 60),
    Figure("http_lag", "lag of its loop meanwhile, p99", "ms", 20),
    # connections.py
    Figure("tls_memory", "2,000 TLS connections at once: memory of one", "KiB"),
    Figure("tls_rate", "opened, with the server on the same machine", "/s"),
    Figure("requests", "100,000 HTTP requests, and no file left open", "/s"),
    # lag.py
    Figure("lag_p99", "loop lag, 10,000 parked and 2,000 jobs/s coming, p99", "ms", 10),
    Figure("lag_late_p50", "dispatch of 20 to start of each, meanwhile, p50", "ms"),
    Figure("lag_late_p99", "dispatch of 20 to start of each, meanwhile, p99", "ms"),
    Figure("lag_looked_p99", "the same while asked for a status every 1.5 s, p99", "ms"),
    Figure("lag_largest", "the largest of all", "ms"),
    # two.py
    Figure("two_noop", "no-op inline jobs, two daemons on one Redis", "/s"),
    Figure("two_noop_times", "that is, times those of one daemon", "x", 0.8, more=True),
    Figure("two_burn", "jobs of 100 µs CPU, two daemons on one Redis", "/s"),
    Figure("two_burn_times", "that is, times those of one daemon", "x", 1.5, more=True),
    # distant.py
    Figure("near_noop", "no-op inline jobs through a proxy", "/s"),
    Figure("distant_noop", "the same, which delays each direction by 1 ms", "/s"),
    Figure("distant_share", "that is, of the rate without the delay", "%", 80, more=True),
    Figure("distant_round_trip", "round trip to Redis then, p50", "ms"),
    Figure("distant_proxy", "the proxy's share of a CPU, at most", "%"),
    # crowded.py
    Figure("ready_noop", "no-op inline jobs while 1,000,000 are ready", "/s"),
    Figure("ready_share", "that is, of the rate while 10,000 are", "%", 80, more=True),
    Figure("crowded_cost", "Redis' own time to reserve and acknowledge a job", "µs"),
    Figure("crowded_new", "the same of new jobs, 1,110,000 others there: times", "x", 1.2),
    Figure("crowded_old", "the same of jobs that stood there since long: times", "x", 1.2),
    Figure("crowded_added", "that is, in microseconds more", "µs"),
    Figure("crowded_floor", "of these for commands on the jobs' own data", "µs"),
)
BY_KEY = {figure.key: figure for figure in FIGURES}
