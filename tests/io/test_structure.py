"""gather, race, timeout, Semaphore, Queue: what belongs together ends together, whatever ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from kqueue import io
from kqueue.errors import JobCancelled, JobTimedOut, UsageError
from kqueue.io.operation import operation
from kqueue.io.scopes import ScopeEnded
from kqueue.kernel import Kernel, Task, VirtualClock, join, sleep

NAME: ContextVar[str] = ContextVar("NAME", default="")


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """On a virtual clock; in the end every task has ended."""
    kernel = Kernel(clock=VirtualClock())
    tasks: list[Task] = []
    spawn = kernel.spawn

    def noted(*args: Any, **kwargs: Any) -> Task:
        tasks.append(spawn(*args, **kwargs))
        return tasks[-1]

    kernel.spawn = noted  # type: ignore[method-assign]
    yield kernel
    assert [task for task in tasks if not task.ended] == []
    assert kernel.abandoned == []
    kernel.close()


def later(value: Any, after_s: float = 1.0, error: BaseException | None = None, log: list[Any] | None = None) -> Any:
    try:
        yield sleep(after_s)
        if error is not None:
            raise error
        return value
    except BaseException as thrown:
        if log is not None:
            log.append((value, type(thrown)))
            yield sleep(0.1)  # cleaning up takes a while
            log.append((value, "clean"))
        raise


# -- gather ---------------------------------------------------------------------------------------------------------------


def test_gather_takes_all_kinds_and_keeps_their_order(kernel: Kernel) -> None:
    async def coroutine() -> str:
        await sleep(2)
        return "c"

    @operation
    def an_operation() -> Any:
        yield from sleep(1)
        return "o"

    def job() -> Any:
        found = yield io.gather(later("g", 3), coroutine(), an_operation(), sleep(0.5))
        return found, kernel.clock.monotonic()

    async def asynchronous() -> Any:
        return await io.gather(later("g", 3), coroutine(), an_operation()), await io.gather()

    assert kernel.run(job()) == (["g", "c", "o", None], 3)
    assert kernel.run(asynchronous()) == (["g", "c", "o"], [])


def test_gather_runs_as_many_at_once_as_it_may(kernel: Kernel) -> None:
    running: list[int] = []
    most = []

    def one(number: int) -> Any:
        running.append(number)
        most.append(len(running))
        yield sleep(1)
        running.remove(number)
        return number

    def job() -> Any:
        return (yield io.gather(*(one(number) for number in range(10)), limit=3)), kernel.clock.monotonic()

    assert kernel.run(job()) == (list(range(10)), 4)
    assert max(most) == 3


def test_the_first_error_ends_the_others_and_waits_for_them(kernel: Kernel) -> None:
    log: list[Any] = []
    never = []

    async def unstarted() -> None:
        never.append(1)

    def job() -> Any:
        with pytest.raises(ValueError, match="boom"):
            yield io.gather(later("a", 9, log=log), later("b", 1, ValueError("boom")), unstarted_later(), limit=2)
        log.append(kernel.clock.monotonic())

    def unstarted_later() -> Any:
        return unstarted()

    kernel.run(job())
    assert log == [("a", JobCancelled), ("a", "clean"), 1.1]
    assert never == []


@pytest.mark.parametrize("function", [io.gather, io.race])
def test_what_ends_the_job_ends_its_tasks(kernel: Kernel, function: Callable[..., Any]) -> None:
    log: list[Any] = []

    def job() -> Any:
        try:
            yield function(later("a", 9, log=log), later("b", 9, log=log))
        finally:
            log.append("job")

    kernel.on_crash = lambda task: None
    task = kernel.spawn(job())
    kernel.throw_at(task, 2.0, JobTimedOut("its time is up"), 1.0)
    with pytest.raises(JobTimedOut, match="its time is up"):
        kernel.run(waiting(task))
    assert sorted(log[:2]) == [("a", JobCancelled), ("b", JobCancelled)]
    assert log[-1] == "job"


def waiting(task: Task) -> Any:
    return (yield join(task))


def test_a_task_that_does_not_want_to_end_does_not_outlive_the_job_by_more_than_its_grace(kernel: Kernel) -> None:
    def stubborn() -> Any:
        while True:
            try:
                yield sleep(100)
            except JobCancelled:
                continue

    task = kernel.spawn(io.gather(stubborn(), later("a", 1, ValueError("boom"))).__await__())
    kernel.throw_at(task, 5.0, JobTimedOut("up"), 1.0)
    while not task.ended:
        kernel.turn()
    assert kernel.clock.monotonic() <= 6.5
    assert {type(each.error).__name__ for each in kernel.abandoned} == {"Abandoned"}
    kernel.abandoned.clear()


def test_gather_is_particular_about_what_it_takes(kernel: Kernel) -> None:
    def job() -> Any:
        with pytest.raises(TypeError, match="call the function"):
            yield io.gather(later)
        with pytest.raises(UsageError):
            yield io.gather(later(1), limit=0)
        with pytest.raises(UsageError):
            yield io.race()

    kernel.run(job())


def test_context_variables_go_down_and_not_up(kernel: Kernel) -> None:
    def child(name: str) -> Any:
        before = NAME.get()
        NAME.set(name)
        yield sleep(1)
        return before, NAME.get()

    def job() -> Any:
        NAME.set("parent")
        found = yield io.gather(child("a"), child("b"))
        return found, NAME.get()

    assert kernel.run(job()) == ([("parent", "a"), ("parent", "b")], "parent")
    assert kernel.run(child("other")) == ("", "other")


def test_gathers_nest(kernel: Kernel) -> None:
    log: list[Any] = []

    def job() -> Any:
        with pytest.raises(ValueError, match="deep"):
            yield io.gather(
                io.gather(later("a", 9, log=log), io.gather(later("b", 9, log=log))), later("c", 1, ValueError("deep"))
            )

    kernel.run(job())
    assert sorted(entry for entry in log if entry[1] == "clean") == [("a", "clean"), ("b", "clean")]


# -- race -----------------------------------------------------------------------------------------------------------------


def test_race_is_won_by_the_first(kernel: Kernel) -> None:
    log: list[Any] = []

    def job() -> Any:
        won = yield io.race(later("slow", 9, log=log), later("quick", 1), later("fails", 5, ValueError()))
        with pytest.raises(ValueError, match="first"):
            yield io.race(later("slow", 9), later("x", 1, ValueError("first")))
        return won

    assert kernel.run(job()) == "quick"
    assert log == [("slow", JobCancelled), ("slow", "clean")]


# -- timeout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outer_s", "inner_s", "raised_by"), [(5, 1, "inner"), (1, 5, "outer"), (1, 1, "outer")])
def test_the_right_scope_ends(kernel: Kernel, outer_s: float, inner_s: float, raised_by: str) -> None:
    def job() -> Any:
        caught = []
        with io.timeout(20) as outermost:
            try:
                with io.timeout(outer_s) as outer:
                    try:
                        with io.timeout(inner_s) as inner:
                            try:
                                yield sleep(9)
                            except Exception:
                                caught.append("a scope's end is no Exception")
                    except io.TimedOut:
                        assert inner.expired
                        caught.append("inner")
            except io.TimedOut:
                assert outer.expired
                caught.append("outer")
            yield sleep(0)
        assert not outermost.expired
        return caught, kernel.clock.monotonic()

    assert kernel.run(job()) == ([raised_by], 1)


def test_a_scope_that_was_left_in_time_does_nothing_later(kernel: Kernel) -> None:
    async def job() -> Any:
        scope = io.timeout(1)
        async with scope:
            await sleep(0.5)
        with pytest.raises(UsageError):
            scope.__enter__()
        await sleep(5)
        return scope.expired

    assert kernel.run(job()) is False


def test_the_jobs_own_end_passes_through_a_scope(kernel: Kernel) -> None:
    def job() -> Any:
        with io.timeout(2):
            yield sleep(9)

    kernel.on_crash = lambda task: None
    for at in (1.0, 2.0):
        began = kernel.clock.monotonic()
        task = kernel.spawn(job())
        kernel.throw_at(task, began + at, JobTimedOut("job"), 1.0)
        while not task.ended:
            kernel.turn()
        assert isinstance(task.error, JobTimedOut)


def test_a_scope_that_ends_a_gather_ends_its_tasks(kernel: Kernel) -> None:
    log: list[Any] = []

    def job() -> Any:
        with pytest.raises(io.TimedOut), io.timeout(1):
            yield io.gather(later("a", 9, log=log), later("b", 9, log=log))
        return kernel.clock.monotonic()

    assert kernel.run(job()) == 1.1
    assert len([entry for entry in log if entry[1] == "clean"]) == 2


def test_a_busy_task_is_interrupted_too(kernel: Kernel) -> None:
    class Ticking(VirtualClock):
        def monotonic(self) -> float:
            self.now += 0.001
            return self.now

    kernel.clock = Ticking()

    def job() -> Any:
        with io.timeout(1):
            while True:
                yield

    with pytest.raises(io.TimedOut, match="longer than the 1 s of its timeout scope"):
        kernel.run(job())


def test_what_came_at_the_last_moment_is_not_lost(kernel: Kernel) -> None:
    """A thing is put, and the time of who waits for it is up, in one turn: it has it, or it is still there."""

    def getter(queue: io.Queue[str]) -> Any:
        try:
            with io.timeout(1):
                return (yield queue.get())
        except io.TimedOut:
            return None

    def putter(queue: io.Queue[str]) -> Any:
        yield sleep(1)
        yield queue.put("thing")

    def job(putter_first: bool) -> Any:
        queue: io.Queue[str] = io.Queue(5)
        things = [putter(queue), getter(queue)] if putter_first else [getter(queue), putter(queue)]
        found = yield io.gather(*things)
        assert found.count("thing") + len(queue) == 1
        assert not queue._filled

    kernel.run(job(True))
    kernel.run(job(False))


def test_scope_ended_is_for_scopes_only() -> None:
    assert not issubclass(ScopeEnded, Exception)


# -- semaphore and queue --------------------------------------------------------------------------------------------------


def test_a_semaphore_is_fair_and_loses_no_place(kernel: Kernel) -> None:
    slots = io.Semaphore(2)
    order = []

    def user(number: int) -> Any:
        with (yield slots.acquire()):
            order.append(number)
            yield sleep(1)

    async def impatient() -> None:
        with pytest.raises(io.TimedOut):
            await slots.acquire(timeout=0.5)
        with pytest.raises(io.TimedOut):
            async with io.timeout(1), slots:
                await sleep(5)

    def job() -> Any:
        yield io.gather(*(user(number) for number in range(4)), impatient(), user(4), user(5))
        assert slots._free == 2
        assert not slots._waiting

    kernel.run(job())
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_queue_is_bounded_and_ends(kernel: Kernel) -> None:
    queue: io.Queue[int] = io.Queue(3)
    fullest = []

    def producer() -> Any:
        for number in range(20):
            yield queue.put(number)
            fullest.append(len(queue))
        queue.close()
        with pytest.raises(io.Closed):
            yield queue.put(99)

    def consumer() -> Any:
        got = []
        while True:
            try:
                got.append((yield queue.get()))
            except io.Closed:
                return got
            yield sleep(0.1)

    def job() -> Any:
        _, one, other = yield io.gather(producer(), consumer(), consumer())
        assert sorted(one + other) == list(range(20))
        with pytest.raises(io.TimedOut):
            yield io.Queue(1).get(timeout=1)

    kernel.run(job())
    assert max(fullest) <= 3
