"""What every broker promises. One suite, all brokers (see RIGS in conftest)."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kqueue.brokers.base import SETTLED, STALE, Counters, Lease, QueueStats, Retention, Settlement
from kqueue.errors import QueueFull

from .conftest import new_job


def reserve(rig: Any, broker: Any, queue: str = "q", **wants: int) -> list[Lease]:
    leases: list[Lease] = rig.do(broker.reserve(queue, wants or {"inline": 10, "isolated": 10})).leases
    return leases


def settle(rig: Any, broker: Any, lease: Lease, verb: str, **how: Any) -> str:
    how.setdefault("counters", lease.counters)
    (answer,) = rig.do(broker.settle([Settlement(lease.token, lease.queue, verb, **how)]))
    return str(answer)


# -- enqueue ----------------------------------------------------------------------------------------------------------


def test_a_job_comes_back_as_the_very_bytes_that_were_enqueued(rig: Any) -> None:
    broker = rig.broker()
    envelope = bytes(range(256)) * 3
    assert rig.do(broker.enqueue([new_job("a", envelope=envelope)])) == [True]
    (lease,) = reserve(rig, broker)
    assert (lease.envelope, lease.lane, lease.queue, lease.token.id) == (envelope, "inline", "q", "a")
    assert lease.counters == Counters()


def test_enqueue_is_idempotent_by_id(rig: Any) -> None:
    broker = rig.broker()
    assert rig.do(broker.enqueue([new_job("a"), new_job("b")])) == [True, True]
    assert rig.do(broker.enqueue([new_job("b"), new_job("c"), new_job("c")])) == [False, True, False]
    assert sorted(lease.token.id for lease in reserve(rig, broker)) == ["a", "b", "c"]


def test_a_client_and_the_daemon_enqueue_the_same_way(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    assert client.enqueue([new_job("a", priority=3)]) == [True]
    assert client.enqueue([new_job("a")]) == [False]
    assert [lease.token.id for lease in reserve(rig, broker)] == ["a"]


def test_a_full_queue_refuses_the_whole_batch(rig: Any) -> None:
    client = rig.make_client()
    client.enqueue([new_job("a"), new_job("b", delay_s=100)], max_depth=3)
    with pytest.raises(QueueFull, match=r"'q'.*3"):
        client.enqueue([new_job("c"), new_job("d")], max_depth=3)
    assert client.enqueue([new_job("c")], max_depth=3) == [True]
    assert client.enqueue([new_job("z", queue="other")], max_depth=3) == [True], "depth counts per queue"


# -- order ------------------------------------------------------------------------------------------------------------


def test_jobs_of_one_priority_run_in_the_order_of_their_ids(rig: Any) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job(id, at=1000.0) for id in ("c", "a", "b")]))
    assert [lease.token.id for lease in reserve(rig, broker)] == ["a", "b", "c"]


def test_priority_is_a_head_start_so_nothing_starves(rig: Any) -> None:
    broker = rig.broker()
    hour = 3600.0
    rig.do(
        broker.enqueue(
            [
                new_job("plain", at=100 * hour),
                new_job("urgent", at=102 * hour, priority=3),
                new_job("urgent-too-late", at=104 * hour, priority=3),
                new_job("low", at=99.5 * hour, priority=-2),
            ]
        )
    )
    assert [lease.token.id for lease in reserve(rig, broker)] == ["urgent", "plain", "urgent-too-late", "low"]


def test_lanes_and_limits_are_apart(rig: Any) -> None:
    broker = rig.broker()
    jobs = [new_job(f"i{n}", at=1.0) for n in range(4)] + [new_job(f"x{n}", lane="isolated", at=1.0) for n in range(4)]
    rig.do(broker.enqueue(jobs))
    assert [lease.token.id for lease in reserve(rig, broker, inline=0, isolated=2)] == ["x0", "x1"]
    assert [lease.token.id for lease in reserve(rig, broker, inline=3, isolated=1)] == ["i0", "i1", "i2", "x2"]
    assert reserve(rig, broker, inline=0, isolated=0) == []


def test_queues_are_apart(rig: Any) -> None:
    broker = rig.broker(queues=("q", "mail"))
    rig.do(broker.enqueue([new_job("a"), new_job("b", queue="mail")]))
    assert [lease.token.id for lease in reserve(rig, broker, "mail")] == ["b"]
    assert [lease.token.id for lease in reserve(rig, broker, "q")] == ["a"]


def test_a_reserved_job_is_not_reserved_again(rig: Any) -> None:
    one, two = rig.broker(), rig.broker()
    rig.do(one.enqueue([new_job() for _ in range(20)]))
    ids = [lease.token.id for broker in (one, two, one) for lease in reserve(rig, broker, inline=9)]
    assert len(ids) == len(set(ids)) == 20


# -- delays -----------------------------------------------------------------------------------------------------------


def test_a_delayed_job_waits_and_says_how_long(rig: Any) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("later", delay_s=100), new_job("soon", delay_s=0.3)]))
    reserved = rig.do(broker.reserve("q", {"inline": 5}))
    assert reserved.leases == []
    assert 0 < reserved.next_due_s <= 0.3
    rig.elapse(0.35)
    reserved = rig.do(broker.reserve("q", {"inline": 5}))
    assert [lease.token.id for lease in reserved.leases] == ["soon"]
    assert 90 < reserved.next_due_s <= 100
    assert rig.do(broker.stats())["q"]._asdict() == {"ready": 0, "delayed": 1, "leased": 1, "dead": 0}


def test_nothing_delayed_means_nothing_due(rig: Any) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job()]))
    assert rig.do(broker.reserve("q", {"inline": 5})).next_due_s is None


# -- settling ---------------------------------------------------------------------------------------------------------


def test_ack_ends_a_job(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = reserve(rig, broker)
    assert settle(rig, broker, lease, "ack") == SETTLED
    assert client.show("a", "q") is None
    assert sum(rig.do(broker.stats()).get("q", ())) == 0


def test_a_kept_result_stays_for_its_time(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = reserve(rig, broker)
    assert settle(rig, broker, lease, "ack", result=b"[1]", keep_s=0.3, certificate=b'{"cause":"ok"}') == SETTLED
    row = client.show("a", "q")
    assert (row.state, row.result, row.certificates) == ("done", b"[1]", (b'{"cause":"ok"}',))
    rig.elapse(0.35)
    rig.do(broker.sweep())
    assert client.show("a", "q") is None


def test_release_with_a_delay_keeps_counters_and_certificates(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("a", priority=2)]))
    (lease,) = reserve(rig, broker)
    counters = Counters(attempts=1, crashes=2, recoveries=3, deferrals=4)
    assert settle(rig, broker, lease, "release", delay_s=0.3, counters=counters, certificate=b"{}") == SETTLED
    row = client.show("a", "q")
    assert (row.state, row.counters, row.certificates, row.priority) == ("delayed", counters, (b"{}",), 2)
    assert reserve(rig, broker) == []
    rig.elapse(0.35)
    (again,) = reserve(rig, broker)
    assert again.counters == counters
    assert again.envelope == lease.envelope
    assert again.token.number > lease.token.number


def test_release_without_a_delay_keeps_its_place(rig: Any) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a", at=10.0), new_job("b", at=20.0)]))
    (lease,) = reserve(rig, broker, inline=1)
    settle(rig, broker, lease, "release")
    assert [lease.token.id for lease in reserve(rig, broker)] == ["a", "b"]


def test_release_into_the_other_lane(rig: Any) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = reserve(rig, broker)
    settle(rig, broker, lease, "release", lane="isolated")
    assert reserve(rig, broker, inline=5) == []
    (again,) = reserve(rig, broker, isolated=5)
    assert (again.lane, again.counters) == ("isolated", Counters())


def test_bury_keeps_the_job_and_its_last_ten_certificates(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("a")]))
    for n in range(12):
        (lease,) = reserve(rig, broker)
        verb = "bury" if n == 11 else "release"
        assert settle(rig, broker, lease, verb, certificate=b"%d" % n, counters=Counters(attempts=n + 1)) == SETTLED
    row = client.show("a", "q")
    assert (row.state, row.counters.attempts) == ("dead", 12)
    assert row.certificates == tuple(b"%d" % n for n in range(2, 12))
    assert reserve(rig, broker) == []
    assert rig.do(broker.stats())["q"].dead == 1


@pytest.mark.parametrize("verb", ["ack", "release", "bury"])
@pytest.mark.parametrize("then", ["ack", "release", "bury"])
def test_a_token_settles_once(rig: Any, verb: str, then: str) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = reserve(rig, broker)
    assert settle(rig, broker, lease, verb, keep_s=60) == SETTLED
    before = client.show("a", "q")
    assert settle(rig, broker, lease, then, certificate=b"late", counters=Counters(attempts=9)) == STALE
    assert client.show("a", "q") == before


def test_a_token_of_an_earlier_reservation_changes_nothing(rig: Any) -> None:
    one, two = rig.broker(), rig.broker()
    rig.do(one.enqueue([new_job("a")]))
    (old,) = reserve(rig, one)
    settle(rig, one, old, "release")
    (new,) = reserve(rig, two)
    assert settle(rig, one, old, "ack") == STALE
    assert settle(rig, two, new, "ack") == SETTLED


def test_a_batch_is_answered_in_order(rig: Any) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job(id, at=1.0) for id in "abc"]))
    a, b, c = reserve(rig, broker)
    settle(rig, broker, b, "ack")
    batch = [Settlement(lease.token, "q", "ack") for lease in (a, b, c)]
    assert rig.do(broker.settle(batch)) == [SETTLED, STALE, SETTLED]
    assert rig.do(broker.settle([])) == []


def test_more_than_one_batch_of_everything(rig: Any) -> None:
    broker = rig.broker()
    assert all(rig.do(broker.enqueue([new_job() for _ in range(1201)])))
    leases = reserve(rig, broker, inline=2000)
    while more := reserve(rig, broker, inline=2000):
        leases += more
    assert len({lease.token.id for lease in leases}) == 1201
    assert set(rig.do(broker.settle([Settlement(lease.token, "q", "ack") for lease in leases]))) == {SETTLED}


# -- epochs -----------------------------------------------------------------------------------------------------------


def test_an_expired_epoch_s_jobs_are_ready_again(rig: Any) -> None:
    dead, alive = rig.broker(lease_s=0.4), rig.broker(lease_s=30)
    rig.do(dead.enqueue([new_job("a")]))
    (old,) = reserve(rig, dead)
    assert rig.do(alive.sweep()).recovered == {}
    rig.elapse(0.5)
    assert rig.do(alive.sweep()).recovered == {"q": 1}
    (new,) = reserve(rig, alive)
    assert new.counters == Counters(recoveries=1)
    assert settle(rig, dead, old, "ack") == STALE
    assert settle(rig, alive, new, "ack") == SETTLED


def test_expiry_makes_a_job_eligible_and_no_more(rig: Any) -> None:
    slow, other = rig.broker(lease_s=0.3), rig.broker(lease_s=30)
    rig.do(slow.enqueue([new_job("a")]))
    (lease,) = reserve(rig, slow)
    rig.elapse(0.4)
    assert rig.do(other.sweep()).recovered == {"q": 1}
    assert settle(rig, slow, lease, "ack") == SETTLED, "nobody has reserved it since"
    assert reserve(rig, other) == []


@pytest.mark.parametrize("verb", ["ack", "release", "bury"])
def test_a_token_that_settles_after_its_expiry_settles_once(rig: Any, verb: str) -> None:
    slow, other, client = rig.broker(lease_s=0.3), rig.broker(lease_s=30), rig.make_client()
    rig.do(slow.enqueue([new_job("a")]))
    (lease,) = reserve(rig, slow)
    rig.elapse(0.4)
    rig.do(other.sweep())
    assert settle(rig, slow, lease, verb, keep_s=60) == SETTLED
    before = client.show("a", "q")
    assert settle(rig, slow, lease, "ack") == STALE
    assert client.show("a", "q") == before


def test_a_token_is_stale_once_its_recovered_job_was_cancelled(rig: Any) -> None:
    slow, other, client = rig.broker(lease_s=0.3), rig.broker(lease_s=30), rig.make_client()
    rig.do(slow.enqueue([new_job("a")]))
    (lease,) = reserve(rig, slow)
    rig.elapse(0.4)
    rig.do(other.sweep())
    assert client.cancel("a", b"{}", "q") is True
    assert settle(rig, slow, lease, "ack") == STALE
    assert client.show("a", "q").state == "dead"


def test_renewal_keeps_everything_the_epoch_holds(rig: Any) -> None:
    broker, other = rig.broker(lease_s=0.5), rig.broker(lease_s=30)
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = reserve(rig, broker)
    for _ in range(3):
        rig.elapse(0.3)
        rig.do(broker.renew())
        assert rig.do(other.sweep()).recovered == {}
    assert settle(rig, broker, lease, "ack") == SETTLED


def test_an_epoch_that_expired_and_reserves_again_is_an_owner_again(rig: Any) -> None:
    broker, other = rig.broker(lease_s=0.3), rig.broker(lease_s=30)
    rig.elapse(0.4)
    rig.do(other.sweep())
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = reserve(rig, broker)
    assert rig.do(other.sweep()).recovered == {}
    rig.elapse(0.4)
    assert rig.do(other.sweep()).recovered == {"q": 1}, "and can die again"
    assert lease.token.id == "a"


def test_the_next_epoch_of_one_identity_recovers_at_once(rig: Any) -> None:
    first = rig.broker(identity="boot:8:42")
    rig.do(first.enqueue([new_job("a"), new_job("b")]))
    assert len(reserve(rig, first)) == 2
    stranger = rig.broker(identity="boot:8:43")
    assert sum(stranger.recovered.values()) == 0
    second = rig.broker(identity="boot:8:42")
    assert second.recovered == {"q": 2}
    assert [lease.counters.recoveries for lease in reserve(rig, second)] == [1, 1]


def test_without_an_identity_nothing_is_recovered_at_once(rig: Any) -> None:
    first = rig.broker()
    rig.do(first.enqueue([new_job("a")]))
    reserve(rig, first)
    assert sum(rig.broker().recovered.values()) == 0


def test_closing_gives_up_what_is_held(rig: Any) -> None:
    broker, other = rig.broker(), rig.broker()
    rig.do(broker.enqueue([new_job("a")]))
    reserve(rig, broker)
    rig.do(broker.close())
    rig.opened.remove(broker)
    rig.elapse(0.01)
    assert rig.do(other.sweep()).recovered == {"q": 1}


def test_an_epoch_whose_outcomes_are_kept_is_not_given_up(rig: Any) -> None:
    """Or another would run at once what its next life is about to settle."""
    broker, other = rig.broker(identity="host:main"), rig.broker()
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = reserve(rig, broker)
    rig.do(broker.close(give_up=False))
    rig.opened.remove(broker)
    rig.elapse(0.01)
    assert rig.do(other.sweep()).recovered == {}
    next_life = rig.broker(identity="host:main", unsettled=[Settlement(lease.token, "q", "ack", lease.counters)])
    assert (next_life.answers, next_life.recovered) == ([SETTLED], {})


# -- holding ----------------------------------------------------------------------------------------------------------


def test_to_hold_a_lease_that_is_ours_changes_nothing(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = reserve(rig, broker)
    before = client.show("a", "q")
    for _ in range(2):
        assert settle(rig, broker, lease, "hold", counters=Counters(9), certificate=b"{}", delay_s=5.0) == SETTLED
    assert client.show("a", "q") == before
    assert settle(rig, broker, lease, "ack") == SETTLED
    assert settle(rig, broker, lease, "hold") == STALE


def test_to_hold_takes_back_what_was_recovered_and_not_reserved_since(rig: Any) -> None:
    slow, other, client = rig.broker(lease_s=0.4), rig.broker(lease_s=30), rig.make_client()
    rig.do(slow.enqueue([new_job("a"), new_job("b")]))
    a, b = reserve(rig, slow)
    rig.elapse(0.5)
    assert rig.do(other.sweep()).recovered == {"q": 2}
    (again,) = reserve(rig, other, inline=1)
    assert again.token.id == "a"
    assert rig.do(slow.renew()) is False
    assert rig.do(slow.settle([Settlement(lease.token, "q", "hold") for lease in (a, b)])) == [STALE, SETTLED]
    row = client.show("b", "q")
    assert (row.state, row.counters) == ("leased", Counters(recoveries=1))
    assert reserve(rig, other) == []
    assert rig.do(other.sweep()).recovered == {}
    assert rig.do(other.stats())["q"]._asdict() == {"ready": 0, "delayed": 0, "leased": 2, "dead": 0}
    assert [settle(rig, slow, lease, "ack") for lease in (a, b)] == [STALE, SETTLED]
    assert settle(rig, other, again, "ack") == SETTLED


def test_what_is_held_is_recovered_again_when_its_owner_dies(rig: Any) -> None:
    """Even when nobody knows the owner any more: `hold` without a renewal before it."""
    slow, other = rig.broker(lease_s=0.4), rig.broker(lease_s=30)
    rig.do(slow.enqueue([new_job("a")]))
    (lease,) = reserve(rig, slow)
    rig.elapse(0.5)
    assert rig.do(other.sweep()).recovered == {"q": 1}
    assert settle(rig, slow, lease, "hold") == SETTLED
    rig.elapse(0.5)
    assert rig.do(other.sweep()).recovered == {"q": 1}
    (again,) = reserve(rig, other)
    assert again.counters == Counters(recoveries=2)
    assert settle(rig, slow, lease, "hold") == STALE


def test_a_dead_job_is_nobody_s_to_hold(rig: Any) -> None:
    slow, other, client = rig.broker(lease_s=0.4), rig.broker(lease_s=30), rig.make_client()
    rig.do(slow.enqueue([new_job("a")]))
    (lease,) = reserve(rig, slow)
    rig.elapse(0.5)
    rig.do(other.sweep())
    assert client.cancel("a", b"{}", "q") is True
    assert settle(rig, slow, lease, "hold") == STALE
    assert client.show("a", "q").state == "dead"


# -- what an earlier life left ------------------------------------------------------------------------------------------


def test_what_an_earlier_life_could_not_settle_is_settled_before_anything_is_recovered(rig: Any) -> None:
    first, client = rig.broker(identity="i"), rig.make_client()
    rig.do(first.enqueue([new_job(id, at=1.0) for id in "abcd"]))
    a, b, c, d = reserve(rig, first)
    assert settle(rig, first, d, "ack") == SETTLED
    outbox = [
        Settlement(a.token, "q", "ack", follow_ups=(new_job("next", at=2.0),)),
        Settlement(b.token, "q", "release", Counters(attempts=1), certificate=b"{}"),
        Settlement(d.token, "q", "ack", follow_ups=(new_job("never"),)),
    ]
    second = rig.broker(identity="i", unsettled=outbox)
    assert second.answers == [SETTLED, SETTLED, STALE]
    assert second.recovered == {"q": 1}
    assert client.show("a", "q") is client.show("never", "q") is None
    assert client.show("b", "q").counters == Counters(attempts=1)
    assert client.show("c", "q").counters == Counters(recoveries=1)
    third = rig.broker(identity="i", unsettled=outbox)
    assert (third.answers, third.recovered) == ([STALE] * 3, {})
    assert [lease.token.id for lease in reserve(rig, third)] == ["b", "c", "next"]
    assert settle(rig, third, c, "ack") == STALE


def test_an_outbox_settles_what_another_has_recovered_and_not_what_it_has_reserved(rig: Any) -> None:
    first, other, client = rig.broker(lease_s=0.4), rig.broker(lease_s=30), rig.make_client()
    rig.do(first.enqueue([new_job(id, at=1.0) for id in "ab"]))
    outbox = [Settlement(lease.token, "q", "ack") for lease in reserve(rig, first)]
    rig.elapse(0.5)
    assert rig.do(other.sweep()).recovered == {"q": 2}
    assert [lease.token.id for lease in reserve(rig, other, inline=1)] == ["a"]
    assert rig.broker(unsettled=outbox).answers == [STALE, SETTLED]
    assert client.show("a", "q").state == "leased"
    assert client.show("b", "q") is None


def test_a_long_outbox_is_settled_in_order(rig: Any) -> None:
    first = rig.broker(identity="i")
    rig.do(first.enqueue([new_job() for _ in range(1200)]))
    leases = [lease for _ in range(3) for lease in reserve(rig, first, inline=500)]
    outbox = [Settlement(lease.token, "q", "ack") for lease in leases[:1100]]
    outbox[7:7] = [outbox[3]]
    second = rig.broker(identity="i", unsettled=outbox)
    assert second.answers == [SETTLED] * 7 + [STALE] + [SETTLED] * 1093
    assert second.recovered == {"q": 100}


def test_every_recovered_run_has_its_certificate(rig: Any) -> None:
    first, client = rig.broker(identity="i"), rig.make_client()
    rig.do(first.enqueue([new_job("poison"), new_job("neighbour")]))
    for lease in reserve(rig, first):
        settle(rig, first, lease, "release", counters=Counters(2, 1, 0, 5), certificate=b"{}")
    reserve(rig, first)
    second = rig.broker(identity="i", culprit="poison", lease_s=0.4)
    reserve(rig, second)
    rig.elapse(0.5)
    other = rig.broker(lease_s=30)
    rig.do(other.sweep())
    for id, counters, ended_by in (
        ("poison", Counters(2, 2, 1, 5), ["kernel", "supervisor"]),
        ("neighbour", Counters(2, 1, 2, 5), ["supervisor", "supervisor"]),
    ):
        row = client.show(id, "q")
        assert row.counters == counters
        first_one, *lost = map(json.loads, row.certificates)
        assert first_one == {}
        assert [(each["cause"], each["attempt"], each["ended_by"]) for each in lost] == [
            ("lost", 4, ended_by[0]), ("lost", 5, ended_by[1]),
        ]  # fmt: skip
        assert lost[0]["error"]["class"] == "SupervisorLost"
        assert 0 < lost[0]["ended_at"] <= lost[1]["ended_at"]


def test_of_many_recoveries_the_last_ten_certificates_are_kept(rig: Any) -> None:
    broker, client = rig.broker(identity="i"), rig.make_client()
    rig.do(broker.enqueue([new_job("a")]))
    for _ in range(12):
        reserve(rig, broker)
        broker = rig.broker(identity="i")
    row = client.show("a", "q")
    assert row.counters == Counters(recoveries=12)
    assert [json.loads(certificate)["attempt"] for certificate in row.certificates] == list(range(3, 13))


# -- who is alive -------------------------------------------------------------------------------------------------------


def test_a_renewal_says_that_the_epoch_had_lapsed(rig: Any) -> None:
    broker, other = rig.broker(lease_s=0.6), rig.broker(lease_s=30)
    assert rig.do(broker.renew()) is True
    rig.elapse(0.7)
    assert rig.do(broker.renew()) is False
    assert rig.do(broker.renew()) is True
    rig.elapse(0.7)
    rig.do(other.sweep())
    assert rig.do(broker.renew()) is False
    assert rig.do(broker.renew()) is True


@pytest.mark.parametrize("swept", [True, False])
def test_a_reservation_does_not_hide_that_the_epoch_had_lapsed(rig: Any, swept: bool) -> None:
    broker, other = rig.broker(lease_s=0.6), rig.broker(lease_s=30)
    rig.do(other.enqueue([new_job("a", at=1.0), new_job("b", at=2.0)]))
    reserve(rig, broker, inline=1)
    rig.elapse(0.7)
    if swept:
        assert rig.do(other.sweep()).recovered == {"q": 1}
    reserve(rig, broker, inline=1)
    assert rig.do(other.sweep()).recovered == {}, "who reserves is alive"
    assert rig.do(broker.renew()) is False
    assert rig.do(broker.renew()) is True


def test_nobody_is_taken_for_dead_before_all_had_a_lease_s_time_to_renew_when_nobody_could(rig: Any) -> None:
    one, two = rig.broker(lease_s=0.8), rig.broker(lease_s=0.8)
    rig.do(one.enqueue([new_job("a")]))
    (lease,) = reserve(rig, one)
    rig.elapse(1.0)
    rounds = 0
    while not (recovered := rig.do(two.sweep()).recovered):
        rounds += 1
        assert rounds < 100, "a dead one is recovered in the end"
        rig.elapse(0.1)
    assert recovered == {"q": 1}
    assert rounds >= (1 if rig.name == "redis" else 8)  # whose time is real, and may be late
    assert settle(rig, one, lease, "ack") == SETTLED


def test_who_renews_first_after_nobody_could_does_not_harm_the_others(rig: Any) -> None:
    """All were stopped, or the host slept: the first to wake renews before it sweeps, as it always does."""
    one, two = rig.broker(lease_s=1.0), rig.broker(lease_s=1.0)
    rig.do(one.enqueue([new_job("a")]))
    (lease,) = reserve(rig, one)
    rig.elapse(1.2)
    rig.do(two.renew())
    assert rig.do(two.sweep()).recovered == {}
    rig.do(one.renew())
    assert rig.do(two.sweep()).recovered == {}
    assert settle(rig, one, lease, "hold") == SETTLED


def test_an_epoch_that_was_given_up_is_recovered_whoever_was_away(rig: Any) -> None:
    one, two = rig.broker(lease_s=0.4), rig.broker(lease_s=0.4)
    rig.do(one.enqueue([new_job("a")]))
    reserve(rig, one)
    rig.do(one.close())
    rig.opened.remove(one)
    rig.elapse(0.5)
    assert rig.do(two.sweep()).recovered == {"q": 1}


@pytest.mark.parametrize("seconds", [86400.0, -86400.0])
def test_a_wall_clock_that_jumps_expires_nobody_and_keeps_nobody_alive(rig: Any, seconds: float) -> None:
    one, two, client = rig.broker(lease_s=0.4), rig.broker(lease_s=30), rig.make_client()
    rig.do(one.enqueue([new_job("a")]))
    (lease,) = reserve(rig, one)
    rig.jump(seconds)
    assert rig.do(two.sweep()).recovered == {}
    assert rig.do(one.renew()) is True
    rig.elapse(0.5)
    assert rig.do(two.sweep()).recovered == {"q": 1}
    assert client.show("a", "q").state == ("ready" if seconds > 0 else "delayed"), "when a job is due, the wall says"
    assert settle(rig, one, lease, "hold") == SETTLED
    assert client.show("a", "q").state == "leased"
    assert rig.do(two.reserve("q", {"inline": 1})) == ([], None)


# -- retention ----------------------------------------------------------------------------------------------------------


def bury(rig: Any, broker: Any, *ids: str, queue: str = "q") -> None:
    rig.do(broker.enqueue([new_job(id, queue=queue) for id in ids]))
    leases = reserve(rig, broker, queue, inline=500)
    assert [lease.token.id for lease in leases] == sorted(ids)
    batch = [Settlement(lease.token, queue, "bury", certificate=b"{}") for lease in leases]
    assert set(rig.do(broker.settle(batch))) == {SETTLED}


def test_dead_letters_go_when_they_are_too_old(rig: Any) -> None:
    broker, client = rig.broker(queues=("q", "r"), retention=Retention(max_age_s=1.5)), rig.make_client()
    bury(rig, broker, "old")
    bury(rig, broker, "old-too", queue="r")
    rig.elapse(1.2)
    bury(rig, broker, "young")
    client.enqueue([new_job("cancelled"), new_job("waits", delay_s=60)])
    client.cancel("cancelled", b"{}", "q")
    assert rig.do(broker.sweep()) == ({}, {})
    rig.elapse(0.4)
    assert rig.do(broker.sweep()).forgotten == {"q": 1, "r": 1}
    assert {row.id for row in client.list(None, None, 9)} == {"young", "cancelled", "waits"}
    assert client.show("old", "q") is None
    assert client.show("young", "q").certificates == (b"{}",)
    assert rig.do(broker.stats())["q"].dead == 2
    rig.elapse(1.5)
    assert rig.do(broker.sweep()).forgotten == {"q": 2}
    assert [row.id for row in client.list(None, None, 9)] == ["waits"]


def test_the_oldest_dead_letters_go_when_they_are_too_many(rig: Any) -> None:
    broker, client = rig.broker(queues=("q", "r"), retention=Retention(max_count=2)), rig.make_client()
    for id in ("d", "b", "c", "a"):
        bury(rig, broker, id)
        rig.elapse(0.01)
    bury(rig, broker, "x", queue="r")
    assert rig.do(broker.sweep()).forgotten == {"q": 2}
    assert [row.id for row in client.list("dead", "q", 9)] == ["a", "c"]
    assert client.show("x", "r").state == "dead"
    assert rig.do(broker.sweep()).forgotten == {}


def test_more_than_a_batch_of_dead_letters_is_dropped(rig: Any) -> None:
    broker = rig.broker(retention=Retention(max_count=3, max_age_s=1000))
    ids = [f"{n:04}" for n in range(1105)]
    for start in range(0, len(ids), 500):
        bury(rig, broker, *ids[start : start + 500])
        rig.elapse(0.01)
    forgotten = 0
    while some := rig.do(broker.sweep()).forgotten:
        forgotten += some["q"]
    assert forgotten == 1102
    assert [row.id for row in rig.make_client().list("dead", "q", 9)] == ids[:-4:-1]


def test_dead_letters_of_queues_that_are_not_ours_are_not_ours_to_drop(rig: Any) -> None:
    other = rig.broker(queues=("r",))
    bury(rig, other, "x", "y", queue="r")
    broker = rig.broker(queues=("q",), retention=Retention(max_count=1))
    bury(rig, broker, "a", "b")
    assert rig.do(broker.sweep()).forgotten == {"q": 1}
    assert rig.do(other.sweep()).forgotten == {}, "and without a retention all are kept"
    assert {row.id for row in rig.make_client().list("dead", None, 9)} == {"b", "x", "y"}


# -- doorbells --------------------------------------------------------------------------------------------------------


def test_a_dispatch_rings_a_waiting_daemon(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    assert reserve(rig, broker) == []
    dispatch = threading.Timer(0.05, lambda: client.enqueue([new_job("a")]))
    dispatch.start()
    assert rig.do(broker.wait(10.0)) is True
    dispatch.join()
    assert [lease.token.id for lease in reserve(rig, broker)] == ["a"]


def test_a_ring_between_reserve_and_wait_is_not_missed(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    assert reserve(rig, broker) == []
    client.enqueue([new_job("a")])
    assert rig.do(broker.wait(10.0)) is True


def test_a_delayed_dispatch_rings_too_so_that_the_timer_can_be_set(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    assert reserve(rig, broker) == []
    client.enqueue([new_job("a", delay_s=50)])
    assert rig.do(broker.wait(10.0)) is True


def test_a_release_by_another_daemon_rings(rig: Any) -> None:
    one, two = rig.broker(), rig.broker()
    rig.do(one.enqueue([new_job("a")]))
    (lease,) = reserve(rig, one)
    assert reserve(rig, two) == []
    rig.do(two.wait(0.05))  # rings that are older than that look
    settle(rig, one, lease, "release")
    assert rig.do(two.wait(10.0)) is True


def test_silence_ends_by_the_timeout(rig: Any) -> None:
    broker = rig.broker()
    assert reserve(rig, broker) == []
    rig.do(broker.wait(0.02))
    assert rig.do(broker.wait(0.05)) is False


# -- looking ----------------------------------------------------------------------------------------------------------


def test_list_and_show_see_every_state(rig: Any) -> None:
    broker, client = rig.broker(queues=("q", "mail")), rig.make_client()
    rig.do(broker.enqueue([new_job("leased"), new_job("dead"), new_job("done")]))
    for lease in reserve(rig, broker):
        if lease.token.id == "dead":
            settle(rig, broker, lease, "bury", certificate=b'{"cause":"timeout"}')
        if lease.token.id == "done":
            settle(rig, broker, lease, "ack", keep_s=60, result=b"1")
    client.enqueue([new_job("ready"), new_job("delayed", delay_s=60), new_job("elsewhere", queue="mail")])
    states = {row.id: row.state for row in client.list(None, None, 100)}
    expected = {id: id for id in ("leased", "dead", "done", "ready", "delayed")} | {"elsewhere": "ready"}
    assert states == {id: state for id, state in expected.items() if id != "done"}
    assert [row.id for row in client.list("done", None, 100)] == ["done"]
    assert [row.id for row in client.list("dead", None, 100)] == ["dead"]
    assert [row.id for row in client.list("ready", "mail", 100)] == ["elsewhere"]
    assert len(client.list(None, None, 2)) == 2
    assert {id: client.show(id).state for id in expected} == expected
    assert client.show("dead", "q").certificates == (b'{"cause":"timeout"}',)
    assert client.show("nobody") is None
    assert client.stats()["q"]._asdict() == {"ready": 1, "delayed": 1, "leased": 1, "dead": 1}


def test_kept_results_do_not_hide_what_waits(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job(f"done{n}", at=float(n)) for n in range(5)]))
    for lease in reserve(rig, broker):
        settle(rig, broker, lease, "ack", keep_s=60, result=b"1")
    client.enqueue([new_job("waits")])
    assert [row.id for row in client.list(None, None, 3)] == [row.id for row in client.list(None, "q", 3)] == ["waits"]
    assert len(client.list("done", "q", 3)) == 3


def test_a_queue_that_nobody_reads_is_counted_too(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    client.enqueue([new_job(queue="mistyped"), new_job()])
    counts = rig.do(broker.stats())
    assert {name: each.ready for name, each in counts.items() if any(each)} == {"mistyped": 1, "q": 1}


def test_list_is_in_the_order_of_reservation(rig: Any) -> None:
    client = rig.make_client()
    client.enqueue([new_job("late", at=20.0), new_job("early", at=10.0), new_job("urgent", at=3600.0 * 3, priority=5)])
    assert [row.id for row in client.list("ready", "q", 10)] == ["urgent", "early", "late"]


def test_cancel_buries_what_waits_and_only_that(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("run")]))
    (lease,) = reserve(rig, broker)
    client.enqueue([new_job("wait"), new_job("later", delay_s=50)])
    assert [client.cancel(id, b'{"cause":"cancelled"}') for id in ("wait", "later", "run", "nobody", "wait")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert reserve(rig, broker) == []
    assert client.show("wait").state == client.show("later", "q").state == "dead"
    assert client.show("wait").certificates == (b'{"cause":"cancelled"}',)
    assert settle(rig, broker, lease, "ack") == SETTLED


def test_documents_reach_clients(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    assert client.documents("") == client.documents("manifest:") == {}
    rig.do(broker.publish({"manifest:q": b"old", "manifest:q2": b"\xff", "limits:q": b"{}"}))
    rig.do(broker.publish({"manifest:q": b"new"}))
    assert client.documents("manifest:") == {"manifest:q": b"new", "manifest:q2": b"\xff"}
    assert client.documents("limits:") == {"limits:q": b"{}"}
    assert len(client.documents("")) == 3


def test_daemons_read_what_daemons_and_operators_published(rig: Any) -> None:
    one, other, client = rig.broker(), rig.broker(queues=("elsewhere",)), rig.make_client()
    assert rig.do(other.documents("promoted:")) == {}
    rig.do(one.publish({"promoted:a": b"1", "promoted:é": b"\xff", "limits:q": b"{}"}))
    assert rig.do(other.documents("promoted:")) == {"promoted:a": b"1", "promoted:é": b"\xff"}
    client.publish({"promoted:a": b"null"})
    assert rig.do(other.documents("promoted:")) == client.documents("promoted:") == {"promoted:a": b"null", "promoted:é": b"\xff"}
    assert rig.do(one.documents("nothing:")) == {}


def test_brokers_of_other_queues_leave_documents_alone(rig: Any) -> None:
    for queue in ("a", "b:c", "b"):
        rig.do(rig.broker(queues=(queue,)).publish({f"manifest:{queue}": queue.encode()}))
    assert rig.make_client().documents("manifest:") == {"manifest:a": b"a", "manifest:b": b"b", "manifest:b:c": b"b:c"}


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_the_truth_after_a_random_walk(rig: Any, seed: int) -> None:
    dice = random.Random(seed)
    client = rig.make_client()
    # Leases so long that nobody but `reopen` loses any, however slow the machine is.
    brokers = [rig.broker(identity=f"i{n}", queues=("q", "r")) for n in range(2)]
    leases: list[Lease] = []
    retention = Retention(max_count=4)

    def reopen() -> None:
        n = dice.randrange(2)
        brokers[n] = rig.broker(identity=f"i{n}", queues=("q", "r"), retention=retention)

    def end(verb: str) -> None:
        if leases:
            item = leases.pop(dice.randrange(len(leases)))
            if verb == "hold" or dice.random() < 0.2:
                leases.append(item)  # to be settled twice
            follow_ups = tuple(new_job(queue=dice.choice("qr"), delay_s=dice.choice([0, 60])) for _ in range(dice.randrange(3)))
            how = {"delay_s": dice.choice([0, 60]), "keep_s": dice.choice([0, 60]), "lane": dice.choice([None, "isolated"])}
            settle(rig, dice.choice(brokers), item, verb, follow_ups=follow_ups, **how)

    def enqueue() -> None:
        ids = [None] * 4 + [lease.token.id for lease in leases[:2]]
        how = {"queue": dice.choice("qr"), "delay_s": dice.choice([0, 0, 60])}
        jobs = [new_job(dice.choice(ids), **how) for _ in range(dice.randrange(9))]
        rig.do(brokers[0].enqueue(jobs)) if dice.random() < 0.5 else client.enqueue(jobs)

    def cancel() -> None:
        waiting = client.list(dice.choice(["ready", "delayed", "dead"]), None, 20)
        for row in waiting[:2]:
            client.cancel(row.id, b"{}", row.queue)

    steps: list[Callable[[], object]] = [
        enqueue, enqueue, cancel, reopen, lambda: end("hold"),
        *(lambda verb=verb: end(verb) for verb in ("ack", "ack", "release", "bury")),  # type: ignore[misc]
        *[lambda: leases.extend(reserve(rig, dice.choice(brokers), dice.choice("qr"), inline=3, isolated=3))] * 3,
        lambda: rig.do(dice.choice(brokers).sweep()),
        lambda: rig.do(dice.choice(brokers).renew()),
    ]  # fmt: skip
    for _ in range(40):
        for _ in range(10):
            dice.choice(steps)()
        truth: dict[str, Counter[str]] = {}
        for row in client.list(None, None, 10_000):
            truth.setdefault(row.queue, Counter())[row.state] += 1
        counted = {queue: stats for queue, stats in client.stats().items() if any(stats)}
        assert counted == {queue: QueueStats(**states) for queue, states in truth.items()}
        assert {queue: stats for queue, stats in rig.do(brokers[1].stats()).items() if any(stats)} == counted


# -- garbage ----------------------------------------------------------------------------------------------------------


def test_a_corrupt_envelope_is_leased_and_can_be_buried(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.enqueue([new_job("bad"), new_job("good")]))
    rig.corrupt("bad", b"\xff\x00garbage")
    leases = {lease.token.id: lease for lease in reserve(rig, broker)}
    assert set(leases) == {"bad", "good"}
    assert leases["bad"].envelope == b"\xff\x00garbage"
    assert settle(rig, broker, leases["bad"], "bury", certificate=b"{}") == SETTLED
    assert client.show("bad", "q").state == "dead"


# -- the client's own promises ----------------------------------------------------------------------------------------


def test_a_client_serves_threads(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()

    def dispatch(thread: int) -> None:
        for n in range(25):
            client.enqueue([new_job(f"t{thread}-{n}")])

    threads = [threading.Thread(target=dispatch, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reserve(rig, broker, inline=500)) == 200


def test_follow_ups_come_with_the_ack_that_settles_and_with_no_other(rig: Any) -> None:
    """Into the job's own queue and into another, at once or later; a stale ack, and one that is repeated, adds none."""
    broker = rig.broker(queues=("q", "r"))
    rig.do(broker.enqueue([new_job("1"), new_job("2")]))
    first, second = rig.do(broker.reserve("q", {"inline": 2})).leases
    follow_ups = (new_job("3"), new_job("4", queue="r", priority=7), new_job("5", delay_s=60.0), new_job("2"))
    acks = [
        Settlement(first.token, "q", "ack", follow_ups=follow_ups),
        Settlement(second.token._replace(number=9), "q", "ack", follow_ups=(new_job("6"),)),
    ]
    assert rig.do(broker.settle(acks)) == [SETTLED, STALE]
    assert rig.do(broker.settle(acks)) == [STALE, STALE]
    kept = Settlement(second.token, "q", "ack", result=b"1", keep_s=60.0, follow_ups=(new_job("7"),))
    assert rig.do(broker.settle([kept])) == [SETTLED]
    assert [lease.token.id for lease in rig.do(broker.reserve("q", {"inline": 9})).leases] == ["3", "7"]
    assert [lease.token.id for lease in rig.do(broker.reserve("r", {"inline": 9})).leases] == ["4"]
    assert rig.do(broker.stats())["q"].delayed == 1


