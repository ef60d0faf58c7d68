"""The runtime on a memory broker: what becomes of each job, from its dispatch to its settlement.

The kernel's clock is virtual and the broker's own time follows it, so that ten minutes of retries take no time. Isolated jobs run
on a strategy that only writes down what it was given; tests/test_isolated.py has the real one.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kqueue import events as facts
from kqueue import intake, settling
from kqueue.brokers.base import Counters, Lease, Owner, Row, Settlement
from kqueue.brokers.commands.memory import MemoryStore
from kqueue.brokers.memory import MemoryBroker
from kqueue.client.handle import Handle
from kqueue.client.memory import MemoryClient
from kqueue.codec import decode, from_json
from kqueue.config import QueueSpec
from kqueue.context import current
from kqueue.dispatch import NewJob, prepare
from kqueue.errors import BrokerRefused, EnvelopeError, JobCancelled, JobNotFound, JobTimedOut, QueueFull, UsageError
from kqueue.execution.jobtraps import enqueue, offload, progress
from kqueue.job import BoundJob, JobFunction, job
from kqueue.kernel import Kernel, Park, VirtualClock, join, sleep
from kqueue.outcome import Outcome
from kqueue.registry import registry
from kqueue.runtime import KQueueRuntime
from kqueue.security import SecurityConfig

EPOCH = 1_790_000_000.0  # the broker's time at the kernel's 0


class Isolated:
    """Serves the isolated lane without a child."""

    name = "isolated"
    cancel_grace_s = 5.0

    def __init__(self) -> None:
        self.executed: list[str] = []
        self.outcome = Outcome("ok")

    def start(self) -> Any:
        yield from ()

    stop = start

    def execute(self, work: Any) -> Any:
        self.executed.append(work.envelope.job)
        yield
        return self.outcome


class House:
    """A store, runtimes on it, and what they told."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.store = MemoryStore(clock=lambda: EPOCH + self.clock.now)
        self.client = MemoryClient(self.store)
        self.told: list[Any] = []
        self.isolated = Isolated()
        self.runtimes: list[KQueueRuntime] = []

    def runtime(self, broker: MemoryBroker | None = None, **settings: Any) -> KQueueRuntime:
        runtime = KQueueRuntime(broker or MemoryBroker(self.store), clock=self.clock, **settings)
        runtime.add_strategy(self.isolated)
        for kind in vars(facts).values():
            if isinstance(kind, type) and issubclass(kind, tuple) and kind is not tuple:
                runtime.events.subscribe(kind, self.told.append)
        self.runtimes.append(runtime)
        return runtime

    def run(self, runtime: KQueueRuntime | None = None, **how: Any) -> int:
        """Until nothing is ready and nothing runs, unless told otherwise."""
        return (runtime or self.runtime()).run(**{"burst": not how, "handle_signals": False, **how})

    def run_until_dead(self, runtime: KQueueRuntime | None = None) -> None:
        runtime = runtime or self.runtime()
        runtime.events.subscribe(facts.JobEnded, lambda fact: runtime.stop() if fact.then in ("dead", "done") else None)
        assert self.run(runtime, burst=False) == 0

    def dispatch(self, bound: BoundJob, **changes: Any) -> str:
        prepared = prepare(bound, bound.registration, arguments_too=False)._replace(**changes)
        self.client.enqueue([prepared])
        return prepared.id

    def put(self, envelope: bytes | None, id: str = "garbage", **changes: Any) -> str:
        """What somebody wrote straight into the store."""
        job = NewJob(id, "default", "inline", 0, envelope)  # type: ignore[arg-type]
        self.client.enqueue([job._replace(**changes)])
        return id

    def at(self, seconds: float, action: Callable[[], Any], runtime: KQueueRuntime) -> None:
        """Do `action` when the kernel's clock says `seconds`."""

        def wait() -> Any:
            yield sleep(seconds - self.clock.now)
            action()

        runtime.kernel.spawn(wait())

    def facts(self, kind: type[Any]) -> list[Any]:
        return [fact for fact in self.told if type(fact) is kind]

    def row(self, id: str) -> Row | None:
        return self.client.show(id)

    def certificates(self, id: str) -> list[dict[str, Any]]:
        row = self.row(id)
        assert row is not None
        return [from_json(certificate) for certificate in row.certificates]


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(registry, "_jobs", {})
    house = House()
    before = set(os.listdir("/proc/self/fd"))
    yield house
    assert set(os.listdir("/proc/self/fd")) == before, "a runtime leaves no fd behind"
    assert all(not runtime.kernel.abandoned or runtime.exit_code == 75 for runtime in house.runtimes)


@pytest.fixture
def ran(house: House) -> list[Any]:
    """What the jobs of `tick` said, with the time."""
    return []


@pytest.fixture
def tick(house: House, ran: list[Any]) -> JobFunction[..., Any]:
    """A job that notes its argument and when it ran."""

    @job(name="tick")
    def tick(name: str, seconds: float = 0) -> Any:
        ran.append((name, house.clock.now))
        yield sleep(seconds)

    return tick


@pytest.fixture
def failing(house: House) -> Callable[..., JobFunction[..., Any]]:
    """Declares a job that always fails, after a second."""

    def declare(**options: Any) -> JobFunction[..., Any]:
        @job(name="failing", **options)
        def failing() -> Any:
            yield sleep(1)
            raise ValueError("no such user")

        return failing

    return declare


# -- a burst ------------------------------------------------------------------------------------------------------------------


def test_a_burst_runs_what_is_ready_and_ends(house: House, tick: Any, ran: list[Any]) -> None:
    ids = [house.dispatch(tick.job(name, seconds=1)) for name in "abc"]
    runtime = house.runtime()
    assert house.run(runtime) == 0
    assert ran == [("a", 0), ("b", 0), ("c", 0)], "at once, side by side"
    assert house.clock.now == 1
    assert [house.row(id) for id in ids] == [None, None, None], "what is acked is gone"
    assert (runtime.processed, runtime.failed, runtime.state, runtime.held) == (3, 0, "stopped", set())


class Distant(MemoryBroker):
    """It answers a reservation after `after_s` (0: in the next turn), and notes when it was asked."""

    def __init__(self, store: MemoryStore, noted: list[str], after_s: float = 0) -> None:
        super().__init__(store)
        self._noted = noted
        self._after_s = after_s

    def reserve(self, queue: str, wants: Any) -> Any:
        self._noted.append("asked")
        reserved = yield from super().reserve(queue, wants)
        yield sleep(self._after_s) if self._after_s else None
        self._noted.append(f"answered {len(reserved.leases)}")
        return reserved


@pytest.mark.parametrize("distant", [True, False])
def test_the_next_reservation_is_under_way_while_jobs_run(
    house: House, monkeypatch: pytest.MonkeyPatch, distant: bool
) -> None:
    """A broker that answers at once would be asked for ever, and no job would run."""
    monkeypatch.setattr(intake, "BATCH", 2)
    noted: list[str] = []

    @job(name="notes")
    async def notes() -> None:
        noted.append("ran")

    for _ in range(4):
        house.dispatch(notes.job())
    if distant:
        house.run(house.runtime(Distant(house.store, noted)))
        assert noted[:8] == ["asked", "answered 2", "asked", "ran", "ran", "answered 2", "asked", "ran"]
    else:
        runtime = house.runtime()
        runtime.events.subscribe(facts.JobStarted, lambda fact: noted.append(f"{len(runtime.held)} are held"))
        house.run(runtime)
        assert max(noted) == "ran"
        assert {line for line in noted if line != "ran"} <= {"1 are held", "2 are held"}, "no more than were asked for at once"


def test_a_burst_does_not_end_before_a_retry_that_came_while_nothing_was_found(house: House, failing: Any) -> None:
    id = house.dispatch(failing(max_attempts=3, backoff=[0]).job())
    house.run(house.runtime(Distant(house.store, [], after_s=1.5)))
    assert len(house.certificates(id)) == 3


