"""Limits that the kernel enforces, and the few system calls that Python lacks. For the template and its children only: ctypes
costs 1 MB, which the supervisor does not pay.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import time
from collections.abc import Mapping
from math import ceil
from typing import Any, Final

MIB: Final = 1024 * 1024
PAGE: Final = os.sysconf("SC_PAGE_SIZE")
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
PR_SET_DUMPABLE: Final = 4
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37
PR_SET_NO_NEW_PRIVS: Final = 38
OOM_SCORE_ADJ: Final = 500  # a job goes before the supervisor, which has 0

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl
_fflush = _libc.fflush


def prctl(option: int, value: int) -> None:
    """prctl(2). Raises OSError."""
    if _prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise _error(f"prctl({option}, {value})")


def is_subreaper() -> bool:
    """Whether orphans among the descendants of this process become its children."""
    answer = ctypes.c_int()
    prctl(PR_GET_CHILD_SUBREAPER, ctypes.addressof(answer))
    return answer.value != 0


def unshare(flags: int) -> None:
    """unshare(2), which os has from Python 3.12 on. Raises OSError."""
    if _libc.unshare(flags) != 0:
        raise _error("unshare")


def setns(fd: int, kind: int) -> None:
    """setns(2), as `unshare`."""
    if _libc.setns(fd, kind) != 0:
        raise _error("setns")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2). Raises OSError."""
    encoded = (source.encode(), target.encode(), None if kind is None else kind.encode())
    if _libc.mount(*encoded, ctypes.c_ulong(flags), data.encode()) != 0:
        raise _error(f"mount on {target}")


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def data_size() -> int:
    """Bytes of data and stack of this process: what RLIMIT_DATA counts (proc_pid_statm(5), field 6)."""
    return statm()[1]


def apply(limits: Mapping[str, float]) -> None:
    """Put the limits of a job on this process.

    `max_memory` (0: none) and `memory_headroom` in MiB, above what the process has already; `max_cpu` in seconds (0: none);
    `max_files` open files; `max_file_size` in MiB (0: none). RLIMIT_RSS does nothing on Linux, and RLIMIT_AS counts address space
    that nobody touches; RLIMIT_DATA makes malloc fail, which Python turns into MemoryError. Python ignores SIGXFSZ, so that a
    write beyond RLIMIT_FSIZE is an OSError in it; a program that it starts has the signal's default, and dies of it.
    `max_processes` is the sampler's: RLIMIT_NPROC counts those of a user, and not for root.

    Raises OSError when the host's own limit is below what the template has already: nothing could run in that.
    """
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


class RunLimits:
    """The limits of one run on a process that will have others: soft ones only, since no hard one could be raised again.

    A run that has used up its `max_cpu` is killed by SIGXCPU, and the process with it. What a limit is already is not set again,
    and no hard one is asked for twice: who lowers it costs the process.
    """

    def __init__(self) -> None:
        self._hard = {which: resource.getrlimit(which)[1] for which in (resource.RLIMIT_DATA, *_SET_ONCE)}
        self._soft: dict[int, int] = {}
        self._applied: tuple[Any, int] = (None, 0)  # what `apply` had last
        self._stand: dict[int, tuple[int, int]] = {}  # and what it said

    def apply(self, limits: Mapping[str, float], data_bytes: int) -> dict[int, tuple[int, int]]:
        """Before a run. `data_bytes`: what RLIMIT_DATA counts now. What stands then, by number: the same dict while that does."""
        if limits is self._applied[0] and data_bytes == self._applied[1] and not limits.get("max_cpu"):
            self._set(resource.RLIMIT_DATA, self._stand[resource.RLIMIT_DATA][0])
            return self._stand
        self._applied = limits, data_bytes
        wanted = {
            resource.RLIMIT_DATA: data_bytes + int((limits["max_memory"] + limits["memory_headroom"]) * MIB),
            resource.RLIMIT_NOFILE: int(limits["max_files"]),
            resource.RLIMIT_FSIZE: int(limits["max_file_size"] * MIB) or resource.RLIM_INFINITY,
            resource.RLIMIT_CPU: _cpu_end(limits["max_cpu"]) if limits.get("max_cpu") else resource.RLIM_INFINITY,
        }
        self._stand = {which: self._set(which, soft) for which, soft in wanted.items()}
        return self._stand

    def lift_memory(self) -> None:
        """The run is over: what is said of it is not to fail for want of memory."""
        self._set(resource.RLIMIT_DATA, resource.RLIM_INFINITY)

    def lift_files(self) -> None:
        self._set(resource.RLIMIT_NOFILE, resource.RLIM_INFINITY)

    def _set(self, which: int, soft: int) -> tuple[int, int]:
        hard = self._hard[which]
        if hard != resource.RLIM_INFINITY and (soft == resource.RLIM_INFINITY or soft > hard):
            soft = hard
        if self._soft.get(which) != soft:
            resource.setrlimit(which, (soft, hard))
            self._soft[which] = soft
        return soft, hard


def _cpu_end(max_cpu_s: float) -> int:
    """The RLIMIT_CPU that is reached `max_cpu_s` from now, in whole seconds, rounded up.

    It goes by the clock ticks that found the process running, not by what getrusage tells: 20 % more on a busy host.
    """
    return ceil(time.clock_gettime(_TICKS_OF_THIS_PROCESS) + max(1.0, max_cpu_s))


_TICKS_OF_THIS_PROCESS: Final = -8  # MAKE_PROCESS_CPUCLOCK(0, CPUCLOCK_PROF), linux/posix-timers_types.h
_SET_ONCE: Final = (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE)  # most jobs agree on them


def statm() -> tuple[int, int]:
    """Bytes of this process that are resident, and those that RLIMIT_DATA counts (proc_pid_statm(5), fields 2 and 6)."""
    fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return parse_statm(os.read(fd, 200))
    finally:
        os.close(fd)


def parse_statm(data: bytes) -> tuple[int, int]:
    fields = data.split()
    return int(fields[1]) * PAGE, int(fields[5]) * PAGE


def flush_c() -> None:
    """What C code has printed and its library still holds."""
    _fflush(None)


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
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d" % OOM_SCORE_ADJ)
        finally:
            os.close(fd)
    except OSError:
        return


def forbid_core_dumps() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
