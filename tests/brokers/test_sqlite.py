"""What the SQLite broker promises beyond the conformance suite: one transaction a turn, and a file that fails or will not do."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kqueue.brokers.base import MAX_BATCH, SETTLED, STALE, Counters, Owner, Retention, Settlement
from kqueue.brokers.commands import sqlite_file
from kqueue.brokers.sqlite import SQLiteBroker
from kqueue.client.sqlite import SQLiteClient
from kqueue.errors import BrokerRefused, BrokerUnavailable, JobCancelled, KQueueError, QueueFull
from kqueue.ids import new_id
from kqueue.kernel import Kernel, VirtualClock, join

from ..daemon import ROOT, Daemon
from .conftest import SQLiteRig, new_job, only

rig = only(SQLiteRig)


def together(rig: SQLiteRig, *verbs: Any) -> list[Any]:
    """Start all `verbs` in one turn of the loop; their values, or the errors they raised."""

    def main() -> Iterator[Any]:
        tasks = [rig.kernel.spawn(verb) for verb in verbs]
        values = []
        for task in tasks:
            try:
                values.append((yield join(task)))
            except KQueueError as error:
                values.append(error)
        return values

    values: list[Any] = rig.do(main())
    return values


def statements(broker: Any, prefix: str = "") -> list[str]:
    """A list that every statement of `broker` which begins with `prefix` joins from now on."""
    seen: list[str] = []
    broker._file._db.set_trace_callback(lambda sql: seen.append(sql) if sql.startswith(prefix) else None)
    return seen


def run_python(script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, **options)


def ids(rig: SQLiteRig, broker: Any) -> list[str]:
    return [lease.token.id for lease in rig.do(broker.reserve("q", {"inline": 100})).leases]


# -- one transaction a turn ---------------------------------------------------------------------------------------------


def test_what_one_turn_asks_for_is_one_transaction(rig: SQLiteRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job(f"a{n}") for n in range(10)]))
    leases = rig.do(broker.reserve("q", {"inline": 10})).leases
    commits = statements(broker, "COMMIT")
    acks = [broker.settle([Settlement(lease.token, "q", "ack")]) for lease in leases]
    *answers, fresh, reserved = together(rig, *acks, broker.enqueue([new_job("b")]), broker.reserve("q", {"inline": 5}))
    assert answers == [[SETTLED]] * 10
    assert fresh == [True]
    assert [lease.token.id for lease in reserved.leases] == ["b"], "commands run in the order they were asked for"
    assert len(commits) == 1


def test_a_command_that_raises_does_not_undo_its_neighbours(rig: SQLiteRig) -> None:
    broker = rig.broker()
    before, refused, after = together(
        rig, broker.enqueue([new_job("a")]), broker.enqueue([new_job("b")], max_depth=1), broker.enqueue([new_job("c")])
    )
    assert (before, after) == ([True], [True])
    assert isinstance(refused, QueueFull)
    assert ids(rig, broker) == ["a", "c"]


def test_a_reservation_that_is_cancelled_before_it_ran_is_withdrawn(rig: SQLiteRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a")]))

    def main() -> Iterator[Any]:
        task = rig.kernel.spawn(broker.reserve("q", {"inline": 1}))
        task.on_end = lambda ended: None
        yield
        rig.kernel.cancel(task, JobCancelled())
        yield from broker.stats()

    rig.do(main())
    assert rig.do(broker.stats())["q"]._asdict() == {"ready": 1, "delayed": 0, "leased": 0, "dead": 0}


def test_a_reservation_that_is_cancelled_after_it_ran_is_given_back(rig: SQLiteRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a")]))

    def main() -> Iterator[Any]:
        task = rig.kernel.spawn(broker.reserve("q", {"inline": 1}))
        commits = statements(broker, "COMMIT")
        while not commits:
            yield  # until the answer is on its way to the task, which has not had its turn yet
        assert not task.ended
        rig.kernel.cancel(task, JobCancelled())
        while not task.ended:
            yield
        return (yield from broker.reserve("q", {"inline": 1}))

    (lease,) = rig.do(main()).leases
    assert (lease.token.id, lease.counters) == ("a", Counters()), "and it costs the job nothing"


def test_a_settlement_runs_even_when_its_task_is_cancelled(rig: SQLiteRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = rig.do(broker.reserve("q", {"inline": 1})).leases

    def main() -> Iterator[Any]:
        task = rig.kernel.spawn(broker.settle([Settlement(lease.token, "q", "ack")]))
        yield
        rig.kernel.cancel(task, JobCancelled())
        return (yield from broker.stats())

    assert sum(rig.do(main()).get("q", ())) == 0


# -- a file that fails --------------------------------------------------------------------------------------------------

HOLD_THE_LOCK = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
db.execute("COMMIT")
print("free", flush=True)
"""


