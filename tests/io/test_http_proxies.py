"""Proxies: which URLs go through which, and the way through one that stands in between for real."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from kqueue.io import http
from kqueue.io.http import proxies
from kqueue.io.http.urls import parse
from kqueue.kernel import Kernel
from tests.io.conftest import Server
from tests.io.http_world import Site, kernel, read_head, says, site
from tests.io.test_tls import Authority, authority

__all__ = ["authority", "kernel", "site"]  # fixtures

Serve = Callable[..., Server]


class Through:
    """A proxy: CONNECT, and plain requests by absolute URLs. `heads` are what it was asked."""

    def __init__(self, serve: Serve) -> None:
        self.heads: list[bytes] = []
        self.server = serve(self._peer)

    @property
    def where(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def _peer(self, client: socket.socket) -> None:
        head = read_head(client)
        self.heads.append(head)
        method, target = head.split(b" ")[:2]
        if method == b"CONNECT":
            host, _, port = target.decode().rpartition(":")
            with socket.create_connection((host, int(port))) as upstream:
                client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
                _pump_both(client, upstream)
        elif head:
            parts = urlsplit(target.decode())
            with socket.create_connection((str(parts.hostname), int(parts.port or 80))) as upstream:
                upstream.sendall(head.replace(target, parts.path.encode() or b"/", 1))
                _pump_both(client, upstream)


def _pump_both(one: socket.socket, other: socket.socket) -> None:
    def pump(source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                to.sendall(data)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=pump, args=(other, one))
    thread.start()
    pump(one, other)
    thread.join(10)


@pytest.fixture
def through(serve: Serve) -> Through:
    return Through(serve)


@pytest.fixture
def secure(authority: Authority) -> Iterator[Site]:
    site = Site(authority.server("behind"))
    yield site
    site.stop()


def test_plain_requests_by_the_environment(
    kernel: Kernel, site: Site, through: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:p%40ss@{through.where}")
    monkeypatch.setenv("NO_PROXY", "localhost,.example.org")
    direct = site.url.replace("127.0.0.1", "localhost")

    def job() -> Any:
        client = http.Client()
        for _ in range(2):
            told = (yield client.get(f"{site.url}/echo", auth=("me", "x"))).json()
        assert "proxy-authorization" in dict(map(tuple, told["headers"])), "our simple proxy hides nothing"
        assert (yield client.get(direct)).status == 200
        assert (yield http.Client(proxy="").get(site.url)).status == 200

    kernel.run(job())
    (head,) = through.heads  # the second request came on the same connection
    port = site.server_port
    assert head.startswith(b"GET http://127.0.0.1:%d/echo HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % (port, port))
    assert b"proxy-authorization: Basic dXNlcjpwQHNz\r\n" in head


def test_tls_goes_through_a_tunnel(kernel: Kernel, secure: Site, through: Through, authority: Authority) -> None:
    def job() -> Any:
        client = http.Client(proxy=f"http://user:pass@{through.where}", verify=authority.ca)
        for _ in range(3):
            told = (yield client.post(f"{secure.url}/echo", json=1)).json()
            assert told["body"] == "1"
            assert not {"proxy-authorization", "via"} & {name for name, _ in told["headers"]}, "that is the proxy's alone"
        with pytest.raises(http.HTTPConnectFailed, match="does not verify"):
            yield http.Client(proxy=f"http://{through.where}").get(secure.url)

    kernel.run(job())
    assert through.heads[0].startswith(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % secure.server_port)
    assert b"proxy-authorization: Basic dXNlcjpwYXNz\r\n" in through.heads[0]
    assert len(through.heads) == 2
    assert secure.connections == 2


@pytest.mark.parametrize(
    ("answer", "words", "retryable"),
    [
        (b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n", r"407 Who are you; write user and password", False),
        (b"HTTP/1.1 403 No\r\n\r\n", "lets us not through to example.org:443: 403 No", False),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "503 Busy", True),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no answer to CONNECT that is HTTP", True),
        (b"", "no answer to CONNECT", True),
        (b"HTTP/1.1 100 Go on\r\n\r\n" * 50, "no answer to CONNECT", True),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "no answer to CONNECT", True),
    ],
)
def test_a_proxy_that_lets_nobody_through(kernel: Kernel, serve: Serve, answer: bytes, words: str, retryable: bool) -> None:
    server = serve(says(answer))

    def job() -> Any:
        with pytest.raises(http.ProxyFailed, match=words) as error:
            yield http.Client(proxy=f"http://u:geheim@127.0.0.1:{server.port}").get("https://example.org/")
        assert error.value.retryable is retryable
        assert "geheim" not in str(error.value)

    kernel.run(job())


def test_a_proxy_that_is_silent_and_one_that_says_too_much(kernel: Kernel, serve: Serve) -> None:
    silent = serve(says(b"", then=lambda sock: sock.recv(1)))
    early = serve(says(b"HTTP/1.1 200 OK\r\n\r\nsomething that nobody asked for"))

    def job() -> Any:
        with pytest.raises(http.HTTPTimeout) as late:
            yield http.Client(proxy=f"127.0.0.1:{silent.port}").get("https://example.org/", timeout=http.Timeouts(connect=0.05))
        assert late.value.phase == "connect"
        with pytest.raises(http.HTTPConnectFailed, match="before TLS was spoken"):
            yield http.Client(proxy=f"127.0.0.1:{early.port}").get("https://example.org/")

    kernel.run(job())


@pytest.mark.parametrize(
    ("environment", "url", "expected"),
    [
        ({}, "http://a/", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://a/", "http://p:1/"),
        ({"HTTP_PROXY": "http://p:1"}, "https://a/", None),
        ({"HTTP_PROXY": "http://p:1", "http_proxy": "http://q:1"}, "http://a/", "http://q:1/"),
        ({"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"}, "http://a/", None),
        ({"ALL_PROXY": "p:3128"}, "https://a/", "http://p:3128/"),
        ({"ALL_PROXY": "p:1", "HTTP_PROXY": "https://q:2"}, "http://a/", "https://q:2/"),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "*"}, "https://a/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "b, a"}, "https://a/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "A"}, "https://x.a/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": ".a"}, "https://xa/", "http://p:1/"),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "*.a"}, "https://x.a/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "a:443"}, "https://a/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "a:444"}, "https://a/", "http://p:1/"),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "[::1]"}, "https://[::1]:5/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "::1"}, "https://[::1]:5/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "[::1]:6"}, "https://[::1]:5/", "http://p:1/"),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "10.0.0.0/8"}, "https://10.1.2.3/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "10.0.0.0/8"}, "https://11.1.2.3/", "http://p:1/"),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "10.0.0.0/8"}, "https://ten/", "http://p:1/"),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "10.0.0.0/8:443"}, "https://10.1.2.3/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "10.0.0.0/8:444"}, "https://10.1.2.3/", "http://p:1/"),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "fd00::/8"}, "https://[fd00::1]/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "[fd00::/8]:443"}, "https://[fd00::1]/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "*:443"}, "https://a/", None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "*:444"}, "https://a/", "http://p:1/"),
    ],
)
def test_which_proxy(environment: dict[str, str], url: str, expected: str | None) -> None:
    found = proxies.from_environment(environment).proxy_for(parse(url))
    assert (None if found is None else str(found)) == expected


def test_a_kind_that_we_do_not_speak(kernel: Kernel, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused where it would be used, and nowhere else."""
    monkeypatch.setenv("ALL_PROXY", "socks5://user:geheim@h:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def job() -> Any:
        client = http.Client()
        assert (yield client.get(site.url)).status == 200
        with pytest.raises(http.InvalidRequest, match=r"http://a/.*socks5://.* is not supported.*NO_PROXY") as error:
            yield client.get("http://a/")
        assert "geheim" not in str(error.value)

    kernel.run(job())
    with pytest.raises(http.InvalidRequest, match="not supported"):
        http.Client(proxy="socks5h://h")


def test_no_tls_within_tls(kernel: Kernel, site: Site, serve: Serve, authority: Authority) -> None:
    """A proxy that is spoken to by TLS serves http:// only; https:// is refused before anybody is connected to."""
    server = serve(says(b"what it was not asked"))

    def job() -> Any:
        client = http.Client(proxy=f"https://user:geheim@127.0.0.1:{server.port}", verify=authority.ca)
        with pytest.raises(http.InvalidRequest, match=r"^https://a/: .*TLS within TLS.*http://127.0.0.1.*NO_PROXY") as error:
            yield client.get("https://a/")
        assert "geheim" not in str(error.value)

    kernel.run(job())
    assert server.accepted == 0
