"""Jobs that follow: in the ack's own queue, and through the outbox into another; exactly once, whatever dies in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kqueue.brokers.base import SETTLED, STALE, Counters, Settlement
from kqueue.brokers.commands import redis as commands
from kqueue.brokers.commands.redis_lua import HAND_OVER_WITHIN_S
from kqueue.kernel import Clock

from ..servers import Proxy
from .conftest import RedisRig, new_job, only
from .test_redis import ids, reserve, settle, stats

OUTBOX = "kq:{q}:outbox"

rig = only(RedisRig)


def run_all(rig: RedisRig, broker: Any, queue: str = "r") -> list[str]:
    """Reserve and acknowledge what is ready in `queue`."""
    ran: list[str] = []
    while leases := rig.do(broker.reserve(queue, {"inline": 500, "isolated": 0})).leases:
        assert set(rig.do(broker.settle([Settlement(lease.token, queue, "ack") for lease in leases]))) == {SETTLED}
        ran += ids(leases)
    return ran


def ack(rig: RedisRig, broker: Any, *follow_ups: Any, **how: Any) -> Any:
    """The ack of a new job, with what follows it."""
    rig.do(broker.enqueue([new_job("first")]))
    (lease,) = reserve(rig, broker)
    return Settlement(lease.token, "q", "ack", follow_ups=tuple(follow_ups), **how)


# -- the same queue ---------------------------------------------------------------------------------------------------


def test_follow_ups_stand_where_they_asked_to_stand(rig: RedisRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    client.enqueue([new_job("exists", at=2e9)])
    jobs = [
        new_job("now", priority=3, lane="isolated", envelope=bytes(range(256))),
        new_job("later", delay_s=60),
        new_job("then", at=2e9),
        new_job("exists"),
        new_job("now", priority=9),
        new_job("first", envelope=b"again"),
    ]
    assert rig.do(broker.settle([ack(rig, broker, *jobs)])) == [SETTLED]
    assert stats(rig, broker) == (2, 3, 0, 0)
    row = client.show("now", "q")
    assert (row.priority, row.lane, row.envelope, row.counters) == (3, "isolated", bytes(range(256)), Counters())
    assert client.show("then", "q").available_at == 2e9
    assert client.show("first", "q").envelope == b"again", "its own id is free when it is done"
    assert rig.server.command("EXISTS", OUTBOX) == 0


@pytest.mark.parametrize("how", [{}, {"keep_s": 60.0, "result": b"1"}])
def test_only_an_ack_that_settles_adds_what_follows(rig: RedisRig, how: dict[str, Any]) -> None:
    broker = rig.broker(queues=("q", "r"))
    good = ack(rig, broker, new_job("same"), new_job("other", queue="r"), **how)
    strangers = (new_job("stale"), new_job("stale", queue="r"))
    bad = good._replace(token=good.token._replace(number=9), follow_ups=strangers)
    assert rig.do(broker.settle([bad])) == [STALE]
    assert rig.do(broker.settle([good._replace(verb="hold")])) == [SETTLED]
    assert stats(rig, broker) == (0, 0, 1, 0)
    assert rig.do(broker.settle([bad, good, good, bad])) == [STALE, SETTLED, STALE, STALE]
    assert rig.do(broker.settle([good])) == [STALE]
    assert run_all(rig, broker, "q") == ["same"]
    assert run_all(rig, broker) == ["other"]


def test_an_ack_whose_reply_is_lost_adds_what_follows_once(rig: RedisRig, proxy: Proxy) -> None:
    broker = rig.broker(queues=("q", "r"))
    settlement = ack(rig, broker, new_job("same"), new_job("other", queue="r"))
    proxy.on_cut = lambda: rig.server.command("DEL", "kq:{q}:ready:inline", "kq:{q}:job:same")  # it has run, and is gone
    proxy.cut()
    assert rig.do(broker.settle([settlement])) == [SETTLED]
    assert proxy.cuts == 1
    assert (run_all(rig, broker, "q"), run_all(rig, broker)) == ([], ["other"])


def test_thousands_may_follow_one_job(rig: RedisRig) -> None:
    broker = rig.broker(queues=("q", "r"))
    jobs = [new_job(f"{n:05}", queue="qr"[n % 2], at=1.0) for n in range(10_000)]
    assert rig.do(broker.settle([ack(rig, broker, *jobs)])) == [SETTLED]
    assert run_all(rig, broker, "q") == [job.id for job in jobs[::2]]
    assert run_all(rig, broker) == [job.id for job in jobs[1::2]]
    assert rig.server.command("EXISTS", OUTBOX) == 0


def test_many_acks_with_large_follow_ups_go_in_parts(rig: RedisRig) -> None:
    broker = rig.broker(queues=("q", "r"))
    rig.do(broker.enqueue([new_job(f"{n}") for n in range(20)]))
    batch = [
        Settlement(lease.token, "q", "ack", follow_ups=(new_job(f"f{n:02}", queue="r", envelope=bytes([n]) * (1 << 20), at=1.0),))
        for n, lease in enumerate(reserve(rig, broker, 20))
    ]
    assert max(len(parts[0][1]) for parts in commands.settle_parts(batch)) == 8
    assert rig.do(broker.settle(batch)) == [SETTLED] * 20
    found = [lease for _ in range(5) for lease in rig.do(broker.reserve("r", {"inline": 20})).leases]
    assert [lease.envelope for lease in found] == [bytes([n]) * (1 << 20) for n in range(20)]


def test_a_full_redis_still_takes_what_follows_an_ack(rig: RedisRig) -> None:
    broker = rig.broker(queues=("q", "r"))
    settlement = ack(rig, broker, new_job("same"), new_job("other", queue="r"))
    rig.server.command("CONFIG", "SET", "maxmemory", 1)
    try:
        assert rig.do(broker.settle([settlement])) == [SETTLED]
        assert (run_all(rig, broker, "q"), run_all(rig, broker)) == (["same"], ["other"])
    finally:
        rig.server.command("CONFIG", "SET", "maxmemory", 0)
    assert rig.news == []


# -- another queue ----------------------------------------------------------------------------------------------------


class Died(BaseException):
    """Of a process: nobody hears of it."""


def die(broker: Any, step: int, when: str) -> list[str]:
    """Let `broker` die at its request number `step`, "before" or "after" Redis has done it. What it asked, by its end."""
    asked: list[str] = []
    real = broker._ask

    def ask(requests: Any, **how: Any) -> Any:
        asked.append(str(requests[-1][0]))
        if len(asked) == step and when == "before":
            raise Died
        replies = yield from real(requests, **how)
        if len(asked) == step:
            raise Died
        return replies

    broker._ask = ask
    return asked


STEPS = ["settle", "outbox", "hand_over", "SADD", "HDEL", "EXPIRE"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(1, len(STEPS) + 1), ids=STEPS)
@pytest.mark.parametrize("meanwhile", [True, False], ids=["it runs meanwhile", "it waits"])
def test_a_job_follows_into_another_queue_exactly_once_whenever_the_daemon_dies(
    rig: RedisRig, step: int, when: str, meanwhile: bool
) -> None:
    first, other = rig.broker(identity="host"), rig.broker(queues=("q", "r"))
    settlement = ack(rig, first, new_job("next", queue="r", priority=7))
    asked = die(first, step, when)
    with pytest.raises(Died):
        rig.do(first.settle([settlement]))
    assert asked == STEPS[:step]
    del first._ask
    ran = run_all(rig, other) if meanwhile else []
    second = rig.broker(identity="host", unsettled=[settlement])
    assert second.answers == [SETTLED if (step, when) == (1, "before") else STALE]
    for broker in (second, other, second):
        rig.do(broker.sweep())
        ran += run_all(rig, other)
    assert ran == ["next"]
    assert rig.server.command("HLEN", OUTBOX) == 0
    assert stats(rig, other) == (0, 0, 0, 0)


@pytest.mark.parametrize("what", ["reply", "request"])
@pytest.mark.parametrize("step", range(1, len(STEPS) + 1), ids=STEPS)
def test_a_job_follows_into_another_queue_exactly_once_whenever_the_connection_is_lost(
    rig: RedisRig, proxy: Proxy, step: int, what: str
) -> None:
    broker = rig.broker()
    rig.broker(queues=("r",))
    settlement = ack(rig, broker, new_job("next", queue="r"))
    real, asked = broker._ask, []  # none of them is asked again, but for the ack

    def ask(requests: Any, **how: Any) -> Any:
        asked.append(requests[-1][0])
        if len(asked) == step:
            proxy.cut(what)
        return (yield from real(requests, **how))

    broker._ask = ask
    assert rig.do(broker.settle([settlement])) == [SETTLED], "the ack is what counts"
    assert proxy.cuts == 1
    ran = run_all(rig, broker)
    rig.do(broker.sweep())
    assert ran + run_all(rig, broker) == ["next"]
    rig.do(broker.sweep())
    assert run_all(rig, broker) == []


def test_outboxes_that_never_end_do_not_keep_a_sweep(rig: RedisRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a settlement; and each outbox has its turn."""

    class Ahead(Clock):
        s = 0.0

        def monotonic(self) -> float:
            return super().monotonic() + self.s

    broker = rig.broker(queues=("q", "r"), lease_s=15.0)
    clock = rig.kernel.clock = Ahead()
    turns: list[str] = []

    def empty(queue: str) -> Iterator[Any]:
        yield from ()
        turns.append(queue)
        clock.s += 1
        return True

    monkeypatch.setattr(broker, "_empty", empty)
    rig.do(broker.sweep())
    assert turns == ["q", "r"] * 3, "a third of a lease, and what was begun in it"
    turns.clear()
    assert rig.do(broker.settle([ack(rig, broker, new_job("second", queue="r"))])) == [SETTLED]
    assert turns == ["q"] * 5


