"""What a generator may yield, how it comes back, that nobody starves, and that each wait ends once.

The promises are those of docs/architecture.md, "The kernel's protocol".
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
from collections import deque
from collections.abc import Callable
from types import coroutine
from typing import Any, ClassVar

import pytest

from kqueue.kernel import (
    READ,
    Kernel,
    Park,
    Task,
    Trap,
    sleep,
    wait_io,
)
from kqueue.kernel.loop import MAX_IMMEDIATE
from kqueue.kernel.traps import set_foreign_loop

from .conftest import HOUR, Give, Refuse, Stop, ending, later, now, turns

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
    (concurrent.futures.Future(), r"kqueue\.sleep, kqueue\.io, kqueue\.offload, or declare .*isolated=True"),
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
    class Other:
        locals: ClassVar[dict[Any, Any]] = {}

        def answer(self, trap: Trap) -> Any:
            yield from ()
            return f"{type(trap).__name__} by another loop"

        def spawn(self, steps: Any) -> Any:
            raise NotImplementedError

        def start(self, steps: Any, ended: Any) -> Any:
            raise NotImplementedError

        def interrupt_in(self, seconds: float) -> Any:
            raise NotImplementedError

        def release(self, fd: int) -> None:
            raise NotImplementedError

    async def job() -> Any:
        return await sleep(1)

    set_foreign_loop(Other())
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
