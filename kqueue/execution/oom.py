"""Who sent a SIGKILL that we did not: the kernel's OOM killer, which only counts whom it killed, or somebody else.

The kernel tells nobody whom it killed but its own log. What it counts is `oom_kill`: in memory.events of our cgroup, where there
is a cgroup v2 with the memory controller, which has those of us and our children alone; else in /proc/vmstat, which has those of
the whole host. So it is evidence, not proof: a job that somebody else killed while the OOM killer took another process reads as
the OOM killer's. Of two jobs that died so while one kill was counted, one does. Where each job has a cgroup with the memory
controller of its own, that one's count is proof.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from ..process import PAGE
from .cgroup import KERNEL_MIB, Seen

NOTHING_SEEN: Final = Seen()
VMSTAT: Final = "/proc/vmstat"
_RARITY_S: Final = 0.2  # a look is good for so long


class Mark(NamedTuple):
    """How things stood when a job began."""

    kills: int
    claimed: int


class OomKills:
    """The kernel's count, and how much of it is accounted for by jobs of ours."""

    def __init__(self, events: str | None = None, vmstat: str = VMSTAT) -> None:
        self._events = _own_events() if events is None else events  # "": there is none
        self._vmstat = vmstat
        self._kills = -1  # -1: it cannot be read
        self._claimed = 0
        self._looked_at: float | None = None
        self.shared_memory = 0  # bytes of the host's, in files in memory and shared mappings

    def look(self, now: float) -> None:
        """Read the count anew, unless that was done just now."""
        if self._looked_at is not None and now - self._looked_at < _RARITY_S:
            return
        self._looked_at = now
        kills, shared_pages = _numbers(self._vmstat, (b"oom_kill", b"nr_shmem"))
        self.shared_memory = max(0, shared_pages) * PAGE
        self._kills = _numbers(self._events, (b"oom_kill",))[0] if self._events else kills

    def mark(self) -> Mark:
        return Mark(self._kills, self._claimed)

    def killer(self, mark: Mark, seen: Seen = NOTHING_SEEN) -> tuple[str, str]:
        """Who sent a SIGKILL to a job that began at `mark`: ("kernel" or "operator", the evidence).

        `seen`: what was counted in its own cgroup, if anything was.
        """
        if seen.oom_kills >= 0:
            self._claimed += seen.oom_kills
            return _by_its_cgroup(seen)
        self._looked_at = None
        self.look(0.0)
        where = f"oom_kill of {self._events or self._vmstat}"
        new = self._kills - mark.kills
        if mark.kills < 0 or self._kills < 0:
            return "operator", f"KQueue did not send it; the kernel's OOM killer may have: {where} cannot be read"
        if new - (self._claimed - mark.claimed) > 0:
            self._claimed += 1
            return "kernel", f"by the kernel's OOM killer, for {where} rose from {mark.kills} to {self._kills} while it ran"
        nor = f"nor did the kernel's OOM killer ({where} is {self._kills})"
        return "operator", f"killed by somebody else: KQueue did not send it, {nor}"


def _by_its_cgroup(seen: Seen) -> tuple[str, str]:
    if not seen.oom_kills:
        nor = "nor did the kernel's OOM killer (oom_kill of its cgroup did not rise)"
        return "operator", f"killed by somebody else: KQueue did not send it, {nor}"
    counted = f"oom_kill of its cgroup rose by {seen.oom_kills}"
    if not seen.over_limit or not seen.memory_max_mib:
        return "kernel", f"by the kernel's OOM killer, since the host or the service had no memory left: {counted}"
    limits = f"its max_memory, isolated.memory_headroom and {KERNEL_MIB} MiB for the kernel"
    return "kernel", f"by the kernel's OOM killer: over {seen.memory_max_mib} MiB, {limits}; {counted}"


def _numbers(path: str, names: tuple[bytes, ...]) -> list[int]:
    """What stands behind `names` in a file of lines such as "oom_kill 0"; -1: nothing."""
    try:
        with open(path, "rb", buffering=0) as file:
            text = b"\n" + file.read(65536)
    except OSError:
        return [-1] * len(names)
    return [_number(text, name) for name in names]


def _number(text: bytes, name: bytes) -> int:
    begin = text.find(b"\n" + name + b" ")
    if begin < 0:
        return -1
    value = text[begin + len(name) + 2 : begin + len(name) + 24].split(b"\n", 1)[0]
    return int(value) if value.isdigit() else -1


def _own_events() -> str:
    """memory.events of our own cgroup v2; "" where there is none: no memory controller, or the root of all."""
    try:
        with open("/proc/self/cgroup") as file:
            for line in file:
                if line.startswith("0::"):
                    path = f"/sys/fs/cgroup{line[3:].strip().rstrip('/')}/memory.events"
                    return path if os.access(path, os.R_OK) else ""
    except OSError:
        pass
    return ""
