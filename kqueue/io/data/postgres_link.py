"""One connection to PostgreSQL: psycopg 3, driven by our traps.

psycopg splits what it does into generators that say what they wait for, and a `wait` that waits for it. So here is an
AsyncConnection whose `wait` is ours, and all of psycopg works: parameters, types, prepared statements, COPY. Nothing of asyncio
runs, though psycopg imports it.

Rule 1. A link is always in autocommit: a transaction is what kqueue.io begins and ends, and nothing else.
Rule 2. A wait that is interrupted tears the link: it does nothing more until it is mended, or closed.
Rule 3. Mending cancels what the server still does, reads what it still says, and rolls back. What cannot be mended in MEND_S
        seconds is closed.

Loaded with the first connection: psycopg is 17 MB, with asyncio, ssl, threading and decimal.
"""

from __future__ import annotations

import select
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
from psycopg import capabilities, generators, pq, waiting

from ...errors import UsageError
from ...kernel.traps import READ, wait_io
from ..errors import ConnectionLost, TimedOut
from ..gate import Gate
from ..operation import Operation
from ..surroundings import left, now, release
from .errors import PostgresError, PostgresTryAgain

T = TypeVar("T")
Steps = Generator[Any, Any, T]

MEND_S: Final = 5.0
LAST_S: Final = 0.5  # for telling the server to stop when the loop has ended; this one blocks
FAIR: Final = 64  # waits that had nothing to wait for, until others may run
ROWS: Final = 1000  # that are made of what the server sent, until others may run

_IDLE: Final = pq.TransactionStatus.IDLE
_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_IN_ERROR: Final = pq.TransactionStatus.INERROR
_UNKNOWN: Final = pq.TransactionStatus.UNKNOWN
# SQLSTATEs of which the same may work later: connection, rollback, resources, shutdown, lock, a snapshot that is too old.
_PASSES: Final = ("08", "40001", "40P01", "53", "57P01", "57P02", "57P03", "55P03", "72000")
_ADVICE: Final = {
    "42P01": "is the schema in its search_path, and the migration done?",
    "25P02": "a statement of this transaction failed before, so nothing more can be done in it",
    "26000": "a pooler in between lends the connection to others: postgres(…, prepare=False)",
}


class _Torn(BaseException):
    """A wait was interrupted. No Exception, so that psycopg passes it on in silence."""


class Driven(psycopg.AsyncConnection[Any]):
    """Waits by our traps."""

    deadline: float | None = None  # for what is done now
    torn: BaseException | None = None  # what interrupted it; None: it is whole
    _unbroken = 0  # waits in a row that had nothing to wait for

    async def wait(self, gen: Any, interval: float = 0.0, timeout: float | None = None) -> Any:
        return await Operation(self._wait(gen))

    def _wait(self, gen: Any) -> Steps[Any]:
        if self.torn is not None:
            raise _Torn
        self._unbroken += 1
        try:
            if self._unbroken % FAIR == 0:
                yield
            return (yield from drive(gen, self.pgconn.socket, self.deadline, self))
        except psycopg.Error:
            raise
        except BaseException as error:
            self.torn = error
            raise _Torn from None


def _execute(cursor: Any, sql: Any, params: Any, prepare: bool, connection: Driven) -> Awaitable[Any]:
    return cursor.execute(sql, params, prepare=prepare)  # type: ignore[no-any-return]


def drive(gen: Any, fd: int, deadline: float | None, whose: Driven | None = None) -> Steps[Any]:
    """Run one of psycopg's generators. TimedOut at `deadline`, though there may always be more to read."""
    try:
        wanted = next(gen)
        while True:
            ready = yield from wait_io(fd, wanted, left(deadline))
            if not ready:
                raise TimedOut("the server did not answer in time")
            if whose is not None:
                whose._unbroken = 0
            wanted = gen.send(ready)
            if ready & READ and left(deadline) == 0:
                raise TimedOut("the server did not come to an end in time")
    except StopIteration as end:
        return end.value
    finally:
        gen.close()


