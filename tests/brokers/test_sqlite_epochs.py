"""Who is alive, by a file that outlives every boot, with two clocks that a test can move, and with garbage in it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kqueue.brokers.base import SETTLED, Counters, Settlement
from kqueue.brokers.commands.host_clock import HOST
from kqueue.brokers.sqlite import SQLiteBroker

from .conftest import SQLiteRig, new_job, only
from .test_sqlite_others import ANYTHING

rig = only(SQLiteRig)


def lease(rig: SQLiteRig, broker: Any) -> Any:
    rig.do(broker.enqueue([new_job()]))
    (lease,) = rig.do(broker.reserve("q", {"inline": 1})).leases
    return lease


def test_the_host_s_clocks_are_what_they_say() -> None:
    assert HOST.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    before, since_boot = time.clock_gettime(time.CLOCK_BOOTTIME), HOST.ticks()
    assert before <= since_boot <= time.clock_gettime(time.CLOCK_BOOTTIME)
    before, wall = time.time(), HOST.wall()
    assert before <= wall <= time.time()
    assert SQLiteBroker("/nowhere/q.db")._file._clock is HOST


@pytest.mark.parametrize("ticks", [1.0, 5_001.0, 1e6])
def test_whoever_lived_in_another_boot_is_dead_at_once(rig: SQLiteRig, ticks: float) -> None:
    """Whatever the time since the new boot is; and there is nobody who would have to be given time."""
    one = rig.broker(lease_s=1000)
    old = lease(rig, one)
    rig.clock.boot, rig.ticks = "the-next-boot", ticks
    two = rig.broker()
    assert rig.do(two.sweep()).recovered == {"q": 1}
    assert rig.do(two.settle([Settlement(old.token, "q", "hold")])) == [SETTLED], "its token is good all the same"
    assert rig.do(two.sweep()).recovered == {"q": 1}, "nobody alive holds it"


def test_a_host_that_slept_gives_everybody_the_time_to_renew(rig: SQLiteRig) -> None:
    """CLOCK_BOOTTIME goes on meanwhile. Each epoch gets its own lease, whose ever it is who wakes first."""
    short, long = rig.broker(lease_s=3), rig.broker(lease_s=15)
    held = lease(rig, long)
    rig.elapse(8 * 3600)
    assert rig.do(short.renew()) is False, "which is told, so that it asks for its leases"
    assert rig.do(short.sweep()).recovered == {}
    for _ in range(14):
        rig.elapse(1)
        rig.do(short.renew())
        assert rig.do(short.sweep()).recovered == {}
    rig.elapse(1)
    rig.do(short.renew())
    assert rig.do(short.sweep()).recovered == {"q": 1}
    assert rig.do(long.settle([Settlement(held.token, "q", "hold")])) == [SETTLED]


def test_a_neighbour_that_keeps_time_lets_nobody_off(rig: SQLiteRig) -> None:
    """SIGSTOP of one daemon of two: the other one renews and sweeps as ever."""
    stopped, other = rig.broker(lease_s=15), rig.broker(lease_s=15)
    lease(rig, stopped)
    recovered = []
    for _ in range(4):
        rig.elapse(5)
        rig.do(other.renew())
        recovered.append(rig.do(other.sweep()).recovered)
    assert recovered == [{}, {}, {"q": 1}, {}]


@pytest.mark.parametrize("column", ["identity", "expires_at", "boot", "lapses_at", "lease_s", "lapsed"])
@pytest.mark.parametrize("garbage", ANYTHING)
def test_garbage_about_an_epoch_keeps_no_job_for_ever(rig: SQLiteRig, column: str, garbage: Any) -> None:
    gone, broker = rig.broker(), rig.broker()
    held = lease(rig, gone)
    rig.sql(f"UPDATE kq_epoch SET {column} = ? WHERE epoch = ?", garbage, held.token.epoch)
    recovered = rig.do(broker.sweep()).recovered
    for _ in range(5):
        rig.elapse(5)
        rig.do(broker.renew())
        recovered |= rig.do(broker.sweep()).recovered
    assert recovered == {"q": 1}
    rig.sql(f"UPDATE kq_epoch SET {column} = ?", garbage)
    (again,) = rig.do(broker.reserve("q", {"inline": 1})).leases
    assert again.counters == Counters(recoveries=1)
    rig.do(broker.renew())
    assert rig.do(broker.sweep()).recovered == {}
    assert rig.do(broker.settle([Settlement(again.token, "q", "ack")])) == [SETTLED]


@pytest.mark.parametrize("garbage", [*ANYTHING, "nan this-boot", "inf this-boot", "-1e999 this-boot", "5 this-boot x"])
def test_garbage_about_the_last_beat_breaks_nothing(rig: SQLiteRig, garbage: Any) -> None:
    one, two = rig.broker(lease_s=15), rig.broker(lease_s=15)
    lease(rig, one)
    rig.sql("INSERT OR REPLACE INTO kq_meta (key, value) VALUES ('beat', ?)", garbage)
    rig.do(two.sweep())
    recovered = {}
    for _ in range(8):
        rig.elapse(5)
        rig.do(two.renew())
        recovered |= rig.do(two.sweep()).recovered
    assert recovered == {"q": 1}
