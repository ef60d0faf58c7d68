"""Timers: virtual time passes at once, and neither nonsense nor a hundred thousand time-outs harm anybody."""

from __future__ import annotations

import random
import socket
from collections import deque
from typing import Any

import pytest

from kqueue.kernel import (
    READ,
    Kernel,
    Park,
    Task,
    run,
    sleep,
    wait_io,
)

from .conftest import HOUR, Refuse, Stop, ending, now

# -- timers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.001, 1, HOUR, 365 * 24 * HOUR, 1e12])
def test_virtual_time_passes_at_once(kernel: Kernel, seconds: float) -> None:
    def job() -> Any:
        yield sleep(seconds)

    kernel.run(job())
    assert now(kernel) == seconds


@pytest.mark.parametrize("seconds", [0, -1, -HOUR, float("-inf")])
def test_sleeping_no_time_lets_the_others_run_once(kernel: Kernel, seconds: float) -> None:
    log = []

    def job() -> Any:
        yield sleep(seconds)
        log.append("slept")

    def other() -> Any:
        log.append("other")
        yield

    ending(kernel, kernel.spawn(job()), kernel.spawn(other()))
    assert log == ["other", "slept"]
    assert now(kernel) == 0


@pytest.mark.parametrize("seconds", [float("nan"), "5", None, 10**400, [1]], ids=repr)
def test_a_time_that_is_none_harms_only_who_asked_for_it(kernel: Kernel, seconds: Any) -> None:
    """NaN compares with nothing: in the heap it would hide everybody's timers."""

    def bad() -> Any:
        with pytest.raises((TypeError, ValueError, OverflowError)):
            yield sleep(seconds)
        with pytest.raises((TypeError, ValueError, OverflowError)):
            yield Park(deque(), seconds) if seconds is not None else Refuse(ValueError())
        return "goes on"

    def good(number: int) -> Any:
        yield sleep(number)
        return now(kernel)

    goods = [kernel.spawn(good(number)) for number in (3, 1, 2)]
    task = kernel.spawn(bad())
    more = [kernel.spawn(good(number)) for number in (6, 4, 5)]
    ending(kernel, task, *goods, *more)
    assert task.value == "goes on"
    assert [each.value for each in goods + more] == [3, 1, 2, 6, 4, 5]


def test_an_infinite_wait_never_ends_and_stops_nobody(kernel: Kernel) -> None:
    def forever() -> Any:
        yield sleep(float("inf"))

    def job() -> Any:
        yield sleep(HOUR)
        return now(kernel)

    task = kernel.spawn(forever())
    assert kernel.run(job()) == HOUR
    assert task.parked
    assert len(kernel.timers) == 0


@pytest.mark.parametrize("seconds", [1e6, 1e12, 1e300])
def test_no_wait_is_longer_than_the_selector_takes(seconds: float) -> None:
    kernel = Kernel()
    ours, theirs = socket.socketpair()

    def sleeper() -> Any:
        yield sleep(seconds)

    def job() -> Any:
        theirs.close()  # or this test would take as long
        return (yield wait_io(ours.fileno(), READ))

    kernel.spawn(sleeper())
    kernel.turn()
    assert kernel.run(job()) == READ
    ours.close()
    kernel.close()


def test_equal_deadlines_come_in_the_order_in_which_they_were_armed(kernel: Kernel) -> None:
    log = []

    def job(name: int) -> Any:
        yield sleep(1)
        log.append(name)

    ending(kernel, *[kernel.spawn(job(name)) for name in range(50)])
    assert log == list(range(50))


def test_time_outs_that_never_fire_do_not_pile_up(kernel: Kernel) -> None:
    queue: deque[Task] = deque()

    def job() -> Any:
        most = 0
        for _ in range(50_000):
            yield Park(queue, timeout_s=30)
            most = max(most, len(kernel.timers))
        return most

    def waker() -> Any:
        while True:
            kernel.unpark(queue)
            yield

    kernel.spawn(waker())
    assert kernel.run(job()) < 3000


def test_cancelled_timers_do_not_pile_up(kernel: Kernel) -> None:
    queue: deque[Task] = deque()

    def job() -> Any:
        yield Park(queue)

    task = kernel.spawn(job())
    kernel.turn()
    for _ in range(100_000):
        kernel.throw_at(task, 30, Stop(), 1).cancel()
    assert len(kernel.timers) < 3000
    kernel.unpark(queue)
    ending(kernel, task)


def test_live_timers_survive_when_the_heap_is_looked_through(kernel: Kernel) -> None:
    def sleeper(seconds: float) -> Any:
        yield sleep(seconds)
        return now(kernel)

    delays = random.Random(1).sample(range(1, 100_000), 5000)
    tasks = [kernel.spawn(sleeper(delay)) for delay in delays]
    victim = kernel.spawn(sleeper(200_000))
    kernel.turn()
    for _ in range(20_000):
        kernel.throw_at(victim, 100_000, Stop(), 1).cancel()
    ending(kernel, victim, *tasks)
    assert [task.value for task in tasks] == delays


@pytest.mark.parametrize("seed", range(5))
def test_the_heap_is_in_order_whatever_was_taken_out_of_it(kernel: Kernel, seed: int) -> None:
    def waiting() -> Any:
        yield Park(deque())

    dice = random.Random(seed)
    task = kernel.spawn(waiting())
    kernel.turn()
    timers, live = kernel.timers, []
    for _ in range(5000):
        when = dice.random()
        timer = kernel.throw_at(task, when, Stop(), 1)
        if dice.random() < 0.8:
            timer.cancel()
        else:
            live.append((when, timer))
    assert timers.next_deadline() == min(live)[0]
    due = [timer for timer in timers.pop_due(0.5) if not timer.stale]
    assert due == [timer for when, timer in sorted(live, key=lambda entry: entry[0]) if when <= 0.5]
    assert timers.next_deadline() == min(when for when, _ in live if when > 0.5)


def test_thousands_of_time_outs_at_one_moment_fire_once_each(kernel: Kernel) -> None:
    """Each of them arms another timer, the end of the grace, while the heap is being emptied."""
    thrown: list[int] = []

    def inner() -> Any:
        yield sleep(HOUR)

    def job(number: int) -> Any:
        try:
            yield run(inner())
        except Stop:
            thrown.append(number)
            yield sleep(0.5)
            return "cleaned up"

    tasks = [kernel.spawn(job(number)) for number in range(3000)]
    for task in tasks:
        kernel.throw_at(task, 10, Stop(), 5)
    ending(kernel, *tasks)
    assert sorted(thrown) == list(range(3000))
    assert {task.value for task in tasks} == {"cleaned up"}


def test_when_nothing_can_ever_happen_virtual_time_says_so(kernel: Kernel) -> None:
    def job() -> Any:
        yield Park(deque())

    with pytest.raises(RuntimeError, match="every task waits for another one"):
        kernel.run(job())


def test_the_real_clock_sleeps_at_least_as_long_as_asked() -> None:
    kernel = Kernel()

    def job() -> Any:
        began = now(kernel)
        yield sleep(0.01)
        return now(kernel) - began

    assert kernel.run(job()) >= 0.01
    kernel.close()
