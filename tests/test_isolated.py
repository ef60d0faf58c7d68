"""Isolated jobs: each of them in a real child of a real template, on the memory broker. What a bad one does, only it feels."""

from __future__ import annotations

import _socket
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kqueue import BoundJob, KQueueRuntime, SecurityConfig, events
from kqueue.brokers.base import Counters, Settlement
from kqueue.brokers.commands.memory import MemoryStore
from kqueue.brokers.memory import MemoryBroker
from kqueue.client.memory import MemoryClient
from kqueue.codec import decode, from_json, unpack
from kqueue.context import MAX_FOLLOW_UP_BYTES, MAX_FOLLOW_UPS
from kqueue.dispatch import prepare
from kqueue.errors import JobCancelled, JobTimedOut
from kqueue.execution.child import Run
from kqueue.execution.privileges import Privileges
from kqueue.loading import ImportFailed, template_config
from tests.apps.zoo import PIDS
from tests.daemon import PATIENCE_S, tree, wait_gone

ROOT = str(Path(__file__).resolve().parent.parent)


class Ran(NamedTuple):
    """How a job ended."""

    ended: events.JobEnded
    result: Any


class Noting(MemoryBroker):
    """Writes down what it settles."""

    def __init__(self, store: MemoryStore, settled: list[Settlement]) -> None:
        super().__init__(store)
        self.settled = settled

    def settle(self, batch: Any) -> Any:
        self.settled += batch
        return (yield from super().settle(batch))


class Bench:
    """A runtime with the zoo in its template."""

    module = "tests.apps.zoo"

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.client = MemoryClient(self.store)
        self.facts: list[Any] = []
        self.settled: list[Settlement] = []
        self.security = SecurityConfig(max_timeout_s=3600)

    def run(self, *jobs: BoundJob, max_isolated: int = 4, kill_grace_s: float = 0.3) -> list[Ran]:
        """Run `jobs` to the end of their first attempt."""
        runtime = KQueueRuntime(
            Noting(self.store, self.settled), template=template_config([ROOT], [], [self.module]), max_isolated=max_isolated,
            kill_grace_s=kill_grace_s, security=self.security, privileges=Privileges(environment=(PIDS,)),
        )  # fmt: skip
        for kind in (events.JobEnded, events.JobOutput, events.JobProgress, events.Warned, events.TemplateDied):
            runtime.events.subscribe(kind, self.facts.append)
        prepared = [prepare(job, job.registration, keys=runtime.keys) for job in jobs]
        self.client.enqueue(prepared)
        assert runtime.run(burst=True, handle_signals=False) == 0
        ended = {fact.id: fact for fact in self.of(events.JobEnded)}
        rows = {job.id: self.client.show(job.id) for job in prepared}
        results = {id: unpack(from_json(row.result)) if row and row.result else None for id, row in rows.items()}
        return [Ran(ended[job.id], results[job.id]) for job in prepared]

    def one(self, name: str, *args: Any, **kwargs: Any) -> Ran:
        from tests.apps import zoo

        return self.run(getattr(zoo, name).job(*args, **kwargs))[0]

    def of(self, kind: type[Any]) -> list[Any]:
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def output(self, id: str) -> list[tuple[str, str]]:
        return [(fact.stream, fact.line) for fact in self.of(events.JobOutput) if fact.id == id]


@pytest.fixture
def bench() -> Iterator[Bench]:
    fds, children = len(os.listdir("/proc/self/fd")), tree(os.getpid())
    yield Bench()
    assert len(os.listdir("/proc/self/fd")) == fds, "an fd was left open"
    assert tree(os.getpid()) == children, "a child or a zombie was left"


# -- what a job gets --------------------------------------------------------------------------------------------------


def test_a_result_comes_back(bench: Bench) -> None:
    ran = bench.one("add", 40, b=2)
    assert (ran.ended.outcome.cause, ran.ended.then, ran.result) == ("ok", "done", 42)


