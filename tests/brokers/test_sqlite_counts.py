"""How many jobs stand where in an SQLite file: without counting them, and right even when somebody with a shell moved some."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from kqueue.brokers.base import QueueStats, Retention, Settlement
from kqueue.brokers.commands import sqlite_transaction
from kqueue.errors import QueueFull

from .conftest import SQLiteRig, new_job, only

rig = only(SQLiteRig)


def insert(rig: SQLiteRig, rows: int, state: str, queue: str = "q", at: float = 1.0) -> None:
    """What somebody with a shell does, who counts nothing."""
    with closing(sqlite3.connect(rig.path, isolation_level=None)) as db:
        db.execute("BEGIN")
        db.executemany(
            "INSERT INTO kq_job (id, queue, state, place, available_at, died_at, envelope) VALUES (?, ?, ?, ?, ?, ?, x'7b7d')",
            ((f"{queue}-{state}-{n:07}", queue, state, at, at, at) for n in range(rows)),
        )
        db.execute("COMMIT")


def truth(rig: SQLiteRig) -> dict[str, QueueStats]:
    counts: dict[str, QueueStats] = {}
    for queue, state, n in rig.sql("SELECT queue, state, count(*) FROM kq_job WHERE state <> 'done' GROUP BY queue, state"):
        counts[queue] = counts.get(queue, QueueStats())._replace(**{state: n})
    return counts


def steps(broker: Any, work: Callable[[], object]) -> int:
    """How many instructions SQLite's machine runs for `work`."""
    taken = 0

    def tick() -> int:
        nonlocal taken
        taken += 1
        return 0

    broker._file._db.set_progress_handler(tick, 1)
    work()
    broker._file._db.set_progress_handler(None, 1)
    return taken


def test_no_verb_costs_more_because_there_is_more(rig: SQLiteRig) -> None:
    broker = rig.broker(retention=Retention(max_age_s=1e9, max_count=1_000_000))
    verbs: dict[str, Callable[[], object]] = {
        "enqueue": lambda: rig.do(broker.enqueue([new_job(at=0.5) for _ in range(10)], max_depth=10_000_000)),
        "a run": lambda: [
            rig.do(broker.settle([Settlement(lease.token, "q", verb)]))
            for verb in ("hold", "release", "ack")
            for lease in rig.do(broker.reserve("q", {"inline": 10})).leases
        ],
        "renew": lambda: rig.do(broker.renew()),
        "stats": lambda: rig.do(broker.stats()),
    }

    def cost() -> dict[str, int]:
        insert(rig, 40, "ready"), insert(rig, 1, "delayed", at=9e9), insert(rig, 1, "dead", at=rig.now)
        rig.do(broker.sweep())
        for work in verbs.values():
            work()  # once, so that both have found every statement prepared
        taken = {name: steps(broker, work) for name, work in verbs.items()}
        rig.sql("DELETE FROM kq_job")
        return taken

    small = cost()
    insert(rig, 200_000, "ready", queue="q", at=2.0)
    rig.sql("UPDATE kq_job SET id = 'x' || id")  # out of the way of the others' names
    insert(rig, 20_000, "delayed", at=8e9)
    insert(rig, 5_000, "dead", at=rig.now)
    rig.sql("UPDATE kq_job SET id = 'y' || id WHERE id GLOB 'q*'")
    large = cost()
    assert small["stats"] > 0
    assert {name: large[name] for name in verbs if large[name] > 1.2 * small[name]} == {}


