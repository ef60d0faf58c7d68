"""The HTTP client with a server that behaves: what is sent is what was asked for, and what comes is what was sent."""

from __future__ import annotations

import io as files
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import __version__, io
from kqueue.context import enter
from kqueue.errors import JobTimedOut, UsageError
from kqueue.io import http
from kqueue.io.http.cookies import Cookies
from kqueue.io.http.headers import Headers
from kqueue.io.http.urls import join as join_urls
from kqueue.io.http.urls import parse
from kqueue.kernel import Kernel, join, sleep
from tests.io.conftest import a_job, open_fds
from tests.io.http_world import Site, expect_fds, kernel, pool_counts, site

__all__ = ["kernel", "site"]  # fixtures


def test_the_three_ways_to_wait_are_the_same(kernel: Kernel, site: Site) -> None:
    def by_yield() -> Any:
        return (yield http.get(site.url)).status

    def by_yield_from() -> Any:
        return (yield from io.http.get(site.url)).status

    async def by_await() -> Any:
        async with await http.stream("GET", site.url) as response:
            assert await response.read_all()
        return (await http.get(site.url)).status

    assert kernel.run(by_yield()) == kernel.run(by_yield_from()) == kernel.run(by_await()) == 200
    assert site.connections == 1, "each came back in time for the next"