def test_whose_code_ran_when_its_supervisor_died_pays_with_a_crash_and_its_neighbours_with_a_recovery(rig: Any) -> None:
    first = rig.broker(identity="host:main")
    rig.do(first.enqueue([new_job("poison"), new_job("neighbour")]))
    assert len(reserve(rig, first)) == 2
    second = rig.broker(identity="host:main", culprit="poison")
    assert second.recovered == {"q": 2}
    assert {lease.token.id: lease.counters for lease in reserve(rig, second)} == {
        "poison": Counters(crashes=1), "neighbour": Counters(recoveries=1),
    }  # fmt: skip


# -- dead letters -----------------------------------------------------------------------------------------------------


def let_die(rig: Any, broker: Any, *names: str, **fields: Any) -> None:
    """Let jobs die, one after the other, each with a certificate that names it."""
    for id in names:
        rig.do(broker.enqueue([new_job(id, at=1000.0, **fields)]))
        (lease,) = reserve(rig, broker, fields.get("queue", "q"))
        how = {"counters": Counters(3, 1, 2, 4, 1), "certificate": b'{"of":"%s"}' % id.encode()}
        assert settle(rig, broker, lease, "bury", **how) == SETTLED


def walk(client: Any, queue: str, limit: int, meanwhile: Callable[[list[str]], None] = lambda ids: None) -> list[str]:
    """Every dead letter of `queue` as a command would walk them; `meanwhile` sees each page."""
    until, after, ids = client.last_dead(queue), None, []
    while until is not None and (page := client.dead(queue, after, until, limit)):
        assert len(page) <= limit
        ids += [mark.id for mark in page]
        after = page[-1]
        meanwhile([mark.id for mark in page])
    return ids


