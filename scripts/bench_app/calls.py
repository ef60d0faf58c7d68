"""Inline jobs of the benchmark that have something done in another process: a call in the pool, a program."""

from __future__ import annotations

import time
from typing import Any

import marks

from kqueue import io, job, offload

FIRST = 20  # that start the template and the process, and are not counted


@job(timeout=300)
def offloads(count: int) -> Any:
    for number in range(FIRST + count):
        began = time.time()
        yield offload(abs, -1)
        if number >= FIRST:
            marks.write("offload", time.time() - began)


@job(timeout=300)
def runs(count: int) -> Any:
    for number in range(FIRST + count):
        began = time.time()
        yield io.run(["true"])
        if number >= FIRST:
            marks.write("program", time.time() - began)