def test_its_facts_come_in_order(house: House, tick: Any) -> None:
    id = house.dispatch(tick.job("a", seconds=2))
    house.run()
    kinds = [type(fact).__name__ for fact in house.told]
    assert kinds == ["DaemonReady", "JobStarted", "JobEnded", "DaemonStopping", "DaemonStopped"]
    started, ended = house.facts(facts.JobStarted)[0], house.facts(facts.JobEnded)[0]
    assert started == facts.JobStarted(id, "tick", "inline", "default", 1)
    assert (ended.id, ended.then, ended.delay_s, ended.outcome.cause, ended.outcome.duration_s) == (id, "done", 0, "ok", 2)
    assert house.facts(facts.DaemonStopping) == [facts.DaemonStopping("burst", 0)]
    assert house.facts(facts.DaemonStopped) == [facts.DaemonStopped(0, 1)]


def test_an_empty_burst_ends_at_once(house: House) -> None:
    assert house.run() == 0
    assert house.clock.now == 0


def test_a_burst_does_not_wait_for_what_is_not_due(house: House, tick: Any, ran: list[Any]) -> None:
    later = house.dispatch(tick.options(delay=100).job("later"))
    house.dispatch(tick.job("now"))
    house.run()
    assert [name for name, _ in ran] == ["now"]
    row = house.row(later)
    assert row is not None
    assert row.state == "delayed"


def test_a_burst_runs_what_its_jobs_dispatch(house: House, tick: Any, ran: list[Any]) -> None:
    @job(name="parent")
    def parent(depth: int) -> Any:
        yield sleep(1)
        id = yield enqueue(tick.job(f"child {depth}"))
        assert house.row(id) is not None
        if depth:
            ids = yield enqueue(parent.job(depth - 1), tick.job("beside"))
            assert len(ids) == 2

    house.dispatch(parent.job(2))
    house.run()
    assert Counter(name for name, _ in ran) == {"child 2": 1, "child 1": 1, "child 0": 1, "beside": 2}


def test_many_more_jobs_than_slots(house: House, tick: Any, ran: list[Any]) -> None:
    for number in range(1000):
        house.dispatch(tick.job(str(number), seconds=1))
    assert house.run(house.runtime(max_inline=100)) == 0
    assert len(ran) == len({name for name, _ in ran}) == 1000
    assert Counter(at for _, at in ran) == {float(second): 100 for second in range(10)}


def test_a_job_that_is_over_leaves_nothing_to_the_garbage_collector(house: House, tick: Any, ran: list[Any]) -> None:
    """Which comes late to a daemon that runs thousands of them: they would be its memory."""
    counts: list[int] = []

    def count(fact: object) -> None:
        counts.append(sum(isinstance(each, settling.Held) for each in gc.get_objects()))

    for number in range(300):
        house.dispatch(tick.job(str(number)))
    runtime = house.runtime(max_inline=10)
    runtime.events.subscribe(facts.JobEnded, count)
    gc.collect()
    gc.disable()
    gc.freeze()  # so that each look is at what the run has made, and not at all there is
    count(None)
    try:
        assert runtime.run(burst=True, handle_signals=False) == 0
    finally:
        gc.unfreeze()
        gc.enable()
    assert len(ran) == 300
    assert max(counts) - counts[0] < 100, "those that run, and those that are being settled"


def test_a_thousand_sleepers_sleep_side_by_side(house: House, tick: Any, ran: list[Any]) -> None:
    for number in range(1000):
        house.dispatch(tick.job(str(number), seconds=3600))
    runtime = house.runtime(security=SecurityConfig())
    for id in list(house.store._jobs):
        house.store._jobs[id].envelope = house.store._jobs[id].envelope.replace(b'"queue"', b'"timeout":0,"queue"')  # type: ignore
    house.run(runtime)
    assert {at for _, at in ran} == {0.0}
    assert house.clock.now == 3600
    assert runtime.failed == 0


# -- results ------------------------------------------------------------------------------------------------------------------


def test_a_result_is_kept_as_long_as_the_job_asks(house: House) -> None:
    @job(name="answer", keep_result=60)
    async def answer(a: int, b: int) -> dict[str, Any]:
        await sleep(1)
        return {"sum": a + b, "of": {a, b}}

    id = house.dispatch(answer.job(40, b=2))
    house.run()
    assert Handle(house.client, id, None).result() == {"sum": 42, "of": {40, 2}}
    assert [certificate["cause"] for certificate in house.certificates(id)] == ["ok"]
    house.clock.now += 61
    house.store.sweep()
    assert house.row(id) is None


# -- attempts -----------------------------------------------------------------------------------------------------------------


def test_a_failing_job_is_tried_again_after_its_backoff_and_then_is_dead(house: House, failing: Any) -> None:
    id = house.dispatch(failing(max_attempts=3, backoff=[10, 20]).job())
    runtime = house.runtime()
    house.run_until_dead(runtime)
    ended = house.facts(facts.JobEnded)
    assert [(fact.then, fact.delay_s) for fact in ended] == [("retry", 10), ("retry", 20), ("dead", 0)]
    assert [fact.attempt for fact in house.facts(facts.JobStarted)] == [1, 2, 3]
    assert house.clock.now == pytest.approx(1 + 10 + 1 + 20 + 1)
    row = house.row(id)
    assert row is not None
    assert (row.state, row.counters) == ("dead", Counters(attempts=3))
    certificates = house.certificates(id)
    assert [(each["attempt"], each["cause"], each["error"]["message"]) for each in certificates] == [
        (1, "exception", "no such user"), (2, "exception", "no such user"), (3, "exception", "no such user")
    ]  # fmt: skip
    assert [each["ended_at"] for each in certificates] == sorted(each["ended_at"] for each in certificates)
    assert (runtime.processed, runtime.failed) == (3, 3)


def test_the_default_backoff_is_jittered_and_costs_the_daemon_nothing_meanwhile(house: House, failing: Any) -> None:
    house.dispatch(failing(max_attempts=8).job())
    runtime = house.runtime(heartbeat_s=1e6, lease_s=3e6)
    house.run_until_dead(runtime)
    delays = [fact.delay_s for fact in house.facts(facts.JobEnded)][:-1]
    assert all(0 < delay <= 2**failures for failures, delay in enumerate(delays, start=1))
    assert runtime.kernel.turns < 300, "nothing polls"


def test_a_job_can_succeed_at_last(house: House) -> None:
    attempts: list[int] = []

    @job(name="flaky", max_attempts=5, backoff=7)
    def flaky() -> Any:
        attempts.append(current().attempt)
        yield
        if len(attempts) < 3:
            raise ConnectionError

    house.dispatch(flaky.job())
    house.run_until_dead()
    assert attempts == [1, 2, 3]
    assert house.clock.now == pytest.approx(14)
    assert house.client.stats() == {}


def test_what_the_dispatch_says_goes_before_what_the_job_declares(house: House, failing: Any) -> None:
    id = house.dispatch(failing(max_attempts=5).options(max_attempts=1).job())
    house.run_until_dead()
    assert len(house.certificates(id)) == 1


def test_a_job_that_takes_too_long_is_timed_out_and_tried_again(house: House) -> None:
    seen = []

    @job(name="slow", timeout=10, max_attempts=2, backoff=0)
    def slow() -> Any:
        try:
            yield sleep(3600)
        except JobTimedOut:
            seen.append((house.clock.now, current().deadline))
            raise

    id = house.dispatch(slow.job())
    house.run_until_dead()
    assert seen == [(10, 10), (20, 20)]
    assert [(each["cause"], each["ended_by"], each["limits"]) for each in house.certificates(id)] == [
        ("timeout", "supervisor", {"timeout": 10})
    ] * 2


def test_limits_that_no_job_may_exceed_clamp_it_at_run(house: House) -> None:
    @job(name="slow", timeout=3600, max_attempts=1)
    def slow() -> Any:
        yield sleep(1000)

    id = house.dispatch(slow.job())
    house.run_until_dead(house.runtime(security=SecurityConfig(max_timeout_s=5)))
    assert house.clock.now == 5
    assert house.certificates(id)[0]["limits"] == {"timeout": 5}


# -- jobs that nobody here can run --------------------------------------------------------------------------------------------


