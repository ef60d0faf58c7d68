"""io.postgres with a real server: rows and types, transactions, errors, cancelling, COPY, LISTEN, the pool."""

from __future__ import annotations

import datetime
import decimal
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import io
from kqueue.context import enter
from kqueue.errors import JobTimedOut, UsageError
from kqueue.kernel import Kernel, join, sleep
from tests.io.conftest import a_job
from tests.io.databases import cut_everywhere, pools, settle, watched_kernel
from tests.servers import Certificates, PostgresServer, Proxy, free_port

watched = pytest.fixture(name="kernel")(watched_kernel)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def table(server: PostgresServer) -> Iterator[PostgresServer]:
    """With a table t (id primary key, name)."""
    server.sql("create table t (id int primary key, name text)")
    yield server
    server.sql("drop table t")


def all_is_quiet(server: PostgresServer) -> None:
    """No client is in a transaction, or in the middle of a statement."""
    assert server.busy() == []


def until_idle(server: PostgresServer) -> None:
    deadline = time.monotonic() + 10
    while busy := server.busy():
        assert time.monotonic() < deadline, busy
        time.sleep(0.01)


# -- the ordinary case ----------------------------------------------------------------------------------------------------


def test_rows_one_value_and_counts(kernel: Kernel, table: PostgresServer) -> None:
    def job() -> Any:
        db = io.postgres(table.dsn)
        assert (yield db.execute("insert into t values (%s, %s), (%s, %s)", [1, "a", 2, "it's 100%; drop table t"])) == 2
        assert (yield db.query("select * from t order by id")) == [(1, "a"), (2, "it's 100%; drop table t")]
        assert (yield db.query("select name from t where id = %(id)s", {"id": 2})) == [("it's 100%; drop table t",)]
        assert (yield db.one("select id, name from t where id = 1")) == (1, "a")
        assert (yield db.one("select id from t where id = 9")) is None
        assert (yield db.value("select count(*) from t")) == 2
        assert (yield db.value("select id from t where id = 9")) is None
        assert (yield db.query("update t set name = 'z' where id = 1")) == []
        assert (yield db.query("update t set name = 'y' returning id")) == [(2,), (1,)]
        with pytest.raises(UsageError, match="2 rows came where one was asked for"):
            yield db.one("select * from t")
        dicts = io.postgres(table.dsn, rows=dict)
        assert (yield dicts.query("select id, name from t where id = 1")) == [{"id": 1, "name": "y"}]
        assert (yield dicts.value("select name from t where id = 2")) == "y"
        assert (yield db.executemany("insert into t values (%s, %s)", [(n, str(n)) for n in range(10, 500)])) == 490
        assert (yield db.execute("select 1; select 2")) == 1
        assert len((yield db.query("select * from generate_series(1, 5000)"))) == 5000

    kernel.run(job())
    assert [(pool.lent, pool.idle) for pool in pools(kernel)] == [(0, 1)], "one connection was enough for all"


def test_types(kernel: Kernel, server: PostgresServer) -> None:
    moment = datetime.datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=datetime.timezone.utc)
    values = [
        7, 2**40, 1.5, decimal.Decimal("1.25"), "žluťoučký", b"\x00\xff", True, None, moment, datetime.date(2026, 2, 3),
        uuid.UUID(int=5), [1, None, 3], ["a", 'b"c'], {"k": [1, {"x": None}]},
    ]  # fmt: skip
    columns = [
        "int4", "int8", "float8", "numeric", "text", "bytea", "bool", "text", "timestamptz", "date", "uuid", "int4[]", "text[]",
        "jsonb",
    ]  # fmt: skip

    def job() -> Any:
        from psycopg.types.json import Jsonb

        db = io.postgres(server.dsn)
        places = ", ".join(f"%s::{column}" for column in columns)
        sent = [*values[:-1], Jsonb(values[-1])]
        for _ in range(7):  # the sixth is the first that goes by a prepared statement
            assert (yield db.one(f"select {places}", sent)) == tuple(values)

    kernel.run(job())


def test_the_three_ways_to_wait_are_the_same(kernel: Kernel, server: PostgresServer) -> None:
    db = io.postgres(server.dsn)

    def by_yield() -> Any:
        return (yield db.value("select 1"))

    def by_yield_from() -> Any:
        return (yield from db.value("select 1"))

    async def by_await() -> Any:
        return await db.value("select 1")

    assert kernel.run(by_yield()) == kernel.run(by_yield_from()) == kernel.run(by_await()) == 1