def test_two_who_hand_over_at_once_do_it_once(rig: RedisRig) -> None:
    one, two = (rig.broker(queues=("q", "r")) for _ in range(2))
    jobs = [new_job(f"{n:04}", queue="r", at=1.0) for n in range(1200)]
    settlement = ack(rig, one, *jobs)
    die(one, 2, "before")
    with pytest.raises(Died):
        rig.do(one.settle([settlement]))
    del one._ask
    ran: list[str] = []

    def work(broker: Any) -> Iterator[Any]:
        """Sweep, and run what comes, as fast as it comes."""
        while len(ran) < len(jobs):
            yield from broker.sweep()
            leases = (yield from broker.reserve("r", {"inline": 100})).leases
            yield from broker.settle([Settlement(lease.token, "r", "ack") for lease in leases])
            ran.extend(ids(leases))

    tasks = [rig.kernel.spawn(work(broker)) for broker in (one, two)]
    rig.until(lambda: all(task.ended for task in tasks))
    assert sorted(ran) == [job.id for job in jobs]
    assert stats(rig, one) == (0, 0, 0, 0)


def test_who_read_the_outbox_long_ago_hands_nothing_over(rig: RedisRig) -> None:
    """It may have been handed over since, have run, and the mark be gone."""
    broker = rig.broker(queues=("q", "r"))
    settlement = ack(rig, broker, new_job("next", queue="r"))
    die(broker, 2, "before")
    with pytest.raises(Died):
        rig.do(broker.settle([settlement]))
    del broker._ask
    (reply,) = rig.do(broker._ask([commands.outbox("q")]))
    read_at, jobs, more = commands.read_outbox("q", reply)
    assert [(job.queue, job.fields[0], more) for job in jobs] == [("r", b"next", False)]
    rig.do(broker.sweep())
    marks: Any = rig.server.command("KEYS", "kq:{r}:handed:*")
    assert HAND_OVER_WITHIN_S < rig.server.command("TTL", marks[0]) <= 2 * HAND_OVER_WITHIN_S  # type: ignore[operator]
    assert run_all(rig, broker) == ["next"]
    assert rig.do(broker._ask([commands.hand_over("r", read_at, jobs)])) == [1]
    assert run_all(rig, broker) == [], "it was done before"
    rig.server.command("DEL", marks[0])
    long_ago = str(float(read_at) - HAND_OVER_WITHIN_S).encode()
    assert rig.do(broker._ask([commands.hand_over("r", long_ago, jobs)])) == [0]
    assert run_all(rig, broker) == []


