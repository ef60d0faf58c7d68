"""TLS: verified unless somebody says otherwise, and what goes wrong has a name, a reason and a next step."""

from __future__ import annotations

import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kqueue import io
from kqueue.errors import UsageError
from kqueue.kernel import Kernel, join, sleep
from tests.io.conftest import Server, cancel_at_every_wait
from tests.servers import Certificates, lack

Serve = Callable[..., Server]


class Authority(Certificates):
    """A CA, and certificates of every kind that it signed."""

    def server(self, name: str, subject: str = "localhost", days: int = 30) -> ssl.SSLContext:
        openssl = shutil.which("openssl") or lack("openssl")
        key, request, certificate, names = (str(self.directory / f"{name}.{kind}") for kind in ("key", "csr", "pem", "names"))
        address = "IP:127.0.0.1," if subject == "localhost" else ""
        Path(names).write_text(f"subjectAltName={address}DNS:{subject}\n")
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        signed = ["-CA", self.ca, "-CAkey", str(self.directory / "ca.key"), "-CAcreateserial", "-extfile", names]
        for args in (
            ["req", *new_key, "-keyout", key, "-out", request, "-subj", f"/CN={subject}"],
            ["x509", "-req", "-in", request, *signed, "-out", certificate, "-days", str(days)],
        ):
            subprocess.run([openssl, *args], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context

    @property
    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    return authority.server("good")


def over_tls(context: ssl.SSLContext, peer: Callable[[ssl.SSLSocket], None]) -> Callable[[socket.socket], None]:
    def serve(sock: socket.socket) -> None:
        with suppress(OSError, ValueError), context.wrap_socket(sock, server_side=True) as secured:
            peer(secured)

    return serve


def echo(sock: ssl.SSLSocket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.unwrap()


def test_much_goes_both_ways_and_ends_in_order(
    kernel: Kernel, serve: Serve, authority: Authority, context: ssl.SSLContext
) -> None:
    data = bytes(range(256)) * 8000

    def writer(stream: io.Stream) -> Any:
        yield stream.write(data)

    def job() -> Any:
        server = serve(over_tls(context, echo))
        with (yield io.connect("127.0.0.1", server.port, tls=authority.trusting)) as stream:
            task = kernel.spawn(writer(stream))
            assert (yield stream.read_exactly(len(data))) == data
            yield join(task)
            yield stream.write(b"last\n")
            assert (yield stream.read_until(b"\n")) == b"last\n"
            yield stream.finish()
            assert (yield stream.read()) == b"", "an orderly end"

    kernel.run(job())


def test_no_tls_within_tls(kernel: Kernel, serve: Serve, authority: Authority, context: ssl.SSLContext) -> None:
    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(over_tls(context, echo)).port, tls=authority.trusting)) as stream:
            with pytest.raises(UsageError, match=r"127.0.0.1.* speaks TLS already"):
                yield stream.start_tls("127.0.0.1", authority.trusting)
            yield stream.write(b"on\n")
            assert (yield stream.read_until(b"\n")) == b"on\n", "nothing has happened to it"

    kernel.run(job())


def test_what_was_decrypted_is_seen_without_the_socket(
    kernel: Kernel, serve: Serve, authority: Authority, context: ssl.SSLContext
) -> None:
    """One record of 16,000 bytes, taken in small pieces: after the first, the socket has nothing any more."""

    def once(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"x" * 16_000)
        sock.recv(1)

    def job() -> Any:
        with (yield io.connect("localhost", serve(over_tls(context, once)).port, tls=authority.trusting)) as stream:
            pieces = []
            for _ in range(16):
                stream._buffer.clear()  # else the stream would have all of it from the first recv()
                pieces.append((yield from stream._receive(1000, 1.0, None)))
            assert b"".join(pieces) == b"x" * 16_000

    kernel.run(job())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subject": "example.org"}, "Hostname mismatch.*connect by a name that stands in the certificate"),
        ({"days": -1}, "expired.*renewed at the server"),
    ],
)
def test_a_certificate_that_is_wrong(
    kernel: Kernel, serve: Serve, authority: Authority, options: Any, words: str
) -> None:
    context = authority.server("wrong", **options)

    def job() -> Any:
        port = serve(over_tls(context, echo)).port
        with pytest.raises(io.CertificateRefused, match=rf"the certificate of localhost:{port} does not verify: .*{words}"):
            yield io.connect("localhost", port, tls=authority.trusting)

    kernel.run(job())


def test_a_ca_that_nobody_trusts(kernel: Kernel, serve: Serve, context: ssl.SSLContext) -> None:
    def job() -> Any:
        with pytest.raises(io.CertificateRefused, match=r"name its CA by tls=ssl.create_default_context\(cafile=FILE\)"):
            yield io.connect("127.0.0.1", serve(over_tls(context, echo)).port, tls=True)

    kernel.run(job())


def test_verification_can_be_turned_off_by_a_context_only(kernel: Kernel, serve: Serve, context: ssl.SSLContext) -> None:
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE

    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(over_tls(context, echo)).port, tls=trusting)) as stream:
            yield stream.write(b"x")
            assert (yield stream.read()) == b"x"
        with pytest.raises(TypeError, match=r"tls= takes True, False or an ssl\.SSLContext, not str"):
            yield io.connect("127.0.0.1", serve(over_tls(context, echo)).port, tls="no")

    kernel.run(job())


