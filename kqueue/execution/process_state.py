"""What of a process a job may leave changed for the next one that runs in it. For pool processes; the supervisor never loads it.

`ProcessState` remembers how things are and says what is no longer so. It looks after every job of a
pool, and takes some 20 µs: everything is compared as a whole first, and only what differs is asked for its details. What /proc
tells is read through fds that stay open: to open them each time is most of the price.

What Python cannot see is not looked at: C variables, memory, threads that ended; nor are oom_score_adj, the scheduling policy and
prctl(2)'s attributes; nor is what belongs to the application, such as its modules' variables.
"""

from __future__ import annotations

import _locale
import _signal  # type: ignore[import-not-found]  # signal.getsignal makes enums, at ten times the price
import fcntl
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

Changes = list[tuple[str, str]]  # (what of the process, in detail)

_SIGNALS: Final = tuple(sorted(int(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}))
_RLIMITS: Final = {name: number for name, number in vars(resource).items() if name.startswith("RLIMIT_")}
_RLIMITS.pop("RLIMIT_OFILE", None)  # another name of RLIMIT_NOFILE
_RLIMIT_NUMBERS: Final = tuple(_RLIMITS.values())
_TIMERS: Final = {"ITIMER_REAL": 0, "ITIMER_VIRTUAL": 1, "ITIMER_PROF": 2}
_TIMER_NUMBERS: Final = tuple(_TIMERS.values())
_STANDARD: Final = ("stdin", "stdout", "stderr", "the job's socket", "the pipe for its stack", "its tray")
_WITH_FLAGS: Final = range(1, len(_STANDARD))
_MARK: Final = 40  # a real-time signal, and those that follow it
CHILDREN: Final = "its children"
THREAD_PATIENCE_S: Final = 0.2  # the kernel counts a thread a little longer than join() waits


