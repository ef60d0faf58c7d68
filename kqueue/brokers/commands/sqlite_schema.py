"""The SQLite schema, and the way there from the one before.

Each state has a partial index that holds the rows of that state and no others, so that a verb costs O(log n) a job however many
dead or delayed ones there are. How many stand where is kept in `kq_count`; see sqlite_transaction.py.

SQLite is dynamically typed, and whoever can write the file can write anything. So:

Rule 1. Only an `id` must be one, by a CHECK, since a token has to find its row again. Every other column may hold anything.
Rule 2. An envelope is handed out as the bytes it is; a counter that is no integer counts as 0; a strange place is still a place.
Rule 3. What no verb would ever find (an unknown state or lane, a due time that never comes) stands in the index `kq_job_odd`, and
        a sweep buries it with a certificate, where people see it.

Processes of version 1 that have the file open when it is brought up to date go on writing it: all that they name is still there,
with the meaning that it had. They count nothing, which a sweep makes good.
"""

from __future__ import annotations

from typing import Final

from ..base import QueueStats

VERSION: Final = 2  # of the schema; stands in kq_meta, since user_version belongs to the application that shares the file

# What a row needs to be found by the verb that moves it on; NULL (a comparison with one) is no better than 0.
ODD: Final = """CASE state
    WHEN 'ready' THEN typeof(queue) = 'text' AND lane IN ('inline', 'isolated')
    WHEN 'delayed' THEN typeof(queue) = 'text' AND lane IN ('inline', 'isolated') AND available_at BETWEEN -1e12 AND 1e12
    WHEN 'leased' THEN typeof(epoch) = 'text'
    WHEN 'done' THEN 1
    WHEN 'dead' THEN 1
  END IS NOT TRUE"""

_DEAD_INDEX: Final = "CREATE INDEX kq_job_dead ON kq_job (queue, died_at, id) WHERE state = 'dead'"
_COUNT_TABLE: Final = (
    "CREATE TABLE kq_count (queue TEXT NOT NULL, state TEXT NOT NULL, n INTEGER, PRIMARY KEY (queue, state)) WITHOUT ROWID"
)

SCHEMA: Final = (
    # schema: the version of it; beat: when somebody last renewed or swept, by the clock that the epochs lapse by
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
  died_at REAL,                  -- dead: since when
  envelope BLOB,
  result BLOB
)""",
    "CREATE INDEX kq_job_ready ON kq_job (queue, lane, place, id) WHERE state = 'ready'",
    "CREATE INDEX kq_job_delayed ON kq_job (queue, available_at) WHERE state = 'delayed'",
    "CREATE INDEX kq_job_leased ON kq_job (epoch, queue) WHERE state = 'leased'",
    "CREATE INDEX kq_job_done ON kq_job (expires_at) WHERE state = 'done'",
    _DEAD_INDEX,
    f"CREATE INDEX kq_job_odd ON kq_job (id) WHERE {ODD}",
    _COUNT_TABLE,
    "CREATE TABLE kq_certificate (job_id TEXT NOT NULL, n INTEGER NOT NULL, body BLOB, PRIMARY KEY (job_id, n))",
    """CREATE TABLE kq_epoch (
  epoch TEXT PRIMARY KEY NOT NULL,
  identity TEXT,
  expires_at REAL,               -- for version 1, which has nothing else: seconds since 1970
  boot TEXT,                     -- of the host; NULL: version 1 wrote this row
  lapses_at REAL,                -- seconds of that boot (CLOCK_BOOTTIME); 0: given up
  lease_s REAL,
  lapsed INTEGER DEFAULT 0       -- 1: it had lapsed and reserved all the same; its next renewal will say so
)""",
    "CREATE TABLE kq_document (key TEXT PRIMARY KEY NOT NULL, value BLOB)",
    f"INSERT INTO kq_meta (key, value) VALUES ('schema', {VERSION})",
)

FROM_VERSION_1: Final = (
    "ALTER TABLE kq_job ADD COLUMN memory INTEGER DEFAULT 0",
    "ALTER TABLE kq_job ADD COLUMN died_at REAL",
    "UPDATE kq_job SET died_at = CAST(strftime('%s', 'now') AS REAL) WHERE state = 'dead'",  # since nothing says when it was
    "DROP INDEX kq_job_dead",
    _DEAD_INDEX,
    _COUNT_TABLE,
    *(
        f"INSERT INTO kq_count SELECT queue, '{state}', count(*) FROM kq_job WHERE state = '{state}' AND typeof(queue) = 'text' "
        "GROUP BY queue"
        for state in QueueStats._fields
    ),
    "ALTER TABLE kq_epoch ADD COLUMN boot TEXT",
    "ALTER TABLE kq_epoch ADD COLUMN lapses_at REAL",
    "ALTER TABLE kq_epoch ADD COLUMN lease_s REAL",
    "ALTER TABLE kq_epoch ADD COLUMN lapsed INTEGER DEFAULT 0",
    "UPDATE kq_meta SET value = 2 WHERE key = 'schema'",
)
