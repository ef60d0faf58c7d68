"""What only Redis can get wrong: replies that are lost, garbage in its keys, a full memory, rings that nobody needs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue.brokers import redis_transport
from kqueue.brokers.base import PRIORITY_STEP_S, SETTLED, STALE, Counters, Lease, Settlement
from kqueue.brokers.commands import redis as commands
from kqueue.brokers.commands.redis_asking import judge
from kqueue.brokers.commands.redis_lua import LANES
from kqueue.brokers.commands.redis_mend import GRACE_S, STRUCTURES
from kqueue.brokers.commands.redis_url import parse_url
from kqueue.brokers.redis_transport import RedisTransport
from kqueue.client.redis import RedisClient
from kqueue.errors import BrokerRefused, BrokerUnavailable, JobCancelled, QueueFull, UsageError
from kqueue.kernel import sleep

from ..servers import Proxy, RedisServer
from .conftest import RedisRig, new_job, only

ROOT = Path(__file__).resolve().parents[2]

JOB = "kq:{q}:job:"
PAST = "kq:{q}:past:"
READY = "kq:{q}:ready:inline"

rig = only(RedisRig)


def direct(rig: RedisRig) -> Any:
    """A broker that does not go through the proxy."""
    url, rig.url = rig.url, rig.server.url
    broker = rig.broker()
    rig.url = url
    return broker


def reserve(rig: RedisRig, broker: Any, inline: int = 10, isolated: int = 0) -> list[Lease]:
    leases: list[Lease] = rig.do(broker.reserve("q", {"inline": inline, "isolated": isolated})).leases
    return leases


def settle(rig: RedisRig, broker: Any, leases: list[Lease], verb: str, **how: Any) -> list[str]:
    batch = [Settlement(lease.token, "q", verb, **{"counters": lease.counters, **how}) for lease in leases]
    answers: list[str] = rig.do(broker.settle(batch))
    return answers


def stats(rig: RedisRig, broker: Any) -> tuple[int, ...]:
    """ready, delayed, leased, dead"""
    return tuple(rig.do(broker.stats())["q"])


def ids(leases: list[Lease]) -> list[str]:
    return [lease.token.id for lease in leases]


# -- lost replies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["reply", "request"])
def test_a_reservation_whose_reply_is_lost_is_answered_again(rig: RedisRig, proxy: Proxy, lost: str) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job(id) for id in "abc"]))
    proxy.cut(lost)
    leases = reserve(rig, broker, inline=2)
    assert ids(leases) == ["a", "b"]
    assert proxy.cuts == 1
    assert stats(rig, broker) == (1, 0, 2, 0), "nothing is leased that nobody knows of"
    assert settle(rig, broker, leases, "ack") == [SETTLED, SETTLED]
    assert [kind for kind, _, _ in rig.news] == ["lost", "back"]


def test_a_repeated_reservation_gives_only_what_is_still_held(rig: RedisRig, proxy: Proxy) -> None:
    broker, other = rig.broker(lease_s=0.2), direct(rig)
    rig.do(other.enqueue([new_job("a"), new_job("b")]))

    def steal() -> None:
        """While the reply is lost, the epoch dies, and somebody else takes "a"."""
        proxy.open = False

    proxy.on_cut = steal
    proxy.cut()
    task = rig.kernel.spawn(broker.reserve("q", {"inline": 5}))
    rig.until(lambda: proxy.cuts == 1)
    rig.elapse(0.25)
    assert rig.do(other.sweep()).recovered == {"q": 2}
    assert ids(reserve(rig, other, inline=1)) == ["a"]
    proxy.open = True
    rig.until(lambda: task.ended)
    assert ids(task.value.leases) == ["b"]
    assert stats(rig, broker) == (0, 0, 2, 0)


@pytest.mark.parametrize("verb", ["ack", "release", "bury"])
def test_a_settlement_whose_reply_is_lost_counts_as_settled(rig: RedisRig, proxy: Proxy, verb: str) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a"), new_job("b"), new_job("c")]))
    leases = reserve(rig, broker)
    settle(rig, broker, leases[1:2], "ack")
    proxy.cut()
    assert settle(rig, broker, leases, verb, certificate=b"{}") == [SETTLED, STALE, SETTLED]
    assert proxy.cuts == 1
    assert len(rig.make_client().show("a", "q").certificates if verb != "ack" else [0]) == 1, "and was done once"


def test_a_job_that_ran_before_its_enqueue_was_repeated_is_not_added_again(rig: RedisRig, proxy: Proxy) -> None:
    broker, other = rig.broker(), direct(rig)

    def close_the_door() -> None:
        proxy.open = False

    proxy.on_cut = close_the_door
    proxy.cut()
    task = rig.kernel.spawn(broker.enqueue([new_job("a")]))
    rig.until(lambda: proxy.cuts == 1)
    assert settle(rig, other, reserve(rig, other), "ack") == [SETTLED]
    proxy.open = True
    rig.until(lambda: task.ended)
    assert task.value == [True]
    assert stats(rig, other) == (0, 0, 0, 0)


def test_an_enqueue_that_was_long_under_way_changes_nothing(rig: RedisRig) -> None:
    """It was asked again, and answered; its job has run and is gone. What a broken connection still brings is nobody's wish."""
    broker, sender = rig.broker(), commands.Sender()
    late = commands.enqueue(sender, 60, [new_job("a")])
    assert rig.do(broker._ask([late])) == [b"1"]
    settle(rig, broker, reserve(rig, broker), "ack")
    rig.do(broker._ask([commands.enqueue(sender, 60, [new_job("b")])]))
    assert rig.do(broker._ask([late])) == [b""]
    assert [lease.token.id for lease in reserve(rig, broker)] == ["b"]


def test_a_client_s_enqueue_whose_reply_is_lost_adds_nothing_twice(rig: RedisRig, proxy: Proxy) -> None:
    client = rig.make_client()
    client.enqueue([new_job("first")])
    proxy.on_cut = lambda: rig.server.commands([("DEL", f"{JOB}a"), ("ZREM", READY, "a")])  # it ran at once, and is gone
    proxy.cut()
    assert client.enqueue([new_job("a"), new_job("first")]) == [True, False]
    assert proxy.cuts == 1
    assert [row.id for row in client.list(None, "q", 10)] == ["first"]


