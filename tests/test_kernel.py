"""The kernel keeps its protocol (docs/architecture.md, "The kernel's protocol"), whatever a generator does.

Time is virtual wherever a duration matters, so an hour passes at once. A task that crashes without anybody having asked for it
fails the test.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import coroutine
from typing import Any

import pytest

from kqueue.kernel import (
    PARKED,
    READ,
    WRITE,
    Abandoned,
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
from kqueue.kernel.loop import MAX_IMMEDIATE
from kqueue.kernel.signals import Signals
from kqueue.kernel.traps import set_foreign_loop

HOUR = 3600.0


class Stop(BaseException):
    """What cancels a task here: like JobCancelled, no `except Exception` catches it."""


class Give(Trap):
    """Answers at once with what it was made with."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def arm(self, kernel: Kernel, task: Task) -> Any:
        return self.value


class Refuse(Trap):
    """Arms a timer, then raises: a trap that goes wrong half-way."""

    def __init__(self, error: BaseException, after_s: float = 1.0) -> None:
        self.error = error
        self.after_s = after_s

    def arm(self, kernel: Kernel, task: Task) -> Any:
        kernel.wake_at(task, kernel.clock.monotonic() + self.after_s, value="from a trap that was refused")
        raise self.error


def crashed(task: Task) -> None:
    raise AssertionError(f"{task} crashed, and nobody expected it") from task.error


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel(clock=VirtualClock())
    kernel.on_crash = crashed
    yield kernel
    kernel.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def ending(kernel: Kernel, *tasks: Task) -> Any:
    """Run until all `tasks` have ended; the value of the first."""
    while not all(task.ended for task in tasks):
        kernel.turn()
    return tasks[0].value


def turns(kernel: Kernel, count: int) -> None:
    for _ in range(count):
        kernel.turn()


def now(kernel: Kernel) -> float:
    return kernel.clock.monotonic()


def fill(sock: socket.socket) -> None:
    """Write until there is no room."""
    try:
        while True:
            sock.send(b"x" * 65536)
    except BlockingIOError:
        return


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# -- what may be yielded, and how it comes back -------------------------------------------------------------------------------


def by_yield() -> Any:
    return (yield Give("a")), (yield Give("b"))


def by_yield_from() -> Any:
    return (yield from Give("a")), (yield from Give("b"))


async def by_await() -> Any:
    return (await Give("a")), (await Give("b"))


@coroutine
def by_a_helper() -> Any:
    return (yield from by_yield())


async def by_awaiting_a_helper() -> Any:
    return await by_a_helper()


ALIKE = [by_yield, by_yield_from, by_await, by_a_helper, by_awaiting_a_helper]


@pytest.mark.parametrize("job", ALIKE)
def test_generators_and_coroutines_are_driven_alike(kernel: Kernel, job: Callable[[], Any]) -> None:
    assert kernel.run(job()) == ("a", "b")


def test_an_error_of_a_trap_is_raised_at_the_line_that_yielded_it(kernel: Kernel) -> None:
    def job() -> Any:
        try:
            yield Refuse(ValueError("no"))
        except ValueError as error:
            return str(error), error.__traceback__ is not None

    assert kernel.run(job()) == ("no", True)


@pytest.mark.parametrize("error", [ValueError(), Stop(), GeneratorExit(), StopIteration(), KeyboardInterrupt()])
def test_whatever_arm_raises_the_task_may_clean_up(kernel: Kernel, error: BaseException) -> None:
    cleaned = []

    def job() -> Any:
        try:
            yield Refuse(error)
        finally:
            cleaned.append((yield Give("with traps")))

    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)):
        kernel.run(job())
    assert cleaned == ["with traps"]


def test_a_trap_that_was_refused_leaves_no_timer_behind(kernel: Kernel) -> None:
    def job() -> Any:
        with pytest.raises(ValueError, match="no"):
            yield Refuse(ValueError("no"), after_s=1)
        return (yield sleep(5)), now(kernel)

    assert kernel.run(job()) == (None, 5)


