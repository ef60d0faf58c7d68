"""The clocks of this host, for brokers that live on it.

When a job is due is a matter of wall time, which all processes of all boots have in common, and which somebody may set. Whether a
process is alive is a matter of how long it has said nothing, and no clock that can be set may have a part in that: CLOCK_BOOTTIME
counts the seconds since the host started, those in which it slept among them, alike for every process. It means nothing after the
next start, so the boot's own id belongs to each of its moments.
"""

from __future__ import annotations

import time
from typing import Final

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # clients run where there is none, and ask no such thing


class HostClock:
    """`boot` is the id of this boot."""

    def __init__(self) -> None:
        self.boot = _boot_id()

    def wall(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def ticks(self) -> float:
        """Seconds since this boot, asleep or awake."""
        return time.clock_gettime(_CLOCK)


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


HOST: Final = HostClock()
