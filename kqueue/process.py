"""What the system says of a process: its memory, and the names of signals.

Reading /proc costs a few microseconds; psutil, which knows much more, costs the supervisor 4 MB.
"""

from __future__ import annotations

import os
import signal
from typing import Final

PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def signal_name(number: int) -> str:
    """"SIGKILL"; of the real-time signals between the first and the last, which have no names, "SIG40"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def resident_mib(pid: int | str = "self") -> float:
    """Resident memory in MiB (proc_pid_statm(5), field 2); 0.0 when there is no such process."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * PAGE / 1048576
    except (OSError, IndexError):
        return 0.0
