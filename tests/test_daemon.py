"""The daemon from outside: a real process, real signals, both brokers."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import BoundJob, JobFailed, JobState, ResultNotKept
from kqueue.brokers.base import Counters
from kqueue.dispatch import prepare
from kqueue.options import DispatchOptions
from tests.apps import inline
from tests.daemon import PATIENCE_S, ROOT, Daemon, alive, tree, tree_but_spares, wait_gone
from tests.servers import RedisServer


def named(name: str, *args: Any, lane: str = "", **options: Any) -> BoundJob:
    """A job bound by name, as a process would that cannot import it."""
    return BoundJob(name, args, {}, DispatchOptions(**options))


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/queue.db"
    server = request.getfixturevalue("redis_server")
    server.command("FLUSHALL")
    return str(server.url)


@pytest.fixture
def daemon(tmp_path: Path, url: str) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, url)
    yield daemon
    daemon.close()


# -- running ----------------------------------------------------------------------------------------------------------


def test_inline_and_isolated_jobs_run_and_their_results_come_back(daemon: Daemon) -> None:
    daemon.start()
    note, nap, crunch, anap = daemon.dispatch(
        inline.note.job("hello"), inline.nap.job(0.05), named("crunch", 7), inline.anap.job(0.01)
    )
    assert note.result(30) == "hello"
    assert crunch.result(30) == {"n": 7, "ballast": 60_000_000}
    assert (nap.result(30), anap.result(30)) == ("", 0.01)
    assert note.state() is JobState.DONE
    (line,) = daemon.marks.wait("crunch")
    assert int(line.split()[2]) != daemon.pid
    assert daemon.stop() == 0


def test_a_job_dispatched_before_the_first_start_runs_in_its_proper_lane(daemon: Daemon) -> None:
    crunch, note = daemon.dispatch(named("crunch", 1), named("note", "x"))
    assert daemon.run("--burst") == 0
    assert crunch.result(0) == {"n": 1, "ballast": 60_000_000}
    assert note.result(0) == "x"


def test_the_supervisor_never_imports_isolated_modules(daemon: Daemon) -> None:
    daemon.start()
    daemon.dispatch(named("crunch", 1))[0].result(30)
    resident = int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * 4096
    assert resident < 60_000_000, "the ballast of the isolated module is not in the supervisor"
    assert "tests/apps/heavy" not in Path(f"/proc/{daemon.pid}/maps").read_text()


def test_a_thousand_sleepers_at_once(daemon: Daemon) -> None:
    daemon.start()
    handles = daemon.dispatch(*[inline.anap.options(timeout=60).job(1.0) for _ in range(1000)])
    assert [handle.result(30) for handle in handles] == [1.0] * 1000
    lines = [line for line in daemon.log if "anap" in line and "strategy=inline" in line]
    assert lines


def test_jobs_leave_no_fd_no_process_and_no_zombie_behind(daemon: Daemon) -> None:
    daemon.start()
    for handle in daemon.dispatch(named("crunch", 0), *[inline.offloads.job() for _ in range(50)])[1:]:
        handle.result(20)  # the template is up, and both processes of the pool
    daemon.marks.wait("crunch")

    def holds() -> tuple[int, list[int]]:
        return len(os.listdir(f"/proc/{daemon.pid}/fd")), tree_but_spares(daemon.pid)

    before = holds()
    handles = daemon.dispatch(*[inline.anap.job(0.01) for _ in range(200)], *[named("crunch", n) for n in range(1, 41)])
    handles += daemon.dispatch(*[inline.offloads.job() for _ in range(10)], *[inline.too_long.job() for _ in range(5)])
    for handle in handles:
        assert handle.wait(20)
    deadline = time.monotonic() + PATIENCE_S
    while (now := holds())[0] != before[0] or not {*now[1]} <= {*before[1]}:  # the last of them may be on its way out
        assert time.monotonic() < deadline, (holds(), before)


def test_a_job_with_one_id_in_two_queues_is_two_jobs(daemon: Daemon) -> None:
    """And both at once: a lease is known by itself, not by the id of its job."""
    if daemon.client.store.address.startswith("sqlite"):
        pytest.skip("in SQLite all queues are one table, and an id is there once")
    daemon.dispatch(inline.nap.options(id="order-17").job(0.3), inline.nap.options(id="order-17", queue="mail").job(0.3))
    assert daemon.run("--burst") == 0
    assert len(daemon.marks.wait("end", 2)) == 2


def test_a_signal_while_it_ends_by_itself_is_the_first_one(daemon: Daemon) -> None:
    daemon.start("--max-time", "3s")
    (nap,) = daemon.dispatch(inline.nap.job(1.0, "calm"))
    daemon.wait_log("stopping")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    if nap.state() is not JobState.READY:  # it was taken before the time was up
        assert nap.result(0) == "calm", "the grace still holds"


def test_closed_standard_fds_change_nothing(daemon: Daemon) -> None:
    (handle,) = daemon.dispatch(inline.note.job("x"))
    command = f'exec "{sys.executable}" -m kqueue.cli.kqueued -c "{daemon.config}" --burst <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], env=daemon.environment, check=False).returncode == 0
    assert handle.result(0) == "x"


def test_jobs_dispatch_jobs_without_blocking(daemon: Daemon) -> None:
    daemon.start()
    (fan,) = daemon.dispatch(inline.fans_out.job(5))
    ids = fan.result(30)
    assert [daemon.client.get(id).result(30) for id in ids] == [f"from {n}" for n in range(5)]


def test_offload_runs_in_a_child(daemon: Daemon) -> None:
    daemon.start()
    assert daemon.dispatch(inline.offloads.job())[0].result(30) == "a/b"


def test_a_blocking_dispatch_in_an_inline_job_is_refused_with_what_to_write(daemon: Daemon) -> None:
    daemon.start()
    with pytest.raises(JobFailed, match=r"dispatch\(\) blocks.*yield enqueue\(note\.job"):
        daemon.dispatch(inline.dispatches_blocking.job())[0].result(30)


def test_yielding_nonsense_is_a_type_error_at_that_line(daemon: Daemon) -> None:
    daemon.start()
    assert "yield sleep(0.5)" in daemon.dispatch(inline.yields_nonsense.job())[0].result(30)


def test_a_timeout_is_thrown_at_the_trap(daemon: Daemon) -> None:
    daemon.start()
    with pytest.raises(JobFailed, match=r"too_long ran longer than its timeout of 0\.2 s"):
        daemon.dispatch(inline.too_long.job())[0].result(30)
    daemon.marks.wait_for(lambda lines: "cleaned up" in lines)


def test_a_failing_job_is_retried_and_then_dead_with_all_its_certificates(daemon: Daemon) -> None:
    daemon.start()
    (handle,) = daemon.dispatch(inline.fails_twice.job())
    with pytest.raises(JobFailed, match="ValueError: no such luck"):
        handle.result(30)
    assert daemon.marks.wait("attempt", 2) == ["attempt 1", "attempt 2"]
    shown = json.loads(daemon.kqueue("show", handle.id, "--json").stdout)
    assert (shown["state"], shown["attempts"], shown["job"]) == ("dead", 2, "fails_twice")
    assert [each["cause"] for each in shown["certificates"]] == ["exception", "exception"]
    assert "no such luck" in shown["certificates"][-1]["error"]["traceback"]


def test_a_child_killed_from_outside_costs_only_that_run(daemon: Daemon) -> None:
    daemon.start()
    (handle,) = daemon.dispatch(named("dies_once"))
    others = daemon.dispatch(*[inline.note.job(str(n)) for n in range(20)])
    assert handle.wait(30)
    assert handle.state() is JobState.DONE
    assert [other.result(30) for other in others] == [str(n) for n in range(20)]
    assert daemon.marks.wait("attempt", 2) == ["attempt 1", "attempt 2"]


def test_a_loop_that_is_blocked_is_reported_with_its_job(daemon: Daemon) -> None:
    daemon.start()
    daemon.dispatch(inline.blocks.job(0.25))[0].wait(30)
    line = daemon.wait_log("blocks")
    assert daemon.wait_log("isolated=True")
    assert "inline.py" in "\n".join(daemon.log), line


# -- states, status, garbage ------------------------------------------------------------------------------------------


def test_what_is_not_kept_reads_as_done(daemon: Daemon) -> None:
    daemon.start()
    (handle,) = daemon.dispatch(inline.note.options(keep_result=0).job("gone"))
    assert handle.wait(30)
    assert handle.state() is JobState.DONE
    with pytest.raises(ResultNotKept, match="keep_result"):
        handle.result(0)


def test_status_and_jobs_are_as_promised(daemon: Daemon) -> None:
    daemon.start()
    daemon.dispatch(named("linger", 60), inline.nap.job(60, "long"), inline.note.options(delay=1000, queue="mail").job("later"))
    daemon.marks.wait("linger")
    daemon.marks.wait("start")
    status = daemon.status()
    assert set(status) >= {
        "pid", "version", "uptime_s", "state", "memory_mib", "processed", "failed", "retried", "killed", "running", "queues",
        "loop",
        "memory_budget",
    }  # fmt: skip
    assert (status["pid"], status["state"]) == (daemon.pid, "running")
    running = {each["job"]: each for each in status["running"]}
    assert set(running) == {"linger", "nap"}
    assert running["linger"]["strategy"] == "isolated"
    assert running["linger"]["pid"] in tree(daemon.pid)
    assert running["nap"]["strategy"] == "inline"
    assert status["queues"]["mail"]["delayed"] == 1
    assert status["queues"]["default"]["leased"] == 2
    jobs = json.loads(daemon.kqueue("jobs", "--json").stdout)
    assert {(each["job"], each["state"]) for each in jobs} == {("linger", "leased"), ("nap", "leased"), ("note", "delayed")}
    assert set(jobs[0]) == {"id", "job", "state", "queue", "lane", "priority", "attempts", "available_at"}
    assert daemon.kqueue("status", "--check").returncode == 0


def test_garbage_in_the_queue_goes_to_the_dead_letters_and_the_rest_runs(daemon: Daemon, tmp_path: Path) -> None:
    handles = daemon.dispatch(*[inline.note.job(str(n)) for n in range(4)])
    envelopes = [
        b"\xff\xfe not json", b'{"v":1}', b'{"v":1,"id":"%s","job":"note","args":"no list"}' % handles[2].id.encode()
    ]  # fmt: skip
    for handle, envelope in zip(handles, envelopes, strict=False):
        overwrite(daemon, tmp_path, handle.id, envelope)
    assert daemon.run("--burst") == 0
    assert handles[3].result(0) == "3"
    for handle, reason in zip(handles, ["not JSON", '"id"', '"args" is a string'], strict=False):
        assert handle.state() is JobState.DEAD
        with pytest.raises(JobFailed, match=reason):
            handle.result(0)


def test_a_member_that_is_no_text_costs_nobody_anything(daemon: Daemon) -> None:
    """Whoever writes into Redis may name a job by any bytes; it is buried, and the others run."""
    if daemon.client.store.address.startswith("sqlite"):
        pytest.skip("its ids are text")
    import redis

    from kqueue.config_file import load_config

    (good,) = daemon.dispatch(inline.note.job("x"))
    with redis.Redis.from_url(load_config(str(daemon.config)).queue.url) as connection:
        connection.zadd("kq:{default}:ready:inline", {b"\xff\xfe": 0})
    assert daemon.run("--burst") == 0
    assert good.result(0) == "x"
    assert not [line for line in daemon.log if "internal error" in line]


def overwrite(daemon: Daemon, tmp_path: Path, id: str, envelope: bytes) -> None:
    """Write an envelope behind KQueue's back."""
    if daemon.client.store.address.startswith("sqlite"):
        with sqlite3.connect(tmp_path / "queue.db") as connection:
            connection.execute("UPDATE kq_job SET envelope = ? WHERE id = ?", (envelope, id))
        connection.close()
        return
    import redis

    from kqueue.config_file import load_config

    with redis.Redis.from_url(load_config(str(daemon.config)).queue.url) as connection:
        key = f"kq:{{default}}:job:{id}"
        connection.set(key, connection.get(key).partition(b"\n")[0] + b"\n" + envelope)


