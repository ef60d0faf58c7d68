"""Ending a job ends all of it. Real daemons, real SIGKILL, and processes that do all they can to survive; /proc says who has."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kqueue import BoundJob, JobHandle
from kqueue.execution import cgroup, killing
from kqueue.options import DispatchOptions
from tests.apps.escapees import FILES, KINDS, holders
from tests.daemon import PATIENCE_S, Daemon, alive, tree, wait_gone

ALL = list(KINDS)


def wait_until(done: Callable[[], bool], what: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.01)


class House:
    """A daemon whose template has the escapees, and the files by which they are seen."""

    def __init__(self, directory: Path, isolated: str = "", **settings: Any) -> None:
        self.directory = directory
        self.files = directory / "files"
        self.files.mkdir()
        self.found_by_anybody = list(ALL)  # also when its template is dead, so that nobody knows the tree any more
        os.environ[FILES] = str(self.files)
        self.daemon = Daemon(
            directory, f"sqlite:///{directory}/queue.db", modules="[]", isolated_modules="[tests.apps.escapees]",
            **settings,
        )  # fmt: skip
        text = self.daemon.config.read_text()
        self.daemon.config.write_text(text.replace("kill_grace: 500ms", f"kill_grace: 500ms, max_concurrent: 20{isolated}"))

    def dispatch(self, name: str, *args: Any, **options: Any) -> JobHandle:
        return self.daemon.dispatch(BoundJob(name, args, {}, DispatchOptions(overrides=options)))[0]

    def leave(self, then: str, kinds: list[str] = ALL, **options: Any) -> dict[str, JobHandle]:
        """A job for each kind of escapee, all of them in place."""
        handles = {kind: self.dispatch("leaves", kind, then, **options) for kind in kinds}
        for kind in kinds:
            self.wait_line(kind, "ready")
        return handles

    def wait_line(self, name: str, word: str) -> None:
        path = self.files / name
        wait_until(lambda: path.exists() and f"\n{word} " in "\n" + path.read_text(), f"{name} never said {word!r}")

    def wait_nobody(self, kinds: list[str] = ALL) -> None:
        """Until no process is left that has one of the files of `kinds` open."""
        wait_until(lambda: not any(map(self.is_held, kinds)), lambda: f"of {list(filter(self.is_held, kinds))}: {self.alive()}")

    def is_held(self, kind: str) -> bool:
        """Whether anybody is left, as their lock says: in /proc somebody may be nobody just then."""
        path = self.files / kind
        if not path.exists():
            return False
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def alive(self) -> dict[int, str]:
        return {pid: Path(path).name for pid, path in holders(str(self.files)).items()}

    def template(self) -> int:
        """The pid of the template, which is the daemon's only child."""
        children = [int(pid) for pid in Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children").read_text().split()]
        (pid,) = (pid for pid in children if alive(pid))
        return pid

    def certificate(self, handle: JobHandle) -> dict[str, Any]:
        """Of its first run."""
        from kqueue.codec import from_json

        row = self.daemon.client.store.show(handle.id)
        assert row is not None
        certificate: dict[str, Any] = from_json(row.certificates[0])
        return certificate


@pytest.fixture(params=["cgroups", "marks"])
def house(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """With a cgroup for each job, and without any."""
    if request.param == "cgroups" and cgroup.home() is None:
        pytest.skip("no cgroup v2 that may be divided here")  # nowhere a failure: containers rarely have one
    monkeypatch.setenv(FILES, "")  # undone at the end
    house = House(tmp_path, isolated="" if request.param == "cgroups" else ", cgroups: false")
    if request.param == "marks":
        house.found_by_anybody.remove("unmarked")
    yield house
    house.daemon.close()
    for pid in holders(str(house.files)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # of a test that failed, or about to end


# -- the end of a job ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "cause", "options"),
    [
        ("ends", "ok", {}),
        ("raises", "exception", {}),
        ("dies", "signal", {}),
        ("stays", "timeout", {"timeout": 6}),
    ],
)
def test_nothing_that_a_job_started_outlives_it_and_nobody_else_is_harmed(
    house: House, then: str, cause: str, options: dict[str, Any]
) -> None:
    house.daemon.start()
    neighbour = house.dispatch("has_a_daemon", "neighbour")
    house.wait_line("neighbour", "own")
    handles = house.leave(then, **options)
    house.wait_nobody()
    assert "neighbour" in house.alive().values(), "a daemon of a job that runs"
    with (house.files / "neighbour").open("a") as file:
        file.write("go 0\n")
    assert neighbour.result(PATIENCE_S) is True
    house.wait_nobody(["neighbour"])
    assert {handle.wait(PATIENCE_S) for handle in handles.values()} == {True}
    if cause == "ok":
        assert {handle.result(0) for handle in handles.values()} == {then}
    else:
        assert [house.certificate(handle)["cause"] for handle in handles.values()] == [cause] * len(ALL)
    assert house.daemon.stop() == 0
    assert house.alive() == {}


def test_a_job_that_stops_its_template_is_killed_and_told_all_the_same(house: House) -> None:
    house.daemon.start()
    (handle,) = house.leave("stops its template", ["daemon"], timeout=2).values()
    good = house.dispatch("looks")
    assert handle.wait(PATIENCE_S)
    assert house.certificate(handle)["cause"] == "timeout"
    assert house.daemon.wait_log("was stopped by a signal, and goes on")
    house.wait_nobody()
    assert isinstance(good.result(PATIENCE_S), list), "its neighbour is done, whatever it saw"
    assert house.daemon.stop() == 0


# -- the end of those who would end it ----------------------------------------------------------------------------------------


def test_nothing_outlives_a_supervisor_that_is_killed(house: House) -> None:
    house.daemon.start()
    house.leave("stays")
    below = tree(house.daemon.pid)
    house.daemon.signal(signal.SIGKILL)
    house.daemon.wait()
    house.wait_nobody()
    wait_gone(below)


def test_nothing_outlives_a_supervisor_whose_template_was_stopped(house: House) -> None:
    house.daemon.start()
    house.leave("stays")
    template = house.template()
    os.kill(template, signal.SIGSTOP)
    house.daemon.signal(signal.SIGKILL)
    house.daemon.wait()
    house.wait_nobody()
    wait_gone([template])


def test_when_supervisor_and_template_are_killed_the_next_start_ends_the_rest_before_its_first_job(house: House) -> None:
    house.daemon.start()
    house.leave("stays", house.found_by_anybody)
    template = house.template()
    house.daemon.signal(signal.SIGSTOP)  # so that it cannot tell the template anything
    after = house.dispatch("looks", priority=100)
    for pid in (template, house.daemon.pid):
        os.kill(pid, signal.SIGKILL)
    house.daemon.wait()
    wait_gone([template])
    assert "daemon" in house.alive().values(), "or this proves nothing"
    house.daemon.start()
    assert after.result(PATIENCE_S) == [], "what the first job saw"
    assert "processes that jobs of an earlier run of this daemon had left behind" in house.daemon.wait_log("msg=\"killed ")
    house.wait_nobody()
    assert house.daemon.stop() == 0


def test_what_jobs_of_a_template_left_that_was_killed_is_ended_before_they_run_again(house: House) -> None:
    house.daemon.start()
    handles = house.leave("stays", house.found_by_anybody)
    os.kill(house.template(), signal.SIGKILL)
    assert {handle.result(PATIENCE_S) for handle in handles.values()} == {"had run before"}
    house.wait_nobody()
    assert "processes that jobs of a template that died had left behind" in house.daemon.wait_log("msg=\"killed ")
    assert house.daemon.stop() == 0


def test_a_daemon_ends_no_process_of_another(house: House, tmp_path: Path) -> None:
    house.daemon.start()
    house.leave("stays", ["daemon", "disguised", "family"])
    before = house.alive()
    (tmp_path / "other").mkdir()
    other = House(tmp_path / "other")
    try:
        other.daemon.start()
        other.leave("stays", ["daemon"])
        os.kill(other.template(), signal.SIGKILL)
        other.daemon.wait_log("template died")
        other.daemon.signal(signal.SIGKILL)
        other.daemon.wait()
        other.daemon.start()
        other.wait_nobody()
        assert other.daemon.stop() == 0
    finally:
        other.daemon.close()
    assert house.alive() == before


# -- what the imports left ----------------------------------------------------------------------------------------------------


def test_threads_and_files_that_an_import_left_are_named(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("KQUEUE_TEST_LEFT_AT_IMPORT", str(port))
        house.daemon.start()
    log = "\n".join(house.daemon.log)
    assert "thread 'poller'" in log
    assert f" to 127.0.0.1:{port}, non-blocking)" in log
    assert "(INET STREAM socket at 127.0.0.1:" in log
    assert "escapees.py)" in log
    assert log.count("open at import") == 2, "and nothing else"
    assert house.daemon.stop() == 0


# -- the parts ----------------------------------------------------------------------------------------------------------------


def test_a_mark_is_inherited_by_whatever_is_forked_or_executed() -> None:
    owner = killing.owner_of("some:daemon")
    pid = os.fork()
    if pid == 0:
        killing.put_mark(owner, 5)
        os.execve("/bin/sh", ["sh", "-c", "sleep 1000 & wait"], {})
    try:
        wait_until(lambda: killing.children_of(pid) != [], "the shell starts nothing")
        (child,) = killing.children_of(pid)
        wait_until(lambda: (process := killing.look(child)) is not None and process.name == "sleep", "no sleep")
        assert [killing.mark_of(each) for each in (pid, child)] == [killing.Mark(owner, 5)] * 2
        assert killing.mark_of(os.getpid()) is None
    finally:
        killed = killing.kill_trees([pid])
        os.waitpid(pid, 0)
    assert killed == killing.Killed(2, [])


@pytest.mark.parametrize("serial", [0, 1, killing.TEMPLATE_SERIAL - 1, killing.TEMPLATE_SERIAL + 1, 10**9])
def test_no_job_has_the_mark_of_a_template(serial: int) -> None:
    assert killing.mark_serial(serial) < killing.TEMPLATE_SERIAL


def test_daemons_differ_in_their_owner_and_those_without_an_identity_always_do() -> None:
    identities = [f"boot:1:{inode}:{name}" for inode in range(500) for name in ("main", "test")]
    assert len({killing.owner_of(identity) for identity in identities}) == len(identities)
    assert killing.owner_of("a") == killing.owner_of("a")
    assert killing.owner_of("") != killing.owner_of("")


def test_who_is_no_child_of_ours_is_not_killed() -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child, child.stdout:
        grandchild = int(child.stdout.readline())
        assert killing.kill_trees([grandchild, os.getppid(), 1]) == killing.Killed(0, [])
        assert alive(grandchild)
        assert killing.kill_trees([child.pid]).alive == 2


def test_a_process_of_another_user_is_reported_and_not_waited_for() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can have a child that it may not signal later")
    program = """
import os
from kqueue.execution import killing
read_fd, write_fd = os.pipe()
pid = os.fork()
if pid == 0:
    os.read(read_fd, 3)
    os._exit(0)
os.setresuid(65534, 65534, 65534)
left = killing.Leftovers(1, False)
left._ours.clear()
print([process.pid == pid for process in left.end({})], left.end({}), left.pause_s)
os.write(write_fd, b"end")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "[True] [] None\n"


MANY_CHILDREN = """
import os, threading
from kqueue.execution import killing
own = killing.OwnChildren()
read_fd, write_fd = os.pipe()
forked = set()
def fork():
    pid = os.fork()
    if pid == 0:
        os.close(write_fd)
        os.read(read_fd, 1)
        os._exit(0)
    forked.add(pid)
def differ():
    return len(forked ^ set(killing.children_of(os.getpid()))), len(forked ^ set(own.pids()))
print(*differ())
for _ in range(3):
    fork()
print(*differ())
thread = threading.Thread(target=lambda: (fork(), done.set(), end.wait()))
done, end = threading.Event(), threading.Event()
thread.start()
done.wait()
print(*differ())
end.set()
thread.join()
for _ in range(750):
    fork()
print(*differ())
os.close(write_fd)
"""


def test_all_children_are_found_however_many_there_are() -> None:
    """None; a few; one of another thread; and more than the kernel lists in one page."""
    done = subprocess.run([sys.executable, "-c", MANY_CHILDREN], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "0 0\n" * 4
