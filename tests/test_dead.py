"""Dead letters, as an operator meets them: listed with the reason, retried and forgotten in bulk, and interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kqueue import job
from kqueue.brokers.base import QueueStats, lost, numbered
from kqueue.cli.certificate import Death, death, reason, told
from kqueue.codec import from_json
from kqueue.job import BoundJob
from kqueue.options import DispatchOptions
from kqueue.outcome import Outcome
from tests.cli_home import COMMAND, PATIENCE_S, Home, bury
from tests.daemon import Daemon
from tests.servers import RedisServer


@job(name="dead_fails", max_attempts=1)
def fails(word: str) -> Any:
    yield
    raise ValueError(f"no such \x1b[31m{word}\nand more")


def counts(home: Home, queue: str = "default") -> QueueStats:
    return home.client.store.stats().get(queue, QueueStats())


# -- looking ----------------------------------------------------------------------------------------------------------------


def test_the_dead_are_listed_with_when_and_of_what_they_died(home: Home) -> None:
    home.client.dispatch([fails.job("luck")])
    home.run_all()
    (waits,) = home.client.dispatch([fails.options(delay=100).job("time")])
    assert waits.cancel()
    page = home.kqueue("jobs", "--state", "dead").out
    head, first, second = page.splitlines()
    assert head.split() == ["ID", "JOB", "QUEUE", "ATTEMPTS", "DIED", "CAUSE", "ERROR"]
    assert first.split()[0] == waits.id, "the last death first"
    assert first.split()[-3:] == ["ago", "cancelled", "-"]
    assert second.split(" ago ")[1].split() == ["exception", "ValueError:", "no", "such", "\\x1b[31mluck"]
    assert "and more" not in second
    cancelled, failed = home.kqueue("jobs", "--state", "dead", "--json").json
    assert (cancelled["cause"], cancelled["error"]) == ("cancelled", None)
    assert (failed["cause"], failed["error"]) == ("exception", "ValueError: no such \x1b[31mluck\nand more")
    assert abs(failed["died_at"] - time.time()) < 600
    assert "died_at" not in home.kqueue("dispatch", "greet").out
    assert "no attempt  cancelled, ended by operator" in home.kqueue("show", waits.id).out


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (Outcome("signal", "kernel", signal="SIGKILL"), "SIGKILL"),
        (Outcome("exit", exit_code=3), "status 3"),
        (Outcome("timeout", "supervisor"), None),
        (Outcome("exception", error={"class": "E", "message": "x" * 1000}), f"E: {'x' * 156}…"),
    ],
)
def test_a_line_says_what_a_job_died_of(outcome: Outcome, line: str | None, home: Home) -> None:
    row = home.client.store.show(home.bury(1)[0])
    assert row is not None
    found = death(row._replace(certificates=(json.dumps(outcome.certificate(attempt=1, strategy="", ended_at=5)).encode(),)))
    assert (found.died_at, found.cause, reason(found)) == (5, outcome.cause, line)
    for odd in (b"", b"[]", b"{}", b'{"ended_at":1e300,"cause":"x","error":null,"exit_code":null,"signal":null}'):
        assert death(row._replace(certificates=(odd,))) == Death()


def test_a_lost_supervisor_is_told_without_inventing_what_nobody_measured() -> None:
    page = told(from_json(numbered(lost(1e9, culprit=False), 3)))
    assert "attempt 3  lost, ended by supervisor" in page
    assert "SupervisorLost: the supervisor died or was cut off while the job ran or was about to" in page
    assert "used" not in page


# -- retry and forget -------------------------------------------------------------------------------------------------------


def test_ids_are_retried_and_forgotten(home: Home) -> None:
    first, second, third = home.bury(3)
    assert home.kqueue("retry", second, third).out == "2 retried\n"
    assert home.kqueue("forget", first).out == "1 forgotten\n"
    assert counts(home) == QueueStats(ready=2)
    shown = home.kqueue("show", second, "--json").json
    assert (shown["state"], shown["attempts"], len(shown["certificates"])) == ("ready", 0, 1)
    assert home.kqueue("show", first).code == 2


def test_what_is_no_dead_letter_is_named_and_the_others_are_done(home: Home) -> None:
    (dead,) = home.bury(1)
    waits = home.dispatch("greet")
    ended = home.kqueue("retry", waits, dead, "nobody\x1b", dead)
    assert (ended.code, ended.out) == (2, "1 retried\n")
    assert ended.err == f"kqueue: 2 of 3 are no dead letters: {waits} is ready; nobody\\x1b is not there\n"
    ended = home.kqueue("forget", *map(str, range(30)), "--json")
    assert ended.code == 2
    assert json.loads(ended.out) == {"forgotten": 0, "missing": [*map(str, range(30))]}
    assert ended.err.endswith("; 9 is not there; and 20 more\n")


def test_an_id_may_be_anything_that_can_be_typed(home: Home) -> None:
    (dead,) = home.bury(1)
    ended = home.kqueue("retry", "", "\udcff", "x" * 100_000, dead, "--json")
    assert ended.code == 2
    assert json.loads(ended.out)["retried"] == 1
    assert "3 of 4 are no dead letters: '' is not there; \\udcff is not there; " in ended.err
    assert home.kqueue("show", "\udcff").code == 2


def test_what_stands_in_no_queue_is_met_too(sqlite_home: Home) -> None:
    """Somebody with a shell took its queue from a dead letter; a daemon's sweep counts it, and whoever forgets all forgets it."""
    for queue in (None, b"\xff", 7):
        id = sqlite_home.bury(1)[0]
        with contextlib.closing(sqlite3.connect(sqlite_home.url.removeprefix("sqlite:///"), isolation_level=None)) as db:
            db.execute("UPDATE kq_job SET queue = ? WHERE id = ?", (queue, id))
    assert sqlite_home.kqueue("jobs", "--state", "dead").code == 0
    sqlite_home.run_all()
    assert sqlite_home.kqueue("forget", "--all", "--yes").out == "3 forgotten\n"
    assert sqlite_home.kqueue("jobs", "--json").json == []


