"""A directory with a kqueue.yaml in which `kqueue` is called, for tests of what it prints and how it ends."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kqueue import KQueueRuntime
from kqueue.cli.main import main
from kqueue.client import Client, from_config
from kqueue.config_file import load_config
from tests.servers import RedisServer

COMMAND = (sys.executable, "-m", "kqueue.cli.main")
PATIENCE_S = 30.0


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self
        return json.loads(self.out)


class Home:
    """A directory with a kqueue.yaml, the current one."""

    def __init__(self, directory: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.url = url
        self._capsys = capsys
        (directory / "kqueue.yaml").write_text(f"queue: {{url: '{url}', names: {{default: 1, mail: 2}}}}\n")
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        self._client = self._client or from_config(load_config("kqueue.yaml"))
        return self._client

    def kqueue(self, *arguments: str) -> Ended:
        """Run a command in this process."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(list(arguments))
        code = exit.value.code
        assert isinstance(code, int)
        return Ended(code, *self._capsys.readouterr())

    def dispatch(self, *arguments: str) -> str:
        id: str = self.kqueue("dispatch", *arguments, "--json").json["id"]
        return id

    def run_all(self) -> None:
        """What a daemon would do until nothing is ready."""
        assert KQueueRuntime(self.url, queues=["default", "mail"]).run(burst=True, handle_signals=False) == 0

    def corrupt(self, id: str, garbage: bytes) -> None:
        if self.url.startswith("sqlite"):
            with contextlib.closing(sqlite3.connect(self.url.removeprefix("sqlite:///"), isolation_level=None)) as db:
                db.execute("UPDATE kq_job SET envelope = ? WHERE id = ?", (garbage, id))
        else:
            import redis

            with redis.Redis.from_url(self.url) as server:
                server.hset(f"kq:{{default}}:job:{id}", "envelope", garbage)

    def close(self) -> None:
        if self._client is not None:
            self._client.store.close()


MakeHome = Callable[[str], Home]


@pytest.fixture
def make_home(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeHome]:
    monkeypatch.chdir(tmp_path)
    for name in ("KQUEUE_URL", "KQUEUE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    homes: list[Home] = []

    def make(url: str) -> Home:
        homes.append(Home(tmp_path, url, capsys))
        return homes[-1]

    yield make
    for home in homes:
        home.close()


@pytest.fixture(params=["sqlite", "redis"])
def home(request: pytest.FixtureRequest, make_home: MakeHome, tmp_path: Path) -> Home:
    if request.param == "sqlite":
        return make_home(f"sqlite:///{tmp_path}/var/q.db")
    server: RedisServer = request.getfixturevalue("redis_server")
    server.command("FLUSHALL")
    return make_home(server.url)


@pytest.fixture
def sqlite_home(make_home: MakeHome, tmp_path: Path) -> Home:
    return make_home(f"sqlite:///{tmp_path}/var/q.db")
