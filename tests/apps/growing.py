"""Inline jobs that take memory, each in its own way."""

from __future__ import annotations

from typing import Any

from kqueue import job, sleep

from .inline import mark

MIB = 1048576


def taken(mib: float) -> bytes:
    """So much memory, touched."""
    return b"x" * int(mib * MIB)


@job(max_attempts=1, timeout=60)
def takes_at_once() -> Any:
    yield
    kept = taken(300)
    try:
        while True:
            yield sleep(0.01)
    finally:
        mark("let go", len(kept))


@job(max_attempts=1, timeout=60)
async def grows_slowly() -> None:
    kept = []
    while True:
        kept.append(taken(0.1))
        await sleep(0.002)


@job(keep_result=60, timeout=60)
def takes_little(rounds: int) -> Any:
    """Some memory of its own, and something to do all the time."""
    kept = [taken(20)]
    for _ in range(rounds):
        yield sleep(0.005)
        kept.append(taken(0.01))
    return len(kept)


@job(keep_result=60, timeout=60)
def leaves_garbage(rounds: int) -> Any:
    """Cycles that only a collection frees, far more than it may have at once."""
    for _ in range(rounds):
        cycle: list[Any] = [taken(1)]
        cycle.append(cycle)
        yield sleep(0.001)
    return rounds


@job(keep_result=60, timeout=60)
def gives_back(rounds: int) -> Any:
    for _ in range(rounds):
        kept = taken(40)
        yield sleep(0.001)
        del kept
        yield sleep(0.001)
    return rounds
