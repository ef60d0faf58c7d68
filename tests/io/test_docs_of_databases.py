"""The examples of docs/io/redis.md and postgres.md work as they stand, and their tables name what there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from kqueue import io
from kqueue.io.data import errors
from kqueue.io.data.postgres import Notifications, Postgres, Statements
from kqueue.io.data.postgres_copy import CopyIn, CopyOut
from kqueue.io.data.redis import Inbox, Pipeline, Redis
from kqueue.io.data.redis_commands import Commands
from kqueue.kernel import Kernel
from tests.io.databases import watched_kernel
from tests.io.test_docs import DOCS, example
from tests.servers import PostgresServer, RedisServer

watched = pytest.fixture(name="kernel")(watched_kernel)


def test_the_example_of_redis(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visit = example("redis.md", "visit", monkeypatch)
    server = RedisServer(tmp_path).start()
    try:
        assert kernel.run(visit("home", server.url)) == ["HOME", 1, "home"]
        assert kernel.run(visit("home", server.url)) == ["HOME", 2, "home"]
    finally:
        server.stop()


def test_the_example_of_postgres(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    pay = example("postgres.md", "pay", monkeypatch)
    server = PostgresServer()
    try:
        server.start()
        server.sql("create table accounts (name text primary key, balance int)")
        server.sql("insert into accounts values ('ann', 100), ('bob', 0)")
        assert kernel.run(pay("ann", "bob", 30, server.dsn)) == ["ann has 70", "bob has 30"]
        assert kernel.run(pay("ann", "bob", 71, server.dsn)) == "too poor"
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("page", "things"),
    [("redis.md", (Commands, Redis, Pipeline, Inbox)), ("postgres.md", (Statements, Postgres, Notifications, CopyIn, CopyOut))],
    ids=["redis", "postgres"],
)
def test_every_method_is_told_of(page: str, things: tuple[type, ...]) -> None:
    text = (DOCS / "io" / page).read_text()
    for thing in things:
        for name in vars(thing):
            if not name.startswith("_") and name not in ("begin", "close", "address"):
                in_code = rf"`[^`\n]*\b{name}\b|^ .*\b{name}\("
                assert re.search(in_code, text, re.MULTILINE), f"docs/io/{page} does not tell of {name}"


@pytest.mark.parametrize(("page", "function"), [("redis.md", io.redis), ("postgres.md", io.postgres)], ids=["redis", "postgres"])
def test_every_option_is_told_of(page: str, function: object) -> None:
    assert callable(function)
    text = (DOCS / "io" / page).read_text()
    for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
        (row,) = [line for line in text.splitlines() if re.match(rf"\| `[^|]*\b{name}\b", line) and line.count("|") == 4
                  and "(" not in line.split("|")[1]]  # fmt: skip
        shown = getattr(parameter.default, "__name__", parameter.default)
        assert re.search(rf"\b{re.escape(str(shown).removesuffix('.0'))}\b", row.split("|")[2]), row


def test_every_error_is_told_of() -> None:
    text = "".join((DOCS / "io" / page).read_text() for page in ("redis.md", "postgres.md"))
    for name, value in vars(errors).items():
        if isinstance(value, type) and value.__module__ == errors.__name__:
            assert f"| `io.{name}` |" in text
            assert name in str(errors.__doc__)
