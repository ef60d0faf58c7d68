"""The chaos harness: that it convicts, that its proxy cuts where it is told, and a short run of it on both brokers.

A checker that acquits everybody proves nothing. So it is fed forged histories here, each with one crime in it, next to the same
history without the crime.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.servers import lack

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from chaos_app import book, nemeses, resp, workload  # noqa: E402  (scripts are no package of ours)
from chaos_app.arena import Arena, Setting  # noqa: E402
from chaos_app.checker import GONE, KILL, TROUBLE, Fault, History, Verdict, absences, judge, silences  # noqa: E402
from chaos_app.proxy import Proxy, Walk, Walker  # noqa: E402

LEASE_S = 3.0
SEED = "7"
KILLS = ("kill-child", "kill-template", "kill-daemon", "kill-dispatcher", "kill-all", "restart", "blink")
SHORT_RUN = {"sqlite": KILLS, "redis": (*KILLS, "kill-redis", "cut", "pause")}


class Forger:
    """Writes histories. Times in seconds; a run is on daemon "a.1" unless told otherwise."""

    def __init__(self) -> None:
        self.history = History()
        self.faults: list[Fault] = []
        self.left: dict[str, str] = {}
        self._runs = 0

    def mark(self, kind: str, job: str, at: float, run: str = "-", word: str = "-", daemon: str = "a.1", pid: int = 100) -> None:
        self.history.add([book.Mark(kind, at, job, run, daemon, pid, 10, word)])

    def dispatch(self, job: str, owed: str = "done", at: float = 0.0, returned: bool = True) -> Forger:
        self.mark(book.ATTEMPTED, job, at, word=owed)
        self.mark(book.RETURNED if returned else book.UNKNOWN, job, at + 0.01)
        return self

    def run(
        self, job: str, began: float, ended: float | None = None, how: str = book.FINISHED, daemon: str = "a.1", pid: int = 100,
        word: str = "-", attempt: str = "1",
    ) -> str:  # fmt: skip
        self._runs += 1
        run = f"{self._runs:08x}"
        self.mark(book.STARTED, job, began, run, attempt, daemon, pid)
        if ended is not None:
            self.mark(how, job, ended, run, word, daemon, pid)
        return run

    def fault(self, how: str, began: float, ended: float, daemon: str = "a.1", pid: int = 0) -> None:
        self.faults.append(Fault(how, "test", began, ended, daemon, pid))

    def verdict(self) -> Verdict:
        return judge(self.history, [*self.faults, *absences(self.faults, LEASE_S)], self.left, {})


@pytest.fixture
def forger() -> Forger:
    """A history with one good job in it."""
    forger = Forger().dispatch("good")
    forger.run("good", 1, 2)
    return forger


# -- the checker convicts -----------------------------------------------------------------------------------------------


def test_a_good_history_is_acquitted(forger: Forger) -> None:
    verdict = forger.verdict()
    assert not verdict.guilty
    assert (verdict.dispatched, verdict.runs, verdict.done) == (1, 1, 1)


@pytest.mark.parametrize("began", [None, 1.0])
def test_a_job_that_is_nowhere_is_lost(forger: Forger, began: float | None) -> None:
    forger.dispatch("gone")
    if began is not None:  # it was acked though it never finished
        forger.run("gone", began)
    assert forger.verdict().lost == ["gone"]
    assert forger.verdict().guilty


def test_a_job_that_still_waits_is_late_and_not_lost(forger: Forger) -> None:
    forger.dispatch("waits")
    forger.left["waits"] = "leased"
    verdict = forger.verdict()
    assert (verdict.lost, verdict.late) == ([], ["waits"])
    assert verdict.guilty


def test_a_dispatch_that_raised_owes_nothing(forger: Forger) -> None:
    forger.dispatch("unsure", returned=False)
    assert not forger.verdict().guilty
    forger.run("unsure", 1, 2)
    verdict = forger.verdict()
    assert not verdict.guilty
    assert (verdict.unknown, verdict.unknown_ran) == (1, 1)


def test_a_run_that_nobody_dispatched_is_unexpected(forger: Forger) -> None:
    forger.run("phantom", 1, 2)
    assert forger.verdict().unexpected == ["phantom"]
    assert forger.verdict().guilty


def test_a_job_that_runs_twice_for_no_reason_convicts(forger: Forger) -> None:
    forger.run("good", 5, 6)
    verdict = forger.verdict()
    assert verdict.guilty
    assert [each.run.job for each in verdict.unexplained] == ["good"]
    assert verdict.duplicated == {"unexplained": 1}


def test_a_run_that_is_cut_off_by_nobody_convicts(forger: Forger) -> None:
    forger.dispatch("cut")
    forger.run("cut", 1)
    forger.run("cut", 2, 3)
    assert len(forger.verdict().unexplained) == 1


def test_one_that_was_to_live_is_not_buried(forger: Forger) -> None:
    forger.dispatch("buried")
    forger.run("buried", 1)
    forger.left["buried"] = "dead"
    assert forger.verdict().buried == ["buried"]
    assert forger.verdict().guilty
    for at in (1, 2, 3):  # a crash each time: then it is right
        forger.run("buried", at)
        forger.fault(KILL, at + 0.5, at + 0.6, pid=100)
    assert not forger.verdict().buried


def test_poison_must_die(forger: Forger) -> None:
    forger.dispatch("poison", owed="dead")
    for at in (1, 2, 3):
        forger.run("poison", at, at + 0.1, book.DYING)
    forger.left["poison"] = "dead"
    assert not forger.verdict().guilty
    del forger.left["poison"]
    assert forger.verdict().lost == ["poison"]


def test_poison_that_ends_well_is_undead(forger: Forger) -> None:
    forger.dispatch("poison", owed="dead")
    forger.run("poison", 1, 2)
    assert forger.verdict().undead == ["poison"]
    assert forger.verdict().guilty


# -- what excuses a second run, and what does not -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "excused"),
    [
        (Fault(KILL, "test", 1.5, 1.6, "a.1"), True),
        (Fault(KILL, "test", 1.5, 1.6, "a.2"), False),  # another life of that daemon
        (Fault(KILL, "test", 1.5, 1.6, "b.1"), False),
        (Fault(KILL, "test", 1.5, 1.6, "a.1", pid=100), True),  # its own process
        (Fault(KILL, "test", 1.5, 1.6, "a.1", pid=10), True),  # the template that it was forked by
        (Fault(KILL, "test", 1.5, 1.6, "a.1", pid=101), False),
        (Fault(KILL, "test", 2.3, 2.4, "a.1"), True),  # it had finished, a moment before, and was not settled
        (Fault(KILL, "test", 4.5, 4.6, "a.1"), False),  # it had finished long before
        (Fault(KILL, "test", 0.1, 0.4, "a.1"), False),  # it had not begun
        (Fault(KILL, "test", 7.1, 7.2, "a.1"), False),  # after the second run
        (Fault(KILL, "test", 0.5, 0.8, "a.1"), True),  # and its child lived a moment longer
        (Fault(GONE, "test", 1.5, 5.0, "a.1"), True),
        (Fault(TROUBLE, "test", 1.5, 2.5, "a.1"), False),  # a cut, a full disk: nothing may run twice for that
        (Fault(TROUBLE, "test", 0.0, 9.0), False),  # nor for a broker that was away
    ],
)
def test_reasons(forger: Forger, fault: Fault, excused: bool) -> None:
    forger.run("good", 6, 6.5)
    forger.faults.append(fault)
    assert forger.verdict().guilty is not excused


def test_an_end_that_could_not_be_settled_may_be_undone_by_a_kill(forger: Forger) -> None:
    forger.run("good", 6, 7)
    forger.fault(KILL, 5, 5.1)
    assert forger.verdict().guilty
    forger.fault(TROUBLE, 1.9, 4.5, daemon="")  # the broker was away until shortly before
    verdict = forger.verdict()
    assert not verdict.guilty
    assert verdict.duplicated == {"killed: test": 1}
    assert verdict.settle_lag_s == pytest.approx(3.0)


def test_one_kill_excuses_one_second_run(forger: Forger) -> None:
    forger.dispatch("cut")
    forger.run("cut", 1)
    forger.fault(KILL, 1.5, 1.5)
    forger.run("cut", 2, 3, daemon="a.2")
    verdict = forger.verdict()
    assert not verdict.guilty
    assert verdict.recovered == {"killed: test": 1}
    assert verdict.since_fault_s == [0.5]
    forger.run("cut", 4, 5)
    assert len(forger.verdict().unexplained) == 1


def test_a_retry_that_was_asked_for_is_no_duplicate(forger: Forger) -> None:
    forger.dispatch("flaky")
    forger.run("flaky", 1, 2, book.FAILED)
    forger.run("flaky", 3, 4)
    verdict = forger.verdict()
    assert not verdict.guilty
    assert (verdict.asked, verdict.duplicated) == (1, {})
    forger.run("flaky", 5, 6)
    assert forger.verdict().guilty


@pytest.mark.parametrize(("attempts", "began", "excused"), [("31", 6.2, True), ("13", 6.2, False), ("31", 8, False)])
def test_a_run_of_a_lost_reservation_is_stale(forger: Forger, attempts: str, began: float, excused: bool) -> None:
    """Reserved, stopped, recovered and run by another meanwhile, and begun all the same: by the lower number of its attempt."""
    forger.dispatch("stale")
    forger.run("stale", 4, 5, daemon="b.1", attempt=attempts[0])
    forger.run("stale", began, 9, attempt=attempts[1])
    forger.fault(GONE, 1, 6)
    assert forger.verdict().guilty is not excused


def test_poison_excuses_its_neighbours_only(forger: Forger) -> None:
    forger.dispatch("poison", owed="dead")
    forger.left["poison"] = "dead"
    forger.run("poison", 1.4, 1.5, book.DYING, word="daemon")
    forger.run("good", 3, 4)
    assert not forger.verdict().guilty
    forger.dispatch("elsewhere")
    forger.run("elsewhere", 1, 2, daemon="b.1")
    forger.run("elsewhere", 3, 4, daemon="b.1")
    assert [each.run.job for each in forger.verdict().unexplained] == ["elsewhere"]


def test_troubles_of_one_daemon_add_up_to_an_absence_and_those_of_all_do_not() -> None:
    own = [Fault(TROUBLE, "pause", 1, 2, "a.1"), Fault(TROUBLE, "lock", 2.1, 4.5)]
    assert [(fault.how, fault.nemesis) for fault in absences(own, LEASE_S)] == [(GONE, "pause+lock")]
    everybodys = [Fault(TROUBLE, "lock", 1, 9)]
    assert absences(everybodys, LEASE_S) == []
    apart = [Fault(TROUBLE, "pause", 1, 1.9, "a.1"), Fault(TROUBLE, "pause", 5, 5.9, "a.1")]
    assert absences(apart, LEASE_S) == []


def test_a_lease_that_was_not_renewed_is_an_absence_if_something_was_done_to_its_daemon() -> None:
    renewals = {"a.1": [0.0, 1.0, 5.0, 6.0], "b.1": [0.0, 1.0, 5.0, 6.0], "c.1": [0.0, 1.0, 2.0, 3.0]}
    own = [Fault(TROUBLE, "cut", 2, 3, "a.1"), Fault(TROUBLE, "away", 2, 5), Fault(TROUBLE, "cut", 1, 3, "c.1")]
    found = silences(renewals, own, LEASE_S)
    assert [(fault.daemon, fault.began, fault.ended, fault.nemesis) for fault in found] == [("a.1", 1.0, 5.0, "cut+away")]


def test_a_daemon_that_fell_silent_for_good_was_gone_too(forger: Forger) -> None:
    """Split off, and never heard of again: its last renewal is followed by the end of the run alone."""
    forger.run("good", 5, 6, daemon="b.1")
    forger.fault(TROUBLE, 1.9, 5.5)
    for renewed, gone in (([0.0, 1.5, 9.0], True), ([0.0, 1.5, 4.0, 5.5, 8.0], False)):
        faults = [*forger.faults, *silences({"a.1": renewed}, forger.faults, LEASE_S)]
        assert judge(forger.history, faults, {}, {}).guilty is not gone


@pytest.mark.parametrize(("healed_at", "renewed_at", "dropped"), [(5.5, 1.5, True), (8.0, 1.5, False), (5.5, 8.0, False)])
def test_an_arena_sees_who_has_dropped_out(healed_at: float, renewed_at: float, dropped: bool) -> None:
    """And its silence lasts until the end of the run, for the checker too."""
    arena: Any = Arena(Setting("redis", 1, LEASE_S), keep=False, say=print)
    arena.daemons = {"a": SimpleNamespace(name="a", label="a.1", alive=True, started_at={"a.1": 0.0})}
    arena.proxies = {"a": SimpleNamespace(renewed_at=[1.0, renewed_at], dead=False)}
    arena.faults.append(Fault(TROUBLE, "split", 1.6, healed_at, "a.1"))
    arena._stopped_at = 12.0
    assert arena._renewals() == {"a.1": [0.0, 1.0, renewed_at, 12.0]}
    assert bool(arena._dropped_out()) is dropped
    arena.proxies["a"].dead = True
    assert "the proxy of a has died" in arena._dropped_out()[0]


def test_the_closest_reason_is_the_one_that_counts(forger: Forger) -> None:
    """Its own process' end before that of its daemon, and each before an absence, in whatever order they came."""
    forger.run("good", 6, 7)
    for fault, reason in (
        (Fault(GONE, "blink", 0.5, 5.0, "a.1"), "gone: blink"), (Fault(KILL, "early", 1.2, 1.2, "a.1"), "killed: early"),
        (Fault(KILL, "late", 1.8, 1.8, "a.1"), "killed: late"), (Fault(KILL, "own", 1.5, 1.5, "a.1", pid=100), "killed: own"),
    ):  # fmt: skip
        forger.faults.append(fault)
        assert forger.verdict().duplicated == {reason: 1}


