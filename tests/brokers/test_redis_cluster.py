"""A Redis Cluster of three nodes: each queue at its own node, slots that move while jobs flow, nodes that die. Real ones.

The conformance suite runs on it, too (ClusterRig). Here is what only a cluster can get wrong.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue.brokers.base import SETTLED, STALE, Lease, Retention, Settlement
from kqueue.brokers.commands import redis as commands
from kqueue.brokers.commands.redis_client_scripts import CLIENT_SCRIPTS
from kqueue.brokers.commands.redis_cluster import Routes, read_redirect, slot_of
from kqueue.brokers.commands.redis_scripts import SCRIPTS
from kqueue.client.redis import RedisClient
from kqueue.errors import BrokerRefused, BrokerUnavailable

from ..servers import Cluster, RedisServer, free_port
from .conftest import ClusterRig, new_job, only

rig = only(ClusterRig)


@pytest.fixture
def queues(rig: ClusterRig) -> list[str]:
    """One at each node."""
    return [rig.cluster.queue_at(node) for node in rig.cluster.nodes]


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster whose nodes a test may kill. Its first node has a replica."""
    cluster = Cluster(tmp_path, replicas=1)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def reserve(rig: ClusterRig, broker: Any, queue: str, inline: int = 100) -> list[Lease]:
    leases: list[Lease] = rig.do(broker.reserve(queue, {"inline": inline})).leases
    return leases


def acks(leases: list[Lease]) -> list[Settlement]:
    return [Settlement(lease.token, lease.queue, "ack") for lease in leases]


def keys(node: RedisServer) -> set[str]:
    found = node.command("KEYS", "kq:*")
    assert isinstance(found, list)
    return {key.decode() for key in found}


# -- whom to ask ------------------------------------------------------------------------------------------------------


def test_each_queue_s_keys_stand_at_its_own_node_and_one_batch_settles_all(rig: ClusterRig, queues: list[str]) -> None:
    broker, client = rig.broker(queues=tuple(queues)), rig.make_client()
    jobs = [new_job(f"{queue}-{n}", queue=queue) for n in range(4) for queue in queues]
    assert rig.do(broker.enqueue(jobs[:6])) == [True] * 6
    assert client.enqueue(jobs) == [False] * 6 + [True] * 6
    for node, queue in zip(rig.cluster.nodes, queues, strict=True):
        assert {key for key in keys(node) if ":job:" in key} == {f"kq:{{{queue}}}:job:{queue}-{n}" for n in range(4)}
    leases = [lease for queue in queues for lease in reserve(rig, broker, queue)]
    assert len(leases) == 12
    assert {queue: tuple(counts) for queue, counts in client.stats().items()} == dict.fromkeys(queues, (0, 0, 4, 0))
    assert rig.do(broker.settle(acks(leases[::-1]))) == [SETTLED] * 12
    assert rig.do(broker.stats()) == client.stats() == dict.fromkeys(queues, (0, 0, 0, 0))
    assert rig.news == [], "going from node to node is nothing to speak of"


def test_there_is_one_connection_for_each_node_that_is_needed(rig: ClusterRig, queues: list[str]) -> None:
    rig.broker(epoch="few", queues=(queues[1],))

    def connected(node: RedisServer) -> int:
        clients = node.command("CLIENT", "LIST")
        return str(clients).count("kqueued:few")

    homes = {rig.cluster.home(f"kq:{{{queues[1]}}}:").port, rig.cluster.home("kq:queues").port}
    assert [connected(node) for node in rig.cluster.nodes] == [int(node.port in homes) for node in rig.cluster.nodes]


def test_what_all_share_has_a_home_of_its_own(rig: ClusterRig, queues: list[str]) -> None:
    broker, client = rig.broker(queues=tuple(queues)), rig.make_client()
    rig.do(broker.publish({"manifest:q": b"{}"}))
    assert client.documents("manifest:") == {"manifest:q": b"{}"}
    assert client.enqueue([new_job("x", queue="unread")]) == [True]
    assert client.show("x") is not None, "found by the list of queues"
    assert [row.id for row in client.list(None, None, 10)] == ["x"]
    assert rig.do(broker.stats())["unread"] == (1, 0, 0, 0)
    assert client.cancel("x", b"{}") is True


