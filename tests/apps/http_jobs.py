"""Jobs that use kqueue.io.http in each of the places where a job may run. All do the same."""

from __future__ import annotations

import os
from typing import Any

from kqueue import io, job

CLIENT = io.http.Client(max_per_host=3, proxy="")


def work(url: str) -> Any:
    """A few requests, at once and one after the other; one is left open."""
    told = yield from io.http.post(f"{url}/echo", json={"pid": os.getpid()}, timeout=10)
    sizes = yield from io.gather(*(size_of(f"{url}/bytes?count={count}") for count in (1, 100_000, 3)))
    try:
        (yield from CLIENT.get(f"{url}/status?code=503")).raise_for_status()
    except io.http.HTTPStatusError as error:
        sizes.append(error.retryable)
    yield from io.http.stream("GET", f"{url}/bytes?count=100000")
    return [told.json()["body"] == f'{{"pid":{os.getpid()}}}', sizes]


def size_of(url: str) -> Any:
    return len((yield from CLIENT.get(url)).body)


@job(keep_result=60, max_attempts=1)
def http_inline(url: str) -> Any:
    return (yield from work(url))


@job(keep_result=60, max_attempts=1)
async def http_inline_async(url: str) -> Any:
    return await awork(url)


@job(keep_result=60, max_attempts=1, isolated=True)
def http_isolated(url: str) -> Any:
    return (yield from work(url))


@job(keep_result=60, max_attempts=1, isolated=True, start="pool")
def http_pooled(url: str) -> Any:
    return (yield from work(url))


@job(keep_result=60, max_attempts=1, isolated=True)
async def http_asyncio(url: str) -> Any:
    return await awork(url)


async def awork(url: str) -> Any:
    async def body() -> Any:
        yield b'{"pid":'
        yield b"%d}" % os.getpid()

    async def size(count: int) -> int:
        return len((await CLIENT.get(f"{url}/bytes?count={count}")).body)

    told = await io.http.post(f"{url}/echo", body=body(), timeout=10)
    sizes: list[Any] = await io.gather(size(1), size(100_000), size(3))
    async with await io.http.stream("GET", f"{url}/bytes?count=1000") as response:
        assert len(await response.read(10)) == 10
    try:
        (await CLIENT.get(f"{url}/status?code=503")).raise_for_status()
    except io.http.HTTPStatusError as error:
        sizes.append(error.retryable)
    return [told.json()["body"] == f'{{"pid":{os.getpid()}}}', sizes]


@job(keep_result=60, max_attempts=1, timeout=60)
def http_get(url: str) -> Any:
    return (yield io.http.get(url)).status


@job(keep_result=60, max_attempts=1, timeout=0.3)
def http_late(url: str) -> Any:
    return (yield io.http.get(url)).status