def test_a_conviction_tells_what_happened_around_it(forger: Forger) -> None:
    forger.run("good", 5, 6, daemon="b.1")
    forger.fault(TROUBLE, 1.5, 2.5)
    forger.fault(KILL, 40, 41)
    renewals = {"a.1": [0.5, 1.4, 60.0], "b.1": [0.25], "c.1": [0.0, 1.0]}
    evidence = judge(forger.history, forger.faults, {}, {}, renewals=renewals).evidence
    assert evidence[-3:] == [
        "trouble by test of a.1 from 1.500 to 2.500",
        "a.1 began at 0.500, then renewed (or ended) at 1.400",
        "b.1 began at 0.250, then renewed (or ended) at no time around",
    ]


def test_a_job_that_was_dispatched_twice_may_arrive_twice(forger: Forger) -> None:
    """What a killed dispatcher had sent may arrive after the job that its successor dispatched is done."""
    forger.dispatch("twice", at=0.0).dispatch("twice", at=0.5)
    forger.run("twice", 1, 2)
    forger.run("twice", 3, 4)
    verdict = forger.verdict()
    assert not verdict.guilty
    assert verdict.duplicated == {"redispatch": 1}
    forger.run("twice", 5, 6)
    assert forger.verdict().guilty


# -- follow-ups ---------------------------------------------------------------------------------------------------------


