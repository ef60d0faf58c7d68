"""What the tests of kqueue.io.http share: a kernel whose pools are looked at, a site by Python's own server, scripted peers."""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from kqueue.io.gate import Gate
from kqueue.io.http.pool import Pools
from kqueue.kernel import Kernel
from tests.io.conftest import _crashed, open_fds


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """At its end no connection may be in use, no request may wait, and no fd be left. No proxies are used."""
    before = open_fds()
    kernel = Kernel()
    kernel.on_crash = _crashed
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield kernel
    assert [counts for counts in pool_counts(kernel) if (counts[0], counts[2]) != (0, 0)] == []
    pools = kernel.locals.get(Pools)
    if pools is not None:
        pools.close()
    gate = kernel.locals.get(Gate)
    assert gate is None or (gate.taken, gate.waiting) == (0, 0)
    kernel.close()
    expect_fds(before)


def expect_fds(expected: set[str]) -> None:
    """No more than these are open, as soon as the threads of servers have noticed that their clients are gone."""
    deadline = time.monotonic() + 20
    while more := open_fds() - expected:
        assert time.monotonic() < deadline, f"left open: {more}"
        time.sleep(0.001)


def pool_counts(kernel: Kernel) -> list[tuple[int, int, int]]:
    """In use, idle, waiting: of each client that has a pool."""
    pools = kernel.locals.get(Pools)
    return [] if pools is None else [pool.counts for pool in pools]


class _Visitor(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        """By what is in `pages`, or by the method page_… that the path begins with."""
        self.server.asked.append((self.command, self.path, self.headers.items()))
        size = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        else:
            body = self.rfile.read(int(size)) if size else b""
        parts = urlsplit(self.path)
        known = self.server.pages.get(parts.path)
        if known is not None:
            return self.send(*known)
        page = getattr(self, f"page_{parts.path.strip('/').partition('/')[0] or 'echo'}")
        page(body, {key: values[-1] for key, values in parse_qs(parts.query).items()})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = answer

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(body)

    def page_echo(self, body: bytes, query: dict[str, str]) -> None:
        told = {
            "method": self.command, "target": self.path, "headers": [[n.lower(), v] for n, v in self.headers.items()],
            "body": body.decode("latin-1"), "query": query,
        }  # fmt: skip
        self.send(200, json.dumps(told).encode(), ("Content-Type", "application/json"), ("X-Twice", "a"), ("X-Twice", "b"))

    def page_status(self, body: bytes, query: dict[str, str]) -> None:
        extra = [("Retry-After", query["after"])] if "after" in query else []
        self.send(int(query["code"]), b"as you wish", *extra)

    def page_to(self, body: bytes, query: dict[str, str]) -> None:
        self.send(int(query.get("code", "302")), b"go on", ("Location", query["url"]))

    def page_loop(self, body: bytes, query: dict[str, str]) -> None:
        self.send(302, b"", ("Location", "/loop"))

    def page_gzip(self, body: bytes, query: dict[str, str]) -> None:
        data = b"packed " * 1000
        kind = query.get("kind", "gzip")
        raw = zlib.compressobj(wbits=-15)
        packed = {
            "gzip": gzip.compress(data), "deflate": zlib.compress(data),
            "two": gzip.compress(data[:3500]) + gzip.compress(data[3500:]),
            "raw": raw.compress(data) + raw.flush(), "cut": gzip.compress(data)[:-9], "lie": b"this is not packed at all",
            "none": b"", "br": b"as it is",
        }[kind]  # fmt: skip
        coding = {"raw": "deflate", "two": "gzip", "cut": "gzip", "lie": "gzip", "none": "gzip"}.get(kind, kind)
        self.send(200, packed, ("Content-Encoding", coding))

    def page_text(self, body: bytes, query: dict[str, str]) -> None:
        self.send(200, "größer".encode("latin-1"), ("Content-Type", "text/plain; charset=ISO-8859-1"))

    def page_set(self, body: bytes, query: dict[str, str]) -> None:
        self.send(200, b"", *(("Set-Cookie", line) for line in query["cookies"].split("|")))

    def page_bytes(self, body: bytes, query: dict[str, str]) -> None:
        self.send(200, b"x" * int(query["count"]))

    def page_chunked(self, body: bytes, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in (b"one", b" two ", b"three" * 10_000):
            self.wfile.write(b"%x;extension=1\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\nX-Trailer: ignored\r\n\r\n")


class Site(ThreadingHTTPServer):
    """Python's own server, with keep-alive. `connections` counts them, `asked` has every request."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Visitor)
        self.connections = 0
        self.pages: dict[str, tuple[int, bytes]] = {}  # by path
        self.asked: list[tuple[str, str, Any]] = []
        self._context = context
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http{'s' if self._context else ''}://127.0.0.1:{self.server_port}"

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, address = super().get_request()
        self.connections += 1
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is not None:
            sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return sock, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news here."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join(10)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.stop()


def says(answer: bytes, *, then: Callable[[socket.socket], None] | None = None) -> Callable[[socket.socket], None]:
    """A peer that reads one request's head, sends `answer`, does what is to be done `then`, and closes the connection."""

    def peer(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(answer)
        if then is not None:
            then(sock)

    return peer


def read_head(sock: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        data = sock.recv(65536)
        if not data:
            return head
        head += data
    return head


def until_gone(sock: socket.socket) -> None:
    """Until the other side has closed it."""
    while sock.recv(65536):
        pass