def test_an_unknown_job_waits_for_a_deploy_and_arguments_that_do_not_fit_do_not(daemon: Daemon) -> None:
    unknown, good = daemon.dispatch(named("nobody"), inline.note.job("x"))
    stranger = prepare(named("note", 1, 2, 3), None)  # by a process that does not have the code
    daemon.client.store.enqueue([stranger])
    bad = daemon.client.get(stranger.id)
    assert daemon.run("--burst") == 0
    assert good.result(0) == "x"
    assert unknown.state() is JobState.DELAYED
    assert bad.state() is JobState.DEAD
    with pytest.raises(JobFailed, match="do not fit job 'note'"):
        bad.result(0)


# -- ending -----------------------------------------------------------------------------------------------------------


def test_sigterm_lets_running_jobs_finish(daemon: Daemon) -> None:
    daemon.start()
    nap, linger, waiting = daemon.dispatch(
        inline.nap.job(0.5, "nap"), named("linger", 0.5), inline.note.options(delay=0.3).job("too late")
    )
    daemon.marks.wait("linger")
    daemon.marks.wait("start")
    assert daemon.stop() == 0
    daemon.marks.wait("lingered")
    assert nap.result(0) == "nap"
    assert linger.state() is JobState.DONE
    assert waiting.state() is not JobState.DONE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_does_not_finish_is_released_without_an_attempt(tmp_path: Path, url: str, number: signal.Signals) -> None:
    daemon = Daemon(tmp_path, url, grace="300ms")
    try:
        daemon.start()
        nap, linger = daemon.dispatch(inline.nap.job(600), named("linger", 600))
        daemon.marks.wait("linger")
        daemon.marks.wait("start")
        family = tree(daemon.pid)
        daemon.signal(number)
        assert daemon.wait() == 0
        wait_gone(family)
        for handle in (nap, linger):
            row = daemon.client.store.show(handle.id)
            assert row is not None
            assert (row.state, row.counters) == ("ready", Counters())
    finally:
        daemon.close()