def test_a_child_is_set_up_as_promised(bench: Bench) -> None:
    os.environ["KQUEUE_URL"] = "redis://:secret@127.0.0.1/0"
    try:
        ran = bench.one("about_me")
    finally:
        del os.environ["KQUEUE_URL"]
    me = ran.result
    assert me["id"] == me["env_id"] == ran.ended.id
    assert (me["name"], me["attempt"]) == ("about_me", 1)
    assert me["sid"] == me["pid"] == ran.ended.outcome.pid, "a session of its own"
    assert (me["core"], me["files"], me["secrets"]) == ([0, 0], 1024, [])
    assert [fd for fd in me["fds"] if fd > 5] == [], "nothing inherited but its own; 5 is the listing itself"
    assert me["stdin"] == "/dev/null"
    assert me["no_new_privs"]
    assert me["title"].startswith(f"kqueued: job about_me {ran.ended.id}")


def test_usage_and_limits_stand_in_the_certificate(bench: Bench) -> None:
    outcome = bench.one("add", 1).ended.outcome
    assert outcome.max_memory_mib > 1
    assert outcome.limits["max_memory"] == 64
    assert outcome.duration_s > 0


# -- how jobs end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "cause", "ended_by", "then", "detail"),
    [
        ("fails", ["oh"], "exception", "job", "retry", "LookupError: oh"),
        ("exits", [3], "exit", "job", "retry", "SystemExit: 3"),
        ("exits", [0], "exit", "job", "retry", "SystemExit: 0"),
        ("exits_hard", [0], "exit", "job", "retry", "exit: status 0"),
        ("exits_hard", [9], "exit", "job", "retry", "exit: status 9"),
        ("segfaults", [], "signal", "kernel", "retry", "signal: SIGSEGV"),
        ("kills_itself", [], "signal", "operator", "retry", "signal: SIGKILL"),
        ("hangs", [], "timeout", "supervisor", "retry", "JobTimedOut: hangs ran longer than its timeout of 0.3 s"),
        ("ignores_sigterm", [], "timeout", "supervisor", "retry", "timeout: SIGKILL"),
        ("eats_memory", [], "memory", "kernel", "retry", "MemoryError"),
        ("burns_cpu", [], "cpu", "kernel", "retry", "cpu: SIGXCPU"),
        ("returns", ["object"], "exception", "job", "retry", "TypeError: the result is of type object"),
        ("returns", ["huge"], "exception", "job", "retry", "TypeError: the result is 2000002 bytes"),
        ("returns", ["nan"], "exception", "job", "retry", "TypeError: the result is nan"),
        ("dispatches_nonsense", [], "exception", "job", "retry", "UsageError: the arguments do not fit job 'add'"),
        ("raises", ["GeneratorExit"], "exception", "job", "retry", "GeneratorExit"),
        ("raises", ["JobCancelled"], "exception", "job", "retry", "JobCancelled"),
        ("raises", ["JobTimedOut"], "exception", "job", "retry", "JobTimedOut"),
        ("generator_that_never_ends", [], "timeout", "supervisor", "retry", "JobTimedOut"),
        ("kills_itself", [40], "signal", "operator", "retry", "signal: SIG40"),
        ("closes_its_socket", [], "exit", "job", "retry", "the job has closed KQueue's socket"),
    ],
)
def test_each_end_has_its_cause(
    bench: Bench, name: str, args: list[Any], cause: str, ended_by: str, then: str, detail: str
) -> None:
    ended = bench.one(name, *args).ended
    assert (ended.outcome.cause, ended.outcome.ended_by, ended.then) == (cause, ended_by, then), ended
    assert detail in ended.outcome.summary()


def test_arguments_that_do_not_fit_go_to_the_dead_letters(bench: Bench) -> None:
    from tests.apps import zoo

    job = zoo.add.job(1)._replace(args=(1, 2, 3), registration=None)
    ended = bench.run(job)[0].ended
    assert (ended.outcome.cause, ended.then) == ("refused", "dead")
    assert "do not fit job 'add'" in ended.outcome.summary()


def test_finally_runs_at_a_timeout_and_its_output_is_kept(bench: Bench) -> None:
    ran = bench.one("cleans_up")
    assert ran.ended.outcome.cause == "timeout"
    assert ran.ended.outcome.output == "cleaned up\n"
    assert "signal.pause()" in ran.ended.outcome.error["traceback"]


def test_a_generator_cleans_up_by_traps(bench: Bench) -> None:
    assert bench.one("generator_that_never_ends").ended.outcome.output == "cleaned up by traps\n"


