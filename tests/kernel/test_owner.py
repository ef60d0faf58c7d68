"""What those who own a kernel and its tasks can rely on: contexts, reports, signals, and that nothing leaks."""

from __future__ import annotations

import contextvars
import gc
import os
import random
import signal
import socket
from collections import deque
from typing import Any

import pytest

from kqueue.kernel import (
    PARKED,
    READ,
    Kernel,
    Park,
    Task,
    Trap,
    VirtualClock,
    join,
    run,
    sleep,
    wait_any,
    wait_io,
    wait_process,
)
from kqueue.kernel.signals import Signals

from .conftest import HOUR, Pair, Stop, ending, joining, later, now, open_fds, turns

# -- context variables --------------------------------------------------------------------------------------------------------

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def test_context_variables_do_not_leak_into_other_tasks(kernel: Kernel) -> None:
    def job(name: str) -> Any:
        before = variable.get()
        variable.set(name)
        yield sleep(1)
        yield
        inner = yield run(asks())
        return before, inner, variable.get()

    def asks() -> Any:
        seen = variable.get()
        variable.set("of the inner one")
        yield
        return seen

    tasks = [kernel.spawn(job(name)) for name in "ab"]
    ending(kernel, *tasks)
    assert [task.value for task in tasks] == [("unset", "a", "a"), ("unset", "b", "b")]
    assert variable.get() == "unset"


def test_a_task_begins_with_what_its_spawner_sees(kernel: Kernel) -> None:
    def job() -> Any:
        yield
        return variable.get()

    def spawner() -> Any:
        variable.set("of the spawner")
        task = kernel.spawn(job())
        variable.set("changed since")
        return (yield join(task))

    assert kernel.run(spawner()) == "of the spawner"
    empty = contextvars.Context()
    assert ending(kernel, kernel.spawn(job(), context=empty)) == "unset"


# -- what the owner hears -----------------------------------------------------------------------------------------------------


def test_a_step_that_keeps_the_loop_is_reported_before_its_end() -> None:
    kernel = Kernel(clock=VirtualClock(), max_slice_s=0.1)
    heard: list[Any] = []
    kernel.on_slow = lambda task, seconds: heard.append((task.name, seconds))

    def blocks() -> Any:
        kernel.clock.now += 0.05  # type: ignore[attr-defined]
        yield
        kernel.clock.now += 0.5  # type: ignore[attr-defined]
        yield
        kernel.clock.now += 0.25  # type: ignore[attr-defined]

    task = kernel.spawn(blocks(), name="blocks")
    task.on_end = lambda task: heard.append("ended")
    ending(kernel, task)
    assert heard == [("blocks", pytest.approx(0.5)), ("blocks", pytest.approx(0.25)), "ended"]
    assert kernel.lag_s()[-1] == pytest.approx(0.5)
    assert kernel.lag_s() == sorted(kernel.lag_s())
    kernel.close()


def test_the_very_first_step_can_be_too_slow_as_well() -> None:
    kernel = Kernel(clock=VirtualClock(), max_slice_s=0.1)
    heard = []
    kernel.on_slow = lambda task, seconds: heard.append(seconds)

    def blocks() -> Any:
        kernel.clock.now += 5  # type: ignore[attr-defined]
        yield

    kernel.run(blocks())
    assert heard == [5]
    kernel.close()


def test_nobody_is_reported_when_no_limit_is_set(kernel: Kernel) -> None:
    heard = []
    kernel.on_slow = lambda task, seconds: heard.append(task)

    def blocks() -> Any:
        kernel.clock.now += HOUR  # type: ignore[attr-defined]
        yield

    kernel.run(blocks())
    assert heard == []