def test_a_queue_can_be_named(home: Home) -> None:
    mail, other = home.bury(2, "mail"), home.bury(3)
    assert home.kqueue("retry", "--all", "--queue", "mail", "--json").json == {"retried": 2, "missing": []}
    assert home.kqueue("forget", "--all", "--queue", "nowhere", "--yes").out == "0 forgotten\n"
    assert home.kqueue("retry", *other, "--queue", "default").out == "3 retried\n"
    assert (counts(home).ready, counts(home, "mail").ready) == (3, len(mail))


def test_ten_thousand_are_retried_and_forgotten_at_once(home: Home) -> None:
    home.bury(9_300)
    home.bury(700, "mail")
    assert home.kqueue("retry", "--all", "--queue", "default").out == "9300 retried\n"
    assert counts(home) == QueueStats(ready=9_300)
    assert home.kqueue("retry", "--all", "--json").json == {"retried": 700, "missing": []}
    home.bury(1_000)
    assert home.kqueue("forget", "--all", "--yes").out == "1000 forgotten\n"
    assert counts(home) == QueueStats(ready=9_300 - 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["retry"], "give the ids of dead letters, or --all"),
        (["forget"], "give the ids of dead letters, or --all"),
        (["retry", "--all", "x"], "give the ids of dead letters, or --all"),
        (["forget", "--all"], "would delete 1 dead letters of default in "),
        (["retry", "--all", "--yes"], "No such option"),
    ],
)
def test_what_is_not_meant_is_refused_and_changes_nothing(home: Home, arguments: Sequence[str], words: str) -> None:
    home.bury(1)
    ended = home.kqueue(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err
    assert ended.err.count("\n") == 1
    assert counts(home) == QueueStats(dead=1)


def test_where_nobody_dispatched_yet_nothing_is_dead_and_nothing_is_created(sqlite_home: Home) -> None:
    assert sqlite_home.kqueue("retry", "--all").out == "0 retried\n"
    assert sqlite_home.kqueue("forget", "--all").out == "0 forgotten\n", "there is nothing to ask about"
    ended = sqlite_home.kqueue("retry", "x", "--json")
    assert (ended.code, json.loads(ended.out)) == (2, {"retried": 0, "missing": ["x"]})
    assert list(sqlite_home.directory.iterdir()) == [sqlite_home.directory / "kqueue.yaml"]


@pytest.mark.parametrize(("answer", "code", "left"), [(b"y\n", 0, 0), (b"n\n", 1, 1200), (b"\n", 1, 1200), (b"\x04", 130, 1200)])
def test_forgetting_all_is_asked_about_on_a_terminal(home: Home, answer: bytes, code: int, left: int) -> None:
    home.bury(1200)
    ours, its = pty.openpty()
    started = subprocess.Popen([*COMMAND, "forget", "--all"], stdin=its, stderr=its, stdout=subprocess.PIPE)
    os.close(its)
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(ours, 65536)
    os.write(ours, answer)
    out, _ = started.communicate(timeout=PATIENCE_S)
    shown += _rest(ours)
    assert b"delete 1200 dead letters of default in " in shown
    assert (started.returncode, out) == (code, b"1200 forgotten\n" if code == 0 else b"")
    assert (b"forgetting" in shown and b"100%" in shown) == (code == 0), "a bar"
    assert counts(home).dead == left


def _rest(fd: int) -> bytes:
    data = b""
    try:
        while more := os.read(fd, 65536):
            data += more
    except OSError:  # EIO: the other end of a terminal is closed
        pass
    os.close(fd)
    return data


# -- interrupted ------------------------------------------------------------------------------------------------------------


def interrupt(patch: pytest.MonkeyPatch, home: Home, verb: str, after: int, *happens: Callable[[], object]) -> None:
    """Have things happen when so many batches are done, and the last one is not counted yet."""
    store = type(home.client.store)
    plain = getattr(store, verb)
    batches = 0

    def instead(self: Any, ids: Sequence[str], queue: str | None = None) -> Any:
        nonlocal batches
        answers = plain(self, ids, queue)
        batches += 1
        for happen in happens if batches == after else ():
            happen()
        return answers

    patch.setattr(store, verb, instead)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["retry", "forget"])