def test_a_killed_job_takes_its_children_with_it(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIDS, str(tmp_path / "pids"))
    assert bench.one("leaves_children").ended.outcome.cause == "timeout"
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    wait_gone(pids)  # killed with the group, while the job was still a zombie


def test_fifty_good_jobs_beside_every_bad_one(bench: Bench) -> None:
    from tests.apps import zoo

    bad = [zoo.fails, zoo.exits_hard, zoo.segfaults, zoo.kills_itself, zoo.hangs, zoo.ignores_sigterm, zoo.eats_memory]
    jobs = [kind.job(1) if kind is zoo.exits_hard else kind.job() for kind in bad]
    good = [zoo.add.job(n) for n in range(50)]
    ran = bench.run(*jobs, *good, max_isolated=8)
    assert all(not each.ended.outcome.ok for each in ran[: len(bad)])
    assert [each.result for each in ran[len(bad) :]] == list(range(50))


def test_a_killed_template_costs_no_job_anything(bench: Bench) -> None:
    from tests.apps import zoo

    good = [zoo.add.options(priority=-1).job(n) for n in range(20)]
    ran = bench.run(zoo.kills_the_template.job(), *good)
    assert [each.result for each in ran[1:]] == list(range(20))
    (died, *_) = bench.of(events.TemplateDied)
    assert died.reason == "killed by SIGKILL"
    first = next(fact for fact in bench.of(events.JobEnded) if fact.job == "kills_the_template")
    assert (first.outcome.cause, first.then) == ("lost", "released")


# -- output -----------------------------------------------------------------------------------------------------------


def test_output_comes_line_by_line_with_the_job_s_id(bench: Bench) -> None:
    ran = bench.one("talks", 3)
    assert bench.output(ran.ended.id) == [
        ("stdout", "hello 0"), ("stdout", "hello 1"), ("stdout", "hello 2"), ("stderr", "and on stderr"),
    ]  # fmt: skip
    assert "hello 2" in ran.ended.outcome.output


def test_output_that_is_no_text_is_shown_all_the_same(bench: Bench) -> None:
    ran = bench.one("talks_garbage")
    lines = [line for _, line in bench.output(ran.ended.id)]
    assert lines[0] == "��\x00 not text"
    assert [len(line) for line in lines[1:4]] == [8192, 8192, 20_000 - 2 * 8192]
    assert lines[4] == "no newline at the end"
    assert ran.ended.outcome.ok


def test_a_flood_is_kept_off_the_log_and_harms_nobody(bench: Bench) -> None:
    from tests.apps import zoo

    flood, good = bench.run(zoo.floods.job(), zoo.add.job(1))
    assert flood.ended.outcome.ok
    assert good.result == 1
    lines = [line for _, line in bench.output(flood.ended.id)]
    assert len(lines) < 14_400, "100 MB are 14,400 lines of 8 KiB"
    assert "more lines were not logged" in lines[-1]
    assert len(flood.ended.outcome.output) == 8192


def test_what_a_job_logs_is_output_with_its_name(bench: Bench) -> None:
    ran = bench.one("logs")
    assert bench.output(ran.ended.id) == [("stderr", "INFO logs: for the record")]


# -- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        "ffffffff01", "00000000", "000000021441", "0000000215", "000000061622666f6f22", "0000000c157b2263617573652200000000",
        "00000003157b7d",
    ],
)  # fmt: skip
def test_garbage_on_the_job_s_socket_costs_that_job_only(bench: Bench, data: str) -> None:
    from tests.apps import zoo

    bad, good = bench.run(zoo.forges_frames.job(data), zoo.add.job(1))
    assert bad.ended.outcome.cause == "exception"
    assert "garbage" in bad.ended.outcome.summary()
    assert good.result == 1


def test_a_job_that_closes_its_pipes_still_has_its_result(bench: Bench) -> None:
    assert bench.one("closes_everything").result == "still here"


# -- services ---------------------------------------------------------------------------------------------------------


def test_a_child_dispatches_through_the_supervisor(bench: Bench) -> None:
    ran = bench.one("dispatches", 3)
    assert len(ran.result) == 3
    rows = [bench.client.show(id) for id in ran.result]
    assert [(row.state, row.lane) for row in rows] == [("delayed", "isolated")] * 3


