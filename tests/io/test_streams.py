"""Streams: what comes goes on as it came, and whatever the other side or the clock does, nothing is left open or undecided."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kqueue import io
from kqueue.errors import JobCancelled, UsageError
from kqueue.io import IncompleteRead
from kqueue.kernel import Kernel, join, sleep
from tests.io.conftest import Server, cancel_at_every_wait

Serve = Callable[..., Server]


def echo(sock: socket.socket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)


def sends(*pieces: bytes) -> Callable[[socket.socket], None]:
    def peer(sock: socket.socket) -> None:
        for piece in pieces:
            sock.sendall(piece)

    return peer


def silent(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def resets(after: bytes) -> Callable[[socket.socket], None]:
    def peer(sock: socket.socket) -> None:
        sock.sendall(after)
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return peer


def never_reads(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.recv(1)
    sock.recv(1 << 20, socket.MSG_PEEK | socket.MSG_WAITALL)


# -- the ordinary case ----------------------------------------------------------------------------------------------------


def test_the_three_ways_to_wait_are_the_same(kernel: Kernel, serve: Serve) -> None:
    port = serve(echo).port

    def by_yield() -> Any:
        stream = yield io.connect("127.0.0.1", port)
        with stream:
            yield stream.write(b"one\ntwo\nthree")
            first = yield stream.read_until(b"\n")
            return [first, (yield stream.read_exactly(4)), (yield stream.read(2)), (yield stream.read())]

    def by_yield_from() -> Any:
        with (yield from io.connect("127.0.0.1", port)) as stream:
            yield from stream.write(b"one\ntwo\nthree")
            first = yield from stream.read_until(b"\n")
            return [first, (yield from stream.read_exactly(4)), (yield from stream.read(2)), (yield from stream.read())]

    async def by_await() -> Any:
        async with await io.connect("127.0.0.1", port) as stream:
            await stream.write(b"one\ntwo\nthree")
            first = await stream.read_until(b"\n")
            return [first, await stream.read_exactly(4), await stream.read(2), await stream.read()]

    expected = [b"one\n", b"two\n", b"th", b"ree"]
    assert kernel.run(by_yield()) == kernel.run(by_yield_from()) == kernel.run(by_await()) == expected


def test_an_operation_is_waited_for_once(kernel: Kernel) -> None:
    def job() -> Any:
        with io.listen("127.0.0.1") as listener:
            accepting = listener.accept(timeout=0)
            with pytest.raises(io.TimedOut):
                yield accepting
            with pytest.raises(RuntimeError, match="waited for once"):
                yield accepting

    kernel.run(job())


def test_one_that_nobody_waits_for_says_so(kernel: Kernel) -> None:
    def job() -> Any:
        yield
        with io.listen("127.0.0.1") as listener, pytest.warns(RuntimeWarning, match=r"Listener.accept\(\) did nothing: write"):
            listener.accept()

    kernel.run(job())


def test_a_unix_socket_and_our_own_listener(kernel: Kernel, tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    def server(listener: io.Listener) -> Any:
        with (yield listener.accept()) as stream:
            yield stream.write((yield stream.read_until(b"\n")).upper())
            assert (yield stream.read()) == b"", "the client has finished"
            yield stream.write(b"bye")

    def job() -> Any:
        with io.listen(unix=path) as listener:
            task = kernel.spawn(server(listener))
            with (yield io.connect(unix=path)) as stream:
                yield stream.write(b"hello\n")
                assert (yield stream.read_until(b"\n")) == b"HELLO\n"
                yield stream.finish()
                assert (yield stream.read_exactly(3)) == b"bye"
                assert (yield stream.read()) == b""
                assert (yield stream.read()) == b""
            yield join(task)

    kernel.run(job())
    assert not Path(path).exists()


def test_much_goes_both_ways_at_once(kernel: Kernel, serve: Serve) -> None:
    data = bytes(range(256)) * 40_000  # 10 MB, far more than sockets hold

    def writer(stream: io.Stream) -> Any:
        yield stream.write(memoryview(data))
        yield stream.finish()

    def job() -> Any:
        with (yield io.connect("localhost", serve(echo).port)) as stream:
            task = kernel.spawn(writer(stream))
            got = bytearray()
            while piece := (yield stream.read(100_000)):
                got += piece
                assert stream.buffered <= 65536
            yield join(task)
            return bytes(got)

    assert kernel.run(job()) == data


# -- peers that do not behave ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "read", "expected"),
    [
        ([b"abc"], lambda s: s.read_until(b"\n"), b"abc"),
        ([b"abc"], lambda s: s.read_exactly(4), b"abc"),
        ([], lambda s: s.read_exactly(1), b""),
    ],
)
def test_an_end_too_early(kernel: Kernel, serve: Serve, pieces: Any, read: Any, expected: bytes) -> None:
    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(sends(*pieces)).port)) as stream:
            with pytest.raises(IncompleteRead, match=r"127.0.0.1:\d+ ended the stream") as error:
                yield read(stream)
            assert error.value.partial == expected
            assert (yield stream.read()) == expected, "nothing is lost"

    kernel.run(job())


def test_a_line_that_does_not_end_is_bounded(kernel: Kernel, serve: Serve) -> None:
    def flood(sock: socket.socket) -> None:
        while True:
            sock.sendall(b"x" * 65536)

    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(flood).port)) as stream:
            with pytest.raises(io.StreamLimit, match="100000 bytes"):
                yield stream.read_until(b"\n", limit=100_000)
            assert 100_000 <= stream.buffered <= 100_000 + 65536
            assert (yield stream.read(5)) == b"xxxxx"

    kernel.run(job())


def test_a_peer_that_sends_without_end_keeps_nobody_else_waiting(kernel: Kernel, serve: Serve) -> None:
    ticks = []

    def flood(sock: socket.socket) -> None:
        while True:
            sock.sendall(b"x" * 1_000_000)

    def ticker() -> Any:
        while True:
            ticks.append(len(ticks))
            yield sleep(0)

    def job() -> Any:
        task = kernel.spawn(ticker())
        with (yield io.connect("127.0.0.1", serve(flood).port)) as stream:
            for reads in range(1, 1001):
                assert len((yield stream.read())) <= 65536
                assert len(ticks) >= reads, "others have a turn between two reads"
        kernel.cancel(task, JobCancelled("enough"))
        yield sleep(0)

    kernel.run(job())


@pytest.mark.parametrize(("line", "fits"), [(b"x" * 9 + b"\r\n", True), (b"x" * 10 + b"\r\n", False)])
def test_the_limit_counts_the_separator(kernel: Kernel, serve: Serve, line: bytes, fits: bool) -> None:
    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(sends(line[:-1], line[-1:])).port)) as stream:
            if fits:
                assert (yield stream.read_until(b"\r\n", limit=11)) == line
            else:
                with pytest.raises(io.StreamLimit):
                    yield stream.read_until(b"\r\n", limit=11)

    kernel.run(job())


def test_a_reset_in_the_middle(kernel: Kernel, serve: Serve) -> None:
    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(resets(b"half a b")).port)) as stream:
            assert (yield stream.read_exactly(8)) == b"half a b"
            yield stream.write(b"!")
            with pytest.raises(io.ConnectionLost, match="reset by peer"):
                yield stream.read()
            with pytest.raises(io.Closed):
                yield stream.read()

    kernel.run(job())


def test_a_peer_that_never_answers(kernel: Kernel, serve: Serve) -> None:
    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(silent).port)) as stream:
            for read in (stream.read, lambda **how: stream.read_until(b"\n", **how), lambda **how: stream.read_exactly(2, **how)):
                with pytest.raises(io.TimedOut, match=r"did not send .* in 0.01 s") as error:
                    yield read(timeout=0.01)
                assert isinstance(error.value, TimeoutError)
                assert isinstance(error.value, OSError)
            yield stream.write(b"and it can still be used")

    kernel.run(job())


def test_a_peer_that_never_reads(kernel: Kernel, serve: Serve) -> None:
    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(never_reads).port)) as stream:
            with pytest.raises(io.TimedOut, match=r"took \d+ of 50000000 bytes in 0.05 s"):
                yield stream.write(b"x" * 50_000_000, timeout=0.05)
            assert stream.closed, "nobody knows where it stands"

    kernel.run(job())


def test_who_refuses_more_can_still_say_why(kernel: Kernel, serve: Serve) -> None:
    def refuses(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.shutdown(socket.SHUT_RD)
        sock.sendall(b"413 too large")
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass

    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(refuses).port)) as stream:
            yield stream.write(b"x" * 1000)
            assert (yield stream.read_exactly(13)) == b"413 too large"

    kernel.run(job())


def test_nobody_is_there(kernel: Kernel, tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]

        def job() -> Any:
            with pytest.raises(io.ConnectFailed, match=rf"cannot connect to 127.0.0.1:{port}: Connection refused"):
                yield io.connect("127.0.0.1", port)
            with pytest.raises(io.ConnectFailed, match="No such file"):
                yield io.connect(unix=str(tmp_path / "none"))
            with pytest.raises(io.ConnectFailed):
                yield io.connect(unix="x" * 200)
            for wrong in ({}, {"host": "h"}, {"host": "h", "port": 70000}, {"host": "h", "port": 1, "unix": "/x"}):
                with pytest.raises(UsageError):
                    yield io.connect(**wrong)

        kernel.run(job())


# -- being interrupted ----------------------------------------------------------------------------------------------------


def test_a_cancellation_at_every_wait_leaves_nothing(kernel: Kernel, serve: Serve) -> None:
    port = serve(echo).port

    def job() -> Any:
        with (yield io.connect("127.0.0.1", port)) as stream:
            yield stream.write(b"x" * 3_000_000)
            yield stream.read_exactly(10)
            yield stream.finish()

    assert cancel_at_every_wait(kernel, job) > 1, "there are waits to be cancelled at"


def test_closing_wakes_who_waits(kernel: Kernel, serve: Serve) -> None:
    def reader(stream: io.Stream) -> Any:
        with pytest.raises(io.Closed):
            yield stream.read()

    def job() -> Any:
        stream = yield io.connect("127.0.0.1", serve(silent).port)
        task = kernel.spawn(reader(stream))
        yield sleep(0)
        stream.close()
        with (yield io.connect("127.0.0.1", serve(echo).port)) as other:  # most likely of the same number
            yield other.write(b"x")
            assert (yield other.read()) == b"x"
        yield join(task)

    kernel.run(job())


def test_a_read_that_was_interrupted_lost_nothing(kernel: Kernel, serve: Serve) -> None:
    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(echo).port)) as stream:
            yield stream.write(b"begi")
            with pytest.raises(io.TimedOut):
                yield stream.read_until(b"\n", timeout=0.05)
            yield stream.write(b"nning\n")
            assert (yield stream.read_until(b"\n")) == b"beginning\n"

    kernel.run(job())


def test_a_stream_that_nobody_holds_is_closed(kernel: Kernel, serve: Serve) -> None:
    port = serve(silent).port

    def job() -> Any:
        yield io.connect("127.0.0.1", port)

    kernel.run(job())


def test_a_dead_peer_is_noticed_without_reading(kernel: Kernel, serve: Serve) -> None:
    def job() -> Any:
        with (yield io.connect("127.0.0.1", serve(sends(b"late")).port)) as stream:
            yield stream.read_exactly(1)
            while stream.is_alive():
                yield sleep(0.001)
            assert (yield stream.read()) == b"ate"

    kernel.run(job())
