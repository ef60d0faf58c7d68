"""Jobs that use kqueue.io in each of the places where a job may run. All do the same, and leave a stream open."""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import Any

from kqueue import io, job
from kqueue.io.names import Names
from kqueue.io.operation import operation
from kqueue.io.surroundings import local
from kqueue.kernel import sleep

LEAK: ContextVar[str] = ContextVar("LEAK", default="clean")


def work(port: int) -> Any:
    """Every part once, by way of a name that only a resolver understands. Returns what came, and the helper's pid."""
    before = LEAK.get()
    LEAK.set("dirty")
    stream = yield from io.connect("127.1", port)
    yield from stream.write(b"hello\n")
    first = yield from stream.read_until(b"\n")
    echoes = yield from io.gather(*(echo(port, number) for number in range(5)), limit=2)
    won = yield from io.race(wait(0.01), wait(60))
    try:
        with io.timeout(0.05), io.timeout(60):
            yield from stream.read()
    except io.TimedOut:
        won += " in time"
    try:
        yield from stream.read(timeout=0.01)
    except io.TimedOut:
        won += ", twice"
    queue: io.Queue[bytes] = io.Queue(1)
    _, pieces = yield from io.gather(produce(queue), consume(queue))
    helpers = local(Names)._helpers
    return [first.decode(), echoes, won, pieces, before, helpers[0].pid if helpers else 0, os.getpid()]


def echo(port: int, number: int) -> Any:
    with (yield from io.connect("127.0.0.1", port)) as stream:
        yield from stream.write(b"%d\n" % number)
        return (yield from stream.read_until(b"\n")).decode()


def wait(seconds: float) -> Any:
    yield from sleep(seconds)
    return f"{seconds:g}"


def produce(queue: io.Queue[bytes]) -> Any:
    for number in range(3):
        yield from queue.put(b"%d" % number)
    queue.close()


def consume(queue: io.Queue[bytes]) -> Any:
    got = []
    try:
        while True:
            got.append((yield from queue.get()).decode())
    except io.Closed:
        return got


@job(keep_result=60, max_attempts=1)
def io_inline(port: int) -> Any:
    return (yield from work(port))


@job(keep_result=60, max_attempts=1, isolated=True)
def io_isolated(port: int) -> Any:
    return (yield from work(port))


@job(keep_result=60, max_attempts=1, isolated=True, start="pool")
def io_pooled(port: int) -> Any:
    return (yield from work(port))


@job(keep_result=60, max_attempts=1, isolated=True)
async def io_asyncio(port: int) -> Any:
    stream = await io.connect("127.1", port)
    async with io.Semaphore(1), io.timeout(30):
        assert await io.gather(aecho(port), aecho(port)) == ["a\n", "a\n"]
    del stream
    return await operation(work)(port)


async def aecho(port: int) -> str:
    async with await io.connect("127.0.0.1", port) as stream:
        await stream.write(b"a\n")
        return (await stream.read_until(b"\n")).decode()


@job(keep_result=60, max_attempts=1, timeout=20)
def io_hold(port: int, seconds: float, timeout: float | None = None) -> Any:
    """Holds a connection for a while."""
    with (yield io.connect("127.0.0.1", port, timeout=timeout)) as stream:
        yield stream.write(b"x\n")
        yield stream.read_until(b"\n")
        yield sleep(seconds)
    return "held"
