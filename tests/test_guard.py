"""hard_slice: an inline job that blocks the loop is interrupted where it stands; nothing else ever is."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import kqueue
from kqueue.brokers.base import Row
from kqueue.errors import JobBlocked
from kqueue.execution import guard as guarding
from kqueue.execution.guard import LATE_S, MAX_THROWN, SOON_S, SliceGuard
from kqueue.execution.inline import GRACE_S
from kqueue.kernel import Clock, Kernel, Task
from kqueue.options import JobOptions
from kqueue.registry import Registration
from tests.apps import blocking, inline
from tests.daemon import PATIENCE_S, Daemon, alive, tree, wait_gone

PACKAGE = str(Path(kqueue.__file__).parent)
HARD = "inline: {max_slice: 50ms, hard_slice: 300ms}"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    daemons: list[Daemon] = []

    def make(more: str = HARD) -> Daemon:
        modules = "[tests.apps.inline, tests.apps.blocking]"
        daemons.append(Daemon(tmp_path, f"sqlite:///{tmp_path}/kqueue.db", modules=modules, isolated_modules="[]", more=more))
        return daemons[-1]

    yield make
    for daemon in daemons:
        daemon.close()


def row_of(daemon: Daemon, handle: kqueue.JobHandle) -> Row:
    row = daemon.client.store.show(handle.id)
    assert row is not None
    return row


def died(daemon: Daemon, handle: kqueue.JobHandle) -> dict[str, Any]:
    """The last certificate of a job that is dead in the end."""
    assert handle.wait(PATIENCE_S), "\n".join(daemon.log)
    row = row_of(daemon, handle)
    assert row.state == "dead", "it ended well"
    certificate: dict[str, Any] = json.loads(row.certificates[-1])
    return certificate


# -- a real daemon ----------------------------------------------------------------------------------------------------------


BLOCKERS = [
    (blocking.spins, "in spins"), (blocking.sleeps, "in sleeps"), (blocking.reads, "in reads"), (blocking.waits, "in waits"),
    (blocking.matches, "in matches"), (blocking.plain, "in plain"), (blocking.calls, "in plain"),
    (blocking.Blocks, "in __init__"), (blocking.gathers, "in spinner"),
]  # fmt: skip


def test_whatever_blocks_is_interrupted_and_named(make: Callable[..., Daemon]) -> None:
    daemon = make().start()
    handles = daemon.dispatch(*(blocker.job() for blocker, _ in BLOCKERS))
    good = daemon.dispatch(*(inline.nap.job(0.01) for _ in range(20)))
    for (_, where), handle in zip(BLOCKERS, handles, strict=True):
        certificate = died(daemon, handle)
        assert (certificate["cause"], certificate["ended_by"]) == ("timeout", "supervisor"), where
        assert certificate["limits"]["hard_slice"] == 0.3
        assert certificate["error"]["class"] == "JobBlocked"
        message = certificate["error"]["message"]
        assert f"{blocking.__file__}:" in message
        assert where in message
        assert "isolated=True" in message
    assert all(handle.wait(PATIENCE_S) for handle in good)
    daemon.marks.wait("cleaned")
    assert [pid for pid in tree(daemon.pid) if "sleep" in Path(f"/proc/{pid}/comm").read_text()] == [], "its child goes with it"
    status = daemon.status()
    assert (status["pid"], status["state"], status["failed"]) == (daemon.pid, "running", len(BLOCKERS))
    assert daemon.stop() == 0


def test_a_loop_in_c_is_reported_when_it_has_ended(make: Callable[..., Daemon]) -> None:
    daemon = make().start()
    count = 10**8  # for so long that hard_slice is over several times
    (handle,) = daemon.dispatch(blocking.counts_in_c.job(count))
    assert handle.result(60) == count * (count - 1) // 2, "a signal that could not be heard in time is none"
    assert "counts_in_c" in daemon.wait_log("held up all others")
    assert daemon.stop() == 0


def test_a_job_that_goes_on_after_it_is_given_up_and_has_had_its_attempt(make: Callable[..., Daemon]) -> None:
    daemon = make().start()
    (handle,) = daemon.dispatch(blocking.swallows_once.job())
    daemon.marks.wait("swallowed")
    assert daemon.wait() == 75
    certificate = died(daemon, handle)
    assert (certificate["cause"], certificate["error"]["class"]) == ("timeout", "JobBlocked")


def test_a_job_that_swallows_everything_takes_nobody_with_it(make: Callable[..., Daemon]) -> None:
    daemon = make().start()
    parked = daemon.dispatch(inline.nap.job(3600))[0]
    daemon.marks.wait("start")
    processes = tree(daemon.pid)
    done = daemon.dispatch(inline.note.job("before"))[0]
    assert done.result(PATIENCE_S) == "before"
    (handle,) = daemon.dispatch(blocking.swallows_all.job())
    daemon.marks.wait("swallowed", MAX_THROWN)
    assert daemon.wait() == 75
    wait_gone(processes)
    daemon.start()
    certificate = died(daemon, handle)
    assert (certificate["attempt"], certificate["cause"], certificate["error"]["class"]) == (1, "timeout", "JobBlocked")
    counters = row_of(daemon, handle).counters
    assert (counters.attempts, counters.crashes) == (1, 0)
    daemon.marks.wait("start", 2)
    row = row_of(daemon, parked)
    assert (row.state, row.counters.recoveries, row.counters.crashes) == ("leased", 1, 0)
    assert alive(daemon.pid)


def test_a_child_has_no_alarm_of_its_supervisor(make: Callable[..., Daemon]) -> None:
    daemon = make().start()
    handles = daemon.dispatch(*(blocking.alarm_of_a_child.job() for _ in range(5)), inline.nap.job(0.1))
    assert [handle.result(PATIENCE_S) for handle in handles[:5]] == [[True, [0.0, 0.0]]] * 5


# -- the handler, step by step ------------------------------------------------------------------------------------------------


class SetClock(Clock):
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class GaveUp(Exception):
    """Instead of the end of the process."""


def give_up(task: Task, error: JobBlocked) -> Any:
    raise GaveUp(str(error))


class Stage:
    """A guard over a kernel whose clock is set, in the middle of a slice that began at 100. Timers are written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = SetClock()
        self.kernel = Kernel(clock=self.clock, max_slice_s=0.1)
        self.guard = SliceGuard(self.kernel, 5.0, give_up)
        self.set: list[float] = []
        monkeypatch.setattr(guarding.signal, "setitimer", lambda which, seconds: self.set.append(round(seconds, 6)))
        self.task = self.kernel.spawn(iter_of(None), name="job")
        self.task.mark = b"id"
        self.kernel.current = self.task
        self.kernel.slice_began = 100.0
        self.guard._arm()

    def look(self, at: float, frame: FrameType | None = None) -> None:
        self.clock.now = at
        self.guard._look(signal.SIGALRM, frame or frame_of_a_job())


