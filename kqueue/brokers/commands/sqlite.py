"""The SQLite commands: the schema, and plain functions that run inside one open write transaction.

What they mean is what `memory.py` means, down to which of two ties wins. Nothing here opens, waits, retries or commits: the
daemon runs all that one turn of its loop asked for in one transaction, a client one command in one, and both by these functions.

Each state has a partial index that holds the rows of that state and no others, so that a verb costs O(log n) a job however many
dead or delayed ones there are. A test reads the query plans.

SQLite is dynamically typed, and whoever can write the file can write anything. So:

Rule 1. Only an `id` must be one, by a CHECK, since a token has to find its row again. Every other column may hold anything.
Rule 2. An envelope is handed out as the bytes it is; a counter that is no integer counts as 0; a strange place is still a place.
Rule 3. What no verb would ever find (an unknown state or lane, a due time that never comes) stands in the index `kq_job_odd`, and
        a sweep buries it with a certificate, where people see it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ...codec import to_json
from ...errors import QueueFull
from ...outcome import Outcome
from ..base import (
    MAX_BATCH,
    MAX_CERTIFICATES,
    PRIORITY_STEP_S,
    SETTLED,
    STALE,
    Counters,
    Lease,
    NewJob,
    Owner,
    QueueStats,
    Reserved,
    Row,
    Settlement,
    Token,
    place,
)

VERSION: Final = 2  # of the schema; stands in kq_meta, since user_version belongs to the application that shares the file

# What a row needs to be found by the verb that moves it on; NULL (a comparison with one) is no better than 0.
_ODD: Final = """CASE state
    WHEN 'ready' THEN typeof(queue) = 'text' AND lane IN ('inline', 'isolated')
    WHEN 'delayed' THEN typeof(queue) = 'text' AND lane IN ('inline', 'isolated') AND available_at BETWEEN -1e12 AND 1e12
    WHEN 'leased' THEN typeof(epoch) = 'text'
    WHEN 'done' THEN 1
    WHEN 'dead' THEN 1
  END IS NOT TRUE"""

SCHEMA: Final = (
    "CREATE TABLE kq_meta (key TEXT PRIMARY KEY NOT NULL, value) WITHOUT ROWID",
    """CREATE TABLE kq_job (
  id TEXT NOT NULL UNIQUE
    CHECK (typeof(id) = 'text' AND id NOT GLOB '*[^0-9A-Za-z_-]*' AND length(id) BETWEEN 1 AND 64
      AND length(id) = length(CAST(id AS BLOB))),  -- both GLOB and length() end at a NUL
  queue TEXT DEFAULT 'default',
  lane TEXT DEFAULT 'inline',
  state TEXT DEFAULT 'ready',
  priority INTEGER DEFAULT 0,
  place REAL DEFAULT 0,          -- lower is earlier: available_at - priority * 3600
  available_at REAL DEFAULT 0,   -- seconds since 1970
  attempts INTEGER DEFAULT 0,
  crashes INTEGER DEFAULT 0,
  recoveries INTEGER DEFAULT 0,
  deferrals INTEGER DEFAULT 0,
  memory INTEGER DEFAULT 0,      -- of the attempts, those that ran out of memory
  number INTEGER DEFAULT 0,      -- of the last reservation; a settlement raises it too, so that a token settles once
  epoch TEXT DEFAULT '',         -- that holds it, or held it last
  expires_at REAL,               -- done: when the result goes
  envelope BLOB,
  result BLOB
)""",
    "CREATE INDEX kq_job_ready ON kq_job (queue, lane, place, id) WHERE state = 'ready'",
    "CREATE INDEX kq_job_delayed ON kq_job (queue, available_at) WHERE state = 'delayed'",
    "CREATE INDEX kq_job_leased ON kq_job (epoch, queue) WHERE state = 'leased'",
    "CREATE INDEX kq_job_done ON kq_job (expires_at) WHERE state = 'done'",
    "CREATE INDEX kq_job_dead ON kq_job (queue) WHERE state = 'dead'",
    f"CREATE INDEX kq_job_odd ON kq_job (id) WHERE {_ODD}",
    "CREATE TABLE kq_certificate (job_id TEXT NOT NULL, n INTEGER NOT NULL, body BLOB, PRIMARY KEY (job_id, n))",
    "CREATE TABLE kq_epoch (epoch TEXT PRIMARY KEY NOT NULL, identity TEXT, expires_at REAL)",
    "CREATE TABLE kq_document (key TEXT PRIMARY KEY NOT NULL, value BLOB)",
    f"INSERT INTO kq_meta (key, value) VALUES ('schema', {VERSION})",
)

FROM_VERSION_1: Final = (
    "ALTER TABLE kq_job ADD COLUMN memory INTEGER DEFAULT 0",
    "UPDATE kq_meta SET value = 2 WHERE key = 'schema'",
)

_STANDS: Final = "CASE WHEN available_at > ? THEN 'delayed' ELSE 'ready' END"  # parameter: now
_FENCE: Final = "id = ? AND number = ? AND epoch = ? AND coalesce(state, '') NOT IN ('done', 'dead')"  # parameters: _token
_COUNTERS: Final = "attempts = ?, crashes = ?, recoveries = ?, deferrals = ?, memory = ?"

_ENQUEUE: Final = (
    "INSERT INTO kq_job (id, queue, lane, state, priority, place, available_at, envelope) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (id) DO NOTHING"
)
_WAITING: Final = (
    "SELECT (SELECT count(*) FROM (SELECT 1 FROM kq_job WHERE state = 'ready' AND queue = :queue LIMIT :most)) + "
    "(SELECT count(*) FROM (SELECT 1 FROM kq_job WHERE state = 'delayed' AND queue = :queue LIMIT :most))"
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
_OWN: Final = "INSERT INTO kq_epoch (epoch, identity, expires_at) VALUES (?, ?, ?) ON CONFLICT (epoch) "
_ACK: Final = f"DELETE FROM kq_job WHERE {_FENCE}"
_KEEP: Final = (
    f"UPDATE kq_job SET state = 'done', result = ?, expires_at = ?, number = number + 1, epoch = '' WHERE {_FENCE}"
)
_BURY: Final = f"UPDATE kq_job SET state = 'dead', {_COUNTERS}, number = number + 1, epoch = '' WHERE {_FENCE}"
_RELEASE: Final = (
    f"UPDATE kq_job SET state = {_STANDS}, lane = coalesce(?, lane), {_COUNTERS}, number = number + 1, epoch = '' WHERE {_FENCE}"
)
_DELAY: Final = (
    f"UPDATE kq_job SET state = 'delayed', available_at = ?, place = ? - priority * {PRIORITY_STEP_S}, "
    f"lane = coalesce(?, lane), {_COUNTERS}, number = number + 1, epoch = '' WHERE {_FENCE}"
)
_RETRY: Final = (
    f"UPDATE kq_job SET state = 'ready', available_at = ?, place = ? - priority * {PRIORITY_STEP_S}, attempts = 0, crashes = 0, "
    "recoveries = 0, deferrals = 0, memory = 0 WHERE id = ? AND state = 'dead'"
)
_CERTIFY: Final = (
    "INSERT OR REPLACE INTO kq_certificate (job_id, n, body) "
    "SELECT :id, coalesce(max(n), 0) + 1, :body FROM kq_certificate WHERE job_id = :id"
)
_ONLY_THE_LAST: Final = (
    "DELETE FROM kq_certificate WHERE job_id = :id "
    f"AND n <= (SELECT max(n) - {MAX_CERTIFICATES} FROM kq_certificate WHERE job_id = :id)"
)
_FORGET: Final = "DELETE FROM kq_certificate WHERE job_id = ?"  # of a job that is gone
_HELD: Final = "SELECT rowid, queue, id FROM kq_job WHERE state = 'leased' AND epoch = ? LIMIT ?"
_RECOVER: Final = (
    f"UPDATE kq_job SET state = {_STANDS}, %(counter)s = CASE typeof(%(counter)s) WHEN 'integer' THEN %(counter)s + 1 ELSE 1 END "
    "WHERE rowid = ?"
)
_LIVING: Final = "SELECT epoch FROM kq_epoch WHERE typeof(expires_at) IN ('real', 'integer') AND expires_at > ?"
_EXPIRED: Final = f"SELECT id FROM kq_job WHERE state = 'done' AND expires_at <= ? ORDER BY expires_at LIMIT {MAX_BATCH}"
_FIND_ODD: Final = (
    f"SELECT rowid, id, state, lane, attempts FROM kq_job INDEXED BY kq_job_odd WHERE {_ODD} ORDER BY id LIMIT {MAX_BATCH}"
)
_ROW: Final = (
    "SELECT id, queue, state, lane, priority, available_at, attempts, crashes, recoveries, deferrals, memory, "
    "CAST(envelope AS BLOB), CAST(result AS BLOB) FROM kq_job "
)
_DOCUMENTS: Final = "SELECT key, CAST(value AS BLOB) FROM kq_document WHERE key >= ? AND key < ?"


class Transaction:
    """One open transaction: what commands run in."""

    __slots__ = ("db", "now", "rings")

    def __init__(self, db: sqlite3.Connection, now: float) -> None:
        self.db = db
        self.now = now  # seconds since 1970, one moment for the whole transaction
        self.rings = False  # something became ready or delayed: ring, once this is committed


# -- the daemon's verbs -----------------------------------------------------------------------------------------------


def open_epoch(tx: Transaction, owner: Owner, lease_s: float, culprit: str = "") -> dict[str, int]:
    """Register `owner` and recover up to MAX_BATCH jobs of its own dead epochs; call it until it recovers none."""
    same = "SELECT epoch FROM kq_epoch WHERE identity = ? AND identity <> '' AND epoch <> ?"
    dead = [epoch for (epoch,) in tx.db.execute(same, (owner.identity, owner.epoch)).fetchall()]
    renew(tx, owner, lease_s)
    return _recover(tx, dead, culprit)


def enqueue(tx: Transaction, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
    if max_depth:
        for queue in {job.queue for job in jobs}:
            (waiting,) = tx.db.execute(_WAITING, {"queue": queue, "most": max_depth}).fetchone()
            if waiting + sum(job.queue == queue for job in jobs) > max_depth:
                raise QueueFull(f"queue {queue!r} holds {waiting} jobs, allowed are {max_depth}")
    fresh = []
    for job in jobs:
        at = tx.now + job.delay_s if job.at is None else job.at
        state = "delayed" if at > tx.now else "ready"
        values = (job.id, job.queue, job.lane, state, job.priority, place(at, job.priority), at, job.envelope)
        fresh.append(tx.db.execute(_ENQUEUE, values).rowcount == 1)
    tx.rings |= True in fresh
    return fresh


def reserve(tx: Transaction, owner: Owner, lease_s: float, queue: str, wants: Mapping[str, int]) -> Reserved:
    due = _next_due(tx, queue)
    if due is not None and due <= tx.now:
        tx.db.execute(_MOVE_DUE, (queue, tx.now))
        due = _next_due(tx, queue)
    leases: list[Lease] = []
    for lane, want in wants.items():
        room = min(want, MAX_BATCH - len(leases))
        if room > 0:
            leases += _lease(tx, owner.epoch, queue, lane, room)
    if leases:
        tx.db.execute(_OWN + "DO NOTHING", (owner.epoch, owner.identity, tx.now + lease_s))
    return Reserved(leases, None if due is None else max(0.0, due - tx.now))


def settle(tx: Transaction, batch: Sequence[Settlement]) -> list[str]:
    return [SETTLED if _settle(tx, item) else STALE for item in batch]


def renew(tx: Transaction, owner: Owner, lease_s: float) -> bool:
    """Whether it was alive until now."""
    alive = tx.db.execute(_LIVING + " AND epoch = ?", (tx.now, owner.epoch)).fetchone() is not None
    update = "DO UPDATE SET identity = excluded.identity, expires_at = excluded.expires_at"
    tx.db.execute(_OWN + update, (owner.epoch, owner.identity, tx.now + lease_s))
    return alive


def sweep(tx: Transaction) -> tuple[dict[str, int], bool]:
    """One bounded round: recovered jobs by queue, and whether there may be more to do."""
    full = False
    for queue in _distinct(tx, "queue", "delayed"):
        full |= tx.db.execute(_MOVE_DUE, (queue, tx.now)).rowcount == MAX_BATCH
    expired = tx.db.execute(_EXPIRED, (tx.now,)).fetchall()
    tx.db.executemany("DELETE FROM kq_job WHERE id = ?", expired)
    tx.db.executemany(_FORGET, expired)
    living = {epoch for (epoch,) in tx.db.execute(_LIVING, (tx.now,)).fetchall()}
    known = [epoch for (epoch,) in tx.db.execute("SELECT epoch FROM kq_epoch").fetchall()]
    recovered = _recover(tx, {epoch: None for epoch in (*known, *_distinct(tx, "epoch", "leased")) if epoch not in living})
    buried = _bury_odd(tx)  # the recovered may be odd as well
    return recovered, full or MAX_BATCH in (len(expired), buried, sum(recovered.values()))


def stats(tx: Transaction) -> dict[str, QueueStats]:
    counts: dict[str, QueueStats] = {}
    for state in QueueStats._fields:
        # Four queries, because each is answered by that state's index alone, without a look at the table.
        for queue, n in tx.db.execute(f"SELECT queue, count(*) FROM kq_job WHERE state = '{state}' GROUP BY queue"):
            queue_stats = counts.get(_text(queue), QueueStats())
            counts[_text(queue)] = queue_stats._replace(**{state: getattr(queue_stats, state) + n})
    return counts


def publish(tx: Transaction, documents: Mapping[str, bytes]) -> None:
    tx.db.executemany("INSERT OR REPLACE INTO kq_document (key, value) VALUES (?, ?)", documents.items())


def close_epoch(tx: Transaction, epoch: str) -> None:
    tx.db.execute("UPDATE kq_epoch SET expires_at = ? WHERE epoch = ?", (tx.now, epoch))


# -- for clients ------------------------------------------------------------------------------------------------------


def show(tx: Transaction, id: str) -> Row | None:
    found = tx.db.execute(_ROW + "WHERE id = ?", (id,)).fetchone()
    if found is None:
        return None
    bodies = tx.db.execute("SELECT CAST(body AS BLOB) FROM kq_certificate WHERE job_id = ? ORDER BY n", (id,))
    return _row(found)._replace(certificates=tuple(body for (body,) in bodies if body is not None))


def list_jobs(tx: Transaction, state: str | None, queue: str | None, limit: int) -> list[Row]:
    wanted = [(f"{column} = ?", value) for column, value in (("state", state), ("queue", queue)) if value is not None]
    others = "coalesce(state, '') <> 'done'" if state is None else "1"
    where = " AND ".join([others, *(test for test, _ in wanted)])
    # Found first and read then, so that sorting a million jobs does not drag their envelopes along.
    found = f"SELECT rowid FROM kq_job WHERE {where} ORDER BY place, id LIMIT ?"
    rows = tx.db.execute(f"{_ROW} WHERE rowid IN ({found}) ORDER BY place, id", (*(value for _, value in wanted), limit))
    return [_row(row) for row in rows]


def cancel(tx: Transaction, id: str, certificate: bytes) -> bool:
    bury = "UPDATE kq_job SET state = 'dead', number = number + 1 WHERE id = ? AND state IN ('ready', 'delayed')"
    if not tx.db.execute(bury, (id,)).rowcount:
        return False
    _certify(tx, id, certificate)
    return True


def retry(tx: Transaction, ids: Sequence[str]) -> list[bool]:
    """Make dead jobs ready now, as if they had never run, but for their certificates; for each whether it was dead."""
    retried = [tx.db.execute(_RETRY, (tx.now, tx.now, id)).rowcount == 1 for id in ids]
    tx.rings |= True in retried
    return retried


def forget(tx: Transaction, ids: Sequence[str]) -> list[bool]:
    """Delete dead jobs; for each whether it was dead."""
    forgotten = [tx.db.execute("DELETE FROM kq_job WHERE id = ? AND state = 'dead'", (id,)).rowcount == 1 for id in ids]
    tx.db.executemany(_FORGET, [(id,) for id, gone in zip(ids, forgotten, strict=True) if gone])
    return forgotten


def documents(tx: Transaction, prefix: str) -> dict[str, bytes]:
    found = tx.db.execute(_DOCUMENTS, (prefix, prefix + "\U0010ffff"))  # the last character there is
    return {key: value for key, value in found if value is not None}


# -- inside -----------------------------------------------------------------------------------------------------------


def _next_due(tx: Transaction, queue: str) -> float | None:
    found = tx.db.execute(_NEXT_DUE, (queue,)).fetchone()
    return None if found is None else float(found[0])


def _lease(tx: Transaction, epoch: str, queue: str, lane: str, want: int) -> list[Lease]:
    leases, held = [], []
    for rowid, id, number, envelope, available_at, *counters in tx.db.execute(_BEST, (queue, lane, want)).fetchall():
        token = Token(epoch, id, _count(number) + 1)
        held.append((epoch, token.number, rowid))
        at = available_at if isinstance(available_at, float) else 0.0
        leases.append(Lease(token, queue, lane, envelope, Counters(*map(_count, counters)), at))
    tx.db.executemany(_LEASE, held)
    return leases


def _settle(tx: Transaction, item: Settlement) -> bool:
    token = (item.token.id, item.token.number, item.token.epoch)
    if item.verb == "ack" and item.keep_s <= 0:
        if not tx.db.execute(_ACK, token).rowcount:
            return False
        tx.db.execute(_FORGET, (item.token.id,))
        enqueue(tx, item.follow_ups)
        return True
    if item.verb == "ack":
        done = tx.db.execute(_KEEP, (item.result, tx.now + item.keep_s, *token))
    elif item.verb == "bury":
        done = tx.db.execute(_BURY, (*item.counters, *token))
    elif item.delay_s > 0:
        due = tx.now + item.delay_s
        done = tx.db.execute(_DELAY, (due, due, item.lane or None, *item.counters, *token))
    else:
        done = tx.db.execute(_RELEASE, (tx.now, item.lane or None, *item.counters, *token))
    if not done.rowcount:
        return False
    tx.rings |= item.verb == "release"
    enqueue(tx, item.follow_ups)
    if item.certificate is not None:
        _certify(tx, item.token.id, item.certificate)
    return True


def _certify(tx: Transaction, id: str, certificate: bytes) -> None:
    tx.db.execute(_CERTIFY, {"id": id, "body": certificate})
    tx.db.execute(_ONLY_THE_LAST, {"id": id})


def _recover(tx: Transaction, epochs: Iterable[str], culprit: str = "") -> dict[str, int]:
    recovered: dict[str, int] = {}
    room = MAX_BATCH
    for epoch in epochs:
        held = tx.db.execute(_HELD, (epoch, room)).fetchall()
        for counter in ("recoveries", "crashes"):
            rows = [(tx.now, rowid) for rowid, _, id in held if (counter == "crashes") == (id == culprit)]
            tx.db.executemany(_RECOVER % {"counter": counter}, rows)
        for _, queue, _ in held:
            recovered[_text(queue)] = recovered.get(_text(queue), 0) + 1
        room -= len(held)
        if room <= 0:
            break  # it may hold more, so it stays known
        tx.db.execute("DELETE FROM kq_epoch WHERE epoch = ?", (epoch,))
    tx.rings |= bool(recovered)
    return recovered


def _bury_odd(tx: Transaction) -> int:
    """Make what no verb finds visible, as dead. Returns how many."""
    odd = tx.db.execute(_FIND_ODD).fetchall()
    for rowid, id, state, lane, attempts in odd:
        message = f"the store held what no job can be: state {state!r:.40}, lane {lane!r:.40}, or a queue or time out of range"
        outcome = Outcome("refused", "supervisor", error={"class": "Refused", "message": message})
        certificate = outcome.certificate(attempt=_count(attempts), strategy="", ended_at=tx.now)
        tx.db.execute("UPDATE kq_job SET state = 'dead', number = number + 1 WHERE rowid = ?", (rowid,))
        _certify(tx, id, to_json(certificate))
    return len(odd)


def _distinct(tx: Transaction, column: str, state: str) -> list[str]:
    """The values that stand in front of a state's index: one seek each, since DISTINCT would read the whole index."""
    lowest = f"SELECT min({column}) FROM kq_job WHERE state = '{state}'"
    walk = (
        f"WITH RECURSIVE found (value) AS ({lowest} UNION ALL "
        f"SELECT ({lowest} AND {column} > found.value) FROM found WHERE found.value IS NOT NULL) "
        "SELECT value FROM found WHERE typeof(value) = 'text'"
    )
    return [value for (value,) in tx.db.execute(walk).fetchall()]


def _row(found: Sequence[Any]) -> Row:
    id, queue, state, lane, priority, available_at, attempts, crashes, recoveries, deferrals, memory, envelope, result = found
    counters = Counters(*map(_count, (attempts, crashes, recoveries, deferrals, memory)))
    at = available_at if isinstance(available_at, float) else 0.0
    rank = priority if isinstance(priority, int) else 0
    return Row(id, _text(queue), _text(state), _text(lane), rank, at, counters, envelope, result)


def _count(value: Any) -> int:
    """A number that may be counted on: SQLite's integers end at 2**63, and whoever reads this one adds to it."""
    return value if isinstance(value, int) and 0 <= value < 1 << 62 else 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
