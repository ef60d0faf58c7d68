"""Rigs: each broker with what the conformance suite needs around it. A new broker is one more class in RIGS."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kqueue.brokers.base import Broker, NewJob, Owner, Store
from kqueue.brokers.commands.host_clock import HostClock
from kqueue.brokers.commands.memory import MemoryStore
from kqueue.brokers.memory import MemoryBroker
from kqueue.brokers.redis import RedisBroker
from kqueue.brokers.sqlite import SQLiteBroker
from kqueue.client.memory import MemoryClient
from kqueue.client.redis import RedisClient
from kqueue.client.sqlite import SQLiteClient
from kqueue.ids import new_id
from kqueue.kernel import Kernel, sleep

from ..servers import Cluster, Proxy, RedisServer


class Rig:
    """One empty store, brokers on it, a blocking client on it, and a way to let time pass."""

    name: str

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.opened: list[Broker] = []

    def make_broker(self) -> Broker:
        raise NotImplementedError

    def make_client(self) -> Store:
        raise NotImplementedError

    def do(self, verb: Any) -> Any:
        """Drive one verb to its end on the rig's kernel."""
        return self.kernel.run(verb)

    def broker(
        self, *, identity: str = "", lease_s: float = 15.0, epoch: str | None = None, queues: tuple[str, ...] = ("q",),
        **how: Any,
    ) -> Any:
        """A broker, opened as a new epoch. `broker.recovered` and `broker.answers` are what `open` returned."""
        broker: Any = self.make_broker()
        owner = Owner(epoch or new_id(), identity)
        broker.recovered, broker.answers = self.do(broker.open(owner, list(queues), lease_s, **how))
        self.opened.append(broker)
        return broker

    def elapse(self, seconds: float) -> None:
        """Let the broker's time pass."""

        def pause() -> Iterator[Any]:
            yield sleep(seconds)

        self.kernel.run(pause())  # type: ignore[arg-type]

    def jump(self, seconds: float) -> None:
        """Set the wall clock, and no other, forward."""
        pytest.skip("it has one clock, and no other process may set it")

    def corrupt(self, id: str, garbage: bytes) -> None:
        """Overwrite the envelope of a job behind the broker's back."""
        raise NotImplementedError

    def close(self) -> None:
        for broker in self.opened:
            self.do(broker.close())
        self.kernel.close()


class MemoryRig(Rig):
    name = "memory"

    def __init__(self, tmp_path: Any, request: pytest.FixtureRequest) -> None:
        super().__init__()
        self.now = 1_790_000_000.0
        self.ticks = 5_000.0
        self.store = MemoryStore(clock=lambda: self.now, ticks=lambda: self.ticks)

    def make_broker(self) -> Broker:
        return MemoryBroker(self.store)

    def make_client(self) -> Store:
        return MemoryClient(self.store)

    def elapse(self, seconds: float) -> None:
        self.now += seconds
        self.ticks += seconds

    def jump(self, seconds: float) -> None:
        self.now += seconds

    def corrupt(self, id: str, garbage: bytes) -> None:
        self.store._jobs[id].envelope = garbage


class RigClock(HostClock):
    """That of a host which `rig` moves."""

    def __init__(self, rig: SQLiteRig) -> None:
        self._rig = rig
        self.boot = "this-boot"

    def wall(self) -> float:
        return self._rig.now

    def ticks(self) -> float:
        return self._rig.ticks


