"""Enqueues with a peer's own client, in its own virtual environment, and prints how many seconds that took.

    python -m peers.send PEER WORK SINGLES BATCHED [ARGUMENT …]     one at a time, then in bulk; prints both times
    python -m peers.send PEER late COUNT PERIOD_S                    one every PERIOD_S, with time.time() as its argument

A client that is connected counts, so a job "warm_up" is sent before.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import time
from typing import Any


async def _done(result: Any) -> None:
    if inspect.isawaitable(result):
        await result


async def _singles(peer: Any, work: str, args: list[str], count: int) -> float:
    began = time.monotonic()
    for _ in range(count):
        await _done(peer.one(work, *args))
    return time.monotonic() - began


async def _batched(peer: Any, work: str, args: list[str], count: int) -> float:
    if not hasattr(peer, "many"):
        return await _singles(peer, work, args, count)
    began = time.monotonic()
    for start in range(0, count, 1_000):
        await _done(peer.many(work, args, min(1_000, count - start)))
    return time.monotonic() - began


async def _at_a_pace(peer: Any, count: int, period_s: float) -> None:
    due = time.monotonic()
    for _ in range(count):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await _done(peer.one("late", time.time()))
        due = max(due + period_s, time.monotonic())


async def main(name: str, work: str, *rest: str) -> None:
    peer = importlib.import_module(f"peers.{name}")
    await _done(peer.one("warm_up"))
    if work == "late":
        await _at_a_pace(peer, int(rest[0]), float(rest[1]))
    else:
        singles, batched, *args = rest
        print(await _singles(peer, work, args, int(singles)), await _batched(peer, work, args, int(batched)))
    if hasattr(peer, "close"):
        await _done(peer.close())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
