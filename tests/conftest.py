"""What all tests share: real servers, and their versions at the head of the report."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest

from tests.cli_home import home as home
from tests.cli_home import make_home as make_home
from tests.cli_home import sqlite_home as sqlite_home
from tests.servers import Cluster, RedisServer, postgres_version, redis_version


def pytest_report_header() -> list[str]:
    return [redis_version(), postgres_version(), f"sqlite: {sqlite3.sqlite_version}"]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the session; a test that needs it empty or broken empties it, or starts its own."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes for the session; a test that moves slots moves them back, and one that kills nodes starts its own."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()
