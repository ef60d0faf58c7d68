"""Jobs of the benchmark that run in the pool, and one that starts by exec."""

from __future__ import annotations

import time

import marks

from kqueue import job


@job(start="pool")
def pooled_noop() -> None:
    marks.write_once("pooled_noop", time.time())


@job(start="pool")
def pooled_late(sent: float) -> None:
    """How long after `sent` (time.time() of the client) a job starts."""
    marks.write_once("pooled_late", time.time() - sent)


@job(start="exec")
def fresh_noop() -> None:
    marks.write_once("fresh_noop", time.time())