def test_any_node_and_any_of_several_will_do_to_begin_with(rig: ClusterRig, queues: list[str]) -> None:
    there = [node.port for node in rig.cluster.nodes]
    for ports in ([there[1]], [there[2], there[0]], [free_port(), there[1]]):
        rig.url = "redis://" + ",".join(f"127.0.0.1:{port}" for port in ports) + "/0"
        broker, client = rig.broker(queues=tuple(queues)), rig.make_client()
        assert client.enqueue([new_job(queue=queue) for queue in queues]) == [True] * 3
        assert [len(reserve(rig, broker, queue)) for queue in queues] == [1, 1, 1]


def test_another_database_than_the_first_is_refused(rig: ClusterRig) -> None:
    for attempt in (rig.broker, lambda: rig.make_client().stats()):
        rig.url = rig.cluster.nodes[0].url_for(db=1)
        with pytest.raises(BrokerRefused, match="SELECT is not allowed in cluster mode"):
            attempt()


def test_without_the_right_to_see_the_map_it_goes_from_node_to_node(rig: ClusterRig, queues: list[str]) -> None:
    rights = ("+@read", "+@write", "+@scripting", "+@connection", "+@pubsub", "+time", "-cluster")
    for node in rig.cluster.nodes:
        node.command("ACL", "SETUSER", "blind", "on", ">pw", "~kq:*", "&kq:*", *rights)
    try:
        rig.url = rig.cluster.nodes[0].url_for("blind", "pw")
        broker, client = rig.broker(queues=tuple(queues)), rig.make_client()
        assert client.enqueue([new_job(queue=queue) for queue in queues]) == [True] * 3
        assert [len(reserve(rig, broker, queue)) for queue in queues] == [1, 1, 1]
        assert rig.news == []
    finally:
        for node in rig.cluster.nodes:
            node.command("ACL", "DELUSER", "blind")


def test_a_user_that_one_node_does_not_know_is_refused_at_the_start(rig: ClusterRig, queues: list[str]) -> None:
    """ACLs are not shared by a cluster's nodes, so this is easily forgotten."""
    for node in rig.cluster.nodes[:2]:
        node.command("ACL", "SETUSER", "worker", "on", ">pw", "~kq:*", "&kq:*", "+@all")
    try:
        rig.url = rig.cluster.nodes[0].url_for("worker", "pw")
        for attempt in (lambda: rig.broker(queues=tuple(queues)), lambda: rig.make_client().enqueue([new_job(queue=queues[2])])):
            with pytest.raises(BrokerRefused, match=f"127.0.0.1:{rig.cluster.nodes[2].port}.*WRONGPASS"):
                attempt()
    finally:
        for node in rig.cluster.nodes[:2]:
            node.command("ACL", "DELUSER", "worker")


# -- doorbells --------------------------------------------------------------------------------------------------------


def test_a_ring_at_any_node_is_heard_once(rig: ClusterRig, queues: list[str]) -> None:
    broker, client = rig.broker(queues=tuple(queues)), rig.make_client()
    rang: list[bytes] = []
    heard = broker._nodes._on_bell
    broker._nodes._on_bell = lambda channel, message: (rang.append(channel), heard(channel, message))
    for queue in queues:
        assert reserve(rig, broker, queue) == []
        rig.do(broker.renew())  # its reply comes after what was rung before
        assert rig.do(broker.wait(0.0)) is False
        client.enqueue([new_job(queue=queue), new_job(queue=queue)])  # one alone would be handed over
        assert rig.do(broker.wait(20.0)) is True
        rig.do(broker.stats())  # the same at each node
        assert len(reserve(rig, broker, queue)) == 2
    assert rang == [commands.bell(queue).encode() for queue in queues]


