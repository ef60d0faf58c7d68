"""The SQLite commands: plain functions that run inside one open write transaction.

What they mean is what `memory.py` means, down to which of two ties wins. Nothing here opens, waits, retries or commits: the
daemon runs all that one turn of its loop asked for in one transaction, a client one command in one, and both by these functions.
Neighbours: the tables (sqlite_schema), counts (sqlite_transaction), who is alive (sqlite_epochs), dead letters (sqlite_dead). The
commands that are wholly theirs are imported here, so that daemon and client find all in one place.

Every statement finds its rows by an index; a test reads the query plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ...errors import QueueFull
from ..base import (
    MAX_BATCH,
    NO_RETENTION,
    PRIORITY_STEP_S,
    SETTLED,
    STALE,
    Counters,
    Lease,
    NewJob,
    Owner,
    Reserved,
    Retention,
    Row,
    Settlement,
    Swept,
    Token,
    last_of_dead,
    lost,
    numbered,
    place,
)
from . import sqlite_dead, sqlite_epochs, sqlite_transaction
from .sqlite_dead import cancel as cancel
from .sqlite_dead import forget as forget
from .sqlite_dead import last_dead as last_dead
from .sqlite_dead import retry as retry
from .sqlite_dead import walk as walk
from .sqlite_epochs import close_epoch as close_epoch
from .sqlite_epochs import renew as renew
from .sqlite_transaction import Transaction, count, distinct, text
from .sqlite_transaction import stats as stats

_STANDS: Final = "CASE WHEN available_at > ? THEN 'delayed' ELSE 'ready' END"  # parameter: now
_LEASED: Final = "id = ? AND number = ? AND epoch = ? AND state = 'leased' AND queue IS coalesce(?, queue)"
_OURS: Final = (  # leased, or recovered and not yet reserved again
    "SELECT rowid, queue, state FROM kq_job WHERE id = ? AND number = ? AND epoch = ? "
    "AND coalesce(state, '') NOT IN ('done', 'dead')"
)
_COUNTERS: Final = "attempts = ?, crashes = ?, recoveries = ?, deferrals = ?, memory = ?"

_ENQUEUE: Final = (
    "INSERT INTO kq_job (id, queue, lane, state, priority, place, available_at, envelope) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (id) DO NOTHING"
)
_NEXT_DUE: Final = (
    "SELECT available_at FROM kq_job WHERE state = 'delayed' AND queue = ? AND available_at BETWEEN -1e12 AND 1e12 "
    "ORDER BY available_at LIMIT 1"
)
_MOVE_DUE: Final = (
    "UPDATE kq_job SET state = 'ready' WHERE rowid IN (SELECT rowid FROM kq_job WHERE state = 'delayed' AND queue = ? "
    f"AND available_at BETWEEN -1e12 AND ? ORDER BY available_at LIMIT {MAX_BATCH})"
)
_BEST: Final = (
    "SELECT rowid, id, number, CAST(envelope AS BLOB), available_at, attempts, crashes, recoveries, deferrals, memory "
    "FROM kq_job WHERE state = 'ready' AND queue = ? AND lane = ? ORDER BY place, id LIMIT ?"
)
_LEASE: Final = "UPDATE kq_job SET state = 'leased', epoch = ?, number = ? WHERE rowid = ?"
_ACK: Final = f"DELETE FROM kq_job WHERE {_LEASED}"
_KEEP: Final = (
    f"UPDATE kq_job SET state = 'done', result = ?, expires_at = ?, number = number + 1, epoch = '' WHERE {_LEASED}"
)
_BURY: Final = (
    f"UPDATE kq_job SET state = 'dead', died_at = ?, {_COUNTERS}, number = number + 1, epoch = '' WHERE {_LEASED}"
)
_RELEASE: Final = (
    f"UPDATE kq_job SET state = {_STANDS}, lane = coalesce(?, lane), {_COUNTERS}, number = number + 1, epoch = '' "
    f"WHERE {_LEASED}"
)
_DELAY: Final = (
    f"UPDATE kq_job SET state = 'delayed', available_at = ?, place = ? - priority * {PRIORITY_STEP_S}, "
    f"lane = coalesce(?, lane), {_COUNTERS}, number = number + 1, epoch = '' WHERE {_LEASED}"
)
_HELD: Final = (
    f"SELECT rowid, id, queue, {_STANDS}, attempts, crashes, recoveries FROM kq_job WHERE state = 'leased' AND epoch = ? LIMIT ?"
)
_RECOVER: Final = "UPDATE kq_job SET state = ?, crashes = ?, recoveries = ? WHERE rowid = ?"
_EXPIRED: Final = f"SELECT id FROM kq_job WHERE state = 'done' AND expires_at <= ? ORDER BY expires_at LIMIT {MAX_BATCH}"
_ROW: Final = (
    "SELECT id, queue, state, lane, priority, available_at, attempts, crashes, recoveries, deferrals, memory, "
    "CAST(envelope AS BLOB), CAST(result AS BLOB) FROM kq_job "
)
_DOCUMENTS: Final = "SELECT key, CAST(value AS BLOB) FROM kq_document WHERE key >= ? AND key < ?"


# -- the daemon's verbs -----------------------------------------------------------------------------------------------


def open_epoch(tx: Transaction, owner: Owner, lease_s: float, culprit: str = "") -> dict[str, int]:
    """Register `owner` and recover up to MAX_BATCH jobs of its own dead epochs; call it until it recovers none."""
    dead = sqlite_epochs.earlier(tx, owner)
    sqlite_epochs.renew(tx, owner, lease_s)
    return _recover(tx, dead, culprit)


def enqueue(tx: Transaction, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
    if max_depth:
        for queue in {job.queue for job in jobs}:
            waiting = tx.count(queue, "ready") + tx.count(queue, "delayed")
            if waiting + sum(job.queue == queue for job in jobs) > max_depth:
                raise QueueFull(f"queue {queue!r} holds {waiting} jobs, allowed are {max_depth}")
    fresh = []
    for job in jobs:
        at = tx.now + job.delay_s if job.at is None else job.at
        state = "delayed" if at > tx.now else "ready"
        values = (job.id, job.queue, job.lane, state, job.priority, place(at, job.priority), at, job.envelope)
        fresh.append(tx.db.execute(_ENQUEUE, values).rowcount == 1)
        if fresh[-1]:
            tx.move(job.queue, None, state)
    tx.rings |= True in fresh
    return fresh


def reserve(tx: Transaction, owner: Owner, lease_s: float, queue: str, wants: Mapping[str, int]) -> Reserved:
    due = _next_due(tx, queue)
    if due is not None and due <= tx.now:
        _move_due(tx, queue)
        due = _next_due(tx, queue)
    leases: list[Lease] = []
    for lane, want in wants.items():
        room = min(want, MAX_BATCH - len(leases))
        if room > 0:
            leases += _lease(tx, owner.epoch, queue, lane, room)
    if leases:
        tx.move(queue, "ready", "leased", len(leases))
        sqlite_epochs.revive(tx, owner, lease_s)
    return Reserved(leases, None if due is None else max(0.0, due - tx.now))


def settle(tx: Transaction, batch: Sequence[Settlement]) -> list[str]:
    return [SETTLED if _settle(tx, item) else STALE for item in batch]


def sweep(
    tx: Transaction, lease_s: float, queues: Iterable[str] = (), retention: Retention = NO_RETENTION
) -> tuple[Swept, bool, bool]:
    """One bounded round; whether there may be more to do, and whether any job of `queues` waits. `retention` holds for them."""
    sqlite_epochs.beat(tx, lease_s)
    full = False
    for queue in distinct(tx, "queue", "delayed"):
        full |= _move_due(tx, queue) == MAX_BATCH
    expired = [id for (id,) in tx.db.execute(_EXPIRED, (tx.now,))]
    tx.db.executemany("DELETE FROM kq_job WHERE id = ?", [(id,) for id in expired])
    for id in expired:
        sqlite_dead.tear_up(tx, id)
    living = sqlite_epochs.living(tx)
    holders = dict.fromkeys([*sqlite_epochs.known(tx), *distinct(tx, "epoch", "leased")])
    recovered = _recover(tx, [epoch for epoch in holders if epoch not in living])
    buried = sqlite_dead.bury_odd(tx)  # the recovered may be odd as well
    dropped = sqlite_dead.retire(tx, queues, retention)
    more = full or MAX_BATCH in (len(expired), sum(recovered.values()), buried, sum(dropped.values()))
    if not more:
        sqlite_transaction.check_counts(tx)
    return Swept(recovered, dropped), more, any(tx.count(queue, state) for queue in queues for state in ("ready", "delayed"))


def publish(tx: Transaction, documents: Mapping[str, bytes]) -> None:
    tx.db.executemany("INSERT OR REPLACE INTO kq_document (key, value) VALUES (?, ?)", documents.items())


# -- for clients ------------------------------------------------------------------------------------------------------


def show(tx: Transaction, id: str) -> Row | None:
    found = tx.db.execute(_ROW + "WHERE id = ?", (id,)).fetchone()
    if found is None:
        return None
    bodies = tx.db.execute("SELECT CAST(body AS BLOB) FROM kq_certificate WHERE job_id = ? ORDER BY n", (id,))
    return _row(found)._replace(certificates=tuple(body for (body,) in bodies if body is not None))


def list_jobs(tx: Transaction, state: str | None, queue: str | None, limit: int) -> list[Row]:
    if state == "dead":
        dead = [show(tx, id) for id in sqlite_dead.newest(tx, queue, limit)]
        return [row._replace(certificates=last_of_dead(row)) for row in dead if row is not None]
    wanted = [(f"{column} = ?", value) for column, value in (("state", state), ("queue", queue)) if value is not None]
    others = "coalesce(state, '') <> 'done'" if state is None else "1"
    where = " AND ".join([others, *(test for test, _ in wanted)])
    # Found first and read then, so that sorting a million jobs does not drag their envelopes along.
    found = f"SELECT rowid FROM kq_job WHERE {where} ORDER BY place, id LIMIT ?"
    rows = tx.db.execute(f"{_ROW} WHERE rowid IN ({found}) ORDER BY place, id", (*(value for _, value in wanted), limit))
    return [_row(row)._replace(certificates=sqlite_dead.last_words(tx, row[0], row[2])) for row in rows.fetchall()]


def version(tx: Transaction) -> str:
    """SQLite's, the schema's, and how this connection writes."""
    schema = "SELECT value FROM kq_meta WHERE key = 'schema'"
    queries = ("SELECT sqlite_version()", schema, "PRAGMA journal_mode", "PRAGMA synchronous")
    release, schema, journal, synchronous = (tx.db.execute(query).fetchone()[0] for query in queries)
    level = ("OFF", "NORMAL", "FULL", "EXTRA")[synchronous]
    return f"SQLite {release}, schema {schema}, journal_mode {journal.upper()}, synchronous {level}"


def documents(tx: Transaction, prefix: str) -> dict[str, bytes]:
    found = tx.db.execute(_DOCUMENTS, (prefix, prefix + "\U0010ffff"))  # the last character there is
    return {key: value for key, value in found if value is not None}


# -- inside -----------------------------------------------------------------------------------------------------------


_NONE: Final = Counters()  # one for all jobs that have not run


def _next_due(tx: Transaction, queue: str) -> float | None:
    found = tx.db.execute(_NEXT_DUE, (queue,)).fetchone()
    return None if found is None else float(found[0])


def _lease(tx: Transaction, epoch: str, queue: str, lane: str, want: int) -> list[Lease]:
    leases, held = [], []
    for rowid, id, number, envelope, available_at, *counters in tx.db.execute(_BEST, (queue, lane, want)).fetchall():
        token = Token(epoch, id, count(number) + 1)
        held.append((epoch, token.number, rowid))
        at = available_at if isinstance(available_at, float) else 0.0
        past = Counters(*map(count, counters)) if any(counters) else _NONE
        leases.append(Lease(token, queue, lane, envelope, past, at))
    tx.db.executemany(_LEASE, held)
    return leases


def _move_due(tx: Transaction, queue: str) -> int:
    moved = tx.db.execute(_MOVE_DUE, (queue, tx.now)).rowcount
    tx.move(queue, "delayed", "ready", moved)
    return moved


def _settle(tx: Transaction, item: Settlement) -> bool:
    if item.verb != "hold":
        after = _end(tx, item, item.queue)  # one statement, where the job is what we think it is
        if after is not None:
            tx.move(item.queue, "leased", after)
            return True
    found = tx.db.execute(_OURS, _token(item)).fetchone()
    if found is None:
        return False
    rowid, queue, state = found
    if state != "leased":
        tx.db.execute("UPDATE kq_job SET state = 'leased' WHERE rowid = ?", (rowid,))
        tx.move(text(queue), text(state), "leased")
    if item.verb != "hold":
        tx.move(text(queue), "leased", _end(tx, item, None))
    return True


def _end(tx: Transaction, item: Settlement, queue: str | None) -> str | None:
    """End a lease of `queue` (None: whatever its queue is): the state that the job is in now, or None: there is no such lease."""
    leased = (*_token(item), queue)
    if item.verb == "ack" and item.keep_s <= 0:
        after, done = "gone", tx.db.execute(_ACK, leased)
    elif item.verb == "ack":
        after, done = "done", tx.db.execute(_KEEP, (item.result, tx.now + item.keep_s, *leased))
    elif item.verb == "bury":
        after, done = "dead", tx.db.execute(_BURY, (tx.now, *item.counters, *leased))
    elif item.delay_s > 0:
        due = tx.now + item.delay_s
        after, done = "delayed", tx.db.execute(_DELAY, (due, due, item.lane or None, *item.counters, *leased))
    else:
        after, done = "ready", tx.db.execute(_RELEASE, (tx.now, item.lane or None, *item.counters, *leased))
    if not done.rowcount:
        return None
    if item.follow_ups and item.verb == "ack":
        enqueue(tx, item.follow_ups)
    elif item.verb == "release":
        tx.rings = True
    if after == "gone":
        sqlite_dead.tear_up(tx, item.token.id)
    elif item.certificate is not None:
        sqlite_dead.certify(tx, item.token.id, item.certificate)
    if after == "ready":  # or delayed, when the wall clock went back
        (after,) = tx.db.execute("SELECT state FROM kq_job WHERE id = ?", (item.token.id,)).fetchone()
    return after


def _token(item: Settlement) -> tuple[str, int, str]:
    return (item.token.id, item.token.number, item.token.epoch)


def _recover(tx: Transaction, epochs: Iterable[str], culprit: str = "") -> dict[str, int]:
    """Make what `epochs` hold ready again, at most MAX_BATCH jobs."""
    recovered: dict[str, int] = {}
    room = MAX_BATCH
    blameless = lost(tx.now)
    for epoch in epochs:
        held = tx.db.execute(_HELD, (tx.now, epoch, room)).fetchall()
        for rowid, id, queue, stands, *counters in held:
            attempts, crashes, recoveries = map(count, counters)
            guilty = id == culprit
            tx.db.execute(_RECOVER, (stands, crashes + guilty, recoveries + (not guilty), rowid))
            certificate = lost(tx.now, culprit=True) if guilty else blameless
            sqlite_dead.certify(tx, id, numbered(certificate, attempts + crashes + recoveries + 1))
            tx.move(text(queue), "leased", stands)
            recovered[text(queue)] = recovered.get(text(queue), 0) + 1
        room -= len(held)
        if room <= 0:
            break  # it may hold more, so it stays known
        tx.db.execute("DELETE FROM kq_epoch WHERE epoch = ?", (epoch,))
    tx.rings |= bool(recovered)
    return recovered


def _row(found: Sequence[Any]) -> Row:
    id, queue, state, lane, priority, available_at, attempts, crashes, recoveries, deferrals, memory, envelope, result = found
    counters = Counters(*map(count, (attempts, crashes, recoveries, deferrals, memory)))
    at = available_at if isinstance(available_at, float) else 0.0
    rank = priority if isinstance(priority, int) else 0
    return Row(id, text(queue), text(state), text(lane), rank, at, counters, envelope, result)