def test_a_second_signal_ends_at_once(tmp_path: Path, url: str) -> None:
    daemon = Daemon(tmp_path, url, grace="600s")
    try:
        daemon.start()
        (linger,) = daemon.dispatch(named("linger", 600))
        daemon.marks.wait("linger")
        daemon.signal(signal.SIGTERM)
        daemon.wait_log("stopping")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        row = daemon.client.store.show(linger.id)
        assert row is not None
        assert (row.state, row.counters) == ("ready", Counters())
    finally:
        daemon.close()


def test_sigusr1_takes_no_more_jobs(daemon: Daemon) -> None:
    daemon.start()
    daemon.dispatch(inline.nap.job(1.0, "running"))
    daemon.marks.wait("start")
    daemon.signal(signal.SIGUSR1)
    daemon.wait_log("quiet")
    (late,) = daemon.dispatch(inline.note.job("late"))
    daemon.marks.wait("end")
    assert daemon.status()["state"] == "quiet"
    assert late.state() is JobState.READY
    assert daemon.stop() == 0


def test_burst_does_not_wait_for_delayed_jobs(daemon: Daemon) -> None:
    first, later = daemon.dispatch(inline.note.job("now"), inline.note.options(delay=1000).job("later"))
    assert daemon.run("--burst") == 0
    assert first.result(0) == "now"
    assert later.state() is JobState.DELAYED


