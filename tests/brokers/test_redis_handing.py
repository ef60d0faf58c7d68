"""An idle daemon is handed the job that a client adds (decision 0023): when, when not, and what is lost on the way."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kqueue.brokers.base import SETTLED, Lease, Settlement
from kqueue.brokers.commands import redis as commands
from kqueue.errors import BrokerUnavailable, QueueFull

from ..servers import Proxy
from .conftest import ClusterRig, RedisRig, new_job, only

BOTH = {"inline": 1, "isolated": 1}

rig = only(RedisRig)


class Daemon:
    """A broker, and what is made of that which comes unasked: it is taken, unless `busy`."""

    def __init__(self, rig: RedisRig, **how: Any) -> None:
        self.rig = rig
        self.busy = False
        self.offered: list[Lease] = []
        self.taken: list[Lease] = []
        self.broker = rig.broker(take=self.take, **how)

    def take(self, lease: Lease) -> bool:
        self.offered.append(lease)
        if not self.busy:
            self.taken.append(lease)
        return not self.busy

    def reserve(self, inline: int = 1, isolated: int = 1, queue: str = "q") -> list[str]:
        reserved = self.rig.do(self.broker.reserve(queue, {"inline": inline, "isolated": isolated}))
        self.taken += reserved.leases
        return ids(reserved.leases)

    def withdraw(self) -> None:
        self.rig.do(self.broker.withdraw("q"))

    def ack(self) -> None:
        """What it took, all of it, and each for the first time."""
        batch = [Settlement(lease.token, lease.queue, "ack") for lease in self.taken]
        assert self.rig.do(self.broker.settle(batch)) == [SETTLED] * len(batch)
        self.taken.clear()

    def hears(self, count: int = 1) -> None:
        self.rig.until(lambda: len(self.offered) >= count)

    def stats(self) -> tuple[int, ...]:
        """ready, delayed, leased, dead"""
        return tuple(self.rig.do(self.broker.stats())["q"])


def ids(leases: list[Lease]) -> list[str]:
    return [lease.token.id for lease in leases]


@pytest.fixture
def idle(rig: RedisRig) -> Daemon:
    """It found nothing."""
    daemon = Daemon(rig)
    assert daemon.reserve() == []
    return daemon


@pytest.mark.parametrize("lane", ["inline", "isolated"])
def test_the_job_comes_with_the_ring(rig: RedisRig, idle: Daemon, lane: str) -> None:
    job = new_job("ä job\n1 2", lane=lane, priority=3)
    assert rig.make_client().enqueue([job]) == [True]
    assert idle.stats() == (0, 0, 1, 0)
    idle.hears()
    (lease,) = idle.taken
    assert (lease.token.id, lease.queue, lease.lane, lease.envelope) == (job.id, "q", lane, job.envelope)
    assert lease.counters.runs == 0
    assert abs(lease.available_at - time.time()) < 60
    assert rig.do(idle.broker.wait(20.0)) is True, "and it rings, since its next reservation is to make another offer"
    idle.ack()
    assert idle.stats() == (0, 0, 0, 0)
    assert rig.server.command("KEYS", "kq:{q}:job:*") == []
    assert idle.reserve() == []
    rig.make_client().enqueue([new_job("another")])
    idle.hears(2)
    idle.ack()


def test_whoever_is_busy_gets_it_by_the_next_reservation(rig: RedisRig, idle: Daemon) -> None:
    idle.busy = True
    rig.make_client().enqueue([new_job("a", lane="isolated")])
    idle.hears()
    assert rig.do(idle.broker.wait(20.0)) is True
    scripts = rig.server.command("INFO", "commandstats")["cmdstat_evalsha"]["calls"]
    assert idle.reserve() == ["a"]
    assert rig.server.command("INFO", "commandstats")["cmdstat_evalsha"]["calls"] == scripts, "nobody had to be asked"
    idle.ack()


def test_what_is_not_wanted_goes_back_at_no_cost(rig: RedisRig, idle: Daemon) -> None:
    other = Daemon(rig)
    idle.busy = True
    rig.make_client().enqueue([new_job("a")])
    idle.hears()
    assert idle.reserve(inline=0) == [], "it has come to want isolated jobs alone"
    assert other.reserve() == ["a"]
    assert other.taken[0].counters.runs == 0
    other.ack()


def test_who_withdraws_is_handed_nothing_and_gives_back_what_was(rig: RedisRig, idle: Daemon) -> None:
    client = rig.make_client()
    idle.withdraw()
    client.enqueue([new_job("a")])
    assert idle.stats() == (1, 0, 0, 0)
    assert idle.reserve(inline=2) == ["a"]
    assert idle.reserve() == []
    idle.ack()
    idle.busy = True
    client.enqueue([new_job("b")])
    assert idle.stats() == (0, 0, 1, 0)
    idle.withdraw()
    assert idle.stats() == (1, 0, 0, 0), "whether the message had come or not"
    client.enqueue([new_job("c")])
    assert idle.stats() == (2, 0, 0, 0)
    idle.withdraw()
    scripts = rig.server.command("INFO", "commandstats")["cmdstat_evalsha"]["calls"]
    idle.withdraw()
    assert rig.server.command("INFO", "commandstats")["cmdstat_evalsha"]["calls"] == scripts, "there is nothing to withdraw"


def test_who_ends_gives_back_what_came_meanwhile(rig: RedisRig, idle: Daemon) -> None:
    idle.busy = True
    rig.make_client().enqueue([new_job("a")])
    rig.do(idle.broker.close())
    other = Daemon(rig)
    assert other.reserve() == ["a"]
    assert other.taken[0].counters.runs == 0, "it was released, not recovered"


@pytest.mark.parametrize(
    "jobs",
    [
        [new_job("a"), new_job("b")],
        [new_job("later", delay_s=60)],
        [new_job("then", at=4e9)],
        [new_job("isolated", lane="isolated")],
    ],
    ids=["two", "delayed", "at", "a lane that is not wanted"],
)
def test_everything_else_is_added_and_rings(rig: RedisRig, jobs: list[Any]) -> None:
    daemon = Daemon(rig)
    assert daemon.reserve(isolated=0) == []
    assert rig.make_client().enqueue(jobs) == [True] * len(jobs)
    assert rig.do(daemon.broker.wait(20.0)) is True
    assert daemon.offered == []
    assert sum(daemon.stats()[:2]) == len(jobs)
    assert daemon.stats()[2] == 0


def test_one_that_is_there_is_not_added_again(rig: RedisRig, idle: Daemon) -> None:
    client = rig.make_client()
    assert client.enqueue([new_job("a")]) == [True]
    idle.hears()
    assert idle.reserve() == []
    assert client.enqueue([new_job("a")]) == [False]
    assert idle.stats() == (0, 0, 1, 0)
    idle.ack()


def test_each_further_job_rings_everybody(rig: RedisRig, idle: Daemon) -> None:
    """The second job must not wait for a daemon that is busy with the first."""
    other = Daemon(rig)
    assert other.reserve() == []
    client = rig.make_client()
    client.enqueue([new_job("a")])
    client.enqueue([new_job("b")])
    assert rig.do(other.broker.wait(20.0)) is True
    assert other.reserve() == ["b"]
    assert (ids(idle.offered), ids(other.offered)) == (["a"], [])


def test_an_offer_is_not_taken_away_by_another(rig: RedisRig, idle: Daemon) -> None:
    other = Daemon(rig)
    for _ in range(3):
        assert other.reserve() == []
    other.withdraw()
    rig.make_client().enqueue([new_job("a")])
    idle.hears()
    assert other.offered == []


def test_who_is_cut_off_is_handed_nothing(rig: RedisRig, proxy: Proxy) -> None:
    """So is who was killed: nobody hears the channel."""
    gone = Daemon(rig)
    rig.url = rig.server.url
    other = Daemon(rig)
    assert gone.reserve() == other.reserve() == []
    proxy.open = False
    proxy.cut_all()
    channel = commands.own_channel("q", gone.broker._owner.epoch)
    rig.until(lambda: rig.server.command("PUBSUB", "NUMSUB", channel)[1] == 0)
    rig.make_client().enqueue([new_job("a")])
    assert rig.do(other.broker.wait(20.0)) is True
    assert other.reserve() == ["a"]
    assert other.taken[0].counters.runs == 0
    proxy.open = True


@pytest.mark.parametrize("how", ["expired", "gave up", "gone"])
def test_an_epoch_that_does_not_live_is_handed_nothing(rig: RedisRig, idle: Daemon, how: str) -> None:
    epochs, epoch = "kq:{q}:epochs", idle.broker._owner.epoch
    if how == "gone":
        rig.server.command("ZREM", epochs, epoch)
    else:
        rig.server.command("ZADD", epochs, {"expired": 1_000, "gave up": 0}[how], epoch)
    rig.make_client().enqueue([new_job("a")])
    assert idle.stats()[:1] == (1,)
    assert rig.server.command("HLEN", f"kq:{{q}}:leased:{epoch}") == 0


def test_a_reservation_that_took_something_since_is_not_forgotten(rig: RedisRig, proxy: Proxy) -> None:
    """A delayed job came due: it is reserved, the reply is lost, and the old offer still stands."""
    idle = Daemon(rig)
    rig.url = rig.server.url
    client = rig.make_client()
    client.enqueue([new_job("due", delay_s=0.05)])
    assert idle.reserve() == []
    rig.elapse(0.06)
    proxy.on_cut = lambda: client.enqueue([new_job("a")])
    proxy.cut("reply")
    assert idle.reserve() == ["due"]
    assert idle.stats() == (1, 0, 1, 0)
    assert idle.reserve() == ["a"]
    idle.ack()


@pytest.mark.parametrize("came", ["before", "after"], ids=lambda came: f"{came} its message could be heard")
def test_a_message_that_is_lost_is_asked_for_again(rig: RedisRig, proxy: Proxy, came: str) -> None:
    idle = Daemon(rig)
    assert idle.reserve() == []
    rig.url = rig.server.url
    client = rig.make_client()
    if came == "before":
        proxy.mute = True
        client.enqueue([new_job("a")])
        rig.until(lambda: rig.server.command("HLEN", f"kq:{{q}}:leased:{idle.broker._owner.epoch}") == 1)
        proxy.mute = False
        proxy.cut_all()
    else:
        proxy.cut("reply")  # the message itself
        client.enqueue([new_job("a")])
    assert rig.do(idle.broker.wait(20.0)) is True
    assert idle.offered == []
    assert idle.reserve() == ["a"]
    idle.ack()


def test_a_renewal_finds_that_an_offer_was_taken_up_and_no_message_came(rig: RedisRig, idle: Daemon) -> None:
    idle.broker._own_channels.clear()  # so what comes counts for a ring of nobody's
    rig.make_client().enqueue([new_job("a")])
    rig.do(idle.broker.renew())
    assert idle.offered == []
    assert rig.do(idle.broker.wait(20.0)) is True
    assert idle.reserve() == ["a"]
    rig.do(idle.broker.renew())
    rig.do(idle.broker.wait(0.0))
    rig.do(idle.broker.renew())
    assert rig.do(idle.broker.wait(0.0)) is False, "it does not ring for ever"


def test_the_offer_of_a_reservation_whose_reply_was_lost(rig: RedisRig, proxy: Proxy) -> None:
    """It is asked again, and answered what has been handed to it since."""
    idle = Daemon(rig)
    rig.url = rig.server.url
    client = rig.make_client()
    proxy.on_cut = lambda: client.enqueue([new_job("a")])
    proxy.cut("reply")
    assert idle.reserve() == ["a"]
    assert idle.offered == []
    assert idle.reserve() == []
    client.enqueue([new_job("b")])
    idle.hears()
    idle.ack()
    assert idle.stats() == (0, 0, 0, 0)


def test_a_message_that_overtakes_the_answer_before_it(rig: RedisRig) -> None:
    """Both came at once: the message is read at once, the answer when its task has its turn."""
    idle = Daemon(rig)
    client = rig.make_client()
    request = idle.broker._requests.setdefault("q", 7)
    idle.broker._unheard.add("q")  # as while it is under way
    call = commands.reserve(idle.broker._owner, 15.0, request, "q", (1, 1))
    assert rig.do(idle.broker._ask([call]))[0][0] == b"offered"
    client.enqueue([new_job("a")])
    assert rig.do(idle.broker.wait(20.0)) is True
    assert idle.offered == [], "nobody takes what a reservation that is under way may bring as well"
    assert idle.reserve() == ["a"]
    assert idle.reserve() == []
    idle.ack()


def test_an_enqueue_whose_reply_was_lost_is_answered_as_it_was(rig: RedisRig, proxy: Proxy) -> None:
    url, rig.url = rig.url, rig.server.url
    idle = Daemon(rig)
    assert idle.reserve() == []
    rig.url = url
    proxy.cut("reply")
    assert rig.make_client().enqueue([new_job("a")]) == [True]
    assert proxy.cuts == 1
    idle.hears()
    idle.ack()
    assert idle.stats() == (0, 0, 0, 0)


def test_a_full_redis_hands_out_nothing(rig: RedisRig, idle: Daemon) -> None:
    rig.server.command("CONFIG", "SET", "maxmemory", 1)
    try:
        with pytest.raises(BrokerUnavailable, match="OOM"):
            rig.make_client().enqueue([new_job("a")])
    finally:
        rig.server.command("CONFIG", "SET", "maxmemory", 0)
    rig.do(idle.broker.renew())
    assert idle.offered == []
    assert idle.stats() == (0, 0, 0, 0)


def test_a_queue_that_is_full_stays_so(rig: RedisRig, idle: Daemon) -> None:
    client = rig.make_client()
    client.enqueue([new_job("later", delay_s=60)])
    assert idle.reserve() == []
    with pytest.raises(QueueFull):
        client.enqueue([new_job("a")], max_depth=1)
    assert client.enqueue([new_job("b")], max_depth=2) == [True]
    idle.hears()
    assert ids(idle.taken) == ["b"]


@pytest.mark.parametrize("key", ["idle", "leased:EPOCH", "last:EPOCH", "epochs"])
def test_garbage_in_the_keys_costs_no_job(rig: RedisRig, idle: Daemon, key: str) -> None:
    name = f"kq:{{q}}:{key}".replace("EPOCH", idle.broker._owner.epoch)
    rig.server.command("DEL", name)
    rig.server.command("LPUSH", name, "garbage")
    assert rig.make_client().enqueue([new_job("a")]) == [True]
    rig.do(idle.broker.renew())
    if not idle.offered:
        assert idle.reserve() == ["a"]
    idle.ack()


@pytest.mark.parametrize("flag", ["1", "garbage", "x 5 inline", "EPOCH x inline", "EPOCH 99999999999999999999 ", ""])
def test_a_flag_that_makes_no_sense_hands_out_nothing(rig: RedisRig, idle: Daemon, flag: str) -> None:
    rig.server.command("SET", "kq:{q}:idle", flag.replace("EPOCH", idle.broker._owner.epoch))
    assert rig.make_client().enqueue([new_job("a")]) == [True]
    assert rig.do(idle.broker.wait(20.0)) is True
    assert idle.reserve() == ["a"]
    idle.ack()


def test_the_next_due_job_is_not_forgotten(rig: RedisRig, idle: Daemon) -> None:
    rig.make_client().enqueue([new_job("later", delay_s=60)])
    assert idle.reserve() == []
    idle.busy = True
    rig.make_client().enqueue([new_job("a")])
    idle.hears()
    reserved = rig.do(idle.broker.reserve("q", BOTH))
    assert ids(reserved.leases) == ["a"]
    assert 50 < reserved.next_due_s <= 60


def test_a_user_who_may_not_hear_is_handed_nothing(rig: RedisRig) -> None:
    rig.server.command("ACL", "SETUSER", "deaf", "on", ">x", "~kq:*", "+@all", "resetchannels")
    try:
        url, rig.url = rig.url, rig.server.url.replace("redis://", "redis://deaf:x@")
        daemon = Daemon(rig)
        rig.url = url
        assert daemon.reserve() == []
        rig.make_client().enqueue([new_job("a")])
        assert daemon.stats() == (1, 0, 0, 0)
        assert daemon.reserve() == ["a"]
        rig.do(daemon.broker.close())
    finally:
        rig.server.command("ACL", "DELUSER", "deaf")


def test_in_a_cluster(request: pytest.FixtureRequest, tmp_path: Any) -> None:
    rig = ClusterRig(tmp_path, request)
    try:
        queues = [f"q{n}" for n in range(8)]
        daemon = Daemon(rig, queues=tuple(queues))
        client = rig.make_client()
        for count, queue in enumerate(queues, 1):
            assert daemon.reserve(queue=queue) == []
            client.enqueue([new_job(queue=queue)])
            daemon.hears(count)
        daemon.ack()
        assert len(daemon.offered) == 8, "each was heard once, whatever node it is on"
    finally:
        rig.close()


def test_whoever_takes_a_job_takes_its_offer_back(rig: RedisRig, idle: Daemon) -> None:
    """A job that came due rings nobody. If the offer stood when the epoch was recovered and lived again, none knew its number."""
    other = Daemon(rig)
    assert other.reserve() == []
    client = rig.make_client()
    client.enqueue([new_job("due", delay_s=0.02)])
    assert idle.reserve() == []
    rig.elapse(0.03)
    assert idle.reserve() == ["due"]
    assert rig.server.command("GET", "kq:{q}:idle") == b"1", "who else is idle is rung"
    idle.ack()
    client.enqueue([new_job("a")])
    assert idle.stats()[0] == 1
    assert rig.do(other.broker.wait(20.0)) is True
    assert other.reserve() == ["a"]


def test_what_was_kept_before_a_lapse_is_not_begun_after_it(rig: RedisRig) -> None:
    """A daemon that was stopped for longer than its lease finds the message; somebody else has had the job since."""
    idle, other = Daemon(rig, lease_s=0.3), Daemon(rig, lease_s=30)
    assert idle.reserve() == []
    idle.busy = True
    rig.make_client().enqueue([new_job("a")])
    rig.elapse(0.35)
    assert rig.do(other.broker.sweep()).recovered == {"q": 1}
    assert other.reserve() == ["a"]
    idle.hears()
    rig.do(idle.broker.wait(0.0))
    assert rig.do(idle.broker.renew()) is False
    assert rig.do(idle.broker.wait(0.0)) is True
    assert idle.reserve() == []
    other.ack()


def test_what_was_kept_before_a_lapse_and_nobody_has_taken_is_asked_for(rig: RedisRig) -> None:
    idle = Daemon(rig, lease_s=0.3)
    assert idle.reserve() == []
    idle.busy = True
    rig.make_client().enqueue([new_job("a")])
    idle.hears()
    rig.elapse(0.35)
    assert rig.do(idle.broker.renew()) is False
    assert idle.reserve() == ["a"]
    idle.ack()
