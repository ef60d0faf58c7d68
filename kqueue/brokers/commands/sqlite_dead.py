"""Dead letters in SQLite: certificates, burials of what no verb would find, retention, and what operators do with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from ...codec import to_json
from ...outcome import Outcome
from ..base import MAX_BATCH, MAX_CERTIFICATES, PRIORITY_STEP_S, Mark, Retention
from .sqlite_schema import ODD
from .sqlite_transaction import NO_TEXT, Transaction, count, text

_CERTIFY: Final = (
    "INSERT OR REPLACE INTO kq_certificate (job_id, n, body) "
    "SELECT :id, coalesce(max(n), 0) + 1, :body FROM kq_certificate WHERE job_id = :id"
)
_ONLY_THE_LAST: Final = (
    "DELETE FROM kq_certificate WHERE job_id = :id "
    f"AND n <= (SELECT max(n) - {MAX_CERTIFICATES} FROM kq_certificate WHERE job_id = :id)"
)
_TEAR_UP: Final = "DELETE FROM kq_certificate WHERE job_id = ?"
_FIND_ODD: Final = (
    f"SELECT rowid, id, queue, state, lane, attempts FROM kq_job INDEXED BY kq_job_odd WHERE {ODD} ORDER BY id LIMIT {MAX_BATCH}"
)
_BURY_ODD: Final = "UPDATE kq_job SET state = 'dead', died_at = ?, number = number + 1 WHERE rowid = ?"
_OLDEST: Final = "SELECT id FROM kq_job WHERE state = 'dead' AND queue = ? ORDER BY died_at, id LIMIT ?"
_HOW_MANY: Final = "SELECT count(*) FROM (SELECT 1 FROM kq_job WHERE state = 'dead' AND queue = ? LIMIT ?)"
_OLDER: Final = "SELECT id FROM kq_job WHERE state = 'dead' AND queue = ? AND died_at <= ? ORDER BY died_at, id LIMIT ?"
_DEAD: Final = "SELECT queue FROM kq_job WHERE id = ? AND state = 'dead'"
_RETRY: Final = (
    f"UPDATE kq_job SET state = 'ready', available_at = ?, place = ? - priority * {PRIORITY_STEP_S}, attempts = 0, crashes = 0, "
    "recoveries = 0, deferrals = 0, memory = 0 WHERE id = ?"
)
_LAST_WORDS: Final = "SELECT CAST(body AS BLOB) FROM kq_certificate WHERE job_id = ? ORDER BY n DESC LIMIT 1"
_SINCE_WHEN: Final = "died_at BETWEEN -1e300 AND 1e300"  # which those that somebody else wrote may not tell
_WALK: Final = (
    f"SELECT died_at, id FROM kq_job WHERE state = 'dead' AND %s AND {_SINCE_WHEN} AND (died_at, id) > (?, ?) "
    "AND (died_at, id) <= (?, ?) ORDER BY died_at, id LIMIT ?"
)
_LAST: Final = (
    f"SELECT died_at, id FROM kq_job WHERE state = 'dead' AND %s AND {_SINCE_WHEN} ORDER BY died_at DESC, id DESC LIMIT 1"
)
_WAITING: Final = "SELECT queue, state FROM kq_job WHERE id = ? AND state IN ('ready', 'delayed')"


def certify(tx: Transaction, id: str, certificate: bytes) -> None:
    """Add `certificate` to those of a job, of which the last MAX_CERTIFICATES are kept."""
    tx.db.execute(_CERTIFY, {"id": id, "body": certificate})
    tx.db.execute(_ONLY_THE_LAST, {"id": id})


def tear_up(tx: Transaction, id: str) -> None:
    """Delete all certificates of a job that is gone."""
    tx.db.execute(_TEAR_UP, (id,))


def bury_odd(tx: Transaction) -> int:
    """Make what no verb finds visible, as dead. Returns how many, at most MAX_BATCH."""
    odd = tx.db.execute(_FIND_ODD).fetchall()
    for rowid, id, queue, state, lane, attempts in odd:
        message = f"the store held what no job can be: state {state!r:.40}, lane {lane!r:.40}, or a queue or time out of range"
        outcome = Outcome("refused", "supervisor", error={"class": "Refused", "message": message})
        certificate = outcome.certificate(attempt=count(attempts), strategy="", ended_at=tx.now)
        tx.db.execute(_BURY_ODD, (tx.now, rowid))
        tx.move(text(queue), text(state), "dead")
        certify(tx, id, to_json(certificate))
    return len(odd)


def retire(tx: Transaction, queues: Iterable[str], retention: Retention) -> dict[str, int]:
    """Drop dead letters of `queues` that are too old, and the oldest of those that are too many: at most MAX_BATCH, by queue."""
    dropped: dict[str, int] = {}
    room = MAX_BATCH
    for queue in queues:
        found: list[tuple[str]] = []
        if 0 < retention.max_count < tx.count(queue, "dead"):  # which may be wrong, and nothing goes by that alone
            ((there,),) = tx.db.execute(_HOW_MANY, (queue, retention.max_count + room))
            found += tx.db.execute(_OLDEST, (queue, max(0, there - retention.max_count)))
        if retention.max_age_s:
            found += tx.db.execute(_OLDER, (queue, tx.now - retention.max_age_s, room))
        ids = [id for (id,) in dict.fromkeys(found)][:room]
        if ids:
            forget(tx, ids)
            dropped[queue] = dropped.get(queue, 0) + len(ids)
            room -= len(ids)
    return dropped


def forget(tx: Transaction, ids: Sequence[str]) -> list[bool]:
    """Delete dead jobs; for each whether it was dead."""
    forgotten = []
    for id in ids:
        dead = tx.db.execute(_DEAD, (id,)).fetchone()
        forgotten.append(dead is not None)
        if dead is not None:
            tx.db.execute("DELETE FROM kq_job WHERE id = ?", (id,))
            tear_up(tx, id)
            tx.move(text(dead[0]), "dead", None)
    return forgotten


def retry(tx: Transaction, ids: Sequence[str]) -> list[bool]:
    """Make dead jobs ready now, as if they had never run, but for their certificates; for each whether it was dead."""
    retried = []
    for id in ids:
        dead = tx.db.execute(_DEAD, (id,)).fetchone()
        retried.append(dead is not None)
        if dead is not None:
            tx.db.execute(_RETRY, (tx.now, tx.now, id))
            tx.move(text(dead[0]), "dead", "ready")
            tx.rings = True
    return retried


def walk(tx: Transaction, queue: str, after: Mark | None, until: Mark, limit: int) -> list[Mark]:
    """`Store.dead`."""
    bounds = (*(after or (-1e301, "")), *until, limit)
    return sorted(mark for test, values in _of(queue) for mark in _marks(tx, _WALK % test, (*values, *bounds)))[:limit]


def last_dead(tx: Transaction, queue: str) -> Mark | None:
    return max((mark for test, values in _of(queue) for mark in _marks(tx, _LAST % test, values)), default=None)


def _of(queue: str) -> list[tuple[str, tuple[str, ...]]]:
    """Conditions, and what they ask for, that find the rows of `queue`."""
    return [("queue = ?", (queue,))] if queue else [(test, ()) for test in NO_TEXT]


def _marks(tx: Transaction, query: str, values: Sequence[Any]) -> list[Mark]:
    return [Mark(*found) for found in tx.db.execute(query, values)]


def newest(tx: Transaction, queue: str | None, limit: int) -> list[str]:
    """Ids of the last `limit` that died, the last first."""
    where = "" if queue is None else "AND queue = ? "
    found = tx.db.execute(
        f"SELECT id FROM kq_job WHERE state = 'dead' {where}ORDER BY died_at DESC, id DESC LIMIT ?",
        (limit,) if queue is None else (queue, limit),
    )
    return [id for (id,) in found]


def last_words(tx: Transaction, id: str, state: str) -> tuple[bytes, ...]:
    """The last certificate, of a dead job."""
    found = tx.db.execute(_LAST_WORDS, (id,)).fetchone() if state == "dead" else None
    return () if found is None or found[0] is None else found


def cancel(tx: Transaction, id: str, certificate: bytes) -> bool:
    """Bury a job that waits; whether it did."""
    waiting = tx.db.execute(_WAITING, (id,)).fetchone()
    if waiting is None:
        return False
    tx.db.execute("UPDATE kq_job SET state = 'dead', died_at = ?, number = number + 1 WHERE id = ?", (tx.now, id))
    tx.move(text(waiting[0]), waiting[1], "dead")
    certify(tx, id, certificate)
    return True