def test_a_socket_a_name_and_tls(kernel: Kernel, server: PostgresServer, tmp_path_factory: Any) -> None:
    certificates = Certificates(tmp_path_factory.mktemp("tls"))
    secured = PostgresServer(tls=certificates)
    ask = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"

    def job() -> Any:
        by_socket = f"host={server.directory} port={server.port} user=postgres password=secret dbname=postgres"
        assert (yield io.postgres(by_socket).value("select inet_client_addr()")) is None
        by_name = server.dsn.replace("127.0.0.1", "localhost")
        assert (yield io.postgres(by_name).value("select host(inet_client_addr())")) == "127.0.0.1"
        several = server.dsn.replace(f"127.0.0.1:{server.port}", f"127.0.0.1:{free_port()},localhost:{server.port}")
        assert (yield io.postgres(several).value("select 1")) == 1
        verified = secured.dsn_for(query=f"?sslmode=verify-full&sslrootcert={certificates.ca}")
        assert (yield io.postgres(verified.replace("127.0.0.1", "localhost")).value(ask)) is True
        with pytest.raises(io.ConnectFailed, match="certificate"):
            yield io.postgres(secured.dsn_for(query="?sslmode=verify-full&sslrootcert=system")).value(ask)

    try:
        secured.start()
        kernel.run(job())
    finally:
        secured.stop()


# -- transactions -----------------------------------------------------------------------------------------------------------


def test_a_transaction_by_a_function(kernel: Kernel, table: PostgresServer) -> None:
    def insert(tx: Any, *ids: int) -> Any:
        for id in ids:
            yield tx.execute("insert into t values (%s)", [id])
        return (yield tx.value("select count(*) from t"))

    async def insert_async(tx: Any, id: int) -> Any:
        await tx.execute("insert into t values (%s)", [id])
        return id

    def job() -> Any:
        db = io.postgres(table.dsn)
        assert (yield db.transaction(insert, 1, 2)) == 2
        with pytest.raises(io.PostgresError, match="duplicate key"):
            yield db.transaction(insert, 3, 1)
        assert (yield db.transaction(insert_async, 4)) == 4
        assert (yield db.query("select id from t order by id")) == [(1,), (2,), (4,)]
        with pytest.raises(io.PostgresError, match="read-only"):
            yield db.transaction(insert, 5, read_only=True)
        with pytest.raises(UsageError, match="has to be a generator"):
            yield db.transaction(lambda tx: None)
        with pytest.raises(io.PostgresError, match="duplicate"):
            yield db.executemany("insert into t values (%s)", [(6,), (7,), (6,)])
        assert (yield db.value("select count(*) from t where id > 4")) == 0, "all or nothing"
        assert (yield db.transaction(lambda tx: level(tx), isolation="serializable")) == "serializable"

    def level(tx: Any) -> Any:
        return (yield tx.value("show transaction_isolation"))

    kernel.run(job())
    all_is_quiet(table)


def test_a_transaction_by_async_with_and_savepoints(kernel: Kernel, table: PostgresServer) -> None:
    async def job() -> None:
        db = io.postgres(table.dsn)
        async with db.transaction() as tx:
            await tx.execute("insert into t values (1)")
            with pytest.raises(ZeroDivisionError):
                await inserts_and_raises(tx, 2)
            with pytest.raises(io.PostgresError, match="duplicate"):
                await inserts_twice(tx, 3)
            async with tx.transaction() as inner, inner.transaction() as innermost:
                await innermost.execute("insert into t values (4)")
            assert await tx.transaction(insert, 5) == 1
            assert await tx.query("select id from t order by id") == [(1,), (4,), (5,)]
            assert await db.value("select count(*) from t") == 0, "nobody else sees it yet"
        with pytest.raises(ZeroDivisionError):
            await inserts_and_raises(db, 6)
        with pytest.raises(UsageError, match="has ended"):
            await tx.execute("select 1")
        assert await db.query("select id from t order by id") == [(1,), (4,), (5,)]

    def insert(tx: Any, id: int) -> Any:
        return (yield tx.execute("insert into t values (%s)", [id]))

    async def inserts_and_raises(outer: Any, id: int) -> None:
        async with outer.transaction() as inner:
            await inner.execute("insert into t values (%s)", [id])
            raise ZeroDivisionError

    async def inserts_twice(outer: Any, id: int) -> None:
        async with outer.transaction() as inner:
            await inner.execute("insert into t values (%s)", [id])
            await inner.execute("insert into t values (%s)", [id])

    kernel.run(job())
    all_is_quiet(table)


