"""Ending a job ends all of it: what it started, and what that started, whatever they did to get away.

Whoever is to be found again must carry something that neither a double fork, nor setsid, nor an exec takes off:

    cgroup     where we may make some (cgroup.py): the kernel kills it as a whole
    tree       below the job; and once its parent died, below the template, which is the subreaper of all of them
    mark       RLIMIT_RSS, which Linux ignores, inherits and shows in /proc/PID/limits: it says whose process, of which job
    environ    KQUEUE_OWNER and KQUEUE_JOB_ID, for what replaced its limits. (Only an exec writes /proc/PID/environ, and a
               process title overwrites it, so of a process that was merely forked it says little.)

Rule 1. A process is signalled by a pidfd that was opened before it was looked at: if its number went to somebody else since,
        the signal is lost, not misdirected.
Rule 2. It is stopped before its children are read, and killed after: what stands still does not fork. Who has many to stop does
        it with real-time priority, where that is permitted, or a fork bomb would have all the processor to outrun it.
Rule 3. Passes are repeated until one finds nothing, among the newest processes too: who forks itself on and is gone is never
        there when a pass over /proc comes by. A zombie is nothing.

The template ends what a job left (`Leftovers`); the supervisor what a dead template left, or a dead supervisor of the same
`state_dir` (`end_marked`). Neither knows what a job is beyond its number.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Collection, Container, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

from ..kernel import sleep
from . import cgroup, procfs

Steps = Generator[Any, Any, Any]
OWNER: Final = "KQUEUE_OWNER"  # in the environment of all that a daemon's jobs execute
JOB_ID: Final = "KQUEUE_JOB_ID"
_SERIALS: Final = 1 << 20  # how many serial numbers a mark tells apart: of jobs that run at once, or have just ended
TEMPLATE_SERIAL: Final = _SERIALS - 1  # the highest, since a hard limit can only be lowered
_OWNERS: Final = 1 << 40
_MARKED: Final = 1 << 61  # beyond any size of memory that somebody could have meant
_PASS_S: Final = (0.002, 0.2)  # first and longest pause between two passes over what is being killed
PATIENCE_S: Final = 5.0  # for killed processes to be gone; one that the kernel holds in a system call takes its time
_LOOKS: Final = 100  # at the newest processes; and how many of them at once
_NEW: Final = 16
_TURN: Final = 64  # processes that are looked at in one turn of the supervisor's loop


# -- marks --------------------------------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    owner: int
    serial: int


def owner_of(identity: str) -> int:
    """The number of the daemon `identity` (see instance.py); without one, a number that no other has."""
    number = 0xCBF29CE484222325  # FNV-1a: hashlib costs the supervisor more than all of this
    for byte in identity.encode() or os.urandom(16):
        number = (number ^ byte) * 0x100000001B3 % (1 << 64)
    return number % _OWNERS


def put_mark(owner: int, serial: int) -> bool:
    """Mark this process, and whatever it will start; whether it is. Where an administrator has set a lower limit, it is not."""
    limit = _MARKED | owner * _SERIALS | (serial if serial == TEMPLATE_SERIAL else mark_serial(serial))
    hard = resource.getrlimit(resource.RLIMIT_RSS)[1]
    is_possible = hard == resource.RLIM_INFINITY or hard >= limit
    if is_possible:
        resource.setrlimit(resource.RLIMIT_RSS, (limit, limit))
    return is_possible


def mark_serial(serial: int) -> int:
    """`serial` as a mark tells it."""
    return serial % TEMPLATE_SERIAL


def mark_of(pid: int) -> Mark | None:
    """What process `pid` is marked with; None: nothing, or it is gone."""
    limit = limit_of(pid, b"Max resident set")
    if limit is None or not limit & _MARKED:
        return None
    return Mark(limit // _SERIALS % _OWNERS, limit % _SERIALS)


def limit_of(pid: int, line: bytes) -> int | None:
    """The soft limit of `pid` in the line of /proc/PID/limits that begins with `line`; None: unlimited, or it is gone."""
    text = _read(f"/proc/{pid}/limits")
    at = text.find(line)
    if at < 0:
        return None
    limit = text[at + 16 : at + 68].split()[0]
    return int(limit) if limit.isdigit() else None


def environ_of(pid: int) -> Mapping[bytes, bytes]:
    """The environment with which `pid` was executed; empty where it cannot be read."""
    return dict(entry.partition(b"=")[::2] for entry in _read(f"/proc/{pid}/environ").split(b"\0"))


# -- the tree -----------------------------------------------------------------------------------------------------------------


class Process(NamedTuple):
    """What /proc/PID/stat says (proc_pid_stat(5))."""

    pid: int
    name: str
    state: str
    ppid: int

    @property
    def is_alive(self) -> bool:
        return self.state not in "ZX"


def look(pid: int) -> Process | None:
    """Process `pid`; None: there is none."""
    stat = _read(f"/proc/{pid}/stat")
    try:
        state, ppid = procfs.stat_fields(stat)[:2]
    except (ProcessLookupError, ValueError):
        return None
    return Process(pid, procfs.stat_name(stat), state.decode(), int(ppid))


def children_of(pid: int) -> list[int]:
    """The children of `pid`, its zombies among them."""
    if not _KERNEL_LISTS_CHILDREN:
        return [other for other in pids() if (process := look(other)) is not None and process.ppid == pid]
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [int(child) for thread in threads for child in _read(f"/proc/{pid}/task/{thread}/children").split()]


class OwnChildren:
    """Those of the process that made this, looked at again and again; a fork of it has to make its own."""

    def __init__(self) -> None:
        self._threads = self._of_the_first = -1
        if _KERNEL_LISTS_CHILDREN:
            with suppress(OSError):
                self._threads = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self._of_the_first = os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY | os.O_CLOEXEC)

    def pids(self) -> list[int]:
        """As `children_of`, with two calls of the kernel instead of eight where there is but one thread."""
        with suppress(OSError):
            if os.fstat(self._threads).st_nlink == _LINKS_OF_ONE:
                listed = os.pread(self._of_the_first, procfs.MAY_BE_MORE, 0)
                if len(listed) < procfs.MAY_BE_MORE:
                    return [*map(int, listed.split())]
        return children_of(os.getpid())


_LINKS_OF_ONE: Final = 3  # of the directory of a process with one thread


def pids() -> Iterator[int]:
    """Every process that /proc shows."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _read(path: str) -> bytes:
    """The file, b"" when it cannot be read: its process is gone, or none of ours to look at."""
    try:
        return procfs.read(path)
    except OSError:
        return b""