def test_a_cluster_sends_a_ring_to_every_node(rig: ClusterRig, queues: list[str]) -> None:
    """Which is why it does not matter where we listen."""
    broker = rig.broker(queues=tuple(queues))
    home = rig.cluster.home(f"kq:{{{queues[0]}}}:")
    assert reserve(rig, broker, queues[0]) == []
    lost = [transport for node, transport in broker._nodes._transports.items() if node[1] == home.port]
    lost[0].state = "lost"  # as it is for a moment, while the ring comes by the others
    rig.make_client().enqueue([new_job(queue=queues[0])])
    assert rig.do(broker.wait(20.0)) is True
    lost[0].state = "ready"


# -- slots that move --------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(rig: ClusterRig, queues: list[str]) -> Iterator[tuple[str, RedisServer, RedisServer]]:
    """A queue's key, the node where it is, and the one it moves to; put back afterwards."""
    key = f"kq:{{{queues[0]}}}:"
    source, to = rig.cluster.nodes[0], rig.cluster.nodes[1]
    yield key, source, to
    for node in rig.cluster.nodes:
        node.command("FLUSHALL")
        node.command("CLUSTER", "SETSLOT", rig.cluster.slot(key), "STABLE")
    if rig.cluster.home(key) is to:
        rig.cluster.begin_move(key, source)  # so that end_move counts for more than what the nodes have told each other before
    rig.cluster.end_move(key, source)


def test_while_its_slot_moves_a_queue_waits_and_no_job_is_in_two_places(
    rig: ClusterRig, queues: list[str], moved: tuple[str, RedisServer, RedisServer]
) -> None:
    key, source, to = moved
    broker, client = rig.broker(queues=tuple(queues)), rig.make_client()
    rig.do(broker.enqueue([new_job(f"old{n}", queue=queues[0]) for n in range(50)]))
    leases = reserve(rig, broker, queues[0], 10)
    rig.cluster.begin_move(key, to)
    rig.cluster.move_keys(key, source, to, count=20)
    tasks = [
        rig.kernel.spawn(verb) for verb in (
            broker.settle(acks(leases)), broker.enqueue([new_job(f"new{n}", queue=queues[0]) for n in range(5)]),
            broker.reserve(queues[0], {"inline": 5}),
        )
    ]  # fmt: skip
    rig.until(lambda: rig.news)
    slot = rig.cluster.slot(key)
    words = f"slot {slot} is being moved to 127.0.0.1:{to.port}; work on its queues goes on when that is done"
    assert words in rig.news[0][1]
    assert len(reserve(rig, broker, queues[1])) == 0, "the other queues go on meanwhile"
    rig.do(broker.renew())
    with pytest.raises(BrokerUnavailable, match="is being moved to"):
        RedisClient(rig.url, patience_s=0.1).enqueue([new_job("late", queue=queues[0])])
    while rig.cluster.move_keys(key, source, to, count=20):
        assert not any(task.ended for task in tasks), "none of it ran on half a queue"
    rig.cluster.end_move(key, to)
    rig.until(lambda: all(task.ended for task in tasks))
    assert tasks[0].value == [SETTLED] * 10
    assert tasks[1].value == [True] * 5
    assert len(tasks[2].value.leases) == 5
    assert client.enqueue([new_job("late", queue=queues[0])]) == [True]
    assert rig.do(broker.stats())[queues[0]] == client.stats()[queues[0]] == (41, 0, 5, 0)
    assert {k for k in keys(source) if k.startswith(key)} == set()
    assert rig.news[-1][0] == "back"


def test_a_slot_that_has_moved_is_asked_for_where_it_is_now(
    rig: ClusterRig, queues: list[str], moved: tuple[str, RedisServer, RedisServer]
) -> None:
    key, source, to = moved
    broker, client = rig.broker(queues=(queues[0],)), rig.make_client()
    assert client.enqueue([new_job(f"{n}", queue=queues[0]) for n in range(9)]) == [True] * 9
    rig.cluster.begin_move(key, to)
    while rig.cluster.move_keys(key, source, to):
        pass
    rig.cluster.end_move(key, to)
    leases = reserve(rig, broker, queues[0])
    assert len(leases) == 9, "MOVED is followed"
    assert rig.news == [], "and is nothing to speak of"
    assert client.stats()[queues[0]] == (0, 0, 9, 0)
    assert rig.do(broker.settle(acks(leases))) == [SETTLED] * 9
    assert rig.do(broker.wait(0.0)) in (True, False)
    assert reserve(rig, broker, queues[0]) == []
    client.enqueue([new_job("ring", queue=queues[0])])
    assert rig.do(broker.wait(20.0)) is True, "and so is its bell"