@pytest.mark.parametrize(("lost", "ran"), [("request", False), ("reply", False), ("reply", True)])
def test_one_job_is_added_once_whatever_is_lost(rig: RedisRig, proxy: Proxy, lost: str, ran: bool) -> None:
    client = rig.make_client()
    client.enqueue([new_job("first")])
    if ran:
        proxy.on_cut = lambda: rig.server.commands([("DEL", f"{JOB}a"), ("ZREM", READY, "a")])
    proxy.cut(lost)
    assert client.enqueue([new_job("a")]) == [True]
    assert proxy.cuts == 1
    assert {row.id for row in client.list(None, "q", 10)} == ({"first"} if ran else {"first", "a"})
    assert client.enqueue([new_job("a")]) == [ran], "and the next request is a new one"


def test_who_gives_up_on_a_lost_reply_is_told_that_the_job_may_be_there(rig: RedisRig, proxy: Proxy) -> None:
    client = RedisClient(rig.url, patience_s=0)
    rig.clients.append(client)
    client.enqueue([new_job("first")])
    proxy.cut()
    with pytest.raises(BrokerUnavailable, match=r'the connection broke: .*; job a may be there all the same: .*\(id="a"\)'):
        client.enqueue([new_job("a")])
    assert client.enqueue([new_job("a")]) == [False]


def test_a_silent_server_is_not_waited_for_without_end(
    rig: RedisRig, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kqueue.client.redis_wire.REPLY_TIMEOUT_S", 0.2)
    client = RedisClient(rig.url, patience_s=0)
    rig.clients.append(client)
    client.enqueue([new_job("first")])
    proxy.mute = True
    with pytest.raises(BrokerUnavailable, match="the connection broke: Timeout reading from socket; job a may be there"):
        client.enqueue([new_job("a")])
    proxy.mute = False
    assert client.enqueue([new_job("b")]) == [True], "by a connection on which no late reply can come"
    assert client.enqueue([new_job("a")]) == [False]


def test_a_reply_that_comes_in_many_pieces_is_put_together(rig: RedisRig) -> None:
    client = rig.make_client()
    documents = {f"test:{n}": bytes([n]) * 700_000 for n in range(3)}
    client.publish(documents)
    assert client.documents("test:") == documents


def test_a_cancellation_whose_reply_is_lost_says_that_it_worked(rig: RedisRig, proxy: Proxy) -> None:
    client = rig.make_client()
    client.enqueue([new_job("a")])
    proxy.cut()
    assert client.cancel("a", b'{"cause":"cancelled"}', "q") is True
    assert client.cancel("a", b'{"cause":"cancelled"}', "q") is False


@pytest.mark.parametrize("verb", ["renew", "sweep", "stats"])
def test_the_other_verbs_are_simply_repeated(rig: RedisRig, proxy: Proxy, verb: str) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a")]))
    proxy.cut()
    rig.do(getattr(broker, verb)())
    assert proxy.cuts == 1
    assert stats(rig, broker) == (1, 0, 0, 0)


def test_after_a_lost_connection_wait_returns_at_once_and_only_once(rig: RedisRig, proxy: Proxy) -> None:
    broker, other = rig.broker(), direct(rig)
    assert reserve(rig, broker) == []
    proxy.open = False
    proxy.cut_all()
    rig.until(lambda: rig.news)
    rig.do(other.enqueue([new_job("a")]))  # a ring that nobody hears
    proxy.open = True
    assert rig.do(broker.wait(10.0)) is True
    assert rig.do(broker.wait(0.05)) is False


# -- cancelled verbs --------------------------------------------------------------------------------------------------


def start(rig: RedisRig, verb: Any) -> Any:
    """Begin `verb` and stop when its request is on its way."""
    task = rig.kernel.spawn(verb)
    rig.kernel.turn()
    assert task.parked
    return task


def test_what_a_cancelled_reservation_took_comes_with_the_next_one(rig: RedisRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job(id) for id in "abcdef"]))
    task = start(rig, broker.reserve("q", {"inline": 4}))
    rig.kernel.cancel(task, JobCancelled())
    assert ids(reserve(rig, broker, inline=2)) == ["a", "b"]
    assert ids(reserve(rig, broker, inline=10)) == ["c", "d", "e", "f"], "what it took beyond that was released"
    assert stats(rig, broker) == (0, 0, 6, 0)


def test_closing_releases_what_a_cancelled_reservation_took_at_no_cost(rig: RedisRig) -> None:
    broker, other = rig.broker(), rig.broker()
    rig.do(broker.enqueue([new_job("a"), new_job("b")]))
    task = start(rig, broker.reserve("q", {"inline": 4}))
    rig.kernel.cancel(task, JobCancelled())
    rig.do(broker.close())
    rig.opened.remove(broker)
    assert [lease.counters for lease in reserve(rig, other)] == [Counters(), Counters()]