def test_an_unknown_job_is_deferred_for_ten_minutes_and_then_dead(house: House) -> None:
    id = house.put(b'{"v":1,"id":"stranger","job":"nobody_knows"}', "stranger")
    runtime = house.runtime()
    house.run_until_dead(runtime)
    assert house.clock.now == pytest.approx(600)
    row = house.row(id)
    assert row is not None
    assert row.counters == Counters(deferrals=21), "no attempt was spent"
    (certificate,) = house.certificates(id)
    assert certificate["cause"] == "refused"
    assert "no job is registered as 'nobody_knows' here" in certificate["error"]["message"]
    assert {fact.then for fact in house.facts(facts.JobEnded)} == {"released", "dead"}
    assert (runtime.processed, runtime.failed) == (1, 1), "counted once, when it is dead"


def test_an_unknown_job_runs_as_soon_as_the_deploy_has_come_this_far(house: House, ran: list[Any]) -> None:
    house.put(b'{"v":1,"id":"early","job":"newest"}', "early")
    runtime = house.runtime()
    house.at(100, lambda: job(name="newest", isolated=False)(lambda: ran.append(house.clock.now)), runtime)
    house.run_until_dead(runtime)
    assert ran == [pytest.approx(120)]
    assert [fact.attempt for fact in house.facts(facts.JobStarted)] == [1]


def test_an_envelope_of_a_newer_version_is_deferred_too(house: House) -> None:
    id = house.put(b'{"v":2,"ident":"newer"}', "newer")
    house.run_until_dead()
    assert house.clock.now == pytest.approx(600)
    assert "this KQueue reads up to 1: upgrade it" in house.certificates(id)[0]["error"]["message"]


def test_or_is_buried_at_once_where_the_operator_wants_that(house: House) -> None:
    id = house.put(b'{"v":1,"id":"stranger","job":"nobody_knows"}', "stranger")
    house.run(house.runtime(bury_unknown=True))
    row = house.row(id)
    assert row is not None
    assert (row.state, house.clock.now) == ("dead", 0)


# -- garbage ------------------------------------------------------------------------------------------------------------------

GARBAGE = [
    (b"", "not JSON"),
    (b"\xff\xfe\x00", "not JSON"),
    (b"[" * 5000, "not JSON"),
    (b'{"v":1}', '"id" is not a printable text'),
    (b'{"v":1,"id":"another","job":"tick"}', "the envelope of garbage says that it is another's"),
    (b'{"v":1,"id":"garbage","job":"tick","args":{}}', '"args" is an object, not a list'),
    (b'{"v":1,"id":"garbage","job":"tick","args":[]}', "the arguments do not fit job 'tick'"),
    (b'{"v":1,"id":"garbage","job":"tick","args":["a",0,1,2]}', "the arguments do not fit job 'tick'"),
    (b'{"v":1,"id":"garbage","job":"tick","kwargs":{"nme":"a"}}', "the arguments do not fit job 'tick'"),
    (b'{"v":1,"id":"garbage","job":"tick","args":[{"$kq":"pickle","v":"gASV"}]}', "a value tagged 'pickle' cannot be read"),
    (b'{"v":1,"id":"garbage","job":"tick","args":["a"],"timeout":"soon"}', "timeout must be seconds"),
    (b'{"v":1,"id":"garbage","job":"tick","args":["a"],"timeout":1' + b"0" * 400 + b"}", "timeout must be seconds"),
    (b'{"v":1,"id":"garbage","job":"tick","args":["a"],"max_attempts":-1}', "max_attempts must be an integer of at least 1"),
    (b'{"v":1,"id":"garbage","job":"tick","args":["' + b"x" * 2_000_000 + b'"]}', "allowed are 1048576"),
    (None, "there is no envelope"),
]


@pytest.mark.parametrize(("envelope", "reason"), GARBAGE, ids=lambda value: repr(value)[:60])
def test_garbage_is_buried_with_its_reason_and_never_run(
    house: House, tick: Any, ran: list[Any], envelope: bytes | None, reason: str
) -> None:
    id = house.put(envelope)
    good = house.dispatch(tick.job("a good one"))
    runtime = house.runtime()
    assert house.run(runtime) == 0
    row = house.row(id)
    assert row is not None
    assert (row.state, row.envelope) == ("dead", envelope), "it is kept as it was found"
    (certificate,) = house.certificates(id)
    assert certificate["cause"] == "refused"
    assert reason in certificate["error"]["message"]
    assert [name for name, _ in ran] == ["a good one"]
    assert house.row(good) is None
    assert (runtime.processed, runtime.failed) == (2, 1)
    assert json.dumps([fact.outcome.summary() for fact in house.facts(facts.JobEnded)])


# -- lanes --------------------------------------------------------------------------------------------------------------------


def test_a_job_in_the_wrong_lane_is_moved_at_no_cost(house: House, tick: Any, ran: list[Any]) -> None:
    heavy = job(name="heavy", isolated=True)(lambda: None)
    one = house.dispatch(tick.job("light"), lane="isolated")
    two = house.dispatch(heavy.job(), lane="inline")
    runtime = house.runtime()
    leases: list[Lease] = []
    runtime.events.subscribe(facts.JobStarted, lambda fact: leases.extend(h.lease for h in runtime.held if h.job == fact.job))
    house.run(runtime)
    assert [name for name, _ in ran] == ["light"]
    assert house.isolated.executed == ["heavy"]
    assert {lease.token.id: (lease.lane, lease.counters) for lease in leases} == {
        one: ("inline", Counters()), two: ("isolated", Counters())
    }  # fmt: skip
    assert [fact.then for fact in house.facts(facts.JobEnded)] == ["done", "done"], "a move is no attempt"
    assert runtime.processed == 2


def test_a_job_that_was_moved_keeps_its_place(house: House, tick: Any, ran: list[Any]) -> None:
    first = house.dispatch(tick.job("first"), lane="isolated")
    house.clock.now += 1
    for number in range(3):
        house.dispatch(tick.job(str(number)))
    runtime = house.runtime(max_inline=1)
    house.run(runtime)
    assert house.row(first) is None
    assert [name for name, _ in ran].index("first") <= 2, "as soon as it stands in its lane, it goes before the younger ones"


def test_a_full_isolated_lane_does_not_hold_up_inline_jobs(house: House, tick: Any, ran: list[Any]) -> None:
    heavy = job(name="heavy", isolated=True)(lambda: None)
    for _ in range(20):
        house.dispatch(heavy.job())
    house.dispatch(tick.job("light"))
    house.run(house.runtime(max_isolated=1))
    assert ran == [("light", 0)]
    assert house.isolated.executed == ["heavy"] * 20


@pytest.mark.parametrize("cause", ["ok", "signal", "lost", "cancelled", "memory"])
def test_what_a_strategy_says_decides_and_only_the_runtime_settles(house: House, cause: str) -> None:
    heavy = job(name="heavy", isolated=True, max_attempts=1)(lambda: None)
    id = house.dispatch(heavy.job())
    house.isolated.outcome = Outcome(cause, signal="SIGSEGV" if cause == "signal" else None)
    runtime = house.runtime()
    runtime.events.subscribe(facts.JobEnded, lambda fact: runtime.stop())
    house.run(runtime, burst=False)
    row = house.row(id)
    if cause == "ok":
        assert row is None
        return
    assert row is not None
    states = {"signal": "delayed", "lost": "ready", "cancelled": "ready", "memory": "dead"}
    counters = {"signal": Counters(crashes=1), "lost": Counters(recoveries=1), "memory": Counters(attempts=1, memory=1)}
    assert (row.state, row.counters) == (states[cause], counters.get(cause, Counters()))


def test_a_strategy_that_raises_loses_no_job_and_is_reported(house: House) -> None:
    heavy = job(name="heavy", isolated=True)(lambda: None)
    id = house.dispatch(heavy.job())
    runtime = house.runtime()

    def execute(work: Any) -> Any:
        yield
        raise KeyError("a bug in the strategy")

    house.isolated.execute = execute  # type: ignore[method-assign]
    runtime.events.subscribe(facts.JobEnded, lambda fact: runtime.stop())
    house.run(runtime, burst=False)
    row = house.row(id)
    assert row is not None
    assert (row.state, row.counters) == ("ready", Counters(recoveries=1))
    assert any("please report it" in fact.message for fact in house.facts(facts.Warned))


# -- order and limits ---------------------------------------------------------------------------------------------------------


