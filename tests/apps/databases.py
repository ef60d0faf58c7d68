"""Jobs that use databases, of every kind that may: inline and isolated, generators and `async def`."""

from __future__ import annotations

from typing import Any

import kqueue
from kqueue import io


def _count(tx: Any, name: str) -> Any:
    yield tx.execute("insert into runs values (%s)", [name])
    return (yield tx.value("select count(*) from runs where name = %s", [name]))


def _steps(redis_url: str, dsn: str, name: str) -> Any:
    redis, db = io.redis(redis_url, decode=True), io.postgres(dsn)
    yield redis.rpush(name, "x")
    with (yield redis.subscribe(name)) as inbox:
        with redis.pipeline(atomic=True) as pipe:
            pipe.publish(name, "heard")
            pipe.command("LLEN", name)
            _, length = yield pipe.run()
        heard = (yield inbox.next(timeout=10)).data
    popped = (yield redis.command("BLPOP", name, 1))[1]
    count = yield db.transaction(_count, name)
    try:
        yield db.query("select pg_sleep(60)", timeout=0.05)
    except io.TimedOut:
        rows = yield db.query("select n from generate_series(1, 3) n")
    with (yield db.copy_out("copy (values (1), (2)) to stdout")) as copy:
        first = yield copy.read()
    return [heard, length, popped, count, len(rows), first.decode()]


async def _async_steps(redis_url: str, dsn: str, name: str) -> Any:
    redis, db = io.redis(redis_url, decode=True), io.postgres(dsn)
    await redis.rpush(name, "x")
    async with await redis.subscribe(name) as inbox:
        async with redis.pipeline(atomic=True) as pipe:
            pipe.publish(name, "heard")
            pipe.command("LLEN", name)
            _, length = await pipe.run()
        heard = (await inbox.next(timeout=10)).data
    popped = (await redis.command("BLPOP", name, 1))[1]
    count = await db.transaction(_count, name)  # a generator with plain yields, whoever drives it
    async with db.transaction() as tx:
        await tx.execute("insert into runs values (%s)", [name])
    try:
        await db.query("select pg_sleep(60)", timeout=0.05)
    except io.TimedOut:
        rows = await db.query("select n from generate_series(1, 3) n")
    async with await db.copy_out("copy (values (1), (2)) to stdout") as copy:
        first = await copy.read()
    return [heard, length, popped, count, len(rows), first.decode()]


@kqueue.job(keep_result=60)
def inline(redis_url: str, dsn: str, name: str) -> Any:
    return (yield from _steps(redis_url, dsn, name))


@kqueue.job(keep_result=60, isolated=True)
def isolated(redis_url: str, dsn: str, name: str) -> Any:
    return (yield from _steps(redis_url, dsn, name))


@kqueue.job(keep_result=60)
async def inline_async(redis_url: str, dsn: str, name: str) -> Any:
    return await _async_steps(redis_url, dsn, name)


@kqueue.job(keep_result=60, isolated=True)
async def isolated_async(redis_url: str, dsn: str, name: str) -> Any:
    return await _async_steps(redis_url, dsn, name)


def _sleeper(tx: Any) -> Any:
    yield tx.execute("insert into runs values ('never')")
    yield tx.query("select pg_sleep(60)")


@kqueue.job(timeout=0.4, max_attempts=1)
def inline_sleeper(dsn: str) -> Any:
    yield io.postgres(dsn).transaction(_sleeper)


@kqueue.job(timeout=0.4, max_attempts=1)
async def inline_async_sleeper(dsn: str) -> None:
    async with io.postgres(dsn).transaction() as tx:
        await tx.execute("insert into runs values ('never')")
        await tx.query("select pg_sleep(60)")


@kqueue.job(timeout=0.6, max_attempts=1, isolated=True)
def isolated_sleeper(dsn: str) -> Any:
    yield io.postgres(dsn).transaction(_sleeper)


@kqueue.job(timeout=0.6, max_attempts=1, isolated=True)
async def isolated_async_sleeper(dsn: str) -> None:
    async with io.postgres(dsn).transaction() as tx:
        await tx.execute("insert into runs values ('never')")
        await tx.query("select pg_sleep(60)")


@kqueue.job(isolated=True, timeout=15, max_attempts=1, keep_result=60)
async def idle_under_asyncio(url: str) -> int:
    """How many connections are left when the one that lies idle has had its time."""
    import asyncio

    redis = io.redis(url, idle=0.05)
    other = io.redis(url, max_connections=1)
    await redis.get("k")
    while (left := len((await other.command("CLIENT", "LIST", "TYPE", "normal")).splitlines())) > 1:
        await asyncio.sleep(0.01)
    return left