def test_closing_does_not_wait_until_the_nodes_agree(
    rig: ClusterRig, queues: list[str], moved: tuple[str, RedisServer, RedisServer]
) -> None:
    key, source, to = moved
    broker = rig.broker(queues=(queues[0],))
    source.command("FLUSHALL")  # else it may not give the slot away
    for here, there in ((source, to), (to, source)):
        here.command("CLUSTER", "SETSLOT", rig.cluster.slot(key), "NODE", rig.cluster.id_of(there))
    try:
        rig.do(rig.opened.pop().close())
        with pytest.raises(BrokerUnavailable, match="closed"):
            rig.do(broker.renew())
    finally:
        rig.cluster.end_move(key, to)


def test_single_keys_are_followed_while_their_slot_moves(rig: ClusterRig, queues: list[str]) -> None:
    """ASK and ASKING: the list of queues, the documents, and what `list` reads."""
    cluster = rig.cluster
    broker, client = rig.broker(queues=tuple(queues)), rig.make_client()
    source = cluster.home("kq:queues")
    to = next(node for node in cluster.nodes if node is not source)
    try:
        cluster.begin_move("kq:queues", to)
        assert source.command("DEL", "kq:queues") == 1  # the source does not have it any more, the target not yet
        assert client.enqueue([new_job("a", queue="brandnew")]) == [True]
        rig.do(broker.renew())
        assert to.command("CLUSTER", "COUNTKEYSINSLOT", cluster.slot("kq:queues")) == 1
        assert client.stats().keys() == {*queues, "brandnew"}
        assert "brandnew" in rig.do(broker.stats())
        assert rig.news == []
    finally:
        cluster.move_keys("kq:queues", source, to)
        cluster.end_move("kq:queues", to)
        cluster.begin_move("kq:queues", source)
        cluster.move_keys("kq:queues", to, source)
        cluster.end_move("kq:queues", source)


# -- nodes that die ---------------------------------------------------------------------------------------------------


def test_a_node_is_killed_and_its_replica_takes_its_place_while_jobs_flow(rig: ClusterRig, mortal: Cluster) -> None:
    names = [mortal.queue_at(node) for node in mortal.nodes[:3]]
    rig.url = f"redis://127.0.0.1:{mortal.nodes[0].port},127.0.0.1:{mortal.nodes[1].port}/0"
    broker = rig.broker(queues=tuple(names))
    client = RedisClient(rig.url, patience_s=20)
    rig.clients.append(client)
    client.enqueue([new_job(f"{queue}-{n}", queue=queue) for n in range(5) for queue in names])
    leases = [lease for queue in names for lease in reserve(rig, broker, queue, 2)]
    replica = mortal.nodes[3]
    replica.until_it_has_what(mortal.nodes[0])
    mortal.nodes[0].kill()
    settling = rig.kernel.spawn(broker.settle(acks(leases)))
    adding = rig.kernel.spawn(broker.enqueue([new_job("more", queue=names[0])]))
    rig.until(lambda: any(f"127.0.0.1:{mortal.nodes[0].port}: " in text for _, text, _ in rig.news))
    assert len(reserve(rig, broker, names[1], 1)) == 1, "the other nodes' queues go on"
    rig.do(broker.renew())
    rig.do(broker.sweep())
    assert names[0] not in rig.do(broker.stats())
    assert not settling.ended
    rig.until(lambda: settling.ended and adding.ended)
    assert settling.value == [SETTLED] * 6
    assert adding.value == [True]
    assert replica.info("role") == "master"
    assert client.enqueue([new_job("last", queue=names[0])]) == [True]
    left = {f"{names[0]}-{n}" for n in (2, 3, 4)}
    assert {lease.token.id for lease in reserve(rig, broker, names[0])} == {*left, "more", "last"}
    rig.until(lambda: rig.news[-1][0] == "back")

    assert rig.broker(queues=(names[0],)), "a daemon that starts now finds the cluster by the second node of its URL"


