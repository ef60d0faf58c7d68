"""The inline jobs of the benchmark. The supervisor imports this, so it is as small as light jobs should be."""

from __future__ import annotations

import time

import marks

from kqueue import job, sleep


@job
async def noop() -> None:
    marks.write("noop", time.time())


@job
async def sized(data: str) -> None:
    """A no-op with an argument."""
    marks.write("sized", time.time())


@job
async def burn() -> None:
    """100 µs of CPU."""
    marks.write("burn", time.time())
    until = time.thread_time() + 0.0001
    while time.thread_time() < until:
        pass


@job
async def late(sent: float) -> None:
    """How long after `sent` (time.time() of the client) a job starts."""
    marks.write("late", time.time() - sent)


@job
async def warm_late(sent: float) -> None:
    marks.write("warm_late", time.time() - sent)


@job(timeout=60)
async def sleeper(seconds: float) -> None:
    marks.write("starts", time.time())
    await sleep(seconds)
    marks.write("ends", time.time())