def test_max_jobs_takes_exactly_so_many(daemon: Daemon) -> None:
    handles = daemon.dispatch(*[inline.note.job(str(n)) for n in range(10)])
    assert daemon.run("--max-jobs", "4") == 0
    assert sorted(handle.state().value for handle in handles) == ["done"] * 4 + ["ready"] * 6


def test_max_time_ends_it(daemon: Daemon) -> None:
    assert daemon.run("--max-time", "300ms") == 0


def test_a_killed_supervisor_leaves_no_process_and_its_jobs_come_back(daemon: Daemon) -> None:
    daemon.start()
    linger, nap = daemon.dispatch(named("linger", 0.4), inline.nap.job(0.4))
    daemon.marks.wait("linger")
    daemon.marks.wait("start")
    family = tree(daemon.pid)
    assert len(family) >= 2, "the template and the job"
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    wait_gone(family)
    daemon.start()
    assert daemon.wait_log("ready again")
    assert nap.result(30) == ""
    assert linger.wait(30)
    assert daemon.stop() == 0


def test_a_job_that_kills_its_supervisor_is_dead_after_three_times_and_its_neighbours_are_done(daemon: Daemon) -> None:
    poison, *neighbours = daemon.dispatch(inline.poison.job(), *[inline.nap.job(0.3) for _ in range(20)])
    for _ in range(3):
        daemon.start()
        daemon.wait()
        assert poison.state() is JobState.LEASED
    daemon.start()
    assert [each.result(30) for each in neighbours] == [""] * 20
    assert poison.wait(30)
    row = daemon.client.store.show(poison.id)
    assert row is not None
    assert (row.state, row.counters.crashes, row.counters.recoveries) == ("dead", 3, 0)
    assert "died 3 times while this job's own code ran" in row.certificates[-1].decode()
    assert daemon.stop() == 0


