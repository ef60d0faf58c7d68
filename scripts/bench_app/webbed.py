"""The inline job of the benchmark that asks a web server, and the client that all of its runs share."""

from __future__ import annotations

import time
from typing import Any

import marks

from kqueue import io, job

CLIENT = io.http.Client(max_per_host=10_000, max_connections=10_000, proxy="")


@job(timeout=60)
def web(url: str) -> Any:
    response = yield CLIENT.get(url, timeout=50)
    if response.raise_for_status().json() == {"answer": 42}:
        marks.write("web", time.time())
