"""Costs: how the cost of a no-op job grows with what a queue is used for: `scripts/bench --only costs [--markdown]`.

Each row is what spending.py finds for one way to use KQueue: jobs a second, and the CPU of the daemons, of Redis and of the
client for a job. Then a model of what one Redis carries, from the constants of the same run, and its check against two daemons.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pages
import redis_costs
from bench import Bench
from kqueued import LOOK_S, PATIENCE_S, Failure
from light import noop, sized
from pages import Page, Table, number
from redis_server import RedisServer
from spending import Spent, spend

from kqueue import dispatch_many

FILE = "performance-costs.md"
COMMAND = "./scripts/bench --only costs --markdown"
HEAD = ("jobs/s", "daemon, µs", "Redis, µs", "client, µs")
SIZES = (
    ("100 B", 100, 5_000), ("1 KB", 1_000, 5_000), ("10 KB", 10_000, 2_000), ("100 KB", 100_000, 400), ("1 MB", 1_000_000, 60),
)  # fmt: skip
LARGE = "limits: {envelope: 2MiB}"
OWN_US = (0, 100, 1_000, 10_000)  # CPU of the job itself
AT_ONCE = (1, 10, 50, 200)
Row = tuple[str, str]  # title of the table, label


def run(bench: Bench, conditions: Mapping[str, str], rounds: int, markdown: bool) -> None:
    redis = bench.redis
    assert redis is not None
    taken, noise = pages.rounds_of(rounds, lambda: dict(_round(bench)))
    carried = [redis_costs.measure(redis, at_once, bench.pick(10_000, 2_000)) for at_once in AT_ONCE]
    spent = {row: Spent(*pages.medians([each[row] for each in taken])) for row in taken[0]}
    found = [*tables(spent), *model(spent, [cost.all_us for cost in carried])]
    pages.show(Page(FILE, COMMAND, found), conditions, noise, markdown)


def _round(bench: Bench) -> Iterator[tuple[Row, Spent]]:
    jobs = bench.pick(10_000, 1_000)
    for queues in (1, 10, 100):
        names = [f"q{number}" for number in range(queues)]
        listed = ", names: {" + ", ".join(f"{name}: 1" for name in names) + "}"
        spent = spend(bench, noop, jobs, queue=listed, send=_sender([noop.options(queue=name) for name in names]))
        yield ("Queues", f"{queues} queue{'s' * (queues > 1)}"), spent
    for levels in (1, 10):
        spent = spend(bench, noop, jobs, send=_sender([noop.options(priority=level) for level in range(levels)]))
        yield ("Priorities", f"{levels} level{'s' * (levels > 1)}"), spent
    for label, size, count in SIZES:
        yield ("Size of the arguments", label), spend(bench, sized, bench.pick(count, count // 5), ["x" * size], more=LARGE)
    for daemons in (1, 2):
        yield ("Daemons", f"{daemons} daemon{'s' * (daemons > 1)}"), spend(bench, noop, 2 * jobs, daemons=daemons)
    for label, other in _servers(bench):
        with other as (beside, query):
            spent = spend(beside, noop, jobs, url=lambda url, query=query: url + query)
            yield ("Guarantees", label), spent
    with _key(bench) as more:
        yield ("Guarantees", "Redis, jobs are signed"), spend(bench, noop, jobs, more=more)
    yield ("Guarantees", "Redis, results are kept"), spend(bench, noop, jobs, send=_sender([noop.options(keep_result=60.0)]))


def _sender(kinds: Sequence[Any]) -> Any:
    """Enqueues jobs of each kind in turn."""

    def send(count: int) -> None:
        for start in range(0, count, 1_000):
            dispatch_many([kinds[number % len(kinds)].job() for number in range(start, min(start + 1_000, count))])

    return send


def _servers(bench: Bench) -> Iterator[tuple[str, Any]]:
    for persistence in ("none", "everysec", "always"):
        label = "Redis without persistence" if persistence == "none" else f"Redis, appendfsync {persistence}"
        yield label, _server(bench, persistence, replica=False)
    yield "Redis, sync_replicas 1, with one replica", _server(bench, "none", replica=True)
    yield "SQLite, synchronous=FULL", _sqlite(bench)


@contextmanager
def _server(bench: Bench, persistence: str, replica: bool) -> Iterator[tuple[Bench, str]]:
    """A Redis, and what to add to its URL."""
    room, _ = bench.empty_queue()
    with RedisServer(room, persistence, ["--repl-diskless-sync-delay", "0"]) as server:
        if not replica:
            yield bench.beside(server), ""
            return
        with RedisServer(room.with_name(f"{room.name}-replica"), options=["--replicaof", f"127.0.0.1 {server.port}"]):
            _wait_for_replica(server)
            yield bench.beside(server), "?sync_replicas=1"


def _wait_for_replica(server: RedisServer) -> None:
    import redis

    deadline = time.monotonic() + PATIENCE_S
    with redis.Redis.from_url(server.url) as client:
        while dict(client.info("replication")).get("slave0", {}).get("state") != "online":
            if time.monotonic() > deadline:
                raise Failure("the replica did not come up")
            time.sleep(LOOK_S)


@contextmanager
def _sqlite(bench: Bench) -> Iterator[tuple[Bench, str]]:
    yield bench.beside(None), ""


@contextmanager
def _key(bench: Bench) -> Iterator[str]:
    """A key that this process signs with, and the configuration of a daemon that wants that."""
    room, _ = bench.empty_queue()
    file = room.with_name(f"{room.name}.key")
    file.touch(0o600)
    file.write_text(os.urandom(32).hex() + "\n")
    os.environ["KQUEUE_SIGNING_KEY_FILE"] = str(file)
    try:
        yield f"security: {{signing_key_file: {file}}}"
    finally:
        del os.environ["KQUEUE_SIGNING_KEY_FILE"]


# -- the page ---------------------------------------------------------------------------------------------------------------


def tables(spent: Mapping[Row, Spent]) -> list[Table]:
    found = []
    for title in dict.fromkeys(title for title, _ in spent):
        rows = [
            [label, *map(number, (each.rate, each.daemon_us, each.redis_us, each.client_us))]
            for (of, label), each in spent.items()
            if of == title
        ]
        head: Sequence[str] = HEAD
        if title == "Size of the arguments":
            head = (*HEAD, "MB/s")
            sizes = {label: size for label, size, _ in SIZES}
            rows = [[*row, number(spent[title, row[0]].rate * sizes[row[0]] / 1e6)] for row in rows]
        found.append(Table(title, head, rows))
    return found


def model(spent: Mapping[Row, Spent], redis_us: Sequence[float]) -> list[Table]:
    """`redis_us`: all that Redis spends on a job, by AT_ONCE."""
    one, two = (spent["Daemons", label] for label in ("1 daemon", "2 daemons"))
    by_size = [
        [f"{at_once} at once", number(us), number(1e6 / us), number(one.daemon_us / us)]
        for at_once, us in zip(AT_ONCE, redis_us, strict=True)
    ]
    by_job = [
        [f"{own:,} µs", number(1e6 / (one.daemon_us + own)), number((one.daemon_us + own) / redis_us[-1])] for own in OWN_US
    ]
    cpus = os.cpu_count() or 1
    bounds = (2e6 / one.daemon_us, 1e6 / one.redis_us, cpus * 1e6 / (one.daemon_us + one.redis_us))
    check = [["two daemons on this machine", *map(number, bounds), number(min(bounds)), number(two.rate)]]
    return [
        Table(
            "What one Redis carries",
            ["Redis, µs a job", "jobs/s it carries", "daemons of no-ops that it feeds"], by_size,
            "Redis runs scripts on one CPU. R is what it spends on a job to enqueue, reserve and settle it, D what a daemon "
            f"spends on a job that does nothing ({number(one.daemon_us)} µs), J the CPU of the job itself. One Redis carries "
            "1,000,000 / R jobs a second, a daemon 1,000,000 / (D+J); so it feeds (D+J) / R daemons, each with its own CPU.",
        ),
        Table(
            f"Daemons that one Redis feeds, {AT_ONCE[-1]} jobs at once", ["jobs/s of a daemon", "daemons"], by_job,
            "By J. A host has as many daemons as it has CPUs for them; jobs that wait, inline, use none.",
        ),
        Table(
            "The model and this machine",
            ["two daemons could", "Redis could", f"{cpus} CPUs could", "so at most", "measured"], check,
            "Jobs that stand in the queue already, so that R is without the enqueueing: 2,000,000 / D, 1,000,000 / R, and the "
            "CPUs shared by all, CPUs times 1,000,000 / (D+R); the least is the bound. D and R of one daemon.",
        ),
    ]  # fmt: skip
