"""What the SQLite broker promises among others: strangers who write into its file, more daemons, forks, and kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kqueue.brokers.base import SETTLED, STALE, Counters, Owner, Retention, Settlement
from kqueue.brokers.commands import sqlite as commands
from kqueue.brokers.sqlite import SQLiteBroker
from kqueue.client.sqlite import SQLiteClient
from kqueue.ids import new_id
from kqueue.kernel import Kernel, join

from .conftest import SQLiteRig, new_job, only

rig = only(SQLiteRig)


def reserve(rig: SQLiteRig, broker: Any) -> dict[str, Any]:
    return {lease.token.id: lease for lease in rig.do(broker.reserve("q", {"inline": 100, "isolated": 100})).leases}


# -- strangers ----------------------------------------------------------------------------------------------------------

ANYTHING = [None, "", "garbage", 7, -1.5, 2**63 - 1, 9e999, b"", b"\xff\x00", "caf\u00e9"]
COLUMNS = [
    "queue", "lane", "state", "priority", "place", "available_at", "attempts", "crashes", "recoveries", "deferrals", "number",
    "epoch", "expires_at", "envelope", "result",
]  # fmt: skip


@pytest.mark.parametrize("state", ["ready", "delayed", "leased", "done", "dead"])
@pytest.mark.parametrize("column", COLUMNS)
def test_garbage_in_any_column_hides_nothing_and_breaks_no_verb(rig: SQLiteRig, column: str, state: str) -> None:
    broker, client = rig.broker(), rig.make_client()
    with closing(sqlite3.connect(rig.path, isolation_level=None)) as shell:
        for n, garbage in enumerate(ANYTHING):
            shell.execute("INSERT INTO kq_job (id, queue, state, epoch) VALUES (?, 'q', ?, 'gone')", (f"bad{n}", state))
            shell.execute(f"UPDATE kq_job SET {column} = ? WHERE id = ?", (garbage, f"bad{n}"))
    rig.do(broker.enqueue([new_job("good"), new_job("later", delay_s=50)]))
    leases = reserve(rig, broker)
    assert "good" in leases
    rig.do(broker.sweep())
    leases |= reserve(rig, broker)
    rows = {row.id: row for row in client.list(None, None, 100) + client.list("done", None, 100)}
    for n in range(len(ANYTHING)):
        row = rows.get(f"bad{n}")
        if row is None:
            assert (state, column) == ("done", "expires_at"), "a time that has passed"
            continue
        assert row.id in leases or row.state in ("done", "dead") or row.queue != "q", f"no verb will ever find {row}"
        assert client.show(row.id) is not None
    assert rig.do(broker.stats()) == client.stats()
    for verb in ("release", "bury"):
        batch = [Settlement(lease.token, "q", verb, lease.counters, certificate=b"{}") for lease in leases.values()]
        assert set(rig.do(broker.settle(batch))) == {SETTLED}
        leases = reserve(rig, broker)
    assert client.cancel("later", b"{}")


@pytest.mark.parametrize(
    ("change", "value"),
    [("state", "eaten"), ("state", None), ("lane", "fast"), ("queue", None), ("queue", b"q"), ("available_at", "soon")],
)
def test_what_no_verb_would_find_is_buried_with_the_reason(rig: SQLiteRig, change: str, value: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    client.enqueue([new_job("a", delay_s=50)])
    rig.sql(f"UPDATE kq_job SET {change} = ?", value)
    rig.do(broker.sweep())
    row = client.show("a")
    assert row is not None
    assert (row.state, row.envelope) == ("dead", new_job("a").envelope)
    certificate = json.loads(row.certificates[0])
    assert (certificate["cause"], certificate["ended_by"], certificate["ended_at"]) == ("refused", "supervisor", rig.now)
    assert "the store held what no job can be" in certificate["error"]["message"]


def test_an_envelope_is_handed_out_as_it_is_and_counters_as_numbers(rig: SQLiteRig) -> None:
    broker = rig.broker()
    rig.sql("INSERT INTO kq_job (id, envelope) VALUES ('text', 'caf\u00e9'), ('none', NULL), ('bytes', x'ff00')")
    rig.sql("UPDATE kq_job SET queue = 'q', attempts = 'many', crashes = 2, recoveries = 1.5, number = 9223372036854775807")
    leases = reserve(rig, broker)
    envelopes = {id: lease.envelope for id, lease in leases.items()}
    assert envelopes == {"text": "caf\u00e9".encode(), "none": None, "bytes": b"\xff\0"}
    assert leases["none"].counters == Counters(crashes=2)
    assert set(rig.do(broker.settle([Settlement(lease.token, "q", "ack") for lease in leases.values()]))) == {SETTLED}


@pytest.mark.parametrize("id", [None, "", "no spaces", "x" * 65, b"bytes", "caf\u00e9", "nul\0"])
def test_an_id_that_is_none_is_refused_at_the_door(rig: SQLiteRig, id: Any) -> None:
    rig.make_client().enqueue([])
    with pytest.raises(sqlite3.IntegrityError):
        rig.sql("INSERT INTO kq_job (id) VALUES (?)", id)


def test_a_lease_of_nobody_and_an_epoch_without_end_are_recovered(rig: SQLiteRig) -> None:
    broker, gone = rig.broker(), rig.broker(lease_s=1000)
    rig.do(broker.enqueue([new_job("a"), new_job("b")]))
    assert len(reserve(rig, gone)) == 2
    rig.sql("UPDATE kq_epoch SET lapses_at = 'never' WHERE epoch = ?", gone._owner.epoch)
    rig.sql("UPDATE kq_job SET epoch = '' WHERE id = 'b'")
    assert rig.do(broker.sweep()).recovered == {"q": 2}
    assert rig.do(broker.sweep()).recovered == {}


def test_more_than_a_batch_is_recovered_and_expired_by_one_sweep(rig: SQLiteRig) -> None:
    dead, broker = rig.broker(identity="i", lease_s=1), rig.broker()
    rig.do(broker.enqueue([new_job() for _ in range(1100)]))
    for _ in range(3):
        rig.do(dead.reserve("q", {"inline": 500}))
    rig.elapse(2)
    assert rig.do(broker.sweep()).recovered == {"q": 1100}
    for _ in range(3):
        leases = rig.do(dead.reserve("q", {"inline": 500})).leases
        rig.do(dead.settle([Settlement(lease.token, "q", "ack", keep_s=1) for lease in leases[:200]]))
    assert rig.broker(identity="i").recovered == {"q": 600}
    rig.elapse(2)
    rig.do(broker.sweep())
    assert rig.sql("SELECT state, count(*) FROM kq_job GROUP BY state") == [("ready", 600)]


def test_no_verb_reads_more_rows_than_it_needs(rig: SQLiteRig) -> None:
    broker, client = rig.broker(identity="i", lease_s=1), rig.make_client()
    seen: list[str] = []
    broker._file._db.set_trace_callback(seen.append)
    jobs = [new_job("a"), new_job("b"), new_job("c"), new_job("d"), new_job("later", delay_s=1)]
    rig.do(broker.enqueue(jobs, max_depth=10))
    for lease, verb in zip(reserve(rig, broker).values(), ("ack", "ack", "release", "bury"), strict=True):
        how = {"keep_s": 1.0, "delay_s": 1.0} if lease.token.id in "bc" else {}
        rig.do(broker.settle([Settlement(lease.token, "q", verb, certificate=b"{}", **how)]))
    rig.elapse(2)
    reserve(rig, broker)
    rig.do(broker.open(Owner("next", "i"), ["q"], 15, retention=Retention(0.1, 1)))
    rig.do(broker.sweep())
    rig.do(broker.renew())
    client.enqueue([])
    client._file._db.set_trace_callback(seen.append)
    client.show("d")
    client.cancel("later", b"{}")
    last = client.last_dead("q")
    client.last_dead("")
    assert last is not None
    client.dead("q", None, last, 500)
    client.list("dead", "q", 10)
    client.retry(["later"])
    client.forget(["d"])
    client.documents("manifest:")
    client.stats()
    plans = {}
    for statement in {sql for sql in seen if sql.startswith(("SELECT", "UPDATE", "INSERT", "DELETE", "WITH"))}:
        plans[statement] = [row[3] for row in rig.sql(f"EXPLAIN QUERY PLAN {statement}")]
    assert len(plans) > 20
    large = ("SCAN kq_job", "SCAN kq_certificate", "SCAN kq_document")
    scans = {sql: step for sql, plan in plans.items() for step in plan if step.startswith(large)}
    assert [sql for sql, step in scans.items() if "kq_job_odd" not in step] == [], "an index of odd rows has next to none"
    assert any("kq_job_ready" in step for plan in plans.values() for step in plan)


# -- dead letters -------------------------------------------------------------------------------------------------------


def test_dead_letters_are_retried_and_forgotten(rig: SQLiteRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job(id, priority=2, lane="isolated") for id in ("a", "b", "c")]))
    how = {"counters": Counters(3, 1, 2, 4, 1), "certificate": b"{}"}
    bury = [Settlement(lease.token, "q", "bury", **how) for lease in reserve(rig, broker).values()]
    rig.do(broker.settle(bury))
    rig.do(broker.enqueue([new_job("waits")]))
    rig.elapse(100)
    rig.do(broker.wait(0))
    retried, rings = client._file.write(lambda tx: commands.retry(tx, ["b", "nobody", "waits", "a", "b"]))
    assert (retried, rings) == ([True, False, False, True, False], True)
    row = client.show("a")
    assert row is not None
    assert (row.state, row.lane, row.counters, row.certificates) == ("ready", "isolated", Counters(), (b"{}",))
    assert row.available_at == rig.now, "not the place that it had"
    leases = reserve(rig, broker)
    assert list(leases) == ["waits", "a", "b"]
    assert set(rig.do(broker.settle(bury))) == {STALE}, "no token of before is good again"
    forgotten, rings = client._file.write(lambda tx: commands.forget(tx, ["c", "a", "nobody", "c"]))
    assert (forgotten, rings) == ([True, False, False, False], False)
    assert client.show("c") is None
    assert rig.sql("SELECT DISTINCT job_id FROM kq_certificate ORDER BY job_id") == [("a",), ("b",)]


# -- doorbells ----------------------------------------------------------------------------------------------------------


def test_daemons_ring_each_other_and_themselves(rig: SQLiteRig) -> None:
    one, two = rig.broker(), rig.broker()

    def both_wait(enqueuing: Any, waits: list[Any]) -> Iterator[Any]:
        tasks = [rig.kernel.spawn(wait) for wait in waits]
        yield
        yield from enqueuing
        rang = []
        for task in tasks:
            rang.append((yield join(task)))
        return rang

    rig.do(one.wait(0)), rig.do(two.wait(0))
    assert rig.do(both_wait(one.enqueue([new_job("a")]), [one.wait(10), two.wait(10)])) == [True, True]
    assert rig.do(both_wait(two.enqueue([new_job("b")]), [one.wait(10), two.wait(10)])) == [True, True]
    assert rig.do(both_wait(one.enqueue([new_job("b")]), [one.wait(0), two.wait(0)])) == [False, False], "it was there"
    assert rig.do(both_wait(one.reserve("q", {"inline": 1}), [one.wait(0), two.wait(0)])) == [False, False]


def test_bells_of_the_dead_are_taken_down_and_those_of_the_living_are_not(rig: SQLiteRig) -> None:
    broker = rig.broker(epoch="alive")
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    dead.bind(f"{rig.path}.bells/dead.sock")
    dead.close()
    full = rig.broker(epoch="full")
    client = rig.make_client()
    for n in range(600):  # more than a socket holds, whatever net.unix.max_dgram_qlen says
        client.enqueue([new_job(f"a{n}")])
    assert sorted(os.listdir(f"{rig.path}.bells")) == ["alive.sock", "full.sock"]
    assert rig.do(full.wait(10)) is True
    assert rig.do(full.wait(0)) is False, "a wait takes all rings"
    rig.do(broker.close())
    rig.opened.remove(broker)
    assert os.listdir(f"{rig.path}.bells") == ["full.sock"]


def test_a_path_may_be_longer_than_a_socket_s(rig: SQLiteRig, tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < 300:
        folder /= "a-rather-long-name-for-a-directory"
    rig.path = str(folder / "kqueue.db")
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.wait(0))
    client.enqueue([new_job("a")])
    assert rig.do(broker.wait(10)) is True


def test_a_bell_that_somebody_removed_hangs_again_after_the_next_renewal(rig: SQLiteRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    for name in os.listdir(f"{rig.path}.bells"):
        os.unlink(f"{rig.path}.bells/{name}")
    os.rmdir(f"{rig.path}.bells")
    rig.do(broker.renew())
    client.enqueue([new_job("a")])
    assert rig.do(broker.wait(10)) is True


# -- forks, kills and what they leave behind ----------------------------------------------------------------------------


def in_child(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def test_what_a_forked_child_dispatches_outlives_its_parent_s_connection(rig: SQLiteRig) -> None:
    client = rig.make_client()
    client.enqueue([new_job("parent")])
    asked, answer = os.pipe(), os.pipe()

    def child() -> None:
        client.enqueue([new_job("child")])
        os.write(answer[1], b"1")
        os.read(asked[0], 1)  # until the parent has closed the last other connection, at which SQLite removes the log
        client.enqueue([new_job("orphan")])
        os.kill(os.getpid(), signal.SIGKILL)

    pid = in_child(child)
    os.read(answer[0], 1)
    client.enqueue([new_job("parent-again")])
    client.close()
    os.write(asked[1], b"1")
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    for fd in (*asked, *answer):
        os.close(fd)
    assert {row.id for row in rig.make_client().list(None, None, 10)} == {"parent", "child", "parent-again", "orphan"}


FORK_AMONG_THREADS = """
import os, sys, threading
from kqueue.brokers.base import NewJob
from kqueue.client.sqlite import SQLiteClient

