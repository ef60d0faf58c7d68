"""Transactions, in two forms that cannot forget to commit, nor leave one open: a function that is run in one, and `async with`.

A plain `with` is neither: at its end a generator cannot wait, and COMMIT has to be waited for. So it is refused.

Rule 1. It is committed when its block or function ends, rolled back when that raises, whatever it raises.
Rule 2. When it should be committed and cannot be (a statement in it failed, or was interrupted, and that error was swallowed),
        that is PostgresAborted: PostgreSQL itself would answer ROLLBACK to such a COMMIT, and nobody would look.
Rule 3. Nested ones are savepoints: what they roll back is theirs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from ...errors import UsageError
from ...kernel import traps
from ...kernel.traps import Trap, sleep
from ..errors import ConnectionLost, TimedOut
from ..operation import Operation
from ..surroundings import deadline_in
from .errors import OutcomeUnknown, PostgresAborted, PostgresTryAgain
from .postgres import Statements, Work, leave, leave_to_others, put_back

if TYPE_CHECKING:
    from types import TracebackType

    from .pool import Lease
    from .postgres import Postgres
    from .postgres_link import Link

T = TypeVar("T")
Steps = Generator[Any, Any, T]

FIRST_PAUSE_S: Final = 0.005  # before a transaction is tried again, and twice as long each time


class Transaction(Trap, Statements):
    """Of one connection. `async with db.transaction() as tx`; or what db.transaction(function) gives its function."""

    def __init__(self, db: Postgres, begin: str, timeout_s: float | None, outer: Transaction | None = None) -> None:
        self._db = db
        self._begin_sql = begin
        self._limit_s = timeout_s  # for all of it
        self._deadline: float | None = None
        self._outer = outer  # None: it is no savepoint
        self._rows = db._rows
        self._timeout_s = db._timeout_s
        self._lease: Lease[Link] | None = None  # None: it has not begun, or has ended
        self._savepoint = ""
        self._nested = 0  # savepoints that there were

    # -- within it ----------------------------------------------------------------------------------------------------

    def _do(self, work: Work[T], timeout: float | None) -> Steps[T]:
        return (yield from work(self._link(), self._until(timeout)))

    def _lend(self, timeout: float | None) -> Steps[tuple[Link, Lease[Link] | None, float | None]]:
        yield from ()
        return self._link(), None, self._until(timeout)

    def transaction(self, function: Callable[..., Any] | None = None, /, *args: Any) -> Any:
        """The same within this one, by a savepoint: what it rolls back is its own alone."""
        if function is None:
            return Transaction(self._db, "", None, self)
        return Operation(transact(lambda: Transaction(self._db, "", None, self), function, args, 1))

    def _link(self) -> Link:
        if self._lease is None:
            raise UsageError("this transaction has ended, or not begun: use it within its function, or its `async with`")
        return self._lease.connection

    def _until(self, timeout: float | None) -> float | None:
        own = deadline_in(self._timeout_s if timeout is None else timeout)
        return min((limit for limit in (own, self._deadline) if limit is not None), default=None)

    # -- its ends -----------------------------------------------------------------------------------------------------

    def begin(self) -> Steps[None]:
        if self._lease is not None:
            raise UsageError("this transaction has begun already")
        if self._outer is not None:
            link, self._deadline = self._outer._link(), self._outer._deadline
            self._outer._nested += 1
            self._savepoint = f"{self._outer._savepoint or 'kq'}_{self._outer._nested}"
            yield from link.command(f"SAVEPOINT {self._savepoint}", self._deadline)
            self._lease = self._outer._lease
            return
        self._deadline = deadline_in(self._limit_s)
        lease = yield from self._db._pool().take(self._until(None))
        try:
            yield from lease.connection.command(self._begin_sql, self._until(None))
        except BaseException as error:
            yield from leave(lease, error)
            raise
        self._lease = lease

    def end(self, error: BaseException | None) -> Steps[None]:
        """Commit, or roll back because of `error`, which is for the caller to raise."""
        lease, self._lease = self._lease, None
        assert lease is not None
        if self._outer is not None:
            yield from self._end_savepoint(lease.connection, error)
            return
        link = lease.connection
        if error is not None and (link.torn is not None or not isinstance(error, Exception)):
            link.tear(error)
            yield from leave(lease, error)  # which rolls back, and keeps nobody waiting
            return
        try:
            yield from self._end(link, error)
        except BaseException as trouble:
            yield from leave(lease, trouble)
            if error is None or not isinstance(trouble, Exception):
                raise
            return  # it could not be rolled back, but its connection is given up, and that comes to the same
        put_back(lease)

    def _end(self, link: Link, error: BaseException | None) -> Steps[None]:
        if error is not None:
            if not link.closed:
                yield from link.command("ROLLBACK", self._until(None))
        elif link.torn is not None:
            raise PostgresAborted(f"{link.address}: nothing was committed: the transaction was interrupted by {link.torn!r}")
        elif link.closed:
            raise PostgresAborted(f"{link.address}: nothing was committed: the connection broke before, and nobody was told")
        elif link.is_failed:
            yield from link.command("ROLLBACK", self._until(None))
            raise PostgresAborted(
                f"{link.address}: nothing was committed: a statement of the transaction failed, and its error was swallowed; put "
                "what may fail into a transaction of its own within it (a savepoint)",
                "25P02",
            )
        elif link.is_idle:
            raise PostgresAborted(f"{link.address}: a statement ended the transaction; leave COMMIT and ROLLBACK to it")
        else:
            yield from self._commit(link)

    def _commit(self, link: Link) -> Steps[None]:
        try:
            tag = yield from link.command("COMMIT", self._until(None))
        except (ConnectionLost, PostgresTryAgain, TimedOut) as error:
            if isinstance(error, PostgresTryAgain) and not link.closed:
                raise  # a serialization failure that was found now
            raise OutcomeUnknown(f"{error}; it was being committed, so nobody knows whether it counts: look", "08007") from None
        if tag != "COMMIT":
            raise PostgresAborted(f"{link.address}: nothing was committed: the server answered {tag} to COMMIT")

    def _end_savepoint(self, link: Link, error: BaseException | None) -> Steps[None]:
        if error is None and link.torn is None and not link.is_failed:
            yield from link.command(f"RELEASE SAVEPOINT {self._savepoint}", self._until(None))
        elif error is not None and (link.torn is not None or link.closed or not isinstance(error, Exception)):
            return  # the outer one is rolled back
        elif link.torn is not None:
            raise PostgresAborted(f"{link.address}: the transaction was interrupted by {link.torn!r}")
        else:
            yield from link.command(f"ROLLBACK TO SAVEPOINT {self._savepoint}", self._until(None))
            yield from link.command(f"RELEASE SAVEPOINT {self._savepoint}", self._until(None))
            if error is None:
                raise PostgresAborted(f"{link.address}: a statement failed, and its error was swallowed: rolled back", "25P02")

    async def __aenter__(self) -> Transaction:
        await Operation(self.begin())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, GeneratorExit):  # nothing can be waited for
            lease, self._lease = self._lease, None
            if lease is not None and self._outer is None:
                lease.connection.tear(error)
                leave_to_others(lease)
            return
        await Operation(self.end(error))

    def __enter__(self) -> NoReturn:
        _refuse()

    def __exit__(self, *error: object) -> None:
        """It is never entered."""

    def arm(self, kernel: Any, task: Any) -> NoReturn:
        _refuse()

    def __await__(self) -> NoReturn:
        _refuse()

    __iter__ = __await__


def _refuse() -> NoReturn:
    raise UsageError(
        "a transaction takes a function: `yield db.transaction(function)`, which commits when it returns; "
        "or `async with db.transaction() as tx:` in an `async def` job"
    )


def transact(
    make: Callable[[], Transaction], function: Callable[..., Any], args: tuple[Any, ...], attempts: int
) -> Steps[Any]:
    """Run function(tx, *args) in a transaction; again, up to `attempts` times in all, when that may help."""
    pause_s = FIRST_PAUSE_S
    while True:
        attempts -= 1
        try:
            return (yield from _attempt(make(), function, args))
        except PostgresTryAgain:
            if attempts < 1:
                raise
        yield from sleep(pause_s)
        pause_s *= 2


def _attempt(tx: Transaction, function: Callable[..., Any], args: tuple[Any, ...]) -> Steps[Any]:
    yield from tx.begin()
    try:
        value = yield from _driven(function(tx, *args))
    except BaseException as error:
        yield from tx.end(error)
        raise
    yield from tx.end(None)
    return value


def _driven(steps: Any) -> Steps[Any]:
    """Run what a user's function returned: a generator of traps or a coroutine."""
    if hasattr(steps, "__await__"):
        return (yield from steps.__await__())
    if not hasattr(steps, "send"):
        raise UsageError("the function of a transaction has to be a generator, with `yield tx.…` in it, or an `async def`")
    if traps.foreign_loop is None:
        return (yield from steps)
    value, error = None, None  # asyncio understands no `yield trap`
    while True:
        try:
            trap = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as end:
            return end.value
        value, error = None, None
        try:
            value = (yield from trap) if isinstance(trap, Trap) else (yield trap)
        except BaseException as thrown:
            error = thrown
