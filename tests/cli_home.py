"""A directory with a kqueue.yaml in which `kqueue` is called, for tests of what it prints and how it ends."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kqueue import KQueueRuntime
from kqueue.brokers import open_broker
from kqueue.brokers.base import Counters, NewJob, Owner, Settlement
from kqueue.cli.main import main
from kqueue.client import Client, from_config
from kqueue.codec import Envelope, encode, to_json
from kqueue.config_file import load_config
from kqueue.ids import new_id
from kqueue.kernel import Kernel
from kqueue.outcome import Outcome
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


def bury(url: str, count: int, queue: str = "default", envelope: bytes | None = None) -> list[str]:
    """Let `count` jobs die as a daemon would, all of one cause; their ids. `envelope`: of each, None: what belongs there."""
    kernel = Kernel()
    broker = open_broker(url, lambda *news: None)
    outcome = Outcome("exception", error={"class": "ValueError", "message": "no luck\x1b"})
    certificate = to_json(outcome.certificate(attempt=1, strategy="inline", ended_at=time.time()))

    def steps() -> Generator[Any, Any, list[str]]:
        yield from broker.open(Owner(new_id(), ""), [queue], 15.0)
        dead: list[str] = []
        for start in range(0, count, 500):
            ids = [new_id() for _ in range(min(500, count - start))]
            jobs = [NewJob(id, queue, "inline", 0, envelope or encode(Envelope(id, "greet", [], {}, queue))) for id in ids]
            yield from broker.enqueue(jobs)
            leases = (yield from broker.reserve(queue, {"inline": len(ids)})).leases
            how: dict[str, Any] = {"counters": Counters(1), "certificate": certificate}
            yield from broker.settle([Settlement(lease.token, queue, "bury", **how) for lease in leases])
            dead += [lease.token.id for lease in leases]
        yield from broker.close()
        return dead

    dead: list[str] = kernel.run(steps())
    kernel.close()
    return dead


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

    def bury(self, count: int, queue: str = "default") -> list[str]:
        """`bury` on the broker of this home."""
        return bury(self.url, count, queue)

    def corrupt(self, id: str, garbage: bytes) -> None:
        if self.url.startswith("sqlite"):
            with contextlib.closing(sqlite3.connect(self.url.removeprefix("sqlite:///"), isolation_level=None)) as db:
                db.execute("UPDATE kq_job SET envelope = ? WHERE id = ?", (garbage, id))
        else:
            import redis

            with redis.Redis.from_url(self.url) as server:
                key = f"kq:{{default}}:job:{id}"
                server.set(key, server.get(key).partition(b"\n")[0] + b"\n" + garbage)

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