def test_a_follow_up_runs_once_after_a_success(forger: Forger) -> None:
    forger.dispatch("parent")
    run = forger.run("parent", 1, 2)
    forger.mark(book.PROMISED, "parent", 1.5, run, "child")
    assert forger.verdict().lost == ["parent's follow-up"]
    forger.run("child", 3, 4)
    assert not forger.verdict().guilty


def test_a_follow_up_of_a_failed_run_is_unexpected(forger: Forger) -> None:
    forger.dispatch("parent")
    failed = forger.run("parent", 1, 2, book.FAILED)
    forger.mark(book.PROMISED, "parent", 1.5, failed, "child-of-failure")
    good = forger.run("parent", 3, 4)
    forger.mark(book.PROMISED, "parent", 3.5, good, "child")
    forger.run("child", 5, 6)
    assert not forger.verdict().guilty
    forger.run("child-of-failure", 5, 6)
    assert "child-of-failure" in forger.verdict().unexpected


def test_two_runs_that_finish_have_one_follow_up(forger: Forger) -> None:
    forger.dispatch("parent")
    first = forger.run("parent", 1, 2)
    forger.mark(book.PROMISED, "parent", 1.5, first, "first-child")
    forger.fault(KILL, 2.1, 2.2)
    second = forger.run("parent", 3, 4)
    forger.mark(book.PROMISED, "parent", 3.5, second, "second-child")
    forger.run("second-child", 5, 6)
    assert not forger.verdict().guilty
    forger.run("first-child", 5, 6)
    verdict = forger.verdict()
    assert len(verdict.unexpected) == 1
    assert any("first-child" in line for line in verdict.evidence)
    assert any(line.startswith("parent S at 1.000") for line in verdict.evidence)
    assert "kill by test of a.1 from 2.100 to 2.200" in verdict.evidence


