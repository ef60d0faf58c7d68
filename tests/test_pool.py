"""The pool: many jobs in one process, none of which feels the others. Real processes, on the memory broker."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from kqueue import BoundJob, KQueueRuntime, events
from kqueue.dispatch import prepare
from kqueue.execution.workers import PoolSettings
from kqueue.loading import template_config
from tests.apps import pooled
from tests.daemon import tree, wait_gone
from tests.test_isolated import ROOT, Bench, Noting, Ran

JOBS = 10_000


class PoolBench(Bench):
    """A runtime with tests.apps.pooled in its template, and a pool of one process unless told otherwise."""

    settings = PoolSettings(size=1)

    def runtime(self, kill_grace_s: float = 0.3, grace_s: float = 10.0) -> KQueueRuntime:
        runtime = KQueueRuntime(
            Noting(self.store, self.settled), template=template_config([ROOT], [], ["tests.apps.pooled"]), pool=self.settings,
            kill_grace_s=kill_grace_s, security=self.security, grace_s=grace_s,
        )  # fmt: skip
        for kind in (events.JobEnded, events.JobOutput, events.Warned, events.TemplateDied):
            runtime.events.subscribe(kind, self.facts.append)
        return runtime

    def pooled(self, *jobs: BoundJob, size: int = 1, runtime: KQueueRuntime | None = None, **settings: Any) -> list[Ran]:
        """Run `jobs` in turn, as far as their retries are not delayed."""
        self.settings = PoolSettings(size=size, **settings)
        runtime = runtime or self.runtime()
        prepared = [prepare(bound, bound.registration) for bound in jobs]
        self.client.enqueue(prepared)
        assert runtime.run(burst=True, handle_signals=False) == 0
        last = {fact.id: fact for fact in self.of(events.JobEnded)}
        return [Ran(last[job.id], self._result(job.id)) for job in prepared]

    def _result(self, id: str) -> Any:
        from kqueue.codec import from_json, unpack

        row = self.client.show(id)
        return unpack(from_json(row.result)) if row is not None and row.result else None

    def warnings(self) -> list[str]:
        return [fact.message for fact in self.of(events.Warned)]


@pytest.fixture
def bench() -> Iterator[PoolBench]:
    fds, children = len(os.listdir("/proc/self/fd")), tree(os.getpid())
    yield PoolBench()
    assert len(os.listdir("/proc/self/fd")) == fds, "an fd was left open"
    assert tree(os.getpid()) == children, "a child or a zombie was left"


# -- lifetimes ------------------------------------------------------------------------------------------------------------


def test_jobs_share_a_process_and_have_no_more_than_their_number(bench: PoolBench) -> None:
    ran = bench.pooled(*[pooled.pid.job() for _ in range(23)], max_jobs=5)
    pids = [each.result for each in ran]
    assert len(set(pids)) == 5
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [5, 5, 5, 5, 3]
    assert pids == sorted(pids, key=pids.index), "one after another"


def test_as_many_processes_as_it_says_run_at_once(bench: PoolBench) -> None:
    ran = bench.pooled(*[pooled.burns.job(0.05) for _ in range(12)], size=3)
    assert len({each.result for each in ran}) == 3


def test_a_process_that_grew_is_replaced(bench: PoolBench) -> None:
    ran = bench.pooled(*[pooled.keeps.job(60) for _ in range(4)], max_memory_mib=120)
    pids = [each.result for each in ran]
    assert len(set(pids)) == 2, "60 MiB and what the template has are allowed, 120 are not"


def test_a_process_that_is_old_is_replaced(bench: PoolBench) -> None:
    ran = bench.pooled(*[pooled.pid.job() for _ in range(3)], max_age_s=1e-9)
    assert len({each.result for each in ran}) == 3


def test_without_limits_it_lives_on(bench: PoolBench) -> None:
    ran = bench.pooled(*[pooled.pid.job() for _ in range(1200)], max_jobs=0, max_memory_mib=0, max_age_s=0)
    assert len({each.result for each in ran}) == 1


def test_thousands_of_jobs_leave_neither_fds_nor_zombies(bench: PoolBench) -> None:
    seen: list[tuple[int, int]] = []
    runtime = bench.runtime()
    count = 0

    def look(fact: events.JobEnded) -> None:
        nonlocal count
        count += 1
        if count in (JOBS // 20, JOBS * 19 // 20):
            seen.append((len(os.listdir("/proc/self/fd")), len(tree(os.getpid()))))

    runtime.events.subscribe(events.JobEnded, look)
    ran = bench.pooled(*[pooled.pid.job() for _ in range(JOBS)], runtime=runtime)
    assert all(each.ended.outcome.ok for each in ran)
    assert seen[0] == seen[1], "(fds, processes) early and late"


# -- what a job leaves changed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", pooled.LEAKS)
def test_a_changed_process_runs_no_other_job(bench: PoolBench, how: str) -> None:
    leak = pooled.leaks.job(how)
    ran = bench.pooled(pooled.pid.job(), leak, pooled.start_of_this.job(), leak, pooled.pid.job())
    before, changed, after, again, last = [each.result for each in ran]
    assert all(each.ended.outcome.ok for each in ran)
    assert before == changed, "what was clean went on"
    assert after == "pool"
    assert again != changed
    assert last not in (changed, again)
    (warning,) = bench.warnings()
    assert warning.startswith("pool_leaks leaves its pool process changed")
    assert pooled.LEAKS[how][1] in warning
    assert "hunter2" not in warning, "values of the environment may be secrets"


@pytest.mark.parametrize("how", ["fd", "high fd", "thread", "stack limit", "memory limit"])
def test_who_takes_the_place_of_our_fds_hides_nothing(bench: PoolBench, how: str) -> None:
    jobs = [pooled.blinds.job(), pooled.pid.job(), pooled.leaks.job(how), pooled.pid.job()]
    *before, after = [each.result for each in bench.pooled(*jobs)]
    assert len(set(before)) == 1, "what is as it was goes on"
    assert after not in before
    (warning,) = bench.warnings()
    assert pooled.LEAKS[how][1] in warning


def test_a_job_that_fails_is_looked_after_as_well(bench: PoolBench) -> None:
    ran = bench.pooled(pooled.pid.job(), pooled.leaks.job("chdir", fail=True), pooled.pid.job())
    assert ran[1].ended.outcome.cause == "exception"
    assert ran[0].result != ran[2].result
    assert len(bench.warnings()) == 1


def test_each_thing_is_told_once(bench: PoolBench) -> None:
    bench.pooled(*[pooled.leaks.job(how) for how in ("chdir", "umask", "chdir", "umask", "umask")])
    first, second = bench.warnings()
    assert "working directory" in first
    assert "umask" in second


def test_what_a_job_leaves_behind_is_gone_afterwards(bench: PoolBench) -> None:
    before = set(tree(os.getpid()))  # servers of other tests
    seen: list[int] = []
    runtime = bench.runtime()
    runtime.events.subscribe(events.JobEnded, lambda fact: seen.extend(set(tree(os.getpid())) - before))
    bench.pooled(pooled.leaks.job("child"), pooled.leaks.job("daemon"), pooled.pid.job(), runtime=runtime)
    wait_gone(sorted(set(seen)))


@pytest.mark.parametrize("how", ["subprocess", "thread", "directory", "files", "log", "alarm", "dispatch"])
def test_a_job_that_puts_things_back_keeps_its_process(bench: PoolBench, how: str) -> None:
    ran = bench.pooled(*[pooled.tidy.job(how) for _ in range(5)])
    assert len({each.result for each in ran}) == 1
    assert bench.warnings() == []


def test_generators_coroutines_and_failures_keep_their_process(bench: PoolBench) -> None:
    jobs = [pooled.tidy_generator.job(), pooled.tidy_async.job(), pooled.pid.job()] * 2
    ran = bench.pooled(*jobs[:5], pooled.fails_tidily.job(), pooled.pid.job())
    failed = ran.pop(5)
    assert len({each.result for each in ran}) == 1, bench.warnings()
    assert failed.ended.outcome.summary() == f"LookupError: {ran[0].result}"


def test_context_variables_are_each_job_s_own(bench: PoolBench) -> None:
    assert [each.result for each in bench.pooled(*[pooled.variable.job() for _ in range(3)])] == ["", "", ""]


# -- limits -----------------------------------------------------------------------------------------------------------------


def test_every_run_has_the_memory_of_its_own_job(bench: PoolBench) -> None:
    small, large = pooled.takes.options(max_memory=16), pooled.takes.options(max_memory=400)
    ran = bench.pooled(*[options.job(300) for _ in range(3) for options in (small, large)])
    assert [each.ended.outcome.cause for each in ran] == ["memory", "ok"] * 3


def test_cpu_is_counted_from_the_start_of_the_run(bench: PoolBench) -> None:
    ran = bench.pooled(*[pooled.burns.options(max_cpu=1).job(0.6) for _ in range(4)], pooled.pid.job())
    assert [each.ended.outcome.cause for each in ran] == ["ok"] * 5
    assert len({each.result for each in ran}) == 1
    assert all(0.5 < each.ended.outcome.cpu_user_s + each.ended.outcome.cpu_system_s < 1.5 for each in ran[:4])
    assert ran[4].ended.outcome.cpu_user_s < 0.5, "what the others used is theirs"


def test_cpu_beyond_the_limit_costs_the_process(bench: PoolBench) -> None:
    burnt, after = bench.pooled(pooled.burns.options(max_cpu=1).job(30), pooled.burns.options(max_cpu=1).job(0.1))
    assert (burnt.ended.outcome.cause, burnt.ended.outcome.signal) == ("cpu", "SIGXCPU")
    assert after.ended.outcome.ok


def test_a_time_out_is_raised_in_the_job_and_its_process_is_replaced(bench: PoolBench) -> None:
    before, late, after = bench.pooled(pooled.pid.job(), pooled.hangs_once.job(), pooled.pid.job())
    assert late.ended.outcome.cause == "timeout"
    assert late.ended.outcome.summary() == "JobTimedOut: pool_hangs_once ran longer than its timeout of 0.3 s"
    assert late.ended.outcome.output == "cleaned up\n"
    assert before.result != after.result


def test_who_does_not_listen_is_killed(bench: PoolBench) -> None:
    stubborn, after = bench.pooled(pooled.hangs.job(stubborn=True), pooled.pid.job())
    assert (stubborn.ended.outcome.cause, stubborn.ended.outcome.signal) == ("timeout", "SIGKILL")
    assert after.ended.outcome.ok
    wait_gone([int(stubborn.ended.outcome.output)])


def test_a_shutdown_releases_a_pooled_job_at_no_cost(bench: PoolBench) -> None:
    runtime = bench.runtime(grace_s=0.1)
    runtime.events.subscribe(events.JobOutput, lambda fact: runtime.stop())
    (ran,) = bench.pooled(pooled.hangs.options(timeout=0).job(), runtime=runtime)
    assert (ran.ended.outcome.cause, ran.ended.then) == ("cancelled", "released")
    assert bench.settled[-1].counters.runs == 0


# -- deaths -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "cause", "detail"),
    [
        ("segfault", "signal", "signal: SIGSEGV"), ("exit", "exit", "exit: status 7"), ("exit 0", "exit", "exit: status 0"),
        ("kill", "signal", "signal: SIGKILL"), ("close the socket", "exit", "WireError: the job has closed KQueue's socket"),
    ],
)  # fmt: skip
def test_a_death_is_its_own_job_s_alone(bench: PoolBench, how: str, cause: str, detail: str) -> None:
    good = [pooled.pid.job() for _ in range(10)]
    ran = bench.pooled(*good, pooled.dies.job(how), *good, size=2)
    died = ran.pop(10)
    assert (died.ended.outcome.cause, died.ended.then) == (cause, "retry")
    assert detail in died.ended.outcome.summary()
    counters = bench.settled[[s.token.id for s in bench.settled].index(died.ended.id)].counters
    assert (counters.crashes, counters.attempts) == ((0, 1) if "WireError" in detail else (1, 0))
    assert all(each.ended.outcome.ok for each in ran)


def test_sys_exit_is_no_death(bench: PoolBench) -> None:
    before, ended, after = bench.pooled(pooled.pid.job(), pooled.dies.job("sys.exit"), pooled.pid.job())
    assert ended.ended.outcome.summary() == "SystemExit: 3"
    assert before.result == after.result


@pytest.mark.parametrize("dead", [False, True])
def test_a_process_that_died_idle_costs_no_job_anything(bench: PoolBench, dead: bool) -> None:
    """`dead`: it has ended, and we have not heard of it; else it is about to end."""
    runtime = bench.runtime()
    waiting = [prepare(pooled.pid.job(), pooled.pid.registration) for _ in range(10)]
    pids = []

    def kill(fact: events.JobEnded) -> None:
        pids.append(fact.outcome.pid or 0)
        os.kill(pids[-1], signal.SIGKILL)
        if dead:
            wait_gone(pids[-1:])
        if waiting:
            bench.client.enqueue([waiting.pop()])

    runtime.events.subscribe(events.JobEnded, kill)
    bench.pooled(pooled.pid.job(), runtime=runtime)
    assert len(set(pids)) == 11
    assert all(fact.outcome.ok for fact in bench.of(events.JobEnded))
    assert {settlement.counters.crashes for settlement in bench.settled} == {0}


def test_who_is_lost_twice_runs_alone(bench: PoolBench) -> None:
    security = bench.security
    runtime = bench.runtime()
    prepared = prepare(pooled.kills_the_template.job(), pooled.kills_the_template.registration)
    bench.client.enqueue([prepared])
    runtime.events.subscribe(events.JobEnded, lambda fact: runtime.stop() if fact.outcome.ok else None)
    assert runtime.run(handle_signals=False) == 0
    assert bench.security is security
    assert [fact.outcome.cause for fact in bench.of(events.JobEnded)] == ["lost", "lost", "ok"]
    assert bench._result(prepared.id) == "fork"


@pytest.mark.parametrize(
    "data",
    [
        "ffffffff01", "00000000", "0000000215", "000000061622666f6f22", "0000000319", pooled.FORGED_DONE,
        pooled.FORGED_RESULT + pooled.FORGED_DONE,
    ],
)  # fmt: skip
def test_forged_frames_cost_their_own_job_only(bench: PoolBench, data: str) -> None:
    first, forged, after = bench.pooled(pooled.pid.job(), pooled.forges.job(data), pooled.pid.job())
    assert (first.ended.outcome.cause, after.ended.outcome.cause) == ("ok", "ok")
    assert first.result != after.result, "nobody believes that process any more"
    if data.startswith(pooled.FORGED_RESULT):
        assert forged.result == "forged", "a job may say what its own result is"
    else:
        assert "garbage" in forged.ended.outcome.summary()


# -- output -----------------------------------------------------------------------------------------------------------------


def test_output_is_the_output_of_the_job_that_wrote_it(bench: PoolBench) -> None:
    ran = bench.pooled(*[pooled.talks.job(number) for number in range(100)])
    assert len({each.result for each in ran}) == 1
    for number, each in enumerate(ran):
        text = "\n".join(line for _, line in bench.output(each.ended.id))
        words = ["c", "child", "fd", "python"] if number % 10 == 0 else ["c", "fd", "python"]
        assert sorted(re.findall("[a-z]+", text)) == words
        assert set(re.findall("[0-9]+", text)) == {str(number)}


def test_a_flood_keeps_to_its_job(bench: PoolBench) -> None:
    flood, after = bench.pooled(pooled.floods.job(), pooled.pid.job())
    assert flood.ended.outcome.ok
    assert len(flood.ended.outcome.output) == 8192
    assert bench.output(after.ended.id) == []
    assert after.ended.outcome.output == ""
    assert flood.result == after.result
