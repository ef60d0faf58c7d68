"""Trays: what waits in one has not begun, whatever becomes of the process before it. Real processes, on the memory broker."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import BoundJob, KQueueRuntime, ahead, events
from kqueue.dispatch import NewJob, prepare
from kqueue.errors import JobCancelled
from kqueue.execution.pool import MOST_AHEAD, MOST_WAITING, Pool
from kqueue.execution.tray import DEPTH, MAX_MESSAGE, Tray, has_unread, take
from kqueue.execution.workers import Worker
from kqueue.kernel import sleep
from kqueue.loading import template_config
from kqueue.outcome import Outcome
from tests.apps import pooled
from tests.daemon import PATIENCE_S, Daemon, tree
from tests.test_isolated import ROOT, Noting
from tests.test_pool import PoolBench

Act = Callable[[Pool], object]
KILLS = 40


class TrayBench(PoolBench):
    """A runtime that reserves enough for trays to be full, and what is done when they are."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.gate, self.notes = str(directory / "gate"), str(directory / "notes")

    def runtime(self, kill_grace_s: float = 0.3, grace_s: float = 10.0) -> KQueueRuntime:
        runtime = KQueueRuntime(
            Noting(self.store, self.settled), template=template_config([ROOT], [], ["tests.apps.pooled"]), pool=self.settings,
            kill_grace_s=kill_grace_s, security=self.security, grace_s=grace_s, max_isolated=2 * DEPTH + 10,
        )  # fmt: skip
        for kind in (events.JobEnded, events.JobOutput, events.Warned, events.TemplateDied, events.TemplateReplaced):
            runtime.events.subscribe(kind, self.facts.append)
        return runtime

    def when_full(self, runtime: KQueueRuntime, act: Act, full: int = DEPTH) -> None:
        """`act`, once the tray of each process of the pool has `full` jobs, and somebody waits for the gate."""

        def is_full(pool: Pool) -> bool:
            trays = [len(worker.next) for worker in pool._running]
            return trays == [full] * self.settings.size and os.path.exists(f"{self.gate} is waited for")

        self.when(runtime, is_full, act)

    def when(self, runtime: KQueueRuntime, ready: Callable[[Pool], bool], act: Act) -> None:
        pool = runtime.isolated.pool

        def watch() -> Any:
            deadline = time.monotonic() + PATIENCE_S
            while not ready(pool):
                assert time.monotonic() < deadline, "it never came to that"
                yield sleep(0.001)
            act(pool)

        runtime.kernel.spawn(watch(), name="watch")

    def fill_late(self, pool: Pool) -> None:
        """Its process finds its tray empty, and in the next moment it is as it was. It has not been heard of yet."""
        worker = the(pool)
        messages = [turn.message for turn in worker.next]
        assert worker.tray.take_back() == set(messages)
        self.open_gate()
        until(lambda: is_asleep(worker.child.pid) and worker.child.ears.poll(0) != [])
        for message in messages:
            assert worker.tray.put(message)

    def noting(self, count: int) -> list[BoundJob]:
        return [pooled.notes.job(self.notes, number) for number in range(count)]

    def first(self, job: str) -> Outcome:
        """How its first attempt ended."""
        return next(fact.outcome for fact in self.of(events.JobEnded) if fact.job == job)

    def open_gate(self) -> None:
        Path(self.gate).touch()

    def noted(self) -> list[list[int]]:
        """(number, pid, pid of the parent) of each run, in their order."""
        if not os.path.exists(self.notes):
            return []
        return [[int(word) for word in line.split()] for line in Path(self.notes).read_text().splitlines()]

    def once_each(self, count: int) -> list[int]:
        """Each of them has run exactly once, and cost nothing; the pids."""
        noted = self.noted()
        assert sorted(number for number, _, _ in noted) == list(range(count))
        ended = [fact for fact in self.of(events.JobEnded) if fact.job == "pool_notes" and fact.then == "done"]
        assert len({fact.id for fact in ended}) == len(ended) == count
        ids = {fact.id for fact in ended}
        assert {(s.counters.crashes, s.counters.runs) for s in self.settled if s.token.id in ids} == {(0, 0)}
        return [pid for _, pid, _ in noted]