class Link:
    """A connection, its place in the gate, and what is known of it. `address` has no secrets."""

    def __init__(self, connection: Driven, gate: Gate, address: str, open_other: Callable[[float], Steps[Link]]) -> None:
        self.connection = connection
        self.address = address
        self.prepares = connection.prepare_threshold is not None
        self.changed = False  # a statement changed the session, so nobody else may have it
        self._gate: Gate | None = gate  # None: closed
        self._open_other = open_other  # another one to the same server, by a deadline
        self._fd = connection.pgconn.socket
        self._busy = False
        self._cancelling: Any = None  # what tells the server to stop, while it does

    @property
    def closed(self) -> bool:
        return self._gate is None or self.connection.closed

    @property
    def torn(self) -> BaseException | None:
        return self.connection.torn

    @property
    def is_idle(self) -> bool:
        """Whole, and in no transaction."""
        return not self.closed and self.torn is None and self.connection.pgconn.transaction_status == _IDLE

    @property
    def is_failed(self) -> bool:
        """In a transaction that cannot be committed any more."""
        return bool(self.connection.pgconn.transaction_status == _IN_ERROR)

    def tear(self, error: BaseException) -> None:
        """Nothing more is to be done with it until it is mended."""
        self.connection.torn = self.connection.torn or error

    def is_alive(self) -> bool:
        pgconn = self.connection.pgconn
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        try:
            while self.is_idle and poll.poll(0):
                pgconn.consume_input()  # what it says while nobody asks: a notice, a last word, or that it is gone
        except psycopg.Error:
            return False
        return self.is_idle

    def close(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            if self._cancelling is not None:
                self._cancelling.finish()
            release(self._fd)
            self.connection.pgconn.finish()
            gate.give()

    def abandon(self) -> None:
        if not self.closed and self.connection.pgconn.transaction_status == _ACTIVE and capabilities.has_cancel_safe():
            cancelling = self._cancelling or self.connection.pgconn.cancel_conn()
            try:
                if cancelling is not self._cancelling:
                    cancelling.start()
                waiting.wait_conn(generators.cancel(cancelling), interval=LAST_S, timeout=LAST_S)
            except (psycopg.Error, OSError):
                pass  # nobody is left to be told
            finally:
                cancelling.finish()
        self.close()

    # -- doing something ----------------------------------------------------------------------------------------------

    def run(self, make: Callable[[Driven], Awaitable[T]], deadline: float | None) -> Steps[T]:
        """Do what psycopg does by `make`. PostgresError, ConnectionLost, TimedOut; torn when it is interrupted."""
        connection = self.connection
        if self._busy:
            raise UsageError(f"two tasks use one connection to {self.address} at once; let one wait for the other")
        if connection.torn is not None:
            raise PostgresError(f"{self.address}: this was interrupted before ({_short(connection.torn)}), and does nothing more")
        connection.deadline = deadline
        self._busy, began = True, now()
        try:
            return (yield from make(connection).__await__())
        except _Torn:
            torn: BaseException | None = self.connection.torn
            if isinstance(torn, TimedOut) and deadline is not None and not left(deadline):
                torn = TimedOut(f"{self.address} did not answer in {now() - began:.3g} s; it is told to stop")
            raise torn or GeneratorExit from None
        except psycopg.Error as error:
            raise self.read(error) from error
        finally:
            self._busy = False

    def read(self, error: psycopg.Error) -> PostgresError | ConnectionLost:
        """What an error of psycopg means."""
        sqlstate = error.sqlstate or ""
        text = first_line(str(error))
        if self.connection.closed and not sqlstate.startswith("57P"):
            return ConnectionLost(f"{self.address}: the connection broke: {text}")
        advice = f"; {_ADVICE[sqlstate]}" if sqlstate in _ADVICE else ""
        detail = error.diag.message_detail if sqlstate else None
        said = f"{self.address}: {text}{f' ({detail})' if detail else ''}{f' [{sqlstate}]' if sqlstate else ''}{advice}"
        kind = PostgresTryAgain if sqlstate.startswith(_PASSES) and sqlstate else PostgresError
        return kind(said, sqlstate, error.diag if sqlstate else None)

    def execute(self, sql: Any, params: Any, factory: Any, deadline: float | None) -> Steps[Any]:
        """A cursor that has executed it."""
        cursor = self.connection.cursor(row_factory=factory)
        yield from self.run(lambda connection: cursor.execute(sql, params), deadline)
        self._look_at(cursor, sql)
        return cursor

    def command(self, sql: str, deadline: float | None) -> Steps[str]:
        """One of our own: BEGIN and its kind. The tag that the server answers with."""
        cursor = self.connection.cursor()
        yield from self.run(lambda connection: cursor.execute(sql.encode(), prepare=False), deadline)
        return cursor.statusmessage or ""

    def rows(self, sql: Any, params: Any, factory: Any, deadline: float | None) -> Steps[list[Any]]:
        """All rows; [] of what has none."""
        cursor = yield from self.execute(sql, params, factory, deadline)
        if cursor.description is None:
            return []
        rows: list[Any] = []
        while True:
            some = yield from self.run(lambda connection: cursor.fetchmany(ROWS), deadline)
            rows += some
            if len(some) < ROWS:
                return rows
            yield

    def execute_many(self, sql: Any, many: Any, deadline: float | None) -> Steps[int]:
        """One after the other. (psycopg's executemany pipelines, and cannot be interrupted in that without a sound.)"""
        cursor, count = self.connection.cursor(), 0
        for params in many:
            yield from self.run(partial(_execute, cursor, sql, params, self.prepares), deadline)
            count += max(0, cursor.rowcount)
        return count

    def _look_at(self, cursor: Any, sql: Any) -> None:
        tag = cursor.statusmessage or ""
        if tag in ("SET", "LISTEN", "PREPARE", "DECLARE CURSOR", "LOAD"):
            words = str(sql).lower().split(None, 2)[:2] if isinstance(sql, (str, bytes)) else []
            self.changed = self.changed or words not in (["set", "local"], ["set", "transaction"])

    # -- mending ------------------------------------------------------------------------------------------------------

    def mend(self) -> Steps[bool]:
        """Make it idle again, whatever was interrupted. False: it is to be closed."""
        deadline = now() + MEND_S
        pgconn = self.connection.pgconn
        try:
            if pgconn.pipeline_status != pq.PipelineStatus.OFF or self.closed:
                return False
            if pgconn.transaction_status == _ACTIVE:
                yield from self._cancel(deadline)
                yield from self._drain(deadline)
                yield from self._say(b"SELECT 1", deadline)  # a late signal of the cancelling hits this, and nobody's work
            if pgconn.transaction_status not in (_IDLE, _UNKNOWN):
                yield from self._say(b"ROLLBACK", deadline)
        except (psycopg.Error, OSError):
            return False
        if self.closed or pgconn.transaction_status != _IDLE:
            return False
        self.connection.torn = None
        return True

    def _cancel(self, deadline: float) -> Steps[None]:
        if capabilities.has_cancel_safe():
            self._cancelling = self.connection.pgconn.cancel_conn()
            self._cancelling.start()
            yield from drive_connecting(generators.cancel(self._cancelling), deadline)
            self._cancelling.finish()
            self._cancelling = None
            return
        # Before libpq 17, cancelling blocks. So we ask as anybody would.
        other = yield from self._open_other(deadline)
        try:
            pid = self.connection.pgconn.backend_pid
            yield from other.run(lambda connection: connection.execute("SELECT pg_cancel_backend(%s)", [pid]), deadline)
        finally:
            other.close()

    def _drain(self, deadline: float) -> Steps[None]:
        """Read all that it still says, and end a COPY."""
        pgconn = self.connection.pgconn
        while results := (yield from drive(generators.execute(pgconn), self._fd, deadline)):
            try:
                if results[-1].status == pq.ExecStatus.COPY_IN:
                    yield from drive(generators.copy_end(pgconn, b"given up"), self._fd, deadline)
                elif results[-1].status == pq.ExecStatus.COPY_OUT:
                    while isinstance((yield from drive(generators.copy_from(pgconn), self._fd, deadline)), memoryview):
                        pass
            except psycopg.Error:
                if pgconn.status != pq.ConnStatus.OK:
                    raise

    def _say(self, sql: bytes, deadline: float) -> Steps[None]:
        pgconn = self.connection.pgconn
        pgconn.send_query(sql)
        yield from drive(generators.execute(pgconn), self._fd, deadline)


def drive_connecting(gen: Any, deadline: float | None) -> Steps[Any]:
    """As `drive`, for those that say which fd they wait for."""
    try:
        fd, wanted = next(gen)
        while True:
            ready = yield from wait_io(fd, wanted, left(deadline))
            if not ready:
                raise TimedOut("no connection came about in time")
            fd, wanted = gen.send(ready)
    except StopIteration as end:
        return end.value
    finally:
        gen.close()


def first_line(text: str) -> str:
    return " ".join(text.strip().split("\n", 1)[0].split())[:500]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__
