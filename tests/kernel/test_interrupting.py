"""interrupt_at, which throws once and condemns nobody; and what is kept with a kernel."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import pytest

from kqueue.kernel import READ, Kernel, Park, Task, running, sleep, wait_io
from tests.kernel.conftest import Stop, ending, now


def test_an_interrupted_task_may_go_on(kernel: Kernel) -> None:
    def job() -> Any:
        assert kernel.current is not None
        kernel.interrupt_at(kernel.current, 1.0, Stop())
        with pytest.raises(Stop):
            yield sleep(10)
        assert now(kernel) == 1
        yield sleep(100)
        return "well"

    assert kernel.run(job()) == "well"
    assert kernel.abandoned == []


def test_what_was_taken_back_does_nothing(kernel: Kernel) -> None:
    def job() -> Any:
        assert kernel.current is not None
        kernel.interrupt_at(kernel.current, 1.0, Stop()).cancel()
        yield sleep(10)

    kernel.run(job())


def test_a_value_that_is_on_its_way_comes_first(kernel: Kernel) -> None:
    """Both are due in one turn: the task has the value, and is interrupted at its next wait."""
    queue: deque[Task] = deque()
    seen = []

    def job() -> Any:
        seen.append((yield Park(queue)))
        try:
            yield sleep(10)
        except Stop:
            seen.append("interrupted")

    task = kernel.spawn(job())
    kernel.turn()
    kernel.unpark(queue, "value")
    kernel.interrupt(task, Stop())
    ending(kernel, task)
    assert seen == ["value", "interrupted"]


def test_a_cancelled_task_is_left_alone(kernel: Kernel) -> None:
    def job() -> Any:
        try:
            yield sleep(10)
        finally:
            yield sleep(0.5)
            seen.append("clean")

    seen: list[str] = []
    task = kernel.spawn(job())
    kernel.turn()
    kernel.cancel(task, Stop(), grace_s=5)
    kernel.interrupt(task, ValueError())
    kernel.interrupt_at(task, 0.1, ValueError())
    ending(kernel, task)
    assert isinstance(task.error, Stop)
    assert seen == ["clean"]


def test_the_kernel_that_runs_is_known_while_it_does(kernel: Kernel) -> None:
    def inner() -> Any:
        yield
        return running()

    def job() -> Any:
        yield
        assert running() is kernel
        other = Kernel()
        assert other.run(inner()) is other
        other.close()
        return running()

    assert running() is None
    assert kernel.run(job()) is kernel
    assert running() is None


def test_what_is_kept_with_a_kernel_is_closed_with_it_the_newest_first() -> None:
    closed = []

    class Thing:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    kernel = Kernel()
    kernel.locals.update(a=Thing("a"), plain=1, b=Thing("b"))
    kernel.close()
    assert closed == ["b", "a"]


def test_a_task_that_waits_can_be_cancelled_after_its_kernel_was_closed() -> None:
    kernel = Kernel()
    read_fd, write_fd = os.pipe()

    def job() -> Any:
        yield wait_io(read_fd, READ)

    task = kernel.spawn(job())
    kernel.spawn(job_of_one_turn())
    kernel.turn()
    kernel.close()
    kernel.cancel(task, Stop())
    os.close(read_fd)
    os.close(write_fd)


def job_of_one_turn() -> Any:
    yield
