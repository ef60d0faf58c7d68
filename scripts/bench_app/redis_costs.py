"""What Redis spends on a job, by how many come at once: the CPU of the whole server, and that of the scripts alone.

A broker of the daemon's own kind enqueues some thousand jobs, reserves and acknowledges them, so many at a time as asked for;
after each of the three the server's CPU time is read. It holds the socket, the parser and the script; `INFO commandstats` has
the script's part. Nobody else is connected, and no job runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import procfs
from redis_server import RedisServer

from kqueue.brokers.base import NewJob, Owner, Settlement
from kqueue.brokers.redis import RedisBroker
from kqueue.kernel import Kernel

ENVELOPE = b'{"v":1,"id":"%s","job":"noop","args":[],"kwargs":{},"queue":"q","lane":"inline","enqueued_at":1790000000.0}'
_ids = count()


class RedisCost(NamedTuple):
    """Microseconds a job."""

    enqueue_us: float
    reserve_us: float
    settle_us: float
    enqueue_script_us: float
    reserve_script_us: float
    settle_script_us: float

    @property
    def all_us(self) -> float:
        return self.enqueue_us + self.reserve_us + self.settle_us


def measure(server: RedisServer, at_once: int, jobs: int) -> RedisCost:
    import redis

    server.flush()
    asks: Any = redis.Redis.from_url(server.url)
    kernel = Kernel()
    broker = RedisBroker(server.url)
    kernel.run(broker.open(Owner("e" * 26, ""), ["q"], 3600.0))
    ids = [f"0{next(_ids):025}" for _ in range(jobs)]
    leases: list[Any] = []

    def enqueue() -> None:
        for part in _parts(ids, at_once):
            kernel.run(broker.enqueue([NewJob(id, "q", "inline", 0, ENVELOPE % id.encode()) for id in part]))

    def reserve() -> None:
        while len(leases) < jobs:
            leases.extend(kernel.run(broker.reserve("q", {"inline": at_once})).leases)

    def settle() -> None:
        for part in _parts(leases, at_once):
            kernel.run(broker.settle([Settlement(lease.token, "q", "ack") for lease in part]))

    try:
        whole, scripts = [], []
        for step in (enqueue, reserve, settle):
            asks.config_resetstat()
            cpu_s = procfs.cpu_s(server.pid)
            step()
            whole.append((procfs.cpu_s(server.pid) - cpu_s) * 1e6 / jobs)
            scripts.append(asks.info("commandstats")["cmdstat_evalsha"]["usec"] / jobs)
        return RedisCost(*whole, *scripts)
    finally:
        kernel.run(broker.close())
        kernel.close()
        asks.close()


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
