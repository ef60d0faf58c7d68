"""Celery on Redis, with late acknowledgement. It has no bulk: a group sends its messages one by one."""

from __future__ import annotations

from typing import Any

from celery import Celery

from . import work

app = Celery("bench", broker=work.redis_url())
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
_tasks = {name: app.task(name=name)(getattr(work, name)) for name in ("warm_up", "noop", "late", "parked")}


def one(name: str, *args: Any) -> None:
    _tasks[name].apply_async(args)
