"""One open transaction on a queue's SQLite file, and how many jobs stand where in it.

`kq_count` has a number for each queue and state, so that nobody has to count index entries: a million take 0.15 s. Commands say
what they move, and the sums are written once, before COMMIT. Triggers would see to it for every writer, but they cost a tenth of
the throughput (decision 0010). So what somebody with a shell moves is not counted, and `check_counts` finds that out.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, Final

from ..base import QueueStats
from .host_clock import HostClock

STATES: Final = QueueStats._fields
CHECKED_ROWS: Final = 20_000  # that one check counts at most, which takes about 1 ms

_ADD: Final = (
    "INSERT INTO kq_count (queue, state, n) VALUES (?, ?, ?) ON CONFLICT (queue, state) DO UPDATE SET n = n + excluded.n"
)
_SET: Final = "INSERT OR REPLACE INTO kq_count (queue, state, n) VALUES (?, ?, ?)"
_COUNT: Final = "SELECT n FROM kq_count WHERE queue = ? AND state = ?"


class Transaction:
    """What commands run in. All of it happens at one moment."""

    __slots__ = ("boot", "db", "moved", "now", "rings", "ticks")

    def __init__(self, db: sqlite3.Connection, clock: HostClock) -> None:
        self.db = db
        self.now = clock.wall()  # seconds since 1970: when jobs are due
        self.ticks = clock.ticks()  # seconds of `boot`: who is alive
        self.boot = clock.boot
        self.rings = False  # something became ready or delayed: ring, once this is committed
        self.moved: dict[tuple[str, str], int] = {}  # (queue, state) -> how many more stand there

    def move(self, queue: str, before: str | None, after: str | None, jobs: int = 1) -> None:
        """Note that `jobs` of `queue` went from one state to another; None: from or to nowhere."""
        moved = self.moved
        if before is not None:
            moved[queue, before] = moved.get((queue, before), 0) - jobs
        if after is not None:
            moved[queue, after] = moved.get((queue, after), 0) + jobs

    def count(self, queue: str, state: str) -> int:
        """How many of `queue` are in `state`."""
        found = self.db.execute(_COUNT, (queue, state)).fetchone()
        return (0 if found is None else count(found[0])) + self.moved.get((queue, state), 0)

    def write_counts(self) -> None:
        """Add what was moved to what is stored."""
        changes = [(queue, state, n) for (queue, state), n in self.moved.items() if n and state in STATES]
        if changes:
            self.db.executemany(_ADD, changes)
        self.moved.clear()


def stats(tx: Transaction) -> dict[str, QueueStats]:
    """By queue; those in which nothing stands are left out."""
    tx.write_counts()
    counts: dict[str, QueueStats] = {}
    for queue, state, n in tx.db.execute("SELECT queue, state, n FROM kq_count WHERE n > 0"):
        if state in STATES:
            counts[text(queue)] = counts.get(text(queue), QueueStats())._replace(**{state: count(n)})
    return counts


def check_counts(tx: Transaction) -> None:
    """Count anew what does not agree with the rows.

    Small numbers are compared as they are. Of a large one only whether there are so many as to be large, since a check must not
    take long: one that is wrong is found when it shrinks.
    """
    tx.write_counts()
    stored: dict[tuple[str, str], Any] = {
        (queue, state): n for queue, state, n in tx.db.execute("SELECT queue, state, n FROM kq_count")
    }
    epochs = distinct(tx, "epoch", "leased")
    queues = {"", *(queue for queue, _ in stored)}
    for state in ("ready", "delayed", "dead"):
        queues.update(distinct(tx, "queue", state))
    large = max(1, CHECKED_ROWS // (len(queues) * (len(STATES) + len(epochs))))
    for queue in queues:
        for state in STATES:
            n = stored.get((queue, state), 0)
            there = _rows(tx, queue, state, epochs, large)
            if n != there and not (isinstance(n, int) and min(n, there) > large):
                tx.db.execute(_SET, (queue, state, _rows(tx, queue, state, epochs, -1)))
    tx.db.execute("DELETE FROM kq_count WHERE n = 0")


NO_TEXT: Final = ("queue = ''", "queue IS NULL", "queue >= x''")  # what counts as '': three, since an index answers no OR


def _rows(tx: Transaction, queue: str, state: str, epochs: Sequence[str], large: int) -> int:
    """How many rows there are; `large`: or, when they are more, any number above it. -1: all."""
    total = 0
    for where in ("queue = :queue",) if queue else NO_TEXT:
        for epoch in epochs if state == "leased" else (None,):  # which comes first in that state's index
            where_epoch = "" if epoch is None else "AND epoch = :epoch"
            found = f"SELECT 1 FROM kq_job WHERE state = '{state}' {where_epoch} AND {where} LIMIT :most"
            values = {"queue": queue, "epoch": epoch, "most": large if large < 0 else large + 1}
            total += int(tx.db.execute(f"SELECT count(*) FROM ({found})", values).fetchone()[0])
    return total


def distinct(tx: Transaction, column: str, state: str) -> list[str]:
    """The values that stand in front of a state's index: one seek each, since DISTINCT would read the whole index."""
    lowest = f"SELECT min({column}) FROM kq_job WHERE state = '{state}'"
    walk = (
        f"WITH RECURSIVE found (value) AS ({lowest} UNION ALL "
        f"SELECT ({lowest} AND {column} > found.value) FROM found WHERE found.value IS NOT NULL) "
        "SELECT value FROM found WHERE typeof(value) = 'text'"
    )
    return [value for (value,) in tx.db.execute(walk).fetchall()]


def count(value: Any) -> int:
    """A number that may be counted on: SQLite's integers end at 2**63, and whoever reads this one adds to it."""
    return value if isinstance(value, int) and 0 <= value < 1 << 62 else 0


def text(value: Any) -> str:
    return value if isinstance(value, str) else ""