def iter_of(value: Any) -> Any:
    yield value


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(monkeypatch)
    yield stage
    stage.kernel.close()


def ours(code: str, **names: Any) -> Any:
    """`f`, as if it stood in a file of KQueue's."""
    exec(compile(code, f"{PACKAGE}/somewhere.py", "exec"), names)
    return names["f"]


def frame_of_a_job() -> FrameType:
    """Of the code that a registered job calls."""
    registration = Registration("the_job", JobOptions(), sys._getframe, False, __name__)
    assert registration.target is not None
    return Registration("the_job", JobOptions(), lambda: sys._getframe(), False, __name__).call((), {})  # type: ignore[no-any-return]


def test_a_slice_is_interrupted_after_exactly_so_long(stage: Stage) -> None:
    assert stage.set == [5.0]
    stage.kernel.slice_began = 103.0  # another one runs when the signal comes
    stage.look(105.0)
    assert stage.set == [5.0, 3.0], "what is left of it"
    with pytest.raises(JobBlocked, match=r"blocked the loop for 5(?:[.]\d+)? s at .*test_guard.py:\d+ in <lambda>"):
        stage.look(108.0)
    assert stage.task.grace_s == GRACE_S
    assert stage.set[2:] == [GRACE_S]


def test_nothing_is_armed_while_no_job_runs(stage: Stage) -> None:
    stage.kernel.current = None
    stage.look(105.0)
    assert (stage.set, stage.kernel.unwatched) == ([5.0], True)
    stage.kernel.current = stage.kernel.spawn(iter_of(None), name="of KQueue itself")
    stage.look(500.0)
    assert (stage.set, stage.kernel.unwatched) == ([5.0], True)


