"""Files of an earlier schema: brought up to date in place, whoever has them open, and with everything that stood in them."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kqueue.brokers.base import SETTLED, Counters, QueueStats, Retention, Settlement
from kqueue.brokers.commands import sqlite_file
from kqueue.errors import BrokerRefused

from .conftest import SQLiteRig, new_job, only

# As version 1 wrote it, statements and all.
VERSION_1 = """
PRAGMA journal_mode = WAL;
CREATE TABLE kq_meta (key TEXT PRIMARY KEY NOT NULL, value) WITHOUT ROWID;
CREATE TABLE kq_job (
  id TEXT NOT NULL UNIQUE
    CHECK (typeof(id) = 'text' AND id NOT GLOB '*[^0-9A-Za-z_-]*' AND length(id) BETWEEN 1 AND 64
      AND length(id) = length(CAST(id AS BLOB))),
  queue TEXT DEFAULT 'default',
  lane TEXT DEFAULT 'inline',
  state TEXT DEFAULT 'ready',
  priority INTEGER DEFAULT 0,
  place REAL DEFAULT 0,
  available_at REAL DEFAULT 0,
  attempts INTEGER DEFAULT 0,
  crashes INTEGER DEFAULT 0,
  recoveries INTEGER DEFAULT 0,
  deferrals INTEGER DEFAULT 0,
  number INTEGER DEFAULT 0,
  epoch TEXT DEFAULT '',
  expires_at REAL,
  envelope BLOB,
  result BLOB
);
CREATE INDEX kq_job_ready ON kq_job (queue, lane, place, id) WHERE state = 'ready';
CREATE INDEX kq_job_delayed ON kq_job (queue, available_at) WHERE state = 'delayed';
CREATE INDEX kq_job_leased ON kq_job (epoch, queue) WHERE state = 'leased';
CREATE INDEX kq_job_done ON kq_job (expires_at) WHERE state = 'done';
CREATE INDEX kq_job_dead ON kq_job (queue) WHERE state = 'dead';
CREATE INDEX kq_job_odd ON kq_job (id) WHERE CASE state
    WHEN 'ready' THEN typeof(queue) = 'text' AND lane IN ('inline', 'isolated')
    WHEN 'delayed' THEN typeof(queue) = 'text' AND lane IN ('inline', 'isolated') AND available_at BETWEEN -1e12 AND 1e12
    WHEN 'leased' THEN typeof(epoch) = 'text'
    WHEN 'done' THEN 1
    WHEN 'dead' THEN 1
  END IS NOT TRUE;
