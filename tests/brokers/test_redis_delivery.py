"""What Redis has to do so that no job is lost: leases are held on to, lost runs are told, jobs follow, dead letters are kept."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from kqueue.brokers.base import MAX_CERTIFICATES, SETTLED, STALE, Counters, Lease, Retention, Settlement, Token

from ..servers import Proxy
from .conftest import RedisRig, new_job, only
from .test_redis import bury, ids, reserve, settle, stats

rig = only(RedisRig)


def lost_lease(rig: RedisRig, *names: str, by: Any = None) -> tuple[Any, Any, list[Lease]]:
    """A daemon whose leases expired and were recovered by another; the two, and the leases."""
    late, other = by or rig.broker(lease_s=0.2), rig.broker(lease_s=30)
    rig.do(late.enqueue([new_job(id) for id in names or ("a",)]))
    leases = reserve(rig, late)
    rig.elapse(0.25)
    assert rig.do(other.sweep()).recovered == {"q": len(leases)}
    return late, other, leases


def certificates(rig: RedisRig, id: str) -> list[dict[str, Any]]:
    return [json.loads(each) for each in rig.make_client().show(id, "q").certificates]  # type: ignore[union-attr]


# -- hold -------------------------------------------------------------------------------------------------------------


def test_to_hold_a_lease_that_is_still_ours_changes_nothing(rig: RedisRig) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("a")]))
    leases = reserve(rig, broker)
    before = client.show("a", "q"), rig.server.command("KEYS", "*")
    for _ in range(2):
        assert settle(rig, broker, leases, "hold", counters=Counters(9, 9, 9, 9, 9), certificate=b"{}") == [SETTLED]
    assert (client.show("a", "q"), rig.server.command("KEYS", "*")) == before
    assert settle(rig, broker, leases, "ack") == [SETTLED]


@pytest.mark.parametrize("lane", ["inline", "isolated"])
def test_to_hold_takes_back_what_was_recovered_and_not_yet_reserved(rig: RedisRig, lane: str) -> None:
    late, other, client = rig.broker(lease_s=0.2), rig.broker(lease_s=30), rig.make_client()
    rig.do(late.enqueue([new_job("a", lane=lane, priority=3), new_job("b", lane=lane)]))
    leases = reserve(rig, late, 1, 1)
    rig.elapse(0.25)
    rig.do(other.sweep())
    before = client.show("a", "q")
    for _ in range(2):
        assert settle(rig, late, leases, "hold") == [SETTLED]
        assert client.show("a", "q") == before._replace(state="leased")
        assert stats(rig, other) == (1, 0, 1, 0)
    assert ids(reserve(rig, other, 10, 10)) == ["b"]
    assert settle(rig, late, leases, "bury") == [SETTLED], "by the very token it had"


def test_what_was_taken_back_has_an_owner_who_can_die_again(rig: RedisRig) -> None:
    late, other, leases = lost_lease(rig)
    assert settle(rig, late, leases, "hold") == [SETTLED]
    assert rig.do(other.sweep()).recovered == {}
    rig.elapse(0.25)
    assert rig.do(other.sweep()).recovered == {"q": 1}
    assert [lease.counters for lease in reserve(rig, other)] == [Counters(recoveries=2)]


def test_it_is_too_late_to_hold_what_somebody_else_has(rig: RedisRig) -> None:
    late, other, leases = lost_lease(rig, "reserved", "cancelled", "acked", "again")
    client = rig.make_client()
    assert client.cancel("cancelled", b"{}", "q")
    mine = {lease.token.id: lease for lease in reserve(rig, other)}
    settle(rig, other, [mine["acked"]], "ack")
    settle(rig, other, [mine["again"]], "release")
    before = [client.show(id, "q") for id in ("reserved", "cancelled", "acked", "again")]
    assert settle(rig, late, leases, "hold") == [STALE] * 4
    assert [client.show(id, "q") for id in ("reserved", "cancelled", "acked", "again")] == before
    rig.server.command("FLUSHALL")
    assert settle(rig, late, leases, "hold") == [STALE] * 4
    assert rig.server.command("KEYS", "kq:{q}:*") == []


def test_hold_in_a_batch_with_others(rig: RedisRig) -> None:
    late, _, leases = lost_lease(rig, *"abcd")
    token = {lease.token.id: lease.token for lease in leases}
    batch = [
        Settlement(token["a"], "q", "hold"),
        Settlement(token["b"], "q", "hold"),
        Settlement(token["b"], "q", "release"),
        Settlement(token["b"], "q", "hold"),
        Settlement(token["c"], "q", "ack"),
        Settlement(token["d"]._replace(number=7), "q", "hold"),
    ]
    assert rig.do(late.settle(batch)) == [SETTLED, SETTLED, SETTLED, STALE, SETTLED, STALE]
    assert stats(rig, late) == (2, 0, 1, 0)
    assert sorted(ids(reserve(rig, late))) == ["b", "d"]


def test_a_hold_whose_reply_is_lost_is_answered_again(rig: RedisRig, proxy: Proxy) -> None:
    late, other, leases = lost_lease(rig)
    proxy.cut()
    assert settle(rig, late, leases, "hold") == [SETTLED]
    assert proxy.cuts == 1
    assert stats(rig, other) == (0, 0, 1, 0)


# -- renewals ---------------------------------------------------------------------------------------------------------


def test_a_renewal_says_whether_the_epoch_had_lapsed(rig: RedisRig) -> None:
    broker = rig.broker(lease_s=0.3)
    assert rig.do(broker.renew()) is True
    rig.elapse(0.35)
    assert rig.do(broker.renew()) is False
    assert rig.do(broker.renew()) is True
    rig.server.command("FLUSHALL")
    assert rig.do(broker.renew()) is False
    rig.server.command("FLUSHALL")
    assert rig.do(broker.renew()) is False
    assert rig.do(broker.renew()) is True


def test_a_renewal_knows_of_a_lapse_that_somebody_else_came_upon(rig: RedisRig) -> None:
    """Recovered by another, then registered again by the next reservation or by a hold, so that it looks alive."""
    late, other, leases = lost_lease(rig, "a", "b")
    assert settle(rig, late, leases[:1], "hold") == [SETTLED]
    assert rig.do(late.renew()) is False
    assert rig.do(late.renew()) is True
    rig.elapse(0.25)
    assert rig.do(other.sweep()).recovered == {"q": 1}
    assert len(reserve(rig, late, 1)) == 1
    assert rig.do(late.renew()) is False
    rig.elapse(0.25)  # nobody recovered it this time
    assert len(reserve(rig, late, 1)) == 1
    assert rig.do(late.renew()) is False
    assert rig.do(late.renew()) is True


def test_a_lapse_is_heard_of_though_the_reply_that_told_it_is_lost(rig: RedisRig, proxy: Proxy) -> None:
    broker = rig.broker(lease_s=0.3)
    rig.elapse(0.35)
    real, told = broker._ask, []

    def ask(asked: Any, **how: Any) -> Any:
        """Lose the reply to the renewal itself, not that to what comes before it."""
        if asked[0][0] == "renew":
            told.append(asked)
            proxy.cut()
        return (yield from real(asked, **how))

    broker._ask = ask
    assert rig.do(broker.renew()) is False
    assert (len(told), proxy.cuts) == (1, 1)


def test_a_lapse_in_one_queue_of_several_is_a_lapse(rig: RedisRig) -> None:
    broker = rig.broker(queues=("q", "r"))
    rig.do(broker.renew())
    rig.server.command("ZREM", "kq:{r}:epochs", broker._owner.epoch)
    assert rig.do(broker.renew()) is False
    assert rig.do(broker.renew()) is True


def test_nothing_is_left_of_an_epoch_that_is_gone(rig: RedisRig) -> None:
    late, other, leases = lost_lease(rig)
    settle(rig, late, leases, "hold")
    rig.elapse(0.25)
    rig.do(other.sweep())
    assert [key for key in rig.server.command("KEYS", "*") if late._owner.epoch.encode() in key] == [  # type: ignore[attr-defined]
        b"kq:{q}:settled:" + late._owner.epoch.encode()  # which expires
    ]


# -- what was lost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["open", "sweep"])
def test_every_run_that_was_lost_has_its_certificate(rig: RedisRig, how: str) -> None:
    broker = rig.broker(lease_s=0.2, identity="host")
    rig.do(broker.enqueue([new_job("a"), new_job("b")]))
    a, _ = reserve(rig, broker)
    settle(rig, broker, [a], "release", counters=Counters(attempts=2, crashes=1, recoveries=4), certificate=b'{"attempt":0}')
    reserve(rig, broker)
    before = time.time()
    if how == "open":
        rig.broker(identity="host", culprit="b")
    else:
        rig.elapse(0.25)
        rig.do(rig.broker(lease_s=30).sweep())
    earlier, of_a = certificates(rig, "a")
    assert earlier == {"attempt": 0}, "and no other was touched"
    assert (of_a["attempt"], of_a["cause"], of_a["ended_by"]) == (8, "lost", "supervisor")
    assert before - 1 < of_a["ended_at"] < time.time() + 1
    (of_b,) = certificates(rig, "b")
    assert (of_b["attempt"], of_b["ended_by"]) == (1, "kernel" if how == "open" else "supervisor")
    counters = {lease.token.id: lease.counters for lease in reserve(rig, rig.broker())}
    assert counters["a"] == Counters(2, 1, 5)
    assert counters["b"] == (Counters(crashes=1) if how == "open" else Counters(recoveries=1))


def test_the_last_certificates_are_kept_when_a_job_is_lost_again_and_again(rig: RedisRig) -> None:
    for n in range(MAX_CERTIFICATES + 2):
        broker = rig.broker(identity="host")
        if n == 0:
            rig.do(broker.enqueue([new_job("a")]))
        reserve(rig, broker)
    numbers = [each["attempt"] for each in certificates(rig, "a")]
    assert numbers == list(range(2, MAX_CERTIFICATES + 2))


@pytest.mark.parametrize(
    "damage",
    [
        ("SET", "kq:{q}:certs:a", "x"),
        ("HSET", "kq:{q}:past:a", "attempts", "many", "crashes", "-3", "recoveries", "1e300"),
        ("SET", "kq:{q}:job:a", "+"),
    ],
)
def test_a_damaged_job_is_recovered_with_a_certificate_too(rig: RedisRig, damage: tuple[str, ...]) -> None:
    broker = rig.broker(identity="host")
    rig.do(broker.enqueue([new_job("a")]))
    reserve(rig, broker)
    rig.server.command(*damage)
    assert rig.broker(identity="host").recovered == {"q": 1}
    (certificate,) = certificates(rig, "a")
    assert certificate["attempt"] in (1, 2)


# -- what an earlier life could not settle ----------------------------------------------------------------------------


def test_what_an_earlier_life_could_not_settle_is_settled_before_anything_is_recovered(rig: RedisRig) -> None:
    first = rig.broker(identity="host", queues=("q", "r"))
    rig.do(first.enqueue([new_job(id) for id in ("acked", "retried", "lost")] + [new_job("other", queue="r")]))
    lease = {each.token.id: each for each in (*reserve(rig, first), *rig.do(first.reserve("r", {"inline": 5})).leases)}
    unsettled = [
        Settlement(lease["acked"].token, "q", "ack", follow_ups=(new_job("next"),)),
        Settlement(lease["other"].token, "r", "bury", Counters(attempts=3), certificate=b'{"cause":"exception"}'),
        Settlement(lease["retried"].token, "q", "release", Counters(attempts=1), delay_s=60),
        Settlement(Token("nobody", "lost", 1), "q", "ack"),
        Settlement(lease["lost"].token._replace(number=5), "q", "ack"),
    ]
    second = rig.broker(identity="host", queues=("q", "r"), unsettled=unsettled, culprit="acked")
    assert second.answers == [SETTLED, SETTLED, SETTLED, STALE, STALE]
    assert second.recovered == {"q": 1}
    assert [(each.token.id, each.counters) for each in reserve(rig, second)] == [
        ("lost", Counters(recoveries=1)), ("next", Counters()),
    ]  # fmt: skip
    assert stats(rig, second) == (0, 1, 2, 0)
    third = rig.broker(identity="host", queues=("q", "r"), unsettled=unsettled)
    assert third.answers == [STALE] * 5, "a page that is read twice"


def test_what_was_recovered_meanwhile_is_settled_too_as_long_as_nobody_reserved_it(rig: RedisRig) -> None:
    late, other, leases = lost_lease(rig, "a", "b")
    taken = reserve(rig, other, 1)
    unsettled = [Settlement(lease.token, "q", "ack") for lease in leases]
    assert rig.broker(unsettled=unsettled).answers == [STALE, SETTLED]
    assert ids(taken) == ["a"]
    assert stats(rig, late) == (0, 0, 1, 0)


# -- who may be taken for dead ----------------------------------------------------------------------------------------


def long_connected(rig: RedisRig, broker: Any) -> None:
    for transport in broker._nodes._transports.values():
        transport.ready_at = -1e9


def test_who_has_just_connected_expires_nobody_but_recovers_what_was_given_up(rig: RedisRig) -> None:
    away, closed = rig.broker(lease_s=0.2), rig.broker()
    rig.do(away.enqueue([new_job("a"), new_job("b")]))
    assert ids(reserve(rig, away, 1)) == ["a"]
    assert ids(reserve(rig, closed, 1)) == ["b"]
    rig.do(closed.close())
    rig.opened.remove(closed)
    rig.elapse(0.25)
    sweeper = rig.broker(lease_s=20, fresh=True)
    assert rig.do(sweeper.sweep()).recovered == {"q": 1}
    assert ids(reserve(rig, sweeper)) == ["b"]
    assert rig.do(sweeper.sweep()).recovered == {}
    long_connected(rig, sweeper)
    assert rig.do(sweeper.sweep()).recovered == {"q": 1}


def test_a_sweep_that_loses_its_connection_expires_nobody_when_it_is_asked_again(rig: RedisRig, proxy: Proxy) -> None:
    sweeper, away = rig.broker(lease_s=20), rig.broker(lease_s=0.2)
    rig.do(away.enqueue([new_job("a")]))
    reserve(rig, away)
    rig.elapse(0.25)
    proxy.cut("request")
    assert rig.do(sweeper.sweep()).recovered == {}
    assert proxy.cuts == 1
    long_connected(rig, sweeper)
    assert rig.do(sweeper.sweep()).recovered == {"q": 1}


def jump(rig: RedisRig, seconds: float) -> None:
    """Put Redis' clock forward (or back): whatever it has noted is so much older (or younger)."""
    beat: Any = rig.server.command("GET", "kq:{q}:beat")
    rig.server.command("SET", "kq:{q}:beat", f"{float(beat) - seconds:.6f}")
    left: Any = rig.server.command("PTTL", "kq:{q}:hush")
    if left > 0:
        rig.server.command("PEXPIRE", "kq:{q}:hush", int(left - seconds * 1000))
    for epoch, expiry in dict(rig.server.command("ZRANGE", "kq:{q}:epochs", 0, -1, "WITHSCORES")).items():  # type: ignore[call-overload]
        if expiry > 0:
            rig.server.command("ZADD", "kq:{q}:epochs", f"{expiry - seconds:.6f}", epoch)