def test_interrupted_it_says_how_many_were_done_and_the_same_command_does_the_rest(
    home: Home, monkeypatch: pytest.MonkeyPatch, verb: str, number: int
) -> None:
    home.bury(2600)
    handler = signal.getsignal(number)
    arguments, participle = {"retry": (["--all"], "retried"), "forget": (["--all", "--yes"], "forgotten")}[verb]
    with monkeypatch.context() as patch:
        interrupt(patch, home, verb, 3, lambda: os.kill(os.getpid(), number))
        ended = home.kqueue(verb, *arguments, "--json")
    assert ended.code == 128 + number
    assert json.loads(ended.out) == {participle: 1500, "missing": []}
    assert ended.err == f"interrupted: 1500 of 2600 {participle}; the same command does the rest\n"
    assert counts(home).dead == 1100
    assert home.kqueue(verb, *arguments).out == f"1100 {participle}\n"
    assert signal.getsignal(number) is handler


def test_interrupted_twice_it_ends_at_once_and_says_what_is_sure(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.bury(1600)
    interrupt(monkeypatch, home, "retry", 2, ctrl_c, ctrl_c)
    ended = home.kqueue("retry", "--all")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.rstrip() == "at least 500 of 1600 retried; the same command does the rest"
    assert counts(home).dead == 600


def test_killed_in_the_middle_nothing_is_half_done(home: Home) -> None:
    """Wherever the kill hits, the certificates of those that were forgotten are gone, and the others are whole."""
    ids = home.bury(10_000)
    started = subprocess.Popen([*COMMAND, "forget", "--all", "--yes"], stdout=subprocess.PIPE)
    while counts(home).dead > 8_000 and started.poll() is None:
        pass
    started.kill()
    started.communicate(timeout=PATIENCE_S)
    left = counts(home).dead
    assert left < 10_000
    assert left % 500 == 0
    store = home.client.store
    rows = [store.show(id, "default") for id in ids[9_000:]]
    assert all(row is None or (row.state == "dead" and len(row.certificates) == 1 and row.envelope) for row in rows)
    assert home.kqueue("forget", "--all", "--yes").out == f"{left} forgotten\n"
    assert counts(home) == QueueStats()
    if home.url.startswith("redis"):
        import redis

        with redis.Redis.from_url(home.url) as server:
            assert [key for key in server.scan_iter("kq:{default}:*", 1000) if b":job:" in key or b":certs:" in key] == []


def test_a_broker_that_goes_away_in_the_middle_is_one_line_after_what_was_done(
    make_home: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always").start()
    try:
        home: Home = make_home(server.url)
        home.bury(1600)
        with monkeypatch.context() as patch:
            interrupt(patch, home, "retry", 2, server.kill)
            ended = home.kqueue("retry", "--all")
        assert (ended.code, ended.out) == (4, "")
        done, why = ended.err.splitlines()
        assert done == "at least 1000 of 1600 retried; the same command does the rest"
        assert why.startswith(f"kqueue: redis://127.0.0.1:{server.port}/0: cannot connect")
        server.start()
        assert home.kqueue("retry", "--all").out == "600 retried\n"
    finally:
        server.stop()


# -- with a daemon ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/q.db"
    server: RedisServer = request.getfixturevalue("redis_server")
    server.command("FLUSHALL")
    return server.url


def test_a_job_that_is_retried_starts_at_once_and_dies_with_all_its_certificates(url: str, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, url).start()
    try:
        daemon.dispatch(BoundJob("fails_twice", [], {}, DispatchOptions()), BoundJob("fails_twice", [], {}, DispatchOptions()))
        daemon.marks.wait("attempt", 4)
        daemon.wait_log("job dead; why", 2)
        ended = daemon.kqueue("retry", "--all")  # nothing is due, so that without a ring nobody would look
        assert (ended.returncode, ended.stdout) == (0, "2 retried\n")
        assert daemon.marks.wait("attempt", 8)[4:] == ["attempt 1", "attempt 1", "attempt 2", "attempt 2"]
        daemon.wait_log("job dead; why", 4)
        for row in json.loads(daemon.kqueue("jobs", "--state", "dead", "--json").stdout):
            shown = json.loads(daemon.kqueue("show", row["id"], "--json").stdout)
            assert [certificate["attempt"] for certificate in shown["certificates"]] == [1, 2, 1, 2]
            assert shown["attempts"] == 2
    finally:
        daemon.close()


def test_jobs_that_die_again_meanwhile_do_not_keep_the_command_from_ending(url: str, tmp_path: Path) -> None:
    bury(url, 3000, envelope=b"garbage")
    daemon = Daemon(tmp_path, url).start()
    try:
        ended = daemon.kqueue("retry", "--all")
        assert (ended.returncode, ended.stdout) == (0, "3000 retried\n")
        daemon.wait_log("job dead; why", 3000)
        assert daemon.client.store.stats()["default"] == QueueStats(dead=3000)
    finally:
        daemon.close()


def test_what_retention_drops_is_logged_and_counted(url: str, tmp_path: Path) -> None:
    ids = bury(url, 1205)
    daemon = Daemon(tmp_path, url, names="{default: 1, mail: 3}, dead: {max_count: 5}", lease="3s").start()
    try:
        daemon.wait_log("dead letters dropped")
        while (found := daemon.status())["queues"]["default"]["dead"] > 5:
            pass
        assert found["queues"]["default"]["dead"] == 5
        assert found["forgotten"] == 1200
        logged = [line for line in daemon.log if "dead letters dropped" in line]
        assert sum(int(line.split("jobs=")[1].split()[0]) for line in logged) == 1200
        assert all("level=warning" in line and "queue=default" in line for line in logged)
        left = json.loads(daemon.kqueue("jobs", "--state", "dead", "--json").stdout)
        assert {row["id"] for row in left} == set(ids[-5:])
    finally:
        daemon.close()
