"""The light jobs: they run inside kqueued. Each tells the book when a run begins, and how it ends if it lives to tell."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kqueue import JobCancelled, JobTimedOut, current, enqueue, job, sleep

from . import book

INLINE_BACKOFF = [0.2]  # seconds: what fails as it should is tried again while the run still lasts


class Deliberate(Exception):
    """What a job raises that was dispatched to fail."""


class Run:
    """One run of the current job."""

    def __init__(self) -> None:
        context = current()
        self.job, self.first = context.id, context.attempt == 1
        self.id = os.urandom(4).hex()
        book.note(book.STARTED, self.job, self.id, context.attempt)

    def ends(self, kind: str, word: object = book.NOBODY) -> None:
        book.note(kind, self.job, self.id, word)

    def sub(self, letter: str) -> str:
        """An id for a job that this run makes, which no other run makes."""
        return f"{self.job}-{letter}{self.id}"

    def then(self, what: Any) -> None:
        """Declare the follow-up `what` (a job function of one argument)."""
        id = self.sub("t")
        book.note(book.PROMISED, self.job, self.id, id)
        current().then(what.options(id=id, queue=current().queue).job(0.01))  # type: ignore[attr-defined]


@contextmanager
def run() -> Iterator[Run]:
    """The marks of one run, around its work."""
    this = Run()
    try:
        yield this
    except Deliberate:
        this.ends(book.FAILED)
        raise
    except (JobCancelled, JobTimedOut, GeneratorExit) as interruption:
        this.ends(book.CANCELLED, type(interruption).__name__)
        raise
    this.ends(book.FINISHED)


@job(timeout=0)
def nap(seconds: float) -> Any:
    with run():
        yield sleep(seconds)


@job(timeout=0, backoff=INLINE_BACKOFF)
def flaky(seconds: float) -> Any:
    """Fails the first time."""
    with run() as this:
        yield sleep(seconds)
        if this.first:
            raise Deliberate


@job(timeout=0, backoff=INLINE_BACKOFF, max_attempts=2)
def hopeless() -> Any:
    with run():
        yield
        raise Deliberate


@job(timeout=0)
def fans(seconds: float) -> Any:
    """Dispatches another job on its way."""
    with run() as this:
        yield sleep(seconds)
        id = this.sub("s")
        book.note(book.ATTEMPTED, id, word="done")
        yield enqueue(nap.options(id=id).job(0.01))
        book.note(book.RETURNED, id)
        yield sleep(seconds)


@job(timeout=0, backoff=INLINE_BACKOFF)
def followed(seconds: float, fails: bool = False) -> Any:
    """Has a follow-up; `fails`: raises the first time, after having said so."""
    with run() as this:
        yield sleep(seconds)
        this.then(nap)
        if fails and this.first:
            raise Deliberate


@job(timeout=0, backoff=INLINE_BACKOFF, max_attempts=2)
def followed_in_vain() -> Any:
    with run() as this:
        yield
        this.then(nap)
        raise Deliberate


@job(timeout=0, backoff=INLINE_BACKOFF)
def poison_inline() -> Any:
    """Takes the whole daemon with it."""
    with run() as this:
        yield sleep(0.01)
        this.ends(book.DYING, "daemon")
        os.kill(os.getpid(), signal.SIGKILL)
        yield sleep(60)
