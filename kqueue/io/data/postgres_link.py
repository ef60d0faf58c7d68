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
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
from psycopg import capabilities, generators, pq, waiting
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ...errors import UsageError
from ...kernel.traps import wait_io
from ..errors import ConnectFailed, ConnectionLost, NameNotFound, TimedOut
from ..gate import Gate, gate
from ..names import addresses_of
from ..operation import Operation
from ..surroundings import left, now, release
from .errors import PostgresError, PostgresRefused, PostgresTryAgain

T = TypeVar("T")
Steps = Generator[Any, Any, T]

CONNECT_S: Final = 10.0  # for all addresses, unless connect_timeout= says otherwise
MEND_S: Final = 5.0
LAST_S: Final = 0.5  # for telling the server to stop when the loop has ended; this one blocks
FAIR: Final = 64  # waits that had nothing to wait for, until others may run
ROWS: Final = 1000  # that are made of what the server sent, until others may run

_IDLE: Final = pq.TransactionStatus.IDLE
_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_IN_ERROR: Final = pq.TransactionStatus.INERROR
_UNKNOWN: Final = pq.TransactionStatus.UNKNOWN
_PORT: Final = "5432"
_KEEPALIVE: Final = {  # so that a server that vanished is noticed within a minute; unless the DSN says otherwise
    "keepalives_idle": "15", "keepalives_interval": "5", "keepalives_count": "3", "tcp_user_timeout": "30000",
    "application_name": "kqueue",
}  # fmt: skip
# SQLSTATEs of which the same may work later: connection, rollback, resources, shutdown, lock, a snapshot that is too old.
_PASSES: Final = ("08", "40001", "40P01", "53", "57P01", "57P02", "57P03", "55P03", "72000")
_ADVICE: Final = {
    "42P01": "is the schema in its search_path, and the migration done?",
    "25P02": "a statement of this transaction failed before, so nothing more can be done in it",
    "26000": "a pooler in between lends the connection to others: postgres(…, prepare=False)",
}


class _Torn(BaseException):
    """A wait was interrupted. No Exception, so that psycopg passes it on in silence."""


class _Driven(psycopg.AsyncConnection[Any]):
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


def _execute(cursor: Any, sql: Any, params: Any, prepare: bool, connection: _Driven) -> Awaitable[Any]:
    return cursor.execute(sql, params, prepare=prepare)  # type: ignore[no-any-return]


def drive(gen: Any, fd: int, deadline: float | None, whose: _Driven | None = None) -> Steps[Any]:
    """Run one of psycopg's generators. TimedOut at `deadline`."""
    try:
        wanted = next(gen)
        while True:
            ready = yield from wait_io(fd, wanted, left(deadline))
            if not ready:
                raise TimedOut("the server did not answer in time")
            if whose is not None:
                whose._unbroken = 0
            wanted = gen.send(ready)
    except StopIteration as end:
        return end.value
    finally:
        gen.close()


class Link:
    """A connection, its place in the gate, and what is known of it. `address` has no secrets."""

    def __init__(self, connection: _Driven, gate: Gate, address: str, spec: Spec) -> None:
        self.connection = connection
        self.address = address
        self.spec = spec
        self.changed = False  # a statement changed the session, so nobody else may have it
        self._gate: Gate | None = gate  # None: closed
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

    def run(self, make: Callable[[_Driven], Awaitable[T]], deadline: float | None) -> Steps[T]:
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
        text = _first_line(str(error))
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
            yield from self.run(partial(_execute, cursor, sql, params, self.spec.prepare), deadline)
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
        other = yield from open_link(self.spec, deadline)
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


# -- connecting -----------------------------------------------------------------------------------------------------------