def test_a_child_may_dispatch_more_than_a_frame_takes(bench: Bench) -> None:
    ran = bench.one("dispatches", 1201)
    assert len(ran.result) == 1201
    assert bench.client.stats()["default"].delayed == 1201


def test_a_child_s_dispatch_is_held_to_the_limits_like_any_other(bench: Bench) -> None:
    ended = bench.one("dispatches_beyond_limits").ended
    assert ended.outcome.cause == "exception"
    assert "timeout 7200 is over limits.timeout 3600" in ended.outcome.summary()


def test_more_children_at_once_than_the_template_s_socket_takes_requests(bench: Bench) -> None:
    from tests.apps import zoo

    ran = bench.run(*[zoo.add.job(n) for n in range(250)], max_isolated=200)
    assert [each.result for each in ran] == list(range(250))
    assert bench.of(events.Warned) == []


def test_progress_of_a_child_is_told(bench: Bench) -> None:
    ran = bench.one("reports")
    assert ran.result == "reported"
    assert [(fact.fraction, fact.note) for fact in bench.of(events.JobProgress)] == [
        (0.25, "step 1"), (0.5, "step 2"), (0.75, "step 3"), (1.0, "step 4"),
    ]  # fmt: skip


def test_a_flood_of_progress_is_told_in_part_and_its_last(bench: Bench) -> None:
    ran = bench.one("floods_with_progress", 50_000)
    told = [fact.note for fact in bench.of(events.JobProgress)]
    assert ran.ended.outcome.ok
    assert told[-1] == "49999"
    assert len(told) < 40_000


def test_a_generator_in_a_child_has_its_traps(bench: Bench) -> None:
    assert bench.one("waits_as_a_generator").result == [26, [3, 2]]


def test_an_async_job_in_a_child_has_asyncio(bench: Bench) -> None:
    assert bench.one("runs_under_asyncio").result == [True, [3, 2]]


def test_a_result_of_tagged_types_comes_back(bench: Bench) -> None:
    assert bench.one("returns", "bytes").result == b"\x00\xff"
    assert bench.one("returns", "set").result == {1}


# -- follow-ups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["then_plain", "then_generator", "then_async", "ThenAsAClass"])
def test_a_child_s_follow_ups_come_with_its_ack(bench: Bench, name: str) -> None:
    ran = bench.one(name)
    (ack,) = (item for item in bench.settled if item.follow_ups)
    assert [(job.id, job.queue, job.lane, job.delay_s) for job in ack.follow_ups] == [
        (ran.result[0], "mail", "isolated", 2.5), (ran.result[1], "default", "isolated", 0),
    ]  # fmt: skip
    assert [decode(job.envelope).args for job in ack.follow_ups] == [[1], [2]]
    assert ack.verb == "ack"


@pytest.mark.parametrize("how", ["raises", "exits", "is killed", "hangs"])
def test_a_run_that_does_not_end_well_has_none(bench: Bench, how: str) -> None:
    ended = bench.one("then_fails", how).ended
    assert not ended.outcome.ok
    assert (ended.outcome.follow_ups, [item.follow_ups for item in bench.settled]) == ((), [()])


def test_a_follow_up_is_refused_at_the_line_that_asks_for_it(bench: Bench) -> None:
    ran = bench.one("then_refused")
    assert ran.result == [
        "UsageError: the arguments do not fit job 'add'(a: 'int', b: 'int' = 0) -> 'int': too many positional arguments",
        "TypeError: args[0] is of type object, which a job cannot carry; pass an id, a path, or plain JSON values",
        "KQueueError: job 'add': timeout 7200 is over limits.timeout 3600; lower it or raise the limit",
        "TypeError: then() takes a bound job such as SendEmail.job(...), not JobFunction",
    ]
    assert [len(item.follow_ups) for item in bench.settled if item.follow_ups] == [1], "what was right between them counts"


def test_a_child_can_flood_neither_with_follow_ups_nor_with_their_bytes(bench: Bench) -> None:
    from tests.apps import zoo

    many, large = bench.run(zoo.then_many.job(MAX_FOLLOW_UPS + 1, 1), zoo.then_many.job(9, 600_000))
    assert many.result == [MAX_FOLLOW_UPS, f"then_many has {MAX_FOLLOW_UPS} follow-ups already, as many as a run may have; "
                           "let one of them dispatch the rest"]  # fmt: skip
    assert large.result[0] == 6
    assert f"over {MAX_FOLLOW_UP_BYTES} bytes" in large.result[1]
    assert sorted(len(item.follow_ups) for item in bench.settled if item.follow_ups) == [6, MAX_FOLLOW_UPS]