def test_a_clock_that_is_put_forward_expires_nobody_who_lives(rig: RedisRig) -> None:
    living, dead, sweeper = rig.broker(lease_s=1), rig.broker(lease_s=1), rig.broker(lease_s=1)
    rig.do(living.enqueue([new_job("a"), new_job("b")]))
    assert ids(reserve(rig, living, 1)) == ["a"]
    assert ids(reserve(rig, dead, 1)) == ["b"]
    for seconds in (3600, 86400):  # the second one while the first hush lasts
        jump(rig, seconds)
        assert rig.do(sweeper.sweep()).recovered == {}
        rig.do(living.renew())
    for _ in range(2):
        rig.elapse(0.4)
        assert rig.do(sweeper.sweep()).recovered == {}
        rig.do(living.renew())
    rig.elapse(0.4)
    assert rig.do(sweeper.sweep()).recovered == {"q": 1}
    assert ids(reserve(rig, sweeper)) == ["b"]


def test_a_clock_that_is_put_back_still_lets_the_dead_be_recovered(rig: RedisRig) -> None:
    living, dead, sweeper = rig.broker(lease_s=1), rig.broker(lease_s=1), rig.broker(lease_s=1)
    rig.do(living.enqueue([new_job("a"), new_job("b")]))
    assert ids(reserve(rig, living, 1)) == ["a"]
    assert ids(reserve(rig, dead, 1)) == ["b"]
    jump(rig, 60)
    rig.do(sweeper.sweep())  # so that there is a hush, whose end is far away after the next jump
    jump(rig, -7200)
    rig.do(living.renew())
    assert rig.do(sweeper.sweep()).recovered == {}
    for _ in range(2):
        rig.elapse(0.4)
        rig.do(living.renew())
        assert rig.do(sweeper.sweep()).recovered == {}
    rig.elapse(0.4)
    rig.do(living.renew())
    assert rig.do(sweeper.sweep()).recovered == {"q": 1}
    assert ids(reserve(rig, sweeper)) == ["b"]
    assert rig.do(living.renew()) is True


