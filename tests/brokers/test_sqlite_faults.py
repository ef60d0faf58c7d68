"""SQLite on a disk that is full, read-only or damaged: what is said, and that nothing is lost."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kqueue.brokers.base import SETTLED, Owner, Settlement
from kqueue.brokers.sqlite import SQLiteBroker
from kqueue.client.sqlite import SQLiteClient
from kqueue.errors import BrokerRefused, BrokerUnavailable
from kqueue.kernel import Kernel, VirtualClock, join

from .conftest import SQLiteRig, new_job


class Disk:
    """A file system of its own, of `size` KiB."""

    def __init__(self, folder: Path, size: int, options: str = "") -> None:
        self.folder = folder
        self.filler = folder / "filler"
        folder.mkdir()
        mounted = self._run("mount", "-t", "tmpfs", "-o", f"size={size}k{options}", "tmpfs", str(folder))
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")

    def fill(self) -> None:
        with open(self.filler, "ab", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    pass

    def free(self) -> None:
        self.filler.unlink()

    def remount(self, how: str) -> None:
        self._run("mount", "-o", f"remount,{how}", str(self.folder)).check_returncode()

    def unmount(self) -> None:
        self._run("umount", "--lazy", str(self.folder))

    @staticmethod
    def _run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disks: list[Disk] = []

    def make(size: int = 1024, options: str = "") -> Disk:
        disks.append(Disk(tmp_path / f"disk{len(disks)}", size, options))
        return disks[-1]

    yield make
    for disk in disks:
        disk.unmount()


@pytest.fixture
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SQLiteRig]:
    rig = SQLiteRig(tmp_path, request)
    rig.kernel = Kernel(clock=VirtualClock())  # so that nobody waits for the next try
    yield rig
    rig.close()


def telling(broker: Any, then: Callable[[int], None]) -> list[str]:
    """What `broker` tells from now on. After each "lost" there is `then(how many there were)`."""
    told: list[str] = []

    def tell(kind: str, text: str, retry_in_s: float) -> None:
        told.append(f"{kind}: {text}")
        if kind == "lost":
            assert retry_in_s > 0
            then(len(told))

    broker._on_event = tell
    return told


def held(rig: SQLiteRig, broker: Any) -> list[Any]:
    rig.do(broker.enqueue([new_job("a", at=1.0), new_job("b", at=2.0)]))
    leases: list[Any] = rig.do(broker.reserve("q", {"inline": 1})).leases
    return leases


def work_on(rig: SQLiteRig, broker: Any, lease: Any) -> None:
    """Settle and enqueue in one turn, and see that both are done when the disk lets them."""
    big = new_job("big", at=3.0, envelope=b"x" * 50_000)

    def main() -> Iterator[Any]:
        tasks = [
            rig.kernel.spawn(broker.settle([Settlement(lease.token, "q", "ack")])),
            rig.kernel.spawn(broker.enqueue([big])),
        ]
        answers = []
        for task in tasks:
            answers.append((yield join(task)))
        return answers

    assert rig.do(main()) == [[SETTLED], [True]]
    assert [each.token.id for each in rig.do(broker.reserve("q", {"inline": 9})).leases] == ["b", "big"]
    assert rig.sql("PRAGMA integrity_check") == [("ok",)]


def test_a_daemon_waits_for_a_full_disk_and_then_goes_on(rig: SQLiteRig, make_disk: Callable[..., Disk]) -> None:
    disk = make_disk()
    rig.path = str(disk.folder / "kqueue.db")
    broker = rig.broker()
    (lease,) = held(rig, broker)
    disk.fill()
    told = telling(broker, lambda times: disk.free() if times == 3 else None)
    work_on(rig, broker, lease)
    assert told == ["lost: database or disk is full; nothing is lost: free space on its disk"] * 3 + ["back: "]


def test_a_daemon_starts_on_a_full_disk_when_there_is_space_again(rig: SQLiteRig, make_disk: Callable[..., Disk]) -> None:
    """Whether the file itself, what stands in it or the log beside it does not fit."""
    for size, options in ((1024, ""), (1024, ",nr_inodes=2"), (1024, ",nr_inodes=3"), (1024, ",nr_inodes=4"), (32, "")):
        disk = make_disk(size, options)
        disk.fill()
        broker = SQLiteBroker(str(disk.folder / "kqueue.db"))
        told = telling(broker, lambda times, disk=disk: (disk.free(), disk.remount("size=1m,nr_inodes=99")))  # type: ignore[misc]
        assert rig.do(broker.open(Owner("e", ""), ["q"], 15)) == ({}, [])
        lost, back = told
        assert lost.endswith("nothing is lost: free space on its disk")
        assert back == "back: "
        rig.do(broker.close())


def test_a_client_says_that_the_disk_is_full(make_disk: Callable[..., Disk]) -> None:
    disk = make_disk()
    with closing(SQLiteClient(str(disk.folder / "kqueue.db"))) as client:
        client.enqueue([new_job("a")])
        disk.fill()
        said = f"{client.address}: database or disk is full; nothing was changed: free space on its disk, then try again"
        for n in range(3):
            with pytest.raises(BrokerUnavailable, match=f"^{re.escape(said)}$"):
                client.enqueue([new_job(f"b{n}", envelope=b"x" * 50_000)])
        assert [row.id for row in client.list(None, None, 9)] == ["a"], "who only looks needs no space"
        disk.free()
        assert client.enqueue([new_job("c")]) == [True]
        assert {row.id for row in client.list(None, None, 9)} == {"a", "c"}


def test_a_file_that_becomes_read_only_is_waited_for(rig: SQLiteRig) -> None:
    broker = rig.broker()
    (lease,) = held(rig, broker)
    db = broker._file._db
    db.execute("PRAGMA query_only = 1")  # as SQLite says when the disk failed and the kernel made it read-only
    told = telling(broker, lambda times: db.execute("PRAGMA query_only = 0") if times == 2 else None)
    work_on(rig, broker, lease)
    step = "make the file, those beside it and their directory writable again (mode, owner, mount)"
    assert told == [f"lost: attempt to write a readonly database; nothing is lost: {step}"] * 2 + ["back: "]


def test_a_file_on_a_read_only_disk_is_refused(rig: SQLiteRig, make_disk: Callable[..., Disk]) -> None:
    disk = make_disk()
    rig.path = str(disk.folder / "kqueue.db")
    broker = rig.broker()
    (lease,) = held(rig, broker)
    broker._file.close()  # an open file keeps a file system from becoming read-only
    disk.remount("ro")
    for path, said in (
        (rig.path, "its file system is mounted read-only; mount it for writing"),
        (str(disk.folder / "new.db"), "Read-only file system; make .* may write"),
    ):
        with pytest.raises(BrokerRefused, match=f"{path}: {said}"):
            SQLiteClient(path).enqueue([new_job()])
    disk.remount("rw")
    work_on(rig, broker, lease)


def test_a_file_that_is_damaged_while_it_is_open_stops_the_daemon_with_the_next_step(rig: SQLiteRig) -> None:
    broker = rig.broker()
    rig.do(broker.enqueue([new_job(envelope=b"x" * 2000) for _ in range(400)]))
    broker._file._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    broker._file.close()
    with open(rig.path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(os.path.getsize(rig.path) - 4096))
    said = f"cannot use the database {rig.path}: database disk image is malformed; stop whatever uses it, save what is left by "
    for look in (lambda: rig.do(broker.reserve("q", {"inline": 5})), rig.make_client().stats):
        with pytest.raises(BrokerRefused, match=re.escape(said)) as refused:
            look()
        assert refused.value.exit_code == 4
