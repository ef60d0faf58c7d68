"""Status: the document of INTERFACES, true to what the runtime does, and harmless to ask for."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import Any

import pytest

from kqueue import KQueueRuntime, job, progress, sleep
from kqueue import events as facts
from kqueue.brokers.memory import shared_store
from kqueue.client import Client, open_store
from kqueue.config import QueueSpec
from kqueue.errors import BrokerUnavailable
from kqueue.kernel import Park, Task, VirtualClock
from kqueue.loading import template_config
from kqueue.observe.status import Status
from kqueue.observe.titles import Titles
from kqueue.outcome import Outcome
from tests.daemon import ROOT

Steps = Generator[Any, Any, Any]

_numbers = count()


@job(name="status_waits")
def waits() -> Any:
    yield progress(0.25, "a quarter")
    yield sleep(3600)


@job(name="status_fails", max_attempts=2, backoff=[0])
def fails() -> Any:
    yield
    raise ValueError("no such luck")


@job(name="status_lingers", isolated=True, timeout=0)
def lingers() -> None:
    progress(0.5)
    time.sleep(3600)


class Rig:
    """A runtime on a memory broker of its own, and a script that runs beside it on the same kernel and ends it."""

    def __init__(self, **options: Any) -> None:
        self.url = f"memory://status-{next(_numbers)}"
        self.runtime = KQueueRuntime(self.url, grace_s=0.0, kill_grace_s=0.1, **options)
        self.client = Client(open_store(self.url))
        self.status = Status(self.runtime)

    def until(self, kind: type[Any], wanted: Callable[[Any], bool] = lambda fact: True) -> Steps:
        """Wait for the next fact of `kind` that is `wanted`."""
        queue: deque[Task] = deque()

        def tell(fact: Any) -> None:
            self.runtime.kernel.unpark(queue, fact)

        self.runtime.events.subscribe(kind, tell)
        while True:
            fact = yield Park(queue)
            if wanted(fact):
                return fact

    def run(self, script: Callable[[], Steps]) -> Any:
        """What `script` returns."""

        def ended(task: Task) -> None:
            self.runtime.stop()

        task = self.runtime.kernel.spawn(script(), name="script")
        task.on_end = ended
        self.runtime.run(handle_signals=False)
        assert task.ended
        if task.error is not None:
            raise task.error
        return task.value

    def document(self) -> Steps:
        return self.status.command({"command": "status"})


@pytest.fixture
def no_leak() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_document_has_exactly_the_fields_of_the_interface() -> None:
    rig = Rig(queues=[QueueSpec("default"), QueueSpec("mail")])
    rig.client.dispatch([waits.job()])

    def script() -> Steps:
        yield from rig.until(facts.JobProgress)
        return (yield from rig.document())

    found = rig.run(script)
    counters = ["processed", "failed", "retried", "killed", "forgotten", "leases_lost"]
    known = ["pid", "version", "uptime_s", "state", "memory_mib", *counters, "running", "queues", "loop", "memory_budget", "jobs"]
    assert list(found) == known
    assert (found["pid"], found["state"]) == (os.getpid(), "running")
    assert found["memory_mib"] > 5
    assert found["queues"] == {
        "default": {"ready": 0, "delayed": 0, "leased": 1, "dead": 0},
        "mail": {"ready": 0, "delayed": 0, "leased": 0, "dead": 0},
    }
    (running,) = found["running"]
    assert list(running) == ["id", "job", "strategy", "pid", "elapsed_s", "memory_mib", "progress"]
    assert (running["job"], running["strategy"], running["progress"]) == ("status_waits", "inline", 0.25)
    assert (running["pid"], running["memory_mib"]) == (None, None), "an inline job has no process of its own"
    assert list(found["loop"]) == ["lag_ms_p50", "lag_ms_p99", "turns_per_s"]
    assert 0 <= found["loop"]["lag_ms_p50"] <= found["loop"]["lag_ms_p99"]


def test_attempts_are_counted_by_what_became_of_them() -> None:
    rig = Rig()
    rig.client.dispatch([fails.job()])

    def script() -> Steps:
        yield from rig.until(facts.JobEnded, lambda fact: fact.then == "dead")
        return (yield from rig.document())

    found = rig.run(script)
    assert (found["processed"], found["failed"], found["retried"], found["killed"]) == (2, 2, 1, 0)
    assert found["queues"]["default"]["dead"] == 1
    assert found["running"] == []


def test_a_child_shows_with_its_pid_and_its_own_memory_and_counts_as_killed(no_leak: None) -> None:
    rig = Rig(template=template_config([str(ROOT)], [], ["tests.test_status"]))
    rig.client.dispatch([lingers.job()])

    def script() -> Steps:
        yield from rig.until(facts.JobProgress)
        during = yield from rig.document()
        os.kill(during["running"][0]["pid"], 9)
        yield from rig.until(facts.JobEnded)
        return during, (yield from rig.document())

    during, after = rig.run(script)
    (running,) = during["running"]
    assert running["strategy"] == "isolated"
    assert running["pid"] not in (None, os.getpid())
    assert running["memory_mib"] > 1
    assert (after["killed"], after["retried"]) == (1, 1)


@pytest.mark.parametrize(
    ("outcome", "killed"),
    [
        (Outcome("ok", pid=7), 0),
        (Outcome("exception", pid=7), 0),
        (Outcome("refused", "supervisor", pid=7), 0),
        (Outcome("timeout", "supervisor", pid=7), 1),
        (Outcome("signal", "operator", signal="SIGKILL", pid=7), 1),
        (Outcome("timeout", "supervisor"), 0),  # inline: there was nothing to kill
    ],
)
def test_killed_are_children_that_something_other_than_the_job_ended(outcome: Outcome, killed: int) -> None:
    rig = Rig()
    rig.runtime.events.emit(facts.JobEnded("i", "j", "isolated", "q", outcome, "dead", 0.0))
    rig.runtime.state = "starting"  # so that the broker is not asked
    found = rig.runtime.kernel.run(rig.document())
    rig.runtime.kernel.close()
    assert found["killed"] == killed


def test_however_often_it_is_asked_the_broker_counts_once_a_second() -> None:
    rig = Rig()
    counted = 0
    stats = rig.runtime.broker.stats

    def counting() -> Any:
        nonlocal counted
        counted += 1
        return stats()

    rig.runtime.broker.stats = counting  # type: ignore[method-assign]

    def script() -> Steps:
        yield from rig.until(facts.DaemonReady)
        for _ in range(50):
            yield from rig.document()

    rig.run(script)
    assert counted == 1


@pytest.mark.parametrize("trouble", ["silent", "failing"])
def test_a_broker_that_does_not_answer_leaves_the_counts_that_were_known(trouble: str) -> None:
    rig = Rig(clock=VirtualClock())
    rig.client.dispatch([fails.options(delay=3600).job()])

    def unanswered() -> Steps:
        if trouble == "failing":
            raise BrokerUnavailable("it is away")
        yield Park(deque())

    def script() -> Steps:
        yield from rig.until(facts.DaemonReady)
        before = yield from rig.document()
        rig.runtime.broker.stats = unanswered  # type: ignore[method-assign]
        rig.status._count_again_at = 0.0
        return before, (yield from rig.document())

    before, after = rig.run(script)
    assert before["queues"] == after["queues"] == {"default": {"ready": 0, "delayed": 1, "leased": 0, "dead": 0}}


def test_it_answers_before_the_broker_does() -> None:
    rig = Rig()
    found = rig.runtime.kernel.run(rig.document())
    rig.runtime.kernel.close()
    assert (found["state"], found["queues"], found["running"]) == ("starting", {}, [])


def test_the_title_says_how_it_is_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("kqueue.observe.titles.setproctitle", titles.append)
    rig = Rig()
    Titles(rig.runtime, "main")
    rig.client.dispatch([fails.job()])

    def script() -> Steps:
        yield from rig.until(facts.JobEnded, lambda fact: fact.then == "dead")

    rig.run(script)
    assert titles[0] == "kqueued: main starting, 0 jobs, 0 processed, 0 failed"
    assert titles[1].startswith("kqueued: main running, 0 jobs")
    assert titles[-1] == "kqueued: main terminating, 0 jobs, 2 processed, 2 failed"
    assert shared_store(rig.url).stats()["default"].dead == 1