def garbage(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)


def hangs_up(sock: socket.socket) -> None:
    sock.recv(10)


def resets(sock: socket.socket) -> None:
    sock.recv(10)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silent(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def drips(sock: socket.socket) -> None:
    """The head of a handshake record, and then a byte of it now and then."""
    sock.sendall(b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xf0")
    for _ in range(100):
        sock.sendall(b"\x00")
        sock.settimeout(0.01)
        with suppress(TimeoutError):
            while sock.recv(65536):
                pass


@pytest.mark.parametrize(
    ("peer", "error", "words"),
    [
        (garbage, io.TLSFailed, "no TLS with .*: what answered does not speak TLS"),
        (hangs_up, io.TLSFailed, "no TLS with .*"),
        (resets, io.TLSFailed, "no TLS with .*: Connection reset by peer"),
        (drips, io.TimedOut, "did not answer the TLS handshake in time"),
        (silent, io.TimedOut, "did not answer the TLS handshake in time"),
    ],
)
def test_a_handshake_that_fails(
    kernel: Kernel, serve: Serve, authority: Authority, peer: Any, error: type[Exception], words: str
) -> None:
    def job() -> Any:
        with pytest.raises(error, match=words):
            yield io.connect("localhost", serve(peer).port, tls=authority.trusting, timeout=0.2)

    kernel.run(job())


def test_a_stream_that_was_cut_is_no_end(
    kernel: Kernel, serve: Serve, authority: Authority, context: ssl.SSLContext
) -> None:
    def cuts(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"half of it")
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TCP alone: without close_notify

    def job() -> Any:
        with (yield io.connect("localhost", serve(over_tls(context, cuts)).port, tls=authority.trusting)) as stream:
            with pytest.raises(io.Truncated, match="without the close_notify") as error:
                yield stream.read_exactly(100)
            assert error.value.partial == b"half of it"

    kernel.run(job())


@pytest.mark.parametrize("is_cut", [False, True])
def test_an_end_is_noticed_without_reading(
    kernel: Kernel, serve: Serve, authority: Authority, context: ssl.SSLContext, is_cut: bool
) -> None:
    def ends(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"late")
        if is_cut:
            sock.shutdown(socket.SHUT_RDWR)
        else:
            sock.unwrap()

    def job() -> Any:
        with (yield io.connect("localhost", serve(over_tls(context, ends)).port, tls=authority.trusting)) as stream:
            yield stream.read_exactly(1)
            while stream.is_alive():
                yield sleep(0.001)
            assert stream.closed == is_cut, "one that was cut is of no use"
            assert stream.buffered == 3, "what came before is still there"

    kernel.run(job())


def test_our_own_listener_speaks_it_too(
    kernel: Kernel, authority: Authority, context: ssl.SSLContext, tmp_path: Path
) -> None:
    def server(listener: io.Listener) -> Any:
        with pytest.raises(io.TLSFailed):
            yield listener.accept()
        with (yield listener.accept()) as stream:
            yield stream.write((yield stream.read_exactly(3)) * 2)
            assert (yield stream.read()) == b""

    def job() -> Any:
        path = str(tmp_path / "s")
        with io.listen(unix=path, tls=context) as listener:
            task = kernel.spawn(server(listener))
            with pytest.raises(UsageError, match="server_name="):
                yield io.connect(unix=path, tls=True)
            with pytest.raises(io.CertificateRefused):
                yield io.connect(unix=path, tls=authority.trusting, server_name="example.org")
            with (yield io.connect(unix=path, tls=authority.trusting, server_name="localhost")) as stream:
                yield stream.write(b"abc")
                assert (yield stream.read_exactly(6)) == b"abcabc"
            yield join(task)

    kernel.run(job())


def test_tls_begins_later(kernel: Kernel, serve: Serve, authority: Authority, context: ssl.SSLContext) -> None:
    def peer(sock: socket.socket) -> None:
        sock.sendall(b"220 go ahead\r\n" if sock.recv(100) == b"STARTTLS\r\n" else b"220 go ahead\r\n250 injected\r\n")
        over_tls(context, echo)(sock)

    def job() -> Any:
        port = serve(peer).port
        with (yield io.connect("localhost", port)) as plain:
            yield plain.write(b"STARTTLS\r\n")
            yield plain.read_until(b"\r\n")
            with (yield plain.start_tls("localhost", authority.trusting)) as stream:
                with pytest.raises(io.Closed):
                    yield plain.read()
                yield stream.write(b"secret\n")
                assert (yield stream.read_until(b"\n")) == b"secret\n"
        with (yield io.connect("localhost", port)) as plain:
            yield plain.write(b"STARTTLS and more\r\n")
            yield plain.read_until(b"\r\n")
            with pytest.raises(io.TLSFailed, match="before TLS was spoken"):
                yield plain.start_tls("localhost", authority.trusting)

    kernel.run(job())


def test_a_cancellation_at_every_wait_leaves_nothing(
    kernel: Kernel, serve: Serve, authority: Authority, context: ssl.SSLContext
) -> None:
    port, trusting = serve(over_tls(context, echo)).port, authority.trusting

    def job() -> Any:
        with (yield io.connect("localhost", port, tls=trusting)) as stream:
            yield stream.write(b"x" * 200_000)
            yield stream.read_exactly(10)

    assert cancel_at_every_wait(kernel, job) > 1, "there are waits to be cancelled at"
