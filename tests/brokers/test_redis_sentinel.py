"""redis+sentinel://: the master is found, and found again, whatever became of the old one. Real Sentinels, real fail-overs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kqueue.brokers import redis_transport
from kqueue.brokers.base import SETTLED, Settlement
from kqueue.brokers.commands.redis_url import parse_url
from kqueue.client import redis_wire
from kqueue.client.redis import RedisClient
from kqueue.errors import BrokerRefused, BrokerUnavailable, UsageError

from ..servers import RedisServer, Sentinel, free_port
from .conftest import RedisRig, new_job, only

rig = only(RedisRig)


class Trio(NamedTuple):
    master: RedisServer
    replica: RedisServer
    sentinel: Sentinel

    @property
    def url(self) -> str:
        """The first of the Sentinels that it names is not there."""
        return f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{self.sentinel.port}/main"


def trio_in(directory: Path, password: str = "") -> Iterator[Trio]:
    for name in ("one", "two", "sentinel"):
        (directory / name).mkdir()
    master, replica = RedisServer(directory / "one").start(), RedisServer(directory / "two").start()
    replica.replicate(master)
    trio = Trio(master, replica, Sentinel(directory / "sentinel", master, password))
    try:
        trio.sentinel.start()
        trio.sentinel.until_it_knows(replicas=1)
        yield trio
    finally:
        for server in trio:
            server.stop()


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Trio]:
    yield from trio_in(tmp_path)


def open_at(rig: RedisRig, url: str) -> Any:
    rig.url = url
    return rig.broker()


def runs_a_job(rig: RedisRig, broker: Any) -> bool:
    rig.do(broker.enqueue([new_job()]))
    (lease,) = rig.do(broker.reserve("q", {"inline": 1})).leases
    return bool(rig.do(broker.settle([Settlement(lease.token, "q", "ack")])) == [SETTLED])


def test_the_master_is_found_though_one_sentinel_is_not_there(rig: RedisRig, trio: Trio) -> None:
    broker, client = open_at(rig, trio.url), RedisClient(trio.url)
    rig.clients.append(client)
    assert runs_a_job(rig, broker)
    assert client.enqueue([new_job("a")]) == [True]
    assert trio.master.command("EXISTS", "kq:{q}:job:a") == 1
    assert rig.news == []


def test_the_master_is_killed_while_jobs_flow_and_work_goes_on_at_its_replica(rig: RedisRig, trio: Trio) -> None:
    broker, client = open_at(rig, trio.url), RedisClient(trio.url, patience_s=20)
    rig.clients.append(client)
    held = rig.do(broker.enqueue([new_job("held")])) and rig.do(broker.reserve("q", {"inline": 1})).leases
    trio.replica.until_it_has_what(trio.master)
    trio.master.kill()
    verbs = [
        broker.settle([Settlement(lease.token, "q", "ack") for lease in held]), broker.renew(), broker.sweep(),
        broker.enqueue([new_job(f"d{n}") for n in range(20)]), broker.publish({"x": b"1"}),
    ]  # fmt: skip
    tasks = [rig.kernel.spawn(verb) for verb in verbs]
    rig.until(lambda: all(task.ended for task in tasks))
    assert tasks[0].value == [SETTLED], "what was leased from the old master is settled with the new one"
    assert client.enqueue([new_job(f"c{n}") for n in range(20)]) == [True] * 20
    assert trio.replica.info("role") == "master"
    leases = rig.do(broker.reserve("q", {"inline": 100})).leases
    assert len(leases) == 40
    assert rig.do(broker.settle([Settlement(lease.token, "q", "ack") for lease in leases])) == [SETTLED] * 40
    kinds = [kind for kind, _, _ in rig.news]
    assert kinds == ["lost"] * (len(kinds) - 1) + ["back"]

    trio.master.start().replicate(trio.replica)  # as the Sentinel would have it do some time later, and nobody cares
    assert runs_a_job(rig, broker)


def test_a_planned_failover_is_followed_while_the_old_master_still_takes_writes(
    rig: RedisRig, trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_wire, "MASTER_KEPT_S", 0.0)
    broker, client = open_at(rig, trio.url), RedisClient(trio.url)
    rig.clients.append(client)
    assert client.enqueue([new_job("a")]) == [True]
    trio.replica.until_it_has_what(trio.master)
    trio.sentinel.command("SENTINEL", "FAILOVER", "main")
    rig.until(lambda: ("back", "", 0.0) in rig.news)
    assert f"the master is 127.0.0.1:{trio.replica.port} by now" in rig.news[0][1]
    assert trio.master.info("role") == "master", "it has been told nothing yet"
    assert client.enqueue([new_job("b")]) == [True]
    assert rig.do(broker.enqueue([new_job("c")])) == [True]
    assert [trio.replica.command("EXISTS", f"kq:{{q}}:job:{id}") for id in "abc"] == [1, 1, 1]
    assert len(rig.do(broker.reserve("q", {"inline": 9})).leases) == 3


def test_a_master_that_was_demoted_under_our_connection_is_left(rig: RedisRig, trio: Trio) -> None:
    """REPLICAOF by hand cuts nobody off: only READONLY tells, and the Sentinels know whom to ask instead."""
    broker, client = open_at(rig, trio.url), RedisClient(trio.url, patience_s=20)
    rig.clients.append(client)
    assert client.enqueue([new_job("a")]) == [True]
    trio.replica.until_it_has_what(trio.master)
    trio.sentinel.command("SENTINEL", "REMOVE", "main")
    trio.replica.command("REPLICAOF", "NO", "ONE")
    trio.master.replicate(trio.replica)
    task = rig.kernel.spawn(broker.reserve("q", {"inline": 1}))
    rig.until(lambda: any("READONLY" in text for _, text, _ in rig.news))
    assert not task.ended
    trio.sentinel.command("SENTINEL", "MONITOR", "main", "127.0.0.1", trio.replica.port, 1)
    rig.until(lambda: task.ended)
    assert [lease.token.id for lease in task.value.leases] == ["a"]
    assert any(f"the master is 127.0.0.1:{trio.replica.port} by now" in text for _, text, _ in rig.news)
    assert client.enqueue([new_job("b")]) == [True]
    assert trio.replica.command("EXISTS", "kq:{q}:job:b") == 1


@pytest.fixture
def liar(trio: Trio) -> Iterator[int]:
    """The port of a Sentinel that names the replica."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = str(trio.replica.port).encode()
    answer = b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n" % (len(port), port)
    open_ = True

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                if not open_:
                    return
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    yield int(listener.getsockname()[1])
    open_ = False
    socket.create_connection(listener.getsockname()).close()
    thread.join()
    listener.close()


