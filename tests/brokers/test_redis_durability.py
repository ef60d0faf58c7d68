"""What people are told of a Redis that would lose jobs: at the daemon's start, and by `Store.health`. On real servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kqueue.brokers.commands.redis_durability import QUESTIONS, SETTINGS, durability
from kqueue.client.redis import RedisClient

from ..servers import RedisServer
from .conftest import RedisRig, only

rig = only(RedisRig)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """One that keeps nothing."""
    server = RedisServer(tmp_path, "--appendonly", "no").start()
    yield server
    server.stop()


def warnings(rig: RedisRig, url: str) -> list[str]:
    """What a daemon that starts there says."""
    rig.url, rig.news[:] = url, []
    rig.broker()
    return [text for kind, text, _ in rig.news if kind == "warning"]


def health(rig: RedisRig, url: str) -> list[tuple[bool, str]]:
    rig.clients.append(RedisClient(url))
    return [(finding.serious, finding.text) for finding in rig.clients[-1].health()]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "it keeps nothing on disk, so when it is killed or restarted every job that waits or runs then is lost"),
        ({"save": "3600 1 60 1000"}, "what was dispatched, started or finished since its last snapshot (3600 1 60 1000) is lost"),
        ({"appendonly": "yes", "appendfsync": "no"}, "half a minute of jobs can be lost"),
        ({"appendonly": "yes", "maxmemory": "99mb", "maxmemory-policy": "allkeys-lru"}, "so when its memory is full"),
        ({"appendonly": "yes", "maxmemory": "99mb", "maxmemory-policy": "volatile-ttl"}, "a lost reply can make a job run twice"),
    ],
)
def test_a_redis_that_would_lose_jobs_is_told_of_when_the_daemon_starts(
    rig: RedisRig, server: RedisServer, settings: dict[str, str], said: str
) -> None:
    for name, value in settings.items():
        server.command("CONFIG", "SET", name, value)
    (warning,) = warnings(rig, server.url)
    assert warning.startswith(f"{server.url}: ")
    assert said in warning
    assert "redis.conf" in warning, "and the line that mends it"
    serious = [finding for finding in health(rig, server.url) if finding[0]]
    assert serious == [(True, warning.removeprefix(f"{server.url}: "))], "doctor shows the same sentence"


def test_one_that_keeps_all_is_not_spoken_of(rig: RedisRig, server: RedisServer) -> None:
    server.command("CONFIG", "SET", "appendonly", "yes")
    server.command("CONFIG", "SET", "appendfsync", "always")
    assert warnings(rig, server.url) == []
    assert health(rig, server.url) == []


def test_what_is_a_matter_of_taste_is_for_the_doctor_only(rig: RedisRig, server: RedisServer) -> None:
    server.command("CONFIG", "SET", "appendonly", "yes")
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert warnings(rig, server.url) == []
    assert [serious for serious, _ in health(rig, server.url)] == [False, False]


def test_it_is_said_once_however_often_the_connection_comes_back(rig: RedisRig, server: RedisServer) -> None:
    assert len(warnings(rig, server.url)) == 1
    for _ in range(3):
        rig.news.clear()
        server.command("CLIENT", "KILL", "TYPE", "PUBSUB")
        rig.until(lambda: ("back", "", 0.0) in rig.news)
        assert [kind for kind, _, _ in rig.news] == ["lost", "back"]


@pytest.mark.parametrize(
    ("rights", "found"),
    [
        (["+config|get"], ["it keeps nothing on disk", "allkeys-lru"]),
        (["+info"], ["it keeps no append-only file", "allkeys-lru"]),  # INFO does not say whether there are snapshots
        ([], []),
    ],
)
def test_it_says_what_it_may_know(rig: RedisRig, server: RedisServer, rights: list[str], found: list[str]) -> None:
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    plain = ["+@read", "+@write", "+@scripting", "+@connection", "+@pubsub", "+time"]
    server.command("ACL", "SETUSER", "worker", "on", ">right", "~kq:*", "&kq:*", *plain, *rights)
    url = server.url_for("worker", "right")
    said = warnings(rig, url)
    assert len(said) == len(found) == len(health(rig, url))
    assert all(words in text for words, text in zip(found, said, strict=True))
    assert not any("right" in text for text in said), "nor is a secret told"


def test_a_disk_that_refused_the_last_write_is_told_of() -> None:
    answers = [RuntimeError("NOPERM")] * len(SETTINGS)
    info = b"# Persistence\r\naof_enabled:1\r\naof_last_write_status:err\r\nrdb_last_bgsave_status:err\r\n"
    texts = [finding.text for finding in durability([*answers, info, b""])]
    assert len(texts) == 2
    assert "append-only file" in texts[0]
    assert "snapshot" in texts[1]


def test_garbage_for_answers_says_nothing() -> None:
    for garbage in (None, 7, b"", [], [b"x"], {}, "x", RuntimeError("ERR")):
        assert durability([garbage] * len(QUESTIONS)) == []