def the(pool: Pool) -> Worker:
    (worker,) = pool._running
    return worker


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[TrayBench]:
    fds, children = len(os.listdir("/proc/self/fd")), tree(os.getpid())
    yield TrayBench(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == fds, "an fd was left open"
    assert tree(os.getpid()) == children, "a child or a zombie was left"


def test_what_was_taken_is_not_given_back() -> None:
    tray = Tray()
    assert [tray.put(b"%d" % number) for number in range(5)] == [True] * 5
    assert take(tray._its) == b"0"
    assert tray.take_back() == {b"1", b"2", b"3", b"4"}
    assert (take(tray._its), tray.take_back()) == (b"", set())
    assert not tray.put(bytes(MAX_MESSAGE + 1))
    tray.close()


def test_a_process_that_goes_on_runs_them_in_their_order(bench: TrayBench) -> None:
    runtime = bench.runtime()
    bench.when_full(runtime, lambda pool: bench.open_gate())
    bench.pooled(pooled.waits_for.job(bench.gate), *bench.noting(60), runtime=runtime)
    assert len(set(bench.once_each(60))) == 1
    assert [number for number, _, _ in bench.noted()] == list(range(60))


def test_a_killed_process_takes_only_the_job_with_it_that_it_ran(bench: TrayBench) -> None:
    runtime = bench.runtime()
    bench.when_full(runtime, lambda pool: os.kill(the(pool).child.pid, signal.SIGKILL))
    bench.when(runtime, lambda pool: len(bench.noted()) == 30, lambda pool: bench.open_gate())
    bench.pooled(pooled.waits_for.job(bench.gate), *bench.noting(30), runtime=runtime)
    killed = bench.first("pool_waits_for")
    assert (killed.cause, killed.signal) == ("signal", "SIGKILL")
    assert killed.pid not in bench.once_each(30)


def test_nobody_waits_behind_a_long_one_while_a_process_is_free(bench: TrayBench) -> None:
    other, count = bench.gate + "2", 2 * DEPTH
    bench.settings = bench.settings._replace(size=2)
    runtime = bench.runtime()
    bench.when_full(runtime, lambda pool: Path(other).touch())
    bench.when(runtime, lambda pool: len(bench.noted()) == count, lambda pool: bench.open_gate())
    jobs = [pooled.waits_for.job(bench.gate), pooled.waits_for.job(other), *bench.noting(count)]
    long, *_ = bench.pooled(*jobs, size=2, runtime=runtime)
    assert long.ended.outcome.ok
    assert set(bench.once_each(count)).isdisjoint({long.ended.outcome.pid})


def test_output_is_its_own_job_s_with_others_behind_it(bench: TrayBench) -> None:
    jobs = [(pooled.chatters if number % 3 else pooled.pid) for number in range(600)]
    ran = bench.pooled(*[job.job(number) if job is pooled.chatters else job.job() for number, job in enumerate(jobs)], size=2)
    for number, (job, each) in enumerate(zip(jobs, ran, strict=True)):
        times = number % 7 if job is pooled.chatters else 0
        assert each.ended.outcome.output.replace("\n", "") == str(number) * 21 * times  # two pipes: lines may be cut by others
        assert {line for _, line in bench.output(each.ended.id)} == ({str(number)} if times else set())
    assert len({each.result for each in ran}) == 2, "who prints costs no process"


def test_a_time_out_is_its_own_job_s_alone(bench: TrayBench) -> None:
    bench.pooled(pooled.hangs_once.job(), *bench.noting(30))
    late = bench.first("pool_hangs_once")
    assert late.summary() == "JobTimedOut: pool_hangs_once ran longer than its timeout of 0.3 s"
    assert late.pid not in bench.once_each(30)


@pytest.mark.parametrize(
    ("how", "options", "cause", "text"),
    [
        ("grows", {"max_memory": 64, "timeout": 60}, "memory", "MemoryError"),
        ("hangs", {"timeout": 0.5}, "timeout", "ran longer than its timeout of 0.5 s"),
        ("prints", {"timeout": 60}, "exception", "has read what its process was to run next"),
    ],
)  # fmt: skip
def test_who_eats_its_tray_is_ended_all_the_same(
    bench: TrayBench, how: str, options: dict[str, Any], cause: str, text: str
) -> None:
    bench.pooled(pooled.eats_its_tray.options(**options).job(how, DEPTH), *bench.noting(30))
    ended = bench.first("pool_eats_its_tray")
    assert (ended.cause, ended.ended_by) == (cause, "supervisor")
    assert text in ended.summary()
    assert ended.output == ("yum\n" if how == "prints" else "")
    assert ended.pid not in bench.once_each(30)


def test_who_is_cancelled_in_a_tray_has_not_begun(bench: TrayBench) -> None:
    runtime = bench.runtime()
    ids: list[str] = []

    def cancel(pool: Pool) -> None:
        turns = list(the(pool).next)
        assert len(turns) == DEPTH
        for turn in (turns[3], turns[-1], turns[0]):
            ids.append(turn.task.name)
            runtime.kernel.cancel(turn.task, JobCancelled("for a test"), 5.0)
        bench.open_gate()

    bench.when_full(runtime, cancel)
    bench.pooled(pooled.waits_for.job(bench.gate), *bench.noting(30), runtime=runtime)
    bench.once_each(30)
    released = [fact for fact in bench.of(events.JobEnded) if fact.then == "released"]
    assert sorted(fact.id for fact in released) == sorted(ids)
    assert all(fact.outcome.pid is None for fact in released)


# -- what the process has done already, and the supervisor has not heard of --------------------------------------------


def until(happened: Callable[[], bool]) -> None:
    """Keep the loop, so that nothing is heard meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


def test_who_is_cancelled_after_it_has_run_has_run(bench: TrayBench) -> None:
    runtime = bench.runtime()

    def cancel(pool: Pool) -> None:
        worker = the(pool)
        turns = list(worker.next)
        bench.open_gate()
        until(lambda: len(bench.noted()) == DEPTH and is_asleep(worker.child.pid))  # it has said so of the last one, too
        for turn in turns:
            runtime.kernel.cancel(turn.task, JobCancelled("for a test"), 5.0)

    bench.when_full(runtime, cancel)
    bench.pooled(pooled.waits_for.job(bench.gate), *bench.noting(30), runtime=runtime)
    assert len(set(bench.once_each(30))) == 1
    assert {fact.then for fact in bench.of(events.JobEnded)} == {"done"}


def test_a_process_that_died_when_it_had_done_all_costs_nobody_anything(bench: TrayBench) -> None:
    runtime = bench.runtime()

    def kill(pool: Pool) -> None:
        worker = the(pool)
        bench.open_gate()
        until(lambda: len(bench.noted()) == DEPTH and is_asleep(worker.child.pid))
        os.kill(worker.child.pid, signal.SIGKILL)

    bench.when_full(runtime, kill)
    bench.pooled(pooled.waits_for.job(bench.gate), *bench.noting(30), runtime=runtime)
    assert len(set(bench.once_each(30))) == 2
    assert {fact.outcome.cause for fact in bench.of(events.JobEnded)} == {"ok"}


def test_output_that_comes_before_the_end_of_an_earlier_run_is_heard_of(bench: TrayBench) -> None:
    runtime = bench.runtime()

    def listen_late(pool: Pool) -> None:
        bench.open_gate()
        until(lambda: has_unread(the(pool).child.stdout))

    bench.when_full(runtime, listen_late)
    notes, talker = bench.noting(20), pooled.chatters.job(5)
    ran = bench.pooled(pooled.waits_for.job(bench.gate), *notes[:4], talker, *notes[4:], runtime=runtime)
    assert len(set(bench.once_each(20))) == 1
    assert [each.ended.outcome.output.replace("\n", "") for each in ran] == [""] * 5 + ["5" * 5 * 21] + [""] * 16
    assert {each.ended.outcome.pid for each in ran} == set(bench.once_each(20)), "who prints costs no process"


def test_who_found_its_tray_empty_is_told_the_first_and_keeps_the_rest(bench: TrayBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was filled a moment too late. What is in it then is not taken out for that, and put in once more."""
    runtime, real = bench.runtime(), Tray.put
    put: Counter[bytes] = Counter()

    def counting(tray: Tray, message: bytes) -> bool:
        done = real(tray, message)
        put[message] += done
        return done

    monkeypatch.setattr(Tray, "put", counting)
    bench.when_full(runtime, bench.fill_late)
    bench.pooled(pooled.waits_for.job(bench.gate), *bench.noting(30), runtime=runtime)
    assert len(set(bench.once_each(30))) == 1
    assert [number for number, _, _ in bench.noted()] == [*range(30)]
    assert set(put.values()) == {1, 2}
    assert len([count for count in put.values() if count == 2]) == DEPTH, "those that were put in late"


@pytest.mark.parametrize("moment", ["before it is told", "after it was told"])
def test_who_dies_when_it_is_told_the_next_costs_nobody_anything(
    bench: TrayBench, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    runtime, real, killed = bench.runtime(), Pool._tell_next, []

    def tell(pool: Pool, worker: Worker) -> bool:
        told = real(pool, worker) if moment == "after it was told" else True
        if not killed:
            killed.append(worker.child.pid)
            os.kill(worker.child.pid, signal.SIGKILL)
            until(lambda: worker.child.has_ended)
        return told if moment == "after it was told" else real(pool, worker)

    monkeypatch.setattr(Pool, "_tell_next", tell)
    bench.when_full(runtime, bench.fill_late)
    bench.pooled(pooled.waits_for.job(bench.gate), *bench.noting(30), runtime=runtime)
    assert len(killed) == 1
    assert killed[0] not in bench.once_each(30)
    assert {fact.outcome.cause for fact in bench.of(events.JobEnded)} == {"ok"}
    assert {(each.counters.runs, each.counters.crashes) for each in bench.settled} == {(0, 0)}


# -- the end of all that ---------------------------------------------------------------------------------------------------


def test_a_shutdown_releases_what_has_not_begun(bench: TrayBench) -> None:
    runtime = bench.runtime(grace_s=0.2)
    bench.when_full(runtime, lambda pool: runtime.stop())
    bench.client.enqueue([prepared(job) for job in (pooled.waits_for.job(bench.gate), *bench.noting(30))])
    assert runtime.run(handle_signals=False) == 0
    assert bench.noted() == []
    assert len(bench.settled) == 31
    assert {(s.verb, s.counters.runs, s.counters.crashes) for s in bench.settled} == {("release", 0, 0)}


def test_quiet_releases_what_has_not_begun_and_lets_the_rest_run(bench: TrayBench) -> None:
    runtime = bench.runtime()
    bench.when_full(runtime, lambda pool: runtime.quiet())
    bench.when(runtime, lambda pool: runtime.state == "quiet" and len(runtime.held) == 1, lambda pool: bench.open_gate())
    bench.when(runtime, lambda pool: runtime.state == "quiet" and not runtime.held, lambda pool: runtime.stop())
    bench.client.enqueue([prepared(job) for job in (pooled.waits_for.job(bench.gate), *bench.noting(30))])
    assert runtime.run(handle_signals=False) == 0
    assert bench.noted() == []
    assert Counter(s.verb for s in bench.settled) == {"release": 30, "ack": 1}


def test_a_new_template_runs_what_has_not_begun(bench: TrayBench) -> None:
    runtime = bench.runtime()
    bench.when_full(runtime, lambda pool: runtime.background(runtime.isolated.link.replace()))
    bench.when(runtime, lambda pool: bool(bench.of(events.TemplateReplaced)), lambda pool: bench.open_gate())
    first, *_ = bench.pooled(pooled.waits_for.job(bench.gate), *bench.noting(30), runtime=runtime)
    bench.once_each(30)
    (replaced,) = bench.of(events.TemplateReplaced)
    assert first.result == replaced.old_pid
    assert {parent for _, _, parent in bench.noted()} == {replaced.pid}


def test_a_template_that_dies_loses_only_what_had_begun(bench: TrayBench) -> None:
    runtime = bench.runtime()
    bench.when_full(runtime, lambda pool: os.kill(runtime.isolated.link.current.pid, signal.SIGKILL))
    bench.when(runtime, lambda pool: len(bench.noted()) == 30, lambda pool: bench.open_gate())
    bench.pooled(pooled.waits_for.job(bench.gate), *bench.noting(30), runtime=runtime)
    bench.once_each(30)


def test_who_is_too_large_for_a_tray_is_not_overtaken(bench: TrayBench) -> None:
    runtime = bench.runtime()
    bench.when_full(runtime, lambda pool: bench.open_gate(), full=5)
    large = pooled.notes.job(bench.notes, 5, "x" * MAX_MESSAGE)
    jobs = bench.noting(30)
    bench.pooled(pooled.waits_for.job(bench.gate), *jobs[:5], large, *jobs[6:], runtime=runtime)
    assert len(set(bench.once_each(30))) == 1
    assert [number for number, _, _ in bench.noted()] == list(range(30))


def test_who_leaves_its_process_changed_has_no_successor_there(bench: TrayBench) -> None:
    runtime = bench.runtime()
    bench.when_full(runtime, lambda pool: bench.open_gate())
    changed, *_ = bench.pooled(pooled.waits_for.job(bench.gate, leave=True), *bench.noting(30), runtime=runtime)
    assert changed.ended.outcome.ok
    assert changed.ended.outcome.pid not in bench.once_each(30)
    assert "the working directory" in bench.warnings()[0]


def test_a_process_has_its_number_of_jobs_with_a_full_tray(bench: TrayBench) -> None:
    bench.pooled(*bench.noting(45), max_jobs=10)
    pids = bench.once_each(45)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [10, 10, 10, 10, 5]


def test_jobs_are_reserved_ahead_only_where_they_are_short(bench: TrayBench) -> None:
    """With the default slots, of which there are fewer."""
    runtime = bench.runtime()
    runtime._slots["isolated"] = 4
    most = 0

    def look(fact: events.JobEnded) -> None:
        nonlocal most
        most = max(most, len(runtime.held))

    runtime.events.subscribe(events.JobEnded, look)
    bench.pooled(*bench.noting(300), runtime=runtime)
    bench.once_each(300)
    assert 4 < most <= 4 + MOST_AHEAD
    short, most = most, 0
    runtime = bench.runtime()
    runtime._slots["isolated"] = 4
    runtime.events.subscribe(events.JobEnded, look)
    bench.pooled(*[pooled.burns.job(0.05) for _ in range(30)], runtime=runtime)
    assert most <= 4 + MOST_WAITING < short


def test_who_is_not_for_the_pool_runs_beside_those_that_wait_for_it(bench: TrayBench) -> None:
    """Two of twelve slow ones run, and two forks have the other slots; a third has none."""
    bench.settings = bench.settings._replace(size=2)
    runtime = bench.runtime()
    runtime._slots["isolated"] = 4
    gates = [f"{bench.gate}{number}" for number in range(3)]

    def both_run(pool: Pool) -> bool:
        return all(os.path.exists(f"{gate} is waited for") for gate in gates[:2])

    def open_one(pool: Pool) -> None:
        assert not os.path.exists(f"{gates[2]} is waited for")
        assert len(pool.waiting()) == 10
        Path(gates[0]).touch()
        bench.when(runtime, lambda pool: os.path.exists(f"{gates[2]} is waited for"), open_the_rest)

    def open_the_rest(pool: Pool) -> None:
        for gate in (*gates, bench.gate):
            Path(gate).touch()

    bench.when(runtime, both_run, open_one)
    bench.pooled(
        *[pooled.waits_for.job(bench.gate) for _ in range(12)], *[pooled.waits_for_apart.job(gate) for gate in gates],
        size=2, runtime=runtime,
    )
    assert {fact.then for fact in bench.of(events.JobEnded)} == {"done"}, "none was reserved in vain"


def test_slow_ones_that_wait_are_few_and_may_be_had_elsewhere(bench: TrayBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kqueue.ahead.SLOW_PATIENCE_S", 0.3)
    runtime = bench.runtime()
    runtime._slots["isolated"] = 4
    most = 4 + MOST_WAITING
    rounds = 0
    reserve = runtime.broker.reserve

    def counting(*args: Any) -> Any:
        nonlocal rounds
        rounds += 1
        assert len(runtime.held) <= most
        return reserve(*args)

    monkeypatch.setattr(runtime.broker, "reserve", counting)

    def then_put_back(pool: Pool) -> None:
        bench.when(runtime, lambda pool: len(runtime.held) <= most // 2 + 1, and_again)

    def and_again(pool: Pool) -> None:
        bench.when(runtime, lambda pool: len(runtime.held) == most, finish)

    def finish(pool: Pool) -> None:
        assert rounds <= 20, "nothing is asked for over and over"
        bench.open_gate()

    bench.when(runtime, lambda pool: len(runtime.held) == most, then_put_back)
    bench.pooled(*[pooled.waits_for.job(bench.gate) for _ in range(30)], runtime=runtime)
    assert Counter(fact.then for fact in bench.of(events.JobEnded)) == {"done": 30}
    assert len(bench.settled) > 30, "some were put back"
    assert {s.counters.runs for s in bench.settled} == {0}


def test_who_was_reserved_ahead_does_not_wait_long(bench: TrayBench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATIENCE_S", "SLOW_PATIENCE_S", "ELSEWHERE_S"):
        monkeypatch.setattr(ahead, name, 0.2)
    runtime = bench.runtime()
    runtime._slots["isolated"] = 4
    long = prepared(pooled.waits_for.options(priority=9).job(bench.gate))

    def is_alone(pool: Pool) -> bool:
        turns = [worker.turn.task.name for worker in pool._running if worker.turn is not None]
        return turns == [long.id] and len(runtime.held) <= 4

    bench.when(runtime, lambda pool: pool.held > 4, lambda pool: bench.client.enqueue([long]))
    bench.when(runtime, is_alone, lambda pool: bench.open_gate())
    bench.pooled(*bench.noting(300), runtime=runtime)
    bench.once_each(300)
    assert {s.counters.runs for s in bench.settled} == {0}


@pytest.mark.parametrize("data", ["ffffffff01", pooled.FORGED_DONE, pooled.FORGED_RESULT + pooled.FORGED_DONE])
def test_a_forger_is_ended_at_once_also_when_it_is_heard_with_the_end_of_the_run_before_it(bench: TrayBench, data: str) -> None:
    runtime, forged = bench.runtime(), f"{bench.gate} forged"

    def hear_both_at_once(pool: Pool) -> None:
        bench.open_gate()
        deadline = time.monotonic() + PATIENCE_S
        while not os.path.exists(forged):
            assert time.monotonic() < deadline, "it never forged"
            time.sleep(0.001)

    bench.when_full(runtime, hear_both_at_once, full=2)
    bench.pooled(pooled.waits_for.job(bench.gate), pooled.forges.job(data, forged), *bench.noting(1), runtime=runtime)
    outcome = bench.first("pool_forges")
    assert outcome.duration_s < outcome.limits["timeout"], "nobody waited for its time to be up"
    assert (outcome.cause, outcome.signal) == ("ok" if data.startswith(pooled.FORGED_RESULT) else "exception", "SIGKILL")
    assert [fact.then for fact in bench.of(events.JobEnded) if fact.job == "pool_notes"] == ["done"]


def prepared(job: BoundJob) -> NewJob:
    return prepare(job, job.registration)


def test_thousands_of_jobs_and_processes_that_are_killed_at_random(tmp_path: Path) -> None:
    """Each job is done, and once, unless its process was killed while it ran; what the certificates say adds up to the kills."""
    notes, count = tmp_path / "notes", 5000
    notes.touch()
    daemon = Daemon(tmp_path, f"sqlite:///{tmp_path}/queue.db", isolated_modules="[tests.apps.pooled]", names="{default: 1}")
    chance = random.Random(4)
    try:
        daemon.dispatch(*[pooled.begins_and_ends.job(str(notes), number) for number in range(count)])
        daemon.start("--burst")
        assert daemon.process is not None
        killed: set[int] = set()
        noted = 0  # bytes, at the last kill
        while daemon.process.poll() is None and len(killed) < KILLS:
            time.sleep(chance.random() / 50)  # the moment is what is at random
            if notes.stat().st_size < noted + 200:  # more jobs first: one that is killed three times is dead
                continue
            members = [pid for pid in tree(daemon.pid) if b"kqueued: job pool_begins" in command_of(pid) and pid not in killed]
            if members:
                victim = chance.choice(members)
                os.kill(victim, signal.SIGKILL)
                killed.add(victim)
                noted = notes.stat().st_size
        assert daemon.wait() == 0
    finally:
        daemon.close()
    words = Counter(notes.read_text().split("\n")[:-1])
    begun = {number: words[f"b {number}"] for number in range(count)}
    ended = {number: words[f"e {number}"] for number in range(count)}
    assert min(ended.values()) >= 1, "none is lost"
    assert sum(begun.values()) - count <= KILLS, "none is run twice without need"
    certificates = [line for line in daemon.log if "job failed" in line or "signal=SIGKILL" in line]
    assert sum(begun.values()) - count <= len(certificates)


def is_asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
