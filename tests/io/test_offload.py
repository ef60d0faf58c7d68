"""Offloaded calls: in warm processes, as long as their job wants them, and no longer. A real daemon and its real pool."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kqueue
from kqueue import events
from kqueue.context import job_in
from kqueue.dispatch import prepare
from kqueue.loading import template_config
from tests.apps import processes
from tests.daemon import PATIENCE_S, ROOT, Daemon, alive, tree, wait_gone

MIB = 1048576
Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    daemons: list[Daemon] = []

    def start(size: int = 1, pool: str = "max_memory: 100", **settings: Any) -> Daemon:
        modules = "[tests.apps.inline, tests.apps.processes]"
        url, more = f"sqlite:///{tmp_path}/kqueue.db", f"pool: {{size: {size}, {pool}}}"
        daemons.append(Daemon(tmp_path, url, modules=modules, isolated_modules="[]", more=more, **settings))
        return daemons[-1].start()

    yield start
    for daemon in daemons:
        daemon.close()


def call(daemon: Daemon, name: str, *args: Any) -> Any:
    return daemon.dispatch(processes.offloads_to.job(name, *args))[0].result(PATIENCE_S)


def state(daemon: Daemon, handle: kqueue.JobHandle) -> str:
    row = daemon.client.store.show(handle.id)
    assert row is not None
    return str(row.state)


# -- where they run ----------------------------------------------------------------------------------------------------------


def test_calls_of_many_jobs_share_a_warm_process(start: Start) -> None:
    daemon = start(size=2)
    handles = daemon.dispatch(*(processes.offloads_to.job("pid_of_process") for _ in range(200)))
    pids = {handle.result(PATIENCE_S) for handle in handles}
    assert len(pids) <= 2, "no more at once than pool.size, and no new one for each"
    assert daemon.pid not in pids
    assert daemon.stop() == 0
    wait_gone(list(pids))


def test_a_changed_process_is_not_used_again(start: Start) -> None:
    daemon = start(pool="max_jobs: 2")
    pids = [call(daemon, "pid_of_process") for _ in range(5)]
    assert [pids.index(pid) for pid in pids] == [0, 0, 2, 2, 4]


def test_jobs_of_the_pool_keep_no_call_waiting(start: Start) -> None:
    daemon = start(size=1)
    daemon.dispatch(*(processes.pooled_for_long.job(600) for _ in range(3)))
    daemon.marks.wait("pooled")
    pid = call(daemon, "pid_of_process")
    assert call(daemon, "pid_of_process") == pid
    assert daemon.status()["state"] == "running"


def test_calls_wait_in_line_within_the_time_of_their_job(start: Start) -> None:
    daemon = start(size=1)
    daemon.dispatch(processes.offloads_to.job("is_stubborn"))
    daemon.marks.wait("stubborn")
    (late,) = daemon.dispatch(processes.offloads_too_long.job("pid_of_process"))
    assert late.wait(PATIENCE_S)
    assert state(daemon, late) == "dead"


def test_an_isolated_job_calls_directly(start: Start) -> None:
    daemon = start()
    own, called = daemon.dispatch(processes.offloads_in_a_child.job())[0].result(PATIENCE_S)
    assert own == called


def test_what_lives_on_after_a_call_is_no_part_of_its_job(tmp_path: Path) -> None:
    """The template's keeper and the sampler start on behalf of the first job that needs them."""
    runtime = kqueue.KQueueRuntime("memory://offload", template=template_config([str(ROOT)], [], ["tests.apps.processes"]))
    job = processes.offloads_to.job("pid_of_process")
    runtime.broker.store.enqueue([prepare(job, job.registration)])  # type: ignore[attr-defined]
    kept: list[Any] = []
    link = runtime.isolated.link.current
    runtime.events.subscribe(
        events.JobEnded, lambda fact: kept.extend([link._keeper.context, runtime.isolated.sampler._task.context])
    )  # type: ignore[union-attr]
    assert runtime.run(burst=True, handle_signals=False) == 0
    assert [job_in(context) for context in kept] == [None, None]


# -- how they end ------------------------------------------------------------------------------------------------------------


def test_a_call_is_timed_out_with_its_job_and_its_process_is_replaced(start: Start) -> None:
    daemon = start()
    before = call(daemon, "pid_of_process")
    (late,) = daemon.dispatch(processes.offloads_too_long.job("cleans_up"))
    assert daemon.marks.wait("begun") == [f"begun {before}"]
    daemon.marks.wait("timed-out")
    assert late.wait(PATIENCE_S)
    wait_gone([before])
    assert call(daemon, "pid_of_process") != before


def test_a_call_that_ignores_sigterm_is_killed(start: Start) -> None:
    daemon = start()
    (late,) = daemon.dispatch(processes.offloads_too_long.job("is_stubborn"))
    pid = int(daemon.marks.wait("stubborn")[0].split()[1])
    assert late.wait(PATIENCE_S)
    wait_gone([pid])
    assert call(daemon, "pid_of_process") != pid


