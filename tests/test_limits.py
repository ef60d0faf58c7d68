"""Every limit, and jobs that try to break it: real processes, each beside good neighbours that must not feel it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import KQueueRuntime, SecurityConfig, events, job
from kqueue.brokers.commands.memory import MemoryStore
from kqueue.brokers.memory import MemoryBroker
from kqueue.client.handle import last_error
from kqueue.client.memory import MemoryClient
from kqueue.codec import from_json, unpack
from kqueue.dispatch import prepare
from kqueue.execution.oom import OomKills
from kqueue.execution.stack import Stack
from kqueue.loading import template_config
from kqueue.outcome import Outcome
from kqueue.redact import redacted, shorten_paths
from tests.apps import greedy
from tests.daemon import tree, wait_gone

ROOT = str(Path(__file__).resolve().parent.parent)
NEIGHBOURS = 5


class Bench:
    def __init__(self) -> None:
        self.store = MemoryStore()
        self.client = MemoryClient(self.store)
        self.outcomes: dict[str, Outcome] = {}
        self.cgroups = True

    def run(self, *jobs: Any, neighbours: int = NEIGHBOURS, module: str = "tests.apps.greedy", slots: int = 3) -> list[Outcome]:
        """The outcomes of `jobs`, which ran beside good ones; each of those had its result."""
        from tests.apps import zoo

        runtime = KQueueRuntime(
            MemoryBroker(self.store), template=template_config([ROOT], [], ["tests.apps.zoo", module]), max_isolated=slots,
            kill_grace_s=0.3, security=SecurityConfig(max_memory_mib=0), cgroups=self.cgroups,
        )  # fmt: skip
        runtime.events.subscribe(events.JobEnded, lambda fact: self.outcomes.setdefault(fact.id, fact.outcome))
        good = [zoo.add.job(number) for number in range(neighbours)]
        prepared = [prepare(job, job.registration) for job in [*jobs, *good]]
        self.client.enqueue(prepared)
        assert runtime.run(burst=True, handle_signals=False) == 0
        outcomes = [self.outcomes[job.id] for job in prepared]
        assert [self.result(job.id) for job in prepared[len(jobs) :]] == list(range(neighbours))
        return outcomes[: len(jobs)]

    def result(self, id: str) -> Any:
        row = self.client.show(id)
        return None if row is None or row.result is None else unpack(from_json(row.result))

    def one(self, name: str, *args: Any, **options: Any) -> Outcome:
        self.outcomes.pop("bad", None)
        self.store.forget(["bad"])
        job = getattr(greedy, name).options(id="bad", max_attempts=1, **options).job(*args)
        (outcome,) = self.run(job)
        return outcome


@pytest.fixture
def bench() -> Iterator[Bench]:
    fds, children = len(os.listdir("/proc/self/fd")), tree(os.getpid())
    yield Bench()
    assert len(os.listdir("/proc/self/fd")) == fds, "an fd was left open"
    wait_gone([pid for pid in tree(os.getpid()) if pid not in children])


def message(outcome: Outcome) -> str:
    assert outcome.error is not None, outcome
    return str(outcome.error["message"])


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "memfd", "written memfd"])
def test_memory_that_no_rlimit_counts_is_seen_and_ends_the_job(bench: Bench, kind: str) -> None:
    outcome = bench.one("maps", kind)
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("memory", "supervisor", "SIGKILL"), outcome
    found = re.fullmatch(r"it has (\d+) MiB, and its max_memory is 32 MiB \(seen after \d+\.\d\d s\)", message(outcome))
    assert found
    assert int(found[1]) > 32
    assert outcome.max_memory_mib > int(found[1]) - 1
    assert "in maps" in outcome.stack


def test_private_memory_is_refused_to_the_job(bench: Bench) -> None:
    outcome = bench.one("maps", "private")
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("memory", "kernel", None)
    assert "Cannot allocate memory" in message(outcome)


def test_a_growing_heap_ends_one_way_or_the_other(bench: Bench) -> None:
    outcome = bench.one("grows_a_bytearray")
    assert outcome.cause == "memory"
    assert outcome.max_memory_mib > 32


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("eats_in_a_subprocess", []), ("eats_in_many", [12, 8]), ("eats_in_many", [12, 8, "orphans"]),
        ("eats_in_many", [12, 8, "threads"]), ("eats_in_many", [12, 8, "forks"]),
    ],
)  # fmt: skip
def test_what_a_job_started_counts_as_well(bench: Bench, name: str, args: list[Any]) -> None:
    outcome = bench.one(name, *args)
    assert (outcome.cause, outcome.ended_by) == ("memory", "supervisor"), outcome
    assert re.match(r"its \d+ processes have \d+ MiB, and its max_memory is \d+ MiB", message(outcome))


def test_what_processes_of_a_job_share_counts_once(bench: Bench) -> None:
    outcome = bench.one("shares_with_its_forks")
    assert (outcome.cause, bench.result("bad")) == ("ok", 0), outcome


def test_what_the_template_has_counts_for_no_job(bench: Bench) -> None:
    """150 MiB, and jobs of 40, alone and several at once."""
    from tests.apps import weighty

    jobs = [weighty.reads.options(id=f"r{n}", max_attempts=1).job() for n in range(4)]
    jobs += [weighty.reads_in_forks.options(id="f", max_attempts=1).job(), weighty.adds.options(id="a", max_attempts=1).job(20)]
    outcomes = bench.run(*jobs, module="tests.apps.weighty", slots=6)
    assert [outcome.cause for outcome in outcomes] == ["ok"] * 6, outcomes


def test_what_a_job_changes_of_it_counts(bench: Bench) -> None:
    from tests.apps import weighty

    jobs = [weighty.writes.options(max_attempts=1).job(), weighty.adds.options(max_attempts=1).job(60)]
    writes, adds = bench.run(*jobs, module="tests.apps.weighty")
    assert (writes.cause, writes.ended_by) == ("memory", "supervisor"), writes
    assert (adds.cause, adds.ended_by) == ("memory", "supervisor"), adds
    assert int(message(adds).split()[2]) in range(58, 75), "60, and what an interpreter needs; nothing of the template's 150"


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["children", "chain", "orphans"])
def test_a_fork_bomb_is_ended_by_its_number(bench: Bench, how: str) -> None:
    outcome = bench.one("forks", 40, how)
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("signal", "supervisor", "SIGKILL"), outcome
    assert re.fullmatch(r"it has \d+ processes at once, and its max_processes is 10", message(outcome))
    assert outcome.summary().startswith("TooManyProcesses: ")


def test_as_many_processes_as_it_may_have_are_no_bomb(bench: Bench) -> None:
    assert bench.one("forks_within_its_limit").ok


# -- CPU, files, sizes ------------------------------------------------------------------------------------------------


def test_a_spinner_in_c_ends_by_its_cpu_time_and_says_where(bench: Bench) -> None:
    outcome = bench.one("spins_in_c")
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("cpu", "kernel", "SIGXCPU"), outcome
    assert re.fullmatch(r"it used \d\S* s of CPU, and its max_cpu is 1 s", message(outcome))
    assert 'File "tests/apps/greedy.py"' in outcome.stack
    assert "in spins_in_c" in outcome.stack


def test_who_ignores_sigxcpu_is_killed_by_the_kernel_a_second_later(bench: Bench) -> None:
    outcome = bench.one("spins_and_ignores_it")
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("cpu", "kernel", "SIGKILL"), outcome


def test_a_disk_filler_is_told_so(bench: Bench, tmp_path: Path) -> None:
    outcome = bench.one("fills_the_disk", str(tmp_path / "file"))
    assert outcome.cause == "exception"
    assert "File too large" in message(outcome)
    assert message(outcome).endswith("(max_file_size of this job is 2 MiB)")
    assert (tmp_path / "file").stat().st_size == 2 << 20


def test_a_disk_filler_dies_of_it_where_the_signal_is_not_ignored(bench: Bench, tmp_path: Path) -> None:
    outcome = bench.one("fills_the_disk", str(tmp_path / "file"), "signal")
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("signal", "kernel", "SIGXFSZ"), outcome
    assert message(outcome) == "it made a file larger than its max_file_size, 2 MiB"


def test_a_program_that_fills_the_disk_is_held_to_it(bench: Bench, tmp_path: Path) -> None:
    outcome = bench.one("fills_the_disk", str(tmp_path / "file"), "program", keep_result=60)
    assert outcome.ok
    assert bench.result("bad") == -25, "SIGXFSZ"
    assert (tmp_path / "file").stat().st_size == 2 << 20


def test_open_files_end_at_their_limit(bench: Bench) -> None:
    outcome = bench.one("opens_files", 100)
    assert outcome.cause == "exception"
    assert "Too many open files" in message(outcome)
    assert message(outcome).endswith("(max_files of this job is 32)")


def test_as_many_files_as_it_may_have(bench: Bench) -> None:
    assert bench.one("opens_files", 32 - 5).ok


def test_a_dispatch_may_set_limits(bench: Bench) -> None:
    assert bench.one("opens_files", 100, max_files=200).ok
    assert bench.outcomes["bad"].limits["max_files"] == 200


def test_limits_are_those_that_were_declared(bench: Bench) -> None:
    assert bench.one("limits_it_has").ok
    has = bench.result("bad")
    assert (has["NOFILE"], has["FSIZE"], has["CORE"]) == ([48, 48], [3 << 20, 3 << 20], [0, 0])
    assert bench.outcomes["bad"].limits["max_processes"] == 256
    assert bench.outcomes["bad"].limits["max_file_size"] == 3


# -- where it stood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("spins_in_c_too_long", "in spins_in_c_too_long"),
        ("hides_among_threads", "in _waits_in_a_thread"),
        ("recurses_deeply", "in recurses_deeply"),
    ],
)
def test_who_had_to_be_killed_leaves_its_stack(bench: Bench, name: str, where: str) -> None:
    outcome = bench.one(name)
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("timeout", "supervisor", "SIGKILL"), outcome
    assert where in outcome.stack
    assert f"in {name}" in outcome.stack, "each thread's"
    assert re.search(r'File "tests/apps/greedy.py", line \d+ in ', outcome.stack)
    assert ROOT not in outcome.stack
    assert "kqueue/execution" not in outcome.stack, "which is the same for every job"
    assert len(outcome.stack) < 17_000


@pytest.mark.parametrize("name", ["stops_itself", "blocks_every_signal", "becomes_another_program"])
def test_who_cannot_be_asked_is_killed_all_the_same(bench: Bench, name: str) -> None:
    outcome = bench.one(name)
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("timeout", "supervisor", "SIGKILL"), outcome
    assert outcome.stack == ""


def test_a_job_that_floods_the_pipe_for_its_stack_gets_what_fits(bench: Bench) -> None:
    outcome = bench.one("floods_its_stack_pipe")
    assert (outcome.cause, outcome.signal) == ("timeout", "SIGKILL")
    assert len(outcome.stack) < 17_000


def test_a_crash_says_where(bench: Bench) -> None:
    from tests.apps import zoo

    (outcome,) = bench.run(zoo.segfaults.options(max_attempts=1).job())
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("signal", "kernel", "SIGSEGV")
    assert outcome.stack.startswith("Fatal Python error: Segmentation fault")
    assert "in segfaults" in outcome.stack


def test_a_stack_is_bounded_and_read_in_linear_time() -> None:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    stack = Stack()
    for _ in range(20):
        os.write(write_fd, b'  File "/x/kqueue/execution/child.py", line 1 in run\n' * 1000)
        while stack.read(read_fd) and stack.came and _more(read_fd):
            pass
    os.close(write_fd)
    assert not stack.read(read_fd)
    os.close(read_fd)
    assert len(stack.text()) <= 17_000


def _more(fd: int) -> bool:
    import select

    return bool(select.select([fd], [], [], 0)[0])


# -- who sent it ------------------------------------------------------------------------------------------------------


def own_memory_cgroup() -> Path | None:
    """Where a cgroup of our own may be made: below the one that we are in, so that nothing leaves its limits."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        here = Path(f"/sys/fs/cgroup/memory{path}")
        if "memory" in controllers.split(",") and os.access(here, os.W_OK):
            return here
        here = Path(f"/sys/fs/cgroup{path}")
        if not controllers and os.access(here / "cgroup.subtree_control", os.W_OK):
            subtree = (here / "cgroup.subtree_control").read_text()
            return here if "memory" in subtree.split() else None
    return None


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """One that has 64 MiB."""
    parent = own_memory_cgroup()
    if parent is None:
        pytest.skip("no cgroup with the memory controller may be made here")
    cgroup = parent / f"kqueue-test-{os.getpid()}"
    cgroup.mkdir()
    try:
        limit = cgroup / "memory.limit_in_bytes"
        (limit if limit.exists() else cgroup / "memory.max").write_text(str(64 << 20))
        yield cgroup
    finally:
        cgroup.rmdir()


