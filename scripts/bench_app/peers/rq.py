"""RQ: two workers, which fork for each job. The worker reads REDIS_URL here, and so has this module when it forks."""

from __future__ import annotations

from typing import Any

from redis import Redis
from rq import Queue

from . import work

REDIS_URL = work.redis_url()
_queue = Queue(connection=Redis.from_url(REDIS_URL))
_KEPT = {"result_ttl": 0, "failure_ttl": 60}  # no results


def one(name: str, *args: Any) -> None:
    _queue.enqueue_call(getattr(work, name), args=args, **_KEPT)


def many(name: str, args: list[str], count: int) -> None:
    _queue.enqueue_many([Queue.prepare_data(getattr(work, name), args=args, **_KEPT) for _ in range(count)])