@pytest.mark.parametrize(("again", "guilty"), [(0.5, False), (1.5, False), (2.05, False), (3.5, True)])
def test_one_that_was_dispatched_anew_when_it_may_have_been_done_has_a_follow_up_more(
    forger: Forger, again: float, guilty: bool
) -> None:
    """Its dispatcher was killed before it heard that the first dispatch was done; that kill excuses the run, and comes first."""
    forger.dispatch("parent").dispatch("parent", at=again)
    for child, at in (("first-child", 1.0), ("second-child", 3.0)):
        forger.mark(book.PROMISED, "parent", at + 0.5, forger.run("parent", at, at + 1), child)
        forger.run(child, 5, 6)
    forger.fault(KILL, 2.1, 2.2)
    assert forger.verdict().guilty is guilty


# -- the book -----------------------------------------------------------------------------------------------------------


def test_marks_of_processes_that_are_killed_are_whole(tmp_path: Path) -> None:
    """Several writers, killed at full speed: every record can be read, and each writer's last one is as whole as the others."""
    path = tmp_path / "book"
    reader = book.Reader(str(path))
    code = "from chaos_app import book\nn = 0\nwhile True:\n book.note('S', f'job{n}', word='x' * 40)\n n += 1"
    environment = {**os.environ, book.PATH_VARIABLE: str(path), "PYTHONPATH": str(ROOT / "scripts")}
    writers = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    marks: list[book.Mark] = []
    while len({mark.pid for mark in marks}) < 3 or len(marks) < 3000:
        marks += reader.more()
    for writer in writers:
        writer.kill()
        writer.wait()
    marks += reader.more()
    reader.close()
    for writer in writers:
        own = [mark.job for mark in marks if mark.pid == writer.pid]
        assert own == [f"job{n}" for n in range(len(own))]