class ProcessState:
    """How this process is now. `changes` compares; `expect_…` tell of what is changed on purpose. OSError: no fd is left."""

    def __init__(self) -> None:
        self._open_fds = _Directory("/proc/self/fd")
        self._own_threads = _Directory("/proc/self/task")
        self._own_limits = os.open("/proc/self/limits", os.O_RDONLY | os.O_CLOEXEC)
        self._can_mark = _mark_standard_fds()
        self._handlers = [*map(_signal.getsignal, _SIGNALS)]
        self._environment = dict(_environment())
        self._expected_rlimits: Mapping[int, tuple[int, int]] = {}
        self._remember_rlimits()
        self._fds = _fd_numbers()
        self._was = self._look()
        self._threads = self._count_threads()

    def expect_environment(self, name: str, value: str) -> None:
        self._environment[os.fsencode(name)] = os.fsencode(value)

    def expect_handler(self, number: int, handler: Any) -> None:
        self._handlers[_SIGNALS.index(number)] = handler

    def expect_rlimits(self, rlimits: Mapping[int, tuple[int, int]]) -> None:
        """These are in force by now, and the others as they were."""
        if rlimits is not self._expected_rlimits:
            self._expected_rlimits = rlimits
            self._remember_rlimits()

    def changes(self) -> Changes:
        """What is not as it was."""
        found: Changes = []
        now = self._look()
        if now != self._was:
            for what, old, new in zip(self._tellers(), self._was, now, strict=True):
                if old != new:
                    found += what(old, new)
        if _environment() != self._environment:
            found += _tell_environment(self._environment, _environment())
        if [*map(_signal.getsignal, _SIGNALS)] != self._handlers:
            found += self._tell_handlers()
        if self._rlimits_as_text() != self._limits_text:
            rows = zip(_RLIMITS, self._rlimits, _rlimits(), strict=True)
            found += [(name, f"{was}, now {is_now}") for name, was, is_now in rows if was != is_now]
        if self._count_threads() != self._threads:
            found += self._tell_threads()
        return found + _tell_children()

    def _look(self) -> tuple[Any, ...]:
        """Everything that is compared as it is, in the order of `_tellers`."""
        return (
            _directory(), _umask(), _signal.pthread_sigmask(signal.SIG_BLOCK, ()), _wakeup_fd(),
            [*map(_signal.getitimer, _TIMER_NUMBERS)], os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0),
            socket.getdefaulttimeout(), sys.getrecursionlimit(), (gc.isenabled(), gc.get_threshold()),
            os.getresuid(), os.getresgid(), _locale.setlocale(_locale.LC_ALL, None), [*sys.path],
            (sys.stdin, sys.stdout, sys.stderr), (sys.gettrace(), sys.getprofile()),
            self._fd_shape(), _flags(), _standard_marks() if self._can_mark else _standard_files(),
        )  # fmt: skip

    def _tellers(self) -> tuple[Callable[[Any, Any], Changes], ...]:
        return (
            _plainly("the working directory"), lambda old, new: [("the umask", f"{old:04o}, now {new:04o}")],
            _plainly("the mask of blocked signals"), _plainly("the wake-up fd of signals"),
            _tell_timers, _plainly("the niceness"), _plainly("the CPUs that it may use"),
            _plainly("the default time-out of sockets"), _plainly("the recursion limit"),
            _plainly("the garbage collector's settings"),
            _plainly("the user or group"), _plainly("the user or group"), _plainly("the locale"),
            lambda old, new: [("sys.path", str([path for path in new if path not in old])[:150])],
            lambda old, new: [("sys.stdin, stdout or stderr", "")], lambda old, new: [("the trace or profile function", "")],
            lambda old, new: _tell_fds(self._fds), _tell_flags, _tell_standard_fds,
        )  # fmt: skip

    def _fd_shape(self) -> Any:
        """How many are open, and the lowest that is free: as long as all stand below that, there is no other set of that shape.

        Linux 6.2 and later tell the first as the size of a directory, at a third of the price of listing it.
        """
        count = self._open_fds.status().st_size
        if not count:
            return _fd_numbers()
        try:
            free = os.dup(0)
        except OSError:  # 0 is closed: so that is it
            return count, 0
        os.close(free)
        return count, free

    def _count_threads(self) -> int:
        """By the kernel's count, as a directory has a link from each that is in it."""
        return self._own_threads.status().st_nlink - 2

    def _remember_rlimits(self) -> None:
        self._rlimits = _rlimits()  # in the order of _RLIMITS
        self._limits_text = self._rlimits_as_text()

    def _rlimits_as_text(self) -> bytes:
        """All of them in one call: to ask for each is three times the price."""
        with suppress(OSError):
            text = os.pread(self._own_limits, 4096, 0)
            if text.startswith(b"Limit"):
                return text
        return repr(_rlimits()).encode()  # the job has closed it, or put something else there

    def _tell_handlers(self) -> Changes:
        pairs = zip(_SIGNALS, self._handlers, strict=True)
        return [(f"the handler of {_name(number)}", "") for number, was in pairs if _signal.getsignal(number) != was]

    def _tell_threads(self) -> Changes:
        deadline: float | None = None
        while (threads := self._count_threads()) != self._threads:
            now = time.monotonic()
            deadline = deadline or now + THREAD_PATIENCE_S
            if now >= deadline or len(sys._current_frames()) > self._threads:
                return [("its threads", f"{threads - self._threads} more")]
            time.sleep(0.001)
        return []


