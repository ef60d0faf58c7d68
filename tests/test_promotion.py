"""A job class that blocks the loop twice runs isolated from then on: everywhere, for good, and until somebody takes it back."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import KQueueRuntime, job
from kqueue import events as facts
from kqueue.client import Client, open_store
from kqueue.promotion import FORGOTTEN, PREFIX, read_promotion
from kqueue.registry import registry
from tests.apps import blocking
from tests.daemon import PATIENCE_S, Daemon

Make = Callable[..., Daemon]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    daemons: list[Daemon] = []

    def make(name: str = "a", more: str = "inline: {max_slice: 50ms}", pin: str = "{}", **settings: Any) -> Daemon:
        directory = tmp_path / name
        directory.mkdir()
        modules = f"[tests.apps.inline, tests.apps.blocking], pin: {pin}"
        daemon = Daemon(
            directory, f"sqlite:///{tmp_path}/kqueue.db", modules=modules, isolated_modules="[]", more=more, **settings
        )
        daemons.append(daemon)
        return daemon

    yield make
    for daemon in daemons:
        daemon.close()


def pids(daemon: Daemon, blocker: Any, count: int) -> list[int]:
    """Where `count` jobs ran, one after the other."""
    return [daemon.dispatch(blocker.job())[0].result(PATIENCE_S) for _ in range(count)]


def lane(daemon: Daemon, name: str) -> tuple[str, str]:
    found = daemon.status()["jobs"].get(name, {"lane": None, "why": None})
    return found["lane"], found["why"]


def until(daemon: Daemon, name: str, wanted: tuple[str, str]) -> None:
    """Each look is a command of its own, so they are as far apart as that takes."""
    for _ in range(100):
        if lane(daemon, name) == wanted:
            return
    raise AssertionError(f"{name} stays {lane(daemon, name)}")


@pytest.mark.parametrize("blocker", [blocking.stalls, blocking.astalls])
def test_what_blocks_twice_runs_in_a_child_and_still_does_after_a_restart(make: Make, blocker: Any) -> None:
    daemon = make().start()
    name = blocker.registration.name
    assert pids(daemon, blocker, 2) == [daemon.pid] * 2
    until(daemon, name, ("isolated", "blocked"))
    assert "runs isolated from now on" in daemon.wait_log("has blocked the loop twice")
    assert daemon.pid not in pids(daemon, blocker, 3)
    page = daemon.kqueue("status").stdout
    assert "isolated, it blocked" in page
    assert f"kqueue demote {name}" in page
    doctor = daemon.kqueue("doctor").stdout
    assert f"{name} runs isolated since it blocked the loop" in doctor
    assert daemon.stop() == 0
    daemon.start()
    assert daemon.pid not in pids(daemon, blocker, 1)
    found = daemon.status()["jobs"][name]
    assert (found["lane"], found["why"], found["causes"]) == ("isolated", "blocked", {"ok": 1})
    assert found["blocked"]["seconds"] > 0.1
    assert sum("has blocked the loop twice" in line for line in daemon.log) == 0, "it is said once"
    assert daemon.stop() == 0


def test_those_that_wait_in_the_inline_lane_are_moved(make: Make) -> None:
    daemon = make()
    handles = daemon.dispatch(*(blocking.stalls.job() for _ in range(30)))
    daemon.start()
    where = [handle.result(PATIENCE_S) for handle in handles]
    assert len(set(where) - {daemon.pid}) >= 20, "a few were on their way already"
    counts = daemon.status()["queues"]["default"]
    assert counts["dead"] == 0
    assert daemon.stop() == 0


def test_daemons_agree_and_do_not_play_ball(make: Make) -> None:
    first, second = make("a").start(), make("b").start()
    second.stop()
    pids(first, blocking.stalls, 2)
    until(first, "stalls", ("isolated", "blocked"))
    second.start()
    assert lane(second, "stalls") == ("isolated", "blocked"), "it has read it at its start"
    assert second.kqueue("demote", "stalls").returncode == 0
    second.stop()
    second.start()
    assert lane(second, "stalls") == (None, None)
    # The first does not know yet, and would move a job that comes; it asks first.
    assert lane(first, "stalls") == ("isolated", "blocked")
    second.stop()
    assert pids(first, blocking.stalls, 1) == [first.pid]
    assert first.stop() == 0


def test_a_daemon_that_has_not_heard_of_it_does_not_send_a_job_back(make: Make) -> None:
    late, first = make("late").start(), make("a").start()
    late.signal(signal.SIGSTOP)  # for less than its lease, so that it gets none of the jobs and hears nothing
    pids(first, blocking.stalls, 2)
    until(first, "stalls", ("isolated", "blocked"))
    late.signal(signal.SIGCONT)
    assert lane(late, "stalls")[1] != "blocked"
    first.stop()
    id = late.kqueue("dispatch", "stalls", "--wait").stdout
    assert str(late.pid) not in id
    assert late.stop() == 0


def test_it_is_taken_back(make: Make) -> None:
    daemon = make(lease="3s").start()
    pids(daemon, blocking.stalls, 2)
    until(daemon, "stalls", ("isolated", "blocked"))
    assert daemon.kqueue("demote").stdout.startswith("stalls: blocked the loop of ")
    assert daemon.kqueue("demote", "nosuch").returncode == 2
    assert daemon.kqueue("demote", "stalls").stdout == "daemons run it inline again: stalls\n"
    assert daemon.kqueue("demote").stdout == "none\n"
    until(daemon, "stalls", ("inline", "kind"))
    assert pids(daemon, blocking.stalls, 1) == [daemon.pid]
    pids(daemon, blocking.stalls, 1)
    until(daemon, "stalls", ("isolated", "blocked"))  # it has not been mended
    assert daemon.stop() == 0


def test_what_is_declared_or_pinned_stays_where_it_is(make: Make) -> None:
    daemon = make(pin="{stalls: inline, note: isolated}").start()
    assert pids(daemon, blocking.stalls, 3) == [daemon.pid] * 3
    assert pids(daemon, blocking.stalls_by_declaration, 3) == [daemon.pid] * 3
    jobs = daemon.status()["jobs"]
    assert {name: (each["lane"], each["why"]) for name, each in jobs.items()} == {
        "stalls": ("inline", "pinned"), "stalls_by_declaration": ("inline", "declared"), "note": ("isolated", "pinned"),
    }  # fmt: skip
    assert [line for line in daemon.log if "has blocked the loop twice" in line] == []
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("pin", "why"),
    [
        ("{stals: inline}", 'no job is registered as \'stals\' (did you mean "stalls"?)'),
        ("{plain: isolated}", "plain declares isolated=False, and that is obeyed"),
    ],
)
def test_a_pin_that_pins_nothing_is_refused_by_check_and_warned_of(make: Make, pin: str, why: str) -> None:
    daemon = make(pin=pin)
    assert daemon.run("--check") == 2
    assert why in daemon.log[-1]
    daemon.start()
    assert why.split(" (")[0] in daemon.wait_log("jobs.pin").replace('\\"', '"')
    assert daemon.stop() == 0


@pytest.mark.parametrize("document", [b"\xff", b"[1]", b"3", b"", FORGOTTEN])
def test_what_is_no_promotion_promotes_nothing(document: bytes) -> None:
    assert read_promotion(document) is None


def test_what_somebody_else_wrote_harms_nobody() -> None:
    nothing = {"seconds": 0, "at": 0, "where": "", "instead": ""}
    assert read_promotion(b'{"seconds": "x", "at": [], "by": 7}') == {**nothing, "by": "7"}


def test_where_no_child_could_find_it_a_job_stays_inline() -> None:
    """One that is defined inside a function, in a program that embeds the runtime."""

    @job(name="local_job")
    def local() -> Any:
        yield

    url = "memory://promotion"
    client = Client(open_store(url))
    client.store.publish({f"{PREFIX}nobody": b'{"seconds": 1}'})
    runtime = KQueueRuntime(url)
    warned: list[str] = []
    runtime.events.subscribe(facts.Warned, lambda fact: warned.append(fact.message))

    def block(fact: Any) -> None:
        for _ in range(3):
            runtime.promotions.blocked("local_job", 1.0, "")

    runtime.events.subscribe(facts.DaemonReady, block)
    assert runtime.run(max_time_s=3, handle_signals=False) == 0
    assert len([text for text in warned if "local_job has blocked the loop twice, and cannot be run isolated" in text]) == 1
    registration = registry.get("local_job")
    assert registration is not None
    assert registration.lane == "inline"
    assert set(client.store.documents(PREFIX)) == {f"{PREFIX}nobody"}
