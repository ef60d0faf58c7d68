"""A module that the template can import, and a job that starts by exec cannot."""

from __future__ import annotations

import os

from kqueue import job

if "KQUEUE_JOB_ID" in os.environ:
    raise LookupError("not twice")


@job(name="fresh_bad", start="exec")
def never() -> None:
    """Nothing to do."""