def test_what_cannot_be_committed_says_so(kernel: Kernel, table: PostgresServer) -> None:
    def swallows(tx: Any) -> Any:
        yield tx.execute("insert into t values (1)")
        with pytest.raises(io.PostgresError):
            yield tx.execute("insert into t values (1)")
        with pytest.raises(io.PostgresError, match="a statement of this transaction failed before") as caught:
            yield tx.execute("select 1")
        assert caught.value.sqlstate == "25P02"

    def swallows_a_timeout(tx: Any) -> Any:
        yield tx.execute("insert into t values (2)")
        with pytest.raises(io.TimedOut):
            yield tx.query("select pg_sleep(60)", timeout=0.05)
        with pytest.raises(io.PostgresError, match="interrupted before"):
            yield tx.query("select 1")

    def commits(tx: Any) -> Any:
        yield tx.execute("insert into t values (3)")
        yield tx.execute("rollback")

    def job() -> Any:
        db = io.postgres(table.dsn)
        for function, message in ((swallows, "was swallowed"), (swallows_a_timeout, "interrupted by"), (commits, "ended the")):
            with pytest.raises(io.PostgresAborted, match=message):
                yield db.transaction(function)
        assert (yield db.value("select count(*) from t")) == 0
        with pytest.raises(UsageError, match=r"began a transaction, which was rolled back: use db.transaction"):
            yield db.execute("begin; insert into t values (4)")
        assert (yield db.value("select count(*) from t")) == 0
        with pytest.raises(UsageError, match=r"yield db\.transaction"), db.transaction():
            pass
        with pytest.raises(UsageError, match=r"yield db\.transaction"):
            yield db.transaction()

    kernel.run(job())
    settle(kernel)
    all_is_quiet(table)


def test_a_serialization_failure_is_tried_again(kernel: Kernel, table: PostgresServer) -> None:
    runs = []

    def change(tx: Any) -> Any:
        runs.append(1)
        seen = yield tx.value("select count(*) from t")
        if len(runs) == 1:
            table.sql("insert into t values (1), (2)")
            table.sql("update t set name = 'other'")
        yield tx.execute("update t set name = 'ours'")
        yield tx.execute("insert into t values (%s)", [10 + seen])

    def lock(tx: Any, first: int, second: int) -> Any:
        yield tx.execute("update t set name = 'x' where id = %s", [first])
        yield sleep(0.1)
        yield tx.execute("update t set name = 'x' where id = %s", [second])

    def job() -> Any:
        db = io.postgres(table.dsn)
        table.sql("insert into t values (3)")
        with pytest.raises(io.PostgresTryAgain) as caught:
            yield db.transaction(conflict, isolation="repeatable read")
        assert caught.value.sqlstate == "40001"
        yield db.transaction(change, isolation="repeatable read", attempts=3)
        two = [kernel.spawn(deadlock(db, *order)) for order in ((1, 2), (2, 1))]
        for task in two:
            yield join(task)

    def conflict(tx: Any) -> Any:
        yield tx.value("select count(*) from t")
        table.sql("update t set name = 'other' where id = 3")
        yield tx.execute("update t set name = 'ours' where id = 3")

    def deadlock(db: Any, first: int, second: int) -> Any:
        yield db.transaction(lock, first, second, attempts=5)

    kernel.run(job())
    assert len(runs) == 2
    all_is_quiet(table)


# -- what goes wrong ----------------------------------------------------------------------------------------------------------


def test_errors_of_the_server_keep_their_code(kernel: Kernel, table: PostgresServer) -> None:
    def job() -> Any:
        db = io.postgres(table.dsn)
        yield db.execute("insert into t values (1)")
        for sql, params, sqlstate, words in (
            ("insert into t values (1)", None, "23505", r"Key \(id\)=\(1\) already exists"),
            ("select nonsense", None, "42703", "nonsense"),
            ("selec 1", None, "42601", "syntax error"),
            ("select * from nothing", None, "42P01", "search_path"),
            ("select %s::int", ["x"], "22P02", "invalid input"),
            ("select 1/0", None, "22012", "division by zero"),
            ("select %s", [], "", "1 placeholder"),
            ("select %s", [object()], "", "cannot adapt"),
            ("copy t from stdin", None, "", "use copy"),
        ):
            with pytest.raises(io.PostgresError, match=words) as caught:
                yield db.query(sql, params)
            assert caught.value.sqlstate == sqlstate
            assert type(caught.value) is io.PostgresError
            assert (yield db.value("select 1")) == 1
        with pytest.raises(io.PostgresError) as caught:
            yield db.execute("insert into t values (1)")
        assert caught.value.diag.constraint_name == "t_pkey"
        with pytest.raises(io.PostgresTryAgain) as caught:
            yield db.transaction(locks)
        assert caught.value.sqlstate == "55P03"

    def locks(tx: Any) -> Any:
        yield tx.execute("lock table t")
        yield io.postgres(table.dsn).transaction(wants_it, attempts=2)

    def wants_it(tx: Any) -> Any:
        yield tx.execute("lock table t nowait")

    kernel.run(job())
    settle(kernel)
    all_is_quiet(table)


