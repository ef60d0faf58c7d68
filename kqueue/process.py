"""What the system says of a process: its memory, and the names of signals.

Reading /proc costs a few microseconds; psutil, which knows much more, costs the supervisor 4 MB.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Final

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4  # linux/prctl.h


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


def keep_memory_private() -> None:
    """Let nobody of this user look into this process or trace it, its environment included; leave no core (PR_SET_DUMPABLE).

    What is executed from here is as it was; what is merely forked is closed, too. `ctypes` could do this for twice the memory.
    """
    import _ctypes as c

    dlopen: Any = c.dlopen  # typeshed knows of no None: what is loaded already
    prctl = c.dlsym(dlopen(None, os.RTLD_NOW), "prctl")
    c.call_function(prctl, (PR_SET_DUMPABLE, 0, 0, 0, 0))
    if c.call_function(prctl, (PR_GET_DUMPABLE, 0, 0, 0, 0)) != 0:
        raise OSError("this process cannot be closed to others of its user: prctl(PR_SET_DUMPABLE) does nothing here")


class OwnStat:
    """This process's memory and the time that it waited for a CPU, for whoever looks often: the files stay open."""

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._schedstat = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # a kernel without CONFIG_SCHED_INFO
            self._schedstat = -1

    def resident_pages(self) -> int:
        return int(os.pread(self._statm, 64, 0).split(None, 2)[1])

    def waited_s(self) -> float:
        """Seconds that the main thread was ready to run and did not, since its start; 0.0 where that is not known."""
        if self._schedstat < 0:
            return 0.0
        try:
            return int(os.pread(self._schedstat, 96, 0).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0

    def close(self) -> None:
        os.close(self._statm)
        if self._schedstat >= 0:
            os.close(self._schedstat)