@pytest.mark.usefixtures("told_each_time")
def test_a_node_without_a_replica_is_killed_and_comes_back(rig: ClusterRig, mortal: Cluster) -> None:
    names = [mortal.queue_at(node) for node in mortal.nodes[:3]]
    rig.url = mortal.url
    broker = rig.broker(queues=tuple(names))
    rig.do(broker.enqueue([new_job(f"{queue}-{n}", queue=queue) for n in range(5) for queue in names]))
    leases = [lease for queue in names for lease in reserve(rig, broker, queue, 2)]
    node = mortal.nodes[2]
    node.command("CONFIG", "SET", "appendfsync", "always")
    node.kill()
    settling = rig.kernel.spawn(broker.settle(acks(leases)))
    adding = rig.kernel.spawn(broker.enqueue([new_job("more", queue=names[2])]))
    rig.until(lambda: len(rig.news) > 3)
    assert not adding.ended
    assert len(reserve(rig, broker, names[0], 1)) == 1
    with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{node.port}"):
        RedisClient(rig.url, patience_s=0.1).enqueue([new_job(queue=names[2])])
    node.start()
    rig.until(lambda: settling.ended and adding.ended)
    assert settling.value == [SETTLED] * 6
    assert len(reserve(rig, broker, names[2])) == 4
    rig.until(lambda: rig.news[-1][0] == "back")


def test_closing_does_not_wait_for_a_node_that_is_gone(rig: ClusterRig, mortal: Cluster) -> None:
    names = [mortal.queue_at(node) for node in mortal.nodes[:3]]
    rig.url = mortal.url
    broker, other = rig.broker(queues=tuple(names)), rig.broker(queues=tuple(names[:2]))
    rig.do(broker.enqueue([new_job("a", queue=names[1])]))
    assert len(reserve(rig, broker, names[1])) == 1
    mortal.nodes[2].kill()
    rig.until(lambda: rig.news)
    rig.opened.remove(broker)
    rig.do(broker.close())
    assert rig.do(other.sweep()).recovered == {names[1]: 1}, "what it held elsewhere was given up at once"


# -- jobs that follow -------------------------------------------------------------------------------------------------


def test_jobs_follow_into_queues_of_other_nodes(rig: ClusterRig, queues: list[str]) -> None:
    broker = rig.broker(queues=tuple(queues))
    rig.do(broker.enqueue([new_job("first", queue=queues[0])]))
    (lease,) = reserve(rig, broker, queues[0])
    follow_ups = tuple(new_job(f"{queue}-{n:03}", queue=queue, at=1.0) for queue in queues for n in range(300))
    assert rig.do(broker.settle([Settlement(lease.token, queues[0], "ack", follow_ups=follow_ups)])) == [SETTLED]
    for queue in queues:
        found = [lease.token.id for lease in reserve(rig, broker, queue, 400)]
        assert found == [job.id for job in follow_ups if job.queue == queue]
    assert rig.news == []