def test_a_point_of_priority_is_an_hour_s_head_start(house: House, tick: Any, ran: list[Any]) -> None:
    for name, priority, age_h in [("old", 0, 3.5), ("young", 0, 0), ("urgent", 3, 0), ("most urgent", 4, 0), ("last", -100, 50)]:
        house.dispatch(tick.options(priority=priority).job(name), at=EPOCH - age_h * 3600)
    house.run(house.runtime(max_inline=1))
    assert [name for name, _ in ran] == ["most urgent", "old", "urgent", "young", "last"]


def test_jobs_of_equal_place_run_in_the_order_of_their_dispatch(house: House, tick: Any, ran: list[Any]) -> None:
    for number in range(50):
        house.dispatch(tick.job(str(number)))
    house.run(house.runtime(max_inline=1))
    assert [name for name, _ in ran] == [str(number) for number in range(50)]


def test_queues_share_by_weight(house: House, tick: Any, ran: list[Any]) -> None:
    for _ in range(200):
        for queue in ("a", "b"):
            house.dispatch(tick.options(queue=queue).job(queue, seconds=1))
    runtime = house.runtime(queues=[QueueSpec("a", 1), QueueSpec("b", 3)], max_inline=1)
    house.run(runtime, max_jobs=100)
    assert abs(Counter(name for name, _ in ran)["a"] - 25) <= 1


def test_in_strict_order_the_first_queue_goes_first(house: House, tick: Any, ran: list[Any]) -> None:
    for queue in ("low", "high", "low", "high"):
        house.dispatch(tick.options(queue=queue).job(queue, seconds=1))
    house.run(house.runtime(queues=["high", "low"], strict_order=True, max_inline=1))
    assert [name for name, _ in ran] == ["high", "high", "low", "low"]


def test_a_rate_is_kept_by_reserving_less_and_no_job_fails_for_it(house: House, tick: Any, ran: list[Any]) -> None:
    for number in range(50):
        house.dispatch(tick.job(str(number)))
    runtime = house.runtime(security=SecurityConfig(per_minute=20))
    house.run(runtime)
    assert Counter(at for _, at in ran) == {0: 20, 60: 20, 120: 10}
    assert (runtime.processed, runtime.failed) == (50, 0)
    assert all(row.counters == Counters() for row in house.client.list(None, None, 100))


def test_limits_of_a_queue_and_of_all_hold(house: House, tick: Any, ran: list[Any]) -> None:
    for _ in range(20):
        for queue in ("a", "b"):
            house.dispatch(tick.options(queue=queue).job(queue, seconds=10))
    queues = [QueueSpec("a", max_concurrent=2), QueueSpec("b")]
    house.run(house.runtime(queues=queues, security=SecurityConfig(max_concurrent=5)))
    running = Counter((at, name) for name, at in ran)
    assert max(count for (_, name), count in running.items() if name == "a") == 2
    assert max(Counter(at for _, at in ran).values()) == 5


def test_where_one_job_at_a_time_is_allowed_both_lanes_get_there(house: House, tick: Any, ran: list[Any]) -> None:
    heavy = job(name="heavy", isolated=True)(lambda: None)
    for _ in range(5):
        house.dispatch(heavy.job())
        house.dispatch(tick.job("light"))
    house.run(house.runtime(security=SecurityConfig(max_concurrent=1)))
    assert (len(ran), len(house.isolated.executed)) == (5, 5)


@pytest.mark.parametrize("isolated", [False, True])
def test_max_jobs_is_exact(house: House, tick: Any, ran: list[Any], isolated: bool) -> None:
    heavy = job(name="heavy", isolated=True)(lambda: None)
    for number in range(10):
        house.dispatch(heavy.job() if isolated else tick.job(str(number), seconds=1))
    assert house.run(max_jobs=3) == 0
    assert len(ran) + len(house.isolated.executed) == 3
    assert house.facts(facts.DaemonStopping)[0].why == "max-jobs"
    assert house.client.stats()["default"].ready == 7


def test_max_jobs_counts_jobs_that_ran(house: House, tick: Any, ran: list[Any]) -> None:
    house.dispatch(tick.job("in the wrong lane"), lane="isolated")
    assert house.run(max_jobs=1) == 0
    assert [name for name, _ in ran] == ["in the wrong lane"]


def test_max_time_ends_it_and_lets_what_runs_finish(house: House, tick: Any, ran: list[Any]) -> None:
    house.dispatch(tick.job("a", seconds=15))
    house.dispatch(tick.options(delay=12).job("too late"))
    assert house.run(max_time_s=10) == 0
    assert house.facts(facts.DaemonStopping) == [facts.DaemonStopping("max-time", 1)]
    assert [name for name, _ in ran] == ["a"]
    assert house.clock.now == 15
    assert [fact.then for fact in house.facts(facts.JobEnded)] == ["done"]


# -- waiting for work ---------------------------------------------------------------------------------------------------------


class CountingBroker(MemoryBroker):
    """Counts how often it is asked for jobs."""

    reserved = 0

    def reserve(self, queue: str, wants: Any) -> Any:
        self.reserved += 1
        return super().reserve(queue, wants)


def test_a_dispatch_is_noticed_at_once_and_a_delayed_one_when_it_is_due(house: House, tick: Any, ran: list[Any]) -> None:
    broker = CountingBroker(house.store)
    runtime = house.runtime(broker)
    house.at(100, lambda: house.dispatch(tick.job("noticed")), runtime)
    house.at(200, lambda: house.dispatch(tick.options(delay=1000.5).job("due")), runtime)
    house.run(runtime, max_time_s=2000)
    assert ran == [("noticed", 100), ("due", pytest.approx(1200.5))]
    assert broker.reserved < 12, "it does not poll"


def test_an_idle_daemon_wakes_up_less_than_once_a_second(house: House) -> None:
    runtime = house.runtime()
    house.run(runtime, max_time_s=3600)
    assert runtime.kernel.turns < 3600


class HandingBroker(MemoryBroker):
    """Hands out the best ready job when it is told to, as Redis does (decision 0023), and writes down who wants none."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.withdrawn: list[str] = []

    def open(self, *args: Any, take: Any, **how: Any) -> Any:
        self.take = take
        return super().open(*args, **how)

    def hand(self) -> bool:
        """Whether the job was begun; if it was not, it is released."""
        reserved = self.store.reserve(self._owner, self._lease_s, "default", {"inline": 1})
        begun: bool = self.take(reserved.leases[0])
        if not begun:
            self.store.settle([Settlement(reserved.leases[0].token, "default", "release")])
        return begun

    def withdraw(self, queue: str) -> Any:
        self.withdrawn.append(queue)
        return super().withdraw(queue)


def silently(house: House, bound: BoundJob) -> str:
    """Dispatch `bound`, and ring nobody."""
    bells, house.store.bells = house.store.bells, []
    id = house.dispatch(bound)
    house.store.bells = bells
    return id


def test_a_job_that_is_handed_to_an_idle_daemon_starts_at_once(house: House, tick: Any, ran: list[Any]) -> None:
    broker = HandingBroker(house.store)
    runtime = house.runtime(broker)
    begun: list[bool] = []
    ids: list[str] = []

    def dispatch() -> None:
        ids.append(silently(house, tick.job("handed", seconds=1)))
        begun.append(broker.hand())

    house.at(100, dispatch, runtime)
    house.run(runtime, max_time_s=200)
    assert (begun, ran) == ([True], [("handed", 100)])
    assert [house.row(id) for id in ids] == [None]
    assert [fact.then for fact in house.facts(facts.JobEnded)] == ["done"]


@pytest.mark.parametrize("limit", ["slots", "queue", "rate", "quiet", "doubt"])
def test_limits_hold_for_jobs_that_are_handed_over(house: House, tick: Any, ran: list[Any], limit: str) -> None:
    broker = HandingBroker(house.store)
    spec = QueueSpec("default", max_concurrent=int(limit == "queue"), per_minute=int(limit == "rate"))
    runtime = house.runtime(broker, queues=[spec], **({"max_inline": 1} if limit == "slots" else {}))
    begun: list[bool] = []

    def dispatch() -> None:
        if limit == "quiet":
            runtime.quiet()
        if limit == "doubt":
            runtime.upkeep.opened(house.clock.boottime() - 1000)
        silently(house, tick.job("handed"))
        begun.append(broker.hand())

    house.at(1, lambda: house.dispatch(tick.job("first", seconds=20)), runtime)
    house.at(5, dispatch, runtime)
    house.run(runtime, max_time_s=15)
    assert begun == [False]
    if limit == "doubt":
        assert ran[1:] == [("handed", 5)], "when it has renewed"
    else:
        assert [name for name, _ in ran] == ["first"]
        assert broker.withdrawn[0] == "default", "as soon as there is no room"


def test_jobs_of_a_dead_supervisor_are_recovered_and_told(house: House, tick: Any, ran: list[Any]) -> None:
    id = house.dispatch(tick.job("a"))
    house.store.open(Owner("dead", ""), 15)
    house.store.reserve(Owner("dead", ""), 15, "default", {"inline": 1})
    runtime = house.runtime()
    house.run_until_dead(runtime)
    assert house.facts(facts.JobsRecovered) == [facts.JobsRecovered("default", 1)]
    assert [(fact.id, fact.attempt) for fact in house.facts(facts.JobStarted)] == [(id, 2)]
    assert 15 <= ran[0][1] <= 20


def test_what_an_earlier_boot_of_the_same_identity_held_is_ready_before_the_first_reserve(
    house: House, tick: Any, ran: list[Any]
) -> None:
    house.dispatch(tick.job("a"))
    house.store.open(Owner("earlier", "host:main"), 15)
    house.store.reserve(Owner("earlier", "host:main"), 15, "default", {"inline": 1})
    house.run(house.runtime(identity="host:main"))
    assert ran == [("a", 0)]


class AwayBroker(MemoryBroker):
    """Takes no settlement until `back` is called."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.away = True
        self._waiting: deque[Any] = deque()

    def settle(self, settlements: Any) -> Any:
        while self.away:
            yield Park(self._waiting)
        return (yield from super().settle(settlements))

    def back(self, kernel: Kernel) -> None:
        self.away = False
        kernel.unpark(self._waiting)


