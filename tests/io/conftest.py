"""What the tests of kqueue.io share: a kernel with an eye on fds, peers with bad manners, and the places where a job may run."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from kqueue.context import JobContext, enter
from kqueue.errors import JobCancelled
from kqueue.io.gate import Gate
from kqueue.kernel import Kernel, Task
from tests.test_inline import Services

Peer = Callable[[socket.socket], None]


def open_fds() -> set[str]:
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """On the real clock. At its end no fd and no place of the gate may be left."""
    before = open_fds()
    kernel = Kernel()
    kernel.on_crash = _crashed
    yield kernel
    gate = kernel.locals.get(Gate)
    assert gate is None or (gate.taken, gate.waiting) == (0, 0)
    kernel.close()
    assert open_fds() <= before, "what an earlier test had left to the collector may be gone by now"


def _crashed(task: Task) -> None:
    raise AssertionError(f"{task} crashed, and nobody expected it") from task.error


def a_job() -> JobContext:
    return JobContext(id="1", name="the_job", queue="q", attempt=1, deadline=None, inline=True, services=Services())


def cancel_at_every_wait(
    kernel: Kernel, job: Callable[[], Any], look: Callable[[], object] | None = None, each: int = 10_000
) -> int:
    """Cancel `job` before its first turn, after one, after two … until it gets through; the turns that it took.

    After `each` turns, only every 20th is looked at. Each time it is a job that ends, and has no place of the gate left, or what
    `look` asserts instead.
    """
    turns = 0
    while True:
        enter(a_job())
        task = kernel.spawn(job())
        for _ in range(turns):
            if not task.ended:
                kernel.turn()
        if not task.ended:
            kernel.cancel(task, JobCancelled("stop"))
            while not task.ended:
                kernel.turn()
        enter(None)
        if look is not None:
            look()
        else:
            assert kernel.locals.get(Gate) is None or kernel.locals[Gate].taken == 0
        if task.error is None:
            return turns
        assert isinstance(task.error, JobCancelled)
        turns += 1 if turns < each else 20


class Server:
    """Serves each connection in a thread by `peer`, which may do as it likes; the connection is closed when that returns."""

    def __init__(self, peer: Peer, family: int = socket.AF_INET, where: Any = ("127.0.0.1", 0)) -> None:
        self._peer = peer
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind(where)
        self._listener.listen(128)
        self.accepted = 0
        self._news = threading.Condition()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def wait_accepted(self, count: int) -> None:
        """Until so many have connected."""
        with self._news:
            assert self._news.wait_for(lambda: self.accepted >= count, 20), f"{self.accepted} of {count} have connected"

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            with self._news:
                self.accepted += 1
                self._news.notify_all()
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with closing(sock):
            try:
                self._peer(sock)
            except OSError:
                return

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(peer: Peer, *args: Any) -> Server:
        servers.append(Server(peer, *args))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
