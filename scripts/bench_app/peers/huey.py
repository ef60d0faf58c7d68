"""Huey on Redis. A worker takes a job off the queue before it runs it: what it holds when it is killed is lost."""

from __future__ import annotations

from typing import Any

from huey import RedisHuey

from . import work

app = RedisHuey("bench", url=work.redis_url(), results=False, immediate=False)
_tasks = {name: app.task(name=name)(getattr(work, name)) for name in ("warm_up", "noop", "late", "parked")}


def one(name: str, *args: Any) -> None:
    _tasks[name](*args)