_KERNEL_LISTS_CHILDREN: Final = os.path.exists("/proc/thread-self/children")  # CONFIG_PROC_CHILDREN, which most have


# -- killing ------------------------------------------------------------------------------------------------------------------


class Killed(NamedTuple):
    """What one pass did."""

    alive: int  # processes that were, and got a SIGKILL
    beyond_us: list[Process]  # that we may not signal


def kill_trees(roots: Collection[int], parent: int | None = None) -> Killed:
    """SIGKILL `roots` and all their descendants. `parent`: whose children they must be; None: ours."""
    if not roots:
        return Killed(0, [])
    parent = os.getpid() if parent is None else parent
    held: list[int] = []
    beyond_us: list[Process] = []
    waiting = [(pid, parent, -1) for pid in roots]
    with _urgently():
        try:
            while waiting:
                pid, its_parent, parent_pidfd = waiting.pop()
                pidfd = _hold(pid, its_parent, parent_pidfd)
                if pidfd is None:
                    continue
                held.append(pidfd)
                try:
                    _signal(pidfd, signal.SIGSTOP)
                except PermissionError:  # a program that changed its user, such as sudo
                    beyond_us += filter(None, [look(pid)])
                waiting += [(child, pid, pidfd) for child in children_of(pid)]
        except OSError:  # no fd is left: kill those we hold, the next pass has the rest
            pass
        for pidfd in held:
            with suppress(PermissionError):
                _signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
    return Killed(len(held) - len(beyond_us), beyond_us)


@contextmanager
def _urgently() -> Iterator[None]:
    """Ahead of all ordinary processes of the host, where we may; for some milliseconds."""
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


