"""Databases in real jobs: inline and isolated, generators and `async def`, to their end and over their time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import BoundJob, KQueueRuntime, SecurityConfig, events
from kqueue.brokers.commands.memory import MemoryStore
from kqueue.brokers.memory import MemoryBroker
from kqueue.client.memory import MemoryClient
from kqueue.codec import from_json, unpack
from kqueue.dispatch import prepare
from kqueue.loading import template_config
from tests.apps import databases
from tests.io.conftest import open_fds
from tests.servers import PostgresServer, RedisServer

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, PostgresServer]]:
    redis, postgres = RedisServer(tmp_path_factory.mktemp("redis")), PostgresServer()
    try:
        redis.start()
        postgres.start()
        postgres.sql("create table runs (name text)")
        yield redis, postgres
    finally:
        redis.stop()
        postgres.stop()


def run(*jobs: BoundJob) -> list[tuple[events.JobEnded, Any]]:
    """Run `jobs` to the end of their first attempt; how each ended, and its result."""
    fds = open_fds()
    store = MemoryStore()
    client = MemoryClient(store)
    runtime = KQueueRuntime(
        MemoryBroker(store), template=template_config([str(ROOT)], [], ["tests.apps.databases"]), max_isolated=4,
        kill_grace_s=5.0, security=SecurityConfig(max_timeout_s=3600),
    )  # fmt: skip
    facts: list[events.JobEnded] = []
    runtime.events.subscribe(events.JobEnded, facts.append)
    prepared = [prepare(job, job.registration, keys=runtime.keys) for job in jobs]
    client.enqueue(prepared)
    assert runtime.run(burst=True, handle_signals=False) == 0
    assert open_fds() == fds
    ended = {fact.id: fact for fact in facts}
    rows = {job.id: client.show(job.id) for job in prepared}
    return [(ended[id], unpack(from_json(row.result)) if row and row.result else None) for id, row in rows.items()]


def test_every_kind_of_job_has_databases(servers: tuple[RedisServer, PostgresServer]) -> None:
    redis, postgres = servers
    kinds = (databases.inline, databases.isolated, databases.inline_async, databases.isolated_async)
    for kind, (ended, result) in zip(
        kinds, run(*(kind.job(redis.url, postgres.dsn, kind.registration.name) for kind in kinds)), strict=True
    ):
        assert result == ["heard", 1, "x", 1, 3, "1\n"], (kind, ended)
    assert postgres.sql("select count(*) from runs") == [(6,)]
    postgres.sql("delete from runs")


def test_what_lies_idle_is_closed_under_asyncio_as_well(servers: tuple[RedisServer, PostgresServer]) -> None:
    ((ended, result),) = run(databases.idle_under_asyncio.job(servers[0].url))
    assert result == 1, ended


SLEEPERS = (
    databases.inline_sleeper, databases.inline_async_sleeper, databases.isolated_sleeper, databases.isolated_async_sleeper,
)  # fmt: skip


@pytest.mark.parametrize("kind", SLEEPERS, ids=lambda kind: kind.registration.name)
def test_a_job_over_its_time_leaves_nothing_at_the_server(servers: tuple[RedisServer, PostgresServer], kind: Any) -> None:
    _, postgres = servers
    ((ended, _),) = run(kind.job(postgres.dsn))
    assert ended.outcome.cause == "timeout", ended
    deadline = time.monotonic() + 10
    while busy := postgres.busy():
        assert time.monotonic() < deadline, busy
        time.sleep(0.01)
    assert postgres.sql("select count(*) from runs where name = 'never'") == [(0,)]


def test_without_psycopg_the_message_says_what_to_install() -> None:
    code = """
import sys
sys.modules["psycopg"] = None
from kqueue import io
from kqueue.kernel import Kernel
def job(what):
    yield what(io.postgres("postgresql://127.0.0.1/x"))
def steps(tx):
    yield tx.value("select 1")
for what in (
    lambda db: db.value("select 1"), lambda db: db.transaction(steps), lambda db: db.copy_in("copy t from stdin"),
    lambda db: db.listen("x"), lambda db: db.executemany("select", []),
):
    try:
        Kernel().run(job(what))
    except Exception as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    told = "UsageError io.postgres needs psycopg 3: pip install 'kqueue[postgres]'"
    assert [line.startswith(told) for line in done.stdout.splitlines()] == [True] * 5


def test_naming_a_database_costs_nothing_before_it_is_used() -> None:
    code = """
import sys
from kqueue import io
io.redis("redis://127.0.0.1/0"), io.postgres("postgresql://127.0.0.1/x")
print(sorted({"psycopg", "ssl", "asyncio", "logging", "decimal"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "[]"