# -- dead letters -----------------------------------------------------------------------------------------------------


def test_old_dead_letters_are_dropped_and_counted(rig: RedisRig) -> None:
    broker, client = rig.broker(queues=("q", "r")), rig.make_client()
    bury(rig, broker, "old1", "old2")
    rig.elapse(0.3)
    bury(rig, broker, "new")
    assert rig.do(broker.sweep()).forgotten == {}, "kept for ever unless somebody says otherwise"
    keeper = rig.broker(queues=("q", "r"), retention=Retention(max_age_s=0.25))
    assert rig.do(keeper.sweep()).forgotten == {"q": 2}
    assert [row.id for row in client.list("dead", "q", 10)] == ["new"]
    assert rig.server.command("KEYS", "*old*") == []
    assert rig.do(keeper.sweep()).forgotten == {}
    rig.elapse(0.3)
    assert rig.do(keeper.sweep()).forgotten == {"q": 1}


def test_dead_letters_beyond_their_number_are_dropped_the_oldest_first(rig: RedisRig) -> None:
    broker = rig.broker()
    for id in ("z", "y", "x", "w"):
        bury(rig, broker, id)
    keeper, client = rig.broker(retention=Retention(max_count=2)), rig.make_client()
    assert rig.do(keeper.sweep()) == ({}, {"q": 2})
    assert sorted(row.id for row in client.list("dead", "q", 10)) == ["w", "x"]
    client.enqueue([new_job("ready"), new_job("later", delay_s=60)])
    assert rig.do(keeper.sweep()).forgotten == {}
    assert stats(rig, keeper) == (1, 1, 0, 2)


def test_many_dead_letters_are_dropped_batch_by_batch(rig: RedisRig) -> None:
    broker = rig.broker()
    for start in range(0, 1300, 100):
        bury(rig, broker, *(f"{n}" for n in range(start, start + 100)))
    rig.elapse(0.05)
    assert rig.do(rig.broker(retention=Retention(max_age_s=0.01, max_count=5)).sweep()).forgotten == {"q": 1300}
    assert stats(rig, broker) == (0, 0, 0, 0)
    assert rig.server.command("KEYS", "kq:{q}:job:*") == rig.server.command("KEYS", "kq:{q}:certs:*") == []