def test_one_that_goes_round_the_bounds_in_the_child_meets_them_in_the_supervisor(bench: Bench) -> None:
    ran = bench.one("then_forged", MAX_FOLLOW_UPS + 100)
    assert ran.result == {"{}": MAX_FOLLOW_UPS, "refused": 100}
    assert len(bench.settled[0].follow_ups) == MAX_FOLLOW_UPS


@pytest.mark.parametrize("name", ["then_without_listening", "then_offloaded"])
def test_follow_ups_nobody_may_ask_for(bench: Bench, name: str) -> None:
    ran = bench.one(name)
    assert [item.follow_ups for item in bench.settled] == [()]
    if name == "then_offloaded":
        assert ran.result == "an offloaded call has no follow-ups; its job has"
    else:
        assert "second dispatch before the first was answered" in ran.ended.outcome.summary()


# -- the retry policy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "cause", "then", "delay_s", "why"),
    [
        ("works", "exception", "retry", 100, ""),
        ("exits", "exit", "retry", 100, ""),
        ("runs out", "memory", "retry", 100, ""),
        ("retry", "exception", "retry", 100, ""),
        ("retry in 5", "exception", "retry", 5, ""),
        ("discard", "exception", "dead", 0, "the job discarded itself"),
        ("raises", "exception", "retry", 2, "gave none: it raised LookupError: no backoff today"),
        ("nonsense", "exception", "retry", 2, "gave none: it returned 'soon', which is no number of seconds"),
        ("blocks", "exception", "retry", 2, "gave none: it was not asked, or did not answer"),
        ("dies", "exception", "retry", 2, "gave none: it was not asked, or did not answer"),
        ("segfaults", "exception", "retry", 2, "gave none: it was not asked, or did not answer"),
        ("is killed", "signal", "retry", 2, "gave none: it was not asked, or did not answer"),
    ],
)
def test_a_backoff_function_is_asked_in_the_child(
    bench: Bench, how: str, cause: str, then: str, delay_s: float, why: str
) -> None:
    ended = bench.one("has_a_backoff", how).ended
    assert (ended.outcome.cause, ended.then) == (cause, then)
    assert ended.delay_s == delay_s if delay_s != 2 else 0 < ended.delay_s <= 2
    certificate = from_json(bench.settled[0].certificate or b"")
    assert certificate["why"].endswith(why), certificate["why"]
    assert (certificate["then"], bool(certificate["why"])) == (then, bool(why))
    asked = how in ("works", "exits", "runs out", "retry")
    assert (f"asked by {ended.outcome.pid} about" in ended.outcome.output) == asked, "and not where nobody wants to know"


def test_a_run_that_timed_out_is_asked_as_well(bench: Bench) -> None:
    ended = bench.one("has_a_backoff_and_no_time").ended
    assert (ended.outcome.cause, ended.delay_s) == ("timeout", 100)
    assert "about JobTimedOut" in ended.outcome.output


def test_what_a_child_raised_is_told_with_its_words(bench: Bench) -> None:
    assert bench.one("has_a_backoff", "discard").ended.outcome.summary() == "Discard: for good"
    assert bench.one("has_a_backoff", "retry").ended.outcome.summary() == "Retry"


def test_a_job_that_runs_out_of_memory_gets_more_each_time(bench: Bench) -> None:
    ran = bench.one("grows")
    assert ran.ended.then == "done"
    ended = bench.of(events.JobEnded)
    assert [(each.outcome.cause, each.outcome.limits["max_memory"]) for each in ended] == [
        ("memory", 100), ("memory", 200), ("ok", 400),
    ]  # fmt: skip
    certificates = [from_json(item.certificate)["limits"]["max_memory"] for item in bench.settled if item.certificate]
    assert certificates == [100, 200]


# -- a host that is short of something --------------------------------------------------------------------------------


def test_a_child_that_floods_the_supervisor_with_dispatches_is_held_back(bench: Bench) -> None:
    ran = bench.one("dispatches_twice_at_once")
    assert ran.ended.outcome.cause == "exception"
    assert "second dispatch" in ran.ended.outcome.summary()