@pytest.mark.parametrize("rows", [7, 30_000])
def test_what_somebody_with_a_shell_did_is_counted_by_the_next_sweep(rig: SQLiteRig, rows: int) -> None:
    broker, client = rig.broker(), rig.make_client()
    insert(rig, rows, "ready")
    insert(rig, 3, "delayed", "r", at=9e9)
    insert(rig, 2, "dead", "s", at=rig.now)
    rig.do(broker.sweep())
    assert client.stats() == truth(rig) == {"q": QueueStats(rows), "r": QueueStats(delayed=3), "s": QueueStats(dead=2)}
    rig.do(broker.reserve("q", {"inline": 5}))
    rig.sql("DELETE FROM kq_job WHERE state = 'leased' AND id GLOB '*[01]'")
    rig.sql("DELETE FROM kq_job WHERE queue = 'r'")
    rig.sql("UPDATE kq_job SET state = 'ready' WHERE queue = 's'")
    rig.do(broker.sweep())
    assert client.stats() == truth(rig) == {"q": QueueStats(rows - 5, leased=3), "s": QueueStats(ready=2)}
    assert rig.sql("SELECT count(*) FROM kq_count WHERE n = 0") == [(0,)]


def test_a_large_count_that_is_wrong_is_found_when_it_shrinks(rig: SQLiteRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    insert(rig, 6_000, "ready")
    rig.do(broker.sweep())
    rig.sql("DELETE FROM kq_job WHERE id GLOB '*9'")
    rig.do(broker.sweep())
    assert client.stats()["q"].ready == 6_000, "both are large"
    while len(rig.do(broker.reserve("q", {"inline": 500})).leases) == 500:
        rig.do(broker.sweep())
    assert client.stats() == truth(rig) == {"q": QueueStats(leased=5_400)}


def test_retention_drops_nothing_because_of_a_wrong_count(rig: SQLiteRig) -> None:
    broker, client = rig.broker(retention=Retention(max_count=3)), rig.make_client()
    insert(rig, 700, "dead", at=rig.now)
    rig.do(rig.broker().sweep())
    assert client.stats()["q"].dead == 700
    rig.sql("DELETE FROM kq_job WHERE id < 'q-dead-0000696'")
    assert rig.do(broker.sweep()).forgotten == {"q": 1}
    assert {row.id[-3:] for row in client.list("dead", None, 9)} == {"697", "698", "699"}
    assert client.stats()["q"].dead == 3


@pytest.mark.parametrize("garbage", [None, "", "garbage", -5, 2**63 - 1, 1.5, b"\xff"])
def test_a_count_that_is_none_is_counted_anew(rig: SQLiteRig, garbage: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    client.enqueue([new_job(), new_job()])
    rig.sql("UPDATE kq_count SET n = ?", garbage)
    assert client.stats().keys() <= {"q"}
    client.enqueue([new_job()], max_depth=2**62) if garbage != 2**63 - 1 else client.enqueue([new_job()])
    rig.do(broker.sweep())
    assert client.stats() == {"q": QueueStats(ready=3)}
    rig.sql("DELETE FROM kq_count")
    rig.do(broker.sweep())
    assert client.stats() == {"q": QueueStats(ready=3)}


@pytest.mark.parametrize("queue", [None, b"q", "caf\u00e9", ""])
def test_jobs_of_queues_with_strange_names_are_counted(rig: SQLiteRig, queue: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.sql("INSERT INTO kq_job (id, queue, state, epoch) VALUES ('a', ?1, 'leased', 'gone'), ('b', ?1, 'dead', '')", queue)
    rig.do(broker.sweep())
    buried = queue is None or isinstance(queue, bytes)
    name = "" if buried else queue
    assert client.stats() == {name: QueueStats(dead=2) if buried else QueueStats(ready=1, dead=1)}


def test_the_depth_that_a_transaction_has_not_written_yet_counts(rig: SQLiteRig) -> None:
    client = rig.make_client()

    def twice(tx: sqlite_transaction.Transaction) -> None:
        from kqueue.brokers.commands import sqlite as commands

        commands.enqueue(tx, [new_job(), new_job(delay_s=5)], max_depth=2)
        commands.enqueue(tx, [new_job()], max_depth=2)

    with pytest.raises(QueueFull, match="'q' holds 2 jobs, allowed are 2"):
        client._file.write(twice)
    assert client.stats() == {}