# -- schedule and workload ----------------------------------------------------------------------------------------------


def test_the_seed_replays_the_schedule_and_the_jobs() -> None:
    def drawn(seed: int) -> tuple[object, object]:
        names = nemeses.available("redis")
        return nemeses.schedule(seed, names, 60, LEASE_S, 1.0), workload.mixed(seed, 500, 60, LEASE_S)

    assert drawn(1) == drawn(1)
    assert drawn(1)[0] != drawn(2)[0]
    assert drawn(1)[1] != drawn(2)[1]


def test_a_schedule_has_every_nemesis_and_ends_in_time() -> None:
    for broker in ("sqlite", "redis"):
        names = nemeses.available(broker)
        strikes = nemeses.schedule(7, names, 300, LEASE_S, 1.0)
        assert {strike.nemesis for strike in strikes} == set(names)
        assert all(strike.at_s + strike.seconds <= 300 for strike in strikes)


# -- the proxy ----------------------------------------------------------------------------------------------------------

REPLIES = [b"+OK\r\n", b":12\r\n", b"$3\r\nabc\r\n", b"$-1\r\n", b"*2\r\n:1\r\n*1\r\n$2\r\nab\r\n", b"%1\r\n+a\r\n:1\r\n"]


@pytest.mark.parametrize("reply", REPLIES)
def test_where_a_reply_ends(reply: bytes) -> None:
    assert [resp.end_of(reply[:size]) for size in range(len(reply))] == [None] * len(reply)
    assert resp.end_of(reply + b"+next\r\n") == len(reply)