def test_an_error_nobody_joined_is_reported(kernel: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    heard = []
    kernel.on_crash = heard.append
    task = kernel.spawn(later(error=ValueError("unheard")))
    kernel.run(later(after_s=5))
    assert heard == [task]

    loud = Kernel(clock=VirtualClock())
    loud.spawn(later(error=ValueError("unheard")), name="loud")
    loud.run(later(after_s=5))
    printed = capsys.readouterr().err
    assert "task 'loud' crashed" in printed
    assert "Traceback" in printed
    assert "ValueError: unheard" in printed
    loud.close()


def test_an_owner_hears_once_that_a_task_goes_on(kernel: Kernel) -> None:
    heard: list[str] = []

    def steps(name: str, count: int) -> Any:
        for _ in range(count):
            yield
        heard.append(f"{name} ends")

    for name, count in (("short", 0), ("long", 3)):
        task = kernel.spawn(steps(name, count), name=name)
        task.on_wait = lambda task: heard.append(f"{task.name} goes on")
    turns(kernel, 4)
    assert heard == ["short ends", "long goes on", "long ends"]


def test_an_owner_that_fails_stops_nobody_else_and_is_reported(kernel: Kernel) -> None:
    heard = []
    kernel.on_crash = heard.append
    task = kernel.spawn(later("value"))
    waiter = kernel.spawn(joining(task))

    def fails(ended: Task) -> None:
        raise ZeroDivisionError

    task.on_end = fails
    ending(kernel, waiter)
    assert waiter.value == "value"
    assert heard == [task]
    assert isinstance(task.error, ZeroDivisionError)


@pytest.mark.parametrize("how", ["joined", "run", "cancelled", "owned", "main"])
def test_an_error_that_somebody_hears_is_no_crash(kernel: Kernel, how: str) -> None:
    error = ValueError("heard")

    def hears(trap: Trap) -> Any:
        with pytest.raises(ValueError, match="heard"):
            yield trap

    if how == "joined":
        kernel.run(hears(join(kernel.spawn(later(error=error)))))
    elif how == "run":
        kernel.run(hears(run(later(error=error))))
    elif how == "main":
        with pytest.raises(ValueError, match="heard"):
            kernel.run(later(error=error))
    else:
        task = kernel.spawn(later(error=error))
        if how == "owned":
            task.on_end = lambda task: None
        else:
            kernel.turn()
            kernel.cancel(task, Stop())
        kernel.run(later(after_s=5))


def test_a_task_says_where_it_stands(kernel: Kernel) -> None:
    def inner() -> Any:
        yield sleep(1)

    def generator_job() -> Any:
        yield from inner()

    async def coroutine_job() -> None:
        await sleep(1)

    one, two = kernel.spawn(generator_job()), kernel.spawn(coroutine_job())
    kernel.turn()
    assert one.where() == f"{__file__}:{inner.__code__.co_firstlineno + 1} in inner"
    assert two.where() == f"{__file__}:{coroutine_job.__code__.co_firstlineno + 1} in coroutine_job"
    assert (repr(one), one.parked) == ("<Task 'generator_job' parked>", True)
    ending(kernel, one, two)
    assert (one.where(), repr(one)) == ("", "<Task 'generator_job' ended>")


def test_run_leaves_the_other_tasks_as_they_are(kernel: Kernel) -> None:
    other = kernel.spawn(later("value", after_s=10))
    kernel.run(later(after_s=5))
    assert other.parked
    kernel.run(later(after_s=7))
    assert other.value == "value"
    assert kernel.turns > 0


# -- signals ------------------------------------------------------------------------------------------------------------------


def test_signals_become_names_in_a_task() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    fds = open_fds()
    kernel = Kernel()
    signals = Signals([signal.SIGUSR1, signal.SIGTERM])

    def job() -> Any:
        names: list[str] = []
        while len(names) < 3:
            names += yield from signals.receive()
        return names

    def killer() -> Any:
        yield
        os.kill(os.getpid(), signal.SIGTERM)
        yield
        os.kill(os.getpid(), signal.SIGUSR1)
        yield
        os.kill(os.getpid(), signal.SIGTERM)

    task = kernel.spawn(job())
    kernel.spawn(killer())
    ending(kernel, task)
    assert task.value == ["SIGTERM", "SIGUSR1", "SIGTERM"]
    signals.close()
    kernel.close()
    assert {number: signal.getsignal(number) for number in before} == before
    assert open_fds() == fds


def test_a_signal_that_came_before_anybody_asked_is_kept_and_a_foreign_one_is_passed_over() -> None:
    kernel = Kernel()
    old = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    signals = Signals([signal.SIGUSR1])
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert kernel.run(signals.receive()) == ["SIGUSR1"]
    signals.close()
    signal.signal(signal.SIGUSR2, old)
    kernel.close()


def test_closing_gives_the_wake_up_fd_back() -> None:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(write_fd)
    Signals([signal.SIGUSR1]).close()
    assert signal.set_wakeup_fd(-1) == write_fd
    os.close(read_fd)
    os.close(write_fd)


# -- nothing is left behind ---------------------------------------------------------------------------------------------------


def test_a_kernel_leaks_no_fd() -> None:
    before = open_fds()
    for _ in range(20):
        kernel = Kernel(clock=VirtualClock())
        ours, theirs = socket.socketpair()

        def job(ours: socket.socket = ours) -> Any:
            yield wait_io(ours.fileno(), READ, 1)
            yield wait_any({ours.fileno(): READ}, 1)
            yield run(later())
            pid = os.posix_spawn("/bin/true", ["true"], {})
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            yield wait_process(pid)
            os.waitpid(pid, 0)

        kernel.run(job())
        ours.close()
        theirs.close()
        kernel.close()
        kernel.close()
    assert open_fds() == before


def test_closing_the_kernel_closes_no_generator(pair: Pair) -> None:
    """A `finally` that yields would raise where nobody can catch it."""
    closed = []

    def job(trap: Trap | None) -> Any:
        try:
            while True:
                yield trap
        finally:
            closed.append(trap)

    kernel = Kernel(clock=VirtualClock())
    for trap in (wait_io(pair[0].fileno(), READ), sleep(HOUR), None):
        kernel.spawn(job(trap))
    turns(kernel, 3)
    kernel.close()
    gc.collect()
    assert closed == []


@pytest.mark.parametrize("seed", range(60))
def test_at_random_every_task_ends_once_and_leaves_nothing(seed: int) -> None:
    """Tasks that sleep, park, join, run, fail, cancel each other and are cancelled, in any order."""
    dice = random.Random(seed)
    kernel = Kernel(clock=VirtualClock())
    kernel.on_crash = lambda task: None
    queues: list[deque[Task]] = [deque() for _ in range(3)]
    tasks: list[Task] = []
    ends: dict[Task, int] = {}

    def start(depth: int) -> Task:
        task = kernel.spawn(job(depth), name=str(len(tasks)))
        tasks.append(task)
        if dice.random() < 0.5:
            task.on_end = lambda task: ends.__setitem__(task, ends.get(task, 0) + 1)
        if dice.random() < 0.3:
            kernel.throw_at(task, now(kernel) + dice.random() * 20, Stop(), dice.choice([0, 1, 5]))
        return task

    def job(depth: int) -> Any:
        for _ in range(dice.randint(1, 8)):
            try:
                yield from step(depth)
            except (ValueError, Stop):
                if dice.random() < 0.5:
                    yield sleep(dice.random() * 3)
                    raise
                if dice.random() < 0.3:
                    raise

    def step(depth: int) -> Any:
        choice = dice.randint(0, 8)
        if choice == 0:
            yield sleep(dice.choice([0, 0.5, 1, 10]))
        elif choice == 1:
            yield Park(dice.choice(queues), dice.choice([0.5, 3, 30]))
        elif choice == 2:
            kernel.unpark(dice.choice(queues), "value", count=dice.choice([1, None]))
        elif choice == 3 and len(tasks) < 150 and depth < 4:
            start(depth + 1)
        elif choice == 4 and tasks:
            other = dice.choice(tasks)
            if other is not kernel.current:
                yield Park(other.joiners, 5) if dice.random() < 0.5 and not other.ended else None
        elif choice == 5 and depth < 4:
            yield run(job(depth + 1))
        elif choice == 6 and tasks:
            kernel.cancel(dice.choice(tasks), Stop(), dice.choice([0, 0.5, 2]))
        elif choice == 7:
            raise ValueError
        else:
            yield

    for _ in range(8):
        start(0)
    kernel.run(later(after_s=24 * HOUR))
    assert [task for task in tasks if not task.ended] == []
    assert set(ends.values()) <= {1}
    assert all(task in ends for task in tasks if task.on_end is not None)
    assert [list(queue) for queue in queues] == [[], [], []]
    assert all(not task.joiners for task in tasks)
    assert kernel.timers.next_deadline() is None
    assert kernel.current is None
    kernel.close()
    kernel.abandoned.clear()
    assert PARKED not in [task.value for task in tasks]