def test_a_bare_yield_lets_the_others_run_once(kernel: Kernel) -> None:
    log = []

    def job(name: str) -> Any:
        for step in range(3):
            log.append(f"{name}{step}")
            yield

    ending(kernel, *[kernel.spawn(job(name)) for name in "abc"])
    assert log == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


def a_generator() -> Any:
    yield


async def a_coroutine() -> None:
    return


class Foreign:
    """An awaitable of another framework: it yields what only its own loop understands."""

    def __init__(self, request: Any) -> None:
        self.request = request

    def __await__(self) -> Any:
        return (yield self.request)


loopless = asyncio.new_event_loop()
loopless.close()

NONSENSE = [
    (5, r"write `yield sleep\(5\)`"),
    (0.5, r"write `yield sleep\(0\.5\)`"),
    (True, "yielded bool"),
    ("text", r"yielded str; it may yield kqueue\.sleep"),
    ([sleep(1)], "yielded list"),
    (sleep, "yielded type"),
    (a_generator, "yielded function"),
    (a_generator(), r"write `yield from a_generator\(\.\.\.\)`"),
    (concurrent.futures.Future(), r"kqueue\.sleep, and kqueue\.offload until there is a kqueue\.io, or declare the job isolated=True"),
    (asyncio.Future(loop=loopless), r"awaited (_asyncio\.)?Future of asyncio.*isolated=True"),
]


@pytest.mark.parametrize(("thing", "advice"), NONSENSE, ids=lambda value: type(value).__name__)
def test_nonsense_is_a_type_error_at_that_very_line_and_says_what_to_write(kernel: Kernel, thing: Any, advice: str) -> None:
    def generator_job() -> Any:
        with pytest.raises(TypeError, match=advice):
            yield thing
        return (yield Give("goes on"))

    async def coroutine_job() -> Any:
        with pytest.raises(TypeError, match=advice):
            await Foreign(thing)
        return await Give("goes on")

    assert kernel.run(generator_job()) == "goes on"
    assert kernel.run(coroutine_job()) == "goes on"


def test_a_coroutine_that_was_not_awaited_is_nonsense_too(kernel: Kernel) -> None:
    forgotten = a_coroutine()

    def job() -> Any:
        yield forgotten

    with pytest.raises(TypeError, match=r"write `await a_coroutine\(\.\.\.\)`"):
        kernel.run(job())
    forgotten.close()


def test_the_error_names_the_line_of_the_job(kernel: Kernel) -> None:
    def job() -> Any:
        yield 5

    with pytest.raises(TypeError) as caught:
        kernel.run(job())
    assert caught.traceback[-1].name == "job"
    assert caught.traceback[-1].lineno == job.__code__.co_firstlineno


@pytest.mark.parametrize("thing", [None, 5, "text", [], a_generator, object()])
def test_only_generators_and_coroutines_become_tasks(kernel: Kernel, thing: Any) -> None:
    with pytest.raises(TypeError, match=r"spawn\(\) takes a generator or a coroutine"):
        kernel.spawn(thing)


def test_a_trap_without_arm_says_so(kernel: Kernel) -> None:
    class Bare(Trap):
        pass

    def job() -> Any:
        yield Bare()

    with pytest.raises(NotImplementedError, match=r"Bare does not define arm\(\)"):
        kernel.run(job())


def test_await_is_answered_by_a_foreign_loop_while_one_is_set(kernel: Kernel) -> None:
    def adapter(trap: Trap) -> Any:
        yield from ()
        return f"{type(trap).__name__} by another loop"

    async def job() -> Any:
        return await sleep(1)

    set_foreign_loop(adapter)
    try:
        with pytest.raises(StopIteration) as end:
            job().send(None)
    finally:
        set_foreign_loop(None)
    assert end.value.value == "sleep by another loop"
    assert kernel.run(job()) is None