class Echo:
    """A server that answers every request with the same reply."""

    def __init__(self, reply: bytes) -> None:
        self.requests = 0
        self._reply = reply
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        data = b""
        with connection:
            while True:
                try:
                    got = connection.recv(4096)
                except OSError:
                    return
                if not got:
                    return
                data += got
                while (end := resp.end_of(data)) is not None:
                    data = data[end:]
                    self.requests += 1
                    connection.sendall(self._reply)

    def close(self) -> None:
        self._listener.close()


REPLY = b"*2\r\n$5\r\nhello\r\n:7\r\n"
REQUEST = b"*2\r\n$7\r\nEVALSHA\r\n$4\r\nabcd\r\n"


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo(REPLY)
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    proxy = Proxy(echo.port, {b"abcd": "settle"})
    yield proxy
    proxy.stop()


def said(port: int, request: bytes, times: int = 1) -> bytes:
    """All that comes back until the connection is closed, or so many replies are whole."""
    data = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        try:
            while data.count(b":7\r\n") < times and (got := connection.recv(4096)):
                data += got
        except ConnectionResetError:
            pass
    return data


@pytest.mark.parametrize("offset", range(len(REPLY) + 1))
def test_a_reply_is_cut_at_every_byte(proxy: Proxy, offset: int) -> None:
    proxy.choose = lambda kind, length: offset if kind == "settle" else None
    assert said(proxy.port, REQUEST, times=2) == REPLY[:offset]
    assert [(cut.kind, cut.offset, cut.length) for cut in proxy.cuts] == [("settle", offset, len(REPLY))]
    proxy.heal()
    assert said(proxy.port, REQUEST) == REPLY


def test_the_second_of_two_replies_is_cut(proxy: Proxy) -> None:
    seen: list[str] = []

    def choose(kind: str, length: int) -> int | None:
        seen.append(kind)
        return 3 if len(seen) == 2 else None

    proxy.choose = choose
    assert said(proxy.port, REQUEST + b"*1\r\n$4\r\nPING\r\n", times=3) == REPLY + REPLY[:3]
    assert seen == ["settle", "PING"]


def test_a_request_that_is_cut_never_arrives(proxy: Proxy, echo: Echo) -> None:
    proxy.choose_request = lambda kind, length: length - 1
    assert said(proxy.port, REQUEST) == b""
    assert echo.requests == 0


