"""The heavy jobs: each run is a child of the template. Imported by the template only."""

from __future__ import annotations

import ctypes
import os
import time

from kqueue import job

from . import book
from .jobs import Deliberate, nap, run

BACKOFF = [0.2]  # seconds


@job(isolated=True, timeout=0)
def work(seconds: float) -> None:
    with run():
        time.sleep(seconds)


@job(isolated=True, timeout=0, backoff=BACKOFF)
def flaky_work(seconds: float) -> None:
    """Fails the first time."""
    with run() as this:
        time.sleep(seconds)
        if this.first:
            raise Deliberate


@job(isolated=True, timeout=0)
def fans_work(seconds: float) -> None:
    """Dispatches another job on its way."""
    with run() as this:
        time.sleep(seconds)
        id = this.sub("s")
        book.note(book.ATTEMPTED, id, word="done")
        nap.options(id=id).dispatch(0.01)
        book.note(book.RETURNED, id)
        time.sleep(seconds)


@job(isolated=True, timeout=0, backoff=BACKOFF)
def followed_work(seconds: float, fails: bool = False) -> None:
    """Has a follow-up; `fails`: raises the first time, after having said so."""
    with run() as this:
        time.sleep(seconds)
        this.then(nap)
        if fails and this.first:
            raise Deliberate


@job(isolated=True, timeout=0, backoff=BACKOFF)
def poison(how: str) -> None:
    """Its process dies: by a "segfault", or by "exit"."""
    with run() as this:
        this.ends(book.DYING, "child")
        if how == "segfault":
            ctypes.string_at(0)
        os._exit(3)