def test_a_cancelled_verb_s_reply_goes_to_nobody(rig: RedisRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a")]))

    def stubborn() -> Iterator[Any]:
        try:
            yield from broker.stats()
        except JobCancelled:
            woken_by.append((yield sleep(0.1)))

    woken_by: list[Any] = []
    cancelled = start(rig, stubborn())
    others = [rig.kernel.spawn(broker.sweep()), rig.kernel.spawn(broker.stats())]
    rig.kernel.cancel(cancelled, JobCancelled())
    rig.until(lambda: all(task.ended for task in (cancelled, *others)))
    assert woken_by == [None], "by its own sleep"
    assert others[0].value.recovered == {}
    assert others[1].value["q"].ready == 1


# -- garbage ----------------------------------------------------------------------------------------------------------

GARBAGE: dict[str, list[tuple[Any, ...]]] = {
    "a member without a job": [("ZADD", READY, 1, "bad")],
    "a member that is no text": [("ZADD", READY, 1, b"bad\xff\x00")],
    "a delayed member without a job": [("ZADD", "kq:{q}:delayed", 1, "bad")],
    "a job that is a hash": [("ZADD", READY, 1, "bad"), ("HSET", f"{JOB}bad", "envelope", "x")],
    "a delayed job that is a list": [("ZADD", "kq:{q}:delayed", 1, "bad"), ("RPUSH", f"{JOB}bad", "x")],
    "only an envelope": [("ZADD", READY, "-inf", "bad"), ("SET", f"{JOB}bad", "x")],
    "a head of nonsense": [("ZADD", READY, 1, "bad"), ("SET", f"{JOB}bad", "-fast 1e999 nan\nx")],
    "a head that tells too much": [("ZADD", READY, 1, "bad"), ("SET", f"{JOB}bad", "+inline 0 1 2\nx")],
    "counters that are no numbers": [
        ("ZADD", READY, 1, "bad"),
        ("SET", f"{JOB}bad", "+inline 1e999 \nx"),
        ("HSET", f"{PAST}bad", "attempts", "many", "n", "nan", "crashes", "-1", "available_at", ""),
    ],
    "a past that is a list": [("ZADD", READY, 1, "bad"), ("SET", f"{JOB}bad", "+inline 0 1\nx"), ("RPUSH", f"{PAST}bad", "x")],
    "certificates that are none": [("ZADD", READY, 1, "bad"), ("SET", "kq:{q}:certs:bad", "x")],
    "a place beyond all": [("ZADD", READY, "-inf", "bad"), ("HSET", f"{PAST}bad", "n", "1e300", "lane", "fast")],
}


@pytest.mark.parametrize("verb", ["bury", "release", "ack"])
@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_leased_beside_its_neighbours_and_can_be_settled(rig: RedisRig, kind: str, verb: str) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("good"), new_job("gut")]))
    rig.server.commands(GARBAGE[kind])
    leases = reserve(rig, broker)
    bad, *good = leases
    assert ids(good) == ["good", "gut"]
    assert bad.token.id.startswith("bad")
    assert bad.envelope is None or bad.envelope.endswith(b"x")
    assert bad.counters == Counters()
    assert settle(rig, broker, [bad], verb, certificate=b"{}", counters=Counters(attempts=1)) == [SETTLED]
    assert settle(rig, broker, good, "ack") == [SETTLED, SETTLED]
    row = client.show(bad.token.id, "q")
    if verb == "ack":
        assert row is None
        return
    assert (row.state, row.certificates, row.counters) == ("dead" if verb == "bury" else "ready", (b"{}",), Counters(attempts=1))
    assert [each.id for each in client.list(row.state, "q", 10)] == [bad.token.id]
    if verb == "release":
        (again,) = reserve(rig, broker)
        assert again.token.number > bad.token.number
        assert settle(rig, broker, [bad], "ack") == [STALE]


@pytest.mark.parametrize(("damage", "left"), [(("DEL", f"{JOB}bad"), None), (("SET", f"{JOB}bad", "x"), b"x")])
def test_a_job_whose_key_is_lost_or_overwritten_while_it_runs_is_recovered_as_garbage(
    rig: RedisRig, damage: tuple[Any, ...], left: bytes | None
) -> None:
    dead, alive = rig.broker(lease_s=0.2), rig.broker(lease_s=30)
    rig.do(dead.enqueue([new_job("bad", at=1.0), new_job("good", at=2.0)]))
    reserve(rig, dead)
    rig.server.command(*damage)
    rig.elapse(0.25)
    assert rig.do(alive.sweep()).recovered == {"q": 2}
    leases = {lease.token.id: lease for lease in reserve(rig, alive)}
    assert leases["good"].envelope is not None
    assert (leases["bad"].envelope, leases["bad"].counters) == (left, Counters(recoveries=1))


# What becomes of a leased job before it is acknowledged after all.
PASTS: dict[str, Any] = {
    "nothing": lambda rig, broker, leases: (broker, leases),
    "a release": lambda rig, broker, leases: (
        settle(rig, broker, leases, "release", counters=Counters(1), certificate=b"{}"), (broker, reserve(rig, broker)),
    )[1],
    "a move to the other lane": lambda rig, broker, leases: (
        settle(rig, broker, leases, "release", lane="isolated"), (broker, reserve(rig, broker, 0, 1)),
    )[1],
    "a recovery": lambda rig, broker, leases: (rig.broker(identity="host"), (broker, leases))[1],
    "a recovery, taken back": lambda rig, broker, leases: (
        rig.broker(identity="host"), settle(rig, broker, leases, "hold"), (broker, leases),
    )[2],
    "a recovery, and another reservation": lambda rig, broker, leases: (
        other := rig.broker(identity="host"), (other, reserve(rig, other)),
    )[1],
    "a cancellation, and a retry": lambda rig, broker, leases: (
        settle(rig, broker, leases, "release"), client := rig.make_client(), client.cancel("a", b"{}"), client.retry(["a"], "q"),
        (broker, reserve(rig, broker)),
    )[4],
    "a death, and a retry": lambda rig, broker, leases: (
        settle(rig, broker, leases, "bury", certificate=b"{}"), rig.make_client().retry(["a"], "q"),
        (broker, reserve(rig, broker)),
    )[2],
    "a result that expires": lambda rig, broker, leases: (
        settle(rig, broker, leases, "ack", keep_s=0.01, result=b"1"), rig.elapse(0.05), rig.do(broker.sweep()), (broker, []),
    )[3],
}  # fmt: skip


@pytest.mark.parametrize("among", [1, 3])
@pytest.mark.parametrize("past", PASTS)
def test_a_job_that_is_done_leaves_nothing_behind(rig: RedisRig, past: str, among: int) -> None:
    broker = rig.broker(identity="host")
    rig.do(broker.enqueue([new_job("a")]))
    holder, leases = PASTS[past](rig, broker, reserve(rig, broker))
    rig.do(holder.enqueue([new_job(f"neighbour {n}", lane="isolated") for n in range(among)]))
    leases += reserve(rig, holder, 0, 10)
    assert settle(rig, holder, leases, "ack") == [SETTLED] * len(leases)
    left: Any = rig.server.command("KEYS", "kq:{q}:*")
    assert [key for key in left if key.split(b":")[2] in (b"job", b"past", b"certs", b"leased", b"ready", b"delayed")] == []


def test_nothing_is_left_of_a_job_that_was_cancelled_before_it_ever_ran(rig: RedisRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("a")]))
    assert client.cancel("a", b"{}", "q")
    assert rig.server.command("GETRANGE", f"{JOB}a", 0, 0) == b"+", "as redis_lua says of one that has certificates"
    assert client.retry(["a"], "q") == [True]
    assert settle(rig, broker, reserve(rig, broker), "ack") == [SETTLED]
    assert rig.server.command("KEYS", "kq:{q}:*:a") == []