def test_a_step_of_a_job_arms_it_once(monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    stage.kernel.current = None
    stage.kernel.watch, stage.kernel.unwatched = stage.guard._arm, True
    for _ in range(3):
        stage.kernel.spawn(iter_of(None), name="of KQueue itself")
    stage.kernel.turn()
    assert stage.set == [5.0, 5.0], "only the job's step did"


def test_where_a_long_slice_stands_is_noted_on_the_way(stage: Stage) -> None:
    stage.guard._first_s = 0.1
    stage.look(100.05)
    assert stage.guard.standing() is None
    stage.look(100.11, ours("def f(function):\n    return function()")(sys._getframe))
    assert stage.guard.standing() is None, "KQueue is at work"
    stage.look(100.15)
    assert stage.set == [5.0, 0.05, SOON_S, 0.1]
    standing = stage.guard.standing()
    assert standing is not None
    assert "in <lambda>" in standing.line
    stage.look(101.0)
    assert stage.guard.standing() is standing, "once of a slice"
    stage.kernel.slice_began = 102.0
    assert stage.guard.standing() is None, "that was another slice"


def test_what_blocks_is_reported_with_its_line_and_what_to_write_instead(make: Callable[..., Daemon]) -> None:
    daemon = make("inline: {max_slice: 20ms, hard_slice: 5s}").start()
    for blocker, text, call, advice in (
        (blocking.stalls, "time.sleep(seconds)", "time.sleep", "`yield kqueue.sleep(…)`"),
        (blocking.stalls_in_a_program, 'subprocess.run(["sleep", "0.15"]', "subprocess.run", "`yield kqueue.io.run([…])`"),
    ):
        advice = f"use {advice}, or declare the job isolated=True"
        name = blocker.registration.name
        for _ in range(2):
            daemon.dispatch(blocker.job())[0].result(PATIENCE_S)
        place = f"{blocking.__file__}:{line_of(text)} in {name} ({call})"
        line = daemon.wait_log(f"{name} held up all others", 2)
        assert place in line
        assert advice in line
        promoted = daemon.wait_log(f"{name} has blocked the loop twice")
        assert f"at {place}, and runs isolated from now on. To have it inline, {advice}, then: kqueue demote {name}" in promoted
        assert f"at {place}: {advice}, then kqueue demote {name}" in daemon.kqueue("status").stdout
        assert place in daemon.kqueue("doctor").stdout
        assert f"at {place}" in daemon.kqueue("demote").stdout
    assert daemon.stop() == 0


def line_of(text: str) -> int:
    """The number of the line of tests.apps.blocking that has `text`."""
    lines = Path(blocking.__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_what_kqueue_loads_for_a_job_is_not_held_against_it(stage: Stage) -> None:
    """Until the same slice blocks in the job's own code."""
    stage.guard._first_s = 0.1
    loads = ours("def f(name, function):\n    return __import__(name) and function()")
    found: list[FrameType] = []
    stage.look(100.11, importing(found, lambda: loads("imported_by_test", sys._getframe)))
    standing = stage.guard.standing()
    assert standing is not None
    assert (standing.call, standing.is_ours) == ("import imported_by_test", True)
    assert "does not hold it against the job" in standing.instead
    assert stage.set[-1] == SOON_S, "it looks again soon"
    stage.look(100.2)
    standing = stage.guard.standing()
    assert standing is not None
    assert "in <lambda>" in standing.line
    assert not standing.is_ours


def importing(found: list[FrameType], run: Callable[[], Any]) -> FrameType:
    """The frame in which the module "imported_by_test" is being executed when `run` imports that."""

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
            return importlib.machinery.ModuleSpec(name, self) if name == "imported_by_test" else None

        def exec_module(self, module: Any) -> None:
            found.append(sys._getframe())

    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        Registration("the_job", JobOptions(), run, False, __name__).call((), {})
    finally:
        sys.meta_path.remove(finder)
        sys.modules.pop("imported_by_test", None)
    return found[0]


@pytest.mark.parametrize("mine", [False, True])
def test_only_imports_of_the_jobs_own_make_it_isolated(make: Callable[..., Daemon], mine: bool) -> None:
    """A real daemon: a module takes long to load, by `import` in a job, or since kqueue.io needs it."""
    daemon = make("inline: {max_slice: 20ms, hard_slice: 5s}").start()
    for _ in range(2):
        daemon.dispatch(blocking.imports.job(mine))[0].result(PATIENCE_S)
    line = daemon.wait_log("imports held up all others", 2)
    assert daemon.stop() == 0
    assert any("has blocked the loop twice" in line for line in daemon.log) == mine
    if not mine:
        place = f"{blocking.__file__}:{line_of('# by KQueue')} in imports (import tests.apps.slow_to_load)"
        assert f"{place}: KQueue loads that once in each process, and does not hold it against the job" in line


def test_who_comes_late_spares_the_job_once(stage: Stage) -> None:
    stage.look(105.0 + LATE_S + 30)
    assert stage.set[1:] == [5.0], "the process was stopped, perhaps"
    with pytest.raises(JobBlocked):
        stage.look(141.0 + LATE_S + 30)
    stage.kernel.slice_began = 200.0
    stage.guard._arm()
    stage.look(300.0)  # another slice


def test_it_gives_up_after_so_many(stage: Stage) -> None:
    for _ in range(MAX_THROWN):
        with pytest.raises(JobBlocked):
            stage.look(stage.guard._due)
    with pytest.raises(GaveUp, match="blocked the loop for 8 s"):
        stage.look(stage.guard._due)


def test_kqueues_own_code_is_not_interrupted(stage: Stage) -> None:
    calls = ours("def f(function):\n    return function()")
    for frame in (
        calls(sys._getframe),  # KQueue's own line
        calls(lambda: sys._getframe()),  # what KQueue called
        Registration("x", JobOptions(), lambda: calls(sys._getframe), False, __name__).call((), {}),  # on behalf of a job
        Registration("x", JobOptions(), lambda: calls(lambda: sys._getframe()), False, __name__).call((), {}),
    ):
        stage.set.clear()
        stage.look(107.0 - LATE_S, frame)
        assert stage.set == [SOON_S]
    assert stage.task.grace_s is None


def test_a_job_that_calls_another_ones_function_is(stage: Stage) -> None:
    frame = Registration("x", JobOptions(), lambda: by_way_of_a_job(), False, __name__).call((), {})
    with pytest.raises(JobBlocked, match="in by_way_of_a_job"):
        stage.look(105.0, frame)


@kqueue.job(isolated=False)
def by_way_of_a_job() -> FrameType:
    return sys._getframe()


def test_a_runtime_puts_back_what_was_there() -> None:
    def mine(number: int, frame: FrameType | None) -> None:
        raise AssertionError("nobody sends this")

    old = signal.signal(signal.SIGALRM, mine)
    try:
        runtime = kqueue.KQueueRuntime("memory://guard")
        assert runtime.run(burst=True) == 0
        assert signal.getsignal(signal.SIGALRM) is mine
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, old)
