"""Light jobs for the tests of the daemon. What they do they tell the test, over the socket named by KQUEUE_TEST_MARKS."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

from kqueue import current, enqueue, job, offload, progress, sleep


def mark(*words: Any) -> None:
    """Tell the test, in one datagram."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(" ".join(map(str, words)).encode(), os.environ["KQUEUE_TEST_MARKS"])


@job(name="stealthy")
def stealthy() -> Any:
    """Kills the daemon when none of its own code runs on the loop."""
    killer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL))
    killer.daemon = True
    killer.start()
    yield sleep(60)


@job(keep_result=60)
def note(word: str) -> Any:
    yield
    mark("note", word)
    return word


@job(keep_result=60)
def nap(seconds: float, word: str = "") -> Any:
    mark("start", word, time.monotonic())
    yield sleep(seconds)
    mark("end", word, time.monotonic())
    return word


@job
def poison() -> Any:
    yield
    os.kill(os.getpid(), signal.SIGKILL)


@job(keep_result=60)
async def anap(seconds: float) -> float:
    await sleep(seconds)
    return seconds


@job(timeout=0.2, max_attempts=1)
def too_long() -> Any:
    try:
        yield sleep(60)
    finally:
        mark("cleaned up")


@job(max_attempts=2, backoff=[0])
def fails_twice() -> Any:
    yield
    mark("attempt", current().attempt)
    raise ValueError("no such luck")


@job(keep_result=60)
def fans_out(count: int) -> Any:
    ids = []
    for n in range(count):
        ids.append((yield enqueue(note.job(f"from {n}"))))
    return ids


@job(keep_result=60)
def offloads() -> Any:
    yield progress(0.5, "half way")
    result = yield offload(os.path.join, "a", "b")
    return result


@job(keep_result=60)
def yields_nonsense() -> Any:
    try:
        yield 0.5
    except TypeError as error:
        return str(error)


@job(max_attempts=1)
def dispatches_blocking() -> Any:
    yield
    note.dispatch("never")


@job(max_attempts=1)
def blocks(seconds: float) -> Any:
    yield
    time.sleep(seconds)
    yield
