"""Cancelling is one throw and a short grace in which traps still work; then the task is abandoned."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from kqueue.kernel import (
    READ,
    WRITE,
    Abandoned,
    Kernel,
    Park,
    Task,
    Trap,
    run,
    sleep,
    wait_io,
)

from .conftest import HOUR, Pair, Stop, ending, joining, later, now

# -- cancelling -------------------------------------------------------------------------------------------------------------


def test_cancelling_is_one_throw_at_the_trap(kernel: Kernel) -> None:
    def job() -> Any:
        try:
            yield sleep(HOUR)
        except Stop as error:
            return str(error)

    task = kernel.spawn(job())
    kernel.turn()
    kernel.cancel(task, Stop("why"))
    assert ending(kernel, task) == "why"
    assert now(kernel) == 0


def test_traps_still_work_while_it_cleans_up(kernel: Kernel, pair: Pair) -> None:
    ours, theirs = pair

    async def job() -> Any:
        try:
            await sleep(HOUR)
        finally:
            await sleep(0.5)
            await wait_io(ours.fileno(), WRITE)
            ours.send(b"goodbye")
            assert await run(later("value", after_s=0.25)) == "value"

    task = kernel.spawn(job())
    kernel.turn()
    kernel.cancel(task, Stop(), grace_s=1)
    ending(kernel, task)
    assert isinstance(task.error, Stop)
    assert theirs.recv(100) == b"goodbye"
    assert now(kernel) == 0.75


def test_a_task_that_was_cancelled_before_its_first_step_never_begins(kernel: Kernel) -> None:
    begun = []

    def job() -> Any:
        begun.append(True)
        yield

    task = kernel.spawn(job())
    kernel.cancel(task, Stop())
    ending(kernel, task)
    assert isinstance(task.error, Stop)
    assert begun == []


def test_cancelling_a_ready_task_drops_what_was_on_its_way(kernel: Kernel) -> None:
    queue: deque[Task] = deque()

    def job() -> Any:
        try:
            return (yield Park(queue))
        except Stop:
            return "stopped"

    task = kernel.spawn(job())
    kernel.turn()
    kernel.unpark(queue, "a value")
    kernel.cancel(task, Stop())
    assert ending(kernel, task) == "stopped"


def test_cancelling_an_ended_task_does_nothing(kernel: Kernel) -> None:
    task = kernel.spawn(later("value"))
    ending(kernel, task)
    kernel.cancel(task, Stop())
    ending(kernel, kernel.spawn(later()))
    assert (task.value, task.error) == ("value", None)


def test_a_task_that_cancels_itself_is_told_at_once(kernel: Kernel) -> None:
    def job() -> Any:
        assert kernel.current is not None
        kernel.cancel(kernel.current, Stop("myself"))
        yield

    with pytest.raises(Stop, match="myself"):
        kernel.run(job())


def test_a_second_cancel_throws_again_and_does_not_prolong_the_grace(kernel: Kernel) -> None:
    thrown = []

    def stubborn() -> Any:
        while True:
            try:
                yield sleep(HOUR)
            except Stop as error:
                thrown.append(str(error))

    task = kernel.spawn(stubborn())
    kernel.turn()
    kernel.cancel(task, Stop("1"), grace_s=1)
    kernel.run(later(after_s=0.5))
    kernel.cancel(task, Stop("2"), grace_s=100)
    ending(kernel, task)
    assert thrown == ["1", "2"]
    assert now(kernel) == 1
    assert isinstance(task.error, Abandoned)


def test_who_ignores_its_cancellation_is_abandoned_after_its_grace(kernel: Kernel) -> None:
    ends, log = [], []

    def stubborn() -> Any:
        try:
            while True:
                try:
                    yield sleep(HOUR)
                except Stop:
                    log.append("ignored")
        finally:
            log.append("closed")

    task = kernel.spawn(stubborn(), name="stubborn")
    task.on_end = ends.append
    kernel.turn()
    kernel.cancel(task, Stop(), grace_s=2)
    with pytest.raises(Abandoned, match="stubborn ignored its cancellation for 2 s"):
        kernel.run(joining(task))
    assert now(kernel) == 2
    assert ends == [task]
    assert kernel.abandoned == [task]
    assert not task.parked
    kernel.run(later(after_s=3 * HOUR))
    assert log == ["ignored"], "it was never resumed, and never closed"
    kernel.close()
    gc.collect()
    assert log == ["ignored"], "and is kept, so that it is not collected either"


def test_an_abandoned_task_takes_no_fd_and_no_place_with_it(kernel: Kernel, pair: Pair) -> None:
    def stubborn(trap: Callable[[], Trap]) -> Any:
        while True:
            try:
                yield trap()
            except Stop:
                continue

    queue: deque[Task] = deque()
    traps: list[Callable[[], Trap]] = [
        lambda: wait_io(pair[0].fileno(), READ), lambda: Park(queue), lambda: run(later(after_s=HOUR))
    ]  # fmt: skip
    tasks = [kernel.spawn(stubborn(trap)) for trap in traps]
    kernel.turn()
    for task in tasks:
        kernel.cancel(task, Stop(), grace_s=1)
    ending(kernel, *tasks, kernel.spawn(later(after_s=5)))
    assert kernel.abandoned == tasks
    assert (len(kernel.poller), list(queue), kernel.timers.next_deadline()) == (0, [], None)


def test_one_that_spins_is_abandoned_too(kernel: Kernel) -> None:
    steps = []

    def spinner() -> Any:
        while True:
            try:
                kernel.clock.now += 0.1  # type: ignore[attr-defined]
                steps.append(now(kernel))
                yield
            except Stop:
                continue

    task = kernel.spawn(spinner())
    kernel.turn()
    kernel.cancel(task, Stop(), grace_s=1)
    ending(kernel, task)
    assert isinstance(task.error, Abandoned)
    assert len(steps) < 20


@pytest.mark.parametrize("grace_s", [0, 0.5])
def test_the_throw_arrives_however_late_the_loop_is(kernel: Kernel, grace_s: float) -> None:
    """A loop that a blocking job kept for longer than the grace must not abandon tasks that never had a chance."""
    log = []

    def job() -> Any:
        try:
            yield sleep(HOUR)
        finally:
            log.append("cleaned up")

    def blocker() -> Any:
        yield
        for task in tasks:
            kernel.cancel(task, Stop(), grace_s)
        kernel.clock.now += 60  # type: ignore[attr-defined]

    tasks = [kernel.spawn(job()) for _ in range(3)]
    ending(kernel, *tasks, kernel.spawn(blocker()))
    assert log == ["cleaned up"] * 3
    assert kernel.abandoned == []


def test_one_that_is_about_to_finish_when_its_grace_ends_may(kernel: Kernel) -> None:
    def job() -> Any:
        try:
            yield sleep(HOUR)
        except Stop:
            yield sleep(0.25)
            return "cleaned up"

    def blocker() -> Any:
        yield sleep(0.125)
        kernel.clock.now += 60  # type: ignore[attr-defined]

    task = kernel.spawn(job())
    kernel.turn()
    kernel.cancel(task, Stop(), grace_s=0.5)
    ending(kernel, task, kernel.spawn(blocker()))
    assert task.value == "cleaned up"


def test_the_owner_is_told_once_however_it_ends(kernel: Kernel) -> None:
    ends: list[str] = []

    def fails() -> Any:
        yield
        raise ValueError("no")

    def stubborn() -> Any:
        while True:
            try:
                yield sleep(1)
            except Stop:
                continue

    tasks = [kernel.spawn(job, name=name) for name, job in [("ends", later()), ("fails", fails()), ("stubborn", stubborn())]]
    for task in tasks:
        task.on_end = lambda task: ends.append(task.name)
    kernel.turn()
    kernel.cancel(tasks[2], Stop(), grace_s=3)
    kernel.run(later(after_s=100))
    assert ends == ["fails", "ends", "stubborn"]


# -- time-outs by throw_at ----------------------------------------------------------------------------------------------------


def test_a_timed_throw_reaches_a_task_wherever_it_waits(kernel: Kernel, pair: Pair) -> None:
    def job(trap: Callable[[], Trap | None]) -> Any:
        try:
            while True:
                yield trap()
        except Stop:
            return now(kernel)

    def tick() -> Trap:
        kernel.clock.now += 0.5  # type: ignore[attr-defined]
        return sleep(0)

    traps: list[Callable[[], Trap | None]] = [
        lambda: sleep(0.7), lambda: Park(deque()), lambda: wait_io(pair[0].fileno(), READ), lambda: run(later(after_s=HOUR)), tick
    ]  # fmt: skip
    for trap in traps:
        task = kernel.spawn(job(trap))
        began = now(kernel)
        kernel.throw_at(task, began + 10, Stop(), grace_s=1)
        assert ending(kernel, task) == began + 10


def test_a_timed_throw_can_be_taken_back(kernel: Kernel) -> None:
    def job() -> Any:
        yield sleep(100)
        return "undisturbed"

    task = kernel.spawn(job())
    timer = kernel.throw_at(task, 10, Stop(), grace_s=1)
    kernel.run(later(after_s=5))
    timer.cancel()
    timer.cancel()
    assert ending(kernel, task) == "undisturbed"


def test_a_timed_throw_does_not_disturb_one_that_is_cleaning_up_already(kernel: Kernel) -> None:
    """A job that a shutdown has cancelled must not be timed out on top of it: that would cost it an attempt."""
    log = []

    def job() -> Any:
        try:
            yield sleep(HOUR)
        except Stop as error:
            log.append(str(error))
            yield sleep(2)
            log.append("cleaned up")

    task = kernel.spawn(job())
    kernel.throw_at(task, 10, Stop("time-out"), grace_s=1)
    kernel.run(later(after_s=9))
    kernel.cancel(task, Stop("shutdown"), grace_s=5)
    ending(kernel, task)
    assert log == ["shutdown", "cleaned up"]


def test_a_timed_throw_of_an_ended_task_does_nothing(kernel: Kernel) -> None:
    task = kernel.spawn(later("value"))
    kernel.throw_at(task, 10, Stop(), grace_s=1)
    ending(kernel, task)
    kernel.run(later(after_s=100))
    assert task.value == "value"