def test_in_a_batch_of_acknowledgments_the_stale_ones_alone_change_nothing(rig: RedisRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job(id) for id in "abcd"]))
    a, b, c, d = reserve(rig, broker)
    stale = b._replace(token=b.token._replace(number=2))
    assert settle(rig, broker, [a, stale, a, c], "ack") == [SETTLED, STALE, STALE, SETTLED]
    assert [rig.server.command("EXISTS", JOB + id) for id in "abcd"] == [0, 1, 0, 1]
    assert settle(rig, broker, [d, b, d], "ack") == [SETTLED, SETTLED, STALE]
    assert stats(rig, broker) == (0, 0, 0, 0)


def test_what_is_too_much_for_one_reply_stays_where_it_was(rig: RedisRig) -> None:
    broker = rig.broker()
    jobs = [new_job(f"{lane} {n:02}", lane=lane)._replace(envelope=b"x" * (1 << 20)) for lane in LANES for n in range(12)]
    for start in range(0, 24, 6):
        rig.do(broker.enqueue(jobs[start : start + 6]))
    call = commands.reserve(broker._owner, 15.0, 10**6, "q", [10, 13])
    how, _, _, inline, _, _, isolated, _, _ = rig.do(broker._ask([call]))[0]
    assert (how, isolated) == (b"enough", []), "and nobody waits for a bell, though a lane has fewer than are wanted"
    assert inline == [f"inline {n:02}".encode() for n in range(8)]
    assert stats(rig, broker) == (16, 0, 8, 0)
    (repeated,) = rig.do(broker._ask([call]))
    assert (repeated[0], repeated[1], repeated[3]) == (b"repeated", 10**6, inline)


def every_verb(rig: RedisRig, broker: Any) -> list[str]:
    """All that a daemon does to "q", with two jobs beside what stands there; their ids as they were leased."""
    rig.do(broker.enqueue([new_job("late", at=2e9 - 1e6), new_job("x", at=1.0), new_job("y", at=2.0)]))
    rig.do(broker.sweep())
    rig.do(broker.renew())
    x, y = leases = reserve(rig, broker)
    assert settle(rig, broker, [x], "bury", certificate=b"{}") == [SETTLED]
    assert settle(rig, broker, [y], "ack", keep_s=60, result=b"1") == [SETTLED]
    rig.do(broker.stats())
    rig.do(broker.publish({"manifest:q": b"{}"}))
    return ids(leases)


WRONG = [*STRUCTURES, "leased:EPOCH", "last:EPOCH", "settled:EPOCH"]


@pytest.mark.parametrize("value", [("SET", "x"), ("SADD", "x"), ("RPUSH", "x"), ("HSET", "x", "y"), ("ZADD", 1, "x")])
@pytest.mark.parametrize("name", WRONG)
def test_a_structure_of_a_wrong_type_is_put_out_of_the_way_and_work_goes_on(
    rig: RedisRig, name: str, value: tuple[Any, ...]
) -> None:
    broker = rig.broker(queues=("q", "other"))
    key = "kq:{q}:" + name.replace("EPOCH", broker._owner.epoch)
    rig.server.command("DEL", key)
    rig.server.command(value[0], key, *value[1:])
    right = rig.server.command("TYPE", key)
    assert every_verb(rig, broker) == ["x", "y"]
    warnings = [text for kind, text, _ in rig.news if kind == "warning"]
    assert len(warnings) <= 1
    assert {kind for kind, _, _ in rig.news} <= {"warning"}
    moved: Any = rig.server.command("KEYS", "kq:{q}:corrupt:*")
    assert len(moved) == len(warnings)
    for text in warnings:
        assert text.startswith(f"{key} held a ")
        assert f"moved to {moved[0].decode()}, and work goes on; " in text
        assert rig.server.command("TYPE", moved[0]) == right, "nothing is deleted"


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name not in ("idle", "hush")])
def test_a_wrong_type_is_noticed_in_whatever_state_the_daemon_is(rig: RedisRig, name: str) -> None:
    """Overwritten between any two verbs, too; each says nothing, does what it should, and the daemon goes on."""
    broker = rig.broker()
    for step in ("enqueue", "reserve", "settle", "sweep", "renew", "stats", "close"):
        rig.do(broker.enqueue([new_job("x" + step), new_job("y" + step)]))
        leases = reserve(rig, broker, 1) if step == "settle" else []
        rig.server.commands([("DEL", f"kq:{{q}}:{name}"), ("SET", f"kq:{{q}}:{name}", "x")])
        if step == "enqueue":
            assert rig.do(broker.enqueue([new_job("z")])) == [True]
        elif step == "reserve":
            reserve(rig, broker)
        elif step == "settle":
            assert settle(rig, broker, leases, "bury") == [SETTLED] * len(leases)
        else:
            rig.do(getattr(broker, step)())
    assert {kind for kind, _, _ in rig.news} <= {"warning"}


def test_what_stands_in_another_structure_goes_on(rig: RedisRig) -> None:
    dead, alive = rig.broker(lease_s=0.2), rig.broker(lease_s=30)
    rig.do(dead.enqueue([new_job("held", at=1.0), new_job("waits", at=2.0), new_job("later", delay_s=0.1)]))
    assert ids(reserve(rig, dead, 1)) == ["held"]
    rig.server.commands([("DEL", READY), ("SET", READY, "x")])
    rig.elapse(0.25)
    assert rig.do(alive.sweep()).recovered == {"q": 1}
    assert sorted(ids(reserve(rig, alive))) == ["held", "later"], "only what stood in the destroyed set is gone"
    assert "scan (kq:{q}:job:*)" in rig.news[0][1]


def test_epochs_that_are_lost_are_found_by_their_owners(rig: RedisRig) -> None:
    dead, alive = rig.broker(lease_s=30, identity="host"), rig.broker(lease_s=30)
    rig.do(dead.enqueue([new_job("held")]))
    reserve(rig, dead)
    rig.server.command("SET", "kq:{q}:epochs", "x")
    assert stats(rig, alive) == (0, 0, 1, 0)
    score: Any = rig.server.command("ZSCORE", "kq:{q}:epochs", dead._owner.epoch)
    assert 0 < float(score) - time.time() <= GRACE_S
    assert rig.broker(identity="host").recovered == {"q": 1}