def test_who_is_no_master_is_left_whoever_named_it(rig: RedisRig, trio: Trio, liar: int) -> None:
    url = f"redis+sentinel://127.0.0.1:{liar},127.0.0.1:{trio.sentinel.port}/main"
    assert runs_a_job(rig, open_at(rig, url))
    assert f"127.0.0.1:{trio.replica.port}/0: it is a " in rig.news[0][1]
    client = RedisClient(url)
    rig.clients.append(client)
    assert all(client.enqueue([new_job()]) == [True] for _ in range(3))


def test_sentinels_may_want_a_password_of_their_own(rig: RedisRig, tmp_path: Path) -> None:
    for trio in trio_in(tmp_path, "secret"):
        url = f"redis+sentinel://127.0.0.1:{trio.sentinel.port}/main?sentinel_password="
        assert runs_a_job(rig, open_at(rig, url + "secret"))
        for client_url, words in ((url + "wrong", "WRONGPASS"), (url.partition("?")[0], "NOAUTH")):
            for make in (lambda at: open_at(rig, at), lambda at: RedisClient(at, patience_s=0).stats()):
                with pytest.raises(BrokerRefused, match=words) as caught:
                    make(client_url)
                assert "sentinel_password=" in str(caught.value)
                assert "wrong" not in str(caught.value)


def test_a_service_that_no_sentinel_knows_is_refused(rig: RedisRig, trio: Trio) -> None:
    url = f"redis+sentinel://127.0.0.1:{trio.sentinel.port}/mian"
    for attempt in (lambda: open_at(rig, url), lambda: RedisClient(url).stats()):
        with pytest.raises(BrokerRefused, match=r"no Sentinel names the master of 'mian'.*SENTINEL MASTERS"):
            attempt()


def test_a_sentinel_is_no_redis(rig: RedisRig, trio: Trio) -> None:
    url = f"redis://127.0.0.1:{trio.sentinel.port}/0"
    for attempt in (lambda: open_at(rig, url), lambda: RedisClient(url).stats()):
        with pytest.raises(BrokerRefused, match=r"it is a Sentinel.*redis\+sentinel://127.0.0.1:\d+/SERVICE"):
            attempt()


def test_while_no_sentinel_answers_it_is_waited_for(rig: RedisRig, trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_transport, "CONNECT_TIMEOUT_S", 0.4)
    trio.sentinel.pause()
    rig.url = trio.url
    broker = rig.make_broker()
    opening = rig.kernel.spawn(broker.open(rig.owner(), ["q"], 15.0))
    rig.until(lambda: rig.news)
    assert "Connection refused" in rig.news[0][1]
    assert f"127.0.0.1:{trio.sentinel.port} did not answer in" in rig.news[0][1], "and none of them for longer than its share"
    trio.sentinel.resume()
    rig.until(lambda: opening.ended)
    assert opening.value == ({}, [])
    rig.opened.append(broker)


def test_a_client_says_what_it_lacks_while_there_is_no_master(trio: Trio) -> None:
    client = RedisClient(trio.url, patience_s=0.2)
    assert client.enqueue([new_job("a")]) == [True]
    trio.master.kill()
    with pytest.raises(BrokerUnavailable) as caught:
        client.enqueue([new_job("b")])
    assert str(caught.value).startswith("redis+sentinel://127.0.0.1:")
    client.close()


def test_the_url_is_read_in_all_its_parts() -> None:
    target = parse_url(
        "redis+sentinel://u:p%40w@a:1,[::1]:2,c/ma%2Din/3?sentinel_username=su&sentinel_password=s%26p&ssl_cert_reqs=none"
    )
    assert target.hosts == (("a", 1), ("::1", 2), ("c", 26379))
    assert (target.service, target.db, target.username, target.password) == ("ma-in", 3, "u", "p@w")
    assert (target.sentinel_username, target.sentinel_password) == ("su", "s&p")
    assert target.tls is not None, "any ssl_ option means TLS, with the Sentinels as well"
    assert target.address == "redis+sentinel://a:1,[::1]:2,c:26379/ma-in/3"
    assert parse_url("redis+sentinel://a/main").tls is None
    for wrong in ("redis+sentinel://a", "redis+sentinel://:secret@a/", "redis+sentinel://a/main/x", "redis://a/?sentinel_password=x"):
        with pytest.raises(UsageError) as caught:
            parse_url(wrong)
        assert "secret" not in str(caught.value)
