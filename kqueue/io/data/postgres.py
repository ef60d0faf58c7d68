"""PostgreSQL for jobs: `postgres`. Needs kqueue[postgres], which is psycopg 3.

    db = io.postgres("postgresql://app:secret@db.example.org/shop")

    rows = yield db.query("select id, name from users where age > %s", [18])
    name = yield db.value("select name from users where id = %s", [7])
    count = yield db.execute("update users set seen = now() where id = %s", [7])

    def move(tx, amount):
        yield tx.execute("update accounts set balance = balance - %s where id = 1", [amount])
        yield tx.execute("update accounts set balance = balance + %s where id = 2", [amount])

    yield db.transaction(move, 100)              # committed when it returns, rolled back when it raises

    async with db.transaction() as tx:           # the same in an `async def` job
        await tx.execute("…")

Outside of a transaction each statement is one of its own. A statement that is interrupted (its job was cancelled, its time was
up) is cancelled at the server as well, and its connection is used again when that is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, overload

from ...context import current_or_none, forget, keep
from ...errors import UsageError
from ...kernel.loop import running
from ..closing import Closing
from ..errors import Closed, TimedOut
from ..operation import Operation, operation
from ..surroundings import deadline_in, left
from .pool import IDLE_S, LIFE_S, Lease, Pool, pool_of

if TYPE_CHECKING:
    from .postgres_copy import CopyIn, CopyOut
    from .postgres_link import Link
    from .postgres_transaction import Transaction

T = TypeVar("T")
Params = Sequence[Any] | Mapping[str, Any] | None
Steps = Generator[Any, Any, T]
Work = Callable[["Link", float | None], Steps[T]]

ISOLATION: Final = ("", "read committed", "repeatable read", "serializable")


class Options(NamedTuple):
    """What tells pools from each other."""

    dsn: str
    max_connections: int
    prepare: bool
    idle_s: float
    life_s: float


def postgres(
    dsn: str, *, rows: type[tuple[Any, ...]] | type[dict[str, Any]] = tuple, timeout: float | None = None,
    max_connections: int = 10, prepare: bool = True, idle: float = IDLE_S, lifetime: float = LIFE_S,
) -> Postgres:  # fmt: skip
    """The database at `dsn`, a URL or "host=… dbname=…" (what it leaves out is as libpq has it: PGHOST, ~/.pgpass and the like).
    Connects to nobody yet, and may be called anywhere, as often as one likes.

    `rows`: make each a tuple, or a dict. `timeout`: seconds for each statement, unless it has its own; None: the job's own.
    `max_connections`: how many statements and transactions go on at once. `prepare`: what is executed often is prepared at the
    server; False where a pooler like pgbouncer stands in between. `idle`, `lifetime`: seconds after which a connection is closed.
    """
    if max_connections < 1:
        raise UsageError(f"postgres(): max_connections is at least 1, not {max_connections!r}")
    if rows not in (tuple, dict):
        raise UsageError(f"postgres(): rows is tuple or dict, not {rows!r}")
    return Postgres(Options(dsn, max_connections, prepare, idle, lifetime), rows, timeout)


class Statements(ABC):
    """What can be asked of a database, and of a transaction in it.

    `%s` in SQL stands for the next of `params` (a list), `%(name)s` for that of a dict: the server gets them apart from the text,
    and nothing has to be quoted. A `%` is written `%%` where there are any. `timeout`: seconds, None: as the database has it.
    """

    _rows: Any
    _timeout_s: float | None

    @abstractmethod
    def _do(self, work: Work[T], timeout: float | None) -> Steps[T]:
        """Run `work` on a connection, by the deadline that `timeout` makes."""

    @abstractmethod
    def _lend(self, timeout: float | None) -> Steps[tuple[Link, Lease[Link] | None, float | None]]:
        """A connection for a COPY, who gives it back (None: the transaction does), and the deadline."""

    @operation
    def query(self, sql: Any, params: Params = None, *, timeout: float | None = None) -> Steps[list[Any]]:
        """All rows."""
        return (yield from self._all(sql, params, timeout))

    @operation
    def one(self, sql: Any, params: Params = None, *, timeout: float | None = None) -> Steps[Any]:
        """The row, or None when there is none. UsageError when there are more."""
        return (yield from self._one(sql, params, timeout, self._rows))

    @operation
    def value(self, sql: Any, params: Params = None, *, timeout: float | None = None) -> Steps[Any]:
        """The first column of the row, or None when there is no row. UsageError when there are more."""
        row = yield from self._one(sql, params, timeout, tuple)
        return row[0] if row else None

    @operation
    def execute(self, sql: Any, params: Params = None, *, timeout: float | None = None) -> Steps[int]:
        """How many rows it concerned; 0 where there is no such number."""

        def work(link: Link, deadline: float | None) -> Steps[int]:
            cursor = yield from link.execute(sql, params, _factory(tuple), deadline)
            return max(0, int(cursor.rowcount))

        return (yield from self._do(work, timeout))

    @operation
    def executemany(self, sql: Any, many: Iterable[Any], *, timeout: float | None = None) -> Steps[int]:
        """The same statement for each of `many` params, all or nothing; how many rows all of them concerned.

        Each is a message there and back. Thousands of rows come faster by copy_in.
        """

        def work(link: Link, deadline: float | None) -> Steps[int]:
            return (yield from link.execute_many(sql, many, deadline))

        return (yield from self._do_all(work, timeout))

    @operation
    def copy_in(
        self, sql: Any, params: Params = None, *, types: Sequence[str] = (), timeout: float | None = None
    ) -> Steps[CopyIn]:
        """Begin a `COPY … FROM STDIN`. Nothing of it counts until `finish` has answered. `types`: see copy_out."""
        place = yield from self._lend(timeout)
        from .postgres_copy import CopyIn  # which needs psycopg, so after a connection has found that it is there

        return (yield from CopyIn.begin(*place, sql, params, types))

    @operation
    def copy_out(
        self, sql: Any, params: Params = None, *, types: Sequence[str] = (), timeout: float | None = None
    ) -> Steps[CopyOut]:
        """Begin a `COPY … TO STDOUT`. `types` of the columns ("int4", "text[]"): else all come as str.

        A COPY in binary needs them both ways.
        """
        place = yield from self._lend(timeout)
        from .postgres_copy import CopyOut

        return (yield from CopyOut.begin(*place, sql, params, types))

    def _do_all(self, work: Work[T], timeout: float | None) -> Steps[T]:
        return self._do(work, timeout)

    def _all(self, sql: Any, params: Params, timeout: float | None, rows: Any = None) -> Steps[list[Any]]:
        def work(link: Link, deadline: float | None) -> Steps[list[Any]]:
            return (yield from link.rows(sql, params, _factory(rows or self._rows), deadline))

        return (yield from self._do(work, timeout))

    def _one(self, sql: Any, params: Params, timeout: float | None, rows: Any) -> Steps[Any]:
        found = yield from self._all(sql, params, timeout, rows)
        if len(found) > 1:
            raise UsageError(f"{len(found)} rows came where one was asked for; use query(), or say `limit 1`")
        return found[0] if found else None


class Postgres(Statements):
    """What `postgres` gives."""

    def __init__(self, options: Options, rows: Any, timeout_s: float | None) -> None:
        self._options = options
        self._rows = rows
        self._timeout_s = timeout_s

    def __repr__(self) -> str:
        return "<Postgres>"  # the DSN has a password in it

    @overload
    def transaction(
        self, function: None = None, /, *, isolation: str = "", read_only: bool = False, attempts: int = 1,
        timeout: float | None = None,
    ) -> Transaction: ...  # fmt: skip
    @overload
    def transaction(
        self, function: Callable[..., Any], /, *args: Any, isolation: str = "", read_only: bool = False, attempts: int = 1,
        timeout: float | None = None,
    ) -> Operation[Any]: ...  # fmt: skip
    def transaction(
        self, function: Callable[..., Any] | None = None, /, *args: Any, isolation: str = "", read_only: bool = False,
        attempts: int = 1, timeout: float | None = None,
    ) -> Any:  # fmt: skip
        """`yield db.transaction(function, *args)` runs the generator (or `async def`) function(tx, *args) in a transaction and
        answers what it returns; `async with db.transaction() as tx` is the other form.

        Committed when it ends, rolled back when it raises. `isolation`: "repeatable read" or "serializable"; `attempts`: how
        often `function` is run at most while what it raises is a PostgresTryAgain. `timeout`: seconds for one attempt.
        """
        from .postgres_transaction import Transaction, transact

        if isolation.lower() not in ISOLATION:
            raise UsageError(f"transaction(): isolation is one of {', '.join(ISOLATION[1:])}, not {isolation!r}")
        begin = "BEGIN"
        if isolation:
            begin += f" ISOLATION LEVEL {isolation.upper()}"
        if read_only:
            begin += " READ ONLY"
        if function is None:
            if attempts != 1:
                raise UsageError("attempts= needs a function that can be run again: transaction(function, attempts=3)")
            return Transaction(self, begin, timeout)
        return Operation(transact(lambda: Transaction(self, begin, timeout), function, args, attempts))

    @operation
    def listen(self, *channels: str, timeout: float | None = None) -> Steps[Notifications]:
        """What is sent by NOTIFY to `channels` from now on, over a connection of its own."""
        if not channels:
            raise UsageError('listen() takes channels: db.listen("orders")')
        deadline = self._deadline(timeout)
        link = yield from self._open(deadline)
        from psycopg import sql

        try:
            notifications = Notifications(link)
            for channel in channels:
                yield from link.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)), None, _factory(tuple), deadline)
        except BaseException:
            link.close()
            raise
        return notifications

    # -- what it stands on --------------------------------------------------------------------------------------------

    def _deadline(self, timeout: float | None) -> float | None:
        return deadline_in(self._timeout_s if timeout is None else timeout)

    def _do(self, work: Work[T], timeout: float | None) -> Steps[T]:
        deadline = self._deadline(timeout)
        lease = yield from self._pool().take(deadline)
        link = lease.connection
        try:
            answer = yield from work(link, deadline)
        except BaseException as error:
            yield from leave(lease, error)
            raise
        if not link.closed and not link.is_idle:
            lease.close()
            raise UsageError(f"{link.address}: a statement began a transaction, which was rolled back: use db.transaction()")
        put_back(lease)
        return answer

    def _lend(self, timeout: float | None) -> Steps[tuple[Link, Lease[Link] | None, float | None]]:
        deadline = self._deadline(timeout)
        lease = yield from self._pool().take(deadline)
        return lease.connection, lease, deadline

    def _do_all(self, work: Work[T], timeout: float | None) -> Steps[T]:
        from .postgres_transaction import Transaction, transact

        def steps(tx: Transaction) -> Steps[T]:
            return (yield from tx._do(work, timeout))

        answer: T = yield from transact(lambda: Transaction(self, "BEGIN", timeout), steps, (), 1)
        return answer

    def _pool(self) -> Pool[Link]:
        options = self._options

        def make() -> Pool[Link]:
            return Pool(self._open, _servers(options.dsn), options.max_connections, options.idle_s, options.life_s)

        return pool_of(options, make)

    def _open(self, deadline: float | None) -> Steps[Link]:
        try:
            from .postgres_dialing import Spec, open_link
        except ImportError as error:
            raise UsageError(f"io.postgres needs psycopg 3: pip install 'kqueue[postgres]' ({error})") from None
        return (yield from open_link(Spec(self._options.dsn, self._options.prepare), deadline))


def _servers(dsn: str) -> str:
    """For messages, before there is a libpq to ask: nothing that may be a secret."""
    authority = dsn.partition("://")[2].partition("/")[0].partition("?")[0]
    hosts = authority.rpartition("@")[2] if "@" in authority or "@" not in dsn else ""
    return f"postgresql://{hosts}" if hosts else "PostgreSQL"


def put_back(lease: Lease[Link]) -> None:
    """What was done with it has ended well."""
    if lease.connection.changed or not lease.connection.is_idle:
        lease.close()
    else:
        lease.give()


def leave(lease: Lease[Link], error: BaseException) -> Steps[None]:
    """What was done with it was ended by `error`: see to it that nothing of that goes on.

    In the daemon a task of its own does, so that the job ends at once. In a process of the job's own nobody would be there for
    that, so there it is waited for.
    """
    if lease.is_handed_over:
        return
    if lease.connection.is_idle or lease.connection.closed:
        put_back(lease)
    elif isinstance(error, GeneratorExit) or _outlives_the_job():
        leave_to_others(lease)
    else:
        yield from _mend(lease)


def leave_to_others(lease: Lease[Link]) -> None:
    """The same, where nobody can wait."""
    kernel = running()
    if lease.is_handed_over:
        return
    if kernel is None or not _outlives_the_job():
        lease.close()
        return
    lease.hand_over()
    kernel.spawn(_mend(lease), name=f"mending a connection to {lease.connection.address}", context=Context())


def _outlives_the_job() -> bool:
    job = current_or_none()
    return running() is not None and (job is None or job.inline)


def _mend(lease: Lease[Link]) -> Steps[None]:
    is_mended = False
    try:
        is_mended = yield from lease.connection.mend()
    finally:
        put_back(lease) if is_mended else lease.close()


def _factory(rows: Any) -> Any:
    from psycopg.rows import dict_row, tuple_row

    return dict_row if rows is dict else tuple_row


class Notify(NamedTuple):
    """What NOTIFY sent. `pid`: of the server's process that did."""

    channel: str
    payload: str
    pid: int


class Notifications(Closing):
    """What NOTIFY sends. Closed like a stream; what came and was not asked for by then is lost."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._came: deque[Notify] = deque()
        link.connection.add_notify_handler(lambda came: self._came.append(Notify(*came)))
        keep(self)

    @operation
    def next(self, *, timeout: float | None = None) -> Steps[Notify]:
        """The next one. TimedOut when none comes in `timeout` seconds, and nothing is lost by that."""
        import psycopg
        from psycopg import generators

        from .postgres_link import drive

        deadline = deadline_in(timeout)
        link = self._link
        while not self._came:
            if link.closed:
                raise Closed(f"{link.address}: this listens no more")
            pgconn = link.connection.pgconn
            try:
                yield from drive(generators.notifies(pgconn), pgconn.socket, deadline)
            except TimedOut:
                if deadline is None or left(deadline):
                    raise
                raise TimedOut(f"{link.address}: nothing came in {timeout:g} s") from None
            except psycopg.Error as error:
                lost = link.read(error)
                self.close()
                raise lost from None
        return self._came.popleft()

    def close(self) -> None:
        """At once."""
        forget(self)
        self._link.close()