def test_who_is_not_let_in_is_told_why(kernel: Kernel, server: PostgresServer) -> None:
    server.sql("create role limited login password 'secret' connection limit 0")

    def job() -> Any:
        for dsn, kind, words in (
            (server.dsn_for(password="wrong"), io.PostgresRefused, "password authentication failed"),
            (server.dsn_for(db="nowhere"), io.PostgresRefused, "nowhere"),
            (server.dsn_for(user="nobody"), io.PostgresRefused, "nobody"),
            (server.dsn_for(user="limited"), io.PostgresTryAgain, "too many connections for role"),
            (server.dsn_for(port=free_port()), io.ConnectFailed, "refused"),
            (f"host={server.directory}/nowhere user=postgres", io.ConnectFailed, "No such file"),
            (f"host=127.0.0.1 port={server.port} user=postgres dbname=postgres", io.PostgresRefused, "no password supplied"),
            (server.dsn_for(query="?sslmode=require"), io.ConnectFailed, "SSL"),
        ):
            with pytest.raises(kind, match=words) as caught:
                yield io.postgres(dsn).value("select 1")
            assert "secret" not in str(caught.value)
        for dsn in ("nonsense", "postgresql://u:secret@h/d?nonsense=1", "service=x"):
            with pytest.raises(UsageError) as refused:
                yield io.postgres(dsn).value("select 1")
            assert "secret" not in str(refused.value)

    kernel.run(job())


def test_a_server_that_says_nothing(kernel: Kernel, server: PostgresServer) -> None:
    proxy = Proxy(server.port)
    proxy.mute = True

    def job() -> Any:
        with pytest.raises(io.TimedOut, match="no connection came about"):
            yield io.postgres(server.dsn_for(port=proxy.port)).value("select 1", timeout=0.2)
        db = io.postgres(server.dsn_for(port=proxy.port, query="?application_name=x"))
        proxy.mute = False
        yield db.value("select 1")
        proxy.mute = True
        with pytest.raises(io.TimedOut, match=r"did not answer in 0\.2"):
            yield db.value("select 1", timeout=0.2)
        proxy.mute = False
        proxy.cut_all()

    try:
        kernel.run(job())
        settle(kernel)
    finally:
        proxy.stop()


def test_a_connection_that_breaks_in_the_middle(kernel: Kernel, table: PostgresServer) -> None:
    proxy = Proxy(table.port)

    def commits(tx: Any) -> Any:
        yield tx.execute("insert into t values (1)")
        proxy.cut("reply")

    def breaks(tx: Any) -> Any:
        proxy.cut("reply")
        yield tx.execute("insert into t values (2)")

    def swallows(tx: Any) -> Any:
        proxy.cut("reply")
        with pytest.raises(io.ConnectionLost):
            yield tx.execute("insert into t values (4)")

    def job() -> Any:
        db = io.postgres(table.dsn_for(port=proxy.port))
        yield db.value("select 1")
        proxy.cut("reply")
        with pytest.raises(io.ConnectionLost, match="the connection broke"):
            yield db.execute("insert into t values (3)")
        with pytest.raises(io.PostgresAborted, match="the connection broke before"):
            yield db.transaction(swallows)
        with pytest.raises(io.ConnectionLost, match="the connection broke") as lost:
            yield db.transaction(breaks)
        assert not isinstance(lost.value, io.OutcomeUnknown)
        with pytest.raises(io.OutcomeUnknown, match="nobody knows whether it counts") as unknown:
            yield db.transaction(commits)
        assert isinstance(unknown.value, io.ConnectionLost)
        assert (yield db.query("select id from t order by id")) == [(1,), (3,)]
        proxy.cut_all()
        deadline = time.monotonic() + 10
        while pools(kernel)[0]._idle[0][0].is_alive():
            assert time.monotonic() < deadline
            yield sleep(0.001)
        assert (yield db.value("select 1")) == 1, "a dead connection in the pool is nobody's business"

    try:
        kernel.run(job())
    finally:
        proxy.stop()
    until_idle(table)


def test_a_connection_that_breaks_in_the_middle_of_much(kernel: Kernel, table: PostgresServer) -> None:
    proxy = Proxy(table.port)

    def reads(db: Any) -> Any:
        with (yield db.copy_out("copy (select * from generate_series(1, 10000000)) to stdout")) as copy:
            for _ in range(1000):
                yield copy.read()
            proxy.cut_all()
            while (yield copy.read()):
                pass

    def writes(db: Any) -> Any:
        with (yield db.copy_in("copy t from stdin")) as copy:
            yield copy.row((1, "x"))
            proxy.cut_all()
            yield copy.rows((n, "x" * 1000) for n in range(2, 100_000))
            yield copy.finish()

    def job() -> Any:
        db = io.postgres(table.dsn_for(port=proxy.port))
        for steps in (reads, writes):
            with pytest.raises(io.ConnectionLost):
                yield from steps(db)
            assert (yield db.value("select count(*) from t")) == 0

    try:
        kernel.run(job())
    finally:
        proxy.stop()
    until_idle(table)