CREATE TABLE kq_certificate (job_id TEXT NOT NULL, n INTEGER NOT NULL, body BLOB, PRIMARY KEY (job_id, n));
CREATE TABLE kq_epoch (epoch TEXT PRIMARY KEY NOT NULL, identity TEXT, expires_at REAL);
CREATE TABLE kq_document (key TEXT PRIMARY KEY NOT NULL, value BLOB);
INSERT INTO kq_meta (key, value) VALUES ('schema', 1);
"""
RENEW_1 = (
    "INSERT INTO kq_epoch (epoch, identity, expires_at) VALUES (?, ?, ?) ON CONFLICT (epoch) "
    "DO UPDATE SET identity = excluded.identity, expires_at = excluded.expires_at"
)
LIVING_1 = "SELECT epoch FROM kq_epoch WHERE typeof(expires_at) IN ('real', 'integer') AND expires_at > ?"
ENQUEUE_1 = (
    "INSERT INTO kq_job (id, queue, lane, state, priority, place, available_at, envelope) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (id) DO NOTHING"
)
LEASE_1 = "UPDATE kq_job SET state = 'leased', epoch = ?, number = ? WHERE id = ?"
ACK_1 = "DELETE FROM kq_job WHERE id = ? AND number = ? AND epoch = ? AND coalesce(state, '') NOT IN ('done', 'dead')"

rig = only(SQLiteRig)


@pytest.fixture
def old(rig: SQLiteRig) -> Iterator[sqlite3.Connection]:
    """A connection of a process of version 1, which holds a lease in a file with a job in every state."""
    with closing(sqlite3.connect(rig.path, isolation_level=None)) as db:
        db.executescript(VERSION_1)
        for id, state in (("w1", "ready"), ("w2", "ready"), ("l", "delayed"), ("h", "ready"), ("d", "dead"), ("r", "done")):
            at = rig.now + 60 if state == "delayed" else rig.now
            db.execute(ENQUEUE_1, (id, "q", "inline", state, 0, at, at, b'{"id":"%s"}' % id.encode()))
        db.execute("UPDATE kq_job SET result = x'31', expires_at = ? WHERE id = 'r'", (rig.now + 60,))
        db.execute("UPDATE kq_job SET attempts = 3, number = 7 WHERE id = 'd'")
        db.execute("INSERT INTO kq_certificate VALUES ('d', 1, x'7b7d')")
        db.execute(ENQUEUE_1, ("m", "mail", "isolated", "ready", 5, 1.0, 1.0, b"{}"))
        db.execute(RENEW_1, ("old", "boot:8:42", rig.now + 15))
        db.execute(LEASE_1, ("old", 1, "h"))
        yield db


def test_an_old_file_is_brought_up_to_date_with_everything_in_it(rig: SQLiteRig, old: sqlite3.Connection) -> None:
    client = rig.make_client()
    assert client.stats() == {"q": QueueStats(2, 1, 1, 1), "mail": QueueStats(ready=1)}, "a look is enough"
    assert rig.sql("SELECT value FROM kq_meta WHERE key = 'schema'") == [(2,)]
    broker = rig.broker(queues=("q", "mail"))
    assert rig.do(broker.sweep()).recovered == {}, "its owner is alive"
    assert [lease.token.id for lease in rig.do(broker.reserve("q", {"inline": 9})).leases] == ["w1", "w2"]
    row = client.show("d")
    assert row is not None
    assert (row.state, row.counters, row.certificates) == ("dead", Counters(attempts=3), (b"{}",))
    done = client.show("r")
    assert done is not None
    assert done.result == b"1"
    rig.elapse(16)
    rig.do(broker.renew())
    assert rig.do(broker.sweep()).recovered == {"q": 1}, "and now it is not"
    (lease,) = rig.do(broker.reserve("q", {"inline": 9})).leases
    assert (lease.token.id, lease.counters) == ("h", Counters(recoveries=1))


def test_the_next_epoch_of_an_old_identity_recovers_at_once(rig: SQLiteRig, old: sqlite3.Connection) -> None:
    assert rig.broker(identity="boot:8:42").recovered == {"q": 1}


def test_old_dead_letters_are_as_old_as_the_migration(rig: SQLiteRig, old: sqlite3.Connection) -> None:
    broker, client = rig.broker(retention=Retention(max_age_s=86400)), rig.make_client()
    ((died_at,),) = rig.sql("SELECT died_at FROM kq_job WHERE id = 'd'")  # by the real clock, which no rig moves
    rig.jump(died_at - rig.now + 86399)
    assert rig.do(broker.sweep()).forgotten == {}
    rig.jump(2)
    assert rig.do(broker.sweep()).forgotten == {"q": 1}
    assert client.show("d") is None


def test_processes_of_version_1_go_on_with_the_file(rig: SQLiteRig, old: sqlite3.Connection) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("ours", at=0.0)]))
    (ours,) = rig.do(broker.reserve("q", {"inline": 1})).leases
    assert broker._owner.epoch in {epoch for (epoch,) in old.execute(LIVING_1, (rig.now,))}, "so its sweep steals nothing of ours"
    old.execute(ENQUEUE_1, ("theirs", "q", "inline", "ready", 0, 1.0, 1.0, b"{}"))
    assert old.execute(ACK_1, ("h", 1, "old")).rowcount == 1
    old.execute(RENEW_1, ("old", "boot:8:42", rig.now + 15))
    old.execute(LEASE_1, ("old", 1, "theirs"))
    rig.elapse(5)
    assert rig.do(broker.sweep()).recovered == {}
    assert client.stats()["q"] == QueueStats(ready=2, delayed=1, leased=2, dead=1)
    assert rig.do(broker.settle([Settlement(ours.token, "q", "ack")])) == [SETTLED]


MIGRATE = """
import sys
from kqueue.client.sqlite import SQLiteClient
sys.stdin.readline()
print(sum(map(sum, SQLiteClient(sys.argv[1]).stats().values())))
"""


def test_many_who_come_at_once_bring_it_up_to_date_once(rig: SQLiteRig, old: sqlite3.Connection) -> None:
    command = [sys.executable, "-c", MIGRATE, rig.path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["6\n"] * 4
    assert [process.returncode for process in processes] == [0] * 4


def test_a_way_that_cannot_be_gone_to_its_end_is_not_gone_at_all(
    rig: SQLiteRig, old: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sqlite_file, "FROM_VERSION_1", (*sqlite_file.FROM_VERSION_1, "SELECT * FROM nowhere"))
        with pytest.raises(BrokerRefused, match="no such table: nowhere"):
            rig.make_client().stats()
    assert rig.sql("SELECT value FROM kq_meta WHERE key = 'schema'") == [(1,)]
    assert "died_at" not in {name for _, name, *_ in rig.sql("PRAGMA table_info(kq_job)")}
    assert rig.make_client().stats()["q"].ready == 2


def test_an_old_file_and_a_new_one_are_alike(rig: SQLiteRig, old: sqlite3.Connection, tmp_path: Path) -> None:
    rig.make_client().stats()
    rig.path, before = str(tmp_path / "new.db"), rig.path
    rig.make_client().enqueue([])

    def shape(path: str) -> set[object]:
        with closing(sqlite3.connect(path)) as db:
            names = db.execute("SELECT type, name, tbl_name FROM sqlite_master").fetchall()
            tables = [name for kind, name, _ in names if kind == "table"]
            columns = [(table, *row[1:]) for table in tables for row in db.execute(f"PRAGMA table_info({table})")]
            indexes = [(name, *row) for kind, name, _ in names if kind == "index" for row in _columns(db, name)]
            return {*names, *columns, *indexes}

    def _columns(db: sqlite3.Connection, index: str) -> list[tuple[object, ...]]:
        return [row[2:] for row in db.execute(f"PRAGMA index_xinfo({index})")]

    assert shape(before) == shape(rig.path)