def test_what_is_sent(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        response = yield http.get(
            f"{site.url}/echo/a b/ü?x=1#fragment", params={"y": ["2", "3"], "z": "ä&"}, headers={"X-Own": " \t1 "}
        )
        told = response.json()
        assert told["target"] == "/echo/a%20b/%C3%BC?x=1&y=2&y=3&z=%C3%A4%26"
        headers = dict(map(tuple, told["headers"]))
        assert headers == {
            "host": site.url.partition("//")[2], "user-agent": f"kqueue/{__version__}", "accept": "*/*",
            "accept-encoding": "gzip, deflate", "x-own": "1",
        }  # fmt: skip
        assert response.headers["X-TWICE"] == "a, b"
        assert response.headers.get_all("x-twice") == ["a", "b"]
        assert "x-nothing" not in response.headers
        assert (response.status, response.reason, response.http_version, response.ok) == (200, "OK", "1.1", True)
        assert response.url == f"{site.url}{told['target']}"
        assert response.raise_for_status() is response
        return repr(response)

    assert re.fullmatch(r"<Response 200 of GET http://127.0.0.1:\d+/echo/a%20b/%C3%BC\?…>", kernel.run(job()))


def test_names_that_are_not_ascii() -> None:
    url = parse("https://Bücher.Example:8443/größe?q=ä b#x")
    assert (url.host, url.port, url.target) == ("xn--bcher-kva.example", 8443, "/gr%C3%B6%C3%9Fe?q=%C3%A4%20b")
    assert url.authority == "xn--bcher-kva.example:8443"
    assert parse("http://[::1]:80/").authority == "[::1]"
    assert parse("HTTP://EXAMPLE.org").target == "/"
    assert join_urls(parse("http://me:pw@a/b/c"), "../d?x") == parse("http://a/d?x")
    assert join_urls(parse("http://a/b"), "/c?next=http://d/") == parse("http://a/c?next=http://d/")
    assert join_urls(parse("http://a/b"), "https://e/?f") == parse("https://e/?f")
    assert parse("http://a/%41%zz").path == "/%41%zz", "what is quoted already, or wrongly, goes as it is"
    assert "geheim" not in parse("http://u:geheim@a/x?geheim").shown


def pieces() -> Iterator[bytes]:
    yield b"one "
    yield b""
    yield b"two"


def waits() -> Any:
    """A body that waits while it is made."""
    yield b"one "
    yield sleep(0.001)
    yield b"two"


async def is_async() -> AsyncIterator[bytes]:
    yield b"one "
    await sleep(0.001)
    yield b"two"


@pytest.mark.parametrize(
    ("given", "kind", "body"),
    [
        ({"json": {"a": [1, None, "ü"]}}, "application/json", '{"a":[1,null,"ü"]}'),
        ({"data": {"a": "1 2", "b": ["x", "y"]}}, "application/x-www-form-urlencoded", "a=1+2&b=x&b=y"),
        ({"data": b"\x00\xff"}, None, "\x00\xff"),
        ({"data": "text"}, "text/plain; charset=utf-8", "text"),
        ({"data": memoryview(b"view")}, None, "view"),
        ({"body": pieces}, None, "one two"),
        ({"body": waits}, None, "one two"),
        ({"body": is_async}, None, "one two"),
        ({"body": lambda: [b"one ", bytearray(b"two")]}, None, "one two"),
        ({"body": lambda: files.BytesIO(b"a file" * 50_000)}, None, "a file" * 50_000),
        ({"json": None, "headers": {"Content-Length": "999"}}, None, ""),
        ({"data": b"[]", "headers": {"Content-Type": "application/json"}}, "application/json", "[]"),
        ({"body": pieces, "headers": {"Content-Length": "7"}}, None, "one two"),
    ],
)
def test_bodies(kernel: Kernel, site: Site, given: dict[str, Any], kind: str | None, body: str) -> None:
    given = {name: value() if callable(value) else value for name, value in given.items()}

    def job() -> Any:
        told = (yield http.post(site.url, **given)).json()
        headers = dict(map(tuple, told["headers"]))
        assert headers.get("content-type") == kind
        assert ("content-length" in headers) != ("transfer-encoding" in headers)
        assert told["body"].encode("latin-1").decode("latin-1" if kind is None else "utf-8") == body

    kernel.run(job())


@pytest.mark.parametrize("is_seekable", [True, False])
def test_files_in_a_form(kernel: Kernel, site: Site, tmp_path: Path, is_seekable: bool) -> None:
    path = tmp_path / "a\"b.txt"
    path.write_bytes(b"content " * 20_000)

    class Pipe(files.BytesIO):
        def seek(self, *args: int) -> int:
            raise OSError

    def job() -> Any:
        with open(path, "rb") as file:
            more: Any = Pipe(b"piped") if not is_seekable else ("n.bin", b"\x00", "image/x")
            told = (yield http.post(site.url, data={"field": "v"}, files={"one": file, "many": [b"x", more]})).json()
        headers, body = dict(map(tuple, told["headers"])), told["body"]
        boundary = headers["content-type"].partition("boundary=")[2]
        assert ("transfer-encoding" in headers) == (not is_seekable)
        parts = body.split(f"--{boundary}")
        assert (parts[0], parts[-1]) == ("", "--\r\n")
        assert parts[1] == '\r\nContent-Disposition: form-data; name="field"\r\n\r\nv\r\n'
        assert parts[2].endswith("\r\n\r\n" + "content " * 20_000 + "\r\n")
        assert 'name="one"; filename="a%22b.txt"\r\nContent-Type: application/octet-stream' in parts[2]
        assert 'name="many"; filename="many"' in parts[3]
        assert ("piped" if not is_seekable else 'filename="n.bin"\r\nContent-Type: image/x\r\n\r\n\x00') in parts[4]

    kernel.run(job())


@pytest.mark.parametrize(
    ("url", "given", "words"),
    [
        ("ftp://h/", {}, "neither http:// nor https://"),
        ("http:///x", {}, "no host"),
        ("http://h:0/", {}, "no port"),
        ("http://h:99999/", {}, "cannot be read"),
        ("http://h/a\r\nX: 1", {}, "characters in it that no URL has"),
        ("http://user:geheim@h\\x/", {}, r"'http://h\\\\x/'.*characters"),
        ("http://[::1/", {}, "cannot be read"),
        ("http://[::x]/", {}, "no IPv6 address|cannot be read"),
        ("http://a b/", {}, "no name of a host"),
        ("http://" + "ü" * 300 + "/", {}, "no name of a host"),
        ("http://h/", {"headers": {"X": "a\r\nY: b"}}, "line break"),
        ("http://h/", {"headers": {"X Y": "a"}}, "no name of a header"),
        ("http://h/", {"headers": {"X": "漢"}}, "cannot be sent"),
        ("http://h/", {"headers": {"X": 1}}, "both str"),
        ("http://h/", {"headers": {"Transfer-Encoding": "chunked"}}, "follows from the body"),
        ("http://h/", {"json": 1, "data": b"x"}, "one body"),
        ("http://h/", {"json": object()}, "as JSON"),
        ("http://h/", {"json": float("nan")}, "as JSON"),
        ("http://h/", {"body": 5}, "a body is"),
        ("http://h/", {"files": {"a": ("x",)}}, "the file 'a' is"),
        ("http://h/", {"auth": "me"}, "a user and a password"),
        (5, {}, "a URL is a str"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is(kernel: Kernel, url: Any, given: Any, words: str) -> None:
    def job() -> Any:
        with pytest.raises(http.InvalidRequest, match=words) as error:
            yield http.post(url, **given)
        assert isinstance(error.value, UsageError)
        assert "geheim" not in str(error.value)
        assert not error.value.retryable

    kernel.run(job())


def test_a_client_with_a_base_refuses_the_same(kernel: Kernel, site: Site) -> None:
    client = http.Client(base_url=site.url, proxy="")

    def job() -> Any:
        assert (yield client.get("echo?next=http://other/")).json()["target"] == "/echo?next=http://other/"
        for wrong in ("/a\r\nX: 1", "//[::1/", "http://[::1/", "ftp://h/", 5):
            with pytest.raises(http.InvalidRequest):
                yield client.get(wrong)

    kernel.run(job())
    assert len(site.asked) == 1


def test_methods(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        for name in ("get", "post", "put", "patch", "delete", "options"):
            assert (yield getattr(http, name)(site.url)).json()["method"] == name.upper()
        assert (yield http.request("report", site.url, redirects=0, timeout=5)).status == 501
        response = yield http.head(f"{site.url}/bytes?count=100")
        assert (response.headers["content-length"], response.body) == ("100", b"")
        assert (yield http.get(f"{site.url}/status?code=204")).body == b""
        assert (yield http.get(f"{site.url}/status?code=304")).status == 304
        for wrong in ("", "GE T", "CONNECT", "G\r\n"):
            with pytest.raises(http.InvalidRequest, match="no method"):
                yield http.request(wrong, site.url)

    kernel.run(job())
    assert site.connections <= 2, "answers without a body leave the connection as it was (Python's own 501 closes it)"


@pytest.mark.parametrize("kind", ["gzip", "deflate", "raw", "two"])
def test_what_is_packed_is_unpacked(kernel: Kernel, site: Site, kind: str) -> None:
    def job() -> Any:
        assert (yield http.get(f"{site.url}/gzip?kind={kind}")).body == b"packed " * 1000
        with (yield http.stream("GET", f"{site.url}/gzip?kind={kind}")) as response:
            got = []
            while piece := (yield response.read(100)):
                got.append(piece)
            assert max(map(len, got)) <= 100
            assert b"".join(got) == b"packed " * 1000

    kernel.run(job())
    assert site.connections == 1


def test_packed_wrongly(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        with pytest.raises(http.HTTPProtocolError, match="not all of it is there"):
            yield http.get(f"{site.url}/gzip?kind=cut")
        with pytest.raises(http.HTTPProtocolError, match="not what its Content-Encoding says"):
            yield http.get(f"{site.url}/gzip?kind=lie")
        assert (yield http.get(f"{site.url}/gzip?kind=none")).body == b""
        assert (yield http.get(f"{site.url}/gzip?kind=br")).body == b"as it is"
        assert (yield http.head(f"{site.url}/gzip")).body == b""

    kernel.run(job())


def test_texts_and_json(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        response = yield http.get(f"{site.url}/text")
        assert response.text == "größer"
        with pytest.raises(http.HTTPProtocolError, match=r"is no JSON: .*response.text"):
            response.json()
        response = yield http.get(f"{site.url}/chunked")
        assert response.body == b"one two " + b"three" * 10_000
        assert "x-trailer" not in response.headers

    kernel.run(job())
    assert site.connections == 1


def test_a_stream_is_read_as_slowly_as_one_likes(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        with (yield http.stream("GET", f"{site.url}/bytes?count=1000000")) as response:
            assert response.status == 200
            assert (yield response.read(3)) == b"xxx"
            assert len((yield response.read_all())) == 999_997
            assert response.closed
            assert (yield response.read()) == b""
        with (yield http.stream("GET", f"{site.url}/bytes?count=1000000")) as response:
            yield response.read(1)
        with pytest.raises(io.Closed, match="was closed before"):
            yield response.read_all()
        with (yield http.stream("GET", f"{site.url}/status?code=404")) as response, pytest.raises(http.HTTPStatusError):
            response.raise_for_status()

    kernel.run(job())
    assert pool_counts(kernel) == [(0, 0, 0)], "one that was not read to its end is closed"


# -- redirects --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "method", "expected"),
    [
        (301, "POST", "GET"), (302, "POST", "GET"), (303, "POST", "GET"), (303, "PUT", "GET"), (301, "PUT", "PUT"),
        (307, "POST", "POST"), (308, "PUT", "PUT"), (302, "GET", "GET"), (303, "HEAD", "HEAD"),
    ],
)  # fmt: skip
def test_a_redirect(kernel: Kernel, site: Site, code: int, method: str, expected: str) -> None:
    def job() -> Any:
        response = yield http.request(method, f"{site.url}/to", params={"code": code, "url": "/echo/x?y=1"}, data=b"body")
        assert (response.status, [each.status for each in response.history]) == (200, [code])
        assert response.url == f"{site.url}/echo/x?y=1"
        command, target, headers = site.asked[-1]
        assert (command, target) == (expected, "/echo/x?y=1")
        assert ("content-length" in dict(headers)) == (expected == method), "the body goes where the method does"

    kernel.run(job())
    assert site.connections == 1


def test_several_redirects(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        response = yield http.get(f"{site.url}/to", params={"url": f"{site.url}/to?url=/echo"})
        assert [each.url.startswith(f"{site.url}/to?url=") for each in response.history] == [True, True]
        assert response.json()["target"] == "/echo"

    kernel.run(job())


def test_redirects_that_are_not_followed(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        with pytest.raises(http.TooManyRedirects, match="redirected 10 times, and is again"):
            yield http.get(f"{site.url}/loop")
        assert len(site.asked) == 11
        assert (yield http.get(f"{site.url}/loop", redirects=0)).status == 302
        for where in ("ftp://x/", "http://h:77777/", "http://a b/", "http://[::1/", "//[::1/"):
            with pytest.raises(http.RedirectRefused, match="leads nowhere"):
                yield http.get(f"{site.url}/to", params={"url": where})
        with pytest.raises(http.RedirectRefused, match="read once only"):
            yield http.post(f"{site.url}/to", params={"url": "/echo", "code": 307}, body=pieces())
        repeated = yield http.post(f"{site.url}/to", params={"url": "/echo", "code": 307}, body=[b"a", b"b"])
        assert repeated.json()["body"] == "ab"

    kernel.run(job())


def test_secrets_stay_with_their_origin(kernel: Kernel, site: Site) -> None:
    other = Site()

    def secrets(told: Any) -> set[str]:
        return {name for name, _ in told["headers"]} & {"authorization", "cookie", "x-other"}

    def job() -> Any:
        given = {"Cookie": "a=b", "X-Other": "1"}
        home = yield http.get(f"{site.url}/to?url=/echo", headers=given, auth=("me", "secret"))
        assert secrets(home.json()) == {"authorization", "cookie", "x-other"}
        away = yield http.get(f"{site.url}/to", params={"url": f"{other.url}/echo"}, headers=given, auth=("me", "secret"))
        assert secrets(away.json()) == {"x-other"}
        # A user in the URL is Basic auth; one that a redirect names is nobody's.
        url = site.url.replace("//", "//me:p%40ss@")
        told = (yield http.get(url)).json()
        assert ["authorization", "Basic bWU6cEBzcw=="] in told["headers"]
        told = (yield http.get(f"{site.url}/to", params={"url": url})).json()
        assert secrets(told) == set()
        client = http.Client(base_url=site.url, headers={"Authorization": "Bearer x"}, proxy="")
        assert secrets((yield client.get("echo")).json()) == {"authorization"}
        assert secrets((yield client.get(other.url)).json()) == set()
        client = http.Client(base_url=url, proxy="")
        told = (yield client.get("echo")).json()
        assert ["authorization", "Basic bWU6cEBzcw=="] in told["headers"]
        assert secrets((yield client.get(f"{other.url}/echo")).json()) == set()

    try:
        kernel.run(job())
    finally:
        other.stop()


# -- clients ----------------------------------------------------------------------------------------------------------------


def test_statuses_are_errors_when_asked_for(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        for code, method, retryable, words in (
            (404, "GET", False, "nothing at this URL"), (401, "GET", False, "credentials"), (503, "POST", True, "may work later"),
            (500, "GET", True, "may work later"), (500, "POST", False, r"error\.response\.text"), (429, "POST", True, "later"),
        ):  # fmt: skip
            response = yield http.request(method, f"{site.url}/status?code={code}&after=7")
            expected = rf"^{method} http://127.0.0.1:\d+/status\?…: answered {code} .*{words}"
            with pytest.raises(http.HTTPStatusError, match=expected) as error:
                response.raise_for_status()
            assert (error.value.retryable, error.value.retry_after_s) == (retryable, 7.0)
            assert error.value.response.text == "as you wish"
        response = yield http.get(f"{site.url}/status", params={"code": 503, "after": "Wed, 21 Oct 2015 07:28:00 GMT"})
        with pytest.raises(http.HTTPStatusError) as error:
            response.raise_for_status()
        assert error.value.retry_after_s == 0

    kernel.run(job())


def test_cookies_are_kept_only_when_asked_for(kernel: Kernel, site: Site) -> None:
    def cookie(response: Any) -> str:
        return str(dict(map(tuple, response.json()["headers"])).get("cookie", ""))

    def job() -> Any:
        lines = "a=1; Path=/; Max-Age=--5|b=2; Path=/echo; Expires=never|c=3; Secure|d=4; Domain=example.org|e=5; Max-Age=0|f|=g"
        lines += "|h=8; Expires=Wed, 21 Oct 2015 07:28:00 GMT"
        client = http.Client(cookies=True, base_url=site.url, proxy="")
        for asking in (http, client):
            yield asking.get(f"{site.url}/set", params={"cookies": lines})
        assert cookie((yield http.get(site.url))) == ""
        assert cookie((yield client.get("/echo"))) == "b=2; a=1"
        yield client.get("/set", params={"cookies": "a=; Path=/; Max-Age=0"})
        assert cookie((yield client.get("/echo/x"))) == "b=2"
        assert cookie((yield client.get(f"{site.url.replace('127.0.0.1', 'localhost')}/echo"))) == ""
        assert cookie((yield client.get("/echo", headers={"Cookie": "own=1"}))) == "own=1"
        assert client.cookies is not None
        assert len(client.cookies) == 1
        for number in range(60):
            yield client.get("/set", params={"cookies": f"n{number}=1"})
        assert len(client.cookies) == 50

    kernel.run(job())


def test_cookies_that_were_set_by_tls_are_not_changed_without_it() -> None:
    def after(*steps: tuple[str, str], url: str = "https://a.example.org/in/side") -> str:
        cookies = Cookies()
        for where, line in steps:
            cookies.learn(parse(where), Headers([(b"set-cookie", line.encode())]))
        return cookies.header_for(parse(url)).decode()

    secure, plain = "https://a.example.org/in/x", "http://a.example.org/in/x"
    good = (secure, "s=good; Secure; Domain=example.org; Path=/")
    assert after(good, (plain, "s=bad; Domain=example.org; Path=/")) == "s=good"
    assert after(good, (plain, "s=; Domain=example.org; Path=/; Max-Age=0")) == "s=good", "nor taken away"
    assert after(good, (plain, "s=bad")) == "s=good", "nor hidden by one of a host below, or a longer path"
    assert after((secure, "s=good; Secure; Path=/"), (plain, "s=bad; Domain=example.org; Path=/")) == "s=good"
    assert after((secure, "s=good; Secure; Path=/in"), (plain, "s=other; Path=/")) == "s=good; s=other", "that hides nothing"
    assert after((secure, "s=old; Path=/"), (plain, "s=new; Path=/")) == "s=new"
    assert after(good, (secure, "s=new; Domain=example.org; Path=/")) == "s=new"
    assert after((secure, "s=gone; Secure; Path=/; Max-Age=0"), (plain, "s=new; Path=/")) == "s=new"


@pytest.mark.parametrize(
    ("line", "is_kept"),
    [
        ("__Host-a=1; Secure; Path=/", True),
        ("__Host-a=1; Path=/", False),
        ("__Host-a=1; Secure", False),
        ("__Host-a=1; Secure; Path=/in", False),
        ("__Host-a=1; Secure; Path=/; Domain=a.example.org", False),
        ("__hoSt-a=1; Path=/", False),
        ("__Secure-a=1; Secure; Domain=example.org", True),
        ("__Secure-a=1", False),
        ("__SECURE-a=1", False),
        ("_Host-a=1", True),
    ],
)
def test_cookies_whose_names_promise_something(line: str, is_kept: bool) -> None:
    cookies = Cookies()
    cookies.learn(parse("https://a.example.org/"), Headers([(b"set-cookie", line.encode())]))
    assert len(cookies) == is_kept


def test_connections_are_used_again(kernel: Kernel, site: Site) -> None:
    def one() -> Any:
        for _ in range(20):
            yield http.get(site.url)

    def job() -> Any:
        yield io.gather(*(one() for _ in range(5)))

    kernel.run(job())
    assert len(site.asked) == 100
    assert site.connections <= 5
    (counts,) = pool_counts(kernel)
    assert counts == (0, site.connections, 0)


def test_not_more_at_once_than_allowed(kernel: Kernel, site: Site) -> None:
    other = Site()
    client = http.Client(max_per_host=2, max_connections=3, proxy="")

    def job() -> Any:
        urls = [site.url, other.url] * 20
        statuses = yield io.gather(*(client.get(url) for url in urls))
        assert [each.status for each in statuses] == [200] * 40
        assert sum(pool_counts(kernel)[0]) <= 3
        # Idle ones give way to another server.
        third = Site()
        try:
            yield io.gather(*(client.get(third.url) for _ in range(5)))
        finally:
            third.stop()
        assert third.connections <= 2
        with (yield client.stream("GET", site.url)), (yield client.stream("GET", site.url)):
            with pytest.raises(http.HTTPTimeout, match="2 connections to it are in use, which is max_per_host") as error:
                yield client.get(site.url, timeout=http.Timeouts(pool=0.01))
            assert (error.value.phase, error.value.retryable) == ("pool", True)

    try:
        kernel.run(job())
    finally:
        other.stop()
    assert site.connections <= 4


def test_who_waits_for_one_server_does_not_cost_another_its_connections(kernel: Kernel, site: Site) -> None:
    """He may have no connection more to his, so what comes back from elsewhere is of no use to him: it is kept."""
    other = Site()
    client = http.Client(max_per_host=1, max_connections=2, proxy="")

    def job() -> Any:
        with (yield client.stream("GET", f"{site.url}/bytes?count=1000000")):
            waiter = kernel.spawn(client.get(site.url).__await__())
            for _ in range(10):
                yield client.get(other.url)
            assert pool_counts(kernel) == [(1, 1, 1)]
        assert (yield join(waiter)).status == 200

    try:
        kernel.run(job())
    finally:
        other.stop()
    assert other.connections == 1


def test_an_idle_connection_is_closed_in_time(kernel: Kernel, site: Site) -> None:
    client = http.Client(idle_timeout=0.01, proxy="")

    def job() -> Any:
        yield client.get(site.url)
        while pool_counts(kernel) != [(0, 0, 0)]:
            yield sleep(0.001)

    before = open_fds()
    kernel.run(job())
    expect_fds(before)


def test_a_client_ends_with_its_job(kernel: Kernel, site: Site) -> None:
    context = a_job()
    before = open_fds()

    def job() -> Any:
        enter(context)
        client = http.Client(proxy="")
        yield client.get(site.url)
        context.close_all()
        with pytest.raises(UsageError, match="was closed"):
            yield client.get(site.url)
        with http.Client() as other:
            yield other.get(site.url)
        enter(None)

    kernel.run(job())
    expect_fds(before)
    assert pool_counts(kernel) == []


def test_the_module_may_be_loaded_by_a_job(site: Site) -> None:
    program = f"""
from kqueue.context import enter
from kqueue.kernel import Kernel
from kqueue import io
from tests.io.conftest import a_job
def job():
    context = a_job()
    enter(context)
    assert (yield io.http.get({site.url!r})).status == 200
    context.close_all()
kernel = Kernel()
kernel.run(job())
kernel.run(job())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert site.connections == 1


def test_the_longest_waiting_is_first_wherever_he_wants_to(
    kernel: Kernel, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one connection for all, a server that is asked all the time does not keep another one's requests waiting."""
    monkeypatch.setattr("kqueue.io.http.pool.HEAD_START_S", 0)
    other = Site()
    client = http.Client(max_connections=1, proxy="")
    served: list[str] = []

    def one(url: str, name: str) -> Any:
        yield client.get(url)
        served.append(name)

    def job() -> Any:
        wanted = [(site.url, "a1"), (site.url, "a2"), (other.url, "b1"), (site.url, "a3"), (other.url, "b2"), (site.url, "a4")]
        yield io.gather(*(one(url, name) for url, name in wanted))

    try:
        kernel.run(job())
    finally:
        other.stop()
    assert served == ["a1", "a2", "b1", "a3", "b2", "a4"]


def test_who_waits_for_a_connection_until_his_job_is_over_is_told(kernel: Kernel, site: Site) -> None:
    client = http.Client(max_per_host=1, proxy="")

    def holds() -> Any:
        with (yield client.stream("GET", f"{site.url}/bytes?count=1000000")):
            task = kernel.spawn(client.get(site.url).__await__())
            task.on_end = lambda ended: None
            yield sleep(0)
            kernel.cancel(task, JobTimedOut("it ran longer than its timeout of 1 s"))
            with pytest.raises(JobTimedOut, match=r"of 1 s; it waited for a connection to 127.0.0.1:\d+: 1 connections to it"):
                yield join(task)

    kernel.run(holds())


def test_no_fd_is_left_over_by_many_requests(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        yield http.get(site.url)
        before = open_fds()
        for number in range(300):
            response = yield http.post(f"{site.url}/status", params={"code": [200, 404, 302, 204][number % 4]}, json=number)
            assert response.status in (200, 404, 302, 204)
        assert open_fds() == before

    kernel.run(job())
    assert site.connections == 1


def test_the_daemon_stays_light(site: Site) -> None:
    program = f"""
import sys
from kqueue.kernel import Kernel
from kqueue import io
assert "h11" not in sys.modules
def job():
    response = yield io.http.post({site.url!r}, data={{"a": 1}}, params={{"b": 2}})
    assert response.json()["method"] == "POST"
Kernel().run(job())
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert loaded & {"asyncio", "http", "http.client", "urllib.request", "requests", "email", "ssl", "threading"} <= {"threading"}


def test_what_is_missing_is_named() -> None:
    program = "import sys; sys.modules['h11'] = None\nimport kqueue.io\nkqueue.io.http"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "needs h11, which is not installed: pip install 'kqueue[http]'" in done.stderr
    assert json.dumps(done.returncode) == "1"