def test_a_server_that_is_killed_and_comes_back(kernel: Kernel) -> None:
    server = PostgresServer()

    def sleeper(db: Any, told: list[Any]) -> Any:
        try:
            yield db.query("select pg_sleep(60)")
        except io.IOFailed as error:
            told.append(error)

    def job(told: list[Any]) -> Any:
        db = io.postgres(server.dsn, max_connections=5)
        tasks = [kernel.spawn(sleeper(db, told)) for _ in range(3)]
        yield db.value("select 1")
        while len(server.busy()) < 3:
            yield sleep(0.01)
        server.kill()
        for task in tasks:
            yield join(task)
        with pytest.raises(io.ConnectFailed):
            yield db.value("select 1")
        server.start()
        assert (yield db.value("select 1")) == 1
        tasks = [kernel.spawn(sleeper(db, told))]
        while not server.busy():
            yield sleep(0.01)
        server.sql("select pg_terminate_backend(pid) from pg_stat_activity where query like '%%pg_sleep%%' and state = 'active'"
                   " and pid <> pg_backend_pid()")
        yield join(tasks[0])
        assert (yield db.value("select 1")) == 1

    told: list[Any] = []
    try:
        server.start()
        kernel.run(job(told))
    finally:
        server.stop()
    assert [type(error) for error in told] == [io.ConnectionLost] * 3 + [io.PostgresTryAgain]
    assert told[3].sqlstate == "57P01"


# -- being interrupted ----------------------------------------------------------------------------------------------------------


def test_a_timeout_ends_the_statement_at_the_server_too(kernel: Kernel, server: PostgresServer) -> None:
    def job() -> Any:
        db = io.postgres(server.dsn, max_connections=1)
        pid = yield db.value("select pg_backend_pid()")
        for _ in range(3):
            with pytest.raises(io.TimedOut, match=r"did not answer in 0\.0"):
                yield db.query("select pg_sleep(60)", timeout=0.05)
            assert (yield db.value("select pg_backend_pid()")) == pid, "the same connection, when that has ended"
        with pytest.raises(io.TimedOut):
            yield db.query("select repeat('x', 1000) from generate_series(1, 100000)", timeout=0.01)
        assert (yield db.value("select pg_backend_pid()")) == pid

    kernel.run(job())
    all_is_quiet(server)


def test_time_is_up_even_while_there_is_always_more(kernel: Kernel) -> None:
    from kqueue.io.data.postgres_link import drive
    from kqueue.kernel.traps import READ

    def reads(count: int) -> Any:
        for _ in range(count):
            yield READ
        return "all"

    def job(fd: int) -> Any:
        now = kernel.clock.monotonic()
        with pytest.raises(io.TimedOut, match="did not come to an end"):
            yield from drive(reads(1_000_000), fd, now + 0.01)
        assert (yield from drive(reads(1), fd, now)) == "all", "what has come is not late"

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        kernel.run(job(ours.fileno()))