def test_what_is_held_arrives_in_the_end(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as connection:
        connection.sendall(REQUEST)
        assert connection.recv(4096) == REPLY
        proxy.hold(True)
        proxy.hold(True)
        connection.sendall(REQUEST)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(4096)
        connection.settimeout(10)
        proxy.hold(False)
        assert connection.recv(4096) == REPLY


def test_who_lost_a_reply_gets_no_later_one(proxy: Proxy, echo: Echo) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as connection:
        proxy.mute = True
        connection.sendall(REQUEST)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(4096)
        connection.settimeout(10)
        assert echo.requests == 1
        proxy.heal()
        assert connection.recv(4096) == b""


def test_a_walk_cuts_at_every_byte_and_only_what_lives(echo: Echo) -> None:
    proxy = Proxy(echo.port, {b"abcd": "settle", b"efgh": "reserve"})
    walk = Walk({"settle"}, limit=100)
    walker = Walker(walk, proxy, {"settle"}, None)
    proxy.choose = walker
    try:
        assert said(proxy.port, REQUEST) == REPLY  # nothing was reserved yet, so it is let through
        cut = [said(proxy.port, REQUEST.replace(b"abcd", b"efgh") + REQUEST, times=3) for _ in range(len(REPLY) + 1)]
        assert cut == [REPLY + REPLY[:offset] for offset in range(len(REPLY) + 1)]
        assert walk.left() == {}
    finally:
        proxy.stop()


# -- the harness itself -------------------------------------------------------------------------------------------------


class Chaos:
    """A run of the harness, with its own directory in `directory`. It runs until it is asked how it ended."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self._file = directory / "results.json"
        command = [sys.executable, "-m", "chaos_app.run", "--seed", SEED, "--json", str(self._file), *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "TMPDIR": str(directory)},
        )  # fmt: skip

    def ended(self, status: int) -> tuple[dict[str, Any], str]:
        """Its result, and what it said; it must have ended with `status` and left nothing behind."""
        said, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == status, said
        assert leftovers(self.directory) == []
        (result,) = json.loads(self._file.read_text())
        return result, said

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate()


def leftovers(directory: Path) -> list[str]:
    """What a run left behind: its directory, a mount in it, processes that have it in their environment."""
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(directory) in line]
    return [str(path) for path in directory.glob("kqueue-chaos-*")] + mounts + processes_of(directory)


def processes_of(directory: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{book.PATH_VARIABLE}={directory}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().decode())
    return found


@pytest.fixture
def run_chaos() -> Iterator[Callable[..., Chaos]]:
    """Starts runs, each in a directory whose path leaves room for that of a Unix socket."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> Chaos:
            chaos = Chaos(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kqc-"))), *arguments)
            stack.callback(chaos.close)
            return chaos

        yield start


def test_nothing_is_lost_whatever_is_killed(run_chaos: Callable[..., Chaos]) -> None:
    need_redis()
    short = ("--minutes", "0.1", "--jobs", "750", "--every", "0.3")
    runs = {broker: run_chaos("--broker", broker, *short, "--nemesis", ",".join(names)) for broker, names in SHORT_RUN.items()}
    for broker, run in runs.items():
        result, said = run.ended(0)
        verdict = result["verdict"]
        assert verdict["dispatched"] + verdict["unknown"] >= 750, said
        assert verdict["done"] >= 650, said
        assert verdict["recovered"] or verdict["duplicated"], said  # it did hit something
        assert set(result["strikes"]) <= set(SHORT_RUN[broker]), said
        assert len(result["strikes"]) >= 5, said


def test_nothing_is_lost_at_any_byte_and_what_is_lost_is_found(run_chaos: Callable[..., Chaos]) -> None:
    """Every 30th byte (`./scripts/chaos --nemesis cut-every-byte` takes them all); and a Redis that is emptied is too much."""
    need_redis()
    cut = run_chaos("--nemesis", "cut-every-byte", "--stride", "30", "--minutes", "1.5")
    emptied = run_chaos("--broker", "redis", "--minutes", "0.05", "--jobs", "300", "--nemesis", "flush", "--bound", "1")
    result, said = cut.ended(0)
    assert result["strikes"]["cut"] >= 25, said
    result, said = emptied.ended(1)
    assert result["verdict"]["lost"], said
    assert "GUILTY" in said


def test_what_a_killed_daemon_had_is_done_by_the_next_one_or_by_another(run_chaos: Callable[..., Chaos]) -> None:
    need_redis()
    runs = {
        scenario: run_chaos("--broker", broker, "--scenario", scenario, "--jobs", "400", "--lease", "3")
        for scenario, broker in (("kills", "sqlite"), ("survivor", "redis"))
    }
    for scenario, run in runs.items():
        result, said = run.ended(0)
        assert result["verdict"]["done"] == 400, said
        assert result["strikes"] == {"kill-daemon": 5 if scenario == "kills" else 1}, said
        taken = {**result["verdict"]["recovered"], **result["verdict"]["duplicated"]}  # done and not settled is in hand, too
        assert "kill-daemon" in str(taken), said


def test_ctrl_c_leaves_nothing_behind(run_chaos: Callable[..., Chaos]) -> None:
    run = run_chaos("--broker", "sqlite", "--minutes", "1")
    deadline = time.monotonic() + 30
    while len(processes_of(run.directory)) < 4:  # two daemons, their templates
        assert run.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.process.send_signal(signal.SIGINT)
    run.process.communicate(timeout=30)
    assert run.process.returncode != 0
    while processes_of(run.directory):  # a daemon that was starting had a child that reads its configuration, and ends itself
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert leftovers(run.directory) == []


def need_redis() -> None:
    if shutil.which("redis-server") is None:
        lack("redis-server")
