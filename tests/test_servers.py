"""The servers of the tests come up beside others that took their ports, or the suite fails by chance."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from .servers import PORTS, PostgresServer, RedisServer, free_port


def test_no_port_is_given_twice_while_there_are_others() -> None:
    given = [free_port() for _ in range(200)]
    assert len(set(given)) == 200
    assert set(given) <= set(PORTS)


@pytest.mark.parametrize("make", [RedisServer, lambda _: PostgresServer()], ids=["redis", "postgres"])
def test_a_server_whose_port_was_taken_meanwhile_has_another(
    tmp_path: Path, make: Callable[[Path], RedisServer | PostgresServer]
) -> None:
    server = make(tmp_path)
    planned = server.port
    try:
        with socket.create_server(("127.0.0.1", planned)):
            server.start()
            assert server.port != planned
            socket.create_connection(("127.0.0.1", server.port)).close()
    finally:
        server.stop()


def test_a_server_that_was_there_before_waits_for_its_own(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    port = server.port
    server.kill()
    thief = socket.create_server(("127.0.0.1", port))
    gives_back = threading.Timer(0.2, thief.close)
    gives_back.start()
    try:
        assert server.start().port == port
    finally:
        gives_back.join()
        server.stop()