def test_a_node_that_is_gone_holds_up_only_what_follows_into_its_queues(rig: ClusterRig, mortal: Cluster) -> None:
    names = [mortal.queue_at(node) for node in mortal.nodes[:3]]
    rig.url = mortal.url
    broker = rig.broker(queues=(names[1],))
    rig.do(broker.enqueue([new_job("first", queue=names[1])]))
    (lease,) = reserve(rig, broker, names[1])
    mortal.nodes[2].kill()
    follow_ups = tuple(new_job(f"at {queue}", queue=queue) for queue in names)
    assert rig.do(broker.settle([Settlement(lease.token, names[1], "ack", follow_ups=follow_ups)])) == [SETTLED]
    rig.do(broker.sweep())
    taken = [lease.token.id for queue in names[:2] for lease in reserve(rig, broker, queue)]
    assert taken == [f"at {queue}" for queue in names[:2]]
    mortal.nodes[2].start()
    reader = rig.broker(queues=(names[2],))
    found: list[Lease] = []
    while not found:
        rig.do(broker.sweep())
        found = reserve(rig, reader, names[2])
    assert [lease.token.id for lease in found] == [f"at {names[2]}"]
    rig.do(reader.settle(acks(found)))
    rig.do(broker.sweep())
    assert reserve(rig, reader, names[2]) == []
    assert f"queue {names[2]!r} does not take the jobs that follow" in "".join(text for _, text, _ in rig.news)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_every_script_keeps_to_the_keys_of_its_queue(rig: ClusterRig, queues: list[str]) -> None:
    """MONITOR at each node shows what scripts do, in all the states that jobs can be in."""
    seen: set[str] = set()
    strays: set[str] = set()
    with Monitors(rig.cluster.nodes) as monitors:
        exercise(rig, queues)
        for node in rig.cluster.nodes:
            node.command("ECHO", "the end")
        for monitor in monitors:
            for line in monitor:
                words = line.split('"')[1::2]
                if words == ["ECHO", "the end"]:
                    break
                found = [word for word in words[1:] if word.startswith("kq:")]
                if " lua] " in line:
                    seen.update(found)
                    strays.update(key for key in found if not any(key.startswith(f"kq:{{{queue}}}:") for queue in queues))
                if words and words[0].upper() == "EVALSHA":
                    tags = {word.partition("}")[0] for word in found}
                    assert len(tags) == 1, f"a script was given keys of {tags}"
    assert strays == set()
    named = {key.partition("}:")[2].partition(":")[0] for key in seen}
    assert named >= {
        "job", "ready", "delayed", "dead", "done", "leased", "certs", "epochs", "owners", "idle", "beat", "last", "settled",
        "client", "bell", "outbox", "handed",
    }  # fmt: skip


class Monitors:
    """What MONITOR says at each node, as lists of lines that grow."""

    def __init__(self, nodes: list[RedisServer]) -> None:
        self.nodes = nodes

    def __enter__(self) -> list[Iterator[str]]:
        import socket

        self.sockets = []
        for node in self.nodes:
            self.sockets.append(socket.socket(socket.AF_UNIX))
            self.sockets[-1].settimeout(20)
            self.sockets[-1].connect(node.socket_path)
            self.sockets[-1].sendall(b"MONITOR\r\n")
        return [iter(each.makefile("r", errors="replace")) for each in self.sockets]

    def __exit__(self, *error: object) -> None:
        for each in self.sockets:
            each.close()


def exercise(rig: ClusterRig, queues: list[str]) -> None:
    """Run every script, with jobs in every state. One that is added later has to be run here as well."""
    client = rig.make_client()
    for queue, next_queue in zip(queues, queues[1:] + queues[:1], strict=True):
        broker = rig.broker(identity="one", queues=(queue,), lease_s=0.2)
        assert reserve(rig, broker, queue) == []
        rig.do(broker.enqueue([new_job(f"{n}", queue=queue, priority=n % 3) for n in range(9)]))
        rig.do(broker.enqueue([new_job("due", queue=queue, delay_s=0.01), new_job("late", queue=queue, delay_s=99)]))
        client.enqueue([new_job("due", queue=queue)], max_depth=99)
        assert reserve(rig, broker, queue, 0) == []
        leases = reserve(rig, broker, queue, 8)
        how: list[dict[str, Any]] = [
            {"verb": "ack"}, {"verb": "ack", "keep_s": 0.01, "result": b"1"}, {"verb": "release", "delay_s": 0.0},
            {"verb": "release", "delay_s": 9.0, "certificate": b"{}"}, {"verb": "bury", "certificate": b"{}"},
        ]  # fmt: skip
        batch = [Settlement(lease.token, queue, **fields) for lease, fields in zip(leases, how, strict=False)]
        follow_ups = (new_job(f"after {queue}", queue=queue), new_job(f"behind {queue}", queue=next_queue, delay_s=99))
        batch[0] = batch[0]._replace(follow_ups=follow_ups)
        assert rig.do(broker.settle(batch)) == [SETTLED] * 5
        assert client.show(f"behind {queue}", next_queue) is not None
        client.cancel("late", b"{}", queue)
        client._wire.ask([commands.retry(queue, ["late"]), commands.forget(queue, [leases[4].token.id])])  # type: ignore[attr-defined]
        rig.do(broker.renew())
        rig.elapse(0.3)
        heir = rig.broker(identity="one", queues=(queue,), lease_s=0.2)
        assert heir.recovered == {queue: 3}
        reserve(rig, heir, queue)
        rig.elapse(0.5)
        other = rig.broker(queues=(queue,), lease_s=0.2, retention=Retention(max_count=1))
        rig.do(other.sweep())
        rig.elapse(0.25)
        rig.do(other.sweep())  # the first one found that nobody had renewed for long
        assert rig.do(broker.settle([batch[0]._replace(token=lease.token, verb="hold") for lease in leases[5:]])) == [STALE] * 3
        rig.do(other.stats())
        assert client.show("late", queue) is not None
        rig.do(other.close())
        rig.opened.remove(other)
    assert set(SCRIPTS) | set(CLIENT_SCRIPTS) == {
        "enqueue", "reserve", "settle", "open", "renew", "sweep", "stats", "close", "cancel", "show",
        "outbox", "hand_over", "retry", "forget",
    }, "run the new one above, so that its keys are seen"  # fmt: skip


