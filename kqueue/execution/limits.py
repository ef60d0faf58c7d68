"""Limits that the kernel enforces, and the few system calls that Python lacks. For the template and its children only: ctypes
costs 1 MB, which the supervisor does not pay.
"""

from __future__ import annotations

import ctypes
import errno
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

    `max_memory` (0: none) and `memory_headroom` in MiB, above what the process has already; `max_cpu` in seconds (0: none);
    `max_files` open files; `max_file_size` in MiB (0: none). RLIMIT_RSS does nothing on Linux, and RLIMIT_AS counts address space
    that nobody touches; RLIMIT_DATA makes malloc fail, which Python turns into MemoryError. Python ignores SIGXFSZ, so that a
    write beyond RLIMIT_FSIZE is an OSError in it; a program that it starts has the signal's default, and dies of it.
    `max_processes` is the sampler's: RLIMIT_NPROC counts those of a user, and not for root.

    Raises OSError when the host's own limit is below what the template has already: nothing could run in that.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, int(limits["max_files"]))
    has = data_size()
    ceiling = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if ceiling != resource.RLIM_INFINITY and ceiling < has:
        already = f"the template has {has // MIB} MiB"
        text = f"RLIMIT_DATA of this service is {ceiling // MIB} MiB, and {already}: raise it (LimitDATA=)"
        raise OSError(errno.ENOMEM, text)
    if limits["max_memory"]:
        _lower(resource.RLIMIT_DATA, has + int((limits["max_memory"] + limits["memory_headroom"]) * MIB))
    if limits.get("max_file_size"):
        _lower(resource.RLIMIT_FSIZE, int(limits["max_file_size"] * MIB))
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
