"""KQueue's jobs for the comparison: inline ones that wait, and that ask a web server. The others are those of the benchmark."""

from __future__ import annotations

import time
from typing import Any

import marks

from kqueue import io, job, sleep

from .work import PARKED_S

CLIENT = io.http.Client(max_per_host=10_000, max_connections=10_000, proxy="")


@job(timeout=60)
async def parked() -> None:
    marks.write("starts", time.time())
    await sleep(PARKED_S)
    marks.write("ends", time.time())


@job(timeout=60)
def http(url: str) -> Any:
    marks.write("starts", time.time())
    response = yield CLIENT.get(url, timeout=50)
    if response.raise_for_status().json() == {"answer": 42}:
        marks.write("ends", time.time())
