"""The HTTP client and servers that do not behave: a clear error, in its time, and nothing is left open or half used."""

from __future__ import annotations

import gzip
import resource
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kqueue import io
from kqueue.context import enter
from kqueue.io import http
from kqueue.io.gate import Gate
from kqueue.io.http import Timeouts
from kqueue.kernel import Kernel, join, sleep
from tests.io.conftest import Server, a_job, cancel_at_every_wait
from tests.io.http_world import Site, kernel, pool_counts, read_head, says, site, until_gone
from tests.io.test_tls import Authority, authority

__all__ = ["authority", "kernel", "site"]  # fixtures

Serve = Callable[..., Server]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def url(server: Server, path: str = "/") -> str:
    return f"http://127.0.0.1:{server.port}{path}"


def resets(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# -- garbage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error", "words", "retryable"),
    [
        (b"", http.HTTPConnectionLost, "closed the connection without a response", True),
        (b"HTTP/1.1 200 OK\r\nX: ", http.HTTPConnectionLost, "in the middle of the response's headers", True),
        (b"220 smtp.example.org ESMTP\r\n\r\n", http.HTTPProtocolError, "is no HTTP response: .*right port", False),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", http.HTTPProtocolError, "is no HTTP response", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", http.HTTPProtocolError, "no HTTP", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello", http.HTTPProtocolError, "no HTTP", False),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, http.HTTPProtocolError, "no HTTP", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 200 + OK, http.HTTPProtocolError, "no end of interim", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", http.HTTPConnectionLost, "in the middle of the body", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", http.HTTPConnectionLost, "of the body", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhello\r\n", http.HTTPProtocolError, "not HTTP", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhellohello", http.HTTPProtocolError, "not HTTP", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 100_000, http.HTTPProtocolError, "not HTTP", False),
    ],
)
def test_what_is_no_answer(
    kernel: Kernel, serve: Serve, answer: bytes, error: type[http.HTTPFailed], words: str, retryable: bool
) -> None:
    server = serve(says(answer))

    def job() -> Any:
        with pytest.raises(error, match=rf"(?s)^GET http://127.0.0.1:\d+/x\?…: .*{words}") as found:
            yield http.get(url(server, "/x?token=geheim"))
        assert "geheim" not in str(found.value)
        assert found.value.retryable is retryable
        assert isinstance(found.value, io.IOFailed)
        with pytest.raises(error) as found:
            yield http.post(url(server))
        assert not found.value.retryable, "it may have been done"

    kernel.run(job())
    assert pool_counts(kernel) == [(0, 0, 0)]


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK,
        b"HTTP/1.0 200 OK\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1;x=y\r\nk\r\n0\r\nTrailer: x\r\n\r\n",
        OK + b"HTTP/1.1 200 OK\r\nX: what nobody asked for\r\n\r\n",
    ],
)
def test_what_is_one_all_the_same(kernel: Kernel, serve: Serve, answer: bytes) -> None:
    server = serve(says(answer))

    def job() -> Any:
        for _ in range(2):
            assert (yield http.get(url(server), headers={"Expect": "100-continue"})).body == b"ok"

    kernel.run(job())
    assert server.accepted == 2, "none of these could be used again"