def test_slots_are_the_cluster_s_own(rig: ClusterRig) -> None:
    for key in ("kq:{q}:", "kq:queues", "123456789", "{}x", "a{b", "a}b{c}d", "{{x}}y", "kq:{Größe:1}:job:x", ""):
        assert slot_of(key) == slot_of(key.encode()) == rig.cluster.slot(key)


# -- the map, without a server ----------------------------------------------------------------------------------------


def test_a_map_that_is_none_changes_nothing() -> None:
    routes = Routes([("a", 1)])
    for garbage in (None, b"OK", [], [[1]], [[0, 5, []]], [[0, 5, [b"h", b"port"]]], RuntimeError("NOPERM")):
        assert routes.learn(garbage, ("a", 1)) is False
        assert not routes.clustered
        assert routes.of("kq:{q}:") == ("a", 1)


def test_a_node_that_does_not_say_its_name_is_the_one_that_was_asked() -> None:
    routes = Routes([("seed", 1)])
    assert routes.learn([[0, 99, [b"", 7, b"id"]], [100, 16383, [None, 8, b"id"], [b"r", 9, b"id"]]], ("asked", 1))
    assert routes.of("kq:{q}:") == ("asked", 8)
    assert routes.masters() == {("asked", 7), ("asked", 8)}
    assert routes.known == [("asked", 7), ("asked", 8), ("r", 9), ("seed", 1)]
    assert read_redirect("MOVED 3999 :6381", ("asked", 1)) == (3999, ("asked", 6381))
    assert read_redirect("ASK 3999 ::1:6381", ("asked", 1)) == (3999, ("::1", 6381))


def test_what_one_node_said_holds_until_the_next_map() -> None:
    routes = Routes([("a", 1)])
    routes.moved(slot_of("kq:{q}:"), ("b", 2))
    assert routes.of("kq:{q}:job:x") == ("b", 2)
    assert routes.of("kq:{other}:") == ("a", 1)
    assert routes.learn([[0, 16383, [b"c", 3, b"id"]]], ("a", 1))
    assert routes.of("kq:{q}:job:x") == ("c", 3)
    routes.learn([[0, 0, [b"d", 4, b"id"]]], ("a", 1))
    assert routes.of("kq:{q}:") == ("a", 1), "whoever is asked first knows who has the rest"


# -- clients ----------------------------------------------------------------------------------------------------------


def test_a_client_is_shared_by_threads_and_forks(rig: ClusterRig, queues: list[str]) -> None:
    client = rig.make_client()
    failures: list[BaseException] = []

    def dispatch(name: str) -> None:
        try:
            for n in range(20):
                assert client.enqueue([new_job(f"{name}-{n}-{queue}", queue=queue) for queue in queues]) == [True] * 3
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=dispatch, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    pid = os.fork()
    if pid == 0:
        dispatch("child")
        os._exit(len(failures))
    for thread in threads:
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert failures == []
    assert {counts.ready for counts in client.stats().values()} == {100}