@pytest.mark.alone  # the count is the host's: who is killed in another test meanwhile would be taken for its victim
def test_the_kernel_s_oom_killer_is_known_by_its_count(bench: Bench, small_cgroup: Path) -> None:
    bench.cgroups = False  # what counts in the job's own would not see it elsewhere
    outcome = bench.one("is_taken_by_the_oom_killer", str(small_cgroup), max_memory=1000)
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("memory", "kernel", "SIGKILL"), outcome
    assert message(outcome).startswith("by the kernel's OOM killer, for oom_kill of /")
    assert outcome.summary().startswith("memory: SIGKILL: by the kernel's OOM killer")


def test_somebody_else_s_sigkill_is_called_so(bench: Bench) -> None:
    from tests.apps import zoo

    (outcome,) = bench.run(zoo.kills_itself.options(max_attempts=1).job())
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("signal", "operator", "SIGKILL")
    assert message(outcome).startswith("killed by somebody else: KQueue did not send it, nor did the kernel's OOM killer")


@pytest.mark.parametrize("events_file", [True, False])
def test_one_oom_kill_explains_one_death(tmp_path: Path, events_file: bool) -> None:
    vmstat, cgroup = tmp_path / "vmstat", tmp_path / "memory.events"
    counted = cgroup if events_file else vmstat

    def count(kills: int) -> None:
        vmstat.write_text(f"nr_shmem 10\noom_kill {kills if counted is vmstat else 99}\nother 1\n")
        cgroup.write_text(f"low 0\noom 7\noom_kill {kills}\noom_group_kill 0\n")

    count(3)
    kills = OomKills(str(cgroup) if events_file else "", str(vmstat))
    kills.look(1.0)
    early, also = kills.mark(), kills.mark()
    assert kills.killer(early)[0] == "operator"
    count(4)
    by, text = kills.killer(early)
    assert (by, f"oom_kill of {counted} rose from 3 to 4" in text) == ("kernel", True)
    assert kills.killer(also)[0] == "operator", "the one that was counted is accounted for"
    kills.look(2.0)
    later = kills.mark()
    assert kills.killer(later)[0] == "operator"
    count(6)
    assert [kills.killer(mark)[0] for mark in (later, early, also)] == ["kernel", "kernel", "operator"]
    counted.unlink()
    by, text = kills.killer(later)
    assert (by, "cannot be read" in text) == ("operator", True)


