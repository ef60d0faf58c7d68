"""What databases answer that is no answer. Connections that fail or break are those of kqueue.io.errors, for both.

    IOFailed
     ├─ RedisError             Redis said no; `.code` is its word ("WRONGTYPE")
     │   ├─ RedisTryAgain      … and says yes later: it loads, it is full, it is being replaced
     │   └─ RedisRedirected    the key is another node's (MOVED, ASK)
     └─ PostgresError          PostgreSQL said no; `.sqlstate` is its word ("23505")
         ├─ PostgresTryAgain   … and the same may work when it is done again: a serialization failure, a deadlock, a shutdown
         ├─ PostgresRefused    it does not let us in: password, database, pg_hba.conf
         ├─ PostgresAborted    the transaction does not count, though nothing was raised in it that came this far
         └─ OutcomeUnknown     the connection broke during COMMIT (also a ConnectionLost)

So `retry_on=(io.ConnectFailed, io.ConnectionLost, io.RedisTryAgain, io.PostgresTryAgain)` is what is worth a retry.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConnectionLost, IOFailed


class RedisError(IOFailed):
    """An error reply. `code`: its first word."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class RedisTryAgain(RedisError):
    """An error reply that passes: the same command may work later."""


class RedisRedirected(RedisError):
    """The key is on another node of a Redis Cluster."""


class PostgresError(IOFailed):
    """An error of the server, or of what was asked of it.

    `sqlstate`: its five letters, "" when it is not the server's. `diag`: what else the server said, as psycopg has it,
    or None.
    """

    def __init__(self, message: str, sqlstate: str = "", diag: Any = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.diag = diag


class PostgresTryAgain(PostgresError):
    """The transaction was rolled back, and may work when it is done again."""


class PostgresRefused(PostgresError):
    """The server does not let us in."""


class PostgresAborted(PostgresError):
    """A transaction that was to be committed could not be: it was rolled back."""


class OutcomeUnknown(PostgresError, ConnectionLost):
    """The connection broke while a transaction was committed: it counts, or it does not."""
