"""Dramatiq on Redis, with the middleware it has by default. It acknowledges after the job. A group sends one by one."""

from __future__ import annotations

from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from . import work

dramatiq.set_broker(RedisBroker(url=work.redis_url()))
_actors = {name: dramatiq.actor(actor_name=name)(getattr(work, name)) for name in ("warm_up", "noop", "late", "parked")}


def one(name: str, *args: Any) -> None:
    _actors[name].send(*args)
