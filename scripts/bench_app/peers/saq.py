"""SAQ on Redis: one process, 100 jobs at once, or 1,000 where they wait. Its jobs take a context, and their arguments by name."""

from __future__ import annotations

import asyncio
from typing import Any

from saq import Queue

from . import work

AT_ONCE = 50  # of 10, 50, 100 and 1,000 the fastest way to enqueue
queue = Queue.from_url(work.redis_url())


async def warm_up(_: Any) -> None:
    work.warm_up()


async def noop(_: Any) -> None:
    work.noop()


async def late(_: Any, *, sent: float) -> None:
    work.late(sent)


async def parked(_: Any) -> None:
    await work.parked_async()


settings = {"queue": queue, "functions": [warm_up, noop, late, parked], "concurrency": 100}
settings_many = {**settings, "concurrency": 1_000}


async def one(name: str, *args: Any) -> None:
    await queue.enqueue(name, ttl=-1, retries=3, **({"sent": args[0]} if args else {}))  # ttl -1: no result is kept


async def many(name: str, args: list[str], count: int) -> None:
    for start in range(0, count, AT_ONCE):
        await asyncio.gather(*(one(name, *args) for _ in range(min(AT_ONCE, count - start))))


async def close() -> None:
    await queue.disconnect()