def test_a_lock_of_another_process_is_waited_out_by_the_loop(rig: SQLiteRig) -> None:
    broker = rig.broker()
    with run_python(HOLD_THE_LOCK, rig.path, stdin=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"

        def main() -> Iterator[Any]:
            one = rig.kernel.spawn(broker.enqueue([new_job("a")], max_depth=1))
            turns = rig.kernel.turns
            while rig.kernel.turns < turns + 50:
                yield  # the loop goes on
            two = rig.kernel.spawn(broker.enqueue([new_job("b")], max_depth=1))
            yield
            assert not one.ended
            holder.stdin.write("\n")
            holder.stdin.flush()
            yield join(one)
            two.on_end = lambda ended: None
            while not two.ended:
                yield
            return two.error

        assert isinstance(rig.do(main()), QueueFull), "the first one came first"
    assert ids(rig, broker) == ["a"]


def test_a_long_lock_is_told_once_and_so_is_its_end(rig: SQLiteRig) -> None:
    rig.kernel = Kernel(clock=VirtualClock())
    broker, told = rig.broker(), []
    with closing(sqlite3.connect(rig.path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")

        def tell(kind: str, text: str, retry_in_s: float) -> None:
            told.append((kind, text, retry_in_s))
            if kind == "lost":
                holder.execute("COMMIT")

        broker._on_event = tell
        assert rig.do(broker.enqueue([new_job("a")])) == [True]
    (lost, text, pause_s), back = told
    assert (lost, back) == ("lost", ("back", "", 0.0))
    assert "database is locked" in text
    assert pause_s > 0


def test_closing_does_not_wait_for_a_file_that_stays_locked(rig: SQLiteRig) -> None:
    rig.kernel = Kernel(clock=VirtualClock())
    broker = rig.broker()
    with closing(sqlite3.connect(rig.path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")

        def main() -> Iterator[Any]:
            waiting = rig.kernel.spawn(broker.wait(None))
            asking = rig.kernel.spawn(broker.enqueue([new_job("a")]))
            yield
            yield from broker.close()
            assert (yield join(waiting)) is False
            yield join(asking)

        with pytest.raises(BrokerUnavailable, match=r"kqueue\.db was closed before it could answer"):
            rig.do(main())
    rig.opened.remove(broker)
    assert rig.sql("SELECT count(*) FROM kq_job") == [(0,)]


def test_a_full_disk_delays_and_loses_nothing(rig: SQLiteRig) -> None:
    rig.kernel = Kernel(clock=VirtualClock())
    broker, told = rig.broker(), []
    rig.do(broker.enqueue([new_job("a")]))
    (lease,) = rig.do(broker.reserve("q", {"inline": 1})).leases
    db = broker._file._db
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")

    def tell(kind: str, text: str, retry_in_s: float) -> None:
        told.append(kind)
        if told.count("lost") == 3:
            db.execute("PRAGMA max_page_count = 1000000")

    broker._on_event = tell
    big = new_job("big", envelope=b"x" * 100_000)
    assert together(rig, broker.settle([Settlement(lease.token, "q", "ack")]), broker.enqueue([big])) == [[SETTLED], [True]]
    assert told == ["lost", "lost", "lost", "back"]
    assert ids(rig, broker) == ["big"]


def test_a_client_says_what_is_wrong_with_the_file(rig: SQLiteRig) -> None:
    client = SQLiteClient(rig.path, patience_s=0)
    client.enqueue([new_job("a")])
    db = client._file._db
    assert db is not None
    db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(BrokerUnavailable, match=r"disk is full; nothing was changed: free space on its disk, then try again"):
        client.enqueue([new_job("big", envelope=b"x" * 100_000)])
    with closing(sqlite3.connect(rig.path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(BrokerUnavailable, match=r"database is locked for 0 s; end the process that holds it \(fuser "):
            client.enqueue([new_job("b")])
        assert [row.id for row in client.list(None, None, 10)] == ["a"], "readers do not wait for writers"
    client.close()


def test_a_file_that_is_replaced_is_noticed_by_everyone(rig: SQLiteRig) -> None:
    broker, client, told = rig.broker(), rig.make_client(), []
    broker._on_event = lambda *news: told.append(news)
    client.enqueue([new_job("a"), new_job("c")])
    old = rig.do(broker.reserve("q", {"inline": 1})).leases
    for name in ("", "-wal", "-shm"):
        os.unlink(rig.path + name)
    client.enqueue([new_job("b")])
    ends = [Settlement(lease.token, "q", verb) for lease in old for verb in ("hold", "release", "bury", "ack")]
    assert rig.do(broker.settle(ends)) == [STALE] * 4, "nobody there knows of that job"
    ((kind, text, _),) = told
    assert kind == "warning"
    assert text.startswith(f"{broker.address} is another file than before")
    assert ids(rig, broker) == ["b"]
    assert rig.sql("SELECT count(*) FROM kq_epoch") == [(1,)], "no lease is without an owner"
    assert rig.do(broker.renew()) is False, "and the runtime is told that something happened to its leases"
    assert len(told) == 1


# -- files that will not do ---------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any], user: int | None = None) -> str:
    """What `work` returns in a forked child of this process, as root or as another `user`; it may not raise."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            os.write(write_fd, str(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write_fd)
    with open(read_fd) as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, said
    return said


def refusal(path: Any, user: int | None = None) -> str:
    """What the daemon and the client say when they are to use `path`, as root or as another `user`."""

    def said(attempt: Callable[[], Any]) -> str:
        with pytest.raises(BrokerRefused) as caught:
            attempt()
        assert caught.value.exit_code == 4
        return str(caught.value)

    def both() -> str:
        kernel, broker = Kernel(), SQLiteBroker(str(path))
        by_daemon = said(lambda: kernel.run(broker.open(Owner(new_id(), ""), ["q"], 15)))
        assert said(lambda: SQLiteClient(str(path)).enqueue([])) == by_daemon
        return by_daemon

    line = in_child(both, user)
    assert str(path) in line
    assert "\n" not in line
    return line


def test_a_directory_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    assert "it is a directory; name a file in it" in refusal(tmp_path)
    (tmp_path / "text").write_text("all work and no play makes a dull database\n" * 100)
    assert "file is not a database; move it away" in refusal(tmp_path / "text")
    assert "Not a directory; make " in refusal(tmp_path / "text" / "kqueue.db")
    assert (tmp_path / "text").read_text().startswith("all work")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_what_may_not_be_written_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, nobody = Path(name), 65534
        folder.chmod(0o755)
        assert f"Permission denied; make {folder} a directory that this user may write" in refusal(folder / "new.db", nobody)
        assert "Permission denied" in refusal(folder / "deeper" / "new.db", nobody)
        with closing(SQLiteClient(str(folder / "old.db"), mode=0o644)) as client:
            client.enqueue([new_job("a")])
            assert "this user may not read and write it" in refusal(folder / "old.db", nobody), "not even beside one who may"
        assert "this user may not read and write it" in refusal(folder / "old.db", nobody)
        os.chown(folder / "old.db", nobody, nobody)
        assert "change the mode or owner of" in refusal(folder / "old.db", nobody)
        for name in ("old.db-wal", "old.db-shm"):
            (folder / name).unlink(missing_ok=True)
        assert "may not write its directory, where the write-ahead log stands" in refusal(folder / "old.db", nobody)


def test_a_newer_schema_and_a_foreign_table_are_refused(rig: SQLiteRig) -> None:
    rig.make_client().enqueue([new_job("a")])
    rig.sql("UPDATE kq_meta SET value = 99")
    assert "was written by a later KQueue (schema 99, this one knows 2): upgrade kqueue here" in refusal(rig.path)
    rig.sql("DELETE FROM kq_meta")
    assert "has a table kq_meta that is not KQueue's" in refusal(rig.path)


def test_an_old_library_is_refused(rig: SQLiteRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file.sqlite3, "sqlite_version_info", (3, 30, 1))
    with pytest.raises(BrokerRefused, match=r"is too old, KQueue needs 3\.31\.0"):
        rig.make_client().enqueue([])


def test_a_sweep_ends_after_a_third_of_a_lease_and_the_next_one_goes_on(rig: SQLiteRig) -> None:
    """Each transaction takes a second. Nine batches are to be dropped; meanwhile the daemon's other verbs have their turn."""
    clock = VirtualClock()
    rig.kernel = Kernel(clock=clock)
    broker = rig.broker(lease_s=15.0, retention=Retention(max_count=10))
    rig.sql(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
        "INSERT INTO kq_job (id, queue, state, died_at) SELECT 'd' || i, 'q', 'dead', ? + i FROM n",
        9 * MAX_BATCH + 10,
        rig.now - 1e6,
    )
    rig.sql("INSERT INTO kq_count VALUES ('q', 'dead', ?)", 9 * MAX_BATCH + 10)
    write = broker._file.write

    def slow_write(work: Any, **how: Any) -> Any:
        clock.now += 1
        rig.elapse(1)
        return write(work, **how)

    broker._file.write = slow_write
    first, alive = together(rig, broker.sweep(), broker.renew())
    assert clock.now <= 7, "five seconds, and what was begun in the last one"
    assert 0 < first.forgotten["q"] < 9 * MAX_BATCH
    assert alive is True
    second = rig.do(broker.sweep())
    assert first.forgotten["q"] + second.forgotten["q"] == 9 * MAX_BATCH
    assert rig.sql("SELECT count(*) FROM kq_job") == [(10,)]


SILENT_DISPATCHER = """
import os, resource, signal, socket, sys
from kqueue.brokers.sqlite import SQLiteBroker
from kqueue.client import sqlite as client_module
from kqueue.client.sqlite import SQLiteClient
from kqueue.dispatch import prepare
from kqueue.kernel import Kernel
from tests.apps import inline

path, how = sys.argv[1:]
die = lambda *arguments, **more: os.kill(os.getpid(), signal.SIGKILL)
job = inline.note.job("silent")
prepared = prepare(job, job.registration, arguments_too=False)
client = SQLiteClient(path)
client.stats()
if how == "a dispatcher killed":  # between its commit and the ring
    client_module.ring = die
elif how == "a daemon killed":
    broker = SQLiteBroker(path)  # not opened, which would ring
    broker._ring = die
    Kernel().run(broker.enqueue([prepared]))
elif how == "no right":
    class Refused(socket.socket):
        def sendto(self, *arguments):
            raise PermissionError
    socket.socket = Refused
elif how == "no descriptor":
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
client.enqueue([prepared])
print("dispatched")
"""


@pytest.mark.parametrize("how", ["a dispatcher killed", "a daemon killed", "no right", "no descriptor"])
def test_an_idle_daemon_runs_what_nobody_rang_for(tmp_path: Path, how: str) -> None:
    path = tmp_path / "kqueue.db"
    daemon = Daemon(tmp_path, f"sqlite:///{path}", lease="3s")
    try:
        daemon.start()
        child = run_python(SILENT_DISPATCHER, str(path), how, cwd=ROOT)
        output, _ = child.communicate(timeout=60)
        assert (child.returncode, output) == ((-9, "") if "killed" in how else (0, "dispatched\n"))
        daemon.marks.wait("note")
        assert daemon.stop() == 0
    finally:
        daemon.close()


def test_looking_does_not_create_a_database(rig: SQLiteRig) -> None:
    client = rig.make_client()
    for look in (client.stats, lambda: client.show("a"), lambda: client.list(None, None, 1), lambda: client.cancel("a", b"")):
        with pytest.raises(BrokerUnavailable, match=f"no database at {rig.path}: start kqueued, or dispatch a job first"):
            look()
    assert client.documents("manifest:") == {}, "a client asks for them before the first dispatch"
    assert not os.path.exists(rig.path)


def test_new_files_are_for_their_owner_unless_told_otherwise(tmp_path: Path) -> None:
    def modes(path: Path) -> list[int]:
        kernel, broker = Kernel(), SQLiteBroker(str(path), mode=0o660 if path.parent.name == "group" else 0o600)
        kernel.run(broker.open(Owner(new_id(), ""), ["q"], 15))
        found = [os.stat(p).st_mode & 0o777 for p in (path.parent, path, f"{path}-wal", f"{path}.bells")]
        kernel.run(broker.close())
        kernel.close()
        return found

    assert modes(tmp_path / "own" / "kqueue.db") == [0o700, 0o600, 0o600, 0o700]
    umask = os.umask(0o022)
    assert modes(tmp_path / "group" / "kqueue.db") == [0o770, 0o660, 0o660, 0o770]
    os.umask(umask)


def test_an_application_s_own_database_can_hold_the_queue(rig: SQLiteRig) -> None:
    with closing(sqlite3.connect(rig.path)) as db:
        db.executescript("CREATE TABLE job (id); INSERT INTO job VALUES (1); PRAGMA user_version = 42")
    broker = rig.broker()
    rig.do(broker.enqueue([new_job("a")]))
    assert ids(rig, broker) == ["a"]
    assert rig.sql("SELECT * FROM job") == [(1,)]
    assert rig.sql("PRAGMA user_version") == [(42,)]


@pytest.mark.parametrize("delay_s", [0.0, 3600.0])
def test_a_job_for_which_no_bell_was_rung_is_found_by_the_next_sweep(
    rig: SQLiteRig, monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.do(broker.sweep())
    assert rig.do(broker.wait(0)) is False, "nothing waits"
    monkeypatch.setattr("kqueue.client.sqlite.ring", lambda *_, **__: None)
    client.enqueue([new_job("a", delay_s=delay_s)])
    assert rig.do(broker.wait(0)) is False
    rig.do(broker.sweep())
    assert rig.do(broker.wait(0)) is True