class Spec:
    """Where to connect to, and how. Raises UsageError when nobody can read the DSN."""

    def __init__(self, dsn: str, prepare: bool) -> None:
        try:
            self.parameters = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
        except psycopg.Error as error:
            raise UsageError(
                f"cannot read the DSN of io.postgres(): {_without(str(error), dsn)}; write postgresql://user:password@host/database"
            ) from None
        if "service" in self.parameters:
            raise UsageError("service= in the DSN of io.postgres() is not followed; write host=, dbname= and user= instead")
        self.prepare = prepare
        found = {item.keyword.decode(): item.val for item in pq.Conninfo.get_defaults()}
        known = {name: value.decode() for name, value in found.items() if value}
        self.settings = {**_KEEPALIVE, **known, **self.parameters}
        self.connect_s = float(self.parameters.get("connect_timeout") or CONNECT_S)

    @property
    def address(self) -> str:
        """For messages."""
        settings = self.settings
        host = settings.get("host") or settings.get("hostaddr") or "localhost"
        user = f"{settings['user']}@" if "user" in settings else ""
        return f"postgresql://{user}{host}:{settings.get('port') or _PORT}/{settings.get('dbname') or settings.get('user', '')}"

    def hosts(self) -> list[tuple[str, str, str]]:
        """Host, address ("": to be looked up) and port of each server that it names."""
        names = (self.settings.get("host") or "").split(",")
        addresses = (self.settings.get("hostaddr") or "").split(",")
        count = max(len(names), len(addresses))
        ports = (self.settings.get("port") or _PORT).split(",")
        names, addresses = names * (count if len(names) == 1 else 1), addresses * (count if len(addresses) == 1 else 1)
        ports = ports * count if len(ports) == 1 else ports
        return list(zip(names, addresses, ports, strict=False))


def open_link(spec: Spec, deadline: float | None) -> Steps[Link]:
    """A connection. ConnectFailed, PostgresRefused, PostgresTryAgain, NameNotFound, TimedOut."""
    until = now() + spec.connect_s
    limit = until if deadline is None else min(until, deadline)
    attempts: list[dict[str, str]] = []
    trouble: list[Exception] = []
    for host, address, port in spec.hosts():
        try:
            found = yield from _look_up(host, address, int(port or _PORT), limit)
        except NameNotFound as error:
            trouble.append(error)
            continue
        attempts += [{"host": host, "hostaddr": each, "port": port} if each else {"host": host, "port": port} for each in found]
    for place, attempt in enumerate(attempts):
        share = now() + max(0.0, limit - now()) / (len(attempts) - place)
        try:
            return (yield from _connect(spec, attempt, share))
        except (ConnectFailed, PostgresRefused, PostgresTryAgain, TimedOut) as error:
            if isinstance(error, TimedOut) and left(share):
                raise  # that of a scope around us
            trouble.append(error)
    raise trouble[-1]


def _look_up(host: str, address: str, port: int, deadline: float) -> Steps[Sequence[str]]:
    """The addresses of a host; [""]: libpq needs none."""
    if address or not host or host.startswith(("/", "@")):
        return [address]
    found = yield from addresses_of(host, port, deadline)
    return [str(at[0]) for _, at in found]


def _connect(spec: Spec, attempt: dict[str, str], deadline: float) -> Steps[Link]:
    places = gate()
    settings = {**_KEEPALIVE, **spec.parameters, **{name: value for name, value in attempt.items() if value}}
    yield from places.take(f"to connect to {spec.address}", deadline)
    try:
        pgconn = yield from drive_connecting(generators.connect(make_conninfo("", **settings)), deadline)
        connection = _Driven(pgconn)
        connection.prepare_threshold = 5 if spec.prepare else None
        yield from connection.set_autocommit(True).__await__()  # asks the server nothing
        return Link(connection, places, spec.address, spec)
    except BaseException as error:
        places.give()
        if isinstance(error, TimedOut):
            raise TimedOut(f"{spec.address} did not answer in time: no connection came about") from None
        if isinstance(error, psycopg.Error):
            raise _read_refusal(spec, attempt, error) from None
        raise


_NOT_NOW: Final = ("starting up", "shutting down", "too many clients", "too many connections", "remaining connection slots",
                   "recovery", "not accepting connections", "not yet accepting", "crash")  # fmt: skip


def _read_refusal(spec: Spec, attempt: dict[str, str], error: psycopg.Error) -> Exception:
    """Why there is no connection. libpq has only words for it, in the language of the server; FATAL is the server's own."""
    text = _first_line(str(error).removeprefix("connection failed: ").removeprefix("connection is bad: "))
    if "FATAL" not in text and "no password supplied" not in text:
        return ConnectFailed(f"cannot connect to {spec.address}: {text}")
    said = text.partition("FATAL:")[2].strip() or text
    if any(words in said for words in _NOT_NOW):
        return PostgresTryAgain(f"{spec.address} takes no connection now: {said}", "57P03")
    return PostgresRefused(f"{spec.address} does not let us in: {said}; check the DSN, and the server's pg_hba.conf")


def _first_line(text: str) -> str:
    return " ".join(text.strip().split("\n", 1)[0].split())[:500]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__


def _without(text: str, dsn: str) -> str:
    """What libpq says of a DSN, which may have it in it, and with it a password."""
    return "it has something in it that libpq does not know" if "@" in dsn or "password" in dsn else _first_line(text)