# -- fairness ---------------------------------------------------------------------------------------------------------------


def test_immediate_answers_are_capped_so_that_one_task_cannot_starve_the_others(kernel: Kernel) -> None:
    log: list[str] = []

    def greedy() -> Any:
        while len(log) < 10 * MAX_IMMEDIATE:
            log.append("greedy")
            yield Give(None)

    def modest() -> Any:
        for _ in range(5):
            log.append("modest")
            yield

    ending(kernel, kernel.spawn(greedy()), kernel.spawn(modest()))
    modest_at = [index for index, name in enumerate(log) if name == "modest"]
    assert len(modest_at) == 5
    assert max(late - early for early, late in zip([0, *modest_at], modest_at, strict=False)) <= MAX_IMMEDIATE + 1


def test_the_cap_loses_neither_a_value_nor_an_error(kernel: Kernel) -> None:
    def job() -> Any:
        for number in range(5 * MAX_IMMEDIATE):
            assert (yield Give(number)) == number
        for number in range(5 * MAX_IMMEDIATE):
            with pytest.raises(ValueError, match=f"^{number}$"):
                yield Refuse(ValueError(number))
            with pytest.raises(TypeError):
                yield number
        return "all"

    assert kernel.run(job()) == "all"


def test_spinners_delay_neither_timers_nor_io_nor_new_tasks(kernel: Kernel, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    done: list[str] = []

    def spinner() -> Any:
        while len(done) < 3:
            kernel.clock.now += 0.001  # type: ignore[attr-defined]
            yield

    def sleeper() -> Any:
        yield sleep(0.01)
        done.append("timer")
        kernel.spawn(newcomer())

    def reader() -> Any:
        yield wait_io(ours.fileno(), READ)
        done.append("io")

    def newcomer() -> Any:
        done.append("newcomer")
        yield

    theirs.send(b"x")
    ending(kernel, *[kernel.spawn(job()) for job in (spinner, spinner, sleeper, reader)])
    assert done == ["io", "timer", "newcomer"]


def test_a_task_made_ready_by_a_step_has_its_turn_next_time(kernel: Kernel) -> None:
    """Else two tasks that wake each other would never let the loop look at its timers."""
    queue: deque[Task] = deque()
    log = []

    def ping() -> Any:
        while "timer" not in log:
            kernel.unpark(queue)
            kernel.clock.now += 1  # type: ignore[attr-defined]
            yield

    def pong() -> Any:
        while "timer" not in log:
            yield Park(queue, 1000)

    def timer() -> Any:
        yield sleep(10)
        log.append("timer")

    ending(kernel, *[kernel.spawn(job()) for job in (ping, pong, timer)])
    assert log == ["timer"]


# -- exactly one wake -------------------------------------------------------------------------------------------------------


def test_a_parked_task_is_woken_once(kernel: Kernel) -> None:
    queue: deque[Task] = deque()

    def job() -> Any:
        return [(yield Park(queue)), (yield Give("second"))]

    task = kernel.spawn(job())
    kernel.turn()
    kernel.wake(task, "first")
    kernel.wake(task, "again")
    kernel.wake(task, error=ValueError("again"))
    assert not queue, "its undo took it out"
    assert ending(kernel, task) == ["first", "second"]
    kernel.wake(task, "after the end")
    kernel.run(later())
    assert task.value == ["first", "second"]


def test_waking_a_task_that_is_ready_does_nothing(kernel: Kernel) -> None:
    def job() -> Any:
        yield
        return (yield)

    task = kernel.spawn(job())
    kernel.wake(task, "nobody waits for this")
    turns(kernel, 2)
    kernel.wake(task, "nor for this")
    assert ending(kernel, task) is None


def test_a_timer_of_an_earlier_wait_is_stale(kernel: Kernel) -> None:
    queue: deque[Task] = deque()

    def job() -> Any:
        first = yield Park(queue, timeout_s=10)
        second = yield Park(queue)
        return first, second, now(kernel)

    def others() -> Any:
        yield sleep(1)
        kernel.unpark(queue, "in time")
        yield sleep(HOUR)
        kernel.unpark(queue, "much later")

    task = kernel.spawn(job())
    ending(kernel, task, kernel.spawn(others()))
    assert task.value == ("in time", "much later", HOUR + 1)


def test_what_happens_in_the_same_turn_as_its_time_out_has_happened(
    kernel: Kernel, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair

    def job() -> Any:
        return (yield wait_io(ours.fileno(), READ, timeout_s=5))

    task = kernel.spawn(job())
    kernel.turn()
    theirs.send(b"x")
    kernel.clock.now = 5.0  # type: ignore[attr-defined]
    assert ending(kernel, task) == READ


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


# -- wait_io ----------------------------------------------------------------------------------------------------------------

Pair = tuple[socket.socket, socket.socket]


def test_a_reader_and_a_writer_may_wait_for_the_same_fd(kernel: Kernel, pair: Pair) -> None:
    ours, theirs = pair
    fill(ours)

    def wait(events: int) -> Any:
        return (yield wait_io(ours.fileno(), events))

    reader, writer = kernel.spawn(wait(READ)), kernel.spawn(wait(WRITE))
    turns(kernel, 1)
    assert (reader.parked, writer.parked) == (True, True)
    while select.select([theirs], [], [], 0)[0]:
        theirs.recv(1 << 20)
    assert ending(kernel, writer) == WRITE
    assert reader.parked
    theirs.send(b"x")
    assert ending(kernel, reader) == READ
    assert len(kernel.poller) == 0


def test_one_task_may_wait_for_both_directions_and_hears_which(kernel: Kernel, pair: Pair) -> None:
    ours, theirs = pair

    def wait() -> Any:
        return (yield wait_io(ours.fileno(), READ | WRITE))

    assert kernel.run(wait()) == WRITE
    theirs.send(b"x")
    assert kernel.run(wait()) == READ | WRITE


def test_a_second_waiter_for_a_direction_is_refused_and_told_who_has_it(kernel: Kernel, pair: Pair) -> None:
    ours, theirs = pair

    def wait() -> Any:
        return (yield wait_io(ours.fileno(), READ))

    first = kernel.spawn(wait(), name="the first")
    for events in (READ, READ | WRITE):

        def second(events: int = events) -> Any:
            yield wait_io(ours.fileno(), events)

        with pytest.raises(RuntimeError, match=r"already waited for by task 'the first'; only one task may read"):
            kernel.run(second())
    theirs.send(b"x")
    assert ending(kernel, first) == READ


def test_a_time_out_is_an_answer_and_no_error(kernel: Kernel, pair: Pair) -> None:
    def job() -> Any:
        return (yield wait_io(pair[0].fileno(), READ, timeout_s=HOUR)), now(kernel)

    assert kernel.run(job()) == (0, HOUR)
    assert len(kernel.poller) == 0


def test_what_cannot_be_polled_is_an_error_at_that_line(kernel: Kernel, pair: Pair, tmp_path: Any) -> None:
    ours, _ = pair
    with open(tmp_path / "file", "w") as file:
        closed = os.dup(ours.fileno())
        os.close(closed)
        for fd, events, error, words in [
            (closed, READ, OSError, "Bad file descriptor"),
            (file.fileno(), READ, OSError, "not permitted"),
            (-1, READ, ValueError, "Invalid file descriptor"),
            (ours, READ, TypeError, r"not for socket: write \.fileno\(\)"),
            (True, READ, TypeError, "not for bool"),
            (ours.fileno(), 0, ValueError, "READ, WRITE or both"),
            (ours.fileno(), 4, ValueError, "READ, WRITE or both"),
            (ours.fileno(), READ | 4, ValueError, "READ, WRITE or both"),
            (ours.fileno(), "r", ValueError, "READ, WRITE or both"),
        ]:

            def job(fd: Any = fd, events: Any = events) -> Any:
                yield wait_io(fd, events)

            with pytest.raises(error, match=words):
                kernel.run(job())
    assert len(kernel.poller) == 0


def test_an_fd_that_is_closed_under_its_waiters_costs_them_their_time_out_and_nobody_else(kernel: Kernel, pair: Pair) -> None:
    ours, _ = pair
    fill(ours)
    fd = ours.fileno()

    def wait(events: int, timeout_s: float) -> Any:
        return (yield wait_io(fd, events, timeout_s)), now(kernel)

    tasks = [kernel.spawn(wait(WRITE, 5)), kernel.spawn(wait(READ, 10))]
    kernel.turn()
    ours.close()
    ending(kernel, *tasks)
    assert [task.value for task in tasks] == [(0, 5), (0, 10)]
    assert len(kernel.poller) == 0


def test_a_number_that_was_handed_out_again_is_a_new_fd(kernel: Kernel, pair: Pair) -> None:
    """The selector has forgotten the closed one, while somebody still waits for it in the other direction."""
    ours, _ = pair
    fill(ours)
    fd = ours.fileno()

    def wait(events: int, timeout_s: float | None) -> Any:
        return (yield wait_io(fd, events, timeout_s))

    orphan = kernel.spawn(wait(WRITE, HOUR))
    kernel.turn()
    newcomer, its_end = socket.socketpair()
    with newcomer, its_end:
        os.dup2(newcomer.fileno(), fd)  # closes `ours`, which keeps its number
        its_end.send(b"x")
        assert kernel.run(wait(READ, None)) == READ
        assert kernel.run(wait(READ, None)) == READ
        kernel.cancel(orphan, Stop())
        ending(kernel, orphan)
        assert len(kernel.poller) == 0
        assert kernel.run(wait(READ | WRITE, None)) == READ | WRITE


def test_hang_up_wakes_a_reader(kernel: Kernel, pair: Pair) -> None:
    ours, theirs = pair

    def job() -> Any:
        return (yield wait_io(ours.fileno(), READ))

    task = kernel.spawn(job())
    kernel.turn()
    theirs.close()
    assert ending(kernel, task) == READ


# -- wait_any ---------------------------------------------------------------------------------------------------------------


def test_the_first_of_several_fds_wakes_and_all_that_are_ready_are_told(kernel: Kernel) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    fds = [ours.fileno() for ours, _ in pairs]

    def job() -> Any:
        return (yield wait_any({fds[0]: READ, fds[1]: READ | WRITE, fds[2]: READ}))

    assert kernel.run(job()) == {fds[1]: WRITE}
    pairs[0][1].send(b"x")
    pairs[1][1].send(b"x")
    assert kernel.run(job()) == {fds[0]: READ, fds[1]: READ | WRITE}
    assert len(kernel.poller) == 0
    for both in pairs:
        both[0].close()
        both[1].close()


def test_waiting_for_any_ends_by_its_time_out_with_nothing(kernel: Kernel, pair: Pair) -> None:
    def job() -> Any:
        return (yield wait_any({pair[0].fileno(): READ, pair[1].fileno(): READ}, timeout_s=7)), now(kernel)

    assert kernel.run(job()) == ({}, 7)
    assert len(kernel.poller) == 0


def test_waiting_for_no_fd_is_only_a_time_out(kernel: Kernel) -> None:
    def job() -> Any:
        return (yield wait_any({}, timeout_s=7))

    assert kernel.run(job()) == {}


def test_when_one_of_several_is_taken_none_of_the_others_stays_registered(kernel: Kernel, pair: Pair) -> None:
    ours, theirs = pair

    def first() -> Any:
        return (yield wait_io(theirs.fileno(), READ))

    def second() -> Any:
        yield wait_any({ours.fileno(): READ, theirs.fileno(): READ})

    task = kernel.spawn(first())
    with pytest.raises(RuntimeError, match="already waited for"):
        kernel.run(second())
    assert len(kernel.poller) == 1
    ours.send(b"x")
    assert ending(kernel, task) == READ, "the first one's wait was not taken back along with the second's"


# -- wait_process -----------------------------------------------------------------------------------------------------------


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE)


def test_the_death_of_a_process_is_an_event() -> None:
    kernel = Kernel()
    before = open_fds()
    process = child("input()")
    assert process.stdin is not None

    def job() -> Any:
        return (yield wait_process(process.pid)), "ended"

    task = kernel.spawn(job())
    kernel.turn()
    assert task.parked
    process.stdin.close()
    assert ending(kernel, task) == (None, "ended")
    assert process.wait() == 1
    assert ending(kernel, kernel.spawn(job())) == (None, "ended"), "there is none any more"
    assert open_fds() == before
    kernel.close()


def test_a_zombie_has_ended(kernel: Kernel) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    def job() -> Any:
        return (yield wait_process(pid))

    assert kernel.run(job()) is None
    assert os.waitpid(pid, 0)[0] == pid


def test_who_no_longer_waits_for_a_process_holds_no_pidfd(kernel: Kernel) -> None:
    before = open_fds()

    def job() -> Any:
        yield wait_process(os.getpid())

    task = kernel.spawn(job())
    kernel.turn()
    assert len(open_fds() - before) == 1
    kernel.cancel(task, Stop())
    ending(kernel, task)
    assert open_fds() == before


@pytest.mark.parametrize("pid", [-1, 0, "1", 10**20])
def test_a_pid_that_is_none_is_an_error_at_that_line(kernel: Kernel, pid: Any) -> None:
    def job() -> Any:
        yield wait_process(pid)

    with pytest.raises((OSError, TypeError, OverflowError)):
        kernel.run(job())


# -- Park -------------------------------------------------------------------------------------------------------------------


def parked(kernel: Kernel, queue: deque[Task], count: int, timeout_s: float | None = None) -> list[Task]:
    def job() -> Any:
        return (yield Park(queue, timeout_s))

    tasks = [kernel.spawn(job(), name=str(number)) for number in range(count)]
    kernel.turn()
    return tasks


def test_the_longest_waiting_is_woken_first(kernel: Kernel) -> None:
    queue: deque[Task] = deque()
    tasks = parked(kernel, queue, 5)
    assert kernel.unpark(queue, "one", count=1) == 1
    assert kernel.unpark(queue, "two", count=2) == 2
    assert kernel.unpark(queue, "none", count=0) == 0
    assert kernel.unpark(queue, "rest") == 2
    assert kernel.unpark(queue, "nobody is left") == 0
    assert kernel.unpark(queue, "nobody is left", count=3) == 0
    ending(kernel, *tasks)
    assert [task.value for task in tasks] == ["one", "two", "two", "rest", "rest"]


def test_a_queue_can_raise_in_all_who_wait(kernel: Kernel) -> None:
    queue: deque[Task] = deque()
    seen = []

    def job() -> Any:
        try:
            yield Park(queue)
        except ValueError as error:
            seen.append(error)

    tasks = [kernel.spawn(job()) for _ in range(3)]
    kernel.turn()
    error = ValueError("the connection is gone")
    assert kernel.unpark(queue, error=error) == 3
    ending(kernel, *tasks)
    assert seen == [error] * 3


def test_who_waited_long_enough_leaves_the_queue(kernel: Kernel) -> None:
    queue: deque[Task] = deque()
    patient, *_ = parked(kernel, queue, 1)
    hasty, *_ = parked(kernel, queue, 1, timeout_s=5)
    ending(kernel, hasty)
    assert (hasty.value, now(kernel)) == (None, 5)
    assert list(queue) == [patient]
    kernel.unpark(queue)
    ending(kernel, patient)


def test_who_is_cancelled_leaves_the_queue(kernel: Kernel) -> None:
    queue: deque[Task] = deque()
    tasks = parked(kernel, queue, 3)
    kernel.cancel(tasks[1], Stop())
    assert list(queue) == [tasks[0], tasks[2]]
    assert kernel.unpark(queue) == 2
    ending(kernel, *tasks)


# -- join and run -----------------------------------------------------------------------------------------------------------


def later(value: Any = None, error: BaseException | None = None, after_s: float = 1.0) -> Any:
    yield sleep(after_s)
    if error is not None:
        raise error
    return value


def joining(task: Task) -> Any:
    return (yield join(task))


def test_join_gives_the_value_to_everyone_who_asks_before_or_after(kernel: Kernel) -> None:
    task = kernel.spawn(later("value"))
    waiting = [kernel.spawn(joining(task)) for _ in range(3)]
    ending(kernel, *waiting)
    assert [each.value for each in waiting] == ["value"] * 3
    assert kernel.run(joining(task)) == "value"


@pytest.mark.parametrize("error", [ValueError("no"), Stop("no"), GeneratorExit("no"), SystemExit("no")])
def test_join_raises_the_error_before_and_after_the_end(kernel: Kernel, error: BaseException) -> None:
    def guarded(task: Task) -> Any:
        try:
            yield join(task)
        except BaseException as caught:
            return caught

    task = kernel.spawn(later(error=error))
    assert kernel.run(guarded(task)) is error
    assert kernel.run(guarded(task)) is error


def test_cancelling_who_joins_leaves_the_task_alone(kernel: Kernel) -> None:
    task = kernel.spawn(later("value"))
    waiter = kernel.spawn(joining(task))
    kernel.turn()
    kernel.cancel(waiter, Stop())
    ending(kernel, waiter)
    assert isinstance(waiter.error, Stop)
    assert kernel.run(joining(task)) == "value"


def test_run_takes_several_steps_as_if_they_were_one_trap(kernel: Kernel) -> None:
    def job() -> Any:
        value = yield run(later("value"))
        with pytest.raises(ValueError, match="no"):
            yield run(later(error=ValueError("no")))
        with pytest.raises(Stop):
            yield run(later(error=Stop()))
        with pytest.raises(TypeError, match=r"spawn\(\) takes a generator"):
            yield run("nonsense")  # type: ignore[arg-type]
        return value, now(kernel)

    assert kernel.run(job()) == ("value", 3)


def test_what_was_run_is_cancelled_with_its_waiter_and_may_clean_up(kernel: Kernel) -> None:
    log = []

    def inner() -> Any:
        try:
            yield sleep(HOUR)
        finally:
            yield sleep(0.1)
            log.append(f"inner cleaned up at {now(kernel):g}")

    def job() -> Any:
        try:
            yield run(inner())
        except Stop:
            log.append("told")

    task = kernel.spawn(job())
    turns(kernel, 2)
    kernel.cancel(task, Stop())
    ending(kernel, task, kernel.spawn(later()))
    assert log == ["told", "inner cleaned up at 0.1"]


def test_what_was_run_may_cancel_its_own_waiter(kernel: Kernel) -> None:
    """Which cancels it in turn, in the middle of the call."""
    log = []

    def inner(outer: Task) -> Any:
        try:
            kernel.cancel(outer, Stop())
        except GeneratorExit:
            log.append("inner was cancelled along")
            raise
        yield

    def job() -> Any:
        assert kernel.current is not None
        try:
            yield run(inner(kernel.current))
        except Stop:
            log.append("told")

    ending(kernel, kernel.spawn(job()))
    assert log == ["inner was cancelled along", "told"]
    assert kernel.abandoned == []


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
    assert kernel.lag_s()[-1] >= 0.5
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