def test_with_too_many_outcomes_to_settle_nothing_more_is_reserved_and_none_is_dropped(
    house: House, tick: Any, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "MAX_UNSETTLED", 10)
    broker = AwayBroker(house.store)
    runtime = house.runtime(broker, max_inline=4)
    ids = [house.dispatch(tick.job(str(number), 1)) for number in range(40)]
    unsettled: list[int] = []

    def back() -> None:
        unsettled.append(len(ran))
        broker.back(runtime.kernel)

    house.at(10_000, back, runtime)
    assert house.run(runtime) == 0
    assert unsettled == [12], "three rounds of four: the third began with eight"
    assert sorted(int(name) for name, _ in ran) == list(range(40)), "each ran once"
    assert [house.row(id) for id in ids] == [None] * 40
    assert not house.facts(facts.LeaseLost)


def test_who_exits_with_outcomes_unsettled_keeps_its_epoch_till_it_expires(
    house: House, tick: Any, ran: list[Any], tmp_path: Path
) -> None:
    """The broker may be back in that very moment, and another daemon would run at once what our next life settles."""
    id = house.dispatch(tick.job("a"))
    runtime = house.runtime(AwayBroker(house.store), outbox=str(tmp_path / "main.outbox"), identity="host:main", grace_s=1)
    assert house.run(runtime, max_time_s=2) == 0
    row = house.row(id)
    assert row is not None
    assert row.state == "leased"
    assert house.run(house.runtime(outbox=str(tmp_path / "main.outbox"), identity="host:main")) == 0
    assert [fact.settled for fact in house.facts(facts.OutboxSettled)] == [1]
    assert house.row(id) is None
    assert [name for name, _ in ran] == ["a"]


