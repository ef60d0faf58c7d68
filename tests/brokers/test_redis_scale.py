"""No verb's cost grows with what stands in a queue: it runs the same commands, and they take as long (figures: scripts/bench)."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from kqueue.brokers.base import SETTLED, Counters, Lease, NewJob, Settlement
from kqueue.brokers.commands import redis as commands
from kqueue.client.redis import RedisClient

from .conftest import RedisRig, new_job, only
from .test_redis import ask

READY, DELAYED, DEAD = 100_000, 20_000, 5_000
BATCH, ROUNDS = 20, 15
# KEYS: what the queue's keys begin with. ARGV: set, first number, how many, first moment
FILL = """
for n = tonumber(ARGV[2]), ARGV[2] + ARGV[3] - 1 do
  local id, at = string.format('1%025d', n), ARGV[4] + n
  redis.call('SET', KEYS[1] .. 'job:' .. id, '-inline 0 ' .. at .. '\\n' .. string.rep('x', 150))
  redis.call('ZADD', KEYS[1] .. ARGV[1], at, id)
end
"""

rig = only(RedisRig)


class Cost:
    """What `full` and `empty` queues cost: for each step the commands that were run, and µs of the scripts' own time."""

    def __init__(self, rig: RedisRig) -> None:
        self.rig = rig
        self.commands: dict[tuple[str, str], dict[str, int]] = {}
        self.usec: dict[tuple[str, str], list[int]] = {}

    def of(self, queue: str, step: str, verb: Any) -> Any:
        self.rig.server.command("CONFIG", "RESETSTAT")
        result = verb() if callable(verb) else self.rig.do(verb)
        info: Any = self.rig.server.command("INFO", "commandstats")
        self.usec.setdefault((queue, step), []).append(info["cmdstat_evalsha"]["usec"])
        calls = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in info.items()}
        self.commands[queue, step] = {name: n for name, n in calls.items() if name not in ("config|resetstat", "info")}
        return result


def test_no_verb_costs_more_when_a_queue_is_full(rig: RedisRig) -> None:
    for kind, first, count, at in (("ready:inline", 0, READY, 1e9), ("delayed", READY, DELAYED, 4e9), ("dead", 10**6, DEAD, 1e9)):
        for start in range(first, first + count, 10_000):
            size = min(10_000, first + count - start)
            rig.server.command("EVAL", FILL, 1, "kq:{full}:", kind, start, size, int(at))
    rig.make_client().enqueue([new_job("later", queue="empty", delay_s=1e6)])  # what nothing at all costs is another path
    brokers = {queue: rig.broker(queues=(queue,), lease_s=1e6) for queue in ("empty", "full")}
    client: RedisClient = rig.make_client()  # type: ignore[assignment]
    cost, numbers = Cost(rig), itertools.count()

    def jobs(queue: str) -> list[NewJob]:
        return [new_job(f"0{next(numbers):025}", queue=queue, at=1.0) for _ in range(BATCH)]

    def settlements(leases: list[Lease], verb: str) -> list[Settlement]:
        how: dict[str, Any] = {"delay_s": 1e7, "counters": Counters(1), "certificate": b"{}"} if verb != "ack" else {}
        return [Settlement(lease.token, lease.queue, verb, **how) for lease in leases]

    for _ in range(ROUNDS):
        for queue, broker in brokers.items():
            for verb in ("ack", "release", "bury"):
                cost.of(queue, "enqueue", broker.enqueue(jobs(queue)))
                leases = cost.of(queue, "reserve", broker.reserve(queue, {"inline": BATCH})).leases
                assert len(leases) == BATCH
                cost.of(queue, "hold", broker.settle(settlements(leases, "hold")))
                assert set(cost.of(queue, verb, broker.settle(settlements(leases, verb)))) == {SETTLED}
            dead = [lease.token.id for lease in leases]
            cost.of(queue, "retry", lambda queue=queue, dead=dead: ask(client, commands.retry(queue, dead)))
            for step in ("renew", "sweep", "stats"):
                cost.of(queue, step, getattr(broker, step)())

    steps = {step for _, step in cost.usec}
    assert steps == {"enqueue", "reserve", "hold", "ack", "release", "bury", "retry", "renew", "sweep", "stats"}
    for step in steps:
        assert cost.commands["full", step] == cost.commands["empty", step], step
        full, empty = (statistics.median(cost.usec[queue, step]) for queue in ("full", "empty"))
        assert full < 2 * empty + 50, f"{step}: {full} µs for {BATCH} jobs in the full queue, {empty} µs in the empty one"
