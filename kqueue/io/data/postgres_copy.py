"""COPY, a piece at a time: what is held is a buffer, however long it is.

    with (yield db.copy_in("COPY users (id, name) FROM STDIN")) as copy:
        for id, name in rows:
            yield copy.row((id, name))
        count = yield copy.finish()

    with (yield db.copy_out("COPY users TO STDOUT", types=["int8", "text"])) as copy:
        while (row := (yield copy.row())) is not None:
            …

Nothing counts until `finish` has answered: a block that ends without it gives the COPY up.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from psycopg import AsyncCopy, generators
from psycopg.pq import ExecStatus

from ...context import forget, keep
from ...errors import UsageError
from ..closing import Closing
from ..errors import Closed
from ..operation import operation
from .postgres import leave, leave_to_others, put_back

if TYPE_CHECKING:
    from types import TracebackType

    from .pool import Lease
    from .postgres_link import Link

T = TypeVar("T")
C = TypeVar("C", bound="_Copy")
Steps = Generator[Any, Any, T]

FAIR_ROWS: Final = 500  # that are written until others may run


class _Copy(Closing):
    """A COPY that goes on. Closed like a stream."""

    _direction: ClassVar[str]
    _status: ClassVar[ExecStatus]

    def __init__(self, link: Link, lease: Lease[Link] | None, cursor: Any, deadline: float | None) -> None:
        self._link = link
        self._lease = lease  # None: the connection is that of a transaction, which sees to it
        self._cursor = cursor
        self._copy: Any = AsyncCopy(cursor)
        self._deadline = deadline
        self._is_over = False
        keep(self)

    @classmethod
    def begin(
        cls: type[C], link: Link, lease: Lease[Link] | None, deadline: float | None, sql: Any, params: Any, types: Sequence[str]
    ) -> Steps[C]:
        cursor: Any = link.connection.cursor()
        try:
            yield from link.run(lambda connection: connection.wait(cursor._start_copy_gen(sql, params)), deadline)
        except BaseException as error:
            if lease is not None:
                yield from leave(lease, error)
            raise
        copy = cls(link, lease, cursor, deadline)
        if copy._copy._direction != cls._status:
            copy.close()
            raise UsageError(f"this is no `COPY … {cls._direction}`: use copy_in for FROM STDIN, copy_out for TO STDOUT")
        try:
            if types:
                copy._copy.set_types(list(types))
        except KeyError as error:
            copy.close()
            raise UsageError(f'types= of a COPY: {error.args[0]}; write "int4", "text[]"') from None
        return copy

    def _run(self, make: Any) -> Steps[Any]:
        """Do something. Who fails here has ended it."""
        if self._is_over:
            raise Closed(f"{self._link.address}: this COPY is over")
        try:
            return (yield from self._link.run(make, self._deadline))
        except BaseException as error:
            self._end()
            if self._lease is not None:
                yield from leave(self._lease, error)
            raise

    def _end(self) -> None:
        self._is_over = True
        forget(self)

    def _done(self) -> None:
        """It has ended well."""
        self._end()
        if self._lease is not None:
            put_back(self._lease)

    def close(self) -> None:
        """Give it up, unless it is over. The transaction in which it was is rolled back."""
        if self._is_over:
            return
        self._end()
        self._link.tear(Closed("a COPY was given up"))
        if self._lease is not None:
            leave_to_others(self._lease)


class CopyIn(_Copy):
    """Rows, or data in the format of the COPY, to the server."""

    _direction = "FROM STDIN"
    _status = ExecStatus.COPY_IN
    _written = 0  # rows

    @operation
    def row(self, values: Sequence[Any]) -> Steps[None]:
        """One row."""
        yield from self._row(values)

    @operation
    def rows(self, many: Iterable[Sequence[Any]]) -> Steps[None]:
        """All of `many`, which may be a generator that makes them one by one."""
        for values in many:
            yield from self._row(values)

    def _row(self, values: Sequence[Any]) -> Steps[None]:
        self._written += 1
        if self._written % FAIR_ROWS == 0:
            yield
        yield from self._run(lambda connection: self._copy.write_row(values))

    @operation
    def write(self, data: bytes | str) -> Steps[None]:
        """Data in the format that the COPY says, cut anywhere."""
        yield from self._run(lambda connection: self._copy.write(data))

    @operation
    def finish(self) -> Steps[int]:
        """Have it count; how many rows there were. PostgresError when there is one that the server does not take."""
        rest = self._copy.formatter.end()
        if rest:
            yield from self._run(lambda connection: self._copy.writer.write(rest))
        pgconn = self._link.connection.pgconn
        result = yield from self._run(lambda connection: connection.wait(generators.copy_end(pgconn, None)))
        self._done()
        return result.command_tuples or 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        was_over = self._is_over
        self.close()
        if error is None and not was_over:
            raise UsageError(f"{self._link.address}: a COPY was not finished, so it does not count: write `yield copy.finish()`")


class CopyOut(_Copy):
    """Rows, or data in the format of the COPY, from the server."""

    _direction = "TO STDOUT"
    _status = ExecStatus.COPY_OUT
    _is_read = False  # to its end

    @operation
    def row(self) -> Steps[tuple[Any, ...] | None]:
        """The next row; None: there is none."""
        if self._is_read:
            return None
        row = yield from self._run(lambda connection: self._copy.read_row())
        if row is None:
            self._is_read = True
            self._done()
        return row  # type: ignore[no-any-return]

    @operation
    def read(self) -> Steps[bytes]:
        """Some more data, mostly a row; b"": there is no more."""
        if self._is_read:
            return b""
        data = bytes((yield from self._run(lambda connection: self._copy.read())))
        if not data:
            self._is_read = True
            self._done()
        return data