def test_one_id_may_follow_twice_when_the_first_has_run(rig: RedisRig) -> None:
    """An id that its caller chose is free again when its job is gone; the marks are of the handing over, not of the id."""
    broker = rig.broker(queues=("q", "r"))
    for _ in range(3):
        assert rig.do(broker.settle([ack(rig, broker, new_job("report", queue="r"))])) == [SETTLED]
        assert run_all(rig, broker) == ["report"]


def test_a_job_that_exists_there_is_not_added_and_what_follows_is_due_when_it_was_to_be(rig: RedisRig) -> None:
    broker, client = rig.broker(queues=("q", "r")), rig.make_client()
    client.enqueue([new_job("exists", queue="r", envelope=b"old")])
    jobs = [new_job("exists", queue="r"), new_job("soon", queue="r", delay_s=0.3), new_job("at", queue="r", at=2e9)]
    settlement = ack(rig, broker, *jobs)
    die(broker, 2, "before")
    with pytest.raises(Died):
        rig.do(broker.settle([settlement]))
    del broker._ask
    rig.elapse(0.35)
    rig.do(broker.sweep())
    assert client.show("exists", "r").envelope == b"old"
    assert client.show("soon", "r").state == "ready", "its time began with the ack"
    assert (client.show("at", "r").state, client.show("at", "r").available_at) == ("delayed", 2e9)


