"""taskiq on a Redis stream, which acknowledges after the job."""

from __future__ import annotations

import asyncio
from typing import Any

from taskiq_redis import RedisStreamBroker

from . import work

AT_ONCE = 10  # of 10, 50, 100 and 1,000 the fastest way to send
broker = RedisStreamBroker(work.redis_url(), consumer_id="0")  # the default, $, forgets what is sent before a worker came


@broker.task
async def warm_up() -> None:
    work.warm_up()


@broker.task
async def noop() -> None:
    work.noop()


@broker.task
async def late(sent: float) -> None:
    work.late(sent)


parked = broker.task(task_name="parked")(work.parked_async)
http = broker.task(task_name="http")(work.http)


async def one(name: str, *args: Any) -> None:
    await globals()[name].kiq(*args)


async def many(name: str, args: list[str], count: int) -> None:
    for start in range(0, count, AT_ONCE):
        await asyncio.gather(*(one(name, *args) for _ in range(min(AT_ONCE, count - start))))


async def close() -> None:
    await broker.shutdown()
