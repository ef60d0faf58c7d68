"""The process that dispatches: `python -m chaos_app.dispatcher ORDERS URL BEGAN_AT`, its book in the environment.

It may be killed at any time and started again: what the book says it had returned for is not dispatched again, and what it had
attempted only, is (by the same id), unless the order says to leave it at one try.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from pathlib import Path

import kqueue
from kqueue.errors import KQueueError

from . import book, heavy, jobs
from .workload import Order, load

BATCH = 50
MODULES = {"jobs": jobs, "heavy": heavy}


def main() -> int:
    orders, url, began_at = load(Path(sys.argv[1])), sys.argv[2], float(sys.argv[3])
    logging.basicConfig()
    kqueue.connect(url)
    marks = _marks()
    returned = {mark.job for mark in marks if mark.kind == book.RETURNED}
    tried = {mark.job for mark in marks if mark.kind == book.ATTEMPTED}
    left = deque(order for order in orders if order.id not in (returned if order.insist else tried))
    while left:
        wait_s = began_at + left[0].at_s - book.now()
        if wait_s > 0:
            time.sleep(wait_s)
        batch = []
        while left and len(batch) < BATCH and left[0].at_s <= book.now() - began_at:
            batch.append(left.popleft())
        if batch and not _dispatch(batch):
            left.extendleft(reversed([order for order in batch if order.insist]))
    return 0


def _marks() -> list[book.Mark]:
    reader = book.Reader(os.environ[book.PATH_VARIABLE])
    marks = reader.more()
    reader.close()
    return marks


def _dispatch(batch: list[Order]) -> bool:
    """Dispatch `batch`; whether it is known that all of them are queued."""
    bound = [_bind(order) for order in batch]
    for order in batch:
        book.note(book.ATTEMPTED, order.id, word=order.owed)
    try:
        kqueue.dispatch_many(bound)
    except KQueueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        for order in batch:
            book.note(book.UNKNOWN, order.id, word=type(error).__name__)
        return False
    for order in batch:
        book.note(book.RETURNED, order.id)
    return True


def _bind(order: Order) -> kqueue.BoundJob:
    job = getattr(MODULES[order.module], order.job)
    bound: kqueue.BoundJob = job.options(id=order.id, queue=order.queue, **order.options).job(*order.args)
    return bound


if __name__ == "__main__":
    sys.exit(main())