def _hold(pid: int, parent: int, parent_pidfd: int) -> int | None:
    """A pidfd of `pid`, if it lives and is a child of `parent`. OSError when there are no more fds."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    process = look(pid)
    if process is not None and process.is_alive and process.ppid == parent and (parent_pidfd < 0 or _lives(parent_pidfd)):
        return pidfd
    os.close(pidfd)
    return None


def _lives(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _signal(pidfd: int, number: signal.Signals) -> None:
    """PermissionError when it is not ours to signal."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return


# -- in the template ----------------------------------------------------------------------------------------------------------


class Running:
    """A child, as its template knows it."""

    __slots__ = ("cgroup", "id", "mark", "serial")

    def __init__(self, mark: int, place: cgroup.Cgroup | None) -> None:
        self.mark = mark  # that of all its processes; the template's own number
        self.cgroup = place
        self.serial = 0  # by which the supervisor knows it; 0: it has no job yet
        self.id = ""  # of its job


class Leftovers:
    """Ends what jobs that are over have left below this process, their subreaper.

    Every orphan becomes a child of ours. One that carries the mark of a job that still runs is that job's daemon, and is let be
    until it ends. What was here when this was made (the application's imports may have started something) is none of a job's.
    """

    def __init__(self, owner: int, cgroups: bool) -> None:
        self._owner = owner
        self._cgroups = cgroup.Cgroups.of(owner_text(owner)) if cgroups else None
        self._our_own = OwnChildren()
        self._ours = set(self._our_own.pids())
        self._beyond_us: set[int] = set()
        self._known: dict[int, int] = {}  # orphan -> mark of its job; its number is its own until we reap it
        self._marks = 0  # so far
        self._pause_s = 0.0  # until the next pass; 0: nothing is left, as far as we know

    def start(self) -> Running:
        """A child that is about to be forked; `enter` is for its process, `over` for when that has ended."""
        self._marks += 1
        try:
            place = None if self._cgroups is None else self._cgroups.take()
        except OSError:  # no fd or no memory is left: it has its mark
            place = None
        return Running(mark_serial(self._marks), place)

    def enter(self, job: Running) -> None:
        """In the job's process, before its first line: be found, with all that it will start."""
        put_mark(self._owner, job.mark)
        try:
            if job.cgroup is not None:
                job.cgroup.enter()
        except OSError:
            return

    def limit(self, job: Running, limits: Mapping[str, float]) -> None:
        """It is about to be told what to do, within `limits`."""
        try:
            if job.cgroup is not None:
                job.cgroup.limit(limits)
        except OSError:  # there are RLIMIT_DATA and the sampler
            return

    def seen(self, job: Running) -> cgroup.Seen:
        """What the kernel counted of it, whose process has ended."""
        return cgroup.Seen() if job.cgroup is None else job.cgroup.seen()

    def over(self, job: Running) -> None:
        if self._cgroups is not None and job.cgroup is not None:
            self._cgroups.give(job.cgroup)

    @property
    def pause_s(self) -> float | None:
        """When to call `end` again at the latest, in seconds; None: nothing is being ended."""
        return self._pause_s or None

    def reaped(self, pid: int) -> None:
        """A child of ours that is no job is no more."""
        self._ours.discard(pid)
        self._beyond_us.discard(pid)
        self._known.pop(pid, None)

    def end(self, running: Mapping[int, Running]) -> list[Process]:
        """One pass, while the jobs `running` (by pid) run. Returns processes, each once, that this user may not signal."""
        strangers = [pid for pid in self._our_own.pids() if pid not in running and not self._is_left_alone(pid)]
        marks = {job.mark for job in running.values()} if strangers else ()
        killed = kill_trees([pid for pid in strangers if not self._belongs(pid, marks, running)])
        if not self._tidy() or killed.alive:
            self._pause_s = min(2 * self._pause_s, _PASS_S[1]) if self._pause_s else _PASS_S[0]
        else:
            self._pause_s = 0.0
        new = [process for process in killed.beyond_us if process.pid not in self._beyond_us]
        self._beyond_us.update(process.pid for process in new)
        return new

    def end_all(self, running: Iterable[Running], patience_s: float) -> bool:
        """End whatever is below this process, in its last moments; whether that is done."""
        if self._cgroups is not None:
            self._cgroups.kill()
        deadline = time.monotonic() + patience_s
        while still := bool(kill_trees(children_of(os.getpid())).alive or not self._tidy()):
            if time.monotonic() > deadline:
                break
            time.sleep(_PASS_S[0])
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        for job in running:
            self.over(job)
        if self._cgroups is not None:
            self._cgroups.close()
        return not still

    def _tidy(self) -> bool:
        """Whether no cgroup still holds what was killed."""
        return self._cgroups is None or self._cgroups.tidy()

    def _is_left_alone(self, pid: int) -> bool:
        return pid in self._ours or pid in self._beyond_us

    def _belongs(self, pid: int, marks: Container[int], running: Mapping[int, Running]) -> bool:
        """Whether the orphan `pid` is of a job that runs."""
        number = self._known.get(pid)
        if number is None:
            mark = mark_of(pid)
            if mark is None or mark.owner != self._owner:
                return self._may_belong(pid, running)
            number = self._known[pid] = mark.serial
        return number in marks

    def _may_belong(self, pid: int, running: Mapping[int, Running]) -> bool:
        """Of an orphan without our mark. Who got rid of its environment, too, did so to get away."""
        id = environ_of(pid).get(JOB_ID.encode())
        return any(job.id.encode() == id for job in running.values())