class _Directory:
    """One of /proc, of which only what stat(2) says matters."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._inode = os.fstat(self._fd).st_ino

    def status(self) -> os.stat_result:
        try:
            status = os.fstat(self._fd)
        except OSError:  # the job has closed it
            return os.stat(self._path)
        return status if status.st_ino == self._inode else os.stat(self._path)


def _plainly(what: str) -> Callable[[Any, Any], Changes]:
    return lambda old, new: [(what, f"{old}, now {new}")]


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "(removed)"


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _rlimits() -> list[tuple[int, int]]:
    return [*map(resource.getrlimit, _RLIMIT_NUMBERS)]


def _wakeup_fd() -> int:
    fd: int = _signal.set_wakeup_fd(-1)
    if fd >= 0:
        _signal.set_wakeup_fd(fd)
    return fd


def _environment() -> dict[bytes, bytes]:
    """The dict within os.environ: comparing that itself decodes every value."""
    inner: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
    return inner


def _tell_environment(old: Mapping[bytes, bytes], new: Mapping[bytes, bytes]) -> Changes:
    """Names alone: a value may be a secret."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return [("the environment", b", ".join(names).decode("utf-8", "replace"))]


def _tell_timers(old: Any, new: Any) -> Changes:
    return [("a timer", name) for name, was, now in zip(_TIMERS, old, new, strict=True) if was != now]


def _fd_numbers() -> list[int]:
    return [fd for fd in map(int, os.listdir("/proc/self/fd")) if _file_of(fd) is not None]  # without that of the listing


def _tell_fds(was: list[int]) -> Changes:
    now = _fd_numbers()
    opened = [_link_of(fd) for fd in now if fd not in was]
    closed = [str(fd) for fd in was if fd not in now]
    both = (f"opened: {', '.join(opened)}" if opened else "", f"closed: {', '.join(closed)}" if closed else "")
    return [("its open fds", "; ".join(part for part in both if part))]


def _link_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return str(fd)


def _mark_standard_fds() -> bool:
    """Give each of them a mark that stays with the file that it is, and that no other one has: a fifth of the price of fstat.

    It is the number of the signal that the file would send if somebody had asked for one (fcntl(2), F_SETSIG). False where
    that is not to be had.
    """
    try:
        for fd in range(len(_STANDARD)):
            fcntl.fcntl(fd, fcntl.F_SETSIG, _MARK + fd)
        return _marks() == [_MARK + fd for fd in range(len(_STANDARD))]
    except OSError:
        return False


def _marks() -> list[int]:
    return [fcntl.fcntl(fd, fcntl.F_GETSIG) for fd in range(len(_STANDARD))]


def _standard_marks() -> list[int]:
    """Those of the standard fds; 0: it is closed."""
    try:
        return _marks()
    except OSError:
        return [0 if _file_of(fd) is None else fcntl.fcntl(fd, fcntl.F_GETSIG) for fd in range(len(_STANDARD))]


def _standard_files() -> list[tuple[int, int] | None]:
    return [_file_of(fd) for fd in range(len(_STANDARD))]


def _file_of(fd: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _tell_standard_fds(old: Any, new: Any) -> Changes:
    return [("its open fds", name) for name, was, now in zip(_STANDARD, old, new, strict=True) if was != now]


def _flags() -> list[int]:
    """Of the standard fds, which would be the next job's, such as O_NONBLOCK. stdin is /dev/null, where they do not matter."""
    try:
        return [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in _WITH_FLAGS]
    except OSError:  # one is closed, as others tell
        return [-1 if _file_of(fd) is None else fcntl.fcntl(fd, fcntl.F_GETFL) for fd in _WITH_FLAGS]


def _tell_flags(old: list[int], new: list[int]) -> Changes:
    rows = zip(_STANDARD[1:], old, new, strict=True)
    return [("the flags of its fds", f"{name}: {was:o}, now {now:o}") for name, was, now in rows if was != now and now >= 0]


def _tell_children() -> Changes:
    """Running ones, zombies, and the orphans of any of them: a pool process is their subreaper."""
    try:
        child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    if child is not None:
        return [(CHILDREN, f"pid {child.si_pid} has ended, and nobody has waited for it")]
    with open("/proc/thread-self/children") as file:
        pids = file.read().split()
    return [(CHILDREN, f"pid {', '.join(pids)}")]