def test_a_reset_in_the_middle_of_the_body(kernel: Kernel, serve: Serve) -> None:
    def peer(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        sock.recv(1)
        resets(sock)

    server = serve(peer)

    def job() -> Any:
        with (yield http.stream("GET", url(server))) as response:
            assert (yield response.read()) == b"half"
            server._open[-1].shutdown(socket.SHUT_RD)  # the peer goes on, and resets
            with pytest.raises(http.HTTPConnectionLost):
                yield response.read()

    kernel.run(job())


# -- much -------------------------------------------------------------------------------------------------------------------


def floods(head: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def peer(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(head)
        while True:
            sock.sendall(piece)

    return peer


def test_a_body_larger_than_allowed(kernel: Kernel, serve: Serve) -> None:
    announced = serve(says(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n", then=until_gone))
    endless = serve(floods(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"))

    def job() -> Any:
        with pytest.raises(http.HTTPBodyTooLarge, match=r"1073741824 bytes are announced, .*max_body=67108864: .*stream"):
            yield http.get(url(announced))
        with pytest.raises(http.HTTPBodyTooLarge, match=r"more has come, allowed are max_body=1000000"):
            yield http.get(url(endless), max_body=1_000_000)
        client = http.Client(max_body=10, proxy="")
        with pytest.raises(http.HTTPBodyTooLarge, match="max_body=10"):
            yield client.get(url(endless))
        with (yield client.stream("GET", url(endless))) as response, pytest.raises(http.HTTPBodyTooLarge):
            yield response.read_all(5)

    kernel.run(job())


def test_a_gigabyte_goes_through_in_little_memory(kernel: Kernel, serve: Serve) -> None:
    size, piece = 1 << 30, b"x" * (1 << 20)

    def peer(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // len(piece)):
            sock.sendall(piece)

    server = serve(peer)

    def job() -> Any:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        got = 0
        with (yield http.stream("GET", url(server))) as response:
            while piece := (yield response.read(65536)):
                got += len(piece)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert got == size
        assert grown_kib < 16 * 1024

    kernel.run(job())


def test_a_bomb_is_as_large_as_its_reader_lets_it_be(kernel: Kernel, serve: Serve) -> None:
    bomb = gzip.compress(b"\0" * (200 << 20), 9)
    assert len(bomb) < 300_000
    server = serve(says(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(bomb), bomb)))

    def job() -> Any:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(http.HTTPBodyTooLarge):
            yield http.get(url(server), max_body=1 << 20)
        with (yield http.stream("GET", url(server))) as response:
            assert (yield response.read(1000)) == b"\0" * 1000
            for _ in range(100):
                assert len((yield response.read(65536))) <= 65536
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024

    kernel.run(job())


# -- time -------------------------------------------------------------------------------------------------------------------


def drips(head: bytes, drop: bytes) -> Callable[[socket.socket], None]:
    """Sends `drop` again and again, slowly enough that no piece is late and all of it is."""

    def peer(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(head)
        sock.settimeout(0.005)
        while True:
            sock.sendall(drop)
            try:
                if not sock.recv(1):
                    return
            except TimeoutError:
                continue

    return peer


@pytest.mark.parametrize(
    ("peer", "given", "phase", "words"),
    [
        (until_gone, Timeouts(head=0.05), "head", "sent no response in time"),
        (drips(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), Timeouts(head=0.05), "head", "sent no response in time"),
        (drips(b"HTTP/1.1 200 OK\r\nX:", b"y"), 0.05, "total", "0.05 s of its timeout are over"),
        (drips(b"", b"HTTP/1.1 102 Processing\r\n\r\n"), Timeouts(head=0.05), "head", "sent no response"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", then=until_gone), Timeouts(read=0.05), "read", "no more of"),
        (drips(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x"), Timeouts(read=5, total=0.1), "total", "0.1 s of its"),
        (until_gone, 0, "total", "over"),
    ],
)
def test_each_phase_has_its_time(kernel: Kernel, serve: Serve, peer: Any, given: Any, phase: str, words: str) -> None:
    server = serve(peer)

    def job() -> Any:
        with pytest.raises(http.HTTPTimeout, match=words) as error:
            yield http.get(url(server), timeout=given)
        assert error.value.phase == phase
        assert error.value.retryable
        assert isinstance(error.value, (io.TimedOut, TimeoutError))
        with pytest.raises(http.HTTPTimeout) as error:
            yield http.post(url(server), timeout=given)
        assert error.value.retryable == (given == 0), "unless nothing was sent"

    kernel.run(job())
    assert pool_counts(kernel) == [(0, 0, 0)]


def test_a_read_has_a_time_of_its_own(kernel: Kernel, serve: Serve) -> None:
    server = serve(says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", then=until_gone))

    def job() -> Any:
        with (yield http.stream("GET", url(server))) as response:
            assert (yield response.read(timeout=5)) == b"x"
            with pytest.raises(http.HTTPTimeout, match=r"read\(timeout=\)"):
                yield response.read(timeout=0.01)

    kernel.run(job())


def test_who_does_not_read_is_not_written_to_for_ever(kernel: Kernel, serve: Serve) -> None:
    done = threading.Event()

    def never_reads(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        done.wait(20)

    def refuses(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 65536

    def job() -> Any:
        for body in (b"x" * 50_000_000, endless()):
            with pytest.raises(http.HTTPTimeout, match="the server took no more") as error:
                yield http.put(url(silent), body=body, timeout=Timeouts(write=0.05))
            assert error.value.phase == "write"
        for body in (b"x" * 50_000_000, endless()):
            response = yield http.put(url(refusing), body=body)
            assert response.status == 413, "what it said before it hung up"

    silent, refusing = serve(never_reads), serve(refuses)
    try:
        kernel.run(job())
    finally:
        done.set()


def test_what_goes_wrong_with_a_body_while_it_is_made(kernel: Kernel, site: Site) -> None:
    closed = []

    def breaks() -> Iterator[bytes]:
        try:
            yield b"x"
            raise KeyError("mine")
        finally:
            closed.append(True)

    def job() -> Any:
        with pytest.raises(KeyError, match="mine"):
            yield http.post(site.url, body=breaks())
        with pytest.raises(http.InvalidRequest, match="made of bytes, not of str"):
            yield http.post(site.url, body=["text"])
        for length in ("3", "1"):
            with pytest.raises(http.InvalidRequest, match="cannot be sent"):
                yield http.post(site.url, body=iter([b"xx"]), headers={"Content-Length": length})

    kernel.run(job())
    assert closed
    assert pool_counts(kernel) == [(0, 0, 0)]


def test_no_connection(kernel: Kernel, serve: Serve) -> None:
    with socket.socket() as reserved, socket.socket() as full:
        reserved.bind(("127.0.0.1", 0))
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())

        def job() -> Any:
            with pytest.raises(http.HTTPConnectFailed, match=r"cannot connect to .*refused") as error:
                yield http.post(f"http://127.0.0.1:{reserved.getsockname()[1]}/")
            assert isinstance(error.value.reason, io.ConnectFailed)
            assert error.value.retryable, "nothing was sent"
            with pytest.raises(http.HTTPConnectFailed, match="cannot be resolved") as error:
                yield http.get("http://nothing.invalid/")
            assert isinstance(error.value.reason, io.NameNotFound)
            with pytest.raises(http.HTTPTimeout, match="no connection came about") as late:
                yield http.post(f"http://127.0.0.1:{full.getsockname()[1]}/", timeout=Timeouts(connect=0.05))
            assert (late.value.phase, late.value.retryable) == ("connect", True)

        kernel.run(job())
        for filler in fillers:
            filler.close()


# -- dead connections in the pool ---------------------------------------------------------------------------------------------


def test_a_connection_that_died_in_the_pool_is_no_error(kernel: Kernel, serve: Serve) -> None:
    """The server closes each connection after its second request has come, unanswered: as one does that has just timed out."""

    def peer(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(OK)
        read_head(sock)

    server = serve(peer)

    def job() -> Any:
        for number in range(3):
            assert (yield http.get(url(server))).body == b"ok"
            assert server.accepted == number + 1
        with pytest.raises(http.HTTPConnectionLost) as error:
            yield http.post(url(server))
        assert not error.value.retryable, "nobody knows whether it was done, so it is not sent again"
        assert (yield http.post(url(server))).body == b"ok"

    kernel.run(job())


def test_a_request_is_repeated_once_and_on_a_new_connection(kernel: Kernel, serve: Serve) -> None:
    """Four connections are idle, and the server hangs up on whatever is asked on any of them: a deadly request is not spread."""
    together = threading.Barrier(4)
    seen: list[bytes] = []

    def peer(sock: socket.socket) -> None:
        if b"deadly" in read_head(sock):
            return
        together.wait(20)
        sock.sendall(OK)
        while head := read_head(sock):
            seen.append(head)
            if b"deadly" in head:
                return

    def job() -> Any:
        yield io.gather(*(http.get(url(server)) for _ in range(4)))
        assert pool_counts(kernel) == [(0, 4, 0)]
        with pytest.raises(http.HTTPConnectionLost, match="without a response"):
            yield http.get(url(server, "/deadly"))
        assert pool_counts(kernel) == [(0, 0, 0)]

    server = serve(peer)
    kernel.run(job())
    assert (len(seen), server.accepted) == (1, 5), "once on an idle one, once on a new one"


def test_one_that_was_closed_in_time_is_not_even_tried(kernel: Kernel, serve: Serve) -> None:
    server = serve(says(OK))

    def job() -> Any:
        for _ in range(3):
            assert (yield http.post(url(server))).body == b"ok"
            while pool_counts(kernel)[0][1] and not _is_closed_by(server):
                yield sleep(0.001)

    kernel.run(job())
    assert server.accepted == 3


def _is_closed_by(server: Server) -> bool:
    return server._open[-1].fileno() == -1


# -- being interrupted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "stream", "upload", "pool"])
def test_a_cancellation_at_every_wait_leaves_nothing(kernel: Kernel, site: Site, how: str) -> None:
    """The job is cancelled before its first turn, after one, after two … until it gets through."""
    client = http.Client(max_per_host=1, proxy="")
    ended = []

    def pieces() -> Any:
        for _ in range(3):
            yield b"x" * 100_000
            yield sleep(0)

    def job() -> Any:
        if how == "whole":
            yield client.get(f"{site.url}/to?url=/bytes?count=3000000")
        elif how == "upload":
            yield client.post(f"{site.url}/echo", body=pieces())
        elif how == "stream":
            with (yield client.stream("GET", f"{site.url}/bytes?count=3000000")) as response:
                while (yield response.read()):
                    pass
        else:
            yield io.gather(*(client.get(site.url) for _ in range(3)))
        ended.append(True)

    def look() -> None:
        for used, idle, waiting in pool_counts(kernel):
            assert (used, waiting) == (0, 0)
            assert kernel.locals[Gate].taken == idle

    assert cancel_at_every_wait(kernel, job, look, each=40) > 3
    assert ended

    def afterwards() -> Any:
        assert (yield client.get(f"{site.url}/bytes?count=10")).body == b"x" * 10

    kernel.run(afterwards())


def test_what_a_job_leaves_open_is_closed_with_it(kernel: Kernel, site: Site) -> None:
    context = a_job()

    def job() -> Any:
        enter(context)
        return (yield http.stream("GET", f"{site.url}/bytes?count=1000000"))

    task = kernel.spawn(job())
    response = kernel.run(join(task).__await__())
    assert pool_counts(kernel) == [(1, 0, 0)]
    context.close_all()
    assert pool_counts(kernel) == [(0, 0, 0)]

    def late() -> Any:
        with pytest.raises(http.HTTPConnectionLost, match="is closed"):
            yield response.read_all()

    kernel.run(late())


def test_one_that_is_forgotten_is_closed(kernel: Kernel, site: Site) -> None:
    def job() -> Any:
        yield http.stream("GET", f"{site.url}/bytes?count=1000000")
        yield sleep(0)
        assert pool_counts(kernel) == [(0, 0, 0)]

    kernel.run(job())


def test_more_requests_than_fds(kernel: Kernel, serve: Serve, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 requests at once with room for 40 fds: all get through, and idle connections keep nobody waiting."""
    monkeypatch.setattr("kqueue.io.gate.room", lambda: 40)
    other = Site()
    clients = [http.Client(proxy=""), http.Client(proxy="")]

    def one(number: int) -> Any:
        response = yield clients[number % 2].get([site.url, other.url][number // 2 % 2], timeout=60)
        return response.status

    def job() -> Any:
        assert set((yield io.gather(*(one(number) for number in range(2_000))))) == {200}
        assert kernel.locals[Gate].taken <= 40
        held = []
        while kernel.locals[Gate].taken - sum(idle for _, idle, _ in pool_counts(kernel)) < 40:
            held.append((yield io.connect("127.0.0.1", site.server_port)))
        with pytest.raises(http.HTTPTimeout, match="no file descriptor was free in time"):
            yield http.get(site.url, timeout=0.05)
        for stream in held:
            stream.close()

    try:
        kernel.run(job())
    finally:
        other.stop()


def test_requests_share_the_fds_with_others(kernel: Kernel, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that go from one request right to the next keep nobody waiting at the gate who wants something else."""
    monkeypatch.setattr("kqueue.io.gate.room", lambda: 5)
    ended: list[str] = []

    def asks(number: int) -> Any:
        yield http.get(site.url)
        ended.append("request")

    def connects() -> Any:
        with (yield io.connect("127.0.0.1", site.server_port)):
            ended.append("stream")

    def job() -> Any:
        yield io.gather(*(asks(number) for number in range(300)), connects())

    kernel.run(job())
    assert len(ended) == 301
    assert ended.index("stream") < 100
    assert site.connections < 100, "most were used again all the same"


def test_what_a_request_waits_for_without_fds_is_told(kernel: Kernel, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kqueue.io.gate.room", lambda: 1)

    def job() -> Any:
        with (yield io.connect("127.0.0.1", site.server_port)):
            late = [http.get(site.url, timeout=Timeouts(pool=0.02 * n, connect=0.005)) for n in (1, 2, 3)]
            for answer in (yield io.gather(*(_error_of(each) for each in late))):
                assert answer.phase == "pool"
                assert "file descriptor" in str(answer)
        assert (yield http.get(site.url)).status == 200

    kernel.run(job())


def _error_of(request: Any) -> Any:
    try:
        yield request
    except http.HTTPTimeout as error:
        return error


# -- TLS ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(authority: Authority) -> Iterator[Callable[..., Site]]:
    sites = []

    def start(name: str, *args: Any) -> Site:
        sites.append(Site(authority.server(name, *args)))
        return sites[-1]

    yield start
    for each in sites:
        each.stop()


def test_over_tls(kernel: Kernel, secure: Any, authority: Authority) -> None:
    site = secure("http")

    def job() -> Any:
        client = http.Client(verify=authority.ca, proxy="")
        for _ in range(3):
            assert (yield client.post(site.url, json=[1])).json()["body"] == "[1]"
        assert len((yield client.get(f"{site.url}/bytes?count=1000000")).body) == 1_000_000
        assert site.connections == 1
        by_context = http.Client(verify=authority.trusting, proxy="")
        assert (yield by_context.get(site.url.replace("127.0.0.1", "localhost"))).status == 200
        careless = http.Client(verify=False, proxy="")
        assert (yield careless.get(site.url)).status == 200
        plain = Site()
        try:
            with pytest.raises(http.RedirectRefused, match="from https to http://"):
                yield client.get(f"{site.url}/to", params={"url": plain.url})
            response = yield client.get(f"{site.url}/to", params={"url": plain.url}, allow_downgrade=True)
            assert response.url.startswith("http://")
        finally:
            plain.stop()

    kernel.run(job())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("self",), "does not verify"), (("expired", "localhost", -1), "expired"), (("other", "example.org"), "127.0.0.1"),
    ],
)  # fmt: skip
def test_a_bad_certificate(kernel: Kernel, secure: Any, authority: Authority, args: Any, words: str) -> None:
    site = secure(*args)
    client = http.Client(verify=True if args == ("self",) else authority.ca, proxy="")

    def job() -> Any:
        with pytest.raises(http.HTTPConnectFailed, match=words) as error:
            yield client.get(site.url)
        assert isinstance(error.value.reason, io.CertificateRefused)
        assert not error.value.retryable

    kernel.run(job())
    assert site.asked == []


def test_no_tls_and_slow_tls(kernel: Kernel, site: Site, serve: Serve) -> None:
    def job() -> Any:
        with pytest.raises(http.HTTPConnectFailed, match="no TLS with") as error:
            yield http.get(site.url.replace("http:", "https:"))
        assert isinstance(error.value.reason, io.TLSFailed)
        with pytest.raises(http.HTTPTimeout, match="TLS handshake") as late:
            yield http.get(url(silent).replace("http:", "https:"), timeout=Timeouts(tls=0.05))
        assert late.value.phase == "tls"

    silent = serve(until_gone)
    kernel.run(job())


def test_a_cut_of_tls_is_not_the_end(kernel: Kernel, serve: Serve, authority: Authority) -> None:
    context = authority.server("cut")

    def cut(sock: socket.socket) -> None:
        raw = sock.dup()
        try:
            peer_of(raw)
        finally:
            raw.close()

    def peer_of(raw: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)

        def flush() -> None:
            data = outgoing.read()
            if data:
                raw.sendall(data)

        def pump(step: Callable[[], Any]) -> Any:
            while True:
                try:
                    value = step()
                except ssl.SSLWantReadError:
                    flush()
                    incoming.write(raw.recv(65536))
                else:
                    flush()
                    return value

        pump(tls.do_handshake)
        while not pump(lambda: tls.read(65536)).endswith(b"\r\n\r\n"):
            pass
        pump(lambda: tls.write(b"HTTP/1.0 200 OK\r\n\r\nhalf of it"))

    server = serve(cut)
    client = http.Client(verify=authority.ca, proxy="")

    def job() -> Any:
        with pytest.raises(http.HTTPConnectionLost, match="close_notify"):
            yield client.get(f"https://127.0.0.1:{server.port}/")

    kernel.run(job())


@pytest.mark.parametrize("headers", [{}, {"Upgrade": "websocket", "Connection": "Upgrade"}])
def test_a_server_that_goes_on_in_another_protocol(kernel: Kernel, serve: Serve, headers: dict[str, str]) -> None:
    server = serve(says(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"))

    def job() -> Any:
        with pytest.raises(http.HTTPProtocolError, match=r"another protocol \(101\).*HTTP/1.1 only.*io.connect") as error:
            yield http.get(url(server), headers=headers)
        assert not error.value.retryable
        assert "right port" not in str(error.value)

    kernel.run(job())


# -- responses that begin before the request has ended ------------------------------------------------------------------------


def echoes(sock: socket.socket) -> None:
    """Sends back what it reads, and reads no more before that is taken; once more, if it is asked to."""
    while head := read_head(sock):
        head, _, body = head.partition(b"\r\n\r\n")
        left = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % left)
        while True:
            sock.sendall(body)
            left -= len(body)
            if not left:
                break
            body = sock.recv(65536)


@pytest.mark.parametrize("is_secure", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_body_is_read_while_another_one_is_sent(
    kernel: Kernel, serve: Serve, authority: Authority, is_secure: bool, is_whole: bool
) -> None:
    context = authority.server("echo")

    def over_tls(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secured:
            echoes(secured)

    server = serve(over_tls if is_secure else echoes)
    pieces = [bytes([number]) * 300_000 for number in range(100)]  # far more than the sockets hold

    def job() -> Any:
        client = http.Client(verify=authority.ca, timeout=Timeouts(write=20, read=20, head=20))
        for _ in range(2):
            asked: Any = {"data": b"".join(pieces)} if is_whole else {
                "body": iter(pieces), "headers": {"Content-Length": str(sum(map(len, pieces)))}
            }  # fmt: skip
            with (yield client.stream("PUT", url(server).replace("http:", "https:" if is_secure else "http:"), **asked)) as got:
                came = yield got.read_all(1 << 30)
            assert came == b"".join(pieces)

    kernel.run(job())
    assert server.accepted == 1, "nothing was left over, so it could be used again"


@pytest.mark.parametrize(("status", "is_kept"), [(200, True), (413, False)])
def test_an_answer_before_the_body_is_taken(kernel: Kernel, serve: Serve, status: int, is_kept: bool) -> None:
    """It is seen at once, though the server reads no more. What it has not refused is sent all the same."""
    seen, all_taken, size = threading.Event(), threading.Event(), 20_000_000

    def answers(sock: socket.socket) -> None:
        body = read_head(sock).partition(b"\r\n\r\n")[2]
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 %d Seen\r\nContent-Length: 3\r\n\r\nyes" % status)
        assert seen.wait(20)
        count = len(body)
        while count < size and (data := sock.recv(1 << 20)):
            count += len(data)
        if count == size:
            all_taken.set()
        until_gone(sock)

    server = serve(answers)

    def job() -> Any:
        with (yield http.stream("PUT", url(server), data=b"x" * size, timeout=20)) as response:
            assert response.status == status
            seen.set()
            assert (yield response.read_all()) == b"yes"

    kernel.run(job())
    assert [counts[1] for counts in pool_counts(kernel)] == [int(is_kept)]
    assert all_taken.wait(20 * is_kept) is is_kept


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_connection_that_is_reset_while_a_body_is_sent(kernel: Kernel, serve: Serve, is_whole: bool) -> None:
    """A kept one is replaced, since it was dying; a POST says what happened."""
    data = b"x" * 20_000_000  # more than the sockets hold

    def peer(sock: socket.socket) -> None:
        head, _, body = read_head(sock).partition(b"\r\n\r\n")
        if head.startswith(b"GET"):
            sock.sendall(OK)
            read_head(sock)
            return resets(sock)
        count = len(body)
        while count < len(data) and (more := sock.recv(1 << 20)):
            count += len(more)
        sock.sendall(OK)
        until_gone(sock)

    server = serve(peer)
    asked: Any = {"data": data} if is_whole else {"body": [data], "headers": {"Content-Length": str(len(data))}}

    def job() -> Any:
        for _ in range(5):
            client = http.Client(timeout=20)
            yield client.get(url(server))
            assert (yield client.put(url(server), **asked)).body == b"ok"
            client = http.Client(timeout=20)
            yield client.get(url(server))
            with pytest.raises(http.HTTPConnectionLost, match=r"127.0.0.1:\d+ (broke the connection|takes no more)") as error:
                yield client.post(url(server), **asked)
            assert not error.value.retryable

    kernel.run(job())


def test_an_answer_is_seen_while_the_body_waits_for_its_next_piece(kernel: Kernel, serve: Serve) -> None:
    closed = []

    def refuses(sock: socket.socket) -> None:
        body = read_head(sock).partition(b"\r\n\r\n")[2]
        while not body:
            body = sock.recv(65536)
        sock.sendall(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
        until_gone(sock)

    class Endless:
        def __iter__(self) -> Iterator[Any]:
            try:
                while True:
                    yield b"x"
                    yield sleep(0.001)
            finally:
                closed.append(True)

    def job() -> Any:
        assert (yield http.put(url(server), body=Endless(), timeout=20)).status == 401

    server = serve(refuses)
    kernel.run(job())
    assert closed == [True], "nobody asks it for more"
