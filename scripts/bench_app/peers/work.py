"""What the jobs do, whoever runs them: each says with its marks when it ran."""

from __future__ import annotations

import asyncio
import os
import time
from functools import cache
from typing import Any

import marks

REDIS_VARIABLE = "BENCH_REDIS"  # the queue's URL, in the environment of whoever enqueues or runs jobs
PARKED_S = 0.1


def redis_url() -> str:
    return os.environ[REDIS_VARIABLE]


def warm_up() -> None:
    """What a client sends before its time is taken."""
    marks.write("warm_up", time.time())


def noop() -> None:
    marks.write("noop", time.time())


def late(sent: float) -> None:
    """How long after `sent` (time.time() of whoever enqueued it) a job starts."""
    marks.write("late", time.time() - sent)


def parked() -> None:
    """For workers of threads."""
    marks.write("starts", time.time())
    time.sleep(PARKED_S)
    marks.write("ends", time.time())


async def parked_async() -> None:
    marks.write("starts", time.time())
    await asyncio.sleep(PARKED_S)
    marks.write("ends", time.time())


async def http(url: str) -> None:
    marks.write("starts", time.time())
    response = await _client().get(url)
    if response.raise_for_status().json() == {"answer": 42}:
        marks.write("ends", time.time())


@cache
def _client() -> Any:
    """One for the whole worker, with as many connections as there are jobs."""
    import httpx

    return httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=50, trust_env=False)