# -- what is wrong otherwise ------------------------------------------------------------------------------------------


@job(isolated=True)
def known_to_the_daemon_only() -> None: ...


def test_a_job_whose_code_was_removed_is_named_and_costs_nobody_else(bench: Bench) -> None:
    (outcome,) = bench.run(known_to_the_daemon_only.job())
    assert (outcome.cause, outcome.ended_by) == ("refused", "supervisor")
    assert message(outcome).startswith("job 'known_to_the_daemon_only' is not registered in the template")


def test_a_host_that_allows_less_than_a_template_has_is_named() -> None:
    code = (
        "import resource; from kqueue.execution import limits; resource.setrlimit(resource.RLIMIT_DATA, (1 << 20, 1 << 20))\n"
        "try: limits.apply({'max_memory': 64, 'memory_headroom': 128, 'max_files': 64})\n"
        "except OSError as error: print(error.strerror)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    expected = r"RLIMIT_DATA of this service is 1 MiB, and the template has \d+ MiB: raise it \(LimitDATA=\)\n"
    assert re.fullmatch(expected, done.stdout), done


# -- what leaves the host ---------------------------------------------------------------------------------------------


def test_a_client_is_told_neither_paths_nor_secrets(bench: Bench) -> None:
    outcome = bench.one("fails_with_secrets")
    assert "/srv/app/private/data.json" in message(outcome), "the operator has it whole"
    assert outcome.error is not None
    assert 'File "tests/apps/greedy.py", line' in outcome.error["traceback"]
    assert ROOT not in outcome.error["traceback"]
    row = bench.client.show("bad")
    assert row is not None
    assert last_error(row) == "RuntimeError: cannot open …/data.json with redis://***@db/0, password=***"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no such file: '/var/lib/app/x.db'", "no such file: '…/x.db'"),
        ("https://bob:pw@example.org/a/b failed", "https://***@example.org/a/b failed"),
        ("https://example.org/a/b failed", "https://example.org/a/b failed"),
        ("api_key: abc123, retry", "api_key: ***, retry"),
        ("{'password': 'a b', 'user': 'c'}", "{'password': ***, 'user': 'c'}"),
        ("Authorization: Bearer eyJhbGciOi", "Authorization: ***"),
        ("AWS_SECRET_ACCESS_KEY=wJalr", "AWS_SECRET_ACCESS_KEY=***"),
        ("1/2 of tokens and a/b/c", "1/2 of tokens and a/b/c"),
        ("/tmp is full", "/tmp is full"),
    ],
)
def test_what_is_redacted(text: str, told: str) -> None:
    assert redacted(text) == told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('File "/srv/app/jobs.py", line 1', 'File "app/jobs.py", line 1'),
        ('File "/srv/lib/python/x/y.py", line 1', 'File "x/y.py", line 1'),
        ('File "/home/bob/secret/deep/x.py", line 1', 'File "…/deep/x.py", line 1'),
        ('File "/srvapp/x.py", line 1', 'File "/srvapp/x.py", line 1'),
        ('File "<string>", line 1', 'File "<string>", line 1'),
    ],
)
def test_how_a_file_is_named(line: str, told: str) -> None:
    assert shorten_paths(line, ["", "/srv", "/srv/lib/python", "/"]) == told


def test_whoever_closes_its_result_pipe_ends_by_that(bench: Bench) -> None:
    outcome = bench.one("closes_its_result_pipe_and_goes_on")
    assert (outcome.cause, outcome.ended_by, outcome.exit_code) == ("exit", "job", 70)
    assert "has closed KQueue's socket" in outcome.output