@pytest.mark.parametrize("name", ["cleans_up", "is_stubborn"])
def test_a_shutdown_ends_calls_within_the_grace(start: Start, name: str) -> None:
    daemon = start(grace="0s")
    (handle,) = daemon.dispatch(processes.offloads_to.job(name))
    daemon.marks.wait("begun" if name == "cleans_up" else "stubborn")
    processes_of_daemon = tree(daemon.pid)
    assert daemon.stop() == 0
    if name == "cleans_up":
        assert daemon.marks.wait("ended") == ["ended JobCancelled"]
    assert state(daemon, handle) == "ready", "a shutdown costs no attempt"
    assert not any(map(alive, processes_of_daemon))


def test_a_killed_daemon_leaves_no_call(start: Start) -> None:
    daemon = start()
    daemon.dispatch(processes.offloads_to.job("is_stubborn"))
    daemon.marks.wait("stubborn")
    running = tree(daemon.pid)
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    wait_gone(running)


def test_a_process_that_died_idle_costs_no_call_anything(start: Start) -> None:
    daemon = start()
    pid = call(daemon, "pid_of_process")
    os.kill(pid, signal.SIGKILL)
    assert call(daemon, "pid_of_process") != pid


# -- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["raises", "OSError"], ["OSError", "of the call"]),
        (["raises", "KeyError"], ["KeyError", "'of the call'"]),
        (["raises", "exit"], ["OffloadError", "exit: status 3"]),
        (["raises", "kill"], ["OffloadError", "signal: SIGKILL: "]),
        (["eats", 600], ["MemoryError", ""]),
    ],
)
def test_errors_come_back(start: Start, arguments: list[Any], error: list[str]) -> None:
    daemon = start()
    kind, message = call(daemon, *arguments)
    assert (kind, message[: len(error[1])]) == (error[0], error[1])
    assert isinstance(call(daemon, "pid_of_process"), int)


def _failure(name: str, *args: Any, of_os: list[Any] | None = None) -> dict[str, Any]:
    return {"class": name, "of_os": of_os, "args": list(args)}


NOTHING_THERE = [errno.ENOENT, "No such file or directory"]
LONG = "x" * 2048
FAILS = {
    "file": _failure("builtins.FileNotFoundError", *NOTHING_THERE, of_os=[*NOTHING_THERE, "/no/such/file", None]),
    "rename": _failure("builtins.FileNotFoundError", *NOTHING_THERE, of_os=[*NOTHING_THERE, b"/no/such/a", "/no/such/b"]),
    "decode": _failure("builtins.UnicodeDecodeError", "utf-8", b"a\xff", 1, 2, "invalid start byte"),
    "key": _failure("builtins.KeyError", "k", 3),
    # What cannot be told, or is too much, is told by its message.
    "no values": _failure("builtins.ValueError", "<class 'object'>"),
    "large": _failure("builtins.ValueError", f"('{LONG[2:]}\n… 95911 characters left out …\n{LONG[5:]}', 1)"),
    # It would end the job's own generator; and of that name there is a built-in class, but it is not this one.
    "stop": _failure("kqueue.errors.OffloadError", "StopIteration"),
    "other": _failure("kqueue.errors.OffloadError", "ConnectionError: of a library"),
}


def test_an_error_of_a_built_in_class_is_whole(start: Start) -> None:
    daemon = start()
    handles = daemon.dispatch(*(processes.offloads_what_fails.job(which) for which in FAILS))
    assert {which: handle.result(PATIENCE_S) for which, handle in zip(FAILS, handles, strict=True)} == FAILS


def test_an_error_over_a_limit_names_it_and_keeps_its_number(start: Start) -> None:
    daemon = start()
    failed = daemon.dispatch(processes.offloads_what_fails.job("files"))[0].result(PATIENCE_S)
    assert (failed["class"], failed["of_os"][0]) == ("builtins.OSError", errno.EMFILE)
    assert failed["of_os"][1].startswith("Too many open files (max_files of this job is ")
    assert failed["of_os"][2] == "/dev/null"


def test_arguments_of_megabytes(start: Start) -> None:
    daemon = start(pool="max_memory: 300")
    small, large = daemon.dispatch(processes.offloads_much.job(20 * MIB), processes.offloads_much.job(40 * MIB))
    assert small.result(PATIENCE_S) == 20 * MIB
    assert "allowed are 33554432: pass a path" in large.result(PATIENCE_S)


def test_a_call_may_dispatch(start: Start) -> None:
    daemon = start()
    for _ in range(2):
        id = call(daemon, "dispatches")
        assert daemon.client.get(id).result(PATIENCE_S) == "noted"
