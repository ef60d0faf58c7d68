"""What /proc says of processes: memory, CPU, wake-ups, children. Linux only, as KQueue is."""

from __future__ import annotations

import os
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Memory(NamedTuple):
    """MiB, from smaps_rollup. PSS divides each shared page by how many share it, so it falls when other Pythons run here."""

    pss: float
    anonymous: float  # the part of PSS that is in no file: what the process itself has made
    resident: float


def memory(pid: int) -> Memory:
    fields: dict[str, int] = {}
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        for line in rollup:
            name, _, rest = line.partition(":")
            if rest.endswith("kB\n"):
                fields[name] = int(rest.split()[0])
    return Memory(fields["Pss"] / 1024, fields["Pss_Anon"] / 1024, fields["Rss"] / 1024)


def resident_mib(pid: int) -> float:
    """Cheaper than `memory`, which makes the kernel walk all page tables."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pid: int) -> float:
    """Seconds on a CPU. By schedstat (nanoseconds) where the kernel has it; utime + stime count in steps of 10 ms."""
    try:
        total_ns = 0
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as schedstat:
                total_ns += int(schedstat.read().split()[0])
        return total_ns / 1e9
    except FileNotFoundError:
        with open(f"/proc/{pid}/stat") as stat:
            utime, stime = stat.read().rpartition(")")[2].split()[11:13]
        return (int(utime) + int(stime)) / TICKS_PER_S


def cpu_below_s(pid: int) -> float:
    """Seconds on a CPU of everything below `pid`, what has ended and was waited for among it (that in steps of 10 ms)."""
    everybody = tree(pid)
    return sum(_reaped_s(each) for each in everybody) + sum(cpu_s(each) for each in everybody[1:])


def _reaped_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        user, system = stat.read().rpartition(")")[2].split()[13:15]
    return (int(user) + int(system)) / TICKS_PER_S


def wakeups(pid: int) -> int:
    """How often it went to sleep, which is how often it woke."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))


def tree(pid: int) -> list[int]:
    """`pid` and everything below it."""
    below: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                below.setdefault(int(stat.read().rpartition(")")[2].split()[1]), []).append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for parent in found:
        found += below.get(parent, [])
    return found


def busy_s() -> float:
    """Seconds that all CPUs together have been busy."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, *_ = map(int, stat.readline().split()[1:])
    return (user + nice + system + irq + softirq) / TICKS_PER_S