def test_the_other_queue_s_bell_rings_and_clients_find_the_queue(rig: RedisRig) -> None:
    broker, idle = rig.broker(), rig.broker(queues=("new",))
    assert rig.do(idle.reserve("new", {"inline": 1})).leases == []
    rig.server.command("SREM", "kq:queues", "new")
    assert rig.do(broker.settle([ack(rig, broker, new_job("next", queue="new"))])) == [SETTLED]
    assert rig.do(idle.wait(10.0)) is True
    assert rig.make_client().show("next").state == "ready"


def test_a_queue_that_may_not_be_written_to_does_not_hold_up_the_ack(rig: RedisRig) -> None:
    rig.server.command("ACL", "SETUSER", "one", "on", ">pw", "&*", "~kq:{q}:*", "~kq:{s}:*", "~kq:queues", "+@all")
    try:
        reader, url = rig.broker(queues=("r", "s")), rig.url
        rig.url = rig.server.url_for("one", "pw")
        broker = rig.broker()
        rig.url = url
        settlement = ack(rig, broker, new_job("next", queue="r"), new_job("other", queue="s"))
        assert rig.do(broker.settle([settlement])) == [SETTLED]
        for _ in range(3):
            rig.do(broker.sweep())
        assert (run_all(rig, reader), run_all(rig, reader, "s")) == ([], ["other"])
        ((kind, text, _),) = rig.news
        assert (kind, "NOPERM" in text) == ("warning", True), "and is told once"
        rig.server.command("ACL", "SETUSER", "one", "~kq:{r}:*")
        rig.do(broker.sweep())
        assert run_all(rig, reader) == ["next"]
    finally:
        rig.server.command("ACL", "DELUSER", "one")


def test_what_stands_in_the_outbox_and_is_no_job_comes_to_where_it_is_buried(rig: RedisRig) -> None:
    broker = rig.broker(queues=("q", "r"))
    packed = b"\x96\xa1r\xa3bad\xa6inline\xa1x\xa3now\xa1e"  # six texts, but no numbers
    rig.server.commands([("HSET", OUTBOX, "junk", b"\xc1\xff", "number", b"\x05", "list", b"\x91\xa1r", "odd", packed)])
    settlement = ack(rig, broker, new_job("good", queue="r"))
    assert rig.do(broker.settle([settlement])) == [SETTLED]
    found = {lease.token.id: lease.envelope for lease in reserve(rig, broker)}
    assert found == {"junk": b"\xc1\xff", "number": b"\x05", "list": b"\x91\xa1r"}
    assert sorted(run_all(rig, broker)) == ["bad", "good"]
    assert rig.server.command("EXISTS", OUTBOX) == 0


@pytest.mark.parametrize("key", ["kq:{r}:ready:inline", "kq:{r}:delayed", "kq:queues", OUTBOX])
def test_a_wrong_type_on_the_way_is_put_out_of_it(rig: RedisRig, key: str) -> None:
    broker, reader = rig.broker(), rig.broker(queues=("r",))
    settlement = ack(rig, broker, new_job("next", queue="r"))
    rig.server.command("SET", key, "x")
    assert rig.do(broker.settle([settlement])) == [SETTLED]
    rig.do(broker.sweep())
    assert run_all(rig, reader) == ["next"]
    assert [kind for kind, _, _ in rig.news] == ["warning"]


def test_a_plain_ack_asks_for_nothing_more(rig: RedisRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a"), new_job("b")]))
    a, b = reserve(rig, broker)
    asked = die(broker, 99, "after")
    assert settle(rig, broker, [a], "ack") == [SETTLED]
    follows = Settlement(b.token, "q", "ack", follow_ups=(new_job("c"),))
    assert rig.do(broker.settle([follows])) == [SETTLED]
    assert asked == ["settle", "settle"]