class SQLiteRig(Rig):
    name = "sqlite"

    def __init__(self, tmp_path: Any, request: pytest.FixtureRequest) -> None:
        super().__init__()
        self.now = 1_790_000_000.0
        self.ticks = 5_000.0
        self.clock = RigClock(self)
        self.path = str(tmp_path / "kqueue.db")
        self.clients: list[SQLiteClient] = []

    def make_broker(self) -> Broker:
        return SQLiteBroker(self.path, clock=self.clock)

    def make_client(self) -> Store:
        self.clients.append(SQLiteClient(self.path, clock=self.clock))
        return self.clients[-1]

    def elapse(self, seconds: float) -> None:
        self.now += seconds
        self.ticks += seconds

    def jump(self, seconds: float) -> None:
        self.now += seconds

    def corrupt(self, id: str, garbage: bytes) -> None:
        self.sql("UPDATE kq_job SET envelope = ? WHERE id = ?", garbage, id)

    def sql(self, statement: str, *values: Any) -> list[Any]:
        """Run one statement as somebody with a shell would."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            return db.execute(statement, values).fetchall()

    def close(self) -> None:
        super().close()
        for client in self.clients:
            client.close()


class RedisRig(Rig):
    name = "redis"

    def __init__(self, tmp_path: Any, request: pytest.FixtureRequest) -> None:
        super().__init__()
        self.server: RedisServer = request.getfixturevalue("redis_server")
        self.server.command("FLUSHALL")
        self.url = self.server.url
        self.news: list[tuple[str, str, float]] = []  # what brokers reported
        self.clients: list[RedisClient] = []

    def make_broker(self) -> Broker:
        return RedisBroker(self.url, on_event=lambda *news: self.news.append(news))

    def broker(self, *, fresh: bool = False, **how: Any) -> Any:
        """As of any Rig. Unless `fresh`, it has been connected for so long that its sweeps may expire others."""
        broker = super().broker(**how)
        if not fresh:
            for transport in broker._nodes._transports.values():
                transport.ready_at = -1e9
        return broker

    def make_client(self) -> Store:
        self.clients.append(RedisClient(self.url))
        return self.clients[-1]

    def owner(self) -> Owner:
        return Owner(new_id(), "")

    def until(self, condition: Callable[[], object]) -> None:
        """Let everybody go on until `condition` holds; fail when it does not within 20 s."""
        deadline = time.monotonic() + 20

        def look() -> Iterator[Any]:
            while not condition():
                assert time.monotonic() < deadline, "it never came"
                yield sleep(0.002)

        self.kernel.run(look())  # type: ignore[arg-type]

    def corrupt(self, id: str, garbage: bytes) -> None:
        self._corrupt(self.server, id, garbage)

    def _corrupt(self, server: Any, id: str, garbage: bytes) -> None:
        head = server.command("GET", f"kq:{{q}}:job:{id}").partition(b"\n")[0]
        server.command("SET", f"kq:{{q}}:job:{id}", head + b"\n" + garbage)

    def close(self) -> None:
        super().close()
        for client in self.clients:
            client.close()


class ClusterRig(RedisRig):
    name = "redis-cluster"

    def __init__(self, tmp_path: Any, request: pytest.FixtureRequest) -> None:
        Rig.__init__(self)
        self.cluster: Cluster = request.getfixturevalue("redis_cluster")
        for node in self.cluster.nodes:
            node.command("FLUSHALL")
        self.url = self.cluster.url
        self.news = []
        self.clients = []

    def corrupt(self, id: str, garbage: bytes) -> None:
        self._corrupt(self.cluster.home("kq:{q}:"), id, garbage)


RIGS = [MemoryRig, SQLiteRig, RedisRig, ClusterRig]


def only(*rigs: type[Rig]) -> Any:
    """A fixture `rig` of these: for one of them alone, a module says `rig = only(RedisRig)`."""

    def rig(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Any]:
        made = getattr(request, "param", rigs[0])(tmp_path, request)
        yield made
        made.close()

    several = {"params": rigs, "ids": lambda rig: rig.name} if len(rigs) > 1 else {}
    return pytest.fixture(**several)(rig)  # type: ignore[call-overload]


rig = only(*RIGS)


@pytest.fixture
def told_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis brokers tell of the same trouble at each try, so that a test can wait for some of them."""
    monkeypatch.setattr("kqueue.brokers.redis_transport.REPORT_AGAIN_S", 0.0)


@pytest.fixture
def proxy(rig: RedisRig) -> Iterator[Proxy]:
    """A proxy that the rig's brokers and clients go through."""
    proxy = Proxy(rig.server.port)
    rig.url = proxy.url
    yield proxy
    for broker in rig.opened:
        rig.do(broker.close())
    rig.opened.clear()
    proxy.stop()


def new_job(id: str | None = None, **fields: Any) -> NewJob:
    """A job to enqueue, with defaults for what a test does not care about."""
    id = id or new_id()
    defaults: dict[str, Any] = {"queue": "q", "lane": "inline", "priority": 0, "envelope": b'{"id":"%s"}' % id.encode()}
    return NewJob(id=id, **{**defaults, **fields})