@pytest.mark.parametrize("damage", ["garbage", "folder"])
def test_outcomes_that_cannot_be_read_are_set_aside_and_said(house: House, tick: Any, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "main.outbox"
    if damage == "garbage":
        path.write_bytes(b"{")
    else:
        path.mkdir()
    house.dispatch(tick.job("a"))
    assert house.run(house.runtime(outbox=str(path))) == 0
    (warned,) = house.facts(facts.Warned)
    assert f"the outcomes in {path}.unreadable were not settled, so those jobs run again: " in warned.message
    assert not path.exists()
    assert house.runtimes[0].processed == 1


# -- stopping -----------------------------------------------------------------------------------------------------------------


def test_stopping_lets_jobs_finish_within_the_grace_and_releases_the_rest_without_an_attempt(
    house: House, tick: Any, ran: list[Any]
) -> None:
    cancelled = []

    @job(name="long")
    def long() -> Any:
        try:
            yield sleep(25)
        except JobCancelled:
            yield sleep(0.5)
            cancelled.append(house.clock.now)
            raise

    quick, slow = house.dispatch(tick.job("quick", seconds=15)), house.dispatch(long.job())
    runtime = house.runtime(grace_s=10)
    house.at(10, lambda: runtime.stop("deploy", exit_code=7), runtime)
    house.at(11, lambda: house.dispatch(tick.job("not any more")), runtime)
    assert house.run(runtime, burst=False) == 7
    assert house.row(quick) is None
    row = house.row(slow)
    assert row is not None
    assert (row.state, row.counters, cancelled) == ("ready", Counters(), [20.5])
    assert [each["cause"] for each in house.certificates(slow)] == ["cancelled"]
    assert [name for name, _ in ran] == ["quick"]
    assert house.facts(facts.DaemonStopping) == [facts.DaemonStopping("deploy", 2)]
    assert house.clock.now == 20.5, "and no longer than that"

    house.run(house.runtime())  # the next one
    assert house.row(slow) is None
    assert [fact.attempt for fact in house.facts(facts.JobStarted) if fact.id == slow] == [1, 1]


def test_jobs_that_had_not_begun_are_released_without_a_trace(house: House, tick: Any, ran: list[Any]) -> None:
    """Reserved, and cancelled before their first step."""
    ids = [house.dispatch(tick.job(str(number))) for number in range(5)]
    runtime = house.runtime(grace_s=0)
    reserve = runtime.broker.reserve

    def reserve_and_stop(queue: str, wants: Any) -> Any:
        reserved = yield from reserve(queue, wants)
        runtime.stop()
        return reserved

    runtime.broker.reserve = reserve_and_stop  # type: ignore[method-assign]
    house.run(runtime, burst=False)
    rows = [house.row(id) for id in ids]
    assert ran == [] or all(row is None for row in rows)
    assert all(row.counters == Counters() and row.state == "ready" for row in rows if row is not None)
    assert house.facts(facts.Warned) == []


def test_a_job_that_would_not_stop_is_released_and_the_daemon_started_again(house: House, tick: Any) -> None:
    @job(name="stubborn", timeout=10, backoff=1000)
    def stubborn() -> Any:
        while True:
            try:
                yield sleep(3600)
            except (JobTimedOut, JobCancelled):
                continue

    id, other = house.dispatch(stubborn.job()), house.dispatch(tick.job("other", seconds=20))
    assert house.run(burst=False) == 75
    assert house.row(other) is None, "the others finish"
    row = house.row(id)
    assert row is not None
    assert (row.state, row.counters) == ("delayed", Counters(attempts=1)), "it had used up its time"
    (outcome,) = [fact.outcome for fact in house.facts(facts.JobEnded) if fact.id == id]
    assert (outcome.cause, outcome.ended_by, outcome.limits) == ("timeout", "supervisor", {"timeout": 10})
    assert outcome.duration_s == pytest.approx(11), "its time and the grace"
    assert outcome.error["class"] == "JobTimedOut"
    assert outcome.error["message"].startswith("stubborn ran longer than its timeout of 10 s, and would not stop: ")
    assert any("would not stop; restarting to end it" in fact.message for fact in house.facts(facts.Warned))


def test_one_that_would_not_stop_for_a_shutdown_costs_no_attempt(house: House) -> None:
    @job(name="stubborn", timeout=0)
    def stubborn() -> Any:
        while True:
            try:
                yield sleep(3600)
            except JobCancelled:
                continue

    id = house.dispatch(stubborn.job())
    runtime = house.runtime(grace_s=5)
    house.at(1, runtime.stop, runtime)
    house.run(runtime, burst=False)
    runtime.exit_code = 75  # it was stopping anyhow
    row = house.row(id)
    assert row is not None
    assert (row.state, row.counters) == ("ready", Counters())
    (outcome,) = [fact.outcome for fact in house.facts(facts.JobEnded)]
    assert (outcome.cause, outcome.limits, outcome.error["class"]) == ("cancelled", {}, "Abandoned")
    assert outcome.duration_s > 1
    assert house.clock.now < 5 + 2 + 5


def test_quiet_keeps_what_runs_and_reserves_no_more(house: House, tick: Any, ran: list[Any]) -> None:
    house.dispatch(tick.job("running", seconds=20))
    runtime = house.runtime()
    house.at(5, runtime.quiet, runtime)
    house.at(6, lambda: house.dispatch(tick.job("waits")), runtime)
    house.at(30, lambda: ran.append((runtime.state, 30)), runtime)
    house.at(40, runtime.stop, runtime)
    assert house.run(runtime, burst=False) == 0
    assert ran == [("running", 0), ("quiet", 30)]
    assert [fact.then for fact in house.facts(facts.JobEnded)] == ["done"]
    assert house.client.stats()["default"].ready == 1


def test_stopping_twice_is_stopping_once(house: House) -> None:
    runtime = house.runtime()
    house.at(1, lambda: runtime.stop("first", 3), runtime)
    house.at(1, lambda: runtime.stop("second", 4), runtime)
    assert house.run(runtime, burst=False) == 3
    assert [fact.why for fact in house.facts(facts.DaemonStopping)] == ["first"]


def test_stopping_before_it_has_started(house: House) -> None:
    runtime = house.runtime()

    def open_and_wait(*args: Any, **options: Any) -> Any:
        yield sleep(1e6)

    runtime.broker.open = open_and_wait  # type: ignore[method-assign]
    house.at(5, runtime.stop, runtime)
    assert house.run(runtime, burst=False) == 0
    assert house.clock.now < 10
    assert house.facts(facts.DaemonReady) == []


# -- signals ------------------------------------------------------------------------------------------------------------------


def kill(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_sigterm_stops_with_the_grace(house: House, tick: Any) -> None:
    id = house.dispatch(tick.job("a", seconds=15))
    runtime = house.runtime()
    house.at(10, lambda: kill(signal.SIGTERM), runtime)
    assert house.run(runtime, burst=False, handle_signals=True) == 0
    assert house.facts(facts.DaemonStopping) == [facts.DaemonStopping("SIGTERM", 1)]
    assert (house.row(id), house.clock.now) == (None, 15)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_one_ends_at_once_what_still_runs(house: House, tick: Any, second: signal.Signals) -> None:
    id = house.dispatch(tick.job("a", seconds=25))
    runtime = house.runtime(grace_s=20)
    house.at(1, lambda: kill(signal.SIGINT), runtime)
    house.at(2, lambda: kill(second), runtime)
    assert house.run(runtime, burst=False, handle_signals=True) == 0
    row = house.row(id)
    assert row is not None
    assert (row.state, row.counters) == ("ready", Counters())
    assert house.clock.now < 4


def test_sigusr1_is_quiet_and_what_cannot_be_done_here_is_said(house: House) -> None:
    before = signal.getsignal(signal.SIGHUP)
    runtime = house.runtime()
    house.at(1, lambda: kill(signal.SIGHUP), runtime)
    house.at(2, lambda: kill(signal.SIGUSR2), runtime)
    house.at(3, lambda: kill(signal.SIGUSR1), runtime)
    house.at(4, lambda: house.told.append(runtime.state), runtime)
    house.at(5, lambda: kill(signal.SIGTERM), runtime)
    assert house.run(runtime, burst=False, handle_signals=True) == 0
    warnings = [fact.message for fact in house.facts(facts.Warned)]
    assert [message.split()[0] for message in warnings] == ["SIGHUP:", "SIGUSR2:", "quiet:"]
    assert "no job here is isolated" in warnings[0]
    assert "quiet" in house.told
    assert signal.getsignal(signal.SIGHUP) == before


# -- leases -------------------------------------------------------------------------------------------------------------------


def steal(house: House) -> None:
    """What happens when our lease has run out: another supervisor sweeps, and reserves what we held."""
    for epoch in list(house.store._epochs):
        house.store.close(epoch)
    house.store.sweep()
    house.store.open(Owner("another", ""), 1e6)
    house.store.reserve(Owner("another", ""), 1e6, "default", {"inline": 10})


def test_a_job_whose_lease_is_gone_is_cancelled_at_the_next_renewal(house: House) -> None:
    ended: list[Any] = []

    @job(name="long", timeout=0)
    def long() -> Any:
        try:
            yield sleep(1000)
        finally:
            ended.append(house.clock.now)

    id = house.dispatch(long.job())
    runtime = house.runtime()
    house.at(6, lambda: steal(house), runtime)
    house.at(20, runtime.stop, runtime)
    assert house.run(runtime, burst=False) == 0
    assert ended == [10.0]
    assert house.facts(facts.LeaseLost) == [facts.LeaseLost(id, "long")]
    assert house.facts(facts.JobEnded) == [], "what came of it is nobody's"
    row = house.row(id)
    assert row is not None
    assert row.state == "leased"
    assert runtime.held == set()


class SlowBroker(MemoryBroker):
    """Renewals take 2 s, sweeps `sweep_s`."""

    sweep_s = 101.0

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.renewals: list[float] = []  # when each was sent
        self.sweeps: list[float] = []

    def renew(self) -> Any:
        self.renewals.append(self.store.clock() - EPOCH)
        yield sleep(2)
        return (yield from super().renew())

    def sweep(self) -> Any:
        self.sweeps.append(self.store.clock() - EPOCH)
        yield sleep(self.sweep_s if len(self.sweeps) > 1 else 0)  # the first one is part of the start
        return (yield from super().sweep())


def test_a_lease_is_renewed_every_third_of_it_whatever_renewals_and_sweeps_take(house: House, tick: Any, ran: list[Any]) -> None:
    house.dispatch(tick.options(timeout=0).job("long", seconds=290))
    broker = SlowBroker(house.store)
    runtime = house.runtime(broker)
    for at_s in range(20, 290, 20):  # another daemon looks for somebody dead
        house.at(at_s, lambda: house.store.sweep(), runtime)
    house.run(runtime, max_time_s=299)
    assert broker.renewals == pytest.approx(list(range(5, 300, 5))), "counted from the sending of the last one"
    assert broker.sweeps == pytest.approx([0, 7, 112, 217]), "one at a time, each after a renewal"
    assert [name for name, _ in ran] == ["long"]
    assert house.facts(facts.JobsRecovered) == house.facts(facts.LeaseLost) == []


def test_who_was_stopped_longer_than_a_lease_takes_back_what_nobody_took(house: House, tick: Any, ran: list[Any]) -> None:
    """Its jobs were recovered meanwhile, those that still run and those that had just ended: it reserves none of them again."""

    def sleep_through() -> None:
        house.clock.now += 100  # as SIGSTOP and SIGCONT do
        for _ in range(5):  # the first one gives everybody a lease's time, since nobody renewed
            house.store.sweep()
            house.clock.now += 5
        assert {row.state for row in house.client.list(None, None, 10)} == {"ready"}
        house.dispatch(tick.job("fresh"))

    for name, seconds in (("ended", 5.0), ("running", 500.0)):
        house.dispatch(tick.options(timeout=0).job(name, seconds=seconds))
    runtime = house.runtime()
    house.at(5, sleep_through, runtime)
    house.run(runtime)
    assert sorted(name for name, _ in ran) == ["ended", "fresh", "running"], "each once"
    assert house.facts(facts.LeaseLost) == []
    assert house.client.list(None, None, 10) == []


def test_who_was_stopped_longer_than_a_lease_lets_go_of_what_somebody_took(house: House, tick: Any, ran: list[Any]) -> None:
    def sleep_through() -> None:
        house.clock.now += 100
        steal(house)
        house.dispatch(tick.job("fresh"))

    for name, seconds in (("ended", 5.0), ("running", 500.0)):
        house.dispatch(tick.options(timeout=0).job(name, seconds=seconds))
    runtime = house.runtime()
    house.at(5, sleep_through, runtime)
    house.at(200, runtime.stop, runtime)
    house.run(runtime, burst=False)
    assert sorted(name for name, _ in ran) == ["ended", "fresh", "running"]
    assert len(house.facts(facts.LeaseLost)) == 2
    assert [row.state for row in house.client.list(None, None, 10)] == ["leased", "leased"], "another's"


def test_a_lease_that_was_lost_is_told_and_changes_nothing(house: House, tick: Any) -> None:
    id = house.dispatch(tick.job("a", seconds=10))
    runtime = house.runtime()
    house.at(5, lambda: steal(house), runtime)
    house.at(20, runtime.stop, runtime)
    house.run(runtime, burst=False)
    assert house.facts(facts.LeaseLost) == [facts.LeaseLost(id, "tick")]
    assert house.facts(facts.JobEnded) == []
    row = house.row(id)
    assert row is not None
    assert (row.state, row.counters) == ("leased", Counters(recoveries=1)), "it is the other one's now"
    assert runtime.processed == 0


def test_an_expired_lease_that_nobody_took_still_settles(house: House, tick: Any) -> None:
    id = house.dispatch(tick.job("a", seconds=10))
    runtime = house.runtime(lease_s=3e6)
    house.at(5, lambda: [house.store.close(epoch) for epoch in house.store._epochs], runtime)
    house.run(runtime)
    assert house.row(id) is None
    assert house.facts(facts.LeaseLost) == []


def test_the_same_job_reserved_again_while_it_still_runs_costs_nobody_his_daemon(house: House, tick: Any, ran: list[Any]) -> None:
    """Our lease ran out while the broker was away, somebody swept, and we were the first to reserve again."""

    def expire() -> None:
        for epoch in list(house.store._epochs):
            house.store.close(epoch)
        house.store.sweep()

    id = house.dispatch(tick.job("a", seconds=20))
    runtime = house.runtime(lease_s=3e6)
    house.at(5, expire, runtime)
    house.at(6, lambda: house.dispatch(tick.job("b")), runtime)
    house.at(100, runtime.stop, runtime)
    assert house.run(runtime, burst=False) == 0
    assert house.row(id) is None
    assert runtime.held == set()


# -- when KQueue itself fails -------------------------------------------------------------------------------------------------


def test_a_broker_that_refuses_at_the_start_ends_it_with_its_own_error(house: House) -> None:
    runtime = house.runtime()

    def refuse(*args: Any, **options: Any) -> Any:
        yield sleep(1)
        raise BrokerRefused("wrong password")

    runtime.broker.open = refuse  # type: ignore[method-assign]
    with pytest.raises(BrokerRefused, match="wrong password"):
        house.run(runtime, burst=False)


@pytest.mark.parametrize("verb", ["renew", "sweep", "settle", "reserve", "wait"])
def test_a_bug_of_kqueue_s_own_ends_the_daemon_with_70_and_its_trace(house: House, tick: Any, verb: str) -> None:
    house.dispatch(tick.job("a", seconds=1))
    runtime = house.runtime(grace_s=1)
    works = getattr(runtime.broker, verb)
    calls = []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > 1 or verb == "settle":
            raise ZeroDivisionError("a bug")
        return (yield from works(*args))

    setattr(runtime.broker, verb, fails)
    house.at(3, lambda: house.dispatch(tick.job("b")), runtime)
    assert house.run(runtime, burst=False) == 70
    (warning, *_) = [fact.message for fact in house.facts(facts.Warned)]
    assert "internal error in" in warning
    assert "please report it" in warning
    assert "ZeroDivisionError: a bug" in warning


def test_too_much_memory_asks_for_a_fresh_start(house: House) -> None:
    assert house.run(house.runtime(memory_limit_mib=1), burst=False) == 75
    assert house.clock.now == 5
    assert "over runtime.memory_limit 1" in house.facts(facts.DaemonStopping)[0].why


def test_the_heartbeat_tells_how_it_goes(house: House, tick: Any, failing: Any) -> None:
    house.dispatch(tick.job("a", seconds=30))
    house.dispatch(failing().job())
    house.run(house.runtime(heartbeat_s=10), max_time_s=25)
    beats = house.facts(facts.Heartbeat)
    assert [(beat.processed >= 1, beat.failed >= 1, beat.state) for beat in beats[:2]] == [(True, True, "running")] * 2
    assert all(beat.memory_mib > 5 and beat.running >= 1 for beat in beats[:2])


@pytest.mark.parametrize("ends", [False, True])
def test_a_slice_that_keeps_the_loop_is_told_whatever_comes_after_it(house: House, ends: bool) -> None:
    @job(name="blocks")
    def blocks() -> Any:
        if ends:
            yield
        house.clock.now += 0.5
        if not ends:
            yield

    id = house.dispatch(blocks.job())
    house.run(house.runtime(max_slice_s=0.1))
    (slow,) = house.facts(facts.SlowSlice)
    assert (slow.id, slow.job, slow.seconds) == (id, "blocks", 0.5)
    assert [type(fact).__name__ for fact in house.told].index("SlowSlice") < len(house.told) - 3, "before its end"


# -- what a job may ask for ---------------------------------------------------------------------------------------------------


def test_progress_is_told(house: House) -> None:
    @job(name="steps")
    def steps() -> Any:
        for step in (1, 2):
            yield progress(step / 2, f"step {step}")

    id = house.dispatch(steps.job())
    house.run()
    told = [facts.JobProgress(id, "steps", 0.5, "step 1"), facts.JobProgress(id, "steps", 1, "step 2")]
    assert house.facts(facts.JobProgress) == told


def test_enqueue_is_held_to_the_same_limits_as_a_dispatch(house: House, tick: Any) -> None:
    refused: list[BaseException] = []

    @job(name="parent")
    def parent() -> Any:
        for bound in (tick.options(timeout=99).job("too long"), tick.job("x" * 2000), tick.job("one"), tick.job("two")):
            try:
                yield enqueue(bound)
            except Exception as error:
                refused.append(error)

    house.dispatch(parent.job())
    limits = SecurityConfig(max_timeout_s=60, queue_depth=1, max_envelope_bytes=1024)
    runtime = house.runtime(security=limits, max_inline=1)
    house.run(runtime)
    assert [type(error).__name__ for error in refused] == ["UsageError", "EnvelopeError", "QueueFull"]
    assert isinstance(refused[2], QueueFull)


def test_a_follow_up_is_refused_at_its_line_and_what_was_accepted_goes_with_the_ack(house: House, tick: Any) -> None:
    settled: list[Any] = []

    class Noting(MemoryBroker):
        def settle(self, batch: Any) -> Any:
            settled.extend(batch)
            return (yield from super().settle(batch))

    @job(name="parent", max_attempts=2, backoff=0)
    def parent() -> Any:
        yield
        context = current()
        with pytest.raises(UsageError, match=r"timeout 99 is over limits\.timeout 60"):
            context.then(tick.options(timeout=99).job("too long"))
        with pytest.raises(EnvelopeError, match="allowed are 1024"):
            context.then(tick.job("x" * 2000))
        context.then(tick.options(queue="mail").job(str(context.attempt)))
        if context.attempt == 1:
            raise LookupError

    house.dispatch(parent.job())
    limits = SecurityConfig(max_timeout_s=60, queue_depth=1, max_envelope_bytes=1024)
    house.run(house.runtime(Noting(house.store), security=limits))
    assert [(item.verb, len(item.follow_ups)) for item in settled if item.verb != "hold"] == [("release", 0), ("ack", 1)]
    (follow_up,) = settled[-1].follow_ups
    assert (follow_up.queue, decode(follow_up.envelope).args) == ("mail", ["2"]), "of the run that counts"


class Children:
    """Stands for the pool of children that offloaded calls run in. Each end of a call keeps the loop for `blocks_s` seconds."""

    def __init__(self, runtime: KQueueRuntime, blocks_s: float = 0.0) -> None:
        self.running = self.most = 0
        self.clock: Any = runtime.kernel.clock
        self.blocks_s = blocks_s
        self.plainly = False  # True: the answer is the function's alone
        runtime.isolated.offload = self.offload  # type: ignore[assignment,method-assign]

    def offload(self, function: Any, args: Any, kwargs: Any, *, context: Any, timeout_s: float, max_memory_mib: int) -> Any:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield sleep(10)
            answer = function(*args, **kwargs)
            return answer if self.plainly else (answer, timeout_s)
        finally:
            self.running -= 1
            self.clock.now += self.blocks_s


def test_offloaded_calls_wait_for_their_turn_within_their_own_time(house: House) -> None:
    answers = []

    @job(name="asks", timeout=100)
    def asks(number: int) -> Any:
        answers.append((yield offload(divmod, number, 2)))

    for number in range(6):
        house.dispatch(asks.job(number))
    runtime = house.runtime(offload_slots=2)
    children = Children(runtime)
    house.run(runtime)
    assert answers == [(divmod(number, 2), 100 - 10 * (number // 2)) for number in range(6)]
    assert (children.most, house.clock.now, runtime.failed) == (2, 30, 0)


def test_a_call_that_cannot_be_ended_is_left_to_the_next_start(house: House) -> None:
    @job(name="asks", timeout=5, max_attempts=1)
    def asks() -> Any:
        yield offload(len, "")

    def never_ends(*args: Any, **kwargs: Any) -> Any:
        while True:
            with suppress(JobCancelled):
                yield sleep(3600)

    id = house.dispatch(asks.job())
    runtime = house.runtime()
    runtime.isolated.offload = never_ends  # type: ignore[method-assign]
    assert house.run(runtime, burst=False) == 75
    assert house.clock.now == 5 + runtime.isolated.cancel_grace_s
    row = house.row(id)
    assert row is not None
    assert row.state == "dead", "the job itself has had its time"


def test_who_is_timed_out_while_he_waits_for_a_slot_keeps_it_from_nobody(house: House) -> None:
    done = []

    @job(name="asks")
    def asks(name: str) -> Any:
        yield offload(len, name)
        done.append((name, house.clock.now))

    house.dispatch(asks.job("holds the slot"))
    house.dispatch(asks.options(timeout=10.25, max_attempts=1).job("times out just when it is free"))
    house.dispatch(asks.options(timeout=100).job("waits behind"))
    runtime = house.runtime(offload_slots=1)
    Children(runtime, blocks_s=0.5)
    house.run(runtime)
    assert done == [("holds the slot", 10.5), ("waits behind", 21)]


variable: ContextVar[str] = ContextVar("variable", default="nobody's")


def test_context_variables_are_each_jobs_own(house: House) -> None:
    """Whatever kind of job sets one, and wherever: it keeps its own across its waits, and nobody else has ever seen it."""
    seen: list[tuple[str, str]] = []

    def note(name: str) -> None:
        seen.append((name, variable.get()))
        variable.set(name)

    def backoff(attempt: int, error: BaseException) -> float:
        note("backoff")
        return 0.0

    @job(name="generator")
    def generator(name: str) -> Any:
        note(name)
        for _ in range(3):
            yield sleep(1)
            assert variable.get() == name
        assert (yield from inner(name)) == name
        assert (yield offload(variable.get)) == name

    def inner(name: str) -> Any:
        yield enqueue(plain.job(f"plain of {name}"))
        return variable.get()

    @job(name="coroutine")
    async def coroutine(name: str) -> None:
        note(name)
        await sleep(1)
        assert variable.get() == name

    @job(name="plain", isolated=False)
    def plain(name: str) -> None:
        note(name)

    @job(name="fails", backoff=backoff, max_attempts=2)
    def fails(name: str) -> Any:
        note(name)
        yield sleep(1)
        raise ValueError(variable.get())

    for number in range(3):
        for each in (generator, coroutine, plain, fails):
            house.dispatch(each.job(f"{each.registration.name} {number}"))  # type: ignore[attr-defined]
    runtime = house.runtime()
    Children(runtime).plainly = True
    house.run(runtime)
    assert len(seen) == 3 * (4 + 1 + 1 + 2), "each of four, the plain one of a generator, a retry, and two backoffs"
    others = [(name, was) for name, was in seen if name != "backoff"]
    assert others == [(name, "nobody's") for name, _ in others]
    assert all(was.startswith("fails") for name, was in seen if name == "backoff"), "which is asked where its job ran"
    assert variable.get() == "nobody's"


def test_a_job_is_told_of_its_id_and_its_deadline(house: House) -> None:
    seen = []

    @job(name="introspective", timeout=7)
    async def introspective() -> None:
        await sleep(1)
        me = current()
        seen.append((me.id, me.name, me.queue, me.attempt, me.deadline, me.inline))

    id = house.dispatch(introspective.job())
    house.run()
    assert seen == [(id, "introspective", "default", 1, 7, True)]


def test_clients_can_read_what_may_be_dispatched_and_how_much(house: House, tick: Any) -> None:
    house.run(house.runtime(security=SecurityConfig(queue_depth=5), queues=["default", "mail"]))
    documents = house.client.documents("")
    assert sorted(documents) == ["limits:default", "limits:mail", "manifest:default", "manifest:mail"]
    assert from_json(documents["manifest:mail"])["tick"]["cooperative"] is True
    assert from_json(documents["limits:default"]) == {
        "max_timeout_s": 0, "max_memory_mib": 512, "max_cpu_s": 0, "max_files": 0, "max_processes": 0, "max_file_size_mib": 0,
        "queue_depth": 5, "max_envelope_bytes": 1 << 20, "strict": True,
            "signed": False,
    }  # fmt: skip


# -- execute_job --------------------------------------------------------------------------------------------------------------


def executed(runtime: KQueueRuntime, bound: BoundJob) -> Outcome:
    def wait() -> Any:
        return (yield join(runtime.execute_job(bound)))

    outcome: Outcome = runtime.kernel.run(wait())
    return outcome


def test_a_job_can_be_executed_without_a_queue(house: House, failing: Any) -> None:
    @job(name="answer", keep_result=1)
    def answer(a: int) -> Any:
        yield sleep(1)
        return a + 1

    runtime = house.runtime()
    outcome = executed(runtime, answer.job(41))
    assert (outcome.cause, outcome.result, outcome.duration_s) == ("ok", b"42", 1)
    assert executed(runtime, failing().job()).cause == "exception"
    assert executed(runtime, answer.job()).cause == "refused"
    assert executed(runtime, BoundJob("answer", (1,), {})).result == b"2", "a name is enough"
    assert house.client.stats() == {}
    runtime.kernel.close()


def test_what_it_executes_is_admitted_like_any_other(house: House) -> None:
    slow = job(name="slow", timeout=3600)(lambda: None)
    strict = house.runtime(security=SecurityConfig(max_timeout_s=60))
    with pytest.raises(UsageError, match=r"job 'slow': timeout 3600 is over limits\.timeout 60"):
        strict.execute_job(slow.job())
    with pytest.raises(JobNotFound, match="no job is registered as 'nobody'"):
        strict.execute_job(BoundJob("nobody", (), {}))
    with pytest.raises(TypeError, match=r"takes a bound job, such as JobFunction\.job"):
        strict.execute_job(slow)  # type: ignore[arg-type]
    lenient = house.runtime(security=SecurityConfig(max_timeout_s=60, strict=False))
    house.isolated.outcome = Outcome("ok", result=b"1")
    assert executed(lenient, slow.job()).ok
    strict.kernel.close()
    lenient.kernel.close()


def test_the_runtime_can_be_driven_beside_other_tasks_of_its_kernel(house: House, tick: Any, ran: list[Any]) -> None:
    runtime = house.runtime()
    assert isinstance(runtime.kernel, Kernel)
    house.at(3, lambda: house.dispatch(tick.job("from a task beside it")), runtime)
    house.run(runtime, max_time_s=10)
    assert ran == [("from a task beside it", 3)]
    assert all(early <= late for early, late in pairwise([at for _, at in ran]))


# -- starting by hand ---------------------------------------------------------------------------------------------------------


def test_start_opens_everything_and_run_goes_on_from_there() -> None:
    runtime = KQueueRuntime(MemoryBroker(MemoryStore()))
    ready: list[facts.DaemonReady] = []
    runtime.events.subscribe(facts.DaemonReady, ready.append)
    runtime.start()
    assert runtime.state == "running"
    assert runtime.run(burst=True, handle_signals=False) == 0
    assert (runtime.state, len(ready)) == ("stopped", 1), "it was not started twice"


def test_a_start_that_is_refused_says_why() -> None:
    class Refusing(MemoryBroker):
        def open(self, *args: Any, **options: Any) -> Any:
            yield from ()
            raise BrokerRefused("no")

    with pytest.raises(BrokerRefused, match="no"):
        KQueueRuntime(Refusing(MemoryStore())).start()
