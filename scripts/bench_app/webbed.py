"""The inline jobs of the benchmark that ask a web server, and what all of their runs share."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import marks

from kqueue import io, job

if TYPE_CHECKING:
    import ssl

CLIENT = io.http.Client(max_per_host=10_000, max_connections=10_000, proxy="")
FORGETFUL = io.http.Client(max_per_host=500, proxy="", idle_timeout=1)


@job(timeout=60)
def web(url: str) -> Any:
    response = yield CLIENT.get(url, timeout=50)
    if response.raise_for_status().json() == {"answer": 42}:
        marks.write("web", time.time())


@job(timeout=60)
def forgetful(url: str) -> Any:
    response = yield FORGETFUL.get(url, timeout=50)
    if response.raise_for_status().json() == {"answer": 42}:
        marks.write("forgetful", time.time())


@job(timeout=120)
def secure(port: int, certificate: str) -> Any:
    """One connection of its own, which is held until the server has all of them."""
    with (yield io.connect("127.0.0.1", port, tls=_trusting(certificate), server_name="localhost")) as stream:
        marks.write("connected", time.time())
        yield stream.write(b"GET / HTTP/1.1\r\n\r\n")
        if (yield stream.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200"):
            marks.write("secure", time.time())


@lru_cache
def _trusting(certificate: str) -> ssl.SSLContext:
    import ssl

    return ssl.create_default_context(cafile=certificate)