@pytest.mark.parametrize("old", [False, True], ids=["by libpq", "as before libpq 17"])
def test_a_cancellation_at_every_wait_leaves_the_pool_clean(
    kernel: Kernel, table: PostgresServer, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        import psycopg

        monkeypatch.setattr(type(psycopg.capabilities), "has_cancel_safe", lambda self, check=False: False)
    db = io.postgres(table.dsn, max_connections=2)

    def steps(tx: Any) -> Any:
        yield tx.execute("insert into t values (1)")
        yield tx.transaction(inner)
        yield tx.query("select pg_sleep(0.002)")

    def inner(tx: Any) -> Any:
        yield tx.execute("insert into t values (2)")

    def job() -> Any:
        yield db.query("select pg_sleep(0.002)")
        yield db.transaction(steps)
        yield db.executemany("insert into t values (%s)", [(n,) for n in range(10, 20)])
        copy = yield db.copy_in("copy t from stdin")
        with copy:
            yield copy.row((30, "x"))
            yield copy.write(b"31\ty\n")
            yield copy.finish()
        with (yield db.copy_out("copy t to stdout")) as copy:
            while (yield copy.row()):
                pass
        with (yield db.listen("news")) as inbox:
            yield db.execute("notify news, 'x'")
            yield inbox.next()

    def after(cut: int) -> None:
        all_is_quiet(table)
        rows = {id for (id,) in table.sql("select id from t")}
        assert rows in (set(), {1, 2}, {1, 2, *range(10, 20)}, {1, 2, *range(10, 20), 30, 31}), "a part of something"
        table.sql("delete from t")
        assert len(table.sql("select from pg_stat_activity where application_name = 'kqueue'")) <= 2

    assert cut_everywhere(kernel, job, after) > 15
    table.sql("delete from t")


def test_what_a_job_left_open_ends_with_it(kernel: Kernel, table: PostgresServer) -> None:
    db = io.postgres(table.dsn)

    async def forgets() -> None:
        tx = db.transaction()
        await tx.__aenter__()
        await tx.execute("insert into t values (1)")
        kept.append(tx)
        kept.append(await db.copy_out("copy (select * from generate_series(1, 100000)) to stdout"))
        kept.append(await db.listen("x"))

    kept: list[Any] = []
    context = a_job()
    enter(context)
    kernel.run(forgets())
    context.close_all()
    enter(None)
    settle(kernel)
    until_idle(table)
    assert table.sql("select count(*) from t") == [(0,)]


def test_scopes_and_gathers_of_kqueue_io(kernel: Kernel, table: PostgresServer) -> None:
    def inserts(tx: Any) -> Any:
        yield tx.execute("insert into t values (1)")
        with pytest.raises(io.TimedOut), io.timeout(0.05):
            yield tx.query("select pg_sleep(60)")

    def sleeps(db: Any, n: int) -> Any:
        yield db.query("select pg_sleep(0.02)")
        if n == 7:
            raise ZeroDivisionError
        yield db.transaction(stores, n)

    def stores(tx: Any, n: int) -> Any:
        yield tx.execute("insert into t values (%s)", [n])
        yield tx.query("select pg_sleep(60)")

    def job() -> Any:
        db = io.postgres(table.dsn, max_connections=3)
        with pytest.raises(io.TimedOut), io.timeout(0.05):
            yield db.query("select pg_sleep(60)")
        with pytest.raises(io.PostgresAborted, match="nothing was committed"):
            yield db.transaction(inserts)
        with pytest.raises(ZeroDivisionError):
            yield io.gather(*(sleeps(db, n) for n in range(9)))
        assert (yield io.gather(*(db.value("select %s::int", [n]) for n in range(20)))) == list(range(20))
        assert (yield io.race(db.query("select pg_sleep(60)"), db.value("select 2"))) == 2
        assert (yield db.value("select count(*) from t")) == 0

    kernel.run(job())
    settle(kernel)
    all_is_quiet(table)


# -- COPY -------------------------------------------------------------------------------------------------------------------


def test_copy_of_100_000_rows_both_ways(kernel: Kernel, server: PostgresServer) -> None:
    server.sql("create table big (id int, name text, at timestamptz)")
    turns: list[int] = []

    def others() -> Any:
        while True:
            turns.append(1)
            yield sleep(0)

    def job() -> Any:
        db = io.postgres(server.dsn)
        when = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
        with (yield db.copy_in("copy big from stdin")) as copy:
            yield copy.rows((n, f"name\t{n}\n\\" if n % 3 else None, when) for n in range(100_000))
            assert (yield copy.finish()) == 100_000
        between = len(turns)
        assert between > 50, "others had their turns"
        seen = 0
        with (yield db.copy_out("copy big to stdout", types=["int4", "text", "timestamptz"])) as copy:
            while (row := (yield copy.row())) is not None:
                assert row == (seen, f"name\t{seen}\n\\" if seen % 3 else None, when)
                seen += 1
        assert seen == 100_000
        assert len(turns) > between + 50
        size = 0
        with (yield db.copy_out("copy big (id) to stdout")) as copy:
            while data := (yield copy.read()):
                size += len(data)
        assert size == sum(len(str(n)) + 1 for n in range(100_000))
        with (yield db.copy_in("copy big (id, name) from stdin (format binary)", types=["int4", "text"])) as copy:
            yield copy.row((-1, "b"))
            assert (yield copy.finish()) == 1

    kernel.spawn(others())
    kernel.run(job())
    server.sql("drop table big")
    assert pools(kernel)[0].idle == 1


def test_a_copy_takes_a_buffer_whatever_its_size(kernel: Kernel, server: PostgresServer) -> None:
    """200 MB each way, with the other side slow or ourselves."""
    row = "x" * 1000
    seen: list[int] = []

    def private_kib() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private"))

    def job() -> Any:
        db = io.postgres(server.dsn)
        yield db.value("select 1")
        before = private_kib()
        with (yield db.copy_in("copy heap from stdin")) as copy:
            for n in range(200_000):
                yield copy.row((row,))
                if n % 5000 == 0:
                    seen.append(private_kib() - before)
            yield copy.finish()
        with (yield db.copy_out("copy heap to stdout")) as copy:
            n = 0
            while (yield copy.read()):
                n += 1
                if n % 5000 == 0:
                    seen.append(private_kib() - before)
        assert n == 200_000

    server.sql("create unlogged table heap (text text)")
    kernel.run(job())
    server.sql("drop table heap")
    assert max(seen) < 16 * 1024


def test_a_copy_that_is_not_finished_does_not_count(kernel: Kernel, table: PostgresServer) -> None:
    def copies(db: Any, *rows: Any, finish: bool = True) -> Any:
        with (yield db.copy_in("copy t from stdin")) as copy:
            for row in rows:
                yield copy.row(row) if isinstance(row, tuple) else copy.write(row)
            if not rows:
                raise ZeroDivisionError
            if finish:
                yield copy.finish()
        with pytest.raises(io.Closed, match="is over"):
            yield copy.finish()

    async def begins(db: Any) -> None:
        async with await db.copy_in("copy t from stdin") as copy:
            await copy.row((1, "x"))

    def swallows(tx: Any) -> Any:
        yield tx.execute("insert into t values (1)")
        with pytest.raises(ZeroDivisionError):
            yield from copies(tx)

    def job() -> Any:
        db = io.postgres(table.dsn, max_connections=1)
        with pytest.raises(UsageError, match="not finished, so it does not count"):
            yield from copies(db, (1, "x"), finish=False)
        with pytest.raises(UsageError, match="not finished, so it does not count"):
            yield from begins(db).__await__()
        with pytest.raises(io.PostgresError, match="duplicate key"):
            yield from copies(db, (1, "x"), (1, "y"))
        with pytest.raises(io.PostgresError, match="invalid input syntax"):
            yield from copies(db, "nonsense\tx\n")
        with pytest.raises(ZeroDivisionError):
            yield from copies(db)
        with (yield db.copy_out("copy (select * from generate_series(1, 1000000)) to stdout")) as copy:
            assert (yield copy.read()) == b"1\n"
        assert (yield db.value("select count(*) from t")) == 0
        for wrong in (db.copy_in("copy t to stdout"), db.copy_out("copy t from stdin"), db.copy_in("select 1")):
            with pytest.raises((UsageError, io.PostgresError), match=r"copy|COPY"):
                yield wrong
        with pytest.raises(io.PostgresAborted):
            yield db.transaction(swallows)
        assert (yield db.value("select count(*) from t")) == 0
        yield from copies(db, (1, "x"), "2\ty\n")
        assert (yield db.value("select count(*) from t")) == 2

    kernel.run(job())
    settle(kernel)
    all_is_quiet(table)


def test_a_copy_of_types_that_there_are_not_lets_go_of_its_connection(kernel: Kernel, server: PostgresServer) -> None:
    db = io.postgres(server.dsn, max_connections=1)
    heard: list[Any] = []

    def errs() -> Any:
        with pytest.raises(UsageError, match="couldn't find the type 'nonsense'"):
            yield db.copy_out("copy (select 1) to stdout", types=["nonsense"])

    def another() -> Any:
        heard.append((yield db.value("select 1 from pg_sleep(0.05)")))

    context = a_job()
    enter(context)
    kernel.run(errs())
    enter(None)
    settle(kernel)
    task = kernel.spawn(another())
    while not server.busy():
        kernel.turn()
    context.close_all()  # the job that erred ends while the next one has the connection
    kernel.run(joins(task))
    assert heard == [1]
    all_is_quiet(server)


def joins(task: Any) -> Any:
    yield join(task)


def test_what_was_read_of_a_copy_that_broke_off_is_not_taken_for_all(kernel: Kernel, server: PostgresServer) -> None:
    def to_the_end(copy: Any, read: str) -> Any:
        while (yield getattr(copy, read)()):
            pass

    def job() -> Any:
        db = io.postgres(server.dsn)
        sleepy = (
            "copy (select repeat('x', 20000), pg_sleep(case n when 3 then 60 else 0 end) from generate_series(1, 5) n) to stdout"
        )
        for read in ("row", "read"):
            with (yield db.copy_out(sleepy, timeout=0.2)) as copy:
                with pytest.raises(io.TimedOut):
                    yield from to_the_end(copy, read)
                with pytest.raises(io.Closed, match="is over"):
                    yield getattr(copy, read)()
            with (yield db.copy_out("copy (select 1) to stdout")) as copy:
                yield from to_the_end(copy, read)
                assert not (yield getattr(copy, read)()), "the end stays the end"

    kernel.run(job())
    settle(kernel)
    all_is_quiet(server)


# -- LISTEN -----------------------------------------------------------------------------------------------------------------


def test_listen(kernel: Kernel, server: PostgresServer) -> None:
    def job() -> Any:
        db = io.postgres(server.dsn)
        with (yield db.listen("news", 'odd "name"')) as inbox:
            with pytest.raises(io.TimedOut, match=r"nothing came in 0\.05 s"):
                yield inbox.next(timeout=0.05)
            yield db.execute("select pg_notify('news', 'one'), pg_notify('odd \"name\"', 'two'), pg_notify('other', 'no')")
            first, second = (yield inbox.next(timeout=5)), (yield inbox.next(timeout=5))
            assert [first[:2], second[:2]] == [("news", "one"), ('odd "name"', "two")]
            server.sql("select pg_terminate_backend(pid) from pg_stat_activity where query like 'LISTEN%%'")
            with pytest.raises((io.ConnectionLost, io.PostgresTryAgain)):
                yield inbox.next(timeout=5)
            with pytest.raises(io.Closed):
                yield inbox.next(timeout=5)

    kernel.run(job())


# -- the pool -----------------------------------------------------------------------------------------------------------------


def test_1_000_jobs_on_a_pool_of_10(kernel: Kernel, server: PostgresServer) -> None:
    answers = []
    dsn = server.dsn_for(query="?application_name=thousand")

    def one(n: int) -> Any:
        db = io.postgres(dsn)
        answers.append((yield db.value("select %s + 0 * pid from (select pg_backend_pid() as pid) x", [n])))
        assert pools(kernel)[0].lent <= 10

    def job() -> Any:
        for task in [kernel.spawn(one(n)) for n in range(1000)]:
            yield join(task)
        return (yield io.postgres(dsn).value("select count(*) from pg_stat_activity where application_name = 'thousand'"))

    assert kernel.run(job()) == 10
    assert sorted(answers) == list(range(1000))
    assert pools(kernel)[0].idle <= 10


def test_who_waits_for_the_pool_waits_in_his_own_time(kernel: Kernel, server: PostgresServer) -> None:
    def holder(db: Any) -> Any:
        yield db.query("select pg_sleep(0.5)")

    def late(db: Any) -> Any:
        yield db.value("select 1")

    def job() -> Any:
        db = io.postgres(server.dsn, max_connections=1)
        task = kernel.spawn(holder(db))
        yield sleep(0)
        with pytest.raises(io.TimedOut, match="all 1 are in use; raise max_connections="):
            yield db.value("select 1", timeout=0.05)
        timed_out = kernel.spawn(late(db))
        kernel.throw_at(timed_out, kernel.clock.monotonic() + 0.05, JobTimedOut("over its 0.05 s"), 1.0)
        with pytest.raises(JobTimedOut, match=r"no connection to .* was free in time"):
            yield join(timed_out)
        assert (yield db.value("select 1")) == 1
        yield join(task)

    kernel.run(job())


def test_a_pool_is_named_by_its_servers_and_no_secret(kernel: Kernel) -> None:
    def job() -> Any:
        for dsn, name in (
            ("postgresql://u:secret@h:1/db?x=1", "postgresql://h:1"), ("postgresql://h/db", "postgresql://h"),
            ("postgresql://u:secret%40@h1:1,h2", "postgresql://h1:1,h2"), ("postgresql://h?password=sec@ret", "PostgreSQL"),
            ("postgresql://u:sec/ret@h/db", "PostgreSQL"), ("postgresql:///db?host=/run", "PostgreSQL"),
            ("host=h password=secret", "PostgreSQL"),
        ):  # fmt: skip
            assert io.postgres(dsn)._pool().what == name
        yield sleep(0)

    kernel.run(job())


def test_connections_are_not_kept_for_ever(kernel: Kernel, server: PostgresServer) -> None:
    pid = "select pg_backend_pid()"

    def job() -> Any:
        db = io.postgres(server.dsn, idle=0.1)
        first = yield db.value(pid)
        assert (yield db.value(pid)) == first
        while pools(kernel)[0].idle:
            yield sleep(0.01)
        assert (yield db.value(pid)) != first
        brief = io.postgres(server.dsn, lifetime=0)
        assert (yield brief.value(pid)) != (yield brief.value(pid))
        changed = io.postgres(server.dsn, idle=59)
        first = yield changed.value(pid)
        yield changed.execute("set search_path to nowhere")
        assert (yield changed.value("show search_path")) == '"$user", public', "what one changed is nobody else's"
        first = yield changed.value(pid)
        yield changed.transaction(local)
        assert (yield changed.value(pid)) == first

    def local(tx: Any) -> Any:
        yield tx.execute("set local statement_timeout to 1000")

    kernel.run(job())


def test_two_tasks_do_not_share_a_transaction(kernel: Kernel, server: PostgresServer) -> None:
    def both(tx: Any) -> Any:
        task = kernel.spawn(slow(tx))
        yield sleep(0)
        with pytest.raises(UsageError, match="two tasks use one connection"):
            yield tx.value("select 1")
        yield join(task)
        return (yield tx.value("select 2"))

    def slow(tx: Any) -> Any:
        yield tx.query("select pg_sleep(0.05)")

    assert kernel.run((lambda: (yield io.postgres(server.dsn).transaction(both)))()) == 2
