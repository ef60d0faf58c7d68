"""Heavy jobs for the tests of the daemon: the template imports this, the supervisor never does."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from kqueue import current, job
from tests.apps.inline import mark

BALLAST = bytearray(b"x") * 60_000_000  # what a supervisor that imported this would show


@job(isolated=True, keep_result=60)
def crunch(n: int) -> dict[str, Any]:
    mark("crunch", n, os.getpid())
    return {"n": n, "ballast": len(BALLAST)}


@job(isolated=True)
def linger(seconds: float) -> None:
    mark("linger", os.getpid(), current().attempt)
    time.sleep(seconds)
    mark("lingered", os.getpid())


@job(isolated=True, backoff=[0])
def dies_once() -> None:
    mark("attempt", current().attempt)
    if current().attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
