"""The isolated jobs of the benchmark: plain functions, so each runs in a child of the template."""

from __future__ import annotations

import time

import marks

from kqueue import job


@job
def forked_noop() -> None:
    marks.write("forked_noop", time.time())


@job
def forked_late(sent: float) -> None:
    """How long after `sent` (time.time() of the client) a job starts."""
    marks.write("forked_late", time.time() - sent)