@pytest.mark.parametrize("module", ["dies_at_import", "exits_at_import"])
def test_a_template_that_cannot_start_is_not_started_for_ever(module: str) -> None:
    runtime = KQueueRuntime(MemoryBroker(MemoryStore()), template=template_config([ROOT], [], [f"tests.apps.{module}"]))
    with pytest.raises(ImportFailed) as caught:
        runtime.run(burst=True, handle_signals=False)
    assert caught.value.key.startswith("jobs.isolated_modules")
    assert "status 7" in str(caught.value) or "SystemExit: 7" in str(caught.value)


def test_one_id_in_two_queues_is_two_jobs_at_once() -> None:
    from tests.apps import zoo

    first, second = MemoryStore(), MemoryStore()  # as a queue each in Redis is
    store = TwoQueues({"a": first, "b": second})
    for queue, each in (("a", first), ("b", second)):
        each.enqueue([prepare(zoo.add.options(id="same", queue=queue).job(1), zoo.add.registration)])
    facts: list[events.JobEnded] = []
    runtime = KQueueRuntime(store, queues=["a", "b"], template=template_config([ROOT], [], ["tests.apps.zoo"]))
    runtime.events.subscribe(events.JobEnded, facts.append)
    assert runtime.run(burst=True, handle_signals=False) == 0
    assert sorted((fact.queue, fact.id, fact.outcome.cause) for fact in facts) == [("a", "same", "ok"), ("b", "same", "ok")]


class TwoQueues(MemoryBroker):
    """A broker that keeps each queue by itself."""

    def __init__(self, stores: dict[str, MemoryStore]) -> None:
        super().__init__(next(iter(stores.values())))
        self.stores = stores

    def reserve(self, queue: str, wants: Any) -> Any:
        yield from ()
        return self.stores[queue].reserve(self._owner, self._lease_s, queue, wants)

    def settle(self, batch: Any) -> Any:
        yield from ()
        return [answer for item in batch for answer in self.stores[item.queue].settle([item])]


def test_a_host_without_fds_costs_no_attempt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.apps import zoo

    def no_pairs(real: Any) -> Any:
        def socketpair(family: int, kind: int, *rest: int) -> Any:
            if kind == socket.SOCK_STREAM:  # a job's; the template's is a SOCK_SEQPACKET
                raise OSError(24, "Too many open files")
            return real(family, kind, *rest)

        return socketpair

    monkeypatch.setattr("kqueue.execution.handle._socket.socketpair", no_pairs(_socket.socketpair))
    job = prepare(zoo.add.job(1), zoo.add.registration)
    bench.client.enqueue([job])
    runtime = KQueueRuntime(MemoryBroker(bench.store), template=template_config([ROOT], [], ["tests.apps.zoo"]))
    runtime.events.subscribe(events.Warned, bench.facts.append)
    assert runtime.run(burst=True, handle_signals=False) == 0
    row = bench.client.show(job.id)
    assert row is not None
    assert (row.state, row.counters) == ("delayed", Counters())
    assert "Too many open files" in bench.of(events.Warned)[0].message


FEW_FDS = """
import os, resource
from kqueue.execution.handle import Child
def is_open():
    return len(os.listdir("/proc/self/fd"))
before, hard = is_open(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
made = []
for spare in range(16):
    resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + spare, hard))
    try:
        Child(1, None).close()
        made.append(True)
    except OSError:
        made.append(False)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert is_open() == before, spare
print(made.index(True) > 4, made == sorted(made))
"""


def test_a_child_for_which_fds_run_out_half_way_leaves_none_open() -> None:
    """Whichever it is that is not to be had."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", FEW_FDS], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.stdout, done.stderr) == ("True True\n", "")


@pytest.mark.parametrize(("ago_s", "error"), [(1.0, JobTimedOut), (0.5, JobCancelled)])
def test_a_child_that_began_late_takes_its_time_out_for_one(ago_s: float, error: type[Exception]) -> None:
    """Its time counts from when it was asked for, as at the supervisor, which sends SIGTERM for both."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        run = Run({"job": "x", "limits": {"timeout": 1.0}}, ours, time.monotonic() - ago_s)
        with pytest.raises(error):
            run.terminated(signal.SIGTERM, None)
