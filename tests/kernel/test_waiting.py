"""Everything a task can wait for: fds, processes, queues, other tasks. Whoever no longer waits leaves nothing behind."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import weakref
from collections import deque
from typing import Any

import pytest

from kqueue.kernel import (
    PARKED,
    READ,
    WRITE,
    Kernel,
    Park,
    Task,
    Trap,
    join,
    run,
    sleep,
    wait_any,
    wait_io,
    wait_process,
)
from kqueue.kernel.poller import AT_ONCE

from .conftest import HOUR, Pair, Stop, ending, fill, joining, later, now, open_fds, turns

# -- many at once ------------------------------------------------------------------------------------------------------------


def test_a_turn_serves_some_of_those_who_are_ready_and_the_next_one_others() -> None:
    """However many have something to read, others have their turn in between, and nobody is forgotten."""
    kernel = Kernel()
    pairs = [socket.socketpair() for _ in range(4 * AT_ONCE)]
    woken: list[int] = []

    def reader(ours: socket.socket) -> Any:
        for _ in range(3):
            yield wait_io(ours.fileno(), READ)
            ours.recv(1)
            woken.append(ours.fileno())

    for ours, theirs in pairs:
        theirs.send(b"123")
        kernel.spawn(reader(ours))
    kernel.turn()  # they begin to wait
    for turn in range(1, 13):
        kernel.turn()
        assert len(woken) == turn * AT_ONCE
    assert sorted(woken) == sorted(3 * [ours.fileno() for ours, _ in pairs])
    assert {len(set(woken[at : at + 4 * AT_ONCE])) for at in range(0, 12 * AT_ONCE, 4 * AT_ONCE)} == {4 * AT_ONCE}, "in turn"
    kernel.close()
    for pair in pairs:
        for each in pair:
            each.close()


# -- wait_io ----------------------------------------------------------------------------------------------------------------


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


def test_a_direction_that_nobody_waits_for_any_longer_wakes_nobody(kernel: Kernel, pair: Pair) -> None:
    """An fd is nearly always writable, so the loop would spin until the reader's wait is over."""
    ours, _ = pair

    def wait(events: int, timeout_s: float | None) -> Any:
        return (yield wait_io(ours.fileno(), events, timeout_s))

    reader, writer = kernel.spawn(wait(READ, 5)), kernel.spawn(wait(WRITE, None))
    for _ in range(5):
        if not reader.ended:
            kernel.turn()
    assert (writer.value, reader.value, now(kernel)) == (WRITE, 0, 5)


def test_a_wait_shorter_than_epoll_can_tell_is_one_turn() -> None:
    """Rounded down it would be none at all, and the loop would spin until it is over."""
    kernel = Kernel()

    def job() -> Any:
        yield
        before = kernel.turns
        yield sleep(0.0009)
        return kernel.turns - before

    assert kernel.run(job()) <= 2
    kernel.close()


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
            (-1, READ, ValueError, "negative integer"),
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
    assert len(kernel.poller) == 0


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


def test_a_trap_that_takes_nothing_back_is_taken_out_of_the_queue_all_the_same(kernel: Kernel) -> None:
    class Simple(Trap):
        def arm(self, kernel: Kernel, task: Task) -> Any:
            queue.append(task)
            return PARKED

    def job() -> Any:
        return (yield Simple())

    queue: deque[Task] = deque()
    tasks = [kernel.spawn(job()) for _ in range(3)]
    kernel.turn()
    assert kernel.unpark(queue, "value", count=2) == 2
    assert list(queue) == tasks[2:]
    assert kernel.unpark(queue, "value") == 1
    ending(kernel, *tasks)


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


def test_who_waits_holds_nothing_of_what_it_was_woken_with(kernel: Kernel) -> None:
    class Payload:
        """Something large."""

    def job() -> Any:
        while True:
            yield Park(queue)

    queue: deque[Task] = deque()
    kernel.spawn(job())
    kernel.turn()
    payload = Payload()
    gone = weakref.ref(payload)
    kernel.unpark(queue, payload)
    kernel.turn()
    del payload
    assert gone() is None


def test_who_is_cancelled_leaves_the_queue(kernel: Kernel) -> None:
    queue: deque[Task] = deque()
    tasks = parked(kernel, queue, 3)
    kernel.cancel(tasks[1], Stop())
    assert list(queue) == [tasks[0], tasks[2]]
    assert kernel.unpark(queue) == 2
    ending(kernel, *tasks)


# -- join and run -----------------------------------------------------------------------------------------------------------


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