def test_a_plain_acknowledgment_survives_it_as_well(rig: RedisRig) -> None:
    """A recovered job's late acknowledgment takes it out of the sets, which are looked at before anything is written."""
    late, other = rig.broker(lease_s=0.2), rig.broker(lease_s=30)
    rig.do(late.enqueue([new_job("a", at=1.0), new_job("b", at=2.0)]))
    leases = reserve(rig, late)
    rig.elapse(0.25)
    rig.do(other.sweep())
    rig.server.command("SET", "kq:{q}:delayed", "x")
    assert settle(rig, late, leases, "ack") == [SETTLED, SETTLED]
    assert stats(rig, other) == (0, 0, 0, 0)


@pytest.mark.parametrize("key", ["kq:queues", "kq:documents"])
def test_what_all_queues_share_is_mended_as_well(rig: RedisRig, key: str) -> None:
    rig.server.command("SET", key, "x")
    broker, client = rig.broker(), rig.make_client()
    assert every_verb(rig, broker) == ["x", "y"]
    assert client.stats().keys() == {"q"}
    assert client.documents("") == {"manifest:q": b"{}"}
    rig.server.commands([("DEL", key), ("SET", key, "x")])
    rig.do(broker.renew())
    rig.do(broker.publish({"manifest:q": b"{}"}))
    assert client.stats().keys() == {"q"}
    assert client.documents("") == {"manifest:q": b"{}"}