client = SQLiteClient(sys.argv[1])
dispatch = lambda id: client.enqueue([NewJob(id, "q", "inline", 0, b"{}")])
done = threading.Event()

def dispatch_on(thread):
    n = 0
    while not done.is_set():
        dispatch(f"t{thread}-{n}")
        n += 1
        counts[thread] = n

counts = [0] * 4
threads = [threading.Thread(target=dispatch_on, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
for n in range(20):
    pid = os.fork()
    if pid == 0:
        dispatch(f"child-{n}")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
done.set()
for thread in threads:
    thread.join()
print(sum(counts) + 20)
"""


def test_forks_among_threads_that_dispatch_lose_nothing_and_hang_nobody(rig: SQLiteRig) -> None:
    script = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK_AMONG_THREADS, rig.path]
    counted = subprocess.run(script, check=True, stdout=subprocess.PIPE, timeout=120).stdout
    assert rig.sql("SELECT count(*) FROM kq_job") == [(int(counted),)]


DISPATCH_AND_SAY_SO = """
import os, sys
from kqueue.brokers.base import NewJob
from kqueue.client.sqlite import SQLiteClient

client = SQLiteClient(sys.argv[1])
for n in range(1000):
    client.enqueue([NewJob(f"j{n}", "q", "inline", 0, b"{}")])
    print(f"j{n}", flush=True)
"""


@pytest.mark.parametrize("after", [1, 100, 500])
def test_what_dispatch_returned_for_is_there_after_kill_9(rig: SQLiteRig, after: int) -> None:
    with subprocess.Popen([sys.executable, "-c", DISPATCH_AND_SAY_SO, rig.path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        returned = [next(process.stdout) for _ in range(after)]
        process.kill()
        returned += list(process.stdout)
    there = {row.id for row in rig.make_client().list("ready", "q", 2000)}
    assert there >= {line.strip().decode() for line in returned if line.endswith(b"\n")}
    assert len(there) <= len(returned) + 1
    assert rig.sql("PRAGMA integrity_check") == [("ok",)]


def test_nothing_stays_open_after_close(tmp_path: Path) -> None:
    def once(n: int) -> None:
        kernel, broker = Kernel(), SQLiteBroker(str(tmp_path / f"{n}.db"))
        kernel.run(broker.open(Owner(new_id(), ""), ["q"], 15))
        client = SQLiteClient(str(tmp_path / f"{n}.db"))
        client.enqueue([new_job("a")])
        assert kernel.run(broker.wait(10)) is True
        kernel.run(broker.close())
        kernel.run(broker.close())
        client.close()
        kernel.close()

    once(0)
    before = sorted(os.listdir("/proc/self/fd"))
    once(1)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.db", "0.db.bells", "1.db", "1.db.bells"]