# -- in the supervisor --------------------------------------------------------------------------------------------------------


def end_marked(owner: int, living: Container[int] = ()) -> Steps:
    """Kill every process that is `owner`'s, until there is none; returns them: {pid: Process}.

    `living`: templates that are spared with all that is below them. Those that outlive it by PATIENCE_S are in it all the same. A
    turn of the loop for every few processes of the host.
    """
    ended: dict[int, Process] = {}
    deadline = time.monotonic() + PATIENCE_S
    pause_s = _PASS_S[0]
    cgroups = cgroup.of_dead_templates(owner_text(owner), living)
    while True:
        alive = 0
        for path in cgroups:
            found = [process for pid in cgroup.members(path) if (process := look(pid)) is not None and process.is_alive]
            cgroup.kill(path)
            ended.update((process.pid, process) for process in found)
            alive += len(found)
        for number, pid in enumerate(pids()):
            if number % _TURN == _TURN - 1:
                yield
            process = look(pid) if pid != os.getpid() and _is_of(pid, owner) else None
            if process is not None and process.is_alive and not _is_below(process, living):
                alive += kill_trees([pid], process.ppid).alive
                ended.setdefault(pid, process)
        alive += len(hopping := _catch(owner, living))
        ended.update(hopping)
        if not alive or time.monotonic() > deadline:
            break
        yield sleep(pause_s)
        pause_s = min(2 * pause_s, _PASS_S[1])
    for path in cgroups:
        cgroup.remove(path)
    return ended


def _catch(owner: int, living: Container[int]) -> dict[int, Process]:
    """Kill one of `owner`'s that forks itself on and is gone before a pass over /proc comes to it: it is among the newest."""
    last = 0
    with _urgently():
        for _ in range(_LOOKS):
            newest = _newest()
            for pid in range(newest, max(last, newest - _NEW), -1):
                process = look(pid) if _is_of(pid, owner) else None
                if (
                    process is not None
                    and process.is_alive
                    and not _is_below(process, living)
                    and kill_trees([pid], process.ppid).alive
                ):
                    return {pid: process}
            last = newest
    return {}


def _newest() -> int:
    """The number that was given to a process last (proc_loadavg(5))."""
    return int(_read("/proc/loadavg").split()[4])


def _is_below(process: Process | None, living: Container[int]) -> bool:
    while process is not None and process.ppid:
        if process.pid in living:
            return True
        process = look(process.ppid)
    return False


def _is_of(pid: int, owner: int) -> bool:
    mark = mark_of(pid)
    if mark is not None and mark.owner == owner:
        return True
    return environ_of(pid).get(OWNER.encode()) == owner_text(owner).encode()


def owner_text(owner: int) -> str:
    """`owner` as it stands in the environment."""
    return f"{owner:010x}"
