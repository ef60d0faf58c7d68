"""`kqueue doctor`: each thing that is wrong is found and told with the next step, and the worst of them is the exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest

from kqueue import disk
from kqueue.cli.doctor import CHECKS
from kqueue.client import sqlite_health
from tests.cli_home import Ended, Home
from tests.daemon import Daemon
from tests.servers import RedisServer


def notes(ended: Ended, about: str) -> list[tuple[str, str]]:
    """Level and text of what was found."""
    found = []
    for note in json.loads(ended.out):
        assert list(note) == ["level", "about", "what", "do"]
        if note["about"] == about:
            found.append((note["level"], f"{note['what']}: {note['do']}" if note["do"] else note["what"]))
    return found


def doctor(home: Home) -> Ended:
    ended = home.kqueue("doctor", "--json")
    assert ended.err == ""
    worst = max(["ok", "warn", "error"].index(note["level"]) for note in json.loads(ended.out))
    assert ended.code == worst
    return ended


def only(ended: Ended, about: str) -> tuple[str, str]:
    (found,) = notes(ended, about)
    return found


def test_a_queue_that_nobody_used_is_well_and_is_not_created_by_looking(sqlite_home: Home) -> None:
    ended = doctor(sqlite_home)
    assert ended.code == 0
    assert [note["about"] for note in json.loads(ended.out)] == [
        "versions", "configuration", "memory", "isolation", "state_dir", "daemon", "broker", "signing",
    ]  # fmt: skip
    assert "is not there yet" in only(ended, "broker")[1]
    assert "can be made" in only(ended, "state_dir")[1]
    assert [path.name for path in sqlite_home.directory.iterdir()] == ["kqueue.yaml"]


def test_people_get_a_line_each_and_the_next_step_below(home: Home) -> None:
    home.bury(3)
    page = home.kqueue("doctor")
    lines = page.out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("warn   queues "))
    assert "3 dead letters are in 'default'" in lines[at]
    assert lines[at + 1].split()[:2] == ["→", "kqueue"]
    assert page.code >= 1


def test_the_broker_says_what_it_is_and_how_it_keeps_jobs(home: Home) -> None:
    home.dispatch("greet")
    (level, text), *_ = notes(doctor(home), "broker")
    assert level == "ok"
    if home.url.startswith("sqlite"):
        assert f"SQLite {sqlite3.sqlite_version}, schema " in text
        assert "journal_mode WAL, synchronous FULL" in text
    else:
        assert "answers: Redis " in text or "answers: Valkey " in text


def test_a_redis_that_keeps_nothing_or_forgets_is_a_warning(make_home: Any, tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--appendonly", "no", "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru").start()
    try:
        ended = doctor(make_home(server.url))
        warnings = [text for level, text in notes(ended, "broker") if level == "warn"]
        assert any("it keeps nothing on disk" in text and 'write "appendonly yes"' in text for text in warnings)
        assert any("maxmemory-policy is allkeys-lru" in text for text in warnings)
        assert ended.code == 1
    finally:
        server.stop()


def test_a_redis_that_tells_nothing_is_still_examined(make_home: Any, tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    try:
        rights = ("~kq:*", "&kq:*", "+@read", "+@write", "+@scripting", "+@connection", "+@pubsub", "+time", "-info", "-config")
        server.command("ACL", "SETUSER", "little", "on", ">secret", *rights)
        ended = doctor(make_home(server.url_for("little", "secret")))
        assert "a version it does not tell" in notes(ended, "broker")[0][1]
        assert "secret" not in ended.out
        assert ended.code == 0
    finally:
        server.stop()


def test_a_redis_kept_as_it_should_be_is_well(make_home: Any, tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always").start()
    try:
        ended = doctor(make_home(server.url))
        assert [level for level, _ in notes(ended, "broker")] == ["ok"]
        assert ended.code == 0
    finally:
        server.stop()


@pytest.mark.parametrize(("url", "words"), [("redis://127.0.0.1:1/0", "Connection refused"), ("memory://", "no other process")])
def test_a_broker_that_cannot_be_reached_is_an_error_and_the_rest_is_examined(make_home: Any, url: str, words: str) -> None:
    ended = doctor(make_home(url))
    level, text = only(ended, "broker")
    assert level == "error"
    assert words in text
    assert notes(ended, "signing")
    assert ended.code == 2


def test_a_configuration_that_is_wrong_is_said_once_with_its_line(sqlite_home: Home) -> None:
    (sqlite_home.directory / "kqueue.yaml").write_text("queue: {}\nleese: 5\n")
    ended = doctor(sqlite_home)
    assert ended.code == 2
    assert only(ended, "configuration")[1].startswith('kqueue.yaml:2: unknown setting "leese"')
    assert ended.out.count("leese") == 1


def test_only_a_url_is_a_warning(sqlite_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    (sqlite_home.directory / "kqueue.yaml").unlink()
    monkeypatch.setenv("KQUEUE_URL", sqlite_home.url)
    ended = doctor(sqlite_home)
    assert "there is only $KQUEUE_URL" in only(ended, "configuration")[1]
    assert ended.code == 1


def test_jobs_that_nobody_reads_are_found(home: Home) -> None:
    home.dispatch("greet", "--queue", "nobodys")
    home.dispatch("greet", "--queue", "mail")
    level, text = notes(doctor(home), "queues")[0]
    assert level == "warn"
    assert text.startswith("1 jobs wait in 'nobodys', which no daemon has ever read: ")
    assert "'mail'" not in text


# -- disks and files --------------------------------------------------------------------------------------------------------

MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
35 21 0:40 / /mnt/with\\040space rw shared:2 master:1 - nfs4 server:/x rw
36 21 0:41 / /run rw - tmpfs tmpfs rw
37 36 0:42 / /run rw - overlay overlay rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "ext4"), ("/mnt/with space", "nfs4"), ("/mnt/with space/a/b", "nfs4"), ("/mnt/wit", "ext4"), ("/run/x", "overlay")],
)
def test_the_kind_of_a_file_system(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "nearest_directory", lambda path: path)
    assert disk.file_system(path, MOUNTS) == kind


def test_what_is_not_there_is_where_it_would_be_made(tmp_path: Path) -> None:
    assert disk.nearest_directory(str(tmp_path / "a/b")) == str(tmp_path)
    assert disk.file_system("/proc/self/fdinfo") == "proc"
    left, share = disk.free(str(tmp_path / "a/b"))
    assert left > 0
    assert 0 < share <= 1


@pytest.mark.parametrize(("kind", "level"), [("nfs4", "error"), ("tmpfs", "warn"), ("", "ok"), ("ext4", "ok")])
def test_state_that_is_not_on_a_local_disk(sqlite_home: Home, monkeypatch: pytest.MonkeyPatch, kind: str, level: str) -> None:
    monkeypatch.setattr("kqueue.disk.file_system", lambda path: kind)
    found, text = only(doctor(sqlite_home), "state_dir")
    assert found == level
    assert kind in text


def test_state_that_cannot_be_kept(sqlite_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    (sqlite_home.directory / "state").write_text("")
    with (sqlite_home.directory / "kqueue.yaml").open("a") as config:
        config.write("state_dir: state\n")
    level, text = only(doctor(sqlite_home), "state_dir")
    assert (level, "is no directory" in text) == ("error", True)
    (sqlite_home.directory / "state").unlink()
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith(str(sqlite_home.directory)))
    level, text = only(doctor(sqlite_home), "state_dir")
    assert (level, "this user may not write" in text) == ("error", True)


@pytest.mark.parametrize(
    ("mode", "words"),
    [(0o600, None), (0o660, None), (0o664, "anybody on this host may read it"), (0o602, "anybody on this host may write")],
)
def test_a_database_that_is_open_to_all_is_a_warning(sqlite_home: Home, mode: int, words: str | None) -> None:
    sqlite_home.dispatch("greet")
    path = Path(sqlite_home.url.removeprefix("sqlite:///"))
    path.chmod(mode)
    warnings = [text for level, text in notes(doctor(sqlite_home), "broker") if level == "warn"]
    assert len(warnings) == (words is not None)
    assert all(words is not None and words in text and "chmod o-rwx" in text for text in warnings)
    assert stat.S_IMODE(path.stat().st_mode) == mode, "it looks, and changes nothing"


@pytest.mark.parametrize(
    ("left", "share", "level"), [(1 << 40, 0.5, None), (1 << 40, 0.01, "ok"), (50 << 20, 0.5, "warn"), (0, 0.0, "warn")]
)
def test_a_disk_that_fills_up(
    sqlite_home: Home, monkeypatch: pytest.MonkeyPatch, left: int, share: float, level: str | None
) -> None:
    monkeypatch.setattr(sqlite_health, "free", lambda path: (left, share))
    _, *others = notes(doctor(sqlite_home), "broker")
    assert [found for found, _ in others] == ([] if level is None else [level])
    assert all("make room" in text for _, text in others)


def test_a_log_that_cannot_be_cut_is_told(sqlite_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    sqlite_home.dispatch("greet")
    monkeypatch.setattr(sqlite_health, "LARGE_LOG", 0)
    with contextlib.closing(sqlite3.connect(sqlite_home.url.removeprefix("sqlite:///"), isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM kq_job").fetchall()
        sqlite_home.dispatch("greet")
        assert any("somebody keeps a transaction open" in text for _, text in notes(doctor(sqlite_home), "broker"))


# -- signing, daemons -------------------------------------------------------------------------------------------------------


def test_the_signing_key_is_looked_at(sqlite_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    level, text = only(doctor(sqlite_home), "signing")
    assert (level, text.startswith("jobs are not signed: ")) == ("ok", True)
    key = sqlite_home.directory / "key"
    with (sqlite_home.directory / "kqueue.yaml").open("a") as config:
        config.write("security: {signing_key_file: key}\n")
    level, text = only(doctor(sqlite_home), "signing")
    assert (level, "cannot be read" in text) == ("error", True)
    key.write_text("a" * 64 + "\n" + "b" * 64 + "\n")
    key.chmod(0o600)
    level, text = only(doctor(sqlite_home), "signing")
    assert (level, "; 1 more are accepted" in text) == ("ok", True)
    assert "a" * 64 not in text
    key.chmod(0o644)
    assert [level for level, _ in notes(doctor(sqlite_home), "signing")] == ["ok", "warn"]
    monkeypatch.setenv("KQUEUE_SIGNING_KEY_FILE", str(sqlite_home.directory / "gone"))
    assert "gone cannot be read" in only(doctor(sqlite_home), "signing")[1]


def test_a_daemon_that_runs_is_known(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, f"sqlite:///{tmp_path}/q.db").start()
    try:
        found = json.loads(daemon.kqueue("doctor", "--json").stdout)
        (note,) = [note for note in found if note["about"] == "daemon"]
        assert note["what"].startswith(f"pid {daemon.pid} runs as instance 'test' on {os.uname().nodename}, and is running")
    finally:
        daemon.close()


def test_every_check_is_a_line_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs/operating.md").read_text()
    for check in CHECKS:
        assert f"| {check.__name__.strip('_')} |" in page


def test_a_daemon_that_does_not_get_past_its_start_is_named(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    server.command("REPLICAOF", "127.0.0.1", 1)
    daemon = Daemon(tmp_path, server.url)
    try:
        daemon.start(wait=False)
        daemon.wait_log("READONLY")
        found = [note for note in json.loads(daemon.kqueue("doctor", "--json").stdout) if note["about"] == "daemon"]
        assert [note["level"] for note in found] == ["warn"]
        assert "has been starting for" in found[0]["what"]
        assert f"pid {daemon.pid} " in found[0]["what"]
        assert "its log says" in found[0]["do"]
    finally:
        daemon.close()
        server.stop()