@pytest.mark.parametrize("name", WRONG)
def test_a_client_puts_it_out_of_the_way_too_and_says_so_in_its_log(
    rig: RedisRig, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker, client = rig.broker(queues=("q", "q2")), rig.make_client()
    key = "kq:{q2}:" + name.replace("EPOCH", broker._owner.epoch)
    rig.server.commands([("DEL", key), ("SADD", key, "x")])
    assert client.enqueue([new_job("a")]) == [True]
    assert client.show("a").state == "ready"
    assert {queue: each.ready for queue, each in client.stats().items()} == {"q": 1, "q2": 0}
    assert [row.id for row in client.list(None, None, 10)] == ["a"]
    assert client.cancel("a", b"{}") is True
    assert client.enqueue([new_job("b", queue="q2")]) == [True]
    assert all(f"{key} held a set instead of a " in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == len(rig.server.command("KEYS", "kq:{q2}:corrupt:*")) <= 1  # type: ignore[arg-type]


def test_a_client_s_own_memory_is_mended_too(rig: RedisRig) -> None:
    client = rig.make_client()
    client.enqueue([new_job("a")])
    (key,) = rig.server.command("KEYS", "kq:{q}:client:*")  # type: ignore[misc]
    rig.server.commands([("DEL", key), ("RPUSH", key, "x")])
    assert client.enqueue([new_job("b")]) == [True]


def test_two_who_find_it_at_once_do_not_move_the_right_one_away(rig: RedisRig) -> None:
    first, second = rig.broker(), rig.broker()
    rig.server.command("SET", READY, "x")
    tasks = [rig.kernel.spawn(each.enqueue([new_job(id)])) for each, id in ((first, "a"), (second, "b"))]
    rig.until(lambda: all(task.ended for task in tasks))
    assert stats(rig, first)[0] == 2
    assert len([kind for kind, _, _ in rig.news if kind == "warning"]) == 1


def test_it_is_refused_only_when_it_stays_wrong(rig: RedisRig) -> None:
    rig.server.command("SET", "elsewhere", "x")
    wire = rig.make_client()._wire  # type: ignore[attr-defined]
    with pytest.raises(BrokerRefused, match=r"WRONGTYPE.*kq:\*"):
        wire.ask([("ZCARD", "elsewhere")])


def test_who_may_not_rename_is_told_what_is_missing(rig: RedisRig) -> None:
    rig.server.command("ACL", "SETUSER", "weak", "on", ">pw", "&*", "~kq:*", "+@all", "-rename")
    try:
        client = RedisClient(rig.server.url_for("weak", "pw"))
        rig.clients.append(client)
        rig.server.command("SET", READY, "x")
        with pytest.raises(BrokerRefused, match=r"WRONGTYPE.*could not be moved out of the way: "):
            client.enqueue([new_job("a")])
    finally:
        rig.server.command("ACL", "DELUSER", "weak")


def test_queues_that_may_not_be_looked_at_do_not_hide_ours(rig: RedisRig) -> None:
    rig.server.command("ACL", "SETUSER", "one", "on", ">pw", "&*", "~kq:{q}:*", "~kq:queues", "+@all")
    try:
        rig.make_client().enqueue([new_job("b", queue="theirs")])
        rig.url = rig.server.url_for("one", "pw")
        broker = rig.broker()
        rig.do(broker.enqueue([new_job("a")]))
        assert {queue: each.ready for queue, each in rig.do(broker.stats()).items()} == {"q": 1}
    finally:
        rig.server.command("ACL", "DELUSER", "one")


# -- dead letters ------------------------------------------------------------------------------------------------------


def ask(client: Any, call: commands.Call) -> list[bool]:
    """What a call about dead letters is answered."""
    (digits,) = client._wire.ask([call])
    return commands.read_digits(digits)


def bury(rig: RedisRig, broker: Any, *names: str, **fields: Any) -> None:
    rig.do(broker.enqueue([new_job(id, **fields) for id in names]))
    how = {"counters": Counters(3, 1, 2, 4, 1), "certificate": b'{"cause":"exception"}'}
    wants = (0, 500) if fields.get("lane") == "isolated" else (500, 0)
    assert settle(rig, broker, reserve(rig, broker, *wants), "bury", **how) == [SETTLED] * len(names)


def test_retried_dead_letters_are_ready_at_once_as_if_they_had_never_run(rig: RedisRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    bury(rig, broker, "a", "b", "c", lane="isolated", priority=2)
    client.enqueue([new_job("waits", at=time.time() - 60)])
    assert ask(client, commands.retry("q", ["b", "nobody", "waits", "a", "b"])) == [True, False, False, True, False]
    assert stats(rig, broker) == (3, 0, 0, 1)
    row = client.show("a", "q")
    assert (row.state, row.lane, row.priority, row.counters) == ("ready", "isolated", 2, Counters())
    assert row.certificates == (b'{"cause":"exception"}',)
    assert abs(row.available_at - time.time()) < 60, "not the place that it had"
    first, second = reserve(rig, broker, 0, 10)
    assert (first.token.id, second.token.id) == ("a", "b")
    assert first.token.number == 2, "so no token of before is good again"
    assert first.envelope is not None


def test_a_retry_rings(rig: RedisRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    bury(rig, broker, "a")
    assert reserve(rig, broker) == []
    ask(client, commands.retry("q", ["a"]))
    assert rig.do(broker.wait(10.0)) is True


def test_forgotten_dead_letters_leave_nothing_behind(rig: RedisRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    bury(rig, broker, "a", "b")
    client.enqueue([new_job("waits")])
    assert ask(client, commands.forget("q", ["b", "waits", "nobody", "b"])) == [True, False, False, False]
    assert client.show("b", "q") is None
    assert stats(rig, broker) == (1, 0, 0, 1)
    assert ask(client, commands.forget("q", ["a"])) == [True]
    assert rig.server.command("KEYS", "kq:{q}:*:[ab]") == []


@pytest.mark.parametrize("verb", ["retry", "forget"])
def test_a_call_about_dead_letters_whose_reply_is_lost_says_what_it_did(rig: RedisRig, proxy: Proxy, verb: str) -> None:
    broker, client = direct(rig), rig.make_client()
    bury(rig, broker, *map(str, range(500)))
    client.stats()
    proxy.on_cut = lambda: rig.server.command("DEL", READY)  # who was retried has run meanwhile
    proxy.cut()
    assert ask(client, getattr(commands, verb)("q", [*map(str, range(499)), "nobody"])) == [True] * 499 + [False]
    assert proxy.cuts == 1
    assert stats(rig, broker) == (0, 0, 0, 1)


@pytest.mark.parametrize("damage", [("DEL", f"{JOB}a"), ("SET", f"{JOB}a", "x"), ("SET", "kq:{q}:certs:a", "x")])
def test_damaged_dead_letters_can_be_retried_and_forgotten(rig: RedisRig, damage: tuple[Any, ...]) -> None:
    broker, client = rig.broker(), rig.make_client()
    bury(rig, broker, "a", "b")
    rig.server.command(*damage)
    assert ask(client, commands.retry("q", ["a", "b"])) == [True, True]
    leases = reserve(rig, broker)
    assert sorted(ids(leases)) == ["a", "b"]
    settle(rig, broker, leases, "bury", certificate=b"{}")
    rig.server.command(*damage)
    assert ask(client, commands.forget("q", ["a", "b"])) == [True, True]
    assert client.list(None, "q", 10) == []


# -- a full or unwilling Redis ----------------------------------------------------------------------------------------


def test_a_full_redis_takes_nothing_new_and_still_works_off_what_it_has(rig: RedisRig) -> None:
    broker, other = rig.broker(lease_s=0.3), rig.broker(lease_s=30)
    hasty = RedisClient(rig.url, patience_s=0)
    rig.clients.append(hasty)
    rig.do(broker.enqueue([new_job("a"), new_job("b", delay_s=0.2), new_job("c"), new_job("d")]))
    rig.server.command("CONFIG", "SET", "maxmemory", 1)
    try:
        with pytest.raises(BrokerUnavailable, match="OOM"):
            hasty.enqueue([new_job("e")])
        leases = reserve(rig, broker, inline=2)
        assert settle(rig, broker, leases[:1], "ack") == [SETTLED]
        assert settle(rig, broker, leases[1:], "release", delay_s=0.2, certificate=b"{}") == [SETTLED]
        (held,) = reserve(rig, broker, inline=1)
        rig.elapse(0.35)
        rig.do(broker.renew())
        assert rig.do(other.sweep()).recovered == {}
        rig.elapse(0.35)
        assert rig.do(other.sweep()).recovered == {"q": 1}
        leases = reserve(rig, other)
        assert sorted(ids(leases)) == sorted(["b", "c", "d"])
        assert held.token.id in ids(leases)
        assert settle(rig, other, leases, "ack") == [SETTLED] * 3
        assert reserve(rig, other) == []
    finally:
        rig.server.command("CONFIG", "SET", "maxmemory", 0)
    assert hasty.enqueue([new_job("e")]) == [True]


def count_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays between tries, as they come."""
    waits: list[float] = []
    original = RedisTransport.backoff_s

    def counted(self: RedisTransport, tries: int) -> float:
        waits.append(original(self, tries))
        return waits[-1]

    monkeypatch.setattr(RedisTransport, "backoff_s", counted)
    return waits


def test_not_now_is_waited_out_and_reported_once(rig: RedisRig, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = rig.broker()
    rig.server.command("REPLICAOF", "127.0.0.1", 1)
    try:
        waits = count_waits(monkeypatch)
        tasks = [rig.kernel.spawn(broker.enqueue([new_job(id)])) for id in "abcde"]
        rig.until(lambda: len(waits) >= 15)
        assert not any(task.ended for task in tasks)
        ((kind, text, retry_in_s),) = rig.news
        assert (kind, "READONLY" in text) == ("lost", True), "once, however many wait and however often they try"
        assert retry_in_s in waits, "and the time is that of a real try"
        monkeypatch.setattr(redis_transport, "REPORT_AGAIN_S", 0.0)
        rig.until(lambda: len(rig.news) >= 2)
        assert rig.news[1][:2] == ("lost", text), "it is told again from time to time"
        monkeypatch.setattr(redis_transport, "REPORT_AGAIN_S", 30.0)
    finally:
        rig.server.command("REPLICAOF", "NO", "ONE")
    rig.until(lambda: all(task.ended for task in tasks))
    assert [task.value for task in tasks] == [[True]] * 5
    assert [kind for kind, _, _ in rig.news].count("back") == 1
    assert rig.news[-1] == ("back", "", 0.0)


def test_forgotten_scripts_are_loaded_again(rig: RedisRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    client.enqueue([new_job("a")])
    rig.server.command("SCRIPT", "FLUSH")
    assert client.enqueue([new_job("b")]) == [True]
    rig.server.command("SCRIPT", "FLUSH")
    assert ids(reserve(rig, broker)) == ["a", "b"]


def test_while_redis_was_away_nobody_is_taken_for_dead(rig: RedisRig) -> None:
    away, back = rig.broker(lease_s=0.2), rig.broker(lease_s=0.4)
    closed = rig.broker(lease_s=30)
    rig.do(away.enqueue([new_job(id) for id in "ab"]))
    assert ids(reserve(rig, away, inline=1)) == ["a"]
    assert ids(reserve(rig, closed, inline=1)) == ["b"]
    rig.do(closed.close())
    rig.opened.remove(closed)
    rig.elapse(0.3)  # longer than half of back's lease, in which nobody renewed or swept
    assert rig.do(back.sweep()).recovered == {"q": 1}, "but what was given up is given up"
    assert ids(reserve(rig, back)) == ["b"]
    rig.elapse(0.1)
    assert rig.do(back.sweep()).recovered == {}
    for _ in range(4):
        rig.elapse(0.1)
        rig.do(back.renew())
    assert rig.do(back.sweep()).recovered == {"q": 1}


# -- doorbells --------------------------------------------------------------------------------------------------------


def rings(rig: RedisRig) -> int:
    """PUBLISH commands since the last call."""
    info = rig.server.command("INFO", "commandstats")
    rig.server.command("CONFIG", "RESETSTAT")
    assert isinstance(info, dict)
    return int(info.get("cmdstat_publish", {}).get("calls", 0))


def test_nobody_is_rung_up_who_is_not_idle(rig: RedisRig) -> None:
    one, two, client = rig.broker(), rig.broker(), rig.make_client()
    client.enqueue([new_job()])
    rings(rig)
    for _ in range(50):
        client.enqueue([new_job()])
    assert len(reserve(rig, one)) == 10
    assert rings(rig) == 0
    assert len(reserve(rig, one, inline=100)) == len(reserve(rig, two)) + 41 == 41
    for _ in range(50):
        client.enqueue([new_job()])
    assert rings(rig) == 2, "one job is handed to the second, which found nothing; then one ring wakes all"
    assert rig.do(one.wait(10.0)) is rig.do(two.wait(10.0)) is True


def test_a_renewal_notices_a_ring_that_was_lost(rig: RedisRig) -> None:
    broker = rig.broker()
    assert reserve(rig, broker) == []
    rig.do(broker.renew())
    assert rig.do(broker.wait(0.02)) is False
    rig.server.command("DEL", "kq:{q}:idle")  # as a client does whose PUBLISH is then refused
    rig.do(broker.renew())
    assert rig.do(broker.wait(10.0)) is True


def test_an_idle_daemon_sleeps(rig: RedisRig) -> None:
    broker = rig.broker()
    assert reserve(rig, broker) == []
    before = rig.kernel.turns
    assert rig.do(broker.wait(0.5)) is False
    assert rig.kernel.turns - before <= 4


# -- size -------------------------------------------------------------------------------------------------------------


def test_large_envelopes_go_and_come_in_parts(rig: RedisRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    jobs = [new_job(f"{n:02}", envelope=bytes([n]) * (1 << 20), at=1.0) for n in range(20)]
    assert rig.do(broker.enqueue(jobs[:10])) == [True] * 10
    assert client.enqueue(jobs[10:]) == [True] * 10
    leases = []
    while part := reserve(rig, broker, inline=20):
        assert len(part) < 20
        leases += part
    assert [lease.envelope for lease in leases] == [job.envelope for job in jobs]
    assert rig.news == []


def test_no_lane_starves_when_more_is_wanted_than_fits_a_batch(rig: RedisRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job(lane=lane, at=1.0) for lane in ("inline", "isolated") for _ in range(600)]))
    leases = reserve(rig, broker, inline=10_000, isolated=4)
    assert [lease.lane for lease in leases].count("isolated") == 4
    assert len(leases) == 500


def test_depth_is_looked_at_before_any_queue_of_several_is_filled(rig: RedisRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    client.enqueue([new_job(queue="full"), new_job(queue="full")])
    for enqueue in (client.enqueue, lambda jobs, depth: rig.do(broker.enqueue(jobs, depth))):
        with pytest.raises(QueueFull, match="'full' holds 2 jobs, allowed are 2"):
            enqueue([new_job(), new_job(queue="full")], 2)
    assert stats(rig, broker) == (0, 0, 0, 0)


@pytest.mark.parametrize("priority", [-100, 0, 7])
@pytest.mark.parametrize("lane", LANES)
def test_one_job_is_put_where_it_would_be_among_others(rig: RedisRig, priority: int, lane: str) -> None:
    client = rig.make_client()
    client.enqueue([new_job("a", priority=priority, lane=lane)])
    client.enqueue([new_job("b", priority=priority, lane=lane), new_job("c", priority=priority, lane=lane)])
    for id in "abc":
        head, envelope = rig.server.command("GET", f"{JOB}{id}").split(b"\n", 1)  # type: ignore[union-attr]
        name, points, due = head.decode().split(" ")
        assert (name, points, envelope) == (f"-{lane}", str(priority), new_job(id).envelope)
        score = float(rig.server.command("ZSCORE", f"kq:{{q}}:ready:{lane}", id))  # type: ignore[arg-type]
        assert score == pytest.approx(float(due) - priority * PRIORITY_STEP_S, abs=1e-5)


def test_one_job_rings_when_it_is_new_and_only_then(rig: RedisRig) -> None:
    client, idle = rig.make_client(), "kq:{q}:idle"
    client.enqueue([new_job("a")])
    rig.server.command("SET", idle, 1)
    assert client.enqueue([new_job("a")]) == [False]
    assert rig.server.command("EXISTS", idle) == 1
    assert client.enqueue([new_job("b")]) == [True]
    assert rig.server.command("EXISTS", idle) == 0


def test_scripts_that_are_forgotten_between_two_jobs_are_loaded_again(rig: RedisRig) -> None:
    client = rig.make_client()
    for id in "abc":
        rig.server.command("SCRIPT", "FLUSH")
        assert client.enqueue([new_job(id)]) == [True]
    assert client.stats()["q"].ready == 3


# -- clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generations", [1, 2])
def test_a_forked_child_and_its_parent_do_not_share_a_connection(rig: RedisRig, generations: int) -> None:
    client = rig.make_client()
    client.enqueue([new_job("before")])
    pid = os.fork()
    if pid == 0:
        try:
            done = False
            if generations == 2 and (grandchild := os.fork()):  # of a child that has not used it
                os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
            done = all(client.enqueue([new_job(f"child{n}")]) == [True] for n in range(20))
        finally:
            os._exit(0 if done else 1)
    assert all(client.enqueue([new_job(f"parent{n}")]) == [True] for n in range(20))
    assert os.waitpid(pid, 0)[1] == 0
    assert client.stats()["q"].ready == 41


def test_looking_a_name_up_imports_no_codec(rig: RedisRig) -> None:
    """A thread that imports while another one forks leaves the child with a lock that nobody gives back."""
    program = f"""
import sys
from kqueue.client.redis import RedisClient
import redis
before = set(sys.modules)
RedisClient({rig.url!r}).stats()
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "encodings.idna" not in done.stdout.split()


def test_a_client_says_in_one_line_what_is_wrong(rig: RedisRig) -> None:
    nobody = RedisClient("redis://me:secret@127.0.0.1:1/0", patience_s=0)
    with pytest.raises(
        BrokerUnavailable,
        match=r"^redis://127.0.0.1:1/0: cannot connect: Connection refused; start Redis there, or correct the URL$",
    ) as caught:
        nobody.enqueue([new_job()])
    assert "secret" not in str(caught.value)
    wrong = RedisClient(rig.server.url_for("me", "secret"), patience_s=0)
    with pytest.raises(BrokerRefused, match=r"WRONGPASS.*check user and password") as caught_too:
        wrong.stats()
    assert "secret" not in str(caught_too.value)
    with pytest.raises(BrokerRefused, match="DB index"):
        RedisClient(rig.server.url_for(db=99)).documents("x")


@pytest.mark.parametrize("greeted", [False, True])
@pytest.mark.parametrize("jobs", [1, 50])
def test_a_client_without_a_password_is_told_where_to_put_it(tmp_path: Path, greeted: bool, jobs: int) -> None:
    server = RedisServer(tmp_path).start()
    client = RedisClient(server.url, patience_s=0.5)
    try:
        if greeted:
            assert client.enqueue([new_job("a")]) == [True]
        server.command("CONFIG", "SET", "requirepass", "secret")
        server.password = "secret"
        server.command("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")
        for request in (
            lambda: client.enqueue([new_job() for _ in range(jobs)]), client.stats, lambda: client.retry(["x"] * 20, "q"),
        ):  # fmt: skip
            with pytest.raises(BrokerRefused, match=r"NOAUTH .*; put user and password into the queue's URL$"):
                request()
        server.command("CONFIG", "SET", "requirepass", "")
        assert client.enqueue([new_job("b")]) == [True], "and it works again when it may"
    finally:
        client.close()
        server.stop()


def test_a_client_without_channel_rights_still_dispatches(rig: RedisRig) -> None:
    rig.server.command("ACL", "SETUSER", "quiet", "on", ">pw", "resetchannels", "~kq:*", "+@all")
    try:
        broker, client = rig.broker(), RedisClient(rig.server.url_for("quiet", "pw"))
        rig.clients.append(client)
        assert reserve(rig, broker) == []
        assert client.enqueue([new_job("a")]) == [True]
        rig.do(broker.renew())
        assert rig.do(broker.wait(10.0)) is True
        assert ids(reserve(rig, broker)) == ["a"]
    finally:
        rig.server.command("ACL", "DELUSER", "quiet")


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", "redis://h:6379/0"),
        ("redis://:pw@h:1/2", "redis://h:1/2"),
        ("rediss://u:p%40w@[::1]:7/0?ssl_ca_certs=/x", "rediss://[::1]:7/0"),
        ("redis://h/?db=3", "redis://h:6379/3"),
        ("unix:///run/r.sock?db=4", "unix:///run/r.sock?db=4"),
        ("unix://u:pw@/run/r.sock", "unix:///run/r.sock"),
    ],
)
def test_an_address_is_the_url_without_secrets(url: str, address: str) -> None:
    assert parse_url(url).address == address


def test_a_url_is_read_as_redis_py_reads_it() -> None:
    target = parse_url("rediss://us%3Aer:p%40w%2F@h:7/1?ssl_cert_reqs=none&ssl_keyfile=%2Fk")
    assert (target.username, target.password, target.host, target.port, target.db) == ("us:er", "p@w/", "h", 7, 1)
    assert target.tls is not None
    assert (target.tls.keyfile, target.tls.checks_host) == ("/k", False)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@h:port/0",
        "redis://:secret@h/mail",
        "redis://:secret@h/0?dbb=secret",
        "rediss://:secret@h/?ssl_cert_reqs=x",
    ],
)
def test_a_wrong_url_is_refused_without_telling_its_secret(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "code", "later"),
    [
        ("LOADING Redis is loading the dataset in memory", "LOADING", True),
        ("WRONGTYPE Operation against a key script: 12ab, on @user_script:12.", "WRONGTYPE", False),
        ("ERR Error running script (call to f_12ab): @user_script:3: WRONGTYPE Operation against", "WRONGTYPE", False),
        ("ERR Error running script (call to f_12ab): @user_script:3: -READONLY You can't write", "READONLY", True),
        ("ERR max number of clients reached", "ERR", True),
        ("MOVED 3999 127.0.0.1:6381", "MOVED", False),
        ("OOM command not allowed when used memory > 'maxmemory'.", "OOM", True),
    ],
)
def test_error_replies_are_understood_inside_scripts_too(message: str, code: str, later: bool) -> None:
    assert judge(message)[:2] == (code, later)


def test_nothing_blocks_the_loop_while_a_name_is_looked_up(rig: RedisRig) -> None:
    rig.url = f"redis://no-such-host.invalid:{rig.server.port}/0"
    broker = rig.make_broker()
    ticks = 0

    def tick() -> Iterator[Any]:
        nonlocal ticks
        while not rig.news:
            ticks += 1
            yield sleep(0.001)

    opening = rig.kernel.spawn(broker.open(rig.owner(), ["q"], 15.0))
    rig.do(tick())
    assert ticks > 1
    assert "cannot resolve no-such-host.invalid" in rig.news[0][1]
    rig.do(broker.close())
    rig.until(lambda: opening.ended)