def test_a_retried_dead_letter_is_ready_as_if_it_had_never_run(rig: Any) -> None:
    broker, client = rig.broker(queues=("q", "r")), rig.make_client()
    let_die(rig, broker, "a", lane="isolated", priority=2)
    let_die(rig, broker, "b", queue="r")
    client.enqueue([new_job("waits", delay_s=100)])
    assert list(client.retry(["b", "nobody", "waits", "a"])) == [True, False, False, True]
    row = client.show("a")
    assert (row.state, row.queue, row.lane, row.priority, row.counters) == ("ready", "q", "isolated", 2, Counters())
    assert row.certificates == (b'{"of":"a"}',)
    assert row.available_at > 1000.0, "it has no head start of before"
    (lease,) = reserve(rig, broker)
    assert (lease.token.id, lease.token.number > 1, lease.counters) == ("a", True, Counters())
    assert list(client.retry(["a", "b"])) == [False, False]
    assert settle(rig, broker, lease, "ack") == SETTLED


def test_only_where_it_is_told_a_dead_letter_is_looked_for(rig: Any) -> None:
    broker, client = rig.broker(queues=("q", "r")), rig.make_client()
    let_die(rig, broker, "a")
    if rig.name == "redis":  # elsewhere ids are those of the whole store
        assert list(client.retry(["a"], "r")) == list(client.forget(["a"], "r")) == [False]
    assert list(client.retry(["a"], "q")) == [True]