def test_one_that_does_so_in_secret_is_found_among_its_neighbours(daemon: Daemon) -> None:
    """No slice page names it: those that are lost together are kept apart until it runs alone."""
    before = [inline.nap.job(0.6) for _ in range(30)]
    handles = daemon.dispatch(*before, inline.stealthy.job(), *before)
    poison = handles.pop(30)
    lives = 0
    while poison.state() is not JobState.DEAD:
        lives += 1
        assert lives < 12
        daemon.start()
        assert daemon.process is not None
        while daemon.process.poll() is None and poison.state() is not JobState.DEAD:
            time.sleep(0.02)
    assert [each.result(60) for each in handles] == [""] * 60
    row = daemon.client.store.show(poison.id)
    assert row is not None
    assert (row.counters.crashes, row.counters.recoveries) == (3, 4)
    assert daemon.stop() == 0


def test_a_second_daemon_of_one_identity_ends_with_3(daemon: Daemon) -> None:
    daemon.start()
    command = [sys.executable, "-m", "kqueue.cli.kqueued", "-c", str(daemon.config)]
    second = subprocess.run(command, capture_output=True, text=True, env=daemon.environment, check=False)
    assert second.returncode == 3
    assert f"pid {daemon.pid}" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert alive(daemon.pid)


def test_over_its_memory_limit_it_ends_to_be_started_again(tmp_path: Path, url: str) -> None:
    daemon = Daemon(tmp_path, url, more="").start()
    daemon.stop()
    text = daemon.config.read_text().replace("memory_check: 500ms", "memory_check: 100ms, memory_limit: 1")
    daemon.config.write_text(text)
    try:
        assert daemon.run() == 75
        assert "memory_limit" in "\n".join(daemon.log)
    finally:
        daemon.close()


def test_the_periodic_line_tells_memory_processed_and_running(daemon: Daemon) -> None:
    daemon.start()
    line = daemon.wait_log("heartbeat", 2)
    for word in ("memory", "processed", "running"):
        assert word in line


# -- not starting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line", "message"),
    [
        ({"modules": "[tests.apps.missing]"}, 4, "there is no module 'tests.apps.missing'"),
        ({"isolated_modules": "[tests.apps.missing]"}, 4, "there is no module 'tests.apps.missing'"),
        ({"modules": "[tests.apps.raises]"}, 4, "raised at import: ZeroDivisionError"),
        ({"isolated_modules": "[tests.apps.raises]"}, 4, "raised at import: ZeroDivisionError"),
        ({"more": "isolatde: {start: fork}"}, 10, "isolated"),
        ({"grace": "soon"}, 6, "soon"),
    ],
)
def test_a_wrong_configuration_is_named_by_line_and_starts_nothing(
    tmp_path: Path, settings: dict[str, str], line: int, message: str
) -> None:
    daemon = Daemon(tmp_path, f"sqlite:///{tmp_path}/queue.db", **settings)
    try:
        for option in ("--check", "--burst"):
            assert daemon.run(option) == 2
            assert daemon.log[0].startswith(f"{daemon.config}:{line}: "), daemon.log
            assert message in daemon.log[0]
            assert len(daemon.log) == 1
    finally:
        daemon.close()


