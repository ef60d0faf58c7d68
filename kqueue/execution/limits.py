"""Limits that the kernel enforces, and the few system calls that Python lacks. For the template and its children only: ctypes
costs 1 MB, which the supervisor does not pay.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping
from typing import Final

MIB: Final = 1024 * 1024
PAGE: Final = os.sysconf("SC_PAGE_SIZE")
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38
OOM_SCORE_ADJ: Final = 500  # a job goes before the supervisor, which has 0

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def prctl(option: int, value: int) -> None:
    """prctl(2). Raises OSError."""
    if _prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")


def data_size() -> int:
    """Bytes of data and stack of this process: what RLIMIT_DATA counts (proc_pid_statm(5), field 6)."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[5]) * PAGE


def apply(limits: Mapping[str, float]) -> None:
    """Put the limits of a job on this process.

    `max_memory` and `memory_headroom` in MiB, above what the process has already; `max_cpu` in seconds (0: none); `max_files`
    open files. RLIMIT_RSS does nothing on Linux, and RLIMIT_AS counts address space that nobody touches; RLIMIT_DATA makes
    malloc fail, which Python turns into MemoryError.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, int(limits["max_files"]))
    data = data_size() + int((limits["max_memory"] + limits["memory_headroom"]) * MIB)
    _lower(resource.RLIMIT_DATA, data)
    if limits.get("max_cpu"):
        seconds = max(1, int(limits["max_cpu"]))
        _lower(resource.RLIMIT_CPU, seconds, seconds + 1)  # SIGXCPU, and SIGKILL a second later


def _lower(which: int, soft: int, hard: int | None = None) -> None:
    """Never above the hard limit there is: raising it needs a privilege, and an operator's ulimit is to be obeyed."""
    ceiling = resource.getrlimit(which)[1]
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(which, (soft, hard))


def yield_to_the_oom_killer() -> None:
    """Let the kernel's OOM killer take this process before the supervisor. Not permitted everywhere, never needed."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(OOM_SCORE_ADJ))
    except OSError:
        pass
