"""Inline jobs that block the loop, each in its own way."""

from __future__ import annotations

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from kqueue import KQueueJob, enqueue, io, job, progress, sleep

from .inline import mark, note


@job(max_attempts=1)
def spins() -> Any:
    yield
    try:
        while True:
            pass
    finally:
        mark("cleaned", "spins")


@job(max_attempts=1)
async def sleeps() -> None:
    await sleep(0)
    time.sleep(100)


@job(max_attempts=1)
def reads() -> Any:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.recv(1)
    yield


@job(max_attempts=1)
def waits() -> Any:
    yield
    subprocess.run(["sleep", "100"], check=True)


@job(max_attempts=1)
def matches() -> Any:
    yield
    re.match(r"(a|a)*b", "a" * 64)


@job(max_attempts=1, isolated=False)
def plain() -> None:
    time.sleep(100)


@job(max_attempts=1)
def calls() -> Any:
    """Calls the function of another job, which blocks."""
    yield
    plain()


class Blocks(KQueueJob):
    """Blocks where it is made, before there is a generator."""

    max_attempts = 1

    def __init__(self) -> None:
        time.sleep(100)

    def handle(self) -> Any:
        yield


@job(keep_result=60)
def stalls(seconds: float = 0.15) -> Any:
    """Blocks for a while, and uses what an inline job may use; the process it ran in."""
    time.sleep(seconds)
    yield sleep(0.01)
    yield progress(0.5, "half way")
    yield enqueue(note.job("from stalls"))
    return os.getpid()


@job(keep_result=60)
def stalls_in_a_program() -> Any:
    subprocess.run(["sleep", "0.15"], check=True)
    yield
    return os.getpid()


@job(keep_result=60)
async def astalls() -> int:
    time.sleep(0.15)
    await sleep(0.01)
    return os.getpid()


@job(keep_result=60, isolated=False)
def stalls_by_declaration() -> Any:
    time.sleep(0.15)
    yield
    return os.getpid()


@job(keep_result=60)
def counts_in_c(n: int) -> Any:
    yield
    return sum(range(n))


@job(max_attempts=1)
def swallows_once() -> Any:
    yield
    try:
        while True:
            pass
    except BaseException:
        mark("swallowed")
    while True:
        try:
            yield sleep(0.01)
        except BaseException:
            mark("swallowed")


@job(max_attempts=1)
def swallows_all() -> Any:
    yield
    while True:
        try:
            while True:
                pass
        except BaseException as error:
            mark("swallowed", type(error).__name__)


@job(keep_result=60)
def alarm_of_a_child() -> list[Any]:
    """Isolated. What it has of the supervisor's timer."""
    return [signal.getsignal(signal.SIGALRM) == signal.SIG_DFL, list(signal.getitimer(signal.ITIMER_REAL))]


@job(max_attempts=1)
def gathers() -> Any:
    """What blocks is a task beside others, which came by an operation."""
    with (yield io.Semaphore().acquire()):
        yield io.gather(sleep(60), spinner())


def spinner() -> Any:
    yield io.Semaphore().acquire()
    while True:
        pass


@job(keep_result=600)
def imports(mine: bool) -> Any:
    """`mine`: the job itself does, else it uses something for which kqueue.io imports it."""
    sys.modules.pop("tests.apps.slow_to_load", None)
    if mine:
        importlib.import_module("tests.apps.slow_to_load")
    else:
        vars(io)["_MODULE_OF"]["slow"] = "tests.apps.slow_to_load"
        vars(io).pop("slow", None)
        getattr(io, "slow")  # noqa: B009 # by KQueue
    yield
