"""Crowded: what Redis itself spends on a job while 1,000,000 are ready, 100,000 delayed and 10,000 dead, against an empty queue.

Two servers of its own, one of them filled. On each by turns: 200 jobs are enqueued, then 20 times 10 are reserved and
acknowledged; what counts is the time of the scripts that do this, from `INFO commandstats`. New jobs are those just enqueued,
which go before all others; old ones have stood there since the filling, and the new go behind them. Nothing of an old one is in
the processor's caches, which is the difference between the two. Medians of 40. What the commands add that touch the jobs
themselves (ZRANGE and ZREMRANGEBYRANK of the ready ones, MGET and DEL of theirs) no script could save: it is a floor under the
rest.

A hash table of Redis that has just grown is moved bit by bit by whoever uses it. After filling, it is used until that is done:
this is the price of growing, not of being large. And what the filling left in the memory of Lua is thrown away.

And the whole of it: the rate (throughput.py) at which a daemon does its first 10,000 no-ops while 1,000,000 are ready, against
one that has 10,000 only; by turns, twice in a round.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import marks
from bench import Bench
from kqueued import Failure, Kqueued
from light import noop
from redis_server import RedisServer

from kqueue.brokers.base import NewJob, Owner, Settlement
from kqueue.brokers.redis import RedisBroker
from kqueue.kernel import Kernel

CROWD = (("ready:inline", 1_000_000, 1_000_000_000), ("delayed", 100_000, 4_000_000_000), ("dead", 10_000, 1_000_000_000))
AT_ONCE = 20_000
BATCH, CALLS = 10, 20
TIMES = 40
FLOOR = ("zrange", "mget", "zremrangebyrank", "del")
ENVELOPE = b'{"v":1,"id":"%s","job":"noop","args":[],"kwargs":{},"queue":"q","lane":"inline","enqueued_at":1790000000.0}'
# KEYS: what the queue's keys begin with. ARGV: set, first number, how many, moment of the first, envelope
FILL = """
for n = ARGV[2], ARGV[2] + ARGV[3] - 1 do
  local id, at = string.format('1%025d', n), ARGV[4] + n
  redis.call('SET', KEYS[1] .. 'job:' .. id, '-inline 0 ' .. at .. '\\n' .. ARGV[5])
  redis.call('ZADD', KEYS[1] .. ARGV[1], at, id)
end
"""
TOUCH = "for n = 1, ARGV[1] do redis.call('ZSCORE', KEYS[1], 'nobody') end"  # looks into the table of keys, too
READY = """
for n = ARGV[1], ARGV[1] + ARGV[2] - 1 do
  local id = string.format('1%025d', n)
  redis.call('SET', KEYS[1] .. 'job:' .. id, '-inline 0 ' .. n .. '\\n' .. string.gsub(ARGV[3], '@', id))
  redis.call('ZADD', KEYS[1] .. 'ready:inline', n, id)
end
"""
READY_ENVELOPE = ENVELOPE.replace(b"%s", b"@").replace(b'"q"', b'"default"')
DONE = 10_000  # of those that are ready
_ids = count()


def measure_ready(bench: Bench) -> dict[str, float]:
    if bench.broker != "redis":
        return {}
    many = bench.pick(1_000_000, 100_000)
    rates: dict[int, list[float]] = {DONE: [], many: []}
    for ready in (DONE, many, many, DONE):
        rates[ready].append(_rate(bench, ready))
    few, crowded = (statistics.mean(rates[ready]) for ready in (DONE, many))
    return {"ready_noop": crowded, "ready_share": crowded / few * 100}


def _rate(bench: Bench, ready: int) -> float:
    import redis

    room, url = bench.empty_queue()
    with redis.Redis.from_url(url) as client:
        for first in range(0, ready, AT_ONCE):
            client.eval(READY, 1, "kq:{default}:", first, min(AT_ONCE, ready - first), READY_ENVELOPE)
    with Kqueued(room, url, options=["--max-jobs", str(DONE)]) as daemon:
        daemon.wait_for_exit()
        moments = marks.read(daemon.marks, noop.registration.name)
    if len(moments) != DONE:
        raise Failure(f"{len(moments)} marks for {DONE} jobs")
    return marks.rate(moments)


def measure(bench: Bench) -> dict[str, float]:
    if bench.broker != "redis":
        return {}
    room, _ = bench.empty_queue()
    with ExitStack() as stack:
        empty, full = (stack.enter_context(_Queue(room.with_name(f"{room.name}-{name}"))) for name in ("empty", "full"))
        full.fill(bench.pick(1, 10))
        samples: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        for _ in range(bench.pick(TIMES, TIMES // 10)):
            for old in (False, True):
                samples.setdefault(("empty", old), []).append(empty.cost_us(old))
                samples.setdefault(("full", old), []).append(full.cost_us(old))
        median = {key: [statistics.median(part) for part in zip(*values, strict=True)] for key, values in samples.items()}
    (empty_us, empty_floor_us), (full_us, full_floor_us) = median["empty", True], median["full", True]
    return {
        "crowded_cost": median["empty", False][0],
        "crowded_new": median["full", False][0] / median["empty", False][0],
        "crowded_old": full_us / empty_us,
        "crowded_added": full_us - empty_us,
        "crowded_floor": full_floor_us - empty_floor_us,
    }


class _Queue:
    """A server, and a broker on it."""

    def __init__(self, directory: Path) -> None:
        self._server = RedisServer(directory)
        self._kernel = Kernel()

    def __enter__(self) -> _Queue:
        import redis

        self._server.__enter__()
        self._redis: Any = redis.Redis.from_url(self._server.url)
        self._broker = RedisBroker(self._server.url)
        self._kernel.run(self._broker.open(Owner("e" * 26, ""), ["q"], 3600.0))
        return self

    def __exit__(self, *error: object) -> None:
        self._kernel.run(self._broker.close())
        self._kernel.close()
        self._redis.close()
        self._server.__exit__()

    def fill(self, part: int) -> None:
        """Put the crowd into it, or one `part`-th of it."""
        first = 0
        for name, jobs, at in CROWD:
            for start in range(first, first + jobs // part, AT_ONCE):
                size = min(AT_ONCE, first + jobs // part - start)
                self._redis.eval(FILL, 1, "kq:{q}:", name, start, size, at, ENVELOPE % (b"1" * 26))
            first += jobs // part
        for name, _, _ in CROWD:
            self._redis.eval(TOUCH, 1, f"kq:{{q}}:{name}", 2 * first)
        self._redis.script_flush()

    def cost_us(self, old: bool) -> tuple[float, float]:
        """Of one job, enqueued just before or long ago: of the scripts, and what of it they spend on the commands of FLOOR."""
        ids = [f"0{next(_ids):025}" for _ in range(BATCH * CALLS)]
        at = None if old else 1.0
        self._kernel.run(self._broker.enqueue([NewJob(id, "q", "inline", 0, ENVELOPE % id.encode(), at=at) for id in ids]))
        self._redis.config_resetstat()
        for _ in range(CALLS):
            leases = self._kernel.run(self._broker.reserve("q", {"inline": BATCH})).leases
            answers = self._kernel.run(self._broker.settle([Settlement(lease.token, "q", "ack") for lease in leases]))
            if answers != ["settled"] * BATCH:
                raise Failure(f"of {BATCH} jobs were settled: {answers}")
        spent = {name: stat["usec"] / BATCH / CALLS for name, stat in self._redis.info("commandstats").items()}
        return spent["cmdstat_evalsha"], sum(spent[f"cmdstat_{name}"] for name in FLOOR)
