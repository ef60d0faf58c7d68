"""queue.sync_replicas: what was promised stands on so many replicas, or it was not promised. Real ones, stopped and promoted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kqueue.brokers import redis_replicas
from kqueue.brokers.base import SETTLED, Lease, Settlement
from kqueue.brokers.commands import redis_asking
from kqueue.client.redis import RedisClient
from kqueue.errors import BrokerRefused, BrokerUnavailable

from ..servers import Cluster, Proxy, RedisServer
from .conftest import RedisRig, new_job, only


class Pair(NamedTuple):
    master: RedisServer
    replica: RedisServer

    @property
    def url(self) -> str:
        return self.master.url_for(query="sync_replicas=1")

rig = only(RedisRig)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    pair = Pair(RedisServer(tmp_path / "one"), RedisServer(tmp_path / "two"))
    try:
        pair.master.start()
        pair.replica.start().replicate(pair.master)
        yield pair
    finally:
        for server in pair:
            server.stop()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """WAIT for 100 ms instead of a second: nothing here takes so long that is to succeed at once."""
    timeout_ms, real = 100, redis_asking.sync
    monkeypatch.setattr(redis_replicas, "sync", lambda key, replicas: real(key, replicas, timeout_ms))
    monkeypatch.setattr("kqueue.client.redis_wire.sync", lambda key, replicas: real(key, replicas, timeout_ms))


def open_at(rig: RedisRig, url: str, **how: Any) -> Any:
    rig.url = url
    return rig.broker(**how)


def client_at(rig: RedisRig, url: str, patience_s: float = 20.0) -> RedisClient:
    rig.clients.append(RedisClient(url, patience_s=patience_s))
    return rig.clients[-1]


def acks(leases: list[Lease]) -> list[Settlement]:
    return [Settlement(lease.token, "q", "ack") for lease in leases]


def test_what_was_promised_stands_on_the_replica_when_it_is_promised(rig: RedisRig, pair: Pair) -> None:
    broker, client = open_at(rig, pair.url), client_at(rig, pair.url)
    for n in range(20):
        assert client.enqueue([new_job(f"c{n}")]) == [True]
        assert pair.replica.command("EXISTS", f"kq:{{q}}:job:c{n}") == 1
        assert rig.do(broker.enqueue([new_job(f"d{n}")])) == [True]
        assert pair.replica.command("EXISTS", f"kq:{{q}}:job:d{n}") == 1
    leases = rig.do(broker.reserve("q", {"inline": 40})).leases
    assert pair.replica.command("ZCARD", "kq:{q}:ready:inline") == 0
    assert rig.do(broker.settle(acks(leases))) == [SETTLED] * 40
    assert pair.replica.command("EXISTS", "kq:{q}:job:c0", "kq:{q}:job:d19") == 0
    client.enqueue([new_job("x")])
    assert client.cancel("x", b"{}") is True
    assert pair.replica.command("ZCARD", "kq:{q}:dead") == 1
    assert rig.news == []


def test_a_dispatch_does_not_return_while_the_replica_is_stopped(rig: RedisRig, pair: Pair) -> None:
    client = client_at(rig, pair.url, patience_s=0.3)
    assert client.enqueue([new_job("a")]) == [True]
    pair.replica.pause()
    with pytest.raises(BrokerUnavailable) as caught:
        client.enqueue([new_job("b")])
    said = str(caught.value)
    assert said.startswith(pair.master.url)
    assert "only 0 of 1 replicas have what was written" in said
    assert 'job b may be there all the same: dispatch it again with .options(id="b"), which adds it once' in said
    with pytest.raises(BrokerUnavailable, match="some of the 2 jobs"):
        client.enqueue([new_job("c"), new_job("d")])
    with pytest.raises(BrokerUnavailable, match="only 0 of 1 replicas"):
        client.cancel("a", b"{}")
    assert client.stats()["q"].ready + client.stats()["q"].dead == 4, "who only looks is answered"
    pair.replica.resume()
    patient = client_at(rig, pair.url)
    assert patient.enqueue([new_job("b")]) == [False], "it is there, and now it is safe"
    assert pair.replica.command("EXISTS", "kq:{q}:job:b") == 1


@pytest.mark.usefixtures("told_each_time")
def test_the_daemon_s_verbs_wait_for_the_replica_and_its_epoch_does_not(rig: RedisRig, pair: Pair) -> None:
    broker = open_at(rig, pair.url, lease_s=3.0)
    rig.do(broker.enqueue([new_job(f"{n}") for n in range(9)]))
    leases = rig.do(broker.reserve("q", {"inline": 4})).leases
    pair.replica.pause()
    tasks = [
        rig.kernel.spawn(verb) for verb in (
            broker.settle(acks(leases)), broker.reserve("q", {"inline": 3}), broker.enqueue([new_job("more")]),
        )
    ]  # fmt: skip
    rig.until(lambda: len(rig.news) >= 6)
    for kind, text, _ in rig.news:
        assert kind == "lost"
        assert "only 0 of 1 replicas have what was written, so it does not count as done yet" in text
        assert "queue.sync_replicas" in text
    rig.do(broker.renew())
    rig.do(broker.sweep())
    assert rig.do(broker.stats())["q"] == (3, 0, 3, 0), "Redis has done it all"
    assert not any(task.ended for task in tasks), "but nobody is told so"
    pair.replica.resume()
    rig.until(lambda: all(task.ended for task in tasks))
    assert tasks[0].value == [SETTLED] * 4, "the first answer, though it was asked often"
    assert [lease.token.id for lease in tasks[1].value.leases] == ["4", "5", "6"]
    assert tasks[2].value == [True]
    assert rig.do(broker.stats())["q"] == (3, 0, 3, 0)
    assert rig.news[-1][0] == "back"


@pytest.mark.parametrize("synced", [True, False])
def test_a_failover_loses_nothing_that_a_dispatch_returned_for(rig: RedisRig, pair: Pair, synced: bool) -> None:
    """And without the setting it does, or this test proved nothing."""
    client = client_at(rig, pair.url if synced else pair.master.url, patience_s=0.3)
    proxy = Proxy(pair.master.port)
    pair.replica.replicate(pair.master, proxy.port)
    returned = []
    for n in range(100):
        proxy.mute = n >= 50  # from then on the replica hears nothing
        try:
            client.enqueue([new_job(f"{n}")])
        except BrokerUnavailable:
            break
        returned.append(f"{n}")
    assert len(returned) == (50 if synced else 100)
    pair.master.kill()
    proxy.stop()
    pair.replica.command("REPLICAOF", "NO", "ONE")
    there = pair.replica.command("KEYS", "kq:{q}:job:*")
    assert isinstance(there, list)
    lost = {f"kq:{{q}}:job:{id}".encode() for id in returned} - set(there)
    assert (lost == set()) == synced


@pytest.mark.usefixtures("told_each_time")
def test_what_is_repeated_by_another_connection_is_waited_for_as_well(rig: RedisRig, pair: Pair) -> None:
    """Then the script writes nothing, and WAIT alone would have nothing to wait for."""
    proxy = Proxy(pair.master.port)
    try:
        broker = open_at(rig, f"{proxy.url}?sync_replicas=1")
        client = client_at(rig, f"{proxy.url}?sync_replicas=1", patience_s=0.5)
        client.enqueue([new_job("a")])
        pair.replica.pause()
        proxy.cut()
        task = rig.kernel.spawn(broker.enqueue([new_job("b")]))
        rig.until(lambda: sum("only 0 of 1" in text for _, text, _ in rig.news) > 2)
        assert proxy.cuts == 1
        assert not task.ended
        proxy.cut()
        with pytest.raises(BrokerUnavailable, match="only 0 of 1"):
            client.enqueue([new_job("c")])
        assert proxy.cuts == 2
        pair.replica.resume()
        rig.until(lambda: task.ended)
        assert task.value == [True]
        rig.do(rig.opened.pop().close())
    finally:
        proxy.stop()


def test_many_who_wait_share_one_wait(rig: RedisRig, pair: Pair) -> None:
    broker = open_at(rig, pair.url)
    pair.master.command("CONFIG", "RESETSTAT")
    tasks = [rig.kernel.spawn(broker.enqueue([new_job()])) for _ in range(200)]
    rig.until(lambda: all(task.ended for task in tasks))
    calls = int(pair.master.info("cmdstat_wait").partition("'calls': ")[2].partition(",")[0])
    assert 1 <= calls < 50


def test_no_renewal_is_held_up_by_those_who_wait(rig: RedisRig, pair: Pair) -> None:
    broker = open_at(rig, pair.url, lease_s=3.0)
    pair.replica.pause()
    tasks = [rig.kernel.spawn(broker.enqueue([new_job()])) for _ in range(200)]
    rig.until(lambda: rig.news)
    before = float(str(pair.master.command("ZSCORE", "kq:{q}:epochs", broker._owner.epoch)))
    rig.do(broker.renew())
    after = float(str(pair.master.command("ZSCORE", "kq:{q}:epochs", broker._owner.epoch)))
    assert before < after, "it came through, before the 20 s that 200 of these would take one by one"
    assert not any(task.ended for task in tasks)
    pair.replica.resume()
    rig.until(lambda: all(task.ended for task in tasks))


def test_a_full_master_still_waits_for_what_it_works_off(rig: RedisRig, pair: Pair) -> None:
    broker = open_at(rig, pair.url)
    rig.do(broker.enqueue([new_job("a")]))
    leases = rig.do(broker.reserve("q", {"inline": 1})).leases
    pair.master.command("CONFIG", "SET", "maxmemory", "1")
    assert rig.do(broker.settle(acks(leases))) == [SETTLED]
    assert pair.replica.command("EXISTS", "kq:{q}:job:a") == 0


def test_who_may_not_wait_is_told_what_is_missing(rig: RedisRig, pair: Pair) -> None:
    pair.master.command("ACL", "SETUSER", "worker", "on", ">pw", "~kq:*", "&kq:*", "+@all", "-wait")
    url = pair.master.url_for("worker", "pw", query="sync_replicas=1")
    with pytest.raises(BrokerRefused, match=r"NOPERM.*\+wait"):
        client_at(rig, url).enqueue([new_job()])
    broker = open_at(rig, url)
    task = rig.kernel.spawn(broker.enqueue([new_job("a")]))
    rig.until(lambda: rig.news)
    assert "NOPERM" in rig.news[0][1]
    pair.master.command("ACL", "SETUSER", "worker", "+wait")
    rig.until(lambda: task.ended)
    assert task.value == [True]


def test_of_a_cluster_each_node_has_replicas_of_its_own(rig: RedisRig, tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster", replicas=1)
    try:
        cluster.start()
        safe, unsafe = cluster.queue_at(cluster.nodes[0]), cluster.queue_at(cluster.nodes[1])
        client = client_at(rig, f"{cluster.url}?sync_replicas=1", patience_s=0.3)
        assert client.enqueue([new_job("a", queue=safe)]) == [True]
        with pytest.raises(BrokerUnavailable, match="only 0 of 1 replicas"):
            client.enqueue([new_job("b", queue=unsafe)])
        broker = open_at(rig, f"{cluster.url}?sync_replicas=1", queues=(safe, unsafe))
        assert len(rig.do(broker.reserve(safe, {"inline": 1})).leases) == 1
        task = rig.kernel.spawn(broker.reserve(unsafe, {"inline": 1}))
        rig.until(lambda: rig.news)
        assert f"127.0.0.1:{cluster.nodes[1].port}: only 0 of 1 replicas" in rig.news[0][1]
        assert not task.ended
        rig.kernel.cancel(task, GeneratorExit())
    finally:
        rig.close()
        rig.opened.clear()
        rig.clients.clear()
        cluster.stop()
