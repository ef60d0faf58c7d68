"""A Redis whose memory is full: what it holds is worked off, also by a daemon that starts then, since only that makes room."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kqueue.brokers.commands.redis_durability import SETTINGS, durability
from tests.apps.inline import nap

from ..daemon import Daemon
from ..servers import RedisServer
from .conftest import RedisRig, new_job, only

rig = only(RedisRig)

JOBS = 400


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, "--appendfsync", "always").start()
    yield server
    server.stop()


@pytest.fixture
def daemon(tmp_path: Path, server: RedisServer) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, server.url, lease="3s", more="inline: {max_concurrent: 50}")
    yield daemon
    daemon.close()


def broker_notes(daemon: Daemon) -> list[tuple[str, str]]:
    found = json.loads(daemon.kqueue("doctor", "--json").stdout)
    return [(note["level"], note["what"]) for note in found if note["about"] == "broker"]


def test_a_daemon_that_is_killed_starts_again_on_a_full_redis_and_finishes_all(daemon: Daemon, server: RedisServer) -> None:
    daemon.start()
    daemon.dispatch(*(nap.job(0.2, f"w{number}") for number in range(JOBS)))
    daemon.marks.wait("end", 20)
    server.command("CONFIG", "SET", "maxmemory", 1)
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    finished = {line.split()[1] for line in daemon.marks.lines if line.startswith("end ")}
    assert len(finished) < JOBS, "or nothing is tested"
    server.command("DEL", "kq:documents", "kq:queues")

    daemon.start()
    daemon.marks.wait_for(lambda lines: len({line.split()[1] for line in lines if line.startswith("end ")}) == JOBS)
    assert sum("what this daemon tells clients" in line for line in daemon.log) == 1
    assert any(level == "error" and "its memory is full" in what for level, what in broker_notes(daemon))
    assert server.command("EXISTS", "kq:documents") == 0

    server.command("CONFIG", "SET", "maxmemory", 0)
    daemon.dispatch(nap.job(0.0, "again"))
    daemon.marks.wait_for(lambda lines: any(line.startswith("end again ") for line in lines))
    assert not any(level == "error" for level, _ in broker_notes(daemon))


def test_what_was_not_published_is_when_there_is_room(rig: RedisRig) -> None:
    rig.server.command("CONFIG", "SET", "maxmemory", 1)
    try:
        broker = rig.broker()
        rig.do(broker.publish({"manifest:q": b"1", "limits:q": b"{}"}))
        rig.do(broker.publish({"manifest:q": b"2"}))
        rig.do(broker.renew())
        assert rig.server.command("EXISTS", "kq:documents", "kq:queues") == 0
        assert rig.do(broker.documents("manifest:")) == {"manifest:q": b"2"}, "it knows what it said itself"
        assert [kind for kind, text, _ in rig.news if "OOM" in text] == ["warning"], "once, and it is no outage"
    finally:
        rig.server.command("CONFIG", "SET", "maxmemory", 0)
    rig.do(broker.renew())
    assert rig.make_client().documents("") == {"manifest:q": b"2", "limits:q": b"{}"}
    assert rig.server.command("SMEMBERS", "kq:queues") in ([b"q"], {b"q"})


def test_the_dead_are_found_on_a_full_redis_too(rig: RedisRig) -> None:
    broker, other = rig.broker(lease_s=0.4), rig.broker(lease_s=0.4)
    rig.do(broker.enqueue([new_job("a")]))
    rig.do(broker.reserve("q", {"inline": 1}))
    rig.server.command("CONFIG", "SET", "maxmemory", 1)
    try:
        for _ in range(5):
            rig.elapse(0.15)
            rig.do(other.renew())
        assert rig.do(other.sweep()).recovered == {"q": 1}
    finally:
        rig.server.command("CONFIG", "SET", "maxmemory", 0)


@pytest.mark.parametrize(
    ("used", "policy", "found"),
    [
        (89, "noeviction", []),
        (90, "noeviction", [(True, False)]),
        (99, "noeviction", [(True, False)]),
        (100, "noeviction", [(True, True)]),
    ],
)
def test_how_full_it_is_is_told(used: int, policy: str, found: list[tuple[bool, bool]]) -> None:
    nothing = [RuntimeError("NOPERM")] * len(SETTINGS)
    info = f"used_memory:{used + 7}\r\nmem_not_counted_for_evict:7\r\nmaxmemory:100\r\nmaxmemory_policy:{policy}\r\n".encode()
    assert [(finding.serious, finding.failing) for finding in durability([*nothing, b"", info])] == found
