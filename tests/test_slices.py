"""Memory of inline jobs: charged to the job that takes it, and to nobody else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kqueue
from kqueue.context import JobContext, enter
from kqueue.errors import JobOutgrew
from kqueue.events import Events
from kqueue.kernel import Clock, Kernel, Task, sleep
from kqueue.process import PAGE
from kqueue.slices import EVERY_SLICE, GROWING_MIB, LONG_S, LOOK_S, SUSPICIOUS_MIB, WINDOW_S, Slices
from tests.apps import growing
from tests.daemon import PATIENCE_S, Daemon

MIB = 1048576


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    modules = "[tests.apps.inline, tests.apps.growing]"
    daemon = Daemon(tmp_path, f"sqlite:///{tmp_path}/kqueue.db", modules=modules, isolated_modules="[]")
    yield daemon
    daemon.close()


def died(daemon: Daemon, handle: kqueue.JobHandle) -> dict[str, Any]:
    assert handle.wait(PATIENCE_S), "\n".join(daemon.log)
    row = daemon.client.store.show(handle.id)
    assert row is not None
    assert row.state == "dead"
    certificate: dict[str, Any] = json.loads(row.certificates[-1])
    return certificate


@pytest.mark.parametrize("hog", [growing.takes_at_once, growing.grows_slowly])
def test_a_job_that_grows_is_cancelled_with_the_numbers_and_its_neighbours_are_not(daemon: Daemon, hog: Any) -> None:
    daemon.start()
    neighbours = daemon.dispatch(*(growing.takes_little.job(300) for _ in range(3)))
    (handle,) = daemon.dispatch(hog.job())
    certificate = died(daemon, handle)
    assert (certificate["cause"], certificate["ended_by"], certificate["strategy"]) == ("memory", "supervisor", "inline")
    assert certificate["limits"] == {"timeout": 60, "max_memory": 64}
    assert certificate["max_memory_mib"] > 64
    assert certificate["error"]["class"] == "JobOutgrew"
    assert "max_memory is 64 MiB" in certificate["error"]["message"]
    if hog is growing.takes_at_once:
        assert certificate["max_memory_mib"] > 250
        daemon.marks.wait("let")
    assert [neighbour.result(PATIENCE_S) for neighbour in neighbours] == [301] * 3
    status = daemon.status()
    assert (status["state"], status["failed"]) == ("running", 1)
    assert status["memory_mib"] < 150, "it let go of what it had"
    assert daemon.stop() == 0


@pytest.mark.parametrize(("job", "rounds"), [(growing.leaves_garbage, 150), (growing.gives_back, 20)])
def test_what_is_not_kept_is_not_held_against_a_job(daemon: Daemon, job: Any, rounds: int) -> None:
    daemon.start()
    (handle,) = daemon.dispatch(job.job(rounds))
    assert handle.result(PATIENCE_S) == rounds
    assert daemon.stop() == 0


# -- the books, step by step --------------------------------------------------------------------------------------------------


class SetClock(Clock):
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class OwnStat:
    """As /proc would say."""

    def __init__(self) -> None:
        self.mib = 50.0
        self.waited = 0.0

    def resident_pages(self) -> float:
        return self.mib * MIB / PAGE

    def waited_s(self) -> float:
        return self.waited

    def close(self) -> None: ...


class Promotions:
    def __init__(self) -> None:
        self.heard: list[tuple[str, float]] = []

    def blocked(self, name: str, seconds: float, where: str, instead: str) -> None:
        self.heard.append((name, seconds))


class Books:
    """Slices over a kernel whose clock and memory are set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.own, self.promotions = SetClock(), OwnStat(), Promotions()
        monkeypatch.setattr("kqueue.slices.OwnStat", lambda: self.own)
        self.kernel = Kernel(clock=self.clock)
        self.slices = Slices(self.kernel, Events(), self.promotions, 0.1)  # type: ignore[arg-type]
        self.slices.start()

    def job(self, steps: Callable[[], Any], max_memory_mib: float = 64) -> Task:
        """A task that is a job; it runs `steps`."""

        def life() -> Any:
            enter(JobContext(
                id="x", name="the_job", queue="q", attempt=1, deadline=None, inline=True, services=None,  # type: ignore[arg-type]
                max_memory_mib=max_memory_mib,
            ))  # fmt: skip
            return (yield from steps())

        task = self.kernel.spawn(life(), name="job")
        task.mark = b"id"
        return task

    def take(self, mib: float, seconds: float = 0.002) -> None:
        """What a slice does."""
        self.own.mib += mib
        self.clock.now += seconds


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    books = Books(monkeypatch)
    yield books
    books.slices.close()
    books.kernel.close()


def test_only_long_slices_are_looked_at_until_memory_grows(books: Books) -> None:
    def steps() -> Any:
        for _ in range(10):
            books.take(1.0, LONG_S / 2)
            yield

    task = books.job(steps)
    books.kernel.turn()
    books.kernel.turn()
    assert books.slices.charged_mib(task) == 0, "nobody looked"
    for _ in range(8):
        books.clock.now += LOOK_S
        books.kernel.turn()
    assert books.own.mib == 50 + 10 > 50 + SUSPICIOUS_MIB
    assert books.kernel.max_slice_s == EVERY_SLICE
    books.clock.now += WINDOW_S + LOOK_S
    books.kernel.turn()  # it ends
    books.own.mib += GROWING_MIB / 2
    books.clock.now += WINDOW_S + LOOK_S
    books.job(lambda: iter(()))
    books.kernel.turn()
    assert books.kernel.max_slice_s == LONG_S, "it is calm again"


def test_each_is_charged_with_its_own_and_the_first_over_its_limit_goes(books: Books) -> None:
    outcomes: list[Any] = []

    def steps(mib: float) -> Any:
        try:
            for _ in range(20):
                books.take(mib)
                yield sleep(0)
            outcomes.append((mib, "ok"))
        except JobOutgrew as error:
            outcomes.append((mib, error.grown_mib))
            books.take(-20 * mib)

    def ours() -> Any:
        for _ in range(20):
            books.take(30.0)  # KQueue's own growth is no job's
            yield sleep(0)

    tasks = [books.job(lambda: steps(10.0)), books.job(lambda: steps(1.0))]
    books.kernel.spawn(ours())
    while not all(task.ended for task in tasks):
        books.kernel.turn()
    assert outcomes == [(10.0, pytest.approx(70.0)), (1.0, "ok")]


def test_a_job_without_a_limit_and_one_that_has_just_ended_are_left_alone(books: Books) -> None:
    def ends() -> Any:
        books.take(500)
        return
        yield

    def stays() -> Any:
        books.take(500)
        yield sleep(0)
        return "well"

    tasks = [books.job(ends), books.job(stays, max_memory_mib=0)]
    while not all(task.ended for task in tasks):
        books.kernel.turn()
    assert [(task.value, task.error) for task in tasks] == [(None, None), ("well", None)]


def test_a_slice_counts_as_blocking_by_what_the_job_did(books: Books) -> None:
    def steps(waited: float, stopped: bool) -> Any:
        def slice() -> Any:
            books.clock.now += 0.15
            books.own.waited += waited
            if stopped:
                books.kernel.resumed_at = books.clock.now - 0.01
            return
            yield

        return slice

    for waited, stopped in ((0.0, False), (0.1, False), (0.0, True), (0.04, False)):
        books.job(steps(waited, stopped))
        books.kernel.turn()
        books.clock.now += 1
    heard = books.promotions.heard
    assert heard == [("the_job", pytest.approx(0.15))] * 2, "neither waiting for a CPU nor a SIGSTOP is its doing"