def test_check_prints_what_would_run(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "kqueue.cli.kqueued", "-c", str(daemon.config), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, env=daemon.environment, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    for word in ("crunch", "isolated", "note", "inline", "default", "mail"):
        assert word in checked.stdout


def test_no_configuration_at_all(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kqueue.cli.kqueued"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert ended.returncode == 2
    assert "kqueue.yaml" in ended.stderr
    assert "kqueue init" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unwritable_database_ends_with_4(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    daemon = Daemon(tmp_path, f"sqlite:///{tmp_path}/file/queue.db")
    try:
        assert daemon.run("--log-level", "info") == 4
        assert len(daemon.log) == 1, daemon.log
        assert str(tmp_path / "file") in daemon.log[0]
    finally:
        daemon.close()


def test_a_redis_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    daemon = Daemon(tmp_path, server.url)
    try:
        daemon.start(wait=False)
        assert "refused" in daemon.wait_log("broker lost")
        server.start()
        daemon.wait_log("ready broker=")
        assert daemon.dispatch(inline.note.job("at last"))[0].result(20) == "at last"
        assert daemon.stop() == 0
    finally:
        daemon.close()
        server.stop()


def test_waiting_for_a_redis_ends_by_sigterm(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, RedisServer(tmp_path).url)
    try:
        daemon.start(wait=False)
        daemon.wait_log("broker lost")
        assert daemon.stop() == 0
    finally:
        daemon.close()


def test_a_wrong_password_ends_with_4_and_is_not_shown(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "right").start()
    daemon = Daemon(tmp_path, server.url_for(password="wrong"))
    try:
        assert daemon.run("--log-level", "info") == 4
        assert "password" in daemon.log[-1].lower() or "WRONGPASS" in daemon.log[-1]
        assert "wrong@" not in "\n".join(daemon.log)
        assert ":wrong" not in "\n".join(daemon.log)
    finally:
        daemon.close()
        server.stop()


def test_redis_killed_and_back_costs_no_job(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always").start()
    daemon = Daemon(tmp_path, server.url).start()
    try:
        handles = daemon.dispatch(*[inline.nap.job(1.0, str(n)) for n in range(50)], *[named("crunch", n) for n in range(5)])
        daemon.marks.wait("start", 50)
        server.kill()
        daemon.wait_log("broker lost")
        daemon.marks.wait("end", 50)
        server.start()
        daemon.wait_log("broker back")
        assert [handle.result(20) for handle in handles[:50]] == [str(n) for n in range(50)]
        assert all(handle.wait(20) for handle in handles[50:])
        assert len(daemon.marks.lines) == 105, "nothing ran twice"
        assert daemon.stop() == 0
    finally:
        daemon.close()
        server.stop()


def test_what_could_not_be_settled_at_the_exit_is_settled_at_the_next_start(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always").start()
    daemon = Daemon(tmp_path, server.url, grace="1s").start()
    try:
        handles = daemon.dispatch(*[inline.nap.job(1.0, str(n)) for n in range(20)])
        (long,) = daemon.dispatch(inline.nap.job(25.0, "long"))
        daemon.marks.wait("start", 21)
        server.kill()
        daemon.marks.wait("end", 20)
        assert daemon.stop() == 0
        assert "test.outbox" in daemon.wait_log("outcomes are kept")
        server.start()
        daemon.start()
        assert "settled=21" in daemon.wait_log("outcomes that an earlier run")
        assert [handle.result(20) for handle in handles] == [str(n) for n in range(20)]
        daemon.marks.wait("start", 22)
        row = daemon.client.store.show(long.id)
        assert row is not None
        assert (row.state, row.counters) == ("leased", Counters()), "it was released, at no cost, and runs again"
        assert len([line for line in daemon.marks.lines if line.startswith("start")]) == 22, "and nothing else did"
        assert long.cancel() is False
        assert daemon.stop() == 0
    finally:
        daemon.close()
        server.stop()


def test_a_daemon_that_was_frozen_longer_than_its_lease_lets_another_s_run_stand(tmp_path: Path, url: str) -> None:
    """SIGSTOP past the lease, then SIGCONT: what the other one has taken meanwhile is cancelled here, and not acked."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (Daemon(tmp_path / name, url, more="", lease="3s") for name in ("one", "two"))
    try:
        one.start()
        (handle,) = one.dispatch(inline.nap.job(20.0, "long"))
        one.marks.wait("start")
        two.start()
        one.signal(signal.SIGSTOP)
        two.marks.wait("start")
        one.signal(signal.SIGCONT)
        one.wait_log("lost its lease")
        row = one.client.store.show(handle.id)
        assert row is not None
        assert (row.state, row.counters) == ("leased", Counters(recoveries=1))
        assert one.marks.lines.count("end") == 0
        assert one.stop() == 0
        row = one.client.store.show(handle.id)
        assert row is not None
        assert row.state == "leased", "the other one's still"
    finally:
        one.close()  # by SIGKILL, which a stopped process hears as well
        two.close()
