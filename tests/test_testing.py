"""What kqueue.testing gives to the tests of applications."""

from __future__ import annotations

import socket
import sys
import threading
import time
from typing import Any

import pytest

from kqueue import JobState, JobTimedOut, KQueueJob, current, enqueue, io, job, offload, progress, sleep
from kqueue.testing import FakeQueue, run


class Greet(KQueueJob):
    def __init__(self, whom: str) -> None:
        self.whom = whom

    def handle(self) -> Any:
        yield sleep(20)
        return f"hello {self.whom}"


@job(name="testing.slow", timeout=5)
async def slow() -> None:
    await sleep(3600)


@job(name="testing.chain")
def chain() -> Any:
    yield progress(0.5)
    yield enqueue(Greet.job("from a job"))
    return (yield offload(divmod, 7, 2)), current().attempt


@job(name="testing.plain", isolated=True)
def plain(values: tuple[int, ...]) -> Any:
    Greet.dispatch("from a child")
    return values


def test_a_job_runs_to_its_end_and_no_time_passes() -> None:
    assert run(Greet.job("ada")) == "hello ada"


@job(name="testing.asks", timeout=7200)
def asks(port: int, timeout_s: float) -> Any:
    with (yield io.connect("127.0.0.1", port)) as stream:
        yield stream.write(b"how are you?\n")
        answer = yield stream.read_until(b"\n", timeout=timeout_s)
        yield sleep(3600)
        return answer


def test_a_server_that_takes_its_time_is_waited_for() -> None:
    def answer_late() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            time.sleep(0.3)
            connection.sendall(b"well\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_late)
        thread.start()
        assert run(asks.job(server.getsockname()[1], 60)) == b"well\n"
        thread.join()


def test_one_that_never_answers_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(io.TimedOut):
        run(asks.job(server.getsockname()[1], 0.2))


def test_time_jumps_over_a_silence_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kqueue.testing.IO_PATIENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(io.TimedOut):
        run(asks.job(server.getsockname()[1], 3600))


def test_arguments_go_through_json_as_they_would_in_a_queue() -> None:
    with FakeQueue():
        assert run(plain.job((1, 2))) == [1, 2]


def test_a_timeout_fires_when_it_would() -> None:
    with pytest.raises(JobTimedOut, match="5 s"):
        run(slow.job())


def test_dispatches_are_remembered_and_can_be_run() -> None:
    with FakeQueue() as queue:
        handle = Greet.dispatch("ada")
        chain.dispatch()
        assert [each.name for each in queue.jobs] == ["Greet", "testing.chain"]
        assert queue.jobs[0] == Greet.job("ada")
        assert handle.state() is JobState.READY
        assert queue.run() == ["hello ada", ((3, 1), 1), "hello from a job"]
        assert handle.state() is JobState.DONE


@job(name="testing.follows")
def follows(how: str) -> Any:
    current().then(Greet.job("first"))
    yield sleep(5)
    with pytest.raises(TypeError, match="args"):
        current().then(Greet.job(object()))  # type: ignore[arg-type]
    current().then(Greet.options(delay=3).job("second"))
    if how == "fails":
        raise LookupError(how)


def test_follow_ups_are_in_the_queue_once_the_job_has_ended_well() -> None:
    queue = FakeQueue()
    with pytest.raises(LookupError):
        run(follows.job("fails"), queue=queue)
    assert queue.jobs == []
    run(follows.job("ends well"), queue=queue)
    assert queue.jobs == [Greet.job("first"), Greet.options(delay=3).job("second")]
    assert queue.run() == ["hello first", "hello second"]


def test_a_fake_queue_refuses_what_a_real_one_would() -> None:
    with FakeQueue() as queue, pytest.raises(TypeError, match="args"):
        Greet.dispatch(object())  # type: ignore[arg-type]
    assert queue.jobs == []


def test_after_it_dispatches_go_where_they_went_before() -> None:
    jobs = sys.modules["kqueue.job"]  # `kqueue.job` itself is the decorator
    dispatcher = jobs._dispatcher
    with FakeQueue():
        assert jobs._dispatcher is not dispatcher
    assert jobs._dispatcher is dispatcher


@job(name="testing.program", timeout=1)
def runs_a_program(seconds: float, scope_s: float) -> Any:
    try:
        with io.timeout(scope_s):
            yield io.run(["sleep", str(seconds)])
    except io.TimedOut:
        return "scope"
    return "done"


def test_the_time_of_a_program_is_that_of_its_job() -> None:
    with pytest.raises(JobTimedOut):
        run(runs_a_program.job(600, 60))
    assert run(runs_a_program.job(600, 0.2)) == "scope"


@job(name="testing.silent")
def outwaits_a_program() -> Any:
    ended = []

    def program() -> Any:
        yield io.run(["sleep", "0.3"])
        ended.append("program")

    def sleeper() -> Any:
        yield sleep(20)
        ended.append("sleep")

    yield io.gather(sleeper(), program())
    return ended


def test_time_does_not_jump_over_a_program_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kqueue.testing.IO_PATIENCE_S", 0.05)
    assert run(outwaits_a_program.job()) == ["program", "sleep"]