def test_a_retry_rings_the_bell(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    let_die(rig, broker, "a")
    assert reserve(rig, broker) == []
    while rig.do(broker.wait(0.01)):
        pass  # rings of before
    client.retry(["a"])
    assert rig.do(broker.wait(10.0)) is True
    assert len(reserve(rig, broker)) == 1


def test_a_forgotten_dead_letter_is_gone_with_its_certificates_and_its_id_is_free(rig: Any) -> None:
    broker, client = rig.broker(), rig.make_client()
    let_die(rig, broker, "a", "b")
    client.enqueue([new_job("waits")])
    assert list(client.forget(["b", "nobody", "waits"])) == [True, False, False]
    assert client.show("b") is None
    assert [row.id for row in client.list("dead", "q", 10)] == ["a"]
    assert client.enqueue([new_job("b")]) == [True]
    assert client.show("b").certificates == ()


def test_the_last_death_is_listed_first_with_its_last_certificate(rig: Any) -> None:
    broker, client = rig.broker(queues=("q", "r")), rig.make_client()
    for id, queue in (("c", "q"), ("a", "r"), ("b", "q")):
        let_die(rig, broker, id, queue=queue, priority=5 if id == "c" else 0)
        rig.elapse(0.01)
    client.enqueue([new_job("waits")])
    rows = client.list("dead", None, 2)
    assert [(row.id, row.queue, row.certificates) for row in rows] == [("b", "q", (b'{"of":"b"}',)), ("a", "r", (b'{"of":"a"}',))]
    assert [row.id for row in client.list("dead", "q", 10)] == ["b", "c"]
    others = {row.id: row.certificates for row in client.list(None, "q", 10)}
    assert others == {"waits": (), "b": (b'{"of":"b"}',), "c": (b'{"of":"c"}',)}


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_a_walk_comes_by_every_dead_letter_once_and_ends_though_they_die_again(rig: Any, limit: int) -> None:
    broker, client = rig.broker(queues=("q", "r")), rig.make_client()
    names = [f"{number:02}" for number in range(7)]
    rig.do(broker.enqueue([new_job(id) for id in names]))
    dead = [Settlement(lease.token, "q", "bury", certificate=b"{}") for lease in reserve(rig, broker)]
    assert rig.do(broker.settle(dead[:4])) == [SETTLED] * 4  # all in one moment, where a store's clock has moments
    rig.elapse(0.01)
    assert rig.do(broker.settle(dead[4:])) == [SETTLED] * 3
    let_die(rig, broker, "elsewhere", queue="r")

    def die_again(ids: list[str]) -> None:
        assert list(client.retry(ids, "q")) == [True] * len(ids)
        rig.elapse(0.01)
        again = [Settlement(lease.token, "q", "bury", certificate=b"{}") for lease in reserve(rig, broker)]
        assert rig.do(broker.settle(again)) == [SETTLED] * len(ids)
        let_die(rig, broker, f"z{ids[0]}")

    assert sorted(walk(client, "q", limit)) == names
    assert sorted(walk(client, "q", limit, die_again)) == names
    assert walk(client, "r", limit) == ["elsewhere"]
    assert walk(client, "nowhere", limit) == []
